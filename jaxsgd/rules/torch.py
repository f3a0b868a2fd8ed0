"""Rules whose formula in torch.optim differs from the one under the same name in optax.

Floor 3. `jaxsgd.torch` calls these under torch's names; here each stands beside its equation.
"""

from __future__ import annotations

import jax.numpy as jnp

from jaxsgd.numerics import debias, ema, real_zeros, sq
from jaxsgd.rule import rule
from jaxsgd.spec import without_when_off

__all__ = ["torch_adagrad", "torch_amsgrad", "torch_nadam", "torch_rmsprop", "torch_sgd"]


@rule(
    start={"trace": without_when_off("momentum")},
    needs={"nesterov": {"momentum": 0.9}, "dampening": {"momentum": 0.9}},
)
def torch_sgd(g, trace, *, t, momentum=0.0, dampening=0.0, nesterov=False):
    r"""SGD as in torch.optim (Sutskever et al. 2013, PMLR 28:1139): $b_1 = g_1,\; b_t = \mu b_{t-1} + (1-\tau) g_t,\; x \leftarrow x - \eta b_t$.

    With ``dampening`` $\tau$ the first step is not damped. ``nesterov`` takes $g + \mu b$.
    """
    if trace is None:
        return g, None
    trace = jnp.where(t == 1, g, momentum * trace + (1 - dampening) * g)
    return (g + momentum * trace if nesterov else trace), trace


@rule(start={"nu": real_zeros, "nu_max": real_zeros})
def torch_amsgrad(g, mu, nu, nu_max, *, t, b1=0.9, b2=0.999, eps=1e-8):
    r"""AMSGrad as in torch.optim (Reddi et al. 2018, arXiv:1904.09237): $\bar v \leftarrow \max(\bar v, v_t),\; u = \hat m_t / (\sqrt{\bar v / (1 - \beta_2^t)} + \epsilon)$.

    The maximum is of the raw average, which is corrected afterwards.
    """
    mu, nu = ema(mu, g, b1), ema(nu, sq(g), b2)
    nu_max = jnp.maximum(nu_max, nu)
    return debias(mu, b1, t) / (jnp.sqrt(debias(nu_max, b2, t)) + eps), mu, nu, nu_max


def _nadam_momenta(mu_product, *, t, b1, momentum_decay):
    mu_now = b1 * (1 - 0.5 * 0.96 ** (t * momentum_decay))
    mu_next = b1 * (1 - 0.5 * 0.96 ** ((t + 1) * momentum_decay))
    return {"mu_product": mu_product * mu_now, "mu_now": mu_now, "mu_next": mu_next}


@rule(start={"nu": real_zeros, "mu_product": lambda: 1.0}, shared=_nadam_momenta)
def torch_nadam(
    g, mu, nu, *, t, mu_product, mu_now, mu_next, b1=0.9, b2=0.999, eps=1e-8, momentum_decay=4e-3
):  # fmt: skip
    r"""NAdam as in torch.optim (Dozat 2016, OpenReview:OM0jvwB8jIp57ZJjtNEZ): $u = \left(\frac{(1-\mu_t) g}{1 - \prod_{i \le t} \mu_i} + \frac{\mu_{t+1} m_t}{1 - \prod_{i \le t+1} \mu_i}\right) / (\sqrt{\hat v_t} + \epsilon)$.

    The momentum rises as $\mu_t = \beta_1 (1 - 0.5 \cdot 0.96^{t \psi})$ with ``momentum_decay`` $\psi$.
    """
    mu, nu = ema(mu, g, b1), ema(nu, sq(g), b2)
    ahead = (1 - mu_now) / (1 - mu_product) * g + mu_next / (1 - mu_product * mu_next) * mu
    return ahead / (jnp.sqrt(debias(nu, b2, t)) + eps), mu, nu


@rule(
    start={"nu": real_zeros, "mean": without_when_off("centered"), "trace": without_when_off("momentum")},
    bounds={"alpha": (0, 1)},
)
def torch_rmsprop(g, nu, mean, trace, *, alpha=0.99, eps=1e-8, momentum=0.0, centered=False):
    r"""RMSprop as in torch.optim (Tieleman & Hinton 2012, Coursera lecture 6e): $b \leftarrow \mu b + g / (\sqrt{v - \bar g^2} + \epsilon),\; x \leftarrow x - \eta b$.

    The mean gradient $\bar g$ is subtracted only when ``centered``. Against `rmsprop`: $\epsilon$ outside the
    root, and the momentum runs over directions, before the learning rate.
    """
    nu = ema(nu, sq(g), alpha)
    mean = ema(mean, g, alpha) if centered else None
    variance = jnp.maximum(nu - sq(mean), 0) if centered else nu
    u = g / (jnp.sqrt(variance) + eps)
    trace = u if trace is None else momentum * trace + u
    return trace, nu, mean, trace


@rule(start={"accumulator": lambda p, initial_accumulator_value: real_zeros(p) + initial_accumulator_value})
def torch_adagrad(g, accumulator, *, initial_accumulator_value=0.0, eps=1e-10):
    r"""Adagrad as in torch.optim (Duchi et al. 2011, JMLR 12:2121): $s \leftarrow s + g^2,\; u = g / (\sqrt s + \epsilon)$."""
    accumulator = accumulator + sq(g)
    return g / (jnp.sqrt(accumulator) + eps), accumulator
