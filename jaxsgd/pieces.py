"""The step of a large array in pieces that fit a processor's cache.

XLA for CPU writes out whole what a reduction reads, such as a moment whose blocks get a scale. A loop over pieces keeps
these temporaries small, and updates the stored slots in place.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp

from jaxsgd.meshes import on_one_device
from jaxsgd.storage import Storage

__all__ = [
    "LARGE",
    "Pieces",
    "as_bytes",
    "from_bytes",
    "in_pieces",
    "is_narrow",
    "on_bytes",
    "pieces_of",
]

PIECE = 2**18
"""The elements of a piece: a megabyte in float32."""
LARGE = 2**21
"""The elements of the smallest array that a loop steps: it takes longer to compile than a step of the whole."""
SMALL = 2**14
"""The elements of an array that is never cut."""


@dataclass(frozen=True)
class Pieces:
    """A cut of an array: it is seen as ``(rows, row)``, and a piece has ``length`` rows.

    The last piece may be shorter.
    """

    rows: int
    row: int
    length: int

    def seen(self, x: jax.Array) -> jax.Array:
        """The array, or a part of its stored form, with its rows as the first axis."""
        return x.reshape(self.rows, x.size // self.rows)

    def shape(self, x: Any) -> jax.ShapeDtypeStruct:
        """The shape and dtype of a piece of ``x``; a scalar stays."""
        shape = () if jnp.ndim(x) == 0 else (self.length, x.size // self.rows)
        return jax.ShapeDtypeStruct(shape, jnp.result_type(x))


def pieces_of(like: jax.Array, storages: Mapping[str, Storage], arrays: Any) -> Pieces | None:
    """The cut of an array of the shape ``like``; None where it is small, split over devices, or packed as one.

    Args:
      storages: those of its slots.
      arrays: all that the step reads.
    """
    if like.size < SMALL or not on_one_device([like, *jax.tree.leaves(arrays)]):
        return None
    row = 1
    for storage in storages.values():
        ask = getattr(storage, "part", None)
        if ask is None or (part := ask(like)) is None:
            return None
        row = math.lcm(row, part)
    if like.shape[-1] % row:
        return None
    if row == 1:
        row = math.gcd(like.shape[-1], PIECE)
    rows, most = like.size // row, max(1, PIECE // row)
    even = next((n for n in range(most, most // 8, -1) if rows % n == 0), most)
    return Pieces(rows, row, even)


def in_pieces(step: Callable[..., Any], pieces: Pieces, read: Any, kept: Any, alive: jax.Array) -> Any:
    """``step(read, kept, rows)`` over the pieces of ``read`` and ``kept``.

    Args:
      step: from a piece of each, and the numbers of its rows, ``(length, 1)``, to the next ``kept``.
      read: a pytree; scalars in it are the same for all pieces.
      kept: a pytree of arrays, replaced piece by piece.
      alive: a scalar that is true, which the compiler does not know.

    Returns:
      ``kept`` after the step, in its shapes.
    """
    step = on_bytes(step, kept)
    seen = jax.tree.map(lambda x: pieces.seen(x) if jnp.ndim(x) else x, read)
    held = jax.tree.map(lambda x: pieces.seen(as_bytes(x)), kept)

    def stepped(held: Any, first: Any, length: int) -> Any:
        def cut(x: Any) -> Any:
            return jax.lax.dynamic_slice_in_dim(x, first, length) if jnp.ndim(x) else x

        # A branch that the compiler cannot resolve: it would else read slices of what the loop replaces wherever a
        # result needs them, and copy the whole of it first. Slices within it are read in place.
        rows = first + jnp.arange(length)[:, None]
        new = jax.lax.cond(
            alive,
            lambda seen, held: step(jax.tree.map(cut, seen), jax.tree.map(cut, held), rows),
            lambda _, held: jax.tree.map(cut, held),
            seen,
            held,
        )
        return jax.tree.map(lambda x, y: jax.lax.dynamic_update_slice_in_dim(x, y, first, 0), held, new)

    whole, rest = divmod(pieces.rows, pieces.length)
    held = jax.lax.fori_loop(0, whole, lambda i, held: stepped(held, i * pieces.length, pieces.length), held)
    if rest:
        held = stepped(held, whole * pieces.length, rest)
    return jax.tree.map(lambda x, like: from_bytes(x.reshape(like.shape), like.dtype), held, kept)


def is_narrow(dtype: Any) -> bool:
    """Whether it is a dtype of eight-bit floats."""
    return jnp.issubdtype(dtype, jnp.floating) and jnp.dtype(dtype).itemsize == 1


def as_bytes(x: jax.Array) -> jax.Array:
    """Eight-bit floats as the uint8 of their bits; other arrays as they are.

    XLA for CPU widens eight-bit floats to copy a slice of them, and not all kernels have them.
    """
    return jax.lax.bitcast_convert_type(x, jnp.uint8) if is_narrow(x.dtype) else x


def from_bytes(x: jax.Array, dtype: Any) -> jax.Array:
    """The way back from `as_bytes`."""
    return x if x.dtype == dtype else jax.lax.bitcast_convert_type(x, dtype)


def on_bytes(step: Callable[..., Any], kept: Any) -> Callable[..., Any]:
    """``step(read, kept, rows)``, whose second argument and last result are as of `as_bytes`."""

    def stepped(read: Any, held: Any, rows: Any) -> Any:
        held = jax.tree.map(lambda x, like: from_bytes(x, like.dtype), held, kept)
        return jax.tree.map(as_bytes, step(read, held, rows))

    return stepped
