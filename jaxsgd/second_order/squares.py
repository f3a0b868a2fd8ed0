"""Nonlinear least squares: fits of a model to data, compiled, batched by `jax.vmap`, and differentiable."""

from __future__ import annotations

import dataclasses
import functools
import weakref
from collections.abc import Callable
from numbers import Real
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxsgd.numerics import check_count, widest
from jaxsgd.paths import nearest
from jaxsgd.second_order.further_tries import best_end, first_end
from jaxsgd.second_order.implicit import differentiable
from jaxsgd.second_order.linear_model import Box
from jaxsgd.second_order.loops import own_problem
from jaxsgd.second_order.objective import (
    Space,
    check_args,
    check_bounds,
    check_fun,
    check_hash,
    check_start,
    hoist,
    is_concrete,
)
from jaxsgd.second_order.region_search import Fit, State, result_of
from jaxsgd.second_order.result import Result
from jaxsgd.second_order.vectors import norm, power_of_two

__all__ = ["least_squares"]

METHODS = ("lm", "dogleg", "gauss_newton")
Method = Literal["lm", "dogleg", "gauss_newton"]


def least_squares(
    residual: Callable[..., Any],
    params: Any,
    *,
    method: Method = "lm",
    args: tuple[Any, ...] = (),
    has_aux: bool = False,
    tol: float | None = None,
    max_iterations: int | None = None,
    bounds: tuple[Any, Any] | None = None,
    callback: Callable[[Result], Any] | None = None,
) -> Result:
    r"""Minimize half the sum of squared residuals: $\min_p \frac12 \lVert r(p) \rVert^2$.

    Every method factors the Jacobian by QR and never forms its square, which would lose half the digits. Parameters
    are scaled by the norms of the Jacobian's columns, so that their units do not matter. A trust region is tried up to
    three times more from the start, without scales or with a smaller region. That happens where it ends without
    convergence or with a Jacobian that has lost its rank or the effect of a parameter. Where parameters have no effect
    at the best end, up to two more tries begin there. They bring those parameters back to where they have one. From a
    saddle point, to which symmetric starts lead, tries go on along its negative curvature. The best end counts, and
    ``evaluations`` counts the residuals of all steps.

    - ``"lm"``: Levenberg-Marquardt in a trust region (Moré 1978, doi:10.1007/BFb0067700).
    - ``"dogleg"``: a trust region with a path of two pieces (Powell 1970). A step costs less.
    - ``"gauss_newton"``: full steps, shortened until the residuals shrink. For good starts and small residuals.

    With ``bounds`` every method solves its step for the parameters that are free. A parameter that the step would take
    out stays at its bound, and the others are solved for again. A step along the projected gradient replaces it where
    that predicts a larger decrease. Every residual is computed inside the bounds.

    Where a search converges, the solver checks the curvature. The directions are the singular vectors of the
    Jacobian, single parameters, and sums of all with signs by chance. If it is negative and no further try finds a way
    down, the status is ``SADDLE_POINT``, which is no success. The check needs at least as many residuals as parameters.
    If parameters have no effect at the end, single ones or several together, but have one elsewhere, the status is
    ``FLAT``. That is no success either: the search may have left the data behind, or spent several parameters on one
    residual.

    Under `jax.vmap` each member stops on its own. Derivatives with respect to ``args`` and to closed-over arrays follow
    from the implicit function theorem; they hold at a minimum.

    Args:
      residual: ``residual(params, *args) -> residuals``, any tree of real floating arrays, or ``(residuals, aux)``.
      params: the start, a tree of real floating arrays.
      method: see above. Default: ``"lm"``.
      args: further arguments of ``residual``. Default: none.
      has_aux: whether ``residual`` returns ``(residuals, aux)``. Default: False.
      tol: converged is where the part of the residuals that the Jacobian can explain is below ``tol`` times the
        residuals. Default: the square root of the rounding unit, 1.5e-8 in float64: the linear model then predicts a
        relative decrease of the sum of squares below rounding.
      max_iterations: the largest number of trial steps of the first try, and of all others together. Default:
        ``100 * (parameters + 1)``, at least 200.
      bounds: ``(lower, upper)``, each a number, None or a tree like ``params``. The start is moved inside them.
        Default: None.
      callback: called with the `Result` so far after every trial step. Default: None.

    Returns:
      A `Result` for the best point: ``value`` is half the sum of squares, ``grad_norm`` the largest absolute entry of
      ``J' r``, with bounds of the projected gradient, ``evaluations`` the residuals of the start and
      of all trial steps.

    Raises:
      TypeError: the residual or the start are not real and floating; an argument is of the wrong kind.
      ValueError: the residual is a scalar; the start is not finite; an unknown method; a limit out of its range;
        bounds crossed or of another structure.

    >>> import jax.numpy as jnp
    >>> t = jnp.linspace(0.0, 1.0, 20)
    >>> def residual(p, y): return p["size"] * jnp.exp(-p["rate"] * t) - y
    >>> fit = least_squares(residual, {"size": 1.0, "rate": 1.0}, args=(2 * jnp.exp(-3 * t),))
    >>> round(float(fit.params["size"]), 3), round(float(fit.params["rate"]), 3)
    (2.0, 3.0)
    """
    check_args(args)
    check_fun(residual, "(params, *args) -> residuals", "residual", 1 + len(args))
    if method not in METHODS:
        raise ValueError(f"method={method!r}: known are {', '.join(METHODS)}{nearest(str(method), METHODS)}")
    if callback is not None:
        check_fun(callback, "(result)", "callback", 1)
        check_hash(callback, "(result)", "callback")
    start, _ = check_start(params)
    limits = None if bounds is None else check_bounds(bounds, start)
    if limits is not None:
        start = jax.tree.map(jnp.clip, start, *limits)
    space = Space(start)
    if max_iterations is None:
        max_iterations = max(200, 100 * (space.size + 1))
    check_count("max_iterations", max_iterations, 0)
    known = tol is not None and is_concrete(tol)
    if known and (not isinstance(tol, Real | jax.Array) or isinstance(tol, bool) or not 0 <= float(tol) < 1):
        raise ValueError(f"tol={tol!r}: it must lie in [0, 1)")
    eps = float(jnp.finfo(space.dtype).eps)
    tolerance = jnp.asarray(eps**0.5 if tol is None else tol, space.dtype)
    arrays = jax.tree.map(jnp.asarray, args)
    options = _Options(method, min(int(max_iterations), np.iinfo(np.int32).max), bool(has_aux), callback)

    pure = functools.partial(_residual, residual, has_aux)
    traced = not is_concrete((start, limits, arrays, tolerance))
    if traced or not _is_closed(residual, pure, start, arrays):

        def residuals(start: Any, *arrays: Any) -> jax.Array:
            return pure(start, arrays)[0]

        start, arrays, limits, tolerance = own_problem(residuals, start, arrays, limits, tolerance)
        fun, consts = hoist(pure, start, arrays)
        return _solve(fun, options, tolerance, start, limits, arrays, consts)
    if callback is None:
        # Most fits end here. The program with all further tries compiles for twice as long.
        result, certain = _first_try(residual, options, tolerance, start, limits, arrays)
        if certain:
            return result
    return _compiled(residual, options, tolerance, start, limits, arrays)


class _Options(NamedTuple):
    """All that is static of a call."""

    method: str
    max_iterations: int
    has_aux: bool
    callback: Any


def _residual(residual: Any, has_aux: bool, params: Any, args: Any) -> tuple[jax.Array, Any]:
    """The residuals as one vector, checked, and the aux."""
    out, aux = residual(params, *args), None
    if has_aux:
        if not isinstance(out, tuple) or len(out) != 2:
            raise TypeError(f"residual returns a {type(out).__name__}. With has_aux=True use (residuals, aux)")
        out, aux = out
    leaves = [jnp.asarray(x) for x in jax.tree.leaves(out)]
    for x in leaves:
        if not jnp.issubdtype(x.dtype, jnp.floating):
            raise TypeError(f"residual: an array of {x.dtype.name}. Use real floating-point residuals")
    if len(leaves) == 1 and leaves[0].shape == ():
        raise ValueError("residual returns a scalar. Use jaxsgd.minimize for it, or return the residuals unsquared")
    if not sum(x.size for x in leaves):
        raise ValueError("residual returns no number. Use a function (params, *args) -> residuals")
    dtype = widest([*(x.dtype for x in leaves), *(x.dtype for x in jax.tree.leaves(params))])
    return jnp.concatenate([x.ravel().astype(dtype) for x in leaves]), aux


_closed: weakref.WeakSet[Any] = weakref.WeakSet()
"""Functions that close over no tracer."""


def _is_closed(residual: Any, pure: Callable[..., Any], start: Any, arrays: Any) -> bool:
    """Whether ``residual`` can be the key of a compiled program: it closes over no tracer, and has a hash."""
    try:
        if residual in _closed:
            return True
        _, consts = hoist(pure, start, arrays)
        if not is_concrete(consts):
            return False
        _closed.add(residual)
    except TypeError as error:
        if "hash" not in str(error) and "weak reference" not in str(error):
            raise
        return False
    return True


@functools.partial(jax.jit, static_argnums=(0, 1))
def _compiled(residual: Any, options: _Options, tol: jax.Array, start: Any, limits: Any, arrays: Any) -> Result:
    fun, consts = hoist(functools.partial(_residual, residual, options.has_aux), start, arrays)
    return _solve(fun, options, tol, start, limits, arrays, consts)


@functools.partial(jax.jit, static_argnums=(0, 1))
def _first_try(
    residual: Any, options: _Options, tol: jax.Array, start: Any, limits: Any, arrays: Any
) -> tuple[Result, jax.Array]:
    """The result of the first try alone, and whether it is that of all tries."""

    def fun(params: Any) -> tuple[jax.Array, Any]:
        return _residual(residual, options.has_aux, params, arrays)

    fit = _fit(fun, options, tol, start, limits)
    s, certain = first_end(fit, options.max_iterations)
    return _result(fun, fit, s), certain


def _solve(
    fun: Callable[..., Any], options: _Options, tol: jax.Array, start: Any, limits: Any, arrays: Any, consts: Any
) -> Result:
    """The result, with its derivative in ``(arrays, consts)``."""

    def solver(start: Any, bounds: Any, data: Any) -> Result:
        arrays, consts, tol = data

        def own(params: Any) -> tuple[jax.Array, Any]:
            return fun(consts, params, arrays)

        fit = _fit(own, options, tol, start, bounds)
        return _result(own, fit, best_end(fit, options.max_iterations))

    def value(params: Any, data: Any) -> tuple[jax.Array, Any]:
        arrays, consts, _ = data
        r, aux = fun(consts, params, arrays)
        return jnp.sum(r * r) / 2, aux

    return differentiable(solver, value, has_aux=True)(start, limits, (arrays, consts, tol))


def _fit(
    fun: Callable[[Any], tuple[jax.Array, Any]], options: _Options, tol: jax.Array, start: Any, bounds: Any
) -> Fit:
    """The problem of one call."""
    space = Space(start)
    (x,) = space.vector(start)
    box = None if bounds is None else Box(*(space.vector(side)[0] for side in bounds))
    # In a power of two near their first norm: nothing is rounded, and units of residuals do not matter.
    r = fun(start)[0].astype(x.dtype)
    unit = power_of_two(norm([r]))

    def residuals(x: jax.Array) -> jax.Array:
        return fun(space.tree([x]))[0].astype(x.dtype) / unit

    return Fit(residuals, x, r / unit, space, unit, box, options.method, tol, options.callback)


def _result(fun: Callable[[Any], tuple[jax.Array, Any]], fit: Fit, s: State) -> Result:
    """The result with its aux."""
    result = result_of(fit, s)
    return dataclasses.replace(result, aux=fun(result.params)[1])
