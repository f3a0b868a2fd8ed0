"""From a rule on one array to a gradient transformation on a tree, written once.

Floor 2. The only file that knows of trees, dtypes, schedules, groups, storage and runtime
hyperparameters all at once.
"""

from __future__ import annotations

import functools
import zlib
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, TypeGuard

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.core import Tracer

from jaxsgd.numerics import compensated, global_norm, real_dtype, stochastic_round, wide, widest
from jaxsgd.paths import Groups, Text, aligned, leaf_names, resolve_groups, same_structure
from jaxsgd.spec import Spec, by_name, is_off, parameter_names
from jaxsgd.state import FOLLOW, PIN, State
from jaxsgd.storage import Blocks, Storage, plain

__all__ = ["ROUNDINGS", "Lift", "describe", "is_constant"]

ROUNDINGS = (None, "stochastic", "compensated")
LOST = "rounded_off"
"""The slot for what rounding took from 16-bit parameters so far."""


def is_constant(value: Any) -> TypeGuard[float]:
    """Whether ``value`` is a plain number, in contrast to a schedule, an array or a tracer."""
    return isinstance(value, int | float | np.number) and not isinstance(value, bool)


def _is_scheduled(value: Any) -> bool:
    """Whether ``value`` is given anew at each step: by a schedule, or by whoever passes an array."""
    return callable(value) or isinstance(value, jax.Array | np.ndarray)


def _narrow(x: Any, dtype: Any) -> Any:
    """A scalar in the real dtype of the leaf it meets; everything else as it is."""
    return x.astype(dtype) if isinstance(x, jax.Array) and x.ndim == 0 and jnp.isdtype(x.dtype, "numeric") else x


@dataclass(eq=False)
class Lift:
    """A rule with its hyperparameters bound: ``init`` and ``update`` on trees.

    Attributes:
      spec: the rule.
      hyper: every hyperparameter by name, with ``learning_rate`` and ``weight_decay``: numbers,
        schedules of the 0-based step, or arrays.
      mask: where weight decay applies: a tree of booleans (or a prefix), or a function of the params.
      groups: see `jaxsgd.paths.Groups`; keys are hyperparameters, ``lr_mult``, ``frozen``, ``storage``.
      storage: slot name -> how it rests.
      dynamic: further hyperparameters to keep in the state.
      norms: keep the norms of gradients and updates in the state.
      rounding: how 16-bit parameters take steps: one of `ROUNDINGS`.
      routes: what a leaf has by its name and shape: a function of the params, overrides of each leaf.
    """

    spec: Spec
    hyper: Mapping[str, Any]
    mask: Any = None
    groups: Groups = ()
    storage: Mapping[str, Storage] = field(default_factory=dict)
    dynamic: tuple[str, ...] = ()
    norms: bool = False
    routes: Callable[[Any], list[dict[str, Any]]] | None = None
    rounding: str | None = None

    def __post_init__(self) -> None:
        live = {"learning_rate", *self.dynamic, *self.spec.runtime}
        if not is_off(self.hyper["weight_decay"]):
            live.add("weight_decay")
        live |= {name for name, value in self.hyper.items() if _is_scheduled(value)}
        self.runtime = {name: self.hyper[name] for name in self.hyper if name in live}
        self.decays = "weight_decay" in live or any(
            not is_off(overrides.get("weight_decay")) for _, overrides in self.groups
        )
        variants = [{}, *(own for _, own in self.groups)]
        self.slots = tuple(slot for slot in self.spec.slots if any(self._starts(slot, own) for own in variants))
        self._jitted = jax.jit(self._update, inline=True)  # makes the eager update one dispatch

    @property
    def transformation(self) -> optax.GradientTransformationExtraArgs:
        return optax.GradientTransformationExtraArgs(self.init, self.update)

    # -- what holds for each leaf ------------------------------------------------------------

    def overrides(self, params: Any) -> list[dict[str, Any]]:
        """What each leaf has other than the call says: by the mask, then by its route, then by its groups."""
        leaves = jax.tree.leaves(params)
        groups = resolve_groups(self.groups, leaf_names(params), leaves)
        routes = [{}] * len(leaves) if self.routes is None else self.routes(params)
        mask: Any = True if self.mask is None else self.mask(params) if callable(self.mask) else self.mask
        decays = jax.tree.leaves(jax.tree.broadcast(mask, params))
        own = zip(decays, routes, groups, strict=True)
        return [({} if decay else {"weight_decay": 0.0}) | route | group for decay, route, group in own]

    def _storage(self, slot: str, own: Mapping[str, Any]) -> Storage:
        return own.get("storage", self.storage).get(slot, plain)

    def _start(self, slot: str, p: jax.Array, own: Mapping[str, Any], key: Any) -> Any:
        hyper = {**self._initial(real_dtype(p.dtype)), **own}
        value = self.spec.begin(slot, {"p": p, **hyper})
        return None if value is None else self._pack(slot, value, own, key)

    def _rounds(self, p: Any) -> bool:
        """Whether the steps of ``p`` are rounded with care: to 16 bits, and somebody asked."""
        narrow = jnp.bfloat16 if self.rounding == "stochastic" else jnp.floating
        return self.rounding is not None and jnp.issubdtype(p.dtype, narrow) and p.dtype.itemsize == 2

    def _starts(self, slot: str, own: Mapping[str, Any]) -> bool:
        """Whether any leaf may have the slot: some rules keep one for matrices only, some for all others."""
        leaves = (jnp.zeros(shape, jnp.float32) for shape in ((), (2, 2)))
        return any(self._start(slot, leaf, own, None) is not None for leaf in leaves)

    def _initial(self, dtype: Any) -> dict[str, Any]:
        """The hyperparameters as the first step will see them. Runtime ones are arrays, so that one that
        happens to be 0 now does not look switched off for good."""
        start = jnp.zeros((), jnp.int32)
        first = {n: jnp.asarray(v(start) if callable(v) else v, dtype) for n, v in self.runtime.items()}
        return {**self.hyper, **first}

    def _pack(self, slot: str, value: Any, own: Mapping[str, Any], key: Any) -> Any:
        return jax.tree.map(lambda x: self._storage(slot, own).pack(x, key), value)

    def _unpack(self, slot: str, value: Any, own: Mapping[str, Any]) -> Any:
        return jax.tree.map(self._storage(slot, own).unpack, value, is_leaf=lambda x: isinstance(x, Blocks))

    # -- init --------------------------------------------------------------------------------

    def init(self, params: Any) -> State:
        """The state before the first step; its slots lie where ``params`` lie. Shapes in place of params will do."""
        leaves, treedef = jax.tree.flatten(params)
        leaves = [jnp.zeros_like(x) if isinstance(x, jax.ShapeDtypeStruct) else x for x in leaves]
        overrides = self.overrides(params)
        for name, leaf, own in zip(leaf_names(params), leaves, overrides, strict=True):
            if not own.get("frozen") and not jnp.issubdtype(jnp.result_type(leaf), jnp.inexact):
                raise ValueError(
                    f"params: {name!r} is {jnp.result_type(leaf).name}; parameters are floating or complex "
                    f'(or frozen: groups=[("{name}", {{"frozen": True}})])'
                )
        dtype = widest(jnp.result_type(x) for x in leaves)
        count = jnp.zeros((), jnp.int32)
        initial = self._initial(dtype)
        hyper = {}
        for name, value in self.runtime.items():
            hyper[name] = initial[name]
            if hyper[name].shape != ():
                raise ValueError(f"{name}: a scalar is needed; got the shape {hyper[name].shape}")
            if not is_constant(value):
                hyper[PIN + name] = jnp.full((), FOLLOW, dtype)
        shared = {name: jnp.asarray(self.spec.begin(name, initial), dtype) for name in self.spec.kept}
        if self.norms:
            shared |= {"gradient_norm": jnp.zeros((), dtype), "update_norm": jnp.zeros((), dtype)}
        keys = self._keys(count, len(leaves))
        slots = {
            slot: treedef.unflatten(
                None if own.get("frozen") else self._start(slot, wide(p), own, keys(i, j))
                for i, (p, own) in enumerate(zip(leaves, overrides, strict=True))
            )
            for j, slot in enumerate(self.slots)
        }
        if self.rounding == "compensated":
            zeros_like = lambda p, own: jnp.zeros_like(p) if self._rounds(p) and not own.get("frozen") else None  # noqa: E731
            slots[LOST] = treedef.unflatten(zeros_like(p, own) for p, own in zip(leaves, overrides, strict=True))
        return State(count, hyper, slots, shared)

    def _keys(self, count: jax.Array, leaves: int) -> Callable[[int, int], Any]:
        """A key for each leaf and slot in this step, the same on every replica."""
        stores = [self.storage, *(own.get("storage", {}) for _, own in self.groups)]
        stored = any(storage.needs_key for store in stores for storage in store.values())
        if not stored and self.rounding != "stochastic":
            return lambda leaf, slot: None
        key = jax.random.fold_in(jax.random.key(0), count)
        return lambda leaf, slot: jax.random.fold_in(key, slot * leaves + leaf)

    def _rounded(self, p: Any, delta: jax.Array, lost: Any, key: Any) -> tuple[jax.Array, Any]:
        """``delta`` as the difference of two values of the parameter's dtype, and what that leaves out."""
        if self.rounding == "compensated":
            return compensated(p, delta, lost)
        bits = jax.random.bits(key, p.shape, jnp.uint16)
        return wide(stochastic_round(wide(p) + delta, p.dtype, bits)) - wide(p), None

    # -- update ------------------------------------------------------------------------------

    def update(self, updates: Any, state: Any, params: Any = None, **extra_args: Any) -> tuple[Any, State]:
        """One step: ``(updates, new state)``; updates are in the dtype of ``params`` (or of the gradients).

        Raises:
          ValueError: ``params`` missing where weight decay or the rule needs them; another structure or
            shape than ``params``; an extra argument that the rule needs is missing.
        """
        if not isinstance(state, State):
            raise TypeError(f"state: {self.spec.name} needs its own State; got {type(state).__name__}")
        slots = (*self.slots, LOST) if self.rounding == "compensated" else self.slots
        for part, wanted, found in (("slots", slots, state.slots), ("hyper", self.runtime, state.hyper)):
            if set(wanted) != {name for name in found if not name.startswith(PIN)}:
                raise ValueError(
                    f"state: made by another optimizer: {self.spec.name} keeps {part} {sorted(wanted)}, "
                    f"the state has {sorted(found)}"
                )
        if params is not None:
            same_structure(params, updates)
        elif "p" in self.spec.context or self.spec.trees is not None or self.rounding is not None:
            raise ValueError(f"params: {self.spec.name} needs them: tx.update(grads, state, params)")
        elif self.decays or self.routes and any(not is_off(own.get("weight_decay")) for own in self.overrides(updates)):
            raise ValueError(
                f"params: weight_decay={self.hyper['weight_decay']} needs them: tx.update(grads, state, params)"
            )
        extra = {name: extra_args[name] for name in self.spec.extra if name in extra_args}
        traced = any(isinstance(x, Tracer) for x in jax.tree.leaves((updates, state)))
        as_it_is = traced or any(callable(value) for value in extra.values())  # a function is no argument of jit
        return (self._update if as_it_is else self._jitted)(updates, state, params, extra)

    def _hyper(self, state: State) -> dict[str, jax.Array]:
        """The runtime hyperparameters of this step: constants from the state, the others made anew."""
        now = {}
        for name, value in self.runtime.items():
            held = state.hyper[name]
            if not is_constant(value):
                pin = state.hyper[PIN + name]
                given = jnp.asarray(value(state.count) if callable(value) else value, held.dtype)
                held = jnp.where(pin >= 0, pin, given)
            now[name] = held
        return now

    def _update(self, updates: Any, state: State, params: Any, extra: Mapping[str, Any]) -> tuple[Any, State]:
        grads, treedef = jax.tree.flatten(updates)
        ps = [None] * len(grads) if params is None else jax.tree.leaves(params)
        overrides = self.overrides(updates if params is None else params)
        names = leaf_names(updates)
        count = jnp.asarray(optax.safe_increment(state.count))
        now = self._hyper(state)
        keys = self._keys(count, len(grads))
        rested = [treedef.flatten_up_to(state.slots[slot]) for slot in self.slots]

        @functools.cache  # the same scalars serve every leaf of one dtype
        def narrowed(dtype: Any) -> dict[str, Any]:
            return {n: _narrow(now.get(n, v), dtype) for n, v in self.hyper.items()} | {"t": count.astype(dtype)}

        calls = {
            i: self._arguments(g, p, [r[i] for r in rested], own, narrowed, count) | self._leaf_key(count, names[i])
            for i, (g, p, own) in enumerate(zip(grads, ps, overrides, strict=True))
            if not own.get("frozen")
        }

        scalar = next(iter(state.hyper.values())).dtype
        for name, made in self._trees({**extra, **now}, updates, params, count, scalar).items():
            for i, call in calls.items():
                call[name] = wide(made[i], call["dtype"])
        shared = self._shared({**extra, **now}, calls, state, count, scalar)
        new_slots = [[None] * len(grads) for _ in self.slots]
        lost = treedef.flatten_up_to(state.slots[LOST]) if LOST in state.slots else [None] * len(grads)
        out: list[Any] = [g if p is None else p for g, p in zip(grads, ps, strict=True)]
        out = [x if i in calls else jnp.zeros_like(x) for i, x in enumerate(out)]
        for i, call in calls.items():
            delta, slots = self._step(call, {**extra, **shared})
            if self._rounds(out[i]):
                out[i], lost[i] = self._rounded(ps[i], delta, lost[i], keys(i, len(self.slots)))
            else:
                out[i] = delta.astype(out[i].dtype)
            for j, (slot, held) in enumerate(zip(self.slots, (r[i] for r in rested), strict=True)):
                if held is not None:
                    packed = self._pack(slot, slots[slot], overrides[i], keys(i, j))
                    new_slots[j][i] = jax.tree.map(lambda new, old: new.astype(old.dtype), packed, held)

        kept = {name: jnp.asarray(shared[name], state.shared[name].dtype) for name in self.spec.kept}
        if self.norms:
            norms = {"gradient_norm": global_norm(grads), "update_norm": global_norm(out)}
            kept |= {name: norm.astype(scalar) for name, norm in norms.items()}
        pins = {name: pin for name, pin in state.hyper.items() if name.startswith(PIN)}
        slots = {s: treedef.unflatten(new) for s, new in zip(self.slots, new_slots, strict=True)}
        if LOST in state.slots:
            slots[LOST] = treedef.unflatten(lost)
        return treedef.unflatten(out), State(count, {**now, **pins}, slots, kept)

    def _leaf_key(self, count: jax.Array, name: str) -> dict[str, jax.Array]:
        """A key of this step and leaf, the same on every replica, for a rule that asks for it. It goes by the
        leaf's name, which a partition of the tree leaves as it is."""
        if "leaf_key" not in self.spec.context:
            return {}
        step_key = jax.random.fold_in(jax.random.key(self.hyper["key"]), count)
        return {"leaf_key": jax.random.fold_in(step_key, zlib.crc32(name.encode()))}

    def _arguments(self, g, p, rested, own, now, count) -> dict[str, Any]:
        """Everything that the functions of a rule may ask for at one leaf, by name."""
        slots = {s: self._unpack(s, r, own) for s, r in zip(self.slots, rested, strict=True)}
        # Compute in the dtype that the state is kept in, whatever the gradient's.
        kept = [p] if p is not None else jax.tree.leaves(slots) or [g]
        real = widest(x.dtype for x in kept)
        dtype = jnp.dtype(f"complex{real.itemsize * 16}") if jnp.iscomplexobj(g) else real
        hyper = dict(now(real))
        for name, value in own.items():
            if name in hyper:
                hyper[name] = _narrow(value(count - 1) if callable(value) else value, real)
        if "lr_mult" in own:
            hyper["learning_rate"] = hyper["learning_rate"] * own["lr_mult"]
        return {
            **hyper,
            **{s: None for s in self.spec.slots},
            **slots,
            "g": wide(g, dtype),
            "p": None if p is None else wide(p),
            "dtype": real,
        }

    def _trees(self, outside, updates, params, count, scalar) -> dict[str, list[Any]]:
        """What the rule makes of the tree as a whole for each leaf, such as a diagonal of the Hessian."""
        if self.spec.trees is None or not jax.tree.leaves(params):
            return {}
        hyper = {name: outside.get(name, value) for name, value in self.hyper.items()}
        available = {**hyper, **outside, "params": params, "updates": updates, "t": count.astype(scalar)}
        self._check_given(parameter_names(self.spec.trees), available)
        made = by_name(self.spec.trees, available)
        return {name: jax.tree.structure(params).flatten_up_to(tree) for name, tree in made.items()}

    def _shared(self, outside, calls, state, count, scalar) -> dict[str, jax.Array]:
        """Map, reduce, map: sums over the tree, then scalars made of them, once a step."""
        if not calls:  # nothing to sum: an empty tree, or all of it frozen
            return {name: state.shared[name] for name in self.spec.kept}
        totals: dict[str, Any] = {}
        if self.spec.sums is not None:
            for call in calls.values():
                scalars = {n: _narrow(v, call["dtype"]) for n, v in {**outside, **state.shared}.items()}
                for name, value in by_name(self.spec.sums, {**scalars, **call}).items():
                    totals[name] = totals.get(name, jnp.zeros((), scalar)) + value.astype(scalar)
        if self.spec.shared is None:
            return totals
        hyper = {name: outside.get(name, value) for name, value in self.hyper.items()}
        available = {**hyper, **outside, **totals, **state.shared, "t": count.astype(scalar)}
        self._check_given(parameter_names(self.spec.shared), available)
        return totals | by_name(self.spec.shared, available)

    def _check_given(self, names: Iterable[str], available: Mapping[str, Any]) -> None:
        for name in names:
            if name not in available:
                raise ValueError(f"{name}: {self.spec.name} needs it: tx.update(grads, state, params, {name}=...)")

    def _step(self, call: dict[str, Any], tree_wide: Mapping[str, Any]) -> tuple[Any, dict[str, Any]]:
        """The rule on one leaf: ``(delta, slots by name)``."""
        spec = self.spec
        available = {**{k: _narrow(v, call["dtype"]) for k, v in tree_wide.items()}, **call}
        self._check_given(spec.context, available)
        delta, slots = spec.step(call["g"], [call[s] for s in spec.slots], available)
        return delta, dict(zip(spec.slots, slots, strict=True))


def describe(tx: optax.GradientTransformation, params: Any) -> str:
    """What each parameter gets, as a table: ``print(describe(tx, params))``.

    Columns: the leaf's name, shape and dtype; how its learning rate is multiplied; its weight decay;
    what its groups override; its state in bytes. ``params`` may be shapes (`jax.ShapeDtypeStruct`).

    Raises:
      TypeError: ``tx`` is not made by a jaxsgd rule (describe the parts of a chain one by one).
    """
    lift = getattr(tx.update, "__self__", None)
    if not isinstance(lift, Lift):
        raise TypeError("tx: not made by a jaxsgd rule; describe the parts of a chain one by one")
    state = jax.eval_shape(lift.init, params)
    treedef = jax.tree.structure(params)
    held = [treedef.flatten_up_to(state.slots[slot]) for slot in lift.slots]
    rows = [("parameter", "shape", "dtype", "learning rate", "weight decay", "overrides", "state bytes")]
    total = 0
    leaves = jax.tree.leaves(params)
    for i, (name, p, s) in enumerate(zip(leaf_names(params), leaves, lift.overrides(params), strict=True)):
        size = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves([h[i] for h in held]))
        total += size
        rate = "frozen" if s.get("frozen") else _show({**lift.hyper, **s}["learning_rate"])
        if "lr_mult" in s and not s.get("frozen"):
            rate += f" x {s['lr_mult']:g}"
        decay = "-" if s.get("frozen") else _show({**lift.hyper, **s}["weight_decay"])
        columns = ("learning_rate", "weight_decay", "lr_mult", "frozen")
        overrides = ", ".join(f"{k}={_show(v)}" for k, v in s.items() if k not in columns)
        rows.append((name, str(jnp.shape(p)), jnp.result_type(p).name, rate, decay, overrides, f"{size:,}"))
    rows.append((f"total of {len(leaves)} parameters", "", "", "", "", "", f"{total:,}"))
    return Text(aligned(rows))


def _show(value: Any) -> str:
    return f"{value:g}" if is_constant(value) else getattr(value, "__name__", str(value))
