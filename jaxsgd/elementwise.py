"""Whether a function treats each number of an array by itself, read from its trace."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import jax
import numpy as np
from jax.extend.core import ClosedJaxpr, Jaxpr, JaxprEqn, Literal, Var, jaxpr_as_fun

__all__ = ["divided", "elementwise"]

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
        _enter(eqn, shapes, out)


def _enter(eqn: JaxprEqn, shapes: set[tuple[int, ...]], out: list[Any]) -> None:
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


# -- a function in two ------------------------------------------------------------------------------

Whole = Callable[..., list[Any]]


def divided(fn: Callable[..., Any], shape: tuple[int, ...], *arguments: Any) -> tuple[Whole, Callable[..., Any]]:
    """``fn`` in two: the work in which places meet, with all that leads to it, and the elementwise rest.

    Args:
      fn: a function of pytrees of arrays.
      shape: the shape of arrays whose numbers are at places. A step on any other array mixes them.
      arguments: its arguments.

    Returns:
      ``whole(*arguments)``, a list of arrays, and ``rest(arguments, arrays)``, the results of ``fn``.

    Example:
      >>> x = jnp.ones((2, 2))
      >>> whole, rest = divided(lambda x: (x @ (x + 1) + x, 2 * x), (2, 2), x)
      >>> [made] = whole(x)  # the product
      >>> rest((x,), [made])[0][0, 0]
      Array(5., dtype=float32)
    """
    closed, results = jax.make_jaxpr(fn, return_shape=True)(*arguments)
    jaxpr = closed.jaxpr
    mixing = [not _is_elementwise(eqn, {shape, ()}) for eqn in jaxpr.eqns]
    before = _needed(
        jaxpr.eqns, [v for eqn, mixes in zip(jaxpr.eqns, mixing, strict=True) if mixes for v in eqn.outvars]
    )
    mixed: set[Var] = set()
    within, beside = [], []
    for eqn, mixes in zip(jaxpr.eqns, mixing, strict=True):
        follows = mixes or any(v in mixed for v in eqn.invars if not isinstance(v, Literal))
        mixed.update(eqn.outvars if follows else ())
        (within if follows and eqn in before else beside).append(eqn)
    beside = _needed(beside, jaxpr.outvars)
    made = {v for eqn in within for v in eqn.outvars}
    asked = [v for v in (*(v for eqn in beside for v in eqn.invars), *jaxpr.outvars) if not isinstance(v, Literal)]
    cut = list(dict.fromkeys(v for v in asked if v in made))

    def part(**parts: Any) -> Callable[..., list[Any]]:
        return jaxpr_as_fun(ClosedJaxpr(jaxpr.replace(**parts), closed.consts))

    first = part(eqns=_needed(before, cut), outvars=cut)
    second = part(eqns=beside, invars=[*jaxpr.invars, *cut])

    def whole(*given: Any) -> list[Any]:
        return first(*jax.tree.leaves(given))

    def rest(given: tuple[Any, ...], arrays: Sequence[Any]) -> Any:
        return jax.tree.unflatten(jax.tree.structure(results), second(*jax.tree.leaves(given), *arrays))

    return whole, rest


def _is_elementwise(eqn: JaxprEqn, shapes: set[tuple[int, ...]]) -> bool:
    try:
        _enter(eqn, shapes, [])
    except _MixedError:
        return False
    return True


def _needed(eqns: Sequence[JaxprEqn], wanted: Iterable[Any]) -> list[JaxprEqn]:
    """The equations that lead to the wanted values, in order."""
    values, out = {v for v in wanted if not isinstance(v, Literal)}, []
    for eqn in reversed(eqns):
        if any(v in values for v in eqn.outvars):
            values.update(v for v in eqn.invars if not isinstance(v, Literal))
            out.append(eqn)
    return out[::-1]
