"""Rules whose formula in torch.optim differs from the one under the same name in optax.

`jaxsgd.torch` has the same rules under torch's names and arguments.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Annotated, Any

import jax
import jax.numpy as jnp

from jaxsgd.hyper import Count, Decay, Static, one_of, within
from jaxsgd.matrices import JORDAN, frobenius, newton_schulz
from jaxsgd.numerics import debias, ema, filled, real_zeros, sq
from jaxsgd.registry import make_rule, rule
from jaxsgd.rules.adaptive import Accumulator
from jaxsgd.rules.layerwise import norm
from jaxsgd.slots import Iterate, Mean, Other, Square, evaluated, start, unless

__all__ = [
    "torch_adafactor",
    "torch_adagrad",
    "torch_amsgrad",
    "torch_asgd",
    "torch_nadam",
    "torch_radam",
    "torch_rmsprop",
    "torch_rprop",
    "torch_sgd",
    "torch_sparse_adam",
]


@rule(usual_rate=0.1, batch_scaling="linear")
def torch_sgd(
    g,
    trace: Annotated[Mean, unless("momentum")],
    *,
    t,
    momentum: Decay = 0.0,
    dampening=0.0,
    nesterov=False,
):
    r"""SGD as in torch.optim (Sutskever et al. 2013, PMLR 28:1139): $b_1 = g_1,\; b_t = \mu b_{t-1} + (1-\tau) g_t,\; x \leftarrow x - \eta b_t$.

    With ``dampening`` $\tau$ the first step is not damped. ``nesterov`` takes $g + \mu b$.

    Use it when you repeat a run of torch.optim. Avoid it in a new run: `sgd` has optax's form.
    """
    if trace is None:
        return g, None
    # Without momentum torch keeps no trace, and damps nothing.
    trace = jnp.where((t == 1) | (momentum == 0), g, momentum * trace + (1 - dampening) * g)
    return (g + momentum * trace if nesterov else trace), trace


@rule(usual_rate=1e-3, batch_scaling="sqrt")
def torch_amsgrad(g, mu: Mean, nu: Square, nu_max: Square, *, t, b1: Decay = 0.9, b2: Decay = 0.999, eps=1e-8):
    r"""AMSGrad as in torch.optim (Reddi et al. 2018, arXiv:1904.09237): $\bar v \leftarrow \max(\bar v, v_t),\; u = \hat m_t / (\sqrt{\bar v / (1 - \beta_2^t)} + \epsilon)$.

    The maximum is of the raw average, which is corrected afterwards.

    Use it when you repeat a run of torch.optim. Avoid it in a new run: `amsgrad` has optax's form.
    """
    mu, nu = ema(mu, g, b1), ema(nu, sq(g), b2)
    nu_max = jnp.maximum(nu_max, nu)
    return debias(mu, b1, t) / (jnp.sqrt(debias(nu_max, b2, t)) + eps), mu, nu, nu_max


def _nadam_momenta(mu_product=1.0, *, t, b1, momentum_decay):
    mu_now = b1 * (1 - 0.5 * 0.96 ** (t * momentum_decay))
    mu_next = b1 * (1 - 0.5 * 0.96 ** ((t + 1) * momentum_decay))
    return {"mu_product": mu_product * mu_now, "mu_now": mu_now, "mu_next": mu_next}


@rule(shared=_nadam_momenta, usual_rate=1e-3, batch_scaling="sqrt")
def torch_nadam(
    g,
    mu: Mean,
    nu: Square,
    *,
    t,
    mu_product,
    mu_now,
    mu_next,
    b1: Decay = 0.9,
    b2: Decay = 0.999,
    eps=1e-8,
    momentum_decay=4e-3,
):
    r"""NAdam as in torch.optim (Dozat 2016, OpenReview:OM0jvwB8jIp57ZJjtNEZ): $u = \left(\frac{(1-\mu_t) g}{1 - \prod_{i \le t} \mu_i} + \frac{\mu_{t+1} m_t}{1 - \prod_{i \le t+1} \mu_i}\right) / (\sqrt{\hat v_t} + \epsilon)$.

    The momentum rises as $\mu_t = \beta_1 (1 - 0.5 \cdot 0.96^{t \psi})$ with ``momentum_decay`` $\psi$.

    Use it when you repeat a run of torch.optim. Avoid it in a new run: `nadam` has optax's form.
    """
    mu, nu = ema(mu, g, b1), ema(nu, sq(g), b2)
    ahead = (1 - mu_now) / (1 - mu_product) * g + mu_next / (1 - mu_product * mu_next) * mu
    return ahead / (jnp.sqrt(debias(nu, b2, t)) + eps), mu, nu


@rule(usual_rate=1e-3, batch_scaling="sqrt")
def torch_rmsprop(
    g,
    nu: Square,
    mean: Annotated[Mean, unless("centered")],
    trace: Annotated[Mean, unless("momentum")],
    *,
    alpha: Decay = 0.99,
    eps=1e-8,
    momentum: Decay = 0.0,
    centered=False,
):
    r"""RMSprop as in torch.optim (Tieleman & Hinton 2012, Coursera lecture 6e): $b \leftarrow \mu b + g / (\sqrt{v - \bar g^2} + \epsilon),\; x \leftarrow x - \eta b$.

    The mean gradient $\bar g$ is subtracted only when ``centered``. Unlike in `rmsprop`, $\epsilon$ is outside the
    root, and the momentum averages directions, before the learning rate.

    Use it when you repeat a run of torch.optim. Avoid it in a new run: `rmsprop` has optax's form.
    """
    nu = ema(nu, sq(g), alpha)
    mean = ema(mean, g, alpha) if centered else None
    variance = jnp.maximum(nu - sq(mean), 0) if centered else nu
    u = g / (jnp.sqrt(variance) + eps)
    trace = u if trace is None else momentum * trace + u
    return trace, nu, mean, trace


@rule(usual_rate=0.03)
def torch_adagrad(g, accumulator: Accumulator, *, t, initial_accumulator_value=0.0, eps=1e-10, lr_decay=0.0):
    r"""Adagrad as in torch.optim (Duchi et al. 2011, JMLR 12:2121): $s \leftarrow s + g^2,\; u_t = g / ((\sqrt s + \epsilon)(1 + (t-1) \kappa))$.

    ``lr_decay`` is $\kappa$.

    Use it when you repeat a run of torch.optim. Avoid it in a new run: `adagrad` has optax's form.
    """
    accumulator = accumulator + sq(g)
    return g / (jnp.sqrt(accumulator) + eps) / (1 + (t - 1) * lr_decay), accumulator


@rule(usual_rate=1e-3, batch_scaling="sqrt")
def torch_radam(g, mu: Mean, nu: Square, *, t, b1: Decay = 0.9, b2: Decay = 0.999, eps=1e-8):
    r"""RAdam as in torch.optim (Liu et al. 2020, arXiv:1908.03265): $u = \hat m_t r_t \sqrt{1 - \beta_2^t} / (\sqrt{v_t} + \epsilon)$ if $\rho_t > 5$, else $\hat m_t$.

    $\rho_t = \rho_\infty - 2 t \beta_2^t / (1 - \beta_2^t)$ with $\rho_\infty = 2 / (1 - \beta_2) - 1$, and
    $r_t^2 = (\rho_t - 4)(\rho_t - 2) \rho_\infty / ((\rho_\infty - 4)(\rho_\infty - 2) \rho_t)$.

    Use it when you repeat a run of torch.optim. Avoid it in a new run: `radam` has optax's form.
    """
    mu, nu = ema(mu, g, b1), ema(nu, sq(g), b2)
    full = 2 / (1 - b2) - 1
    length = full - 2 * t * (1 - filled(b2, t)) / filled(b2, t)
    safe = jnp.maximum(length, 5)  # below, the branch is not taken, and must not be NaN
    rectified = jnp.sqrt((safe - 4) * (safe - 2) * full / ((full - 4) * (full - 2) * safe))
    adaptive = rectified * jnp.sqrt(filled(b2, t)) / (jnp.sqrt(nu) + eps)
    return debias(mu, b1, t) * jnp.where(length > 5, adaptive, 1), mu, nu


@rule(coupled=True, usual_rate=0.1)
def torch_asgd(
    g,
    average: Annotated[Iterate, evaluated("average")],
    eta: Annotated[Other, start(lambda p: jnp.zeros((), p.real.dtype))],
    *,
    t,
    p,
    learning_rate,
    lambd=1e-4,
    alpha=0.75,
    t0=1e6,
):
    r"""ASGD as in torch.optim (Polyak & Juditsky 1992, doi:10.1137/0330046): $x \leftarrow (1 - \lambda \eta_t) x - \eta_t g,\; \bar x \leftarrow \bar x + \mu_t (x - \bar x),\; \eta_{t+1} = \eta / (1 + \lambda \eta t)^\alpha$.

    $\mu_t = 1 / \max(1, t - 1 - t_0)$: the average $\bar x$ begins after ``t0`` steps; `jaxsgd.eval_params` gives it.

    Use it when you repeat a run of torch.optim. Avoid it in a new run: take `sgd` with `params_ema`.
    """
    # The step before computed this step's rate: a new learning rate counts one step later.
    eta = jnp.where(t == 1, learning_rate, eta)
    delta = -eta * (g + lambd * p)
    average = average + (p + delta - average) / jnp.maximum(1, t - 1 - t0)
    return delta, average, learning_rate / (1 + lambd * learning_rate * t) ** alpha


@rule(usual_rate=0.01)
def torch_rprop(
    g,
    step: Annotated[Other, start(real_zeros)],
    sign: Mean,
    *,
    t,
    learning_rate,
    eta_minus: Annotated[float, within(0, 1)] = 0.5,
    eta_plus: Count = 1.2,
    min_step_size=1e-6,
    max_step_size=50.0,
):
    r"""Rprop as in torch.optim (Riedmiller & Braun 1993, doi:10.1109/ICNN.1993.298623): $s_0 = \eta,\; s \leftarrow \operatorname{clip}(\eta^{\pm} s),\; x \leftarrow x - s \operatorname{sign}(g)$.

    Each coordinate's step $s$ begins at the first step's learning rate and is clipped from the first step on. Later
    learning rates change nothing; in `rprop` they scale all steps. Where the gradient's sign turns, $s$ shrinks and the
    coordinate rests for a step. Signs are compared, where torch multiplies gradients: no product underflows.

    Use it when you repeat a run of torch.optim. Avoid it in a new run: `rprop` has optax's form.
    """
    product = jnp.real(jnp.sign(g) * jnp.conj(sign))
    factor = jnp.where(product > 0, eta_plus, jnp.where(product < 0, eta_minus, 1))
    step = jnp.clip(jnp.where(t == 1, learning_rate, step) * factor, min_step_size, max_step_size)
    sign = jnp.where(product < 0, 0, jnp.sign(g))
    return -step * sign, step, sign


def _mean_of(axis: int) -> Callable:
    """How a second moment starts that is averaged over one of the last two axes; None below two dimensions."""
    return lambda p: real_zeros(jnp.sum(p, axis, keepdims=True)) if p.ndim > 1 else None


def _rms(x: jax.Array) -> jax.Array:
    return norm(x) / max(x.size, 1) ** 0.5


@rule(usual_rate=0.01, cost="factored")
def torch_adafactor(
    g,
    row: Annotated[Square, start(_mean_of(-1))],
    col: Annotated[Square, start(_mean_of(-2))],
    nu: Annotated[Square, start(lambda p: real_zeros(p) if p.ndim < 2 else None)],
    *,
    t,
    p,
    learning_rate,
    decay_rate=0.8,
    eps1=None,
    eps2=1e-3,
    d: Count = 1.0,
):
    r"""Adafactor as in torch.optim (Shazeer & Stern 2018, arXiv:1804.04235): $V = R C / \operatorname{mean}(R),\; u = g / \max(\sqrt V, \epsilon_1),\; x \leftarrow x - \min(\eta, t^{-1/2}) \max(\epsilon_2, \operatorname{rms}(x))\, u / \max(1, \operatorname{rms}(u) / d)$.

    $R$ and $C$ are averages of $g^2$ over the last axis and the last but one of any matrix. A new $g^2$ weighs $t^{-c}$
    with ``decay_rate`` $c$. Below two dimensions $V$ is that average itself. The learning rate bounds the relative
    step, and scales the decoupled weight decay. ``eps1`` None is the rounding unit of the precision of the computation.
    `adafactor` takes other axes, factors large arrays only, and adds $\epsilon_1$ to $V$.

    Use it when you repeat a run of torch.optim. Avoid it in a new run: `adafactor` has optax's form.
    """
    weight, least = t**-decay_rate, float(jnp.finfo(g.dtype).eps) if eps1 is None else eps1
    mixed = lambda mean, x: (1 - weight) * mean + weight * x  # noqa: E731
    if nu is not None:
        variance = nu = mixed(nu, sq(g))
    else:
        row, col = (mixed(m, jnp.mean(sq(g), axis, keepdims=True)) for m, axis in ((row, -1), (col, -2)))
        variance = row * col / jnp.maximum(jnp.mean(row, -2, keepdims=True), least)
    u = g / jnp.sqrt(jnp.maximum(variance, least**2))
    step = jnp.minimum(learning_rate, t**-0.5) * jnp.maximum(eps2, _rms(p))
    return -step * u / jnp.maximum(1, _rms(u) / d), row, col, nu


@rule(usual_rate=1e-3, batch_scaling="sqrt", cost="rows_with_gradient")
def torch_sparse_adam(g, mu: Mean, nu: Square, *, t, p, weight_decay, b1: Decay = 0.9, b2: Decay = 0.999, eps=1e-8):
    r"""SparseAdam as in torch.optim (Kingma & Ba 2015, arXiv:1412.6980): $u_i = \frac{\sqrt{1 - \beta_2^t}}{1 - \beta_1^t} \cdot \frac{m_i}{\sqrt{v_i} + \epsilon} \text{ in rows with } g_i \ne 0$.

    A row is one index of the first axis, such as the embedding of a token. A row whose gradient is exactly zero does
    not change: neither its parameters nor its moments, and it takes no weight decay. $t$ counts all steps.

    Use it when you repeat a run of torch.optim on embeddings of which few rows have gradients. Avoid it when all rows
    have gradients: take `adam`.
    """
    touched = jnp.any(g != 0, tuple(range(1, g.ndim)), keepdims=True)
    mu = jnp.where(touched, ema(mu, g, b1), mu)
    nu = jnp.where(touched, ema(nu, sq(g), b2), nu)
    u = debias(mu, b1, t) * jnp.sqrt(filled(b2, t)) / (jnp.sqrt(nu) + eps)
    return jnp.where(touched, u + weight_decay * p, 0), mu, nu


def _muon_settings(ns_coefficients: Any = JORDAN[0], **rest: Any) -> dict[str, Any]:
    """The coefficients are compiled in."""
    try:
        a, b, c = map(float, ns_coefficients)
    except (TypeError, ValueError):
        raise TypeError(f"ns_coefficients={ns_coefficients!r}: three numbers are needed, (a, b, c)") from None
    return rest | {"ns_coefficients": (a, b, c)}


@functools.partial(make_rule, call=_muon_settings, weight_decay=0.1)
def torch_muon(
    g,
    mu: Mean,
    *,
    momentum: Decay = 0.95,
    nesterov=True,
    eps=1e-7,
    ns_steps=5,
    ns_coefficients: Static = JORDAN[0],
    adjust_lr_fn: Annotated[str | None, one_of("original", "match_rms_adamw")] = None,
):
    r"""Muon as in torch.optim (Jordan et al. 2024, kellerjordan.github.io/posts/muon): $M \leftarrow \mu M + (1-\mu) G,\; U = \sqrt{\max(1, \tfrac{rows}{columns})}\, \operatorname{orth}(\mu M + (1-\mu) G)$.

    It computes in the parameters' precision (at least float32) where torch rounds to bfloat16. The matrix is divided
    by its norm if that is above ``eps``, and by ``eps`` otherwise. The rule is not in `jaxsgd.RULES`: it takes
    matrices only, and unlike `jaxsgd.muon` hands no other array to Adam.
    """
    mu = ema(mu, g, momentum)
    x = ema(mu, g, momentum) if nesterov else mu
    # `newton_schulz` adds this to the norm. It lifts a smaller norm to eps, and leaves all others.
    u = newton_schulz(x, [ns_coefficients], ns_steps, eps=jnp.maximum(eps - frobenius(x), 0))
    rows, columns = g.shape[-2:]
    rms = adjust_lr_fn == "match_rms_adamw"
    return u * (0.2 * max(rows, columns) ** 0.5 if rms else max(1, rows / columns) ** 0.5), mu
