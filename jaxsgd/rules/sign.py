"""Rules whose step is a sign."""

from __future__ import annotations

from typing import Annotated

import jax.numpy as jnp

from jaxsgd.hyper import Decay
from jaxsgd.numerics import ema, real_zeros
from jaxsgd.registry import rule
from jaxsgd.slots import Mean, Other, kept_in, start, unless

__all__ = ["lion", "rprop", "sign_sgd", "signum"]


@rule(positional="learning_rate b1 b2 mu_dtype weight_decay mask", weight_decay=1e-3, usual_rate=1e-4)
def lion(g, mu: Annotated[Mean, kept_in("mu_dtype")], *, b1: Decay = 0.9, b2: Decay = 0.99):
    r"""Lion (Chen et al. 2023, arXiv:2302.06675): $u = \operatorname{sign}(\beta_1 m + (1-\beta_1) g),\; m \leftarrow \beta_2 m + (1-\beta_2) g$.

    Use it when memory is short and batches are large. Avoid it when batches are small: all steps have the same length,
    whatever the noise.
    """
    return jnp.sign(ema(mu, g, b1)), ema(mu, g, b2)


@rule(usual_rate=1e-3)
def sign_sgd(g):
    r"""signSGD (Bernstein et al. 2018, arXiv:1802.04434): $u = \operatorname{sign}(g)$.

    Use it when only signs are to be sent between devices. Avoid it when batches are small: all steps have the same
    length, whatever the noise.
    """
    return (jnp.sign(g),)


@rule(positional="learning_rate beta accumulator_dtype", usual_rate=1e-3)
def signum(g, mu: Annotated[Mean, unless("beta"), kept_in("accumulator_dtype")], *, beta: Decay = 0.9):
    r"""Signum (Bernstein et al. 2018, arXiv:1802.04434): $m \leftarrow \beta m + (1-\beta) g,\; u = \operatorname{sign}(m)$.

    Use it when `sign_sgd` is too noisy: the sign is of an average. Avoid it when batches are small and the rate is
    constant.
    """
    mu = ema(mu, g, beta)
    return jnp.sign(mu), mu


@rule(usual_rate=0.01)
def rprop(
    g,
    scale: Annotated[Other, start(lambda p: real_zeros(p) + 1)],
    sign: Mean,
    *,
    learning_rate,
    eta_minus=0.5,
    eta_plus=1.2,
    min_step_size=1e-6,
    max_step_size=50.0,
):
    r"""Rprop (Riedmiller & Braun 1993, doi:10.1109/ICNN.1993.298623): $s \leftarrow \eta^{\pm} s,\; x \leftarrow x - s \operatorname{sign}(g)$.

    Each coordinate's step $s$ begins at the learning rate. It grows by $\eta^+$ while the sign of its gradient stays
    and shrinks by $\eta^-$ when it turns, within its bounds. Where the sign turns, the coordinate rests for a step
    (iRprop-, Igel & Huesken 2000). The state holds $s$ as a multiple of the learning rate, so that a schedule or a new
    value scales all steps.

    Use it when each step sees the whole data set. Avoid it when steps see minibatches: the signs of noise move the
    steps.
    """
    product = jnp.real(jnp.sign(g) * jnp.conj(sign))
    scale = scale * jnp.where(product > 0, eta_plus, jnp.where(product < 0, eta_minus, 1))
    # A learning rate of 0 has no multiple that the bounds could hold.
    rate = jnp.where(learning_rate > 0, learning_rate, 1)
    scale = jnp.where(product != 0, jnp.clip(scale, min_step_size / rate, max_step_size / rate), scale)
    sign = jnp.where(product < 0, 0, jnp.sign(g))
    return -learning_rate * scale * sign, scale, sign
