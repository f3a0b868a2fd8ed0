"""Clipping by the norm of all gradients together.

Floor 4.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.typing import ArrayLike

from jaxsgd.numerics import sq, wide, widest

__all__ = ["AxisName", "ClipState", "clip_by_global_norm", "norm_across"]

AxisName = str | tuple[str, ...] | None


class ClipState(NamedTuple):
    """What `clip_by_global_norm` remembers.

    Attributes:
      count: int32 scalar, completed steps.
      gradient_norm: scalar in float32 (float64 where a parameter is), the last norm before clipping.
    """

    count: jax.Array
    gradient_norm: jax.Array


def varying_over(x: jax.Array) -> frozenset[str]:
    """The manual mesh axes over which ``x`` may differ, as far as `jax.shard_map` keeps track."""
    return jax.typeof(x).manual_axis_type.varying


def norm_across(tree: Any, axis_name: AxisName = None) -> jax.Array:
    """The Euclidean norm of all leaves, and of all their shards along ``axis_name``.

    Its derivative at zero is zero. Where `jax.shard_map` checks replication, only leaves that vary over
    the axis are added up along it. With ``check_vma=False`` and in `jax.pmap` nothing tells a shard from
    a copy, and every leaf is taken for a shard.

    Returns:
      A scalar in at least float32; 0 for an empty tree.
    """
    leaves = [x for x in map(jnp.asarray, jax.tree.leaves(tree)) if jnp.issubdtype(x.dtype, jnp.inexact)]
    dtype = widest(x.dtype for x in leaves)
    names = (axis_name,) if isinstance(axis_name, str) else axis_name or ()
    tracked = [name for name in names if varying_over(jax.lax.axis_index(name))]
    sums: dict[tuple[str, ...], jax.Array] = {}
    for x in leaves:
        axes = tuple(name for name in names if name not in tracked or name in varying_over(x))
        sums[axes] = sums.get(axes, jnp.zeros((), dtype)) + jnp.sum(sq(wide(x))).astype(dtype)
    parts = [jax.lax.psum(part, axes) if axes else part for axes, part in sums.items()]
    total = sum(parts, jnp.zeros((), dtype))
    # The root's slope at 0 is infinite: take the root of something else there.
    return jnp.where(total != 0, jnp.sqrt(jnp.where(total != 0, total, 1)), 0)


def clip_by_global_norm(
    max_norm: ArrayLike | Callable[[jax.Array], ArrayLike], *, axis_name: AxisName = None
) -> optax.GradientTransformationExtraArgs:
    r"""Clipping by global norm (Pascanu et al. 2013, arXiv:1211.5063): $g \leftarrow g \min(1, c / \lVert g \rVert)$.

    One norm over the whole tree, accumulated in float32 whatever the gradients' dtype (float64 for float64),
    kept in the state as ``gradient_norm`` to be logged: ``optax.tree.get(state, "gradient_norm")``. Put it
    first in the chain, before any `optax.partition`, or each part is clipped by its own norm.

    A norm that is inf or NaN asks for a step of length 0: all finite entries become 0; those that are inf
    or NaN stay, so that a `guard` sees them. Finite gradients whose squares overflow (from 1.8e19 on
    in float32) are such a case too. At zero gradients the derivative through the clip is finite.

    Args:
      max_norm: c, a positive number, or a schedule of the 0-based step.
      axis_name: mesh axes along which the gradients are sharded inside `jax.shard_map` or `jax.pmap`; the
        squared sums are added up along them. Not needed under `jax.jit`, nor where all devices hold the same
        gradients. See `norm_across` for trees that hold both kinds.

    Returns:
      A transformation. Updates have the shapes and dtypes of the gradients; bit by bit the same where the
      norm is below ``max_norm``.

    Raises:
      ValueError: ``max_norm`` is a number that is not above 0.
    """
    if isinstance(max_norm, int | float) and not max_norm > 0:
        raise ValueError(f"max_norm={max_norm}: the largest allowed norm must be above 0")

    def init(params: Any) -> ClipState:
        dtype = widest(jnp.result_type(p) for p in jax.tree.leaves(params))
        return ClipState(jnp.zeros((), jnp.int32), jnp.zeros((), dtype))

    def update(updates: Any, state: Any, params: Any = None, **extra_args: Any) -> tuple[Any, ClipState]:
        del params, extra_args
        norm = norm_across(updates, axis_name)
        limit = jnp.asarray(max_norm(state.count) if callable(max_norm) else max_norm).astype(norm.dtype)
        finite, over = jnp.isfinite(norm), norm > limit
        scale = jnp.where(over, limit / jnp.where(over, norm, 1), 1)

        def cut(g: Any) -> jax.Array:
            g = jnp.asarray(g)
            scaled = wide(g) * scale.astype(wide(g).dtype)
            # Not a product: inf times 0 is NaN.
            return jnp.where(finite, scaled.astype(g.dtype), jnp.where(jnp.isfinite(g), jnp.zeros_like(g), g))

        count = jnp.asarray(optax.safe_increment(state.count))
        return jax.tree.map(cut, updates), ClipState(count, norm.astype(state.gradient_norm.dtype))

    return optax.GradientTransformationExtraArgs(init, update)
