r"""Rules that change one thing about Adam: the mean, the scale, the order, or the sign.

As in `jaxsgd.rules.adaptive`, $m$ and $v$ are moving averages of the gradient and of a squared magnitude, and a hat is
bias correction.
"""

from __future__ import annotations

import math
from typing import Annotated

import jax.numpy as jnp

from jaxsgd.hyper import Decay, within
from jaxsgd.numerics import debias, ema, sq, zeros
from jaxsgd.registry import rule
from jaxsgd.rules.adaptive import Accumulator, FirstMoment, adam, adamax, mean_hat
from jaxsgd.slots import Iterate, Mean, Square, kept_in, start

__all__ = [
    "acprop", "adabelief", "adamaxw", "adan", "ademamix", "adopt", "grams", "madgrad", "mars", "nadamw",
    "optimistic_adam", "optimistic_adam_v2", "radam", "simplified_ademamix", "yogi",
]  # fmt: skip

# -- presets -------------------------------------------------------------------------------------

adamaxw = adamax.preset(
    "adamaxw",
    r"""AdaMaxW (Kingma & Ba 2015, arXiv:1412.6980; Loshchilov & Hutter 2019, arXiv:1711.05101): $v \leftarrow \max(\beta_2 v, \lvert g \rvert + \epsilon),\; x \leftarrow x - \eta\,(\hat m_t / v + \lambda x)$.

    `adamax` with decoupled weight decay, of every parameter unless ``mask`` or ``groups`` say otherwise.

    Use it when you want `adamax` with weight decay. Avoid it when single outliers occur: the maximum forgets them
    slowly.
    """,
    positional="learning_rate b1 b2 eps weight_decay mask",
    weight_decay=1e-4,
)

nadamw = adam.preset(
    "nadamw",
    r"""NAdamW (Dozat 2016, OpenReview:OM0jvwB8jIp57ZJjtNEZ; Loshchilov & Hutter 2019, arXiv:1711.05101): $x \leftarrow x - \eta\,((\beta_1 \hat m_{t+1} + (1-\beta_1) \hat g_t) / (\sqrt{\hat v_t} + \epsilon) + \lambda x)$.

    `adam` with Nesterov's look-ahead and decoupled weight decay.

    Use it when AdamW works and you want Nesterov's look-ahead. Avoid it when noise is large: looking ahead then gains
    nothing.
    """,
    positional="learning_rate b1 b2 eps eps_root mu_dtype weight_decay mask",
    nesterov=True,
    weight_decay=1e-4,
)


# -- another scale -------------------------------------------------------------------------------


@rule(positional="learning_rate b1 b2 eps eps_root", usual_rate=1e-3, batch_scaling="sqrt")
def adabelief(
    g, mu: FirstMoment, nu: Square, *, t, b1: Decay = 0.9, b2: Decay = 0.999, eps=1e-16, eps_root=1e-16, nesterov=False
):
    r"""AdaBelief (Zhuang et al. 2020, arXiv:2010.07468): $v \leftarrow \beta_2 v + (1-\beta_2)(g - m)^2 + \bar\epsilon,\; u = \hat m_t / (\sqrt{\hat v_t} + \epsilon)$.

    A gradient close to its mean $m$ is believed: the step is then long.

    Use it when gradients keep their direction: steps are then longer than Adam's. Avoid it when the loss has hardly any
    noise: the denominator is then near zero.
    """
    mu = ema(mu, g, b1)
    nu = ema(nu, sq(g - mu), b2) + eps_root
    return mean_hat(mu, g, b1, t, nesterov) / (jnp.sqrt(debias(nu, b2, t)) + eps), mu, nu


@rule(positional="learning_rate b1 b2 eps eps_root weight_decay mask", usual_rate=1e-3)
def acprop(
    g, mu: Mean, nu: Square, *, t, b1: Decay = 0.9, b2: Decay = 0.999, eps=1e-16, eps_root=1e-16, stale_mean=False
):
    r"""ACProp (Zhuang et al. 2021, arXiv:2110.05454): $u = g / (\sqrt{\hat v_{t-1}} + \epsilon),\; v_t = \beta_2 v_{t-1} + (1-\beta_2)(g - m_t)^2 + \bar\epsilon$.

    The scale is one step older than the gradient, so that the two are independent; the first step is $g$.
    The residual is of the new mean, as in the paper and its authors' code. ``stale_mean=True`` takes that of
    the mean before, as optax does: $v$ is $1/\beta_1^2$ as large, the steps $\beta_1$ times as long.

    Use it when Adam's steps are unstable, since the scale here is independent of the gradient. Avoid it when some
    gradients hardly vary: their scale is near zero, and the steps are long.
    """
    mean, mu = mu, ema(mu, g, b1)
    scale = jnp.where(t == 1, 1, jnp.sqrt(debias(nu, b2, jnp.maximum(t - 1, 1))))
    residual = g - (mean if stale_mean else mu)
    return g / (scale + eps), mu, ema(nu, sq(residual), b2) + eps_root


@rule(positional="learning_rate b1 b2 eps", usual_rate=1e-3, batch_scaling="sqrt")
def yogi(
    g,
    mu: Annotated[Mean, start(lambda p, initial_mean: zeros(p) + initial_mean)],
    nu: Accumulator,
    *,
    t,
    b1: Decay = 0.9,
    b2: Decay = 0.999,
    eps=1e-3,
    eps_root=0.0,
    initial_accumulator_value=1e-6,
    initial_mean=0.0,
):
    r"""Yogi (Zaheer et al. 2018, NeurIPS 31): $v \leftarrow v - (1-\beta_2) \operatorname{sign}(v - g^2)\, g^2,\; u = \hat m_t / (\sqrt{\hat v_t} + \epsilon)$.

    $v$ shrinks by no more than a share of $g^2$, so that a rare large gradient is remembered. The mean starts
    at 0, as in the paper: no gradient, no step. ``initial_mean=1e-6`` is optax's.

    Use it when Adam's second moment grows too fast after rare large gradients. Avoid it when the first gradients are
    huge: the moment falls slowly.
    """
    mu = ema(mu, g, b1)
    nu = nu - (1 - b2) * jnp.sign(nu - sq(g)) * sq(g)
    return debias(mu, b1, t) / (jnp.sqrt(debias(nu, b2, t) + eps_root) + eps), mu, nu


@rule(positional="learning_rate b1 b2 eps eps_root threshold", usual_rate=1e-3, batch_scaling="sqrt")
def radam(
    g,
    mu: FirstMoment,
    nu: Square,
    *,
    t,
    b1: Decay = 0.9,
    b2: Decay = 0.999,
    eps=1e-8,
    eps_root=0.0,
    threshold: Annotated[float, within(4, math.inf)] = 5.0,
    nesterov=False,
):
    r"""RAdam (Liu et al. 2020, arXiv:1908.03265): $u = \hat m_t \sqrt{\frac{(\rho_t-4)(\rho_t-2)\rho_\infty}{(\rho_\infty-4)(\rho_\infty-2)\rho_t}} / (\sqrt{\hat v_t} + \epsilon)$ if $\rho_t \ge 5$, else $\hat m_t$.

    $\rho_t = \rho_\infty - 2 t \beta_2^t / (1 - \beta_2^t)$ is the number of gradients that $v$ averages, and
    $\rho_\infty = 2 / (1-\beta_2) - 1$. Below ``threshold`` (at least 4) the scale is not trusted.

    Use it when you want no warm-up to tune. Avoid it when you have a warm-up that works: take `adam`.
    """
    mu, nu = ema(mu, g, b1), ema(nu, sq(g), b2)
    mean = mean_hat(mu, g, b1, t, nesterov)
    most = 2 / (1 - b2) - 1
    rho = most - debias(2 * t * b2**t, b2, t)
    ratio = (rho - 4) * (rho - 2) * most / ((most - 4) * (most - 2) * rho)
    # Below 4 the ratio may be negative; there its root is not used, and must not be NaN.
    rectifier = jnp.sqrt(jnp.where(rho >= threshold, ratio, 1))
    adapted = rectifier * mean / (jnp.sqrt(debias(nu, b2, t) + eps_root) + eps)
    return jnp.where(rho >= threshold, adapted, mean), mu, nu


# -- another mean --------------------------------------------------------------------------------


@rule(positional="learning_rate b1 b2 b3 eps eps_root weight_decay mask", usual_rate=1e-3, cost="differences")
def adan(
    g,
    mu: FirstMoment,
    change: Mean,
    nu: Square,
    previous: Mean,
    *,
    t,
    b1: Decay = 0.98,
    b2: Decay = 0.92,
    b3: Decay = 0.99,
    eps=1e-8,
    eps_root=1e-8,
    weight=None,
):
    r"""Adan (Xie et al. 2022, arXiv:2208.06677): $\delta = g_t - g_{t-1},\; u = (\hat m_t + \beta_2 \hat d_t) / (\sqrt{\hat v_t + \bar\epsilon} + \epsilon)$.

    $m$ averages $g$, $d$ averages $\delta$ (decay $\beta_2$) and $v$ averages $(g + \beta_2 \delta)^2$ (decay $\beta_3$).
    The decays are those of averages, as in the authors' code; the paper's betas are one minus them. ``weight``
    multiplies the differences. None is ``b2``; optax has ``1 - b2``.

    Use it when batches are large and gradients change smoothly. Avoid it when memory is short: it keeps four numbers a
    parameter.
    """
    delta, weight = jnp.where(t == 1, 0, g - previous), b2 if weight is None else weight
    mu, change = ema(mu, g, b1), ema(change, delta, b2)
    nu = ema(nu, sq(g + weight * delta), b3)
    ahead = debias(mu, b1, t) + weight * debias(change, b2, t)
    return ahead / (jnp.sqrt(debias(nu, b3, t) + eps_root) + eps), mu, change, nu, g


@rule(positional="learning_rate b1 b2 b3 alpha eps eps_root mu_dtype weight_decay mask", usual_rate=1e-3)
def ademamix(
    g,
    mu: Annotated[FirstMoment, kept_in("mu_dtype")],
    mu_slow: Annotated[Mean, kept_in("mu_dtype")],
    nu: Square,
    *,
    t,
    b1: Decay = 0.9,
    b2: Decay = 0.999,
    b3: Decay = 0.9999,
    alpha=5.0,
    eps=1e-8,
    eps_root=0.0,
):
    r"""AdEMAMix (Pagliardini et al. 2024, arXiv:2409.03137): $u = (\hat m_t + \alpha s_t) / (\sqrt{\hat v_t + \bar\epsilon} + \epsilon),\; s_t = \beta_3 s_{t-1} + (1-\beta_3) g$.

    A slow mean $s$ beside the fast one. It is not corrected, so its weight grows slowly. ``b3`` and ``alpha`` may be
    schedules, as in the paper. ``mu_dtype`` is the dtype in which both means are stored.

    Use it when runs are long: the slow average uses gradients from thousands of steps. Avoid it when runs are short, or
    the data change on the way.
    """
    mu, mu_slow, nu = ema(mu, g, b1), ema(mu_slow, g, b3), ema(nu, sq(g), b2)
    mixed = debias(mu, b1, t) + alpha * mu_slow
    return mixed / (jnp.sqrt(debias(nu, b2, t) + eps_root) + eps), mu, mu_slow, nu


@rule(positional="learning_rate b1 b2 alpha eps eps_root weight_decay mask", usual_rate=1e-3)
def simplified_ademamix(
    g, trace: Mean, nu: Square, *, t, b1: Decay = 0.99, b2: Decay = 0.95, alpha=0.0, eps=1e-8, eps_root=0.0
):
    r"""Simplified AdEMAMix (Morwani et al. 2025, arXiv:2502.02431): $b \leftarrow \beta_1 b + g,\; u = (b + \alpha g) / (\sqrt{\hat v_t + \bar\epsilon} + \epsilon)$.

    One trace instead of two means. It is a sum, not an average: use $1 - \beta_1$ times the learning rate of Adam.

    Use it when `ademamix` takes too much memory. Avoid it when you reuse Adam's rate as it is: the trace is a sum.
    """
    trace, nu = b1 * trace + g, ema(nu, sq(g), b2)
    return (trace + alpha * g) / (jnp.sqrt(debias(nu, b2, t) + eps_root) + eps), trace, nu


@rule(positional="learning_rate optimism b1 b2 eps eps_root mu_dtype", usual_rate=1e-3, cost="kept_in_place")
def optimistic_adam(
    g,
    mu: Annotated[FirstMoment, kept_in("mu_dtype")],
    nu: Square,
    previous: Mean,
    *,
    t,
    learning_rate,
    optimism=None,
    b1: Decay = 0.9,
    b2: Decay = 0.999,
    eps=1e-8,
    eps_root=0.0,
    nesterov=True,
):
    r"""Optimistic Adam (Daskalakis et al. 2018, arXiv:1711.00141): $x \leftarrow x - \eta u_t - o\,(u_t - u_{t-1})$.

    $u$ is the direction of `adam`. The optimism $o$ is the learning rate by default. It is not multiplied by the
    learning rate, as it is in `optimistic_adam_v2`.

    Use it when two players train against each other, as in a GAN. Avoid it when you minimise one loss: it gains
    nothing.
    """
    o = learning_rate if optimism is None else optimism
    u, mu, nu = adam.fn(g, mu, nu, t=t, b1=b1, b2=b2, eps=eps, eps_root=eps_root, nesterov=nesterov)
    return -learning_rate * u - o * jnp.where(t == 1, 0, u - previous), mu, nu, u


@rule(positional="learning_rate", usual_rate=1e-3, cost="kept_in_place")
def optimistic_adam_v2(
    g,
    mu: Annotated[FirstMoment, kept_in("mu_dtype")],
    nu: Square,
    previous: Mean,
    *,
    t,
    alpha=1.0,
    beta=1.0,
    b1: Decay = 0.9,
    b2: Decay = 0.999,
    eps=1e-8,
    eps_root=0.0,
    nesterov=True,
):
    r"""Optimistic Adam (Daskalakis et al. 2018, arXiv:1711.00141): $x \leftarrow x - \eta\,(\alpha u_t + \beta\,(u_t - u_{t-1}))$.

    $u$ is the direction of `adam`. The step takes the last direction back and repeats it with the current gradient.
    This damps the circling of two players around an equilibrium.

    Use it when two players train against each other, as in a GAN. Avoid it when you minimise one loss: it gains
    nothing.
    """
    u, mu, nu = adam.fn(g, mu, nu, t=t, b1=b1, b2=b2, eps=eps, eps_root=eps_root, nesterov=nesterov)
    return alpha * u + beta * jnp.where(t == 1, 0, u - previous), mu, nu, u


@rule(usual_rate=1e-3, cost="corrected_gradient")
def mars(
    g,
    mu: Mean,
    nu: Square,
    previous: Mean,
    *,
    t,
    b1: Decay = 0.95,
    b2: Decay = 0.99,
    eps=1e-8,
    gamma=0.025,
    max_norm=1.0,
):
    r"""MARS-AdamW (Yuan et al. 2024, arXiv:2411.10438): $c = g_t + \gamma \tfrac{\beta_1}{1-\beta_1} (g_t - g_{t-1}),\; \tilde c = c \min(1, 1 / \lVert c \rVert),\; u = \hat m_t / (\sqrt{\hat v_t} + \epsilon)$.

    Adam on $\tilde c$, a gradient of reduced variance. This is the approximate form, where $g_{t-1}$ is of the
    batch before (and 0 at first, as in the authors' code). The norm is of one array and at most ``max_norm``.
    The authors use it for matrices and AdamW for the rest: see `optax.partition`.

    Use it when the noise of gradients limits a language model. Avoid it when memory is short: it keeps three numbers a
    parameter.
    """
    c = g + gamma * b1 / (1 - b1) * (g - previous)
    norm = jnp.sqrt(jnp.sum(sq(c)))
    c = c * jnp.where(norm > max_norm, max_norm / norm, 1)
    mu, nu = ema(mu, c, b1), ema(nu, sq(c), b2)
    return debias(mu, b1, t) / (jnp.sqrt(debias(nu, b2, t)) + eps), mu, nu, g


# -- another order, another sign -----------------------------------------------------------------


@rule(positional="learning_rate b1 b2 eps mu_dtype", usual_rate=1e-3)
def adopt(
    g,
    mu: Annotated[FirstMoment, kept_in("mu_dtype")],
    nu: Square,
    *,
    t,
    b1: Decay = 0.9,
    b2: Decay = 0.9999,
    eps=1e-6,
    nesterov=False,
    use_clipping=True,
    clip_value_fn=None,
):
    r"""ADOPT (Taniguchi et al. 2024, arXiv:2411.02853): $m \leftarrow \beta_1 m + (1-\beta_1) \operatorname{clip}(g / \max(\sqrt{v_{t-1}}, \epsilon), t^{1/4}),\; u = m$.

    The gradient is scaled by the average before it, then averaged, so that any $\beta_2$ converges. The first
    step only sets $v = g^2$. ``clip_value_fn`` is a number or a function of the 0-based step. Default: the step's
    fourth root.

    Use it when Adam needs a special ``b2`` to converge. Avoid it when you compare with Adam's published settings:
    ``b2`` and ``eps`` differ.
    """
    scaled = g / jnp.maximum(jnp.sqrt(nu), eps)
    if use_clipping:
        top = (t - 1) ** 0.25 if clip_value_fn is None else clip_value_fn
        scaled = jnp.where(jnp.abs(scaled) <= top, scaled, top * jnp.sign(scaled))
    scaled = jnp.where(t == 1, 0, scaled)
    mu, nu = ema(mu, scaled, b1), jnp.where(t == 1, sq(g), ema(nu, sq(g), b2))
    return (ema(mu, scaled, b1) if nesterov else mu), mu, nu


@rule(positional="learning_rate momentum weight_decay eps", coupled=True, usual_rate=0.01)
def madgrad(g, x0: Iterate, s: Mean, accumulator: Square, *, p, t, learning_rate, momentum: Decay = 0.9, eps=1e-6):
    r"""MADGRAD (Defazio & Jelassi 2021, arXiv:2101.11075): $\lambda_t = \eta \sqrt t,\; s \leftarrow s + \lambda_t g,\; a \leftarrow a + \lambda_t g^2,\; x \leftarrow \mu x + (1-\mu) (x_0 - s / (\sqrt[3]{a} + \epsilon))$.

    Dual averaging: each point is an average towards one step from $x_0$. ``eps`` is added to the
    learning rate too. Weight decay is added to the gradient.

    Use it when gradients are sparse, or Adam generalises badly on images. Avoid it when you cannot tune: rates and
    decays of Adam and SGD do not carry over.
    """
    weight = (learning_rate + eps) * jnp.sqrt(t)
    s, accumulator = s + weight * g, accumulator + weight * sq(g)
    z = x0 - s / (jnp.cbrt(accumulator) + eps)
    return (1 - momentum) * (z - p), x0, s, accumulator


@rule(usual_rate=1e-3)
def grams(g, mu: FirstMoment, nu: Square, *, t, b1: Decay = 0.9, b2: Decay = 0.999, eps=1e-8):
    r"""Grams (Cao et al. 2024, arXiv:2412.17107): $u = \operatorname{sign}(g) \, \lvert \hat m_t / (\sqrt{\hat v_t} + \epsilon) \rvert$.

    A step has the length of Adam's and the sign of the current gradient.

    Use it when momentum makes Adam overshoot. Avoid it when batches are small: the sign of one gradient is noise.
    """
    u, mu, nu = adam.fn(g, mu, nu, t=t, b1=b1, b2=b2, eps=eps)
    return jnp.sign(g) * jnp.abs(u), mu, nu
