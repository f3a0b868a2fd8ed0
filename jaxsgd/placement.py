"""The state of a step on a mesh: brought to its place, kept there, and the program compiled for it."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, Concatenate, ParamSpec, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from jaxsgd.memory import in_device_memory, sent_back
from jaxsgd.meshes import on_auto_axes, same_mesh
from jaxsgd.numerics import is_key, strong
from jaxsgd.paths import leaf_names
from jaxsgd.train_state import TrainState, check_kind

__all__ = ["brought_home", "compiled_for", "with_slots_on_device"]

P = ParamSpec("P")
S = TypeVar("S")


def brought_home(mesh: Mesh, state: TrainState, before: list[Any] | None) -> tuple[TrainState, list[Any]]:
    """The state with arrays that were put into it placed like those before them, and where its leaves are then.

    Where the parameters have moved themselves, the state was made again: then only scalars are placed.

    Args:
      mesh: where the state belongs.
      state: with leaves that lie elsewhere, such as a learning rate that was set.
      before: where the leaves of the last state were, if there was one.

    Raises:
      ValueError: the state was not made on the mesh.
    """
    leaves, treedef = jax.tree.flatten(state)
    home: list[Any] = [getattr(x, "sharding", None) for x in leaves]
    on_mesh = [same_mesh(getattr(sharding, "mesh", None), mesh) for sharding in home]
    known: list[Any] = [None] * len(home)
    if before is not None and len(before) == len(home):
        ours = jax.tree.leaves(state.replace(params=jax.tree.map(lambda _: True, state.params)))  # type: ignore[attr-defined]
        params = [i for i, x in enumerate(ours) if x is True]
        if all(home[i] == before[i] or not on_mesh[i] for i in params):
            known = before
    for i, sharding in enumerate(home):
        where = known[i]
        if where is None and on_mesh[i] and sharding.mesh != mesh:  # its axes are of the other type
            where = NamedSharding(mesh, sharding.spec, memory_kind=sharding.memory_kind)
        if where is None and not on_mesh[i]:
            scalar = any(on_mesh) and (is_key(leaves[i]) or jnp.shape(leaves[i]) == ())
            where = NamedSharding(mesh, PartitionSpec()) if scalar else None
            if where is None:
                raise ValueError(
                    f"state: {leaf_names(state)[i]!r} is on {sharding}, not on the step's mesh "
                    f"{dict(mesh.shape)}. Use TrainState.create(..., mesh=mesh)"
                )
        if where is not None and where != sharding:
            leaf = strong(leaves[i]) if isinstance(leaves[i], jax.Array) else np.asarray(leaves[i])
            leaves[i] = jax.device_put(leaf, where)
    return treedef.unflatten(leaves), [x.sharding for x in leaves]


def compiled_for(fn: Callable[..., Any], mesh: Mesh, where: Any, donated: tuple[int, ...], others: int) -> Any:
    """``fn(state, ...) -> (state, metrics)`` compiled for a state on ``mesh``, of which each array keeps its sharding.

    Args:
      fn: the step.
      mesh: of the shardings; call the result in `jaxsgd.meshes.in_mesh` if it is Explicit.
      where: the state's shardings, a tree like it.
      donated: the arguments whose memory is used again.
      others: how many arguments follow the state.
    """
    specs = jax.tree.map(lambda sharding: sharding.spec, where)
    fn = on_auto_axes(fn, mesh, (specs, PartitionSpec()))
    places = {"in_shardings": (where, *[None] * others), "out_shardings": (where, None)}
    return jax.jit(fn, donate_argnums=donated, **places)


def with_slots_on_device(
    fn: Callable[Concatenate[S, TrainState, P], tuple[TrainState, Any]],
) -> Callable[Concatenate[S, TrainState, P], tuple[TrainState, Any]]:
    """A method ``fn(self, state, ...) -> (state, metrics)`` that finds on the device what the host's memory keeps.

    The next state has in the host's memory what the state had there.
    """

    @functools.wraps(fn)
    def call(self: S, state: TrainState, *args: P.args, **kwargs: P.kwargs) -> tuple[TrainState, Any]:
        check_kind(state)
        new, report = fn(self, state.replace(opt_state=in_device_memory(state.opt_state)), *args, **kwargs)
        return new.replace(opt_state=sent_back(new.opt_state, state.opt_state)), report

    return call
