"""The meaning of the names of an optimizer state's leaves: a slot of a parameter, or a scalar."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jaxsgd.blockwise import Packed, bits_of, packed_as
from jaxsgd.paths import leaf_paths

__all__ = ["CLOCKS", "HYPER", "SHARED", "Item", "Leaves", "PINS", "Place", "kind", "whole"]

CLOCKS = ("count", "gradient_step")
"""How transformations call the number of completed steps."""
HYPER, SHARED, PINS = "hyper/", "shared/", "pins/"
SCALARS = {"hyper": HYPER, "hyperparams": HYPER, "shared": SHARED, "pins": PINS}
"""What precedes the name of a hyperparameter, and of a scalar that belongs to a rule as a whole."""


class Place(NamedTuple):
    """The parts of a leaf's name: ``container/slot/parameter/inside``, or ``container/slot`` of a scalar."""

    container: str
    slot: str
    parameter: str | None
    inside: str = ""


class Item(NamedTuple):
    """The stored arrays of a slot of one parameter, or some of them: their names, and the pytree that they make."""

    names: tuple[str, ...]
    value: Any

    @property
    def size(self) -> int:
        """Its numbers, those of scales aside."""
        if isinstance(self.value, Packed):
            return self.value[0].size * 8 // bits_of(self.value)
        return sum(int(getattr(leaf, "size", 1)) for leaf in jax.tree.leaves(self.value))


def kind(x: Any) -> Any:
    """The dtype of an array, as it is, or of a Python number."""
    return x.dtype if hasattr(x, "dtype") else jnp.result_type(x)


def _unboxed(inside: tuple[str, ...]) -> tuple[str, ...]:
    """Without the ``value`` of an nnx.Variable that was saved as a dict."""
    return inside[1:] if inside[:1] == ("value",) else inside


def _of(prefix: tuple[str, ...], parameter: str, inside: tuple[str, ...]) -> Place:
    """The place of a leaf of a slot whose trees stand at ``prefix``."""
    inside = _unboxed(inside)
    if prefix[-1].isdigit():  # a position is no name: only the same position is the same slot
        return Place("", "/".join(prefix), parameter, "/".join(inside))
    container = prefix[:-2] if prefix[-2:-1] == ("slots",) else prefix[:-1]
    return Place("/".join(container), prefix[-1], parameter, "/".join(inside))


def _places(leaves: Mapping[str, Any], params: Mapping[str, Any]) -> dict[str, Place]:
    """What every name says. A name may be read in several ways where parameters are called like slots or like ends of
    others; the reading that explains most of its neighbours too is taken."""
    split = {name: tuple(name.split("/")) for name in leaves}
    slots = {(*keys[:-1], "slots") for keys in split.values() if keys[-1] == "count"}  # of `jaxsgd.State`
    candidates = {name: list(_candidates(keys, leaves[name], params, slots)) for name, keys in split.items()}
    covers: dict[tuple[str, ...], set[str]] = defaultdict(set)
    for readings in candidates.values():
        for prefix, parameter, _ in readings:
            covers[prefix].add(parameter)
    beside_scalars = {keys[:-1] for name, keys in split.items() if not candidates[name]}

    def rank(name: str, reading: tuple) -> tuple:
        prefix, parameter, inside = reading
        same = jnp.shape(leaves[name]) == jnp.shape(params[parameter])
        whole = not inside or inside == ("value",)
        known = not prefix[-1].isdigit(), prefix[:-1] in beside_scalars
        return prefix[:-1] in slots, whole, len(covers[prefix]), *known, same, len(prefix)

    best = {name: max(c, key=lambda r: rank(name, r)) for name, c in candidates.items() if c}
    trees = {prefix for prefix, _, _ in best.values()}
    out = {}
    for name, keys in split.items():
        if name in best:
            out[name] = _of(*best[name])
            continue
        above = [keys[:i] for i in range(len(keys) - 1, 0, -1) if keys[:i] in trees]
        if above and params.keys() != {""}:
            out[name] = _of(above[0], "/".join(keys[len(above[0]) :]), ())
        elif field := SCALARS.get("".join(keys[-2:-1])):
            out[name] = Place("/".join(keys[:-2]), field + keys[-1], None)
        else:
            out[name] = Place("/".join(keys[:-1]), keys[-1], None)
    return out


def _candidates(keys: tuple[str, ...], leaf: Any, params: Mapping[str, Any], slots: set) -> Iterable[tuple]:
    """The ways to read one name: ``(prefix, parameter, inside)``, the prefix ending in the slot."""
    for start in range(1, len(keys) + 1):
        prefix = keys[:start]
        if prefix[-1] in ("slots", *SCALARS, *CLOCKS):
            continue
        for stop in range(start, len(keys) + 1):
            parameter = "/".join(keys[start:stop])
            if parameter not in params or (parameter == "") != (params.keys() == {""}):
                continue
            p, inside = params[parameter], keys[stop:]
            if prefix[:-1] not in slots:
                number = jnp.issubdtype(kind(leaf), jnp.inexact) or not jnp.issubdtype(kind(p), jnp.inexact)
                named = not prefix[-1].isdigit() and parameter != ""
                if parameter == "" and "".join(prefix[-2:-1]) in SCALARS:
                    continue
                whole = inside in ((), ("value",))
                if not number or not whole and not jnp.ndim(leaf):  # a count or a norm beside, not inside
                    continue
                if not named and not (whole and jnp.shape(leaf) == jnp.shape(p)):
                    continue
            yield prefix, parameter, inside


def whole(parts: Mapping[str, tuple[str, Any]], stored: Any = None) -> Item | None:
    """The parts of one value as one item: one array, packed blocks, or a pytree like ``stored``; None for others.

    Args:
      parts: inside -> name and leaf.
      stored: the form that they may have.
    """
    if stored is None:
        if set(parts) == {""}:
            return Item((parts[""][0],), parts[""][1])
        packed = packed_as({inside: leaf for inside, (_, leaf) in parts.items()})
        return None if packed is None else Item(tuple(parts[inside][0] for inside in packed._fields), packed)
    insides = ["/".join(_unboxed(path)) for path in leaf_paths(stored)]
    if set(insides) != set(parts):
        return None
    names, leaves = zip(*(parts[inside] for inside in insides), strict=True)
    return Item(names, jax.tree.unflatten(jax.tree.structure(stored), leaves))


class Leaves:
    """One of the two states, by name.

    Attributes:
      slots: (slot, parameter) -> container -> inside -> name and leaf.
      kinds: container -> the slots it has.
      scalars: container -> scalar -> name of the leaf.
    """

    def __init__(self, leaves: Mapping[str, Any], params: Mapping[str, Any]) -> None:
        self.leaves, self.places = leaves, _places(leaves, params)
        self.slots: dict[tuple[str, str], dict[str, dict[str, tuple[str, Any]]]] = {}
        self.kinds: dict[str, set[str]] = defaultdict(set)
        self.scalars: dict[str, dict[str, str]] = defaultdict(dict)
        for name, place in self.places.items():
            if place.parameter is None:
                self.scalars[place.container][place.slot] = name
            else:
                self.kinds[place.container].add(place.slot)
                here = self.slots.setdefault((place.slot, place.parameter), {}).setdefault(place.container, {})
                here[place.inside] = (name, leaves[name])

    def own(self, container: str) -> set[str]:
        """The scalars of a container without hyperparameters and what a rule shares."""
        return {name for name in self.scalars.get(container, ()) if not name.startswith((HYPER, SHARED, PINS))}
