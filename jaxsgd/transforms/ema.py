"""The moving average of parameters.

Floor 4.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from jaxsgd.numerics import real_dtype, wide, wide_dtype

__all__ = ["EmaState", "ema"]


class EmaState(NamedTuple):
    """What `ema` remembers.

    Attributes:
      count: int32 scalar, completed steps.
      average: tree like params in at least float32, ready to use: nothing is left to debias.
    """

    count: jax.Array
    average: Any


def ema(decay: float, *, debias: bool = True) -> optax.GradientTransformationExtraArgs:
    r"""Moving average of parameters (after Polyak & Juditsky 1992): $\bar p_t = d\,\bar p_{t-1} + (1-d)\,p_t$.

    The average of the parameters as they are after each step, rounding included, in float32 for narrower ones.
    (Source: SIAM J. Control Optim. 30(4):838-855, which weighs all steps alike.)
    Updates pass unchanged. Put it last in the chain, ``optax.chain(adamw(3e-4), ema(0.999))``: it adds the updates
    that it gets to the parameters. Put it inside `guard`, `accumulate` and `optax.MultiSteps`, so
    that steps which were skipped, or not yet made, do not count. `jaxsgd.eval_params` finds the average.

    Args:
      decay: d in [0, 1).
      debias: weigh the parameters after step i of t by $d^{t-i} / \sum_j d^{t-j}$, so that the average forgets
        the initial ones at the first step. Otherwise it starts from them.

    Returns:
      A transformation with an `EmaState`. Before the first step the average is the initial parameters. Leaves that
      are not floating are not averaged but copied.

    Raises:
      ValueError: ``decay`` outside [0, 1); in the update, ``params`` missing.
    """
    if not 0 <= decay < 1:
        raise ValueError(f"decay={decay}: it must lie in [0, 1)")
    log_decay = math.log(decay) if decay > 0 else -math.inf

    def init(params: Any) -> EmaState:
        # A copy, or params and state could not both be donated.
        average = jax.tree.map(lambda p: jnp.array(p, dtype=wide_dtype(jnp.result_type(p)), copy=True), params)
        return EmaState(jnp.zeros((), jnp.int32), average)

    def update(updates: Any, state: Any, params: Any = None, **extra_args: Any) -> tuple[Any, EmaState]:
        del extra_args
        if params is None:
            raise ValueError("params: ema needs them: tx.update(grads, state, params)")
        count = jnp.asarray(optax.safe_increment(state.count))

        def mix(average: jax.Array, p: jax.Array) -> jax.Array:
            if not jnp.issubdtype(average.dtype, jnp.inexact):
                return p
            share: Any = 1 - decay
            if debias and decay > 0:
                steps = count.astype(real_dtype(average.dtype))
                share = (math.expm1(log_decay) / jnp.expm1(steps * log_decay)).astype(average.dtype)
            return average + share * (wide(p) - average)

        new = optax.apply_updates(params, updates)
        return updates, EmaState(count, jax.tree.map(mix, state.average, new))

    return optax.GradientTransformationExtraArgs(init, update)
