"""One training in several processes: a Flax MLP on handwritten digits, data parallel with ZeRO-1.

On this machine, by one command: two processes of two CPU devices each, joined over loopback:

    python examples/multihost.py --processes 2 --devices 2

The same script on a TPU pod slice (run it on every host) and on SLURM nodes with GPUs, where jax.distributed finds
the other processes by itself:

    gcloud compute tpus tpu-vm ssh NAME --worker=all --command="python examples/multihost.py --cluster"
    srun --nodes=2 --ntasks-per-node=8 --gpus-per-task=1 python examples/multihost.py --cluster

Elsewhere name the first process, from each of them:

    python examples/multihost.py --coordinator HOST:PORT --processes 2 --process 0

Each process loads only its own rows of a batch. With --checkpoint all write to one directory that all can see; a run
that lost a process is started again with the same command and goes on from there.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import pathlib
import signal
import socket
import subprocess
import sys
import time

import jax
import numpy as np
import optax
from flax import nnx
from jax.sharding import Mesh
from sklearn.datasets import load_digits

import jaxsgd
from jaxsgd.checkpoint import Checkpoints


class MLP(nnx.Module):
    """Two dense layers: 64 pixels to 10 logits."""

    def __init__(self, rngs: nnx.Rngs) -> None:
        self.hidden = nnx.Linear(64, 128, rngs=rngs)
        self.head = nnx.Linear(128, 10, rngs=rngs)

    def __call__(self, images: jax.Array) -> jax.Array:
        return self.head(nnx.relu(self.hidden(images)))


def loss_fn(model: MLP, batch: dict[str, jax.Array], key: jax.Array) -> tuple[jax.Array, dict[str, jax.Array]]:
    logits = model(batch["image"])
    loss = optax.softmax_cross_entropy_with_integer_labels(logits, batch["label"]).mean()
    return loss, {"accuracy": (logits.argmax(-1) == batch["label"]).mean()}


def my_rows(size: int, step: int, seed: int, examples: int) -> np.ndarray:
    """Which examples this process loads for a step: its part of a batch that all processes draw alike."""
    rows = np.random.default_rng((seed, step)).choice(examples, size, replace=False)
    mine = size // jax.process_count()
    return rows[jax.process_index() * mine : (jax.process_index() + 1) * mine]


def train(args: argparse.Namespace) -> None:
    """The part of one process."""
    mesh = Mesh(jax.devices(), ("data",))
    if args.batch_size % jax.device_count():
        raise SystemExit(f"--batch-size {args.batch_size}: a multiple of the {jax.device_count()} devices is needed")
    digits = load_digits()
    images, labels = (digits.data / 16).astype(np.float32), digits.target.astype(np.int32)

    tx = jaxsgd.guard(optax.chain(jaxsgd.clip_by_global_norm(1.0), jaxsgd.adamw(args.learning_rate)))
    make = lambda key: MLP(nnx.Rngs(key))  # noqa: E731
    state = jaxsgd.TrainState.create(make, tx, key=args.seed, mesh=mesh, zero1="data")
    report = jaxsgd.assert_sharded(state, zero1="data")
    step = jaxsgd.make_step(loss_fn, tx, mesh=mesh)
    recorder = jaxsgd.Recorder(every=10)
    chief = jax.process_index() == 0
    if chief:
        print(
            f"{jax.process_count()} processes, {jax.device_count()} devices; optimizer state: "
            f"{report.bytes_per_device:,} of {report.bytes_in_all:,} bytes on each",
            flush=True,
        )
    first, checkpoints = 0, None
    with contextlib.ExitStack() as stack:
        if args.checkpoint is not None:
            checkpoints = stack.enter_context(Checkpoints(args.checkpoint, every=args.checkpoint_every))
            if checkpoints.latest is not None:
                state, first, _, _ = checkpoints.restore(state)
                if chief:
                    print(f"goes on after step {first}", flush=True)
        for i in range(first, args.steps):
            rows = my_rows(args.batch_size, i, args.seed, len(labels))
            state, metrics = step(state, {"image": images[rows], "label": labels[rows]})
            for record in recorder.add(metrics):
                if chief and record["step"] % 10 == 0:
                    print(f"step {record['step']} loss {record['loss']:.4f} acc {record['accuracy']:.3f}", flush=True)
            if checkpoints is not None:
                checkpoints.after(i + 1, state, data=i + 1)
            if args.pause:
                time.sleep(args.pause)
    if args.out is not None and chief:
        leaves = jaxsgd.paths.named_leaves(state.params, "params")
        np.savez(args.out, **{name: np.asarray(x) for name, x in leaves.items()})
        print(f"wrote {args.out}", flush=True)


def launch(processes: int) -> int:
    """Start the processes on this machine; when one fails, end the others and say which it was."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, *sys.argv, "--coordinator", f"127.0.0.1:{port}"]
    running = [subprocess.Popen([*command, "--process", str(i)]) for i in range(processes)]
    print("processes", *(child.pid for child in running), flush=True)
    try:
        while any(child.poll() is None for child in running):
            bad = [(i, child.returncode) for i, child in enumerate(running) if child.poll() not in (None, 0)]
            if bad:
                index, code = bad[0]
                how = f"was ended by {signal.Signals(-code).name}" if code < 0 else f"failed with status {code}"
                print(f"multihost: process {index} {how}; the others are stopped. Start again to go on from the "
                      "last checkpoint.", file=sys.stderr)  # fmt: skip
                return 1
            time.sleep(0.05)
        return max(abs(child.returncode) for child in running)
    finally:
        for child in running:
            child.kill()
            child.wait()


def main() -> None:
    parser = argparse.ArgumentParser(description="Train a Flax MLP on digits in several processes.")
    parser.add_argument("--processes", type=int, default=2, help="how many; without --process they are started here")
    parser.add_argument("--devices", type=int, help="CPU devices of each process; otherwise the accelerators there are")
    parser.add_argument("--cluster", action="store_true", help="one of a TPU pod's or SLURM's processes")
    parser.add_argument("--coordinator", help="HOST:PORT of process 0, for a process started by hand")
    parser.add_argument("--process", type=int, help="which of them this is")
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--batch-size", type=int, default=64, help="of all processes together")
    parser.add_argument("--learning-rate", type=float, default=3e-3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--checkpoint", type=pathlib.Path, help="a directory that all processes see")
    parser.add_argument("--checkpoint-every", type=int, default=20)
    parser.add_argument("--pause", type=float, default=0.0, help="seconds to wait after each step")
    parser.add_argument("--out", type=pathlib.Path, help="a file.npz for the trained parameters")
    args = parser.parse_args()
    if args.process is not None and args.coordinator is None:
        parser.error("--process needs --coordinator")
    if not args.cluster and args.process is None and args.processes > 1:
        sys.exit(launch(args.processes))
    if args.devices is not None:
        os.environ["JAX_PLATFORMS"] = "cpu"
        jax.config.update("jax_platforms", "cpu")
        jax.config.update("jax_num_cpu_devices", args.devices)
    if args.cluster:
        jax.distributed.initialize()
    elif args.processes > 1:
        jax.distributed.initialize(
            args.coordinator, args.processes, args.process, initialization_timeout=60, heartbeat_timeout_seconds=10,
            shutdown_timeout_seconds=30,
        )  # fmt: skip
    train(args)


if __name__ == "__main__":
    main()
