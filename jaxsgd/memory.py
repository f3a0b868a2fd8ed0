"""The slots of an optimizer in the memory of the host: put there, brought to the device, and sent back.

The memory kind of an array's sharding says in which memory it is. Inside a compiled program its type says so.
"""

from __future__ import annotations

from typing import Any

import jax
from jax.core import Tracer

from jaxsgd.numerics import is_key
from jaxsgd.paths import owners

__all__ = ["HOST", "check_host_memory", "host_slots", "in_device_memory", "in_host_memory", "on_host", "sent_back"]

HOST = "pinned_host"
"""The memory kind: memory of the host that a device reads and writes without its processor."""


def check_host_memory(argument: str, device: Any) -> None:
    """Check that a device can use the host's memory.

    Args:
      argument: what asks for it, such as ``"offload=True"``.
      device: a device, or the description of one to compile for.

    Raises:
      ValueError: its platform has no such memory kind.
    """
    kinds = [memory.kind for memory in device.addressable_memories()]
    if HOST not in kinds:
        raise ValueError(
            f"{argument}: {device.device_kind} on the platform {device.platform!r} has no memory of kind {HOST!r}, "
            f"only {', '.join(kinds) or 'none that JAX knows'}. "
            "Use offload=False, and storage=jaxsgd.int8() or zero1= for a smaller state"
        )


def on_host(x: Any) -> bool:
    """Whether an array, a shape with a sharding or a traced array is in the host's memory."""
    if isinstance(x, Tracer):
        return jax.typeof(x).memory_space == jax.memory.Space.Host
    return getattr(getattr(x, "sharding", None), "memory_kind", None) == HOST


def host_slots(state: Any, params: Any) -> list[bool]:
    """Which leaves of an optimizer's state go to the host: arrays that belong to a parameter, scalars excepted."""
    marks = owners(state, params, [True] * len(jax.tree.leaves(params)))
    leaves = zip(jax.tree.leaves(state), marks, strict=True)
    return [mark is True and x.ndim > 0 and x.size > 0 and not is_key(x) for x, mark in leaves]


def in_host_memory(where: Any, state: Any, params: Any) -> Any:
    """Shardings, a tree like ``state``, with the slots of parameters in the host's memory."""
    shardings, treedef = jax.tree.flatten(where)
    pairs = zip(shardings, host_slots(state, params), strict=True)
    return treedef.unflatten(s.with_memory_kind(HOST) if mine else s for s, mine in pairs)


def in_device_memory(tree: Any) -> Any:
    """``tree`` with its arrays in the memory of their devices; those that are there stay as they are."""
    return jax.tree.map(lambda x: jax.device_put(x, jax.memory.Space.Device) if on_host(x) else x, tree)


def sent_back(tree: Any, before: Any) -> Any:
    """``tree`` with its arrays in the host's memory where those of ``before``, a tree like it, are."""
    if not any(map(on_host, jax.tree.leaves(before))):
        return tree
    return jax.tree.map(lambda x, old: jax.device_put(x, jax.memory.Space.Host) if on_host(old) else x, tree, before)
