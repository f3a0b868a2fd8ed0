"""Products with curvature matrices, and the linear systems that second-order rules solve, matrix-free or dense."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jaxsgd.matrices import cholesky, eigenvectors
from jaxsgd.second_order.loops import cond, while_loop

__all__ = [
    "Solution",
    "conjugate_gradients",
    "dense_direction",
    "dot",
    "gauss_newton_product",
    "hessian_product",
    "plus",
]

Vector = list[jax.Array]
"""A vector as arrays in flattening order, each with its own shape, dtype and sharding."""
Product = Callable[[Vector], Vector]

LATEST, OLDEST = 10, 64
"""CG looks back over a tenth of its iterations, at least 10 (Martens 2010, section 4.4) and at most 64."""


def dot(xs: Vector, ys: Vector) -> jax.Array:
    """The inner product, in the widest dtype."""
    dtype = max((x.dtype for x in xs), key=lambda dtype: dtype.itemsize)
    return sum((jnp.sum(x * y).astype(dtype) for x, y in zip(xs, ys, strict=True)), jnp.zeros((), dtype))


def plus(xs: Vector, scale: jax.Array, ys: Vector) -> Vector:
    """``xs + scale * ys``."""
    return [x + scale.astype(x.dtype) * y for x, y in zip(xs, ys, strict=True)]


def hessian_product(fn: Callable[[Vector], jax.Array], xs: Vector) -> Product:
    """``v -> H v`` with the Hessian of ``fn`` at ``xs`` (Pearlmutter 1994, doi:10.1162/neco.1994.6.1.147)."""
    return jax.linearize(jax.grad(fn), xs)[1]


def gauss_newton_product(outputs_fn: Callable[[Vector], Any], loss: Callable[[Any], jax.Array], xs: Vector) -> Product:
    """``v -> J' H J v`` with the Jacobian J of ``outputs_fn`` and the Hessian H of ``loss`` in the outputs.

    Schraudolph 2002, doi:10.1162/08997660260028683.
    """
    outputs, forward = jax.linearize(outputs_fn, xs)
    backward = jax.linear_transpose(forward, xs)
    leaves, treedef = jax.tree.flatten(outputs)
    moves = [jnp.issubdtype(x.dtype, jnp.inexact) for x in leaves]

    def of_moving(values: list[jax.Array]) -> jax.Array:
        rest = iter(values)
        return loss(treedef.unflatten(next(rest) if move else x for x, move in zip(leaves, moves, strict=True)))

    moving = [x for x, move in zip(leaves, moves, strict=True) if move]
    curved = jax.linearize(jax.grad(of_moving), moving)[1]

    def product(v: Vector) -> Vector:
        tangents = jax.tree.leaves(forward(v))
        bent = iter(curved([t for t, move in zip(tangents, moves, strict=True) if move]))
        back = [next(bent) if move else t for t, move in zip(tangents, moves, strict=True)]
        return backward(treedef.unflatten(back))[0]

    return product


class Solution(NamedTuple):
    """The result of `conjugate_gradients`.

    Attributes:
      direction: d, with a quadratic model below 0, or zeros.
      iterations: int32 scalar.
      negative: whether it met negative curvature.
    """

    direction: Vector
    iterations: jax.Array
    negative: jax.Array


class _Walk(NamedTuple):
    d: Vector
    r: Vector
    p: Vector
    rr: jax.Array
    model: jax.Array
    past: jax.Array
    i: jax.Array
    negative: jax.Array
    done: jax.Array


def conjugate_gradients(
    product: Product, grads: Vector, damping: jax.Array, start: Vector, iterations: Any, tol: Any
) -> Solution:
    """Minimize the quadratic model ``g'd + d'(B + damping) d / 2`` by conjugate gradients.

    It stops at ``iterations``, at rounding, or at negative curvature. It also stops when the last tenth of the
    iterations lowered the model by less than ``tol`` an iteration (Martens 2010). At negative curvature it goes one
    last step down along that direction, by as much as if the curvature were positive.

    Args:
      product: ``v -> B v``.
      grads: g.
      damping: a scalar, 0 or more.
      start: the d to begin at; 0 counts where its model is not below 0.
      iterations: the largest number of products.
      tol: the relative decrease of the model an iteration.
    """

    def damped(v: Vector) -> Vector:
        return plus(product(v), damping, v)

    def minus_gradient() -> Vector:
        return [-g for g in grads]

    gg = dot(grads, grads)
    dtype = gg.dtype
    tiny = jnp.finfo(dtype).tiny
    bent = damped(start)
    model = dot(grads, start) + dot(start, bent) / 2
    better = model < 0
    zeros = [jnp.zeros_like(g) for g in grads]
    d = [jnp.where(better, s, z) for s, z in zip(start, zeros, strict=True)]
    r = [jnp.where(better, -g - b, -g) for g, b in zip(grads, bent, strict=True)]
    rr = dot(r, r)
    model = jnp.where(better, model, 0)
    eps = jnp.finfo(dtype).eps
    walk = _Walk(
        d, r, r, rr, model, jnp.zeros(OLDEST, dtype), jnp.zeros((), jnp.int32), jnp.zeros((), bool), rr <= tiny
    )

    def body(w: _Walk) -> _Walk:
        bent = damped(w.p)
        curvature, pp = dot(w.p, bent), dot(w.p, w.p)
        # Rounding alone can turn a flat direction; below it nothing is known.
        negative = curvature <= eps * damping * pp
        size = jnp.where(negative, jnp.maximum(jnp.abs(curvature), jnp.maximum(damping, eps) * pp), curvature)
        alpha = w.rr / jnp.maximum(size, tiny)
        d = plus(w.d, alpha, w.p)
        r = plus(w.r, -alpha, bent)
        rr = dot(r, r)
        # The model falls by alpha r'r - alpha^2 p'(B + damping)p / 2.
        model = w.model - alpha * w.rr + alpha * alpha * curvature / 2
        finite = jnp.isfinite(model) & jnp.isfinite(rr)
        look = jnp.clip((w.i + 1) // 10, LATEST, OLDEST - 1)
        before = w.past[(w.i - look) % OLDEST]
        slow = (w.i >= look) & (model < 0) & (before - model < look.astype(dtype) * tol * -model)
        done = slow | negative | ~finite | (rr <= eps * eps * gg)
        keep = lambda new, old: [jnp.where(finite, n, o) for n, o in zip(new, old, strict=True)]  # noqa: E731
        return _Walk(
            keep(d, w.d),
            keep(r, w.r),
            plus(r, rr / jnp.maximum(w.rr, tiny), w.p),
            jnp.where(finite, rr, w.rr),
            jnp.where(finite, model, w.model),
            w.past.at[w.i % OLDEST].set(model),
            w.i + 1,
            negative,
            done,
        )

    w = while_loop(lambda w: (w.i < iterations) & ~w.done, body, walk)
    return Solution(w.d, w.i, w.negative)


def dense_direction(hessian: jax.Array, g: jax.Array, damping: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The descent direction ``-(H + damping)^-1 g``, and whether all numbers were finite.

    Where ``H + damping`` is not positive definite beyond rounding, the magnitudes of H's eigenvalues replace them
    (saddle-free Newton, Dauphin et al. 2014, arXiv:1406.2572). Each is at least the square root of the rounding unit
    times the largest.
    """
    n, dtype = g.shape[0], g.dtype
    eps = jnp.finfo(dtype).eps
    identity, damping = jnp.eye(n, dtype=dtype), damping.astype(dtype)
    matrix = (hessian + hessian.T) / 2
    good = jnp.all(jnp.isfinite(matrix)) & jnp.all(jnp.isfinite(g))
    # A decomposition of a matrix with an inf may never return.
    matrix, g = jnp.where(good, matrix, identity), jnp.where(good, g, 0)
    shifted = matrix + damping * identity
    factor = cholesky(shifted)
    pivots = jnp.diagonal(factor) ** 2

    def newton() -> jax.Array:
        return -jax.scipy.linalg.cho_solve((factor, True), g)

    def saddle_free() -> jax.Array:
        values, vectors = eigenvectors(matrix)
        size = jnp.abs(values)
        largest = jnp.max(size)
        # No curvature at all: a gradient step.
        size = jnp.where(largest > 0, jnp.maximum(size, jnp.sqrt(eps) * largest) + damping, 1)
        return -(vectors @ ((vectors.T @ g) / size))

    # A pivot below rounding says nothing about its sign.
    positive = jnp.all(pivots > n * eps * jnp.max(jnp.abs(jnp.diagonal(shifted))))
    return cond(positive, newton, saddle_free), good
