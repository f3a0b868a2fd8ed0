"""An optimizer as a table: which parameter gets which learning rate, decay and overrides, and its state in bytes."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import optax

from jaxsgd.lift import Lift, shown, watched
from jaxsgd.paths import Text, aligned, leaf_names
from jaxsgd.state import State

__all__ = ["describe"]

COLUMNS = ("parameter", "shape", "dtype", "learning rate", "weight decay", "overrides", "state bytes")
OWN_COLUMNS = ("learning_rate", "weight_decay", "lr_mult", "frozen")


def describe(tx: optax.GradientTransformation, params: Any) -> str:
    """The settings of each parameter, as a table: ``print(describe(tx, params))``.

    The columns are the leaf's name, shape and dtype, its learning rate with its multiplier, and its weight decay. Other
    overrides of its groups and its state in bytes follow. In a chain, or any other combination, each rule of jaxsgd has
    its own table. The other parts are listed by the names of their states.

    Args:
      tx: any optax gradient transformation.
      params: the parameters, or their shapes (`jax.ShapeDtypeStruct`).

    Returns:
      The text.

    Example::

        print(jaxsgd.describe(optax.chain(optax.clip(1.0), jaxsgd.adamw(1e-3)), {"w": jnp.ones((2, 3))}))
    """
    seen, state = watched(tx, params)
    lifts = list({id(lift): (lift, given) for lift, given in seen}.values())
    tables = [_table(lift, given) for lift, given in lifts]
    if len(lifts) > 1:
        tables = [f"{lift!r}\n{table}" for (lift, _), table in zip(lifts, tables, strict=True)]
    others = [f"{_name(node)}: {_size(node):,} bytes" for node in _parts(state)]
    if others:
        tables.append("other parts, by their states: " + "; ".join(others))
    return Text("\n\n".join(tables))


def _table(lift: Lift, params: Any) -> str:
    state = jax.eval_shape(lift.init, params)
    treedef = jax.tree.structure(params)
    kept = [treedef.flatten_up_to(held) for held in state.slots.values()]
    leaves = jax.tree.leaves(params)
    rows: list[tuple[str, ...]] = [COLUMNS]
    total = 0
    for i, (name, p, own) in enumerate(zip(leaf_names(params), leaves, lift.overrides(params), strict=True)):
        size = sum(_size(held[i]) for held in kept)
        total += size
        rate, decay = (shown({**lift.hyper, **own}[key]) for key in ("learning_rate", "weight_decay"))
        if "lr_mult" in own:
            rate += f" x {shown(own['lr_mult'])}"
        if own.get("frozen"):
            rate, decay = "frozen", "-"
        overrides = ", ".join(f"{key}={shown(value)}" for key, value in own.items() if key not in OWN_COLUMNS)
        rows.append((name, str(jnp.shape(p)), jnp.result_type(p).name, rate, decay, overrides, f"{size:,}"))
    rows.append((f"total of {len(leaves)} parameters", "", "", "", "", "", f"{total:,}"))
    return aligned(rows)


def _size(tree: Any) -> int:
    return sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(tree))


def _parts(state: Any) -> list[Any]:
    """The innermost states that are not of a rule of jaxsgd."""
    if isinstance(state, State):
        return []
    if _is_named_tuple(state):
        inside = [part for field in state for part in _parts(field)]
        return inside or ([] if _holds(state) else [state])
    children = jax.tree.leaves(state, is_leaf=lambda x: x is not state and (_is_named_tuple(x) or isinstance(x, State)))
    return [part for child in children if _is_named_tuple(child) for part in _parts(child)]


def _holds(state: Any) -> bool:
    nodes = jax.tree.leaves(state, is_leaf=lambda x: isinstance(x, State))
    return any(isinstance(node, State) for node in nodes)


def _is_named_tuple(x: Any) -> bool:
    return isinstance(x, tuple) and hasattr(x, "_fields")


def _name(node: Any) -> str:
    return f"{type(node).__module__.split('.')[0]} {type(node).__name__}"
