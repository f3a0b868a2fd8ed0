"""References and exceptions of the rules in momentum, adaptive, adam_variants, sign, layerwise and torch."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import optax
from case import Case


def _trace_of_optax(learning_rate, momentum=0.9):
    return optax.sgd(learning_rate, momentum)


def _velocity_of_optax(learning_rate, momentum=0.9):
    return optax.chain(optax.scale_by_learning_rate(learning_rate), optax.trace(momentum))


def _nesterov_of_optax(learning_rate, momentum=0.9):
    return optax.chain(optax.scale_by_learning_rate(learning_rate), optax.trace(momentum, nesterov=True))


def _acprop_of_optax(
    learning_rate, b1=0.9, b2=0.999, eps=1e-16, eps_root=1e-16, weight_decay=0.0, stale_mean=False
):  # fmt: skip
    """ACProp of optax's parts: its own, or the scale that its AdaBelief had one step earlier."""
    if stale_mean:
        return optax.contrib.acprop(learning_rate, b1, b2, eps, eps_root, weight_decay)
    belief = optax.scale_by_belief(b1, b2, eps, eps_root)

    def update(updates, state, params=None):
        root = jax.tree.map(jnp.sqrt, optax.tree.bias_correction(state.nu, b2, jnp.maximum(state.count, 1)))
        u = jax.tree.map(lambda g, r: g / (jnp.where(state.count == 0, 1, r) + eps), updates, root)
        return u, belief.update(updates, state, params)[1]

    decay = optax.add_decayed_weights(weight_decay)
    return optax.chain(
        optax.GradientTransformation(belief.init, update), decay, optax.scale_by_learning_rate(learning_rate)
    )


def _yogi_of_optax(
    learning_rate, b1=0.9, b2=0.999, eps=1e-3, eps_root=0.0, initial_accumulator_value=1e-6, initial_mean=0.0
):  # fmt: skip
    """optax's Yogi, whose mean starts at ``initial_mean``."""
    scale = optax.scale_by_yogi(b1, b2, eps, eps_root, initial_accumulator_value)

    def init(params):
        state: Any = scale.init(params)
        return state._replace(mu=optax.tree.full_like(params, initial_mean))

    return optax.chain(optax.GradientTransformation(init, scale.update), optax.scale_by_learning_rate(learning_rate))


def _optimistic_adam_of_optax(
    learning_rate, optimism=None, b1=0.9, b2=0.999, eps=1e-8, eps_root=0.0, nesterov=True
):  # fmt: skip
    return optax.chain(
        optax.scale_by_adam(b1, b2, eps, eps_root, nesterov=nesterov),
        optax.scale_by_optimistic_gradient(learning_rate, learning_rate if optimism is None else optimism),
        optax.scale(-1.0),
    )


def _adopt_of_optax(
    learning_rate, b1=0.9, b2=0.9999, eps=1e-6, nesterov=False, use_clipping=True, clip_value_fn=None
):  # fmt: skip
    """optax's ADOPT, with a number in place of the function of the step."""
    clip = {} if clip_value_fn is None else {"clip_value_fn": lambda _: clip_value_fn}
    return optax.contrib.adopt(learning_rate, b1, b2, eps, nesterov=nesterov, use_clipping=use_clipping, **clip)


def _madgrad_of_optax(learning_rate, momentum=0.9, weight_decay=0.0, eps=1e-6):
    """optax's MADGRAD, counting in floats: of its integer count it takes the root in float32 always."""
    tx = optax.contrib.madgrad(learning_rate, momentum, weight_decay, eps)
    return optax.GradientTransformation(lambda params: optax.tree.set(tx.init(params), count=jnp.zeros(())), tx.update)


CASES = {
    # momentum
    "sgd": Case(needs={"nesterov": {"momentum": 0.9}}),
    "momentum": Case(oracle=_trace_of_optax),
    "velocity": Case(oracle=_velocity_of_optax),
    "nesterov": Case(oracle=_nesterov_of_optax),
    "noisy_sgd": Case(
        oracle=None,
        alternatives={"key": 1},
        exceptions={
            "zero": "the noise moves a parameter whose gradient is zero",
            "complex": "the noise is drawn on the axes, it does not turn with the gradient",
        },
    ),
    # adaptive
    "rmsprop": Case(needs={"nesterov": {"momentum": 0.9}, "eps_in_sqrt": {"eps": 0.01}}),
    # adam_variants
    "acprop": Case(oracle=_acprop_of_optax),
    "yogi": Case(oracle=_yogi_of_optax),
    "radam": Case(alternatives={"b2": 0.95, "threshold": 6.0}),
    "adan": Case(oracle=None),
    "optimistic_adam": Case(oracle=_optimistic_adam_of_optax),
    "mars": Case(alternatives={"max_norm": 3.0}),
    "adopt": Case(oracle=_adopt_of_optax, alternatives={"eps": 1.0}),
    "madgrad": Case(oracle=_madgrad_of_optax),
    # sign
    "rprop": Case(oracle=None, alternatives={"eta_plus": 1.5, "min_step_size": 0.03, "max_step_size": 0.06}),
    # layerwise
    "lars": Case(
        exceptions={"narrow": "the trace holds steps, which are scaled by the norm of the bf16 parameters"},
    ),
    "fromage": Case(alternatives={"min_norm": 0.5}),
    # torch
    "torch_sgd": Case(needs={"nesterov": {"momentum": 0.9}, "dampening": {"momentum": 0.9}}),
    "torch_asgd": Case(
        alternatives={"lambd": 0.1, "t0": 10.0},
        needs={"alpha": {"lambd": 0.1}},
        exceptions={"narrow": "the average is of the parameters, rounded as they are"},
    ),
    "torch_rprop": Case(alternatives={"eta_plus": 1.5, "min_step_size": 0.03, "max_step_size": 0.06}),
    "torch_adafactor": Case(alternatives={"d": 2.0, "eps2": 5.0}),
}
