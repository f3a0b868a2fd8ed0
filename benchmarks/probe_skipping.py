"""The rate that `probe` suggests with and without NaN batches, under a guard.

    python benchmarks/probe_skipping.py               each schedule of optax, on a small regression with noise
    python benchmarks/probe_skipping.py --problems    other models, rules and data, three seeds each
    python benchmarks/probe_skipping.py --problems "digits cnn adamw,wine raw adamw"     tasks by name

Every row has the rate without NaN batches, with 2% and with 6% of them, and the ratios to the first. Half of the rows
use `jaxsgd.guard`, half `optax.apply_if_finite`. The last line has the share of ratios within 1.5, and the worst.
"""

from __future__ import annotations

import argparse
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from learning_rate_tasks import TASKS

import jaxsgd

STEPS = 1000
SHARES = (0.0, 0.02, 0.06)
"""Shares of the batches that are NaN."""
NEAR = 1.5
PROBLEMS = (
    "digits mlp adam",
    "digits tanh momentum",
    "digits cnn adamw",
    "topics transformer adamw",
    "topics bigram sgd",
    "diabetes linear adamw",
    "china noise sgd",
    "digits dropout adamw",
    "wine raw adamw",
    "cancer raw adam",
    "digits batchnorm sgd",
    "iris mlp lion",
    "topics window schedule-free",
)
"""Tasks of learning_rate_tasks.py, all of its design half."""
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


def ratios(label: str, of: Callable[[float], Any]) -> list[float]:
    """The ratios of the rates of ``of(share)``, a probe, to that without NaN batches; prints the row."""
    rates = [of(share).learning_rate for share in SHARES]
    found = [rate / rates[0] if rate and rates[0] else float("inf") for rate in rates[1:]]
    row = "".join(f"{rate or 0:>12.3g}" for rate in rates) + "".join(f"{ratio:>10.2f}" for ratio in found)
    print(f"{label:46}{row}", flush=True)
    return found


def of_schedule(index: int, name: str, share: float) -> jaxsgd.Probe:
    params = {"in": 0.5 * jax.random.normal(jax.random.key(1), (4, 8)), "out": jnp.zeros(8)}

    def make(rate: float) -> Any:
        return GUARDS[index % 2](jaxsgd.adam(SCHEDULES[name](rate)))

    return jaxsgd.probe(loss_fn, params, functools.partial(batch, share), make, steps=STEPS)


def of_task(index: int, name: str, seed: int, share: float) -> jaxsgd.Probe:
    """A bad batch has a factor of NaN, by which the loss is multiplied."""
    task = TASKS[name]()
    at = task.data(seed)

    def spoilt(step: int) -> Any:
        bad = np.random.default_rng([3, seed, step]).random() < share
        return {"batch": at(step), "factor": np.float32(np.nan if bad else 1)}

    def loss(params: Any, batch: Any, key: jax.Array) -> jax.Array:
        return batch["factor"] * task.loss_fn(params, batch["batch"], key)

    def make(rate: float) -> Any:
        return GUARDS[index % 2](task.rule(rate))

    params = task.init(jax.random.key(seed))
    return jaxsgd.probe(loss, params, spoilt, make, steps=task.steps, key=seed)


def main() -> None:
    parser = argparse.ArgumentParser(description="The probe's rates with and without NaN batches.")
    parser.add_argument("--problems", nargs="?", const=",".join(PROBLEMS), help="tasks by name, divided by commas")
    args = parser.parse_args()
    print(f"{'':46}" + "".join(f"{f'{share:.0%} NaN':>12}" for share in SHARES) + f"{'ratio':>10}{'ratio':>10}")
    found: list[float] = []
    if args.problems:
        for i, name in enumerate(args.problems.split(",")):
            for seed in range(3):
                found += ratios(f"{name}, {seed}", functools.partial(of_task, i, name, seed))
    else:
        for i, name in enumerate(SCHEDULES):
            guard = ("guard", "apply_if_finite")[i % 2]
            found += ratios(f"{name}, {guard}", functools.partial(of_schedule, i, name))
    apart = np.exp(np.abs(np.log(found)))
    print(f"within {NEAR}: {int(np.sum(apart <= NEAR))} of {len(apart)}; the worst is {apart.max():.2f}")


if __name__ == "__main__":
    main()
