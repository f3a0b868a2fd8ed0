"""One migration: the leaves that are matched, the form in which each is carried over, and the report."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxsgd.blockwise import Packed, bits_of, decode, encode_like
from jaxsgd.forms import Form
from jaxsgd.migration.names import CLOCKS, HYPER, PINS, SHARED, Item, Leaves, Place, kind, whole
from jaxsgd.migration.report import SECTIONS, Entry, Report, listed
from jaxsgd.numerics import is_key
from jaxsgd.paths import named_leaves
from jaxsgd.rounding import LOST
from jaxsgd.state import PIN, find_states
from jaxsgd.storage import Cast, Plain, Storage, needs_key

__all__ = ["Migration"]

# Compiled as a whole for each shape, in place of some forty operations.
_decode, _encode_like = jax.jit(decode), jax.jit(encode_like)


def _some(names: Iterable[str]) -> str:
    names = list(names)
    return listed(map(repr, names[:4])) + (f" and {len(names) - 4} more" if len(names) > 4 else "")


def _show(x: Any) -> str:
    return f"{np.asarray(x).item():g}" if jnp.shape(x) == () and not is_key(x) else f"an array {jnp.shape(x)}"


class _Unfit(Exception):
    """Why an old value cannot serve as a new one."""


def _carried(old: Item, new: Item, was: Form | None, now: Form | None) -> tuple[Any, str]:
    """The value of ``old`` in the form, dtype and place of ``new``, and how it got there."""
    if was is not None and now is not None and was.slot.kind != now.slot.kind:
        raise _Unfit(f"it was of the kind {was.slot.kind}, now it is {now.slot.kind}")
    other = was is not None and now is not None and was.storage != now.storage
    if not _is_single(new.value, now) and _layout(old.value) == _layout(new.value) and not other:
        return jax.tree.map(_placed, old.value, new.value), ""
    wide, how = _unpacked(old, was)
    if now is not None and now.slot.kind == "square" and _negative(wide):
        raise _Unfit(f"{now.slot.name} is a sum of squares in the new optimizer, and the old value is negative")
    if _is_single(new.value, now):
        return _cast(wide, new.value, how)
    packed = _packed(wide, new.value, now)
    blocks = isinstance(new.value, Packed)
    name = f"at {bits_of(new.value)} bits" if blocks else f"by {type(now and now.storage).__name__}"
    return jax.tree.map(_placed, packed, new.value), f"repacked {name}" if how else f"packed {name}"


def _layout(value: Any) -> Any:
    return jax.tree.structure(value), [(jnp.shape(x), kind(x)) for x in jax.tree.leaves(value)]


def _negative(x: Any) -> bool:
    return jnp.size(x) > 0 and not jnp.iscomplexobj(x) and bool(jnp.min(jnp.asarray(x)) < 0)


def _is_single(value: Any, form: Form | None) -> bool:
    """Whether the value is the array itself, perhaps in another dtype."""
    return _is_array(value) and (form is None or isinstance(form.storage, Plain | Cast))


def _is_array(value: Any) -> bool:
    return jax.tree_util.treedef_is_leaf(jax.tree.structure(value))


def _unpacked(old: Item, form: Form | None) -> tuple[Any, str]:
    if isinstance(old.value, Packed):
        try:
            return _decode(type(old.value)(*old.value)), f"unpacked from {bits_of(old.value)} bits"
        except ValueError as error:
            raise _Unfit(str(error)) from None
    if _is_single(old.value, form):
        return old.value, ""
    if form is None:
        parts = listed(name.rpartition("/")[2] for name in old.names)
        raise _Unfit(f"it is stored in another form ({parts}): give old_tx=, the optimizer that made it")
    value = _unpack(form.storage, jax.tree.map(jnp.asarray, old.value))
    return value, f"unpacked by {type(form.storage).__name__}"


def _packed(wide: Any, like: Any, form: Form | None) -> Any:
    """A wide array in the stored form of ``like``."""
    if isinstance(like, Packed):
        shape, dtype = jax.eval_shape(decode, like).shape, like.scale.dtype
    elif form is None:
        raise _Unfit("the storage of its new form is not known: give tx=, the new optimizer")
    else:
        about = jax.eval_shape(form.storage.unpack, form.stored)
        shape, dtype = about.shape, about.dtype
    if jnp.shape(wide) != shape:
        raise _Unfit(f"the shape was {jnp.shape(wide)}, now it is {shape}")
    if jnp.iscomplexobj(wide) and not jnp.issubdtype(dtype, jnp.complexfloating):
        raise _Unfit(f"it was {kind(wide)}, now it is {dtype}")
    wide = jnp.asarray(wide, dtype)
    if isinstance(like, Packed):
        return _encode_like(like, wide)
    assert form is not None
    packed = _pack(form.storage, wide)
    if jax.tree.map(jnp.shape, packed) != jax.tree.map(jnp.shape, like):
        raise _Unfit(f"{type(form.storage).__name__} packs it in another form than at the start")
    return packed


@functools.partial(jax.jit, static_argnums=0)
def _unpack(storage: Storage, stored: Any) -> Any:
    return storage.unpack(stored)


@functools.partial(jax.jit, static_argnums=0)
def _pack(storage: Storage, x: Any) -> Any:
    return storage.pack(x, jax.random.key(0) if needs_key(storage) else None)


def _cast(old: Any, like: Any, how: str = "") -> tuple[Any, str]:
    """An array or a scalar in the dtype and place of another one of its shape."""
    if jnp.shape(old) != jnp.shape(like):
        raise _Unfit(f"the shape was {jnp.shape(old)}, now it is {jnp.shape(like)}")
    was, now = kind(old), kind(like)
    if was == now:
        return _placed(old, like), how
    number = jnp.issubdtype(was, jnp.inexact) and jnp.issubdtype(now, jnp.inexact)
    count = jnp.issubdtype(was, jnp.integer) and jnp.issubdtype(now, jnp.integer)
    smaller = jnp.issubdtype(was, jnp.complexfloating) and not jnp.issubdtype(now, jnp.complexfloating)
    if smaller or not (number or count):
        raise _Unfit(f"it was {was}, now it is {now}")
    made = _placed(old, like)
    if number and jnp.finfo(now).max < jnp.finfo(was).max and not _finite(made) and _finite(old):
        raise _Unfit(f"its values do not fit into {now}")
    return made, how or (f"cast from {was} to {now}" if jnp.result_type(was) == was else how)


def _finite(x: Any) -> bool:
    return bool(jnp.all(jnp.isfinite(jnp.asarray(x))))


def _placed(x: Any, like: Any) -> jax.Array:
    """A copy of ``x`` with the dtype, sharding and commitment of ``like``."""
    committed = getattr(like, "committed", False)
    if not committed and getattr(x, "committed", False) and not is_key(x):
        x = np.asarray(x)  # a committed copy would bind later steps to one device
    if not is_key(like):
        x = jnp.asarray(x).astype(kind(like))
    return jax.device_put(x, like.sharding, may_alias=False) if committed else jnp.array(x, copy=True)


def _common(a: Sequence[str], b: Sequence[str]) -> list[str]:
    """What two paths begin with alike."""
    return [x for x, y in itertools.takewhile(lambda pair: pair[0] == pair[1], zip(a, b, strict=False))]


@dataclass
class _Slot:
    """One value of a slot: ``old`` is its counterpart, from the container ``source``; ``value`` is that one in the new
    form, of which ``was`` and ``now`` are the forms as far as known."""

    place: Place
    item: Item
    source: str | None
    old: Item | None
    reason: str
    was: Form | None = None
    now: Form | None = None
    value: Any = None

    def adapt(self) -> None:
        if self.old is not None:
            try:
                self.value, how = _carried(self.old, self.item, self.was, self.now)
                self.reason = self.reason or how
            except _Unfit as error:
                self.reason = str(error)


class _Forms:
    """The forms of one optimizer by slot and parameter; of no optimizer none are known."""

    def __init__(self, known: Iterable[Form]) -> None:
        self.known: dict[tuple[str, str], list[Form]] = {}
        for form in known:
            self.known.setdefault((form.slot.name, form.parameter), []).append(form)

    def at(self, container: str, slot: str, parameter: str) -> Form | None:
        """The form in a container, or in the one that its name ends in: a state may stand within another tree."""
        held = self.known.get((slot, parameter), [])
        fits = [f for f in held if f"/{container}".endswith(f"/{f.container}") or not f.container]
        return max(fits, key=lambda form: len(form.container), default=None)

    def iterates(self, container: str) -> set[str]:
        """The slots of a container that start as a copy of the parameters, at any step."""
        held = [form for forms in self.known.values() for form in forms if form.container == container]
        return {form.slot.name for form in held if form.slot.kind == "iterate"}


class Migration:
    """One migration: the matched leaves, and its report. ``out`` are the new leaves by name."""

    def __init__(
        self,
        old: Mapping[str, Any],
        fresh_state: Any,
        params: dict[str, Any],
        count: Any,
        was: Iterable[Form] = (),
        now: Iterable[Form] = (),
    ) -> None:
        self.old, self.new = Leaves(old, params), Leaves(named_leaves(fresh_state, "fresh_state"), params)
        self.was, self.now = _Forms(was), _Forms(now)
        self.params, self.count = params, count
        self.out: dict[str, Any] = dict(self.new.leaves)
        self.used: set[str] = set()
        self.entries: dict[str, list[Entry]] = {name: [] for name in SECTIONS}
        states = {path for path, _ in find_states(fresh_state)}
        clocks = {c for c in self.new.scalars if self.new.own(c) == {"count"}}
        self.rules = states | {c for c in clocks if not states or c not in self.new.kinds}
        self.slots = [slot for key in self.new.slots for slot in self._matched(key)]
        # Container -> those of the old state that its slots come from, and its slots that start again everywhere.
        # What rounding took starts at 0 and a copy of the parameters as they are, at any step.
        self.sources: dict[str, dict[str, None]] = {c: {} for c in self.new.kinds}
        self.anew = {c: sorted(slots - {LOST} - self.now.iterates(c)) for c, slots in self.new.kinds.items()}

    def run(self) -> Report:
        self._check_model()
        for slot in self.slots:
            slot.adapt()
            here, name = slot.place.container, slot.place.slot
            if slot.value is not None:
                self.anew[here] = [other for other in self.anew[here] if other != name]
                self.sources[here] |= {str(slot.source): None}
        for slot in self.slots:
            self._place(slot)
        for container, names in self.new.scalars.items():
            self._scalars(container, names)
        self._leftovers()
        return Report(**{name: tuple(held) for name, held in self.entries.items()})

    def _say(self, section: str, name: str, reason: str, place: Place, size: int = 1) -> None:
        self.entries[section].append(Entry(name, reason, place.slot, place.parameter, size))

    def _check_model(self) -> None:
        old = self.old
        told = any(p.slot in CLOCKS or p.slot.startswith(HYPER) for p in old.places.values())
        others = old.slots or not told or any(jnp.ndim(x) for x in old.leaves.values())
        if others and not any(parameter in self.params for _, parameter in old.slots):
            raise ValueError(
                "old_state: it holds no leaf of any of these parameters; is it another model's? "
                f"The parameters are {_some(self.params)}; the old state has {_some(old.leaves)}"
            )

    # -- slots

    def _matched(self, key: tuple[str, str]) -> Iterable[_Slot]:
        """The values of one slot of one parameter, each with its counterpart."""
        slot, parameter = key
        there, here = self.old.slots.get(key, {}), self.new.slots[key]
        pairs = self._pairs(list(here), list(there))
        elsewhere = any(slot in slots for slots in self.old.kinds.values())
        for container, parts in here.items():
            source, reason = pairs.get(container, (None, ""))
            now = self.now.at(container, slot, parameter)
            was = None if source is None else self.was.at(source, slot, parameter)
            if source is None and not reason:
                reason = f"new, the old state has {'none for it' if elsewhere else 'no such slot'}"
            olds = {} if source is None else there[source]
            for inside, item, old in _paired(parts, olds, now and now.stored, was and was.stored):
                why = reason if old is not None or reason else "new, the old state has no such part"
                yield _Slot(Place(container, slot, parameter, inside), item, source, old, why, was, now)

    def _pairs(self, new: list[str], old: list[str]) -> dict[str, tuple[str | None, str]]:
        """Container in the new state -> the one in the old that holds the same, and the words for the report."""
        out: dict[str, tuple[str | None, str]] = {}
        where = listed(c or "the top" for c in old)
        several = f"there are {len(old)} in the old state (at {where}), {len(new)} in the new"
        if len(new) > 1 or len(old) > 1:
            for slots in [self.new.kinds[c] for c in new]:  # rules with the same slots, in order
                ours = [c for c in new if self.new.kinds[c] == slots]
                theirs = [c for c in old if self.old.kinds[c] == slots]
                if len(ours) == len(theirs):
                    out |= {c: (source, "") for c, source in zip(ours, theirs, strict=True)}
                    new, old = [c for c in new if c not in ours], [c for c in old if c not in theirs]
        if len(new) == len(old) == 1:
            return out | {new[0]: (old[0], "")}
        same = {c: (c, f"by its whole name: {several}") for c in new if c in old}
        unsure = {c: (None, f"uncertain: {several}") for c in new if c not in same and set(old) - set(same)}
        return out | same | unsure

    def _restarts(self, container: str) -> bool:
        return self.count == "auto" and container in self.rules and bool(self.anew.get(container))

    def _place(self, slot: _Slot) -> None:
        """Put the value into the new state, unless its rule is reset."""
        container, old, item = slot.place.container, slot.old, slot.item
        section = "reset"
        self.used |= set(old.names) if old is not None else set()
        if slot.value is not None and self._restarts(container):
            slot.reason = f'its rule is reset with its {listed(self.anew[container])}; count="keep" keeps it'
        elif slot.value is not None:
            section = "kept"
            leaves = jax.tree.leaves(slot.value)
            self.out |= dict(zip(item.names, leaves, strict=True))
        name = item.names[0] if len(item.names) == 1 else item.names[0].rpartition("/")[0]
        self._say(section, name, slot.reason, slot.place, item.size)

    # -- scalars

    def _scalars(self, container: str, names: Mapping[str, str]) -> None:
        rule, has_slots = container in self.rules, container in self.new.kinds
        follows = not self._restarts(container) if rule else not self.anew.get(container)
        sources = list(self.sources[container]) if has_slots else self._twins(container)
        if rule and "count" in names:
            self._count(names["count"], container, sources)
        for field, name in names.items():
            if field.startswith(HYPER):
                self._hyper(name, container, sources, follows)
            elif field.startswith(PINS):
                self._pin(name, container, sources)
            elif not (rule and field == "count"):
                self._scalar(name, sources, follows)

    def _twins(self, container: str) -> list[str]:
        """The container of the old state, one without slots, that is the same kind of thing as this one."""
        fields = self.new.own(container)
        alike = [c for c in self.old.scalars if self.old.own(c) == fields and c not in self.old.kinds]
        if container in alike or len(alike) < 2:
            return [container] if container in alike else alike

        def common(other: str) -> int:
            return len(_common(container.split("/")[::-1], other.split("/")[::-1]))

        best = max(map(common, alike))
        return [c for c in alike if common(c) == best]

    def _scalar(self, name: str, sources: Sequence[str], follows: bool) -> None:
        place, fresh = self.new.places[name], self.new.leaves[name]
        short = place.slot.removeprefix(SHARED)
        held = [self.old.scalars.get(c, {}) for c in sources]
        found = [old[f] for old in held for f in (place.slot, short) if f in old][:1]
        if not found:
            return self._say("changed", name, "new", place)
        self.used |= set(found)
        try:
            if len(sources) > 1 and place.container not in self.new.kinds:
                raise _Unfit(f"uncertain which of {listed(map(repr, sources))} in the old state")
            if not follows:
                raise _Unfit("reset, as the slots beside it are")
            self.out[name], how = _cast(self.old.leaves[found[0]], fresh)
            self._say("kept", name, how, place)
        except _Unfit as error:
            self._say("reset", name, str(error), place)
        return None

    def _nearest(self, names: Iterable[str], sources: Sequence[str]) -> str | None:
        """The scalar of the old state that stands nearest to where the slots come from; of several the largest."""

        def near(name: str) -> tuple[bool, int, float]:
            there = self.old.places[name].container
            shared = [len(_common(there.split("/"), source.split("/"))) for source in sources]
            return there in sources, max(shared, default=0), float(np.max(self.old.leaves[name]))

        return max(names, key=near, default=None)

    def _count(self, name: str, container: str, sources: Sequence[str]) -> None:
        """The completed steps of a rule."""
        old, place, fresh = self.old, self.new.places[name], self.new.leaves[name]
        simple = {c for c in old.scalars if old.own(c) <= {*CLOCKS, "mini_step"} or c in sources}
        clocks = [
            n for n, p in old.places.items() if p.slot in CLOCKS and p.container in simple and p.parameter is None
        ]
        clock = self._nearest(clocks, [container, *sources] if container not in self.new.kinds else sources)
        was = 0 if clock is None else old.leaves[clock]
        same = [n for n in clocks if np.array_equal(old.leaves[n], was)]
        self.used |= set(same)
        if isinstance(self.count, int) or self.count == "reset" or self._restarts(container):
            now = self.count if isinstance(self.count, int) else 0
            self.out[name] = _placed(jnp.full_like(fresh, now), fresh)
            why = "as asked for"
            if self._restarts(container):
                why = f'with its {listed(self.anew[container])}, and so do schedules; count="keep" goes on'
            self._say("changed", name, f"{_show(was)} -> {now}, {why}", place)
        elif clock is None:
            self._say("changed", name, "0, the old state has none; count=<steps> sets it", place)
        else:
            self.out[name], _ = _cast(was, fresh)
            others = {_show(old.leaves[n]) for n in clocks} - {_show(was)}
            unlike = f", where others have {listed(sorted(others))}" if others else ""
            beside = "" if old.places[clock].container in (container, *sources) else f" from {clock}"
            self._say("kept", name, f"{_show(was)}{beside}{unlike}", place)
        late = [s.place for s in self.slots if s.place.container == container and s.value is None]
        if late and not self._restarts(container) and np.any(self.out[name]):
            parameters = _some(dict.fromkeys(str(p.parameter) for p in late))
            whose = f"{listed(dict.fromkeys(p.slot for p in late))} of {parameters}"
            self._say(
                "changed",
                name,
                f"goes on, but {whose} are reset: the first steps there are too long (see migrate)",
                place,
            )

    def _hyper(self, name: str, container: str, sources: Sequence[str], follows: bool) -> None:
        place, fresh = self.new.places[name], self.new.leaves[name]
        found = self._old_scalar(place, container, sources)
        pin = PINS + PIN + place.slot.removeprefix(HYPER)
        scheduled = pin in self.new.scalars[container]
        if found is None:
            if any(p.slot.startswith(HYPER) for p in self.old.places.values()):
                self._say("changed", name, f"{_show(fresh)}, new" + " at step 0" * scheduled, place)
            return
        was = self.old.leaves[found]
        if scheduled:
            if pin not in self.old.scalars[self.old.places[found].container]:
                self._say("changed", name, f"{_show(was)} -> a schedule, as the new optimizer says", place)
            if follows and jnp.shape(was) == jnp.shape(fresh):  # what was applied last, until the next step
                self.out[name], _ = _cast(was, fresh)
        elif not np.array_equal(np.asarray(was, kind(fresh)), np.asarray(fresh)):
            self._say("changed", name, f"{_show(was)} -> {_show(fresh)}, as the new optimizer says", place)

    def _pin(self, name: str, container: str, sources: Sequence[str]) -> None:
        place = self.new.places[name]
        found = self._old_scalar(place, container, sources)
        if found is not None and np.any(np.asarray(was := self.old.leaves[found]) >= 0):
            self._say("changed", name, f"was {_show(was)}; it follows its schedule again", place)

    def _old_scalar(self, place: Place, container: str, sources: Sequence[str]) -> str | None:
        """The name of the old state's scalar for a place of the new one."""
        named = [n for n, p in self.old.places.items() if p.slot == place.slot and p.parameter is None]
        found = self._nearest(named, [container] if container in self.rules and not sources else sources)
        self.used |= set(named) if found is not None else set()
        return found

    # -- the rest

    def _leftovers(self) -> None:
        old, new = self.old, self.new
        for name, place in old.places.items():
            if name in self.used or place.parameter is not None:
                continue
            value = old.leaves[name]
            if place.slot.startswith(HYPER):
                self._say("changed", name, "the new state holds none; the new optimizer's value counts", place)
            elif not place.slot.startswith(PINS):
                size = int(getattr(value, "size", 1))
                self._say("dropped", name, f"{_show(value)}, the new state has no place for it", place, size)
        for (slot, parameter), held in old.slots.items():
            for container, parts in held.items():
                left = {inside: part for inside, part in parts.items() if part[0] not in self.used}
                if not left:
                    continue
                reason = "the new state has no such slot" + " for it" * any(slot == s for s, _ in new.slots)
                reason = "no such parameter" if parameter not in self.params else reason
                reason = "another's was taken, or none was certain" if (slot, parameter) in new.slots else reason
                item = whole(left) or _together(left)
                self._say("dropped", item.names[0], reason, Place(container, slot, parameter), item.size)


def _paired(
    new: Mapping[str, tuple[str, Any]], old: Mapping[str, tuple[str, Any]], now: Any, was: Any
) -> Iterable[tuple[str, Item, Item | None]]:
    """The parts of a value with their counterparts: all as one where that can be, else each by its name.

    Args:
      new, old: inside -> name and leaf.
      now, was: the forms that they may have, or None. Without ``was`` the old value may have the new form.
    """
    one, other = whole(new, now), (whole(old, was) or whole(old, now)) if old else None
    if one is not None or other is not None:
        yield "", one or _together(new), other or (_together(old) if old else None)
        return
    for inside, (name, leaf) in new.items():
        part = old.get(inside)
        yield inside, Item((name,), leaf), None if part is None else Item((part[0],), part[1])


def _together(parts: Mapping[str, tuple[str, Any]]) -> Item:
    """Parts of an unknown form as one value."""
    names, leaves = zip(*parts.values(), strict=True)
    return Item(names, leaves)
