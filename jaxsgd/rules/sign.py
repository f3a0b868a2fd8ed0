"""Rules whose step is a sign.

Floor 3.
"""

from __future__ import annotations

import jax.numpy as jnp
import optax

from jaxsgd.numerics import ema
from jaxsgd.rule import rule

__all__ = ["lion"]


@rule(
    oracle=optax.lion,
    positional=("learning_rate", "b1", "b2", "mu_dtype", "weight_decay", "mask"),
    aliases={"mu_dtype": "mu"},
    weight_decay=1e-3,
)
def lion(g, mu, *, b1=0.9, b2=0.99):
    r"""Lion (Chen et al. 2023, arXiv:2302.06675): $u = \operatorname{sign}(\beta_1 m + (1-\beta_1) g),\; m \leftarrow \beta_2 m + (1-\beta_2) g$."""
    return jnp.sign(ema(mu, g, b1)), ema(mu, g, b2)
