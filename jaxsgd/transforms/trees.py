"""Trees of arrays as transformations meet them: kinds of leaves, checks of two trees, nodes of a state."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from jaxsgd.lift import lifts_in
from jaxsgd.paths import find_nodes, leaf_names
from jaxsgd.state import plain

__all__ = [
    "as_array",
    "check_like",
    "find",
    "is_inexact",
    "keep_types",
    "map_inexact",
    "or_zeros",
    "scalar",
    "select",
    "update_types",
]

FLOAT0 = jax.dtypes.float0
REMEDY = "Use a state that tx.init(params) made for these parameters"


def is_inexact(x: Any) -> bool:
    """Whether ``x`` is floating or complex. Leaves of other kinds have no gradient."""
    return jnp.issubdtype(x.dtype if isinstance(x, jax.Array) else jnp.result_type(x), jnp.inexact)


# Leaves of one shape and dtype share one trace of each jitted function.


def as_array(x: Any) -> jax.Array:
    """``x`` as a JAX array."""
    return x if isinstance(x, jax.Array) else jnp.asarray(x)


def map_inexact(fn: Callable[[jax.Array], Any], tree: Any) -> Any:
    """``fn`` of each floating or complex leaf; all others unchanged."""
    return jax.tree.map(lambda x: fn(as_array(x)) if is_inexact(x) else x, tree)


@jax.jit
def select(predicate: jax.Array, x: Any, y: Any) -> jax.Array:
    """``x`` where the predicate is true, else ``y``."""
    return jnp.where(predicate, x, y)


@jax.jit
def or_zeros(predicate: jax.Array, x: Any) -> jax.Array:
    """``x`` where the predicate is true, else zeros."""
    return jnp.where(predicate, x, jnp.zeros_like(x))


def scalar(value: Any, name: str = "value") -> jax.Array:
    """The extra argument ``name`` as an array.

    Raises:
      ValueError: it is no real scalar.
    """
    value = jnp.asarray(value)
    if value.shape != ():
        raise ValueError(f"{name}: it has the shape {value.shape}; a scalar is needed")
    if jnp.iscomplexobj(value):
        raise ValueError(f"{name}: it is {value.dtype.name}; a real number is needed")
    return value


def check_like(new: Any, old: Any, what: str) -> None:
    """Check that a tree of this step has the leaves and shapes that the state has. Otherwise arrays would broadcast.

    Args:
      new: parameters, gradients, or the new state.
      old: the state's tree.
      what: the transformation that an error names.

    Raises:
      ValueError: names the first leaf that differs.
    """
    leaves, treedef = jax.tree.flatten(new)
    old_leaves, old_treedef = jax.tree.flatten(old)
    if treedef != old_treedef:
        names, old_names = leaf_names(new), leaf_names(old)
        for name in (*names, *old_names):
            if name not in names or name not in old_names:
                verb = "has no" if name in names else "alone has"
                raise ValueError(f"{what}: the state {verb} leaf {name!r}. {REMEDY}")
        raise ValueError(f"{what}: the containers differ: {treedef}; the state has {old_treedef}. {REMEDY}")
    for index, (n, o) in enumerate(zip(leaves, old_leaves, strict=True)):
        if jnp.shape(n) != jnp.shape(o):
            name = leaf_names(new)[index]
            raise ValueError(f"{what}: {name!r} has the shape {jnp.shape(n)}; the state has {jnp.shape(o)}. {REMEDY}")
        if jnp.iscomplexobj(n) and not jnp.iscomplexobj(o):
            name, dtypes = leaf_names(new)[index], (jnp.result_type(n).name, jnp.result_type(o).name)
            raise ValueError(f"{what}: {name!r} is {dtypes[0]}; the state is {dtypes[1]}. {REMEDY}")


def keep_types(new: Any, old: Any, what: str) -> Any:
    """``new`` in the dtypes of ``old``: some transformations change their state's dtypes with the gradients'.

    Raises:
      ValueError: as in `check_like`.
    """
    check_like(new, old, what)
    return jax.tree.map(_keep_type, new, old)


def update_types(tx: optax.GradientTransformation, params: Any) -> Any:
    """A tree with the dtypes that updates of ``tx`` have: those of ``params``, float32 where a rounding made them."""

    def is_narrow(p: Any) -> bool:
        return jnp.issubdtype(jnp.result_type(p), jnp.floating) and jnp.result_type(p).itemsize == 2

    if not any(map(is_narrow, jax.tree.leaves(params))):
        return params
    if not any(lift.rounding for lift in lifts_in(tx, params)):
        return params
    return jax.tree.map(lambda p: jax.ShapeDtypeStruct(p.shape, jnp.float32) if is_narrow(p) else p, params)


def _keep_type(new: Any, old: Any) -> Any:
    dtype, old_dtype = jnp.result_type(new), jnp.result_type(old)
    if dtype == old_dtype:
        return new
    if dtype == FLOAT0:
        return jnp.zeros(new.shape, old_dtype)
    return np.zeros(jnp.shape(new), FLOAT0) if old_dtype == FLOAT0 else as_array(new).astype(old_dtype)


def find(state: Any, kind: type) -> list[tuple[str, Any]]:
    """Every node of type ``kind`` in ``state`` with its path, and with arrays in place of NNX variables.

    Raises:
      ValueError: there is none.
    """
    nodes = find_nodes(state, kind)
    if not nodes:
        raise ValueError(f"state: no {kind.__name__} in {jax.tree.structure(state)}")
    return [(path, plain(node)) for path, node in nodes]
