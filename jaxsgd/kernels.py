"""The step of a packed array in one kernel, for TPU and GPU.

XLA needs a kernel to find the scale of each block and another one to use it, with whole moments in between. Here a
block is read, unpacked, stepped, packed and written by one Pallas kernel, whose body is the trace of the step itself.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jax.extend.core import ClosedJaxpr, Literal

from jaxsgd.elementwise import ALONE, CALLS
from jaxsgd.meshes import made_from
from jaxsgd.pieces import Pieces, as_bytes, from_bytes, is_narrow, on_bytes

__all__ = ["Body", "body_of", "in_kernel"]

# fmt: off
UNKNOWN = {
    "acos", "acosh", "asin", "asinh", "atan", "atanh", "cbrt", "complex", "conj", "copy", "cosh", "digamma", "erf",
    "erfc", "expm1", "imag", "lgamma", "real", "reduce_precision", "round", "sinh",
}
# fmt: on
"""Primitives that Mosaic or Triton does not translate."""
KNOWN = (ALONE - UNKNOWN) | {"broadcast_in_dim", "iota", "reduce_max", "reduce_sum", "reshape", "squeeze"}
"""Primitives that both translate."""
INSTEAD: dict[str, Callable[[Any], Any]] = {
    "sign": lambda x: jnp.where(x > 0, jnp.ones_like(x), jnp.where(x < 0, -jnp.ones_like(x), x)),
}
"""Primitives whose translation asks which TPU the host has, though the kernel may be for another one."""
ROWS = {"tpu": 256, "cuda": 8}
"""The blocks that one call of the kernel steps."""


@dataclass(frozen=True)
class Body:
    """A step on blocks, split into what needs scalars alone and what needs the blocks.

    Attributes:
      closed: the trace: blocks, then the numbers of rows, then scalars -> blocks.
      blocks: how many of its arguments are blocks.
      inside: for each equation whether it is computed in the kernel.
      scalars: the variables that the kernel gets from outside.
    """

    closed: ClosedJaxpr
    blocks: int
    inside: tuple[bool, ...]
    scalars: tuple[Any, ...]

    def before(self, values: Sequence[Any]) -> list[Any]:
        """The scalars of the kernel, from those of the step."""
        jaxpr = self.closed.jaxpr
        env = dict(zip(jaxpr.invars[self.blocks + 1 :], values, strict=True))
        env |= dict(zip(jaxpr.constvars, self.closed.consts, strict=True))
        self._run(env, inside=False)
        return [env[v] for v in self.scalars]

    def within(self, blocks: Sequence[Any], rows: Any, scalars: Sequence[Any]) -> list[Any]:
        """The new blocks."""
        jaxpr = self.closed.jaxpr
        env = dict(zip(jaxpr.invars[: self.blocks + 1], (*blocks, rows), strict=True))
        env |= dict(zip(self.scalars, scalars, strict=True))
        self._run(env, inside=True)
        return [v.val if isinstance(v, Literal) else env[v] for v in jaxpr.outvars]

    def _run(self, env: dict[Any, Any], *, inside: bool) -> None:
        for eqn, here in zip(self.closed.jaxpr.eqns, self.inside, strict=True):
            if here is not inside:
                continue
            values = [v.val if isinstance(v, Literal) else env[v] for v in eqn.invars]
            if inside and eqn.primitive.name in INSTEAD:
                out = INSTEAD[eqn.primitive.name](*values)
            elif inside and _reads_bytes(eqn):
                out = values[0]
            else:
                out = eqn.primitive.bind(*values, **eqn.primitive.get_bind_params(eqn.params))
            env.update(zip(eqn.outvars, out if eqn.primitive.multiple_results else [out], strict=True))


def body_of(step: Callable[..., Any], blocks: Sequence[Any], rows: Any, scalars: Sequence[Any]) -> Body | None:
    """The body of a kernel; None if the step does what no kernel can.

    Args:
      step: ``step(blocks, rows, scalars)`` -> a list of new blocks.
      blocks, rows, scalars: their shapes and dtypes.
    """

    def flat(*arrays: Any) -> Any:
        return step(arrays[: len(blocks)], arrays[len(blocks)], arrays[len(blocks) + 1 :])

    closed = jax.make_jaxpr(flat)(*blocks, rows, *scalars)
    jaxpr = closed.jaxpr
    depends, inside, needed = {*jaxpr.invars[: len(blocks) + 1]}, [], {}
    for eqn in jaxpr.eqns:
        named = [v for v in eqn.invars if not isinstance(v, Literal)]
        large = any(math.prod(v.aval.shape) > 8 for v in eqn.outvars)  # such as an iota: rather computed again
        here = large or any(v in depends for v in named)
        inside.append(here)
        if here:
            needed |= dict.fromkeys(v for v in named if v not in depends)
            depends |= {*eqn.outvars}
            if not _translates(eqn):
                return None
    if any(v.aval.shape != () for v in needed) or any(v not in depends for v in jaxpr.outvars):
        return None
    return Body(closed, len(blocks), tuple(inside), tuple(needed))


def _translates(eqn: Any) -> bool:
    name = eqn.primitive.name
    if name in CALLS:
        return all(_translates(inner) for inner in eqn.params[CALLS[name]].jaxpr.eqns)
    narrow = any(is_narrow(v.aval.dtype) for v in (*eqn.invars, *eqn.outvars))
    return _reads_bytes(eqn) if narrow else name in KNOWN


def _reads_bytes(eqn: Any) -> bool:
    """Whether it turns uint8 into eight-bit floats or back. A kernel holds such floats as their bytes."""
    types = [v.aval.dtype for v in (*eqn.invars, *eqn.outvars)]
    return eqn.primitive.name == "bitcast_convert_type" and jnp.uint8 in types and any(map(is_narrow, types))


def in_kernel(
    step: Callable[..., Any], pieces: Pieces, read: Any, kept: Any, made: Any, shape: tuple[int, ...], *, on: str
) -> Any:
    """``step(read, kept, rows)`` on all blocks; None if no kernel can do it. See `jaxsgd.pieces.in_pieces`.

    Args:
      step: to ``(new, kept)``.
      made: the shape and dtype of ``new``: those of the array, or ``(rows, 1)``.
      shape: the array's.
      on: ``"tpu"`` or ``"cuda"``; with ``"interpret"`` the TPU's kernel runs anywhere, for tests.
    """
    step = on_bytes(step, kept)
    values, form = jax.tree.flatten(read)
    stored, treedef = jax.tree.flatten(kept)
    held = [as_bytes(x) for x in stored]
    is_array = [bool(jnp.ndim(x)) for x in values]
    arrays = [x for x, array in zip(values, is_array, strict=True) if array]
    scalars = [x for x, array in zip(values, is_array, strict=True) if not array]

    def flat(blocks: Sequence[Any], rows: Any, others: Sequence[Any]) -> list[Any]:
        own, rest = iter(blocks), iter(others)
        there = form.unflatten(next(own) if array else next(rest) for array in is_array)
        return jax.tree.leaves(step(there, treedef.unflatten(own), rows))

    given = [*arrays, *held]
    results = [made, *held]
    if any(x.size // pieces.rows not in (1, pieces.row) for x in (*given, *results)):
        return None
    grid = (_OnGPU if on == "cuda" else _OnTPU).of(pieces, shape)
    if grid is None:
        return None
    seen = [jax.ShapeDtypeStruct((grid.count, x.size // pieces.rows), x.dtype) for x in given]
    numbers = jax.ShapeDtypeStruct((grid.count, 1), jnp.int32)
    body = body_of(flat, seen, numbers, [jax.ShapeDtypeStruct((), jnp.result_type(x)) for x in scalars])
    if body is None:
        return None
    new, *after = grid.call(body, body.before(scalars), given, results, interpret=on == "interpret")
    after = [from_bytes(x.reshape(like.shape), like.dtype) for x, like in zip(after, stored, strict=True)]
    return new.reshape(made.shape), treedef.unflatten(after)


def _aliases(scalars: int, given: list[Any], results: list[Any]) -> dict[int, int]:
    """Arrays of state are replaced in place; the first result is new."""
    first = scalars + len(given) - len(results)
    return {first + i: i for i in range(1, len(results))}


@dataclass(frozen=True)
class _OnGPU:
    """Blocks of an array in order, some to a program."""

    rows: int
    row: int
    count: int

    @classmethod
    def of(cls, pieces: Pieces, shape: tuple[int, ...]) -> _OnGPU | None:
        if pieces.row & (pieces.row - 1):  # Triton's blocks are powers of two
            return None
        return cls(pieces.rows, pieces.row, math.gcd(pieces.rows, ROWS["cuda"]))

    def call(
        self, body: Body, scalars: list[Any], given: list[Any], results: list[Any], *, interpret: bool
    ) -> list[Any]:
        from jax.experimental import pallas as pl
        from jax.experimental.pallas import triton

        count, few = self.count, len(scalars)

        def shape(x: Any) -> tuple[int, ...]:
            return (self.rows, self.row) if x.size > self.rows else (self.rows,)

        def spec(x: Any) -> Any:
            if x.size > self.rows:
                return pl.BlockSpec((count, self.row), lambda i: (i, 0))
            return pl.BlockSpec((count,), lambda i: (i,))

        def kernel(*refs: Any) -> None:
            values, own, out = refs[:few], refs[few : few + len(given)], refs[few + len(given) :]
            blocks = [ref[...] if len(ref.shape) > 1 else ref[...][:, None] for ref in own]
            rows = pl.program_id(0) * count + jax.lax.broadcasted_iota(jnp.int32, (count, 1), 0)
            new = body.within(blocks, rows, [ref[0] for ref in values])
            for ref, x in zip(out, new, strict=True):
                ref[...] = x if len(ref.shape) > 1 else x.reshape(count)

        one = pl.BlockSpec((1,), lambda i: (0,))
        return pl.pallas_call(
            kernel,
            grid=(self.rows // count,),
            in_specs=[*(one for _ in scalars), *map(spec, given)],
            out_specs=[*map(spec, results)],
            out_shape=[made_from(given, shape(x), x.dtype) for x in results],
            input_output_aliases=_aliases(few, given, results),
            compiler_params=triton.CompilerParams(num_warps=4, num_stages=1),
            interpret=interpret,
            name="step",
        )(*(jnp.reshape(x, (1,)) for x in scalars), *(x.reshape(shape(x)) for x in given))


@dataclass(frozen=True)
class _OnTPU:
    """A matrix in blocks of some rows by a block of its columns; the scales of those rows stay while they pass.

    A TPU lays out the last two axes in tiles, so that the matrix is not seen in another shape.
    """

    height: int
    row: int
    across: int
    count: int

    @classmethod
    def of(cls, pieces: Pieces, shape: tuple[int, ...]) -> _OnTPU | None:
        height = math.prod(shape[:-1])
        if pieces.row % 128 or shape[-1] % pieces.row or height < 32:
            return None
        return cls(height, pieces.row, shape[-1] // pieces.row, min(ROWS["tpu"], height // 32 * 32))

    def call(
        self, body: Body, scalars: list[Any], given: list[Any], results: list[Any], *, interpret: bool
    ) -> list[Any]:
        from jax.experimental import pallas as pl
        from jax.experimental.pallas import tpu

        count, across, few = self.count, self.across, len(scalars)
        scales = self.height * across

        def shape(x: Any) -> tuple[int, ...]:
            return self.height, across * (self.row if x.size > scales else 1)

        def spec(x: Any) -> Any:
            if x.size > scales:
                return pl.BlockSpec((count, self.row), lambda i, k: (i, k))
            return pl.BlockSpec((count, across), lambda i, k: (i, 0))

        def kernel(*refs: Any) -> None:
            values, own, out = refs[:few], refs[few : few + len(given)], refs[few + len(given) :]
            down, along = pl.program_id(0), pl.program_id(1)
            here = jax.lax.broadcasted_iota(jnp.int32, (count, across), 1) == along
            blocks = [
                ref[...] if x.size > scales else jnp.sum(jnp.where(here, ref[...], 0), axis=1, keepdims=True)
                for ref, x in zip(own, given, strict=True)
            ]
            rows = (down * count + jax.lax.broadcasted_iota(jnp.int32, (count, 1), 0)) * across + along
            new = body.within(blocks, rows, [ref[0] for ref in values])
            for ref, x, like in zip(out, new, results, strict=True):
                ref[...] = x if like.size > scales else jnp.where(here, x, ref[...])

        return pl.pallas_call(
            kernel,
            grid=(pl.cdiv(self.height, count), across),
            in_specs=[*(pl.BlockSpec(memory_space=tpu.SMEM) for _ in scalars), *map(spec, given)],
            out_specs=[*map(spec, results)],
            out_shape=[made_from(given, shape(x), x.dtype) for x in results],
            input_output_aliases=_aliases(few, given, results),
            compiler_params=tpu.CompilerParams(dimension_semantics=("parallel", "arbitrary")),
            interpret=interpret,
            name="step",
        )(*(jnp.reshape(x, (1,)) for x in scalars), *(x.reshape(shape(x)) for x in given))
