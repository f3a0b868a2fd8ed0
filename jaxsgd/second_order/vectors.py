"""Arithmetic of vectors that are lists of arrays."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from jaxsgd.second_order.objective import Vector

__all__ = ["axpy", "dot", "finite", "largest", "norm", "select", "total"]


def total(parts: list[jax.Array]) -> jax.Array:
    """The sum of scalars or small arrays."""
    out = parts[0]
    for part in parts[1:]:
        out = out + part
    return out


def dot(xs: Vector, ys: Vector) -> jax.Array:
    """The inner product."""
    return total([jnp.sum(x * y) for x, y in zip(xs, ys, strict=True)])


def norm(xs: Vector) -> jax.Array:
    """The Euclidean norm, without overflow of squares."""
    top = largest(xs)
    scale = jnp.where((top > 0) & jnp.isfinite(top), top, 1)
    return scale * jnp.sqrt(total([jnp.sum((x / scale) ** 2) for x in xs]))


def largest(xs: Vector) -> jax.Array:
    """The largest absolute entry."""
    out = jnp.zeros((), xs[0].dtype)
    for x in xs:
        out = jnp.maximum(out, jnp.max(jnp.abs(x), initial=0))
    return out


def finite(xs: Vector) -> jax.Array:
    """Whether all entries are finite."""
    out = jnp.ones((), bool)
    for x in xs:
        out &= jnp.all(jnp.isfinite(x))
    return out


def axpy(a: Any, xs: Vector, ys: Vector) -> Vector:
    """``a * xs + ys``."""
    return [a * x + y for x, y in zip(xs, ys, strict=True)]


def select(condition: jax.Array, xs: Any, ys: Any) -> Any:
    """A tree of ``xs`` where the scalar condition holds, else of ``ys``."""
    return jax.tree.map(lambda x, y: jnp.where(condition, x, y), xs, ys)
