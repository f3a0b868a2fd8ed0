"""L-BFGS-B: L-BFGS inside bounds, by the generalized Cauchy point and a subspace step."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jaxsgd.matrices import inverse
from jaxsgd.second_order.descent import Limits, Move
from jaxsgd.second_order.limited_memory import Pairs, empty, remember
from jaxsgd.second_order.objective import Vector

__all__ = ["LBFGSB"]


def _inverse(matrix: jax.Array, sizes: jax.Array) -> jax.Array:
    """The inverse of a small indefinite matrix, scaled by the sizes of its diagonal, which has many orders."""
    scale = 1 / jnp.sqrt(jnp.maximum(sizes, jnp.finfo(matrix.dtype).tiny))
    return scale[:, None] * inverse(scale[:, None] * matrix * scale) * scale


def _product(a: jax.Array, b: jax.Array) -> jax.Array:
    return jnp.matmul(a, b, precision="highest")


def cauchy_point(
    x: jax.Array, g: jax.Array, low: jax.Array, high: jax.Array, w: jax.Array, m: jax.Array, theta: jax.Array
) -> jax.Array:
    """The first local minimum of the model along the projected gradient path.

    The path bends where a variable meets its bound. Slope and curvature of all its pieces come from sums over the
    sorted bends, without a loop.

    Args:
      x, g, low, high: the point, the gradient, the bounds, [n].
      w, m, theta: the model ``B = theta I - w' m w``; w is [2m, n].
    """
    gap = jnp.where(g > 0, x - low, x - high)
    bends = jnp.where(g == 0, jnp.inf, jnp.maximum(gap / jnp.where(g == 0, 1, g), 0))
    d = jnp.where(bends > 0, -g, 0)
    order = jnp.argsort(bends)
    sorted_d, sorted_w = d[order], w[:, order]

    def rest(values: jax.Array) -> jax.Array:
        """Sums over the variables that still move, for each piece."""
        sums = jnp.cumsum(values[..., ::-1], -1)[..., ::-1]
        return jnp.concatenate([sums, jnp.zeros_like(sums[..., :1])], -1)

    squares, moving = rest(sorted_d**2), rest(sorted_w * sorted_d)
    begin = jnp.concatenate([jnp.zeros_like(x[:1]), bends[order]])
    stop = jnp.concatenate([bends[order], jnp.full_like(x[:1], jnp.inf)])
    length = jnp.where(jnp.isfinite(stop), stop - jnp.where(jnp.isfinite(begin), begin, 0), 0)
    walked = jnp.cumsum(length * moving, -1) - length * moving
    at = jnp.where(jnp.isfinite(begin), begin, 0)
    with_m = _product(m, moving)
    slope = (theta * at - 1) * squares - jnp.sum(with_m * walked, 0)
    bend = theta * squares - jnp.sum(with_m * moving, 0)
    bend = jnp.maximum(bend, jnp.finfo(x.dtype).eps * theta * squares)
    minimum = at + jnp.where(slope < 0, -slope / jnp.where(bend > 0, bend, 1), 0)
    ends = (minimum <= stop) | ~jnp.isfinite(begin)
    t = minimum[jnp.argmax(ends)]
    return jnp.where(bends <= t, jnp.where(d < 0, low, jnp.where(d > 0, high, x)), jnp.clip(x + t * d, low, high))


class _Matrices(NamedTuple):
    """The pairs, and their products ``s_i y_j`` and ``s_i s_j``, [m, m]."""

    pairs: Pairs
    sy: jax.Array
    ss: jax.Array


class LBFGSB:
    """L-BFGS-B (Byrd, Lu, Nocedal & Zhu 1995, doi:10.1137/0916069; subspace step: Morales & Nocedal 2011).

    Args:
      memory: the number of pairs.
      limits: the bounds, each one flat vector.
    """

    curvature, tilts, lasts = 0.9, True, False

    def __init__(self, memory: int, limits: Limits) -> None:
        self.memory, self.limits = memory, limits

    def init(self, x: Vector) -> _Matrices:
        square = jnp.zeros((self.memory, self.memory), x[0].dtype)
        return _Matrices(empty(x, self.memory), square, square)

    def advance(self, memory: _Matrices, move: Move) -> tuple[_Matrices, Vector, Any, Any, Any]:
        m = self.memory
        pairs, new = remember(memory.pairs, move, m)
        sy, ss = new.put(memory.sy, new.y_s, new.s_y), new.put(memory.ss, new.s_s, new.s_s)
        (x,), (g,), (low,), (high,), (rows,) = move.x, move.g, self.limits.lower, self.limits.upper, pairs.rows
        theta = 1 / pairs.gamma
        valid = jnp.arange(m) < pairs.count
        both = valid[:, None] & valid[None, :]
        age = (jnp.arange(m) - pairs.count) % m
        later = jnp.where(both & (age[:, None] > age[None, :]), sy, 0)
        eye = jnp.eye(m, dtype=x.dtype)
        corner = -jnp.where(both, eye * jnp.diagonal(sy), eye)
        other = jnp.where(both, theta * ss, eye)
        middle = jnp.block([[corner, later.T], [later, other]])
        w = jnp.concatenate([rows[m:], theta * rows[:m]]) * jnp.concatenate([valid, valid])[:, None]
        sizes = jnp.abs(jnp.diagonal(middle))
        inner = _inverse(middle, sizes)
        cauchy = cauchy_point(x, g, low, high, w, inner, theta)

        # The model's minimum over the variables that are free at the Cauchy point.
        free = (cauchy > low) & (cauchy < high)
        moved = cauchy - x
        residual = jnp.where(free, g + theta * moved - _product(_product(inner, _product(w, moved)), w), 0)
        # Of sums over all variables only those at bounds stay, so that nothing cancels where none is.
        w_free, w_bound = w * free, w * ~free
        y_free, y_bound, s_bound = w_free[:m], w_bound[:m], w_bound[m:] / theta
        earlier = jnp.where(both & (age[:, None] <= age[None, :]), sy, 0) - _product(s_bound, y_bound.T)
        held = jnp.where(both, theta * _product(s_bound, s_bound.T), eye)
        reduced = jnp.block([[corner - _product(y_free, y_free.T) / theta, -earlier.T], [-earlier, held]])
        reduced = _inverse(reduced, sizes)
        bent = _product(_product(reduced, _product(w_free, residual)), w_free)
        inward = jnp.where(free, -(residual + bent / theta) / theta, 0)
        inward = jnp.where(jnp.all(jnp.isfinite(inward)), inward, 0)
        clipped = jnp.clip(cauchy + inward, low, high) - x
        gap = jnp.where(inward < 0, low - cauchy, high - cauchy)
        share = jnp.min(jnp.where(inward != 0, gap / jnp.where(inward == 0, 1, inward), 1), initial=1)
        shortened = moved + share * inward
        p = jnp.where(jnp.vdot(clipped, g) < 0, clipped, shortened)
        p = jnp.where(jnp.vdot(p, g) < 0, p, moved)
        return _Matrices(pairs, sy, ss), [p], jnp.ones_like(theta), pairs.count > 0, jnp.zeros((), bool)
