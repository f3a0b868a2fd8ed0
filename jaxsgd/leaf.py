"""One array of a tree under a rule: the rule's view, and its step.

`step_leaf` is compiled with a leaf's settings static, so that leaves of one shape and one setting share a trace.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from dataclasses import replace as replaced
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jaxsgd.elementwise import elementwise
from jaxsgd.hyper import Hyper, is_array, is_off, narrow
from jaxsgd.kernels import in_kernel
from jaxsgd.meshes import platform_of
from jaxsgd.numerics import sq, sum_of_squares, wide, wide_dtype, widest
from jaxsgd.pieces import LARGE, Pieces, in_pieces, pieces_of
from jaxsgd.rounding import LOST, rounded, rounds
from jaxsgd.slots import Slot, by_name, parameter_names
from jaxsgd.storage import Storage, drawn, needs_key, plain

__all__ = ["Applied", "Equation", "Leaf", "Settings", "ShapeError", "step_leaf", "stepped", "sum_leaf"]


@dataclass(frozen=True)
class Leaf:
    """One array as a rule sees it.

    Attributes:
      g: the gradient, in the dtype to compute in.
      p: the parameter, widened, or None where nothing needs it.
      slots: name -> value, wide; None where the array has none.
      hyper: all else by name: hyperparameters, ``learning_rate``, ``weight_decay``, ``t`` (the 1-based step), scalars
        of the tree, extra arguments of the update.
      delta: the change of the parameter, once a step was taken.
    """

    g: Any
    p: Any
    slots: Mapping[str, Any]
    hyper: Mapping[str, Any]
    delta: Any = None

    @property
    def learning_rate(self) -> Any:
        return self.hyper["learning_rate"]

    @property
    def weight_decay(self) -> Any:
        return self.hyper["weight_decay"]

    @property
    def t(self) -> Any:
        return self.hyper["t"]

    def replace(self, **changes: Any) -> Leaf:
        """A leaf with other fields, or with other entries of ``hyper``."""
        fields = {name: changes.pop(name) for name in ("g", "p", "slots", "hyper", "delta") if name in changes}
        if changes:
            fields["hyper"] = {**fields.get("hyper", self.hyper), **changes}
        return replaced(self, **fields)

    @property
    def arrays(self) -> tuple[Any, Any, dict[str, Any], dict[str, Any]]:
        """The arrays of the computation: the gradient, the parameter, the slots, and the arrays in ``hyper``."""
        return self.g, self.p, dict(self.slots), {name: x for name, x in self.hyper.items() if is_array(x)}

    def named(self) -> dict[str, Any]:
        """Everything by name, for functions that ask by their parameters."""
        return {**self.hyper, **self.slots, "g": self.g, "p": self.p}


@dataclass(frozen=True, eq=False)
class Equation:
    """A rule as data: what it keeps and asks for, and its step on one array.

    Attributes:
      name: the rule's.
      fn: the rule, ``fn(g, *slots, **context, **hyper) -> (direction, *slots)``; where it asks for ``learning_rate`` it
        owns its step and returns the change of the parameter instead.
      slots: name -> what it keeps of each array.
      context: what it asks for beside: ``t``, ``p``, ``learning_rate``, scalars of ``shared``, extra arguments.
      hypers: its hyperparameters by name.
      sums: optional, one leaf by name -> dict of scalars, which are added over the tree.
      shared: optional, once a step: kept scalars as positionals, whose defaults are their start; sums, ``t`` and
        hyperparameters as keywords -> dict of scalars for the rule to ask for by name.
      kept: the scalars that ``shared`` keeps -> how they start, a function of hyperparameters.
      trees: optional, once a step: ``params``, ``updates``, ``t``, hyperparameters and extra arguments by name -> dict
        of trees like the params; the rule asks for its leaf of one by name.
      coupled: weight decay is added to the gradient (L2) instead of the direction.
      fixed: hyperparameters that the wrapper around it has settled.
      advance: a wrapper's step, a function of a leaf; None for a rule of its own.
      stacked: leaves of one shape and the same settings take their step together, as one stack: for work on matrices.
    """

    name: str
    fn: Callable
    slots: Mapping[str, Slot]
    context: tuple[str, ...]
    hypers: Mapping[str, Hyper]
    sums: Callable | None = None
    shared: Callable | None = None
    kept: Mapping[str, Callable] = field(default_factory=dict)
    trees: Callable | None = None
    coupled: bool = False
    fixed: Mapping[str, Any] = field(default_factory=dict)
    advance: Callable[[Leaf], Leaf] | None = None
    stacked: bool = False

    @property
    def owns_step(self) -> bool:
        """Whether the rule returns the whole change of the parameter."""
        return "learning_rate" in self.context

    @property
    def tree_wide(self) -> frozenset[str]:
        """The hyperparameters that have one value for the whole tree: no group may override them."""
        asked = {*(parameter_names(self.shared) if self.shared is not None else ())}
        asked |= {name for begin in self.kept.values() for name in parameter_names(begin)}
        return frozenset(name for name, h in self.hypers.items() if h.in_state or name in asked)

    @property
    def extra(self) -> frozenset[str]:
        """The extra arguments of ``update`` that the rule, its sums or its tree-wide scalars ask for."""
        functions = [fn for fn in (self.sums, self.shared, self.trees) if fn is not None]
        asked = {*self.context, *(name for fn in functions for name in parameter_names(fn))}
        made = {"g", "p", "t", "learning_rate", "weight_decay", "leaf_key", "params", "updates"}
        return frozenset(asked - made - {*self.slots, *self.kept, *self.hypers, *self.fixed})

    def first(self, slot: str, p: Any, hyper: Mapping[str, Any]) -> Any:
        """A slot before the first step, from ``p`` and hyperparameters; None where the array has none."""
        return self.slots[slot].first(p, hyper)

    def direction(self, leaf: Leaf) -> tuple[Any, Leaf]:
        """The equation on one array: what it returns first, and the leaf with its new slots.

        Raises:
          TypeError: the function returned another number of values than the gradient's and its slots'.
        """
        hyper = {**leaf.hyper, **self.fixed, "p": leaf.p}
        arguments = {name: hyper[name] for name in (*self.context, *self.hypers, *self.fixed)}
        out = self.fn(leaf.g, *(leaf.slots.get(name) for name in self.slots), **arguments)
        first, *slots = out if isinstance(out, tuple) else (out,)
        if len(slots) != len(self.slots):
            raise TypeError(
                f"rule {self.name}: it returned {1 + len(slots)} values; a direction and its {len(self.slots)} slots "
                f"are needed{': ' if self.slots else ''}{', '.join(self.slots)}"
            )
        return first, leaf.replace(slots={**leaf.slots, **dict(zip(self.slots, slots, strict=True))})

    def step(self, leaf: Leaf) -> Leaf:
        """The rule on one array, then learning rate and decay: the leaf with its ``delta`` and new slots."""
        if self.advance is not None:
            return self.advance(leaf)
        rate, decay = leaf.learning_rate, leaf.weight_decay
        decays = not is_off(decay) and "weight_decay" not in self.context
        if decays and self.coupled:
            leaf, decays = leaf.replace(g=leaf.g + decay * leaf.p), False
        direction, leaf = self.direction(leaf)
        if self.owns_step:
            return leaf.replace(delta=direction - rate * decay * leaf.p if decays else direction)
        return leaf.replace(delta=-rate * (direction + decay * leaf.p if decays else direction))


class ShapeError(Exception):
    """A slot has another shape than its parameter: slot, its shape, the right one."""


@dataclass(frozen=True)
class Settings:
    """All that is static of one leaf; hashable, so that leaves with the same share a trace.

    Attributes:
      rule: what steps.
      constants: hyperparameters that are compiled in, with ``lr_mult``: pairs of name and value.
      storage: pairs of slot and storage.
      slots: the slots that the state has.
      rounding: how a 16-bit parameter takes steps.
    """

    rule: Equation
    constants: tuple[tuple[str, Any], ...]
    storage: tuple[tuple[str, Storage], ...]
    slots: tuple[str, ...]
    rounding: str | None = None

    @functools.cached_property
    def storages(self) -> dict[str, Storage]:
        return dict(self.storage)

    @functools.cached_property
    def known(self) -> dict[str, Any]:
        return dict(self.constants)

    def drawn(self, keys: Mapping[str, jax.Array]) -> dict[str, Any]:
        """The values that the storages of its slots take in place of their keys."""
        return {name: drawn(self.storages.get(name, plain), key) for name, key in keys.items()}

    def leaf(self, g: Any, p: Any, rested: Mapping[str, Any], hyper: Mapping[str, Any]) -> tuple[Leaf, Any]:
        """The leaf that the rule sees, and the real dtype that it computes in.

        Raises:
          ShapeError: a slot does not fit the parameter.
        """
        slots = {name: None if x is None else self._unpacked(name, x) for name, x in rested.items()}
        # Compute in the dtype that the state is kept in, whatever the gradient's.
        kept = [p] if p is not None else jax.tree.leaves(slots) or [g]
        real = widest(x.dtype for x in kept)
        dtype = jnp.dtype(f"complex{real.itemsize * 16}") if jnp.iscomplexobj(g) else real
        now = {name: narrow(value, real) for name, value in hyper.items()} | self.known
        if "lr_mult" in now:
            now["learning_rate"] = now["learning_rate"] * now["lr_mult"]
        leaf = Leaf(wide(g, dtype), None if p is None else wide(p), dict.fromkeys(self.rule.slots) | slots, now)
        self._check(leaf, p if p is not None else g)
        return leaf, real

    def _unpacked(self, name: str, packed: Any) -> Any:
        storage = self.storages.get(name, plain)
        return jax.tree.map(wide, packed) if storage is plain else storage.unpack(packed)

    def _check(self, leaf: Leaf, like: Any) -> None:
        for name, value in leaf.slots.items():
            if value is None:
                continue
            if self.rule.slots[name].zero:
                wanted = [like.shape]
            else:
                begin = functools.partial(self.rule.first, name, hyper=leaf.hyper)
                wanted = [x.shape for x in jax.tree.leaves(jax.eval_shape(lambda p, b=begin: b(wide(p)), like))]
            found = [x.shape for x in jax.tree.leaves(value)]
            if found != wanted:
                self._check_storage(name, wanted)
                raise ShapeError(
                    name, found[0] if len(found) == 1 else found, wanted[0] if len(wanted) == 1 else wanted
                )

    def _check_storage(self, name: str, shapes: list[tuple[int, ...]]) -> None:
        """Whether the slot's storage gives back what it was given."""
        storage = self.storages.get(name, plain)
        if storage is plain or len(shapes) != 1:
            return
        like, key = jax.ShapeDtypeStruct(shapes[0], jnp.float32), jax.eval_shape(lambda: jax.random.key(0))
        back = jax.eval_shape(
            lambda x, k: storage.unpack(storage.pack(x, k if needs_key(storage) else None)), like, key
        )
        if jnp.shape(back) != like.shape:
            raise ValueError(
                f"storage: {storage!r} packed {name} of shape {like.shape} and unpacked an array of shape "
                f"{jnp.shape(back)}; unpack must give the shape that pack was given"
            )


class Applied(NamedTuple):
    """In place of an update: the parameter after it, and the sum of the update's squares.

    Rows of a parameter have a sum each, ``(rows, 1)``.
    """

    p: Any
    squares: Any


def stepped(settings: Settings, applies: bool, g: Any, p: Any, rested: Any, hyper: Any, lost: Any, keys: Any) -> Any:
    """One step of one array: its update, its stored slots, and the part that rounding took.

    Args:
      settings: its static part.
      applies: give an `Applied` in place of the update.
      g, p, rested, hyper: the gradient, the parameter, stored slots and runtime values by name.
      lost: what rounding took so far.
      keys: random keys by slot.
    """
    whole = functools.partial(_step, settings, applies)
    pieces = _pieces(settings, g, p, rested, hyper, lost)
    if pieces is None:
        return whole(g, p, rested, hyper, lost, keys)

    platform = platform_of((g, p, rested))
    cut = functools.partial(_step_in_pieces if platform == "cpu" else _step_in_kernel, settings, applies, pieces)
    # A program may also be exported for another platform than it was traced for.
    ways = {platform: cut} if platform == "cpu" else {platform: functools.partial(cut, on=platform)}
    return jax.lax.platform_dependent(g, p, rested, hyper, lost, keys, **ways, default=whole)


step_leaf = functools.partial(jax.jit, static_argnums=(0, 1))(stepped)
"""`stepped`, compiled: leaves of one shape and one setting share its trace."""


def _step(
    settings: Settings,
    applies: bool,
    g: Any,
    p: Any,
    rested: Any,
    hyper: Any,
    lost: Any,
    keys: Any,
    rows: Any = None,
) -> Any:
    """`step_leaf` of an array, or of the ``rows`` of one, see `jaxsgd.storage.Storage`."""
    leaf, _ = settings.leaf(g, p, rested, hyper)
    leaf = settings.rule.step(leaf)
    part = {} if rows is None else {"rows": rows}
    packed = {}
    for name, old in rested.items():
        if old is None:
            packed[name] = None
            continue
        storage = settings.storages.get(name, plain)
        new = leaf.slots[name] if storage is plain else storage.pack(leaf.slots[name], keys.get(name), **part)
        packed[name] = jax.tree.map(lambda x, like: x.astype(like.dtype), new, old)
    like = g if p is None else p
    if settings.rounding is not None and rounds(like, settings.rounding):
        update, lost = rounded(settings.rounding, p, leaf.delta, lost, keys.get(LOST))
    else:
        update = leaf.delta.astype(like.dtype)
    return _applied(p, update, rows) if applies else update, packed, lost


def _applied(p: Any, update: Any, rows: Any) -> Applied:
    squares = sum_of_squares(update) if rows is None else jnp.sum(sq(wide(update)), axis=1, keepdims=True)
    return Applied((p.astype(update.dtype) + update).astype(p.dtype), squares)


def _pieces(settings: Settings, g: Any, p: Any, rested: Any, hyper: Any, lost: Any) -> Pieces | None:
    """How the step of an array is cut; None where it has no packed slot, is too small, or its numbers depend on
    each other."""
    packing = {name: s for name, s in settings.storages.items() if s is not plain and rested.get(name) is not None}
    if not packing or settings.rounding == "stochastic":
        return None
    if platform_of((g, p, rested)) == "cpu" and g.size < LARGE:
        return None  # before the rule is traced for nothing
    pieces = pieces_of(g, packing, (p, rested, hyper, lost))
    if pieces is None:
        return None
    shapes = jax.eval_shape(lambda *arrays: settings.leaf(*arrays)[0].arrays, g, p, rested, hyper)

    def stepped(arrays: Any) -> Any:
        g, p, slots, hyper = arrays
        leaf = settings.rule.step(Leaf(g, p, slots, {**hyper, **settings.known}))
        return leaf.delta, leaf.slots

    alone = elementwise(stepped, (shapes,), (jax.tree.map(pieces.shape, shapes),))
    return pieces if alone else None


def _step_in_pieces(settings: Settings, applies: bool, pieces: Pieces, *arrays: Any) -> Any:
    """`step_leaf` for a CPU; ``arrays`` are its last six arguments."""
    g, p, rested, hyper, lost, keys = arrays
    like = g if p is None else p
    dtype = wide_dtype(like.dtype) if rounds(like, settings.rounding) else like.dtype
    # The update takes the gradient's place where it can, which needs no memory in a training step.
    there = not applies and g.dtype == dtype
    if applies:
        first = Applied(p, jnp.zeros((pieces.rows, 1), wide_dtype(like.dtype)))
    else:
        first = g if there else jnp.zeros_like(g, dtype)

    def step(read: Any, kept: Any, rows: Any) -> Any:
        (g, p, hyper), (first, rested, lost) = read, kept
        g, p = first if there else g, first.p if applies else p
        return _step(settings, applies, g, p, rested, hyper, lost, keys, rows)

    read = None if there else g, None if applies else p, hyper
    done = in_pieces(step, pieces, read, (first, rested, lost), hyper["t"] >= 0)
    return _summed(done) if applies else done


def _step_in_kernel(settings: Settings, applies: bool, pieces: Pieces, *arrays: Any, on: str) -> Any:
    """`step_leaf` for a TPU or a GPU; ``arrays`` are its last six arguments."""
    g, p, rested, hyper, lost, keys = arrays
    like = g if p is None else p
    if applies:
        made = jax.ShapeDtypeStruct((pieces.rows, 1), wide_dtype(like.dtype))
    else:
        dtype = wide_dtype(like.dtype) if rounds(like, settings.rounding) else like.dtype
        made = jax.ShapeDtypeStruct(like.shape, dtype)

    def step(read: Any, kept: Any, rows: Any) -> Any:
        (g, stays, hyper), (moves, rested, lost) = read, kept
        p = moves if applies else stays
        first, rested, lost = _step(settings, applies, g, p, rested, hyper, lost, keys, rows)
        return (first.squares, (first.p, rested, lost)) if applies else (first, (None, rested, lost))

    stays, moves = (None, p) if applies else (p, None)
    out = in_kernel(step, pieces, (g, stays, hyper), (moves, rested, lost), made, like.shape, on=on)
    if out is None:
        return _step(settings, applies, *arrays)
    new, (moved, rested, lost) = out
    return _summed((Applied(moved, new), rested, lost)) if applies else (new, rested, lost)


def _summed(done: tuple[Applied, Any, Any]) -> Any:
    (p, squares), rested, lost = done
    return Applied(p, jnp.sum(squares)), rested, lost


@functools.partial(jax.jit, static_argnums=0)
def sum_leaf(settings: Settings, g: Any, p: Any, rested: Any, hyper: Any) -> dict[str, jax.Array]:
    """The terms of one array in the sums over the tree."""
    leaf, _ = settings.leaf(g, p, rested, hyper)
    assert settings.rule.sums is not None
    return by_name(settings.rule.sums, leaf.named())
