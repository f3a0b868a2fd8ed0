"""Products that are symmetric matrices, in half the work on a GPU.

XLA computes both halves of a symmetric product. On a GPU it adds a multiple of another matrix in a pass of its own.
Here a Triton kernel computes the tiles on and below the diagonal, adds what is to be added, and writes each tile twice.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from jaxsgd.meshes import made_from, on_one_device, platform_of

__all__ = ["Product", "half_product", "halves", "symmetric_product"]

LEAST = 256
"""The smallest side of a product that the kernel computes: it has few tiles below that."""
DTYPES = {jnp.dtype("float32"): 32, jnp.dtype("bfloat16"): 64, jnp.dtype("float16"): 64}
"""The types of matrices that the kernel takes, and how many columns of a tile it multiplies at once."""


Product = Callable[..., jax.Array]
"""`symmetric_product` with its first argument."""


def halves(like: jax.Array) -> bool:
    """Whether the kernel is for products of ``like`` and of what comes from it: on a GPU, each array on one device."""
    return platform_of(like) == "cuda" and on_one_device([like])


def symmetric_product(
    halved: bool,
    plain: Callable[..., jax.Array],
    x: jax.Array,
    y: jax.Array | None = None,
    *,
    tall: bool = False,
    scalars: Sequence[Any] = (0, 0, 1),
) -> jax.Array:
    r"""$a I + b Y + c X Y^T$, or $X^T Y$ in its place.

    Args:
      halved: whether the kernel makes it, see `halves`. It leaves to ``plain`` what it cannot.
      plain: the same as a function of ``x``, or of ``x`` and ``y``.
      x: matrices in the last two axes.
      y: matrices of its shape. The product with them is symmetric. Default: ``x``.
      tall: whether the product is $X^T Y$.
      scalars: a, b and c. Unless b is 0, ``x`` and ``y`` are square.
    """
    arrays = (x,) if y is None else (x, y)
    if not (halved and _fits(arrays, tall, scalars)):
        return plain(*arrays)

    @jax.custom_jvp
    def call(*arrays: jax.Array) -> jax.Array:
        kernel = functools.partial(_any_batch, tall, tuple(scalars))
        # A program may also be exported for another platform than it was traced for.
        return jax.lax.platform_dependent(*arrays, cuda=kernel, default=plain)

    @call.defjvp
    def _(primals: Any, tangents: Any) -> Any:
        return jax.jvp(plain, primals, tangents)

    return call(*arrays)


def _fits(arrays: Sequence[jax.Array], tall: bool, scalars: Sequence[Any]) -> bool:
    x = arrays[0]
    rows, columns = x.shape[-2:]
    size, length = (columns, rows) if tall else (rows, columns)
    known = all(isinstance(scalar, int | float) for scalar in scalars)
    alike = all(other.dtype == x.dtype and other.shape == x.shape for other in arrays)
    return known and alike and x.dtype in DTYPES and size >= LEAST and size % 64 == 0 and length % DTYPES[x.dtype] == 0


def _any_batch(tall: bool, scalars: tuple[float, float, float], *arrays: jax.Array) -> jax.Array:
    """`half_product` of stacks of any shape, and under `jax.vmap`: one call for all of their matrices."""

    @jax.custom_batching.custom_vmap
    def call(*arrays: jax.Array) -> jax.Array:
        lead, matrix = arrays[0].shape[:-2], arrays[0].shape[-2:]
        out = half_product([x.reshape(math.prod(lead), *matrix) for x in arrays], tall, scalars)
        return out.reshape(*lead, *out.shape[1:])

    @call.def_vmap
    def _(size: int, batched: Sequence[bool], *arrays: jax.Array) -> tuple[jax.Array, bool]:
        pairs = zip(arrays, batched, strict=True)
        return call(*(x if own else jnp.broadcast_to(x, (size, *x.shape)) for x, own in pairs)), True

    return call(*arrays)


def half_product(
    arrays: Sequence[jax.Array], tall: bool, scalars: tuple[float, float, float], *, interpret: bool = False
) -> jax.Array:
    """A product of stacks ``(count, rows, columns)`` by the kernel, see `symmetric_product`.

    With ``interpret`` it runs anywhere, for tests.
    """
    from jax.experimental import pallas as pl
    from jax.experimental.pallas import triton

    x, (a, b, c) = arrays[0], scalars
    count, rows, columns = x.shape
    size, length = (columns, rows) if tall else (rows, columns)
    side, step = 128 if size % 128 == 0 else 64, DTYPES[x.dtype]
    tiles, axis = size // side, 0 if tall else 1

    def half_product_kernel(*refs: Any) -> None:
        left, right, out = refs[0], refs[-2], refs[-1]
        number, matrix = pl.program_id(0), pl.program_id(1)
        # The tiles of the triangle are numbered row by row.
        row = (jnp.sqrt((8 * number + 1).astype(jnp.float32)) / 2 - 0.499).astype(jnp.int32)
        column = number - row * (row + 1) // 2
        above, before = pl.ds(row * side, side), pl.ds(column * side, side)

        def read(ref: Any, place: Any, k: jax.Array) -> jax.Array:
            along = pl.ds(k * step, step)
            return ref[(matrix, along, place) if tall else (matrix, place, along)]

        def multiplied(k: jax.Array, total: jax.Array) -> jax.Array:
            pair, over = (read(left, above, k), read(right, before, k)), (((axis,), (axis,)), ((), ()))
            return total + jax.lax.dot_general(*pair, over, preferred_element_type=jnp.float32)

        tile = c * jax.lax.fori_loop(0, length // step, multiplied, jnp.zeros((side, side), jnp.float32))
        if b:
            tile += b * right[matrix, above, before].astype(jnp.float32)
        if a:
            i, j = (jax.lax.broadcasted_iota(jnp.int32, tile.shape, axis) for axis in (0, 1))
            tile += jnp.where((i == j) & (row == column), a, 0)
        tile = tile.astype(out.dtype)
        out[matrix, above, before] = tile

        @pl.when(row != column)
        def _() -> None:
            out[matrix, before, above] = tile.T

    return pl.pallas_call(
        half_product_kernel,
        grid=(tiles * (tiles + 1) // 2, count),
        out_shape=made_from(arrays, (count, size, size), x.dtype),
        compiler_params=triton.CompilerParams(num_warps=8 if side == 128 else 4, num_stages=3),
        interpret=interpret,
        name="half_product",
    )(*arrays)
