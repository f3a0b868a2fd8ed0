"""What a train state takes on a device, from shapes and shardings alone.

Floor 6. Exact: bytes of arrays as they are split; what a compiler adds by padding is not in it.
"""

from __future__ import annotations

import math
from collections import Counter
from typing import Any

import jax
import jax.numpy as jnp
from jax.extend.core import Literal

from jaxsgd.paths import name_parts, owner, path_name
from jaxsgd.plan.reading import Buffer
from jaxsgd.plan.result import GRADIENTS, REST, SCRATCH
from jaxsgd.sharding import moment_sharding
from jaxsgd.storage import int8

__all__ = ["arguments", "int8_bytes", "local_bytes", "parts", "slot_of", "state_buffers"]


def local_bytes(leaf: Any) -> int:
    """Bytes of an array on a device that holds a part of it."""
    shape = leaf.sharding.shard_shape(leaf.shape) if getattr(leaf, "sharding", None) is not None else leaf.shape
    if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
        return math.prod(shape) * math.prod(jax.eval_shape(jax.random.key_data, leaf).shape[leaf.ndim :]) * 4
    return math.prod(shape) * leaf.dtype.itemsize


def tree_bytes(tree: Any) -> int:
    return sum(map(local_bytes, jax.tree.leaves(tree)))


def slot_of(path: Any, names: dict[tuple[str, ...], Any]) -> str:
    """The slot that a leaf of a state belongs to: ``"mu"``; ``"other"`` for what belongs to no parameter."""
    parts = name_parts(path)
    found = owner(path, {name: name for name in names})
    if found is None or not parts:
        return "other"
    if "slots" in parts[:-1]:
        return parts[parts.index("slots") + 1]
    starts = [i for i in range(len(parts)) if parts[i : i + len(found)] == found]
    before = [part for part in parts[: starts[-1] if starts else 0] if not part.isdigit()]
    return before[-1] if before else "other"


def state_bytes(state: Any) -> dict[str, int]:
    """Bytes on a device of each slot of the optimizer's state."""
    names = {name_parts(path): None for path, _ in jax.tree_util.tree_flatten_with_path(state.params)[0]}
    out: Counter[str] = Counter()
    for path, leaf in jax.tree_util.tree_flatten_with_path(state.opt_state)[0]:
        out[slot_of(path, names)] += local_bytes(leaf)
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
        shape = leaf.sharding.shard_shape(leaf.shape) if getattr(leaf, "sharding", None) is not None else leaf.shape
        kind = "key" if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key) else _short(leaf.dtype.name)
        name = ("batch/" if path[0].idx else "") + path_name(path[1:])
        found.append(Buffer(local_bytes(leaf), f"{kind}[{','.join(map(str, shape))}]", name))
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
    known = {name_parts(path): leaf.shape for path, leaf in jax.tree_util.tree_flatten_with_path(state.params)[0]}
    spared = 0
    leaves = jax.tree_util.tree_flatten_with_path(state.opt_state)[0]
    for (path, leaf), starts_at_zero in zip(leaves, zero, strict=True):
        moment = starts_at_zero and "slots" in name_parts(path) and owner(path, known) == leaf.shape
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
