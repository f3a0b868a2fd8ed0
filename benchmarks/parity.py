"""Final losses with small state and bf16 weights beside float32: the digits CNN and the character model, by seed.

    python benchmarks/parity.py [--seeds 3] [--epochs 8] [--steps 400]

The seeds draw weights and batches, and are the same for all ways to store. A row gives the mean and the standard
deviation over seeds of the loss at the end: of the last epoch (digits) or the last 50 steps (text). ``difference`` is
the mean difference from float32 by seed, in % of float32's mean; ``within`` says if it is less than the deviation of
float32 over seeds.
"""

from __future__ import annotations

import argparse
import pathlib
import statistics
import sys
from dataclasses import replace
from typing import Any

import jax
import numpy as np
import optax
from flax import nnx

import jaxsgd

sys.path.insert(0, str(pathlib.Path(__file__).parent.parent / "examples"))
from char_model import PRESETS, batch_at, build, corpus  # noqa: E402
from digits import CNN, load, loss_fn  # noqa: E402

WAYS: dict[str, dict[str, Any]] = {
    "float32": {},
    "int8": {"storage": jaxsgd.int8(min_size=256)},
    "int8 dynamic": {"storage": jaxsgd.int8(min_size=256, map="dynamic")},
    "int4": {"storage": jaxsgd.int4(min_size=256)},
    "fp8": {"storage": jaxsgd.fp8(min_size=256)},
    "fp8, squares e4m3": {"storage": jaxsgd.fp8(min_size=256, square="e4m3")},
    "factored": {"storage": {"nu": jaxsgd.factored(min_dim_size=16)}},
    "bf16 weights": {"rounding": "stochastic"},
    "bf16 weights, int8": {"rounding": "stochastic", "storage": jaxsgd.int8(min_size=256)},
}
RULES = {"adamw": 2e-3, "lion": 3e-4}
BATCH = 64


def digits(rule: str, way: str, seed: int, epochs: int) -> float:
    """The mean training loss of the last epoch."""
    images, labels = load(0)["train"]
    tx = jaxsgd.RULES[rule](RULES[rule], **WAYS[way])
    model = CNN(nnx.Rngs(seed))
    if way.startswith("bf16"):
        graphdef, params, rest = nnx.split(model, nnx.Param, ...)
        model = nnx.merge(graphdef, jax.tree.map(lambda x: x.astype("bfloat16"), params), rest)
    step = jaxsgd.make_step(loss_fn, tx)
    state = jaxsgd.TrainState.create(model, tx, key=jax.random.key(seed))
    rng, losses = np.random.default_rng(seed), []
    for _ in range(epochs):
        order, losses = rng.permutation(len(images)), []
        for first in range(0, len(order) - BATCH + 1, BATCH):
            index = order[first : first + BATCH]
            state, report = step(state, {"image": images[index], "label": labels[index]})
            losses.append(report["loss"])
    return float(np.mean(losses))


def text(rule: str, way: str, seed: int, steps: int) -> float:
    """The mean training loss of the last 50 steps, in nats a character."""
    dtype = "bfloat16" if way.startswith("bf16") else "float32"
    config = replace(PRESETS["small"], layers=2, width=64, context=64, param_dtype=dtype)
    built, ids = build(config), corpus().train
    rate = optax.warmup_cosine_decay_schedule(0.0, RULES[rule], steps // 20, steps)
    tx = jaxsgd.RULES[rule](rate, **WAYS[way])
    step = jaxsgd.make_step(built.loss_fn, tx)
    state = jaxsgd.TrainState.create(jax.jit(built.init), tx, key=seed)
    losses = []
    for i in range(steps):
        state, report = step(state, batch_at(i, ids, config, seed))
        losses.append(report["loss"])
    return float(np.mean(losses[-50:]))


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--epochs", type=int, default=8)
    parser.add_argument("--steps", type=int, default=400)
    options = parser.parse_args()
    tasks = {"digits": (digits, options.epochs), "text": (text, options.steps)}
    print(
        "| task | rule | stored | loss | sd | difference (%) | within |\n| --- | --- | --- | ---: | ---: | ---: | --- |"
    )
    for task, (trained, length) in tasks.items():
        for rule in RULES:
            exact: list[float] = []
            for way, settings in WAYS.items():
                if isinstance(settings.get("storage"), dict) and not {*settings["storage"]} <= {
                    *jaxsgd.RULES[rule].slots
                }:
                    continue  # a rule without a second moment
                ends = [trained(rule, way, seed, length) for seed in range(options.seeds)]
                exact = exact or ends
                apart = statistics.mean(a - b for a, b in zip(ends, exact, strict=True))
                within = "yes" if abs(apart) <= statistics.stdev(exact) else "no"
                print(
                    f"| {task} | {rule} | {way} | {statistics.mean(ends):.4f} | {statistics.stdev(ends):.4f} | "
                    f"{100 * apart / statistics.mean(exact):+.1f} | {within} |",
                    flush=True,
                )


if __name__ == "__main__":
    main()
