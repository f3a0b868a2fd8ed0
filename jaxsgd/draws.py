"""The keys of the random numbers that a step draws."""

from __future__ import annotations

import contextvars
from collections.abc import Iterator
from contextlib import contextmanager

import jax
import jax.numpy as jnp
import numpy as np

from jaxsgd.numerics import hashed

__all__ = ["layer_key", "of_layer", "step_key"]

_layer: contextvars.ContextVar[jax.Array | None] = contextvars.ContextVar("layer", default=None)


def step_key(count: jax.Array, number: int) -> jax.Array:
    """The random key of a step for the use of this number.

    Its words are hashes in place of `jax.random.fold_in`, which takes longer to compile than a step of Adam.
    """
    words = jnp.stack([count.astype(jnp.uint32) * np.uint32(2)] * 2) + np.arange(2, dtype=np.uint32)
    words = words * np.uint32(0x9E3779B1) + np.uint32((number + 1) * 0x85EBCA77 % 2**32)
    if (layer := _layer.get()) is not None:
        words += hashed(layer.astype(jnp.uint32) + 1)
    return jax.random.wrap_key_data(hashed(words), impl="threefry2x32")


def layer_key(key: jax.Array) -> jax.Array:
    """``key``, or within `of_layer` that of the layer."""
    layer = _layer.get()
    return key if layer is None else jax.random.fold_in(key, layer)


@contextmanager
def of_layer(index: jax.Array) -> Iterator[None]:
    """A context whose steps draw the random numbers of one layer of a stack."""
    token = _layer.set(index)
    try:
        yield
    finally:
        _layer.reset(token)
