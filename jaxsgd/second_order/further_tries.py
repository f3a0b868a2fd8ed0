"""Further tries of least squares where an end is no minimum, or may not be the best one."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from jaxsgd.second_order.ends import checked, dead, downhill, named, revived, suspicions
from jaxsgd.second_order.linear_model import linear_model
from jaxsgd.second_order.loops import switch, while_loop
from jaxsgd.second_order.region_search import Fit, State, begin, search
from jaxsgd.second_order.result import Status

__all__ = ["best_end", "first_end"]

TRIES = ((True, 100.0), (False, 1.0), (False, 0.1), (True, 0.1))
"""``(scaled, radius)`` of each try: whether columns of the Jacobian scale the parameters, and the first radius in
units of the length of the start. The first is MINPACK's."""
REVIVALS = ((True, 1.0), (False, 1.0))
"""The same of further tries, from the best end with parameters that have lost their effect where they have one."""
LOST = 1e-3
"""A parameter has lost its effect where its column of the Jacobian is below this share of its largest norm."""


def first_end(fit: Fit, most: int) -> tuple[State, jax.Array]:
    """The end of the first try, and whether it is that of `best_end` for certain.

    The program is about half as large. Its end counts unless it failed, is a saddle point, or leaves out a parameter.
    """
    s = search(fit, _begun(fit, jnp.zeros((), jnp.int32), fit.x, fit.r), jnp.asarray(most, jnp.int32))
    saddle, blind = suspicions(fit, s)
    return s, ~(_doubtful(fit, jnp.ones((), jnp.int32), s) | saddle | blind)


def _tries(fit: Fit) -> tuple[tuple[bool, float], ...]:
    return TRIES + REVIVALS if fit.tall else TRIES


def _begun(fit: Fit, i: jax.Array, x: jax.Array, r: jax.Array) -> State:
    """Try ``i`` at its start."""
    scaled, share = zip(*_tries(fit), strict=True)
    return begin(fit, x, r, jnp.asarray(scaled)[i], jnp.asarray(share, x.dtype)[i])


def best_end(fit: Fit, most: int) -> State:
    """The best end of all tries; its counts are of all.

    Args:
      fit: the problem.
      most: the largest number of trial steps of the first try, and of all others together.
    """

    def another(carry: Any) -> Any:
        i, best, moved, left, trials, iterations = carry
        x, r = fit.x, fit.r
        if fit.tall:
            # From a saddle point every region leads back, if the start is symmetric.
            way = jnp.where(best.code == Status.SADDLE_POINT, 2, jnp.where(i < len(TRIES), 0, 1))
            roads = [lambda: (fit.x, fit.r), lambda: revived(fit, best, moved), lambda: downhill(fit, best)]
            x, r = switch(way, roads)
        s, after = named(fit, search(fit, _begun(fit, i, x, r), left))
        level = jnp.where(best.code <= Status.CONVERGED_STEP, 0.999 * best.norm, best.norm)
        better = (i == 0) | (s.norm < level) | ((s.norm == level) & (s.code <= Status.CONVERGED_STEP))
        best, moved = jax.tree.map(lambda a, b: jnp.where(better, a, b), (s, after), (best, moved))
        # The tries after the first share as many steps as the first may take.
        left = jnp.where(i == 0, left, left - s.trials)
        return i + 1, best, moved, left, trials + s.trials, iterations + s.iterations

    def goes_on(carry: Any) -> jax.Array:
        i, best, _, left, _, _ = carry
        return (i == 0) | ((i < (len(_tries(fit)) if fit.shrinks else 1)) & (left > 0) & _doubtful(fit, i, best))

    zero = jnp.zeros((), jnp.int32)
    shapes = jax.eval_shape(lambda: _begun(fit, zero, fit.x, fit.r))
    blank = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), shapes)
    begun = (zero, blank, fit.x, jnp.asarray(most, jnp.int32), zero, zero)
    _, s, _, _, trials, iterations = while_loop(goes_on, another, begun)
    s = s._replace(trials=trials, iterations=iterations)
    return checked(fit, s) if fit.tall else s


def _doubtful(fit: Fit, i: jax.Array, s: State) -> jax.Array:
    """Whether another try may find a better end than the best of ``i`` tries."""
    lost = jnp.any(s.columns <= LOST * jnp.where(s.peak > 0, s.peak, 1)) & (i == 1)
    lost = (lost | _deficient(fit, s)) & fit.misses(s)
    failed = (s.code > Status.CONVERGED_STEP) & (s.code != Status.NOT_FINITE_START)
    idle = jnp.any(dead(fit, s))
    return jnp.where(
        i < len(TRIES), failed | lost | idle, idle | (s.code == Status.SADDLE_POINT) | (s.code == Status.FLAT)
    )


def _deficient(fit: Fit, s: State) -> jax.Array:
    """Whether the Jacobian, in units of its columns, has not the rank of its shape."""
    values = linear_model(s.factor, jnp.where(s.columns > 0, s.columns, 1)).s
    return values[min(len(s.x), len(s.r)) - 1] <= fit.eps**0.5 * values[0]
