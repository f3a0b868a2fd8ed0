"""The largest and smallest eigenvalues of a Hessian, from its products with vectors.

This is the Lanczos iteration with full reorthogonalisation and thick restarts (Wu & Simon 2000,
doi:10.1137/S0895479898334605). The Hessian is never formed. Its product with a vector is a forward derivative of the
gradient (Pearlmutter 1994, doi:10.1162/neco.1994.6.1.147). One compiled program makes all steps.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxsgd.ensemble.losses import pure_loss
from jaxsgd.numerics import wide, wide_dtype, widest
from jaxsgd.progress import Bar
from jaxsgd.train_state import TrainState

__all__ = ["Curvature", "Spectrum", "spectrum"]

CHUNK = 8
"""Steps between two checks of the residuals."""
MEMORY = 2**30
"""Bytes for the vectors of the iteration, unless that leaves too few of them."""


@dataclass(frozen=True)
class Spectrum:
    """The largest and smallest eigenvalues of a symmetric matrix.

    Attributes:
      eigenvalues: the largest, descending.
      residuals: for each, the norm of ``A v - eigenvalue v`` from the iteration. The matrix has an eigenvalue within
        that distance, up to rounding.
      smallest, smallest_residual: the smallest eigenvalue and its residual.
      converged: whether all residuals are at most the tolerance times the largest eigenvalue's magnitude.
      iterations: products of the matrix with a vector.
      size: the number of rows.
      rounding: a bound of the error by rounding alone.
    """

    eigenvalues: tuple[float, ...]
    residuals: tuple[float, ...]
    smallest: float
    smallest_residual: float
    converged: bool
    iterations: int
    size: int
    rounding: float

    @property
    def largest(self) -> float:
        return self.eigenvalues[0]

    @property
    def negative(self) -> bool:
        """Whether the smallest eigenvalue is below zero by more than its residual and rounding."""
        return self.smallest < -(self.smallest_residual + self.rounding)

    def transformed(self, scale: float, shift: float) -> Spectrum:
        """The spectrum of ``scale * (A + shift)``, ``scale`` above 0."""
        return Spectrum(
            tuple(scale * (x + shift) for x in self.eigenvalues),
            tuple(scale * r for r in self.residuals),
            scale * (self.smallest + shift),
            scale * self.smallest_residual,
            self.converged,
            self.iterations,
            self.size,
            scale * self.rounding,
        )


@dataclass(frozen=True)
class _Problem:
    """The static parts of a loss at a point. It is hashable: the same problem at another point compiles nothing."""

    loss_fn: Callable[..., Any]
    graphdef: Any
    treedef: Any
    trained: tuple[bool, ...]
    several: bool

    def point(self, arrays: dict[str, Any]) -> jax.Array:
        """The trained parameters as one vector."""
        leaves = [wide(p).ravel() for p, t in zip(arrays["params"], self.trained, strict=True) if t]
        dtype = widest(x.dtype for x in leaves)
        return jnp.concatenate([x.astype(dtype) for x in leaves])

    def loss(self, arrays: dict[str, Any], x: jax.Array, batch: Any, key: jax.Array) -> jax.Array:
        """The loss of one batch as a function of that vector; 16-bit parameters are float32."""
        leaves, at = [], 0
        for p, trained in zip(arrays["params"], self.trained, strict=True):
            if trained:
                size = math.prod(p.shape)
                leaves.append(x[at : at + size].reshape(p.shape).astype(wide_dtype(p.dtype)))
                at += size
            else:
                leaves.append(wide(p) if jnp.issubdtype(p.dtype, jnp.inexact) else p)
        params = self.treedef.unflatten(leaves)
        none: Any = None
        state = TrainState(none, params, none, none, arrays["model_state"], self.graphdef)
        fn, params = pure_loss(self.loss_fn, state)
        return fn(params, batch, key).astype(x.dtype)

    def mean(self, arrays: dict[str, Any], fn: Callable[[Callable[[jax.Array], jax.Array]], Any]) -> Any:
        """The mean of ``fn(loss)`` over the losses of the batches."""
        batch, key = arrays["batch"], arrays["key"]
        if not self.several:
            return fn(lambda x: self.loss(arrays, x, batch, key))
        count = jax.tree.leaves(batch)[0].shape[0]

        def one(inputs: Any) -> Any:
            i, own = inputs
            return fn(lambda x: self.loss(arrays, x, own, jax.random.fold_in(key, i)))

        numbers = jnp.arange(count)
        shapes = jax.eval_shape(one, jax.tree.map(lambda x: x[0], (numbers, batch)))
        zeros = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), shapes)
        add = lambda total, inputs: (jax.tree.map(jnp.add, total, one(inputs)), None)  # noqa: E731
        total, _ = jax.lax.scan(add, zeros, (numbers, batch))
        return jax.tree.map(lambda x: x / count, total)


@functools.partial(jax.jit, static_argnums=0)
def _value_and_gradient(problem: _Problem, arrays: dict[str, Any]) -> tuple[jax.Array, jax.Array]:
    x = problem.point(arrays)
    with jax.default_matmul_precision("highest"):
        return problem.mean(arrays, lambda loss: jax.value_and_grad(loss)(x))


def _orthogonal(basis: jax.Array, w: jax.Array) -> tuple[jax.Array, jax.Array]:
    """``w`` without its part in the span of the rows of ``basis``, and the coefficients of that part."""
    coefficients = jnp.zeros((basis.shape[0],), basis.dtype)
    for _ in range(2):  # once leaves a remainder where most of w cancels
        part = basis @ w
        w = w - part @ basis
        coefficients = coefficients + part
    return w, coefficients


@functools.partial(jax.jit, static_argnums=0, donate_argnums=(1, 2))
def _advance(
    problem: _Problem, basis: jax.Array, matrix: jax.Array, first: jax.Array, last: jax.Array, arrays: dict[str, Any],
    scale: jax.Array, shift: jax.Array, seed: jax.Array,
) -> tuple[jax.Array, jax.Array]:  # fmt: skip
    """Steps ``first`` to ``last``: rows of ``basis``, columns of the matrix in that basis."""
    x, size = problem.point(arrays), basis.shape[1]
    tiny = 30 * jnp.finfo(basis.dtype).eps

    def times(v: jax.Array) -> jax.Array:
        v = scale * v
        hv = problem.mean(arrays, lambda loss: jax.jvp(jax.grad(loss), (x,), (v,))[1])
        return scale * (hv + shift * v)

    def step(j: jax.Array, carry: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        basis, matrix = carry
        w, column = _orthogonal(basis, times(basis[j]))
        beta = jnp.sqrt(jnp.sum(w * w))
        # A zero remainder: the rows span an invariant subspace. Continue with a random direction.
        known = jnp.maximum(jnp.max(jnp.abs(matrix)), jnp.max(jnp.abs(column)))
        broken = beta <= tiny * known
        other, _ = _orthogonal(basis, jax.random.normal(jax.random.fold_in(seed, j), w.shape, w.dtype))
        w = jnp.where(broken, other, w)
        length = jnp.sqrt(jnp.sum(w * w))
        w = w / jnp.where(length > 0, length, 1)
        w, _ = _orthogonal(basis, w)
        whole = j + 1 >= size
        basis = basis.at[j + 1].set(jnp.where(whole, 0, w))
        matrix = matrix.at[:, j].set(column)
        return basis, matrix.at[j + 1, j].set(jnp.where(broken | whole, 0, beta))

    with jax.default_matmul_precision("highest"):
        return jax.lax.fori_loop(first, last, step, (basis, matrix))


@jax.jit
def _combined(mix: jax.Array, basis: jax.Array, kept: jax.Array, end: jax.Array) -> jax.Array:
    """The basis after a restart: ``kept`` combinations of the old rows, then the row at ``end``."""
    with jax.default_matmul_precision("highest"):
        rows = mix @ basis
    return jax.lax.dynamic_update_index_in_dim(rows, basis[end], kept, 0)


@dataclass(frozen=True)
class Curvature:
    """A loss at a point, ready for products with its Hessian.

    Attributes:
      problem: the static parts.
      arrays: parameters, model state, batch, key.
      names: the names of all parameters.
    """

    problem: _Problem
    arrays: dict[str, Any]
    names: tuple[str, ...]

    @classmethod
    def of(
        cls, loss_fn: Any, graphdef: Any, params: Any, model_state: Any, batch: Any, several: bool, key: Any,
        names: tuple[str, ...],
    ) -> Curvature:  # fmt: skip
        leaves, treedef = jax.tree.flatten(params)
        leaves = [jnp.asarray(p) for p in leaves]
        trained = tuple(not jnp.issubdtype(p.dtype, jnp.integer) and p.dtype != bool for p in leaves)
        arrays = {"params": leaves, "model_state": model_state, "batch": batch, "key": key}
        return cls(_Problem(loss_fn, graphdef, treedef, trained, several), arrays, names)

    def only(self, trained: tuple[bool, ...]) -> Curvature:
        """The same with the other leaves constant."""
        return Curvature(dataclasses.replace(self.problem, trained=trained), self.arrays, self.names)

    @property
    def size(self) -> int:
        pairs = zip(self.arrays["params"], self.problem.trained, strict=True)
        return sum(math.prod(p.shape) for p, trained in pairs if trained)

    @property
    def dtype(self) -> Any:
        pairs = zip(self.arrays["params"], self.problem.trained, strict=True)
        return widest(p.dtype for p, trained in pairs if trained)

    def value_and_gradient(self) -> tuple[jax.Array, jax.Array]:
        """The loss and its gradient as a vector."""
        return _value_and_gradient(self.problem, self.arrays)


def spectrum(
    curvature: Curvature, wanted: int, iterations: int, tolerance: float, key: jax.Array, bar: Bar,
    scale: Any = 1.0, shift: Any = 0.0,
) -> Spectrum:  # fmt: skip
    """The ``wanted`` largest eigenvalues of ``S (H + D) S`` and its smallest.

    Args:
      curvature: the Hessian H.
      wanted: the number of largest eigenvalues.
      iterations: the largest number of products.
      tolerance: the residuals to reach, as a share of the largest magnitude.
      key: the PRNG key of the first vector.
      bar: a progress bar.
      scale, shift: the diagonals S and D. Default: 1 and 0.

    Raises:
      ValueError: a product is not finite.
    """
    size, dtype = curvature.size, curvature.dtype
    wanted = min(wanted, size)
    room = min(size, max(4 * wanted + 8, min(64, MEMORY // (size * dtype.itemsize))), max(iterations, 1))
    first_key, seed = jax.random.split(key)
    start = jax.random.normal(first_key, (size,), dtype)
    basis = jnp.zeros((room + 1, size), dtype).at[0].set(start / jnp.sqrt(jnp.sum(start * start)))
    matrix = jnp.zeros((room + 1, room + 1), dtype)
    diagonals = [jnp.broadcast_to(jnp.asarray(x, dtype), (size,)) for x in (scale, shift)]
    at = spent = 0
    enough = min(size, 3 * CHUNK, room)
    eps = float(jnp.finfo(dtype).eps)
    while True:
        stop = min(at + CHUNK, room, at + iterations - spent)
        seed, own = jax.random.split(seed)
        bounds = jnp.asarray(at, jnp.int32), jnp.asarray(stop, jnp.int32)
        basis, matrix = _advance(curvature.problem, basis, matrix, *bounds, curvature.arrays, *diagonals, own)
        spent, at = spent + stop - at, stop
        small = np.asarray(matrix, np.float64)
        if not np.isfinite(small).all():
            raise ValueError("loss_fn: a product with its Hessian is not finite at this point")
        theta, y = np.linalg.eigh((small[:at, :at] + small[:at, :at].T) / 2)
        beta = abs(small[at, at - 1])
        largest = max(float(np.abs(theta).max()), np.finfo(np.float64).tiny)
        top = list(range(at - 1, at - 1 - min(wanted, at), -1))
        residuals = beta * np.abs(y[-1])
        converged = len(top) == wanted and bool(residuals[[*top, 0]].max() <= tolerance * largest)
        bar.advance(0 if spent == 0 else min(CHUNK, spent), f"{theta[-1]:.4g}")
        if converged and at >= enough or spent >= iterations or at == size:
            break
        if at == room:
            at = max(1, min(room // 2, room - 2))
            below = max(1, at // 3)
            kept = [*range(below), *range(room - (at - below), room)]
            mix = np.zeros((room + 1, room + 1))
            mix[:at, :room] = y[:, kept].T
            basis = _combined(jnp.asarray(mix, dtype), basis, jnp.asarray(at), jnp.asarray(room))
            fresh = np.zeros((room + 1, room + 1))
            fresh[:at, :at] = np.diag(theta[kept])
            fresh[at, :at] = small[room, room - 1] * y[-1, kept]
            matrix = jnp.asarray(fresh, dtype)
    return Spectrum(
        tuple(float(theta[i]) for i in top),
        tuple(float(residuals[i]) for i in top),
        float(theta[0]),
        float(residuals[0]),
        converged or at == size,
        spent,
        size,
        30 * eps * largest,
    )
