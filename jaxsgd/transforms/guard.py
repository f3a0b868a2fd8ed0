"""A guard against bad batches: the step is skipped, wholly.

Floor 4.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from jaxsgd.numerics import widest
from jaxsgd.paths import path_name
from jaxsgd.transforms.clip import AxisName, norm_across

__all__ = ["GuardState", "Rolling", "find", "guard", "guard_report", "keep_types", "resume"]


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
    """What `guard` remembers.

    Attributes:
      inner: the wrapped transformation's state, as of the last good step.
      skipped: int32 scalar, steps skipped in all.
      skipped_in_a_row: int32 scalar, steps skipped since the last good one.
      halted: bool scalar, whether the guard has given up until `resume`.
      norms, losses: `Rolling` statistics of both, which only ``z_score`` uses.
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

    A step is bad where the gradients, or the loss if it is given (``tx.update(..., value=loss)``), are not
    finite, and, with ``z_score``, where their norm or the loss lies more than so many standard deviations
    above its rolling mean. Then the updates are zeros, and nothing in ``tx`` advances: neither moments, nor the
    step count, nor schedules. ``tx`` never sees the bad gradients, so no NaN survives in a derivative either.

    Unlike `optax.apply_if_finite` the guard never lets a NaN in. After ``max_consecutive`` bad steps in a row it
    halts: it skips every step, good ones too, so that the parameters stay those of the last good step, and
    `guard_report` says so. `resume` lets it go on.

    An outlier counts in the statistics as the largest value that would have passed: one of them moves little, while
    after a lasting change of level the threshold follows within a few steps. The standard deviation is taken to be a
    thousandth of the mean at least.

    Args:
      tx: what to guard; the whole optimizer, clipping included.
      max_consecutive: bad steps in a row after which to halt.
      z_score: standard deviations above the mean from which a norm or a loss is an outlier, for example 6; None
        looks for non-finite values only.
      window: the rolling statistics weigh the past like a mean over so many steps; half as many good steps must
        have passed before anything is called an outlier.
      axis_name: mesh axes inside `jax.shard_map` or `jax.pmap` whose devices decide together: norms are added up
        as in `norm_across`, losses averaged. Without it, devices with different gradients part.

    Returns:
      A transformation with a `GuardState`. Norms whose squares overflow float32 (from 1.8e19 on) count as
      not finite.

    Raises:
      ValueError: ``max_consecutive`` below 1, ``z_score`` not above 0, ``window`` below 2; in the update, a
        ``value`` that is no scalar.
    """
    if max_consecutive < 1:
        raise ValueError(f"max_consecutive={max_consecutive}: at least 1 is needed")
    if z_score is not None and not z_score > 0:
        raise ValueError(f"z_score={z_score}: a number above 0 is needed, or None")
    if window < 2:
        raise ValueError(f"window={window}: at least 2 steps are needed")
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
        seen = {"norms": norm_across(updates, axis_name)}
        if extra_args.get("value") is not None:
            loss = jnp.asarray(extra_args["value"])
            if loss.shape != ():
                raise ValueError(f"value: the loss has the shape {loss.shape}; a scalar is needed")
            seen["losses"] = loss if axis_name is None else jax.lax.pmean(loss, axis_name)
        seen = {name: x.astype(stats[name].mean.dtype) for name, x in seen.items()}
        finite = jnp.stack([jnp.isfinite(x) for x in seen.values()]).all()
        good = finite
        if z_score is not None:
            good &= jnp.stack([x <= ceiling(stats[name]) for name, x in seen.items()]).all()
            stats |= {name: add(stats[name], x, finite) for name, x in seen.items()}
        good &= ~state.halted

        def only_good(x: Any) -> jax.Array:
            return jnp.where(good, x, jnp.zeros_like(x))

        if "losses" in seen:
            extra_args["value"] = only_good(extra_args["value"])
        updates, advanced = inner.update(jax.tree.map(only_good, updates), state.inner, params, **extra_args)
        held = jax.tree.map(lambda n, o: jnp.where(good, n, o), keep_types(advanced, state.inner), state.inner)
        in_a_row = jnp.where(good, 0, optax.safe_increment(state.skipped_in_a_row))
        skipped = jnp.where(good, state.skipped, optax.safe_increment(state.skipped))
        halted = state.halted | (in_a_row >= max_consecutive)
        return jax.tree.map(only_good, updates), GuardState(held, skipped, in_a_row, halted, **stats)

    return optax.GradientTransformationExtraArgs(init, update)


def keep_types(new: Any, old: Any) -> Any:
    """``new`` in the dtypes of ``old``: some transformations change their state's dtypes with the gradients'."""
    return jax.tree.map(
        lambda n, o: n if jnp.result_type(n) == jnp.result_type(o) else jnp.astype(n, o.dtype), new, old
    )


def find(tree: Any, kind: type) -> list[tuple[str, Any]]:
    """Every node of type ``kind`` in ``tree`` with its path.

    Raises:
      ValueError: there is none.
    """
    flat = jax.tree_util.tree_flatten_with_path(tree, is_leaf=lambda node: isinstance(node, kind))[0]
    found = [(path_name(path), node) for path, node in flat if isinstance(node, kind)]
    if not found:
        raise ValueError(f"state: no {kind.__name__} in {jax.tree.structure(tree)}")
    return found


def guard_report(state: Any) -> dict[str, Any]:
    """What the guard did, on the host: ``skipped``, ``skipped_in_a_row``, ``halted`` and a ``verdict`` in words.

    Args:
      state: an optimizer state; a `GuardState` is found inside chains, partitions and wrappers. Where there are
        several, each name is prefixed with the path of its guard. Stacked states give lists.

    Raises:
      ValueError: ``state`` holds no guard.
    """
    found = find(state, GuardState)
    out: dict[str, Any] = {}
    for path, node in found:
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
        prefix = f"{path}/" if len(found) > 1 else ""
        values = {"skipped": skipped, "skipped_in_a_row": row, "halted": halted}
        out |= {prefix + name: value.tolist() for name, value in values.items()} | {prefix + "verdict": verdict}
    return out


def skipped_steps(state: Any) -> dict[str, jax.Array]:
    """``{"skipped": steps that the guard of ``state`` skipped so far}`` on the device; nothing without one guard."""
    nodes = jax.tree.leaves(state, is_leaf=lambda node: isinstance(node, GuardState))
    guards = [node for node in nodes if isinstance(node, GuardState)]
    return {"skipped": guards[0].skipped} if len(guards) == 1 else {}


def resume(state: Any) -> Any:
    """A copy of ``state`` whose guards go on after a halt, with their statistics as they were.

    Raises:
      ValueError: ``state`` holds no guard.
    """
    find(state, GuardState)

    def go_on(node: Any) -> Any:
        if not isinstance(node, GuardState):
            return node
        return node._replace(skipped_in_a_row=jnp.zeros_like(node.skipped_in_a_row), halted=jnp.zeros_like(node.halted))

    return jax.tree.map(go_on, state, is_leaf=lambda node: isinstance(node, GuardState))
