"""Train a small Flax network on handwritten digits with second-order rules, beside AdamW.

    python examples/second_order.py

Prints a table: the steps and seconds until the test accuracy first reaches 97%, and the accuracy at the end. The 1,797
images of 8 x 8 pixels ship with scikit-learn.
"""

from __future__ import annotations

import argparse
import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from sklearn.datasets import load_digits

from jaxsgd import TrainState, adamw, make_step
from jaxsgd.second_order.rules import gauss_newton, lbfgs, newton_cg, split_loss

GOAL = 0.97
Data = dict[str, tuple[np.ndarray, np.ndarray]]


class MLP(nnx.Module):
    """64 pixels to 10 logits over 64 hidden units: 4,810 parameters."""

    def __init__(self, rngs: nnx.Rngs) -> None:
        self.hidden, self.head = nnx.Linear(64, 64, rngs=rngs), nnx.Linear(64, 10, rngs=rngs)

    def __call__(self, images: jax.Array) -> jax.Array:
        return self.head(nnx.tanh(self.hidden(images)))


def outputs_fn(model: MLP, batch: Any, key: jax.Array) -> jax.Array:
    return model(batch[0])


def cross_entropy(logits: jax.Array, batch: Any) -> jax.Array:
    return optax.softmax_cross_entropy_with_integer_labels(logits, batch[1]).mean()


RUNS = {  # optimizer, size of a batch (None: all images), steps
    "adamw": (lambda: adamw(2e-3), 64, 600),
    "newton_cg": (lambda: newton_cg(damping=0.1, cg_iterations=30), 512, 60),
    "gauss_newton": (lambda: gauss_newton(damping=0.1, cg_iterations=30), 512, 60),
    "lbfgs": (lambda: lbfgs(), None, 100),
}


def load(seed: int) -> Data:
    """Images in [0, 1] and labels, split 80 / 20 at random into train and test."""
    data = load_digits()
    images, labels = (data.data / 16.0).astype(np.float32), data.target.astype(np.int32)
    order = np.random.default_rng(seed).permutation(len(labels))
    train, test = order[: len(labels) * 4 // 5], order[len(labels) * 4 // 5 :]
    return {"train": (images[train], labels[train]), "test": (images[test], labels[test])}


def run(name: str, data: Data, seed: int, shorten: int) -> dict[str, Any]:
    """One training: steps and seconds to the goal, accuracy and loss at the end. Compiling is not counted."""
    make, size, steps = RUNS[name]
    tx, (images, labels) = make(), data["train"]
    step = make_step(split_loss(outputs_fn, cross_entropy), tx)
    size, rng = len(labels) if size is None else size, np.random.default_rng(seed)
    graphdef, _ = nnx.split(MLP(nnx.Rngs(seed)))

    @jax.jit
    def accuracy(params: Any) -> jax.Array:
        logits = nnx.merge(graphdef, params)(jnp.asarray(data["test"][0]))
        return jnp.mean(jnp.argmax(logits, -1) == data["test"][1])

    spare = TrainState.create(MLP(nnx.Rngs(seed)), tx)
    spare, _ = step(spare, (images[:size], labels[:size]))
    accuracy(spare.params).block_until_ready()

    state = TrainState.create(MLP(nnx.Rngs(seed)), tx)
    seconds, reached, scores, report = 0.0, None, [], {}
    for i in range(max(1, steps // shorten)):
        chosen = np.arange(size) if size == len(labels) else rng.choice(len(labels), size, replace=False)
        begin = time.perf_counter()
        state, report = step(state, (images[chosen], labels[chosen]))
        jax.block_until_ready(state)
        seconds += time.perf_counter() - begin
        scores.append(float(accuracy(state.params)))
        if reached is None and scores[-1] >= GOAL:
            reached = (i + 1, seconds)
    return {"steps": len(scores), "seconds": seconds, "reached": reached, "accuracy": scores[-1], "best": max(scores),
            "loss": float(report["loss"])}  # fmt: skip


def main(argv: list[str] | None = None) -> dict[str, dict[str, Any]]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seed", type=int, default=0, help="of the split and of the parameters")
    parser.add_argument("--shorten", type=int, default=1, help="divide the steps by this")
    args = parser.parse_args(argv)
    if args.shorten < 1:
        parser.exit(2, f"--shorten {args.shorten}: at least 1 is needed\n")
    data = load(args.seed)
    rows = {name: run(name, data, args.seed, args.shorten) for name in RUNS}
    print(
        f"{'':<14}{'steps to 97%':>14}{'seconds to 97%':>16}{'steps':>8}{'seconds':>10}{'accuracy %':>12}{'loss':>11}"
    )
    for name, row in rows.items():
        steps, seconds = ("-", "-") if row["reached"] is None else (row["reached"][0], f"{row['reached'][1]:.2f}")
        print(
            f"{name:<14}{steps:>14}{seconds:>16}{row['steps']:>8}{row['seconds']:>10.2f}"
            f"{100 * row['accuracy']:>12.1f}{row['loss']:>11.2e}"
        )
    return rows


if __name__ == "__main__":
    main()
