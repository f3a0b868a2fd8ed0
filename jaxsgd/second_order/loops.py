"""Loops and branches whose parts may vary over the axes of `jax.shard_map`.

Its check wants each value that a loop carries to vary over the same axes before and after a turn. The branches of a
condition have to give results that vary alike. A zero varies over none; what is added to it may. Here they are made to
agree.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

__all__ = ["cond", "own_problem", "switch", "varying", "while_loop"]


def varying(like: Any, tree: Any) -> Any:
    """``tree``, whose arrays vary at least over the axes over which anything in ``like`` varies."""
    axes = _axes(like)

    def one(x: Any) -> Any:
        missing = axes - _axes(x)
        return jax.lax.pcast(x, tuple(missing), to="varying") if missing else x

    return jax.tree.map(one, tree) if axes else tree


def _axes(tree: Any) -> frozenset[Any]:
    """The axes over which anything in a tree of arrays, or of their types, varies: none without that check."""
    if not _mapped():
        return frozenset()
    types = [x if isinstance(x, jax.ShapeDtypeStruct) else jax.typeof(x) for x in jax.tree.leaves(tree)]
    return frozenset().union(*(t.manual_axis_type.varying for t in types if t.manual_axis_type is not None))


def _mapped() -> bool:
    return bool(jax.sharding.get_abstract_mesh().manual_axes)


def own_problem(fun: Callable[..., Any], params: Any, args: Any, *others: Any) -> tuple[Any, ...]:
    """``(params, args, *others)``, in `jax.shard_map` varying as the parameters and the result of ``fun`` do.

    A result that varies makes it a problem of each device, wherever the start is from.
    """
    if not _mapped():
        return params, args, *others
    return varying((params, jax.eval_shape(fun, params, *args)), (params, args, *others))


def while_loop(goes_on: Callable[[Any], Any], body: Callable[[Any], Any], carry: Any) -> Any:
    """`jax.lax.while_loop`; all that it carries varies alike."""
    carry = varying(carry, carry)
    return jax.lax.while_loop(goes_on, lambda c: varying(carry, body(c)), carry)


def cond(flag: Any, yes: Callable[..., Any], no: Callable[..., Any], *arguments: Any) -> Any:
    """`jax.lax.cond`; where the flag varies both branches are computed, as under `jax.vmap`."""
    if not _axes(flag):
        return jax.lax.cond(flag, yes, no, *arguments)
    return jax.tree.map(lambda x, y: jnp.where(flag, x, y), yes(*arguments), no(*arguments))


def switch(index: Any, ways: Sequence[Callable[[], Any]]) -> Any:
    """`jax.lax.switch`, as `cond`."""
    if not _axes(index):
        return jax.lax.switch(index, ways)
    out = ways[0]()
    for i, way in enumerate(ways[1:], 1):
        out = jax.tree.map(lambda x, y, i=i: jnp.where(index == i, y, x), out, way())
    return out
