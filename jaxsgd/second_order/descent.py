"""Descent with a line search: one loop whose every turn evaluates the function and its gradient once.

A model of the function gives the direction: L-BFGS, BFGS, conjugate gradients, Newton.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp

from jaxsgd.second_order.line_search import ROUNDING, Line, judge_trial, step_from
from jaxsgd.second_order.loops import cond, while_loop
from jaxsgd.second_order.objective import Vector
from jaxsgd.second_order.result import Status
from jaxsgd.second_order.vectors import axpy, dot, largest, multiplied, norm, select, tilted, times, unit

__all__ = [
    "End",
    "Limits",
    "Model",
    "Move",
    "Setting",
    "Shown",
    "clipped",
    "descend",
    "end_of_numbers",
    "plain_scale",
    "projected",
    "report",
]


PROBES = 20
"""The largest number of ends at which a change in the last place is tried."""


class Setting(NamedTuple):
    """Tolerance and limits, as scalars that a compiled program takes as arguments."""

    tol: Any
    max_iterations: Any
    max_evaluations: Any


class Limits(NamedTuple):
    """Lower and upper bounds as vectors."""

    lower: Vector
    upper: Vector


Shown = Callable[[Vector, Vector], tuple[Vector, jax.Array]]
"""``(x, gradient) -> (x, norm of the gradient)``, from the units of a search to those of the parameters."""


class End(NamedTuple):
    """The end of a search: the best point and what `jaxsgd.second_order.Result` says about it."""

    x: Vector
    f: Any
    grad_norm: Any
    iterations: Any
    evaluations: Any
    code: Any


class Move(NamedTuple):
    """The outcome of one trial, from which a model learns.

    Attributes:
      x, f, g: the current point, its value and gradient.
      scale: the factor of f and g: a power of two, 1 for values of an ordinary size.
      s, y: the last change of the point and of the gradient.
      drop: the last decrease of the value.
      took: whether the trial was accepted as a step, so that s and y are a pair.
      reset: whether the model has to forget all, for its direction failed.
      first: whether this is the first evaluation.
      a: the step that was taken along the last direction.
      p: the last direction.
    """

    x: Vector
    f: Any
    g: Vector
    scale: Any
    s: Vector
    y: Vector
    drop: Any
    took: Any
    reset: Any
    first: Any
    a: Any
    p: Vector


class Model(Protocol):
    """A model of the function: it gives directions, and the first step to try along each.

    Attributes:
      curvature: the largest share of the first slope that an accepted step has left.
      tilts: whether its first direction is tilted. It knows gradients alone: these keep a symmetry of the start, and
        the negative curvature across it stays unseen.
      lasts: whether it never forgets. Then it may take the curvature of a steep start for that of a flat valley. An
        end by value is tried once more without its memory.
    """

    curvature: float
    tilts: bool
    lasts: bool

    def init(self, x: Vector) -> Any:
        """The memory before the first evaluation."""
        ...

    def advance(self, memory: Any, move: Move) -> tuple[Any, Vector, Any, Any, Any]:
        """``(memory, direction, first step, known, bent)``.

        ``known``: whether the model has learnt about the curvature, so that the predicted decrease counts.
        ``bent``: whether the curvature is negative somewhere.
        """
        ...


class _Carry(NamedTuple):
    x: Vector
    f: Any
    g: Vector
    scale: Any
    p: Vector
    line: Line
    memory: Any
    fresh: Any
    still: Any
    lowest: Any
    promised: Any
    probing: Any
    probes: Any
    renewed: Any
    f_first: Any
    g_first: Any
    grad_norm: Any
    iterations: Any
    evaluations: Any
    code: Any


def plain_scale(move: Move, straight: jax.Array) -> jax.Array:
    """The share of the gradient that makes a step where nothing is known of the curvature; elsewhere 1.

    At the start that step has `first_length`. After a step along a straight slope it is as long as that.
    """

    def share() -> jax.Array:
        size = norm(move.g)
        length = jnp.where(move.first, first_length(norm(move.x), move.f, size), norm(move.s))
        return length / jnp.where(size > 0, size, 1)

    return cond(move.first | straight, share, lambda: jnp.ones((), move.g[0].dtype))


def first_length(size: jax.Array, f: jax.Array, slope: jax.Array) -> jax.Array:
    """The length of the first step, from the lengths of point and gradient: 1, or less where that is far off."""
    # A step that would take the linear model far below zero is long, if values are about zero or above.
    down = jnp.abs(f) / jnp.where(slope > 0, slope, 1)
    out = jnp.minimum(1, jnp.maximum(2 * down, 1e-2 * size))
    return jnp.where(out > 0, out, 1)


def end_of_numbers(start: Vector) -> jax.Array:
    """The size of a parameter beyond which its square overflows: from there a slope of zero says nothing."""
    return 0.01 * float(jnp.finfo(start[0].dtype).max) ** 0.5 * jnp.maximum(1, largest(start))


def projected(x: Vector, g: Vector, limits: Limits) -> jax.Array:
    """The largest entry of the step that a gradient step makes inside the bounds."""
    rows = zip(x, g, limits.lower, limits.upper, strict=True)
    return largest([jnp.clip(g, x - high, x - low) for x, g, low, high in rows])


def clipped(x: Vector, limits: Limits | None) -> Vector:
    """``x``, moved into the bounds."""
    if limits is None:
        return x
    return [jnp.clip(x, low, high) for x, low, high in zip(x, limits.lower, limits.upper, strict=True)]


def _room(x: Vector, p: Vector, limits: Limits | None) -> jax.Array | None:
    """The largest step along ``p`` inside the bounds; None without bounds."""
    if limits is None:
        return None
    out = jnp.full((), jnp.inf, x[0].dtype)
    for at, way, low, high in zip(x, p, limits.lower, limits.upper, strict=True):
        gap = jnp.where(way < 0, low - at, high - at) / jnp.where(way == 0, 1, way)
        out = jnp.minimum(out, jnp.min(jnp.where(way == 0, jnp.inf, gap), initial=jnp.inf))
    return jnp.maximum(out, 0)


def _last_place(x: Vector, f: jax.Array, g: Vector, limits: Limits | None) -> Vector:
    """A change in the last place against the gradient, of the entries where that shows in the value."""
    eps = jnp.finfo(f.dtype).eps

    def change(x: jax.Array, g: jax.Array) -> jax.Array:
        by = eps * jnp.abs(x)
        return jnp.where(jnp.abs(g) * by > ROUNDING * eps * jnp.abs(f), -jnp.sign(g) * by, 0)

    step = [change(x, g) for x, g in zip(x, g, strict=True)]
    return axpy(-1, x, clipped(axpy(1, x, step), limits))


def report(callback: Callable[..., None], stepped: jax.Array, *news: Any) -> None:
    """Call ``callback(stepped, *news)`` on the host where there was a step.

    Under `jax.vmap` it is called for all members: then ``stepped`` tells which of them have news.
    """
    cond(stepped, lambda: jax.debug.callback(callback, stepped, *news, ordered=False), lambda: None)


def descend(
    value_and_grad: Callable[[Vector, jax.Array], tuple[jax.Array, Vector]],
    x: Vector,
    model: Model,
    setting: Setting,
    shown: Shown,
    limits: Limits | None = None,
    callback: Callable[..., None] | None = None,
    *,
    probes: bool = False,
) -> End:
    """Minimize by steps along a model's directions.

    Args:
      value_and_grad: the function with its gradient at a point, both times a factor.
      x: the start; with bounds, inside them.
      model: gives the directions.
      setting: tolerance and limits.
      shown: gives the point and the norm that a result has.
      limits: bounds, or None.
      callback: called with ``(stepped, iteration, x, f, gradient norm)``, see `report`.
      probes: whether to try a change in the last place where a search without success, or for the value, ends. It takes
        a tenth more time to compile.
    """
    dtype = x[0].dtype
    eps = float(jnp.finfo(dtype).eps)
    zero, far = jnp.zeros((), dtype), jnp.full((), jnp.inf, dtype)
    nothing, none = [jnp.zeros_like(leaf) for leaf in x], jnp.zeros((), jnp.int32)
    yes = jnp.ones((), bool)
    # What stays the same is computed here. XLA would take it out of the loop, but copies the whole loop to do so.
    loosely, least = jnp.sqrt(setting.tol), (0.1 * setting.tol) ** 2
    tilts = tilted([jnp.ones_like(leaf) for leaf in x]) if model.tilts else []
    may_repeat = setting.max_evaluations > 1
    farthest = end_of_numbers(x)

    def share_left(now: _Carry) -> jax.Array:
        """The gradient as a share of the first."""
        return now.grad_norm / jnp.where(now.g_first > 0, now.g_first, 1)

    def little_left(now: _Carry) -> jax.Array:
        """Whether little is left to gain if decreases go with the squares of gradients, as they do near a minimum.

        At a kink the steps shrink to nothing and the gradient stays large.
        """
        return modest(now) & (share_left(now) ** 2 * (now.f_first - now.f) <= eps**0.5 * jnp.abs(now.f))

    def modest(now: _Carry) -> jax.Array:
        """Whether a step of 1, or as long as a shorter point, changes the value by a small part, by the gradient alone.

        After a steep start any other gradient is a small share of the first, also at a kink. A value that is no more
        than what rounding of the point makes of the gradient is as good as zero.
        """
        length, size = largest(now.x), jnp.abs(now.f)
        small = now.grad_norm * jnp.minimum(1, length) <= 0.01 * jnp.maximum(size, now.scale)
        return small | (size <= 10 * eps * length * now.grad_norm)

    def judge(c: _Carry, now: _Carry, took: Any, predicted: Any, known: Any, bent: Any) -> tuple[Any, Any]:
        """The status after an accepted step, and for how many steps the value has not moved."""
        size_f = jnp.maximum(jnp.abs(now.f), jnp.minimum(now.scale, jnp.abs(now.f_first)))
        size_g = jnp.minimum(now.scale, jnp.maximum(jnp.abs(now.f), now.g_first))
        by_gradient = (now.grad_norm <= setting.tol * size_g) & known
        by_gradient &= predicted <= jnp.maximum(least * size_f, eps * jnp.abs(now.f))
        by_gradient |= now.grad_norm == 0
        # A step may raise the value by rounding; lowering it again is no progress.
        unmoved = took & (now.f >= c.lowest - 2 * eps * jnp.abs(now.f))
        still = jnp.where(unmoved, c.still + 1, 0)
        quiet = (still >= 2) & known & (predicted <= 4 * eps * jnp.abs(now.f))
        fallen = modest(now) & (share_left(now) <= loosely)
        smooth = fallen | little_left(now)
        code = jnp.where(quiet, jnp.where(smooth, Status.CONVERGED_VALUE, Status.LINE_SEARCH_FAILED), Status.RUNNING)
        code = jnp.where((still >= 10) & fallen, Status.CONVERGED_VALUE, code)
        code = jnp.where(by_gradient, jnp.where(bent, Status.SADDLE_POINT, Status.CONVERGED_GRADIENT), code)
        return jnp.where(took, code, Status.RUNNING), jnp.where(took, still, c.still)

    def body(c: _Carry) -> _Carry:
        first = c.f == jnp.inf
        xt = clipped(axpy(c.line.a, c.p, c.x), limits)
        ft, gt = value_and_grad(xt, c.scale)
        top = largest(gt)
        fine = jnp.isfinite(ft) & jnp.isfinite(top)
        # Where products of such values leave the range of the dtype, the start is evaluated again, in another unit.
        scale = unit(jnp.maximum(jnp.abs(ft), top))
        again = (c.evaluations == 0) & fine & (scale != 1) & may_repeat
        scale = jnp.where(again, scale, c.scale)
        size = top if limits is None else scale * projected(xt, times(1 / scale, gt), limits)
        line, accepted, failed = judge_trial(c.line, c.f, ft, dot(gt, c.p), fine, model.curvature)
        # There is nothing to try below a change in the last place.
        failed |= c.probing & ~accepted & (line.lo[0] == 0) & (line.hi[0] <= 1)
        took = jnp.where(first, fine & ~again, accepted)
        failed = failed & ~first
        s = select(took & ~first, axpy(-1, c.x, xt), nothing)
        y = select(took & ~first, axpy(-1, c.g, gt), nothing)
        x, f, g = select(took, (xt, ft, gt), (c.x, c.f, c.g))
        restart = failed & ~c.fresh
        drop = jnp.where(took & ~first, c.f - ft, 0)
        move = Move(x, f, g, scale, s, y, drop, took & ~first, restart, first, c.line.a, c.p)
        memory, p, a, known, bent = model.advance(c.memory, move)
        if model.tilts:
            p = select(first, multiplied(tilts, p), p)
        slope = dot(g, p)
        # A direction that does not descend or is not finite gives way to the gradient, at the length of the last step.
        usable = (slope < 0) & jnp.isfinite(slope)

        def downhill() -> tuple[Vector, jax.Array]:
            plain = (norm(s) + eps * norm(x)) / jnp.where(norm(g) > 0, norm(g), 1)
            down = axpy(-1, x, clipped(axpy(-plain, g, x), limits))
            return down, dot(g, down)

        p, slope = cond(usable, lambda: (p, slope), downhill)
        now = c._replace(
            x=x,
            f=f,
            g=g,
            scale=scale,
            lowest=jnp.minimum(c.lowest, f),
            f_first=jnp.where(c.f_first == jnp.inf, f, c.f_first),
            g_first=jnp.where(c.f_first == jnp.inf, size, c.g_first),
            grad_norm=jnp.where(took, size, c.grad_norm),
            iterations=c.iterations + (took & ~first),
            evaluations=c.evaluations + 1,
        )
        predicted = -slope * a / 2
        code, still = judge(c, now, took, predicted, known, bent)
        turn = took | restart
        fresh = jnp.where(turn, ~known | restart | ~usable, c.fresh)
        line = select(turn, step_from(a, f, slope, _room(x, p, limits)), select(again, c.line, line))
        end = jnp.where(fine | ~first, Status.LINE_SEARCH_FAILED, Status.NOT_FINITE_START)
        stuck = (failed & c.fresh) | (turn & ~(slope < 0)) | (first & ~fine)
        # At a point where the value cannot be told from its neighbours, the search ends as a success if the
        # model saw that little is left to gain.
        gain = -c.line.d0 * jnp.minimum(1, c.line.a) / 2
        exhausted = failed & (gain <= 4 * eps * jnp.abs(f)) & (c.grad_norm <= loosely * c.g_first)
        exhausted |= failed & c.fresh & (c.grad_norm <= 100 * eps * c.g_first)
        exhausted &= modest(now)
        end = jnp.where(exhausted, Status.CONVERGED_VALUE, end)
        code = jnp.where((code == 0) & (stuck | exhausted), end, code)
        lowest = -jnp.maximum(jnp.maximum(scale, jnp.abs(now.f_first)), now.g_first) / eps**2
        endless = (f < lowest) | (largest(x) > farthest)
        code = jnp.where((ft == -jnp.inf) | (took & endless), Status.UNBOUNDED, code)
        over = now.evaluations >= setting.max_evaluations
        code = jnp.where((code == 0) & over, Status.EVALUATION_LIMIT, code)
        code = jnp.where((code == 0) & took & (now.iterations >= setting.max_iterations), Status.ITERATION_LIMIT, code)
        if callback is not None:
            point, slope = shown(x, times(1 / scale, g))
            report(callback, took & ~first & (c.code == 0), now.iterations, point, f / scale, slope)
        return now._replace(
            p=select(turn, p, c.p),
            line=line,
            memory=memory,
            fresh=fresh,
            still=still,
            promised=jnp.where(took, predicted, jnp.where(restart, jnp.maximum(c.promised, predicted), c.promised)),
            probing=c.probing & ~turn,
            code=code.astype(jnp.int32),
        )

    def probe(c: _Carry) -> _Carry:
        """Continue from an end where rounding of the parameters hides more than rounding of the value does.

        The model may not have seen some of them move, and a search may have failed for that rounding. A change in the
        last place tells. If that fails too, and no model promised more than such changes, the search has settled.
        """
        settled = c.probing & (c.code == Status.LINE_SEARCH_FAILED)
        settled &= little_left(c) & (c.promised <= -ROUNDING * c.line.d0)
        done = jnp.where(settled, Status.CONVERGED_VALUE, c.code)
        p = _last_place(c.x, c.f, c.g, limits)
        slope = dot(c.g, p)
        ends = (c.code == Status.CONVERGED_VALUE) | (c.code == Status.LINE_SEARCH_FAILED)
        goes_on = ends & ~c.probing & (slope < 0) & (c.probes < PROBES) & (c.evaluations < setting.max_evaluations)
        line = step_from(jnp.ones((), dtype), c.f, slope, None if limits is None else jnp.ones((), dtype))
        return c._replace(
            p=p,
            line=line,
            fresh=yes,
            probing=yes,
            probes=c.probes + 1,
            code=jnp.where(goes_on, Status.RUNNING, done).astype(jnp.int32),
        )

    def renew(c: _Carry) -> _Carry:
        """Continue from an end by value as from a start, as long as that lowers the value."""
        lower = c.f < c.renewed - 4 * eps * jnp.abs(c.f)
        # What failed after a success, and lowered nothing, was one.
        done = jnp.where((c.code == Status.LINE_SEARCH_FAILED) & ~lower, Status.CONVERGED_VALUE, c.code)
        goes_on = (c.code == Status.CONVERGED_VALUE) & lower & (c.evaluations < setting.max_evaluations)
        return select(goes_on, c._replace(renewed=c.f, **unlearnt(c.x)), c._replace(code=done.astype(jnp.int32)))

    def unlearnt(x: Vector) -> dict[str, Any]:
        """What a search from a point begins with: nothing is evaluated yet, and nothing learnt."""
        return {
            "f": far,
            "lowest": far,
            "g": nothing,
            "p": nothing,
            "line": step_from(zero, far, zero, None if limits is None else far),
            "memory": model.init(x),
            "fresh": yes,
            "still": none,
            "probing": ~yes,
            "code": none,
        }

    def search(c: _Carry) -> _Carry:
        return while_loop(lambda c: c.code == 0, body, c)

    def whole(c: _Carry) -> _Carry:
        c = search(c)
        c = probe(c) if probes else c
        return renew(c) if model.lasts else c

    carry = _Carry(
        x=x,
        scale=jnp.ones((), dtype),
        promised=zero,
        probes=none,
        renewed=far,
        f_first=far,
        g_first=far,
        grad_norm=far,
        iterations=none,
        evaluations=none,
        **unlearnt(x),
    )
    out = while_loop(lambda c: c.code == 0, whole, carry) if probes or model.lasts else search(carry)
    x, slope = shown(out.x, times(1 / out.scale, out.g))
    # Without a finite start there is no gradient.
    slope = jnp.where(jnp.isfinite(out.grad_norm), slope, out.grad_norm)
    return End(x, out.f / out.scale, slope, out.iterations, out.evaluations, out.code)
