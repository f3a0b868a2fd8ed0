r"""Rules that find the length of their step themselves.

Polyak's rules take the length from the loss: the gap to the optimum over the squared gradient. DoG, DoWG, D-Adaptation
and Prodigy take it from the distance walked so far, COCOB from a bet on each coordinate. The learning rate multiplies
it, so start at 1. Where the loss gives the length, the learning rate caps it.
"""

from __future__ import annotations

from typing import Annotated, Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxsgd.hyper import Decay, Positive, Real, is_off, one_of
from jaxsgd.numerics import debias, ema, filled, real_zeros, sq
from jaxsgd.registry import rule
from jaxsgd.slots import Iterate, Mean, Square, start

__all__ = ["cocob", "dadapt_adamw", "dog", "dowg", "momo", "momo_adam", "polyak_sgd", "prodigy"]

TINY = float(np.finfo(np.float64).eps)  # a squared gradient up to here counts as none, as in optax
BETAS, INIT_STEP = (0.9, 0.999), ("heuristic", 1e-6)


def _dot(a: jax.Array, b: jax.Array) -> jax.Array:
    """The inner product of two arrays as vectors of real numbers, so that complex ones may turn together."""
    return jnp.sum(jnp.real(jnp.conj(a) * b))


def _over(a: Any, b: jax.Array, least: float = 0.0) -> jax.Array:
    """``a / b``, and 0 where ``b`` is at most ``least``: without a gradient there is no estimate."""
    some = b > least
    return jnp.where(some, a / jnp.where(some, b, 1), 0)


def _decay(p: Any, weight_decay: Any) -> Any:
    return 0 if is_off(weight_decay) else weight_decay * p


def _capped(max_learning_rate: Any = 1.0, learning_rate: Any = None, **rest: Any) -> dict[str, Any]:
    """``max_learning_rate``, optax's name of the learning rate."""
    return rest | {"learning_rate": max_learning_rate if learning_rate is None else learning_rate}


@rule(
    positional="max_learning_rate scaling f_min eps variant",
    call=_capped,
    sums=lambda g: {"gg": jnp.sum(sq(g))},
    usual_rate=1.0,
)
def polyak_sgd(
    g,
    *,
    learning_rate,
    value,
    gg,
    scaling=1.0,
    f_min: Real = 0.0,
    eps=0.0,
    variant: Annotated[str, one_of("sps", "sps+")] = "sps",
):
    r"""SGD with Polyak's step, SPS (Loizou et al. 2021, arXiv:2002.10542): $x \leftarrow x - s \min\{(f(x) - f^*) / (\lVert g \rVert^2 + \epsilon),\, \eta\}\, g$.

    The update needs the loss: ``value=``. ``f_min`` is a guess of the lowest loss $f^*$. The learning rate (or
    ``max_learning_rate``) is the cap $\eta$. ``scaling`` is $s$; in optax 0.2.8 it acts as $1/s$ below the cap.
    ``variant="sps+"`` takes no step back below ``f_min`` (Garrigos et al. 2023, arXiv:2307.14528).

    Use it when the lowest possible loss is known, often 0. Avoid it when minibatches are noisy and ``f_min`` is a
    guess.
    """
    gap = jnp.maximum(value - f_min, 0) if variant == "sps+" else value - f_min
    return (-scaling * jnp.minimum(_over(gap, gg + eps, TINY), learning_rate) * g,)


def _mean(mean: jax.Array, x: Any, decay: Any, t: Any) -> jax.Array:
    """The moving average that starts at its first value."""
    return jnp.where(t == 1, x, ema(mean, x, decay))


def _model_step(bound, loss, gamma, mm, mp, bias, learning_rate, weight_decay, lower_bound, adapt_lower_bound):
    """The step to where the averaged linear model of the loss meets its lower bound, and the adapted bound."""
    shrink = 1 + learning_rate * weight_decay
    if adapt_lower_bound:
        reach = shrink * (loss - gamma) + mp
        reset = reach < shrink * bias * bound
        bound = jnp.where(reset, jnp.maximum(reach / (2 * bias * shrink), lower_bound), bound)
    else:
        bound = lower_bound
    polyak = _over(jnp.maximum(shrink * (loss - bias * bound - gamma) + mp, 0), mm, TINY)
    if adapt_lower_bound:
        tau = jnp.minimum(learning_rate / bias, polyak)
        bound = jnp.maximum((loss + mp - gamma - tau * mm / 2) / bias, lower_bound)
    return {"loss_mean": loss, "gamma": gamma, "bound": bound, "polyak": polyak}


def _proximal(p, step, learning_rate, weight_decay):
    r"""The change to $(x - step) / (1 + \eta \lambda)$: decay acts at the end of the step."""
    shrink = learning_rate * weight_decay
    return -step if is_off(weight_decay) else -(shrink * p + step) / (1 + shrink)


FIRST_BOUND: Any = start(lambda lower_bound: lower_bound)


def _momo_sums(g, mu, *, p, t, beta):
    mu = _mean(mu, g, beta, t)
    return {"mm": jnp.sum(sq(mu)), "mp": _dot(mu, p), "gp": _dot(g, p)}


def _momo_shared(
    loss_mean: Any = 0.0,
    gamma: Any = 0.0,
    bound=FIRST_BOUND,
    *,
    value,
    t,
    mm,
    mp,
    gp,
    learning_rate,
    weight_decay,
    beta,
    lower_bound,
    adapt_lower_bound,
):
    loss = _mean(loss_mean, jnp.asarray(value, loss_mean.dtype), beta, t)
    gamma = _mean(gamma, gp, beta, t)
    return _model_step(bound, loss, gamma, mm, mp, 1, learning_rate, weight_decay, lower_bound, adapt_lower_bound)


@rule(
    positional="learning_rate beta lower_bound weight_decay adapt_lower_bound",
    learning_rate=1.0,
    sums=_momo_sums,
    shared=_momo_shared,
    cost="sums_of_moments",
)
def momo(
    g,
    mu: Mean,
    *,
    p,
    t,
    learning_rate,
    weight_decay,
    value,
    polyak,
    beta: Decay = 0.9,
    lower_bound: Real = 0.0,
    adapt_lower_bound=False,
):
    r"""MoMo (Schaipp et al. 2024, arXiv:2305.07583): $\tau = \min\{\eta,\, (\bar f - f^* - \gamma + \langle m, x \rangle)_+ / \lVert m \rVert^2\},\; x \leftarrow x - \tau m$.

    $m$, $\bar f$ and $\gamma$ average $g$, the loss (the update needs it: ``value=``) and $\langle g, x \rangle$.
    ``lower_bound`` is a guess of the lowest loss $f^*$, and ``adapt_lower_bound=True`` adapts it. Weight decay divides
    the result of the step by $1 + \eta \lambda$, as in the paper; optax 0.2.8 divides $x$ alone.

    Use it when the lowest possible loss is known, often 0, and the rate is not. Avoid it when the loss can fall below
    ``lower_bound``.
    """
    mu = _mean(mu, g, beta, t)
    return _proximal(p, jnp.minimum(learning_rate, polyak) * mu, learning_rate, weight_decay), mu


def _momo_adam_sums(g, mu, nu, *, p, t, b1, b2, eps):
    mu, root = ema(mu, g, b1), jnp.sqrt(debias(ema(nu, sq(g), b2), b2, t)) + eps
    return {"mm": jnp.sum(sq(mu) / root), "mp": _dot(mu, p), "gp": _dot(g, p)}


def _momo_adam_shared(
    loss_mean: Any = 0.0,
    gamma: Any = 0.0,
    bound=FIRST_BOUND,
    *,
    value,
    t,
    mm,
    mp,
    gp,
    learning_rate,
    weight_decay,
    b1,
    lower_bound,
    adapt_lower_bound,
):
    loss, gamma = ema(loss_mean, jnp.asarray(value, loss_mean.dtype), b1), ema(gamma, gp, b1)
    bias = filled(b1, t)
    return _model_step(bound, loss, gamma, mm, mp, bias, learning_rate, weight_decay, lower_bound, adapt_lower_bound)


@rule(
    positional="learning_rate b1 b2 eps lower_bound weight_decay adapt_lower_bound",
    learning_rate=1e-2,
    sums=_momo_adam_sums,
    shared=_momo_adam_shared,
    cost="sums_of_moments",
)
def momo_adam(
    g,
    mu: Mean,
    nu: Square,
    *,
    p,
    t,
    learning_rate,
    weight_decay,
    value,
    polyak,
    b1: Decay = 0.9,
    b2: Decay = 0.999,
    eps=1e-8,
    lower_bound: Real = 0.0,
    adapt_lower_bound=False,
):
    r"""MoMo-Adam (Schaipp et al. 2024, arXiv:2305.07583): $\tau = \min\left\{\frac{\eta}{1-\beta_1^t},\, \frac{(\bar f - (1-\beta_1^t) f^* - \gamma + \langle m, x \rangle)_+}{\langle m, m / r \rangle}\right\},\; x \leftarrow x - \tau m / r,\; r = \sqrt{\hat v_t} + \epsilon$.

    `momo` in Adam's metric; the same arguments, and the update needs the loss: ``value=``.

    Use it when the lowest possible loss is known and Adam's rate is not. Avoid it when the loss can fall below
    ``lower_bound``.
    """
    mu, nu = ema(mu, g, b1), ema(nu, sq(g), b2)
    root = jnp.sqrt(debias(nu, b2, t)) + eps
    tau = jnp.minimum(learning_rate / filled(b1, t), polyak)
    return _proximal(p, tau * mu / root, learning_rate, weight_decay), mu, nu


def _walked(g, x0, *, p, weight_decay):
    """The squared norms of the gradient (decay included, as in the step), of the distance walked, and of x0."""
    return {"gg": jnp.sum(sq(g + _decay(p, weight_decay))), "moved": jnp.sum(sq(p - x0)), "began": jnp.sum(sq(x0))}


def _dog_shared(distance=0.0, squares=0.0, *, t, gg, moved, began, init_kind, init_value, eps):
    first = {"distance": init_value, "heuristic": init_value * (1 + jnp.sqrt(began)), "learning_rate": 0.0}[init_kind]
    distance = jnp.maximum(jnp.where(t == 1, first, distance), jnp.sqrt(moved))
    squares = squares + gg
    rate = _over(distance, jnp.sqrt(squares + eps))
    rate = jnp.where(t == 1, init_value, rate) if init_kind == "learning_rate" else rate
    return {"distance": distance, "squares": squares, "rate": rate}


def _init_step(init_step: Any = INIT_STEP, **rest: Any) -> dict[str, Any]:
    """``init_step=(kind, value)``, as in optax, where it is not the default."""
    return rest if init_step is INIT_STEP else rest | dict(zip(("init_kind", "init_value"), init_step, strict=True))


@rule(
    positional="learning_rate init_step eps weight_decay mask",
    call=_init_step,
    learning_rate=1.0,
    weight_decay=None,
    coupled=True,
    sums=_walked,
    shared=_dog_shared,
)
def dog(
    g,
    x0: Iterate,
    *,
    rate,
    init_kind: Annotated[str, one_of("distance", "heuristic", "learning_rate")] = INIT_STEP[0],
    init_value=INIT_STEP[1],
    eps=1e-8,
):
    r"""DoG, distance over gradients (Ivgi et al. 2023, arXiv:2302.12022): $\bar r_t = \max_{k \le t} \lVert x_k - x_0 \rVert,\; u = \bar r_t\, g / \sqrt{\textstyle\sum_{k \le t} \lVert g_k \rVert^2 + \epsilon}$.

    ``init_step=(kind, value)``, or ``init_kind`` and ``init_value``, sets the first step: by the ``"distance"``
    $r_0$, by its ``"learning_rate"``, or by the ``"heuristic"`` $r_0 = \alpha (1 + \lVert x_0 \rVert)$.
    Weight decay is added to the gradient. The authors evaluate an average of the parameters.

    Use it when you fine-tune without tuning a rate, and evaluate an average (`params_ema`). Avoid it when layers need
    different rates: all share one step size.
    """
    return rate * g, x0


FIRST_SQ: Any = start(lambda init_estim_sq_dist, eps: eps if init_estim_sq_dist is None else init_estim_sq_dist)


def _dowg_shared(distance_sq=FIRST_SQ, squares=0.0, *, gg, moved, eps):
    distance_sq = jnp.maximum(distance_sq, moved)
    squares = squares + distance_sq * gg
    return {"distance_sq": distance_sq, "squares": squares, "rate": _over(distance_sq, jnp.sqrt(squares) + eps)}


@rule(
    positional="learning_rate init_estim_sq_dist eps weight_decay mask",
    learning_rate=1.0,
    weight_decay=None,
    coupled=True,
    sums=_walked,
    shared=_dowg_shared,
)
def dowg(g, x0: Iterate, *, rate, init_estim_sq_dist=None, eps=1e-4):
    r"""DoWG, distance over weighted gradients (Khaled et al. 2023, arXiv:2305.16284): $u = \bar r_t^2\, g / (\sqrt{\textstyle\sum_{k \le t} \bar r_k^2 \lVert g_k \rVert^2} + \epsilon)$.

    $\bar r_t^2$ as in `dog`, but from ``init_estim_sq_dist``, by default ``eps``. Decay is added to the gradient.

    Use it when `dog` is too slow: late gradients weigh more here. Avoid it when layers need different rates: all share
    one step size.
    """
    return rate * g, x0


FIRST_D: Any = start(lambda estim_lr0: estim_lr0)


def _betas(betas: Any = BETAS, **rest: Any) -> dict[str, Any]:
    """``betas=(b1, b2)``, as in optax, where it is not the default."""
    return rest if betas is BETAS else rest | dict(zip(("b1", "b2"), betas, strict=True))


def _adam_rate(d, learning_rate, t, b1, b2, corrected=True):
    r"""$d\,\eta \sqrt{1 - \beta_2^t} / (1 - \beta_1^t)$: both corrections of Adam in the step."""
    return d * learning_rate * (jnp.sqrt(filled(b2, t)) / filled(b1, t) if corrected else 1)


def _prodigy_memory(g, s, d, rate, b2, beta3, estim_lr0, safeguard_warmup):
    decay = b2**0.5 if beta3 is None else beta3
    return decay * s + d / estim_lr0 * (d if safeguard_warmup else rate) * g


def _prodigy_sums(
    g, s, x0, *, p, t, estim_lr, learning_rate, b1, b2, beta3, estim_lr0, safeguard_warmup, bias_correction
):
    d, rate = estim_lr, _adam_rate(estim_lr, learning_rate, t, b1, b2, bias_correction)
    s = _prodigy_memory(g, s, d, rate, b2, beta3, estim_lr0, safeguard_warmup)
    return {"gained": d / estim_lr0 * rate * _dot(g, x0 - p), "length": jnp.sum(jnp.abs(s))}


def _prodigy_shared(estim_lr=FIRST_D, numerator_weighted=0.0, *, gained, length, b2, beta3, estim_lr_coef):
    numerator = (b2**0.5 if beta3 is None else beta3) * numerator_weighted + gained
    d = jnp.maximum(estim_lr, _over(estim_lr_coef * numerator, length))
    return {"estim_lr": d, "numerator_weighted": numerator, "d_before": estim_lr}


@rule(
    positional="learning_rate betas beta3 eps estim_lr0 estim_lr_coef weight_decay safeguard_warmup",
    call=_betas,
    learning_rate=1.0,
    sums=_prodigy_sums,
    shared=_prodigy_shared,
)
def prodigy(
    g,
    mu: Mean,
    nu: Square,
    s: Mean,
    x0: Iterate,
    *,
    p,
    t,
    estim_lr,
    d_before,
    learning_rate,
    weight_decay,
    b1: Decay = 0.9,
    b2: Decay = 0.999,
    beta3: Decay = None,
    eps=1e-8,
    estim_lr0: Positive = 1e-6,
    estim_lr_coef=1.0,
    safeguard_warmup=False,
    bias_correction=True,
):
    r"""Prodigy (Mishchenko & Defazio 2024, arXiv:2306.06101): $d \leftarrow \max\{d,\, \textstyle\sum_k w_k \langle g_k, x_0 - x_k \rangle / \lVert \sum_k w_k g_k \rVert_1\},\; x \leftarrow x - \eta d\, \hat m_t / (\sqrt{\hat v_t} + \epsilon)$.

    $d$ estimates the distance to the solution; the weights $w_k \propto d_k^2 \eta_k$ fade by ``beta3``, by default
    $\sqrt{\beta_2}$. ``safeguard_warmup`` leaves $\eta_k$ out of the denominator. Weight decay goes by $\eta d$.

    Use it when you cannot tune AdamW's learning rate and memory is ample. Avoid it when you warm up without
    ``safeguard_warmup``.
    """
    rate = _adam_rate(d_before, learning_rate, t, b1, b2, bias_correction)
    mu, nu = ema(mu, d_before * g, b1), ema(nu, sq(d_before * g), b2)
    s = _prodigy_memory(g, s, d_before, rate, b2, beta3, estim_lr0, safeguard_warmup)
    return -rate * (mu / (jnp.sqrt(nu) + estim_lr * eps) + _decay(p, weight_decay)), mu, nu, s, x0


def _dadapt_sums(g, nu, s, *, t, estim_lr, learning_rate, b1, b2, eps):
    rate, decay = _adam_rate(estim_lr, learning_rate, t, b1, b2), b2**0.5
    gained = rate * _dot(g, s / (jnp.sqrt(nu) + eps))
    return {"gained": gained, "length": jnp.sum(jnp.abs(ema(s, rate * g, decay)))}


def _dadapt_shared(estim_lr=FIRST_D, numerator_weighted=0.0, *, gained, length, b2):
    numerator = ema(numerator_weighted, gained, b2**0.5)
    d = jnp.maximum(estim_lr, _over(numerator, (1 - b2**0.5) * length))
    return {"estim_lr": d, "numerator_weighted": numerator, "d_before": estim_lr}


@rule(
    positional="learning_rate betas eps estim_lr0 weight_decay",
    call=_betas,
    learning_rate=1.0,
    sums=_dadapt_sums,
    shared=_dadapt_shared,
    cost="sums_of_this_step",
)
def dadapt_adamw(
    g,
    mu: Mean,
    nu: Square,
    s: Mean,
    *,
    p,
    t,
    d_before,
    learning_rate,
    weight_decay,
    b1: Decay = 0.9,
    b2: Decay = 0.999,
    eps=1e-8,
    estim_lr0: Positive = 1e-6,
):
    r"""D-Adaptation, Adam form (Defazio & Mishchenko 2023, arXiv:2301.07733): $d \leftarrow \max\{d,\, \textstyle\sum_k \eta_k d_k \langle g_k, s_k \rangle_{1/\sqrt{v_k}} / \lVert s \rVert_1\},\; x \leftarrow x - \hat m_t(\eta d g) / (\sqrt{\hat v_t} + \epsilon)$.

    $d$ estimates the distance to the solution; both sums fade by $\sqrt{\beta_2}$. Weight decay goes by $\eta d$.

    Use it when you cannot tune AdamW's learning rate. Avoid it when early steps may mislead it: its estimate never
    falls.
    """
    rate = _adam_rate(d_before, learning_rate, t, b1, b2)
    mu, nu, s = ema(mu, rate * g, b1), ema(nu, sq(g), b2), ema(s, rate * g, b2**0.5)
    return -rate * _decay(p, weight_decay) - mu / (jnp.sqrt(nu) + eps), mu, nu, s


@rule(positional="learning_rate alpha eps weight_decay mask", learning_rate=1.0, coupled=True)
def cocob(
    g,
    x0: Iterate,
    total: Mean,
    largest: Annotated[Square, start(lambda p, eps: real_zeros(p) + eps)],
    absolute: Square,
    reward: Square,
    *,
    p,
    learning_rate,
    alpha=100.0,
    eps=1e-8,
):
    r"""COCOB (Orabona & Tommasi 2017, arXiv:1705.07795): $x \leftarrow x_0 - \frac{\sum_k g_k}{L \max(\sum_k \lvert g_k \rvert + L,\, \alpha L)} (L + R),\; R \leftarrow (R - g (x - x_0))_+$.

    Each coordinate bets a part of its wealth on its next gradient, bounded by $L$. There is no step size. The
    learning rate multiplies the gradient, so only its changes matter. Weight decay is added to the gradient.

    Use it when you cannot tune a learning rate at all. Avoid it when you can: it keeps five numbers a parameter, and
    tuned rules end lower.
    """
    c = learning_rate * g
    total, absolute, largest = total + c, absolute + jnp.abs(c), jnp.maximum(largest, jnp.abs(c))
    reward = jnp.maximum(reward - jnp.real(jnp.conj(c) * (p - x0)), 0)
    bet = _over(largest + reward, largest * jnp.maximum(absolute + largest, alpha * largest))
    return x0 - total * bet - p, x0, total, largest, absolute, reward
