"""Roundings that keep steps below half a digit of 16-bit parameters."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from jaxsgd.numerics import compensated, stochastic_round, wide

__all__ = ["LOST", "ROUNDINGS", "rounded", "rounds"]

ROUNDINGS = (None, "stochastic", "compensated")
LOST = "rounded_off"
"""The slot for the part of all steps that rounding took from a 16-bit parameter so far."""


def rounds(p: Any, rounding: str | None) -> bool:
    """Whether ``rounding`` changes how a parameter like ``p`` takes its steps."""
    narrow = jnp.bfloat16 if rounding == "stochastic" else jnp.floating
    return rounding is not None and jnp.issubdtype(p.dtype, narrow) and p.dtype.itemsize == 2


def rounded(rounding: str, p: Any, delta: jax.Array, lost: Any, key: Any) -> tuple[jax.Array, Any]:
    """``delta`` as the difference of two values of the parameter's dtype, and the part that this leaves out."""
    if rounding == "compensated":
        return compensated(p, delta, lost)
    bits = jax.random.bits(key, p.shape, jnp.uint16)
    return wide(stochastic_round(wide(p) + delta, p.dtype, bits)) - wide(p), None
