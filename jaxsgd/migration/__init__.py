"""An optimizer's state carried over an edit of the optimizer: kept where names agree, reset elsewhere."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

import jax
import numpy as np
import optax

from jaxsgd.forms import forms
from jaxsgd.migration.moving import Migration
from jaxsgd.migration.report import Entry, Report
from jaxsgd.paths import named_leaves

__all__ = ["Entry", "Report", "adopt", "migrate"]


def migrate(
    old_state: Any,
    tx: optax.GradientTransformation,
    params: Any,
    *,
    old_tx: optax.GradientTransformation | None = None,
    count: Literal["auto", "keep", "reset"] | int = "auto",
) -> tuple[Any, Report]:
    """Keep a state after an edit of its optimizer: ``state, report = migrate(old_state, tx, params)``.

    Use it when a clip or a guard was added, a schedule replaces a constant, or AdamW replaces Adam. Use it too when
    groups or storage changed, or when the run began with optax. In these cases ``tx.init`` would forget the moments,
    and a checkpoint does not fit.

    Leaves are matched by name. A leaf of a parameter (``"1/slots/mu/dense/kernel"``) goes to the same slot (mu) of the
    same parameter, wherever that is in the new state. A leaf without a counterpart, or of another shape, is as
    ``tx.init`` makes it. Two rules in a chain may each have a mu. Rules with the same slots are then matched in order
    if their numbers are equal, else by their full names. The others are reset. The report lists every case.

    **Storage.** Each slot is packed by the storage that the new optimizer has for it: `cast`, `int8` or your own.
    Values that were cast or packed by `int8` unpack by themselves; those of your own storage need ``old_tx``, and are
    reset without it. A value that does not fit into its new dtype is reset too.

    **Kinds.** A slot is reset where the new rule has another kind of slot under its name. With ``old_tx`` any other
    kind counts. Without it, a slot is reset where a sum of squares would become negative. Within a kind only names are
    compared. So the report cannot know that adam's nu is a mean of squares and adamax's nu a maximum. Nor does it know
    whether a rule sums its momentum or averages it. Switch between such rules with ``tx.init(params)``.

    **The count** of completed steps drives schedules and bias correction. The count of a rule continues if each of its
    slots was found for at least one parameter. A copy of the parameters (the slow weights of `lookahead`) may start at
    any step. Otherwise the whole rule is reset, with all its slots, to count 0. The reason is bias correction. It takes
    a moment at zero for an average of ``count`` steps, and a full moment at count 0 for an average of none. The errors
    are large with adam's b1=0.9, b2=0.999 and t=10,000. If both moments are zero, the first step is 3.2 times too long
    and the twelfth 6.6 times. It takes 1,750 steps to come within 10%. If only nu is zero, the first step is 32 times
    too long. With a full mu at count 0 it is 10 times too long. The first case concerns a single parameter that is
    reset (reshaped, no longer frozen) while the count continues: a short warmup helps.

    **Hyperparameters** are as ``tx`` says; one that was set or pinned by `with_hyper` is to be set again. Scalars of a
    rule (weight sums) go with its slots, those of other transformations (counters, norms, statistics) by name.

    Args:
      old_state: an optimizer state of jaxsgd or optax, in any tree; nested dicts and lists of arrays, as a checkpoint
        is read without its structure; or a dict from names to arrays.
      tx: the new optimizer.
      params: the parameters it is to train.
      old_tx: the optimizer that made ``old_state``. Default: unknown.
      count: ``"auto"``, as above; ``"keep"``: it always continues, with the slots that were found; ``"reset"``: it is 0
        for every rule, and the slots that were found stay; or a number of steps, for states that hold none
        (``optax.sgd`` with a constant learning rate). Default: ``"auto"``.

    Returns:
      ``(state, report)``: a state like ``tx.init(params)``, in structure, dtypes and sharding, which shares no memory
      with the old one; and a `Report`.

    Raises:
      ValueError: the old state holds no array, arrays that were donated, two leaves of one name, or leaves of other
        parameters only (another model); ``count`` is none of the above.
    """
    old = named_leaves(old_state, "old_state")
    _check_old(old)
    return adopt(old, tx.init(params), params, tx=tx, old_tx=old_tx, count=count)


def adopt(
    old_leaves: Mapping[str, Any],
    fresh_state: Any,
    params: Any,
    *,
    tx: optax.GradientTransformation | None = None,
    old_tx: optax.GradientTransformation | None = None,
    count: Literal["auto", "keep", "reset"] | int = "auto",
) -> tuple[Any, Report]:
    """`migrate` into a state that was made already: ``adopt(leaves, jaxsgd.init_sharded(tx, params, mesh), params)``.

    Args:
      old_leaves: names, as of `jaxsgd.paths.leaf_names`, to arrays.
      fresh_state: the new optimizer's state before its first step. Leaves that are not replaced are returned as they
        are.
      params: the parameters; only names, shapes and dtypes matter.
      tx: the new optimizer, whose storages pack the old values. Default: unknown; `cast` and `int8` need none.
      old_tx: the optimizer that made the old leaves. Default: unknown.
      count: as in `migrate`.

    Returns:
      ``(state, report)``. Each array has the sharding that it has in ``fresh_state``.

    Raises:
      ValueError: as in `migrate`.
    """
    if count not in ("auto", "keep", "reset") and (isinstance(count, bool | str) or not count >= 0):
        raise ValueError(f'count={count!r}: "auto", "keep", "reset" or a number of steps from 0 is needed')
    _check_old(old_leaves)
    count = count if isinstance(count, str) else int(count)
    was, now = (() if each is None else forms(each, params) for each in (old_tx, tx))
    moving = Migration(old_leaves, fresh_state, named_leaves(params, "params"), count, was, now)
    report = moving.run()
    return jax.tree.unflatten(jax.tree.structure(fresh_state), list(moving.out.values())), report


def _check_old(old: Mapping[str, Any]) -> None:
    if not old:
        raise ValueError("old_state: it holds no array, nothing to carry over; tx.init(params) makes a new state")
    for name, leaf in old.items():
        if not isinstance(leaf, int | float | complex | np.generic | np.ndarray | jax.Array):
            raise ValueError(f"old_state: {name!r} is a {type(leaf).__name__}; an array is needed")
        if isinstance(leaf, jax.Array) and leaf.is_deleted():
            raise ValueError(f"old_state: {name!r} was donated to a step; migrate the state that the step returned")
