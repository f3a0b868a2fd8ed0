"""Memory and time of `jaxsgd.make_layer_step` beside `jaxsgd.make_step`: a transformer of 24 scanned layers, AdamW.

    python benchmarks/layer_step.py [--width 512] [--rounds 5]

Both compute each layer a second time in the backward pass. Temporaries are those of `jaxsgd.plan`; for a TPU and a GPU
it needs ``jaxsgd[compilers]``. On the CPU the growth of the resident memory during a step is measured too, in a process
for each step (Linux), and the time of a step as the median of interleaved runs. All bytes are given as a part of the
gradients' bytes.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import os
import statistics
import subprocess
import sys
import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from plan_memory import growth

import jaxsgd
from jaxsgd.planning.targets import available

LAYERS, ROWS, LENGTH, HEADS, VOCABULARY = 24, 2, 32, 8, 512
DEVICES = {"cpu": "cpu", "v5e:1x1": "tpu", "h100:1": "cuda"}


def norm(x: jax.Array) -> jax.Array:
    """Layer norm without parameters."""
    return (x - x.mean(-1, keepdims=True)) * jax.lax.rsqrt(x.var(-1, keepdims=True) + 1e-5)


def before(params: Any, batch: jax.Array, key: jax.Array) -> jax.Array:
    """Embeddings of all tokens but the last."""
    return params["embed"][batch[:, :-1]]


def layer(params: Any, x: jax.Array, key: jax.Array) -> jax.Array:
    """Causal attention and a perceptron."""
    q, k, v = (y.reshape(*y.shape[:2], HEADS, -1) for y in jnp.split(norm(x) @ params["qkv"], 3, axis=-1))
    x = x + jax.nn.dot_product_attention(q, k, v, is_causal=True).reshape(x.shape) @ params["out"]
    return x + jax.nn.gelu(norm(x) @ params["up"]) @ params["down"]


def after(params: Any, x: jax.Array, batch: jax.Array, key: jax.Array) -> jax.Array:
    """Cross entropy of the next token."""
    return optax.softmax_cross_entropy_with_integer_labels(norm(x) @ params["head"], batch[:, 1:]).mean()


def loss_fn(params: Any, batch: jax.Array, key: jax.Array) -> jax.Array:
    """The same as one function, with a checkpoint for each layer."""
    body = jax.checkpoint(lambda x, p: (layer(p, x, key), None), prevent_cse=False)
    return after(params, jax.lax.scan(body, before(params, batch, key), params["layers"])[0], batch, key)


def shapes(width: int) -> dict[str, Any]:
    """The parameters."""
    sizes = {"qkv": (width, 3 * width), "out": (width, width), "up": (width, 4 * width), "down": (4 * width, width)}
    stack = {name: jax.ShapeDtypeStruct((LAYERS, *size), jnp.float32) for name, size in sizes.items()}
    ends = {"embed": (VOCABULARY, width), "head": (width, VOCABULARY)}
    return {"layers": stack} | {name: jax.ShapeDtypeStruct(size, jnp.float32) for name, size in ends.items()}


def steps() -> dict[str, Any]:
    """Both steps, with the optimizer."""
    tx = jaxsgd.adamw(1e-3)
    return {
        "make_step": jaxsgd.make_step(loss_fn, tx),
        "make_layer_step": jaxsgd.make_layer_step(before, layer, after, tx),
    }


def start(width: int) -> tuple[jaxsgd.TrainState, jax.Array]:
    """A state and a batch."""
    rng = np.random.default_rng(0)
    params = jax.tree.map(lambda x: jnp.asarray(rng.normal(size=x.shape) / width**0.5, x.dtype), shapes(width))
    return jaxsgd.TrainState.create(params, jaxsgd.adamw(1e-3)), jnp.asarray(
        rng.integers(0, VOCABULARY, (ROWS, LENGTH + 1))
    )


def temporaries(step: Any, width: int, topology: str) -> int | None:
    """Bytes, as the plan for a device gives them."""
    batch = jax.ShapeDtypeStruct((ROWS, LENGTH + 1), jnp.int32)
    return jaxsgd.plan(step, shapes(width), batch=batch, topology=topology).temporary


def measured(name: str, width: int, rounds: int) -> int:
    """Bytes by which a step raises this process's memory."""
    # M_MMAP_THRESHOLD: a large block is mapped by itself, and goes back to the system when it is freed.
    ctypes.CDLL("libc.so.6").mallopt(-3, 65536)
    step, (state, batch) = steps()[name], start(width)

    def once() -> Any:
        nonlocal state
        state, report = step(state, batch)
        return state, report

    return growth(once, rounds)


def in_a_process(name: str, width: int, rounds: int) -> int:
    """`measured` in a process of its own."""
    command = [sys.executable, __file__, "--measure", name, "--width", str(width), "--rounds", str(rounds)]
    done = subprocess.run(
        command, capture_output=True, text=True, check=False, env=os.environ | {"JAX_PLATFORMS": "cpu"}
    )
    if done.returncode:
        raise SystemExit(f"{name}: {done.stderr}")
    return json.loads(done.stdout.splitlines()[-1])


def compared(width: int, rounds: int) -> tuple[dict[str, float], float]:
    """The median time of each step, and the largest difference of the parameters after all of them."""
    both, states = steps(), {name: start(width) for name in ("make_step", "make_layer_step")}
    times: dict[str, list[float]] = {name: [] for name in both}
    for _ in range(rounds + 1):
        for name, step in both.items():
            begin = time.perf_counter()
            states[name] = jax.block_until_ready(step(*states[name])[0]), states[name][1]
            times[name].append(time.perf_counter() - begin)
    params = [jax.tree.leaves(state.params) for state, _ in states.values()]
    apart = max(float(jnp.abs(a - b).max()) for a, b in zip(*params, strict=True))
    return {name: statistics.median(own[1:]) for name, own in times.items()}, apart


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--width", type=int, default=512)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--measure", choices=["make_step", "make_layer_step"], help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.measure:
        print(json.dumps(measured(args.measure, args.width, args.rounds)))
        return
    gradients = 4 * sum(x.size for x in jax.tree.leaves(shapes(args.width)))
    print(f"gradients: {gradients / 2**20:,.0f} MiB\n")
    print("| bytes | make_step | make_layer_step | fall |\n|:---|---:|---:|---:|")
    rows = {}
    for name, platform in DEVICES.items():
        if available(platform):
            rows[f"temporaries, {name}"] = [temporaries(step, args.width, name) for step in steps().values()]
    rows["growth measured, cpu"] = [in_a_process(name, args.width, args.rounds) for name in steps()]
    for name, (one, two) in rows.items():
        print(f"| {name} | {one / gradients:.3f} | {two / gradients:.3f} | {(one - two) / gradients:.3f} |")
    times, apart = compared(args.width, args.rounds)
    print(f"\ntime of make_layer_step: {times['make_layer_step'] / times['make_step']:.2f} of make_step's")
    print(f"largest difference of a parameter after {args.rounds + 1} steps: {apart:.1e}")


if __name__ == "__main__":
    main()
