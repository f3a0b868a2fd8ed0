"""Whole runs, from the first call to the last loss, beside optax and, if it is installed, torch.

    python benchmarks/jobs.py [--steps 600] [--rounds 5]

All train one perceptron on the same batches of handwritten digits with AdamW, from the same weights, in float32. Each
run compiles again and ends with the loss of the last batch on the host. The loop of optax is that of its own
documentation: `jax.value_and_grad` and `tx.update` under one `jax.jit`. Runs are interleaved in one process. A ratio is
the median over the rounds of jaxsgd's time divided by the other's, so above 1 jaxsgd is slower.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import statistics
import time
from collections.abc import Callable
from typing import Any

os.environ.setdefault("JAX_PLATFORMS", "cpu")

import jax
import jax.numpy as jnp
import numpy as np
import optax
from sklearn.datasets import load_digits

import jaxsgd

RATE, DECAY = 1e-3, 0.01
Job = Callable[[], float]
"""Trains, and returns the last loss."""


def weights(width: int) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    sizes = [(64, width), (width, width), (width, 10)]
    out = {}
    for i, (inward, outward) in enumerate(sizes, 1):
        out[f"w{i}"] = (rng.normal(size=(inward, outward)) * inward**-0.5).astype(np.float32)
        out[f"b{i}"] = np.zeros(outward, np.float32)
    return out


def batches(steps: int, size: int = 64) -> list[dict[str, np.ndarray]]:
    data = load_digits()
    images, labels = (data.data / 16).astype(np.float32), data.target.astype(np.int32)
    rng = np.random.default_rng(1)
    return [{"x": images[i], "y": labels[i]} for i in (rng.integers(0, len(labels), size) for _ in range(steps))]


def loss_fn(params: Any, batch: Any, key: Any = None) -> jax.Array:
    x = batch["x"]
    for i in (1, 2):
        x = jnp.tanh(x @ params[f"w{i}"] + params[f"b{i}"])
    return optax.softmax_cross_entropy_with_integer_labels(x @ params["w3"] + params["b3"], batch["y"]).mean()


def with_jaxsgd(start: dict[str, np.ndarray], data: list[Any]) -> float:
    tx = jaxsgd.adamw(RATE, weight_decay=DECAY)
    state, step = jaxsgd.TrainState.create(start, tx), jaxsgd.make_step(loss_fn, tx)
    for batch in data:
        state, metrics = step(state, batch)
    return float(metrics["loss"])


def with_optax(start: dict[str, np.ndarray], data: list[Any]) -> float:
    return optax_loop(optax.adamw(RATE, weight_decay=DECAY), start, data)


def with_our_rule(start: dict[str, np.ndarray], data: list[Any]) -> float:
    return optax_loop(jaxsgd.adamw(RATE, weight_decay=DECAY), start, data)


def optax_loop(tx: optax.GradientTransformation, start: dict[str, np.ndarray], data: list[Any]) -> float:
    @jax.jit
    def step(params: Any, state: Any, batch: Any) -> tuple[Any, Any, jax.Array]:
        loss, grads = jax.value_and_grad(loss_fn)(params, batch)
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state, loss

    params: Any = jax.tree.map(jnp.asarray, start)
    state = tx.init(params)
    for batch in data:
        params, state, loss = step(params, state, batch)
    return float(loss)


def with_torch(start: dict[str, np.ndarray], data: list[Any]) -> float:
    import torch

    params = {name: torch.tensor(value, requires_grad=True) for name, value in start.items()}
    optimizer = torch.optim.AdamW(params.values(), lr=RATE, weight_decay=DECAY)
    for batch in data:
        x = torch.as_tensor(batch["x"])
        for i in (1, 2):
            x = torch.tanh(x @ params[f"w{i}"] + params[f"b{i}"])
        labels = torch.as_tensor(batch["y"]).long()
        loss = torch.nn.functional.cross_entropy(x @ params["w3"] + params["b3"], labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return float(loss.detach())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=600)
    parser.add_argument("--rounds", type=int, default=5)
    args = parser.parse_args()
    jax.config.update("jax_enable_compilation_cache", False)
    jobs = {"jaxsgd": with_jaxsgd, "jaxsgd's rule in optax's loop": with_our_rule, "optax": with_optax}
    if importlib.util.find_spec("torch"):
        jobs["torch"] = with_torch
    print(f"AdamW, {args.steps} steps of 64 digits, {args.rounds} interleaved runs, compile included")
    print(f"{'width':>5s}  {'loop':30s} {'seconds':>8s} {'ratio':>6s} {'last loss':>10s}")
    for width in (64, 512):
        start, data = weights(width), batches(args.steps)
        seconds: dict[str, list[float]] = {name: [] for name in jobs}
        losses: dict[str, float] = {}
        for _ in range(args.rounds):
            for name, job in jobs.items():
                jax.clear_caches()
                begin = time.perf_counter()
                losses[name] = job(start, data)
                seconds[name].append(time.perf_counter() - begin)
        for name, times in seconds.items():
            ratio = statistics.median(a / b for a, b in zip(seconds["jaxsgd"], times, strict=True))
            print(
                f"{width:5d}  {name:30s} {statistics.median(times):8.3f} {ratio:6.2f} {losses[name]:10.5f}", flush=True
            )


if __name__ == "__main__":
    main()
