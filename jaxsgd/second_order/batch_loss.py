"""The loss of one batch as a function of the parameters alone, for optimizers that evaluate it more than once.

Second-order rules and line searches ask for ``value_fn(params) -> loss``. Here it is made from a train step's loss:
the same batch, the same random numbers, the mean over all microbatches and devices. Its derivatives of any order are
those of the mean.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from jaxsgd.numerics import wide
from jaxsgd.transforms.accumulation import over, split_microbatches, weight_of, weighted
from jaxsgd.transforms.clip import AxisName, varying_over

__all__ = ["SplitLoss", "mean_loss", "split_loss", "split_mean_loss", "taken_by"]


class SplitLoss:
    """A loss in two parts: outputs of a model, and a convex loss of the outputs. Made by `split_loss`.

    Attributes:
      outputs_fn: ``(params, batch, key) -> outputs``, or ``params -> outputs``.
      loss: ``(outputs, batch) -> loss`` or ``(loss, aux)``, or ``outputs -> loss``.
    """

    def __init__(self, outputs_fn: Callable[..., Any], loss: Callable[..., Any]) -> None:
        for name, fn in (("outputs_fn", outputs_fn), ("loss", loss)):
            if not callable(fn):
                raise TypeError(f"{name}={fn!r}: a function is needed")
        self.outputs_fn, self.loss = outputs_fn, loss

    def __call__(self, *args: Any) -> Any:
        """The loss of ``(params, batch, key)``, of ``(params, model_state, batch, key)``, or of ``(params)`` alone."""
        if len(args) not in (1, 3, 4):
            raise TypeError(f"split_loss: call it as (params, batch, key) or (params); got {len(args)} arguments")
        out = self.outputs_fn(*args)
        if len(args) == 1:
            return self.loss(out)
        if len(args) == 3:
            return self.loss(out, args[1])
        try:
            outputs, model_state = out
        except (TypeError, ValueError):
            raise ValueError("outputs_fn: with a model_state it returns (outputs, model_state)") from None
        loss = self.loss(outputs, args[2])
        loss, aux = loss if isinstance(loss, tuple) else (loss, None)
        return loss, (model_state, aux)


def split_loss(outputs_fn: Callable[..., Any], loss: Callable[..., Any]) -> SplitLoss:
    """A loss split into a model and a convex loss of its outputs, as `jaxsgd.gauss_newton` needs it.

    It is a ``loss_fn`` itself: ``make_step(split_loss(outputs_fn, loss), tx)`` works with every optimizer.

    Args:
      outputs_fn: ``outputs_fn(params, batch, key) -> outputs``, any tree of arrays, such as logits. With an NNX model,
        ``params`` is the model. With a ``model_state``: ``outputs_fn(params, model_state, batch, key) -> (outputs,
        model_state)``. For an update by hand: ``outputs_fn(params) -> outputs``.
      loss: ``loss(outputs, batch) -> loss`` or ``(loss, aux)``, a mean over the batch, convex in the outputs: squared
        error, cross-entropy of logits. For an update by hand: ``loss(outputs) -> loss``.

    Returns:
      A `SplitLoss`.

    Raises:
      TypeError: one of them is no function.

    >>> import jax.numpy as jnp
    >>> loss_fn = split_loss(lambda p, batch, key: batch["x"] * p, lambda out, batch: jnp.mean((out - batch["y"]) ** 2))
    >>> float(loss_fn(jnp.float32(2.0), {"x": jnp.ones(3), "y": jnp.zeros(3)}, None))
    4.0
    """
    return SplitLoss(outputs_fn, loss)


def taken_by(update: Callable[..., Any], extra: dict[str, Any]) -> dict[str, Any]:
    """The extra arguments that a transformation's ``update`` takes: all, unless it names those it takes."""
    try:
        parameters = inspect.signature(update).parameters.values()
    except (TypeError, ValueError):
        return extra
    if any(p.kind is p.VAR_KEYWORD for p in parameters):
        return extra
    names = {p.name for p in parameters if p.kind is not p.POSITIONAL_ONLY}
    return {name: value for name, value in extra.items() if name in names}


# -- over devices ----------------------------------------------------------------------------------


@partial(jax.custom_jvp, nondiff_argnums=(1,))
def _same(x: jax.Array, axis_name: AxisName) -> jax.Array:
    return x


@_same.defjvp
def _same_jvp(axis_name: Any, primals: tuple[jax.Array], tangents: tuple[jax.Array]) -> tuple[jax.Array, jax.Array]:
    # The mean of equal tangents is each of them; transposed, it is the mean of the devices' gradients.
    return primals[0], jax.lax.pmean(tangents[0], axis_name)


def _tracked(axis_name: AxisName) -> bool:
    """Whether `jax.shard_map` keeps track of what varies: it then transposes collectives by itself."""
    names = (axis_name,) if isinstance(axis_name, str) else axis_name or ()
    return any(varying_over(jax.lax.axis_index(name)) for name in names)


def _to_devices(tree: Any, axis_name: AxisName) -> Any:
    """Replicated arrays as each device's own. Gradients come back as their sum (untracked: as their mean)."""
    if axis_name is None:
        return tree
    names = (axis_name,) if isinstance(axis_name, str) else tuple(axis_name)
    if not _tracked(axis_name):
        return jax.tree.map(lambda x: _same(x, names) if jnp.issubdtype(x.dtype, jnp.inexact) else x, tree)

    def cast(x: Any) -> jax.Array:
        missing = tuple(name for name in names if name not in varying_over(x))
        return jax.lax.pcast(x, missing, to="varying") if missing else x

    return jax.tree.map(cast, tree)


def _over_devices(x: jax.Array, axis_name: AxisName) -> jax.Array:
    """The sum over devices. Its gradient is 1 on each (untracked: their number, for `_to_devices` takes the mean)."""
    if axis_name is None:
        return x
    if _tracked(axis_name):
        return jax.lax.psum(x, axis_name)
    return jax.lax.pmean(jax.lax.psum(1, axis_name) * x, axis_name)


def _mean(losses: jax.Array, weights: jax.Array, axis_name: AxisName) -> jax.Array:
    """The weighted mean over microbatches and devices."""
    weights = jax.lax.stop_gradient(weights)
    total = jnp.sum(jnp.maximum(weights, 0))
    total = total if axis_name is None else jax.lax.psum(total, axis_name)
    return over(_over_devices(jnp.sum(weighted(weights, losses)), axis_name), total)


# -- the functions ---------------------------------------------------------------------------------


def mean_loss(
    loss_fn: Callable[..., Any],
    steps: int,
    batch: Any,
    key: jax.Array,
    carried: Any,
    *,
    weight: Any = None,
    axis_name: AxisName = None,
) -> Callable[[Any], jax.Array]:
    """``value_fn(params) -> loss`` of one batch.

    Args:
      loss_fn: ``(params, carried, batch, key) -> (loss, (carried, aux))``.
      steps: the number of microbatches. With more than one, derivatives recompute each, in the memory of one.
      batch, key, carried: what stays fixed: the examples, the random numbers, the model's state before the step.
      weight, axis_name: see `jaxsgd.accumulate_gradients`.

    Returns:
      A function whose value is the loss that `jaxsgd.accumulate_gradients` gives.
    """

    def terms(params: Any, carried: Any, batch: Any, key: Any) -> tuple[Any, jax.Array, jax.Array]:
        loss, (carried, aux) = loss_fn(params, carried, batch, key)
        return carried, loss, weight_of(weight, batch, aux)

    def value_fn(params: Any) -> jax.Array:
        if steps == 1 and weight is None and axis_name is None:
            return terms(params, carried, batch, key)[1]
        params, own = _to_devices(params, axis_name), _to_devices(carried, axis_name)
        if steps == 1:
            _, loss, size = terms(params, own, batch, key)
            return _mean(loss[None], size[None], axis_name)

        @jax.checkpoint
        def body(carried: Any, now: Any) -> tuple[Any, tuple[jax.Array, jax.Array]]:
            carried, loss, size = terms(params, carried, *now)
            return carried, (loss, size)

        _, (losses, sizes) = jax.lax.scan(body, own, (split_microbatches(batch, steps), jax.random.split(key, steps)))
        return _mean(losses, sizes, axis_name)

    return value_fn


def split_mean_loss(
    outputs_fn: Callable[..., Any],
    loss: Callable[..., Any],
    steps: int,
    batch: Any,
    key: jax.Array,
    carried: Any,
    *,
    weight: Any = None,
    axis_name: AxisName = None,
) -> SplitLoss:
    """`mean_loss` of a split loss: ``value_fn(params) -> loss``, in two parts.

    Args:
      outputs_fn: ``(params, carried, batch, key) -> (outputs, carried)``.
      loss: ``(outputs, batch) -> loss`` or ``(loss, aux)``.
      steps, batch, key, carried, weight, axis_name: see `mean_loss`.

    Returns:
      A `SplitLoss` of the parameters alone. Outputs are each device's own; those of several microbatches are stacked.
    """

    def outputs_of(params: Any) -> Any:
        params, own = _to_devices(params, axis_name), _to_devices(carried, axis_name)
        if steps == 1:
            return outputs_fn(params, own, batch, key)[0]

        @jax.checkpoint
        def body(carried: Any, now: Any) -> tuple[Any, Any]:
            outputs, carried = outputs_fn(params, carried, *now)
            return carried, outputs

        return jax.lax.scan(body, own, (split_microbatches(batch, steps), jax.random.split(key, steps)))[1]

    def term(outputs: Any, batch: Any) -> tuple[jax.Array, jax.Array]:
        out = loss(outputs, batch)
        value, aux = out if isinstance(out, tuple) else (out, None)
        return wide(value), weight_of(weight, batch, aux)

    def loss_of_outputs(outputs: Any) -> jax.Array:
        if steps == 1:
            value, size = term(outputs, batch)
            return value if weight is None and axis_name is None else _mean(value[None], size[None], axis_name)
        values, sizes = jax.lax.map(lambda pair: term(*pair), (outputs, split_microbatches(batch, steps)))
        return _mean(values, sizes, axis_name)

    return SplitLoss(outputs_of, loss_of_outputs)
