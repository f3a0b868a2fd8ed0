"""Derivatives of a minimizer with respect to the data of its problem, by the implicit function theorem."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxsgd.matrices import eigenvectors
from jaxsgd.second_order.loops import varying
from jaxsgd.second_order.objective import Space
from jaxsgd.second_order.result import Result
from jaxsgd.second_order.vectors import divided, far_units, multiplied

__all__ = ["differentiable"]

DENSE = 256
"""Up to this number of parameters the Hessian is built and inverted; beyond it, conjugate gradients solve."""


def _free(x: jax.Array, bounds: Any) -> jax.Array:
    """Where a parameter is strictly inside its bounds."""
    return jnp.ones_like(x, bool) if bounds is None else (x > bounds[0]) & (x < bounds[1])


def _solver(size: int) -> Callable[[Any, jax.Array], jax.Array]:
    def dense(matvec: Any, b: jax.Array) -> jax.Array:
        matrix = jax.vmap(matvec)(jnp.eye(size, dtype=b.dtype))
        # eigh must see finite numbers only; a pseudo-inverse leaves directions without curvature where they are.
        matrix = jnp.where(jnp.all(jnp.isfinite(matrix)), (matrix + matrix.T) / 2, jnp.eye(size, dtype=b.dtype))
        values, vectors = eigenvectors(matrix)
        floor = size * jnp.finfo(b.dtype).eps * jnp.max(jnp.abs(values))
        inverse = jnp.where(jnp.abs(values) > floor, 1 / jnp.where(values == 0, 1, values), 0)
        return vectors @ (inverse * (b @ vectors))

    def iterative(matvec: Any, b: jax.Array) -> jax.Array:
        tol = float(np.sqrt(jnp.finfo(b.dtype).eps)) / 100
        return jax.scipy.sparse.linalg.cg(matvec, b, tol=tol, maxiter=10 * size)[0]

    return dense if size <= DENSE else iterative


def differentiable(
    solve: Callable[[Any, Any, Any], Result], fun: Callable[[Any, Any], Any], has_aux: bool = False
) -> Callable[[Any, Any, Any], Result]:
    """``solve`` with derivatives of the minimizer, the value and the aux with respect to the data.

    At a minimum the gradient of ``fun`` in the parameters is zero for all data, so that the minimizer moves by
    ``-H^-1 dg`` (Blondel et al. 2022, arXiv:2105.15183). It has forward and reverse mode, of first order.
    Parameters at a bound move with the bound. The start has no influence.

    Args:
      solve: ``(start, bounds, data) -> Result``. It may close over no tracer: pass arrays in ``data``, see
        `jaxsgd.second_order.objective.hoist`.
      fun: ``(params, data) -> value``, or ``(value, aux)``.
      has_aux: whether ``fun`` returns an aux. Default: False.

    Returns:
      A function of ``(start, bounds, data)``; ``bounds`` is None or ``(lower, upper)`` with the params' structure.
    """

    @jax.custom_jvp
    def call(start: Any, bounds: Any, data: Any) -> Result:
        return solve(start, bounds, data)

    @call.defjvp
    def rule(primals: Any, tangents: Any) -> tuple[Result, Result]:
        (start, bounds, data), (_, dbounds, ddata) = primals, tangents
        result = call(start, bounds, data)
        space = Space(result.params)
        x = space.vector(result.params)
        units = far_units(x)  # the Hessian of large parameters is small
        limits = None if bounds is None else tuple(space.vector(side)[0] for side in bounds)
        free = _free(x[0], limits)

        def full(x: jax.Array, data: Any) -> Any:
            return fun(space.tree(multiplied([x], units)), data)

        def value(x: jax.Array, data: Any) -> Any:
            out = full(x, data)
            return (out[0] if has_aux else out).astype(x.dtype)

        gradient = jax.grad(value)
        moved = jnp.zeros_like(x[0])
        if limits is not None:
            lower, upper = (space.vector(side)[0] for side in dbounds)
            moved = jnp.where(free, 0, jnp.where(x[0] <= limits[0], lower, upper))
        [x], [moved] = divided(x, units), divided([moved], units)
        _, changed = jax.jvp(gradient, (x, data), (moved, ddata))

        def product(v: jax.Array) -> jax.Array:
            bent = jax.jvp(lambda x: gradient(x, data), (x,), (jnp.where(free, v, 0),))[1]
            return jnp.where(free, bent, v)

        wanted = jnp.where(free, -changed, 0)
        inner = jax.lax.custom_linear_solve(product, wanted, _solver(space.size), symmetric=True)
        dx = inner + moved
        slope = jax.jvp(value, (x, data), (dx, ddata))[1]
        daux = result.aux
        if has_aux:
            _, (_, daux) = jax.jvp(full, (x, data), (dx, ddata))
        still = jax.tree.map(_zero, replace(result, params=None, value=None, aux=None))
        dparams = space.tree(multiplied([dx], units))
        return result, replace(still, params=dparams, value=slope.astype(result.value.dtype), aux=daux)

    return call


def _zero(x: jax.Array) -> Any:
    if jnp.issubdtype(x.dtype, jnp.inexact):
        return jnp.zeros_like(x)
    return varying(x, np.zeros(x.shape, jax.dtypes.float0))
