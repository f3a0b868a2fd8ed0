r"""Rules that scale a step by a ratio of its layer's norms.

Throughout, $\lVert \cdot \rVert$ is the Euclidean norm of one array, and $\phi$ the trust ratio
$\lVert x \rVert / \lVert u \rVert$, which is 1 where either norm is 0.
"""

from __future__ import annotations

from typing import Annotated, Any

import jax
import jax.numpy as jnp

from jaxsgd.hyper import Decay
from jaxsgd.numerics import debias, ema, real_dtype, sq
from jaxsgd.paths import is_function
from jaxsgd.registry import rule
from jaxsgd.rules.adaptive import FirstMoment
from jaxsgd.slots import Mean, Square, start, unless

__all__ = ["fromage", "lamb", "lars", "novograd"]


def norm(x: jax.Array) -> jax.Array:
    """The Euclidean norm of one array, with the derivative 0 where it is 0."""
    total = jnp.sum(sq(x))
    zero = total == 0
    return jnp.where(zero, 0, jnp.sqrt(jnp.where(zero, 1, total)))


def trust_ratio(p: jax.Array, u: jax.Array, *, min_norm: Any = 0.0, coefficient: Any = 1.0, eps: Any = 0.0) -> Any:
    """``coefficient * |p| / (|u| + eps)`` with norms of at least ``min_norm``; 1 where either is 0."""
    of_p, of_u = jnp.maximum(norm(p), min_norm), jnp.maximum(norm(u), min_norm)
    defined = (of_p != 0) & (of_u != 0)
    return jnp.where(defined, coefficient * of_p / (jnp.where(defined, of_u, 1) + eps), 1)


@rule(
    positional="learning_rate b1 b2 eps eps_root weight_decay mask",
    usual_rate=1e-3,
    batch_scaling="sqrt",
    cost="leaf_norms",
)
def lamb(
    g, mu: FirstMoment, nu: Square, *, p, t, weight_decay, b1: Decay = 0.9, b2: Decay = 0.999, eps=1e-6, eps_root=0.0
):
    r"""LAMB (You et al. 2020, arXiv:1904.00962): $r = \hat m_t / (\sqrt{\hat v_t} + \epsilon) + \lambda x,\; u = r\, \lVert x \rVert / \lVert r \rVert$.

    Weight decay is part of the step that the layer's norm scales.

    Use it when batches have thousands of examples. Avoid it when batches are small: AdamW does as well.
    """
    mu, nu = ema(mu, g, b1), ema(nu, sq(g), b2)
    r = debias(mu, b1, t) / (jnp.sqrt(debias(nu, b2, t) + eps_root) + eps) + weight_decay * p
    return trust_ratio(p, r) * r, mu, nu


def _trust_ratio_mask(trust_ratio_mask: Any = True, **rest: Any) -> dict[str, Any]:
    """One flag for all leaves, or routes for a tree of flags (or a prefix, or a function of the params)."""
    if isinstance(trust_ratio_mask, bool):
        return rest | {"trust_ratio_mask": trust_ratio_mask}

    def routes(params: Any) -> list[dict[str, Any]]:
        mask = trust_ratio_mask(params) if is_function(trust_ratio_mask) else trust_ratio_mask
        return [{"trust_ratio_mask": bool(flag)} for flag in jax.tree.leaves(jax.tree.broadcast(mask, params))]

    return rest | {"trust_ratio_mask": True, "routes": routes}


@rule(
    positional="learning_rate weight_decay weight_decay_mask trust_coefficient eps trust_ratio_mask momentum nesterov",
    call=_trust_ratio_mask,
    coupled=True,
    usual_rate=0.1,
    batch_scaling="linear",
    cost="leaf_norms",
)
def lars(
    g,
    trace: Annotated[Mean, unless("momentum")],
    *,
    p,
    learning_rate,
    trust_coefficient=0.001,
    eps=0.0,
    trust_ratio_mask=True,
    momentum: Decay = 0.9,
    nesterov=False,
):
    r"""LARS (You et al. 2017, arXiv:1708.03888): $u = g + \lambda x,\; v \leftarrow \mu v - \eta\, \kappa u\, \lVert x \rVert / (\lVert u \rVert + \epsilon),\; x \leftarrow x + v$.

    Weight decay $\lambda$ is added to the gradient, and the norm is of their sum, as in optax. The paper adds up their
    norms, $\lVert g \rVert + \lambda \lVert x \rVert$. ``trust_ratio_mask=False`` takes $u$ as it is for all
    parameters. A tree of booleans, or a function of the params, chooses some. A norm of 0 does the same.

    Use it when a convolutional network trains on very large batches. Avoid it when you train a transformer: take
    `lamb`.
    """
    scale = trust_ratio(p, g, coefficient=trust_coefficient, eps=eps) if trust_ratio_mask else 1
    step = -learning_rate * (scale * g)
    if trace is None:
        return step, None
    trace = momentum * trace + step
    return (momentum * trace + step if nesterov else trace), trace


@rule(usual_rate=0.01, cost="leaf_norms")
def fromage(g, *, p, learning_rate, min_norm=1e-6):
    r"""Fromage (Bernstein et al. 2020, arXiv:2002.03432): $x \leftarrow (x - \eta\, g\, \lVert x \rVert / \lVert g \rVert) / \sqrt{1 + \eta^2}$.

    Both norms count as at least ``min_norm``.

    Use it when one rate should suit layers of all sizes. Avoid it when vectors start at zero: ``min_norm`` then decides
    their steps.
    """
    root = jnp.sqrt(1 + learning_rate**2)
    # 1 / root - 1 without the cancellation that a small learning rate brings.
    shrink = -(learning_rate**2) / (root * (1 + root))
    return (-learning_rate / root * trust_ratio(p, g, min_norm=min_norm) * g + shrink * p,)


@rule(positional="learning_rate b1 b2 eps eps_root weight_decay", usual_rate=0.01, cost="leaf_norms")
def novograd(
    g,
    mu: FirstMoment,
    nu: Annotated[Square, start(lambda p: jnp.zeros((), real_dtype(p.dtype)))],
    *,
    p,
    t,
    weight_decay,
    b1: Decay = 0.9,
    b2: Decay = 0.25,
    eps=1e-6,
    eps_root=0.0,
):
    r"""NovoGrad (Ginsburg et al. 2019, arXiv:1905.11286): $v \leftarrow \beta_2 v + (1-\beta_2) \lVert g \rVert^2,\; m \leftarrow \beta_1 m + g / (\sqrt v + \epsilon) + \lambda x,\; u = m$.

    One $v$ for each array, which starts at its first $\lVert g \rVert^2$. Weight decay goes through the momentum.

    Use it when memory is short: it keeps one moment and a number for each array. Avoid it when the rows of an array
    differ much, as in embeddings.
    """
    squared = jnp.sum(sq(g))
    nu = jnp.where(t == 1, squared, ema(nu, squared, b2))
    u = g / (jnp.sqrt(nu + eps_root) + eps) + weight_decay * p
    mu = u if mu is None else b1 * mu + u
    return mu, mu, nu
