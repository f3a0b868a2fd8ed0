"""Batches of examples: trees of arrays that share their first axis."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from jaxsgd.paths import leaf_names

__all__ = ["batch_size", "check_divides"]


def batch_size(batch: Any) -> int | None:
    """The length of the first axis, which all arrays of a batch share; None if the batch has no array.

    Raises:
      ValueError: names the arrays that disagree, or the empty one.
    """
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
