"""Clipping by the norm of all gradients together."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.typing import ArrayLike

from jaxsgd.hyper import is_constant, scheduled
from jaxsgd.numerics import sq, wide, widest
from jaxsgd.transforms.trees import REMEDY, as_array, is_inexact, map_inexact

__all__ = ["AxisName", "GlobalNormState", "clip_by_global_norm", "norm_across"]

AxisName = str | tuple[str, ...] | None


class GlobalNormState(NamedTuple):
    """The state of `clip_by_global_norm`.

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
    a copy: every leaf counts as a shard.

    Returns:
      A scalar in at least float32; 0 for an empty tree. Leaves that are not floating do not count.
    """
    leaves = [as_array(x) for x in jax.tree.leaves(tree) if is_inexact(x)]
    dtype = widest(x.dtype for x in leaves)
    names = (axis_name,) if isinstance(axis_name, str) else axis_name or ()
    tracked = [name for name in names if varying_over(jax.lax.axis_index(name))]
    sums: dict[tuple[str, ...], jax.Array] = {}
    for x in leaves:
        axes = tuple(name for name in names if name not in tracked or name in varying_over(x)) if names else ()
        part = _squares(x)
        part = part if part.dtype == dtype else part.astype(dtype)
        sums[axes] = jax.lax.add(sums[axes], part) if axes in sums else part
    parts = [jax.lax.psum(part, axes) if axes else part for axes, part in sums.items()]
    return _root(sum(parts, jnp.zeros((), dtype)))


@jax.jit
def _squares(x: jax.Array) -> jax.Array:
    return jax.lax.reduce_sum(sq(wide(x)), tuple(range(x.ndim)))


@jax.custom_jvp
def _root(x: jax.Array) -> jax.Array:
    """The square root, with the slope 0 at 0.

    Not a choice by ``x != 0``: compilers copy cheap operations into every consumer, and with them the sum of all
    leaves into the program of each leaf.
    """
    return jnp.sqrt(x)


@_root.defjvp
def _root_jvp(primals: tuple[jax.Array], tangents: tuple[jax.Array]) -> tuple[jax.Array, jax.Array]:
    root = _root(*primals)
    return root, tangents[0] * jnp.where(root != 0, 0.5 / jnp.where(root != 0, root, 1), 0)


@jax.jit
def _factor(norm: jax.Array, limit: jax.Array) -> tuple[jax.Array, ...]:
    """Of all leaves: whether they stay, their factor, and whether the norm is finite."""
    limit = limit.astype(norm.dtype)
    over = norm > limit
    return norm <= limit, jnp.where(over, limit / jnp.where(over, norm, 1), 1), jnp.isfinite(norm)


@jax.jit
def _cut(g: jax.Array, fits: jax.Array, scale: jax.Array, finite: jax.Array) -> jax.Array:
    x = wide(g)
    # Choices, not products: inf times 0 is NaN.
    rest = jax.lax.select(jnp.isfinite(g), jnp.zeros_like(g), g)
    clipped = jax.lax.select(finite, (x * scale.astype(x.dtype)).astype(g.dtype), rest)
    return jax.lax.select(fits, g, clipped)


def clip_by_global_norm(
    max_norm: ArrayLike | Callable[[jax.Array], ArrayLike], *, axis_name: AxisName = None
) -> optax.GradientTransformationExtraArgs:
    r"""Clipping by global norm (Pascanu et al. 2013, arXiv:1211.5063): $g \leftarrow g \min(1, c / \lVert g \rVert)$.

    One norm over the whole tree, accumulated in float32 whatever the gradients' dtype (float64 for float64).
    The state keeps it for logging: ``optax.tree.get(state, "gradient_norm")``. Put the clip first in the chain,
    before any `optax.partition`; otherwise each part is clipped by its own norm.

    If the norm is inf or NaN, all finite entries become 0. Entries that are inf or NaN stay, so that a `guard`
    sees them. The same happens to finite gradients whose squares overflow (from 1.8e19 on in float32).
    At zero gradients the derivative through the clip is finite.

    Args:
      max_norm: c, a positive number, or a schedule of the 0-based step.
      axis_name: mesh axes along which the gradients are sharded inside `jax.shard_map` or `jax.pmap`; the
        squared sums are added up along them. Not needed under `jax.jit`, nor where all devices have the same
        gradients. See `norm_across` for trees of both kinds. Default: None.

    Returns:
      A transformation with a `GlobalNormState`. Updates have the shapes and dtypes of the gradients; they are bitwise
      the same where the norm is below ``max_norm``. Leaves that are not floating pass unchanged. With None or
      `optax.EmptyState` as the state, the update returns it, without the norm.

    Raises:
      ValueError: ``max_norm`` is a number that is not above 0.
      TypeError: ``max_norm`` is neither a scalar nor a schedule; in the update, the state of another transformation,
        or no state for a schedule.
    """
    if is_constant(max_norm) and not max_norm > 0:
        raise ValueError(f"max_norm={max_norm}: the largest allowed norm must be above 0")
    if not (callable(max_norm) or is_constant(max_norm) or getattr(max_norm, "shape", None) == ()):
        raise TypeError(f"max_norm={max_norm!r}: a number, a scalar array or a schedule is needed")

    def init(params: Any) -> GlobalNormState:
        dtype = widest(jnp.result_type(p) for p in jax.tree.leaves(params))
        return GlobalNormState(jnp.zeros((), jnp.int32), jnp.zeros((), dtype))

    def update(updates: Any, state: Any, params: Any = None, **extra_args: Any) -> tuple[Any, Any]:
        del params, extra_args
        limit: Any = max_norm
        if isinstance(state, GlobalNormState):
            limit = scheduled(max_norm, state.count)
        elif callable(max_norm) or not isinstance(state, optax.EmptyState | None):
            raise TypeError(
                f"state: clip_by_global_norm needs its GlobalNormState, got {type(state).__name__}. {REMEDY}"
            )
        norm = norm_across(updates, axis_name)
        factor = _factor(norm, jnp.asarray(limit))
        clipped = map_inexact(lambda g: _cut(g, *factor), updates)
        if not isinstance(state, GlobalNormState):
            return clipped, state
        count = jnp.asarray(optax.safe_increment(state.count))
        return clipped, GlobalNormState(count, norm.astype(state.gradient_norm.dtype))

    return optax.GradientTransformationExtraArgs(init, update)
