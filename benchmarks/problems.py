"""Test problems of unconstrained and boxed minimization, from their equations.

Sources: More, Garbow & Hillstrom 1981 (doi:10.1145/355934.355936), whose numbers the comments give; classics of the
CUTEst collection; fits of the NIST's StRD (www.itl.nist.gov/div898/strd); logistic regressions and fits on made data.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import jax
import jax.numpy as jnp
import numpy as np

__all__ = ["Problem", "boxed", "residuals", "unconstrained"]


Residual = Callable[[jax.Array], jax.Array]


@dataclass(frozen=True)
class Problem:
    """A function of a vector, its start and bounds.

    Attributes:
      name: a short name; ``x10`` marks a start at ten times the usual one.
      fun: ``fun(x) -> value``.
      start: float64 vector.
      lower, upper: float64 vectors, or None.
      residual: ``residual(x) -> vector`` whose sum of squares is ``fun``, or None.
    """

    name: str
    fun: Callable[[jax.Array], jax.Array]
    start: np.ndarray
    lower: np.ndarray | None = None
    upper: np.ndarray | None = None
    residual: Residual | None = None


def squares(residual: Residual) -> Callable[[jax.Array], jax.Array]:
    def fun(x: jax.Array) -> jax.Array:
        return jnp.sum(residual(x) ** 2)

    return fun


# -- More, Garbow & Hillstrom ----------------------------------------------------------------------


def rosenbrock(x: jax.Array) -> jax.Array:  # 1, 21
    return jnp.concatenate([10 * (x[1::2] - x[::2] ** 2), 1 - x[::2]])


def freudenstein_roth(x: jax.Array) -> jax.Array:  # 2
    a = -13 + x[0] + ((5 - x[1]) * x[1] - 2) * x[1]
    b = -29 + x[0] + ((x[1] + 1) * x[1] - 14) * x[1]
    return jnp.stack([a, b])


def powell_badly_scaled(x: jax.Array) -> jax.Array:  # 3
    return jnp.stack([1e4 * x[0] * x[1] - 1, jnp.exp(-x[0]) + jnp.exp(-x[1]) - 1.0001])


def brown_badly_scaled(x: jax.Array) -> jax.Array:  # 4
    return jnp.stack([x[0] - 1e6, x[1] - 2e-6, x[0] * x[1] - 2])


def beale(x: jax.Array) -> jax.Array:  # 5
    return jnp.array([1.5, 2.25, 2.625]) - x[0] * (1 - x[1] ** jnp.arange(1, 4))


def jennrich_sampson(x: jax.Array) -> jax.Array:  # 6
    i = jnp.arange(1.0, 11)
    return 2 + 2 * i - jnp.exp(i * x[0]) - jnp.exp(i * x[1])


def helical_valley(x: jax.Array) -> jax.Array:  # 7
    angle = jnp.arctan2(x[1], x[0]) / (2 * jnp.pi)
    return jnp.stack([10 * (x[2] - 10 * angle), 10 * (jnp.hypot(x[0], x[1]) - 1), x[2]])


BARD = [0.14, 0.18, 0.22, 0.25, 0.29, 0.32, 0.35, 0.39, 0.37, 0.58, 0.73, 0.96, 1.34, 2.10, 4.39]


def bard(x: jax.Array) -> jax.Array:  # 8
    u = jnp.arange(1.0, 16)
    v = 16 - u
    return jnp.array(BARD) - (x[0] + u / (v * x[1] + jnp.minimum(u, v) * x[2]))


GAUSSIAN = [0.0009, 0.0044, 0.0175, 0.0540, 0.1295, 0.2420, 0.3521, 0.3989]


def gaussian(x: jax.Array) -> jax.Array:  # 9
    y = jnp.array(GAUSSIAN + GAUSSIAN[-2::-1])
    t = (8 - jnp.arange(1.0, 16)) / 2
    return x[0] * jnp.exp(-x[1] * (t - x[2]) ** 2 / 2) - y


MEYER = [34780, 28610, 23650, 19630, 16370, 13720, 11540, 9744, 8261, 7030, 6005, 5147, 4427, 3820, 3307, 2872]


def meyer(x: jax.Array) -> jax.Array:  # 10
    t = 45 + 5 * jnp.arange(1.0, 17)
    return x[0] * jnp.exp(x[1] / (t + x[2])) - jnp.array(MEYER, float)


def gulf(x: jax.Array) -> jax.Array:  # 11
    t = jnp.arange(1.0, 100) / 100
    y = 25 + (-50 * jnp.log(t)) ** (2 / 3)
    return jnp.exp(-(jnp.abs(y - x[1]) ** x[2]) / x[0]) - t


def box(x: jax.Array) -> jax.Array:  # 12
    t = jnp.arange(1.0, 11) / 10
    return jnp.exp(-t * x[0]) - jnp.exp(-t * x[1]) - x[2] * (jnp.exp(-t) - jnp.exp(-10 * t))


def powell_singular(x: jax.Array) -> jax.Array:  # 13, 22
    a, b, c, d = x[::4], x[1::4], x[2::4], x[3::4]
    return jnp.concatenate([a + 10 * b, 5**0.5 * (c - d), (b - 2 * c) ** 2, 10**0.5 * (a - d) ** 2])


def wood(x: jax.Array) -> jax.Array:  # 14
    a, b, c, d = x
    rows = [10 * (b - a**2), 1 - a, 90**0.5 * (d - c**2), 1 - c, 10**0.5 * (b + d - 2), (b - d) / 10**0.5]
    return jnp.stack(rows)


KOWALIK_Y = [0.1957, 0.1947, 0.1735, 0.16, 0.0844, 0.0627, 0.0456, 0.0342, 0.0323, 0.0235, 0.0246]
KOWALIK_U = [4, 2, 1, 0.5, 0.25, 0.167, 0.125, 0.1, 0.0833, 0.0714, 0.0625]


def kowalik_osborne(x: jax.Array) -> jax.Array:  # 15
    u = jnp.array(KOWALIK_U)
    return jnp.array(KOWALIK_Y) - x[0] * (u**2 + u * x[1]) / (u**2 + u * x[2] + x[3])


def brown_dennis(x: jax.Array) -> jax.Array:  # 16
    t = jnp.arange(1.0, 21) / 5
    return (x[0] + t * x[1] - jnp.exp(t)) ** 2 + (x[2] + x[3] * jnp.sin(t) - jnp.cos(t)) ** 2


OSBORNE_1 = (
    "844 908 932 936 925 908 881 850 818 784 751 718 685 658 628 603 580 558 538 522 506 490 478 467 457 448 438 431"
    " 424 420 414 411 406"
)


def osborne_1(x: jax.Array) -> jax.Array:  # 17
    t = 10 * jnp.arange(33.0)
    y = jnp.array([float(word) for word in OSBORNE_1.split()]) / 1000
    return y - (x[0] + x[1] * jnp.exp(-t * x[3]) + x[2] * jnp.exp(-t * x[4]))


def biggs(x: jax.Array) -> jax.Array:  # 18
    t = jnp.arange(1.0, 14) / 10
    y = jnp.exp(-t) - 5 * jnp.exp(-10 * t) + 3 * jnp.exp(-4 * t)
    return x[2] * jnp.exp(-t * x[0]) - x[3] * jnp.exp(-t * x[1]) + x[5] * jnp.exp(-t * x[4]) - y


OSBORNE_2 = (
    "1366 1191 1112 1013 991 885 831 847 786 725 746 679 608 655 616 606 602 626 651 724 649 649 694 644 624 661 612"
    " 558 533 495 500 423 395 375 372 391 396 405 428 429 523 562 607 653 672 708 633 668 645 632 591 559 597 625 739"
    " 710 729 720 636 581 428 292 162 98 54"
)


def osborne_2(x: jax.Array) -> jax.Array:  # 19
    t = jnp.arange(65.0) / 10
    y = jnp.array([float(word) for word in OSBORNE_2.split()]) / 1000
    bumps = [x[1 + i] * jnp.exp(-((t - x[8 + i]) ** 2) * x[5 + i]) for i in range(3)]
    return y - (x[0] * jnp.exp(-t * x[4]) + bumps[0] + bumps[1] + bumps[2])


def watson(x: jax.Array) -> jax.Array:  # 20
    t = jnp.arange(1.0, 30)[:, None] / 29
    j = jnp.arange(len(x))
    slope = jnp.sum(j[1:] * x[1:] * t ** (j[1:] - 1), 1)
    rest = slope - jnp.sum(x * t**j, 1) ** 2 - 1
    return jnp.concatenate([rest, jnp.stack([x[0], x[1] - x[0] ** 2 - 1])])


def penalty_1(x: jax.Array) -> jax.Array:  # 23
    return jnp.append(1e-5**0.5 * (x - 1), jnp.sum(x**2) - 0.25)


def penalty_2(x: jax.Array) -> jax.Array:  # 24
    n = len(x)
    i = jnp.arange(2.0, n + 1)
    y = jnp.exp(i / 10) + jnp.exp((i - 1) / 10)
    a = 1e-5**0.5
    steps = a * (jnp.exp(x[1:] / 10) + jnp.exp(x[:-1] / 10) - y)
    ends = a * (jnp.exp(x[1:] / 10) - jnp.exp(jnp.float64(-0.1)))
    last = jnp.sum(jnp.arange(n, 0, -1) * x**2) - 1
    return jnp.concatenate([jnp.stack([x[0] - 0.2, last]), steps, ends])


def variably_dimensioned(x: jax.Array) -> jax.Array:  # 25
    total = jnp.sum(jnp.arange(1, len(x) + 1) * (x - 1))
    return jnp.concatenate([x - 1, jnp.stack([total, total**2])])


def trigonometric(x: jax.Array) -> jax.Array:  # 26
    n = len(x)
    return n - jnp.sum(jnp.cos(x)) + jnp.arange(1, n + 1) * (1 - jnp.cos(x)) - jnp.sin(x)


def brown_almost_linear(x: jax.Array) -> jax.Array:  # 27
    return jnp.append(x[:-1] + jnp.sum(x) - (len(x) + 1), jnp.prod(x) - 1)


def discrete_boundary(x: jax.Array) -> jax.Array:  # 28
    h = 1 / (len(x) + 1)
    around = jnp.pad(x, 1)
    return 2 * x - around[:-2] - around[2:] + h**2 * (x + h * jnp.arange(1, len(x) + 1) + 1) ** 3 / 2


def discrete_integral(x: jax.Array) -> jax.Array:  # 29
    h = 1 / (len(x) + 1)
    t = h * jnp.arange(1, len(x) + 1)
    cubes = (x + t + 1) ** 3
    low, high = jnp.cumsum(t * cubes), jnp.cumsum(((1 - t) * cubes)[::-1])[::-1]
    return x + h * ((1 - t) * low + t * (high - (1 - t) * cubes)) / 2


def broyden_tridiagonal(x: jax.Array) -> jax.Array:  # 30
    around = jnp.pad(x, 1)
    return (3 - 2 * x) * x - around[:-2] - 2 * around[2:] + 1


def broyden_banded(x: jax.Array) -> jax.Array:  # 31
    i = np.arange(len(x))
    near = (i[None] >= i[:, None] - 5) & (i[None] <= i[:, None] + 1) & (i[None] != i[:, None])
    return x * (2 + 5 * x**2) + 1 - jnp.asarray(near, float) @ (x * (1 + x))


def linear_full_rank(x: jax.Array) -> jax.Array:  # 32
    total = 2 * jnp.sum(x) / 20
    return jnp.concatenate([x - total - 1, jnp.full(20 - len(x), -1.0) - total])


def linear_rank_one(x: jax.Array) -> jax.Array:  # 33
    return jnp.arange(1, 21) * jnp.sum(jnp.arange(1, len(x) + 1) * x) - 1


def chebyquad(x: jax.Array) -> jax.Array:  # 35
    n = len(x)
    z = 2 * x - 1
    rows, before, now = [], jnp.ones(n), z
    for i in range(1, n + 1):
        integral = -1 / (i**2 - 1) if i % 2 == 0 else 0.0
        rows.append(jnp.mean(now) - integral)
        before, now = now, 2 * z * now - before
    return jnp.stack(rows)


# -- classics --------------------------------------------------------------------------------------


def chained_rosenbrock(x: jax.Array) -> jax.Array:
    return jnp.sum(100 * (x[1:] - x[:-1] ** 2) ** 2 + (1 - x[:-1]) ** 2)


def dixon_price(x: jax.Array) -> jax.Array:
    return (x[0] - 1) ** 2 + jnp.sum(jnp.arange(2, len(x) + 1) * (2 * x[1:] ** 2 - x[:-1]) ** 2)


def quartic(x: jax.Array) -> jax.Array:
    return jnp.sum(jnp.arange(1, len(x) + 1) * (x - 1) ** 4)


def engval(x: jax.Array) -> jax.Array:
    return jnp.sum((x[:-1] ** 2 + x[1:] ** 2) ** 2) + jnp.sum(3 - 4 * x[:-1])


def tridia(x: jax.Array) -> jax.Array:
    return (x[0] - 1) ** 2 + jnp.sum(jnp.arange(2, len(x) + 1) * (2 * x[1:] - x[:-1]) ** 2)


def arwhead(x: jax.Array) -> jax.Array:
    return jnp.sum((x[:-1] ** 2 + x[-1] ** 2) ** 2 - 4 * x[:-1] + 3)


def cosine(x: jax.Array) -> jax.Array:
    return jnp.sum(jnp.cos(x[:-1] ** 2 - x[1:] / 2))


def himmelblau(x: jax.Array) -> jax.Array:
    return (x[0] ** 2 + x[1] - 11) ** 2 + (x[0] + x[1] ** 2 - 7) ** 2


def six_hump(x: jax.Array) -> jax.Array:
    return (4 - 2.1 * x[0] ** 2 + x[0] ** 4 / 3) * x[0] ** 2 + x[0] * x[1] + 4 * (x[1] ** 2 - 1) * x[1] ** 2


def cliff(x: jax.Array) -> jax.Array:
    return ((x[0] - 3) / 100) ** 2 - (x[0] - x[1]) + jnp.exp(20 * (x[0] - x[1]))


def quadratic(condition: float, size: int) -> Callable[[jax.Array], jax.Array]:
    rng = np.random.default_rng(size)
    turn, _ = np.linalg.qr(rng.normal(size=(size, size)))
    matrix = jnp.asarray(turn * np.geomspace(1, condition, size) @ turn.T)
    target = jnp.asarray(rng.normal(size=size))

    def fun(x: jax.Array) -> jax.Array:
        return (x - target) @ matrix @ (x - target) / 2

    return fun


def scaled(fun: Callable[[jax.Array], jax.Array], factor: float) -> Callable[[jax.Array], jax.Array]:
    def times(x: jax.Array) -> jax.Array:
        return factor * fun(x)

    return times


def logistic(seed: int, size: int, spread: float, penalty: float) -> Callable[[jax.Array], jax.Array]:
    """Mean logistic loss of 200 points; the features' scales span ``spread`` orders of ten."""
    rng = np.random.default_rng(seed)
    scales = 10.0 ** np.linspace(-spread / 2, spread / 2, size)
    features = rng.normal(size=(200, size))
    labels = jnp.asarray(np.where(features @ rng.normal(size=size) + rng.normal(size=200) > 0, 1.0, -1.0))
    features = jnp.asarray(features * scales)

    def fun(x: jax.Array) -> jax.Array:
        return jnp.mean(jnp.logaddexp(0, -labels * (features @ x))) + penalty * jnp.sum(x**2) / 2

    return fun


def poisson(seed: int, size: int) -> Callable[[jax.Array], jax.Array]:
    rng = np.random.default_rng(seed)
    features = rng.normal(size=(150, size))
    counts = jnp.asarray(rng.poisson(np.exp(features @ rng.normal(size=size) / 2)), float)
    features = jnp.asarray(features)

    def fun(x: jax.Array) -> jax.Array:
        rate = features @ x
        return jnp.mean(jnp.exp(rate) - counts * rate)

    return fun


def fit(kind: str) -> Residual:
    rng = np.random.default_rng(len(kind))
    t = np.linspace(0, 4, 60)
    noise = 0.02 * rng.normal(size=60)
    data = {
        "decay": 2.5 * np.exp(-1.3 * t) + 0.5,
        "peak": 1.5 * np.exp(-((t - 1.8) ** 2) / 0.5) + 0.2,
        "logistic growth": 3 / (1 + np.exp(-2.2 * (t - 2))),
        "sine": 1.2 * np.sin(2.1 * t + 0.4),
        "michaelis menten": 2 * t / (0.7 + t),
    }[kind]
    t, y = jnp.asarray(t), jnp.asarray(data + noise)

    def residual(x: jax.Array) -> jax.Array:
        if kind == "decay":
            return x[0] * jnp.exp(-x[1] * t) + x[2] - y
        if kind == "peak":
            return x[0] * jnp.exp(-((t - x[1]) ** 2) / (x[2] ** 2 + 1e-8)) + x[3] - y
        if kind == "logistic growth":
            return x[0] * jax.nn.sigmoid(x[1] * (t - x[2])) - y
        if kind == "sine":
            return x[0] * jnp.sin(x[1] * t + x[2]) - y
        return x[0] * t / (x[1] + t) - y

    return residual


# -- NIST StRD -------------------------------------------------------------------------------------


def _words(text: str) -> np.ndarray:
    return np.array([float(word) for word in text.split()])


MISRA_X = "77.6 114.9 141.1 190.8 239.9 289 332.8 378.4 434.8 477.3 536.8 593.1 689.1 760"
MISRA_Y = "10.07 14.73 17.94 23.93 29.61 35.18 40.02 44.82 50.76 55.05 61.01 66.40 75.47 81.78"
RAT43_Y = "16.08 33.83 65.80 97.20 191.55 326.20 386.87 520.53 590.03 651.92 724.93 699.56 689.96 637.56 717.41"
ECKERLE_X = (
    "400 405 410 415 420 425 430 435 436.5 438 439.5 441 442.5 444 445.5 447 448.5 450 451.5 453 454.5 456 457.5 459"
    " 460.5 462 463.5 465 470 475 480 485 490 495 500"
)
ECKERLE_Y = (
    "1.575e-4 1.699e-4 2.350e-4 3.102e-4 4.917e-4 8.710e-4 .0017418 .00464 .0065895 .0097302 .0149002 .023731"
    " .0401683 .0712559 .1264458 .2073413 .2902366 .3445623 .3698049 .3668534 .3106727 .2078154 .1164354 .0616764"
    " .03372 .0194023 .0117831 .0074357 .0022732 8.8e-4 4.579e-4 2.345e-4 1.586e-4 1.143e-4 7.1e-5"
)
THURBER_X = (
    "-3.067 -2.981 -2.921 -2.912 -2.840 -2.797 -2.702 -2.699 -2.633 -2.481 -2.363 -2.322 -1.501 -1.460 -1.274 -1.212"
    " -1.100 -1.046 -.915 -.714 -.566 -.545 -.4 -.309 -.109 -.103 .01 .119 .377 .79 .963 1.006 1.115 1.572 1.841"
    " 2.047 2.2"
)
THURBER_Y = (
    "80.574 84.248 87.264 87.195 89.076 89.608 89.868 90.101 92.405 95.854 100.696 101.060 401.672 390.724 567.534"
    " 635.316 733.054 759.087 894.206 990.785 1090.109 1080.914 1122.643 1178.351 1260.531 1273.514 1288.339 1327.543"
    " 1353.863 1414.509 1425.208 1421.384 1442.962 1464.350 1468.705 1447.894 1457.628"
)


def misra(x: jax.Array) -> jax.Array:
    return x[0] * (1 - jnp.exp(-x[1] * _words(MISRA_X))) - _words(MISRA_Y)


def box_bod(x: jax.Array) -> jax.Array:
    return x[0] * (1 - jnp.exp(-x[1] * _words("1 2 3 5 7 10"))) - _words("109 149 149 191 213 224")


def rat43(x: jax.Array) -> jax.Array:
    return x[0] / (1 + jnp.exp(x[1] - x[2] * jnp.arange(1.0, 16))) ** (1 / x[3]) - _words(RAT43_Y)


def eckerle(x: jax.Array) -> jax.Array:
    return x[0] / x[1] * jnp.exp(-(((_words(ECKERLE_X) - x[2]) / x[1]) ** 2) / 2) - _words(ECKERLE_Y)


def thurber(x: jax.Array) -> jax.Array:
    t = _words(THURBER_X)
    below = 1 + x[4] * t + x[5] * t**2 + x[6] * t**3
    return (x[0] + x[1] * t + x[2] * t**2 + x[3] * t**3) / below - _words(THURBER_Y)


# -- the sets --------------------------------------------------------------------------------------


def _v(*numbers: float) -> np.ndarray:
    return np.array(numbers, float)


def _steps(n: int) -> np.ndarray:
    t = np.arange(1, n + 1) / (n + 1)
    return t * (t - 1)


MGH: list[tuple[str, Residual, np.ndarray]] = [
    ("rosenbrock", rosenbrock, _v(-1.2, 1)),
    ("freudenstein roth", freudenstein_roth, _v(0.5, -2)),
    ("powell badly scaled", powell_badly_scaled, _v(0, 1)),
    ("brown badly scaled", brown_badly_scaled, _v(1, 1)),
    ("beale", beale, _v(1, 1)),
    ("jennrich sampson", jennrich_sampson, _v(0.3, 0.4)),
    ("helical valley", helical_valley, _v(-1, 0, 0)),
    ("bard", bard, _v(1, 1, 1)),
    ("gaussian", gaussian, _v(0.4, 1, 0)),
    ("meyer", meyer, _v(0.02, 4000, 250)),
    ("gulf", gulf, _v(5, 2.5, 0.15)),
    ("box", box, _v(0, 10, 20)),
    ("powell singular", powell_singular, _v(3, -1, 0, 1)),
    ("wood", wood, _v(-3, -1, -3, -1)),
    ("kowalik osborne", kowalik_osborne, _v(0.25, 0.39, 0.415, 0.39)),
    ("brown dennis", brown_dennis, _v(25, 5, -5, -1)),
    ("osborne 1", osborne_1, _v(0.5, 1.5, -1, 0.01, 0.02)),
    ("biggs", biggs, _v(1, 2, 1, 1, 1, 1)),
    ("osborne 2", osborne_2, _v(1.3, 0.65, 0.65, 0.7, 0.6, 3, 5, 7, 2, 4.5, 5.5)),
    ("watson 6", watson, np.zeros(6)),
    ("watson 9", watson, np.zeros(9)),
    ("extended rosenbrock", rosenbrock, np.tile(_v(-1.2, 1), 10)),
    ("extended powell", powell_singular, np.tile(_v(3, -1, 0, 1), 5)),
    ("penalty 1", penalty_1, np.arange(1.0, 11)),
    ("penalty 2", penalty_2, np.full(10, 0.5)),
    ("variably dimensioned", variably_dimensioned, 1 - np.arange(1, 11) / 10),
    ("trigonometric", trigonometric, np.full(10, 0.1)),
    ("brown almost linear", brown_almost_linear, np.full(10, 0.5)),
    ("discrete boundary", discrete_boundary, _steps(10)),
    ("discrete integral", discrete_integral, _steps(10)),
    ("broyden tridiagonal", broyden_tridiagonal, np.full(10, -1.0)),
    ("broyden banded", broyden_banded, np.full(10, -1.0)),
    ("linear full rank", linear_full_rank, np.ones(10)),
    ("linear rank one", linear_rank_one, np.ones(10)),
    ("chebyquad", chebyquad, np.arange(1, 9) / 9),
]
FARTHER = {
    10: ("rosenbrock", "freudenstein roth", "beale", "helical valley", "bard", "gaussian", "box", "powell singular",
         "wood", "kowalik osborne", "brown dennis", "extended rosenbrock", "penalty 1", "variably dimensioned",
         "trigonometric", "broyden tridiagonal"),
    100: ("rosenbrock", "freudenstein roth", "helical valley", "powell singular", "wood", "brown dennis",
          "extended rosenbrock", "variably dimensioned"),
}  # fmt: skip


FITS = [
    ("fit of a decay", "decay", _v(1, 1, 0)),
    ("fit of a peak", "peak", _v(1, 1.5, 1, 0)),
    ("fit of growth", "logistic growth", _v(1, 1, 1)),
    ("fit of a sine", "sine", _v(1, 2, 0)),
    ("fit of saturation", "michaelis menten", _v(1, 1)),
]
"""``(name, kind of fit, start)``."""


def unconstrained() -> list[Problem]:
    """Problems without bounds."""
    out = [Problem(name, squares(residual), start) for name, residual, start in MGH]
    for factor, names in FARTHER.items():
        out += [Problem(f"{n} x{factor}", squares(r), factor * start) for n, r, start in MGH if n in names]
    rng = np.random.default_rng(0)
    out += [
        Problem("chained rosenbrock 50", chained_rosenbrock, np.tile(_v(-1.2, 1), 25)),
        Problem("dixon price", dixon_price, np.full(20, 0.9)),
        Problem("quartic", quartic, np.full(30, 2.0)),
        Problem("engval", engval, np.full(50, 2.0)),
        Problem("tridia", tridia, np.ones(50)),
        Problem("arwhead", arwhead, np.ones(50)),
        Problem("cosine", cosine, np.ones(20)),
        Problem("himmelblau", himmelblau, _v(0, 0)),
        Problem("six hump", six_hump, _v(1.5, 0.6)),
        Problem("cliff", cliff, _v(0, -1)),
        Problem("quadratic 1e2", quadratic(1e2, 30), np.zeros(30)),
        Problem("quadratic 1e6", quadratic(1e6, 10), np.zeros(10)),
        Problem("rosenbrock times 1e-8", scaled(squares(rosenbrock), 1e-8), _v(-1.2, 1)),
        Problem("rosenbrock times 1e8", scaled(squares(rosenbrock), 1e8), _v(-1.2, 1)),
        Problem("logistic", logistic(1, 10, 0, 1e-3), np.zeros(10)),
        Problem("logistic, 2 orders", logistic(2, 10, 2, 1e-4), np.zeros(10)),
        Problem("logistic, 4 orders", logistic(3, 10, 4, 1e-6), np.zeros(10)),
        Problem("logistic, 6 orders", logistic(4, 8, 6, 1e-8), np.zeros(8)),
        Problem("logistic, 60 features", logistic(5, 60, 1, 1e-2), rng.normal(size=60)),
        Problem("poisson", poisson(6, 8), np.zeros(8)),
    ]
    return out + [Problem(name, squares(fit(kind)), start) for name, kind, start in FITS]


def _box(name: str, fun: Callable, start: np.ndarray, lower: np.ndarray | float, upper: np.ndarray | float) -> Problem:
    low, high = np.broadcast_to(lower, start.shape), np.broadcast_to(upper, start.shape)
    return Problem(name, fun, np.clip(start, low, high), np.array(low, float), np.array(high, float))


def boxed() -> list[Problem]:
    """Problems with bounds."""
    starts = {name: (squares(residual), start) for name, residual, start in MGH}
    inf = np.inf

    def of(name: str, lower: np.ndarray | float, upper: np.ndarray | float) -> Problem:
        return _box(name, *starts[name], lower, upper)

    return [
        of("rosenbrock", _v(-50, -50), _v(0.5, 100)),
        of("freudenstein roth", 0, 4.5),
        of("powell badly scaled", _v(0, 1), _v(1, 9)),
        of("brown badly scaled", 0, _v(1e6, 100)),
        of("beale", _v(0.6, 0.5), _v(10, 100)),
        of("helical valley", _v(-100, -1, -1), _v(0.8, 1, 1)),
        of("bard", _v(0.1, 0, 0), _v(50, 2, 2)),
        of("gaussian", _v(0.398, 1, -0.5), _v(4.2, 2, 0.1)),
        of("box", _v(0, 5, 0), _v(2, 9.5, 20)),
        of("powell singular", 0.1, 20),
        of("wood", -100, _v(0, 10, 100, 100)),
        of("brown dennis", _v(-10, 0, -100, -20), _v(100, 15, 0, 0.2)),
        of("kowalik osborne", 0.13, 0.42),
        of("biggs", _v(0, 0, 0, 1, 0, 0), _v(2, 8, 1, 7, 5, 5)),
        of("watson 6", _v(-0.015, -inf, -inf, -inf, -inf, -inf), _v(inf, inf, 0.2, inf, inf, 0.9)),
        of("extended rosenbrock", -50, np.tile(_v(0.5, 100), 10)),
        of("penalty 1", 0, _v(*[0.1, inf] * 5)),
        of("variably dimensioned", 0, np.tile(_v(0.9, inf), 5)),
        of("trigonometric", 0.01, 0.3),
        of("discrete boundary", -0.1, 0),
        of("broyden tridiagonal", -0.5, 0.5),
        of("linear full rank", -0.5, inf),
        _box("chained rosenbrock 50", chained_rosenbrock, np.tile(_v(-1.2, 1), 25), -1.5, 0.8),
        _box("quadratic 1e2", quadratic(1e2, 30), np.zeros(30), 0, 0.5),
        _box("quadratic 1e6", quadratic(1e6, 10), np.zeros(10), 0, inf),
        _box("logistic, 2 orders", logistic(2, 10, 2, 1e-4), np.zeros(10), 0, inf),
        _box("logistic, 60 features", logistic(5, 60, 1, 1e-2), np.zeros(60), -0.05, 0.05),
        _box("poisson", poisson(6, 8), np.zeros(8), 0, 0.3),
        _box("engval", engval, np.full(50, 2.0), 0.5, 2),
        _box("cosine", cosine, np.ones(20), 0.5, 2),
    ]


NIST: list[tuple[str, Residual, np.ndarray]] = [
    ("misra1a", misra, _v(500, 1e-4)),
    ("boxbod", box_bod, _v(1, 1)),
    ("boxbod near", box_bod, _v(100, 0.75)),
    ("rat43", rat43, _v(100, 10, 1, 1)),
    ("rat43 near", rat43, _v(700, 5, 0.75, 1.3)),
    ("eckerle4", eckerle, _v(1, 10, 500)),
    ("eckerle4 near", eckerle, _v(1.5, 5, 450)),
    ("thurber", thurber, _v(1000, 1000, 400, 40, 0.7, 0.3, 0.03)),
    ("thurber near", thurber, _v(1300, 1500, 500, 75, 1, 0.4, 0.05)),
]
"""The far and the near start of each fit."""


def residuals() -> list[Problem]:
    """Problems of least squares: starts at 1, 10 and 100 times the usual one, fits, and problems with bounds.

    Starts at zero or with residuals that are not finite are left out.
    """
    usual = [*MGH, *((name, fit(kind), start) for name, kind, start in FITS)]
    out = []
    for name, residual, start in usual:
        for factor in (1, 10, 100):
            if factor == 1 or np.any(start) and np.all(np.isfinite(residual(jnp.asarray(factor * start)))):
                label = name if factor == 1 else f"{name} x{factor}"
                out.append(Problem(label, squares(residual), factor * start, residual=residual))
    out += [Problem(name, squares(residual), start, residual=residual) for name, residual, start in NIST]
    of_name = {name: residual for name, residual, _ in MGH}
    for problem in boxed():
        if problem.name in of_name:
            residual = of_name[problem.name]
            out.append(replace(problem, name=f"{problem.name} in a box", residual=residual))
    return out
