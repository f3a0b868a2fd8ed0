"""Train a small Flax CNN on real handwritten digits with any rule of jaxsgd.

    python examples/digits.py --rule adamw --learning-rate 2e-3 --schedule cosine --epochs 30

The 1,797 images of 8 x 8 pixels ship with scikit-learn. Writes metrics.jsonl (a line a step, then one an
epoch) and loss.png into --out.
"""

from __future__ import annotations

import argparse
import json
import pathlib
import sys
import time
from typing import Any, NoReturn

import jax
import numpy as np
import optax
from flax import nnx
from rich.progress import BarColumn, Progress, TextColumn
from sklearn.datasets import load_digits

import jaxsgd
from jaxsgd.plot import loss_curves, save

SCHEDULES = {
    "constant": lambda rate, steps: rate,
    "cosine": lambda rate, steps: optax.cosine_decay_schedule(rate, steps),
    "linear": lambda rate, steps: optax.linear_schedule(rate, 0.0, steps),
    "warmup_cosine": lambda rate, steps: optax.warmup_cosine_decay_schedule(0.0, rate, max(1, steps // 10), steps),
}


class CNN(nnx.Module):
    """Two convolutions, two dense layers: 8 x 8 x 1 images to 10 logits, about 110,000 parameters."""

    def __init__(self, rngs: nnx.Rngs) -> None:
        self.conv1 = nnx.Conv(1, 32, (3, 3), rngs=rngs)
        self.conv2 = nnx.Conv(32, 64, (3, 3), rngs=rngs)
        self.hidden = nnx.Linear(4 * 4 * 64, 64, rngs=rngs)
        self.head = nnx.Linear(64, 10, rngs=rngs)

    def __call__(self, images: jax.Array) -> jax.Array:
        x = nnx.relu(self.conv1(images))
        x = nnx.max_pool(nnx.relu(self.conv2(x)), (2, 2), (2, 2))
        return self.head(nnx.relu(self.hidden(x.reshape(x.shape[0], -1))))


def load(seed: int = 0) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Images in [0, 1] and labels, split 70 / 10 / 20 at random into train, validation and test."""
    data = load_digits()
    images = (data.images[..., None] / 16.0).astype(np.float32)
    labels = data.target.astype(np.int32)
    order = np.random.default_rng(seed).permutation(len(labels))
    first, second = int(0.7 * len(labels)), int(0.8 * len(labels))
    parts = {"train": order[:first], "validation": order[first:second], "test": order[second:]}
    return {name: (images[index], labels[index]) for name, index in parts.items()}


def loss_fn(model: CNN, batch: dict[str, jax.Array], key: jax.Array) -> tuple[jax.Array, dict[str, jax.Array]]:
    logits = model(batch["image"])
    loss = optax.softmax_cross_entropy_with_integer_labels(logits, batch["label"]).mean()
    return loss, {"accuracy": (logits.argmax(-1) == batch["label"]).mean()}


@nnx.jit
def correct(model: CNN, images: jax.Array, labels: jax.Array) -> jax.Array:
    return (model(images).argmax(-1) == labels).mean()


class Parser(argparse.ArgumentParser):
    """Errors in one line."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: error: {message}\n")


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = Parser(description="Train a Flax CNN on handwritten digits with any rule of jaxsgd.")
    parser.add_argument("--rule", default="adamw", help=f"one of {', '.join(sorted(jaxsgd.RULES))}")
    parser.add_argument("--learning-rate", type=float, help="the peak. Default: the rule's usual rate")
    parser.add_argument("--schedule", choices=sorted(SCHEDULES), help="cosine; constant for schedule-free rules")
    parser.add_argument("--batch-size", default="64", help="1 is stochastic, N a minibatch, 'full' the whole set")
    parser.add_argument("--epochs", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0, help="of weights and order; the split stays the same")
    parser.add_argument("--out", type=pathlib.Path, default=pathlib.Path("runs/digits"))
    return parser.parse_args(argv)


def choose(args: argparse.Namespace, examples: int) -> tuple[int, Any, int]:
    """The batch size, the transformation and the number of steps.

    Raises:
      ValueError: an argument that cannot be used, in one line.
    """
    size = examples if args.batch_size == "full" else int(args.batch_size) if args.batch_size.isdigit() else 0
    if not 1 <= size <= examples:
        raise ValueError(f"--batch-size {args.batch_size}: a number from 1 to {examples} is needed, or 'full'")
    if args.epochs < 1:
        raise ValueError(f"--epochs {args.epochs}: at least 1 is needed")
    rule = jaxsgd.RULES[args.rule]
    rate = (rule.usual_rate or 1e-3) if args.learning_rate is None else args.learning_rate
    rule(rate)  # a schedule would hide a bad rate
    steps = args.epochs * (examples // size)
    # A rule that is evaluated at an average of its iterates needs no decay.
    averages = any(slot.role is not None for slot in rule.slots.values())
    schedule = args.schedule or ("constant" if averages else "cosine")
    return size, rule(SCHEDULES[schedule](rate, steps)), steps


def plan_inputs(argv: list[str]) -> dict[str, Any]:
    """What ``jaxsgd plan examples/digits.py`` plans."""
    args = parse(argv)
    size, tx, _ = choose(args, 1257)
    batch = {"image": jax.ShapeDtypeStruct((size, 8, 8, 1), "float32"), "label": jax.ShapeDtypeStruct((size,), "int32")}
    return {"loss_fn": loss_fn, "params": CNN(nnx.Rngs(args.seed)), "tx": tx, "batch": batch}


def main(argv: list[str] | None = None) -> float:
    """Train, write the files, and return the accuracy on the test set."""
    args = parse(argv)
    data = load()
    images, labels = data["train"]
    try:
        size, tx, steps = choose(args, len(labels))
        args.out.mkdir(parents=True, exist_ok=True)
    except (KeyError, ValueError, OSError) as error:
        print(f"digits: error: {error}", file=sys.stderr)
        sys.exit(2)

    state = jaxsgd.TrainState.create(CNN(nnx.Rngs(args.seed)), tx, key=args.seed)
    step = jaxsgd.make_step(loss_fn, tx)
    rng = np.random.default_rng(args.seed)
    pending, records = [], []
    print(f"{args.rule}, {steps} steps of {size} out of {len(labels)} images")
    columns = (
        TextColumn("epoch {task.fields[epoch]}"), BarColumn(bar_width=16), TextColumn("{task.completed}/{task.total}"),
        TextColumn("loss {task.fields[loss]:.4f} acc {task.fields[accuracy]:.3f}"),
        TextColumn("lr {task.fields[rate]:.1e} {task.fields[speed]:.0f} steps/s"),
    )  # fmt: skip
    begin = time.perf_counter()
    compile_seconds = 0.0
    with Progress(*columns) as progress:
        bar = progress.add_task("", total=steps, epoch=0, loss=np.nan, accuracy=np.nan, rate=np.nan, speed=0.0)
        for epoch in range(1, args.epochs + 1):
            order = rng.permutation(len(labels))
            for first in range(0, len(labels) - size + 1, size):
                index = order[first : first + size]
                state, report = step(state, {"image": images[index], "label": labels[index]})
                pending.append(report)
                if not compile_seconds:
                    jax.block_until_ready(state)
                    compile_seconds = time.perf_counter() - begin
                if len(pending) == 20:
                    records += collect(pending)
                    last, spent = records[-1], time.perf_counter() - begin - compile_seconds
                    progress.update(
                        bar, completed=len(records), epoch=epoch, loss=last["loss"], accuracy=last["accuracy"],
                        rate=last["learning_rate"], speed=len(records) / max(spent, 1e-9),
                    )  # fmt: skip
            records += collect(pending)
            accuracy = float(correct(state.model, *data["validation"]))
            last = records[-1]
            last["validation_accuracy"] = accuracy
            spent = time.perf_counter() - begin - compile_seconds
            progress.update(
                bar, completed=len(records), epoch=epoch, loss=last["loss"], accuracy=last["accuracy"],
                rate=last["learning_rate"], speed=len(records) / max(spent, 1e-9),
            )  # fmt: skip
    train_seconds = time.perf_counter() - begin - compile_seconds

    test = float(correct(state.model, *data["test"]))
    with open(args.out / "metrics.jsonl", "w") as file:
        for record in records:
            file.write(json.dumps(record) + "\n")
        file.write(json.dumps({"test_accuracy": test, "compile_s": compile_seconds, "train_s": train_seconds}) + "\n")
    curves = {f"training loss, {args.rule}": [record["loss"] for record in records]}
    title = f"Digits: {args.rule}, test accuracy {test:.4f}"
    picture = save(loss_curves(curves, title=title, smooth=0.9), args.out / "loss.png")
    print(f"test accuracy {test:.4f}")
    print(f"compile {compile_seconds:.1f} s, train {train_seconds:.1f} s")
    print(f"wrote {picture} and {args.out / 'metrics.jsonl'}")
    return test


def collect(pending: list[dict[str, Any]]) -> list[dict[str, float]]:
    """Fetch the metrics of several steps at once, and empty the list."""
    fetched = [{**r.pop("aux"), **r} for r in jax.device_get(pending)]
    pending.clear()
    return [{name: float(value) for name, value in report.items()} for report in fetched]


if __name__ == "__main__":
    main()
