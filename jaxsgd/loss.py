"""The user's loss, in any of its forms, read in one way by the train step and by every tool."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from jaxsgd.numerics import is_key

__all__ = ["call_loss", "fold_keys", "loss_and_aux", "with_all_arguments"]


def with_all_arguments(loss_fn: Callable[..., Any], stateful: bool = False) -> Callable[..., Any]:
    """``loss_fn`` as a function of ``(params, batch, key)``. A loss of ``(params, batch)`` gets no key.

    Args:
      loss_fn: the loss.
      stateful: whether it has a model state of its own, and so the arguments ``(params, model_state, batch, key)``.

    Raises:
      TypeError: it is no function of so many arguments.
    """
    if not callable(loss_fn):
        raise TypeError(f"loss_fn={loss_fn!r}: a function (params, batch, key) -> loss is needed")
    try:
        parameters = inspect.signature(loss_fn).parameters.values()
    except ValueError:  # a builtin has no signature
        return loss_fn
    positional = [p for p in parameters if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]
    needed, wanted = sum(p.default is p.empty for p in positional), 4 if stateful else 3
    if any(p.kind is p.VAR_POSITIONAL for p in parameters) or len(positional) >= wanted:
        if needed <= wanted:
            return loss_fn
    elif len(positional) == 2 and not stateful:
        return lambda params, batch, key: loss_fn(params, batch)
    if stateful:
        raise TypeError(
            "loss_fn: with a model_state it needs the arguments (params, model_state, batch, key); "
            f"it takes {len(positional)}"
        )
    more = ". Use a jaxsgd.TrainState with model_state= for (params, model_state, batch, key)" if needed == 4 else ""
    raise TypeError(
        f"loss_fn: it needs the arguments (params, batch, key) or (params, batch); it takes {len(positional)}{more}"
    )


def loss_and_aux(out: Any) -> tuple[jax.Array, Any]:
    """``(loss, aux)`` from what a loss returns: ``loss``, or ``(loss, aux)``; aux is None without one.

    Raises:
      ValueError: it returns something else, or its loss is no real floating scalar.
    """
    if isinstance(out, tuple) and len(out) != 2:
        raise ValueError(
            f"loss_fn: it returns a tuple of {len(out)}; loss or (loss, aux) is needed. Use a dict for several aux"
        )
    loss, aux = out if isinstance(out, tuple) else (out, None)
    if loss is None or isinstance(loss, list | dict | tuple):
        raise ValueError(f"loss_fn: it returns a {type(loss).__name__}; a scalar loss or (loss, aux) is needed")
    if jnp.shape(loss) != ():
        raise ValueError(f"loss_fn: the loss has the shape {jnp.shape(loss)}; a scalar is needed. Use its mean")
    if not jnp.issubdtype(jnp.result_type(loss), jnp.floating):
        raise ValueError(f"loss_fn: the loss is {jnp.result_type(loss).name}; a real floating scalar is needed")
    return jnp.asarray(loss), aux


def call_loss(
    loss_fn: Callable[..., Any], graphdef: Any, params: Any, model_state: Any, batch: Any, key: Any
) -> tuple[jax.Array, tuple[Any, Any]]:
    """The loss in one form: ``loss, (model_state, aux)``.

    Args:
      loss_fn: ``(params, batch, key)``, or of an NNX model, or ``(params, model_state, batch, key)``.
      graphdef: the static half of an NNX model, or None.
      params: the parameters.
      model_state: what the model updates by itself, or None.
      batch, key: the examples, and the key for random numbers.

    Raises:
      ValueError: it returns something else than a scalar loss, ``(loss, aux)`` or ``(loss, (model_state, aux))``.
    """
    if graphdef is not None:
        model = nnx.merge(graphdef, params, model_state, copy=True)
        loss, aux = loss_and_aux(loss_fn(model, batch, key))
        return loss, (nnx.state(model, nnx.Not(nnx.Param)), aux)
    if model_state is None:
        loss, aux = loss_and_aux(loss_fn(params, batch, key))
        return loss, (None, aux)
    out = loss_fn(params, model_state, batch, key)
    try:
        loss, (model_state, aux) = out
    except (TypeError, ValueError):
        raise ValueError("loss_fn: with a model_state it returns (loss, (model_state, aux))") from None
    return loss_and_aux(loss)[0], (model_state, aux)


def fold_keys(tree: Any, data: Any) -> Any:
    """``tree`` with random keys of its own: ``data``, an integer, is folded into each typed key of it.

    The keys of `flax.nnx.Rngs` are such: a model with dropout then draws other random numbers.
    """

    def fold(x: Any) -> Any:
        if not is_key(x):
            return x
        flat = jax.vmap(jax.random.fold_in, in_axes=(0, None))(x.reshape(-1), jnp.asarray(data, jnp.uint32))
        return flat.reshape(x.shape)

    return jax.tree.map(fold, tree)
