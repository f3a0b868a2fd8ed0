"""L-BFGS: a model of the curvature from the last pairs of steps and changes of the gradient."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jaxsgd.second_order.descent import Move, first_scale
from jaxsgd.second_order.objective import Vector
from jaxsgd.second_order.vectors import dot, norm, total

__all__ = ["LBFGS", "Pairs"]


class Pairs(NamedTuple):
    """The last pairs of steps and changes of the gradient, and their products.

    Attributes:
      rows: for each array of the vector, its m steps s and m changes y.
      sy, yy, ss: the products ``s_i y_j``, ``y_i y_j`` and ``s_i s_j``.
      count: the number of pairs since the last reset.
      gamma: the scale of the first matrix: the inverse Hessian is about ``gamma`` times the identity.
    """

    rows: Vector
    sy: Any
    yy: Any
    ss: Any
    count: Any
    gamma: Any


def _times(rows: Vector, columns: list[Vector]) -> jax.Array:
    """The products of all rows with some vectors, [2m, number of vectors]."""
    parts = []
    for i, block in enumerate(rows):
        stacked = jnp.stack([column[i].ravel() for column in columns], 1)
        parts.append(jnp.matmul(block.reshape(len(block), -1), stacked, precision="highest"))
    return total(parts)


def combined(rows: Vector, weights: jax.Array) -> Vector:
    """The sum of rows with weights."""
    return [jnp.tensordot(weights, block, 1, precision="highest") for block in rows]


def _put(block: jax.Array, row: jax.Array, at: jax.Array, wanted: jax.Array) -> jax.Array:
    old = jax.lax.dynamic_index_in_dim(block, at, 0, keepdims=False)
    return jax.lax.dynamic_update_index_in_dim(block, jnp.where(wanted, row, old), at, 0)


def remember(pairs: Pairs, move: Move, memory: int) -> tuple[Pairs, jax.Array]:
    """The pairs with the newest, and the products of all rows with the gradient, [2m]."""
    sy, yy, ss = dot(move.s, move.y), dot(move.y, move.y), dot(move.s, move.s)
    eps = jnp.finfo(sy.dtype).eps
    good = move.took & (sy > eps * jnp.sqrt(ss) * jnp.sqrt(yy)) & (yy > 0)
    slot = pairs.count % memory
    rows = [
        _put(_put(block, s, slot, good), y, memory + slot, good)
        for block, s, y in zip(pairs.rows, move.s, move.y, strict=True)
    ]
    products = _times(rows, [move.s, move.y, move.g])
    with_s, with_y = products[:, 0], products[:, 1]

    def cross(matrix: jax.Array, row: jax.Array, column: jax.Array) -> jax.Array:
        here = jnp.arange(memory) == slot
        changed = jnp.where(here[:, None], row[None, :], jnp.where(here[None, :], column[:, None], matrix))
        return jnp.where(good, changed, matrix)

    # A first length for the first direction; later the size of the latest pair (Nocedal & Wright 2006, 7.20).
    start = first_scale(move)
    gamma = jnp.where(good, sy / jnp.where(good, yy, 1), pairs.gamma)
    # Along a straight slope there is no pair: the next step is at least as long as the last.
    straight = move.took & ~good & (pairs.count == 0)
    gamma = jax.lax.cond(straight, lambda: jnp.maximum(gamma, norm(move.s) / norm(move.g)), lambda: gamma)
    gamma = jnp.where(move.first, start, gamma)
    new = Pairs(
        rows,
        cross(pairs.sy, with_s[memory:], with_y[:memory]),
        cross(pairs.yy, with_y[memory:], with_y[memory:]),
        cross(pairs.ss, with_s[:memory], with_s[:memory]),
        jnp.where(move.reset, 0, pairs.count + good),
        gamma,
    )
    return new, products[:, 2]


def empty(x: Vector, memory: int) -> Pairs:
    """No pairs."""
    dtype = x[0].dtype
    square = jnp.zeros((memory, memory), dtype)
    rows = [jnp.zeros((2 * memory, *leaf.shape), dtype) + 0 * leaf for leaf in x]
    return Pairs(rows, square, square, square, jnp.zeros((), jnp.int32), jnp.ones((), dtype))


class LBFGS:
    """L-BFGS in its compact form (Byrd, Nocedal & Schnabel 1994, doi:10.1007/BF01582063).

    Args:
      memory: the number of pairs.
    """

    curvature = 0.9

    def __init__(self, memory: int) -> None:
        self.memory = memory

    def init(self, x: Vector) -> Pairs:
        return empty(x, self.memory)

    def advance(self, memory: Pairs, move: Move) -> tuple[Pairs, Vector, Any, Any, Any]:
        m = self.memory
        pairs, products = remember(memory, move, m)
        # Oldest first. Slots without a pair count as zeros, with one on the diagonal.
        order = (pairs.count + jnp.arange(m)) % m
        valid = order < pairs.count
        both = valid[:, None] & valid[None, :]
        sy = jnp.where(both, pairs.sy[order][:, order], jnp.eye(m, dtype=pairs.sy.dtype))
        yy = jnp.where(both, pairs.yy[order][:, order], 0)
        sg, yg = jnp.where(valid, products[:m][order], 0), jnp.where(valid, products[m:][order], 0)

        def solve(b: jax.Array, trans: int) -> jax.Array:
            return jax.scipy.linalg.solve_triangular(sy, b, trans=trans)

        gamma = pairs.gamma
        on_y = solve(sg, 0)
        on_s = solve(jnp.diagonal(sy) * on_y + gamma * (yy @ on_y - yg), 1)
        weights = jnp.concatenate([jnp.where(valid, on_s, 0), jnp.where(valid, -gamma * on_y, 0)])
        back = jnp.argsort(order)
        weights = jnp.concatenate([weights[:m][back], weights[m:][back]])
        p = [-gamma * g - step for g, step in zip(move.g, combined(pairs.rows, weights), strict=True)]
        return pairs, p, jnp.ones_like(gamma), pairs.count > 0, jnp.zeros((), bool)
