"""The bytes of a train state on a device, from shapes and shardings alone.

Exact: bytes of arrays as they are split; what a compiler adds by padding is not in it.
"""

from __future__ import annotations

from collections import Counter
from typing import Any

import jax

from jaxsgd.blockwise import int8
from jaxsgd.forms import forms
from jaxsgd.memory import on_host
from jaxsgd.numerics import is_key
from jaxsgd.paths import leaf_names, leaf_paths, owners
from jaxsgd.planning.reading import Buffer
from jaxsgd.planning.result import GRADIENTS, REST, SCRATCH
from jaxsgd.sharding import local_bytes, local_shape, moment_sharding
from jaxsgd.storage import accepts, of_kind

__all__ = [
    "arguments",
    "host_bytes",
    "in_one_memory",
    "int8_bytes",
    "parts",
    "slot_of",
    "state_buffers",
    "tree_bytes",
    "unsplit_bytes",
]


def device_bytes(x: Any) -> int:
    """Bytes of an array in a device's memory: none of one that the host keeps."""
    return 0 if on_host(x) else local_bytes(x)


def tree_bytes(tree: Any) -> int:
    return sum(map(device_bytes, jax.tree.leaves(tree)))


def host_bytes(tree: Any) -> int:
    """Bytes of the arrays of one device that its host keeps."""
    return sum(map(local_bytes, jax.tree.leaves(tree))) - tree_bytes(tree)


def in_one_memory(state: Any) -> Any:
    """The shapes of a state for a device whose memory is the host's."""

    def moved(x: Any) -> Any:
        if not on_host(x):
            return x
        return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding.with_memory_kind("device"))

    return jax.tree.map(moved, state)


def unsplit_bytes(whole: Any, split: Any) -> int:
    """Bytes on a device of the leaves that take as much in ``split`` as in ``whole``."""
    pairs = zip(map(device_bytes, jax.tree.leaves(whole)), map(device_bytes, jax.tree.leaves(split)), strict=True)
    return sum(before for before, after in pairs if after == before)


def slot_of(path: tuple[str, ...], parameter: tuple[str, ...] | None) -> str:
    """The slot of a leaf of a state, ``"mu"``, by the names on its path and on its parameter's; ``"other"`` where it
    has none."""
    if parameter is None or not path:
        return "other"
    if "slots" in path[:-1]:
        return path[path.index("slots") + 1]
    starts = [i for i in range(len(path)) if path[i : i + len(parameter)] == parameter]
    before = [part for part in path[: starts[-1] if starts else 0] if not part.isdigit()]
    return before[-1] if before else "other"


def state_bytes(state: Any) -> dict[str, int]:
    """Bytes on a device of each slot of the optimizer's state."""
    parameters = owners(state.opt_state, state.params, leaf_paths(state.params))
    out: Counter[str] = Counter()
    leaves = zip(leaf_paths(state.opt_state), jax.tree.leaves(state.opt_state), parameters, strict=True)
    for path, leaf, parameter in leaves:
        out[slot_of(path, parameter)] += device_bytes(leaf)
    return dict(sorted(out.items(), key=lambda item: (item[0] == "other", item[0])))


def arguments(state: Any, batch: Any) -> int:
    """Bytes on a device of what a step is called with."""
    return tree_bytes(state) + tree_bytes(batch)


def gradient_bytes(state: Any) -> int:
    """Bytes on a device of an array like each parameter, where its moments lie."""
    leaves = jax.tree.leaves(state.params)
    total = 0
    for leaf, where in zip(leaves, moment_sharding(state.opt_state, state.params), strict=True):
        total += local_bytes(leaf if where is None else jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=where))
    return total


def parts(state: Any, batch: Any, needs: int, scratch: int = 0) -> dict[str, int]:
    """``needs`` split into what it is for."""
    out = {"params": tree_bytes(state.params)}
    room = max(0, needs - scratch - arguments(state, batch))
    out[GRADIENTS] = min(gradient_bytes(state), room)
    out |= {f"state: {slot}": size for slot, size in state_bytes(state).items()}
    if jax.tree.leaves(state.model_state):
        out["model state"] = tree_bytes(state.model_state)
    out["batch"] = tree_bytes(batch)
    if scratch:
        out[SCRATCH] = scratch
    out[REST] = max(0, needs - sum(out.values()))
    return out


def state_buffers(state: Any, batch: Any) -> list[Buffer]:
    """The arrays that a step is called with, largest first, by their parts on a device."""
    found = []
    for prefix, tree in (("", state), ("batch/", batch)):
        for name, leaf in zip(leaf_names(tree), jax.tree.leaves(tree), strict=True):
            kind = "key" if is_key(leaf) else _short(leaf.dtype.name)
            shape = f"{kind}[{','.join(map(str, local_shape(leaf)))}]"
            if not on_host(leaf):
                found.append(Buffer(local_bytes(leaf), shape, prefix + name))
    return sorted(found, key=lambda b: (-b.bytes, b.what))


def _short(dtype: str) -> str:
    """A dtype by the compiler's name, as in what it says of its own arrays."""
    for long, short in {"bfloat": "bf", "float": "f", "uint": "u", "int": "s", "complex": "c", "bool": "pred"}.items():
        if dtype.startswith(long):
            return short + dtype.removeprefix(long)
    return dtype


def int8_bytes(tx: Any, state: Any) -> int:
    """Bytes on a device that ``storage=jaxsgd.int8()`` would save; 0 where no rule in ``tx`` has a slot for it."""
    storage = int8(stochastic=False)
    shapes = jax.tree.map(lambda p: jax.ShapeDtypeStruct(p.shape, p.dtype), state.params)
    held = dict(zip(leaf_names(state.opt_state), jax.tree.leaves(state.opt_state), strict=True))
    saved = 0
    for form in forms(tx, shapes):
        if not accepts(storage, form.slot.kind):
            continue
        wide = jax.eval_shape(form.storage.unpack, form.stored)
        packed = jax.eval_shape(of_kind(storage, form.slot.kind).pack, wide)
        whole, rest = (sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(y)) for y in (form.stored, packed))
        if rest < whole:
            here = sum(device_bytes(held[name]) for name in form.names)
            saved += here * (whole - rest) // whole
    return saved
