"""Arithmetic of vectors that are lists of arrays."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from jaxsgd.second_order.objective import Vector

__all__ = [
    "axpy",
    "divided",
    "dot",
    "far_units",
    "is_far",
    "is_large",
    "largest",
    "multiplied",
    "norm",
    "power_of_two",
    "select",
    "start_units",
    "tilted",
    "times",
    "total",
    "unit",
]


def total(parts: list[jax.Array]) -> jax.Array:
    """The sum of scalars or small arrays."""
    out = parts[0]
    for part in parts[1:]:
        out = out + part
    return out


def dot(xs: Vector, ys: Vector) -> jax.Array:
    """The inner product."""
    return total([jnp.sum(x * y) for x, y in zip(xs, ys, strict=True)])


def norm(xs: Vector) -> jax.Array:
    """The Euclidean norm, without overflow of squares."""
    top = largest(xs)
    scale = jnp.where((top > 0) & jnp.isfinite(top), top, 1)
    return scale * jnp.sqrt(total([jnp.sum((x / scale) ** 2) for x in xs]))


def largest(xs: Vector) -> jax.Array:
    """The largest absolute entry; NaN if an entry is."""
    # Absolute values are in the order of their bits, NaN last. XLA on CPUs takes the maximum of integers in a quarter
    # of the time.
    dtype = xs[0].dtype
    bits = jnp.dtype(f"int{8 * dtype.itemsize}")
    tops = [jnp.max(jax.lax.bitcast_convert_type(jnp.abs(x), bits), initial=0) for x in xs]
    return jax.lax.bitcast_convert_type(jnp.max(jnp.stack(tops)), dtype)


def axpy(a: Any, xs: Vector, ys: Vector) -> Vector:
    """``a * xs + ys``."""
    return [a * x + y for x, y in zip(xs, ys, strict=True)]


def times(a: Any, xs: Vector) -> Vector:
    """``a * xs``."""
    return [a * x for x in xs]


def multiplied(xs: Vector, ys: Vector) -> Vector:
    """``xs * ys``, entry by entry."""
    return [x * y for x, y in zip(xs, ys, strict=True)]


def divided(xs: Vector, ys: Vector) -> Vector:
    """``xs / ys``, entry by entry."""
    return [x / y for x, y in zip(xs, ys, strict=True)]


def power_of_two(x: jax.Array) -> jax.Array:
    """A power of two near ``x``, and far from overflow; 1 where ``x`` is 0 or not finite. To divide by it is exact."""
    info = jnp.finfo(x.dtype)
    safe = jnp.where((x > 0) & jnp.isfinite(x), x, 1)
    # A number without its mantissa. Of `ldexp` and `frexp`, XLA makes a hundred operations.
    bits = jax.lax.bitcast_convert_type(safe, f"int{info.bits}")
    power = jax.lax.bitcast_convert_type(bits >> info.nmant << info.nmant, x.dtype)
    return jnp.clip(power, 2.0 ** (info.minexp + 2), 2.0 ** (info.maxexp - 2))


def unit(size: jax.Array) -> jax.Array:
    """The power of two that brings values of this size to where their products stay in the dtype's range.

    1 from 2e-10 to 4e9 in float32, and from 9e-78 to 1e77 in float64.
    """
    out, near = (2.0 ** (jnp.finfo(size.dtype).maxexp // part) for part in (4, 8))
    inside = (1 / out <= size) & (size <= out)
    return jnp.where(inside, 1, power_of_two(jnp.clip(size, 1 / near, near)) / power_of_two(size))


def far_units(xs: Vector) -> Vector:
    """For each entry a power of two near it if it is so large that products of slopes lose their range; else 1.

    1 up to 4e9 in float32, and up to 1e77 in float64.
    """
    return [jnp.where(jnp.abs(x) > 2.0 ** (jnp.finfo(x.dtype).maxexp // 4), power_of_two(jnp.abs(x)), 1) for x in xs]


def is_large(x: Any) -> Any:
    """Which entries are so large that their rounding may hide more of a value than its own does.

    Above 3e3 in float32, and 7e7 in float64.
    """
    return abs(x) > jnp.finfo(x.dtype).eps ** -0.5


def is_far(x: Any) -> Any:
    """Which entries are so large that a step of 1 is lost in rounding: above 2e7 in float32, and 9e15 in float64."""
    return abs(x) > 2 / jnp.finfo(x.dtype).eps


def start_units(xs: Vector, f: jax.Array, slopes: Vector) -> Vector:
    """For each entry of a start a power of two near its scale, at least 1.

    The scale is the distance over which the slope takes the value to zero, as a position far from zero may change by
    little. It is at most the entry, for values may be far from zero too. Small entries have 1: a start near zero says
    nothing about the size of a parameter.
    """

    def near(x: jax.Array, slope: jax.Array) -> jax.Array:
        size = jnp.abs(x)
        way = jnp.abs(f) / jnp.where(slope == 0, 1, jnp.abs(slope))
        known = (slope != 0) & jnp.isfinite(way) & (way > 0)
        return power_of_two(jnp.maximum(1, jnp.where(known, jnp.minimum(size, way), size)))

    return [near(x, slope) for x, slope in zip(xs, slopes, strict=True)]


TILT = 0.01
SPREAD = 0x9E3779B9
"""Its multiples, as shares of 2**32, are spread evenly: the golden ratio's."""


def tilted(xs: Vector) -> Vector:
    """``xs`` with each entry shortened by another share, up to `TILT`.

    From a symmetric start, gradients alone keep the symmetry, and lead to a saddle point that looks like a minimum.
    """
    out = []
    for i, x in enumerate(xs):
        bits = jnp.full(x.shape, SPREAD**2 * i % 2**32, jnp.uint32)
        for axis in range(x.ndim):
            place = jax.lax.broadcasted_iota(jnp.uint32, x.shape, axis)
            bits += place * jnp.uint32(pow(SPREAD, 2 * axis + 1, 2**32))
        out.append(x - (TILT / 2**24) * (bits >> 8).astype(x.dtype) * x)
    return out


def select(condition: jax.Array, xs: Any, ys: Any) -> Any:
    """A tree of ``xs`` where the scalar condition holds, else of ``ys``."""
    return jax.tree.map(lambda x, y: jnp.where(condition, x, y), xs, ys)
