"""How a slot rests between two steps. Rules never see it: they get and return wide arrays.

Floor 1. A storage is a pair of functions on one array; the lift packs after a step and unpacks
before the next.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from jaxsgd.numerics import stochastic_round, wide

__all__ = ["Storage", "cast", "plain"]


@runtime_checkable
class Storage(Protocol):
    """What the lift asks of a storage."""

    @property
    def needs_key(self) -> bool:
        """Whether `pack` wants a random key."""
        ...

    def pack(self, x: jax.Array, key: jax.Array | None = None) -> Any:
        """The resting form of one wide array."""
        ...

    def unpack(self, packed: Any) -> jax.Array:
        """The wide array again."""
        ...


@dataclass(frozen=True)
class Plain:
    """As computed: at least float32."""

    needs_key = False

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
      dtype: a floating dtype. A bfloat16 second moment with ``b2=0.999`` stops moving at half its value
        when rounded to nearest; use ``stochastic=True`` there.
      stochastic: round at random (to bfloat16) with the right mean, with bits drawn from the step,
        the slot and the leaf, so that every replica draws the same.

    Raises:
      ValueError: ``dtype`` is not a floating dtype, or ``stochastic`` with other than bfloat16.
    """
    resolved = jnp.dtype(dtype)
    if not jnp.issubdtype(resolved, jnp.floating):
        raise ValueError(f"dtype={resolved.name}: a slot is stored in a floating dtype")
    if stochastic and resolved != jnp.bfloat16:
        raise ValueError(f"stochastic=True rounds to bfloat16; got dtype={resolved.name}")
    return Cast(resolved, stochastic)
