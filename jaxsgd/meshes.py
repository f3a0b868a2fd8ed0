"""Meshes with Explicit axes: entered, and left as Auto ones inside a program.

On Explicit axes the sharding of an array is part of its type, and every operation has to state that of its result.
The programs here leave that to XLA: inside, the axes are Auto. Arguments and results have the user's types.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import jax
from jax.sharding import AxisType, Mesh, NamedSharding

__all__ = ["auto_mesh", "auto_sharding", "in_mesh", "is_explicit", "on_auto_axes", "same_mesh"]


def is_explicit(mesh: Mesh | None) -> bool:
    """Whether an axis of ``mesh`` is Explicit, as `jax.make_mesh` makes them by default."""
    return mesh is not None and AxisType.Explicit in mesh.axis_types


def same_mesh(a: Any, b: Any) -> bool:
    """Whether two meshes have the same devices under the same names, whatever the types of their axes."""
    if a is b or a == b:
        return True
    both = isinstance(a, Mesh) and isinstance(b, Mesh)
    return both and a.axis_names == b.axis_names and a.devices.tolist() == b.devices.tolist()


def auto_mesh(mesh: Mesh) -> Mesh:
    """``mesh`` with Auto axes."""
    return Mesh(mesh.devices, mesh.axis_names) if is_explicit(mesh) else mesh


def auto_sharding(sharding: Any) -> Any:
    """A `NamedSharding` on the same mesh with Auto axes; anything else as it is."""
    if not isinstance(sharding, NamedSharding) or not isinstance(sharding.mesh, Mesh):
        return sharding
    return NamedSharding(auto_mesh(sharding.mesh), sharding.spec, memory_kind=sharding.memory_kind)


def in_mesh(mesh: Mesh | None, *, abstract: bool = False) -> AbstractContextManager[Any]:
    """The context of a call on ``mesh``; the ``abstract`` one within a trace, or where its devices need not exist."""
    if mesh is None:
        return nullcontext()
    return jax.sharding.use_abstract_mesh(mesh.abstract_mesh) if abstract else jax.set_mesh(mesh)


def on_auto_axes(fn: Callable[..., Any], mesh: Mesh, out: Any) -> Callable[..., Any]:
    """``fn`` with all axes of ``mesh`` Auto inside, to be traced in `in_mesh`.

    Args:
      fn: a function of arrays.
      mesh: the mesh. One without Explicit axes changes nothing.
      out: the specs of the results: a tree of `jax.sharding.PartitionSpec`, or a prefix of one.
    """
    return jax.sharding.auto_axes(fn, axes=mesh.axis_names, out_sharding=out) if is_explicit(mesh) else fn
