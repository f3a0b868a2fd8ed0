"""Storages: the form of a slot between two steps. Rules never see it: they get and return wide arrays.

A storage is any object with ``pack`` and ``unpack``; the lift packs after a step and unpacks before the next.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
from jax.core import Tracer
from jax.typing import DTypeLike

from jaxsgd.numerics import real_dtype, stochastic_round, wide

__all__ = [
    "Cast",
    "Plain",
    "Storage",
    "accepts",
    "cast",
    "drawn",
    "first_packed",
    "first_zeros",
    "needs_key",
    "of_kind",
    "plain",
]


@runtime_checkable
class Storage(Protocol):
    """The storage of one slot: a hashable object, such as a frozen dataclass.

    ``pack`` may give any pytree of arrays; ``unpack`` gives the wide array again, of the same shape. A storage may have
    further attributes:

    - ``needs_key = True``: ``pack`` gets a random key in place of None;
    - ``accepts(kind) -> bool``: whether a slot of this kind can be stored so (see `jaxsgd.slots`); by default any;
    - ``of_kind(kind) -> Storage``: the form for slots of this kind; by default itself;
    - ``part(like) -> int``: how many numbers at the end of an array of this shape and dtype are packed apart from the
      others. It divides the last axis; None where the array is not packed. A large array may then be packed in parts,
      ``(count, n * part)``, and ``pack`` takes ``rows=``, the number of each row in the whole, ``(count, 1)``;
    - ``drawn(key) -> array``: what ``pack`` takes in place of a random key, made once a step for all leaves;
    - ``zeros(like) -> packed``: the form of zeros of ``like``'s shape and dtype, where packing zeros costs more. It is
      called while tracing.
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


def drawn(storage: Storage, key: jax.Array | None) -> jax.Array | None:
    """The value that ``storage.pack`` takes as a key for all arrays of a step."""
    ask = getattr(storage, "drawn", None)
    return key if ask is None or key is None else ask(key)


def first_packed(storage: Storage, x: jax.Array, key: jax.Array | None) -> Any:
    """The stored form of a slot's first value."""
    # Behind a barrier: XLA would pack constants while compiling, for minutes.
    return _packed(storage, x, key)


def first_zeros(storage: Storage, like: jax.ShapeDtypeStruct, p: jax.Array) -> Any:
    """The stored form of zeros on the device of ``p``. None where packing zeros has to do: if ``p`` is sharded."""
    if not hasattr(storage, "zeros"):
        return None
    if isinstance(p, Tracer):
        return _zeros(storage, like)
    if len(p.sharding.device_set) > 1:
        return None
    with jax.default_device(next(iter(p.sharding.device_set))):
        return _zeros(storage, like)


@functools.partial(jax.jit, static_argnums=(0, 1))
def _zeros(storage: Any, like: jax.ShapeDtypeStruct) -> Any:
    return storage.zeros(like)


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


plain = Plain()
"""The default storage: slots rest as they are computed, in float32 or wider."""


def cast(dtype: DTypeLike, *, stochastic: bool = False) -> Storage:
    """Keep a slot in ``dtype`` between steps, for example ``storage={"mu": cast("bfloat16")}``.

    Args:
      dtype: a floating dtype, or a complex one, which means that of its real part. A bfloat16 second moment
        with ``b2=0.999`` stops moving at half its value when rounded to nearest; use ``stochastic=True`` there.
      stochastic: round at random (to bfloat16) with the right mean. The bits come from the step, the slot and the leaf,
        so every replica draws the same.

    Raises:
      ValueError: ``dtype`` is no floating dtype, or ``stochastic`` with other than bfloat16.
    """
    try:
        resolved = jnp.dtype(dtype)
    except TypeError:
        raise ValueError(f"dtype={dtype!r}: it is no dtype. Use 'bfloat16'") from None
    if jnp.issubdtype(resolved, jnp.complexfloating):
        resolved = real_dtype(resolved)
    if not jnp.issubdtype(resolved, jnp.floating):
        raise ValueError(f"dtype={resolved.name}: a slot is stored in a floating dtype")
    if resolved.itemsize < 2:
        raise ValueError(f"dtype={resolved.name}: too few exponents without a scale. Use jaxsgd.int8()")
    if stochastic and resolved != jnp.bfloat16:
        raise ValueError(f"stochastic=True rounds to bfloat16; got dtype={resolved.name}")
    return Cast(resolved, stochastic)
