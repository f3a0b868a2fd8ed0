"""Kill a training process at random moments, many times, and see whether its end differs from an unbroken run's.

    python tests/helpers/kills.py --times 200 --flips 100 --seed 0 --out kills.json

Each process trains a small network with `jaxsgd.checkpoint.Checkpoints` and writes down, on the disk, each step that
it learns to be saved. SIGKILL ends it at a random moment: in turn from its start on, or from its first step on, within
the time that an unbroken run takes from there; the next one goes on. Counted are: ends that are not the unbroken run's
bit for bit (``mismatches``), and starts from a step before one that was reported saved (``lost``). Both must be 0.
"""

from __future__ import annotations

import argparse
import collections
import hashlib
import json
import multiprocessing
import os
import pathlib
import random
import sys
import tempfile
import time
import warnings

STEPS, EVERY, KEEP, BATCH, IMAGES = 60, 3, 2, 32, 256
PHASES = ("starting", "restoring", "in a step", "in after()", "finished")
LIBRARIES = ["jax", "numpy", "optax", "flax.nnx", "orbax.checkpoint", "jaxsgd", "jaxsgd.checkpoint"]


def images():
    """Ten classes of 8 x 8 pixels: ten patterns and noise."""
    import numpy as np

    draw = np.random.default_rng(0)
    labels = draw.integers(0, 10, IMAGES)
    return (draw.normal(size=(10, 64))[labels] + draw.normal(size=(IMAGES, 64))).astype(np.float32), labels


def fresh():
    """The state before the first step, and the step: batch statistics, dropout, momentum, decay and a schedule."""
    import jax
    import jax.numpy as jnp
    import optax
    from flax import nnx

    import jaxsgd

    class Network(nnx.Module):
        def __init__(self, rngs: nnx.Rngs) -> None:
            self.first, self.last = nnx.Linear(64, 64, rngs=rngs), nnx.Linear(64, 10, rngs=rngs)
            self.norm, self.drop = nnx.BatchNorm(64, rngs=rngs), nnx.Dropout(0.1, rngs=rngs)

        def __call__(self, x: jax.Array, key: jax.Array) -> jax.Array:
            hidden = self.drop(nnx.relu(self.norm(self.first(x))))
            return self.last(jnp.where(jax.random.bernoulli(key, 0.9, hidden.shape), hidden, 0))

    def loss(model, batch, key):
        return optax.softmax_cross_entropy_with_integer_labels(model(batch[0], key), batch[1]).mean()

    tx = jaxsgd.adamw(optax.cosine_decay_schedule(1e-2, STEPS), weight_decay=1e-2)
    return jaxsgd.TrainState.create(Network(nnx.Rngs(0)), tx, key=1), jaxsgd.make_step(loss, tx)


def fingerprint(state) -> str:
    """Of every leaf, keys included: name, dtype, shape and bytes."""
    import jax
    import numpy as np

    from jaxsgd.paths import leaf_names

    digest = hashlib.sha256()
    for name, leaf in zip(leaf_names(state), jax.tree.leaves(state), strict=True):
        raw = jax.random.key_data(leaf) if jax.numpy.issubdtype(leaf.dtype, jax.dtypes.prng_key) else leaf
        digest.update(f"{name} {leaf.dtype} {leaf.shape} ".encode() + np.asarray(raw).tobytes())
    return digest.hexdigest()


def write_down(path: pathlib.Path, line: str) -> None:
    with path.open("a") as file:
        file.write(line + "\n")
        file.flush()
        os.fsync(file.fileno())


def train(place: str, cache: str, phase, stop: int = STEPS) -> None:
    """One process: go on from the newest checkpoint, if there is one, to the step ``stop``."""
    import jax
    import numpy as np

    jax.config.update("jax_compilation_cache_dir", cache)
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)
    from jaxsgd.checkpoint import Checkpoints

    warnings.filterwarnings("ignore", ".*the save was cut short; passed over", RuntimeWarning)
    run = pathlib.Path(place)
    inputs, labels = images()
    state, step = fresh()
    position, told = {"epoch": 0, "index": 0}, None
    with Checkpoints(run / "checkpoints", keep=KEEP, every=EVERY) as checkpoints:
        phase.value = 1
        done = 0
        if checkpoints.latest is not None:
            state, position, done, _ = checkpoints.restore(state)
        write_down(run / "resumed", str(done))
        for done in range(done + 1, stop + 1):  # noqa: B020
            phase.value = 2
            order = np.random.default_rng(position["epoch"]).permutation(IMAGES)
            chosen = order[position["index"] : position["index"] + BATCH]
            state, _ = step(state, (inputs[chosen], labels[chosen]))
            position["index"] += BATCH
            if position["index"] == IMAGES:
                position = {"epoch": position["epoch"] + 1, "index": 0}
            phase.value = 3
            checkpoints.after(done, state, data=position)
            if checkpoints.latest != told:
                told = checkpoints.latest
                write_down(run / "reported", str(told))
    if stop == STEPS:
        write_down(run / "end", fingerprint(state))
    phase.value = 4


def lines(path: pathlib.Path) -> list[str]:
    return path.read_text().splitlines() if path.exists() else []


def unfinished(run: pathlib.Path) -> set[int]:
    """The inodes of checkpoints that are not complete."""
    paths = [path for path in (run / "checkpoints").glob("*") if path.is_dir() and path.name != "replaced"]
    return {path.stat().st_ino for path in paths if not (path / "jaxsgd-manifest").exists()}


class Killer:
    """Runs, in ``folder``, until as many kills are counted as were asked for and the last run is at its end."""

    def __init__(self, folder: pathlib.Path, seed: int) -> None:
        self.context = multiprocessing.get_context("forkserver")
        self.context.set_forkserver_preload(LIBRARIES)
        self.folder, self.draw = folder, random.Random(seed)
        self.counts = dict.fromkeys(("kills", "resumed", "runs", "mismatches", "lost", "failed", "save_in_flight"), 0)
        self.phases: collections.Counter[str] = collections.Counter()

    def process(self, run: pathlib.Path, stop: int = STEPS):
        run.mkdir(exist_ok=True)
        phase = self.context.RawValue("i", 0)
        return self.context.Process(target=train, args=(str(run), str(self.folder / "cache"), phase, stop)), phase

    def unbroken(self) -> tuple[str, float, float]:
        """The end of an unbroken run, and the seconds it takes once its programs are compiled: all, and to train."""
        start = first = now = 0.0
        for name, stops in {"warm": (STEPS // 2, STEPS), "unbroken": (STEPS,)}.items():
            for stop in stops:
                start = time.perf_counter()
                process, phase = self.process(self.folder / name, stop)
                process.start()
                self.await_training(process, phase)
                first = time.perf_counter()
                process.join()
                if process.exitcode != 0:
                    raise RuntimeError(f"the unbroken run ended with {process.exitcode}")
                now = time.perf_counter()
        ends = {lines(self.folder / name / "end")[0] for name in ("warm", "unbroken")}
        if len(ends) > 1:
            raise RuntimeError("two runs without a kill have different ends")
        return ends.pop(), now - start, now - first

    @staticmethod
    def await_training(process, phase) -> None:
        while process.exitcode is None and phase.value < 2:
            time.sleep(0.002)

    def kill(self, times: int) -> dict:
        end, whole, training = self.unbroken()
        start = time.perf_counter()
        while self.counts["kills"] < times:
            run = self.folder / f"run{self.counts['runs']}"
            self.counts["runs"] += 1
            while not (run / "end").exists():
                self.one(run, whole, training, times)
            self.counts["mismatches"] += lines(run / "end") != [end]
        took = time.perf_counter() - start
        return {
            **self.counts,
            "phases": dict(self.phases),
            "seconds": round(took, 1),
            "unbroken_seconds": round(whole, 2),
        }

    def one(self, run: pathlib.Path, whole: float, training: float, times: int) -> None:
        """One process of a run, killed unless it ends first or enough are."""
        process, phase = self.process(run)
        reported, starts = lines(run / "reported"), len(lines(run / "resumed"))
        before = unfinished(run)
        process.start()
        late = self.counts["kills"] % 2 == 1
        if late:
            self.await_training(process, phase)
        limit = self.draw.uniform(0, training if late else whole)
        process.join(None if self.counts["kills"] == times else limit)
        if process.exitcode is None:
            process.kill()
            process.join()
        if process.exitcode == -9:
            self.counts["kills"] += 1
            self.phases[PHASES[phase.value]] += 1
            self.counts["save_in_flight"] += bool(unfinished(run) - before)
        elif process.exitcode != 0:
            self.counts["failed"] += 1
            write_down(run / "end", f"exit code {process.exitcode}")
        for resumed in lines(run / "resumed")[starts:]:
            self.counts["resumed"] += resumed != "0"
            self.counts["lost"] += int(resumed) < int(reported[-1] if reported else 0)


def flip(directory: pathlib.Path, like, times: int, seed: int) -> dict:
    """Flip one random bit of a random file of the newest checkpoint, again and again: how many are noticed?"""
    from jaxsgd.checkpoint import Checkpoints

    checkpoints = Checkpoints(directory)
    draw, step = random.Random(seed), checkpoints.latest
    files = sorted(path for path in (directory / str(step)).rglob("*") if path.is_file())
    seen, start = 0, time.perf_counter()
    for each in range(times):
        file = files[each % len(files)]
        was = file.read_bytes()
        now = bytearray(was)
        bit = draw.randrange(8 * len(was))
        now[bit // 8] ^= 1 << bit % 8
        file.write_bytes(now)
        try:
            checkpoints.restore(like, step=step)
        except ValueError as error:
            seen += str(file.relative_to(directory / str(step))) in str(error)
        file.write_bytes(was)
    checkpoints.restore(like, step=step)  # and nothing else was wrong with it
    return {"flips": times, "detected": seen, "files": len(files), "seconds": round(time.perf_counter() - start, 1)}


def main(times: int, flips: int, seed: int) -> dict:
    """All counts, as they are recorded."""
    with tempfile.TemporaryDirectory() as folder:
        killer = Killer(pathlib.Path(folder), seed)
        report = {"seed": seed, "steps": STEPS, "every": EVERY, "keep": KEEP, **killer.kill(times)}
        report["bit_flips"] = flip(killer.folder / "unbroken" / "checkpoints", fresh()[0], flips, seed)
    return report


if __name__ == "__main__":
    os.environ.setdefault("JAX_PLATFORMS", "cpu")
    parser = argparse.ArgumentParser(description="Kill a training process at random moments, many times.")
    parser.add_argument("--times", type=int, default=200, help="processes to kill")
    parser.add_argument("--flips", type=int, default=100, help="bits to flip")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=pathlib.Path, help="where to write the counts as JSON")
    given = parser.parse_args()
    counts = main(given.times, given.flips, given.seed)
    print(json.dumps(counts, indent=2))
    if given.out:
        given.out.write_text(json.dumps(counts, indent=2) + "\n")
    flips_missed = counts["bit_flips"]["flips"] - counts["bit_flips"]["detected"]
    sys.exit(bool(counts["mismatches"] or counts["lost"] or counts["failed"] or flips_missed))
