"""Newton's method: with a line search, in a region of trust, and by products with the Hessian."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jaxsgd.matrices import eigenvectors
from jaxsgd.second_order.descent import End, Move, Setting, Shown, end_of_numbers, report
from jaxsgd.second_order.loops import cond, while_loop
from jaxsgd.second_order.objective import Vector
from jaxsgd.second_order.result import Status
from jaxsgd.second_order.vectors import tilted, unit

__all__ = ["Newton", "trust_region"]


class Spectrum(NamedTuple):
    """The Hessian by its eigenvalues, ascending, and its eigenvectors."""

    values: jax.Array
    vectors: jax.Array


def hessian_of(value: Callable[[jax.Array], jax.Array], x: jax.Array) -> jax.Array:
    """The Hessian; the identity if it is not finite."""
    hessian = jax.jacfwd(jax.grad(value))(x)
    hessian = (hessian + hessian.T) / 2
    # LAPACK may not return for a matrix with a number that is not finite.
    return jnp.where(jnp.all(jnp.isfinite(hessian)), hessian, jnp.eye(x.size, dtype=x.dtype))


def scaled_spectrum(value: Callable[[jax.Array], jax.Array], x: jax.Array) -> Spectrum:
    """The spectrum in units of the parameters that make curvatures about 1; the vectors are in their own units."""
    hessian = hessian_of(value, x)
    size = jnp.abs(hessian)
    rows = jnp.max(size, axis=1)
    # A curvature, or where that is smaller, as at a saddle, what the others' products with it imply.
    implied = jnp.max(size * (size / jnp.where(rows > 0, rows, 1)), axis=1)
    own = jnp.maximum(jnp.diagonal(size), implied)
    units = 1 / jnp.sqrt(jnp.where(own > 0, own, 1))
    values, vectors = eigenvectors(units[:, None] * hessian * units)
    return Spectrum(values, units[:, None] * vectors)


def _least(values: jax.Array) -> jax.Array:
    """The smallest curvature that is told from zero."""
    return len(values) * jnp.finfo(values.dtype).eps * jnp.max(jnp.abs(values))


class Newton:
    """Newton's direction with the absolute values of the Hessian's eigenvalues, so that it always descends.

    Nocedal & Wright 2006, section 3.4.
    """

    curvature, tilts, lasts = 0.9, False, False

    def __init__(self, value: Callable[[Vector], jax.Array]) -> None:
        self.value = value

    def init(self, x: Vector) -> Spectrum:
        size, dtype = x[0].size, x[0].dtype
        return Spectrum(jnp.ones(size, dtype), jnp.zeros((size, size), dtype))

    def advance(self, memory: Spectrum, move: Move) -> tuple[Spectrum, Vector, Any, Any, Any]:
        (x,), (g,) = move.x, move.g
        memory = cond(
            move.took | move.first, lambda: scaled_spectrum(lambda x: move.scale * self.value([x]), x), lambda: memory
        )
        values, vectors = memory
        least = _least(values)
        size = jnp.maximum(jnp.abs(values), jnp.where(least > 0, least, 1))
        inner = jnp.matmul(g, vectors, precision="highest")
        # After a failed search: down the gradient, at the scale of the largest curvature.
        p = -jnp.matmul(vectors, inner / jnp.where(move.reset, jnp.max(size), size), precision="highest")
        bent = values[0] < -jnp.sqrt(jnp.finfo(x.dtype).eps) * jnp.max(jnp.abs(values))
        return memory, [p], jnp.ones_like(least), ~move.reset, bent


class Step(NamedTuple):
    """A step in a region of trust: the decrease of the model, and whether the region's border was not met."""

    p: jax.Array
    predicted: jax.Array
    inside: jax.Array


def exact_step(model: Spectrum, g: jax.Array, radius: jax.Array) -> Step:
    """The minimizer of the quadratic model within the radius (More & Sorensen 1983, doi:10.1137/0904038)."""
    values, vectors = model
    inner = jnp.matmul(g, vectors, precision="highest")
    length = jnp.linalg.norm(g)
    tiny = jnp.finfo(g.dtype).tiny
    least = jnp.maximum(_least(values), tiny)

    def along(shift: jax.Array) -> jax.Array:
        return -inner / jnp.maximum(values + shift, least)

    floor = jnp.maximum(0, -values[0])

    def narrow(state: Any) -> Any:
        low, high, shift, _, i = state
        step = along(shift)
        size = jnp.linalg.norm(step)
        low, high = jnp.where(size > radius, shift, low), jnp.where(size > radius, high, shift)
        change = jnp.sum(step**2 / jnp.maximum(values + shift, least))
        newton = shift + size**2 / jnp.where(change > 0, change, 1) * (size - radius) / radius
        inside = (newton > low) & (newton < high)
        middle = jnp.where(low > 0, jnp.sqrt(low) * jnp.sqrt(high), jnp.maximum(high / 100, 0))
        return low, high, jnp.where(inside, newton, middle), jnp.abs(size - radius) <= 0.01 * radius, i + 1

    free = along(jnp.zeros_like(radius))
    whole = (values[0] > least) & (jnp.linalg.norm(free) <= radius)
    high = floor + length / radius
    begin = (floor, high, jnp.where(floor > 0, floor + 1e-3 * length / radius, high / 100), whole, 0)
    low, high, shift, _, _ = while_loop(lambda s: ~s[3] & (s[4] < 60), narrow, begin)
    border = along(shift)
    size = jnp.linalg.norm(border)
    # The hard case: the rest of the way along the lowest curvature.
    rest = jnp.sqrt(jnp.maximum(radius**2 - (size**2 - border[0] ** 2), 0))
    lowest = jnp.where(border[0] >= 0, rest, -rest)
    hard = (values[0] <= least) & (size < 0.9 * radius)
    border = jnp.where(hard & (values[0] < -least), border.at[0].set(lowest), border)
    border = border * jnp.minimum(1, radius / jnp.maximum(jnp.linalg.norm(border), tiny))
    step = jnp.where(whole, free, border)
    predicted = -jnp.vdot(inner, step) - jnp.vdot(step, values * step) / 2
    flat = (values[0] > -least) & (jnp.linalg.norm(step) < 0.9 * radius)
    return Step(jnp.matmul(vectors, step, precision="highest"), predicted, whole | flat)


def truncated_step(product: Callable[[jax.Array], jax.Array], g: jax.Array, radius: jax.Array, tol: jax.Array) -> Step:
    """Conjugate gradients up to the border of the region (Steihaug 1983, doi:10.1137/0720042).

    Args:
      product: the Hessian times a vector.
      g: the gradient.
      radius: of the region.
      tol: the share of the gradient that the residual may have.
    """
    # In units of the gradient: its products with itself may leave the range of the dtype.
    size = jnp.linalg.norm(g)
    size = jnp.where(size > 0, size, 1)
    g, radius = g / size, radius / size
    zero = jnp.zeros_like(g)
    no = jnp.zeros((), bool)

    def body(state: Any) -> Any:
        p, hp, r, d, rr, _, _, i = state
        hd = product(d)
        curved = jnp.vdot(d, hd)
        dd, pd, pp = jnp.vdot(d, d), jnp.vdot(p, d), jnp.vdot(p, p)
        a = rr / jnp.where(curved > 0, curved, 1)
        to_border = jnp.maximum(radius**2 - pp, 0)
        out = to_border / (pd + jnp.sqrt(jnp.maximum(pd**2 + dd * to_border, 0)))
        leaves = ~(curved > 0) | (pp + 2 * a * pd + a**2 * dd >= radius**2)
        a = jnp.where(leaves, out, a)
        p, hp, r = p + a * d, hp + a * hd, r + a * hd
        fresh = jnp.vdot(r, r)
        done = leaves | (jnp.sqrt(fresh) <= tol)
        return p, hp, r, -r + fresh / jnp.where(rr > 0, rr, 1) * d, fresh, done, leaves, i + 1

    begin = (zero, zero, g, -g, jnp.vdot(g, g), jnp.linalg.norm(g) == 0, no, 0)
    most = 2 * g.size + 10
    p, hp, _, _, _, _, leaves, _ = while_loop(lambda s: ~s[5] & (s[7] < most), body, begin)
    return Step(size * p, size * (size * (-jnp.vdot(g, p) - jnp.vdot(p, hp) / 2)), ~leaves)


class _Carry(NamedTuple):
    x: Any
    f: Any
    g: Any
    scale: Any
    model: Any
    step: Step
    radius: Any
    f_first: Any
    g_first: Any
    iterations: Any
    evaluations: Any
    code: Any


def trust_region(
    value: Callable[[Vector], jax.Array],
    x: Vector,
    setting: Setting,
    shown: Shown,
    *,
    exact: bool,
    callback: Callable[..., None] | None = None,
) -> End:
    """Minimize by Newton steps in a region of trust (Conn, Gould & Toint 2000; Nocedal & Wright 2006, chapter 4).

    Args:
      value: the function.
      x: the start, one flat array.
      setting: tolerance and limits.
      shown: gives the point and the norm that a result has.
      exact: solve for each step exactly, by eigenvalues. Otherwise by conjugate gradients.
      callback: called with ``(stepped, iteration, x, f, gradient norm)``, see `report`.
    """
    dtype, size = x[0].dtype, x[0].size
    eps, farthest = float(jnp.finfo(dtype).eps), end_of_numbers(x)

    def scaled(scale: jax.Array) -> Callable[[jax.Array], jax.Array]:
        return lambda x: scale * value([x])

    def next_step(x: Any, g: Any, scale: Any, model: Any, radius: Any, g_first: Any) -> Step:
        if exact:
            return exact_step(model, g, radius)
        fallen = jnp.max(jnp.abs(g)) / jnp.where(g_first > 0, g_first, 1)
        # Below rounding, residuals say nothing.
        share = jnp.clip(jnp.sqrt(fallen), 100 * eps, 0.1)
        return truncated_step(lambda v: jax.jvp(jax.grad(scaled(scale)), (x,), (v,))[1], g, radius, share)

    def body(c: _Carry) -> _Carry:
        first = c.f == jnp.inf
        xt = c.x + c.step.p
        ft, gt = jax.value_and_grad(scaled(c.scale))(xt)
        fine = jnp.isfinite(ft) & jnp.all(jnp.isfinite(gt))
        # Where products of such values leave the range of the dtype, the start is evaluated again, in another unit.
        scale = unit(jnp.maximum(jnp.abs(ft), jnp.max(jnp.abs(gt))))
        again = (c.evaluations == 0) & fine & (scale != 1) & (setting.max_evaluations > 1)
        scale = jnp.where(again, scale, c.scale)
        predicted, length = c.step.predicted, jnp.linalg.norm(c.step.p)
        blur = eps * jnp.sum(jnp.abs(c.g * c.x))  # what rounding of the point does to the value
        gained = c.f - ft
        most = jnp.maximum(jnp.abs(gained), predicted)
        ratio = gained / jnp.where(predicted > 0, predicted, 1)
        ratio = jnp.where(most <= 8 * eps * jnp.abs(c.f) + blur, 0, ratio)
        # Where rounding may hide the change of the value, a smaller gradient counts; a value near zero may be the
        # difference of larger numbers.
        size_f = jnp.maximum(jnp.abs(c.f), jnp.minimum(c.scale, jnp.abs(c.f_first)))
        better = jnp.max(jnp.abs(gt)) < jnp.max(jnp.abs(c.g))
        ratio = jnp.where((most <= 8 * eps * size_f + blur) & better, 1, ratio)
        ratio = jnp.where(fine, ratio, -1)
        took = jnp.where(first, fine & ~again, fine & (ratio > 1e-4) & (predicted > 0))
        x, f, g = (jnp.where(took, a, b) for a, b in zip((xt, ft, gt), (c.x, c.f, c.g), strict=True))
        grown = jnp.where((ratio > 0.75) & ~c.step.inside, jnp.maximum(c.radius, 3 * length), c.radius)
        # Where a step fails, the parabola through both values and the first slope tells how far to go.
        slope = jnp.vdot(c.g, c.step.p)
        parabola = jnp.clip(-slope / (2 * (-gained - slope)), 0.1, 0.5)
        shrunk = jnp.where(fine & jnp.isfinite(parabola), parabola, 0.1) * length
        radius = jnp.where(ratio < 0.25, shrunk, grown)
        model = c.model
        if exact:
            model = cond(took, lambda: Spectrum(*eigenvectors(hessian_of(scaled(scale), x))), lambda: c.model)
        top = jnp.max(jnp.abs(g))
        # Long enough for the value to show what the slope promises.
        shows = 100 * eps * jnp.abs(f) / jnp.where(top > 0, top, 1)
        radius = jnp.where(first, jnp.maximum(jnp.maximum(1, jnp.linalg.norm(x)), shows), radius)
        f_first, g_first = jnp.where(first, f, c.f_first), jnp.where(first, top, c.g_first)
        # After a steep start values leave the range of its unit: then they get one of their own.
        up = jnp.where(took & ~first, jnp.clip(unit(jnp.maximum(jnp.abs(f), top)), 1, jnp.maximum(1, 1 / scale)), 1)
        f, g, top, scale, f_first, g_first = (up * part for part in (f, g, top, scale, f_first, g_first))
        model = model._replace(values=up * model.values)
        step = next_step(x, g, scale, model, radius, g_first)
        if not exact:
            step = step._replace(p=jnp.where(first, tilted([step.p])[0], step.p))
        size_f = jnp.maximum(jnp.abs(f), jnp.minimum(scale, jnp.abs(f_first)))
        size_g = jnp.minimum(scale, jnp.maximum(jnp.abs(f), g_first))
        small = top <= setting.tol * size_g
        least = jnp.maximum((0.1 * setting.tol) ** 2 * size_f, eps * jnp.abs(f))
        done = took & small & step.inside & (step.predicted <= least)
        bent = (top == 0) & ~step.inside
        code = jnp.where(done, Status.CONVERGED_GRADIENT, Status.RUNNING)
        # A step that was refused although it was to gain no more than rounding: there is nothing left to gain.
        spent = ~took & ~first & (predicted <= 4 * eps * jnp.abs(f) + blur) & c.step.inside & fine
        spent &= top <= jnp.sqrt(setting.tol) * g_first
        code = jnp.where((code == 0) & spent, Status.CONVERGED_VALUE, code)
        small_radius = radius <= eps * eps * jnp.maximum(jnp.linalg.norm(x), eps)
        tight = ~took & (length <= eps * jnp.linalg.norm(x) / 4) | small_radius
        code = jnp.where((code == 0) & tight & ~first, Status.STEP_TOO_SMALL, code)
        if exact:
            convex = model.values[0] >= -_least(model.values)
            code = jnp.where((code == Status.STEP_TOO_SMALL) & small & convex, Status.CONVERGED_GRADIENT, code)
        code = jnp.where((code == 0) & ~bent & (step.predicted <= 0), Status.STEP_TOO_SMALL, code)
        code = jnp.where((code == 0) & bent & (step.predicted <= 0), Status.SADDLE_POINT, code)
        code = jnp.where(again, Status.RUNNING, code)
        code = jnp.where(first & ~fine, Status.NOT_FINITE_START, code)
        lowest = -jnp.maximum(jnp.maximum(scale, jnp.abs(f_first)), g_first) / eps**2
        endless = (f < lowest) | (jnp.max(jnp.abs(x)) > farthest)
        code = jnp.where((ft == -jnp.inf) | (took & endless), Status.UNBOUNDED, code)
        iterations, evaluations = c.iterations + (took & ~first), c.evaluations + 1
        code = jnp.where((code == 0) & (evaluations >= setting.max_evaluations), Status.EVALUATION_LIMIT, code)
        over = took & (iterations >= setting.max_iterations)
        code = jnp.where((code == 0) & over, Status.ITERATION_LIMIT, code)
        if callback is not None:
            point, slope = shown([x], [g / scale])
            report(callback, took & ~first & (c.code == 0), iterations, point, f / scale, slope)
        code = code.astype(jnp.int32)
        return _Carry(x, f, g, scale, model, step, radius, f_first, g_first, iterations, evaluations, code)

    far, none = jnp.full((), jnp.inf, dtype), jnp.zeros((), jnp.int32)
    zero = jnp.zeros_like(x[0])
    square = size if exact else 0
    model = Spectrum(jnp.ones(square, dtype), jnp.zeros((square, square), dtype))
    step = Step(zero, jnp.zeros((), dtype), jnp.ones((), bool))
    one = jnp.ones((), dtype)
    carry = _Carry(x[0], far, zero, one, model, step, one, far, far, none, none, none)
    out = while_loop(lambda c: c.code == 0, body, carry)
    point, slope = shown([out.x], [out.g / out.scale])
    # Without a finite start there is no gradient.
    slope = jnp.where(out.f == jnp.inf, out.f, slope)
    return End(point, out.f / out.scale, slope, out.iterations, out.evaluations, out.code)
