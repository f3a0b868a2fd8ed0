"""The user's loss, in any of its forms, as a pure function of parameters."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax

from jaxsgd.loss import call_loss, fold_keys, is_stateful, with_all_arguments
from jaxsgd.models import is_module, split_model
from jaxsgd.numerics import strong
from jaxsgd.paths import check_params, is_function
from jaxsgd.train_state import TrainState, refuse_deleted

__all__ = ["apart", "pure_loss", "takes"]


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
    elif is_module(model):
        graphdef, params, model_state = split_model(model)
    else:
        graphdef, params, model_state = None, model, None
    refuse_deleted("params", params)
    check_params(params)
    return graphdef, jax.tree.map(strong, params), model_state


def pure_loss(
    loss_fn: Callable[..., Any], model: Any, *, random: bool = False
) -> tuple[Callable[[Any, Any, jax.Array], jax.Array], Any]:
    """``(fn, params)`` with ``fn(params, batch, key) -> loss``, a real scalar.

    Args:
      loss_fn: as in `jaxsgd.make_step`, or of ``(params, batch)`` alone. Auxiliary results are dropped.
      model: a tree of parameters, an ``nnx.Module``, or a `TrainState`. Its model state stays constant.
      random: whether the key of the call decides the random numbers of an NNX model too. Default: the model's own.

    Raises:
      TypeError: as in `jaxsgd.loss.with_all_arguments` and `apart`.
      RuntimeError: the parameters were donated to a train step.
      ValueError: at the call, the loss is no real scalar.
    """
    graphdef, params, model_state = apart(model)
    loss_fn = with_all_arguments(loss_fn, is_stateful(graphdef, model_state))

    def fn(params: Any, batch: Any, key: jax.Array) -> jax.Array:
        held = fold_keys(model_state, jax.random.bits(key)) if random and graphdef is not None else model_state
        return call_loss(loss_fn, graphdef, params, held, batch, key)[0]

    return fn, params


def takes(loss_fn: Callable[..., Any], model: Any) -> Callable[[Any], bool]:
    """Whether the loss takes a batch, as a function of the batch. Nothing is traced until it is asked."""

    def asked(batch: Any) -> bool:
        def one(key: jax.Array) -> jax.Array:
            fn, params = pure_loss(loss_fn, model(key) if is_function(model) and not _is_model(model) else model)
            return fn(params, batch, key)

        try:
            jax.eval_shape(one, jax.random.key(0))
        except Exception:  # whatever a loss says to a batch that is none
            return False
        return True

    return asked


def _is_model(model: Any) -> bool:
    return is_module(model) or isinstance(model, TrainState)
