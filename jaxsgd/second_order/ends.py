"""The end of a search for least squares: a minimum, a saddle point or a flat place. And the ways to leave it."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from jaxsgd.second_order.linear_model import column_norms, linear_model
from jaxsgd.second_order.region_search import Fit, State, free_part
from jaxsgd.second_order.result import Status
from jaxsgd.second_order.vectors import norm

__all__ = ["checked", "dead", "downhill", "named", "revived"]

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
    return jax.jvp(lambda x: jax.jvp(fit.residuals, (x,), (v,))[1], (x,), (v,))


def named(fit: Fit, s: State) -> State:
    """The end of a try, with the name of a saddle point where it is one."""
    if not fit.tall:
        return s  # J may come from a function with reverse mode alone, and there are many directions
    saddle = jax.lax.cond(
        s.code == Status.CONVERGED_GRADIENT,
        lambda: jnp.any(_curved(fit, s)[1] < BENT),
        lambda: jnp.zeros((), bool),
    )
    return s._replace(code=jnp.where(saddle, Status.SADDLE_POINT, s.code).astype(jnp.int32))


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
    root = fit.eps**0.5
    return (s.columns * _sizes(fit, s) <= root * s.norm) & (s.norm > root * norm([fit.r]))


def _elsewhere(fit: Fit, s: State, i: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Other places of parameter ``i``, the norms of the residuals there, and where it changes them."""
    at, one = s.x[i], jnp.ones((), s.x.dtype)
    places = jnp.stack([fit.x[i], *(at * share for share in (0.5, 0.1, 1e-3, 0, -1)), one, -one])
    if fit.box is not None:
        places = jnp.clip(places, fit.box.lower[i], fit.box.upper[i])
    norms = jax.vmap(lambda place: norm([fit.residuals(s.x.at[i].set(place))]))(places)
    return places, norms, ~(jnp.abs(norms - s.norm) <= 1e-4 * s.norm)


def revived(fit: Fit, s: State) -> tuple[jax.Array, jax.Array]:
    """The point with each dead parameter at the best place where it has an effect, and the residuals there."""

    def place(i: jax.Array) -> jax.Array:
        places, norms, moves = _elsewhere(fit, s, i)
        usable = moves & jnp.isfinite(norms)
        return jnp.where(jnp.any(usable), places[jnp.argmin(jnp.where(usable, norms, jnp.inf))], s.x[i])

    x = jnp.where(dead(fit, s), jax.lax.map(place, jnp.arange(len(s.x))), s.x)
    return x, fit.residuals(x)


def checked(fit: Fit, s: State) -> State:
    """The best end, flat where a parameter has neither slope nor curvature, but an effect elsewhere."""

    def flat(i: jax.Array) -> jax.Array:
        second = _derivatives(fit, s.x, jnp.zeros_like(s.x).at[i].set(_sizes(fit, s)[i]))[1]
        straight = norm([second]) <= fit.eps**0.5 * s.norm
        return straight & jnp.any(_elsewhere(fit, s, i)[2])

    idle = dead(fit, s) & (s.code <= Status.CONVERGED_STEP)
    if fit.box is not None:
        idle &= (s.x > fit.box.lower) & (s.x < fit.box.upper)
    left = jax.lax.cond(
        jnp.any(idle),
        lambda: jnp.any(idle & jax.lax.map(flat, jnp.arange(len(s.x)))),
        lambda: jnp.zeros((), bool),
    )
    return s._replace(code=jnp.where(left, Status.FLAT, s.code).astype(jnp.int32))
