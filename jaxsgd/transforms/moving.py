"""The parameters that an optimizer moves, read from its own update."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend.core import ClosedJaxpr, Jaxpr, Literal

from jaxsgd.numerics import widest
from jaxsgd.second_order.batch_loss import SplitLoss, taken_by

__all__ = ["moving"]

KEEP_ZERO = set(
    """abs add add_any broadcast_in_dim complex concatenate conj convert_element_type copy cumsum dynamic_slice
    expand_dims imag max min neg optimization_barrier pad pbroadcast pcast psum psum_invariant pvary real reduce_max
    reduce_min reduce_precision reduce_sum reshape rev sharding_constraint sign slice sqrt square squeeze stop_gradient
    sub tanh transpose""".split()  # noqa: SIM905 - forty names on forty lines would say less
)
"""Operations that make zeros of zeros alone."""


class _LossAsked(Exception):
    """The update calls its ``value_fn``."""


def moving(update: Callable[..., Any], state: Any, params: Any, value_fn: Callable[..., Any] | None) -> list[bool]:
    """Whether each parameter is moved by ``update``, in flattening order.

    A parameter stays where it is if its update is zeros whatever the gradients are: a group with ``frozen``,
    `optax.set_to_zero` in `optax.partition`, `optax.freeze`, under any wrappers. The update is traced, not run.
    A rate that happens to be 0 freezes nothing.

    Args:
      update: the ``update`` of a gradient transformation.
      state, params: its arguments, as arrays, tracers or shapes.
      value_fn: the loss as a function of the parameters, one of the extra arguments of the train step. With None, a
        rule that calls it counts as one that moves all.
    """
    try:
        # Tracing the loss is most of the work, and few rules call it.
        stand_in = SplitLoss(_refuse, _refuse) if isinstance(value_fn, SplitLoss) else _refuse
        return _moving(update, state, params, stand_in)
    except _LossAsked:
        if value_fn is None:
            return [True] * len(jax.tree.leaves(params))
        return _moving(update, state, params, value_fn)


def _refuse(*args: Any, **kwargs: Any) -> Any:
    raise _LossAsked


def _moving(update: Callable[..., Any], state: Any, params: Any, value_fn: Any) -> list[bool]:
    def updates(grads: Any, state: Any, params: Any, value: jax.Array) -> Any:
        extra = taken_by(update, {"value": value, "grad": grads, "value_fn": value_fn})
        return update(grads, state, params, **extra)[0]

    value = jax.ShapeDtypeStruct((), widest(jnp.result_type(p) for p in jax.tree.leaves(params)))
    traced = jax.make_jaxpr(updates)(params, state, params, value)
    return [not zero for zero in _zeros(traced, [False] * len(traced.jaxpr.invars))]


def _zeros(closed: ClosedJaxpr, given: list[bool]) -> list[bool]:
    """Whether each output is zeros, where the inputs ``given`` are."""
    return _of_jaxpr(closed.jaxpr, [_is_zero(c) for c in closed.consts], given)


def _is_zero(x: Any) -> bool:
    """Whether an array is zeros. False for tracers and for arrays on a device."""
    return isinstance(x, np.ndarray) and x.dtype != jax.dtypes.float0 and not np.any(x)


def _of_jaxpr(jaxpr: Jaxpr, consts: list[bool], given: list[bool]) -> list[bool]:
    known: dict[Any, bool] = dict(zip(jaxpr.constvars, consts, strict=True))
    known |= dict(zip(jaxpr.invars, given, strict=True))

    def read(x: Any) -> bool:
        return bool(np.all(np.asarray(x.val) == 0)) if isinstance(x, Literal) else known.get(x, False)

    for equation in jaxpr.eqns:
        inputs = [read(x) for x in equation.invars]
        known |= dict(zip(equation.outvars, _of_equation(equation, inputs), strict=True))
    return [read(x) for x in jaxpr.outvars]


def _of_equation(equation: Any, inputs: list[bool]) -> list[bool]:
    name, params, many = equation.primitive.name, equation.params, len(equation.outvars)
    if name in KEEP_ZERO:
        return [all(inputs)] * many
    if name == "mul":
        # Zeros of a whole array stay. A factor that is a number is a rate: where it is 0 the others still move.
        return [any(z and not isinstance(x, Literal) for z, x in zip(inputs, equation.invars, strict=True))]
    if name == "div":
        return [inputs[0] and not isinstance(equation.invars[0], Literal)]
    if name == "select_n":
        return [all(inputs[1:])]
    if name == "cond":
        branches = [_zeros(branch, inputs[1:]) for branch in params["branches"]]
        return [all(outputs) for outputs in zip(*branches, strict=True)]
    inner = next((params[k] for k in ("jaxpr", "call_jaxpr", "fun_jaxpr") if k in params), None)
    if name not in ("scan", "while") and inner is not None:
        if isinstance(inner, ClosedJaxpr) and len(inner.jaxpr.invars) == len(inputs):
            return _zeros(inner, inputs)
        if isinstance(inner, Jaxpr) and len(inner.invars) == len(inputs) and not inner.constvars:
            return _of_jaxpr(inner, [], inputs)
    return [False] * many
