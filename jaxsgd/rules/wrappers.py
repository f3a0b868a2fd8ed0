"""Rules around rules: they change the gradient before the rule's step, or the step after.

A wrapper takes a `Rule` and gives a `Rule`: ``cautious(adamw)(1e-3)``. The new rule has the wrapper's arguments and the
base's, and its slots are of the same kinds. It is not registered in `RULES`. The update needs ``params``.
"""

from __future__ import annotations

import jax.numpy as jnp

from jaxsgd.hyper import Decay, is_off
from jaxsgd.numerics import sq
from jaxsgd.registry import wrapper
from jaxsgd.slots import Mean

__all__ = ["adaptive_clip", "cautious", "cautious_decay", "centralized", "grokfast"]


@wrapper
def cautious(inner, leaf):
    r"""Cautious updates (Liang et al. 2024, arXiv:2411.16085): $\phi = [u g > 0],\; u \leftarrow u \phi / \max(\operatorname{mean} \phi, 10^{-3})$.

    Coordinates whose step would climb along the current gradient rest. The others grow to keep the mean step.
    Weight decay is not masked, unless the rule adds it to the gradient.
    """
    after, decay = (inner(leaf), None) if inner.base.coupled else _apart(inner, leaf)
    delta, agrees = after.delta, jnp.real(after.delta * jnp.conj(leaf.g)) < 0
    delta = jnp.where(agrees, delta / jnp.maximum(agrees.mean(dtype=delta.real.dtype), 1e-3), 0)
    return after.replace(delta=delta if decay is None else delta + decay)


@wrapper
def cautious_decay(inner, leaf):
    r"""Cautious weight decay (Chen et al. 2025, arXiv:2510.12402): $x \leftarrow x - \eta\,(u + \lambda [u x \ge 0]\, x)$.

    Decay acts only where it points the same way as the step. It is decoupled, whatever the rule does with its own.
    """
    after, decay = _apart(inner, leaf)
    if decay is None:
        return after
    return after.replace(delta=after.delta + jnp.where(jnp.real(after.delta * jnp.conj(leaf.p)) <= 0, decay, 0))


def _apart(inner, leaf):
    """The step without weight decay, and what decay adds to it: None if nothing."""
    rest = inner(leaf.replace(weight_decay=0.0))
    if is_off(leaf.weight_decay):
        return rest, None
    if "weight_decay" not in inner.base.context:
        return rest, -leaf.learning_rate * leaf.weight_decay * leaf.p
    whole = inner(leaf)  # the rule has a decay of its own, such as one in units of a rate that it learns
    return whole.replace(delta=rest.delta), whole.delta - rest.delta


@wrapper
def grokfast(inner, leaf, slow: Mean, *, t, alpha: Decay = 0.98, lamb=2.0):
    r"""Grokfast-EMA (Lee et al. 2024, arXiv:2405.20233): $h \leftarrow \alpha h + (1-\alpha) g,\; g \leftarrow g + \lambda h$.

    Amplifies the slow part of the gradients, an average that starts at the first gradient.
    Its arguments are ``alpha`` (0.98) and ``lamb`` (2.0).
    """
    slow = jnp.where(t == 1, leaf.g, alpha * slow + (1 - alpha) * leaf.g)
    return inner(leaf.replace(g=leaf.g + lamb * slow)), slow


@wrapper
def centralized(inner, leaf):
    r"""Gradient centralization (Yong et al. 2020, arXiv:2004.01461): $g \leftarrow g - \operatorname{mean}(g)$.

    The mean is over all axes but the last, the outputs of a Flax kernel. Vectors and scalars do not change.
    """
    g = leaf.g
    return inner(leaf.replace(g=g - g.mean(axis=tuple(range(g.ndim - 1)), keepdims=True)) if g.ndim > 1 else leaf)


@wrapper
def adaptive_clip(inner, leaf, *, clipping=0.01, eps_clip=1e-3):
    r"""Adaptive gradient clipping (Brock et al. 2021, arXiv:2102.06171): $g_i \leftarrow g_i \min(1, c \max(\lVert W_i \rVert, \epsilon) / \lVert g_i \rVert)$.

    Unit-wise: $i$ runs over the last axis, the outputs of a Flax kernel. A vector is one unit.
    Its arguments are ``clipping`` (0.01) and ``eps_clip`` (1e-3).
    """
    g = leaf.g
    axes = tuple(range(max(g.ndim - 1, 1)))[: g.ndim]
    norm, room = (jnp.sqrt(sq(x).sum(axis=axes, keepdims=True)) for x in (g, leaf.p))
    room = clipping * jnp.maximum(room, eps_clip)
    return inner(leaf.replace(g=jnp.where(norm > room, g * (room / jnp.where(norm > room, norm, 1)), g)))
