r"""Rules that find the length of their step themselves.

Floor 3. Three ways to know it: from the loss (Polyak: the gap to the optimum over the squared gradient), from the
distance walked so far (DoG, DoWG, D-Adaptation, Prodigy), from a bet on each coordinate (COCOB). A learning rate
multiplies the length found, so that 1 is the place to start; where the loss gives the length, it caps it.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from jaxsgd.numerics import debias, ema, filled, real_zeros, sq
from jaxsgd.rule import rule
from jaxsgd.spec import is_off

__all__ = ["cocob", "dadapt_adamw", "dog", "dowg", "momo", "momo_adam", "polyak_sgd", "prodigy"]

TINY = float(np.finfo(np.float64).eps)  # a squared gradient up to here counts as none, as in optax
ANY = (-np.inf, np.inf)  # bounds of a lower bound of the loss: it may be negative
POSITIVE = (float(np.finfo(np.float32).tiny), np.inf)  # bounds of a first estimate: it is divided by
BETAS, INIT_STEP = (0.9, 0.999), ("heuristic", 1e-6)


def _dot(a: jax.Array, b: jax.Array) -> jax.Array:
    """The inner product of two arrays as vectors of real numbers, so that complex ones may turn together."""
    return jnp.sum(jnp.real(jnp.conj(a) * b))


def _over(a: Any, b: jax.Array, least: float = 0.0) -> jax.Array:
    """``a / b``, and 0 where ``b`` is at most ``least``: no gradient, so nothing learnt."""
    some = b > least
    return jnp.where(some, a / jnp.where(some, b, 1), 0)


def _decay(p: Any, weight_decay: Any) -> Any:
    return 0 if is_off(weight_decay) else weight_decay * p


ORIGIN = {"x0": lambda p: jnp.array(p, copy=True)}
LOSS = {"flax": "the loss must be given to the update, and Flax's own train states do not pass it on"}


def _polyak_arguments(arguments: dict[str, Any]) -> dict[str, Any]:
    """``max_learning_rate``, as optax has it, is the learning rate."""
    if arguments["variant"] not in ("sps", "sps+"):
        raise ValueError(f"polyak_sgd: variant={arguments['variant']!r}: it must be 'sps' or 'sps+'")
    cap = arguments.pop("max_learning_rate")
    return arguments | ({"learning_rate": cap} if arguments["learning_rate"] is None else {})


def _polyak_oracle(learning_rate, scaling=1.0, f_min=0.0, eps=0.0, variant="sps"):
    return optax.chain(optax.scale_by_polyak(f_min, learning_rate, eps, variant), optax.scale_by_learning_rate(scaling))


@rule(
    sums=lambda g: {"gg": jnp.sum(sq(g))},
    oracle=_polyak_oracle,
    positional=("max_learning_rate", "scaling", "f_min", "eps", "variant"),
    extras={"max_learning_rate": 1.0},
    prepare=_polyak_arguments,
    learning_rate=None,
    bounds={"f_min": ANY},
    needs={"f_min": {"learning_rate": 1.0}, "eps": {"learning_rate": 1.0}, "variant": {"f_min": 8.0}},
    alternatives={"variant": "sps+", "eps": 10.0},
    exceptions=LOSS,
)
def polyak_sgd(g, *, learning_rate, value, gg, scaling=1.0, f_min=0.0, eps=0.0, variant="sps"):
    r"""SGD with Polyak's step, SPS (Loizou et al. 2021, arXiv:2002.10542): $x \leftarrow x - s \min\{(f(x) - f^*) / (\lVert g \rVert^2 + \epsilon),\, \eta\}\, g$.

    The update needs the loss: ``value=``. ``f_min`` is a guess of the lowest loss $f^*$, the learning rate
    ``max_learning_rate`` is the cap $\eta$, ``scaling`` is $s$ (in optax 0.2.8 it acts as $1/s$ below the cap).
    ``variant="sps+"`` takes no step back below ``f_min`` (Garrigos et al. 2023, arXiv:2307.14528).
    """
    gap = jnp.maximum(value - f_min, 0) if variant == "sps+" else value - f_min
    return (-scaling * jnp.minimum(_over(gap, gg + eps, TINY), learning_rate) * g,)


def _mean(mean: jax.Array, x: Any, decay: Any, t: Any) -> jax.Array:
    """The moving average that starts at its first value."""
    return jnp.where(t == 1, x, ema(mean, x, decay))


def _model_step(bound, loss, gamma, mm, mp, bias, learning_rate, weight_decay, lower_bound, adapt_lower_bound):
    """Where the averaged linear model of the loss meets its lower bound: the step, and the bound if it is learnt."""
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
    r"""The change to $(x - step) / (1 + \eta \lambda)$: a step with the decay of where it arrives."""
    shrink = learning_rate * weight_decay
    return -step if is_off(weight_decay) else -(shrink * p + step) / (1 + shrink)


def _as_published(theirs):
    """optax's rule, with the step itself shrunk too, as in the paper and in the authors' code."""

    @functools.wraps(theirs)
    def oracle(learning_rate, weight_decay=0.0, **others):
        tx, shrink = theirs(learning_rate, weight_decay=weight_decay, **others), learning_rate * weight_decay
        also = optax.stateless_with_tree_map(lambda u, p: (u - shrink**2 / (1 + shrink) * p) / (1 + shrink))
        return optax.chain(tx, also)

    return oracle


def _momo_sums(g, mu, *, p, t, beta):
    mu = _mean(mu, g, beta, t)
    return {"mm": jnp.sum(sq(mu)), "mp": _dot(mu, p), "gp": _dot(g, p)}


def _momo_shared(
    loss_mean, gamma, bound, *, value, t, mm, mp, gp, learning_rate, weight_decay, beta, lower_bound, adapt_lower_bound
):
    loss = _mean(loss_mean, jnp.asarray(value, loss_mean.dtype), beta, t)
    gamma = _mean(gamma, gp, beta, t)
    return _model_step(bound, loss, gamma, mm, mp, 1, learning_rate, weight_decay, lower_bound, adapt_lower_bound)


SCALARS = {"loss_mean": lambda: 0.0, "gamma": lambda: 0.0, "bound": lambda lower_bound: lower_bound}
MODEL: dict[str, Any] = {
    "bounds": {"beta": (0, 1), "lower_bound": ANY},
    "needs": dict.fromkeys(("lower_bound", "adapt_lower_bound"), {"learning_rate": 1.0}),
    "alternatives": {"beta": 0.5},
    "exceptions": LOSS | {"narrow": "the step is made of the loss, which is that of the rounded parameters"},
}


@rule(
    start=SCALARS,
    sums=_momo_sums,
    shared=_momo_shared,
    oracle=_as_published(optax.contrib.momo),
    positional=("learning_rate", "beta", "lower_bound", "weight_decay", "adapt_lower_bound"),
    learning_rate=1.0,
    **MODEL,
)
def momo(
    g, mu, *, p, t, learning_rate, weight_decay, value, polyak, beta=0.9, lower_bound=0.0, adapt_lower_bound=False
):  # fmt: skip
    r"""MoMo (Schaipp et al. 2024, arXiv:2305.07583): $\tau = \min\{\eta,\, (\bar f - f^* - \gamma + \langle m, x \rangle)_+ / \lVert m \rVert^2\},\; x \leftarrow x - \tau m$.

    $m$, $\bar f$ and $\gamma$ average $g$, the loss (the update needs it: ``value=``) and $\langle g, x \rangle$.
    ``lower_bound`` is a guess of the lowest loss $f^*$, ``adapt_lower_bound=True`` learns it. Weight decay divides
    what the step gives by $1 + \eta \lambda$, as in the paper; optax 0.2.8 divides $x$ alone.
    """
    mu = _mean(mu, g, beta, t)
    return _proximal(p, jnp.minimum(learning_rate, polyak) * mu, learning_rate, weight_decay), mu


def _momo_adam_sums(g, mu, nu, *, p, t, b1, b2, eps):
    mu, root = ema(mu, g, b1), jnp.sqrt(debias(ema(nu, sq(g), b2), b2, t)) + eps
    return {"mm": jnp.sum(sq(mu) / root), "mp": _dot(mu, p), "gp": _dot(g, p)}


def _momo_adam_shared(
    loss_mean, gamma, bound, *, value, t, mm, mp, gp, learning_rate, weight_decay, b1, lower_bound, adapt_lower_bound
):
    loss, gamma = ema(loss_mean, jnp.asarray(value, loss_mean.dtype), b1), ema(gamma, gp, b1)
    bias = filled(b1, t)
    return _model_step(bound, loss, gamma, mm, mp, bias, learning_rate, weight_decay, lower_bound, adapt_lower_bound)


@rule(
    start={"nu": real_zeros, **SCALARS},
    sums=_momo_adam_sums,
    shared=_momo_adam_shared,
    oracle=_as_published(optax.contrib.momo_adam),
    positional=("learning_rate", "b1", "b2", "eps", "lower_bound", "weight_decay", "adapt_lower_bound"),
    learning_rate=1e-2,
    **MODEL,
)
def momo_adam(
    g, mu, nu, *, p, t, learning_rate, weight_decay, value, polyak,
    b1=0.9, b2=0.999, eps=1e-8, lower_bound=0.0, adapt_lower_bound=False,
):  # fmt: skip
    r"""MoMo-Adam (Schaipp et al. 2024, arXiv:2305.07583): $\tau = \min\left\{\frac{\eta}{1-\beta_1^t},\, \frac{(\bar f - (1-\beta_1^t) f^* - \gamma + \langle m, x \rangle)_+}{\langle m, m / r \rangle}\right\},\; x \leftarrow x - \tau m / r,\; r = \sqrt{\hat v_t} + \epsilon$.

    `momo` in Adam's metric; the same arguments, and the update needs the loss: ``value=``.
    """
    mu, nu = ema(mu, g, b1), ema(nu, sq(g), b2)
    root = jnp.sqrt(debias(nu, b2, t)) + eps
    tau = jnp.minimum(learning_rate / filled(b1, t), polyak)
    return _proximal(p, tau * mu / root, learning_rate, weight_decay), mu, nu


def _walked(g, x0, *, p, weight_decay):
    """The squares of the gradient (decay included, as in the step), of the way walked, and of where it began."""
    return {"gg": jnp.sum(sq(g + _decay(p, weight_decay))), "moved": jnp.sum(sq(p - x0)), "began": jnp.sum(sq(x0))}


def _dog_shared(distance, squares, *, t, gg, moved, began, init_kind, init_value, eps):
    first = {"distance": init_value, "heuristic": init_value * (1 + jnp.sqrt(began)), "learning_rate": 0.0}[init_kind]
    distance = jnp.maximum(jnp.where(t == 1, first, distance), jnp.sqrt(moved))
    squares = squares + gg
    rate = _over(distance, jnp.sqrt(squares + eps))
    rate = jnp.where(t == 1, init_value, rate) if init_kind == "learning_rate" else rate
    return {"distance": distance, "squares": squares, "rate": rate}


def _dog_arguments(arguments: dict[str, Any]) -> dict[str, Any]:
    """``init_step=(kind, value)``, as optax has it, where it is not the default."""
    kind, value = given = arguments.pop("init_step")
    if given is not INIT_STEP:
        arguments = arguments | {"init_kind": kind, "init_value": value}
    if (kind := arguments["init_kind"]) not in ("distance", "heuristic", "learning_rate"):
        raise ValueError(f"dog: init_step: the kind {kind!r}: 'distance', 'heuristic' or 'learning_rate' is needed")
    return arguments


def _dog_oracle(learning_rate, init_kind: Any = INIT_STEP[0], init_value=INIT_STEP[1], eps=1e-8, weight_decay=None):
    return optax.contrib.dog(learning_rate, (init_kind, init_value), eps, weight_decay)


FAR = {"narrow": "the step is made of the distance walked, and narrow parameters do not walk small steps"}
WALK: dict[str, Any] = {"sums": _walked, "learning_rate": 1.0, "weight_decay": None, "coupled": True, "exceptions": FAR}


@rule(
    start={**ORIGIN, "distance": lambda: 0.0, "squares": lambda: 0.0},
    **WALK,
    shared=_dog_shared,
    oracle=_dog_oracle,
    positional=("learning_rate", "init_step", "eps", "weight_decay", "mask"),
    extras={"init_step": INIT_STEP},
    prepare=_dog_arguments,
    needs=dict.fromkeys(("learning_rate", "eps", "weight_decay", "init_kind"), {"init_value": 1.0})
    | {"init_value": {"init_kind": "learning_rate"}},
    alternatives={"init_kind": "distance", "init_value": 0.1, "weight_decay": 0.1, "eps": 10.0},
)
def dog(g, x0, *, rate, init_kind=INIT_STEP[0], init_value=INIT_STEP[1], eps=1e-8):
    r"""DoG, distance over gradients (Ivgi et al. 2023, arXiv:2302.12022): $\bar r_t = \max_{k \le t} \lVert x_k - x_0 \rVert,\; u = \bar r_t\, g / \sqrt{\textstyle\sum_{k \le t} \lVert g_k \rVert^2 + \epsilon}$.

    ``init_step=(kind, value)``, or ``init_kind`` and ``init_value``, says how it begins: with the ``"distance"``
    $r_0$, with the ``"learning_rate"`` of the first step, or by the ``"heuristic"`` $r_0 = \alpha (1 + \lVert x_0 \rVert)$.
    Weight decay is added to the gradient. The authors evaluate an average of the parameters.
    """
    return rate * g, x0


def _dowg_shared(distance_sq, squares, *, gg, moved, eps):
    distance_sq = jnp.maximum(distance_sq, moved)
    squares = squares + distance_sq * gg
    return {"distance_sq": distance_sq, "squares": squares, "rate": _over(distance_sq, jnp.sqrt(squares) + eps)}


@rule(
    start={**ORIGIN, "squares": lambda: 0.0,
           "distance_sq": lambda init_estim_sq_dist, eps: eps if init_estim_sq_dist is None else init_estim_sq_dist},
    **WALK,
    shared=_dowg_shared,
    oracle=optax.contrib.dowg,
    positional=("learning_rate", "init_estim_sq_dist", "eps", "weight_decay", "mask"),
    alternatives={"weight_decay": 0.1},
)  # fmt: skip
def dowg(g, x0, *, rate, init_estim_sq_dist=None, eps=1e-4):
    r"""DoWG, distance over weighted gradients (Khaled et al. 2023, arXiv:2305.16284): $u = \bar r_t^2\, g / (\sqrt{\textstyle\sum_{k \le t} \bar r_k^2 \lVert g_k \rVert^2} + \epsilon)$.

    $\bar r_t^2$ as in `dog`, but from ``init_estim_sq_dist``, by default ``eps``. Decay is added to the gradient.
    """
    return rate * g, x0


def _betas(arguments: dict[str, Any]) -> dict[str, Any]:
    """``betas=(b1, b2)``, as optax has it, where it is not the default."""
    b1, b2 = given = arguments.pop("betas")
    return arguments if given is BETAS else arguments | {"b1": b1, "b2": b2}


def _adam_rate(d, learning_rate, t, b1, b2, corrected=True):
    r"""$d\,\eta \sqrt{1 - \beta_2^t} / (1 - \beta_1^t)$: both corrections of Adam in the step."""
    return d * learning_rate * (jnp.sqrt(filled(b2, t)) / filled(b1, t) if corrected else 1)


def _prodigy_memory(g, s, d, rate, b2, beta3, estim_lr0, safeguard_warmup):
    decay = b2**0.5 if beta3 is None else beta3
    return decay * s + d / estim_lr0 * (d if safeguard_warmup else rate) * g


def _prodigy_sums(g, s, x0, *, p, t, d, learning_rate, b1, b2, beta3, estim_lr0, safeguard_warmup, bias_correction):
    rate = _adam_rate(d, learning_rate, t, b1, b2, bias_correction)
    s = _prodigy_memory(g, s, d, rate, b2, beta3, estim_lr0, safeguard_warmup)
    return {"gained": d / estim_lr0 * rate * _dot(g, x0 - p), "length": jnp.sum(jnp.abs(s))}


def _prodigy_shared(d, numerator, *, gained, length, b2, beta3, estim_lr_coef):
    numerator = (b2**0.5 if beta3 is None else beta3) * numerator + gained
    return {"d": jnp.maximum(d, _over(estim_lr_coef * numerator, length)), "numerator": numerator, "d_before": d}


@rule(
    start={"nu": real_zeros, **ORIGIN, "d": lambda estim_lr0: estim_lr0, "numerator": lambda: 0.0},
    sums=_prodigy_sums,
    shared=_prodigy_shared,
    oracle=lambda learning_rate, b1=0.9, b2=0.999, beta3=None, eps=1e-8, estim_lr0=1e-6, estim_lr_coef=1.0,
        weight_decay=0.0, safeguard_warmup=False: optax.contrib.prodigy(
            learning_rate, (b1, b2), beta3, eps, estim_lr0, estim_lr_coef, weight_decay, safeguard_warmup),
    positional=(
        "learning_rate", "betas", "beta3", "eps", "estim_lr0", "estim_lr_coef", "weight_decay", "safeguard_warmup",
    ),
    extras={"betas": BETAS},
    prepare=_betas,
    learning_rate=1.0,
    bounds={"beta3": (0, 1), "estim_lr0": POSITIVE},
    needs=dict.fromkeys(
        ("learning_rate", "b1", "b2", "beta3", "eps", "estim_lr0", "estim_lr_coef", "weight_decay", "safeguard_warmup",
         "bias_correction"), {"estim_lr0": 0.1, "estim_lr_coef": 100.0}),
    alternatives={"estim_lr0": 0.05, "estim_lr_coef": 50.0},
    exceptions=FAR | {"oracle:bias_correction": "optax always corrects; without it the oracle is prodigyopt"},
)  # fmt: skip
def prodigy(
    g, mu, nu, s, x0, *, p, t, d, d_before, learning_rate, weight_decay, b1=0.9, b2=0.999, beta3=None, eps=1e-8,
    estim_lr0=1e-6, estim_lr_coef=1.0, safeguard_warmup=False, bias_correction=True,
):  # fmt: skip
    r"""Prodigy (Mishchenko & Defazio 2024, arXiv:2306.06101): $d \leftarrow \max\{d,\, \textstyle\sum_k w_k \langle g_k, x_0 - x_k \rangle / \lVert \sum_k w_k g_k \rVert_1\},\; x \leftarrow x - \eta d\, \hat m_t / (\sqrt{\hat v_t} + \epsilon)$.

    $d$ estimates the distance to the solution; the weights $w_k \propto d_k^2 \eta_k$ fade by ``beta3``, by default
    $\sqrt{\beta_2}$. ``safeguard_warmup`` leaves $\eta_k$ out of the denominator. Weight decay goes by $\eta d$.
    """
    rate = _adam_rate(d_before, learning_rate, t, b1, b2, bias_correction)
    mu, nu = ema(mu, d_before * g, b1), ema(nu, sq(d_before * g), b2)
    s = _prodigy_memory(g, s, d_before, rate, b2, beta3, estim_lr0, safeguard_warmup)
    return -rate * (mu / (jnp.sqrt(nu) + d * eps) + _decay(p, weight_decay)), mu, nu, s, x0


def _dadapt_sums(g, nu, s, *, t, d, learning_rate, b1, b2, eps):
    rate, decay = _adam_rate(d, learning_rate, t, b1, b2), b2**0.5
    gained = rate * _dot(g, s / (jnp.sqrt(nu) + eps))
    return {"gained": gained, "length": jnp.sum(jnp.abs(ema(s, rate * g, decay)))}


def _dadapt_shared(d, numerator, *, gained, length, b2):
    numerator = ema(numerator, gained, b2**0.5)
    return {"d": jnp.maximum(d, _over(numerator, (1 - b2**0.5) * length)), "numerator": numerator, "d_before": d}


@rule(
    start={"nu": real_zeros, "d": lambda estim_lr0: estim_lr0, "numerator": lambda: 0.0},
    sums=_dadapt_sums,
    shared=_dadapt_shared,
    oracle=lambda learning_rate, b1=0.9, b2=0.999, eps=1e-8, estim_lr0=1e-6, weight_decay=0.0:
        optax.contrib.dadapt_adamw(learning_rate, (b1, b2), eps, estim_lr0, weight_decay),
    positional=("learning_rate", "betas", "eps", "estim_lr0", "weight_decay"),
    extras={"betas": BETAS},
    prepare=_betas,
    learning_rate=1.0,
    needs=dict.fromkeys(("learning_rate", "b1", "b2", "eps", "weight_decay"), {"estim_lr0": 0.1}),
    bounds={"estim_lr0": POSITIVE},
    alternatives={"estim_lr0": 0.1},
    exceptions={"narrow": "the step is made of sums of the gradient, which is rounded with the parameters"},
)  # fmt: skip
def dadapt_adamw(
    g, mu, nu, s, *, p, t, d_before, learning_rate, weight_decay, b1=0.9, b2=0.999, eps=1e-8, estim_lr0=1e-6
):
    r"""D-Adaptation, Adam form (Defazio & Mishchenko 2023, arXiv:2301.07733): $d \leftarrow \max\{d,\, \textstyle\sum_k \eta_k d_k \langle g_k, s_k \rangle_{1/\sqrt{v_k}} / \lVert s \rVert_1\},\; x \leftarrow x - \hat m_t(\eta d g) / (\sqrt{\hat v_t} + \epsilon)$.

    $d$ estimates the distance to the solution; both sums fade by $\sqrt{\beta_2}$. Weight decay goes by $\eta d$.
    """
    rate = _adam_rate(d_before, learning_rate, t, b1, b2)
    mu, nu, s = ema(mu, rate * g, b1), ema(nu, sq(g), b2), ema(s, rate * g, b2**0.5)
    return -rate * _decay(p, weight_decay) - mu / (jnp.sqrt(nu) + eps), mu, nu, s


@rule(
    start={**ORIGIN, "largest": lambda p, eps: real_zeros(p) + eps, "absolute": real_zeros, "reward": real_zeros},
    oracle=optax.contrib.cocob,
    positional=("learning_rate", "alpha", "eps", "weight_decay", "mask"),
    learning_rate=1.0,
    coupled=True,
    needs={"learning_rate": {"eps": 0.1}},
    exceptions=FAR,
)
def cocob(g, x0, total, largest, absolute, reward, *, p, learning_rate, alpha=100.0, eps=1e-8):
    r"""COCOB (Orabona & Tommasi 2017, arXiv:1705.07795): $x \leftarrow x_0 - \frac{\sum_k g_k}{L \max(\sum_k \lvert g_k \rvert + L,\, \alpha L)} (L + R),\; R \leftarrow (R - g (x - x_0))_+$.

    Each coordinate bets a part of its wealth on its next gradient, which $L$ bounds; there is no step size. The
    learning rate multiplies the gradient, so only its changes matter. Weight decay is added to the gradient.
    """
    c = learning_rate * g
    total, absolute, largest = total + c, absolute + jnp.abs(c), jnp.maximum(largest, jnp.abs(c))
    reward = jnp.maximum(reward - jnp.real(jnp.conj(c) * (p - x0)), 0)
    bet = _over(largest + reward, largest * jnp.maximum(absolute + largest, alpha * largest))
    return x0 - total * bet - p, x0, total, largest, absolute, reward
