"""Whether a function treats each number of an array by itself, read from its trace."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from jax.extend.core import ClosedJaxpr, Jaxpr, Literal

__all__ = ["elementwise"]

# fmt: off
ALONE = {
    "abs", "acos", "acosh", "add", "add_any", "and", "asin", "asinh", "atan", "atan2", "atanh", "bitcast_convert_type",
    "cbrt", "ceil", "clamp", "complex", "conj", "convert_element_type", "copy", "cos", "cosh", "digamma", "div", "eq",
    "erf", "erf_inv", "erfc", "exp", "exp2", "expm1", "floor", "ge", "gt", "imag", "integer_pow", "is_finite", "le",
    "lgamma", "log", "log1p", "logistic", "lt", "max", "min", "mul", "ne", "neg", "nextafter", "not", "or", "pow",
    "real", "reduce_precision", "rem", "round", "rsqrt", "select_n", "shift_left", "shift_right_arithmetic",
    "shift_right_logical", "sign", "sin", "sinh", "sqrt", "square", "stop_gradient", "sub", "tan", "tanh", "xor",
}
# fmt: on
"""Primitives whose result at one place depends on their operands at that place."""

CALLS = {"jit": "jaxpr", "pjit": "jaxpr", "closed_call": "call_jaxpr", "custom_jvp_call": "call_jaxpr"}
"""Primitives that call a function -> the parameter that holds it."""


class _MixedError(Exception):
    """Numbers of different places meet."""


def elementwise(fn: Callable[..., Any], *of_shapes: tuple[Any, ...]) -> bool:
    """Whether ``fn`` gives each number of its results from the numbers at that place and from scalars alone.

    Args:
      fn: a function of pytrees of arrays, or of their shapes.
      of_shapes: its arguments, once for each shape that they may be cut or joined to. A function that does other things
        on another shape, such as to divide by its length, is not elementwise.

    Example:
      >>> x = jnp.zeros((4, 4))
      >>> elementwise(lambda x: 2 * x, (x,)), elementwise(lambda x: x / x.size, (x,), (x[:2],))
      (True, False)
    """
    try:
        prints = [_print(jax.make_jaxpr(fn)(*arguments)) for arguments in of_shapes]
    except _MixedError:
        return False
    return all(one == prints[0] for one in prints)


def _print(closed: ClosedJaxpr) -> list[Any]:
    """All that is done, but for the shapes.

    Raises:
      _MixedError: a part mixes places.
    """
    shapes = {_shape(v) for v in (*closed.jaxpr.invars, *closed.jaxpr.outvars)} - {()}
    if len(shapes) > 1:
        raise _MixedError
    out: list[Any] = []
    _walk(closed.jaxpr, closed.consts, shapes | {()}, out)
    return out


def _shape(v: Any) -> tuple[int, ...]:
    return v.aval.shape


def _walk(jaxpr: Jaxpr, consts: Any, shapes: set[tuple[int, ...]], out: list[Any]) -> None:
    for const in consts:
        if np.shape(const) != ():
            raise _MixedError
        out.append(np.asarray(const).tobytes())
    for eqn in jaxpr.eqns:
        name = eqn.primitive.name
        if any(_shape(v) not in shapes for v in (*eqn.invars, *eqn.outvars)):
            raise _MixedError
        literals = [np.asarray(v.val).tobytes() for v in eqn.invars if isinstance(v, Literal)]
        out.append((name, *literals, eqn.params.get("y")))
        if name in CALLS:
            inner = eqn.params[CALLS[name]]
            _walk(inner.jaxpr, inner.consts, shapes, out)
        elif all(_shape(v) == () for v in (*eqn.invars, *eqn.outvars)):
            out.append(str(eqn.params))
        elif not (name in ALONE or name == "broadcast_in_dim" and _shape(eqn.invars[0]) == ()):
            raise _MixedError
