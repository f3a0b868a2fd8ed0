"""A part of a checkpoint, put into a tree that may have another structure or other dtypes."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxsgd.migration.report import Entry, Report
from jaxsgd.models import is_module, merge_model, split_model
from jaxsgd.numerics import is_key
from jaxsgd.paths import named_leaves, nearest

__all__ = ["Filling", "fill", "nested", "open_tree", "recast"]


class Filling:
    """The leaf of a checkpoint for each leaf of a tree, before anything is read.

    Attributes:
      sources: name in the tree -> name in the checkpoint, of the leaves to read.
      reset, dropped: entries of the report.
    """

    def __init__(
        self, table: Mapping[str, dict], leaves: Mapping[str, Any], rename: Callable[[str], str] | None
    ) -> None:
        self.sources: dict[str, str] = {}
        self.reset: list[Entry] = []
        for name, leaf in leaves.items():
            source = name if rename is None else rename(name)
            if not isinstance(source, str):
                raise TypeError(f"rename({name!r}) returned {source!r}. Use a function from name to name")
            reason = _unfit(table.get(source), leaf)
            if reason is None:
                self.sources[name] = source
            else:
                self.reset.append(_entry(name, reason, leaf))
        used = set(self.sources.values())
        parts = {name.partition("/")[0] for name in leaves} if rename is None else {n.partition("/")[0] for n in used}
        self.dropped = [
            Entry(name, "no place in the new tree", *_parted(name), int(np.prod(row["shape"], dtype=int)))
            for name, row in table.items()
            if name not in used and name.partition("/")[0] in parts
        ]

    def check(self, leaves: Mapping[str, Any], partial: bool, where: str, nearest_in: Mapping[str, dict]) -> None:
        """
        Raises:
          ValueError: nothing fits; or without ``partial`` something does not; or a leaf that stays as it is, is only
            a shape.
        """
        if not self.sources:
            asked = next(iter(leaves), "")
            raise ValueError(f"{where}: no leaf of like fits, {asked!r} neither{nearest(asked, nearest_in)}")
        if not partial and (self.reset or self.dropped):
            lines = [f"  {entry.name}: {entry.reason}" for entry in [*self.reset, *self.dropped]]
            more = [f"  and {len(lines) - 8} more"] if len(lines) > 8 else []
            hint = "Use partial=True to keep the leaves that fit, with a report"
            raise ValueError("\n".join([f"{where}: the weights of another model", *lines[:8], *more, hint]))
        for entry in self.reset:
            if isinstance(leaves[entry.name], jax.ShapeDtypeStruct):
                raise ValueError(
                    f"like: {entry.name!r} is only a shape, and there is no value for it ({entry.reason}). "
                    "Use initialised arrays"
                )


def fill(filling: Filling, leaves: Mapping[str, Any], read: Mapping[str, Any], dtype: Any) -> tuple[dict, Report]:
    """The leaves of the tree, read or as they were, and the report.

    Raises:
      ValueError: a value does not fit into the dtype.
    """
    out, kept = {}, []
    for name, leaf in leaves.items():
        out[name] = leaf
        if name in filling.sources:
            source, value = filling.sources[name], read[name]
            out[name], how = recast(value, _wanted(leaf, dtype), name)
            kept.append(_entry(name, ", ".join(filter(None, [f"from {source}" * (source != name), how])), leaf))
        elif dtype is not None:
            out[name] = recast(leaf, _wanted(leaf, dtype), name)[0]
    return out, Report(tuple(kept), tuple(filling.reset), tuple(filling.dropped), ())


def recast(value: Any, dtype: Any, name: str) -> tuple[Any, str]:
    """The value in another dtype of its kind, and the words for it.

    Raises:
      ValueError: a finite value becomes infinite, or an integer another one.
    """
    was = getattr(value, "dtype", None)
    if was is None or dtype is None or was == dtype:
        return value, ""
    with np.errstate(over="ignore", invalid="ignore"):
        new = value.astype(dtype)
    fits = jnp.isfinite(new) | ~jnp.isfinite(value) if jnp.issubdtype(dtype, jnp.inexact) else new == value
    if not bool(jnp.all(fits)):
        raise ValueError(f"{name}: its values do not fit into {jnp.dtype(dtype)}. Use a wider dtype than that")
    return new, f"cast from {was} to {jnp.dtype(dtype)}"


def nested(leaves: Mapping[str, Any], part: str) -> Any:
    """Dicts in dicts: ``{"params/dense/kernel": x}`` as ``{"dense": {"kernel": x}}``."""
    if part in leaves:
        return leaves[part]
    out: dict[str, Any] = {}
    for name, leaf in leaves.items():
        *above, last = name.removeprefix(f"{part}/").split("/")
        node = out
        for key in above:
            node = node.setdefault(key, {})
        node[last] = leaf
    return out


def open_tree(like: Any, part: str) -> tuple[dict[str, Any], Callable[[dict[str, Any]], Any]]:
    """The leaves of ``like`` by their names in a checkpoint, and the way back. An `nnx.Module` has
    leaves for its parameters and for its other variables."""
    if is_module(like):
        graphdef, *trees = split_model(like)
        parts = dict(zip(("params", "model_state"), trees, strict=True))
    else:
        graphdef, parts = None, {part: like}
    leaves = {
        f"{part}/{name}" if name else part: leaf
        for part, tree in parts.items()
        for name, leaf in named_leaves(tree, "like").items()
    }

    def back(new: dict[str, Any]) -> Any:
        values = iter([new[name] for name in leaves])
        trees = [jax.tree.map(lambda _: next(values), tree) for tree in parts.values()]
        return trees[0] if graphdef is None else merge_model(graphdef, *trees)

    return leaves, back


def _wanted(leaf: Any, dtype: Any) -> Any:
    own = getattr(leaf, "dtype", None)
    floating = own is not None and not is_key(leaf) and jnp.issubdtype(own, jnp.floating)
    return dtype if dtype is not None and floating else own


def _unfit(row: Mapping[str, Any] | None, leaf: Any) -> str | None:
    """Why a saved leaf cannot be this one."""
    if row is None:
        return "new, the checkpoint has no such leaf"
    if tuple(row["shape"]) != np.shape(leaf):
        return f"the shape was {tuple(row['shape'])}, now it is {np.shape(leaf)}"
    now = leaf.dtype if hasattr(leaf, "dtype") else np.asarray(leaf).dtype
    if (row["impl"] is not None) or is_key(leaf):
        return None if row["dtype"] == str(now) else f"it was {row['dtype']}, now it is {now}"
    was = jnp.dtype(row["dtype"])
    for kind in (jnp.floating, jnp.complexfloating, jnp.integer, jnp.bool_):
        if jnp.issubdtype(was, kind) and jnp.issubdtype(now, kind):
            return None
    return f"it was {was}, now it is {now}"


def _parted(name: str) -> tuple[str, str]:
    part, _, parameter = name.partition("/")
    return part, parameter


def _entry(name: str, reason: str, leaf: Any) -> Entry:
    return Entry(name, reason, *_parted(name), int(np.size(leaf)))
