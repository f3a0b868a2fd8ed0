"""BFGS with a dense inverse Hessian, and nonlinear conjugate gradients."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jaxsgd.second_order.descent import Move, plain_scale
from jaxsgd.second_order.objective import Vector
from jaxsgd.second_order.vectors import axpy, dot, norm, select

__all__ = ["BFGS", "ConjugateGradient"]


class _Inverse(NamedTuple):
    h: jax.Array
    gamma: Any
    count: Any


class BFGS:
    """BFGS: the inverse Hessian of all steps, as one matrix (Nocedal & Wright 2006, algorithm 6.1)."""

    curvature, tilts, lasts = 0.9, True, True

    def init(self, x: Vector) -> _Inverse:
        return _Inverse(jnp.eye(x[0].size, dtype=x[0].dtype), jnp.ones((), x[0].dtype), jnp.zeros((), jnp.int32))

    def advance(self, memory: _Inverse, move: Move) -> tuple[_Inverse, Vector, Any, Any, Any]:
        (s,), (y,), (g,) = move.s, move.y, move.g
        eye = jnp.eye(g.size, dtype=g.dtype)
        sy, yy = jnp.vdot(s, y), jnp.vdot(y, y)
        good = move.took & (sy > jnp.finfo(g.dtype).eps * norm(move.s) * norm(move.y)) & (yy > 0)
        sy, yy = jnp.where(good, sy, 1), jnp.where(good, yy, 1)
        gamma = jnp.where(good, sy / yy, memory.gamma)
        # The first pair sets the scale (6.20).
        h = jnp.where(good & (memory.count == 0), gamma * eye, memory.h)
        hy = jnp.matmul(h, y, precision="highest")
        updated = h + jnp.outer(s, s) * ((1 + jnp.vdot(y, hy) / sy) / sy) - (jnp.outer(hy, s) + jnp.outer(s, hy)) / sy
        h = jnp.where(good, updated, h)
        # Along a straight slope there is no pair: the next step is as long as the last.
        straight = move.took & ~good & (memory.count == 0)
        gamma = jnp.where(move.first | straight, plain_scale(move, straight), gamma)
        hg = jnp.matmul(h, g, precision="highest")
        # Rounding can leave the matrix indefinite: then all is forgotten but the scale.
        plain = move.first | straight | move.reset | ~(jnp.vdot(hg, g) > 0)
        h, p = jnp.where(plain, gamma * eye, h), jnp.where(plain, -gamma * g, -hg)
        count = jnp.where(plain, 0, memory.count + good)
        return _Inverse(h, gamma, count), [p], jnp.ones_like(sy), count > 0, jnp.zeros((), bool)


class _Last(NamedTuple):
    gamma: Any
    count: Any


class ConjugateGradient:
    """Nonlinear conjugate gradients (Hager & Zhang 2005, doi:10.1137/030601880)."""

    # Directions are conjugate only if the first is the gradient's.
    curvature, tilts, lasts = 0.4, False, False

    def init(self, x: Vector) -> _Last:
        return _Last(jnp.ones((), x[0].dtype), jnp.zeros((), jnp.int32))

    def advance(self, memory: _Last, move: Move) -> tuple[_Last, Vector, Any, Any, Any]:
        g, p, y = move.g, move.p, move.y
        py, sy, yy = dot(p, y), dot(move.s, y), dot(y, y)
        good = move.took & (py > 0) & (yy > 0)
        safe = jnp.where(good, py, 1)
        beta = (dot(y, g) - 2 * yy * dot(p, g) / safe) / safe
        # The lower bound on beta keeps the method convergent (their equation 1.5, with eta 0.4).
        least = -1 / (norm(p) * jnp.minimum(0.4, norm(move.g)))
        beta = jnp.where(good, jnp.maximum(beta, jnp.where(jnp.isfinite(least), least, 0)), 0)
        gamma = jnp.where(good, sy / jnp.where(good, yy, 1), memory.gamma)
        straight = move.took & ~good & (memory.count == 0)
        gamma = jnp.where(move.first | straight, plain_scale(move, straight), gamma)
        downhill = axpy(-1, g, [jnp.zeros_like(leaf) for leaf in g])
        conjugate = [b - leaf for b, leaf in zip([beta * leaf for leaf in p], g, strict=True)]
        descends = dot(conjugate, g) < -1e-10 * norm(conjugate) * norm(g)
        direction = select(descends & ~move.reset & move.took, conjugate, downhill)
        # Along the new direction the curvature of the last step predicts the first trial.
        bent = sy / jnp.where(good, dot(move.s, move.s), 1)
        length = -dot(direction, g) / jnp.where(good, bent * dot(direction, direction), 1)
        a = jnp.where(good, jnp.where(length > 0, length, gamma), gamma)
        count = jnp.where(move.reset, 0, memory.count + good)
        return _Last(gamma, count), direction, a, count > 0, jnp.zeros((), bool)
