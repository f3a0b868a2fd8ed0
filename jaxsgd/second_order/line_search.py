"""A line search that sees one trial at a time, so that the solver around it compiles the function once."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

__all__ = ["Line", "judge_trial", "step_from"]

DECREASE = 1e-4
"""Armijo's constant (Nocedal & Wright 2006, section 3.1)."""
ROUNDING = 8
"""Values that differ by fewer units in the last place count as equal; slopes then decide (Hager & Zhang 2005)."""
TRIALS = 30


class Line(NamedTuple):
    """A search along one direction. ``lo`` is the best step so far, the minimum is between ``lo`` and ``hi``.

    Steps are multiples of the direction; each comes with the value f and the slope d there.
    """

    a: Any
    f0: Any
    d0: Any
    lo: Any
    f_lo: Any
    d_lo: Any
    hi: Any
    f_hi: Any
    d_hi: Any
    bracketed: Any
    width: Any
    older_width: Any
    trials: Any
    forced: Any
    a_max: Any


def step_from(a: jax.Array, f0: jax.Array, d0: jax.Array, a_max: jax.Array) -> Line:
    """A search from a point with value ``f0`` and slope ``d0``, with the first step ``a`` and the largest ``a_max``."""
    zero, no = jnp.zeros_like(f0), jnp.zeros((), bool)
    far = jnp.full_like(f0, jnp.inf)
    a = jnp.minimum(a, a_max)
    return Line(a, f0, d0, zero, f0, d0, far, far, zero, no, far, far, jnp.zeros((), jnp.int32), no, a_max)


def _cubic(a: Any, fa: Any, da: Any, b: Any, fb: Any, db: Any) -> jax.Array:
    """The minimizer of the cubic with these values and slopes; not finite if there is none."""
    z = 3 * (fa - fb) / (b - a) + da + db
    largest = jnp.maximum(jnp.abs(z), jnp.maximum(jnp.abs(da), jnp.abs(db)))
    root = (z / largest) ** 2 - (da / largest) * (db / largest)
    w = jnp.sign(b - a) * largest * jnp.sqrt(root)
    return b - (b - a) * (db + w - z) / (db - da + 2 * w)


def _inside(line: Line) -> jax.Array:
    """The next step in a bracket: the cubic's minimizer, away from the ends; half-way if the bracket shrinks slowly."""
    width = line.hi - line.lo
    cubic = _cubic(line.lo, line.f_lo, line.d_lo, line.hi, line.f_hi, line.d_hi)
    # Next to the start of a direction of unknown scale the minimizer may be far below the first trial.
    near = jnp.where((line.lo == 0) & (line.trials < 4), 1e-3, 0.1)
    share = jnp.clip((cubic - line.lo) / width, near, 0.9)
    known = jnp.isfinite(share) & jnp.isfinite(line.f_hi)
    share = jnp.where(known, share, jnp.where(line.lo == 0, 0.1, 0.5))
    slow = jnp.isfinite(line.older_width) & (jnp.abs(width) > 0.66 * line.older_width)
    return line.lo + width * jnp.where(slow & known, jnp.minimum(share, 0.5), share)


def _beyond(line: Line, before: Line) -> jax.Array:
    """The next step beyond the best one: where the slope would vanish, 1.1 to 10 times as far; else 4 times."""
    gained = line.lo - before.lo
    secant = -line.d_lo * gained / (line.d_lo - before.d_lo)
    share = jnp.where(line.d_lo > before.d_lo, jnp.clip(secant / gained, 1.1, 10), 4)
    return line.lo + jnp.where(jnp.isfinite(share), share, 4) * gained


def judge_trial(line: Line, f: jax.Array, d: jax.Array, finite: jax.Array, curvature: float) -> tuple[Line, Any, Any]:
    """Judge the trial at ``line.a`` and choose the next.

    Args:
      line: the search.
      f, d: the value and the slope at ``line.a``.
      finite: whether they, and the gradient, are finite.
      curvature: the largest share of the first slope that an accepted step has left.

    Returns:
      ``(line, accepted, failed)``.
    """
    eps = jnp.finfo(f.dtype).eps
    a = line.a
    equal = jnp.abs(f - line.f0) <= ROUNDING * eps * jnp.abs(line.f0)
    enough = f <= line.f0 + DECREASE * a * line.d0
    flat = jnp.abs(d) <= curvature * jnp.abs(line.d0)
    wolfe = (enough | (equal & (d <= (2 * DECREASE - 1) * line.d0))) & flat
    accepted = finite & (wolfe | line.forced | (enough & (a >= line.a_max)))

    high = jnp.where(equal, False, ~enough | (f >= line.f_lo)) | ~finite
    turned = ~high & jnp.where(line.bracketed, d * (line.hi - line.lo) >= 0, d >= 0)
    f, d = jnp.where(finite, f, jnp.inf), jnp.where(finite, d, 0)

    def choose(if_high: Any, if_turned: Any, other: Any) -> jax.Array:
        return jnp.where(high, if_high, jnp.where(turned, if_turned, other))

    new = line._replace(
        lo=jnp.where(high, line.lo, a),
        f_lo=jnp.where(high, line.f_lo, f),
        d_lo=jnp.where(high, line.d_lo, d),
        hi=choose(a, line.lo, line.hi),
        f_hi=choose(f, line.f_lo, line.f_hi),
        d_hi=choose(d, line.d_lo, line.d_hi),
        bracketed=line.bracketed | high | turned,
        trials=line.trials + 1,
    )
    width = jnp.where(new.bracketed, jnp.abs(new.hi - new.lo), jnp.inf)
    following = jnp.where(new.bracketed, _inside(new), jnp.minimum(_beyond(new, line), line.a_max))
    narrow = width <= 4 * eps * jnp.maximum(jnp.abs(new.lo), jnp.where(new.bracketed, jnp.abs(new.hi), 0))
    over = (new.trials >= TRIALS) | narrow | ~jnp.isfinite(following) | (line.forced & ~finite)
    # The best step lowered the value, if not by enough: it is evaluated once more, and taken.
    lower = line.f0 - new.f_lo > 2 * eps * jnp.abs(line.f0)
    forced = over & lower & ~line.forced
    new = new._replace(a=jnp.where(forced, new.lo, following), forced=forced, width=width, older_width=line.width)
    return new, accepted, over & ~forced & ~accepted
