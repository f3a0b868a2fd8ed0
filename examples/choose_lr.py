"""Choose the learning rate for a model on real data, and see why.

    python examples/choose_lr.py --rule adamw --steps 400

On the 1,797 handwritten digits that scikit-learn ships: a probe and the range test, a training with the suggestion, a
diagnosis of its curve, the sharpness of the loss and the rates that it allows, the noise of the gradient and the gain
of a larger batch, a sweep to check the suggestion, and with --race a comparison of AdamW and SGD with momentum. The
pictures go to --out.
"""

from __future__ import annotations

import argparse
import pathlib
import sys
from typing import Any, NoReturn

import jax
import numpy as np
import optax
from flax import nnx
from sklearn.datasets import load_digits

import jaxsgd
from jaxsgd import plot


class MLP(nnx.Module):
    """64 pixels to 10 logits by two hidden layers."""

    def __init__(self, rngs: nnx.Rngs, width: int = 64) -> None:
        self.first = nnx.Linear(64, width, rngs=rngs)
        self.second = nnx.Linear(width, width, rngs=rngs)
        self.head = nnx.Linear(width, 10, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.head(nnx.relu(self.second(nnx.relu(self.first(x)))))


def loss_fn(model: MLP, batch: dict[str, jax.Array], key: jax.Array) -> jax.Array:
    return optax.softmax_cross_entropy_with_integer_labels(model(batch["image"]), batch["label"]).mean()


def batches(size: int, epochs: int, seed: int = 0) -> tuple[list[dict[str, np.ndarray]], dict[str, np.ndarray]]:
    """Shuffled minibatches of the training digits, epoch by epoch, and the held-out digits."""
    data = load_digits()
    images = (data.images.reshape(len(data.images), -1) / 16.0).astype(np.float32)
    labels = data.target.astype(np.int32)
    rng = np.random.default_rng(seed)
    order = rng.permutation(len(labels))
    train, test = order[: int(0.8 * len(order))], order[int(0.8 * len(order)) :]
    out = []
    for _ in range(epochs):
        order = rng.permutation(train)  # a new array: slices of one shuffled in place would all become the last order
        out += [order[i : i + size] for i in range(0, len(order) - size + 1, size)]
    pick = lambda index: {"image": images[index], "label": labels[index]}  # noqa: E731
    return [pick(index) for index in out], pick(test)


class Parser(argparse.ArgumentParser):
    """Errors in one line."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: error: {message}\n")


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = Parser(description="Choose the learning rate for a model on handwritten digits, and see why.")
    parser.add_argument("--rule", default="adamw", help="any rule of jaxsgd")
    parser.add_argument(
        "--steps", type=int, default=400, help="of one training, at least 120; the probe costs as many again"
    )
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--race", action="store_true", help="also race AdamW against SGD with momentum")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=pathlib.Path, default=pathlib.Path("runs/choose_lr"))
    args = parser.parse_args(argv)
    if args.steps < 120:
        parser.error(f"--steps {args.steps}: at least 120 are needed, for short runs to say something")
    if not 1 <= args.batch_size <= 1437:
        parser.error(f"--batch-size {args.batch_size}: a number from 1 to 1437 is needed")
    return args


def main(argv: list[str] | None = None) -> float | None:
    """Run it all; returns the rate suggested, or None."""
    args = parse(argv)
    try:
        rule = jaxsgd.RULES[args.rule]
    except KeyError as error:
        print(f"choose_lr: error: {error}", file=sys.stderr)
        sys.exit(2)
    data, held_out = batches(args.batch_size, epochs=3 + args.steps * args.batch_size // 1437, seed=args.seed)
    shown: dict[str, Any] = {}
    model = MLP(nnx.Rngs(args.seed))

    print(f"== Probe: {args.rule}, {len(data[0]['label'])} digits a batch, for {args.steps} steps")
    found = jaxsgd.probe(loss_fn, model, data, rule, steps=args.steps, range_test=True)
    print(found, end="\n\n")
    shown["probe"] = plot.probe(found)
    if found.learning_rate is None:
        write(shown, args.out)
        return None

    print(f"== A training at {found.learning_rate:g}")
    tx = jaxsgd.monitor(rule(found.learning_rate))
    state, step = jaxsgd.TrainState.create(model, tx, key=args.seed), jaxsgd.make_step(loss_fn, tx)
    recorder = jaxsgd.Recorder()
    for batch in data[: args.steps]:
        state, metrics = step(state, batch)
        recorder.add(metrics | jaxsgd.monitor_report(state.opt_state))
    recorder.flush()
    accuracy = float((state.model(held_out["image"]).argmax(-1) == held_out["label"]).mean())
    print(f"accuracy on held-out digits {accuracy:.4f}")
    diagnosis = jaxsgd.diagnose(recorder.records, tx=tx, steps_per_epoch=1437 // args.batch_size)
    print(diagnosis, end="\n\n")
    shown["curve"] = plot.diagnosis(diagnosis, [record["loss"] for record in recorder.records])

    print("== Sharpness at its end, on all the digits of an epoch")
    epoch = data[: 1437 // args.batch_size]
    try:
        sharp = jaxsgd.sharpness(loss_fn, state, epoch, tx=tx, eigenvalues=3)
    except ValueError as error:  # a rule that does not treat each coordinate by itself
        print(error)
        sharp = jaxsgd.sharpness(loss_fn, state, epoch, eigenvalues=3)
    print(sharp, end="\n\n")
    shown["sharpness"] = plot.sharpness(sharp)

    print("== Noise of the gradient there")
    noise = jaxsgd.noise_scale(loss_fn, state, epoch, population=1437)
    print(noise, end="\n\n")
    if noise.known:
        shown["noise"] = plot.noise_scale(noise)

    print("== A sweep around the suggestion, two seeds each")
    rates = found.learning_rate * np.geomspace(1 / 16, 16, 9)

    def build(learning_rate: jax.Array, seed: jax.Array) -> tuple[Any, Any]:
        tx = rule(learning_rate)
        fresh = MLP(nnx.Rngs(jax.random.key(seed)))
        return jaxsgd.make_step(loss_fn, tx), jaxsgd.TrainState.create(fresh, tx)

    swept = jaxsgd.sweep(build, data=data, steps=args.steps, learning_rate=rates, seed=[args.seed, args.seed + 1])
    print(swept)
    shown["sweep"] = plot.sweep(swept)
    means = np.asarray([row["mean"] for row in swept.over_seeds()])
    start = float(np.nanmean(swept.losses[:, 0]))
    share = (start - means[len(rates) // 2]) / (start - means[np.isfinite(means)].min())
    print(f"the suggestion reaches {share:.1%} of the decrease of the best of these\n")

    if args.race:
        print("== AdamW or SGD with momentum?")
        race = jaxsgd.pick(loss_fn, lambda key: MLP(nnx.Rngs(key)), data, steps=args.steps)
        print(race, end="\n\n")
        shown["race"] = plot.pick(race)
    write(shown, args.out)
    return found.learning_rate


def write(figures: dict[str, Any], out: pathlib.Path) -> None:
    for name, figure in figures.items():
        print(f"wrote {plot.save(figure, out / f'{name}.png')}")


if __name__ == "__main__":
    main()
