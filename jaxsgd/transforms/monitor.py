"""Measurements of each parameter, in a state of fixed structure.

Floor 4.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from jaxsgd.paths import named_leaves
from jaxsgd.transforms.clip import AxisName, norm_across
from jaxsgd.transforms.guard import find

__all__ = ["MonitorState", "monitor", "monitor_report"]


class MonitorState(NamedTuple):
    """What `monitor` remembers.

    Attributes:
      inner: the wrapped transformation's state.
      gradient_norms: ``{name of the leaf: float32 scalar}``, of the gradients that came in.
      update_ratios: ``{name of the leaf: float32 scalar}``, the norm of the update over that of the parameter.
    """

    inner: Any
    gradient_norms: dict[str, jax.Array]
    update_ratios: dict[str, jax.Array]


def monitor(tx: optax.GradientTransformation, *, axis_name: AxisName = None) -> optax.GradientTransformationExtraArgs:
    """Measure each parameter's gradient norm and update-to-weight ratio: ``monitor(adamw(3e-4))``.

    Nothing else changes. The ratio says how far a step moves a weight relative to its size; about 1e-3 is
    a common rule of thumb. It is 0 where the parameter itself is 0. All are zeros before the first step.

    Args:
      tx: what to measure; the whole optimizer, so that the update is the one applied.
      axis_name: mesh axes along which leaves are sharded inside `jax.shard_map`, see `norm_across`.

    Returns:
      A transformation with a `MonitorState`, read by `monitor_report`. Leaves that are not floating are left out.

    Raises:
      ValueError: two leaves have the same name; in the update, ``params`` missing.
    """
    inner = optax.with_extra_args_support(tx)

    def init(params: Any) -> MonitorState:
        leaves = named_leaves(params, "params")
        measured = [n for n, p in leaves.items() if jnp.issubdtype(jnp.result_type(p), jnp.inexact)]
        norms, ratios = ({name: jnp.zeros((), jnp.float32) for name in measured} for _ in range(2))
        return MonitorState(inner.init(params), norms, ratios)

    def update(updates: Any, state: Any, params: Any = None, **extra_args: Any) -> tuple[Any, MonitorState]:
        if params is None:
            raise ValueError("params: monitor needs them: tx.update(grads, state, params)")
        grads, ps = named_leaves(updates, "updates"), named_leaves(params, "params")
        updates, advanced = inner.update(updates, state.inner, params, **extra_args)
        steps = named_leaves(updates, "updates")

        def norm(leaf: Any) -> jax.Array:
            return norm_across(leaf, axis_name).astype(jnp.float32)

        norms, ratios = {}, {}
        for name in state.gradient_norms:
            norms[name], size = norm(grads[name]), norm(ps[name])
            ratios[name] = jnp.where(size > 0, norm(steps[name]) / jnp.where(size > 0, size, 1), 0)
        return updates, MonitorState(advanced, norms, ratios)

    return optax.GradientTransformationExtraArgs(init, update)


def monitor_report(state: Any) -> dict[str, jax.Array]:
    """What to log of the last step, as device scalars: ``{"gradient_norm/<leaf>": ..., "update_ratio/<leaf>": ...}``.

    Args:
      state: an optimizer state; a `MonitorState` is found inside chains, partitions and wrappers.

    Raises:
      ValueError: ``state`` holds no monitor.
    """
    out = {}
    for _, node in find(state, MonitorState):
        out |= {f"gradient_norm/{name}": value for name, value in node.gradient_norms.items()}
        out |= {f"update_ratio/{name}": value for name, value in node.update_ratios.items()}
    return out
