"""A line search that sees one trial at a time, so that the solver around it compiles the function once."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jaxsgd.second_order.loops import cond

__all__ = ["Line", "judge_trial", "step_from"]

DECREASE = 1e-4
"""Armijo's constant (Nocedal & Wright 2006, section 3.1)."""
ROUNDING = 8
"""Values that differ by fewer units in the last place count as equal; slopes then decide (Hager & Zhang 2005)."""
TRIALS = 30


class Line(NamedTuple):
    """A search along one direction. The minimum is between the points ``lo`` and ``hi``.

    A point is ``[step, value, slope]``; steps are multiples of the direction. As one array, a point is one kernel where
    it changes: three scalars would be three, each with all that decides about the change.

    Attributes:
      a: the step of the next trial.
      d0: the slope at the start.
      lo: the best point so far.
      hi: the other end; its step is infinite as long as none is known.
      width: the distance of both before the last trial; infinite as long as there was no other end.
      trials: the number of trials.
      forced: whether the next trial is the best point again, to be taken.
      a_max: the largest step, or None.
    """

    a: Any
    d0: Any
    lo: Any
    hi: Any
    width: Any
    trials: Any
    forced: Any
    a_max: Any


def step_from(a: jax.Array, f0: jax.Array, d0: jax.Array, a_max: jax.Array | None) -> Line:
    """A search from a point with value ``f0`` and slope ``d0``, with the first step ``a`` and the largest ``a_max``."""
    zero, far = jnp.zeros_like(f0), jnp.full_like(f0, jnp.inf)
    a = a if a_max is None else jnp.minimum(a, a_max)
    lo, hi = jnp.stack([zero, f0, d0]), jnp.stack([far, far, zero])
    return Line(a, d0, lo, hi, far, jnp.zeros((), jnp.int32), jnp.zeros((), bool), a_max)


def _cubic(a: Any, fa: Any, da: Any, b: Any, fb: Any, db: Any) -> jax.Array:
    """The minimizer of the cubic with these values and slopes; not finite if there is none."""
    z = 3 * (fa - fb) / (b - a) + da + db
    largest = jnp.maximum(jnp.abs(z), jnp.maximum(jnp.abs(da), jnp.abs(db)))
    root = (z / largest) ** 2 - (da / largest) * (db / largest)
    w = jnp.sign(b - a) * largest * jnp.sqrt(root)
    return b - (b - a) * (db + w - z) / (db - da + 2 * w)


def _inside(line: Line) -> jax.Array:
    """The next step in a bracket: the cubic's minimizer, away from the ends; half-way if the bracket shrinks slowly."""
    lo, hi = line.lo[0], line.hi[0]
    width = hi - lo
    cubic = _cubic(*line.lo, *line.hi)
    # Next to the start of a direction of unknown scale the minimizer may be far below the first trial.
    near = jnp.where((lo == 0) & (line.trials < 4), 1e-3, 0.1)
    share = jnp.clip((cubic - lo) / width, near, 0.9)
    known = jnp.isfinite(share) & jnp.isfinite(line.hi[1])
    share = jnp.where(known, share, jnp.where(lo == 0, 0.1, 0.5))
    slow = jnp.isfinite(line.width) & (jnp.abs(width) > 0.66 * line.width)
    return lo + width * jnp.where(slow & known, jnp.minimum(share, 0.5), share)


def _beyond(line: Line, before: Line) -> jax.Array:
    """The next step beyond the best one: where the slope would vanish, 1.1 to 10 times as far; else 4 times."""
    gained = line.lo[0] - before.lo[0]
    secant = -line.lo[2] * gained / (line.lo[2] - before.lo[2])
    share = jnp.where(line.lo[2] > before.lo[2], jnp.clip(secant / gained, 1.1, 10), 4)
    return line.lo[0] + jnp.where(jnp.isfinite(share), share, 4) * gained


def judge_trial(
    line: Line, f0: jax.Array, f: jax.Array, d: jax.Array, finite: jax.Array, curvature: float
) -> tuple[Line, Any, Any]:
    """Judge the trial at ``line.a`` and choose the next.

    Args:
      line: the search.
      f0: the value at its start.
      f, d: the value and the slope at ``line.a``.
      finite: whether they, and the gradient, are finite.
      curvature: the largest share of the first slope that an accepted step has left.

    Returns:
      ``(line, accepted, failed)``. After an accepted trial the line is as it was.
    """
    eps = jnp.finfo(f.dtype).eps
    equal = jnp.abs(f - f0) <= ROUNDING * eps * jnp.abs(f0)
    enough = f <= f0 + DECREASE * line.a * line.d0
    flat = jnp.abs(d) <= curvature * jnp.abs(line.d0)
    wolfe = (enough | (equal & (d <= (2 * DECREASE - 1) * line.d0))) & flat
    accepted = finite & (wolfe | line.forced)
    if line.a_max is not None:
        accepted |= finite & enough & (line.a >= line.a_max)
    high = jnp.where(equal, False, ~enough | (f >= line.lo[1])) | ~finite
    # Most trials are accepted: these skip the search for the next.
    done = line, jnp.zeros((), bool)
    line, failed = cond(accepted, lambda: done, lambda: _next_trial(line, f0, f, d, high, finite))
    return line, accepted, failed


def _next_trial(
    line: Line, f0: jax.Array, f: jax.Array, d: jax.Array, high: jax.Array, finite: jax.Array
) -> tuple[Line, jax.Array]:
    """The search after a trial that was not accepted, and whether it failed; ``high``: the minimum is before it."""
    eps = jnp.finfo(f.dtype).eps
    bracketed = line.hi[0] < jnp.inf
    turned = ~high & (d * jnp.where(bracketed, line.hi[0] - line.lo[0], 1) >= 0)
    here = jnp.stack([line.a, jnp.where(finite, f, jnp.inf), jnp.where(finite, d, 0)])
    lo = jnp.where(high, line.lo, here)
    hi = jnp.where(high, here, jnp.where(turned, line.lo, line.hi))
    new = line._replace(lo=lo, hi=hi, trials=line.trials + 1)

    bracketed |= high | turned
    beyond = _beyond(new, line)
    following = jnp.where(bracketed, _inside(new), beyond if line.a_max is None else jnp.minimum(beyond, line.a_max))
    narrow = bracketed & (jnp.abs(hi[0] - lo[0]) <= 4 * eps * jnp.maximum(jnp.abs(lo[0]), jnp.abs(hi[0])))
    over = (new.trials >= TRIALS) | narrow | ~jnp.isfinite(following) | (line.forced & ~finite)
    # The best step lowered the value, if not by enough: it is evaluated once more, and taken.
    lower = f0 - lo[1] > 2 * eps * jnp.abs(f0)
    forced = over & lower & ~line.forced
    width = jnp.abs(line.hi[0] - line.lo[0])
    new = new._replace(a=jnp.where(forced, lo[0], following), forced=forced, width=width)
    return new, over & ~forced
