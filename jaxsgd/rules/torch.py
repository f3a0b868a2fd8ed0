"""Rules whose formula in torch.optim differs from the one under the same name in optax.

Floor 3. `jaxsgd.torch` calls these under torch's names; here each stands beside its equation.
"""

from __future__ import annotations

import jax.numpy as jnp

from jaxsgd.numerics import debias, ema, filled, real_zeros, sq, zeros
from jaxsgd.rule import rule
from jaxsgd.spec import without_when_off

__all__ = [
    "torch_adagrad",
    "torch_amsgrad",
    "torch_asgd",
    "torch_nadam",
    "torch_radam",
    "torch_rmsprop",
    "torch_sgd",
]


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


@rule(start={"nu": real_zeros})
def torch_radam(g, mu, nu, *, t, b1=0.9, b2=0.999, eps=1e-8):
    r"""RAdam as in torch.optim (Liu et al. 2020, arXiv:1908.03265): $u = \hat m_t r_t \sqrt{1 - \beta_2^t} / (\sqrt{v_t} + \epsilon)$ if $\rho_t > 5$, else $\hat m_t$.

    $\rho_t = \rho_\infty - 2 t \beta_2^t / (1 - \beta_2^t)$ with $\rho_\infty = 2 / (1 - \beta_2) - 1$, and
    $r_t^2 = (\rho_t - 4)(\rho_t - 2) \rho_\infty / ((\rho_\infty - 4)(\rho_\infty - 2) \rho_t)$.
    """
    mu, nu = ema(mu, g, b1), ema(nu, sq(g), b2)
    full = 2 / (1 - b2) - 1
    length = full - 2 * t * (1 - filled(b2, t)) / filled(b2, t)
    safe = jnp.maximum(length, 5)  # below, the branch is not taken, and must not be NaN either
    rectified = jnp.sqrt((safe - 4) * (safe - 2) * full / ((full - 4) * (full - 2) * safe))
    adaptive = rectified * jnp.sqrt(filled(b2, t)) / (jnp.sqrt(nu) + eps)
    return debias(mu, b1, t) * jnp.where(length > 5, adaptive, 1), mu, nu


@rule(
    start={"average": zeros, "eta": lambda p: jnp.zeros((), p.real.dtype)},
    coupled=True,
    bounds={"alpha": (0, float("inf"))},
    alternatives={"lambd": 0.1, "t0": 10.0},
    needs={"alpha": {"lambd": 0.1}},
    exceptions={"narrow": "the average is of the parameters, rounded as they are"},
)
def torch_asgd(g, average, eta, *, t, p, learning_rate, lambd=1e-4, alpha=0.75, t0=1e6):
    r"""ASGD as in torch.optim (Polyak & Juditsky 1992, doi:10.1137/0330046): $x \leftarrow (1 - \lambda \eta_t) x - \eta_t g,\; \bar x \leftarrow \bar x + \mu_t (x - \bar x),\; \eta_{t+1} = \eta / (1 + \lambda \eta t)^\alpha$.

    $\mu_t = 1 / \max(1, t - 1 - t_0)$: the average $\bar x$ begins after ``t0`` steps; `jaxsgd.eval_params` gives it.
    """
    # A step's rate is made at the end of the step before, so that a changed learning rate waits one step.
    eta = jnp.where(t == 1, learning_rate, eta)
    delta = -eta * (g + lambd * p)
    average = average + (p + delta - average) / jnp.maximum(1, t - 1 - t0)
    return delta, average, learning_rate / (1 + lambd * learning_rate * t) ** alpha
