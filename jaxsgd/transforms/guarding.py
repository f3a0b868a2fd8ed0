"""A guard that skips the steps of bad batches, and reports them."""

from __future__ import annotations

import math
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from jaxsgd.numerics import check_count, is_float0, widest
from jaxsgd.paths import check_optimizer
from jaxsgd.transforms.clip import AxisName, norm_across
from jaxsgd.transforms.trees import find, keep_types, or_zeros, scalar, select

__all__ = ["GuardState", "Rolling", "guard", "guard_report", "resume"]


class Rolling(NamedTuple):
    """The rolling mean and variance of a number, over accepted and capped values.

    Attributes:
      count: int32 scalar, values seen.
      mean, variance: scalars, weighted exponentially.
    """

    count: jax.Array
    mean: jax.Array
    variance: jax.Array


class GuardState(NamedTuple):
    """The state of `guard`.

    Attributes:
      inner: the wrapped transformation's state after the last good step.
      skipped: int32 scalar, steps skipped in all.
      skipped_in_a_row: int32 scalar, steps skipped since the last good one.
      halted: bool scalar, whether the guard skips every step until `resume`.
      norms, losses: `Rolling` statistics of gradient norms and losses, for ``z_score``.
    """

    inner: Any
    skipped: jax.Array
    skipped_in_a_row: jax.Array
    halted: jax.Array
    norms: Rolling
    losses: Rolling


def guard(
    tx: optax.GradientTransformation,
    *,
    max_consecutive: int = 50,
    z_score: float | None = None,
    window: int = 128,
    axis_name: AxisName = None,
) -> optax.GradientTransformationExtraArgs:
    """Skip the steps of bad batches: ``guard(optax.chain(clip_by_global_norm(1.0), adamw(3e-4)))``.

    A step is bad if the gradients are not finite, or the loss, where it is passed: ``tx.update(..., value=loss)``.
    With ``z_score``, it is also bad if their norm or the loss is an outlier above its rolling mean. The updates of a
    bad step are zeros, and nothing in ``tx`` advances: no moment, no step count, no schedule. ``tx`` never sees the
    bad gradients, so that derivatives through the step stay finite.

    After ``max_consecutive`` bad steps in a row the guard halts: it skips every step, good ones too, and
    `guard_report` says so. The parameters stay those of the last good step, where `optax.apply_if_finite` lets the NaN
    in. `resume` ends the halt.

    An outlier counts in the statistics as the largest value that would have passed. So a single one changes little,
    and after a lasting change of level the threshold follows within a few steps. The standard deviation counts as at
    least a thousandth of the mean.

    Args:
      tx: the whole optimizer, clipping included.
      max_consecutive: bad steps in a row after which the guard halts. Default: 50.
      z_score: standard deviations above the mean from which a norm or a loss is an outlier, for example 6. Default:
        None, only values that are not finite are bad.
      window: steps of a flat window that would weigh the past alike. After half as many good steps the guard starts
        to call values outliers. Default: 128.
      axis_name: mesh axes inside `jax.shard_map` or `jax.pmap` whose devices decide together: norms are added up
        as in `norm_across`, losses averaged. Without it, devices with different gradients diverge. Default: None.

    Returns:
      A transformation with a `GuardState`. A norm whose square overflows float32 (from 1.8e19 on) is not finite.

    Raises:
      ValueError: ``max_consecutive`` below 1, ``z_score`` not above 0, ``window`` below 2; in the update, a
        ``value`` that is no real scalar, or a state that was made for parameters of other shapes.
    """
    check_count("max_consecutive", max_consecutive)
    check_count("window", window, 2)
    if z_score is not None and not z_score > 0:
        raise ValueError(f"z_score={z_score}: a number above 0 is needed, or None")
    check_optimizer(tx)
    inner = optax.with_extra_args_support(tx)
    log_decay = math.log((window - 1) / (window + 1))  # the mean age of a value is that of a flat window

    def init(params: Any) -> GuardState:
        dtype = widest(jnp.result_type(p) for p in jax.tree.leaves(params))
        counts = [jnp.zeros((), jnp.int32) for _ in range(4)]
        norm, loss = (Rolling(count, jnp.zeros((), dtype), jnp.zeros((), dtype)) for count in counts[2:])
        return GuardState(inner.init(params), counts[0], counts[1], jnp.zeros((), bool), norm, loss)

    def ceiling(stat: Rolling) -> jax.Array:
        if z_score is None:
            return jnp.full_like(stat.mean, jnp.inf)
        # Without the floor, the next value after a constant run is an outlier, and the threshold never moves.
        deviation = jnp.maximum(jnp.sqrt(stat.variance), 1e-3 * jnp.abs(stat.mean))
        return jnp.where(stat.count >= window // 2, stat.mean + z_score * deviation, jnp.inf)

    def add(stat: Rolling, x: jax.Array, good: jax.Array) -> Rolling:
        # The exact mean and variance under weights decay**age, without the cancellation of E[x^2] - E[x]^2.
        count = jnp.asarray(optax.safe_increment(stat.count))
        share = jnp.minimum(math.expm1(log_decay) / jnp.expm1(count.astype(x.dtype) * log_decay), 1)
        off = jnp.where(good, jnp.minimum(x, ceiling(stat)) - stat.mean, 0)
        new = Rolling(count, stat.mean + share * off, (1 - share) * (stat.variance + share * off * off))
        return jax.tree.map(lambda n, o: jnp.where(good, n, o), new, stat)

    def update(updates: Any, state: Any, params: Any = None, **extra_args: Any) -> tuple[Any, GuardState]:
        stats = {"norms": state.norms, "losses": state.losses}
        measures = {"norms": norm_across(updates, axis_name)}
        if extra_args.get("value") is not None:
            loss = scalar(extra_args["value"])
            measures["losses"] = loss if axis_name is None else jax.lax.pmean(loss, axis_name)
        measures = {name: x.astype(stats[name].mean.dtype) for name, x in measures.items()}
        finite = jnp.stack([jnp.isfinite(x) for x in measures.values()]).all()
        good = finite
        if z_score is not None:
            good &= jnp.stack([x <= ceiling(stats[name]) for name, x in measures.items()]).all()
            stats |= {name: add(stats[name], x, finite) for name, x in measures.items()}
        good &= ~state.halted

        def only_good(x: Any) -> jax.Array:
            return x if is_float0(x) else or_zeros(good, x)

        if "losses" in measures:
            extra_args["value"] = only_good(extra_args["value"])
        updates, new = inner.update(jax.tree.map(only_good, updates), state.inner, params, **extra_args)
        new = jax.tree.map(partial(select, good), keep_types(new, state.inner, "guard"), state.inner)
        in_a_row = jnp.where(good, 0, optax.safe_increment(state.skipped_in_a_row))
        skipped = jnp.where(good, state.skipped, optax.safe_increment(state.skipped))
        halted = state.halted | (in_a_row >= max_consecutive)
        return jax.tree.map(only_good, updates), GuardState(new, skipped, in_a_row, halted, **stats)

    return optax.GradientTransformationExtraArgs(init, update)


def guard_report(state: Any) -> dict[str, Any]:
    """Steps that the guard skipped, on the host: ``skipped``, ``skipped_in_a_row``, ``halted`` and a ``verdict``.

    Args:
      state: an optimizer state; a `GuardState` is found inside chains, partitions, wrappers and `nnx.Optimizer`.
        Where there are several, each name is prefixed with the path of its guard. Stacked states give lists.

    Returns:
      Two counts, a bool, and a sentence.

    Raises:
      ValueError: ``state`` holds no guard.
    """
    nodes = find(state, GuardState)
    out: dict[str, Any] = {}
    for path, node in nodes:
        skipped, row, halted = map(np.asarray, jax.device_get((node.skipped, node.skipped_in_a_row, node.halted)))
        if halted.any():
            verdict = (
                f"halted: {row.max()} steps in a row were skipped; the parameters are those of the last good "
                "step; look for the cause, then go on with resume(state)"
            )
        elif row.any():
            verdict = f"skipping: the last {row.max()} steps were bad"
        else:
            verdict = f"good: {skipped.max()} steps skipped so far"
        prefix = f"{path}/" if len(nodes) > 1 else ""
        values = {"skipped": skipped, "skipped_in_a_row": row, "halted": halted}
        out |= {prefix + name: value.tolist() for name, value in values.items()} | {prefix + "verdict": verdict}
    return out


def resume(state: Any) -> Any:
    """A copy of ``state`` in which no guard is halted; their statistics stay.

    Args:
      state: an optimizer state, as in `guard_report`. Flax variables stay variables.

    Raises:
      ValueError: ``state`` holds no guard.
    """
    find(state, GuardState)

    def go_on(node: Any) -> Any:
        if not isinstance(node, GuardState):
            return node
        row, halted = jax.tree.map(jnp.zeros_like, (node.skipped_in_a_row, node.halted))
        return node._replace(skipped_in_a_row=row, halted=halted)

    return jax.tree.map(go_on, state, is_leaf=lambda node: isinstance(node, GuardState))
