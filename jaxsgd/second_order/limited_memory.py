"""L-BFGS: a model of the curvature from the last pairs of steps and changes of the gradient."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jaxsgd.second_order.descent import Move, plain_scale
from jaxsgd.second_order.line_search import ROUNDING
from jaxsgd.second_order.objective import Vector
from jaxsgd.second_order.vectors import dot, total

__all__ = ["LBFGS", "Pairs", "biggs_factor", "empty", "remember"]

FACTORS = 0.5, 2.0
"""The smallest and the largest factor of a change of the gradient. Yuan's are 0.01 and 100; these need fewer
evaluations on the problems of ``benchmarks/minimise.py``."""

SHRINK = 0.9
"""The smallest factor of the scale from pair to pair. A pair's own scale is that of the largest curvatures along its
step; directions that no step has taken yet have smaller ones. With it logistic regressions take a tenth fewer steps."""


class Pairs(NamedTuple):
    """The last pairs of steps and changes of the gradient.

    Attributes:
      rows: for each array of the vector, its m steps s and m changes y, [2m, ...].
      count: the number of pairs since the last reset.
      gamma: the scale of the first matrix: the inverse Hessian is about ``gamma`` times the identity.
    """

    rows: Vector
    count: Any
    gamma: Any


class Newest(NamedTuple):
    """The newest pair: the products of all rows with its s and y and with the gradient.

    Attributes:
      good: whether there is a new pair.
      here: its place, one-hot, [m].
      s_s, s_y, s_g: products of all s with the new s, the new y and the gradient, [m].
      y_s, y_y, y_g: products of all y with them, [m].
    """

    good: Any
    here: Any
    s_s: Any
    s_y: Any
    s_g: Any
    y_s: Any
    y_y: Any
    y_g: Any

    def put(self, matrix: jax.Array, row: jax.Array, column: jax.Array) -> jax.Array:
        """The matrix with the new pair's row and column."""
        changed = jnp.where(self.here[:, None], row[None, :], jnp.where(self.here[None, :], column[:, None], matrix))
        return jnp.where(self.good, changed, matrix)


def _times(rows: Vector, columns: list[Vector]) -> jax.Array:
    """The products of some vectors with all rows, [number of vectors, 2m]."""
    # A product for each vector: that is a matrix and a vector, for which XLA on CPUs has a faster loop.
    parts = []
    for i, block in enumerate(rows):
        flat = block.reshape(len(block), -1)
        parts.append(jnp.stack([_product(flat, column[i].ravel()) for column in columns]))
    return total(parts)


def _put(block: jax.Array, row: jax.Array, at: jax.Array, wanted: jax.Array) -> jax.Array:
    old = jax.lax.dynamic_index_in_dim(block, at, 0, keepdims=False)
    return jax.lax.dynamic_update_index_in_dim(block, jnp.where(wanted, row, old), at, 0)


def biggs_factor(move: Move, sy: jax.Array) -> jax.Array:
    """The factor of y with which ``s y`` is the curvature at the end of the step, not its mean along the step.

    The cubic that has the values and slopes of both ends says that curvature (Biggs 1973,
    doi:10.1093/imamat/12.3.337; Yuan 1991, doi:10.1093/imanum/11.3.325). The factor is 1 for a quadratic function, and
    where the rounding of the values would show.
    """
    exact = ROUNDING * jnp.finfo(sy.dtype).eps * (jnp.abs(move.f) + jnp.abs(move.drop)) <= 0.01 * sy
    factor = 6 * (move.drop + dot(move.s, move.g)) / jnp.where(sy > 0, sy, 1) - 2
    return jnp.where(exact & jnp.isfinite(factor), jnp.clip(factor, *FACTORS), 1)


def remember(pairs: Pairs, move: Move, memory: int) -> tuple[Pairs, Newest]:
    """The pairs with the newest in place of the oldest, and its products."""
    sy, yy, ss = dot(move.s, move.y), dot(move.y, move.y), dot(move.s, move.s)
    eps = jnp.finfo(sy.dtype).eps
    good = move.took & (sy > eps * jnp.sqrt(ss) * jnp.sqrt(yy)) & (yy > 0)
    factor = biggs_factor(move, sy)
    changes = [factor * y for y in move.y]
    slot = pairs.count % memory
    rows = [
        _put(_put(block, s, slot, good), y, memory + slot, good)
        for block, s, y in zip(pairs.rows, move.s, changes, strict=True)
    ]
    with_s, with_y, with_g = _times(rows, [move.s, changes, move.g])

    # The size of the latest pair (Nocedal & Wright 2006, 7.20).
    least = jnp.where(pairs.count > 0, SHRINK * pairs.gamma, 0)
    gamma = jnp.where(good, jnp.maximum(sy / jnp.where(good, factor * yy, 1), least), pairs.gamma)
    # Along a straight slope there is no pair: the next step is at least as long as the last.
    straight = move.took & ~good & (pairs.count == 0)
    plain = plain_scale(move, straight)
    gamma = jnp.where(move.first, plain, jnp.where(straight, jnp.maximum(gamma, plain), gamma))
    new = Pairs(rows, jnp.where(move.reset, 0, pairs.count + good), gamma)
    parts = [part for products in (with_s, with_y, with_g) for part in (products[:memory], products[memory:])]
    s_s, y_s, s_y, y_y, s_g, y_g = parts
    return new, Newest(good, jnp.arange(memory) == slot, s_s, s_y, s_g, y_s, y_y, y_g)


def empty(x: Vector, memory: int) -> Pairs:
    """No pairs."""
    dtype = x[0].dtype
    rows = [jnp.zeros((2 * memory, *leaf.shape), dtype) + 0 * leaf for leaf in x]
    return Pairs(rows, jnp.zeros((), jnp.int32), jnp.ones((), dtype))


class _Compact(NamedTuple):
    """The pairs, and the small matrices of the compact form.

    Attributes:
      pairs: the last pairs.
      inverse: the inverse of R, the products ``s_i y_j`` of each s with its own y and later ones, [m, m]. Rows and
        columns are in the places of the pairs: a triangle in order of age. Zero without a pair.
      yy: the products ``y_i y_j``, [m, m].
      sy: the products ``s_i y_i``, [m].
    """

    pairs: Pairs
    inverse: jax.Array
    yy: jax.Array
    sy: jax.Array


class LBFGS:
    """L-BFGS in its compact form (Byrd, Nocedal & Schnabel 1994, doi:10.1007/BF01582063).

    A new pair adds a column to the inverse of the triangle R. The oldest pair leaves by its row and column: the rest
    of the inverse stays as it is. No step solves a triangle or sorts by age.

    Args:
      memory: the number of pairs.
    """

    curvature, tilts, lasts = 0.9, True, False

    def __init__(self, memory: int) -> None:
        self.memory = memory

    def init(self, x: Vector) -> _Compact:
        square = jnp.zeros((self.memory, self.memory), x[0].dtype)
        return _Compact(empty(x, self.memory), square, square, square[0])

    def advance(self, memory: _Compact, move: Move) -> tuple[_Compact, Vector, Any, Any, Any]:
        pairs, new = remember(memory.pairs, move, self.memory)
        newest = jnp.sum(jnp.where(new.here, new.s_y, 0))
        newest = jnp.where(new.good, newest, 1)
        sy = jnp.where(new.good & new.here, newest, memory.sy)
        rest = jnp.where(new.here[:, None] | new.here[None, :], 0, memory.inverse)
        column = jnp.where(new.here, 1, -_small(rest, jnp.where(new.here, 0, new.s_y))) / newest
        inverse = jnp.where(new.here[None, :], column[:, None], rest)
        inverse = jnp.where(new.good, inverse, memory.inverse)
        inverse = jnp.where(move.reset, 0, inverse)
        yy = new.put(memory.yy, new.y_y, new.y_y)

        gamma = pairs.gamma
        on_y = _small(inverse, new.s_g)
        on_s = _small(inverse.T, sy * on_y + gamma * (_small(yy, on_y) - new.y_g))
        weights = jnp.concatenate([on_s, -gamma * on_y])
        steps = [jnp.tensordot(weights, block, 1, precision="highest") for block in pairs.rows]
        p = [-gamma * g - step for g, step in zip(move.g, steps, strict=True)]
        return _Compact(pairs, inverse, yy, sy), p, jnp.ones_like(gamma), pairs.count > 0, jnp.zeros((), bool)


def _small(matrix: jax.Array, vector: jax.Array) -> jax.Array:
    """Their product, as sums: these join what is around them, where a product on CPUs is 40 ms of compilation more."""
    return jnp.sum(matrix * vector, 1)


def _product(a: jax.Array, b: jax.Array) -> jax.Array:
    return jnp.matmul(a, b, precision="highest")
