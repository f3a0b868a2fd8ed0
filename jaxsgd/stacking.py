"""Leaves of one shape as one stack: a rule on matrices runs its products and decompositions once for all of them.

The state keeps one slot for each parameter. Only the step sees the stack, through `jax.vmap`, so that every rule is
served by its equation on one array.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from jaxsgd.elementwise import divided
from jaxsgd.meshes import platform_of

__all__ = ["is_small", "kinds_of", "mesh_of", "side_by_side", "stacks", "together"]

LEAST = 2**26
"""Bytes that a stack may always have."""

SMALL = 2**18
"""Elements of a small leaf. The kernels of larger ones are not joined: that gains nothing, and a joined kernel needs
the gradients of all its leaves at once."""


def kinds_of(arrays: Any) -> tuple[Any, ...]:
    """The properties that arrays must share to be stacked: their structure, shapes, dtypes and shardings."""
    return jax.tree.structure(arrays), *(jax.typeof(x) for x in jax.tree.leaves(arrays))


def mesh_of(settings: Mapping[str, Any]) -> Mesh | None:
    """The mesh with Auto axes that a setting says to spread matrices over."""
    meshes = [mesh for value in settings.values() if isinstance(mesh := getattr(value, "mesh", None), Mesh)]
    return next((mesh for mesh in meshes if AxisType.Explicit not in mesh.axis_types), None)


def stacks(keys: Sequence[Hashable], leaves: Sequence[Any]) -> list[list[int]]:
    """The indices of the leaves that take one step together, in the order of their first.

    Temporaries are as large as a stack. So none is larger than a quarter of the tree, or than `LEAST`.

    Args:
      keys: what leaves must agree in; None for a leaf that is alone.
      leaves: arrays. Leaves below two dimensions, and those on a mesh with Explicit axes, are alone.
    """
    most = max(LEAST, sum(_bytes(x) for x in leaves) // 4)
    groups: dict[Any, list[int]] = {}
    for i, (key, leaf) in enumerate(zip(keys, leaves, strict=True)):
        alone = key is None or jnp.ndim(leaf) < 2 or AxisType.Explicit in jax.typeof(leaf).sharding.mesh.axis_types
        groups.setdefault((i,) if alone else key, []).append(i)
    out = []
    for indices in groups.values():
        count = max(1, most // max(1, _bytes(leaves[indices[0]])))
        parts = -(-len(indices) // count)
        size = -(-len(indices) // parts)
        out += [indices[at : at + size] for at in range(0, len(indices), size)]
    return out


def _bytes(x: Any) -> int:
    return x.size * x.dtype.itemsize


def is_small(leaf: Any) -> bool:
    """Whether a GPU takes longer to start a kernel than to step the leaf."""
    return jnp.size(leaf) <= SMALL


def side_by_side(scalars: Any, t: jax.Array, leaves: Sequence[Any]) -> Any:
    """``scalars`` for the steps of these leaves: on a GPU they are read from one array.

    XLA for GPU joins kernels that read the same array and write arrays of one shape. A scalar does not count as such an
    array. So the steps of leaves of one shape are a few kernels in place of one each.

    Args:
      scalars: a pytree. Its scalars of the type of ``t`` move, but for ``t``.
      t: the step.
      leaves: the arrays that are stepped. Unless two have one shape, nothing moves.
    """
    shapes = [jnp.shape(leaf) for leaf in leaves]
    if platform_of(leaves) != "cuda" or len({*shapes}) == len(shapes):
        return scalars
    every, treedef = jax.tree.flatten(scalars)
    moved = {id(x): x for x in every if x is not t and _kind(x) == _kind(t)}
    row = jax.lax.optimization_barrier(jnp.stack([t, *moved.values()]))
    there = {key: row[i] for i, key in enumerate(moved, 1)}
    return treedef.unflatten([there.get(id(x), x) for x in every])


def _kind(x: Any) -> tuple[Any, ...]:
    kind = jax.typeof(x)
    return kind.shape, kind.dtype, kind.weak_type, kind.manual_axis_type


def together(step: Callable[..., Any], arguments: Sequence[tuple[Any, ...]], mesh: Mesh | None = None) -> list[Any]:
    """``[step(*own) for own in arguments]``, where the work on whole arrays is run once on the stacked arguments.

    Elementwise work that no such work needs is done leaf by leaf: the next moment, the scaling of the update. A kernel
    that takes parts of a stack cannot write in place of its operands, and its results are copied.

    Args:
      step: a function of arrays.
      arguments: those of each leaf: trees of the same structure, shapes and dtypes.
      mesh: the mesh over whose devices the stack is spread, padded with zeros to a multiple of their number.
        Default: the stack is where its leaves are.
    """
    if len(arguments) == 1:
        return [step(*arguments[0])]
    missing = 0 if mesh is None else -len(arguments) % mesh.size

    def stacked(*leaves: Any) -> Any:
        return _apart(jnp.stack([*leaves, *[jnp.zeros_like(leaves[0])] * missing]), mesh)

    whole, rest = divided(step, jnp.shape(jax.tree.leaves(arguments[0])[0]), *arguments[0])
    spread: dict[str, Any] = {} if mesh is None else {"spmd_axis_name": mesh.axis_names}
    stack = jax.vmap(whole, **spread)(*jax.tree.map(stacked, *arguments))
    # The rest is written in place of its operands, so it has to wait until the stack is made of these.
    arguments, stack = jax.lax.optimization_barrier((arguments, [_apart(x, mesh) for x in stack]))
    return [rest(own, [x[i] for x in stack]) for i, own in enumerate(arguments)]


def _apart(stack: jax.Array, mesh: Mesh | None) -> jax.Array:
    """``stack`` with whole leaves on each device, or their parts as the leaves have them.

    Where only the matrix work is spread, one transfer leads there and one back. Else XLA takes slices of a stack that
    is spread over devices by several transfers for each leaf.
    """
    if mesh is None:
        return stack
    free = PartitionSpec(None, *[PartitionSpec.UNCONSTRAINED] * (stack.ndim - 1))
    return jax.lax.with_sharding_constraint(stack, NamedSharding(mesh, free))
