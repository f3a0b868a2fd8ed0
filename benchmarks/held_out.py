"""More problems of least squares: fits of made data from seven starts, which did not serve to choose its tries.

`first` has 20 models of one variable. It showed false successes, for which the check of ends was written. `second` has
22 more: sums with offsets, networks, shapes, positions, epidemics. It was run after that check was done.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from problems import Problem, Residual, squares

__all__ = ["first", "second"]

Model = tuple[Callable[[jax.Array], jax.Array], list[float]]
"""``(predictions of the parameters, true parameters)``."""

T = np.linspace(0.1, 10, 60)

FIRST: dict[str, Model] = {
    "exp2": (lambda p: p[0] * jnp.exp(-p[1] * T) + p[2] * jnp.exp(-p[3] * T), [3, 0.3, 2, 2]),
    "gauss": (lambda p: p[0] * jnp.exp(-(((T - p[1]) / p[2]) ** 2)) + p[3], [2, 5, 1, 0.5]),
    "gauss2": (
        lambda p: p[0] * jnp.exp(-(((T - p[1]) / p[2]) ** 2)) + p[3] * jnp.exp(-(((T - p[4]) / p[5]) ** 2)),
        [2, 3, 1, 1, 7, 0.8],
    ),
    "logistic": (lambda p: p[0] / (1 + jnp.exp(-p[1] * (T - p[2]))), [4, 1.5, 5]),
    "menten": (lambda p: p[0] * T / (p[1] + T), [5, 2]),
    "hill": (lambda p: p[0] * T ** p[2] / (p[1] ** p[2] + T ** p[2]), [5, 3, 2]),
    "damped": (lambda p: p[0] * jnp.exp(-p[1] * T) * jnp.cos(p[2] * T + p[3]), [2, 0.2, 2, 0.5]),
    "rational": (lambda p: (p[0] + p[1] * T) / (1 + p[2] * T + p[3] * T**2), [1, 2, 0.5, 0.1]),
    "power": (lambda p: p[0] * T ** p[1] + p[2], [2, 0.7, 1]),
    "gompertz": (lambda p: p[0] * jnp.exp(-p[1] * jnp.exp(-p[2] * T)), [5, 4, 0.8]),
    "weibull": (lambda p: p[0] - p[1] * jnp.exp(-p[2] * T ** p[3]), [5, 4, 0.1, 2]),
    "sine": (lambda p: p[0] * jnp.sin(p[1] * T) + p[2], [2, 1.5, 0.3]),
    "arrhenius": (lambda p: p[0] * jnp.exp(-p[1] / (T + p[2])), [5, 6, 1]),
    "lorentz": (lambda p: p[0] / (1 + ((T - p[1]) / p[2]) ** 2) + p[3] * T, [3, 4, 0.7, 0.1]),
    "chirp": (lambda p: p[0] * jnp.sin(p[1] * T + p[2] * T**2), [1, 0.5, 0.2]),
    "softplus": (lambda p: p[0] * jnp.logaddexp(0.0, p[1] * (T - p[2])), [1, 2, 4]),
    "tanhs": (lambda p: p[0] * jnp.tanh(p[1] * T) + p[2] * jnp.tanh(p[3] * T), [2, 0.3, 1, 3]),
    "logs": (lambda p: p[0] * jnp.log(jnp.abs(p[1] + T) + 1e-3) + p[2] * T, [2, 1, 0.3]),
    "step": (lambda p: p[0] + p[1] * jnp.arctan(p[2] * (T - p[3])), [1, 2, 3, 4]),
    "dose": (lambda p: p[3] + (p[0] - p[3]) / (1 + (T / p[1]) ** p[2]), [5, 3, 3, 1]),
}

CENTRED = np.linspace(-2, 2, 50)
NEAR = np.linspace(0.8, 6, 50)
WARM = np.linspace(20.0, 100, 40)
DECADES = np.geomspace(0.01, 100, 40)
ARC = np.linspace(0.3, 2.5, 30)
AROUND = np.linspace(0.0, 2 * np.pi, 40, endpoint=False)
GRID = np.stack(np.meshgrid(np.linspace(0, 5, 9), np.linspace(0, 5, 9))).reshape(2, -1)
SHAPE = np.array([[0.0, 2, 3, 1.5, -1, 0.5], [0, 0.5, 2, 3, 2, 1]])
BEACONS = np.array([[0.0, 10, 10, 0, 5], [0, 0, 8, 8, 12]])


def _moved(p: jax.Array) -> jax.Array:
    """A shape turned by an angle, scaled and shifted."""
    c, s = jnp.cos(p[0]), jnp.sin(p[0])
    turned = p[1] * jnp.stack([c * SHAPE[0] - s * SHAPE[1], s * SHAPE[0] + c * SHAPE[1]])
    return jnp.ravel(turned + p[2:, None])


def _on_circle(p: jax.Array) -> jax.Array:
    """How far points of an arc around (3, 2) of radius 4 are from a circle."""
    x, y = 3 + 4 * np.cos(ARC), 2 + 4 * np.sin(ARC)
    return jnp.hypot(x - p[0], y - p[1]) - p[2]


def _on_ellipse(p: jax.Array) -> jax.Array:
    """The equation of an ellipse at points of one around (1, 2) with the axes 3 and 1.5, turned by 0.5."""
    c, s = np.cos(0.5), np.sin(0.5)
    a, b = 3 * np.cos(AROUND), 1.5 * np.sin(AROUND)
    x, y = 1 + c * a - s * b - p[0], 2 + s * a + c * b - p[1]
    c, s = jnp.cos(p[4]), jnp.sin(p[4])
    return ((c * x + s * y) / p[2]) ** 2 + ((c * y - s * x) / p[3]) ** 2


def _infected(p: jax.Array) -> jax.Array:
    """The share of the infected by days in a model of infection and recovery."""

    def day(carry: tuple[jax.Array, jax.Array], _: None) -> tuple[tuple[jax.Array, jax.Array], jax.Array]:
        well, ill = carry
        new, recovered = p[0] * well * ill, p[1] * ill
        return (well - new, ill + new - recovered), ill

    return jax.lax.scan(day, (1 - p[2], p[2]), None, length=60)[1]


SECOND: dict[str, Model] = {
    "two decays and an offset": (
        lambda p: p[0] * jnp.exp(-p[1] * T) + p[2] * jnp.exp(-p[3] * T) + p[4],
        [3, 0.4, 1.5, 2.5, 0.7],
    ),
    "inhibition": (lambda p: p[0] * T / (p[1] + T + T**2 / p[2]), [6, 1.5, 8]),
    "two logistics": (
        lambda p: p[0] * jax.nn.sigmoid(p[1] * (T - p[2])) + p[3] * jax.nn.sigmoid(p[4] * (T - p[5])),
        [2, 3, 2.5, 1, 2, 7],
    ),
    "morse": (lambda p: p[0] * (1 - jnp.exp(-p[1] * (NEAR - p[2]))) ** 2 + p[3], [4, 1.2, 1.5, -4]),
    "planck": (lambda p: p[0] * T**3 / jnp.expm1(p[1] * T), [2, 1.3]),
    "antoine": (lambda p: p[0] - p[1] / (p[2] + WARM), [7, 1600, 230]),
    "voigt": (
        lambda p: (
            p[0] * (p[3] / (1 + ((T - p[1]) / p[2]) ** 2) + (1 - p[3]) * jnp.exp(-np.log(2) * ((T - p[1]) / p[2]) ** 2))
            + p[4]
        ),
        [3, 5, 0.8, 0.4, 0.2],
    ),
    "network": (
        lambda p: p[0] * jnp.tanh(p[1] * CENTRED + p[2]) + p[3] * jnp.tanh(p[4] * CENTRED + p[5]) + p[6],
        [1, 1.5, -1, 0.8, -2, 1.5, 0.2],
    ),
    "circle": (_on_circle, [3, 2, 4]),
    "ellipse": (_on_ellipse, [1, 2, 3, 1.5, 0.5]),
    "rotation": (_moved, [0.7, 1.5, 2, -1]),
    "positions": (lambda p: jnp.hypot(BEACONS[0] - p[0], BEACONS[1] - p[1]) + p[2], [3, 5, 0.5]),
    "absorption": (lambda p: p[0] * p[1] / (p[1] - p[2]) * (jnp.exp(-p[2] * T) - jnp.exp(-p[1] * T)), [5, 1.5, 0.2]),
    "decay and line": (lambda p: p[0] * jnp.exp(-p[1] * T) + p[2] + p[3] * T, [3, 1.2, 1, 0.1]),
    "relaxation": (lambda p: p[0] + p[1] / (1 + (p[2] * DECADES) ** 2), [1, 4, 0.7]),
    "langmuir": (lambda p: p[0] * (p[1] * T) ** p[2] / (1 + (p[1] * T) ** p[2]), [4, 0.5, 1.5]),
    "richards": (lambda p: p[0] / (1 + p[3] * jnp.exp(-p[1] * (T - p[2]))) ** (1 / p[3]), [5, 1.2, 4, 0.6]),
    "two sines": (
        lambda p: p[0] * jnp.sin(p[1] * T + p[2]) + p[3] * jnp.sin(p[4] * T + p[5]),
        [2, 1, 0.5, 1, 2.7, 1],
    ),
    "stretched": (lambda p: p[0] * jnp.exp(-((T / p[1]) ** p[2])), [3, 2, 0.6]),
    "water": (lambda p: p[0] + (p[1] - p[0]) / (1 + (p[2] * DECADES) ** p[3]) ** (1 - 1 / p[3]), [0.1, 0.5, 0.6, 2]),
    "epidemic": (_infected, [0.5, 0.15, 0.002]),
    "spot": (
        lambda p: p[0] * jnp.exp(-((GRID[0] - p[1]) ** 2 + (GRID[1] - p[2]) ** 2) / (2 * p[3] ** 2)) + p[4],
        [4, 2, 3, 0.8, 0.3],
    ),
}
TARGETS = {"circle": 0.0, "ellipse": 1.0}
"""The value of each prediction for shapes, whose equations have no data of their own."""


def _residual(model: Callable[[jax.Array], jax.Array], y: np.ndarray) -> Residual:
    return lambda p: model(p) - y


def _starts(rng: np.random.Generator, truth: np.ndarray) -> list[np.ndarray]:
    """Ones, factors of the truth by chance, ten times and a tenth of it, and no knowledge of it."""
    n = len(truth)
    near = [truth * rng.lognormal(0, spread, n) for spread in (0.5, 1, 1.5)]
    return [np.ones(n), *near, truth * 10, truth * 0.1, np.abs(rng.normal(size=n)) * 10]


def _problems(models: dict[str, Model], seed: int, noise: float) -> list[Problem]:
    """Each model from seven starts; those with residuals that are not finite are left out."""
    rng = np.random.default_rng(seed)
    out = []
    for name, (model, numbers) in models.items():
        truth = np.array(numbers, float)
        exact = np.asarray(model(jnp.asarray(truth)))
        spread = 1 if name in TARGETS else np.std(exact)
        y = TARGETS.get(name, exact) + rng.normal(size=exact.size) * noise * spread
        residual = _residual(model, y)
        starts: Sequence[np.ndarray] = _starts(rng, truth)
        for i, start in enumerate(starts):
            if np.all(np.isfinite(residual(jnp.asarray(start)))):
                out.append(Problem(f"{name} {i}", squares(residual), start, residual=residual))
    return out


def first() -> list[Problem]:
    """140 fits of 20 models, with 3% of noise."""
    return _problems(FIRST, 11, 0.03)


def second() -> list[Problem]:
    """Fits of 22 models, with 2% of noise."""
    return _problems(SECOND, 2026, 0.02)
