"""More functions for `minimize`: classics of other collections, and models' losses.

Nothing in it had been chosen on them when they first ran: lbfgs solved 70 of 71, with 1 false success, and SciPy's
L-BFGS-B 66, with 5. The tilt of the first step came after that, for the hanging chain.

Sources: CUTEst (Gould, Orban & Toint 2015, doi:10.1007/s10589-014-9687-3), test functions of global optimization
(Jamil & Yang 2013, arXiv:1308.4008), and losses of statistics, physics and learning on made data. Each has one start.
A local minimum is a solution.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from problems import Problem

__all__ = ["functions"]

Function = Callable[[Any], Any]
CASES: list[tuple[str, Function, Any]] = []
"""``(name, function, start)``."""


def case(name: str, *start: Any) -> Callable[[Function], Function]:
    """Put a function with its start on the list: numbers, or one array."""

    def put(fun: Function) -> Function:
        CASES.append((name, fun, start[0] if len(start) == 1 else start))
        return fun

    return put


def functions() -> list[Problem]:
    """All problems."""
    return [Problem(name, fun, np.array(start, float)) for name, fun, start in CASES]


# -- CUTEst ----------------------------------------------------------------------------------------


@case("denschna", 1, 1)
def denschna(x):
    return x[0] ** 4 + (x[0] + x[1]) ** 2 + jnp.expm1(x[1]) ** 2


@case("denschnb", 1, 1)
def denschnb(x):
    return (x[0] - 2) ** 2 * (1 + x[1] ** 2) + (x[1] + 1) ** 2


@case("denschnc", 2, 3)
def denschnc(x):
    return (x[0] ** 2 + x[1] ** 2 - 2) ** 2 + (jnp.exp(x[0] - 1) + x[1] ** 3 - 2) ** 2


@case("denschnd", 10, 10, 10)
def denschnd(x):
    a = x[0] ** 2 + x[1] ** 3 - x[2] ** 4
    return a**2 + (2 * x[0] * x[1] * x[2]) ** 2 + (2 * x[0] * x[1] - 3 * x[1] * x[2] + x[0] * x[2]) ** 2


@case("denschne", 2, 3, -8)
def denschne(x):
    return x[0] ** 2 + (x[1] + x[1] ** 2) ** 2 + jnp.expm1(x[2]) ** 2


@case("denschnf", 2, 0)
def denschnf(x):
    a = 2 * (x[0] + x[1]) ** 2 + (x[0] - x[1]) ** 2 - 8
    return a**2 + (5 * x[0] ** 2 + (x[1] - 3) ** 2 - 9) ** 2


@case("cube", -1.2, 1)
def cube(x):
    return (x[0] - 1) ** 2 + 100 * (x[1] - x[0] ** 3) ** 2


@case("himmelbg", 0.5, 0.5)
def himmelbg(x):
    return jnp.exp(-x[0] - x[1]) * (2 * x[0] ** 2 + 3 * x[1] ** 2)


@case("himmelbb", -1.2, 1)
def himmelbb(x):
    return (x[0] * x[1] * (1 - x[0]) * (1 - x[1] - x[0] * (1 - x[0]) ** 5)) ** 2


@case("maratosb", 1.1, 0.1)
def maratosb(x):
    return x[0] + 1e6 * (x[0] ** 2 + x[1] ** 2 - 1) ** 2


@case("sisser", 1, 0.1)
def sisser(x):
    return 3 * x[0] ** 4 - 2 * (x[0] * x[1]) ** 2 + 3 * x[1] ** 4


@case("hs 308", 3, 0.1)
def hs_308(x):
    return (x[0] ** 2 + x[0] * x[1] + x[1] ** 2) ** 2 + jnp.sin(x[0]) ** 2 + jnp.cos(x[1]) ** 2


@case("hairy", -5, -7)
def hairy(x):
    hair = 30 * jnp.sin(7 * x[0]) ** 2 * jnp.cos(7 * x[1]) ** 2
    return hair + 100 * jnp.sqrt(0.01 + (x[0] - x[1]) ** 2) + 100 * jnp.sqrt(0.01 + x[0] ** 2)


@case("expfit", 0, 0)
def expfit(x):
    t = 0.25 * jnp.arange(1, 11)
    return jnp.sum((x[0] * jnp.exp(t * x[1]) - t) ** 2)


@case("liarwhd", np.full(36, 4))
def liarwhd(x):
    return jnp.sum(4 * (x**2 - x[0]) ** 2 + (x - 1) ** 2)


@case("nondia", np.full(50, -1))
def nondia(x):
    return (x[0] - 1) ** 2 + 100 * jnp.sum((x[0] - x[:-1] ** 2) ** 2)


@case("nondquar", np.tile([1, -1], 10))
def nondquar(x):
    return (x[0] - x[1]) ** 2 + (x[-2] + x[-1]) ** 2 + jnp.sum((x[:-2] + x[1:-1] + x[-1]) ** 4)


@case("quartc", np.full(25, 2))
def quartc(x):
    return jnp.sum((x - jnp.arange(1, 26)) ** 4)


@case("tridia", np.ones(30))
def tridia(x):
    return (x[0] - 1) ** 2 + jnp.sum(jnp.arange(2, 31) * (2 * x[1:] - x[:-1]) ** 2)


@case("tointgss", np.full(50, 3))
def tointgss(x):
    last = x[2:] ** 2
    return jnp.sum((10 / 52 + last) * (2 - jnp.exp(-((x[:-2] - x[1:-1]) ** 2) / (0.1 + last))))


@case("schmvett", np.full(10, 0.5))
def schmvett(x):
    a, b, c = x[:-2], x[1:-1], x[2:]
    return -jnp.sum(1 / (1 + (a - b) ** 2) + jnp.sin((jnp.pi * b + c) / 2) + jnp.exp(-(((a + c) / b - 2) ** 2)))


@case("dqdrtic", np.full(50, 3))
def dqdrtic(x):
    return jnp.sum(x[:-2] ** 2 + 100 * x[1:-1] ** 2 + 100 * x[2:] ** 2)


@case("edensch", np.full(36, 8))
def edensch(x):
    a, b = x[:-1], x[1:]
    return 16 + jnp.sum((a - 2) ** 4 + (a * b - 2 * b) ** 2 + (b + 1) ** 2)


@case("cragglvy", np.append(1, np.full(19, 2)))
def cragglvy(x):
    a, b, c, d = x[:-3:2], x[1:-2:2], x[2:-1:2], x[3::2]
    parts = (jnp.exp(a) - b) ** 4 + 100 * (b - c) ** 6 + jnp.tan(c - d) ** 4 + a**8 + (d - 1) ** 2
    return jnp.sum(parts)


@case("bdqrtic", np.ones(50))
def bdqrtic(x):
    a, b, c, d = x[:-4], x[1:-3], x[2:-2], x[3:-1]
    return jnp.sum((3 - 4 * a) ** 2 + (a**2 + 2 * b**2 + 3 * c**2 + 4 * d**2 + 5 * x[-1] ** 2) ** 2)


@case("fletchcr", np.zeros(20))
def fletchcr(x):
    return 100 * jnp.sum((x[1:] - x[:-1] + 1 - x[:-1] ** 2) ** 2)


@case("genhumps", np.append(-506.0, np.full(4, 506.2)))
def genhumps(x):
    a, b = x[:-1], x[1:]
    return jnp.sum(jnp.sin(2 * a) ** 2 * jnp.sin(2 * b) ** 2 + 0.05 * (a**2 + b**2))


@case("genrose", np.arange(1, 21) / 21)
def genrose(x):
    return 1 + jnp.sum(100 * (x[1:] - x[:-1] ** 2) ** 2 + (x[1:] - 1) ** 2)


@case("power", np.ones(20))
def power(x):
    return jnp.sum(jnp.arange(1, 21) * x**2) ** 2


@case("sinquad", np.full(5, 0.1))
def sinquad(x):
    middle = jnp.sin(x[1:-1] - x[-1]) - x[0] ** 2 + x[1:-1] ** 2
    return (x[0] - 1) ** 4 + jnp.sum(middle**2) + (x[-1] ** 2 - x[0] ** 2) ** 2


@case("chnrosnb", np.full(25, -1))
def chnrosnb(x):
    weights = 16 * (1.5 + jnp.sin(jnp.arange(2, 26))) ** 2
    return jnp.sum(weights * (x[:-1] - x[1:] ** 2) ** 2 + (x[1:] - 1) ** 2)


@case("dixmaanb", np.full(15, 2))
def dixmaanb(x):
    first = jnp.sum(x**2) + 0.0625 * jnp.sum(x[:-1] ** 2 * (x[1:] + x[1:] ** 2) ** 2)
    return 1 + first + 0.0625 * jnp.sum(x[:10] ** 2 * x[5:] ** 4) + 0.0625 * jnp.sum(x[:5] * x[10:])


@case("hilberta", np.full(6, -3))
def hilberta(x):
    i = jnp.arange(6)
    return x @ (1 / (i[:, None] + i + 1.0)) @ x


@case("argtrig", np.full(10, 0.1))
def argtrig(x):
    i = jnp.arange(1, 11)
    return jnp.sum((10 - jnp.sum(jnp.cos(x) + jnp.sin(x)) + i * (1 - jnp.cos(x) - jnp.sin(x))) ** 2)


# -- global optimization ---------------------------------------------------------------------------


@case("booth", -8, 9)
def booth(x):
    return (x[0] + 2 * x[1] - 7) ** 2 + (2 * x[0] + x[1] - 5) ** 2


@case("matyas", 9, -7)
def matyas(x):
    return 0.26 * (x[0] ** 2 + x[1] ** 2) - 0.48 * x[0] * x[1]


@case("three humps", 2, -1.5)
def three_humps(x):
    return 2 * x[0] ** 2 - 1.05 * x[0] ** 4 + x[0] ** 6 / 6 + x[0] * x[1] + x[1] ** 2


@case("six humps", 1.6, 0.9)
def six_humps(x):
    return (4 - 2.1 * x[0] ** 2 + x[0] ** 4 / 3) * x[0] ** 2 + x[0] * x[1] + 4 * (x[1] ** 2 - 1) * x[1] ** 2


@case("goldstein price", -0.4, -0.6)
def goldstein_price(x):
    a, b = x
    one = 1 + (a + b + 1) ** 2 * (19 - 14 * a + 3 * a**2 - 14 * b + 6 * a * b + 3 * b**2)
    return one * (30 + (2 * a - 3 * b) ** 2 * (18 - 32 * a + 12 * a**2 + 48 * b - 36 * a * b + 27 * b**2))


@case("branin", 6, 12)
def branin(x):
    a = x[1] - 5.1 / (4 * jnp.pi**2) * x[0] ** 2 + 5 / jnp.pi * x[0] - 6
    return a**2 + 10 * (1 - 1 / (8 * jnp.pi)) * jnp.cos(x[0]) + 10


@case("easom", 1.5, 4.5)
def easom(x):
    return -jnp.cos(x[0]) * jnp.cos(x[1]) * jnp.exp(-((x[0] - jnp.pi) ** 2) - (x[1] - jnp.pi) ** 2)


@case("ackley", 2.3, -1.7, 0.6)
def ackley(x):
    root = jnp.sqrt(jnp.mean(x**2) + 1e-12)
    return 20 + jnp.e - 20 * jnp.exp(-0.2 * root) - jnp.exp(jnp.mean(jnp.cos(2 * jnp.pi * x)))


@case("rastrigin", 1.3, -2.2, 0.7, 3.1)
def rastrigin(x):
    return jnp.sum(x**2 - 10 * jnp.cos(2 * jnp.pi * x) + 10)


@case("griewank", 30.0, -45.0, 12.0)
def griewank(x):
    return 1 + jnp.sum(x**2) / 4000 - jnp.prod(jnp.cos(x / jnp.sqrt(jnp.arange(1, 4))))


@case("levy", np.full(8, -5.5))
def levy(x):
    w = 1 + (x - 1) / 4
    middle = jnp.sum((w[:-1] - 1) ** 2 * (1 + 10 * jnp.sin(jnp.pi * w[:-1] + 1) ** 2))
    return jnp.sin(jnp.pi * w[0]) ** 2 + middle + (w[-1] - 1) ** 2 * (1 + jnp.sin(2 * jnp.pi * w[-1]) ** 2)


@case("zakharov", np.linspace(-4, 9, 12))
def zakharov(x):
    a = jnp.sum(0.5 * jnp.arange(1, 13) * x)
    return jnp.sum(x**2) + a**2 + a**4


@case("styblinski tang", np.linspace(-1, 1.5, 7))
def styblinski_tang(x):
    return jnp.sum(x**4 - 16 * x**2 + 5 * x) / 2


@case("salomon", 3.1, 1.2)
def salomon(x):
    root = jnp.sqrt(jnp.sum(x**2) + 1e-12)
    return 1 - jnp.cos(2 * jnp.pi * root) + 0.1 * root


@case("sharp valley", 4.0, 3.0)
def sharp_valley(x):
    return jnp.logaddexp(1e3 * (x[0] - x[1]), -1e3 * (x[0] - x[1])) + 0.1 * x[0] ** 2 + x[1]


# -- losses of models ------------------------------------------------------------------------------

DRAW = np.random.default_rng(7)
X = DRAW.normal(size=(80, 6))
W = np.array([1.0, -2, 0.5, 0, 3, -1])
COUNTS = DRAW.poisson(np.exp(0.4 * X @ W / 2)).astype(float)
LABELS = (X @ W + 0.5 * DRAW.normal(size=80) > 0).astype(float)
TIMES = DRAW.exponential(np.exp(-0.3 * X @ W))
READINGS = X @ W + 0.3 * DRAW.standard_t(2, size=80)
ORDERS = 10.0 ** np.array([-4, -2, 0, 1, 3, 5])
CLUSTERS = np.concatenate([DRAW.normal(-2, 0.7, 60), DRAW.normal(1.5, 1.1, 90)])
LINE = np.linspace(0, 1, 25)
WAVES = np.sin(6 * LINE) + 0.1 * DRAW.normal(size=25)
RATINGS = DRAW.normal(size=(12, 2)) @ DRAW.normal(size=(2, 9)) + 0.05 * DRAW.normal(size=(12, 9))
CLASSES = DRAW.integers(0, 3, 80)


@case("poisson regression", np.zeros(6))
def poisson(w):
    return jnp.sum(jnp.exp(X @ w) - COUNTS * (X @ w))


@case("poisson, scaled columns", np.zeros(6))
def poisson_scaled(w):
    rate = (X * ORDERS) @ w
    return jnp.sum(jnp.exp(rate) - COUNTS * rate)


@case("gamma regression", np.zeros(6))
def gamma(w):
    return jnp.sum(TIMES * jnp.exp(X @ w) - X @ w)


@case("cox regression", np.zeros(6))
def cox(w):
    later = TIMES[None, :] >= TIMES[:, None]
    return jnp.sum(jax.nn.logsumexp(jnp.where(later, X @ w, -jnp.inf), axis=1) - X @ w)


@case("probit", np.zeros(6))
def probit(w):
    return -jnp.sum(jax.scipy.stats.norm.logcdf((2 * LABELS - 1) * (X @ w))) + 0.01 * jnp.sum(w**2)


@case("student regression", np.append(np.zeros(6), 1))
def student(p):
    scale = jnp.exp(p[6])
    return jnp.sum(1.5 * jnp.log1p(((READINGS - X @ p[:6]) / scale) ** 2 / 2) + p[6])


@case("huber regression", np.zeros(6))
def huber(w):
    miss = jnp.abs(READINGS - X @ w)
    return jnp.sum(jnp.where(miss < 0.5, miss**2 / 2, 0.5 * (miss - 0.25)))


@case("smooth hinge", np.zeros(6))
def hinge(w):
    return jnp.mean(jax.nn.softplus(5 * (1 - (2 * LABELS - 1) * (X @ w))) / 5) + 1e-3 * jnp.sum(w**2)


@case("softmax regression", np.zeros(18))
def softmax(w):
    logits = X @ w.reshape(6, 3)
    return jnp.mean(jax.nn.logsumexp(logits, axis=1) - logits[jnp.arange(80), CLASSES])


@case("mixture of gaussians", -1.0, 1.0, 0.0, 0.0, 0.0)
def mixture(p):
    parts = jax.scipy.stats.norm.logpdf(CLUSTERS[:, None], p[:2], jnp.exp(p[2:4]))
    return -jnp.sum(jax.nn.logsumexp(parts + jax.nn.log_sigmoid(jnp.stack([p[4], -p[4]])), axis=1))


@case("gaussian process", 0.0, 0.0, -1.0)
def gaussian_process(p):
    gaps = (LINE[:, None] - LINE) ** 2
    kernel = jnp.exp(2 * p[0] - gaps / (2 * jnp.exp(2 * p[1]))) + jnp.exp(2 * p[2]) * jnp.eye(25)
    factor = jnp.linalg.cholesky(kernel)
    whitened = jax.scipy.linalg.solve_triangular(factor, WAVES, lower=True)
    return jnp.sum(whitened**2) / 2 + jnp.sum(jnp.log(jnp.diagonal(factor)))


@case("low rank ratings", 0.3 * np.random.default_rng(1).normal(size=42))
def ratings(p):
    miss = RATINGS - p[:24].reshape(12, 2) @ p[24:].reshape(2, 9)
    return jnp.sum(miss**2) + 0.1 * jnp.sum(p**2)


@case("small network", 0.5 * np.random.default_rng(2).normal(size=31))
def network(p):
    hidden = jnp.tanh(LINE[:, None] * p[:10] + p[10:20])
    return jnp.mean((hidden @ p[20:30] + p[30] - WAVES) ** 2) + 1e-4 * jnp.sum(p**2)


@case("tiny values", np.zeros(6))
def tiny(w):
    return 1e-12 * jnp.sum((READINGS - X @ w) ** 2)


@case("huge values", np.zeros(6))
def huge(w):
    return 1e12 * jnp.sum((READINGS - X @ w) ** 2)


@case("far from zero", np.full(6, 1e8))
def far_away(w):
    return jnp.sum((READINGS - X @ (w - 1e8)) ** 2)


# -- physics ---------------------------------------------------------------------------------------


@case("four atoms", 0.0, 0.1, 0, 1.4, 0, 0.2, 0.3, 1.5, 0, 0.5, 0.4, 1.3)
def atoms(p):
    places = p.reshape(4, 3)
    i, j = np.triu_indices(4, 1)
    inverse = jnp.sum((places[i] - places[j]) ** 2, axis=1) ** -3
    return jnp.sum(4 * (inverse**2 - inverse))


@case("hanging chain", np.zeros(20))
def chain(p):
    heights = jnp.concatenate([jnp.zeros(1), p, jnp.zeros(1)])
    lengths = jnp.sqrt((1 / 21) ** 2 + jnp.diff(heights) ** 2)
    return jnp.sum(p) / 21 + 50 * jnp.sum((lengths - 1.3 / 21) ** 2)


@case("minimal surface", np.zeros(25))
def surface(p):
    edge = jnp.sin(jnp.linspace(0, jnp.pi, 7))
    whole = jnp.zeros((7, 7)).at[0].set(edge).at[-1].set(edge).at[1:-1, 1:-1].set(p.reshape(5, 5))
    down, right = 6 * jnp.diff(whole, axis=0)[:, :-1], 6 * jnp.diff(whole, axis=1)[:-1]
    return jnp.sum(jnp.sqrt(1 + down**2 + right**2)) / 36


@case("bratu", np.zeros(15))
def bratu(p):
    whole = jnp.concatenate([jnp.zeros(1), p, jnp.zeros(1)])
    return 8 * jnp.sum(jnp.diff(whole) ** 2) - 2 * jnp.sum(jnp.exp(p)) / 16


@case("double well", np.linspace(-0.3, 0.5, 10))
def double_well(p):
    return jnp.sum((p**2 - 1) ** 2) + 0.3 * jnp.sum(jnp.diff(p) ** 2)


@case("pendulum by torques", np.zeros(20))
def pendulum(torques):
    def step(state, torque):
        angle, speed = state
        speed = speed + 0.1 * (torque - jnp.sin(angle))
        return (angle + 0.1 * speed, speed), None

    (angle, speed), _ = jax.lax.scan(step, (0.0, 0.0), torques)
    return 10 * (angle - 1) ** 2 + speed**2 + 0.01 * jnp.sum(torques**2)
