r"""Rules that learn a preconditioner by whitening the gradients they meet.

A matrix has a factor for each side, upper triangular or diagonal. The preconditioner is $P = Q^T Q$ with
$Q = Q_R \otimes Q_L$. A vector or a scalar has one factor.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Annotated, Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxsgd.hyper import Decay, Fraction, Seed, one_of
from jaxsgd.matrices import adjoint, frobenius, known, partitioned
from jaxsgd.numerics import debias, ema, sq
from jaxsgd.registry import rule
from jaxsgd.slots import Basis, Mean, start, unless

__all__ = ["kron"]

Saving = Annotated[Any, one_of("one_diag", "smart_one_diag", "all_diag")]
"""The sides with a diagonal factor whatever their size: the longer one, the longer one if there is one, both."""

DAMPING = math.sqrt(np.finfo(np.float32).eps)
"""The noise added to the data of a fit, in units of their mean magnitude."""

# -- the factors of a leaf -----------------------------------------------------------------------


def _matrix(x: jax.Array, merge_dims: bool) -> jax.Array:
    """A leaf as a matrix, or a batch of them; a vector is one row, a scalar one number."""
    if x.ndim > 1 and not (merge_dims and x.ndim > 2):
        return x
    return x.reshape((math.prod(x.shape[:-1]), x.shape[-1]) if x.ndim > 1 else (1, x.size))


def _factor(axis: int) -> Callable:
    """The start of the factor of one side: the scaled identity, whole or its diagonal."""

    def begin(p, max_size_triangular, min_ndim_triangular, memory_save_mode, precond_init_scale, merge_dims):
        ndim = min(p.ndim, 2)
        if p.size == 0 or (axis == -2 and ndim < 2):
            return None
        shape = jax.eval_shape(lambda x: _matrix(x, merge_dims), jax.ShapeDtypeStruct(p.shape, p.dtype)).shape
        size, other, batch = shape[axis], shape[-3 - axis], shape[:-2]
        # Of equal sides the last is the longer one.
        longer = ndim < 2 or size > other or (size == other and axis == -1)
        saved = {None: False, "one_diag": longer, "smart_one_diag": ndim > 1 and size > other, "all_diag": True}
        longest, least = (
            known("max_size_triangular", max_size_triangular),
            known("min_ndim_triangular", min_ndim_triangular),
        )
        dense = 1 < size <= longest and ndim >= least and not saved[memory_save_mode]
        scale = precond_init_scale ** (1 / max(ndim, 1))
        return jnp.broadcast_to(
            scale * (jnp.eye(size, dtype=p.dtype) if dense else jnp.ones(size, p.dtype)),
            (*batch, size, size) if dense else (*batch, size),
        )

    return begin


def _due(waited=0.0, *, t, preconditioner_update_probability):
    """Whether this step fits the preconditioners: one in 1/p, counted for all leaves at once."""
    rate = preconditioner_update_probability
    if rate is None:
        rate = jnp.clip(jnp.exp((501 - t) / 1000), 0.03, 1.0)
    due = waited + 1 >= 1 / rate
    return {"waited": jnp.where(due, 0, waited + 1), "due": due}


# -- one side of a matrix ------------------------------------------------------------------------


def _turned(x: jax.Array) -> jax.Array:
    return jnp.swapaxes(x, -1, -2)


def _both(function: Callable, x: jax.Array, left: Any, right: Any) -> jax.Array:
    """``function(factor, x)`` on the rows of ``x``, then on its columns."""
    x = x if left is None else function(left, x)
    return _turned(function(right, _turned(x)))


def _times(q: jax.Array, x: jax.Array) -> jax.Array:
    """$Q X$, of a triangular or a diagonal factor."""
    return q @ x if q.ndim == x.ndim else jnp.expand_dims(q, -1) * x


def _preconditioned(q: jax.Array, x: jax.Array) -> jax.Array:
    """$Q^* Q X$."""
    return adjoint(q) @ (q @ x) if q.ndim == x.ndim else jnp.expand_dims(q.conj() * q, -1) * x


def _solved(q: jax.Array, x: jax.Array) -> jax.Array:
    """$Q^{-*} X$."""
    if q.ndim < x.ndim:
        return x / jnp.expand_dims(q.conj(), -1)
    return jax.lax.linalg.triangular_solve(q, x, left_side=True, lower=False, transpose_a=True, conjugate_a=True)


def _norm_below(x: jax.Array) -> jax.Array:
    """A lower bound of the spectral norm of a positive semidefinite matrix: a step of the power iteration."""
    largest = jnp.max(jnp.abs(x), (-2, -1), keepdims=True)
    x = x / jnp.where(largest > 0, largest, 1)
    longest = jnp.expand_dims(jnp.argmax(jnp.sum(sq(x), -2, keepdims=True), -1), -1)
    seen = x @ jnp.take_along_axis(x, longest, -1)
    size = frobenius(seen)
    return largest * frobenius(x @ (seen / jnp.where(size > 0, size, 1)))


def _fitted(q: Any, a: jax.Array, b: jax.Array, rate: Any) -> Any:
    """One relative step of a factor: $Q \\leftarrow Q - \\mu \\operatorname{triu}(A A^* - B B^*) Q / \\lVert A A^* + B B^* \\rVert$."""
    if q is None:
        return None
    tiny = float(jnp.finfo(q.dtype).tiny)
    if q.ndim < a.ndim:
        ours, theirs = jnp.sum(sq(a), -1), jnp.sum(sq(b), -1)
        size = jnp.max(ours + theirs, -1, keepdims=True)
        return q - (rate * (ours - theirs) / jnp.maximum(size, tiny)).astype(q.dtype) * q
    ours, theirs = a @ adjoint(a), b @ adjoint(b)
    size = jnp.maximum(_norm_below(ours + theirs), tiny).astype(q.dtype)
    return q - rate * jnp.triu(ours - theirs) / size @ q


def _balanced(batch: int, left: Any, right: Any) -> tuple[Any, Any]:
    """The factors with equal largest entries, against overflow: neither $P$ nor any later step changes by it."""
    if left is None:
        return left, right
    largest = [jnp.max(jnp.abs(q), tuple(range(batch, q.ndim))) for q in (left, right)]
    ratio = jnp.sqrt(largest[1] / largest[0])
    ours, theirs = (ratio.reshape(ratio.shape + (1,) * (q.ndim - batch)).astype(q.dtype) for q in (left, right))
    return left * ours, right / theirs


def _noise(key: jax.Array, g: jax.Array, merge_dims: bool) -> jax.Array:
    """Normal numbers like the gradient, as a matrix."""
    return _matrix(jax.random.normal(key, g.shape, g.dtype), merge_dims)


def _whitened(x: jax.Array, left: Any, right: Any, noise: jax.Array, rate: Any) -> tuple[Any, Any]:
    """The factors after one step towards white $Q_L G Q_R^T$, compared with ``noise``."""
    mean = jnp.mean(jnp.abs(x), (-2, -1), keepdims=True).astype(x.dtype)
    a = _both(_times, x + DAMPING * mean * noise, left, right)
    b = _both(_solved, noise, left, right)
    new = _balanced(x.ndim - 2, _fitted(left, a, b, rate), _fitted(right, _turned(a), _turned(b), rate))
    # No branch: the rule's own is one for all leaves of a stack.
    return jax.tree.map(lambda q, old: jnp.where(jnp.any(x != 0), q, old), new, (left, right))


@rule(positional="learning_rate b1 weight_decay mask", learning_rate=3e-4, shared=_due, cost="decomposed", stacked=True)
@partitioned
def kron(
    g,
    mu: Annotated[Mean, unless("b1")],
    left: Annotated[Basis, start(_factor(-2))],
    right: Annotated[Basis, start(_factor(-1))],
    *,
    t,
    due,
    leaf_key,
    b1: Decay = 0.9,
    preconditioner_update_probability: Fraction = None,
    max_size_triangular=8192,
    min_ndim_triangular=2,
    memory_save_mode: Saving = None,
    momentum_into_precond_update=True,
    precond_lr=0.1,
    precond_init_scale=1.0,
    merge_dims=True,
    key: Seed = 0,
):
    r"""PSGD Kron (Li 2015, arXiv:1512.04202): $U = Q_L^T Q_L\, \hat M_t\, Q_R^T Q_R,\; A = Q_L \hat M_t Q_R^T,\; B = Q_L^{-T} V Q_R^{-1},\; Q_L \leftarrow Q_L - \mu \operatorname{triu}(A A^T - B B^T)\, Q_L / \lVert A A^T + B B^T \rVert$.

    A whitened momentum, with upper triangular factors for both sides. Relative steps against noise $V \sim N(0, 1)$ fit
    the factors; $Q_R$ likewise, with $A^T, B^T$. The root mean square of a step is clipped at 1.1. The arguments are
    those of github.com/evanatyourservice/kron_torch. Unlike there, the noise that damps the fit does not enter the
    step, and a gradient of zeros fits nothing.

    - ``preconditioner_update_probability``: how often the factors are fitted, as a rate: every $1/p$ steps. None is 1
      for 500 steps and falls to 0.03 until step 4,000. A number, or a schedule.
    - ``max_size_triangular``: longer sides have a diagonal factor; so have sides of length 1, and all sides of
      arrays with fewer than ``min_ndim_triangular`` dimensions. ``memory_save_mode``: further diagonal ones: the
      longer side's (``"one_diag"``; ``"smart_one_diag"`` if it is strictly longer) or both (``"all_diag"``).
    - ``merge_dims``: axes before the last are one, as for a convolution's (h, w, in, out). False makes those before the
      last two a batch with factors of their own, as for the layers of a scan.
    - ``precond_lr``, ``precond_init_scale``: the step $\mu$ of the factors, and the scale that $P^{1/2}$ starts at.
      ``key``: the seed of the noise, which depends on the step and on the leaf's name too.

    Use it when fewer steps are worth more time for each. Avoid it when layers are wide: the factors take time and
    memory.
    """
    mu = ema(mu, g, b1)
    mean = debias(mu, b1, t)
    if right is None:  # nothing in it
        return mean, mu, left, right
    x = _matrix(mean, merge_dims)
    seen = x if momentum_into_precond_update else _matrix(g, merge_dims)

    def fitted():
        return _whitened(seen, left, right, _noise(leaf_key, g, merge_dims), precond_lr)

    left, right = jax.lax.cond(due, fitted, lambda: (left, right))
    u = _both(_preconditioned, x, left, right)
    size = frobenius(u) / math.sqrt(math.prod(u.shape[-2:])) + 1e-12
    return (u * jnp.minimum(1, 1.1 / size).astype(u.dtype)).reshape(g.shape), mu, left, right
