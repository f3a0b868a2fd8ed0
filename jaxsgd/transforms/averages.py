"""Moving averages: of the updates, as optax has it, and of the parameters."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.typing import ArrayLike, DTypeLike
from optax import EmaState

from jaxsgd.hyper import is_constant
from jaxsgd.numerics import filled, is_float0, wide, wide_dtype, widest, zeros
from jaxsgd.paths import check_params, same_structure
from jaxsgd.transforms.trees import as_array, check_like, is_inexact

__all__ = ["EmaState", "ParamsEmaState", "ema", "params_ema"]


def _check_decay(decay: Any) -> None:
    if is_constant(decay) and not 0 <= decay < 1:
        raise ValueError(f"decay={decay}: it must lie in [0, 1)")


# -- of the updates --------------------------------------------------------------------------------


def ema(
    decay: ArrayLike, debias: bool = True, accumulator_dtype: DTypeLike | None = None
) -> optax.GradientTransformationExtraArgs:
    r"""Moving average of the updates: $m \leftarrow d\,m + (1-d)\,g$, $u = m / (1 - d^t)$.

    Called as optax's ``ema``: ``optax.chain(ema(0.9), optax.scale(-0.1))``. For an average of the parameters use
    `params_ema`.

    Args:
      decay: d in [0, 1).
      debias: divide by $1 - d^t$. Default: True.
      accumulator_dtype: the dtype of m, for real leaves. Default: None, that of the parameter, float32 for narrower
        ones.

    Returns:
      A transformation with an `EmaState`: ``count`` and ``ema``. Updates keep their dtypes. Leaves that are not
      floating pass unchanged.

    Raises:
      ValueError: ``decay`` outside [0, 1); in the update, a state that was made for other shapes.
    """
    _check_decay(decay)

    def init(params: Any) -> EmaState:
        check_params(params)

        def start(p: Any) -> jax.Array:
            mean = zeros(p)
            return mean if accumulator_dtype is None or not _is_real(mean) else mean.astype(accumulator_dtype)

        return EmaState(jnp.zeros((), jnp.int32), jax.tree.map(start, params))

    def update(updates: Any, state: Any, params: Any = None, **extra_args: Any) -> tuple[Any, EmaState]:
        del params, extra_args
        check_like(updates, state.ema, "ema")
        count = jnp.asarray(optax.safe_increment(state.count))
        dtype = widest(x.dtype for x in jax.tree.leaves(state.ema))
        rate = jnp.asarray(decay, dtype)
        fill = filled(decay if is_constant(decay) else rate, count.astype(dtype)) if debias else jnp.ones((), dtype)
        leaves, treedef = jax.tree.flatten(updates)
        pairs = [
            _average(as_array(g), mean, rate, fill) if is_inexact(mean) and not is_float0(g) else (g, mean)
            for g, mean in zip(leaves, jax.tree.leaves(state.ema), strict=True)
        ]
        new, means = (treedef.unflatten([pair[i] for pair in pairs]) for i in range(2))
        return new, EmaState(count, means)

    return optax.GradientTransformationExtraArgs(init, update)


def _is_real(x: jax.Array) -> bool:
    return jnp.issubdtype(x.dtype, jnp.floating)


@jax.jit
def _average(g: jax.Array, mean: jax.Array, decay: jax.Array, fill: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The average of one leaf, debiased and as the state keeps it."""
    x = wide(mean)
    decay, fill = decay.astype(x.dtype), fill.astype(x.dtype)
    x = decay * x + (1 - decay) * wide(g, x.dtype)
    return (x / fill).astype(g.dtype), x.astype(mean.dtype)


# -- of the parameters -----------------------------------------------------------------------------


class ParamsEmaState(NamedTuple):
    """The state of `params_ema`.

    Attributes:
      count: int32 scalar, completed steps.
      average: tree like params in at least float32, ready to use: nothing is left to debias.
    """

    count: jax.Array
    average: Any


def params_ema(decay: float, *, debias: bool = True) -> optax.GradientTransformationExtraArgs:
    r"""Moving average of parameters (after Polyak & Juditsky 1992): $\bar p_t = d\,\bar p_{t-1} + (1-d)\,p_t$.

    The average of the parameters as they are after each step, rounding included, in float32 for narrower ones.
    (Source: SIAM J. Control Optim. 30(4):838-855, which weighs all steps alike.)
    Updates pass unchanged. Put it last in the chain, ``optax.chain(adamw(3e-4), params_ema(0.999))``: it adds the
    updates to the parameters. Put it inside `guard`, `accumulate` and `optax.MultiSteps`, so that skipped and partial
    steps do not count. `jaxsgd.eval_params` finds the average.

    Args:
      decay: d in [0, 1).
      debias: weigh the parameters after step i of t by $d^{t-i} / \sum_j d^{t-j}$, so that the average forgets
        the initial ones at the first step. With False it starts from them. Default: True.

    Returns:
      A transformation with a `ParamsEmaState`. Before the first step the average is the initial parameters. Leaves
      that are not floating are copied.

    Raises:
      ValueError: ``decay`` outside [0, 1); in the update, ``params`` missing, or a state that was made for
        other shapes.
    """
    _check_decay(decay)

    def init(params: Any) -> ParamsEmaState:
        check_params(params)
        # A copy, or params and state could not both be donated.
        average = jax.tree.map(lambda p: jnp.array(p, dtype=wide_dtype(jnp.result_type(p)), copy=True), params)
        return ParamsEmaState(jnp.zeros((), jnp.int32), average)

    def update(updates: Any, state: Any, params: Any = None, **extra_args: Any) -> tuple[Any, ParamsEmaState]:
        del extra_args
        if params is None:
            raise ValueError("params: params_ema needs them: tx.update(grads, state, params)")
        same_structure(params, updates)
        check_like(params, state.average, "params_ema")
        count = jnp.asarray(optax.safe_increment(state.count))
        dtype = widest(x.dtype for x in jax.tree.leaves(state.average))
        share = jnp.asarray(1 - decay, dtype)
        if debias and not (is_constant(decay) and decay == 0):
            log = math.log(decay) if is_constant(decay) else jnp.log(jnp.asarray(decay, dtype))
            share = jnp.expm1(log) / jnp.expm1(count.astype(dtype) * log)

        def mix(average: jax.Array, p: Any, u: Any) -> jax.Array:
            return as_array(p).astype(average.dtype) if is_float0(u) else _mix(average, as_array(p), as_array(u), share)

        return updates, ParamsEmaState(count, jax.tree.map(mix, state.average, params, updates))

    return optax.GradientTransformationExtraArgs(init, update)


@jax.jit
def _mix(average: jax.Array, p: jax.Array, u: jax.Array, share: jax.Array) -> jax.Array:
    dtype = p.dtype if p.dtype == u.dtype else jnp.promote_types(wide_dtype(p.dtype), wide_dtype(u.dtype))
    new = (p.astype(dtype) + u.astype(dtype)).astype(p.dtype)
    if not is_inexact(average):
        return new
    return average + share.astype(average.dtype) * (wide(new) - average)
