"""Batch statistics of weights that no step has trained with, such as averages."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxsgd.loss import call_loss, is_stateful, with_all_arguments
from jaxsgd.numerics import as_key, is_key, wide
from jaxsgd.train_state import TrainState

__all__ = ["batch_statistics"]

TOLERANCE = 1e-3
"""How far the momentum of one running average may differ between its elements."""


def batch_statistics(
    state: TrainState,
    loss_fn: Callable[..., Any],
    batches: Iterable[Any],
    *,
    params: Any = None,
    key: int | jax.Array = 0,
) -> Any:
    """Compute the batch statistics of the weights to evaluate, from a few batches.

    An average of weights (`jaxsgd.params_ema`, schedule-free) was never trained with, so the running statistics of
    batch norm are those of other weights. This call runs the loss, in training mode, on each batch. It takes the plain
    mean of the batches' statistics, as torch's ``update_bn`` does (Izmailov et al. 2018, arXiv:1803.05407).

    A running average is recognised by its update: it is linear in the old value, with one momentum below 1. That
    momentum is measured, so that the batch's own statistics come out exactly. Everything else that the model carries
    (counters, random keys) stays as it is.

    Args:
      state: the `TrainState`, of an NNX model or with a ``model_state``. It is not changed.
      loss_fn: the loss of the training, see `jaxsgd.make_step`.
      batches: an iterable of batches; some hundreds of examples in all are enough.
      params: the weights. Default: ``state.eval_params``.
      key: a seed or a key, of the loss's random numbers, such as dropout's. Default: 0.

    Returns:
      A tree like ``state.model_state``. ``state.model_with(statistics)`` is the NNX model with it.

    Raises:
      ValueError: the state carries no ``model_state``; there is no batch; the loss updates no running average, as in
        evaluation mode; a statistic is not finite.

    >>> import jax.numpy as jnp
    >>> def loss_fn(params, seen, batch, key):
    ...     return jnp.mean(params * batch), (0.9 * seen + 0.1 * jnp.mean(batch), None)
    >>> state = TrainState.create(jnp.ones(()), jaxsgd.sgd(0.1), model_state=jnp.zeros(()))
    >>> round(float(batch_statistics(state, loss_fn, [jnp.full(4, 2.0), jnp.full(4, 4.0)])), 5)
    3.0
    """
    if state.model_state is None or not jax.tree.leaves(state.model_state):
        raise ValueError("state: its model carries no statistics; a model_state or an nnx.Module with some is needed")
    read = with_all_arguments(loss_fn, is_stateful(state.graphdef, state.model_state))
    params = state.eval_params if params is None else params
    leaves, treedef = jax.tree.flatten(state.model_state)
    numbers = [not is_key(x) and jnp.issubdtype(jnp.result_type(x), jnp.inexact) for x in leaves]

    @jax.jit
    def after(value: Any, leaves: list[Any], params: Any, batch: Any, index: Any) -> list[jax.Array]:
        """The statistics after one batch, where all were ``value`` before."""
        filled = [jnp.full_like(x, value) if n else x for x, n in zip(leaves, numbers, strict=True)]
        rng = jax.random.fold_in(as_key(key), index)
        carried = call_loss(read, state.graphdef, params, treedef.unflatten(filled), batch, rng)[1][0]
        return [wide(x) for x, n in zip(jax.tree.leaves(carried), numbers, strict=True) if n]

    total: list[Any] = []
    momenta: list[float | None] = []
    count = 0
    for count, batch in enumerate(batches, 1):  # noqa: B007 - the number of batches is used below
        zero = after(0.0, leaves, params, batch, count)
        if count == 1:
            ones = after(1.0, leaves, params, batch, count)
            if not all(
                bool(jnp.isfinite(low).all() | jnp.isfinite(high).all()) for low, high in zip(zero, ones, strict=True)
            ):
                raise ValueError("batches: the statistics of the first one are not finite")
            momenta = [_momentum(low, high) for low, high in zip(zero, ones, strict=True)]
            total = [jnp.zeros_like(x) for x in zero]
        total = [t + x for t, x in zip(total, zero, strict=True)]
    if count == 0:
        raise ValueError("batches: there is none; a few batches of training examples are needed")
    if all(m is None for m in momenta):
        raise ValueError(
            "loss_fn: it updates no running average. Use the loss of the training, with batch norm in training mode"
        )
    means = iter([None if m is None else t / (count * (1 - m)) for t, m in zip(total, momenta, strict=True)])
    made = [next(means) if n else None for n in numbers]
    if not all(bool(jnp.isfinite(x).all()) for x in made if x is not None):
        raise ValueError("batches: their statistics are not finite")
    return treedef.unflatten(
        jnp.array(old, copy=True) if new is None else new.astype(old.dtype)
        for old, new in zip(leaves, made, strict=True)
    )


def _momentum(low: jax.Array, high: jax.Array) -> float | None:
    """The momentum of a running average from its values after starts at 0 and at 1; None if it is no such average."""
    difference = np.asarray(high, np.float64) - np.asarray(low, np.float64)
    if difference.size == 0 or not np.isfinite(difference).all():
        return None
    momentum = float(difference.mean())
    # Rounding of values around 1e3 and more hides the difference of 1.
    even = np.abs(difference - momentum) <= TOLERANCE + 1e-6 * np.abs(np.asarray(low, np.float64))
    return momentum if even.all() and -TOLERANCE <= momentum < 1 - TOLERANCE else None
