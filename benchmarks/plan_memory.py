"""Memory by `jaxsgd.plan` beside the measured peak of the step that it plans, for eight programs on the CPU.

    python benchmarks/plan_memory.py [--only scan] [--rounds 3]

Each program runs in a process of its own. The peak is the bytes of the step's arguments plus the growth of the resident
memory during one step: ``VmHWM`` after the step, reset just before it, less ``VmRSS`` before it. The median of three
steps counts, after one step that compiles. On a mesh the process holds all devices, so plan's bytes of one device are
multiplied by their number. The last column leaves out the arguments, which are exact: it compares what plan adds to
them with the growth alone. Linux only.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import json
import os
import statistics
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

import jaxsgd
from jaxsgd.planning.plan import Plan, plan

MIB = 2**20
ROWS, LENGTH, WIDTH, HEADS, LAYERS, VOCABULARY = 16, 256, 512, 8, 4, 512


class Block(nn.Module):
    """Causal attention and a perceptron, each on the layer norm of its input."""

    @nn.compact
    def __call__(self, x: jax.Array, _: None) -> tuple[jax.Array, None]:
        mask = nn.make_causal_mask(jnp.zeros(x.shape[:2]))
        x = x + nn.MultiHeadDotProductAttention(HEADS)(nn.LayerNorm()(x), mask=mask)
        hidden = nn.gelu(nn.Dense(4 * WIDTH)(nn.LayerNorm()(x)))
        return x + nn.Dense(WIDTH)(hidden), None


class Transformer(nn.Module):
    """Token ids ``(rows, length)`` to logits; the blocks are one scan or a Python loop, with or without remat."""

    scan: bool
    remat: bool

    @nn.compact
    def __call__(self, tokens: jax.Array) -> jax.Array:
        x = nn.Embed(VOCABULARY, WIDTH)(tokens)
        block = nn.remat(Block, prevent_cse=not self.scan) if self.remat else Block
        if self.scan:
            stack = nn.scan(block, variable_axes={"params": 0}, split_rngs={"params": True}, length=LAYERS)
            x, _ = stack()(x, None)
        else:
            for _ in range(LAYERS):
                x, _ = block()(x, None)
        return nn.Dense(VOCABULARY)(nn.LayerNorm()(x))


class ConvNet(nnx.Module):
    """Images ``(rows, 64, 64, 3)`` to ten logits, by convolutions with batch norm."""

    def __init__(self, rngs: nnx.Rngs) -> None:
        sizes = (3, 32, 32, 64, 64)
        self.convs = nnx.List([nnx.Conv(a, b, (3, 3), rngs=rngs) for a, b in zip(sizes, sizes[1:], strict=False)])
        self.norms = nnx.List([nnx.BatchNorm(b, rngs=rngs) for b in sizes[1:]])
        self.head = nnx.Linear(sizes[-1], 10, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        for conv, norm in zip(self.convs, self.norms, strict=True):
            x = jax.nn.relu(norm(conv(x)))
        return self.head(x.mean((1, 2)))


def image_loss(model: ConvNet, batch: Any, key: jax.Array) -> jax.Array:
    return optax.softmax_cross_entropy_with_integer_labels(model(batch["x"]), batch["y"]).mean()


@dataclass(frozen=True)
class Case:
    """A program: its model, and what `jaxsgd.plan` and `jaxsgd.make_step` are told."""

    scan: bool = True
    remat: bool = False
    images: bool = False
    devices: int = 1
    settings: dict[str, Any] = field(default_factory=dict)

    def build(self) -> tuple[Callable[..., Any], Any, dict[str, np.ndarray]]:
        """The loss, a function of a key that makes the parameters (or a module), and a batch."""
        if self.images:
            return image_loss, ConvNet(nnx.Rngs(0)), {"x": np.ones((128, 64, 64, 3), "f4"), "y": np.zeros(128, "i4")}
        model = Transformer(self.scan, self.remat)

        def init(key: jax.Array) -> Any:
            return model.init(key, jnp.zeros((1, LENGTH), jnp.int32))["params"]

        def loss_fn(params: Any, batch: Any, key: jax.Array) -> jax.Array:
            logits: Any = model.apply({"params": params}, batch["x"])
            return optax.softmax_cross_entropy_with_integer_labels(logits, batch["y"]).mean()

        tokens = np.zeros((ROWS, LENGTH), np.int32)
        return loss_fn, init, {"x": tokens, "y": tokens}


CASES = {
    "scan": Case(),
    "scan, remat": Case(remat=True),
    "unrolled": Case(scan=False),
    "unrolled, remat": Case(scan=False, remat=True),
    "accumulate=4": Case(settings={"accumulate": 4}),
    "mesh of 8": Case(devices=8),
    "mesh of 8, ZeRO-1": Case(devices=8, settings={"zero1": "data"}),
    "batch norm": Case(images=True),
}


def resident(name: str) -> int:
    """Bytes of the process's resident memory: ``VmRSS`` now, ``VmHWM`` the most since its reset."""
    with open("/proc/self/status") as lines:
        return next(1024 * int(line.split()[1]) for line in lines if line.startswith(name))


def held(tree: Any) -> int:
    """Bytes of all parts of all arrays in this process."""
    leaves = [x for x in jax.tree.leaves(tree) if not jnp.issubdtype(x.dtype, jax.dtypes.prng_key)]
    return sum(shard.data.nbytes for leaf in leaves for shard in leaf.addressable_shards)


def growth(step: Callable[[], Any], rounds: int) -> int:
    """Bytes by which one step raises the resident memory above its level before it: the median, in this process."""
    libc = ctypes.CDLL("libc.so.6")
    rises = []
    for _ in range(rounds + 1):
        gc.collect()
        libc.malloc_trim(0)
        with open("/proc/self/clear_refs", "w") as reset:
            reset.write("5")
        before = resident("VmRSS")
        jax.block_until_ready(step())
        rises.append(resident("VmHWM") - before)
    return int(statistics.median(rises[1:]))


def measure(case: Case, rounds: int) -> dict[str, int]:
    """Bytes of a program by plan and by measurement, on all devices."""
    # M_MMAP_THRESHOLD: a large block is mapped by itself, and goes back to the system when it is freed.
    ctypes.CDLL("libc.so.6").mallopt(-3, 65536)
    loss_fn, model, batch = case.build()
    tx = jaxsgd.adamw(1e-3)
    answer: Plan = plan(loss_fn, model, tx, batch, topology=f"cpu:{case.devices}", **case.settings)
    mesh, zero1 = None, case.settings.get("zero1")
    if case.devices > 1:
        mesh = jax.make_mesh((case.devices,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    state = jaxsgd.TrainState.create(model, tx, mesh=mesh, zero1=zero1)
    step = jaxsgd.make_step(loss_fn, tx, mesh=mesh, accumulate=case.settings.get("accumulate", 1))
    batch = jaxsgd.shard_batch(batch, mesh) if mesh is not None else jax.device_put(batch)

    def once() -> Any:
        nonlocal state
        state, metrics = step(state, batch)
        return state, metrics

    rise = growth(once, rounds)
    arguments = held((state, batch))
    return {"plan": answer.needs * case.devices, "arguments": arguments, "growth": rise} | {
        name: size * case.devices for name, size in answer.parts.items()
    }


def in_a_process(name: str, rounds: int) -> dict[str, int]:
    """`measure` in a process of its own, which has the devices of the program."""
    flags = f"--xla_force_host_platform_device_count={CASES[name].devices}"
    command = [sys.executable, __file__, "--measure", name, "--rounds", str(rounds)]
    environment = os.environ | {"XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu"}
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    if done.returncode:
        raise SystemExit(f"{name}: {done.stderr}")
    return json.loads(done.stdout.splitlines()[-1])


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--only", choices=list(CASES), help="one program")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--measure", choices=list(CASES), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.measure:
        print(json.dumps(measure(CASES[args.measure], args.rounds)))
        return
    print(f"| {'program':<18} | arguments, MiB | growth, MiB | plan, MiB | plan / peak | without arguments |")
    print("|:---|---:|---:|---:|---:|---:|")
    for name in [args.only] if args.only else CASES:
        found = in_a_process(name, args.rounds)
        peak, more = found["arguments"] + found["growth"], found["plan"] - found["arguments"]
        numbers = [f"{found[key] / MIB:,.0f}" for key in ("arguments", "growth", "plan")]
        numbers += [f"{found['plan'] / peak:.3f}", f"{more / found['growth']:.3f}"]
        print(f"| {name:<18} | {' | '.join(numbers)} |", flush=True)


if __name__ == "__main__":
    main()
