"""From a rule on one array to a gradient transformation on a tree, written once.

The only file that knows of trees, dtypes, schedules, groups, storage and runtime hyperparameters all at once.
"""

from __future__ import annotations

import contextvars
import functools
import zlib
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple, Self

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.core import Tracer

from jaxsgd.applying import apart, applies, tell
from jaxsgd.draws import layer_key, step_key
from jaxsgd.hyper import first_values, is_array, is_constant, is_off, scheduled
from jaxsgd.leaf import Equation, Settings, ShapeError, step_leaf, stepped, sum_leaf
from jaxsgd.numerics import complex_with_real, global_norm, is_float0, real_dtype, wide, widest
from jaxsgd.paths import (
    Groups,
    check_params,
    in_containers_of,
    is_function,
    leaf_names,
    resolve_groups,
    same_structure,
)
from jaxsgd.rounding import LOST, rounds
from jaxsgd.slots import Slot, by_name, parameter_names
from jaxsgd.stacking import is_small, kinds_of, mesh_of, side_by_side, stacks, together
from jaxsgd.state import State, unpinned
from jaxsgd.storage import Storage, first_packed, first_zeros, needs_key, plain

__all__ = ["Bound", "Lift", "Transformation", "lifts_in", "shown", "watched"]


class Bound(optax.GradientTransformationExtraArgs):
    """A gradient transformation whose two functions are methods of one object.

    It is a pair of functions and no more. What takes a tuple apart can put it together again: JAX's tree functions,
    Equinox's filters, cloudpickle.

    Attributes:
      lift: that object; None in place of a part that a filter took out.
    """

    @classmethod
    def of(cls, lift: Any) -> Self:
        """The transformation by the methods ``init`` and ``update`` of ``lift``."""
        return cls(lift.init, lift.update)

    @property
    def lift(self) -> Any:
        return getattr(self.init, "__self__", None)

    # It never changes, so that a copy is itself, as of any tuple.
    def __copy__(self) -> Bound:
        return self

    def __deepcopy__(self, memo: Any) -> Bound:
        return self


class Transformation(Bound):
    """A gradient transformation that knows its rule.

    Attributes:
      lift: the rule with its hyperparameters bound.
      rule: the rule.
    """

    @property
    def rule(self) -> Any:
        return self.lift.rule

    def __repr__(self) -> str:
        return super().__repr__() if self.lift is None else repr(self.lift)


@dataclass(frozen=True, eq=False)
class _Group:
    """Leaves with the same overrides.

    Attributes:
      settings: all that is static of them; None where they are frozen.
      given: overrides that come at each step: name -> schedule or array.
      constant: the names of the others.
    """

    settings: Settings | None
    given: Mapping[str, Any] = field(default_factory=dict)
    constant: frozenset[str] = frozenset()

    def overrides(self, name: str) -> bool:
        """Whether a value of the call counts nothing here."""
        return name in self.constant


class _Part(NamedTuple):
    """One leaf in one update."""

    name: str
    settings: Settings | None
    g: Any
    p: Any
    rested: dict[str, Any]
    hyper: dict[str, Any]
    own: dict[str, Any]
    lost: Any
    keys: dict[Any, Any]

    @property
    def arrays(self) -> tuple[Any, ...]:
        """All that a leaf has of its own."""
        return self.g, self.p, self.rested, self.lost, self.own

    @property
    def packs(self) -> bool:
        """Whether one of its slots has a storage other than plain."""
        assert self.settings is not None
        return any(storage is not plain and self.rested.get(n) is not None for n, storage in self.settings.storage)

    def refused(self, error: ShapeError) -> ValueError:
        slot, found, wanted = error.args
        return ValueError(
            f"state: {slot} of {self.name!r} has the shape {found}; a parameter of the shape {jnp.shape(self.g)} needs "
            f"{wanted}. Use tx.init(params), or jaxsgd.migrate(state, tx, params)"
        )


@dataclass(eq=False)
class Lift:
    """A rule with its hyperparameters bound: ``init`` and ``update`` on trees.

    Attributes:
      rule: the rule.
      hyper: every hyperparameter by name, with ``learning_rate`` and ``weight_decay``: numbers, schedules of the
        0-based step, or arrays.
      mask: where weight decay applies: a tree of booleans (or a prefix), or a function of the params.
      groups: see `jaxsgd.paths.Groups`; keys are hyperparameters, ``lr_mult``, ``frozen``, ``storage``.
      storage: slot name -> how it is stored.
      dynamic: further hyperparameters to keep in the state.
      norms: keep the norms of gradients and updates in the state.
      rounding: how 16-bit parameters take steps: one of `jaxsgd.rounding.ROUNDINGS`.
      routes: overrides by name and shape: a function of the params, overrides of each leaf.
      shown: what the call said other than the defaults, for ``repr``.
      decay_is_off: the call has no weight decay by default.
    """

    rule: Equation
    hyper: Mapping[str, Any]
    mask: Any = None
    groups: Groups = ()
    storage: Mapping[str, Storage] = field(default_factory=dict)
    dynamic: tuple[str, ...] = ()
    norms: bool = False
    rounding: str | None = None
    routes: Callable[[Any], list[dict[str, Any]]] | None = None
    shown: Mapping[str, Any] = field(default_factory=dict)
    decay_is_off: bool = True

    def __post_init__(self) -> None:
        in_state = {name for name, h in self.rule.hypers.items() if h.in_state}
        live = {"learning_rate", *self.dynamic, *in_state}
        decay = self.hyper["weight_decay"]
        # An array is stored where a call without it stores a number: the state is then the same under
        # optax.inject_hyperparams, which makes arrays of all numbers.
        if not is_off(decay) and not (is_array(decay) and self.decay_is_off):
            live.add("weight_decay")
        live |= {name for name, value in self.hyper.items() if callable(value) and not self._static(name)}
        self.runtime = {name: value for name, value in self.hyper.items() if name in live}
        self.arrays = {name: v for name, v in self.hyper.items() if name not in live and is_array(v)}
        self.constants = {n: v for n, v in self.hyper.items() if n not in live and n not in self.arrays}
        self.decays = not is_off(decay) or any(not is_off(own.get("weight_decay")) for _, own in self.groups)
        # A runtime value that happens to be 0 now is not off.
        known = {name: self.constants.get(name, True) for name in self.hyper}
        variants = [{**known, **own} for own in ({}, *(own for _, own in self.groups))]
        self.slots = tuple(name for name, s in self.rule.slots.items() if not all(s.off(own) for own in variants))
        self._remembered: tuple[Any, list[_Group]] = (None, [])
        self._jitted = jax.jit(self._update, inline=True)  # makes the eager update one dispatch

    def _static(self, name: str) -> bool:
        return name in self.rule.hypers and self.rule.hypers[name].static

    def __repr__(self) -> str:
        return f"{self.rule.name}({', '.join(f'{name}={shown(value)}' for name, value in self.shown.items())})"

    @property
    def transformation(self) -> Transformation:
        return Transformation.of(self)

    # -- what holds for each leaf ------------------------------------------------------------

    def overrides(self, params: Any) -> list[dict[str, Any]]:
        """Per-leaf overrides: by the mask, then by its route, then by its groups."""
        leaves = jax.tree.leaves(params)
        plain_call = self.mask is None and self.routes is None and not self.groups
        if plain_call:
            return [{}] * len(leaves)
        groups = resolve_groups(self.groups, leaf_names(params), leaves)
        routes = [{}] * len(leaves) if self.routes is None else self.routes(params)
        decays = self._masked(params)
        own = zip(decays, routes, groups, strict=True)
        return [({} if decay else {"weight_decay": 0.0}) | route | group for decay, route, group in own]

    def _masked(self, params: Any) -> list[bool]:
        mask: Any = True if self.mask is None else self.mask(params) if is_function(self.mask) else self.mask
        try:
            decays = jax.tree.leaves(jax.tree.broadcast(mask, params))
        except ValueError as error:
            raise ValueError(f"mask: it is no tree like the params, nor a prefix of one: {error}") from None
        for name, decay in zip(leaf_names(params), decays, strict=True):
            if isinstance(decay, Tracer) or np.shape(decay) != () or np.asarray(decay).dtype != bool:
                raise TypeError(f"mask: {decay!r} at {name!r}. Use True or False, known while tracing")
        return [bool(decay) for decay in decays]

    def storages(self, params: Any) -> list[Mapping[str, Storage]]:
        """Slot -> storage of each leaf; a frozen leaf has none."""
        return [{} if group.settings is None else group.settings.storages for group in self._own(params)]

    def _own(self, params: Any) -> list[_Group]:
        """The group of each leaf; remembered, for patterns are slow."""
        leaves, treedef = jax.tree.flatten(params)
        key = treedef, tuple((jnp.shape(x), jnp.result_type(x)) for x in leaves)
        if self._remembered[0] != key:
            made: dict[Any, _Group] = {}
            groups = []
            for own in self.overrides(params):
                name = tuple((n, v if _is_hashable(v) else id(v)) for n, v in own.items() if n != "storage")
                name = name, id(own.get("storage"))
                if name not in made:
                    made[name] = self._group(own)
                groups.append(made[name])
            self._remembered = key, groups
        return self._remembered[1]

    def _group(self, own: Mapping[str, Any]) -> _Group:
        if own.get("frozen"):
            return _Group(None)
        storage = own.get("storage", self.storage)
        own = {name: value for name, value in own.items() if name not in ("storage", "frozen")}
        given = {name: value for name, value in own.items() if self._comes(name, value)}
        constant = {name: value for name, value in own.items() if name not in given}
        values = {n: v for n, v in {**self.constants, **constant}.items() if n not in given}
        settings = Settings(self.rule, tuple(values.items()), tuple(storage.items()), self.slots, self.rounding)
        try:
            hash(settings)
        except TypeError as error:
            raise TypeError(f"{self.rule.name}: each setting must be hashable: {error}") from None
        return _Group(settings, given, frozenset(constant))

    def _comes(self, name: str, value: Any) -> bool:
        # A rate is a value of each step as that of the call is, so that leaves that differ in it alone share a trace.
        varies = callable(value) or is_array(value) or name == "learning_rate"
        return varies and not self._static(name)

    def _initial(self, dtype: Any) -> dict[str, Any]:
        """The hyperparameters as the first step will see them. Runtime ones are arrays, so that one that
        happens to be 0 now does not look switched off for good."""
        arrays = {name: jnp.asarray(value, dtype) if _real(value) else value for name, value in self.arrays.items()}
        return {**self.constants, **arrays, **first_values(self.runtime, dtype)}

    # -- init --------------------------------------------------------------------------------

    def init(self, params: Any) -> State:
        """The state before the first step; its slots are sharded like ``params``. Shapes in place of params will do."""
        check_params(params)
        leaves, treedef = jax.tree.flatten(params)
        leaves = [jnp.zeros_like(x) if isinstance(x, jax.ShapeDtypeStruct) else x for x in leaves]
        own = self._own(params)
        self._check_dtypes(params, leaves, own)
        dtype = widest(jnp.result_type(x) for x in leaves)
        count = jnp.zeros((), jnp.int32)
        initial = self._initial(dtype)
        hyper = {}
        for name in self.runtime:
            hyper[name] = initial[name]
            if hyper[name].shape != ():
                raise ValueError(f"{name}: a scalar is needed; got the shape {hyper[name].shape}")
        shared = {name: jnp.asarray(by_name(begin, initial), dtype) for name, begin in self.rule.kept.items()}
        if self.norms:
            shared |= {"gradient_norm": jnp.zeros((), dtype), "update_norm": jnp.zeros((), dtype)}
        keys = functools.cache(lambda: self._keys(count))  # eagerly, a key takes longer than the zeros of a tree
        slots = {
            slot: treedef.unflatten(
                None if o.settings is None else self._first(slot, wide(p), o, initial, keys)
                for p, o in zip(leaves, own, strict=True)
            )
            for slot in self.slots
        }
        if self.rounding == "compensated":
            careful = [o.settings is not None and rounds(p, self.rounding) for p, o in zip(leaves, own, strict=True)]
            slots[LOST] = treedef.unflatten(
                jnp.zeros_like(p) if c else None for p, c in zip(leaves, careful, strict=True)
            )
        roles = {f"{s.role} {name}": None for name, s in self.rule.slots.items() if s.role and name in slots}
        state = State(count, hyper, slots, shared, unpinned(self.runtime, dtype), roles)
        if (seen := _seen.get()) is not None:
            seen.append((self, jax.tree.map(lambda x: jax.ShapeDtypeStruct(jnp.shape(x), jnp.result_type(x)), params)))
        return state

    def _check_dtypes(self, params: Any, leaves: list[Any], own: list[_Group]) -> None:
        for i, (leaf, o) in enumerate(zip(leaves, own, strict=True)):
            if o.settings is not None and self.rounding == "stochastic" and jnp.result_type(leaf) == jnp.float16:
                raise ValueError(
                    f"rounding='stochastic': {leaf_names(params)[i] or 'params'} is float16, which it does not round. "
                    "Use bfloat16 parameters, or rounding='compensated'"
                )
            if o.settings is not None and not jnp.issubdtype(jnp.result_type(leaf), jnp.inexact):
                name = leaf_names(params)[i]
                raise ValueError(
                    f"params: {name!r} is {jnp.result_type(leaf).name}; parameters are floating or complex "
                    f'(or frozen: groups=[("{name}", {{"frozen": True}})])'
                )

    def _first(
        self,
        slot: str,
        p: jax.Array,
        own: _Group,
        initial: Mapping[str, Any],
        keys: Callable[[], Mapping[Any, jax.Array]],
    ) -> Any:
        assert own.settings is not None
        dtype = real_dtype(p.dtype)
        given = {name: jnp.asarray(scheduled(value, np.int32(0)), dtype) for name, value in own.given.items()}
        runtime = (
            {n: v.astype(dtype) if _real(v) else v for n, v in initial.items()} if dtype != jnp.float32 else initial
        )
        hyper = {**runtime, **own.settings.known, **given}
        storage, begin = own.settings.storages.get(slot, plain), self.rule.slots[slot]
        if storage is not plain and begin.zero and not begin.off(hyper):
            packed = first_zeros(storage, _like(begin, p.shape, p.dtype), p)
            if packed is not None:
                return packed
        value = begin.first(p, hyper)
        return value if value is None or storage is plain else first_packed(storage, value, keys().get(slot))

    def _keys(self, count: jax.Array) -> dict[Any, jax.Array]:
        """A key of this step for each slot whose storage draws, and for rounding; the same on every replica.

        One key serves all leaves: with a key each their programs would differ. XLA for CPU compiles equal ones once.
        """
        stores = [self.storage, *(own.get("storage", {}) for _, own in self.groups)]
        drawing = {slot for store in stores for slot, storage in store.items() if needs_key(storage)}
        names = [slot for slot in self.slots if slot in drawing] + [LOST] * (self.rounding == "stochastic")
        if not names:
            return {}
        return {name: step_key(count, j) for j, name in enumerate(names)}

    # -- update ------------------------------------------------------------------------------

    def update(self, updates: Any, state: Any, params: Any = None, **extra_args: Any) -> tuple[Any, State]:
        """One step: ``(updates, new state)``; updates are in the dtype of ``params`` (or of the gradients).

        Raises:
          ValueError: ``params`` missing where weight decay or the rule needs them; another structure or shape than
            ``params``; a state of another optimizer or of other parameters; an extra argument that the rule needs is
            missing.
        """
        self._check_state(state)
        if params is not None:
            same_structure(params, updates)
        elif "p" in self.rule.context or self.rule.trees is not None or self.rounding is not None:
            raise ValueError(f"params: {self.rule.name} needs them: tx.update(grads, state, params)")
        elif self.decays or self.routes and any(not is_off(own.get("weight_decay")) for own in self.overrides(updates)):
            raise ValueError(
                f"params: weight_decay={self.hyper['weight_decay']} needs them: tx.update(grads, state, params)"
            )
        # The gradient of an integer is no argument of a compiled function.
        updates = jax.tree.map(lambda g: np.zeros(g.shape, bool) if is_float0(g) else g, updates)
        extra = {name: extra_args[name] for name in self.rule.extra if name in extra_args}
        traced = any(isinstance(x, Tracer) for x in jax.tree.leaves((updates, state, params)))
        as_it_is = traced or any(callable(value) for value in extra.values())  # a function is no argument of jit
        # Schedules see the count as it is: outside jit they may be plain Python.
        given = self._given(self._own(updates if params is None else params), state)
        with complex_with_real(updates):
            if as_it_is:
                return self._update(updates, state, params, extra, given)
            with apart():
                return self._jitted(updates, state, params, extra, given)

    def _check_state(self, state: Any) -> None:
        if not isinstance(state, State):
            raise TypeError(f"state: {self.rule.name} needs its own State; got {type(state).__name__}")
        slots = (*self.slots, LOST) if self.rounding == "compensated" else self.slots
        for part, wanted, found in (("slots", slots, state.slots), ("hyper", self.runtime, state.hyper)):
            if set(wanted) != set(found):
                raise ValueError(
                    f"state: made by another optimizer: {self.rule.name} keeps {part} {sorted(wanted)}, "
                    f"the state has {sorted(found)}"
                )

    def _given(self, own: list[_Group], state: State) -> Any:
        """What schedules and arrays say now: by name, and for each group of leaves."""
        dtype = next(iter(state.hyper.values())).dtype

        def now(value: Any) -> Any:
            value = scheduled(value, state.count)
            return jnp.asarray(value, dtype) if _real(value) or is_constant(value) else jnp.asarray(value)

        changing = {n: v for n, v in self.runtime.items() if callable(v) or is_array(v)}
        everywhere = {name: now(value) for name, value in (changing | self.arrays).items()}
        return everywhere, [{name: now(value) for name, value in group.given.items()} for group in dict.fromkeys(own)]

    def _hyper(self, state: State, given: Mapping[str, Any]) -> dict[str, jax.Array]:
        """The runtime hyperparameters of this step: constants from the state, the others as given."""
        return {name: state.applied(name, given.get(name, state.hyper[name])) for name in self.runtime}

    def _update(
        self, updates: Any, state: State, params: Any, extra: Mapping[str, Any], given: Any
    ) -> tuple[Any, State]:
        treedef, count = jax.tree.structure(updates), jnp.asarray(optax.safe_increment(state.count))
        everywhere, by_group = given
        now = self._hyper(state, everywhere)
        scalar = now["learning_rate"].dtype
        outside = {**extra, **everywhere, **now, "t": count.astype(scalar)}
        rested = {slot: treedef.flatten_up_to(held) for slot, held in state.slots.items()}
        parts = self._parts(updates, rested, params, outside, by_group, count)
        moving = [part for part in parts if part.settings is not None]
        shared = self._shared(moving, state, outside, scalar)
        out, slots = [], {name: [] for name in state.slots}
        for update, kept in self._all_stepped(parts, {**state.shared, **shared}):
            out.append(update)
            for name, held in slots.items():
                held.append(kept.get(name))
        kept = {name: jnp.asarray(shared[name], state.shared[name].dtype) for name in self.rule.kept}
        if self.norms:
            norms = {"gradient_norm": global_norm([part.g for part in parts]), "update_norm": global_norm(out)}
            kept |= {name: norm.astype(scalar) for name, norm in norms.items()}
        trees = {name: treedef.unflatten(map(_as_it_came, rested[name], held)) for name, held in slots.items()}
        return treedef.unflatten(out), State(count, now, trees, kept, state.pins, state.roles)

    def _parts(
        self, updates: Any, slots: Any, params: Any, outside: Mapping[str, Any], by_group: Any, count: jax.Array
    ) -> list[_Part]:
        """Every leaf with what its step needs."""
        grads = jax.tree.leaves(updates)
        ps = [None] * len(grads) if params is None else jax.tree.leaves(params)
        own = self._own(updates if params is None else params)
        names = leaf_names(updates)
        trees = self._trees(outside, updates, params)
        scalars = {name: value for name, value in outside.items() if not callable(value)}
        hyper = {
            id(group): {name: x for name, x in {**scalars, **values}.items() if not group.overrides(name)}
            for group, values in zip(dict.fromkeys(own), by_group, strict=True)
        }
        beside = side_by_side(hyper, outside["t"], [g for g in grads if is_small(g)])
        rested = {slot: held for slot, held in slots.items() if slot != LOST}
        lost = slots.get(LOST)
        keys = self._keys(count)
        moving = {id(group): group.settings for group in own if group.settings is not None}
        draws = {name: settings.drawn(keys) for name, settings in moving.items()}
        parts = []
        for i, (g, p, group) in enumerate(zip(grads, ps, own, strict=True)):
            alone = {name: made[i] for name, made in trees.items()}
            if "leaf_key" in self.rule.context:
                alone["leaf_key"] = self._leaf_key(count, names[i], outside)
            parts.append(
                _Part(
                    names[i],
                    group.settings,
                    g,
                    p,
                    {
                        slot: self._in_its_form(slot, held[i], g if p is None else p, group)
                        for slot, held in rested.items()
                    },
                    (beside if is_small(g) else hyper)[id(group)],
                    alone,
                    None if lost is None else lost[i],
                    draws.get(id(group), {}),
                )
            )
        return parts

    def _in_its_form(self, slot: str, held: Any, p: Any, own: _Group) -> Any:
        """A stored slot in the containers that its storage makes, where something made mappings of them."""
        if not isinstance(held, Mapping):
            return held

        def begin(p: Any) -> Any:
            keys = functools.partial(self._keys, jnp.zeros((), jnp.int32))
            return self._first(slot, wide(p), own, self._initial(real_dtype(p.dtype)), keys)

        return in_containers_of(jax.eval_shape(begin, p), held)

    def _all_stepped(self, parts: list[_Part], shared: Mapping[str, Any]) -> list[tuple[Any, dict[str, Any]]]:
        """The update of each leaf and its new slots; leaves that go together take one step."""
        out: list[Any] = [None] * len(parts)
        for indices in self._together(parts):
            for i, done in zip(indices, self._stepped([parts[i] for i in indices], shared), strict=True):
                out[i] = done
        return out

    def _together(self, parts: list[_Part]) -> list[list[int]]:
        """The leaves of each step."""
        if not self.rule.stacked:
            return [[i] for i in range(len(parts))]
        keys = [part.settings and (part.settings, id(part.hyper), *kinds_of(part.arrays)) for part in parts]
        # An array of more axes is a stack itself, which the rule spreads over the mesh that it is given.
        spread = [part.settings is not None and mesh_of(part.settings.known) is not None for part in parts]
        alone = [far and jnp.ndim(part.g) > 2 for far, part in zip(spread, parts, strict=True)]
        return stacks([None if a else key for a, key in zip(alone, keys, strict=True)], [part.g for part in parts])

    def _stepped(self, parts: list[_Part], shared: Mapping[str, Any]) -> list[tuple[Any, dict[str, Any]]]:
        """The updates of leaves that take one step, and their new slots."""
        first = parts[0]
        if first.settings is None:
            return [(jnp.zeros_like(part.g if part.p is None else part.p), part.rested) for part in parts]
        hyper = side_by_side({**first.hyper, **shared}, first.hyper["t"], [part.g for part in parts])
        self._check_given(self.rule.context, {*hyper, *first.own, *self.constants, *first.settings.known, "p"})

        whole = len(parts) == 1 and first.p is not None and first.packs and not self.norms
        applied = whole and applies(first.rested)

        settings = first.settings
        one = step_leaf if len(parts) == 1 else stepped  # a stack's step is divided, which a compiled one is not

        def step(g: Any, p: Any, rested: Any, lost: Any, own: Any) -> Any:
            return one(settings, applied, g, p, rested, {**hyper, **own}, lost, first.keys)

        try:
            done = together(step, [part.arrays for part in parts], mesh_of(first.settings.known))
        except ShapeError as error:
            raise first.refused(error) from None
        if whole:
            out, slots, lost = done[0]
            tell(first.rested, first.p, *(out if applied else (out,)))
            done = [(out.p if applied else out, slots, lost)]
        return [
            (update, slots if part.lost is None else {**slots, LOST: lost})
            for part, (update, slots, lost) in zip(parts, done, strict=True)
        ]

    def _shared(self, moving: list[_Part], state: State, outside: Mapping[str, Any], scalar: Any) -> dict[str, Any]:
        """Map, reduce, map: sums over the tree, then scalars made of them, once a step."""
        if not moving:  # nothing to sum: an empty tree, or all of it frozen
            return {name: state.shared[name] for name in self.rule.kept}
        totals: dict[str, Any] = {}
        if self.rule.sums is not None:
            for part in moving:
                assert part.settings is not None
                try:
                    terms = sum_leaf(
                        part.settings, part.g, part.p, part.rested, {**part.hyper, **part.own, **state.shared}
                    )
                except ShapeError as error:
                    raise part.refused(error) from None
                for name, value in terms.items():
                    totals[name] = totals.get(name, jnp.zeros((), scalar)) + value.astype(scalar)
        if self.rule.shared is None:
            return totals
        available = {**self.constants, **outside, **totals, **state.shared}
        self._check_given(parameter_names(self.rule.shared), available)
        made = by_name(self.rule.shared, available)
        for name in made:
            if name in self.rule.hypers:
                raise TypeError(f"rule {self.rule.name}: shared returns {name!r}, which is a hyperparameter")
        return totals | made

    def _trees(self, outside: Mapping[str, Any], updates: Any, params: Any) -> dict[str, list[Any]]:
        """What the rule makes of the tree as a whole for each leaf, such as a diagonal of the Hessian."""
        if self.rule.trees is None or not jax.tree.leaves(params):
            return {}
        available = {**self.constants, **outside, "params": params, "updates": updates}
        self._check_given(parameter_names(self.rule.trees), available)
        made = by_name(self.rule.trees, available)
        return {name: [wide(x) for x in jax.tree.structure(params).flatten_up_to(tree)] for name, tree in made.items()}

    def _check_given(self, names: Iterable[str], available: Iterable[str]) -> None:
        for name in names:
            if name not in available:
                raise ValueError(f"{name}: {self.rule.name} needs it: tx.update(grads, state, params, {name}=...)")

    def _leaf_key(self, count: jax.Array, name: str, outside: Mapping[str, Any]) -> jax.Array:
        """A key of this step and leaf, the same on every replica, for a rule that asks for it. It goes by the
        leaf's name, which a partition of the tree leaves as it is."""
        seed = self.constants["key"] if "key" in self.constants else outside["key"]
        step_key = jax.random.fold_in(jax.random.key(seed), count)
        return layer_key(jax.random.fold_in(step_key, zlib.crc32(name.encode())))


# -- which lifts a transformation holds -------------------------------------------------------------

_Seen = list[tuple["Lift", Any]]
_seen: contextvars.ContextVar[_Seen | None] = contextvars.ContextVar("seen", default=None)


def watched(tx: optax.GradientTransformation, params: Any) -> tuple[_Seen, Any]:
    """Every lift inside a transformation with the shapes it is given, and the shapes of the state.

    ``tx.init`` runs on shapes, and each lift in it reports itself: in chains, partitions and wrappers alike.
    """
    seen: _Seen = []
    token = _seen.set(seen)
    try:
        state = jax.eval_shape(lambda params: tx.init(params), params)  # a new function: JAX keeps traces by function
    finally:
        _seen.reset(token)
    return seen, state


def lifts_in(tx: optax.GradientTransformation, params: Any) -> list[Lift]:
    """The rules of jaxsgd inside any transformation, with their hyperparameters bound, in the order of their state."""
    return list(dict.fromkeys(lift for lift, _ in watched(tx, params)[0]))


@functools.cache
def _like(slot: Slot, shape: tuple[int, ...], dtype: Any) -> jax.ShapeDtypeStruct:
    """The shape and dtype of a slot that starts at zero, of a parameter of these."""
    return jax.eval_shape(slot.begin, jax.ShapeDtypeStruct(shape, dtype))


def _as_it_came(old: Any, new: Any) -> Any:
    """A new slot in the containers that the old one came in."""
    return in_containers_of(old, new) if isinstance(old, Mapping) else new


def _real(value: Any) -> bool:
    return is_array(value) and jnp.issubdtype(value.dtype, jnp.floating)


def _is_hashable(value: Any) -> bool:
    try:
        hash(value)
    except TypeError:
        return False
    return True


def shown(value: Any) -> str:
    """A setting in a line: numbers in six digits, functions by their name."""
    if is_constant(value):
        return f"{value:g}"
    if is_array(value):
        return f"array{value.shape}"
    return repr(value) if isinstance(value, str) or not hasattr(value, "__name__") else value.__name__
