"""Names of leaves, groups of leaves by name, and tables of them.

Floor 0. A leaf's name is its path joined by ``/``: ``"encoder/layer_0/kernel"``.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, TypeVar

import jax
import jax.numpy as jnp

__all__ = [
    "Groups", "Text", "aligned", "leaf_names", "named_leaves", "nearest", "owners", "resolve_groups", "same_structure",
]  # fmt: skip

T = TypeVar("T")

Groups = Sequence[tuple[str | Callable[[str, Any], bool], Mapping[str, Any]]]
"""``[(pattern, overrides), ...]``: ``pattern`` is a regular expression searched in the leaf's name,
or a function ``(name, leaf) -> bool``; later matches win, setting by setting."""


def _key_name(key: Any) -> str:
    for attribute in ("key", "name", "idx"):
        if hasattr(key, attribute):
            return str(getattr(key, attribute))
    return str(key)


def name_parts(path: Sequence[Any]) -> tuple[str, ...]:
    """The names along one tree path. The ``value`` that an `nnx.Variable` puts at the end is left out,
    so that a leaf has one name whether it is wrapped (``init``) or bare (``update``)."""
    keys = list(path)
    if keys and isinstance(keys[-1], jax.tree_util.GetAttrKey) and keys[-1].name == "value":
        keys.pop()
    return tuple(_key_name(key) for key in keys)


def path_name(path: Sequence[Any]) -> str:
    """One tree path as text."""
    return "/".join(name_parts(path))


def owners(state: Any, params: Any, values: Iterable[T]) -> list[T | None]:
    """For each leaf of an optimizer's state, the one of ``values``, one for each parameter, of its parameter.

    That is the parameter whose name stands in the leaf's path: of several the longest name counts, then the last place.
    In the slots of a `jaxsgd.State` the name begins right behind the slot's. None where there is none.
    """
    paths = [name_parts(path) for path, _ in jax.tree_util.tree_flatten_with_path(params)[0]]
    known = dict(zip(paths, values, strict=True))
    return [_owner(name_parts(path), known) for path, _ in jax.tree_util.tree_flatten_with_path(state)[0]]


def _owner(parts: tuple[str, ...], known: Mapping[tuple[str, ...], T]) -> T | None:
    lengths = range(len(parts), -1, -1)
    places = [(i, n) for n in lengths for i in range(len(parts) - n, -1, -1)]
    if "slots" in parts[:-1]:
        behind = parts.index("slots") + 2
        places = [(behind, n) for n in lengths if behind + n <= len(parts)] + places
    return next((known[parts[i : i + n]] for i, n in places if parts[i : i + n] in known), None)


def leaf_names(tree: Any) -> list[str]:
    """The names of the leaves of ``tree``, in flattening order."""
    return [path_name(path) for path, _ in jax.tree_util.tree_flatten_with_path(tree)[0]]


def named_leaves(tree: Any, what: str) -> dict[str, Any]:
    """The leaves of ``tree`` by name, in flattening order.

    Raises:
      ValueError: two leaves have the same name; ``what`` says whose.
    """
    names, leaves = leaf_names(tree), jax.tree.leaves(tree)
    out = dict(zip(names, leaves, strict=True))
    if len(out) < len(names):
        twice = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"{what}: two leaves have the name {twice!r}, by which they are told apart")
    return out


def aligned(rows: Sequence[Sequence[str]]) -> str:
    """Rows of cells as lines, each column as wide as its widest cell."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join("  ".join(c.ljust(w) for c, w in zip(row, widths, strict=True)).rstrip() for row in rows)


class Text(str):
    """Text that a REPL shows as it prints."""

    __repr__ = str.__str__


def nearest(name: str, names: Iterable[str]) -> str:
    """``"; did you mean 'adam'?"`` where a similar name exists, else the list of names."""
    known = sorted(names)
    close = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
    return f"; did you mean {close[0]!r}?" if close else f"; known: {', '.join(known)}"


def resolve_groups(groups: Groups, names: Sequence[str], leaves: Sequence[Any]) -> list[dict]:
    """The overrides of each leaf, merged in the order of ``groups``.

    Raises:
      ValueError: a pattern that matches no leaf (a tree without leaves is not checked).
    """
    settings: list[dict] = [{} for _ in names]
    for pattern, overrides in groups:
        if isinstance(pattern, str):
            hits = [re.search(pattern, name) is not None for name in names]
        else:
            hits = [bool(pattern(name, leaf)) for name, leaf in zip(names, leaves, strict=True)]
        if names and not any(hits):
            shown = ", ".join(names[:8]) + (", ..." if len(names) > 8 else "")
            raise ValueError(f"groups: the pattern {pattern!r} matches no parameter; the parameters are: {shown}")
        for setting, hit in zip(settings, hits, strict=True):
            if hit:
                setting.update(overrides)
    return settings


def same_structure(params: Any, grads: Any) -> None:
    """Check that two trees have the same leaves and shapes.

    Raises:
      ValueError: names the first path that only one of them has, or whose shapes differ.
    """
    if jax.tree.structure(params) != jax.tree.structure(grads):
        in_params, in_grads = leaf_names(params), leaf_names(grads)
        for name in in_params:
            if name not in in_grads:
                raise ValueError(f"grads: no gradient for the parameter {name!r}")
        for name in in_grads:
            if name not in in_params:
                raise ValueError(f"grads: {name!r} is not among the parameters")
        raise ValueError(
            "grads: the same leaves in another container: params are "
            f"{jax.tree.structure(params)}, grads are {jax.tree.structure(grads)}"
        )
    for index, (p, g) in enumerate(zip(jax.tree.leaves(params), jax.tree.leaves(grads), strict=True)):
        if jnp.shape(p) != jnp.shape(g):
            raise ValueError(
                f"grads: {leaf_names(params)[index]!r} has the shape {jnp.shape(g)}; its parameter has {jnp.shape(p)}"
            )
        if jnp.iscomplexobj(g) and not jnp.iscomplexobj(p):
            raise ValueError(
                f"grads: {leaf_names(params)[index]!r} is {jnp.result_type(g).name}; "
                f"its parameter is {jnp.result_type(p).name}"
            )
