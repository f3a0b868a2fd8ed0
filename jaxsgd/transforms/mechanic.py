"""Mechanic: a wrapper that learns the learning rate of any optimizer."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.typing import ArrayLike

from jaxsgd.hyper import is_constant
from jaxsgd.numerics import wide, wide_dtype, widest, zeros
from jaxsgd.paths import check_optimizer, check_params, same_structure
from jaxsgd.transforms.clip import norm_across
from jaxsgd.transforms.trees import REMEDY, check_like, is_inexact, keep_types

__all__ = ["MechanizeState", "mechanize"]


class MechanizeState(NamedTuple):
    """The state of `mechanize`.

    Attributes:
      base_optimizer_state: the wrapped optimizer's state.
      count: int32 scalar, completed steps.
      r, m, v, s: for each beta, in float32 (float64 where a parameter is): its winnings, the largest bet, the squared
        bets, its share of the scale. ``s.sum()`` is the learned scale.
      delta: tree like params in at least float32, the sum of the wrapped optimizer's updates; None for a leaf that is
        not floating.
      carry: tree like params, the rounding error that the next step adds to narrow parameters; None for leaves of
        float32 and wider.
    """

    base_optimizer_state: Any
    count: jax.Array
    r: jax.Array
    m: jax.Array
    v: jax.Array
    s: jax.Array
    delta: Any
    carry: Any


def mechanize(
    base_optimizer: optax.GradientTransformation,
    weight_decay: ArrayLike = 1e-2,
    eps: ArrayLike = 1e-8,
    s_init: ArrayLike = 1e-6,
    num_betas: int = 6,
) -> optax.GradientTransformationExtraArgs:
    r"""Mechanic (Cutkosky et al. 2023, arXiv:2306.00144): $\Delta_{t+1} = \Delta_t + u_t,\; x_t = x_1 + s_t \Delta_t$.

    Learns the scale $s$ of the updates $u$ of any optimizer: ``mechanize(adam(1.0))``. A schedule that ends at 0 may
    be its learning rate. Mechanic bets on the inner product of the gradient with $\Delta$, at several horizons at once.

    The state keeps $\Delta$ in at least float32, where optax computes it from $(x_1 - x_t) / s$. Both need a copy of
    the parameters. But $s$ starts at 1e-6, and float32 cannot represent a change of a parameter by a 1e-7th of itself.
    Computed from the parameters, $\Delta$ is rounding error, or stays 0 where the updates are small. For narrow
    parameters, a second copy in their own dtype carries the rounding error to the next step.

    Args:
      base_optimizer: the optimizer that makes the updates.
      weight_decay: $\lambda$: the bet is on $g + \lambda s \lVert g \rVert x / \lVert x \rVert$. Default: 0.01.
      eps: a small number above 0. Default: 1e-8.
      s_init: the scale of the first steps. Default: 1e-6.
      num_betas: number of horizons, with decays of 0.9, 0.99, 0.999, ... Default: 6.

    Returns:
      A transformation with a `MechanizeState`. Updates are in the dtypes of ``params``, which it needs. Extra arguments
      go to ``base_optimizer``.

    Raises:
      ValueError: an argument out of its range; in the update, ``params`` missing, or a state that was made for other
        parameters or another ``num_betas``.
    """
    for name, value, above in (("weight_decay", weight_decay, False), ("s_init", s_init, False), ("eps", eps, True)):
        if is_constant(value) and not (value > 0 if above else value >= 0):
            raise ValueError(f"{name}={value}: it must be {'above 0' if above else '0 or more'}")
    if not num_betas >= 1:
        raise ValueError(f"num_betas={num_betas}: at least 1 is needed")
    check_optimizer(base_optimizer)
    base = optax.with_extra_args_support(base_optimizer)

    def init(params: Any) -> MechanizeState:
        check_params(params)
        dtype = widest(jnp.result_type(p) for p in jax.tree.leaves(params))
        r, m, v = (jnp.zeros((num_betas,), dtype) for _ in range(3))
        s = jnp.ones((num_betas,), dtype) * jnp.asarray(s_init).astype(dtype)
        delta = jax.tree.map(zeros, _only(is_inexact, params))
        carry = jax.tree.map(jnp.zeros_like, _only(_is_narrow, params))
        return MechanizeState(base.init(params), jnp.zeros((), jnp.int32), r, m, v, s, delta, carry)

    def update(updates: Any, state: Any, params: Any = None, **extra_args: Any) -> tuple[Any, MechanizeState]:
        if params is None:
            raise ValueError("params: mechanize needs them: tx.update(grads, state, params)")
        same_structure(params, updates)
        check_like(_only(is_inexact, params), state.delta, "mechanize")
        check_like(_only(_is_narrow, params), state.carry, "mechanize")
        if state.s.shape != (num_betas,):
            raise ValueError(f"mechanize: num_betas={num_betas}; the state has {state.s.size}. {REMEDY}")
        steps, advanced = base.update(updates, state.base_optimizer_state, params, **extra_args)
        leaves, treedef = jax.tree.flatten(params)
        grads, us, deltas, carries = map(treedef.flatten_up_to, (updates, steps, state.delta, state.carry))
        decay_by, tiny, start = (jnp.asarray(x).astype(state.s.dtype) for x in (weight_decay, eps, s_init))

        scale = jnp.sum(state.s)
        decay = decay_by * scale * norm_across(updates) / (norm_across(params) + tiny)
        shrink = scale / (scale + tiny)
        bet = jnp.zeros_like(scale)
        for p, g, d in zip(leaves, grads, deltas, strict=True):
            if d is not None:
                bet -= _inner_product(p, g, d, decay).astype(bet.dtype)
        bet *= shrink

        betas = jnp.asarray([1 - 0.1**i for i in range(1, num_betas + 1)], state.s.dtype)
        m = jnp.maximum(betas * state.m, jnp.abs(bet) + tiny)
        v = betas**2 * state.v + bet**2
        r = betas * state.r + jnp.clip(bet, -state.m, state.m) * state.s
        s = (start / num_betas * m + jnp.maximum(r, 0)) / (jnp.sqrt(v) + tiny)
        new_scale = jnp.sum(s)

        results = [
            (u, None, None) if d is None else _move(p, u, d, carry, scale, shrink, new_scale)
            for p, u, d, carry in zip(leaves, us, deltas, carries, strict=True)
        ]
        out, delta, carry = (treedef.unflatten([result[i] for result in results]) for i in range(3))
        count = jnp.asarray(optax.safe_increment(state.count))
        inner = keep_types(advanced, state.base_optimizer_state, "mechanize")
        return keep_types(out, params, "mechanize"), MechanizeState(inner, count, r, m, v, s, delta, carry)

    return optax.GradientTransformationExtraArgs(init, update)


@jax.jit
def _inner_product(p: Any, g: Any, delta: jax.Array, decay: jax.Array) -> jax.Array:
    bent = wide(g, delta.dtype) + decay.astype(delta.dtype) * wide(p)
    return jnp.real(jnp.vdot(bent, delta, precision="highest"))


@jax.jit
def _move(
    p: Any, u: Any, delta: jax.Array, carry: Any, scale: jax.Array, shrink: jax.Array, new_scale: jax.Array
) -> tuple[jax.Array, jax.Array, Any]:
    """The update of one leaf, the new sum of updates, and what rounding takes from the parameter."""
    scale, shrink, new_scale = (x.astype(delta.dtype) for x in (scale, shrink, new_scale))
    new = shrink * delta + wide(u, delta.dtype)
    step = new_scale * new - scale * delta
    if carry is None:
        return step, new, None
    # Aim at a number that a parameter can hold, so that adding the update rounds nothing more.
    aim = wide(p) + step + wide(carry)
    landed = _rounded(aim, carry.dtype)
    return (landed - wide(p)).astype(carry.dtype), new, (aim - landed).astype(carry.dtype)


def _rounded(x: jax.Array, dtype: Any) -> jax.Array:
    """``x`` rounded to a narrow dtype. Compilers leave out a cast to bf16 and back, but not this."""
    if dtype.itemsize > 1:
        return jax.lax.reduce_precision(x, jnp.finfo(dtype).nexp, jnp.finfo(dtype).nmant)
    return jax.lax.optimization_barrier(x.astype(dtype)).astype(x.dtype)


def _only(test: Callable[[Any], bool], tree: Any) -> Any:
    """``tree`` with None for each leaf that fails ``test``."""
    return jax.tree.map(lambda x: x if test(x) else None, tree)


def _is_narrow(p: Any) -> bool:
    return wide_dtype(jnp.result_type(p)) != jnp.result_type(p)
