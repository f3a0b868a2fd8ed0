"""Training with moments at eight bits beside float32: final losses of the digits CNN over seeds.

    python benchmarks/eight_bit.py [--seeds 5] [--epochs 15]

Every array of 256 numbers or more is packed. The seeds draw weights and batches; a seed is the same for all storages.
"""

from __future__ import annotations

import argparse
import pathlib
import statistics
import sys
from typing import Any

import jax
import numpy as np
from flax import nnx
from rich.progress import track

import jaxsgd

sys.path.insert(0, str(pathlib.Path(__file__).parent.parent / "examples"))
from digits import CNN, load, loss_fn  # noqa: E402

STORAGES: dict[str, Any] = {
    "float32": None,
    "int8 power": jaxsgd.int8(min_size=256),
    "int8 dynamic": jaxsgd.int8(min_size=256, map="dynamic"),
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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--epochs", type=int, default=15)
    options = parser.parse_args()
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
