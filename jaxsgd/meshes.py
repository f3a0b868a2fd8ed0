"""Where arrays are: on which platform, whole or split, and on meshes with Explicit axes.

On Explicit axes the sharding of an array is part of its type, and every operation has to state that of its result.
The programs here leave that to XLA: inside, the axes are Auto. Arguments and results have the user's types.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import AxisType, Mesh, NamedSharding

__all__ = [
    "auto_mesh",
    "auto_sharding",
    "in_mesh",
    "is_explicit",
    "made_from",
    "on_auto_axes",
    "on_one_device",
    "platform_of",
    "same_mesh",
]


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


def platform_of(arrays: Any) -> str:
    """The platform of arrays, or of the program that will run: ``"cpu"``, ``"tpu"`` or ``"cuda"``.

    Arrays with a mesh name the platform of its devices, which this process may not have; others the process's own.
    """
    meshes = [jax.typeof(x).sharding.mesh for x in jax.tree.leaves(arrays)]
    named = [mesh.abstract_device.platform for mesh in meshes if mesh.abstract_device is not None]
    platform = named[0] if named else jax.default_backend()
    return "cuda" if platform == "gpu" else platform


def on_one_device(arrays: list[Any]) -> bool:
    """Whether each device steps the whole of what it sees: no array is split by the compiler."""
    types = [jax.typeof(x) for x in arrays]
    meshes = [t.sharding.mesh for t in types]
    whole = all(m.empty or m.size == 1 or set(m.axis_types) == {AxisType.Manual} for m in meshes)
    return whole and len({t.manual_axis_type for t in types if t.ndim}) <= 1


def made_from(arrays: Any, shape: tuple[int, ...], dtype: Any) -> jax.ShapeDtypeStruct:
    """The type of what a kernel makes from arrays of `on_one_device`: in `jax.shard_map` it varies as they do."""
    kinds = {jax.typeof(x).manual_axis_type for x in arrays if jnp.ndim(x)}
    return jax.ShapeDtypeStruct(shape, dtype, manual_axis_type=next(iter(kinds), None))
