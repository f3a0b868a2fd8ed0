"""Array in, array out: the few formulas that every rule is made of."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike, DTypeLike

__all__ = [
    "as_key",
    "check_count",
    "compensated",
    "complex_with_real",
    "conjugated",
    "debias",
    "differentiable",
    "ema",
    "filled",
    "global_norm",
    "hashed",
    "is_float0",
    "is_key",
    "real_dtype",
    "real_zeros",
    "root_of",
    "sq",
    "stochastic_round",
    "strong",
    "sum_of_squares",
    "wide",
    "wide_dtype",
    "widest",
    "zeros",
]


def wide_dtype(dtype: DTypeLike) -> jnp.dtype:
    """The dtype to compute in: float32 for narrower floats; all others as they are."""
    dtype = jnp.dtype(dtype)
    narrow = jnp.issubdtype(dtype, jnp.floating) and dtype.itemsize < 4
    return jnp.dtype(jnp.float32) if narrow else dtype


def widest(dtypes: Iterable[DTypeLike]) -> jnp.dtype:
    """The widest real dtype of ``abs(x)`` among arrays of these dtypes; float32 if there are none."""
    reals = [real_dtype(wide_dtype(dtype)) for dtype in dtypes if jnp.issubdtype(dtype, jnp.inexact)]
    return max(reals, key=lambda dtype: dtype.itemsize, default=jnp.dtype(jnp.float32))


def is_key(x: Any) -> bool:
    """Whether ``x`` is an array, or the shape of one, of typed PRNG keys."""
    return hasattr(x, "dtype") and jnp.issubdtype(x.dtype, jax.dtypes.prng_key)


def as_key(key: Any) -> jax.Array:
    """A PRNG key: that of a seed, or the key itself, typed or of two uint32 numbers.

    Raises:
      TypeError: it is none of these.

    >>> as_key(0).dtype, as_key(jax.random.key(1)).shape
    (key<fry>, ())
    """
    dtype, ndim = getattr(key, "dtype", None), getattr(key, "ndim", 0)
    if is_key(key) and ndim == 0 or dtype == jnp.uint32 and ndim == 1:
        return key
    whole = isinstance(key, int) or dtype is not None and jnp.issubdtype(dtype, jnp.integer)
    if not whole or isinstance(key, bool) or ndim:
        raise TypeError(f"key={key!r}: a seed or a key is needed. Use a whole number or jax.random.key(0)")
    return jax.random.key(key)


def check_count(name: str, value: Any, least: int = 1) -> None:
    """Check an argument that counts steps, examples or the like.

    Raises:
      ValueError: it is no whole number, or below ``least``.

    >>> check_count("every", 10)
    """
    if isinstance(value, bool) or not isinstance(value, int | np.integer) or value < least:
        raise ValueError(f"{name}={value!r}: a whole number is needed, at least {least}")


def wide(x: ArrayLike, dtype: DTypeLike | None = None) -> jax.Array:
    """``x`` widened to ``dtype``, or to at least float32; the result is never weakly typed."""
    x = jnp.asarray(x)
    return jax.lax.convert_element_type(x, wide_dtype(x.dtype if dtype is None else dtype))


def real_dtype(dtype: DTypeLike) -> jnp.dtype:
    """The dtype of ``abs(x)``: float32 for complex64, float64 for complex128, else ``dtype``."""
    return jnp.finfo(dtype).dtype


def zeros(p: ArrayLike) -> jax.Array:
    """Zeros of the shape (and sharding) of ``p``, in the dtype that its state is kept in."""
    p = jnp.asarray(p)
    return jnp.zeros_like(p, dtype=wide_dtype(p.dtype))


def real_zeros(p: ArrayLike) -> jax.Array:
    """Like `zeros`, but real: second moments of complex parameters are real."""
    p = jnp.asarray(p)
    return jnp.zeros_like(p, dtype=real_dtype(wide_dtype(p.dtype)))


def sq(x: Any) -> jax.Array:
    """The squared magnitude |x|^2, real also where ``x`` is complex."""
    return jnp.real(x * jnp.conj(x)) if jnp.iscomplexobj(x) else x * x


def ema(mean: Any, x: jax.Array, decay: Any) -> jax.Array:
    """The moving average ``decay * mean + (1 - decay) * x``.

    ``mean`` is None where the state keeps no such average (``decay`` is 0): then it is ``x``.
    """
    return x if mean is None else decay * mean + (1 - decay) * x


def debias(mean: jax.Array, decay: Any, t: Any) -> jax.Array:
    """An `ema` that started at zero, corrected after ``t`` steps: ``mean / (1 - decay**t)``."""
    return mean / filled(decay, t)


def filled(decay: Any, t: Any) -> jax.Array:
    """The weight of all terms of an `ema` after ``t`` steps: ``1 - decay**t``.

    Computed as ``-expm1(t * log(decay))``: in float32, ``1 - 0.999**1`` as written keeps only four of its
    seven digits.
    """
    known = isinstance(decay, float | int)
    log_decay = (math.log(decay) if decay > 0 else -math.inf) if known else jnp.log(decay)
    return -jnp.expm1(t * log_decay)


def complex_with_real(tree: Any) -> AbstractContextManager[Any]:
    """A context in which arithmetic of complex and real numbers is allowed, if the tree has complex leaves.

    Every equation scales complex numbers by real ones. JAX's strict promotion of dtypes refuses that.
    """
    if any(jnp.issubdtype(jnp.result_type(x), jnp.complexfloating) for x in jax.tree.leaves(tree)):
        return jax.numpy_dtype_promotion("standard")
    return nullcontext()


def conjugated(grads: Any) -> Any:
    """``grads`` with its complex leaves conjugated: the direction of steepest ascent.

    `jax.grad` of a real loss gives the conjugate of that direction for a complex parameter.
    """
    return jax.tree.map(lambda g: jnp.conj(g) if jnp.iscomplexobj(g) else g, grads)


def differentiable(tree: Any, moving: Iterable[bool] | None = None) -> tuple[list[Any], Callable[..., Any]]:
    """The leaves of ``tree`` that have a gradient, and the way back to a tree.

    Args:
      tree: any pytree.
      moving: which leaves are wanted, in flattening order. Default: all.

    Returns:
      ``(leaves, whole)``: the floating and complex leaves in flattening order, and ``whole(values, fill)``, a tree like
      ``tree`` with ``values`` in their places. ``fill(leaf)`` makes what stands in for each other leaf, by default the
      leaf itself.
    """
    leaves, treedef = jax.tree.flatten(tree)
    moves = [bool(jnp.issubdtype(jnp.result_type(x), jnp.inexact)) for x in leaves]
    if moving is not None:
        moves = [move and wanted for move, wanted in zip(moves, moving, strict=True)]

    def whole(values: Iterable[Any], fill: Callable[[Any], Any] = lambda leaf: leaf) -> Any:
        rest = iter(values)
        return treedef.unflatten(next(rest) if move else fill(x) for x, move in zip(leaves, moves, strict=True))

    return [x for x, move in zip(leaves, moves, strict=True) if move], whole


def strong(x: Any) -> Any:
    """A number or a weakly typed array as an array of its own dtype; anything else as it is.

    A parameter that starts weakly typed comes back strongly typed from its first step, which compiles the step twice.
    """
    weak = isinstance(x, jax.Array) and not is_key(x) and jax.typeof(x).weak_type
    if weak or isinstance(x, bool | int | float | complex | np.generic):
        return jnp.asarray(x, jnp.result_type(x))
    return x


def global_norm(tree: Any) -> jax.Array:
    """The Euclidean norm of all leaves together, accumulated in at least float32 (0 if empty).

    Leaves of the dtype float0, which are the gradients of integers, count nothing.
    """
    leaves = [x for x in jax.tree.leaves(tree) if not is_float0(x)]
    return root_of([sum_of_squares(x) for x in leaves], widest(jnp.result_type(x) for x in leaves))


def sum_of_squares(x: Any) -> jax.Array:
    """The sum of the squared magnitudes of an array, in at least float32; 0 for the gradient of an integer."""
    if is_float0(x):
        return jnp.zeros(())
    x = jnp.asarray(x)
    x = x if jnp.issubdtype(x.dtype, jnp.inexact) else x.astype(jnp.float32)
    return jnp.sum(sq(wide(x)))


def is_float0(x: Any) -> bool:
    """Whether ``x`` is the gradient of an integer: it has a shape, but no values."""
    return getattr(x, "dtype", None) == jax.dtypes.float0


def root_of(squares: Sequence[jax.Array], dtype: Any = None) -> jax.Array:
    """The root of a sum, in ``dtype``. Default: the widest of theirs."""
    dtype = widest(x.dtype for x in squares) if dtype is None else dtype
    return jnp.sqrt(sum((x.astype(dtype) for x in squares), jnp.zeros((), dtype)))


def hashed(words: jax.Array) -> jax.Array:
    """uint32 words, scattered: the finalizer of MurmurHash3 (Appleby, public domain)."""
    words = (words ^ (words >> 16)) * np.uint32(0x85EBCA6B)
    words = (words ^ (words >> 13)) * np.uint32(0xC2B2AE35)
    return words ^ (words >> 16)


def stochastic_round(x: jax.Array, dtype: DTypeLike, bits: jax.Array) -> jax.Array:
    """Round float32 ``x`` to bfloat16 at random, so that the expected value is ``x``.

    ``bits`` are uniform uint16 of ``x``'s shape. Adding them below the bits that bfloat16 keeps
    and truncating carries into the kept part with exactly the right probability. Non-finite
    values are passed through; values in the last binade round down rather than to infinity.
    """
    if jnp.dtype(dtype) != jnp.bfloat16:
        raise ValueError(f"stochastic rounding is to bfloat16; got dtype={jnp.dtype(dtype).name}")
    x = x.astype(jnp.float32)
    raw = jax.lax.bitcast_convert_type(x, jnp.uint32)
    mask = jnp.uint32(0xFFFF0000)
    raised = jax.lax.bitcast_convert_type((raw + bits.astype(jnp.uint32)) & mask, jnp.float32)
    truncated = jax.lax.bitcast_convert_type(raw & mask, jnp.float32)
    rounded = jnp.where(jnp.isfinite(raised), raised, truncated)
    return jnp.where(jnp.isfinite(x), rounded, x).astype(dtype)


def compensated(p: jax.Array, delta: jax.Array, lost: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Kahan's sum (1965, doi:10.1145/363707.363723): the step to the rounded ``p + delta + lost``, and what it lost.

    ``p`` and ``lost`` are of the narrow dtype, ``delta`` and the step are wide.
    """
    wanted = delta + wide(lost)
    step = wide((wide(p) + wanted).astype(p.dtype)) - wide(p)
    return step, (wanted - step).astype(lost.dtype)
