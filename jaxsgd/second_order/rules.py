"""Second-order rules in optax's protocol: L-BFGS, Newton, Newton-CG and Gauss-Newton.

They see the whole tree and evaluate the loss themselves: ``tx.update(grads, state, params, value=loss, grad=grads,
value_fn=fn)``, with ``fn(params) -> loss`` on the same batch. `jaxsgd.make_step` supplies these arguments.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from optax import lbfgs as optax_lbfgs

from jaxsgd.hyper import Bounds, is_constant
from jaxsgd.numerics import complex_with_real, strong, wide, wide_dtype, widest
from jaxsgd.paths import check_params, leaf_names, same_structure
from jaxsgd.second_order.batch_loss import split_loss
from jaxsgd.second_order.curvature import (
    Product,
    conjugate_gradients,
    dense_direction,
    dot,
    gauss_newton_product,
    hessian_product,
    plus,
)
from jaxsgd.second_order.loops import while_loop
from jaxsgd.second_order.tree_rule import Problem, TreeLift, TreeRule, tree_rule

__all__ = ["gauss_newton", "lbfgs", "newton", "newton_cg", "split_loss"]

Rate = float | jax.Array | Callable[[Any], Any]
ZOOM = optax.scale_by_zoom_linesearch(max_linesearch_steps=20, initial_guess_strategy="one")
"""The line search of `optax.lbfgs`."""


# -- L-BFGS ----------------------------------------------------------------------------------------


@tree_rule(needs=("value", "grad", "value_fn"))
def lbfgs(
    learning_rate: Rate | None = None,
    memory_size: int = 10,
    scale_init_precond: bool = True,
    linesearch: optax.GradientTransformation | None = ZOOM,
) -> optax.GradientTransformationExtraArgs:
    r"""L-BFGS (Liu & Nocedal 1989, doi:10.1007/BF01589116): $p \leftarrow p - \eta H_m g$.

    ``H_m`` is the inverse Hessian as the last m steps show it. The method is that of `optax.lbfgs`, with its call; the
    state of 16-bit parameters is float32 here. The line search evaluates the loss and its gradient several times a
    step. To minimize a function, use `jaxsgd.minimize`.

    Use it when the loss is smooth and every step sees the same full batch. Avoid it when each step sees another
    minibatch: its memory compares the gradients of successive steps.

    Args:
      learning_rate: the factor of the step before the line search: a number, a schedule of the 0-based step, or an
        array. Default: None, 1.
      memory_size: steps that are kept. The state takes ``2 * memory_size + 3`` times the bytes of the parameters.
        Default: 10.
      scale_init_precond: scale the first guess of the inverse Hessian by the last step. Default: True.
      linesearch: a line search, or None for none. Default: `optax.scale_by_zoom_linesearch` with 20 steps.

    Returns:
      A transformation; its update needs ``value``, ``grad`` and ``value_fn`` where it has a line search.

    >>> import jax, jax.numpy as jnp, optax
    >>> loss = lambda p: jnp.sum((p - 3.0) ** 2)
    >>> tx, p = lbfgs(), jnp.zeros(2)
    >>> state = tx.init(p)
    >>> for _ in range(3):
    ...     value, grad = jax.value_and_grad(loss)(p)
    ...     updates, state = tx.update(grad, state, p, value=value, grad=grad, value_fn=loss)
    ...     p = optax.apply_updates(p, updates)
    >>> [round(float(x), 3) for x in p]
    [3.0, 3.0]
    """
    inner = optax_lbfgs(learning_rate, memory_size, scale_init_precond, linesearch)

    def init(params: Any) -> Any:
        check_params(params)
        for name, leaf in zip(leaf_names(params), jax.tree.leaves(params), strict=True):
            if not jnp.issubdtype(jnp.result_type(leaf), jnp.inexact):
                raise ValueError(
                    f"params: {name!r} is {jnp.result_type(leaf).name}; parameters are floating or complex. "
                    "Use optax.partition to give it another rule"
                )
        if not jax.tree.leaves(params):  # optax's line search takes no empty tree
            return optax.EmptyState()
        whole = jax.tree.map(
            lambda x: jnp.zeros(x.shape, x.dtype) if isinstance(x, jax.ShapeDtypeStruct) else x, params
        )
        return jax.tree.map(strong, inner.init(jax.tree.map(wide, whole)))

    def update(updates: Any, state: Any, params: Any = None, **extra_args: Any) -> tuple[Any, Any]:
        if params is None:
            raise ValueError("params: lbfgs needs them: tx.update(grads, state, params, ...)")
        if not jax.tree.leaves(params):
            return updates, state
        given: dict[str, Any] = {}
        if linesearch is not None:
            for name in ("value", "grad", "value_fn"):
                if extra_args.get(name) is None:
                    raise ValueError(
                        f"{name}: the line search of lbfgs needs it. Use jaxsgd.make_step, or tx.update(grads, state, "
                        "params, value=loss, grad=grads, value_fn=fn) with fn(params) -> loss"
                    )
            same_structure(params, extra_args["grad"], "grad")
            value_fn = extra_args["value_fn"]
            scalar = widest(jnp.result_type(p) for p in jax.tree.leaves(params))

            def wide_fn(ps: Any, **more: Any) -> jax.Array:
                return jnp.asarray(value_fn(_like(ps, params), **more)).astype(scalar)

            given = {"value": jnp.asarray(extra_args["value"]).astype(scalar), "value_fn": wide_fn}
            given |= {"grad": _wide_like(extra_args["grad"], params)}
        grads, ps = _wide_like(updates, params), jax.tree.map(wide, params)
        with complex_with_real(grads):
            steps, after = inner.update(grads, state, ps, **{**extra_args, **given})
        return _like(steps, params), jax.tree.map(_as_before, after, state)

    return optax.GradientTransformationExtraArgs(init, update)


def _as_before(new: Any, old: Any) -> jax.Array:
    # Never weakly typed, which would compile the step twice.
    return jax.lax.convert_element_type(new, old.dtype)


def _like(tree: Any, params: Any) -> Any:
    return jax.tree.map(lambda x, p: x.astype(jnp.result_type(p)), tree, params)


def _wide_like(tree: Any, params: Any) -> Any:
    """Gradients in the dtypes that parameters are computed in."""
    return jax.tree.map(lambda g, p: jnp.asarray(g).astype(wide_dtype(jnp.result_type(p))), tree, params)


# -- Newton ----------------------------------------------------------------------------------------


@tree_rule(needs=("value_fn",), usual_rate=1.0)
def newton(
    learning_rate: Rate = 1.0, *, damping: Rate = 0.0, max_params: int = 5_000
) -> optax.GradientTransformationExtraArgs:
    r"""Newton's method, damped (Levenberg 1944, doi:10.1090/qam/10666): $p \leftarrow p - \eta (H + \lambda I)^{-1} g$.

    ``H`` is the dense Hessian of the loss over all parameters. Where ``H + damping`` is not positive definite, the
    magnitudes of H's eigenvalues stand for them, so that the step goes down (saddle-free Newton, Dauphin et al. 2014,
    arXiv:1406.2572). One step on a convex quadratic ends at its minimum.

    A full step may overshoot. A line search after it prevents this:
    ``optax.chain(jaxsgd.newton(), optax.scale_by_backtracking_linesearch(max_backtracking_steps=15))``.

    Use it when a model has at most some hundred parameters. Avoid it when it has more: the Hessian takes the square of
    their number in memory.

    Args:
      learning_rate: the factor of the step: a number, a schedule of the 0-based step, or an array. It is part of the
        state. Default: 1.
      damping: lambda, what is added to the Hessian's diagonal: a number, a schedule, or an array. Default: 0.
      max_params: the largest number of parameters. The Hessian takes its square in numbers, its decomposition
        the cube in operations. Default: 5,000, 95 MiB in float32.

    Returns:
      A transformation with a `jaxsgd.State`. Its update needs ``params`` and ``value_fn``. ``shared["rejected"]``
      counts the steps that were not taken, for the gradient or the Hessian was not finite; their updates are zeros.

    Raises:
      ValueError: ``learning_rate`` or ``damping`` is negative or not finite; in init, more than ``max_params``
        parameters, or integer or complex ones; in the update, ``value_fn`` is missing.

    >>> import jax, jax.numpy as jnp
    >>> loss = lambda p: (p["a"] - 1.0) ** 2 + 100.0 * (p["b"] - p["a"]) ** 2
    >>> tx, p = newton(), {"a": jnp.float32(0.0), "b": jnp.float32(5.0)}
    >>> updates, _ = tx.update(jax.grad(loss)(p), tx.init(p), p, value_fn=loss)
    >>> {name: round(float(p[name] + u), 4) for name, u in updates.items()}
    {'a': 1.0, 'b': 1.0}
    """
    hyper = {"learning_rate": learning_rate, "damping": damping}
    start = {"rejected": _zero}
    refuse = partial(_refuse_many, max_params)
    return TreeLift("newton", _newton, hyper, _shown(newton, locals()), (), start, refuse=refuse).transformation


def _newton(problem: Problem, hyper: Mapping[str, Any], slots: Any, shared: Mapping[str, Any]) -> Any:
    sizes = [x.size for x in problem.params]
    cuts = np.cumsum(sizes)[:-1].tolist()
    dtype = problem.dtype

    def flat(xs: list[jax.Array]) -> jax.Array:
        return jnp.concatenate([x.reshape(-1).astype(dtype) for x in xs])

    def apart(v: jax.Array) -> list[jax.Array]:
        parts = jnp.split(v, cuts)
        return [part.reshape(x.shape).astype(x.dtype) for part, x in zip(parts, problem.params, strict=True)]

    product = hessian_product(problem.value_fn, problem.params)
    rows = jnp.eye(sum(sizes), dtype=dtype)
    hessian = jax.lax.map(lambda row: flat(product(apart(row))), rows, batch_size=128)
    direction, good = dense_direction(hessian, flat(problem.grads), hyper["damping"])
    step = jnp.where(good, hyper["learning_rate"] * direction, 0)
    return apart(step), {}, {"rejected": shared["rejected"] + jnp.where(good, 0, 1)}


def _refuse_many(most: Any, params: Any) -> None:
    leaves = jax.tree.leaves(params)
    count = sum(int(np.prod(jnp.shape(x))) for x in leaves)
    if count > int(most):
        dtype = widest(jnp.result_type(x) for x in leaves)
        size = count * count * dtype.itemsize
        raise ValueError(
            f"params: {count:,} parameters have a dense Hessian of {_bytes(size)} in {dtype.name}; newton takes at "
            f"most max_params={int(most):,}. Use newton_cg, which needs no more than products with it"
        )


def _bytes(size: float) -> str:
    for unit in ("bytes", "KiB", "MiB"):
        if size < 1024:
            return f"{size:,.0f} {unit}"
        size /= 1024
    return f"{size:,.0f} GiB" if size >= 10 else f"{size:.1f} GiB"


# -- matrix-free -----------------------------------------------------------------------------------


@tree_rule(needs=("value_fn",), usual_rate=1.0)
def newton_cg(
    learning_rate: Rate = 1.0,
    *,
    damping: float = 1.0,
    cg_iterations: int = 50,
    cg_tol: float = 5e-4,
    warm_start: float = 0.95,
    backtracking_steps: int = 10,
) -> optax.GradientTransformationExtraArgs:
    r"""Hessian-free Newton (Martens 2010, ICML): $p \leftarrow p - \eta (H + \lambda I)^{-1} g$ by conjugate gradients.

    A product with the Hessian costs about two gradients; the Hessian is never formed. ``lambda`` follows the ratio of
    the loss's decrease to that of the quadratic model (Levenberg-Marquardt). Above 3/4 it shrinks by a third, below 1/4
    it grows by a half. CG starts at the last step's direction. At negative curvature it goes down along that direction
    and stops. The step is halved until the loss of the batch falls; if it does not, the updates are zeros and
    ``lambda`` grows by 4.

    For a model with a convex loss, `jaxsgd.gauss_newton` is usually better: its matrix has no negative curvature.
    Put L2 regularization into the loss, where the curvature sees it.

    Use it when batches are large and first-order rules need many steps. Avoid it when batches are small: the curvature
    of a small batch is mostly noise.

    Args:
      learning_rate: the factor of the step, see `newton`. Default: 1.
      damping: the first lambda. Later ones are ``shared["damping"]`` of the state. Default: 1.
      cg_iterations: the most products a step. Default: 50.
      cg_tol: CG stops when its last tenth of the iterations, at least 10, lowered the model by less than this share an
        iteration. Default: 5e-4.
      warm_start: the factor of the last direction where CG starts; 0 starts at zero. Default: 0.95.
      backtracking_steps: the most halvings of a step. Default: 10.

    Returns:
      A transformation with a `jaxsgd.State`. Its update needs ``params`` and ``value_fn``, and takes ``value``.
      ``shared`` has ``damping``, ``ratio``, ``cg_iterations`` of the last step, and ``rejected``, the number of steps
      not taken. `jaxsgd.metrics` reports them.

    Raises:
      ValueError: an argument out of its range; in init, integer or complex parameters; in the update, ``value_fn`` is
        missing.

    >>> import jax, jax.numpy as jnp, optax
    >>> loss = lambda p: (1 - p[0]) ** 2 + 100 * (p[1] - p[0] ** 2) ** 2
    >>> tx, p = newton_cg(damping=0.1), jnp.array([-1.2, 1.0])
    >>> state = tx.init(p)
    >>> for _ in range(50):
    ...     updates, state = tx.update(jax.grad(loss)(p), state, p, value_fn=loss)
    ...     p = optax.apply_updates(p, updates)
    >>> p.round(3).tolist()
    [1.0, 1.0]
    """
    return _matrix_free(newton_cg, _hessian, **locals())


@tree_rule(needs=("value_fn", "split_loss"), usual_rate=1.0)
def gauss_newton(
    learning_rate: Rate = 1.0,
    *,
    damping: float = 1.0,
    cg_iterations: int = 50,
    cg_tol: float = 5e-4,
    warm_start: float = 0.95,
    backtracking_steps: int = 10,
) -> optax.GradientTransformationExtraArgs:
    r"""Gauss-Newton (Schraudolph 2002, doi:10.1162/08997660260028683): $d = -(J^T H J + \lambda I)^{-1} g$.

    ``J`` is the Jacobian of the model's outputs, ``H`` the Hessian of the loss in the outputs. Where the loss is
    convex in the outputs, the matrix has no negative curvature. It is never formed: CG needs products, each of which
    costs about two gradients. Damping, warm start and backtracking are those of `newton_cg`.

    The loss has to be a `jaxsgd.split_loss`: ``make_step(split_loss(outputs_fn, loss), gauss_newton())``. By hand:
    ``tx.update(grads, state, params, value_fn=split_loss(outputs_fn, loss))`` with ``outputs_fn(params) -> outputs``
    and ``loss(outputs) -> loss``.

    Use it when the loss is convex in the model's outputs, as squares and cross-entropy are, and batches are large.
    Avoid it when batches are small, or when the loss cannot be written as a function of outputs.

    Args:
      learning_rate, damping, cg_iterations, cg_tol, warm_start, backtracking_steps: see `newton_cg`.

    Returns:
      A transformation with a `jaxsgd.State` like that of `newton_cg`.

    Raises:
      ValueError: an argument out of its range; in init, integer or complex parameters; in the update, ``value_fn``
        is missing or no `jaxsgd.split_loss`.

    >>> import jax, jax.numpy as jnp, optax
    >>> t = jnp.linspace(0.0, 1.0, 20)
    >>> squares = lambda y: jnp.mean((y - 2.0 * jnp.exp(-3.0 * t)) ** 2)
    >>> loss = split_loss(lambda p: p[0] * jnp.exp(-p[1] * t), squares)
    >>> tx, p = gauss_newton(damping=1e-2), jnp.array([1.0, 1.0])
    >>> state = tx.init(p)
    >>> for _ in range(20):
    ...     updates, state = tx.update(jax.grad(loss)(p), state, p, value_fn=loss)
    ...     p = optax.apply_updates(p, updates)
    >>> p.round(2).tolist()
    [2.0, 3.0]
    """
    return _matrix_free(gauss_newton, _generalized, **locals())


def _hessian(problem: Problem) -> Product:
    return hessian_product(problem.value_fn, problem.params)


def _generalized(problem: Problem) -> Product:
    assert problem.split is not None
    return gauss_newton_product(problem.split.outputs_fn, problem.split.loss, problem.params)


def _matrix_free(
    rule: TreeRule,
    product_of: Callable[[Problem], Product],
    *,
    learning_rate: Any,
    damping: Any,
    cg_iterations: Any,
    cg_tol: Any,
    warm_start: Any,
    backtracking_steps: Any,
) -> optax.GradientTransformationExtraArgs:
    name, shown = rule.name, _shown(rule, locals())
    for argument, value, domain in (
        ("damping", damping, Bounds(float(np.finfo(np.float32).tiny), np.inf, "it must be above 0")),
        ("cg_iterations", cg_iterations, Bounds(1, np.inf, "at least 1 is needed")),
        ("cg_tol", cg_tol, Bounds(0, 1, "it must lie in [0, 1)")),
        ("warm_start", warm_start, Bounds(0, np.nextafter(1, 2), "it must lie in [0, 1]")),
        ("backtracking_steps", backtracking_steps, Bounds(0, np.inf, "it must be 0 or more")),
    ):
        if callable(value):
            raise TypeError(f"{name}: {argument}={value!r}: a number is needed")
        domain.check(f"{name}: {argument}={value!r}", value)
        if argument in ("cg_iterations", "backtracking_steps") and is_constant(value) and value != int(value):
            raise ValueError(f"{name}: {argument}={value!r}: a whole number is needed")

    def solve(problem: Problem, hyper: Any, slots: Any, shared: Any) -> Any:
        start = [jnp.asarray(warm_start).astype(x.dtype) * x for x in slots["direction"]]
        product = product_of(problem)
        found = conjugate_gradients(product, problem.grads, shared["damping"], start, cg_iterations, cg_tol)
        step, ratio, taken = _accepted(problem, product, found.direction, hyper["learning_rate"], backtracking_steps)
        factor = jnp.where(taken, jnp.where(ratio > 0.75, 2 / 3, jnp.where(ratio < 0.25, 3 / 2, 1)), 4)
        eps = jnp.finfo(problem.dtype).eps
        scalars = {
            "damping": jnp.clip(shared["damping"] * factor, eps, 1 / eps),
            "ratio": ratio,
            "cg_iterations": found.iterations,
            "rejected": shared["rejected"] + jnp.where(taken, 0, 1),
        }
        # A direction that was no good is no place to start from.
        kept = [jnp.where(taken, x, jnp.zeros_like(x)) for x in found.direction]
        return (
            [jnp.where(taken, step.astype(x.dtype) * x, jnp.zeros_like(x)) for x in found.direction],
            {"direction": kept},
            scalars,
        )

    start = {"damping": lambda hyper: damping, "ratio": _one, "cg_iterations": _zero, "rejected": _zero}
    hyper = {"learning_rate": learning_rate}
    return TreeLift(name, solve, hyper, shown, ("direction",), start, "split_loss" in rule.needs).transformation


def _accepted(
    problem: Problem, product: Product, direction: list[jax.Array], rate: jax.Array, halvings: Any
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """The factor of the direction, the reduction ratio of the first trial, and whether a step is taken.

    Where the model predicts less than the rounding of the loss, the ratio is 0.5, which changes no damping.
    """
    value = problem.value()
    dtype = problem.dtype
    slope = dot(problem.grads, direction).astype(dtype)
    bend = dot(direction, product(direction)).astype(dtype)

    def trial(scale: jax.Array) -> jax.Array:
        return problem.value_fn(plus(problem.params, scale, direction))

    def noise(new: jax.Array) -> jax.Array:
        return problem.noise * jnp.maximum(jnp.abs(value), jnp.abs(new))

    def falls(scale: jax.Array, new: jax.Array) -> jax.Array:
        return new <= value + 1e-4 * scale * jnp.minimum(slope, 0) + noise(new)

    first = trial(rate)

    def shorter(carry: Any) -> Any:
        i, scale, _ = carry
        return i + 1, scale / 2, trial(scale / 2)

    def goes_on(carry: Any) -> jax.Array:
        i, scale, new = carry
        return (i < halvings) & ~falls(scale, new) & finite

    finite = jnp.isfinite(slope) & jnp.isfinite(bend) & jnp.isfinite(value)
    _, scale, new = while_loop(goes_on, shorter, (jnp.zeros((), jnp.int32), rate, first))
    predicted = rate * slope + rate * rate * bend / 2
    known = -predicted > noise(first)
    # Negative: the loss rose, or the model did not fall.
    ratio = jnp.where(jnp.isfinite(first), (first - value) / jnp.where(known, predicted, -1), -1)
    ratio = jnp.where(known | ~jnp.isfinite(first), ratio, 0.5)
    return scale, jnp.where(finite, ratio, -1), finite & falls(scale, new)


def _zero(hyper: Any) -> float:
    return 0.0


def _one(hyper: Any) -> float:
    return 1.0


def _shown(rule: Any, given: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments that are not the defaults, for ``repr``."""
    return {
        name: given[name]
        for name, default in rule.defaults.items()
        if not (is_constant(given[name]) and given[name] == default)
    }
