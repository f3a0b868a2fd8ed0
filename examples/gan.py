"""Train two networks against each other on handwritten digits: one compiled step, two optimizers, one average.

    python examples/gan.py --steps 3000

A generator makes images from noise, a discriminator tells them from real ones (Goodfellow et al. 2014,
arXiv:1406.2661, the non-saturating loss). Each network is the other's constant: its step reads the other's parameters,
and neither trains nor donates them. Samples come from an average of the generator's weights. Writes samples.png into
--out, and says how a classifier that was trained on real digits sees the samples.
"""

from __future__ import annotations

import argparse
import functools
import pathlib
import sys
from typing import Any

import jax
import jax.numpy as jnp
import matplotlib
import numpy as np
import optax
from flax import nnx
from rich.progress import track
from sklearn.datasets import load_digits
from sklearn.linear_model import LogisticRegression

import jaxsgd

matplotlib.use("Agg")
from matplotlib import pyplot as plt  # noqa: E402 - after the choice of backend

NOISE = 16


class Network(nnx.Module):
    """Three dense layers."""

    def __init__(self, sizes: tuple[int, int, int], rngs: nnx.Rngs) -> None:
        into, hidden, out = sizes
        self.first = nnx.Linear(into, hidden, rngs=rngs)
        self.second = nnx.Linear(hidden, hidden, rngs=rngs)
        self.last = nnx.Linear(hidden, out, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        x = nnx.leaky_relu(self.first(x), 0.2)
        return self.last(nnx.leaky_relu(self.second(x), 0.2))


GENERATOR, DISCRIMINATOR = (NOISE, 128, 64), (64, 128, 1)


def images_of(generator: Network, key: jax.Array, count: int) -> jax.Array:
    """Images of 64 pixels from -1 to 1."""
    return nnx.tanh(generator(jax.random.normal(key, (count, NOISE))))


def losses(structures: dict[str, Any]) -> tuple[Any, Any]:
    """The two losses. Each gets the other network's parameters as the step's constants."""

    def generator_loss(generator: Network, real: jax.Array, key: jax.Array, other: Any) -> Any:
        judge = nnx.merge(structures["discriminator"], other)
        said = judge(images_of(generator, key, len(real)))
        return optax.sigmoid_binary_cross_entropy(said, jnp.ones_like(said)).mean()

    def discriminator_loss(judge: Network, real: jax.Array, key: jax.Array, other: Any) -> Any:
        fake = images_of(nnx.merge(structures["generator"], other), key, len(real))
        on_real, on_fake = judge(real), judge(fake)
        loss = optax.sigmoid_binary_cross_entropy(on_real, 0.9 * jnp.ones_like(on_real)).mean()
        loss += optax.sigmoid_binary_cross_entropy(on_fake, jnp.zeros_like(on_fake)).mean()
        return loss, {"right": (jnp.mean(on_real > 0) + jnp.mean(on_fake < 0)) / 2}

    return generator_loss, discriminator_loss


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Train a GAN on handwritten digits.")
    parser.add_argument("--steps", type=int, default=3000)
    parser.add_argument("--batch-size", type=int, default=128)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=pathlib.Path, default=pathlib.Path("runs/gan"))
    args = parser.parse_args(argv)
    for name, value, most in (("--steps", args.steps, None), ("--batch-size", args.batch_size, 1797)):
        if value < 1 or most is not None and value > most:
            parser.error(f"{name} {value}: a number from 1{'' if most is None else f' to {most}'} is needed")
    return args


def main(argv: list[str] | None = None) -> dict[str, float]:
    """Train, write the picture, and return the scores of the samples."""
    args = parse(argv)
    digits = load_digits()
    real = (digits.data / 8.0 - 1.0).astype(np.float32)

    models = {
        "generator": Network(GENERATOR, nnx.Rngs(args.seed)),
        "discriminator": Network(DISCRIMINATOR, nnx.Rngs(1)),
    }
    generator_loss, discriminator_loss = losses({name: nnx.graphdef(model) for name, model in models.items()})
    tx = {
        "generator": optax.chain(jaxsgd.adam(5e-4, b1=0.5), jaxsgd.params_ema(0.995)),
        "discriminator": jaxsgd.adam(5e-4, b1=0.5),
    }
    states = {name: jaxsgd.TrainState.create(models[name], tx[name], key=args.seed) for name in tx}
    generator_step = jaxsgd.make_step(generator_loss, tx["generator"])
    discriminator_step = jaxsgd.make_step(discriminator_loss, tx["discriminator"])

    @functools.partial(jax.jit, donate_argnums=0)
    def step(states: dict[str, Any], batch: jax.Array) -> tuple[dict[str, Any], dict[str, jax.Array]]:
        judge, said = discriminator_step.fn(states["discriminator"], batch, states["generator"].params)
        maker, made = generator_step.fn(states["generator"], batch, judge.params)
        report = {"generator": made["loss"], "discriminator": said["loss"], "right": said["aux"]["right"]}
        return {"generator": maker, "discriminator": judge}, report

    rng, report = np.random.default_rng(args.seed), {}
    for _ in track(range(args.steps), "training"):
        states, report = step(states, real[rng.choice(len(real), args.batch_size, replace=False)])
    print(", ".join(f"{name} {float(value):.3f}" for name, value in report.items()), "(loss, loss, share judged right)")

    made = np.asarray(images_of(states["generator"].model, jax.random.key(1), 1000))
    scores = judged(real, digits.target, made)
    print(", ".join(f"{name} {value:.3f}" for name, value in scores.items()))
    try:
        args.out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        sys.exit(f"gan: error: --out {args.out}: {error}")
    print(f"wrote {picture(made, args.out / 'samples.png')}")
    return scores


def judged(real: np.ndarray, labels: np.ndarray, made: np.ndarray) -> dict[str, float]:
    """How a classifier of real digits sees the samples.

    Returns:
      ``confidence``, its mean largest probability; ``classes``, the number of digits that at least 2% of the samples
      show; ``distance``, the mean distance of a sample to its nearest real image over that of a real one to its own.
    """
    sure = LogisticRegression(max_iter=2000).fit(real, labels).predict_proba(made)
    shares = np.bincount(sure.argmax(1), minlength=10) / len(made)

    def nearest(x: np.ndarray, own: bool) -> float:
        gaps = np.sqrt(np.maximum((x**2).sum(1)[:, None] + (real**2).sum(1) - 2 * x @ real.T, 0))
        return float(np.sort(gaps, axis=1)[:, 1 if own else 0].mean())

    return {
        "confidence": float(sure.max(1).mean()),
        "classes": int((shares >= 0.02).sum()),
        "distance": nearest(made, False) / nearest(real, True),
    }


def picture(made: np.ndarray, path: pathlib.Path) -> pathlib.Path:
    """The first 64 samples in a square, with gaps."""
    framed = np.pad(made[:64].reshape(8, 8, 8, 8), ((0, 0), (0, 0), (1, 1), (1, 1)), constant_values=-1)
    grid = framed.transpose(0, 2, 1, 3).reshape(80, 80)
    figure, axes = plt.subplots(figsize=(5, 5))
    axes.imshow(grid, cmap="gray_r", vmin=-1, vmax=1)
    axes.set_axis_off()
    axes.set_title("Samples of the averaged generator")
    figure.savefig(path, dpi=120)
    plt.close(figure)
    return path


if __name__ == "__main__":
    main()
