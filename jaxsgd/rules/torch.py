"""Rules whose formula in torch.optim differs from the one under the same name in optax.

Floor 3. `jaxsgd.torch` calls these under torch's names; here each stands beside its equation.
"""

from __future__ import annotations

import math
from typing import Any

import jax
import jax.numpy as jnp

from jaxsgd.matrices import JORDAN, frobenius, newton_schulz
from jaxsgd.numerics import debias, ema, filled, real_zeros, sq, zeros
from jaxsgd.rule import make_rule, rule
from jaxsgd.rules.layerwise import norm
from jaxsgd.spec import Spec, without_when_off

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


@rule(
    start={"step": real_zeros},
    bounds={"eta_minus": (0, 1), "eta_plus": (1, math.inf)},
    alternatives={"eta_plus": 1.5, "min_step_size": 0.03, "max_step_size": 0.06},
)
def torch_rprop(
    g, step, sign, *, t, learning_rate, eta_minus=0.5, eta_plus=1.2, min_step_size=1e-6, max_step_size=50.0
):  # fmt: skip
    r"""Rprop as in torch.optim (Riedmiller & Braun 1993, doi:10.1109/ICNN.1993.298623): $s_0 = \eta,\; s \leftarrow \operatorname{clip}(\eta^{\pm} s),\; x \leftarrow x - s \operatorname{sign}(g)$.

    Each coordinate's step $s$ begins at the first step's learning rate and is clipped from the first step on; later
    learning rates change nothing (in `rprop` they scale all steps). Where the gradient's sign turns, $s$ shrinks and
    the coordinate rests for a step. Signs are compared, where torch multiplies gradients: no product underflows.
    """
    product = jnp.real(jnp.sign(g) * jnp.conj(sign))
    factor = jnp.where(product > 0, eta_plus, jnp.where(product < 0, eta_minus, 1))
    step = jnp.clip(jnp.where(t == 1, learning_rate, step) * factor, min_step_size, max_step_size)
    sign = jnp.where(product < 0, 0, jnp.sign(g))
    return -step * sign, step, sign


def _mean_of(axis: int) -> Any:
    """The start of Adafactor's second moments averaged over one of the last two axes; None where these are not two."""
    return lambda p: real_zeros(jnp.sum(p, axis, keepdims=True)) if p.ndim > 1 else None


def _rms(x: jax.Array) -> jax.Array:
    return norm(x) / max(x.size, 1) ** 0.5


@rule(
    start={"row": _mean_of(-1), "col": _mean_of(-2), "nu": lambda p: real_zeros(p) if p.ndim < 2 else None},
    bounds={"d": (1, math.inf)},
    alternatives={"d": 2.0, "eps2": 5.0},
)
def torch_adafactor(
    g, row, col, nu, *, t, p, learning_rate, decay_rate=0.8, eps1=None, eps2=1e-3, d=1.0
):  # fmt: skip
    r"""Adafactor as in torch.optim (Shazeer & Stern 2018, arXiv:1804.04235): $V = R C / \operatorname{mean}(R),\; u = g / \max(\sqrt V, \epsilon_1),\; x \leftarrow x - \min(\eta, t^{-1/2}) \max(\epsilon_2, \operatorname{rms}(x))\, u / \max(1, \operatorname{rms}(u) / d)$.

    $R$ and $C$ are averages of $g^2$ over the last axis and the last but one of any matrix, where a new $g^2$ weighs
    $t^{-c}$ with ``decay_rate`` $c$; below two dimensions $V$ is that average itself. The learning rate bounds the
    relative step, and scales the decoupled weight decay. ``eps1`` None is the rounding unit of the precision that
    is computed in. Against `adafactor`: the axes, no least size, and $\epsilon_1$ bounds $V$ instead of entering it.
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


@rule(start={"nu": real_zeros})
def torch_sparse_adam(g, mu, nu, *, t, p, weight_decay, b1=0.9, b2=0.999, eps=1e-8):
    r"""SparseAdam as in torch.optim (Kingma & Ba 2015, arXiv:1412.6980): $u_i = \frac{\sqrt{1 - \beta_2^t}}{1 - \beta_1^t} \cdot \frac{m_i}{\sqrt{v_i} + \epsilon} \text{ in rows with } g_i \ne 0$.

    A row is what an index along the first axis holds, such as the embedding of a token. Where all of its gradient
    is exactly zero, nothing of it changes: parameters, moments, and no weight decay. $t$ counts all steps.
    """
    touched = jnp.any(g != 0, tuple(range(1, g.ndim)), keepdims=True)
    mu = jnp.where(touched, ema(mu, g, b1), mu)
    nu = jnp.where(touched, ema(nu, sq(g), b2), nu)
    u = debias(mu, b1, t) * jnp.sqrt(filled(b2, t)) / (jnp.sqrt(nu) + eps)
    return jnp.where(touched, u + weight_decay * p, 0), mu, nu


def _muon(
    g, mu, *, momentum=0.95, nesterov=True, eps=1e-7, ns_steps=5, coefficients=JORDAN[0], adjust="original"
):  # fmt: skip
    r"""Muon as in torch.optim (Jordan et al. 2024, kellerjordan.github.io/posts/muon): $M \leftarrow \mu M + (1-\mu) G,\; U = \sqrt{\max(1, \tfrac{rows}{columns})}\, \operatorname{orth}(\mu M + (1-\mu) G)$.

    It computes in the parameters' precision (at least float32) where torch rounds to bfloat16. The matrix is divided
    by its norm if that is above ``eps``, and by ``eps`` otherwise.
    """
    mu = ema(mu, g, momentum)
    x = ema(mu, g, momentum) if nesterov else mu
    # What `newton_schulz` adds to the norm lifts a smaller one to eps, and leaves all others.
    u = newton_schulz(x, [coefficients], ns_steps, eps=jnp.maximum(eps - frobenius(x), 0))
    rows, columns = g.shape[-2:]
    return u * (0.2 * max(rows, columns) ** 0.5 if adjust == "match_rms_adamw" else max(1, rows / columns) ** 0.5), mu


torch_muon = make_rule(Spec.read(_muon, name="torch_muon"), _muon.__doc__ or "", weight_decay=0.1)
"""Not in `RULES`: it has no meaning below two dimensions, and unlike `jaxsgd.muon` hands nothing to Adam."""
