"""The end of a search for least squares: a minimum, a saddle point or a flat place. And the ways to leave it."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from jaxsgd.matrices import singular_vectors
from jaxsgd.second_order.linear_model import column_norms, linear_model
from jaxsgd.second_order.loops import cond, varying, while_loop
from jaxsgd.second_order.region_search import Fit, State, free_part
from jaxsgd.second_order.result import Status
from jaxsgd.second_order.vectors import norm

__all__ = ["checked", "dead", "downhill", "named", "revived", "suspicions"]

BENT = -1e-3
"""A negative curvature, as a share of its positive part and the length of the second derivative."""
WAYS = tuple(sign * 10.0**-i for i in range(4) for sign in (1, -1))
"""Steps that leave a saddle point, in units of the length of the point."""

# -- saddle points ---------------------------------------------------------------------------------


def _curved(fit: Fit, s: State) -> tuple[jax.Array, jax.Array]:
    """Directions in units of J's columns, and the curvature of the sum of squares along each, at least -1.

    Residuals along ``v`` are ``r + t J v + t^2 r''(v, v) / 2``: the curvature is ``|J v|^2 + r' r''(v, v)``.
    """
    n, dtype = len(s.x), s.x.dtype
    factor = free_part(fit, s)
    columns = column_norms(factor[:, :-1])
    units = jnp.where(columns > 0, columns, 1)
    # Where J vanishes all directions are alike: single parameters, and all with signs by chance, whose products may be
    # what bends.
    signs = jax.random.rademacher(jax.random.key(0), (n, n), dtype) / n**0.5
    both = jnp.concatenate([linear_model(factor, units).vt, jnp.eye(n, dtype=dtype), signs]) / units
    if fit.box is not None:
        both = jnp.where(fit.box.holds(s.x, s.gradient), 0, both)

    def along(v: jax.Array) -> jax.Array:
        first, second = (part / s.norm for part in _derivatives(fit, s.x, v))
        convex, other = jnp.sum(first * first), jnp.sum(s.r / s.norm * second)
        size = convex + norm([second])
        return (convex + other) / jnp.where(size > 0, size, 1)

    return both, jax.vmap(along)(both)


def _derivatives(fit: Fit, x: jax.Array, v: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The first and the second derivative of the residuals along ``v``."""
    v = varying(x, v)
    return jax.jvp(lambda x: jax.jvp(fit.residuals, (x,), (v,))[1], (x,), (v,))


def suspicions(fit: Fit, s: State) -> tuple[jax.Array, jax.Array]:
    """Whether a success is a saddle point; if not, whether the Jacobian leaves out directions there."""
    no = jnp.zeros((), bool)
    if not fit.tall:
        return no, no  # J may come from a function with reverse mode alone, and there are many directions
    ended = (s.code >= Status.CONVERGED_GRADIENT) & (s.code <= Status.CONVERGED_STEP)
    missed = ended & fit.misses(s)
    saddle = cond(
        (s.code == Status.CONVERGED_GRADIENT) | missed, lambda: jnp.any(_curved(fit, s)[1] < BENT), lambda: no
    )
    return saddle, missed & ~saddle & jnp.any(_unseen(fit, s)[1])


def named(fit: Fit, s: State) -> tuple[State, jax.Array]:
    """The end of a try, with the name of a saddle point or of a flat place where it is one.

    Returns:
      The end, and the start of another try: if the end is flat, the parameters that have lost their effect together
      are elsewhere there.
    """
    if not fit.tall:
        return s, s.x
    no = jnp.zeros((), bool)
    saddle, blind = suspicions(fit, s)
    ways, which = _unseen(fit, s)

    def body(_: Any) -> tuple[jax.Array, jax.Array, jax.Array]:
        moved, elsewhere = _together(fit, s, which)
        return no, jnp.any(_straight(fit, s, ways)) & elsewhere, moved

    # A loop of one turn at most, which a batch enters only if one of its members does.
    _, lost, moved = while_loop(lambda carry: carry[0], body, (blind, no, s.x))
    code = jnp.where(saddle, Status.SADDLE_POINT, jnp.where(lost, Status.FLAT, s.code))
    return s._replace(code=code.astype(jnp.int32)), moved


def downhill(fit: Fit, s: State) -> tuple[jax.Array, jax.Array]:
    """The best of some points along the direction of the most negative curvature, and the residuals there."""
    ways, curvature = _curved(fit, s)
    # Signs by chance are the last resort.
    chosen = (curvature < BENT) & (jnp.arange(len(ways)) < len(ways) - len(s.x))
    way = ways[jnp.argmin(jnp.where(chosen, curvature - 1, curvature))]
    far = norm([jnp.where(s.columns > 0, s.columns, 1) * s.x])
    points = s.x + jnp.where(far > 0, far, 1) * jnp.asarray(WAYS, s.x.dtype)[:, None] * way
    if fit.box is not None:
        points = jnp.clip(points, *fit.box)
    norms = jax.vmap(lambda point: norm([fit.residuals(point)]))(points)
    x = points[jnp.argmin(jnp.where(jnp.isfinite(norms), norms, jnp.inf))]
    return x, fit.residuals(x)


# -- parameters without effect ---------------------------------------------------------------------


def _sizes(fit: Fit, s: State) -> jax.Array:
    """The size of each parameter; where it began at zero, at least 1."""
    return jnp.maximum(jnp.abs(s.x), jnp.where(fit.x == 0, 1, jnp.abs(fit.x)))


def dead(fit: Fit, s: State) -> jax.Array:
    """Parameters that could double without an effect on the residuals, by the Jacobian."""
    return (s.columns * _sizes(fit, s) <= fit.eps**0.5 * s.norm) & fit.misses(s)


def _elsewhere(fit: Fit, s: State, i: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Other places of parameter ``i``, the norms of the residuals there, and where it changes them."""
    at, one = s.x[i], jnp.ones((), s.x.dtype)
    places = jnp.stack([fit.x[i], *(at * share for share in (0.5, 0.1, 1e-3, 0, -1)), one, -one])
    if fit.box is not None:
        places = jnp.clip(places, fit.box.lower[i], fit.box.upper[i])
    norms = jax.vmap(lambda place: norm([fit.residuals(s.x.at[i].set(place))]))(places)
    return places, norms, ~(jnp.abs(norms - s.norm) <= 1e-4 * s.norm)


def revived(fit: Fit, s: State, moved: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The point with each dead parameter at the best place where it has an effect, and the residuals there.

    From a flat end it is ``moved``, if that is another point.
    """

    def place(i: jax.Array) -> jax.Array:
        places, norms, moves = _elsewhere(fit, s, i)
        usable = moves & jnp.isfinite(norms)
        return jnp.where(jnp.any(usable), places[jnp.argmin(jnp.where(usable, norms, jnp.inf))], s.x[i])

    single = jnp.where(dead(fit, s), jax.lax.map(place, jnp.arange(len(s.x))), s.x)
    x = jnp.where((s.code == Status.FLAT) & jnp.any(moved != s.x), moved, single)
    return x, fit.residuals(x)


def checked(fit: Fit, s: State) -> State:
    """The best end, flat where a parameter has neither slope nor curvature, but an effect elsewhere."""

    def flat(i: jax.Array) -> jax.Array:
        second = _derivatives(fit, s.x, jnp.zeros_like(s.x).at[i].set(_sizes(fit, s)[i]))[1]
        # Where it is not finite, nothing shows that the residuals bend.
        straight = ~(norm([second]) > fit.eps**0.5 * s.norm)
        return straight & jnp.any(_elsewhere(fit, s, i)[2])

    idle = dead(fit, s) & (s.code <= Status.CONVERGED_STEP)
    if fit.box is not None:
        idle &= (s.x > fit.box.lower) & (s.x < fit.box.upper)
    left = cond(
        jnp.any(idle),
        lambda: jnp.any(idle & jax.lax.map(flat, jnp.arange(len(s.x)))),
        lambda: jnp.zeros((), bool),
    )
    return s._replace(code=jnp.where(left, Status.FLAT, s.code).astype(jnp.int32))


# -- parameters that have lost their effect together -----------------------------------------------


def _unseen(fit: Fit, s: State) -> tuple[jax.Array, jax.Array]:
    """Directions that double a parameter without an effect on the residuals, by the Jacobian; and its parameters.

    Returns:
      Rows, zero where the Jacobian sees the direction; and whether each parameter changes along one of them.
    """
    factor, sizes = free_part(fit, s), _sizes(fit, s)
    columns = column_norms(factor[:, :-1])
    units = jnp.where(columns > 0, columns, 1)
    vt = jnp.where(columns > 0, linear_model(factor, units).vt, 0)
    share = jnp.max(jnp.abs(vt / units) / sizes, axis=1, keepdims=True)
    ways = vt / units / jnp.where(share > 0, share, 1)
    effect = column_norms(factor[:, :-1] @ ways.T)
    # Columns of zeros are of parameters at bounds, or of single ones without effect.
    unseen = (effect <= fit.eps**0.5 * s.norm) & (jnp.sum(vt * vt, axis=1) > 0.01)
    ways = jnp.where(unseen[:, None], ways, 0)
    effects = jnp.abs(jnp.where(unseen[:, None], vt, 0))
    return ways, jnp.any((effects > 0) & (effects >= 0.1 * jnp.max(effects, axis=1, keepdims=True)), axis=0)


def _straight(fit: Fit, s: State, ways: jax.Array) -> jax.Array:
    """Along which directions the residuals stay as they are to second order, if the other parameters follow."""
    root = fit.eps**0.5
    j = fit.jacobian(s.x)
    columns = column_norms(free_part(fit, s)[:, :-1])
    left, values, _ = singular_vectors(jnp.where(columns > 0, j / jnp.where(columns > 0, columns, 1), 0))
    left = jnp.where(values > root * values[0], left, 0)
    bends = jax.vmap(lambda way: _derivatives(fit, s.x, way)[1])(ways)
    bends = bends - (bends @ left) @ left.T
    # Where the second derivative is not finite, nothing shows that they bend.
    return jnp.any(ways != 0, axis=1) & ~(column_norms(bends.T) > root * s.norm)


def _together(fit: Fit, s: State, which: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The end with other values of some parameters, and whether more parameters have an effect of their own there.

    Of some points it is the one where the part of the residuals that the Jacobian cannot explain is smallest.
    """
    shares = jnp.asarray((0.5, 0.1, 1e-3, 0, -1), s.x.dtype)[:, None]
    ones = jnp.ones_like(s.x)[None]
    points = jnp.where(which, jnp.concatenate([fit.x[None], shares * s.x, ones, -ones]), s.x)
    if fit.box is not None:
        points = jnp.clip(points, *fit.box)

    def seen(factor: jax.Array, columns: jax.Array) -> tuple[jax.Array, jax.Array]:
        model = linear_model(factor, jnp.where(columns > 0, columns, 1))
        own = model.s > fit.eps**0.5 * model.s[0]
        return jnp.sum(own), norm([jnp.where(own, model.c, 0)])

    def at(x: jax.Array) -> tuple[jax.Array, jax.Array]:
        factor, columns, good = fit.factored(x, fit.residuals(x))
        rank, explained = seen(factor, columns)
        size = norm([factor[:, -1]])
        share = explained / jnp.where(size > 0, size, 1)
        return jnp.where(good, rank, -1), size * jnp.sqrt(jnp.maximum((1 - share) * (1 + share), 0))

    ranks, rests = jax.lax.map(at, points)
    better = (ranks > seen(s.factor, s.columns)[0]) & jnp.isfinite(rests)
    return points[jnp.argmin(jnp.where(better, rests, jnp.inf))], jnp.any(better)
