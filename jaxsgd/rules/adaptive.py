r"""Rules that scale each coordinate by its own history.

Throughout, $m$ and $v$ are moving averages of the gradient and of its squared magnitude, and a hat is bias correction:
$\hat m_t = m_t / (1 - \beta_1^t)$.
"""

from __future__ import annotations

from typing import Annotated, Any

import jax
import jax.numpy as jnp

from jaxsgd.hyper import Decay
from jaxsgd.numerics import debias, ema, real_zeros, sq
from jaxsgd.registry import rule
from jaxsgd.slots import Mean, Square, kept_in, start, unless

__all__ = ["adadelta", "adagrad", "adam", "adamax", "adamw", "amsgrad", "nadam", "rmsprop"]

FirstMoment = Annotated[Mean, unless("b1")]
Accumulator = Annotated[Square, start(lambda p, initial_accumulator_value: real_zeros(p) + initial_accumulator_value)]


def mean_hat(mu: jax.Array, g: jax.Array, b1: Any, t: Any, nesterov: bool) -> jax.Array:
    """The corrected mean, one step ahead where ``nesterov`` (Dozat 2016)."""
    return ema(debias(mu, b1, t + 1), debias(g, b1, t), b1) if nesterov else debias(mu, b1, t)


@rule(usual_rate=0.03)
def adagrad(g, accumulator: Accumulator, *, initial_accumulator_value=0.1, eps=1e-7):
    r"""Adagrad (Duchi et al. 2011, JMLR 12:2121): $s \leftarrow s + g^2,\; u = g / \sqrt{s + \epsilon}$.

    Use it when features are sparse, or the problem is convex. Avoid it when a deep network trains for long: the steps
    only shrink.
    """
    accumulator = accumulator + sq(g)
    scale = jnp.where(accumulator > 0, 1 / jnp.sqrt(accumulator + eps), 0)
    return scale * g, accumulator


@rule(usual_rate=1e-3, batch_scaling="sqrt")
def rmsprop(
    g,
    nu: Annotated[Square, start(lambda p, initial_scale: real_zeros(p) + initial_scale)],
    mu: Annotated[Mean, unless("centered")],
    velocity: Annotated[Mean, unless("momentum")],
    *,
    learning_rate,
    t,
    decay: Decay = 0.9,
    eps=1e-8,
    initial_scale=0.0,
    eps_in_sqrt=True,
    centered=False,
    momentum: Decay = None,
    nesterov=False,
    bias_correction=False,
):
    r"""RMSProp (Tieleman & Hinton 2012, Coursera lecture 6e): $v \leftarrow \rho v + (1-\rho) g^2,\; x \leftarrow x - \eta g / \sqrt{v + \epsilon}$.

    ``centered`` subtracts the squared mean gradient from $v$ (Graves 2013, arXiv:1308.0850);
    ``eps_in_sqrt=False`` is $\sqrt v + \epsilon$; ``momentum`` runs over the steps, learning rate included.

    Use it when a recurrent network or an agent trains on data that change. Avoid it when the first steps matter: by
    default nothing corrects its bias.
    """
    nu = ema(nu, sq(g), decay)
    mean = ema(mu, g, decay) if centered else None
    correct = (lambda m: debias(m, decay, t)) if bias_correction else (lambda m: m)
    variance = jnp.maximum(correct(nu) - sq(correct(mean)), 0) if centered else correct(nu)
    root = jnp.sqrt(variance + eps) if eps_in_sqrt else jnp.sqrt(variance) + eps
    step = -learning_rate * g / root
    if velocity is None:
        return step, nu, mean, None
    velocity = momentum * velocity + step
    return (momentum * velocity + step if nesterov else velocity), nu, mean, velocity


@rule(positional="learning_rate b1 b2 eps eps_root mu_dtype", usual_rate=1e-3, batch_scaling="sqrt")
def adam(
    g,
    mu: Annotated[FirstMoment, kept_in("mu_dtype")],
    nu: Square,
    *,
    t,
    b1: Decay = 0.9,
    b2: Decay = 0.999,
    eps=1e-8,
    eps_root=0.0,
    nesterov=False,
    bias_correction=True,
):
    r"""Adam (Kingma & Ba 2015, arXiv:1412.6980): $u = \hat m_t / (\sqrt{\hat v_t + \bar\epsilon} + \epsilon)$.

    ``bias_correction=False`` takes $m$ and $v$ as they are; with ``b1=0`` no $m$ is kept.

    Use it when layers have gradients of different sizes, as a first choice without weight decay. Avoid it when you want
    weight decay: take `adamw`.
    """
    mu, nu = ema(mu, g, b1), ema(nu, sq(g), b2)
    if not bias_correction:
        t = jnp.inf
    return mean_hat(mu, g, b1, t, nesterov) / (jnp.sqrt(debias(nu, b2, t) + eps_root) + eps), mu, nu


adamw = adam.preset(
    "adamw",
    r"""AdamW (Loshchilov & Hutter 2019, arXiv:1711.05101): $x \leftarrow x - \eta\,(\hat m_t / (\sqrt{\hat v_t} + \epsilon) + \lambda x)$.

    `adam` with decoupled weight decay, of every parameter unless ``mask`` or ``groups`` say otherwise.

    Use it when you train a transformer, and as a first choice with weight decay. Avoid it when memory is short: it
    keeps two numbers a parameter.
    """,
    positional="learning_rate b1 b2 eps eps_root mu_dtype weight_decay mask",
    weight_decay=1e-4,
)

nadam = adam.preset(
    "nadam",
    r"""NAdam (Dozat 2016, OpenReview:OM0jvwB8jIp57ZJjtNEZ): $u = (\beta_1 \hat m_{t+1} + (1-\beta_1) \hat g_t) / (\sqrt{\hat v_t} + \epsilon)$.

    `adam` with Nesterov's look-ahead, where $\hat m_{t+1} = m_t / (1 - \beta_1^{t+1})$ and
    $\hat g_t = g_t / (1 - \beta_1^t)$.

    Use it when Adam works and you want Nesterov's look-ahead. Avoid it when you want weight decay: take `nadamw`.
    """,
    nesterov=True,
)


@rule(
    positional="learning_rate b1 b2 eps eps_root mu_dtype bias_correction_mu bias_correction_nu",
    usual_rate=1e-3,
    batch_scaling="sqrt",
)
def amsgrad(
    g,
    mu: Annotated[Mean, kept_in("mu_dtype")],
    nu: Square,
    nu_max: Square,
    *,
    t,
    b1: Decay = 0.9,
    b2: Decay = 0.999,
    eps=1e-8,
    eps_root=0.0,
    bias_correction_mu=True,
    bias_correction_nu=True,
):
    r"""AMSGrad (Reddi et al. 2018, arXiv:1904.09237): $\bar v \leftarrow \max(\bar v, \hat v_t),\; u = \hat m_t / (\sqrt{\bar v} + \epsilon)$.

    The maximum is of the corrected average, as in optax; torch takes it before the correction
    (`jaxsgd.torch.Adam`).

    Use it when Adam's steps grow again late in a run. Avoid it when the first gradients are huge: their scale is never
    forgotten.
    """
    mu, nu = ema(mu, g, b1), ema(nu, sq(g), b2)
    mean = debias(mu, b1, t) if bias_correction_mu else mu
    nu_max = jnp.maximum(nu_max, debias(nu, b2, t) if bias_correction_nu else nu)
    return mean / (jnp.sqrt(nu_max + eps_root) + eps), mu, nu, nu_max


@rule(usual_rate=1e-3, batch_scaling="sqrt")
def adamax(g, mu: Mean, nu: Square, *, t, b1: Decay = 0.9, b2: Decay = 0.999, eps=1e-8):
    r"""AdaMax (Kingma & Ba 2015, arXiv:1412.6980): $v \leftarrow \max(\beta_2 v, |g| + \epsilon),\; u = \hat m_t / v$.

    Use it when gradients are sparse, with few large entries. Avoid it when single outliers occur: the maximum forgets
    them slowly.
    """
    mu = ema(mu, g, b1)
    nu = jnp.maximum(b2 * nu, jnp.abs(g) + eps)
    return debias(mu, b1, t) / nu, mu, nu


@rule(
    positional="learning_rate rho eps weight_decay weight_decay_mask",
    learning_rate=1.0,
    coupled=True,
    cost="step_averaged",
)
def adadelta(g, e_g: Square, e_x: Square, *, rho: Decay = 0.9, eps=1e-6):
    r"""Adadelta (Zeiler 2012, arXiv:1212.5701): $E_g \leftarrow \rho E_g + (1-\rho) g^2,\; u = g \sqrt{E_x + \epsilon} / \sqrt{E_g + \epsilon},\; E_x \leftarrow \rho E_x + (1-\rho) u^2$.

    Weight decay is added to the gradient.

    Use it when you want steps in the units of the parameters. Avoid it when runs are short: the first steps are tiny.
    """
    e_g = ema(e_g, sq(g), rho)
    u = g * (jnp.sqrt(e_x + eps) / jnp.sqrt(e_g + eps))
    return u, e_g, ema(e_x, sq(u), rho)
