"""Moments at eight or four bits: codes or eight-bit floats, and a scale for each block of a row."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxsgd.numerics import check_count, hashed, wide
from jaxsgd.storage import Storage

__all__ = [
    "CODES",
    "Blocks",
    "Blockwise",
    "DynamicBlocks",
    "Floats",
    "Nibbles",
    "Packed",
    "bits_of",
    "decode",
    "encode_like",
    "fp8",
    "int4",
    "int8",
    "packed_as",
]

MAPS = ("octaves", "dynamic")
DITHER_BITS = 14
STEPS = 2**DITHER_BITS
"""Stochastic rounding tells apart so many shares of the way between two neighbours."""
GOLDEN = 0x9E3779B1
"""2**32 over the golden ratio: the step of Weyl's sequence."""


class Blocks(NamedTuple):
    """An array at eight bits by the map ``octaves``: ordinary arrays that shard, checkpoint and donate like the rest.

    Attributes:
      codes: shape of the array; int8 from -127 to 127, or uint8 where no value is negative.
      scale: the largest magnitude of each block, shape ``(*shape[:-1], blocks)``.
    """

    codes: jax.Array
    scale: jax.Array


class DynamicBlocks(NamedTuple):
    """An array at eight bits by the map ``dynamic``.

    Attributes:
      indices: shape of the array; indices of `dynamic_map`: uint8 where no value is negative, else int8, less 1
        (so that -127 to 128 fit).
      scale: the largest magnitude of each block, shape ``(*shape[:-1], blocks)``.
    """

    indices: jax.Array
    scale: jax.Array


class Nibbles(NamedTuple):
    """An array at four bits.

    Attributes:
      nibbles: the codes of two neighbours in a byte, the first one's in its low bits; shape ``(*shape[:-1],
        shape[-1] // 2)``; uint8 where no value is negative, else int8.
      scale: the largest magnitude of each block, shape ``(*shape[:-1], blocks)``.
    """

    nibbles: jax.Array
    scale: jax.Array


class Floats(NamedTuple):
    """An array of eight-bit floats.

    Attributes:
      floats: shape of the array; float8_e4m3fn or float8_e5m2. A block is scaled so that its largest magnitude is the
        largest finite number of the format (448 or 57344).
      scale: the largest magnitude of each block, shape ``(*shape[:-1], blocks)``.
    """

    floats: jax.Array
    scale: jax.Array


Packed = Blocks | DynamicBlocks | Nibbles | Floats
FORMS: dict[str, Any] = {
    "octaves": Blocks,
    "dynamic": DynamicBlocks,
    "nibbles": Nibbles,
    "e4m3": Floats,
    "e5m2": Floats,
}
FLOATS: dict[str, Any] = {"e4m3": jnp.float8_e4m3fn, "e5m2": jnp.float8_e5m2}
"""The formats of the Open Compute Project's 8-bit floats (Micikevicius et al. 2022, arXiv:2209.05433)."""
CODES = tuple(jnp.dtype(dtype) for dtype in (jnp.int8, jnp.uint8, *FLOATS.values()))
"""The dtypes of packed numbers."""

# -- the map "octaves" -----------------------------------------------------------------------------

MANTISSA = 23
"""The bits of a float32's mantissa."""
ONE = np.int32(127 << MANTISSA)
"""The bits of 1.0."""


@dataclass(frozen=True)
class Octaves:
    """Codes that are the leading bits of ``1 + top * unit`` as a float32, less those of 1.

    So the values are ``(2**octave * (1 + step / steps) - 1) / top``, evenly spaced within an octave, and a code takes a
    few operations on whole numbers. The law of telephony (ITU-T G.711, the mu-law) has the same form.

    Attributes:
      bits: of a step within its octave.
      codes: how many there are.
      least: what is added before a code is read: 1, or 0 for values that are never 0.
    """

    bits: int
    codes: int
    least: int = 1

    @property
    def low(self) -> int:
        """The number of mantissa bits that a code leaves out."""
        return MANTISSA - self.bits

    @property
    def _last(self) -> float:
        """The float32 whose leading bits are the largest code."""
        octave, step = divmod(self.codes - 1, 1 << self.bits)
        return 2.0**octave * (1 + step / (1 << self.bits))

    @property
    def top(self) -> np.float32:
        """The value of the largest code, before values are divided by it."""
        return np.float32(self._last - self.least)

    def _raised(self, value: jax.Array) -> jax.Array:
        """The float32 whose leading bits are the code of a value in [0, `top`]."""
        return value + 1 if self.least else jnp.maximum(value, 1)

    def _lowered(self, whole: jax.Array) -> jax.Array:
        """The way back from `_raised`."""
        return whole - self.least

    def code(self, size: jax.Array, dithered: jax.Array | None) -> jax.Array:
        """The codes of magnitudes in [0, 1], float32, as int32: each goes to one of its two neighbours.

        Args:
          size: the magnitudes.
          dithered: see `dither`. A value goes to the larger neighbour if its share of the way there exceeds them. So
            the mean over keys is the value. None: to the nearest.
        """
        above = jax.lax.bitcast_convert_type(self._raised(size * self.top), jnp.int32)
        up = np.int32(1 << (self.low - 1 if dithered is None else self.low - DITHER_BITS - 1)) - ONE
        if dithered is not None:
            above = above + (dithered << (self.low - DITHER_BITS))
        return jnp.minimum((above + up) >> self.low, np.int32(self.codes - 1))

    def value(self, code: jax.Array) -> jax.Array:
        """The magnitudes that int32 codes stand for; 1 exactly for the largest, so that no scale ever drifts."""
        share = np.float32(1) / self.top  # for every map here, top * share is 1
        value = self._lowered(jax.lax.bitcast_convert_type((code << np.int32(self.low)) + ONE, jnp.float32))
        # It is never negative: `abs` keeps XLA from multiplying the share and a scale first, which rounds otherwise.
        return jnp.abs(value * share)


MEANS = {"octaves": Octaves(3, 128), "nibbles": Octaves(1, 8)}
"""Of a magnitude beside a sign bit: 16 octaves of 8 steps, or 4 of 2."""
SQUARES = {"octaves": Octaves(3, 256), "nibbles": Octaves(1, 16, least=0)}
"""Of a number that is never negative: 32 octaves of 8 steps, or 8 of 2. At four bits none is 0, since a step
would be divided by it (Li et al. 2023, arXiv:2309.01507)."""


def octave_codes(unit: jax.Array, dithered: jax.Array | None, signed: bool) -> jax.Array:
    """The codes of values in [-1, 1], or in [0, 1], rounded as `Octaves.code` says."""
    # Here and below, a comparison with the magnitude takes XLA two operations less than one with 0.
    if not signed:
        return SQUARES["octaves"].code(unit, dithered).astype(jnp.uint8)
    size = jnp.abs(unit)
    code = MEANS["octaves"].code(size, dithered)
    return jax.lax.select(unit < size, -code, code).astype(jnp.int8)


def octave_values(codes: jax.Array, signed: bool) -> jax.Array:
    """The values of codes."""
    code = codes.astype(jnp.int32)
    if not signed:
        return SQUARES["octaves"].value(code)
    positive = jnp.abs(code)
    size = MEANS["octaves"].value(positive)
    return jax.lax.select(code < positive, -size, size)


# -- the map "nibbles" -----------------------------------------------------------------------------


def nibble_codes(unit: jax.Array, dithered: jax.Array | None, signed: bool) -> jax.Array:
    """Codes from 0 to 15, int32; with a sign the fourth bit is that."""
    if not signed:
        return SQUARES["nibbles"].code(unit, dithered)
    code = MEANS["nibbles"].code(jnp.abs(unit), dithered)
    return jnp.where((unit < 0) & (code > 0), code + 8, code)


def nibble_values(codes: jax.Array, signed: bool) -> jax.Array:
    """The values of codes."""
    if not signed:
        return SQUARES["nibbles"].value(codes)
    size = MEANS["nibbles"].value(codes & 7)
    return jnp.where(codes > 7, -size, size)


def paired(codes: jax.Array, signed: bool) -> jax.Array:
    """Codes of four bits, two to a byte."""
    both = codes[..., 0::2] | (codes[..., 1::2] << 4)
    return jax.lax.bitcast_convert_type(both.astype(jnp.uint8), jnp.int8 if signed else jnp.uint8)


def unpaired(both: jax.Array) -> jax.Array:
    """The codes of `paired`, int32."""
    byte = jax.lax.bitcast_convert_type(both, jnp.uint8).astype(jnp.int32)
    return jnp.stack([byte & 15, byte >> 4], axis=-1).reshape(*both.shape[:-1], 2 * both.shape[-1])


# -- the maps "e4m3" and "e5m2" ---------------------------------------------------------------------


@dataclass(frozen=True)
class Minifloat(Octaves):
    """Codes that are the bits of an eight-bit float without its sign, subnormal numbers included.

    Values are in units of the smallest normal number: below 1 they are evenly spaced, as between 1 and 2. So their
    codes are the leading bits of ``value + max(value, 1)``, for which no processor needs instructions of its own. A
    conversion rounds to nearest, and gives NaN above the largest number of e4m3fn.
    """

    @property
    def top(self) -> np.float32:
        return np.float32(self._last / 2)

    def _raised(self, value: jax.Array) -> jax.Array:
        return value + jnp.maximum(value, 1)

    def _lowered(self, whole: jax.Array) -> jax.Array:
        return jnp.minimum(whole - 1, whole * 0.5)


MINIFLOATS = {"e4m3": Minifloat(3, 0x7F), "e5m2": Minifloat(2, 0x7C)}
"""The codes from 0 to the largest finite number. Those above are NaN, and in e5m2 inf."""


def float_codes(unit: jax.Array, dithered: jax.Array | None, signed: bool, *, map: str) -> jax.Array:
    """Eight-bit floats of values in [-1, 1], or in [0, 1], times their largest, rounded as `Octaves.code` says."""
    code = MINIFLOATS[map].code(jnp.abs(unit) if signed else unit, dithered)
    if signed:
        code = code | ((jax.lax.bitcast_convert_type(unit, jnp.int32) >> 24) & 0x80)
    return jax.lax.bitcast_convert_type(code.astype(jnp.uint8), FLOATS[map])


def float_values(floats: jax.Array, signed: bool, *, map: str) -> jax.Array:
    """The values of eight-bit floats, over their largest."""
    code = jax.lax.bitcast_convert_type(floats, jnp.uint8).astype(jnp.int32)
    if not signed:
        return MINIFLOATS[map].value(code)
    size = MINIFLOATS[map].value(code & 0x7F)
    return jax.lax.select(code > 0x7F, -size, size)


# -- the map "dynamic" -----------------------------------------------------------------------------

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

    The values cover seven decades below 1, each with twice the values of the one below it. They are the middles of
    equal parts of a decade; 0 and 1 are values too. Index 0 is 0. A signed map has the indices -127 to 128, the other
    one 0 to 255. The map is convex and piecewise linear, so that a value is the largest of seven lines of the index.
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


def dynamic_codes(unit: jax.Array, dithered: jax.Array | None, signed: bool) -> jax.Array:
    """The codes of values in [-1, 1], or in [0, 1], as `octave_codes` rounds them."""
    share = np.float32(STEPS / 2 - 0.5) if dithered is None else dithered.astype(jnp.float32)
    up = (share + np.float32(0.5)) * np.float32(1 / STEPS)
    if not signed:
        return jnp.minimum(jnp.floor(_index_of(unit, False) + up), np.float32(255)).astype(jnp.uint8)
    index = jnp.floor(jnp.sign(unit) * _index_of(jnp.abs(unit), True) + up)
    return (jax.lax.clamp(np.float32(-127), index, np.float32(128)) - 1).astype(jnp.int8)


def dynamic_values(codes: jax.Array, signed: bool) -> jax.Array:
    """The values of codes, see `dynamic_map`."""
    index = codes.astype(jnp.float32)
    return dynamic_map(index + 1 if signed else index, signed)


TO_CODES: dict[str, Callable[..., jax.Array]] = {
    "octaves": octave_codes,
    "dynamic": dynamic_codes,
    "nibbles": nibble_codes,
    **{name: functools.partial(float_codes, map=name) for name in FLOATS},
}
TO_VALUES: dict[str, Callable[..., jax.Array]] = {
    "octaves": octave_values,
    "dynamic": dynamic_values,
    "nibbles": nibble_values,
    **{name: functools.partial(float_values, map=name) for name in FLOATS},
}

# -- the storage -----------------------------------------------------------------------------------


def shift_of(key: jax.Array) -> jax.Array:
    """The shift of `dither` from a key, uint32: once a step, for XLA to compile few operations a leaf."""
    words = jax.random.key_data(key)  # of a seed they may be 0 and 1
    words = hashed(words + np.arange(words.size, dtype=np.uint32) * np.uint32(GOLDEN))
    # XLA for CPU computes scalars again in each of the fusions that need them, but sums only once.
    return jnp.sum(words, dtype=jnp.uint32)


def dither(shift: jax.Array, shape: tuple[int, ...], rows: Any = None) -> jax.Array:
    """Whole numbers from 0 to `STEPS` - 1, int32: the same however the array is sharded or cut.

    Weyl's sequence of the golden ratio over the positions, shifted by a hash. Over keys each number is uniform; over
    positions they are spread more evenly than random ones. A hash of each position takes XLA for CPU twice as long to
    compile. A half is added before they round, so that the rounding error of a share never moves a value of the map.

    Args:
      shift: see `shift_of`.
      shape: the array's.
      rows: where the array is a part of another, the numbers of its rows, along its first axis, there; they broadcast
        to ``shape``.
    """
    position, stride = jnp.broadcast_to(shift, shape), GOLDEN
    for axis in reversed(range(0 if rows is None else 1, len(shape))):
        position = position + jax.lax.broadcasted_iota(jnp.uint32, shape, axis) * np.uint32(stride % 2**32)
        stride *= shape[axis]
    if rows is not None:
        position = position + rows.astype(jnp.uint32) * np.uint32(stride % 2**32)
    return (position >> np.uint32(32 - DITHER_BITS)).astype(jnp.int32)


@dataclass(frozen=True)
class Blockwise:
    """Codes and a scale for each block. See `int8`, `int4` and `fp8`.

    Attributes:
      square: the map of slots that are never negative, if it is another one than ``map``.
    """

    block: int
    min_size: int
    stochastic: bool
    map: str = "octaves"
    signed: bool = True
    square: str | None = None

    @property
    def needs_key(self) -> bool:
        return self.stochastic

    def accepts(self, kind: str) -> bool:
        return kind in ("mean", "square")

    def of_kind(self, kind: str) -> Blockwise:
        signed = kind != "square"
        return replace(self, signed=signed, map=self.map if signed or self.square is None else self.square)

    @property
    def _dtype(self) -> Any:
        return FLOATS.get(self.map, jnp.int8 if self.signed else jnp.uint8)

    def _packs(self, x: Any) -> bool:
        # A last axis of 1 would have a scale for each number, which takes more than it saves.
        small = x.size < max(self.min_size, 1) or x.ndim == 0 or x.shape[-1] == 1
        small = small or (self.map == "nibbles" and x.shape[-1] % 2 == 1)
        return not small and jnp.issubdtype(x.dtype, jnp.floating)

    def drawn(self, key: jax.Array) -> jax.Array:
        return shift_of(key)

    def zeros(self, like: jax.ShapeDtypeStruct) -> Any:
        if not self._packs(like):
            return jnp.zeros(like.shape, like.dtype)
        blocks = -(-like.shape[-1] // min(self.block, like.shape[-1]))
        half = 2 if self.map == "nibbles" else 1
        zero = -1 if self.map == "dynamic" and self.signed else 0
        codes = jnp.full((*like.shape[:-1], like.shape[-1] // half), zero, self._dtype)
        return FORMS[self.map](codes, jnp.zeros((*like.shape[:-1], blocks), like.dtype))

    def _blocks(self, x: jax.Array) -> jax.Array:
        """``x`` with its last axis cut into blocks of equal length, the last filled up; ``x`` itself if that is one."""
        block = min(self.block, x.shape[-1])
        if block == x.shape[-1] and x.ndim > 1:
            return x
        missing = -x.shape[-1] % block
        padded = jnp.pad(x, [(0, 0)] * (x.ndim - 1) + [(0, missing)]) if missing else x
        return padded.reshape(*x.shape[:-1], -1, block)

    def _joined(self, blocks: jax.Array, shape: tuple[int, ...]) -> jax.Array:
        """The way back from `_blocks`."""
        return blocks if blocks.shape == shape else blocks.reshape(*shape[:-1], -1)[..., : shape[-1]]

    def part(self, like: Any) -> int | None:
        """See `jaxsgd.storage.Storage`: a block, or a row whose last block is shorter."""
        return None if not self._packs(like) else self.block if like.shape[-1] % self.block == 0 else like.shape[-1]

    def pack(self, x: jax.Array, key: jax.Array | None = None, rows: Any = None) -> Any:
        if not self._packs(x) and rows is None:
            return x
        blocks = self._blocks(x)
        scale = jnp.max(jnp.abs(blocks) if self.signed else blocks, axis=-1, keepdims=True)
        # Below 2**-120 the reciprocal, by which XLA multiplies, would overflow: such a block is 0.
        unit = blocks * (1 / jnp.maximum(scale, np.float32(2.0**-120).astype(x.dtype)))
        dithered = None
        if self.stochastic and key is not None:
            shift = key if key.dtype == jnp.uint32 and key.ndim == 0 else self.drawn(key)
            dithered = dither(shift, unit.shape, rows if rows is None else rows.reshape(-1, *(1,) * (unit.ndim - 1)))
        codes = TO_CODES[self.map](unit.astype(jnp.float32), dithered, self.signed)
        if rows is None and (blocks is not x or self.map == "nibbles"):
            # A barrier: XLA for TPU would move the reshape up and write the scales out in full.
            codes = jax.lax.optimization_barrier(codes)
        codes = self._joined(codes, x.shape)
        if self.map == "nibbles":
            codes = paired(codes, self.signed)
        return FORMS[self.map](codes, scale if blocks is x else scale[..., 0])

    def unpack(self, packed: Any) -> jax.Array:
        if not isinstance(packed, Packed):
            return wide(packed)
        codes, scale = packed
        if isinstance(packed, Floats) and codes.dtype != self._dtype:
            raise ValueError(
                f"state: it keeps {codes.dtype.name}, this storage keeps {jnp.dtype(self._dtype).name}. "
                "Use jaxsgd.migrate(state, tx, params)"
            )
        codes = unpaired(codes) if self.map == "nibbles" else codes
        unit = TO_VALUES[self.map](codes, self.signed).astype(scale.dtype)
        blocks = self._blocks(unit)
        return self._joined(blocks * (scale if blocks is unit else scale[..., None]), unit.shape)


def _storage_of(packed: Packed) -> Blockwise:
    """The storage that packed it: the length of a block is the power of two that gives so many scales."""
    codes, scale = packed
    name = next(name for name, form in FORMS.items() if isinstance(packed, form))
    name = next((floats for floats, dtype in FLOATS.items() if codes.dtype == dtype), name)
    size, count = codes.shape[-1] * (2 if name == "nibbles" else 1), scale.shape[-1]
    block = next(b for b in (2**i for i in range(size.bit_length() + 1)) if -(-size // b) == count)
    return Blockwise(block, 0, False, name, codes.dtype != jnp.uint8)


def bits_of(packed: Packed) -> int:
    """The bits of a code."""
    return 4 if isinstance(packed, Nibbles) else 8


def decode(packed: Packed) -> jax.Array:
    """The wide array that was packed, from its blocks alone."""
    return _storage_of(packed).unpack(packed)


def encode_like(example: Packed, x: jax.Array) -> Packed:
    """``x``, of the shape that the example unpacks to, packed the way it is, rounded to nearest."""
    storage = _storage_of(example)
    codes, scale = storage.pack(x if storage.signed else jnp.maximum(x, 0))
    return type(example)(codes, scale.astype(example.scale.dtype))


def packed_as(parts: Mapping[str, Any]) -> Packed | None:
    """Packed blocks by the names of their parts; None if these are others."""
    for form in FORMS.values():
        if set(parts) == set(form._fields) and getattr(parts[form._fields[0]], "dtype", None) in CODES:
            return form(**parts)
    return None


def int8(*, block: int = 256, min_size: int = 4096, stochastic: bool = True, map: str = "octaves") -> Storage:
    """Moments at eight bits between steps, in blocks that share a scale: ``storage=int8()``.

    Block-wise as Dettmers et al. (2022, arXiv:2110.02861). A block is a part of the last axis, so that a slot shards
    like its parameter. An array of fewer than ``min_size`` elements stays as it is. So does each slot that is no moment
    (a copy of the parameters, a basis). ``groups=[("embed", {"storage": {}})]`` leaves embeddings out.

    Args:
      block: elements that share a scale, a power of two. Default: 256.
      min_size: elements of the smallest array that is packed. Default: 4096.
      stochastic: round to one of the two neighbours at random, with the right mean. To nearest, the second moment of
        normal gradients is 5% too large after 5,000 steps of ``b2=0.999``. Default: True.
      map: the 256 values of a block. ``"octaves"``: in each octave eight at equal distances; 16 octaves and a sign for
        a mean, 32 for a square. They are the leading bits of a float32, so that a code takes few instructions.
        ``"dynamic"``: the map of the paper, as in bitsandbytes, seven decades of which each has twice the values of
        the one below. Default: ``"octaves"``.

    Raises:
      ValueError: ``block`` is no power of two, ``min_size`` is below 0, or ``map`` is unknown.

    Example:
      >>> tx = jaxsgd.adamw(1e-3, storage=jaxsgd.int8())
      >>> tx.init({"kernel": jnp.zeros((64, 64))}).slots["mu"]["kernel"].codes.dtype
      dtype('int8')
    """
    _check(block, min_size)
    if map not in MAPS:
        raise ValueError(f"map={map!r}: known are {', '.join(MAPS)}")
    return Blockwise(block, min_size, stochastic, map)


def int4(*, block: int = 128, min_size: int = 4096, stochastic: bool = True) -> Storage:
    """Moments at four bits between steps, in blocks that share a scale: ``storage=int4()``.

    As `int8`, with 16 values of a block. A mean has a sign and 4 octaves of 2 steps, a square has 8 octaves without 0
    (Li et al. 2023, arXiv:2309.01507, whose scales go by rows and columns). AdamW keeps 1.06 bytes a parameter.
    Rounding adds noise; ``benchmarks/parity.py`` measures the losses. An array with an odd last axis stays whole.

    Args:
      block: elements that share a scale, a power of two. Default: 128.
      min_size, stochastic: as of `int8`.

    Raises:
      ValueError: ``block`` is no power of two or below 2, or ``min_size`` is below 0.

    Example:
      >>> tx = jaxsgd.adamw(1e-3, storage=jaxsgd.int4())
      >>> tx.init({"kernel": jnp.zeros((64, 64))}).slots["mu"]["kernel"].nibbles.shape
      (64, 32)
    """
    _check(block, min_size)
    if block == 1:
        raise ValueError("block=1: two neighbours share a byte. Use 128")
    return Blockwise(block, min_size, stochastic, "nibbles")


def fp8(
    *, block: int = 256, min_size: int = 4096, stochastic: bool = True, mean: str = "e4m3", square: str = "e5m2"
) -> Storage:
    """Moments as eight-bit floats between steps, in blocks that share a scale: ``storage=fp8()``.

    The formats of Micikevicius et al. (2022, arXiv:2209.05433). The largest magnitude of a block becomes the largest
    finite number of the format, so that nothing overflows. Zeros stay zero. A NaN or an inf stays visible: it is not
    finite when it comes back, and its block may be NaN. AdamW keeps 2.03 bytes a parameter. Blocks, sharding and the
    arrays that stay whole are those of `int8`.

    ``square="e5m2"`` is the default since it trains as float32 does. ``benchmarks/parity.py``, AdamW on digits, 8
    epochs, three seeds, last loss: float32 0.0242 (sd 0.0037), e5m2 0.0242, e4m3 0.0201. With e4m3 the smallest squares
    of a block become 0, and steps are larger than Adam's. Where the gradient is 0 they can be 1,000 times as large.

    Args:
      block: elements that share a scale, a power of two. Default: 256.
      min_size: elements of the smallest array that is packed. Default: 4096.
      stochastic: round to one of the two neighbours at random, with the right mean. To nearest, a second moment with
        ``b2=0.999`` stalls: a step changes it by less than half the distance to a neighbour. Default: True.
      mean: the format of moments with a sign, ``"e4m3"`` or ``"e5m2"``. e4m3 (float8_e4m3fn) has 3 bits of a fraction
        and spans 2e5 between its smallest and its largest number; e5m2 (float8_e5m2) has 2 and spans 4e9.
        Default: ``"e4m3"``.
      square: the format of second moments, ``"e4m3"`` or ``"e5m2"``. Default: ``"e5m2"``.

    Raises:
      ValueError: ``block`` is no power of two, ``min_size`` is below 0, or a format is unknown.

    Example:
      >>> tx = jaxsgd.adamw(1e-3, storage=jaxsgd.fp8())
      >>> tx.init({"kernel": jnp.zeros((64, 64))}).slots["mu"]["kernel"].floats.dtype
      dtype(float8_e4m3fn)
    """
    _check(block, min_size)
    for name, format in {"mean": mean, "square": square}.items():
        if format not in FLOATS:
            raise ValueError(f"{name}={format!r}: no format of eight-bit floats. Use {' or '.join(map(repr, FLOATS))}")
    return Blockwise(block, min_size, stochastic, mean, square=square)


def _check(block: int, min_size: int) -> None:
    check_count("block", block)
    if block & (block - 1):
        raise ValueError(f"block={block}: a power of two is needed, such as 128 or 256")
    check_count("min_size", min_size, 0)
