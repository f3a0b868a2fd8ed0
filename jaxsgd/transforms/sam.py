"""Sharpness-aware minimization: the gradient where an adversary has moved the parameters to.

Floor 4.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.core import Tracer

from jaxsgd.numerics import wide
from jaxsgd.transforms.clip import AxisName, norm_across
from jaxsgd.transforms.guard import keep_types

__all__ = ["SamState", "normalize", "sam"]


class SamState(NamedTuple):
    """What `sam` remembers.

    Attributes:
      steps_since_sync: int32 scalar, adversarial steps since the last outer one.
      opt_state: the outer optimizer's state.
      adv_state: the adversary's state.
      cache: tree like params, where the outer optimizer is; None in opaque mode.
    """

    steps_since_sync: jax.Array
    opt_state: Any
    adv_state: Any
    cache: Any


def normalize(*, axis_name: AxisName = None) -> optax.GradientTransformationExtraArgs:
    r"""The gradient divided by the norm of the whole tree: $g \leftarrow g / \lVert g \rVert$, 0 for no gradient.

    Args:
      axis_name: mesh axes along which the gradients are sharded inside `jax.shard_map` or `jax.pmap`; see
        `jaxsgd.transforms.clip.norm_across`.

    Returns:
      A transformation without state. The norm is in at least float32; updates keep their dtypes.
    """

    def update(updates: Any, state: Any, params: Any = None, **extra_args: Any) -> tuple[Any, Any]:
        del params, extra_args
        norm = norm_across(updates, axis_name)
        norm = jnp.where(norm == 0, 1, norm)

        def divide(g: Any) -> jax.Array:
            g = jnp.asarray(g)
            if not jnp.issubdtype(g.dtype, jnp.inexact):
                return g
            return (wide(g) / norm.astype(wide(g).dtype)).astype(g.dtype)

        return jax.tree.map(divide, updates), state

    return optax.GradientTransformationExtraArgs(lambda params: optax.EmptyState(), update)


def sam(
    optimizer: optax.GradientTransformation,
    adv_optimizer: optax.GradientTransformation,
    sync_period: int = 2,
    reset_state: bool = True,
    opaque_mode: bool = False,
    batch_axis_name: str | None = None,
) -> optax.GradientTransformationExtraArgs:
    r"""SAM (Foret et al. 2020, arXiv:2010.01412): $x \leftarrow x - \eta\, \nabla f(x + \rho\, g / \lVert g \rVert)$.

    Sharpness-aware minimization, by two optimizers: ``sam(sgd(0.01), optax.chain(normalize(), sgd(0.1)))`` is the
    paper's, with $\rho = 0.1$. The adversary's steps are taken uphill. By default they are seen: of ``sync_period``
    calls of ``update`` all but the last move the params to where the next gradient is to be taken, and the last moves
    them back and the outer optimizer one step on. Only one of the two optimizers runs in each call.

    Args:
      optimizer: the outer optimizer; it sees the params from which the adversary set out.
      adv_optimizer: the adversary, an optimizer that descends.
      sync_period: calls from one outer step to the next; 1 leaves the adversary out.
      reset_state: start the adversary's state anew after each outer step.
      opaque_mode: take all steps in each call of ``update``, for models that remember more than params (batch
        statistics) and may not see the adversary's. The call needs ``grad_fn(params, i)``, the gradient at the i-th
        adversarial point: ``tx.update(grads, state, params, grad_fn=grad_fn)``.
      batch_axis_name: with ``opaque_mode`` in `jax.pmap`, the axis along which to average those gradients.

    Returns:
      A transformation with a `SamState`. Further extra arguments are passed on to both optimizers.

    Raises:
      ValueError: ``sync_period`` below 1; in the update, ``params`` missing, or ``grad_fn`` in opaque mode.
    """
    if not sync_period >= 1:
        raise ValueError(f"sync_period={sync_period}: at least 1 is needed, the outer step itself")
    outer, adversary = optax.with_extra_args_support(optimizer), optax.with_extra_args_support(adv_optimizer)

    def init(params: Any) -> SamState:
        # A copy, or params and state could not both be donated.
        cache = None if opaque_mode else jax.tree.map(lambda p: jnp.array(p, copy=True), params)
        return SamState(jnp.zeros((), jnp.int32), outer.init(params), adversary.init(params), cache)

    def uphill(updates: Any, adv_state: Any, params: Any, extra: dict[str, Any]) -> tuple[Any, Any]:
        updates, adv_state = adversary.update(updates, adv_state, params, **extra)
        return keep_types(jax.tree.map(jnp.negative, updates), params), adv_state

    def one_of_both(updates: Any, state: Any, params: Any, extra: dict[str, Any]) -> tuple[Any, SamState]:
        first, last = state.steps_since_sync == 0, state.steps_since_sync >= sync_period - 1
        cache = jax.tree.map(lambda p, c: jnp.where(first, p, c), params, state.cache)

        def step() -> tuple[Any, Any, Any]:
            moved, opt_state = outer.update(updates, state.opt_state, cache, **extra)
            back = jax.tree.map(lambda c, p, u: wide(c) - wide(p) + wide(u, wide(p).dtype), cache, params, moved)
            adv_state = adversary.init(params) if reset_state else state.adv_state
            return (
                keep_types(back, params),
                keep_types(opt_state, state.opt_state),
                keep_types(adv_state, state.adv_state),
            )

        def climb() -> tuple[Any, Any, Any]:
            climbed, adv_state = uphill(updates, state.adv_state, params, extra)
            return climbed, state.opt_state, keep_types(adv_state, state.adv_state)

        # Selected, not weighted by 0 and 1: 0 times inf is NaN.
        out, opt_state, adv_state = (
            jax.lax.cond(last, step, climb) if isinstance(last, Tracer) else (step if last else climb)()
        )
        steps = jnp.where(last, 0, state.steps_since_sync + 1)
        return out, SamState(steps, opt_state, adv_state, cache)

    def all_at_once(updates: Any, state: Any, params: Any, grad_fn: Any, extra: dict[str, Any]) -> tuple[Any, SamState]:
        if grad_fn is None:
            raise ValueError(
                "grad_fn: sam with opaque_mode=True needs it: tx.update(grads, state, params, grad_fn=...)"
            )
        adv_state, point = state.adv_state, params
        for i in range(sync_period - 1):
            climbed, adv_state = uphill(updates, adv_state, point, extra)
            point = optax.apply_updates(point, climbed)
            updates = grad_fn(point, i)
            if batch_axis_name is not None:
                updates = jax.lax.pmean(updates, batch_axis_name)
        updates, opt_state = outer.update(updates, state.opt_state, params, **extra)
        if reset_state:
            adv_state = adversary.init(params)
        opt_state, adv_state = keep_types((opt_state, adv_state), (state.opt_state, state.adv_state))
        return keep_types(updates, params), SamState(jnp.zeros((), jnp.int32), opt_state, adv_state, None)

    def update(
        updates: Any, state: Any, params: Any = None, *, grad_fn: Any = None, **extra_args: Any
    ) -> tuple[Any, SamState]:
        if params is None:
            raise ValueError("params: sam needs them: tx.update(grads, state, params)")
        if opaque_mode:
            return all_at_once(updates, state, params, grad_fn, extra_args)
        return one_of_both(updates, state, params, extra_args)

    return optax.GradientTransformationExtraArgs(init, update)
