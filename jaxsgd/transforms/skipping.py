"""Steps that a transformation skips, as its state tells them."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from jaxsgd.numerics import is_key
from jaxsgd.paths import leaf_paths
from jaxsgd.state import plain

__all__ = ["kept_where_skipped", "skipped_now", "skipped_steps"]

COUNTERS = ("skipped", "total_notfinite")
"""Fields of a state that count skipped steps: of `jaxsgd.guard` or a transformation of your own, of
`optax.apply_if_finite`."""
FLAG = "should_skip"
"""The entry of `optax.MultiSteps` that says whether the last step was skipped."""


def _by_path(state: Any) -> list[tuple[tuple[str, ...], str, jax.Array]]:
    """The entries of a state that count skipped steps or flag one: path, name and value."""
    state, out = plain(state), []
    flat = jax.tree_util.tree_flatten_with_path(state)[0]
    for names, (path, leaf) in zip(leaf_paths(state), flat, strict=True):
        if not path or jnp.shape(leaf) != ():
            continue
        last, dtype = path[-1], jnp.result_type(leaf)
        if isinstance(last, jax.tree_util.GetAttrKey) and last.name in COUNTERS and jnp.issubdtype(dtype, jnp.integer):
            out.append((names, last.name, leaf))
        elif isinstance(last, jax.tree_util.DictKey) and last.key == FLAG and dtype == jnp.bool_:
            out.append((names, FLAG, leaf))
    return out


def skipped_now(old: Any, new: Any) -> jax.Array | None:
    """Whether the update from one optimizer state to the next was skipped, a bool scalar; None if neither can say.

    It was skipped if a count of skipped steps has risen in any part of the state. Such a count is an int32 scalar in a
    field ``skipped`` of a named tuple or dataclass, or ``total_notfinite`` of `optax.apply_if_finite`.
    `optax.MultiSteps` has its own sign.
    """
    said = []
    for (_, name, before), (_, _, after) in zip(_by_path(old), _by_path(new), strict=True):
        said.append(after if name == FLAG else after > before)
    return jnp.stack(said).any() if said else None


def kept_where_skipped(skipped: jax.Array, old: Any, new: Any) -> Any:
    """``new``, or ``old`` where the step was skipped or made a finite number of ``old`` not finite."""

    def is_bad(new: Any, old: Any) -> jax.Array | None:
        if is_key(new) or not jnp.issubdtype(jnp.result_type(new), jnp.inexact):
            return None
        return jnp.any(jnp.isfinite(old) & ~jnp.isfinite(new))

    bad = jax.tree.leaves(jax.tree.map(is_bad, new, old))
    skipped = jnp.stack([skipped, *bad]).any()

    def keep(new: Any, old: Any) -> Any:
        return new if is_key(new) else jnp.where(skipped, jnp.asarray(old).astype(new.dtype), new)

    return jax.tree.map(keep, new, old)


def skipped_steps(state: Any) -> dict[str, jax.Array]:
    """``{"skipped": steps skipped so far}`` on the device, for the transformations of ``state`` that count them.

    Where there are several, each name is prefixed with the path of its state, as in `jaxsgd.guard_report`.
    """
    counts = [(path, count) for path, name, count in _by_path(state) if name != FLAG]
    return {"/".join((*path[:-1], "skipped") if len(counts) > 1 else ("skipped",)): count for path, count in counts}
