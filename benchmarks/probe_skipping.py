"""The rate that `probe` suggests with and without 2% NaN batches, under a guard, for each schedule of optax.

    python benchmarks/probe_skipping.py            a table; the last column is the ratio of the two rates

A small regression with noise, 1,000 steps. Half of the rows use `jaxsgd.guard`, half `optax.apply_if_finite`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

import jaxsgd

STEPS = 1000
CYCLES = [{"init_value": 0.0, "warmup_steps": 20, "decay_steps": n, "end_value": 0.0} for n in (400, 600)]
SCHEDULES: dict[str, Callable[[float], Any]] = {
    "a number": lambda r: r,
    "constant": optax.constant_schedule,
    "linear": lambda r: optax.linear_schedule(r, 0.0, STEPS),
    "polynomial": lambda r: optax.polynomial_schedule(r, 0.0, 2, STEPS),
    "exponential": lambda r: optax.exponential_decay(r, 300, 0.5),
    "cosine": lambda r: optax.cosine_decay_schedule(r, STEPS),
    "piecewise": lambda r: optax.piecewise_constant_schedule(r, {500: 0.3}),
    "interpolated": lambda r: optax.piecewise_interpolate_schedule("cosine", r, {500: 0.5, 900: 0.1}),
    "warmup, constant": lambda r: optax.warmup_constant_schedule(0.0, r, 50),
    "warmup, cosine": lambda r: optax.warmup_cosine_decay_schedule(0.0, r, 50, STEPS),
    "warmup, exponential": lambda r: optax.warmup_exponential_decay_schedule(0.0, r, 50, 300, 0.5),
    "sgdr": lambda r: optax.sgdr_schedule([{**cycle, "peak_value": r} for cycle in CYCLES]),
    "joined": lambda r: optax.join_schedules(
        [optax.linear_schedule(0.0, r, 50), optax.cosine_decay_schedule(r, STEPS - 50)], [50]
    ),
    "one cycle, cosine": lambda r: optax.cosine_onecycle_schedule(STEPS, r),
    "one cycle, linear": lambda r: optax.linear_onecycle_schedule(STEPS, r),
}
GUARDS: list[Callable[[Any], Any]] = [jaxsgd.guard, lambda tx: optax.apply_if_finite(tx, 50)]
GOAL = np.array([1.0, -2.0, 3.0, 0.5])


def batch(share: float, index: int) -> dict[str, np.ndarray]:
    """Sixteen examples; the ``share`` of batches that are bad has NaN inputs."""
    rng = np.random.default_rng([1, index])
    x = rng.normal(size=(16, 4)).astype(np.float32)
    y = (x @ GOAL + 0.3 * rng.normal(size=16)).astype(np.float32)
    bad = np.random.default_rng([2, index]).random() < share
    return {"x": np.full_like(x, np.nan) if bad else x, "y": y}


def loss_fn(params: Any, batch: Any, key: jax.Array) -> jax.Array:
    del key
    return jnp.mean((jnp.tanh(batch["x"] @ params["in"]) @ params["out"] - batch["y"]) ** 2)


def main() -> None:
    params = {"in": 0.5 * jax.random.normal(jax.random.key(1), (4, 8)), "out": jnp.zeros(8)}
    print(f"{'schedule':22}{'guard':>16}{'clean':>12}{'2% NaN':>12}{'ratio':>8}")
    for i, (name, schedule) in enumerate(SCHEDULES.items()):
        guard = GUARDS[i % 2]

        def make(rate: float, guard: Any = guard, schedule: Any = schedule) -> Any:
            return guard(jaxsgd.adam(schedule(rate)))

        found = [
            jaxsgd.probe(loss_fn, params, lambda index, share=share: batch(share, index), make, steps=STEPS)
            for share in (0.0, 0.02)
        ]
        clean, bad = (probe.learning_rate for probe in found)
        ratio = "none" if clean is None or bad is None else f"{bad / clean:.2f}"
        label = "guard" if i % 2 == 0 else "apply_if_finite"
        print(f"{name:22}{label:>16}{clean or 0:>12.3g}{bad or 0:>12.3g}{ratio:>8}", flush=True)


if __name__ == "__main__":
    main()
