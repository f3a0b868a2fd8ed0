"""How a slot rests between two steps. Rules never see it: they get and return wide arrays.

A storage is any object with ``pack`` and ``unpack``; the lift packs after a step and unpacks before the next.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, NamedTuple, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jax.typing import DTypeLike

from jaxsgd.numerics import real_dtype, stochastic_round, wide

__all__ = ["Blocks", "Storage", "accepts", "cast", "decode", "encode_like", "first_packed", "int8", "of_kind", "plain"]


class Blocks(NamedTuple):
    """An array at eight bits, as ordinary arrays that shard, checkpoint and donate like the rest.

    Attributes:
      codes: of the array's shape, indices of `dynamic_map`: uint8 where no value is negative, else int8, less 1
        (so that -127 to 128 fit).
      scale: the largest magnitude of each block, of which its values are multiples: shape ``(*shape[:-1], blocks)``.
    """

    codes: jax.Array
    scale: jax.Array


@runtime_checkable
class Storage(Protocol):
    """How one slot is stored: a hashable object, such as a frozen dataclass.

    ``pack`` may give any pytree of arrays; ``unpack`` gives the wide array again, of the same shape. A storage may have
    further attributes:

    - ``needs_key = True``: ``pack`` gets a random key in place of None;
    - ``accepts(kind) -> bool``: whether a slot of this kind can be stored so (see `jaxsgd.slots`); by default any;
    - ``of_kind(kind) -> Storage``: the form for slots of this kind; by default itself;
    - ``zeros(x) -> packed``: the form of an array of zeros like ``x``, where that is cheaper than packing one.
    """

    def pack(self, x: jax.Array, key: jax.Array | None = None) -> Any:
        """The stored form of one wide array."""
        ...

    def unpack(self, packed: Any) -> jax.Array:
        """The wide array again."""
        ...


def accepts(storage: Storage, kind: str) -> bool:
    """Whether ``storage`` takes slots of this kind."""
    ask = getattr(storage, "accepts", None)
    return True if ask is None else bool(ask(kind))


def of_kind(storage: Storage, kind: str) -> Storage:
    """The form of ``storage`` for slots of this kind."""
    ask = getattr(storage, "of_kind", None)
    return storage if ask is None else ask(kind)


def needs_key(storage: Storage) -> bool:
    """Whether ``storage.pack`` wants a random key."""
    return bool(getattr(storage, "needs_key", False))


def first_packed(storage: Storage, x: jax.Array, zero: bool, key: jax.Array | None) -> Any:
    """The stored form of a slot's first value; ``zero`` says that it is zeros."""
    written = getattr(storage, "zeros", None)
    if zero and written is not None and (isinstance(x, Tracer) or len(x.sharding.device_set) == 1):
        return written(x)
    # Behind a barrier: XLA would pack constants while compiling, for minutes.
    return _packed(storage, x, key)


@functools.partial(jax.jit, static_argnums=0)
def _packed(storage: Storage, x: jax.Array, key: jax.Array | None) -> Any:
    return storage.pack(jax.lax.optimization_barrier(x), key)


@dataclass(frozen=True)
class Plain:
    """As computed: at least float32."""

    def pack(self, x: jax.Array, key: jax.Array | None = None) -> jax.Array:
        return x

    def unpack(self, packed: jax.Array) -> jax.Array:
        return wide(packed)

    def zeros(self, x: jax.Array) -> jax.Array:
        return x


@dataclass(frozen=True)
class Cast:
    """As another floating dtype. See `cast`."""

    dtype: jnp.dtype
    stochastic: bool = False

    @property
    def needs_key(self) -> bool:
        return self.stochastic

    def accepts(self, kind: str) -> bool:
        """A second moment needs the exponents of float32: in float16 it underflows at gradients of 1e-4."""
        return kind != "square" or jnp.finfo(self.dtype).nexp >= 8

    def pack(self, x: jax.Array, key: jax.Array | None = None) -> jax.Array:
        if not jnp.issubdtype(x.dtype, jnp.inexact):
            return x
        if self.stochastic and key is not None and not jnp.iscomplexobj(x):
            return stochastic_round(x, self.dtype, jax.random.bits(key, x.shape, jnp.uint16))
        # A complex moment has no 16-bit form; promotion keeps it complex.
        return x.astype(jnp.promote_types(self.dtype, jnp.complex64) if jnp.iscomplexobj(x) else self.dtype)

    def unpack(self, packed: jax.Array) -> jax.Array:
        return wide(packed)


DECADES = np.arange(7)


def _first(signed: bool) -> int:
    """How many values the lowest decade has."""
    return 1 if signed else 2


@functools.cache
def _value_lines(signed: bool) -> tuple[np.ndarray, np.ndarray]:
    """c and k of ``value = k (9 index + c)``: the sum is exact in float32, so that the value is rounded once."""
    counts = _first(signed) * 2.0**DECADES
    shifts = 4.5 + 9 * (_first(signed) - 1) - 8 * counts
    return shifts.astype(np.float32), (10.0 ** (DECADES - 7) / counts).astype(np.float32)


@functools.cache
def _index_lines(signed: bool) -> tuple[np.ndarray, np.ndarray]:
    """Slopes and offsets of the index as a function of a magnitude in [0, 1]."""
    counts = _first(signed) * 2**DECADES
    edges = [np.linspace(0.1, 1, n + 1) * 10.0 ** (d - 6) for d, n in zip(DECADES, counts, strict=True)]
    values = np.concatenate([[0.0], *((e[1:] + e[:-1]) / 2 for e in edges), [1.0]])
    starts = np.cumsum(np.concatenate([[1], counts]))  # the first index of each decade, and that of 1
    knots = np.unique([0, *starts, *(starts[1:] - 1)])
    slopes = np.diff(knots) / np.diff(values[knots])
    offsets = knots[:-1] - slopes * values[knots[:-1]]
    slopes = slopes.astype(np.float32)
    offsets[-1] = knots[-1] - slopes[-1]  # exact at 1, the largest of each block
    return slopes, offsets.astype(np.float32)


def _over_lines(x: jax.Array, a: np.ndarray, b: np.ndarray, line: Callable[..., jax.Array], largest: bool) -> jax.Array:
    """The largest or smallest of ``line(x, a, b)`` over pairs of coefficients."""

    def reduced(x: jax.Array) -> jax.Array:
        shape = (len(a), *x.shape)
        wide_a, wide_b = (jax.lax.broadcast_in_dim(jnp.asarray(c), shape, (0,)) for c in (a, b))
        reduce = jax.lax.reduce_max if largest else jax.lax.reduce_min
        return reduce(line(jax.lax.broadcast(x, shape[:1]), wide_a, wide_b), axes=(0,))

    def one_by_one(x: jax.Array) -> jax.Array:
        return functools.reduce(
            jnp.maximum if largest else jnp.minimum, (line(x, *pair) for pair in zip(a, b, strict=True))
        )

    # XLA for CPU compiles one reduction much faster than many lines; GPU and TPU fuse elementwise work only.
    return jax.lax.platform_dependent(x, cpu=reduced, default=one_by_one)


def dynamic_map(index: jax.Array, signed: bool) -> jax.Array:
    """256 values in [-1, 1], or in [0, 1], finer towards zero (Dettmers et al. 2022, arXiv:2110.02861).

    Seven decades below 1, each with twice the values of the one before, the middles of equal parts of its
    [0.1, 1]; and 0 and 1 themselves. Index 0 is 0; a signed map has -127 to 128, the other one 0 to 255.
    The map is convex and piecewise linear, so that a value is the largest of seven lines of the index.
    """
    x = index.astype(jnp.float32)
    value = _over_lines(9 * jnp.abs(x) if signed else 9 * x, *_value_lines(signed), lambda x, c, k: (x + c) * k, True)
    value = jax.lax.clamp(np.float32(0), value, np.float32(1))
    return jnp.sign(x) * value if signed else value


def _index_of(size: jax.Array, signed: bool) -> jax.Array:
    """Where a magnitude in [0, 1] stands in `dynamic_map`: whole at its values, linear between them."""
    slopes, offsets = _index_lines(signed)
    low = _over_lines(size, slopes[:-1], offsets[:-1], lambda x, a, b: x * a + b, False)
    return jnp.maximum(low, size * slopes[-1] + offsets[-1])


def random_shares(key: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    """Multiples of 2**-16 in [0, 1): a hash of each position and the key, the same however the array is sharded.

    So coarse that `floor` of an index below 256 plus one of them is exact: a value of the map never moves.
    """
    hashed, stride = jax.random.key_data(key)[-1], 0x9E3779B1  # Weyl's sequence of the golden ratio
    for axis in reversed(range(len(shape))):
        hashed = hashed + jax.lax.broadcasted_iota(jnp.uint32, shape, axis) * np.uint32(stride % 2**32)
        stride *= shape[axis]
    hashed = (hashed ^ (hashed >> 15)) * np.uint32(0x85EBCA77)
    hashed = (hashed ^ (hashed >> 13)) * np.uint32(0xC2B2AE3D)
    return (hashed >> 16).astype(jnp.float32) * np.float32(2**-16)


@dataclass(frozen=True)
class Int8:
    """Eight bits in blocks. See `int8`."""

    block: int
    min_size: int
    stochastic: bool
    signed: bool = True

    @property
    def needs_key(self) -> bool:
        return self.stochastic

    def accepts(self, kind: str) -> bool:
        return kind in ("mean", "square")

    def of_kind(self, kind: str) -> Int8:
        return replace(self, signed=kind != "square")

    def _packs(self, x: jax.Array) -> bool:
        # A last axis of 1 would have a scale for each number, which takes more than it saves.
        small = x.size < max(self.min_size, 1) or x.ndim == 0 or x.shape[-1] == 1
        return not small and jnp.issubdtype(x.dtype, jnp.floating)

    def zeros(self, x: jax.Array) -> Any:
        if not self._packs(x):
            return x
        blocks = -(-x.shape[-1] // min(self.block, x.shape[-1]))
        codes = jnp.full_like(x, -1, jnp.int8) if self.signed else jnp.zeros_like(x, jnp.uint8)
        return Blocks(codes, jnp.zeros((*x.shape[:-1], blocks), x.dtype))

    def _blocks(self, x: jax.Array) -> jax.Array:
        """``x`` with its last axis cut into blocks of equal length, the last filled up with zeros."""
        block = min(self.block, x.shape[-1])
        missing = -x.shape[-1] % block
        padded = jnp.pad(x, [(0, 0)] * (x.ndim - 1) + [(0, missing)]) if missing else x
        return padded.reshape(*x.shape[:-1], -1, block)

    def _codes(self, unit: jax.Array, key: jax.Array | None) -> jax.Array:
        """The indices of values in [-1, 1]: the nearest, or one of the two neighbours with the right mean."""
        drawn = random_shares(key, unit.shape) if self.stochastic and key is not None else np.float32(0.5)
        if not self.signed:
            return jnp.minimum(jnp.floor(_index_of(unit, False) + drawn), np.float32(255)).astype(jnp.uint8)
        index = jnp.floor(jnp.sign(unit) * _index_of(jnp.abs(unit), True) + drawn)
        return (jax.lax.clamp(np.float32(-127), index, np.float32(128)) - 1).astype(jnp.int8)

    def pack(self, x: jax.Array, key: jax.Array | None = None) -> Any:
        if not self._packs(x):
            return x
        blocks = self._blocks(x)
        scale = jnp.max(jnp.abs(blocks) if self.signed else blocks, axis=-1)
        # Below 2**-120 the reciprocal, by which XLA multiplies, would overflow: such a block is 0.
        unit = blocks / jnp.maximum(scale, np.float32(2.0**-120).astype(x.dtype))[..., None]
        # A barrier: XLA for TPU would move the reshape up and write the scales out in full.
        codes = jax.lax.optimization_barrier(self._codes(unit.astype(jnp.float32), key))
        return Blocks(codes.reshape(*x.shape[:-1], -1)[..., : x.shape[-1]], scale)

    def unpack(self, packed: Any) -> jax.Array:
        if not isinstance(packed, Blocks):
            return wide(packed)
        index = packed.codes.astype(jnp.float32)
        unit = dynamic_map(index + 1 if self.signed else index, self.signed).astype(packed.scale.dtype)
        scaled = self._blocks(unit) * packed.scale[..., None]
        return scaled.reshape(*unit.shape[:-1], -1)[..., : unit.shape[-1]]


def _storage_of(packed: Blocks) -> Int8:
    """What packed it: the length of a block is the power of two that gives so many scales."""
    size, count = packed.codes.shape[-1], packed.scale.shape[-1]
    block = next(b for b in (2**i for i in range(size.bit_length() + 1)) if -(-size // b) == count)
    return Int8(block, 0, stochastic=False, signed=packed.codes.dtype == jnp.int8)


def decode(packed: Blocks) -> jax.Array:
    """The wide array that was packed, from its blocks alone."""
    return _storage_of(packed).unpack(packed)


def encode_like(example: Blocks, x: jax.Array) -> Blocks:
    """``x``, of the shape of ``example.codes``, packed the way ``example`` is, rounded to nearest."""
    packed = _storage_of(example).pack(jnp.maximum(x, 0) if example.codes.dtype == jnp.uint8 else x)
    return Blocks(packed.codes, packed.scale.astype(example.scale.dtype))


plain = Plain()
"""The default storage: slots rest as they are computed, in float32 or wider."""


def cast(dtype: DTypeLike, *, stochastic: bool = False) -> Storage:
    """Keep a slot in ``dtype`` between steps, for example ``storage={"mu": cast("bfloat16")}``.

    Args:
      dtype: a floating dtype, or a complex one, which means that of its real part. A bfloat16 second moment
        with ``b2=0.999`` stops moving at half its value when rounded to nearest; use ``stochastic=True`` there.
      stochastic: round at random (to bfloat16) with the right mean, with bits drawn from the step,
        the slot and the leaf, so that every replica draws the same.

    Raises:
      ValueError: ``dtype`` is not a floating dtype, or ``stochastic`` with other than bfloat16.
    """
    resolved = jnp.dtype(dtype)
    if jnp.issubdtype(resolved, jnp.complexfloating):
        resolved = real_dtype(resolved)
    if not jnp.issubdtype(resolved, jnp.floating):
        raise ValueError(f"dtype={resolved.name}: a slot is stored in a floating dtype")
    if resolved.itemsize < 2:
        raise ValueError(f"dtype={resolved.name}: too few exponents without a scale. Use jaxsgd.int8()")
    if stochastic and resolved != jnp.bfloat16:
        raise ValueError(f"stochastic=True rounds to bfloat16; got dtype={resolved.name}")
    return Cast(resolved, stochastic)


def int8(*, block: int = 256, min_size: int = 4096, stochastic: bool = True) -> Storage:
    """Keep moments at eight bits between steps (Dettmers et al. 2022, arXiv:2110.02861): ``storage=int8()``.

    Blocks lie along the last axis, so that a slot may be sharded like its parameter. An array of fewer than
    ``min_size`` elements stays as it is, and so does every slot that is no moment (a copy of the parameters, a
    basis); embeddings opt out by ``groups=[("embed", {"storage": {}})]``.

    Args:
      block: how many elements share a scale, a power of two (so that the arrays alone say it).
      min_size: the smallest array that is packed.
      stochastic: round to one of the two neighbours at random, with the right mean. To nearest, the second moment of
        normal gradients is 5% too large after 5,000 steps of ``b2=0.999``.

    Raises:
      ValueError: ``block`` is no power of two, or ``min_size`` below 0.
    """
    if block < 1 or block & (block - 1):
        raise ValueError(f"block={block}: a power of two is needed, such as 128 or 256")
    if min_size < 0:
        raise ValueError(f"min_size={min_size}: it must be 0 or more")
    return Int8(block, min_size, stochastic)
