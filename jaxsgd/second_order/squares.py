"""Nonlinear least squares: fits of a model to data, compiled, batched by `jax.vmap`, and differentiable."""

from __future__ import annotations

import dataclasses
import functools
import weakref
from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxsgd.matrices import singular_vectors, triangle
from jaxsgd.numerics import widest
from jaxsgd.paths import nearest
from jaxsgd.second_order.implicit import differentiable
from jaxsgd.second_order.objective import Space, check_bounds, check_start, hoist, is_concrete
from jaxsgd.second_order.result import Result, Status
from jaxsgd.second_order.vectors import power_of_two

__all__ = ["least_squares"]

LOST = 1e-3
"""A parameter has lost its effect where its column of the Jacobian is below this share of its largest norm."""
TRIES = ((True, 100.0), (False, 1.0), (False, 0.1), (True, 0.1))
"""``(scaled, radius)`` of each try: whether columns of the Jacobian scale the parameters, and the first radius in
units of the length of the start. The first is MINPACK's."""
ACCURACY = {True: 0.1, False: 0.01}
"""How near the length of a step of ``"lm"`` comes to the radius, with scales (MINPACK) and without (SciPy's trf)."""
REVIVALS = ((True, 1.0), (False, 1.0))
"""The same of further tries, from the best end with parameters that have lost their effect where they have one."""
BENT = -1e-3
"""A negative curvature, as a share of its positive part and the length of the second derivative."""
WAYS = tuple(sign * 10.0**-i for i in range(4) for sign in (1, -1))
"""Steps that leave a saddle point, in units of the length of the point."""
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
    convergence or with a Jacobian that has lost its rank or the effect of a parameter. Where a parameter has no effect
    at the best end, up to two more tries begin there. They bring that parameter back to where it has one. From a saddle
    point, to which symmetric starts lead, tries go on along its negative curvature. The best end counts, and
    ``evaluations`` counts the residuals of all steps.

    - ``"lm"``: Levenberg-Marquardt in a trust region (Moré 1978, doi:10.1007/BFb0067700).
    - ``"dogleg"``: a trust region with a path of two pieces (Powell 1970). A step costs less.
    - ``"gauss_newton"``: full steps, shortened until the residuals shrink. For good starts and small residuals.

    With ``bounds`` every method solves its step for the parameters that are free. A parameter that the step would take
    out stays at its bound, and the others are solved for again. A step along the projected gradient replaces it where
    that predicts a larger decrease. Every residual is computed inside the bounds.

    Where the gradient is zero, the solver checks the curvature. The directions are the singular vectors of the
    Jacobian, single parameters, and sums of all with signs by chance. If it is negative and no further try finds a way
    down, the status is ``SADDLE_POINT``, which is no success. The check needs at least as many residuals as parameters.
    If a parameter has no effect at the end, but has one elsewhere, the status is ``FLAT``. That is no success either:
    the search may have left the data behind.

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
    if not callable(residual):
        raise TypeError(f"residual={residual!r}: it is no function. Use a function (params, *args) -> residuals")
    if method not in METHODS:
        raise ValueError(f"method={method!r}: known are {', '.join(METHODS)}{nearest(str(method), METHODS)}")
    if not isinstance(args, tuple):
        raise TypeError(f"args is a {type(args).__name__}. Use a tuple: args=(x, y)")
    start = check_start(params)
    limits = None if bounds is None else check_bounds(bounds, start)
    if limits is not None:
        start = jax.tree.map(jnp.clip, start, *limits)
    space = Space(start)
    if max_iterations is None:
        max_iterations = max(200, 100 * (space.size + 1))
    if isinstance(max_iterations, bool) or not isinstance(max_iterations, int | np.integer) or max_iterations < 0:
        raise ValueError(f"max_iterations={max_iterations!r}: a whole number from 0 is needed")
    if tol is not None and is_concrete(tol) and not 0 <= float(tol) < 1:
        raise ValueError(f"tol={tol!r}: it must lie in [0, 1)")
    eps = float(jnp.finfo(space.dtype).eps)
    tolerance = jnp.asarray(eps**0.5 if tol is None else tol, space.dtype)
    arrays = jax.tree.map(jnp.asarray, args)
    options = _Options(method, int(max_iterations), bool(has_aux), callback)

    pure = functools.partial(_residual, residual, has_aux)
    traced = not is_concrete((start, limits, arrays, tolerance))
    if traced or not _is_closed(residual, pure, start, arrays):
        fun, consts = hoist(pure, start, arrays)
        return _solve(fun, options, tolerance, start, limits, arrays, consts)
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


def _solve(
    fun: Callable[..., Any], options: _Options, tol: jax.Array, start: Any, limits: Any, arrays: Any, consts: Any
) -> Result:
    """The result, with its derivative in ``(arrays, consts)``."""

    def solver(start: Any, bounds: Any, data: Any) -> Result:
        arrays, consts, tol = data
        return _search(lambda p: fun(consts, p, arrays), options, tol, start, bounds)

    def value(params: Any, data: Any) -> tuple[jax.Array, Any]:
        arrays, consts, _ = data
        r, aux = fun(consts, params, arrays)
        return jnp.sum(r * r) / 2, aux

    result = differentiable(solver, value, has_aux=True)(start, limits, (arrays, consts, tol))
    return result


# -- the search ------------------------------------------------------------------------------------


class _State(NamedTuple):
    """A search in progress.

    Attributes:
      x, r, norm: the best point, its residuals and their norm.
      factor: R of ``[J | r] = QR``, at the best point.
      scale: units of the parameters: the largest norm so far of each column of the Jacobian, or 1.
      peak: the largest norm so far of each column.
      scaled: whether ``scale`` follows ``peak``.
      radius: of the trust region in scaled parameters; for Gauss-Newton the share of a full step.
      iterations, trials: accepted steps and trial steps.
      code: the status.
      failed: whether the last trial was not finite.
    """

    x: jax.Array
    r: jax.Array
    norm: jax.Array
    factor: jax.Array
    scale: jax.Array
    peak: jax.Array
    scaled: jax.Array
    radius: jax.Array
    iterations: jax.Array
    trials: jax.Array
    code: jax.Array
    failed: jax.Array


def _norm(x: jax.Array) -> jax.Array:
    """The Euclidean norm, without overflow of the squares."""
    largest = jnp.max(jnp.abs(x), initial=0)
    safe = jnp.where((largest > 0) & jnp.isfinite(largest), largest, 1)
    return jnp.where(jnp.isfinite(largest), safe * jnp.sqrt(jnp.sum((x / safe) ** 2)), largest)


class _Model(NamedTuple):
    """The linear model at a point: ``J / scale = Q U diag(s) V'``, and r in its range.

    Attributes:
      s: singular values, 0 where they are below rounding.
      vt: V'.
      c: ``U' Q' r``.
    """

    s: jax.Array
    vt: jax.Array
    c: jax.Array

    def step(self, shift: Any) -> jax.Array:
        """The scaled step that minimizes the model with ``shift`` times its squared length."""
        size = self.s * self.s + shift
        # Divided twice, so that no square of a condition number arises where shift is 0.
        inner = jnp.where(self.s > 0, self.c / jnp.where(self.s > 0, self.s, 1) * _share(self.s, shift, size), 0)
        return -(inner @ self.vt)


def _share(s: jax.Array, shift: Any, size: jax.Array) -> jax.Array:
    return jnp.where(shift > 0, s * s / jnp.where(size > 0, size, 1), 1)


def _model(factor: jax.Array, scale: jax.Array) -> _Model:
    n = scale.shape[0]
    r = factor[:, :n] / scale
    u, s, vt = singular_vectors(r)
    c = factor[:, n] @ u
    floor = max(factor.shape) * jnp.finfo(s.dtype).eps * jnp.max(s, initial=0)
    return _Model(jnp.where(s > floor, s, 0), vt, c)


def _lm(model: _Model, radius: jax.Array, accuracy: jax.Array) -> jax.Array:
    """The minimizer of the model in the trust region, to a share of the radius (Moré 1978)."""
    s, c = model.s, model.c
    s2 = s * s

    def length(shift: jax.Array) -> tuple[jax.Array, jax.Array]:
        size = jnp.where(s2 + shift > 0, s2 + shift, 1)
        z = jnp.where(s > 0, s * c / size, 0)
        norm = _norm(z)
        return norm, -jnp.sum(z * (z / size)) / jnp.where(norm > 0, norm, 1)

    full = _norm(jnp.where(s > 0, c / jnp.where(s > 0, s, 1), 0))
    upper = _norm(s * c) / radius
    tiny = jnp.finfo(s.dtype).tiny

    def body(carry: Any) -> Any:
        i, low, high, shift, _ = carry
        shift = jnp.where((shift <= low) | (shift >= high), jnp.maximum(1e-3 * high, jnp.sqrt(low * high)), shift)
        norm, slope = length(shift)
        miss = norm - radius
        low, high = jnp.where(miss > 0, shift, low), jnp.where(miss > 0, high, shift)
        # Newton's method on 1 / norm, which is nearly linear.
        after = shift - (miss / radius) * (norm / jnp.where(slope != 0, slope, -tiny))
        return i + 1, low, high, after, (shift, jnp.abs(miss) <= accuracy * radius)

    def goes_on(carry: Any) -> jax.Array:
        return (carry[0] < 30) & ~carry[4][1]

    zero = jnp.zeros_like(radius)
    inside = full <= (1 + accuracy) * radius
    start = (jnp.zeros((), jnp.int32), zero, upper, zero, (zero, inside))
    shift = jax.lax.while_loop(goes_on, body, start)[4][0]
    return model.step(shift)


def _dogleg(model: _Model, radius: jax.Array) -> jax.Array:
    """The point of Powell's path on the boundary, or the full step."""
    full = model.step(jnp.zeros_like(radius))
    g = model.s * model.c
    down, bend = jnp.sum(g * g), jnp.sum((model.s * g) ** 2)
    cauchy = -(down / jnp.where(bend > 0, bend, 1)) * (g @ model.vt)
    long, short = _norm(full), _norm(cauchy)
    # The point between both at which the length is the radius.
    d = full - cauchy
    a, b, c = jnp.sum(d * d), jnp.sum(d * cauchy), jnp.sum(cauchy * cauchy) - radius * radius
    root = jnp.sqrt(jnp.maximum(b * b - a * c, 0))
    t = jnp.where(b > 0, -c / jnp.where(b + root > 0, b + root, 1), (root - b) / jnp.where(a > 0, a, 1))
    bent = cauchy + jnp.clip(t, 0, 1) * d
    edge = jnp.where(short >= radius, cauchy * (radius / jnp.where(short > 0, short, 1)), bent)
    return jnp.where(long <= radius, full, edge)


def _gauss_newton(model: _Model, radius: jax.Array) -> jax.Array:
    return radius * model.step(jnp.zeros_like(radius))


def _step_of(method: str, scaled: jax.Array) -> Callable[[_Model, jax.Array], jax.Array]:
    """The step of a method, for a model and a radius."""
    if method == "lm":
        return functools.partial(_lm, accuracy=jnp.where(scaled, ACCURACY[True], ACCURACY[False]))
    return _dogleg if method == "dogleg" else _gauss_newton


class _Box(NamedTuple):
    """Lower and upper bounds as flat vectors."""

    lower: jax.Array
    upper: jax.Array

    def holds(self, x: jax.Array, gradient: jax.Array) -> jax.Array:
        """Which parameters are at a bound that the gradient pushes them against."""
        return ((x <= self.lower) & (gradient >= 0)) | ((x >= self.upper) & (gradient <= 0))


def _boxed_step(
    step_of: Callable[[_Model, jax.Array], jax.Array], s: _State, box: _Box, shrinks: bool
) -> tuple[jax.Array, jax.Array]:
    """The scaled step inside the bounds, and the point that it leads to.

    Args:
      step_of: the step of a model without bounds.
      s: the search.
      box: the bounds.
      shrinks: whether the radius is a length. Otherwise it is a share of the full step.
    """
    n = s.x.shape[0]
    j, c = s.factor[:, :n] / s.scale, s.factor[:, n]
    low, high = (box.lower - s.x) * s.scale, (box.upper - s.x) * s.scale
    gradient = c @ j
    held = box.holds(s.x, gradient)

    def body(carry: Any) -> Any:
        fixed, moved, _, _ = carry
        rest = c + j @ moved
        used = jnp.sum(moved * moved)
        radius = jnp.sqrt(jnp.maximum(s.radius**2 - used, 0.01 * s.radius**2)) if shrinks else s.radius
        model = _model(jnp.concatenate([jnp.where(fixed, 0, j), rest[:, None]], 1), jnp.ones_like(s.scale))
        step = jnp.where(fixed, moved, step_of(model, radius))
        out = ~fixed & ((step < low) | (step > high))
        step = jnp.clip(step, low, high)
        return fixed | out, jnp.where(fixed | out, step, 0), step, jnp.any(out)

    zero = jnp.zeros_like(s.x)
    # Each turn but the last fixes one parameter more, so that it ends.
    fixed, _, inward, _ = jax.lax.while_loop(lambda carry: carry[3], body, (held, zero, zero, jnp.ones((), bool)))
    down = jnp.where(held, 0, -gradient)
    square, bend = jnp.sum(down * down), jnp.sum((j @ down) ** 2)
    length = jnp.where(square > 0, jnp.sqrt(square), 1)
    full = square / jnp.where(bend > 0, bend, 1)
    far = jnp.minimum(full, s.radius / length) if shrinks else s.radius * full
    along = far * 0.25 ** jnp.arange(16, dtype=s.x.dtype)
    steps = jnp.concatenate([inward[None], jnp.clip(along[:, None] * down, low, high)])
    moved = steps @ j.T
    values = jnp.sum(moved * (moved + 2 * c), 1)
    best = steps[jnp.argmin(values)]
    if shrinks:
        best = jax.lax.cond(
            jnp.any(fixed), lambda: _refined(j, c, best, jnp.min(values), low, high, s.radius), lambda: best
        )
    x = jnp.clip(s.x + best / s.scale, box.lower, box.upper)
    # A parameter that reaches its bound is exactly there, whatever the rounding.
    return best, jnp.where(best <= low, box.lower, jnp.where(best >= high, box.upper, x))


def _refined(
    j: jax.Array, c: jax.Array, z: jax.Array, value: jax.Array, low: jax.Array, high: jax.Array, radius: jax.Array
) -> jax.Array:
    """A step inside the bounds that lowers the model further, with parameters that may leave a bound again.

    Each turn goes towards the model's minimum over the parameters that no bound holds, and bends at the bounds (Moré &
    Toraldo 1991, doi:10.1137/0801008). No entry is longer than the radius, spread over
    all entries, or than the longest of the first step.

    Args:
      j, c: the model ``|j z + c|^2``.
      z, value: a step inside the bounds, and ``|j z + c|^2 - |c|^2`` there.
      low, high: the bounds of the step.
      radius: of the trust region.
    """
    size = jnp.maximum(radius / len(z) ** 0.5, jnp.max(jnp.abs(z)))
    low, high = jnp.maximum(low, -size), jnp.minimum(high, size)
    shares = 0.5 ** jnp.arange(10, dtype=z.dtype)

    def body(carry: Any) -> Any:
        i, z, value, _ = carry
        rest = c + j @ z
        held = _Box(low, high).holds(z, rest @ j)
        model = _model(jnp.concatenate([jnp.where(held, 0, j), rest[:, None]], 1), jnp.ones_like(z))
        way = jnp.where(held, 0, model.step(jnp.zeros_like(radius)))
        steps = jnp.clip(z + shares[:, None] * way, low, high)
        moved = steps @ j.T
        values = jnp.sum(moved * (moved + 2 * c), 1)
        lowest = jnp.min(values)
        better = lowest < value
        z = jnp.where(better, steps[jnp.argmin(values)], z)
        return i + 1, z, jnp.minimum(value, lowest), lowest < value - 1e-3 * jnp.abs(value)

    begin = (jnp.zeros((), jnp.int32), z, value, jnp.ones((), bool))
    return jax.lax.while_loop(lambda carry: carry[3] & (carry[0] < len(z) + 5), body, begin)[1]


def _search(
    fun: Callable[[Any], tuple[jax.Array, Any]], options: _Options, tol: jax.Array, start: Any, bounds: Any
) -> Result:
    space = Space(start)
    (x,) = space.vector(start)
    box = None if bounds is None else _Box(*(space.vector(side)[0] for side in bounds))
    n, dtype = space.size, x.dtype
    eps = jnp.finfo(dtype).eps
    free = options.method != "gauss_newton"

    # In a power of two near their first norm: nothing is rounded, and units of residuals do not matter.
    r = fun(start)[0].astype(dtype)
    unit = power_of_two(_norm(r))
    r = r / unit

    def residuals(x: jax.Array) -> jax.Array:
        return fun(space.tree([x]))[0].astype(dtype) / unit

    count = len(r)
    jacobian = jax.jacfwd(residuals) if n <= count else jax.jacrev(residuals)

    def factored(x: jax.Array, r: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
        """R of ``[J | r]``, the norms of J's columns, and whether both are finite."""
        j = jacobian(x)
        good = jnp.all(jnp.isfinite(j)) & jnp.all(jnp.isfinite(r))
        # A decomposition of a matrix with an inf may never return.
        both = jnp.where(good, jnp.concatenate([j, r[:, None]], axis=1), 0)
        return triangle(both), jax.vmap(_norm, in_axes=1)(both[:, :n]), good

    def free_part(s: _State) -> jax.Array:
        """The factor without the columns of parameters that a bound holds."""
        if box is None:
            return s.factor
        held = box.holds(s.x, s.factor[:, n] @ s.factor[:, :n])
        return jnp.where(jnp.append(held, False), 0, s.factor)

    def angles(s: _State) -> tuple[_Model, jax.Array, jax.Array]:
        """The model in units of J's columns, the share of r that J explains, and the largest cosine of r and a column.

        Along directions that J hardly sees, rounding is all that it explains: the cosines do not see those.
        """
        factor = free_part(s)
        columns = jax.vmap(_norm, in_axes=1)(factor[:, :n])
        columns = jnp.where(columns > 0, columns, 1)
        model = _model(factor, columns)
        norm = jnp.where(s.norm > 0, s.norm, 1)
        cosine = jnp.max(jnp.abs((factor[:, n] / norm) @ (factor[:, :n] / columns)))
        return model, _norm(jnp.where(model.s > 0, model.c, 0)) / norm, cosine

    def deficient(factor: jax.Array, columns: jax.Array) -> jax.Array:
        """Whether the Jacobian, in units of its columns, has not the rank of its shape."""
        s = _model(factor, jnp.where(columns > 0, columns, 1)).s
        return s[min(n, count) - 1] <= eps**0.5 * s[0]

    def code_of(s: _State) -> jax.Array:
        """The status at a new point, from the unconstrained step."""
        model, explained, cosine = angles(s)
        columns = jax.vmap(_norm, in_axes=1)(free_part(s)[:, :n])
        small = _norm(model.step(jnp.zeros((), dtype))) <= eps ** (2 / 3) * _norm(columns * s.x)
        code = jnp.where(small, Status.CONVERGED_STEP, Status.RUNNING)
        code = jnp.where(s.norm <= eps * jnp.minimum(first, 1 / unit), Status.CONVERGED_VALUE, code)
        flat = ((explained <= tol) & (cosine <= jnp.sqrt(tol))) | (cosine <= 10 * eps)
        return jnp.where(flat, Status.CONVERGED_GRADIENT, code).astype(jnp.int32)

    first = _norm(r)
    zero = jnp.zeros((), jnp.int32)
    tries = TRIES + REVIVALS if n <= count else TRIES

    def begin(i: jax.Array, x: jax.Array, r: jax.Array) -> _State:
        factor, columns, good = factored(x, r)
        norm = _norm(r)
        good &= jnp.isfinite(norm)
        scaled = jnp.asarray([scaled for scaled, _ in tries])[i]
        scale = jnp.where(scaled & (columns > 0), columns, 1)
        far = _norm(scale * x)
        share = jnp.asarray([share for _, share in tries], dtype)[i]
        radius = share * jnp.where(far > 0, far, 1) if free else jnp.ones((), dtype)
        s = _State(x, r, norm, factor, scale, columns, scaled, radius, zero, zero, zero, jnp.zeros((), bool))
        return s._replace(code=jnp.where(good, code_of(s), Status.NOT_FINITE_START).astype(jnp.int32))

    def body(s: _State) -> _State:
        # In a power of two near the norm of the residuals: nothing is rounded, and no square leaves the range.
        near = power_of_two(s.norm)
        factor = s.factor / near
        step_of = _step_of(options.method, s.scaled)
        if box is None:
            step = step_of(_model(factor, s.scale), s.radius)
            x = s.x + step / s.scale
        else:
            step, x = _boxed_step(step_of, s._replace(factor=factor), box, free)
        length = _norm(step)
        r = residuals(x)
        norm = _norm(r)
        moved, rest = factor[:, :n] @ (step / s.scale), factor[:, n]
        # The relative decrease of the sum of squares: by the linear model, and in truth.
        squared = (s.norm / near) ** 2
        predicted = -jnp.sum(moved * (moved + 2 * rest)) / squared
        actual = jnp.where(norm < 10 * s.norm, (1 - norm / s.norm) * (1 + norm / s.norm), -1)
        actual = jnp.where(jnp.isfinite(norm), actual, -1)
        ratio = jnp.where(predicted > 0, actual / jnp.where(predicted > 0, predicted, 1), 0)
        wanted = (ratio >= 1e-4) & (norm < s.norm)
        factor, columns, good = jax.lax.cond(
            wanted, factored, lambda x, r: (s.factor, s.peak, jnp.zeros((), bool)), x, r
        )
        taken = wanted & good
        ratio = jnp.where(wanted & ~good, -1, ratio)
        if free:
            # A parabola through both values and the slope says where the minimum along the step is.
            slope = -jnp.sum(moved * rest) / squared
            shorter = jnp.where(actual >= 0, 0.5, 0.5 * slope / jnp.maximum(slope - actual / 2, eps))
            shorter = jnp.clip(jnp.where(jnp.isfinite(norm), shorter, 0.1), 0.1, 0.5)
            radius = jnp.where(s.trials == 0, jnp.minimum(s.radius, length), s.radius)
            grown = jnp.where(ratio >= 0.75, jnp.maximum(radius, 2 * length), radius)
            radius = jnp.where(ratio <= 0.25, shorter * jnp.minimum(radius, 10 * length), grown)
        else:
            radius = jnp.where(taken, jnp.ones((), dtype), s.radius / 4)
        new = _State(
            jnp.where(taken, x, s.x),
            jnp.where(taken, r, s.r),
            jnp.where(taken, norm, s.norm),
            jnp.where(taken, factor, s.factor),
            jnp.where(taken & s.scaled, jnp.maximum(s.scale, columns), s.scale),
            jnp.where(taken, jnp.maximum(s.peak, columns), s.peak),
            s.scaled,
            radius,
            s.iterations + taken,
            s.trials + 1,
            s.code,
            ~jnp.isfinite(norm) | (wanted & ~good),
        )
        after = jnp.where(taken, code_of(new), Status.RUNNING)
        _, explained, cosine = angles(s)
        # The linear model predicts next to nothing: rounding hides what is left to gain.
        level = (explained <= eps**0.375) & (cosine <= eps**0.25) | (cosine <= eps**0.375)
        level &= ~new.failed
        least = eps * _norm(s.scale * s.x) if free else eps
        stuck = jnp.where(new.failed, Status.NOT_FINITE, Status.STEP_TOO_SMALL)
        stuck = jnp.where(level, Status.CONVERGED_VALUE, stuck)
        ends = ~taken & ((new.radius <= least) | (level & (jnp.abs(actual) <= 10 * eps)))
        new = new._replace(code=jnp.where(ends, stuck, after).astype(jnp.int32))
        if options.callback is not None:
            jax.debug.callback(options.callback, _result(new))
        return new

    def curved(s: _State) -> tuple[jax.Array, jax.Array]:
        """Directions in units of J's columns, and the curvature of the sum of squares along each, at least -1.

        Residuals along ``v`` are ``r + t J v + t^2 r''(v, v) / 2``: the curvature is ``|J v|^2 + r' r''(v, v)``.
        """
        factor = free_part(s)
        columns = jax.vmap(_norm, in_axes=1)(factor[:, :n])
        # Where J vanishes all directions are alike: single parameters, and all with signs by chance, whose products
        # may be what bends.
        signs = jax.random.rademacher(jax.random.key(0), (n, n), dtype) / n**0.5
        both = jnp.concatenate([_model(factor, jnp.where(columns > 0, columns, 1)).vt, jnp.eye(n, dtype=dtype), signs])
        both = both / jnp.where(columns > 0, columns, 1)
        if box is not None:
            both = jnp.where(box.holds(s.x, s.factor[:, n] @ s.factor[:, :n]), 0, both)

        def along(v: jax.Array) -> jax.Array:
            def slope(x: jax.Array) -> jax.Array:
                return jax.jvp(residuals, (x,), (v,))[1]

            first, second = jax.jvp(slope, (s.x,), (v,))
            first, second, r = first / s.norm, second / s.norm, s.r / s.norm
            convex, other = jnp.sum(first * first), jnp.sum(r * second)
            size = convex + _norm(second)
            return (convex + other) / jnp.where(size > 0, size, 1)

        return both, jax.vmap(along)(both)

    def named(s: _State) -> _State:
        """The end of a try, with the name of a saddle point where it is one."""
        if n > count:
            return s  # J may come from a function with reverse mode alone, and there are many directions
        saddle = jax.lax.cond(
            s.code == Status.CONVERGED_GRADIENT, lambda: jnp.any(curved(s)[1] < BENT), lambda: jnp.zeros((), bool)
        )
        return s._replace(code=jnp.where(saddle, Status.SADDLE_POINT, s.code).astype(jnp.int32))

    def downhill(s: _State) -> tuple[jax.Array, jax.Array]:
        """The best of some points along the direction of the most negative curvature, and the residuals there."""
        ways, curvature = curved(s)
        # Signs by chance are the last resort.
        chosen = (curvature < BENT) & (jnp.arange(len(ways)) < len(ways) - n)
        way = ways[jnp.argmin(jnp.where(chosen, curvature - 1, curvature))]
        columns = jax.vmap(_norm, in_axes=1)(s.factor[:, :n])
        far = _norm(jnp.where(columns > 0, columns, 1) * s.x)
        points = s.x + jnp.where(far > 0, far, 1) * jnp.asarray(WAYS, dtype)[:, None] * way
        if box is not None:
            points = jnp.clip(points, box.lower, box.upper)
        norms = jax.vmap(lambda point: _norm(residuals(point)))(points)
        x = points[jnp.argmin(jnp.where(jnp.isfinite(norms), norms, jnp.inf))]
        return x, residuals(x)

    def _result(s: _State) -> Result:
        gradient = s.factor[:, :n].T @ s.factor[:, n] * unit * unit
        if box is not None:
            gradient = jnp.clip(gradient, s.x - box.upper, s.x - box.lower)
        value = (s.norm * unit) ** 2 / 2
        params = space.tree([s.x])
        return Result(params, value, jnp.max(jnp.abs(gradient)), s.iterations, s.trials + 1, s.code, None)

    def search(s: _State, most: jax.Array) -> _State:
        s = jax.lax.while_loop(lambda s: (s.code == Status.RUNNING) & (s.trials < most), body, s)
        return s._replace(code=jnp.where(s.code == Status.RUNNING, Status.ITERATION_LIMIT, s.code).astype(jnp.int32))

    def sizes(s: _State) -> jax.Array:
        """The size of each parameter; where it began at zero, at least 1."""
        return jnp.maximum(jnp.abs(s.x), jnp.where(x == 0, 1, jnp.abs(x)))

    def dead(s: _State) -> jax.Array:
        """Parameters that could double without an effect on the residuals, by the Jacobian."""
        columns = jax.vmap(_norm, in_axes=1)(s.factor[:, :n])
        return (columns * sizes(s) <= eps**0.5 * s.norm) & (s.norm > eps**0.5 * first)

    def doubtful(i: jax.Array, s: _State) -> jax.Array:
        """Whether another try may find a better end than the best of ``i`` tries."""
        columns = jax.vmap(_norm, in_axes=1)(s.factor[:, :n])
        lost = jnp.any(columns <= LOST * jnp.where(s.peak > 0, s.peak, 1)) | deficient(s.factor, columns)
        lost &= (s.norm > eps**0.5 * first) & (i == 1)
        failed = (s.code > Status.CONVERGED_STEP) & (s.code != Status.NOT_FINITE_START)
        idle = jnp.any(dead(s))
        return jnp.where(i < len(TRIES), failed | lost | idle, idle | (s.code == Status.SADDLE_POINT))

    def another(carry: Any) -> Any:
        i, best, left, trials, iterations = carry
        place, there = x, r
        if n <= count:
            # From a saddle point every region leads back, if the start is symmetric.
            way = jnp.where(best.code == Status.SADDLE_POINT, 2, jnp.where(i < len(TRIES), 0, 1))
            roads = [lambda best: (x, r), revived, downhill]
            place, there = jax.lax.switch(way, roads, best)
        s = named(search(begin(i, place, there), left))
        level = jnp.where(best.code <= Status.CONVERGED_STEP, 0.999 * best.norm, best.norm)
        better = (i == 0) | (s.norm < level) | ((s.norm == level) & (s.code <= Status.CONVERGED_STEP))
        best = jax.tree.map(lambda a, b: jnp.where(better, a, b), s, best)
        # The tries after the first share as many steps as the first may take.
        left = jnp.where(i == 0, left, left - s.trials)
        return i + 1, best, left, trials + s.trials, iterations + s.iterations

    def goes_on(carry: Any) -> jax.Array:
        i, best, left, _, _ = carry
        return (i == 0) | ((i < (len(tries) if free else 1)) & (left > 0) & doubtful(i, best))

    def elsewhere(s: _State, i: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
        """Other places of parameter ``i``, the norms of the residuals there, and where it changes them."""
        at, one = s.x[i], jnp.ones((), dtype)
        places = jnp.stack([x[i], *(at * share for share in (0.5, 0.1, 1e-3, 0, -1)), one, -one])
        if box is not None:
            places = jnp.clip(places, box.lower[i], box.upper[i])
        norms = jax.vmap(lambda place: _norm(residuals(s.x.at[i].set(place))))(places)
        return places, norms, ~(jnp.abs(norms - s.norm) <= 1e-4 * s.norm)

    def revived(s: _State) -> tuple[jax.Array, jax.Array]:
        """The point with each dead parameter at the best place where it has an effect, and the residuals there."""

        def place(i: jax.Array) -> jax.Array:
            places, norms, moves = elsewhere(s, i)
            usable = moves & jnp.isfinite(norms)
            return jnp.where(jnp.any(usable), places[jnp.argmin(jnp.where(usable, norms, jnp.inf))], s.x[i])

        x = jnp.where(dead(s), jax.lax.map(place, jnp.arange(n)), s.x)
        return x, residuals(x)

    def flat(s: _State, i: jax.Array) -> jax.Array:
        """Whether parameter ``i`` has no curvature here either, and changes the residuals elsewhere."""
        way = jnp.zeros_like(x).at[i].set(sizes(s)[i])
        second = jax.jvp(lambda x: jax.jvp(residuals, (x,), (way,))[1], (s.x,), (way,))[1]
        straight = _norm(second) <= eps**0.5 * s.norm
        return straight & jnp.any(elsewhere(s, i)[2])

    budget = jnp.asarray(options.max_iterations, jnp.int32)
    blank = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), jax.eval_shape(begin, zero, x, r))
    carry = jax.lax.while_loop(goes_on, another, (zero, blank, budget, zero, zero))
    s = carry[1]._replace(trials=carry[3], iterations=carry[4])
    if n <= count:
        idle = dead(s) & (s.code <= Status.CONVERGED_STEP)
        if box is not None:
            idle &= (s.x > box.lower) & (s.x < box.upper)
        left = jax.lax.cond(
            jnp.any(idle),
            lambda: jnp.any(idle & jax.lax.map(functools.partial(flat, s), jnp.arange(n))),
            lambda: jnp.zeros((), bool),
        )
        s = s._replace(code=jnp.where(left, Status.FLAT, s.code).astype(jnp.int32))
    result = _result(s)
    return dataclasses.replace(result, aux=fun(result.params)[1])
