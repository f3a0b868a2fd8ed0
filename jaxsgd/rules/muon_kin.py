r"""Rules that orthogonalise a momentum in other ways than Muon.

They treat leaves as `jaxsgd.rules.matrix` does. Kernels are (in, out), and axes before the last two are a batch. Leaves
that are no hidden matrix go to Adam.
"""

from __future__ import annotations

import math
from typing import Annotated, Any

import jax
import jax.numpy as jnp

from jaxsgd.hyper import Decay, Fraction, Seed, Static
from jaxsgd.matrices import (
    USUAL,
    adjoint,
    as_matrices,
    frobenius,
    gathered,
    known,
    matrix_shape,
    orthonormal,
    partitioned,
)
from jaxsgd.numerics import ema, real_zeros, sq
from jaxsgd.registry import rule
from jaxsgd.rules.adaptive import adam
from jaxsgd.rules.matrix import LAST_TWO, adam_zeros, hidden_matrices, matrix_axes, orthogonalized
from jaxsgd.slots import Basis, Mean, Square, start

__all__ = ["adamuon", "dion", "normuon"]

# -- orthogonal updates with a second moment -----------------------------------------------------


def _resized(x: jax.Array, size: Any) -> jax.Array:
    """``x`` with the Frobenius norm ``size``, zeros as they are."""
    now = frobenius(x)
    return x * (size / jnp.where(now == 0, 1, now)).astype(x.dtype)


def _cleared(x: jax.Array) -> jax.Array:
    """``x`` with zeros where only the rounding of Newton-Schulz is left.

    An entry that is always rounding would get full steps from a second moment of its own.
    """
    rounding = 512 * float(jnp.finfo(x.dtype).eps) / math.sqrt(math.prod(x.shape[-2:])) * frobenius(x)
    return jnp.where(jnp.abs(x) <= rounding, 0, x)


def _neurons(p: Any, axes: Any) -> Any:
    """Zeros for each output of a matrix, or each entry of a leaf of Adam's."""
    axes = matrix_axes(p, axes)
    return real_zeros(p if axes is None else jnp.sum(as_matrices(gathered(p)[0], *axes)[0], -2, keepdims=True))


POSITIONAL = "learning_rate ns_coeffs ns_steps beta beta2 weight_decay"


@rule(positional=POSITIONAL, call=orthogonalized, usual_rate=0.02, cost="products", stacked=True)
@partitioned
def normuon(
    g,
    mu: Mean,
    nu: Annotated[Square, start(_neurons)],
    *,
    t,
    axes: Static = LAST_TWO,
    how: Static = USUAL,
    ns_steps=5,
    beta: Decay = 0.95,
    beta2: Decay = 0.95,
    eps=1e-7,
    eps_nu=1e-10,
    nesterov=True,
    consistent_rms=None,
    adam_b1: Decay = 0.9,
    adam_b2: Decay = 0.95,
    adam_eps=1e-10,
):
    r"""NorMuon (Li et al. 2025, arXiv:2510.05491): $O = \operatorname{orth}(M),\; v_j \leftarrow \beta_2 v_j + (1-\beta_2) \operatorname{mean}_i O_{ij}^2,\; \hat O_{ij} = O_{ij} / (\sqrt{v_j} + \epsilon),\; U = \sqrt{\max(1, \tfrac{out}{in})}\, \lVert O \rVert\, \hat O / \lVert \hat O \rVert$.

    Muon with a second moment for each output (the neurons, the last axis of a kernel). So none of them steps further
    than the others. The arguments are those of `muon`, and ``eps_nu`` for $\epsilon$; ``eps`` is that of the
    orthogonalisation. By default as in github.com/zichongli5/NorMuon: Nesterov's look-ahead, no bias correction, Muon's
    size of steps. The paper's algorithm is ``nesterov=False, consistent_rms=0.2``: a root mean square of 0.2, so that
    Adam's learning rates serve.

    Use it when Muon trains well and some neurons step too far. Avoid it when the model has few matrices: the rest is
    plain Adam.
    """
    if (axes := matrix_axes(g, axes)) is None:
        return adam.fn(g, mu, nu, t=t, b1=adam_b1, b2=adam_b2, eps=adam_eps)
    mu = ema(mu, g, beta)
    x, back = as_matrices(ema(mu, g, beta) if nesterov else mu, *axes)
    o = how.orthogonal(x, ns_steps, eps)
    nu = ema(nu, jnp.mean(sq(o), -2, keepdims=True), beta2)
    rows, columns = x.shape[-2:]
    size = frobenius(o) * math.sqrt(max(1, columns / rows))
    size = size if consistent_rms is None else consistent_rms * math.sqrt(rows * columns)
    return back(_resized(o / (jnp.sqrt(nu) + eps_nu).astype(o.dtype), size)), mu, nu


@rule(positional=POSITIONAL, call=orthogonalized, weight_decay=0.01, usual_rate=0.02, cost="products", stacked=True)
@partitioned
def adamuon(
    g,
    mu: Mean,
    nu: Square,
    *,
    t,
    axes: Static = LAST_TWO,
    how: Static = USUAL,
    ns_steps=5,
    beta: Decay = 0.95,
    beta2: Decay = 0.95,
    eps=1e-7,
    eps_nu=1e-8,
    nesterov=False,
    sign=True,
    consistent_rms=0.2,
    adam_b1: Decay = 0.9,
    adam_b2: Decay = 0.95,
    adam_eps=1e-8,
):
    r"""AdaMuon (Si et al. 2025, arXiv:2507.11005): $O = \operatorname{orth}(\operatorname{sign}(M)),\; V \leftarrow \beta_2 V + (1-\beta_2) O^2,\; \hat O = O / (\sqrt V + \epsilon),\; U = 0.2 \sqrt{mn}\, \hat O / \lVert \hat O \rVert$.

    Muon with a second moment of each entry of the orthogonal update, which comes from the signs of the momentum. The
    paper has one decay for both moments. The arguments are those of `muon`, and ``eps_nu`` for
    $\epsilon$; ``eps`` is that of the orthogonalisation, ``consistent_rms`` the root mean square of a step.
    ``sign=False`` orthogonalises the momentum itself, as github.com/Chongjie-Si/AdaMuon does (with ``nesterov=True``
    and ``beta2=0.999``).

    Use it when Muon trains well and single entries of a matrix need steps of their own. Avoid it when memory is short:
    Muon keeps half as much.
    """
    if (axes := matrix_axes(g, axes)) is None:
        return adam.fn(g, mu, nu, t=t, b1=adam_b1, b2=adam_b2, eps=adam_eps)
    mu = ema(mu, g, beta)
    x, back = as_matrices(ema(mu, g, beta) if nesterov else mu, *axes)
    o = how.orthogonal(jnp.sign(x) if sign else x, ns_steps, eps)
    o = back(_cleared(o))
    nu = ema(nu, sq(o), beta2)
    scaled, _ = as_matrices(o / (jnp.sqrt(nu) + eps_nu).astype(o.dtype), *axes)
    return back(_resized(scaled, consistent_rms * math.sqrt(math.prod(x.shape[-2:])))), mu, nu


# -- Dion: orthogonal on a subspace ---------------------------------------------------------------


def _facing(axes: Any, shape: tuple[int, ...]) -> tuple[Any, Any]:
    """The axes of the longer side of a matrix, whose basis Dion keeps orthonormal, then those of the other.

    Of equal sides the outputs come first, as in the authors' code with its (out, in).
    """
    rows, columns = axes
    sizes = [math.prod(shape[axis] for axis in side) for side in axes]
    return (rows, columns) if sizes[0] > sizes[1] else (columns, rows)


def _start_basis(p: Any, axes: Any, rank_fraction: Any, key: Any) -> Any:
    """The start of Dion's power iteration: a draw that is the same for every matrix of a shape."""
    if (axes := matrix_axes(p, axes)) is None:
        return None
    *batch, _, short = matrix_shape(p.shape, *_facing(axes, p.shape))
    rank = max(
        1, math.ceil(float(known("rank_fraction", rank_fraction)) * short - 1e-6)
    )  # 0.7 * 10 is 7, whatever its last digit says
    seed = jax.random.key(key.astype(jnp.uint32) if isinstance(key, jax.Array) else key)
    return jnp.broadcast_to(jax.random.normal(seed, (short, rank), p.dtype), (*batch, short, rank))


def _power_step(b: jax.Array, q: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
    """One step of the power iteration from the basis ``q``: $P, R = B^* P$, and which columns of $R$ are no rounding.

    Where ``b`` has a lower rank than ``q``, the last columns of $P$ are any that complete it. $B$ has only rounding there,
    which normalised would be a full step of noise.
    """
    size = frobenius(b)
    witness = jnp.where(size > 0, size, jnp.inf)[..., 0]  # of zeros too the basis is the identity
    p, _ = orthonormal(b @ q, witness, jnp.eye(b.shape[-2], q.shape[-1], dtype=b.dtype))
    r = adjoint(b) @ p
    least = 64 * float(jnp.finfo(b.dtype).eps) * jnp.where(jnp.isfinite(size), size, 0)
    return p, r, ~(jnp.sum(sq(r), -2, keepdims=True) <= sq(least))  # what is not finite is no rounding


def _unit_columns(r: jax.Array, clear: jax.Array, eps: Any) -> jax.Array:
    """The columns of ``r`` with length 1; zeros where they are not ``clear``."""
    length = jnp.sqrt(jnp.where(clear, jnp.sum(sq(r), -2, keepdims=True), 1))
    return jnp.where(clear, r / (length + eps).astype(r.dtype), 0)


@rule(
    positional="learning_rate rank_fraction beta weight_decay",
    call=hidden_matrices,
    learning_rate=0.01,
    weight_decay=0.01,
    cost="decomposed",
    stacked=True,
)
@partitioned
def dion(
    g,
    mu: Mean,
    nu: Annotated[Square, start(adam_zeros)],
    q: Annotated[Basis, start(_start_basis)],
    *,
    t,
    axes: Static = LAST_TWO,
    rank_fraction: Fraction = 1,
    beta: Decay = 0.95,
    eps=1e-8,
    key: Seed = 0,
    adam_b1: Decay = 0.9,
    adam_b2: Decay = 0.95,
    adam_eps=1e-8,
):
    r"""Dion (Ahn et al. 2025, arXiv:2504.05295): $B = M + G,\; P = \operatorname{qr}(B Q),\; R = B^T P,\; M \leftarrow B - (1-\mu) P R^T,\; Q_j \leftarrow R_j / \lVert R_j \rVert,\; U = \sqrt{\tfrac{out}{in}}\, P Q^T$.

    An orthonormal update of low rank, from one step of the power iteration on the momentum; the rest stays in the
    momentum. ``rank_fraction`` is the rank, in parts of the shorter side; ``beta`` is $\mu$; ``key`` the seed of the first
    $Q$. The basis of the longer side is the orthonormal one, as in the authors' code. Columns of $R$ that are only
    rounding, where $B$ has a lower rank, make no step, and their $Q_j$ waits. Leaves that are no hidden matrix go to Adam,
    as in `muon`.

    Use it when large matrices are split over devices: it sends low ranks only. Avoid it when all is on one device:
    `muon` is simpler.
    """
    if (axes := matrix_axes(g, axes)) is None:
        return *adam.fn(g, mu, nu, t=t, b1=adam_b1, b2=adam_b2, eps=adam_eps), q
    b, back = as_matrices(mu + g, *_facing(axes, g.shape))
    basis, r, clear = _power_step(b, q)
    unit = _unit_columns(r, clear, eps)
    inputs, outputs = (math.prod(g.shape[axis] for axis in side) for side in axes)
    u = math.sqrt(outputs / inputs) * basis @ adjoint(unit)
    return back(u), back(b - (1 - beta) * basis @ adjoint(r)), nu, jnp.where(clear, unit, q)
