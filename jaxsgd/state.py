"""The state of a lifted rule: what it is, how to read it, how to set it.

Everything here finds `State` wherever it is: inside `optax.chain`, `optax.partition`,
`optax.MultiSteps`, a Flax `TrainState`, so no caller needs to know how a transformation was built.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.core import Tracer

from jaxsgd.paths import compiled, find_nodes, nearest

__all__ = ["State", "find_states", "metrics", "plain", "unpinned", "with_hyper"]

PIN = "pin of "  # keys of their own, so that optax.tree.get(state, "learning_rate") finds one value
FOLLOW = -1.0  # no hyperparameter is negative, and unlike NaN it leaves jax_debug_nans usable


class State(NamedTuple):
    """The state of a rule.

    Attributes:
      count: int32 scalar, completed steps.
      hyper: hyperparameters as applied in the last step (before the first: as they will be), scalars
        in float32, or float64 where a parameter is.
      slots: ``{"mu": tree like params, ...}``; a slot of a frozen leaf is None.
      shared: scalars that belong to the tree as a whole.
      pins: ``{"pin of <name>": scalar}`` for each hyperparameter that follows a schedule, negative until `with_hyper`
        pins the value.
      roles: the slots that `jaxsgd.eval_params` reads, ``{"average <slot>": None}``; structure alone, without leaves.
    """

    count: jax.Array
    hyper: dict[str, jax.Array]
    slots: dict[str, Any]
    shared: dict[str, jax.Array]
    pins: dict[str, jax.Array] = {}
    roles: dict[str, None] = {}

    def follows(self, name: str) -> bool:
        """Whether the hyperparameter follows a schedule, unless it is pinned."""
        return PIN + name in self.pins

    def applied(self, name: str, value: Any) -> Any:
        """``value`` of a hyperparameter, or what `with_hyper` pinned it to."""
        pin = self.pins.get(PIN + name)
        return value if pin is None else jnp.where(pin >= 0, pin, value)


def unpinned(hyper: Mapping[str, Any], dtype: Any) -> dict[str, jax.Array]:
    """The pins before the first step of hyperparameters, of which some may be schedules."""
    return {PIN + name: jnp.full((), FOLLOW, dtype) for name, value in hyper.items() if callable(value)}


def _is_state(node: Any) -> bool:
    return isinstance(node, State)


def plain(tree: Any) -> Any:
    """``tree`` with the array in place of each variable of Flax NNX, as in ``nnx.Optimizer.opt_state``."""
    variable = getattr(sys.modules.get("flax.nnx"), "Variable", None)
    if variable is None:
        return tree
    is_variable = lambda node: isinstance(node, variable)  # noqa: E731
    return jax.tree.map(lambda x: x.get_value() if is_variable(x) else x, tree, is_leaf=is_variable)


def find_states(tree: Any) -> list[tuple[str, State]]:
    """Every `State` in ``tree`` with its path, with arrays in place of NNX variables."""
    return [(path, plain(node)) for path, node in find_nodes(tree, State)]


def metrics(state: Any) -> dict[str, jax.Array]:
    """Values to log, as device scalars: ``step``, the hyperparameters applied, and the norms.

    ``step`` counts completed steps. ``gradient_norm`` and ``update_norm`` are there when the rule was
    called with ``norms=True`` (`jaxsgd.make_step` reports them in any case). Where ``state`` holds
    several rules, each name is prefixed with the path of its rule.

    Raises:
      ValueError: ``state`` holds no jaxsgd state.
    """
    found = find_states(state)
    if not found:
        raise ValueError(f"state: no jaxsgd state in {jax.tree.structure(state)}")
    out = {}
    for path, node in found:
        prefix = f"{path}/" if len(found) > 1 else ""
        out |= {prefix + k: v for k, v in {"step": node.count, **node.hyper, **node.shared}.items()}
    return out


def _like(held: Any, value: Any) -> Any:
    """``value`` in place of an array, with its dtype and on its devices; the variable of an NNX optimizer stays one."""

    def put(old: Any) -> Any:
        new = jnp.asarray(value, old.dtype)
        if isinstance(old, Tracer) or isinstance(new, Tracer) or not isinstance(old, jax.Array):
            return new
        # An array that is not bound to its device stays so: jit compiles for the two apart.
        return jax.device_put(new, old.sharding) if old.committed and new.shape == old.shape else new

    return jax.tree.map(put, held)


def with_hyper(state: Any, *, at: str | None = None, **values: Any) -> Any:
    """A copy of ``state`` with hyperparameters set: ``with_hyper(state, learning_rate=3e-4)``.

    The values are runtime data: setting them under a jitted step compiles nothing. One that follows a
    schedule is pinned to the value until ``with_hyper(state, learning_rate=None)`` lets it follow
    again.

    Args:
      state: any tree that holds a `State`.
      at: where ``state`` holds several rules, a regular expression that finds the path of those meant.
      **values: names and values; scalars, or arrays to `jax.vmap` over.

    Raises:
      TypeError: a value is text.
      ValueError: no rule in ``state`` has the hyperparameter as a runtime value, or several have it and
        ``at`` does not say which; a value below 0 or NaN; None for one that follows no schedule.
    """
    search = compiled("at", at or "").search
    found = [(p, s) for p, s in find_nodes(state, State) if search(p)]
    for name, value in values.items():
        if isinstance(value, int | float) and not value >= 0:
            raise ValueError(f"{name}={value}: a hyperparameter must be 0 or more")
        if isinstance(value, str | bytes):
            raise TypeError(f"{name}={value!r}: a number, an array or None is needed")
        holders = [path for path, node in found if name in node.hyper]
        if not holders:
            known = {k for _, node in found for k in node.hyper}
            hint = f"{nearest(name, known)} (name it in dynamic=({name!r},) when calling the rule)"
            raise ValueError(f"{name}: not a runtime value of this state{hint if known else ', which has none'}")
        if len(holders) > 1 and at is None:
            raise ValueError(f"{name}: several rules have it, say which with at=: {holders}")
    chosen = {id(node) for _, node in found}

    def set_values(node: Any) -> Any:
        if not _is_state(node) or id(node) not in chosen:
            return node
        hyper, pins = dict(node.hyper), dict(node.pins)
        for name, value in values.items():
            if name not in hyper:
                continue
            if value is None and not node.follows(name):
                raise ValueError(f"{name}=None: it follows no schedule; give it a value")
            if value is not None:
                hyper[name] = _like(hyper[name], value)
            if node.follows(name):
                pins[PIN + name] = _like(pins[PIN + name], FOLLOW if value is None else value)
        return node._replace(hyper=hyper, pins=pins)

    return jax.tree.map(set_values, state, is_leaf=_is_state)
