"""A search for least squares from one start to its end, by trial steps in a trust region."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jaxsgd.matrices import triangle
from jaxsgd.second_order.linear_model import Box, Model, box_step, column_norms, linear_model, step_of
from jaxsgd.second_order.loops import cond, while_loop
from jaxsgd.second_order.objective import Space
from jaxsgd.second_order.result import Result, Status
from jaxsgd.second_order.vectors import norm, power_of_two

__all__ = ["Fit", "State", "begin", "free_part", "result_of", "search"]


@dataclass(frozen=True)
class Fit:
    """The problem that every search of a call shares.

    Attributes:
      residuals: ``residuals(x) -> r``, vectors, divided by ``unit``.
      x, r: the start and the residuals there.
      space: the vectors that stand for the parameters.
      unit: a power of two near the norm of the residuals at the start.
      box: the bounds, or None.
      method: ``"lm"``, ``"dogleg"`` or ``"gauss_newton"``.
      tol: the tolerance of convergence.
      callback: called with the result after every trial step, or None.
    """

    residuals: Callable[[jax.Array], jax.Array]
    x: jax.Array
    r: jax.Array
    space: Space
    unit: jax.Array
    box: Box | None
    method: str
    tol: jax.Array
    callback: Callable[[Result], Any] | None

    @property
    def tall(self) -> bool:
        """Whether there are at least as many residuals as parameters."""
        return len(self.x) <= len(self.r)

    @property
    def shrinks(self) -> bool:
        """Whether the radius is a length. Otherwise it is a share of the full step."""
        return self.method != "gauss_newton"

    @property
    def eps(self) -> Any:
        """The rounding unit."""
        return jnp.finfo(self.x.dtype).eps

    def jacobian(self, x: jax.Array) -> jax.Array:
        """J, by columns or by rows, whichever are fewer."""
        return (jax.jacfwd if self.tall else jax.jacrev)(self.residuals)(x)

    def misses(self, s: State) -> jax.Array:
        """Whether more is left of the first residuals than rounding leaves."""
        return s.norm > self.eps**0.5 * norm([self.r])

    def factored(self, x: jax.Array, r: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
        """R of ``[J | r]``, the norms of J's columns, and whether both are finite."""
        j = self.jacobian(x)
        good = jnp.all(jnp.isfinite(j)) & jnp.all(jnp.isfinite(r))
        # A decomposition of a matrix with an inf may never return.
        both = jnp.where(good, jnp.concatenate([j, r[:, None]], axis=1), 0)
        return triangle(both), column_norms(both[:, :-1]), good


class State(NamedTuple):
    """A search in progress.

    Attributes:
      x, r, norm: the best point, its residuals and their norm.
      factor: R of ``[J | r] = QR``, at the best point.
      scale: units of the parameters: the largest norm so far of each column of the Jacobian, or 1.
      peak: the largest norm so far of each column.
      scaled: whether ``scale`` follows ``peak``.
      radius: of the trust region in scaled parameters; for Gauss-Newton the share of a full step.
      iterations, trials: accepted steps and trial steps.
      code: the status.
      failed: whether the last trial was not finite.
      explained: the share of r that J explains.
      cosine: the largest cosine of r and a column of J.
    """

    x: jax.Array
    r: jax.Array
    norm: jax.Array
    factor: jax.Array
    scale: jax.Array
    peak: jax.Array
    scaled: jax.Array
    radius: jax.Array
    iterations: jax.Array
    trials: jax.Array
    code: jax.Array
    failed: jax.Array
    explained: jax.Array
    cosine: jax.Array

    @property
    def columns(self) -> jax.Array:
        """The norms of the Jacobian's columns."""
        return column_norms(self.factor[:, :-1])

    @property
    def gradient(self) -> jax.Array:
        """``J' r``."""
        return self.factor[:, -1] @ self.factor[:, :-1]


def begin(fit: Fit, x: jax.Array, r: jax.Array, scaled: jax.Array, share: jax.Array) -> State:
    """A search at a start.

    Args:
      fit: the problem.
      x, r: the start and the residuals there.
      scaled: whether columns of the Jacobian scale the parameters.
      share: the first radius in units of the length of the start.
    """
    factor, columns, good = fit.factored(x, r)
    size = norm([r])
    good &= jnp.isfinite(size)
    scale = jnp.where(scaled & (columns > 0), columns, 1)
    far = norm([scale * x])
    radius = share * jnp.where(far > 0, far, 1) if fit.shrinks else jnp.ones((), x.dtype)
    zero = jnp.zeros((), jnp.int32)
    no, none = jnp.zeros((), bool), jnp.zeros_like(size)
    s = _judged(fit, State(x, r, size, factor, scale, columns, scaled, radius, zero, zero, zero, no, none, none))
    return s._replace(code=jnp.where(good, s.code, Status.NOT_FINITE_START).astype(jnp.int32))


def search(fit: Fit, s: State, most: jax.Array) -> State:
    """The end of a search after at most so many trial steps."""
    s = while_loop(lambda s: (s.code == Status.RUNNING) & (s.trials < most), lambda s: _trial(fit, s), s)
    return s._replace(code=jnp.where(s.code == Status.RUNNING, Status.ITERATION_LIMIT, s.code).astype(jnp.int32))


def result_of(fit: Fit, s: State) -> Result:
    """The result, but for its aux."""
    gradient = s.factor[:, :-1].T @ s.factor[:, -1] * fit.unit * fit.unit
    if fit.box is not None:
        gradient = jnp.clip(gradient, s.x - fit.box.upper, s.x - fit.box.lower)
    value = (s.norm * fit.unit) ** 2 / 2
    params = fit.space.tree([s.x])
    return Result(params, value, jnp.max(jnp.abs(gradient)), s.iterations, s.trials + 1, s.code, None)


# -- a point ---------------------------------------------------------------------------------------


def free_part(fit: Fit, s: State) -> jax.Array:
    """The factor without the columns of parameters that a bound holds."""
    if fit.box is None:
        return s.factor
    held = fit.box.holds(s.x, s.gradient)
    return jnp.where(jnp.append(held, False), 0, s.factor)


def _angles(fit: Fit, s: State) -> tuple[Model, jax.Array, jax.Array]:
    """The model in units of J's columns, the share of r that J explains, and the largest cosine of r and a column.

    Along directions that J hardly sees, rounding is all that it explains: the cosines do not see those.
    """
    factor = free_part(fit, s)
    columns = column_norms(factor[:, :-1])
    columns = jnp.where(columns > 0, columns, 1)
    model = linear_model(factor, columns)
    size = jnp.where(s.norm > 0, s.norm, 1)
    cosine = jnp.max(jnp.abs((factor[:, -1] / size) @ (factor[:, :-1] / columns)))
    return model, norm([jnp.where(model.s > 0, model.c, 0)]) / size, cosine


def _judged(fit: Fit, s: State) -> State:
    """A new point with its status, from the unconstrained step."""
    eps = fit.eps
    model, explained, cosine = _angles(fit, s)
    columns = column_norms(free_part(fit, s)[:, :-1])
    full = model.step(jnp.zeros((), s.x.dtype))
    # A step that is small beside the parameters may still explain much of r, if one of them is far from zero.
    length, size = norm([full]), norm([columns * s.x])
    small = (length <= eps ** (2 / 3) * size) & ((explained <= eps**0.375) | ~fit.misses(s))
    code = jnp.where(small | (length <= 4 * eps * size), Status.CONVERGED_STEP, Status.RUNNING)
    zero = s.norm <= eps * jnp.minimum(norm([fit.r]), 1 / fit.unit)
    code = jnp.where(zero, Status.CONVERGED_VALUE, code)
    flat = ((explained <= fit.tol) & (cosine <= jnp.sqrt(fit.tol))) | (cosine <= 10 * eps)
    code = jnp.where(flat, Status.CONVERGED_GRADIENT, code).astype(jnp.int32)
    return s._replace(code=code, explained=explained, cosine=cosine)


# -- a step ----------------------------------------------------------------------------------------


def _step(fit: Fit, s: State, factor: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The scaled step, and the point that it leads to."""
    step = step_of(fit.method, s.scaled)
    if fit.box is None:
        z = step(linear_model(factor, s.scale), s.radius)
        return z, s.x + z / s.scale
    lower, upper = fit.box
    room = Box((lower - s.x) * s.scale, (upper - s.x) * s.scale)
    z = box_step(step, factor[:, :-1] / s.scale, factor[:, -1], room, s.radius, fit.shrinks)
    x = jnp.clip(s.x + z / s.scale, lower, upper)
    # A parameter that reaches its bound is exactly there, whatever the rounding.
    return z, jnp.where(z <= room.lower, lower, jnp.where(z >= room.upper, upper, x))


def _trial(fit: Fit, s: State) -> State:
    """One step, taken if it lowers the residuals."""
    eps, dtype = fit.eps, s.x.dtype
    # In a power of two near the norm of the residuals: nothing is rounded, and no square leaves the range.
    near = power_of_two(s.norm)
    factor = s.factor / near
    step, x = _step(fit, s, factor)
    length = norm([step])
    r = fit.residuals(x)
    size = norm([r])
    moved, rest = factor[:, :-1] @ (step / s.scale), factor[:, -1]
    # The relative decrease of the sum of squares: by the linear model, and in truth.
    squared = (s.norm / near) ** 2
    predicted = -jnp.sum(moved * (moved + 2 * rest)) / squared
    actual = jnp.where(size < 10 * s.norm, (1 - size / s.norm) * (1 + size / s.norm), -1)
    actual = jnp.where(jnp.isfinite(size), actual, -1)
    ratio = jnp.where(predicted > 0, actual / jnp.where(predicted > 0, predicted, 1), 0)
    wanted = (ratio >= 1e-4) & (size < s.norm)
    factor, columns, good = cond(wanted, fit.factored, lambda x, r: (s.factor, s.peak, jnp.zeros((), bool)), x, r)
    taken = wanted & good
    ratio = jnp.where(wanted & ~good, -1, ratio)
    if fit.shrinks:
        # A parabola through both values and the slope says where the minimum along the step is.
        slope = -jnp.sum(moved * rest) / squared
        shorter = jnp.where(actual >= 0, 0.5, 0.5 * slope / jnp.maximum(slope - actual / 2, eps))
        shorter = jnp.clip(jnp.where(jnp.isfinite(size), shorter, 0.1), 0.1, 0.5)
        radius = jnp.where(s.trials == 0, jnp.minimum(s.radius, length), s.radius)
        grown = jnp.where(ratio >= 0.75, jnp.maximum(radius, 2 * length), radius)
        radius = jnp.where(ratio <= 0.25, shorter * jnp.minimum(radius, 10 * length), grown)
    else:
        radius = jnp.where(taken, jnp.ones((), dtype), s.radius / 4)
    new = State(
        jnp.where(taken, x, s.x),
        jnp.where(taken, r, s.r),
        jnp.where(taken, size, s.norm),
        jnp.where(taken, factor, s.factor),
        jnp.where(taken & s.scaled, jnp.maximum(s.scale, columns), s.scale),
        jnp.where(taken, jnp.maximum(s.peak, columns), s.peak),
        s.scaled,
        radius,
        s.iterations + taken,
        s.trials + 1,
        s.code,
        ~jnp.isfinite(size) | (wanted & ~good),
        s.explained,
        s.cosine,
    )
    stays = new._replace(code=_stuck(fit, new, actual).astype(jnp.int32))
    new = jax.tree.map(lambda a, b: jnp.where(taken, a, b), _judged(fit, new), stays)
    if fit.callback is not None:
        jax.debug.callback(fit.callback, result_of(fit, new))
    return new


def _stuck(fit: Fit, s: State, actual: jax.Array) -> jax.Array:
    """The status after a step that was not taken; ``actual``: the relative decrease of the sum of squares."""
    eps = fit.eps
    # The linear model predicts next to nothing: rounding hides what is left to gain.
    level = (s.explained <= eps**0.375) & (s.cosine <= eps**0.25) | (s.cosine <= eps**0.375)
    level &= ~s.failed
    least = eps * norm([s.scale * s.x]) if fit.shrinks else eps
    ends = (s.radius <= least) | (level & (jnp.abs(actual) <= 10 * eps))
    code = jnp.where(s.failed, Status.NOT_FINITE, Status.STEP_TOO_SMALL)
    code = jnp.where(level, Status.CONVERGED_VALUE, code)
    return jnp.where(ends, code, Status.RUNNING)
