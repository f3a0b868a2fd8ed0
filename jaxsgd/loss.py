"""The user's loss, in any of its forms, read in one way by the train step and by every tool."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from jaxsgd.models import carried_state, merge_model
from jaxsgd.numerics import is_key
from jaxsgd.paths import leaf_names

__all__ = ["call_loss", "fold_keys", "is_stateful", "loss_and_aux", "with_all_arguments"]


def is_stateful(graphdef: Any, model_state: Any) -> bool:
    """Whether the loss takes and returns the model state: there is one, and no NNX model carries it."""
    return graphdef is None and model_state is not None


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
    for name, x in zip(leaf_names(aux), jax.tree.leaves(aux), strict=True):
        if not hasattr(x, "dtype") and not isinstance(x, bool | int | float | complex):
            raise TypeError(
                f"loss_fn: aux {name!r} is a {type(x).__name__}; arrays and numbers are needed. Leave it out"
            )
    return jnp.asarray(loss), aux


def _like(new: Any, old: Any) -> Any:
    """``new``, the model's state after a call, in the dtypes of ``old``, the one before.

    Raises:
      ValueError: it has other leaves or shapes, or numbers of another kind.
    """
    names, treedef = leaf_names(old), jax.tree.structure(old)
    found, leaves = leaf_names(new), jax.tree.leaves(new)
    if found != names:
        more, less = sorted({*found} - {*names}), sorted({*names} - {*found})
        if more or less or len(found) != len(names):
            said = [f"new: {', '.join(more[:3])}"] * bool(more) + [f"missing: {', '.join(less[:3])}"] * bool(less)
            raise ValueError(
                f"loss_fn: the model's state has other leaves after it ({'; '.join(said)}). Use the same tree. An "
                "NNX model that sows values needs nnx.pop(model, nnx.Intermediate)"
            )
        by_name = dict(zip(found, leaves, strict=True))  # a container of another order, such as a FrozenDict
        leaves = [by_name[name] for name in names]
    triples = zip(names, leaves, jax.tree.leaves(old), strict=True)
    return treedef.unflatten(_in_dtype(name, x, like) for name, x, like in triples)


def _in_dtype(name: str, x: Any, like: Any) -> Any:
    if jnp.shape(x) != jnp.shape(like):
        raise ValueError(
            f"loss_fn: the model's state {name!r} has the shape {jnp.shape(x)} after it, {jnp.shape(like)} before"
        )
    if is_key(x) or is_key(like) or x is like:
        return x
    dtype, wanted = jnp.result_type(x), jnp.result_type(like)
    if dtype == wanted:
        return x
    if not jnp.can_cast(dtype, wanted, "same_kind"):
        raise ValueError(
            f"loss_fn: the model's state {name!r} is {dtype.name} after it, {wanted.name} before. Use one kind"
        )
    return jnp.asarray(x).astype(wanted)


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
      ValueError: it returns something else than a scalar loss, ``(loss, aux)`` or ``(loss, (model_state, aux))``; the
        model's state has other leaves, shapes or kinds of numbers after it. Floating numbers keep their dtypes.
      TypeError: a leaf of aux is no array and no number.
    """
    if graphdef is not None:
        model = merge_model(graphdef, params, model_state)
        loss, aux = loss_and_aux(loss_fn(model, batch, key))
        return loss, (_like(carried_state(model), model_state), aux)
    if model_state is None:
        loss, aux = loss_and_aux(loss_fn(params, batch, key))
        return loss, (None, aux)
    out = loss_fn(params, model_state, batch, key)
    try:
        loss, (carried, aux) = out
    except (TypeError, ValueError):
        raise ValueError("loss_fn: with a model_state it returns (loss, (model_state, aux))") from None
    loss, aux = loss_and_aux((loss, aux))
    return loss, (_like(carried, model_state), aux)


def fold_keys(tree: Any, data: Any) -> Any:
    """``tree`` with random keys of its own: ``data``, an integer, is folded into each of its typed keys.

    The keys of `flax.nnx.Rngs` are such: a model with dropout then draws other random numbers.
    """

    def fold(x: Any) -> Any:
        if not is_key(x):
            return x
        flat = jax.vmap(jax.random.fold_in, in_axes=(0, None))(x.reshape(-1), jnp.asarray(data, jnp.uint32))
        return flat.reshape(x.shape)

    return jax.tree.map(fold, tree)
