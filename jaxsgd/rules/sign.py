"""Rules whose step is a sign.

Floor 3.
"""

from __future__ import annotations

import jax.numpy as jnp
import optax

from jaxsgd.numerics import ema, real_zeros
from jaxsgd.rule import rule
from jaxsgd.spec import without_when_off

__all__ = ["lion", "rprop", "sign_sgd", "signum"]


@rule(
    oracle=optax.lion,
    positional=("learning_rate", "b1", "b2", "mu_dtype", "weight_decay", "mask"),
    aliases={"mu_dtype": "mu"},
    weight_decay=1e-3,
)
def lion(g, mu, *, b1=0.9, b2=0.99):
    r"""Lion (Chen et al. 2023, arXiv:2302.06675): $u = \operatorname{sign}(\beta_1 m + (1-\beta_1) g),\; m \leftarrow \beta_2 m + (1-\beta_2) g$."""
    return jnp.sign(ema(mu, g, b1)), ema(mu, g, b2)


@rule(oracle=optax.sign_sgd)
def sign_sgd(g):
    r"""signSGD (Bernstein et al. 2018, arXiv:1802.04434): $u = \operatorname{sign}(g)$."""
    return (jnp.sign(g),)


@rule(
    start={"mu": without_when_off("beta")},
    oracle=optax.signum,
    positional=("learning_rate", "beta", "accumulator_dtype"),
    aliases={"accumulator_dtype": "mu"},
    bounds={"beta": (0, 1)},
)
def signum(g, mu, *, beta=0.9):
    r"""Signum (Bernstein et al. 2018, arXiv:1802.04434): $m \leftarrow \beta m + (1-\beta) g,\; u = \operatorname{sign}(m)$."""
    mu = ema(mu, g, beta)
    return jnp.sign(mu), mu


@rule(
    start={"scale": lambda p: real_zeros(p) + 1},
    alternatives={"eta_plus": 1.5, "min_step_size": 0.03, "max_step_size": 0.06},
)
def rprop(
    g, scale, sign, *, learning_rate, eta_minus=0.5, eta_plus=1.2, min_step_size=1e-6, max_step_size=50.0
):  # fmt: skip
    r"""Rprop (Riedmiller & Braun 1993, doi:10.1109/ICNN.1993.298623): $s \leftarrow \eta^{\pm} s,\; x \leftarrow x - s \operatorname{sign}(g)$.

    Each coordinate's step $s$ begins at the learning rate, grows by $\eta^+$ while the sign of its gradient stays
    and shrinks by $\eta^-$ when it turns, within its bounds; where it turns the coordinate rests for a step
    (iRprop-, Igel & Huesken 2000). The state holds $s$ as a multiple of the learning rate, so that a schedule
    or a new value scales all steps.
    """
    product = jnp.real(jnp.sign(g) * jnp.conj(sign))
    scale = scale * jnp.where(product > 0, eta_plus, jnp.where(product < 0, eta_minus, 1))
    # A learning rate of 0 has no multiple that the bounds could hold.
    rate = jnp.where(learning_rate > 0, learning_rate, 1)
    scale = jnp.where(product != 0, jnp.clip(scale, min_step_size / rate, max_step_size / rate), scale)
    sign = jnp.where(product < 0, 0, jnp.sign(g))
    return -learning_rate * scale * sign, scale, sign
