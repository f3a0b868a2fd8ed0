"""`minimize`: from a function and a start to a minimum, and a true sentence about it."""

from __future__ import annotations

from collections.abc import Callable, Hashable
from functools import partial
from numbers import Real
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxsgd.hyper import WholeFrom
from jaxsgd.numerics import widest
from jaxsgd.paths import nearest
from jaxsgd.second_order.bfgs import BFGS, ConjugateGradient
from jaxsgd.second_order.descent import End, Limits, Setting, Shown, clipped, descend, projected
from jaxsgd.second_order.implicit import differentiable
from jaxsgd.second_order.lbfgsb import LBFGSB
from jaxsgd.second_order.limited_memory import LBFGS
from jaxsgd.second_order.loops import cond, own_problem, varying
from jaxsgd.second_order.newton_methods import Newton, trust_region
from jaxsgd.second_order.objective import (
    Space,
    Vector,
    check_args,
    check_bounds,
    check_fun,
    check_hash,
    check_start,
    hoist,
    is_split,
    peak,
)
from jaxsgd.second_order.result import Result
from jaxsgd.second_order.vectors import divided, is_far, is_large, largest, multiplied, start_units

__all__ = ["METHODS", "minimize"]

METHODS = ("lbfgs", "lbfgsb", "bfgs", "cg", "newton", "newton_cg", "trust_region")
DENSE = ("bfgs", "newton", "trust_region")
"""Methods that hold a matrix with a row and a column for each parameter."""
LARGEST = 5000
"""The largest number of parameters for a dense matrix, as for the rule `jaxsgd.newton`."""


class _Plan(NamedTuple):
    """What a compiled program depends on, beside the function and the shapes."""

    method: str
    has_aux: bool
    split: bool
    memory: int
    large: bool
    far: bool
    callback: Hashable


def minimize(
    fun: Callable[..., Any],
    params: Any,
    *,
    method: str = "lbfgs",
    args: tuple[Any, ...] = (),
    has_aux: bool = False,
    tol: float | None = None,
    max_iterations: int = 2000,
    max_evaluations: int | None = None,
    bounds: tuple[Any, Any] | None = None,
    memory: int | None = None,
    callback: Callable[[int, Any, float, float], None] | None = None,
) -> Result:
    """Find a local minimum of a smooth function of any pytree.

    It works inside `jax.jit`, `jax.vmap` (each member stops on its own) and `jax.lax.scan`. A program is compiled once
    for a function, a method and shapes: pass the same function object again, and data in ``args``. The result has
    derivatives, forward and reverse, with respect to ``args`` and closed-over arrays, by the implicit function theorem.
    Inside `jax.shard_map` every device minimizes a function of its own. Where ``fun`` ends in `jax.lax.pmean`, all
    minimize the same one.

    ============  ================================================  ============================
    method        direction                                         cost of a step beside ``fun``
    ============  ================================================  ============================
    lbfgs         inverse Hessian from the last ``memory`` steps     ``4 * memory * n``
    lbfgsb        the same inside bounds                             ``n * memory ** 2 + n log n``
    bfgs          inverse Hessian from all steps                     ``n ** 2``
    cg            nonlinear conjugate gradients (Hager & Zhang)      ``n``
    newton        Hessian, negative curvature turned positive        Hessian and ``n ** 3``
    trust_region  Hessian, exact step in a region of trust           Hessian and ``n ** 3``
    newton_cg     conjugate gradients in a region of trust           some products with the Hessian
    ============  ================================================  ============================

    The gradient decides convergence. At a saddle point where it is exactly zero, ``newton`` and ``trust_region`` see
    the negative curvature. The other methods stop there as if it were a minimum. Where two parameters begin alike and
    have the same role, gradients keep them alike, and may lead to a saddle point. So the first step of ``lbfgs``,
    ``lbfgsb``, ``bfgs`` and ``newton_cg`` is tilted: each entry is shortened by another share, up to 1%.

    Args:
      fun: ``fun(params, *args) -> value``, a scalar, or ``(value, aux)``.
      params: the start, a pytree of real floating-point arrays. With bounds it is moved inside them. Narrow floats are
        optimized in float32. Sharded arrays stay sharded with ``lbfgs`` and ``cg``. If an entry is above 2e7 in
        float32, or 9e15 in float64, a step of 1 is lost in its rounding. Then entries above 1 are measured in powers of
        two near their scales at the start, and ``tol`` is for gradients in these units.
      method: one of the above. Default: ``"lbfgs"``; with bounds ``"lbfgs"`` means ``"lbfgsb"``.
      args: further arguments of ``fun``: pytrees of arrays.
      has_aux: whether ``fun`` returns ``(value, aux)``. Default: False.
      tol: the gradient counts as zero if its largest entry is at most ``tol * min(1, max(abs(value), its first size))``
        and the model predicts a decrease of at most ``(tol / 10) ** 2 * max(abs(value), min(1, abs(first value)))``. A
        decrease that rounding of the value hides will do too. Default: 1e-6 in float64, 1e-5 in float32.
      max_iterations: the largest number of steps. Default: 2000.
      max_evaluations: the largest number of evaluations of the value and gradient. Default:
        ``3 * max_iterations + 100``.
      bounds: ``(lower, upper)``, each a number, None or a tree like ``params``. Methods with bounds: ``"lbfgsb"``.
      memory: the number of steps that ``lbfgs`` and ``lbfgsb`` remember. Default: 30; above 10,000
        parameters 10.
      callback: called on the host as ``callback(iteration, params, value, grad_norm)`` after each step. It may be
        called late, and each call copies the parameters to the host. Default: None.

    Returns:
      A `Result`: ``params, value, grad_norm, iterations, evaluations, status, aux``. Its ``str`` says why the solver
      ended. It is the best point that was accepted, and never NaN if the start is finite. Rounding of large parameters
      may hide the way down. So if an entry of the start is above 3e3 in float32, or 7e7 in float64, methods with a line
      search try a change in the last place before they end.

    Raises:
      TypeError: ``fun`` is no function or returns no scalar; a parameter is no real floating-point array; a limit is
        no whole number, a bound no real number.
      ValueError: unknown method; a start that is not finite or has no number; bounds crossed or of another structure;
        a limit or tolerance out of its range; a dense matrix for too many parameters.

    Source: Nocedal & Wright 2006, Numerical Optimization, chapters 3 to 7; Byrd, Lu, Nocedal & Zhu 1995,
    doi:10.1137/0916069.

    >>> import jax.numpy as jnp
    >>> def rosenbrock(x):
    ...     return 100 * (x[1] - x[0] ** 2) ** 2 + (1 - x[0]) ** 2
    >>> result = minimize(rosenbrock, jnp.array([-1.2, 1.0]))
    >>> result.success, bool(jnp.allclose(result.params, 1, atol=1e-2))
    (True, True)
    """
    check_args(args)
    check_fun(fun, "(params, *args) -> value", "fun", 1 + len(args))
    check_hash(fun, "(params, *args) -> value", "fun")
    method = _method(method, bounds)
    params, peaks = check_start(params)
    limits = None if bounds is None else check_bounds(bounds, params)
    if limits is not None:
        params = jax.tree.map(jnp.clip, params, *limits)
        peaks = [peak(x) for x in jax.tree.leaves(params)]
    size = sum(x.size for x in jax.tree.leaves(params))
    if method in DENSE and size > LARGEST:
        _refuse_size(method, size, widest(x.dtype for x in jax.tree.leaves(params)))
    if memory is None:
        memory = 30 if size <= 10_000 else 10
    for name, number in (("max_iterations", max_iterations), ("max_evaluations", max_evaluations), ("memory", memory)):
        if name != "max_evaluations" or number is not None:
            WholeFrom(1).check(f"{name}={number!r}", number)
    if callback is not None:
        form = "(iteration, params, value, grad_norm)"
        check_fun(callback, form, "callback", 4)
        check_hash(callback, form, "callback")
    dtype = widest(x.dtype for x in jax.tree.leaves(params))
    if tol is None:
        tol = 1e-6 if dtype == jnp.float64 else 1e-5
    elif not isinstance(tol, jax.Array) and (not isinstance(tol, Real) or isinstance(tol, bool) or not tol >= 0):
        raise ValueError(f"tol={tol!r}: a tolerance of 0 or more is needed. Use tol=1e-6, or None for the default")
    limit = 3 * max_iterations + 100 if max_evaluations is None else max_evaluations
    tolerance = tol.astype(dtype) if isinstance(tol, jax.Array) else np.asarray(tol, dtype)
    setting = Setting(tolerance, _whole(max_iterations), _whole(limit))
    split = method in ("lbfgs", "cg") and is_split(params)
    large, far = (any(x is None or bool(size(x)) for x in peaks) for size in (is_large, is_far))
    return _run(fun, _Plan(method, has_aux, split, int(memory), large, far, callback), params, limits, args, setting)


def _whole(x: Any) -> Any:
    """A whole number as int32; one beyond its range as the largest."""
    return x.astype(jnp.int32) if isinstance(x, jax.Array) else np.int32(min(x, np.iinfo(np.int32).max))


@partial(jax.jit, static_argnums=(0, 1))
def _run(fun: Any, plan: _Plan, params: Any, bounds: Any, args: Any, setting: Setting) -> Result:
    value_of = (lambda *given: fun(*given)[0]) if plan.has_aux else fun
    params, args, bounds, setting = own_problem(value_of, params, args, bounds, setting)
    pure, consts = hoist(fun, params, *args)
    _check_output(jax.eval_shape(pure, consts, params, *args), plan.has_aux)

    def valued(params: Any, data: Any) -> Any:
        consts, args, _ = data
        return pure(consts, params, *args)

    def solve(start: Any, bounds: Any, data: Any) -> Result:
        space = Space(start, plan.split)
        x = space.vector(start)

        def plain_value(x: Vector) -> jax.Array:
            out = valued(space.tree(x), data)
            return (out[0] if plan.has_aux else out).astype(space.dtype)

        units, extra = [jnp.ones_like(leaf) for leaf in x], 0
        if plan.far:
            far = extra = jnp.any(jnp.stack([jnp.any(is_far(leaf)) for leaf in x]))
            units = cond(far, lambda: start_units(x, *jax.value_and_grad(plain_value)(x)), lambda: units)

        def value(x: Vector) -> jax.Array:
            return plain_value(multiplied(x, units) if plan.far else x)

        plain = None if bounds is None else Limits(*map(space.vector, bounds))
        limits = None if plain is None else Limits(*(divided(side, units) for side in plain))

        def shown(x: Vector, g: Vector) -> tuple[Vector, jax.Array]:
            x, g = clipped(multiplied(x, units), plain), divided(g, units)
            return x, largest(g) if plain is None else projected(x, g, plain)

        end = _engine(plan, space, value, divided(x, units), data[2], shown, limits)
        out = space.tree(end.x)
        aux = valued(out, data)[1] if plan.has_aux else None
        return Result(out, end.f, end.grad_norm, end.iterations, end.evaluations + extra, end.code, aux)

    return differentiable(solve, valued, plan.has_aux)(params, bounds, (consts, args, setting))


def _engine(
    plan: _Plan, space: Space, value: Any, x: Vector, setting: Setting, shown: Shown, limits: Limits | None
) -> End:
    callback: Any = plan.callback

    def tell(stepped: Any, iteration: Any, x: Any, f: Any, grad_norm: Any) -> None:
        # In NumPy, for the host's thread may be without float64.
        if stepped:
            callback(int(iteration), space.tree(jax.tree.map(np.asarray, x)), float(f), float(grad_norm))

    told = None if callback is None else tell

    def value_and_grad(x: Vector, scale: jax.Array) -> tuple[jax.Array, Vector]:
        f, gradient = jax.vjp(value, x)
        return scale * f, gradient(varying(f, scale))[0]

    match plan.method:
        case "trust_region" | "newton_cg":
            return trust_region(value, x, setting, shown, exact=plan.method == "trust_region", callback=told)
        case "lbfgs":
            model: Any = LBFGS(plan.memory)
        case "lbfgsb":
            full = [jnp.full_like(x, -jnp.inf) for x in x], [jnp.full_like(x, jnp.inf) for x in x]
            limits = Limits(*full) if limits is None else limits
            model = LBFGSB(plan.memory, limits)
        case "bfgs":
            model = BFGS()
        case "cg":
            model = ConjugateGradient()
        case _:
            model = Newton(value)
    return descend(value_and_grad, x, model, setting, shown, limits, told, probes=plan.large)


# -- bad input -------------------------------------------------------------------------------------


def _method(method: Any, bounds: Any) -> str:
    if method not in METHODS:
        raise ValueError(f"method={method!r}{nearest(str(method), METHODS)}")
    if bounds is None:
        return method
    if method not in ("lbfgs", "lbfgsb"):
        raise ValueError(f"bounds: method={method!r} has no bounds. Use method='lbfgsb'")
    return "lbfgsb"


def _check_output(out: Any, has_aux: bool) -> None:
    if has_aux:
        if not isinstance(out, tuple) or len(out) != 2:
            raise TypeError("fun: with has_aux=True it returns (value, aux). Use has_aux=False for a value alone")
        out = out[0]
    elif isinstance(out, tuple):
        raise TypeError("fun returns a tuple, not a scalar. Use has_aux=True if it returns (value, aux)")
    if not hasattr(out, "shape") or len(jax.tree.leaves(out)) != 1:
        raise TypeError(f"fun returns a {type(out).__name__}, not a scalar. Use a function that returns one number")
    if out.shape:
        raise TypeError(
            f"fun returns an array of shape {out.shape}, not a scalar. "
            "Use jaxsgd.least_squares for residuals, or return a sum or a mean"
        )
    if not jnp.issubdtype(out.dtype, jnp.floating):
        raise TypeError(f"fun returns {out.dtype}, not a real floating-point number. Use a real loss")


def _refuse_size(method: str, size: int, dtype: Any) -> None:
    gib = size * size * jnp.dtype(dtype).itemsize / 2**30
    raise ValueError(
        f"method={method!r}: the Hessian of {size:,} parameters takes {gib:,.{0 if gib >= 10 else 1}f} GiB "
        f"in {jnp.dtype(dtype).name}; the limit is {LARGEST:,} parameters. Use method='newton_cg' or method='lbfgs'"
    )
