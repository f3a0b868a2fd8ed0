"""Batches of examples: trees of arrays that share their first axis."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxsgd.paths import leaf_names

__all__ = ["as_arrays", "batch_size", "check_divides"]


def as_arrays(batch: Any) -> Any:
    """``batch`` with arrays of other libraries, such as torch's tensors on the CPU, as NumPy arrays.

    Raises:
      TypeError: names the leaf that is neither an array nor a number, and says how to write it.
    """
    leaves, treedef = jax.tree.flatten(batch)
    if all(isinstance(x, np.ndarray | jax.Array | np.generic | int | float | complex) for x in leaves):
        return batch
    names = leaf_names(batch)
    return treedef.unflatten(_array(name, x) for name, x in zip(names, leaves, strict=True))


def _array(name: str, x: Any) -> Any:
    kind = type(x).__name__
    if isinstance(x, np.ndarray | jax.Array | np.generic | int | float | complex) or hasattr(x, "aval"):
        return x
    if isinstance(x, jax.ShapeDtypeStruct):
        return x
    if hasattr(x, "__array__"):
        return np.asarray(x)
    where = f"batch: {name!r}" if name else "batch: it"
    if dataclasses.is_dataclass(x):
        raise TypeError(f"{where} is a {kind}, no pytree. Use jax.tree_util.register_dataclass({kind}), or a dict")
    if isinstance(x, str | bytes) or not isinstance(x, Iterable):
        raise TypeError(f"{where} is a {kind}; arrays and numbers are needed. Leave it out, or encode it as numbers")
    raise TypeError(f"{where} is a {kind}, which holds batches; one batch is needed. Use next(iter(...))")


def batch_size(batch: Any) -> int | None:
    """The length of the first axis, which all arrays of a batch share; None if the batch has no array.

    Raises:
      ValueError: names the arrays that disagree, or the empty one.
      TypeError: as in `as_arrays`.
    """
    batch = as_arrays(batch)
    sizes = {
        name: jnp.shape(leaf)[0]
        for name, leaf in zip(leaf_names(batch), jax.tree.leaves(batch), strict=True)
        if jnp.ndim(leaf) > 0
    }
    if not sizes:
        return None
    (first, size), *others = sizes.items()
    for name, other in others:
        if other != size:
            raise ValueError(f"batch: {first!r} has {size} examples, {name!r} has {other}; they must be the same")
    if size == 0:
        raise ValueError(f"batch: {first!r} is empty; at least one example is needed")
    return size


def check_divides(batch: Any, unit: int, among: str) -> None:
    """Check that the number of examples divides by ``unit``.

    Args:
      batch: a tree of arrays.
      unit: the divisor.
      among: the divisor's name for the error, ``"8 devices"``.

    Raises:
      ValueError: it does not divide, and the nearest sizes are named; or as in `batch_size`.
    """
    size = batch_size(batch)
    if size is None or size % unit == 0:
        return
    name = next(n for n, x in zip(leaf_names(batch), jax.tree.leaves(batch), strict=True) if jnp.ndim(x) > 0)
    below = size - size % unit
    near = f"{below} or {below + unit}" if below else f"{unit}"
    raise ValueError(f"batch: {name!r} has {size} examples, not divisible by {among}; nearest: {near}")
