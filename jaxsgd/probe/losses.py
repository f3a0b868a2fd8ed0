"""The user's loss, in any of its forms, as a pure function of parameters."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from jaxsgd.numerics import strong
from jaxsgd.paths import check_params
from jaxsgd.train_state import TrainState, refuse_deleted

__all__ = ["apart", "pure_loss", "three_arguments"]


def three_arguments(loss_fn: Callable[..., Any]) -> Callable[..., Any]:
    """``loss_fn`` as a function of ``(params, batch, key)``. A loss of ``(params, batch)`` gets no key.

    Raises:
      TypeError: it is no function of two or three arguments.
    """
    if not callable(loss_fn):
        raise TypeError(f"loss_fn={loss_fn!r}: a function (params, batch, key) -> loss is needed")
    try:
        parameters = inspect.signature(loss_fn).parameters.values()
    except ValueError:  # a builtin has no signature
        return loss_fn
    positional = [p for p in parameters if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]
    if any(p.kind is p.VAR_POSITIONAL for p in parameters) or len(positional) >= 3:
        needed = sum(p.default is p.empty for p in positional)
        if needed <= 3:
            return loss_fn
    elif len(positional) == 2:
        return lambda params, batch, key: loss_fn(params, batch)
    raise TypeError(
        f"loss_fn: it needs the arguments (params, batch, key) or (params, batch); it takes {len(positional)}"
    )


def apart(model: Any) -> tuple[Any, Any, Any]:
    """``(graphdef, params, model_state)``: the static half of an NNX model or None, the parameters, other variables.

    Args:
      model: a tree of parameters, an ``nnx.Module``, or a `TrainState`.

    Raises:
      TypeError: a leaf of the parameters is no array and no number.
      RuntimeError: the parameters were donated to a train step.
    """
    if isinstance(model, TrainState):
        graphdef, params, model_state = model.graphdef, model.params, model.model_state
    elif isinstance(model, nnx.Module):
        graphdef, params, model_state = nnx.split(model, nnx.Param, ...)
    else:
        graphdef, params, model_state = None, model, None
    refuse_deleted("params", params)
    check_params(params)
    return graphdef, jax.tree.map(strong, params), model_state


def pure_loss(loss_fn: Callable[..., Any], model: Any) -> tuple[Callable[[Any, Any, jax.Array], jax.Array], Any]:
    """``(fn, params)`` with ``fn(params, batch, key) -> loss``, a real scalar.

    Args:
      loss_fn: as in `jaxsgd.make_step`, or of ``(params, batch)`` alone. Auxiliary results are dropped.
      model: a tree of parameters, an ``nnx.Module``, or a `TrainState`. Its model state stays constant.

    Raises:
      TypeError: as in `three_arguments` and `apart`.
      RuntimeError: the parameters were donated to a train step.
      ValueError: at the call, the loss is no real scalar.
    """
    loss_fn = three_arguments(loss_fn)
    graphdef, params, model_state = apart(model)

    def fn(params: Any, batch: Any, key: jax.Array) -> jax.Array:
        if graphdef is not None:
            out = loss_fn(nnx.merge(graphdef, params, model_state, copy=True), batch, key)
        elif model_state is not None:
            out = loss_fn(params, model_state, batch, key)
        else:
            out = loss_fn(params, batch, key)
        loss = out[0] if isinstance(out, tuple) else out
        if jnp.shape(loss) != () or not jnp.issubdtype(jnp.result_type(loss), jnp.floating):
            raise ValueError(f"loss_fn: a real scalar is needed; it returns {jnp.result_type(loss)}{jnp.shape(loss)}")
        return jnp.asarray(loss)

    return fn, params
