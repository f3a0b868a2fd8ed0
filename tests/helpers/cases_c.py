"""References and exceptions of the rules in factored, adaptive_lr, curvature, averaging and wrappers."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
import optax
from case import Case

# -- factored --------------------------------------------------------------------------------------


def _adafactor_of_optax(
    learning_rate, min_dim_size_to_factor=128, decay_rate=0.8, decay_offset=0, multiply_by_parameter_scale=True,
    clipping_threshold=1.0, momentum=None, eps=1e-30, factored=True, weight_decay=0.0, independent_decay=False,
):  # fmt: skip
    """optax's Adafactor from its parts, with the decay 1 - t**-c not rounded to float32, and torch's decay."""
    decay = weight_decay if independent_decay else learning_rate * weight_decay
    return optax.chain(
        optax.scale_by_factored_rms(
            factored, decay_rate, decay_offset, min_dim_size_to_factor, eps,
            lambda i, c: 1 - jnp.add(i, 1.0) ** jnp.negative(c),
        ),
        optax.identity() if clipping_threshold is None else optax.clip_by_block_rms(clipping_threshold),
        optax.scale(learning_rate),
        optax.scale_by_param_block_rms() if multiply_by_parameter_scale else optax.identity(),
        optax.identity() if momentum is None else optax.ema(momentum, debias=False),
        optax.add_decayed_weights(decay),
        optax.scale(-1),
    )  # fmt: skip


def _sm3_of_optax(learning_rate, momentum=0.9, eps=1e-8):
    """optax's SM3 for scalars too, as vectors of length 1: on a scalar it raises an IndexError."""
    inner = optax.chain(optax.scale_by_sm3(momentum or 0.0, eps=eps), optax.scale(-learning_rate))
    at_least_1d = lambda tree: jax.tree.map(jnp.atleast_1d, tree)

    def update(updates, state, params=None):
        new, state = inner.update(at_least_1d(updates), state)
        return jax.tree.map(lambda u, g: u.reshape(g.shape), new, updates), state

    return optax.GradientTransformation(lambda params: inner.init(at_least_1d(params)), update)


# -- adaptive_lr -----------------------------------------------------------------------------------


def _polyak_of_optax(learning_rate, scaling=1.0, f_min=0.0, eps=0.0, variant="sps"):
    return optax.chain(optax.scale_by_polyak(f_min, learning_rate, eps, variant), optax.scale_by_learning_rate(scaling))


def _as_published(theirs):
    """optax's rule, with the step itself shrunk too, as in the paper and in the authors' code."""

    @functools.wraps(theirs)
    def oracle(learning_rate, weight_decay=0.0, **others):
        tx, shrink = theirs(learning_rate, weight_decay=weight_decay, **others), learning_rate * weight_decay
        also = optax.stateless_with_tree_map(lambda u, p: (u - shrink**2 / (1 + shrink) * p) / (1 + shrink))
        return optax.chain(tx, also)

    return oracle


def _dog_of_optax(learning_rate, init_kind: Any = "heuristic", init_value=1e-6, eps=1e-8, weight_decay=None):
    return optax.contrib.dog(learning_rate, (init_kind, init_value), eps, weight_decay)


def _prodigy_of_optax(
    learning_rate, b1=0.9, b2=0.999, beta3=None, eps=1e-8, estim_lr0=1e-6, estim_lr_coef=1.0, weight_decay=0.0,
    safeguard_warmup=False,
):  # fmt: skip
    return optax.contrib.prodigy(
        learning_rate, (b1, b2), beta3, eps, estim_lr0, estim_lr_coef, weight_decay, safeguard_warmup
    )


def _dadapt_of_optax(learning_rate, b1=0.9, b2=0.999, eps=1e-8, estim_lr0=1e-6, weight_decay=0.0):
    return optax.contrib.dadapt_adamw(learning_rate, (b1, b2), eps, estim_lr0, weight_decay)


LOSS = {"flax": "the loss must be given to the update, and Flax's own train states do not pass it on"}
FAR = {"narrow": "the step is made of the distance walked, and narrow parameters do not walk small steps"}
MODEL: dict[str, Any] = {
    "needs": dict.fromkeys(("lower_bound", "adapt_lower_bound"), {"learning_rate": 1.0}),
    "exceptions": LOSS | {"narrow": "the step is made of the loss, which is that of the rounded parameters"},
    "alternatives": {"beta": 0.5},
}
PRODIGY = (
    "learning_rate", "b1", "b2", "beta3", "eps", "estim_lr0", "estim_lr_coef", "weight_decay", "safeguard_warmup",
    "bias_correction",
)  # fmt: skip

# -- curvature -------------------------------------------------------------------------------------


def noisy_ones(key: jax.Array) -> optax.GradientTransformationExtraArgs:
    """An estimate of the diagonal that depends on the key also where the Hessian is diagonal."""

    def update(updates, state, params=None, *, obj_fn):
        del params, obj_fn
        return jax.tree.map(lambda g: jax.random.uniform(key, g.shape, g.dtype), updates), state

    return optax.GradientTransformationExtraArgs(lambda params: optax.EmptyState(), update)


# -- averaging -------------------------------------------------------------------------------------


def rising(count: Any) -> Any:
    """A schedule under which the weights of the average differ; with a constant rate they are all equal."""
    return 0.01 * (count + 1)


WEIGHTED = {"weight_lr_power": {"learning_rate": rising}}

CASES = {
    "adafactor": Case(
        oracle=_adafactor_of_optax,
        needs={"factored": {"min_dim_size_to_factor": 2}, "independent_decay": {"weight_decay": 0.1}},
        alternatives={"min_dim_size_to_factor": 2},
        exceptions={"narrow": "the momentum holds steps, which are scaled by the size of the bf16 parameters"},
    ),
    "sm3": Case(oracle=_sm3_of_optax),
    "polyak_sgd": Case(
        oracle=_polyak_of_optax,
        needs={"f_min": {"learning_rate": 1.0}, "eps": {"learning_rate": 1.0}, "variant": {"f_min": 8.0}},
        alternatives={"variant": "sps+", "eps": 10.0},
        exceptions=LOSS,
    ),
    "momo": Case(oracle=_as_published(optax.contrib.momo), **MODEL),
    "momo_adam": Case(oracle=_as_published(optax.contrib.momo_adam), **MODEL),
    "dog": Case(
        oracle=_dog_of_optax,
        needs=dict.fromkeys(("learning_rate", "eps", "weight_decay", "init_kind"), {"init_value": 1.0})
        | {"init_value": {"init_kind": "learning_rate"}},
        alternatives={"init_kind": "distance", "init_value": 0.1, "weight_decay": 0.1, "eps": 10.0},
        exceptions=FAR,
    ),
    "dowg": Case(alternatives={"weight_decay": 0.1}, exceptions=FAR),
    "prodigy": Case(
        oracle=_prodigy_of_optax,
        needs=dict.fromkeys(PRODIGY, {"estim_lr0": 0.1, "estim_lr_coef": 100.0}),
        alternatives={"estim_lr0": 0.05, "estim_lr_coef": 50.0},
        exceptions=FAR | {"oracle:bias_correction": "optax always corrects; without it the oracle is prodigyopt"},
    ),
    "dadapt_adamw": Case(
        oracle=_dadapt_of_optax,
        needs=dict.fromkeys(("learning_rate", "b1", "b2", "eps", "weight_decay"), {"estim_lr0": 0.1}),
        alternatives={"estim_lr0": 0.1},
        exceptions={"narrow": "the step is made of sums of the gradient, which is rounded with the parameters"},
    ),
    "cocob": Case(needs={"learning_rate": {"eps": 0.1}}, exceptions=FAR),
    "sophia": Case(
        needs={
            "gamma": {"clip_threshold": 20.0},
            "update_interval": {"clip_threshold": 20.0},
            "key": {"clip_threshold": 20.0, "gamma": 1.0, "hessian_diagonal_fn": noisy_ones},
        },
        alternatives={"key": 1},
        exceptions={
            "flax": "the objective must be given to the update, and Flax's own train states do not pass it on",
            "oracle:key": "optax's keys are other ones",
        },
    ),
    "schedule_free_adamw": Case(needs=WEIGHTED),
    "schedule_free_sgd": Case(needs=WEIGHTED, like="sgd"),
    "schedule_free_radam": Case(needs=WEIGHTED, alternatives={"b2": 0.95}),
    "grokfast_sgd": Case(like="sgd"),
    "centralized_sgd": Case(like="sgd"),
    "adaptive_clip_sgd": Case(alternatives={"eps_clip": 10.0}, like="sgd"),
    "lookahead_sgd": Case(
        exceptions={"narrow": "the slow weights average the parameters, rounded as they are"}, like="sgd"
    ),
}
