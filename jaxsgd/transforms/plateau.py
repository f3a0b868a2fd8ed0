"""A learning rate that shrinks when the loss stops falling."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.typing import ArrayLike

from jaxsgd.hyper import is_constant
from jaxsgd.numerics import wide, widest
from jaxsgd.transforms.trees import map_inexact, scalar

__all__ = ["PlateauState", "reduce_on_plateau"]


class PlateauState(NamedTuple):
    """The state of `reduce_on_plateau`.

    Attributes:
      scale: scalar in float32 (float64 where a parameter is), the factor of the last updates. For a log:
        ``optax.tree.get(state, "scale")``.
      best_value: like ``scale``, the lowest average so far that counted as an improvement.
      plateau_count: int32 scalar, averages since then.
      cooldown_count: int32 scalar, averages until failures count again.
      count: int32 scalar, values in the current average.
      avg_value: like ``scale``, that average.
    """

    scale: jax.Array
    best_value: jax.Array
    plateau_count: jax.Array
    cooldown_count: jax.Array
    count: jax.Array
    avg_value: jax.Array


def reduce_on_plateau(
    factor: ArrayLike = 0.1,
    patience: ArrayLike = 10,
    rtol: ArrayLike = 1e-4,
    atol: ArrayLike = 0.0,
    cooldown: ArrayLike = 0,
    accumulation_size: ArrayLike = 1,
    min_scale: ArrayLike = 0.0,
) -> optax.GradientTransformationExtraArgs:
    """Scale the updates down when the loss stops improving: ``optax.chain(adam(1e-3), reduce_on_plateau(0.5))``.

    The update needs the loss: ``tx.update(grads, state, params, value=loss)``. With several devices pass the mean over
    all of them; otherwise their learning rates diverge. An average is an improvement if it is below the best one by
    more than the tolerances. After ``patience`` averages in a row without an improvement, the scale is multiplied by
    ``factor``. A value that is inf, minus infinity or NaN is no improvement, and the state does not keep it.

    Args:
      factor: the factor of a reduction, in (0, 1). Default: 0.1.
      patience: averages without an improvement before a reduction, at least 1. Default: 10.
      rtol: share of the best value's magnitude that an improvement must exceed, in [0, 1]. Default: 1e-4.
      atol: amount that it must exceed in addition, 0 or more. One of both must be above 0. Default: 0.
      cooldown: averages after a reduction that do not count as failures. Default: 0.
      accumulation_size: values in an average: 1 for a validation loss, more for the losses of batches. Default: 1.
      min_scale: the smallest scale, in [0, 1]. Default: 0.

    Returns:
      A transformation with a `PlateauState`. Updates keep their dtypes. Leaves that are not floating pass unchanged.

    Raises:
      ValueError: an argument out of its range; in the update, ``value`` missing or no real scalar.
    """
    _check("factor", factor, "it must lie in (0, 1)", lambda x: 0 < x < 1)
    _check("patience", patience, "at least 1 average is needed", lambda x: x >= 1 and x == int(x))
    _check("rtol", rtol, "it must lie in [0, 1]", lambda x: 0 <= x <= 1)
    _check("atol", atol, "it must be 0 or more", lambda x: x >= 0)
    if is_constant(rtol) and is_constant(atol) and rtol == atol == 0:
        raise ValueError(f"rtol={rtol}, atol={atol}: one of both must be above 0")
    _check("cooldown", cooldown, "a whole number from 0 is needed", lambda x: x >= 0 and x == int(x))
    _check("accumulation_size", accumulation_size, "at least 1 value is needed", lambda x: x >= 1 and x == int(x))
    _check("min_scale", min_scale, "it must lie in [0, 1]", lambda x: 0 <= x <= 1)

    def init(params: Any) -> PlateauState:
        dtype = widest(jnp.result_type(p) for p in jax.tree.leaves(params))
        scale, best, average = (jnp.asarray(start, dtype) for start in (1.0, jnp.inf, 0.0))
        failed, cooling, count = (jnp.zeros((), jnp.int32) for _ in range(3))
        return PlateauState(scale, best, failed, cooling, count, average)

    def update(updates: Any, state: Any, params: Any = None, **extra_args: Any) -> tuple[Any, PlateauState]:
        del params
        if extra_args.get("value") is None:
            raise ValueError("value: reduce_on_plateau needs it: tx.update(grads, state, params, value=loss)")
        value = scalar(extra_args["value"])
        dtype = state.scale.dtype
        relative, absolute, less, least = (jnp.asarray(x).astype(dtype) for x in (rtol, atol, factor, min_scale))

        count = jnp.asarray(optax.safe_increment(state.count))
        total = state.count.astype(dtype) * state.avg_value.astype(dtype) + value.astype(dtype)
        average = total / count.astype(dtype)
        full = count >= accumulation_size

        best = state.best_value.astype(dtype)
        first = jnp.isinf(best)
        finite = jnp.where(first, 0, best)
        # A share of the magnitude: a share of a negative best would let worse values pass for better ones.
        needed = jnp.where(finite > 0, (1 - relative) * finite, (1 + relative) * finite) - absolute
        improved = full & jnp.isfinite(average) & (first | (average < needed))
        failures = jnp.where(improved, 0, jnp.asarray(optax.safe_increment(state.plateau_count)))

        cooling = state.cooldown_count > 0
        reduce = full & ~cooling & (failures >= patience)
        scale = jnp.where(reduce, jnp.maximum(state.scale * less, least), state.scale)
        rested = jnp.where(cooling, state.cooldown_count - 1, jnp.where(reduce, cooldown, 0))
        state = PlateauState(
            scale=scale,
            best_value=jnp.where(improved, average, best),
            plateau_count=jnp.where(full, jnp.where(cooling | reduce, 0, failures), state.plateau_count),
            cooldown_count=jnp.where(full, rested, state.cooldown_count).astype(jnp.int32),
            count=jnp.where(full, 0, count),
            avg_value=jnp.where(full, 0, average),
        )
        return map_inexact(lambda u: _scale(u, scale), updates), state

    return optax.GradientTransformationExtraArgs(init, update)


@jax.jit
def _scale(u: jax.Array, scale: jax.Array) -> jax.Array:
    return (wide(u) * scale.astype(wide(u).dtype)).astype(u.dtype)


def _check(name: str, value: Any, words: str, valid: Any) -> None:
    """Check an argument's range where it is a number; arrays are not checked."""
    if is_constant(value):
        if not valid(value):
            raise ValueError(f"{name}={value}: {words}")
    elif not isinstance(value, jax.Array):
        raise TypeError(f"{name}={value!r}: a number is needed")
