"""Measurements of each parameter, in a state of fixed structure."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from optax import monitor as optax_monitor

from jaxsgd.paths import check_optimizer, named_leaves, same_structure
from jaxsgd.transforms.clip import AxisName, norm_across
from jaxsgd.transforms.trees import REMEDY, find, is_inexact

__all__ = ["LeafMonitorState", "monitor", "monitor_report"]


class LeafMonitorState(NamedTuple):
    """The state of `monitor` around a transformation.

    Attributes:
      inner: the wrapped transformation's state.
      gradient_norms: ``{name of the leaf: float32 scalar}``, of the gradients that came in.
      update_ratios: ``{name of the leaf: float32 scalar}``, the norm of the update over that of the parameter.
    """

    inner: Any
    gradient_norms: dict[str, jax.Array]
    update_ratios: dict[str, jax.Array]


def monitor(
    tx: optax.GradientTransformation | Mapping[str, Any], *, axis_name: AxisName = None
) -> optax.GradientTransformationExtraArgs:
    """Measure each parameter's gradient norm and update-to-weight ratio: ``monitor(adamw(3e-4))``.

    Nothing else changes. The ratio is the size of a step relative to the weight's; a common rule of thumb is 1e-3. It
    is 0 where the parameter itself is 0. Before the first step all values are 0. `monitor_report` reads them.

    ``monitor({"norm": optax.tree.norm})`` is optax's ``monitor``: a part of a chain, with optax's state.

    Args:
      tx: the whole optimizer, so that the measured update is the applied one; or optax's dict of measurements.
      axis_name: mesh axes along which leaves are sharded inside `jax.shard_map`, see `norm_across`. Default: None.

    Returns:
      A transformation with a `LeafMonitorState`. Leaves that are not floating are left out.

    Raises:
      TypeError: ``tx`` is neither a transformation nor a dict.
      ValueError: two leaves have the same name; in the update, ``params`` missing, or a state that was made for other
        parameters.
    """
    if isinstance(tx, Mapping):
        if axis_name is not None:
            raise ValueError(f"axis_name={axis_name!r}: the measurements of a dict do not take it. Use it inside them")
        return optax_monitor(dict(tx))
    check_optimizer(tx)
    inner = optax.with_extra_args_support(tx)

    def init(params: Any) -> LeafMonitorState:
        floats = [name for name, p in named_leaves(params, "params").items() if is_inexact(p)]
        norms, ratios = ({name: jnp.zeros((), jnp.float32) for name in floats} for _ in range(2))
        return LeafMonitorState(inner.init(params), norms, ratios)

    def update(updates: Any, state: Any, params: Any = None, **extra_args: Any) -> tuple[Any, LeafMonitorState]:
        if params is None:
            raise ValueError("params: monitor needs them: tx.update(grads, state, params)")
        same_structure(params, updates)
        floats = {name: i for i, (name, p) in enumerate(named_leaves(params, "params").items()) if is_inexact(p)}
        if floats.keys() != state.gradient_norms.keys():
            odd = min(floats.keys() ^ state.gradient_norms.keys())
            raise ValueError(f"monitor: {odd!r} is only in one of the state and the parameters. {REMEDY}")
        grads, ps = jax.tree.leaves(updates), jax.tree.leaves(params)
        updates, advanced = inner.update(updates, state.inner, params, **extra_args)
        steps = jax.tree.leaves(updates)
        norms, ratios = {}, {}
        for name, i in floats.items():
            norms[name], ratios[name] = _measure(grads[i], ps[i], steps[i], axis_name)
        return updates, LeafMonitorState(advanced, norms, ratios)

    return optax.GradientTransformationExtraArgs(init, update)


@partial(jax.jit, static_argnums=3)
def _measure(g: Any, p: Any, u: Any, axis_name: AxisName) -> tuple[jax.Array, jax.Array]:
    norm, size, step = (norm_across(x, axis_name).astype(jnp.float32) for x in (g, p, u))
    return norm, jnp.where(size > 0, step / jnp.where(size > 0, size, 1), 0)


def monitor_report(state: Any) -> dict[str, jax.Array]:
    """The last step's values, as device scalars: ``{"gradient_norm/<leaf>": ..., "update_ratio/<leaf>": ...}``.

    Args:
      state: an optimizer state; a `LeafMonitorState` is found inside chains, partitions, wrappers and `nnx.Optimizer`.

    Raises:
      ValueError: ``state`` holds no monitor.
    """
    out = {}
    for _, node in find(state, LeafMonitorState):
        out |= {f"gradient_norm/{name}": value for name, value in node.gradient_norms.items()}
        out |= {f"update_ratio/{name}": value for name, value in node.update_ratios.items()}
    return out
