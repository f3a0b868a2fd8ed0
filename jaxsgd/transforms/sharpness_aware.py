"""Sharpness-aware minimization: gradients at parameters that an adversary has moved uphill."""

from __future__ import annotations

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.core import Tracer

from jaxsgd.numerics import wide
from jaxsgd.paths import check_optimizer, check_params, same_structure
from jaxsgd.transforms.clip import AxisName, norm_across
from jaxsgd.transforms.trees import check_like, is_inexact, keep_types, map_inexact, select, update_types

__all__ = ["SamState", "normalize", "sam"]


class SamState(NamedTuple):
    """The state of `sam`.

    Attributes:
      steps_since_sync: int32 scalar, adversarial steps since the last outer step.
      opt_state: the outer optimizer's state.
      adv_state: the adversary's state.
      cache: tree like params, the outer optimizer's parameters; None in opaque mode.
    """

    steps_since_sync: jax.Array
    opt_state: Any
    adv_state: Any
    cache: Any


def normalize(*, axis_name: AxisName = None) -> optax.GradientTransformationExtraArgs:
    r"""The gradient divided by the norm of the whole tree: $g \leftarrow g / \lVert g \rVert$, 0 for no gradient.

    Args:
      axis_name: mesh axes along which the gradients are sharded inside `jax.shard_map` or `jax.pmap`; see
        `jaxsgd.transforms.clip.norm_across`. Default: None.

    Returns:
      A transformation without state. The norm is in at least float32; updates keep their dtypes. Leaves that are not
      floating pass unchanged.
    """

    def update(updates: Any, state: Any, params: Any = None, **extra_args: Any) -> tuple[Any, Any]:
        del params, extra_args
        norm = norm_across(updates, axis_name)
        norm = jnp.where(norm == 0, 1, norm)
        return map_inexact(lambda g: _divide(g, norm), updates), state

    return optax.GradientTransformationExtraArgs(lambda params: optax.EmptyState(), update)


@jax.jit
def _divide(g: jax.Array, norm: jax.Array) -> jax.Array:
    return (wide(g) / norm.astype(wide(g).dtype)).astype(g.dtype)


def sam(
    optimizer: optax.GradientTransformation,
    adv_optimizer: optax.GradientTransformation,
    sync_period: int = 2,
    reset_state: bool = True,
    opaque_mode: bool = False,
    batch_axis_name: str | None = None,
) -> optax.GradientTransformationExtraArgs:
    r"""SAM (Foret et al. 2020, arXiv:2010.01412): $x \leftarrow x - \eta\, \nabla f(x + \rho\, g / \lVert g \rVert)$.

    Sharpness-aware minimization by two optimizers: ``sam(sgd(0.01), optax.chain(normalize(), sgd(0.1)))`` is the
    paper's, with $\rho = 0.1$. The adversary's steps go uphill. By default the caller sees them. Of ``sync_period``
    calls of ``update``, all but the last move the params to the point of the next gradient. The last one moves them
    back and takes the outer optimizer's step. Only one of the two optimizers runs in each call.

    Args:
      optimizer: the outer optimizer; its params are those before the adversary's steps.
      adv_optimizer: the adversary, an optimizer that descends.
      sync_period: calls from one outer step to the next; 1 leaves the adversary out. Default: 2.
      reset_state: reset the adversary's state after each outer step. Default: True.
      opaque_mode: take all steps in each call of ``update``, for models with other state than params (batch
        statistics), which must not see the adversary's params. The call needs ``grad_fn(params, i)``, the gradient at
        the i-th adversarial point: ``tx.update(grads, state, params, grad_fn=grad_fn)``. Default: False.
      batch_axis_name: with ``opaque_mode`` in `jax.pmap`, the axis along which to average those gradients.
        Default: None.

    Returns:
      A transformation with a `SamState`. Other extra arguments go to both optimizers. Updates have the dtypes of
      ``params``; those of integers are zeros.

    Raises:
      ValueError: ``sync_period`` below 1; in the update, ``params`` missing, ``grad_fn`` missing in opaque mode, or a
        state that was made for parameters of other shapes.
    """
    if not sync_period >= 1:
        raise ValueError(f"sync_period={sync_period}: at least 1 is needed, the outer step itself")
    check_optimizer(optimizer)
    check_optimizer(adv_optimizer)
    outer, adversary = optax.with_extra_args_support(optimizer), optax.with_extra_args_support(adv_optimizer)

    def init(params: Any) -> SamState:
        check_params(params)
        # A copy, or params and state could not both be donated.
        cache = None if opaque_mode else jax.tree.map(lambda p: jnp.array(p, copy=True), params)
        return SamState(jnp.zeros((), jnp.int32), outer.init(params), adversary.init(params), cache)

    def uphill(updates: Any, adv_state: Any, params: Any, extra: dict[str, Any]) -> tuple[Any, Any]:
        updates, adv_state = adversary.update(updates, adv_state, params, **extra)
        return keep_types(map_inexact(jnp.negative, updates), update_types(outer, params), "sam"), adv_state

    def one_of_both(updates: Any, state: Any, params: Any, extra: dict[str, Any]) -> tuple[Any, SamState]:
        check_like(params, state.cache, "sam")
        first, last = state.steps_since_sync == 0, state.steps_since_sync >= sync_period - 1
        cache = jax.tree.map(partial(select, first), params, state.cache)

        def step() -> tuple[Any, Any, Any]:
            steps, opt_state = outer.update(updates, state.opt_state, cache, **extra)
            back = jax.tree.map(lambda c, p, u: _back(c, p, u) if is_inexact(p) else u, cache, params, steps)
            adv_state = adversary.init(params) if reset_state else state.adv_state
            old = (update_types(outer, params), state.opt_state, state.adv_state)
            return keep_types((back, opt_state, adv_state), old, "sam")

        def climb() -> tuple[Any, Any, Any]:
            steps, adv_state = uphill(updates, state.adv_state, params, extra)
            return steps, state.opt_state, keep_types(adv_state, state.adv_state, "sam")

        # Selected, not weighted by 0 and 1: 0 times inf is NaN.
        out, opt_state, adv_state = (
            jax.lax.cond(last, step, climb) if isinstance(last, Tracer) else (step if last else climb)()
        )
        count = jnp.where(last, 0, state.steps_since_sync + 1)
        return out, SamState(count, opt_state, adv_state, cache)

    def all_at_once(updates: Any, state: Any, params: Any, grad_fn: Any, extra: dict[str, Any]) -> tuple[Any, SamState]:
        if grad_fn is None:
            raise ValueError(
                "grad_fn: sam with opaque_mode=True needs it: tx.update(grads, state, params, grad_fn=...)"
            )
        adv_state, point = state.adv_state, params
        for i in range(sync_period - 1):
            steps, adv_state = uphill(updates, adv_state, point, extra)
            point = optax.apply_updates(point, steps)
            updates = grad_fn(point, i)
            if batch_axis_name is not None:
                updates = map_inexact(lambda g: jax.lax.pmean(g, batch_axis_name), updates)
        updates, opt_state = outer.update(updates, state.opt_state, params, **extra)
        if reset_state:
            adv_state = adversary.init(params)
        old = (update_types(outer, params), state.opt_state, state.adv_state)
        updates, opt_state, adv_state = keep_types((updates, opt_state, adv_state), old, "sam")
        return updates, SamState(jnp.zeros((), jnp.int32), opt_state, adv_state, None)

    def update(
        updates: Any, state: Any, params: Any = None, *, grad_fn: Any = None, **extra_args: Any
    ) -> tuple[Any, SamState]:
        if params is None:
            raise ValueError("params: sam needs them: tx.update(grads, state, params)")
        same_structure(params, updates)
        if opaque_mode:
            return all_at_once(updates, state, params, grad_fn, extra_args)
        return one_of_both(updates, state, params, extra_args)

    return optax.GradientTransformationExtraArgs(init, update)


@jax.jit
def _back(cached: jax.Array, p: Any, u: Any) -> jax.Array:
    """The step from ``p`` to the outer optimizer's new parameter."""
    return wide(cached) - wide(p) + wide(u, wide(p).dtype)
