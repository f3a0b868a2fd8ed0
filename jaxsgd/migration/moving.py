"""One migration: what is matched with what, in which form it is carried over, and what is said of it.

Floor 6.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxsgd.lift import LOST
from jaxsgd.migration.names import CLOCKS, HYPER, SHARED, Item, Leaves, Place, kind
from jaxsgd.migration.report import SECTIONS, Entry, Report, listed
from jaxsgd.numerics import is_key
from jaxsgd.paths import named_leaves
from jaxsgd.state import PIN, find_states
from jaxsgd.storage import Blocks, decode, encode_like

__all__ = ["Migration"]

# Compiled as a whole for each shape, in place of some forty operations.
_decode, _encode_like = jax.jit(decode), jax.jit(encode_like)

ALIASES = {"max_rate": "max_lr"}
"""Scalars of rules -> what optax calls them."""


def _some(names: Iterable[str]) -> str:
    names = list(names)
    return listed(map(repr, names[:4])) + (f" and {len(names) - 4} more" if len(names) > 4 else "")


def _show(x: Any) -> str:
    return f"{np.asarray(x).item():g}" if jnp.shape(x) == () and not is_key(x) else f"an array {jnp.shape(x)}"


class _Unfit(Exception):
    """Why an old value cannot serve as a new one."""


def _adapted(old: Any, new: Any) -> tuple[Any, str]:
    """``old`` in the form, dtype and place of ``new``, and what that changed, in words."""
    how = ""
    if isinstance(old, Blocks) or isinstance(new, Blocks):
        forms = [[(jnp.shape(x), kind(x)) for x in blocks] for blocks in (old, new) if isinstance(blocks, Blocks)]
        if len(forms) == 2 and forms[0] == forms[1]:
            return Blocks(*map(_placed, old, new)), how
        try:
            if isinstance(old, Blocks):
                old, how = _decode(Blocks(*old)), "unpacked from 8 bits"
            if isinstance(new, Blocks) and jnp.shape(old) == new.codes.shape and not jnp.iscomplexobj(old):
                packed = _encode_like(new, jnp.asarray(old, new.scale.dtype))
                return Blocks(*map(_placed, packed, new)), "packed anew" if how else "packed at 8 bits"
        except ValueError as error:
            raise _Unfit(str(error)) from None
    like = new.codes if isinstance(new, Blocks) else new
    if jnp.shape(old) != jnp.shape(like):
        raise _Unfit(f"the shape was {jnp.shape(old)}, now it is {jnp.shape(like)}")
    was, now = kind(old), kind(like)
    if was != now:
        number = jnp.issubdtype(was, jnp.inexact) and jnp.issubdtype(now, jnp.inexact)
        whole = jnp.issubdtype(was, jnp.integer) and jnp.issubdtype(now, jnp.integer)
        smaller = jnp.issubdtype(was, jnp.complexfloating) and not jnp.issubdtype(now, jnp.complexfloating)
        if isinstance(new, Blocks) or smaller or not (number or whole):
            raise _Unfit(f"it was {was}, now it is {now}")
        how = how or (f"cast from {was} to {now}" if jnp.result_type(was) == was else how)
    return _placed(old, new), how


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
    """What becomes of one value of a slot: ``old`` is its counterpart, in the container ``source``, and ``value`` what
    that is in the new form."""

    place: Place
    item: Item
    source: str | None
    old: Item | None
    reason: str
    value: Any = None

    def adapt(self) -> None:
        if self.old is not None:
            try:
                self.value, how = _adapted(self.old.value, self.item.value)
                self.reason = self.reason or how
            except _Unfit as error:
                self.reason = str(error)


class Migration:
    """One migration: what is matched with what, and what is said of it. ``out`` are the new leaves by name."""

    def __init__(self, old: Mapping[str, Any], fresh_state: Any, params: dict[str, Any], count: Any) -> None:
        self.old, self.new = Leaves(old, params), Leaves(named_leaves(fresh_state, "fresh_state"), params)
        self.params, self.count = params, count
        self.out: dict[str, Any] = dict(self.new.leaves)
        self.used: set[str] = set()
        self.entries: dict[str, list[Entry]] = {name: [] for name in SECTIONS}
        states = {path for path, _ in find_states(fresh_state)}
        clocks = {c for c in self.new.scalars if self.new.own(c) == {"count"}}
        self.rules = states | {c for c in clocks if not states or c not in self.new.kinds}
        self.slots = [slot for key in self.new.slots for slot in self._matched(key)]
        # Container -> those of the old state that its slots come from, and its slots that begin wholly anew.
        self.sources: dict[str, dict[str, None]] = {c: {} for c in self.new.kinds}
        self.anew = {c: sorted(slots - {LOST}) for c, slots in self.new.kinds.items()}  # LOST does begin at 0

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

    def _say(self, section: str, name: str, reason: str, place: Place, value: Any = 0) -> None:
        value = value.codes if isinstance(value, Blocks) else value
        size = getattr(value, "size", 1)
        self.entries[section].append(Entry(name, reason, place.slot, place.parameter, int(size)))

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
        for container, items in here.items():
            source, reason = pairs.get(container, (None, ""))
            for inside, item in items.items():
                old = None if source is None else there[source].get(inside)
                if old is None and not reason:
                    reason = f"new, the old state has {'none for it' if elsewhere else 'no such slot'}"
                yield _Slot(Place(container, slot, parameter, inside), item, source, old, reason)

    def _pairs(self, new: list[str], old: list[str]) -> dict[str, tuple[str | None, str]]:
        """Container in the new state -> the one in the old that holds the same, and what is to be said of it."""
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
        """The value into the new state, unless its rule starts anew."""
        container, old, item = slot.place.container, slot.old, slot.item
        section = "reset"
        self.used |= set(old.names) if old is not None else set()
        if slot.value is not None and self._restarts(container):
            slot.reason = f'its rule starts anew with its {listed(self.anew[container])}; count="keep" keeps it'
        elif slot.value is not None:
            section = "kept"
            leaves = slot.value if isinstance(slot.value, Blocks) else (slot.value,)
            self.out |= dict(zip(item.names, leaves, strict=True))
        name = item.names[0].removesuffix("/codes") if isinstance(item.value, Blocks) else item.names[0]
        self._say(section, name, slot.reason, slot.place, item.value)

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
        found = [old[f] for old in held for f in (place.slot, short, ALIASES.get(short)) if f in old][:1]
        if not found:
            return self._say("changed", name, "new", place)
        self.used |= set(found)
        try:
            if len(sources) > 1 and place.container not in self.new.kinds:
                raise _Unfit(f"uncertain which of {listed(map(repr, sources))} in the old state")
            if not follows:
                raise _Unfit("starts anew, as the slots beside it do")
            self.out[name], how = _adapted(self.old.leaves[found[0]], fresh)
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
            self.out[name], _ = _adapted(was, fresh)
            others = {_show(old.leaves[n]) for n in clocks} - {_show(was)}
            unlike = f", where others have {listed(sorted(others))}" if others else ""
            beside = "" if old.places[clock].container in (container, *sources) else f" from {clock}"
            self._say("kept", name, f"{_show(was)}{beside}{unlike}", place)
        late = [s.place for s in self.slots if s.place.container == container and s.value is None]
        if late and not self._restarts(container) and np.any(self.out[name]):
            parameters = _some(dict.fromkeys(str(p.parameter) for p in late))
            whose = f"{listed(dict.fromkeys(p.slot for p in late))} of {parameters}"
            self._say(
                "changed", name, f"goes on, but {whose} begin anew: too long first steps there (see migrate)", place
            )

    def _hyper(self, name: str, container: str, sources: Sequence[str], follows: bool) -> None:
        place, fresh = self.new.places[name], self.new.leaves[name]
        named = [n for n, p in self.old.places.items() if p.slot == place.slot and p.parameter is None]
        found = self._nearest(named, [container] if container in self.rules and not sources else sources)
        short = place.slot.removeprefix(HYPER)
        scheduled = HYPER + PIN + short in self.new.scalars[container]
        if found is None:
            if not short.startswith(PIN) and any(p.slot.startswith(HYPER) for p in self.old.places.values()):
                self._say("changed", name, f"{_show(fresh)}, new" + " at step 0" * scheduled, place)
            return
        self.used |= set(named)
        was = self.old.leaves[found]
        if short.startswith(PIN):
            if np.any(np.asarray(was) >= 0):
                self._say("changed", name, f"was {_show(was)}; it follows its schedule again", place)
        elif scheduled:
            if HYPER + PIN + short not in self.old.scalars[self.old.places[found].container]:
                self._say("changed", name, f"{_show(was)} -> a schedule, as the new optimizer says", place)
            if follows and jnp.shape(was) == jnp.shape(fresh):  # what was applied last, until the next step
                self.out[name], _ = _adapted(was, fresh)
        elif not np.array_equal(np.asarray(was, kind(fresh)), np.asarray(fresh)):
            self._say("changed", name, f"{_show(was)} -> {_show(fresh)}, as the new optimizer says", place)

    # -- the rest

    def _leftovers(self) -> None:
        old, new = self.old, self.new
        for name, place in old.places.items():
            if name in self.used or place.parameter is not None:
                continue
            value = old.leaves[name]
            if place.slot.startswith(HYPER):
                if not place.slot.startswith(HYPER + PIN):
                    reason = "the new state holds none; what the new optimizer says counts"
                    self._say("changed", name, reason, place)
            else:
                self._say("dropped", name, f"{_show(value)}, the new state has no place for it", place, value)
        for (slot, parameter), held in old.slots.items():
            for container, items in held.items():
                for item in items.values():
                    if set(item.names) <= self.used:
                        continue
                    reason = "the new state has no such slot" + " for it" * any(slot == s for s, _ in new.slots)
                    reason = "no such parameter" if parameter not in self.params else reason
                    reason = "another's was taken, or none was certain" if (slot, parameter) in new.slots else reason
                    self._say("dropped", item.names[0], reason, Place(container, slot, parameter), item.value)
