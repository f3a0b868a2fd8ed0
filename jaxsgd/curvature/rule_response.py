"""A rule's answers to tiny inputs.

The rule is called as it is, with all that is chained around it. The kinds of its slots separate averages of gradients,
which turn with the gradient's sign, from scales, which do not. Other transformations have no kinds, so they are called
with gradients of either sign.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxsgd.forms import forms
from jaxsgd.lift import lifts_in
from jaxsgd.numerics import wide
from jaxsgd.paths import leaf_names, owners
from jaxsgd.registry import Rule
from jaxsgd.state import PIN, State
from jaxsgd.storage import Cast, Plain

__all__ = ["Asked", "rate_in_force", "rule_name", "rules_in"]

ODD, EVEN = ("mean", "iterate"), ("square",)
"""Kinds of slots that turn with the sign of gradients and parameters, and those that do not."""


def rules_in(tx: Any, params: Any) -> list[Rule]:
    """The rules in ``tx``; none if it does not take such ``params``."""
    try:
        return [lift.rule for lift in lifts_in(tx, params) if isinstance(lift.rule, Rule)]
    except Exception:  # whatever a user's transformation says to parameters that are not its own
        return []


def rule_name(tx: Any, params: Any) -> str:
    """The names of the jaxsgd rules in ``tx``; ``"tx"`` if there is none."""
    return " + ".join(dict.fromkeys(rule.name for rule in rules_in(tx, params))) or "tx"


def _is_state(node: Any) -> bool:
    return isinstance(node, State)


class Asked:
    """A rule to be asked: its state taken apart into averages of gradients, which are odd, and the rest."""

    def __init__(self, name: str, tx: Any, params: Any, opt_state: Any, value: Any) -> None:
        self.name, self.tx, self.value = name, tx, value
        self.leaves, self.treedef = jax.tree.flatten(params)
        self.leaves = [jnp.asarray(p) for p in self.leaves]
        self.names = leaf_names(params)
        self.floating = [jnp.issubdtype(p.dtype, jnp.floating) for p in self.leaves]
        slots = {name: form for form in forms(tx, params) for name in form.names}
        for form in slots.values():
            sizes = [x.dtype.itemsize for x in jax.tree.leaves(form.stored)]
            if not isinstance(form.storage, Plain | Cast) or min(sizes, default=4) < 4:
                raise ValueError(
                    f"tx: the slot {form.slot.name!r} of {name} is rounded between steps by {form.storage!r}; a linear "
                    "response needs plain storage. Use the optimizer without storage=, and its state by jaxsgd.migrate"
                )
        self.state_leaves, self.state_def = jax.tree.flatten(self._settled(opt_state, 0))
        self.owner = owners(self.state_def.unflatten(self.state_leaves), params, range(len(self.leaves)))
        self.paths = leaf_names(opt_state)
        dtypes = [wide(p).dtype for p, f in zip(self.leaves, self.floating, strict=True) if f]
        self.tiny = 1e-60 if all(d == jnp.float64 for d in dtypes) else 1e-18
        self._update = jax.jit(self._plain)
        self.odd, self.even = self._parity([slots[n].slot.kind if n in slots else None for n in self.paths])
        for i in self.odd:
            j = self.owner[i]
            if j is None or jnp.shape(self.state_leaves[i]) != jnp.shape(self.leaves[j]):
                raise ValueError(f"tx: {name} has no diagonal preconditioner: {self.paths[i]!r} is like no parameter")
        self.kinds = self._kinds()
        self.scales = [i for i in self.even if self._is_scale(i)]
        if not self.scales:  # the first step may be a special one
            self.state_leaves = jax.tree.leaves(self._settled(opt_state, 1))
        elif not any(np.any(self.state_leaves[i]) for i in self.scales):
            raise ValueError(
                f"opt_state: {name} divides by averages of gradients and has seen none; give it after some steps"
            )

    def _settled(self, state: Any, least: int) -> Any:
        """Wide, with the count that makes the coming step the last one again: its scales are those it applied."""
        paths, treedef = jax.tree_util.tree_flatten_with_path(state)
        out = []
        for path, leaf in paths:
            counts = getattr(path[-1], "name", None) == "count" if path else False
            leaf = jnp.asarray(leaf)
            if counts and jnp.issubdtype(leaf.dtype, jnp.integer):
                leaf = jnp.maximum(leaf - 1, least)
            out.append(wide(leaf) if jnp.issubdtype(leaf.dtype, jnp.floating) else leaf)
        return treedef.unflatten(out)

    def _plain(self, state_leaves: Any, g: Any, p: Any) -> tuple[list[Any], list[Any]]:
        unflatten = self.treedef.unflatten
        state = self.state_def.unflatten(state_leaves)
        delta, after = self.tx.update(unflatten(g), state, unflatten(p), value=self.value)
        return jax.tree.leaves(delta), jax.tree.leaves(after)

    def zeros(self) -> list[Any]:
        return [
            jnp.zeros_like(wide(p)) if f else jnp.zeros_like(p) for p, f in zip(self.leaves, self.floating, strict=True)
        ]

    def random(self, seed: int, scale: float) -> list[Any]:
        """Numbers of both signs, none near zero."""
        out = []
        for i, zero in enumerate(self.zeros()):
            if self.floating[i]:
                draw = np.random.default_rng((seed, i)).uniform(-1, 1, zero.shape)
                zero = jnp.asarray((draw + np.sign(draw)) * scale, zero.dtype)
            out.append(zero)
        return out

    def update(self, state: Sequence[Any], g: Any, p: Any) -> tuple[list[Any], list[Any]]:
        delta, after = self._update(list(state), g, p)
        return [np.asarray(x, np.float64) for x in delta], after

    def _parity(self, kinds: Sequence[str | None]) -> tuple[list[int], list[int]]:
        """The leaves of the state that turn with the sign of gradients and parameters, and those that stay.

        Raises:
          ValueError: a leaf does neither.
        """
        floating = [i for i, x in enumerate(self.state_leaves) if jnp.issubdtype(x.dtype, jnp.floating)]
        scalars = {i for i in floating if self.owner[i] is None and not self.state_leaves[i].ndim}
        odd = {i for i in floating if kinds[i] in ODD}
        even = {i for i in floating if kinds[i] in EVEN or kinds[i] is None and i in scalars}
        unknown = [i for i in floating if i not in odd | even]
        after = [self._after_three(sign) for sign in (1, -1)] if unknown else []
        for i in unknown:
            a, b = (np.asarray(state[i], np.float64) for state in after)
            size = np.abs(a).max(initial=0) * 1e-5
            if np.abs(a - b).max(initial=0) <= size:
                even.add(i)
            elif np.abs(a + b).max(initial=0) <= size:
                odd.add(i)
            elif kinds[i] == "basis" or np.isfinite(a).all():
                raise ValueError(
                    f"tx: {self.name} has no diagonal preconditioner: {self.paths[i]!r} is no average of gradients "
                    "nor of their squares"
                )
        return sorted(odd), sorted(even)

    def _after_three(self, sign: int) -> list[Any]:
        """The state after three steps, by which all averages have begun, on gradients and parameters times ``sign``."""

        def turn(xs: Sequence[Any]) -> list[Any]:
            return [sign * x if f else x for x, f in zip(xs, self.floating, strict=True)]

        p = turn(self.random(2, 0.1))
        state = jax.tree.leaves(self._like_settled(self.tx.init(self.treedef.unflatten(p))))
        for step in range(3):
            state = self._update(state, turn(self.random(3 + step, 0.1)), p)[1]
        return state

    def _like_settled(self, state: Any) -> Any:
        return jax.tree.map(lambda x: wide(x) if jnp.issubdtype(jnp.result_type(x), jnp.floating) else x, state)

    def _kinds(self) -> list[list[int]]:
        """The averages by kind: each holds one leaf of the state for each parameter that has it."""
        kinds: dict[int, list[int]] = {}
        for j in range(len(self.leaves)):
            own = [i for i in self.odd if self.owner[i] == j]
            for rank, i in enumerate(own):
                kinds.setdefault(rank, []).append(i)
        return list(kinds.values())

    # -- what it answers ----------------------------------------------------------------------------

    def base(self) -> list[Any]:
        """The state with its averages of gradients at zero, and scales that will be after a step what they are now."""
        state = [jnp.zeros_like(x) if i in self.odd else x for i, x in enumerate(self.state_leaves)]
        for _ in range(3):
            _, after = self._update(state, self.zeros(), self.zeros())
            for i in self.scales:
                wanted = self.state_leaves[i]
                made = jnp.where(after[i] != 0, after[i], 1)
                state[i] = jnp.where(after[i] != 0, state[i] * (wanted / made), state[i])
        _, after = self._update(state, self.zeros(), self.zeros())
        for i in self.scales:
            if bool(jnp.any((after[i] == 0) & (self.state_leaves[i] != 0))):
                raise ValueError(
                    f"tx: {self.name} has no diagonal preconditioner: {self.paths[i]!r} is made of each gradient alone"
                )
        return state

    def _is_scale(self, i: int) -> bool:
        """Whether a leaf of the state is an average of squares of some parameter."""
        owner = self.owner[i]
        return owner is not None and ("slots" in self.paths[i].split("/") or self.names[owner] != "")

    def at_rate(self, state: Sequence[Any], factor: float) -> list[Any]:
        """The state with every learning rate multiplied, and pinned."""
        tree = self.state_def.unflatten(list(state))

        def scaled(node: Any) -> Any:
            if not isinstance(node, State):
                return node
            rate = jnp.asarray(rate_in_force(node) * factor, node.hyper["learning_rate"].dtype)
            pins = {PIN + "learning_rate": rate} if node.follows("learning_rate") else {}
            return node._replace(hyper={**node.hyper, "learning_rate": rate}, pins=node.pins | pins)

        return jax.tree.leaves(jax.tree.map(scaled, tree, is_leaf=_is_state))

    def flat(self, leaves: Sequence[Any], scale: float = 1.0) -> np.ndarray:
        """One vector of what belongs to floating parameters."""
        parts = [np.asarray(x, np.float64).ravel() / scale for x, f in zip(leaves, self.floating, strict=True) if f]
        return np.concatenate(parts) if parts else np.zeros(0)

    def averages(self, after: Sequence[Any], kind: list[int]) -> list[Any]:
        """The leaves of one kind of average in the parameters' order, zeros where there is none."""
        out = self.zeros()
        for i in kind:
            out[self.owner[i]] = after[i]  # type: ignore[index]
        return out

    def with_averages(self, state: Sequence[Any], kind: list[int], values: Sequence[Any]) -> list[Any]:
        state = list(state)
        for i in kind:
            state[i] = values[self.owner[i]].astype(state[i].dtype)  # type: ignore[index]
        return state

    def outputs(self, state: Sequence[Any], g: Any, p: Any, scale: float = 1.0) -> np.ndarray:
        """The change of the parameters and the new averages, as rows."""
        delta, after = self.update(state, g, p)
        return np.stack([self.flat(delta, scale), *(self.flat(self.averages(after, k), scale) for k in self.kinds)])

    def table(self, state: Sequence[Any]) -> np.ndarray:
        """``(outputs, inputs, coordinates)``: every output's answer to the gradient, each average, the parameters."""
        columns = []
        for column in range(len(self.kinds) + 2):
            r = self.random(10 + column, self.tiny)
            g, p, s = self.zeros(), self.zeros(), state
            if column == 0:
                g = r
            elif column == len(self.kinds) + 1:
                p = r
            else:
                s = self.with_averages(state, self.kinds[column - 1], r)
            answer = self.outputs(s, g, p, self.tiny) / self.flat(r, self.tiny)
            columns.append(answer)
        return np.stack(columns, 1)


def rate_in_force(state: State) -> Any:
    """The learning rate in force; one of zero (a warm-up's first) stands for a small one."""
    rate = state.hyper["learning_rate"]
    return jnp.where(rate > 0, rate, 1e-3)
