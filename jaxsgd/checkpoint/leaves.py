"""A tree as named arrays that can be saved without its classes, and back: the form that Orbax writes and reads."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxsgd.numerics import is_key

__all__ = ["compare", "pack", "put", "targets", "unpack"]

SHOWN = 8


def pack(leaves: dict[str, Any]) -> tuple[dict[str, dict], dict[str, Any]]:
    """A table of all leaves for JSON, and the arrays to write: those that are not empty, which nothing else writes to.

    Raises:
      RuntimeError: a leaf was donated to a step.
      TypeError: a leaf is neither array nor number.
      ValueError: there is no array, or two names differ in slashes at their end only: the store drops those.
    """
    table, arrays = {}, {}
    for name, leaf in leaves.items():
        if isinstance(leaf, jax.Array) and leaf.is_deleted():
            raise RuntimeError(f"state: {name!r} was donated to a later step; save the state which that returned")
        if (
            isinstance(leaf, jax.ShapeDtypeStruct)
            or np.dtype(jnp.uint8 if is_key(leaf) else _dtype(leaf)).kind in "OSUMm"
        ):
            raise TypeError(f"state: {name!r} is {leaf!r}; only arrays and numbers are saved")
    if not any(np.size(leaf) for leaf in leaves.values()):
        raise ValueError("state: it holds no array")
    places: dict[str, str] = {}
    for name in leaves:
        if places.setdefault(name.rstrip("/"), name) != name:
            other = places[name.rstrip("/")]
            raise ValueError(f"state: the names {other!r} and {name!r} are one place in the store; rename one of them")
    for name, leaf in leaves.items():
        raw = jax.random.key_data(leaf) if is_key(leaf) else leaf
        impl = str(jax.random.key_impl(leaf)) if is_key(leaf) else None
        table[name] = {**_kind(leaf), "impl": impl, "stored": _kind(raw)}
        if np.size(raw):  # Orbax takes no empty array
            arrays[name] = _out_of_reach(raw)
    return table, arrays


def targets(table: dict[str, dict], likes: dict[str, Any]) -> dict[str, Any]:
    """The arrays to read. Each goes to the place of the array with its name in ``likes``, else into host memory."""
    out = {}
    for name, row in table.items():
        shape, dtype = row["stored"]["shape"], jnp.dtype(row["stored"]["dtype"])
        sharding = _sharding(likes.get(name), row["impl"] is not None)
        if 0 not in shape and sharding is not None:
            out[name] = jax.ShapeDtypeStruct(shape, dtype, sharding=sharding)
        elif 0 not in shape:
            out[name] = np.broadcast_to(np.zeros((), dtype), shape)
    return out


def unpack(table: dict[str, dict], arrays: dict[str, Any], likes: dict[str, Any]) -> dict[str, Any]:
    """The leaves of ``table``, each as the kind of leaf that has its name in ``likes``.

    Without such a leaf they are NumPy arrays and typed keys."""
    out = {}
    for name, row in table.items():
        value = arrays[name] if name in arrays else np.zeros(row["stored"]["shape"], jnp.dtype(row["stored"]["dtype"]))
        if row["impl"] is not None:
            value = jax.random.wrap_key_data(jnp.asarray(value), impl=row["impl"])
        out[name] = put(value, likes[name]) if name in likes else value
    return out


def put(value: Any, like: Any) -> Any:
    """The value as the kind of leaf that ``like`` is, where that one is."""
    if isinstance(like, jax.Array | jax.ShapeDtypeStruct):
        anywhere = isinstance(like, jax.Array) and not like.committed
        return jax.device_put(value, None if anywhere else like.sharding)
    return np.asarray(value) if isinstance(like, np.ndarray) else type(like)(np.asarray(value)[()])


def compare(saved: dict[str, dict], leaves: dict[str, Any], without: Collection[str] = ()) -> list[str]:
    """In lines, the paths that only one side has and those whose shapes or dtypes differ; empty if it is one model."""
    names = (saved.keys() | leaves.keys()) - set(without)
    differ = []
    for name in sorted(names & saved.keys() & leaves.keys()):
        here = _kind(leaves[name])
        if any(saved[name][what] != here[what] for what in here):
            differ.append(f"{name}: {_text(saved[name])} saved, {_text(here)} in the state")
    groups = {
        "only the checkpoint has": sorted(names - leaves.keys()),
        "only the state has": sorted(names - saved.keys()),
        "another shape or dtype": differ,
    }
    lines = []
    for what, paths in groups.items():
        if paths:
            lines += [f"{what} ({len(paths)}):", *(f"  {path}" for path in paths[:SHOWN])]
            lines += [f"  and {len(paths) - SHOWN} more"] if len(paths) > SHOWN else []
    return lines


def _dtype(leaf: Any) -> Any:
    return leaf.dtype if hasattr(leaf, "dtype") else np.asarray(leaf).dtype


def _kind(leaf: Any) -> dict[str, Any]:
    return {"shape": list(np.shape(leaf)), "dtype": str(_dtype(leaf))}


def _text(kind: dict[str, Any]) -> str:
    return f"{kind['dtype']}[{','.join(map(str, kind['shape']))}]"


def _out_of_reach(leaf: Any) -> Any:
    """The leaf where no later step can write: on the CPU NumPy and Orbax would read the state's own memory, which the
    next step reuses. From other devices Orbax copies before it returns."""
    if not isinstance(leaf, jax.Array):
        return np.array(leaf)
    on_cpu = next(iter(leaf.sharding.device_set)).platform == "cpu"
    if leaf.is_fully_addressable:
        # Of several processes, Orbax takes what is on one of them alone only as a NumPy array, from the first.
        return np.array(leaf) if on_cpu or jax.process_count() > 1 else leaf
    if not on_cpu:
        return leaf
    parts = [jax.device_put(np.array(shard.data), shard.device) for shard in leaf.addressable_shards]
    return jax.make_array_from_single_device_arrays(leaf.shape, leaf.sharding, parts)


def _sharding(like: Any, key: bool) -> jax.sharding.Sharding | None:
    """Where an array is read to; None: to the host, from where `put` takes it."""
    sharding = getattr(like, "sharding", None)
    if sharding is None or (isinstance(like, jax.Array) and not like.committed):
        return None
    if key and not isinstance(sharding, jax.sharding.NamedSharding):
        return None  # the raw key has an axis more
    return sharding if jax.process_count() == 1 or not sharding.is_fully_addressable else None
