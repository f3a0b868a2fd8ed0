"""One row of the ledger: the update of a rule, compiled for a device and read."""

from __future__ import annotations

import functools
import hashlib
import math
import time
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from explanations import SLOW_TO_COMPILE

from jaxsgd.applying import update_params
from jaxsgd.blockwise import int8
from jaxsgd.planning.hlo import FREE, Instruction, Program, shapes
from jaxsgd.planning.reading import read
from jaxsgd.planning.targets import lookup
from jaxsgd.registry import RULES, Rule
from jaxsgd.storage import Storage, cast, plain

__all__ = ["DEVICES", "STORAGES", "TREES", "Row", "is_small", "kernels", "lower", "measure", "packs", "state_of"]

DEVICES = {"v5e": "v5e:1x1", "h100": "h100:1"}
"""The ledger's devices, by their topologies."""

STORAGES: Mapping[str, Storage] = {"plain": plain, "bf16": cast("bfloat16"), "int8": int8()}
"""The storages of moments that are measured."""

TREES = {
    "large": {"bias": (8192,), "square": (8192, 8192), "wide": (4096, 16384)},
    "packed": {"bias": (2048,), "square": (8192, 8192)},
    "small": {"bias": (512,), "square": (128, 128), "wide": (128, 256)},
}
"""float32 parameters. The matrices of the large tree do not fit into the fast memory of a core, so that what is read
twice is counted twice."""

TINY = 256
"""Kernels on no more elements than this prepare scalars and keys; they are counted apart."""

Row = dict[str, Any]


def is_small(rule: Rule) -> bool:
    """Whether a rule is measured on the small tree."""
    return rule.cost in SLOW_TO_COMPILE


def stored(rule: Rule, storage: str) -> dict[str, Storage]:
    """``storage=`` of a rule's call: all of its moments in one of `STORAGES`."""
    held = STORAGES[storage]
    return {name: held for name in rule(1e-3).lift.slots if rule.slots[name].kind in ("mean", "square")}


def tree_of(rule: Rule, storage: str) -> dict[str, jax.ShapeDtypeStruct]:
    """The parameters that a rule with a storage is measured on."""
    sizes = TREES["small" if is_small(rule) else "packed" if storage == "int8" else "large"]
    return {name: jax.ShapeDtypeStruct(shape, jnp.float32) for name, shape in sizes.items()}


def _size(tree: Any) -> int:
    return sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(tree))


def _loss(params: Any) -> jax.Array:
    """A loss for rules that look at one: their Hessian products cost little more than the parameters."""
    return sum((jnp.vdot(x, x) for x in jax.tree.leaves(params)), jnp.float32(0)) / 2


def lower(rule: Rule, storage: str, topology: str) -> tuple[Any, Any, Any]:
    """A rule's update, lowered for one device: ``(lowered, shapes of params, shapes of slots)``.

    Parameters and state are donated and come first, in the order in which the step returns them. JAX gives donated
    arrays to outputs in order. In another order the compiler has to copy.
    """
    tx = rule(1e-3, storage=stored(rule, storage))
    params = tree_of(rule, storage)
    state = jax.eval_shape(tx.init, params)

    def update(params: Any, state: Any, grads: Any, value: jax.Array) -> tuple[Any, Any]:
        return update_params(tx, grads, state, params, value=value, obj_fn=_loss)

    where = jax.sharding.NamedSharding(lookup(topology).mesh(), jax.sharding.PartitionSpec())
    there = lambda tree: jax.tree.map(  # noqa: E731
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=where, weak_type=x.weak_type), tree
    )
    value = jax.ShapeDtypeStruct((), jnp.float32)
    arguments = there((params, state, params, value))
    return jax.jit(update, donate_argnums=(0, 1)).lower(*arguments), params, state.slots


def measure(name: str, storage: str, device: str, before: Row | None = None) -> Row:
    """One row: what the update of a rule takes on a device.

    Args:
      name, storage, device: of `RULES`, `STORAGES` and `DEVICES`.
      before: the row as it was measured; returned where the program is still the same.

    Returns:
      ``state`` (bytes a parameter), ``bytes`` and ``minimum`` (moved in memory, a parameter and step), ``ratio`` of the
      two, ``fusions`` a leaf, ``products`` (kernels with matrix products), ``copies``, ``loops`` and ``small`` kernels,
      ``temporaries`` (over the parameters' bytes), ``seconds`` of compilation, ``program`` (what was compiled, hashed).
    """
    rule = RULES[name]
    lowered, params, slots = lower(rule, storage, DEVICES[device])
    program = hashlib.sha256(lowered.as_text().encode()).hexdigest()[:12]
    if before is not None and before["program"] == program:
        return before
    begin = time.perf_counter()
    compiled = lookup(DEVICES[device]).compile(lowered)
    seconds = time.perf_counter() - begin
    found = read(compiled)
    weights, kept = _size(params), _size(slots)
    per = 4 / weights
    minimum = 3 * weights + 2 * kept
    kinds = kernels(Program(compiled.as_text()))
    return {
        "state": round(kept * per, 4), "bytes": round(found.bytes * per, 3), "minimum": round(minimum * per, 3),
        "ratio": round(found.bytes / minimum, 3), "fusions": round(kinds.pop("fusions") / len(params), 2), **kinds,
        "temporaries": round(found.memory.temporaries / weights, 4) if found.memory else None,
        "seconds": round(seconds, 1), "program": program,
    }  # fmt: skip


def kernels(program: Program) -> dict[str, int]:
    """Kernels of the entry computation by what they do; transfers to a core's own memory are none."""
    entry = program.computations[program.entry]
    out: dict[str, int] = dict.fromkeys(("fusions", "products", "copies", "loops", "small"), 0)
    for i in entry.values():
        if i.opcode in ("while", "conditional", "call"):
            out["loops"] += i.opcode != "call"
        elif i.opcode in FREE or i.opcode.endswith(("-start", "-done")) or 'target="ConcatBitcast"' in i.rest:
            continue
        else:
            touched = [s for name in (i.name, *i.operands) if name in entry for s in shapes(entry[name].shape)]
            if all(math.prod(s.dims) <= TINY for s in touched):
                out["small"] += 1
            else:
                out[_kind(program, i)] += 1
    return out


def _kind(program: Program, i: Instruction) -> str:
    if program.work(program.entry, i).flops:
        return "products"
    return "copies" if i.opcode == "copy" else "fusions"


@functools.cache
def _kept(name: str, storage: str, packed: bool) -> tuple[tuple[tuple[int, ...], Any], ...]:
    """Shapes and dtypes of a rule's slots on the tree of a storage, as they rest with it or without."""
    rule = RULES[name]
    tx = rule(1e-3, storage=stored(rule, storage) if packed else None)
    slots = jax.eval_shape(tx.init, tree_of(rule, storage)).slots
    return tuple((x.shape, x.dtype) for x in jax.tree.leaves(slots))


def packs(name: str, storage: str) -> bool:
    """Whether a storage changes a rule's state."""
    return _kept(name, storage, True) != _kept(name, storage, False)


def state_of(name: str, storage: str) -> float:
    """Bytes a parameter of a rule's state, from shapes alone."""
    sizes = (math.prod(shape) * dtype.itemsize for shape, dtype in _kept(name, storage, True))
    return round(sum(sizes) * 4 / _size(tree_of(RULES[name], storage)), 4)
