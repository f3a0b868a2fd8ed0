"""Moments at eight and four bits beside float32: the time and memory of an update, and final losses of the digits CNN.

    python benchmarks/eight_bit.py [--seeds 5] [--epochs 15] [--millions 64] [--only update|training]

update: one array of so many million parameters. The compiled step from gradients to new parameters
(`jaxsgd.update_params`), parameters and state donated; medians of interleaved runs beside ``optax.adamw`` in float32.
training: every array of 256 numbers or more is packed. The seeds draw weights and batches; a seed is the same for all
storages.
"""

from __future__ import annotations

import argparse
import pathlib
import statistics
import sys
import time
from typing import Any

import jax
import numpy as np
import optax
from flax import nnx
from rich.progress import track

import jaxsgd

sys.path.insert(0, str(pathlib.Path(__file__).parent.parent / "examples"))
from digits import CNN, load, loss_fn  # noqa: E402

STORAGES: dict[str, Any] = {
    "float32": None,
    "int8 octaves": jaxsgd.int8(min_size=256),
    "int8 dynamic": jaxsgd.int8(min_size=256, map="dynamic"),
    "int4": jaxsgd.int4(min_size=256),
}
RULES = {"adamw": 2e-3, "lion": 3e-4, "momentum": 0.05, "rmsprop": 1e-3}
BATCH = 64


def trained(rule: str, storage: Any, seed: int, epochs: int) -> tuple[float, float]:
    """Mean training loss of the last epoch, and the test loss."""
    parts = load(0)
    images, labels = parts["train"]
    tx = jaxsgd.RULES[rule](RULES[rule], storage=storage)
    step = jaxsgd.make_step(loss_fn, tx)
    state = jaxsgd.TrainState.create(CNN(nnx.Rngs(seed)), tx, key=jax.random.key(seed))
    rng, losses = np.random.default_rng(seed), []
    for _ in range(epochs):
        order, losses = rng.permutation(len(images)), []
        for first in range(0, len(order) - BATCH + 1, BATCH):
            index = order[first : first + BATCH]
            state, report = step(state, {"image": images[index], "label": labels[index]})
            losses.append(report["loss"])
    test = loss_fn(state.model, {"image": parts["test"][0], "label": parts["test"][1]}, state.key)[0]
    return float(np.mean(losses)), float(test)


def updates(millions: int, runs: int = 9) -> None:
    """Print a line for each way to keep AdamW's moments."""
    shape = (millions * 1024, 1024)
    grads = jax.random.normal(jax.random.key(0), shape) * 1e-2
    weights = jax.random.normal(jax.random.key(1), shape)
    ways = {"optax float32": optax.adamw(1e-3), "float32": jaxsgd.adamw(1e-3, weight_decay=1e-4)}
    ways["int8"] = jaxsgd.adamw(1e-3, weight_decay=1e-4, storage=jaxsgd.int8())
    ways["int4"] = jaxsgd.adamw(1e-3, weight_decay=1e-4, storage=jaxsgd.int4())
    compiled, compiling, carries = {}, {}, {}
    for name, tx in ways.items():

        def step(carry: Any, grads: Any, tx: Any = tx) -> Any:
            return jaxsgd.update_params(tx, grads, carry[1], carry[0])

        carries[name] = jax.numpy.copy(weights), tx.init(weights)
        lowered = jax.jit(step, donate_argnums=0).lower(carries[name], grads)
        begin = time.perf_counter()
        compiled[name] = lowered.compile()
        compiling[name] = time.perf_counter() - begin
    times: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(runs):
        for name, compiled_step in compiled.items():
            begin = time.perf_counter()
            carries[name] = jax.block_until_ready(compiled_step(carries[name], grads))
            times[name].append(time.perf_counter() - begin)
    print(f"{'update':16}{'ns / param':>12}{'ratio':>8}{'state':>10}{'temps':>10}{'compile':>10}   (bytes a param)")
    first = np.asarray(times["optax float32"][1:])
    for name, compiled_step in compiled.items():
        own, held = np.asarray(times[name][1:]), sum(x.nbytes for x in jax.tree.leaves(carries[name][1]))
        temps = compiled_step.memory_analysis().temp_size_in_bytes
        print(
            f"{name:16}{np.median(own) / weights.size * 1e9:12.2f}{np.median(own / first):8.2f}"
            f"{held / weights.size:10.3f}{temps / weights.size:10.3f}{compiling[name]:9.2f}s"
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--epochs", type=int, default=15)
    parser.add_argument("--millions", type=int, default=64)
    parser.add_argument("--only", choices=("update", "training"))
    options = parser.parse_args()
    if options.only != "training":
        updates(options.millions)
    if options.only == "update":
        return
    print(f"{'rule':10}{'storage':14}{'train loss':>12}{'sd':>10}{'test loss':>12}{'sd':>10}")
    for rule in RULES:
        for name, storage in STORAGES.items():
            runs = track(range(options.seeds), f"{rule}, {name}", transient=True)
            ends = [trained(rule, storage, seed, options.epochs) for seed in runs]
            figures = [f(side) for side in zip(*ends, strict=True) for f in (statistics.mean, statistics.stdev)]
            print(
                f"{rule:10}{name:14}{figures[0]:12.5f}{figures[1]:10.5f}{figures[2]:12.4f}{figures[3]:10.4f}",
                flush=True,
            )


if __name__ == "__main__":
    main()
