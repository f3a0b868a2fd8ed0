"""A learning rate that is learnt on the way, around any optimizer.

Floor 4.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.typing import ArrayLike

from jaxsgd.lift import is_constant
from jaxsgd.numerics import wide, wide_dtype, widest, zeros
from jaxsgd.transforms.clip import norm_across
from jaxsgd.transforms.guard import keep_types

__all__ = ["MechanizeState", "mechanize"]


class MechanizeState(NamedTuple):
    """What `mechanize` remembers.

    Attributes:
      base_optimizer_state: the wrapped optimizer's state.
      count: int32 scalar, completed steps.
      r, m, v, s: of each beta, in float32 (float64 where a parameter is): what it won, the largest bet, the squared
        bets, its share of the scale. ``s.sum()`` is the scale that was learnt.
      delta: tree like params in at least float32, the sum of the wrapped optimizer's updates; None for a leaf that is
        not floating.
      carry: tree like params, what the rounding of narrow parameters still owes them; None for leaves of float32 and
        wider.
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

    Learns the scale $s$ of the updates $u$ of any optimizer: ``mechanize(adam(1.0))``, or with a schedule that ends
    at 0 as its learning rate. It bets on the inner product of the gradient with $\Delta$, at several horizons at once.

    $\Delta$ is kept, in at least float32, where optax computes it anew from $(x_1 - x_t) / s$. Both cost a copy of the
    parameters. But $s$ begins at 1e-6, and a parameter cannot hold a move of a 1e-7th of itself: what is computed anew
    in float32 is rounding, and 0 for ever where the updates are small. For bf16 and f16 parameters, a second copy in
    their own dtype carries what rounding took from them to the next step.

    Args:
      base_optimizer: what makes the updates.
      weight_decay: $\lambda$: the gradient that is bet on is $g + \lambda s \lVert g \rVert x / \lVert x \rVert$.
      eps: a small number above 0.
      s_init: the scale that the first steps have.
      num_betas: how many horizons: decays of 0.9, 0.99, 0.999, ...

    Returns:
      A transformation with a `MechanizeState`. Updates are in the dtypes of ``params``, which it needs; extra arguments
      are passed on.

    Raises:
      ValueError: an argument out of its range; in the update, ``params`` missing.
    """
    for name, value, above in (("weight_decay", weight_decay, False), ("s_init", s_init, False), ("eps", eps, True)):
        if is_constant(value) and not (value > 0 if above else value >= 0):
            raise ValueError(f"{name}={value}: it must be {'above 0' if above else '0 or more'}")
    if not num_betas >= 1:
        raise ValueError(f"num_betas={num_betas}: at least 1 is needed")
    base = optax.with_extra_args_support(base_optimizer)

    def init(params: Any) -> MechanizeState:
        leaves, treedef = jax.tree.flatten(params)
        dtype = widest(jnp.result_type(p) for p in leaves)
        r, m, v = (jnp.zeros((num_betas,), dtype) for _ in range(3))
        s = jnp.ones((num_betas,), dtype) * jnp.asarray(s_init).astype(dtype)
        delta = treedef.unflatten([zeros(p) if _moves(p) else None for p in leaves])
        carry = treedef.unflatten([jnp.zeros_like(p) if _is_narrow(p) else None for p in leaves])
        return MechanizeState(base.init(params), jnp.zeros((), jnp.int32), r, m, v, s, delta, carry)

    def update(updates: Any, state: Any, params: Any = None, **extra_args: Any) -> tuple[Any, MechanizeState]:
        if params is None:
            raise ValueError("params: mechanize needs them: tx.update(grads, state, params)")
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
                bent = wide(g, d.dtype) + decay.astype(d.dtype) * wide(p)
                bet -= jnp.real(jnp.vdot(bent, d)).astype(bet.dtype)
        bet *= shrink

        betas = jnp.asarray([1 - 0.1**i for i in range(1, num_betas + 1)], state.s.dtype)
        m = jnp.maximum(betas * state.m, jnp.abs(bet) + tiny)
        v = betas**2 * state.v + bet**2
        r = betas * state.r + jnp.clip(bet, -state.m, state.m) * state.s
        s = (start / num_betas * m + jnp.maximum(r, 0)) / (jnp.sqrt(v) + tiny)
        new_scale = jnp.sum(s)

        def move(p: Any, u: Any, d: Any, carry: Any) -> tuple[Any, Any, Any]:
            if d is None:
                return u, None, None
            before, kept, after = (x.astype(d.dtype) for x in (scale, shrink, new_scale))
            new = kept * d + wide(u, d.dtype)
            step = after * new - before * d
            if carry is None:
                return step.astype(p.dtype), new, None
            # Aim at a number that a parameter can hold, so that adding the update rounds nothing more. A cast there
            # and back would not do: compilers leave it out.
            aim, grid = wide(p) + step + wide(carry), jnp.finfo(p.dtype)
            landed = jax.lax.reduce_precision(aim, grid.nexp, grid.nmant)
            return (landed - wide(p)).astype(p.dtype), new, (aim - landed).astype(p.dtype)

        moved = [move(*parts) for parts in zip(leaves, us, deltas, carries, strict=True)]
        out, delta, carry = (treedef.unflatten([one[i] for one in moved]) for i in range(3))
        count = jnp.asarray(optax.safe_increment(state.count))
        inner = keep_types(advanced, state.base_optimizer_state)
        return out, MechanizeState(inner, count, r, m, v, s, delta, carry)

    return optax.GradientTransformationExtraArgs(init, update)


def _moves(p: Any) -> bool:
    return jnp.issubdtype(jnp.result_type(p), jnp.inexact)


def _is_narrow(p: Any) -> bool:
    return wide_dtype(jnp.result_type(p)) != jnp.result_type(p)
