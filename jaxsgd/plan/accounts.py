"""What a train state takes on a device, from shapes and shardings alone.

Floor 6. Exact: bytes of arrays as they are split; what a compiler adds by padding is not in it.
"""

from __future__ import annotations

import math
from collections import Counter
from typing import Any

import jax

from jaxsgd.numerics import is_key
from jaxsgd.paths import name_parts, owners, path_name
from jaxsgd.plan.reading import Buffer
from jaxsgd.plan.result import GRADIENTS, REST, SCRATCH
from jaxsgd.sharding import local_bytes, local_shape, moment_sharding
from jaxsgd.storage import int8

__all__ = ["arguments", "int8_bytes", "parts", "slot_of", "state_buffers"]


def tree_bytes(tree: Any) -> int:
    return sum(map(local_bytes, jax.tree.leaves(tree)))


def slot_of(path: Any, found: tuple[str, ...] | None) -> str:
    """The slot of a leaf of a state, ``"mu"``, by its path and its parameter's name; ``"other"`` where it has none."""
    parts = name_parts(path)
    if found is None or not parts:
        return "other"
    if "slots" in parts[:-1]:
        return parts[parts.index("slots") + 1]
    starts = [i for i in range(len(parts)) if parts[i : i + len(found)] == found]
    before = [part for part in parts[: starts[-1] if starts else 0] if not part.isdigit()]
    return before[-1] if before else "other"


def state_bytes(state: Any) -> dict[str, int]:
    """Bytes on a device of each slot of the optimizer's state."""
    names = [name_parts(path) for path, _ in jax.tree_util.tree_flatten_with_path(state.params)[0]]
    out: Counter[str] = Counter()
    leaves = jax.tree_util.tree_flatten_with_path(state.opt_state)[0]
    for (path, leaf), name in zip(leaves, owners(state.opt_state, state.params, names), strict=True):
        out[slot_of(path, name)] += local_bytes(leaf)
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
    for path, leaf in jax.tree_util.tree_flatten_with_path((state, batch))[0]:
        kind = "key" if is_key(leaf) else _short(leaf.dtype.name)
        name = ("batch/" if path[0].idx else "") + path_name(path[1:])
        found.append(Buffer(local_bytes(leaf), f"{kind}[{','.join(map(str, local_shape(leaf)))}]", name))
    return sorted(found, key=lambda b: (-b.bytes, b.what))


def _short(dtype: str) -> str:
    """A dtype by the compiler's name, as in what it says of its own arrays."""
    for long, short in {"bfloat": "bf", "float": "f", "uint": "u", "int": "s", "complex": "c", "bool": "pred"}.items():
        if dtype.startswith(long):
            return short + dtype.removeprefix(long)
    return dtype


def int8_bytes(tx: Any, state: Any) -> int:
    """Bytes on a device that ``storage=jaxsgd.int8()`` would spare; 0 where no moment of a rule would be packed."""
    shapes = jax.tree.map(lambda p: jax.ShapeDtypeStruct(p.shape, p.dtype), state.params)
    zero = _zeros(tx, shapes)
    spared = 0
    leaves = jax.tree_util.tree_flatten_with_path(state.opt_state)[0]
    params = owners(state.opt_state, state.params, jax.tree.leaves(state.params))
    for (path, leaf), starts_at_zero, param in zip(leaves, zero, params, strict=True):
        moment = starts_at_zero and "slots" in name_parts(path) and param is not None and param.shape == leaf.shape
        if not moment or leaf.dtype.itemsize < 2:
            continue
        packed = jax.eval_shape(int8(stochastic=False).pack, jax.ShapeDtypeStruct(leaf.shape, leaf.dtype))
        rest = sum(math.prod(x.shape) * x.dtype.itemsize for x in jax.tree.leaves(packed))
        whole = math.prod(leaf.shape) * leaf.dtype.itemsize
        spared += local_bytes(leaf) * (whole - rest) // whole if whole else 0
    return spared


def _zeros(tx: Any, shapes: Any) -> list[bool]:
    """For each leaf of ``tx.init(params)`` whether it is made of zeros."""
    traced = jax.make_jaxpr(tx.init)(shapes).jaxpr
    return [_is_zero(traced, out) for out in traced.outvars]


def _is_zero(jaxpr: Any, out: Any) -> bool:
    from jax.extend.core import Literal  # slow to import, and needed only where something does not fit

    if isinstance(out, Literal):
        return not out.val
    made = next((e for e in jaxpr.eqns if out in e.outvars), None)
    if made is None:
        return False
    if made.primitive.name in ("jit", "pjit"):
        return _is_zero(made.params["jaxpr"].jaxpr, made.params["jaxpr"].jaxpr.outvars[made.outvars.index(out)])
    if made.primitive.name in ("broadcast_in_dim", "convert_element_type", "copy", "reshape"):
        return _is_zero(jaxpr, made.invars[0])
    return False
