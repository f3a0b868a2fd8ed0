"""Names of leaves, groups of leaves by name, and tables of them.

A leaf's name is its path joined by ``/``: ``"encoder/layer_0/kernel"``.
"""

from __future__ import annotations

import difflib
import os
import re
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, TypeGuard, TypeVar

import jax
import jax.numpy as jnp
import numpy as np

__all__ = [
    "Groups",
    "Text",
    "aligned",
    "check_optimizer",
    "check_params",
    "compiled",
    "find_nodes",
    "is_function",
    "leaf_names",
    "leaf_paths",
    "named_leaves",
    "nearest",
    "owners",
    "resolve_groups",
    "same_structure",
]

T = TypeVar("T")

Path = tuple[str, ...]
"""The names along the path to a node."""

Groups = Sequence[tuple[str | Callable[[str, Any], bool], Mapping[str, Any]]]
"""``[(pattern, overrides), ...]``: ``pattern`` is a regular expression searched in the leaf's name,
or a function ``(name, leaf) -> bool``; later matches win, setting by setting."""

BOXES = {"flax.nnx": "Variable", "flax.core.meta": "AxisMetadata"}
"""Modules and their types that hold an array as ``value``. The array has the same name outside of its box."""


# -- names -----------------------------------------------------------------------------------------


def _key_name(key: Any) -> str:
    for attribute in ("key", "name", "idx"):
        if hasattr(key, attribute):
            return str(getattr(key, attribute))
    return str(key)


def _is_value(key: Any) -> bool:
    return isinstance(key, jax.tree_util.GetAttrKey) and key.name == "value"


Keyed = list[tuple[tuple[Any, ...], Any]]


def _flatten(tree: Any, is_leaf: Callable[[Any], bool] | None = None) -> list[tuple[Path, Any]]:
    """The leaves of ``tree`` with the names along their paths, in flattening order."""
    flat = jax.tree_util.tree_flatten_with_path(tree, is_leaf=is_leaf)[0]
    if any(_is_value(key) for path, _ in flat for key in path):
        # A path does not tell a box from a node that happens to have a field "value": the nodes have to be seen.
        types = [getattr(sys.modules.get(module), name, None) for module, name in BOXES.items()]
        boxes = tuple(box for box in types if box is not None)
        flat = _unboxed(tree, flat, boxes, is_leaf) if boxes else flat
    return [(tuple(map(_key_name, path)), leaf) for path, leaf in flat]


def _unboxed(tree: Any, flat: Keyed, boxes: tuple[type, ...], is_leaf: Callable[[Any], bool] | None) -> Keyed:
    """``flat``, the leaves of ``tree`` with their keys, without the keys that lead into a box."""
    seen: set[int] = set()

    def stop(node: Any) -> bool:
        if is_leaf is not None and is_leaf(node):
            return True
        if node is not tree and isinstance(node, boxes):
            seen.add(id(node))
        return id(node) in seen

    root = isinstance(tree, boxes) and not (is_leaf is not None and is_leaf(tree))
    out: Keyed = []
    for path, node in jax.tree_util.tree_flatten_with_path(tree, is_leaf=stop)[0]:
        depth, inner = len(path), [((), node)]
        if id(node) in seen:
            count = len(jax.tree.leaves(node, is_leaf=is_leaf))
            inner = [(keys[depth:], leaf) for keys, leaf in flat[len(out) : len(out) + count]]
            if any(_is_value(key) for keys, _ in inner for key in keys[1:]):
                inner = _unboxed(node, inner, boxes, is_leaf)
            else:
                inner = [(keys[_is_value(keys[0]) :], leaf) for keys, leaf in inner]
        path = path[root and depth > 0 and _is_value(path[0]) :]
        out += [((*path, *keys), leaf) for keys, leaf in inner]
    return out


def leaf_paths(tree: Any, is_leaf: Callable[[Any], bool] | None = None) -> list[Path]:
    """The names along the path to each leaf of ``tree``, in flattening order: ``("encoder", "kernel")``.

    The ``value`` of an `nnx.Variable` and of a linen box is left out, so that a leaf has one name, boxed or bare.
    """
    return [path for path, _ in _flatten(tree, is_leaf)]


def leaf_names(tree: Any, is_leaf: Callable[[Any], bool] | None = None) -> list[str]:
    """The names of the leaves of ``tree``, in flattening order: `leaf_paths` joined by ``/``."""
    return ["/".join(path) for path, _ in _flatten(tree, is_leaf)]


def in_containers_of(like: Any, tree: Any) -> Any:
    """``tree`` in the containers of ``like``, if its leaves have the same names.

    `flax.nnx.Optimizer` makes mappings of the containers inside an array's state.
    """
    leaves = dict(zip(leaf_names(tree), jax.tree.leaves(tree), strict=True))
    names = leaf_names(like)
    if set(names) != set(leaves):
        return tree
    return jax.tree.unflatten(jax.tree.structure(like), [leaves[name] for name in names])


def find_nodes(tree: Any, kind: type | tuple[type, ...]) -> list[tuple[str, Any]]:
    """Every node of type ``kind`` in ``tree`` with its name."""
    flat = _flatten(tree, is_leaf=lambda node: isinstance(node, kind))
    return [("/".join(path), node) for path, node in flat if isinstance(node, kind)]


def named_leaves(tree: Any, what: str) -> dict[str, Any]:
    """The leaves of ``tree`` by name, in flattening order.

    Args:
      tree: any pytree.
      what: the argument that an error names.

    Raises:
      ValueError: two leaves have the same name.
    """
    flat = [("/".join(path), leaf) for path, leaf in _flatten(tree)]
    out = dict(flat)
    if len(out) < len(flat):
        names = [name for name, _ in flat]
        twice = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"{what}: two leaves have the name {twice!r}; rename one of them")
    return out


def owners(state: Any, params: Any, values: Iterable[T]) -> list[T | None]:
    """For each leaf of an optimizer's state the entry of ``values`` that belongs to the leaf's parameter.

    A leaf belongs to the parameter whose name its path contains. The longest name wins, then the last place.
    In the slots of a `jaxsgd.State` the name starts right behind the slot's.

    Args:
      state: any optimizer state.
      params: the parameters.
      values: one entry for each parameter.

    Returns:
      A list in the order of the state's leaves; None for a leaf that belongs to no parameter.
    """
    known = dict(zip(leaf_paths(params), values, strict=True))
    return [_owner(path, known) for path in leaf_paths(state)]


def _owner(parts: Path, known: Mapping[Path, T]) -> T | None:
    lengths = range(len(parts), -1, -1)
    # The first part is a field of the state or a place in a chain, if more than a name follows it.
    places = [(i, n) for n in lengths for i in range(len(parts) - n, -1, -1) if i > 0 or n in (0, len(parts))]
    if "slots" in parts[:-1]:
        behind = parts.index("slots") + 2
        places = [(behind, n) for n in lengths if behind + n <= len(parts)] + places
    return next((known[parts[i : i + n]] for i, n in places if parts[i : i + n] in known), None)


# -- kinds of input --------------------------------------------------------------------------------


def check_optimizer(tx: Any) -> None:
    """Check that ``tx`` is a gradient transformation.

    Raises:
      TypeError: it has no ``init`` and ``update``.
    """
    if callable(getattr(tx, "init", None)) and callable(getattr(tx, "update", None)):
        return
    call = "; call it with a learning rate first" if callable(tx) else ""
    raise TypeError(f"tx={tx!r}: a gradient transformation such as jaxsgd.adamw(1e-3) is needed{call}")


def is_function(x: Any) -> TypeGuard[Callable[..., Any]]:
    """Whether ``x`` is to be called: it is callable and no pytree of arrays that happens to have ``__call__``.

    A model of Equinox, or another registered class with ``__call__``, is a tree of its leaves.
    """
    if not callable(x):
        return False
    leaves = jax.tree.leaves(x)
    return isinstance(x, jax.tree_util.Partial) or not leaves or len(leaves) == 1 and leaves[0] is x


def check_params(params: Any, what: str = "params") -> None:
    """Check that every leaf is an array, the shape of one, or a number.

    Args:
      params: any pytree.
      what: the argument that the error names.

    Raises:
      TypeError: names the first leaf that is something else.
    """
    for path, leaf in _flatten(params):
        if isinstance(leaf, bool | int | float | complex):
            continue
        dtype = getattr(leaf, "dtype", None) if hasattr(leaf, "shape") else None
        if dtype is not None and (jnp.issubdtype(dtype, np.number) or jnp.issubdtype(dtype, np.bool_)):
            continue
        where = f"{what}: {'/'.join(path)!r}" if path else what
        if dtype is not None:
            raise TypeError(f"{where} has the dtype {dtype}; parameters are arrays of numbers")
        kind = f"the function {getattr(leaf, '__name__', leaf)}" if callable(leaf) else f"a {type(leaf).__name__}"
        raise TypeError(
            f"{where} is {kind}; parameters are arrays or numbers. Use a pytree of arrays; of an Equinox model, "
            "filter it: eqx.filter(model, eqx.is_inexact_array)"
        )


# -- tables ----------------------------------------------------------------------------------------


def aligned(rows: Sequence[Sequence[str]]) -> str:
    """Rows of cells as lines, each column as wide as its widest cell."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join("  ".join(c.ljust(w) for c, w in zip(row, widths, strict=True)).rstrip() for row in rows)


class Text(str):
    """Text that a REPL shows as it prints."""

    __repr__ = str.__str__


def nearest(name: str, names: Iterable[str]) -> str:
    """``"; did you mean 'adam'?"`` where a similar name exists, else the list of names.

    Capitals do not count. If names are equally similar, up to three that begin alike are listed: ``v5e`` or ``v5p``
    for ``v5x``, not ``v7x``.
    """
    known, low = sorted(names), name.lower()
    folded = {other.lower(): other for other in known}

    def likeness(other: str) -> tuple[float, int]:
        return difflib.SequenceMatcher(None, low, other).ratio(), len(os.path.commonprefix([low, other]))

    close = {other: likeness(other) for other in difflib.get_close_matches(low, folded, n=9, cutoff=0.5)}
    best = [repr(folded[other]) for other in close if close[other] == max(close.values())][:3]
    return f"; did you mean {' or '.join(sorted(best))}?" if best else f"; known: {', '.join(known)}"


# -- groups ----------------------------------------------------------------------------------------


def compiled(what: str, pattern: str) -> re.Pattern[str]:
    """The regular expression that the argument ``what`` has.

    Raises:
      ValueError: it is none.
    """
    try:
        return re.compile(pattern)
    except re.error as error:
        raise ValueError(f"{what}: the pattern {pattern!r} is no regular expression: {error}") from None


def resolve_groups(groups: Groups, names: Sequence[str], leaves: Sequence[Any]) -> list[dict]:
    """The overrides of each leaf, merged in the order of ``groups``.

    Raises:
      ValueError: a pattern that is no regular expression, or that matches no leaf (a tree without leaves is not
        checked).
    """
    settings: list[dict] = [{} for _ in names]
    for pattern, overrides in groups:
        if isinstance(pattern, str):
            search = compiled("groups", pattern).search
            hits = [search(name) is not None for name in names]
        else:
            hits = [bool(pattern(name, leaf)) for name, leaf in zip(names, leaves, strict=True)]
        if names and not any(hits):
            shown = ", ".join(names[:8]) + (", ..." if len(names) > 8 else "")
            raise ValueError(f"groups: the pattern {pattern!r} matches no parameter; the parameters are: {shown}")
        for setting, hit in zip(settings, hits, strict=True):
            if hit:
                setting.update(overrides)
    return settings


# -- two trees -------------------------------------------------------------------------------------


def same_structure(params: Any, grads: Any, what: str = "grads") -> None:
    """Check that two trees have the same leaves and shapes.

    Args:
      params: parameters.
      grads: gradients.
      what: the argument that an error names.

    Raises:
      TypeError: parameters that are no arrays.
      ValueError: names the first path that only one of them has, or whose shapes differ.
    """
    if jax.tree.structure(params) != jax.tree.structure(grads):
        check_params(params)
        in_params, in_grads = leaf_names(params), leaf_names(grads)
        for name in in_params:
            if name not in in_grads:
                raise ValueError(f"{what}: no gradient for the parameter {name!r}")
        for name in in_grads:
            if name not in in_params:
                raise ValueError(f"{what}: {name!r} is not among the parameters")
        raise ValueError(
            f"{what}: the same leaves in another container: params are "
            f"{jax.tree.structure(params)}, {what} has {jax.tree.structure(grads)}"
        )
    for index, (p, g) in enumerate(zip(jax.tree.leaves(params), jax.tree.leaves(grads), strict=True)):
        if jnp.shape(p) != jnp.shape(g):
            raise ValueError(
                f"{what}: {leaf_names(params)[index]!r} has the shape {jnp.shape(g)}; its parameter has {jnp.shape(p)}"
            )
        if jnp.iscomplexobj(g) and not jnp.iscomplexobj(p):
            raise ValueError(
                f"{what}: {leaf_names(params)[index]!r} is {jnp.result_type(g).name}; "
                f"its parameter is {jnp.result_type(p).name}"
            )
