"""The linear model of residuals at a point, and the steps that minimize it in a trust region."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jaxsgd.matrices import singular_vectors
from jaxsgd.second_order.loops import cond, while_loop
from jaxsgd.second_order.vectors import norm

__all__ = ["Box", "Model", "Step", "box_step", "column_norms", "linear_model", "step_of"]

ACCURACY = {True: 0.1, False: 0.01}
"""How near the length of a step of ``"lm"`` comes to the radius, with scales (MINPACK) and without (SciPy's trf)."""


class Model(NamedTuple):
    """The linear model at a point: ``J / scale = Q U diag(s) V'``, and r in its range.

    Attributes:
      s: singular values, 0 where they are below rounding.
      vt: V'.
      c: ``U' Q' r``.
    """

    s: jax.Array
    vt: jax.Array
    c: jax.Array

    def step(self, shift: Any) -> jax.Array:
        """The scaled step that minimizes the model with ``shift`` times its squared length."""
        size = self.s * self.s + shift
        share = jnp.where(shift > 0, self.s * self.s / jnp.where(size > 0, size, 1), 1)
        # Divided twice, so that no square of a condition number arises where shift is 0.
        inner = jnp.where(self.s > 0, self.c / jnp.where(self.s > 0, self.s, 1) * share, 0)
        return -(inner @ self.vt)


Step = Callable[[Model, jax.Array], jax.Array]
"""``(model, radius) -> scaled step``."""


def linear_model(factor: jax.Array, scale: jax.Array) -> Model:
    """The model of R of ``[J | r] = QR``, in these units of the parameters."""
    n = scale.shape[0]
    u, s, vt = singular_vectors(factor[:, :n] / scale)
    c = factor[:, n] @ u
    floor = max(factor.shape) * jnp.finfo(s.dtype).eps * jnp.max(s, initial=0)
    return Model(jnp.where(s > floor, s, 0), vt, c)


def column_norms(matrix: jax.Array) -> jax.Array:
    """The Euclidean norm of each column."""
    return jax.vmap(lambda column: norm([column]), in_axes=1)(matrix)


# -- steps ---------------------------------------------------------------------------------------


def _lm(model: Model, radius: jax.Array, accuracy: jax.Array) -> jax.Array:
    """The minimizer of the model in the trust region, to a share of the radius (Moré 1978)."""
    s, c = model.s, model.c
    s2 = s * s

    def length(shift: jax.Array) -> tuple[jax.Array, jax.Array]:
        size = jnp.where(s2 + shift > 0, s2 + shift, 1)
        z = jnp.where(s > 0, s * c / size, 0)
        long = norm([z])
        return long, -jnp.sum(z * (z / size)) / jnp.where(long > 0, long, 1)

    full = norm([jnp.where(s > 0, c / jnp.where(s > 0, s, 1), 0)])
    upper = norm([s * c]) / radius
    tiny = jnp.finfo(s.dtype).tiny

    def body(carry: Any) -> Any:
        i, low, high, shift, _ = carry
        shift = jnp.where((shift <= low) | (shift >= high), jnp.maximum(1e-3 * high, jnp.sqrt(low * high)), shift)
        long, slope = length(shift)
        miss = long - radius
        low, high = jnp.where(miss > 0, shift, low), jnp.where(miss > 0, high, shift)
        # Newton's method on 1 / length, which is nearly linear.
        after = shift - (miss / radius) * (long / jnp.where(slope != 0, slope, -tiny))
        return i + 1, low, high, after, (shift, jnp.abs(miss) <= accuracy * radius)

    def goes_on(carry: Any) -> jax.Array:
        return (carry[0] < 30) & ~carry[4][1]

    zero = jnp.zeros_like(radius)
    inside = full <= (1 + accuracy) * radius
    start = (jnp.zeros((), jnp.int32), zero, upper, zero, (zero, inside))
    shift = while_loop(goes_on, body, start)[4][0]
    return model.step(shift)


def _dogleg(model: Model, radius: jax.Array) -> jax.Array:
    """The point of Powell's path on the boundary, or the full step."""
    full = model.step(jnp.zeros_like(radius))
    g = model.s * model.c
    down, bend = jnp.sum(g * g), jnp.sum((model.s * g) ** 2)
    cauchy = -(down / jnp.where(bend > 0, bend, 1)) * (g @ model.vt)
    long, short = norm([full]), norm([cauchy])
    # The point between both at which the length is the radius.
    d = full - cauchy
    a, b, c = jnp.sum(d * d), jnp.sum(d * cauchy), jnp.sum(cauchy * cauchy) - radius * radius
    root = jnp.sqrt(jnp.maximum(b * b - a * c, 0))
    t = jnp.where(b > 0, -c / jnp.where(b + root > 0, b + root, 1), (root - b) / jnp.where(a > 0, a, 1))
    bent = cauchy + jnp.clip(t, 0, 1) * d
    edge = jnp.where(short >= radius, cauchy * (radius / jnp.where(short > 0, short, 1)), bent)
    return jnp.where(long <= radius, full, edge)


def _gauss_newton(model: Model, radius: jax.Array) -> jax.Array:
    return radius * model.step(jnp.zeros_like(radius))


def step_of(method: str, scaled: jax.Array) -> Step:
    """The step of a method.

    Args:
      method: ``"lm"``, ``"dogleg"`` or ``"gauss_newton"``, whose radius is a share of the full step.
      scaled: whether columns of the Jacobian scale the parameters.
    """
    if method == "lm":
        return functools.partial(_lm, accuracy=jnp.where(scaled, ACCURACY[True], ACCURACY[False]))
    return _dogleg if method == "dogleg" else _gauss_newton


# -- bounds --------------------------------------------------------------------------------------


class Box(NamedTuple):
    """Lower and upper bounds as flat vectors."""

    lower: jax.Array
    upper: jax.Array

    def holds(self, x: jax.Array, gradient: jax.Array) -> jax.Array:
        """Which parameters are at a bound that the gradient pushes them against."""
        return ((x <= self.lower) & (gradient >= 0)) | ((x >= self.upper) & (gradient <= 0))


def box_step(step: Step, j: jax.Array, c: jax.Array, room: Box, radius: jax.Array, shrinks: bool) -> jax.Array:
    """The scaled step inside the bounds.

    Args:
      step: the step of a model without bounds.
      j, c: the model ``|j z + c|^2`` of a scaled step z.
      room: the bounds of z. They hold 0.
      radius: of the trust region.
      shrinks: whether the radius is a length. Otherwise it is a share of the full step.
    """
    low, high = room
    gradient = c @ j
    zero = jnp.zeros_like(gradient)
    held = room.holds(zero, gradient)

    def body(carry: Any) -> Any:
        fixed, moved, _, _ = carry
        rest = c + j @ moved
        used = jnp.sum(moved * moved)
        left = jnp.sqrt(jnp.maximum(radius**2 - used, 0.01 * radius**2)) if shrinks else radius
        model = linear_model(jnp.concatenate([jnp.where(fixed, 0, j), rest[:, None]], 1), jnp.ones_like(zero))
        z = jnp.where(fixed, moved, step(model, left))
        out = ~fixed & ((z < low) | (z > high))
        z = jnp.clip(z, low, high)
        return fixed | out, jnp.where(fixed | out, z, 0), z, jnp.any(out)

    # Each turn but the last fixes one parameter more, so that it ends.
    fixed, _, inward, _ = while_loop(lambda carry: carry[3], body, (held, zero, zero, jnp.ones((), bool)))
    down = jnp.where(held, 0, -gradient)
    square, bend = jnp.sum(down * down), jnp.sum((j @ down) ** 2)
    length = jnp.where(square > 0, jnp.sqrt(square), 1)
    full = square / jnp.where(bend > 0, bend, 1)
    far = jnp.minimum(full, radius / length) if shrinks else radius * full
    along = far * 0.25 ** jnp.arange(16, dtype=zero.dtype)
    steps = jnp.concatenate([inward[None], jnp.clip(along[:, None] * down, low, high)])
    moved = steps @ j.T
    values = jnp.sum(moved * (moved + 2 * c), 1)
    best = steps[jnp.argmin(values)]
    if not shrinks:
        return best
    return cond(jnp.any(fixed), lambda: _refined(j, c, best, jnp.min(values), room, radius), lambda: best)


def _refined(j: jax.Array, c: jax.Array, z: jax.Array, value: jax.Array, room: Box, radius: jax.Array) -> jax.Array:
    """A step inside the bounds that lowers the model further, with parameters that may leave a bound again.

    Each turn goes towards the model's minimum over the parameters that no bound holds, and bends at the bounds (Moré &
    Toraldo 1991, doi:10.1137/0801008). No entry is longer than the radius, spread over
    all entries, or than the longest of the first step.

    Args:
      j, c: the model ``|j z + c|^2``.
      z, value: a step inside the bounds, and ``|j z + c|^2 - |c|^2`` there.
      room: the bounds of the step.
      radius: of the trust region.
    """
    size = jnp.maximum(radius / len(z) ** 0.5, jnp.max(jnp.abs(z)))
    near = Box(jnp.maximum(room.lower, -size), jnp.minimum(room.upper, size))
    shares = 0.5 ** jnp.arange(10, dtype=z.dtype)

    def body(carry: Any) -> Any:
        i, z, value, _ = carry
        rest = c + j @ z
        held = near.holds(z, rest @ j)
        model = linear_model(jnp.concatenate([jnp.where(held, 0, j), rest[:, None]], 1), jnp.ones_like(z))
        way = jnp.where(held, 0, model.step(jnp.zeros_like(radius)))
        steps = jnp.clip(z + shares[:, None] * way, *near)
        moved = steps @ j.T
        values = jnp.sum(moved * (moved + 2 * c), 1)
        lowest = jnp.min(values)
        better = lowest < value
        z = jnp.where(better, steps[jnp.argmin(values)], z)
        return i + 1, z, jnp.minimum(value, lowest), lowest < value - 1e-3 * jnp.abs(value)

    begin = (jnp.zeros((), jnp.int32), z, value, jnp.ones((), bool))
    return while_loop(lambda carry: carry[3] & (carry[0] < len(z) + 5), body, begin)[1]
