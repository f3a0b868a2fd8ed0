"""Gradients of batches that do not fit: summed inside one step, or over several.

Floor 4.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.core import Tracer
from jax.typing import ArrayLike

from jaxsgd.batches import batch_size, check_divides
from jaxsgd.numerics import is_key, wide, widest, zeros
from jaxsgd.transforms.clip import AxisName, varying_over
from jaxsgd.transforms.guard import keep_types

__all__ = ["Accumulate", "AccumulateState", "accumulate", "accumulate_gradients"]


def weighted(weight: jax.Array, x: Any) -> jax.Array:
    """``weight * x``, widened; 0 where the weight is, even if ``x`` is then NaN (the mean of no tokens)."""
    x = wide(x)
    scale = weight.astype(x.dtype).reshape(weight.shape + (1,) * (x.ndim - weight.ndim))
    return jnp.where(scale.real > 0, scale * x, jnp.zeros_like(x))


def over(total: jax.Array, weight: jax.Array) -> jax.Array:
    """``total / weight``; ``total``, which is then 0, where no weight was collected."""
    return total / jnp.where(weight > 0, weight, 1).astype(total.dtype)


# -- inside one step -------------------------------------------------------------------------------


def accumulate_gradients(
    loss_fn: Callable[..., Any],
    steps: int,
    *,
    weight: str | Callable[[Any], ArrayLike] | None = None,
    axis_name: AxisName = None,
) -> Callable[..., tuple[tuple[jax.Array, Any], Any]]:
    """The loss and gradient of a batch in ``steps`` microbatches, in the memory of one.

    ``(loss, aux), grads = accumulate_gradients(loss_fn, 8, weight="tokens")(params, batch, key)`` gives what
    ``jax.value_and_grad(loss_fn, has_aux=True)`` gives for the whole batch: a `jax.lax.scan` adds up the
    gradients in at least float32. The optimizer then runs once.

    Args:
      loss_fn: ``loss_fn(params, batch, key) -> loss`` or ``(loss, aux)``, the loss being a mean over a microbatch.
      steps: the number of microbatches. Arrays of the batch are split on the first axis, which it must divide;
        scalars go to every microbatch. Microbatch i holds the examples i, i + steps, ..., so that a batch which is
        sharded over devices is split without moving anything between them.
      weight: by what the mean of a microbatch counts. ``"tokens"``: by ``aux["tokens"]``, of the whole batch then;
        a function ``weight(batch) -> scalar``; None: all the same. A microbatch of weight 0 counts nothing, even
        where its loss is NaN. If all weigh 0, loss and gradients are 0.
      axis_name: mesh axes inside `jax.shard_map` or `jax.pmap` along which the batch is sharded and ``params`` are
        replicated: loss, gradients and scalars in aux are then of the whole batch, reduced once at the end. Without
        it they are this device's own; nothing is summed behind your back. Not needed under `jax.jit`.

    Returns:
      A function ``(params, batch, key=None) -> ((loss, aux), grads)``. Gradients have the shapes of ``params``, in
      float32 for narrower ones. In aux, floating scalars are weighted means, integer scalars sums; all other leaves
      are stacked, with a new first axis of length ``steps``. ``key`` is split between the microbatches.

    Raises:
      ValueError: ``steps`` below 1; the batch cannot be split (the nearest sizes are named); the loss is no
        scalar; aux lacks the weight.
    """
    if steps < 1:
        raise ValueError(f"steps={steps}: at least one microbatch is needed")

    def stateless(params: Any, carried: Any, batch: Any, key: Any) -> tuple[jax.Array, tuple[Any, Any]]:
        out = loss_fn(params, batch, key)
        loss, aux = out if isinstance(out, tuple) else (out, None)
        return loss, (carried, aux)

    gradients = carrying_gradients(stateless, steps, weight=weight, axis_name=axis_name)

    def whole(params: Any, batch: Any, key: Any = None) -> tuple[tuple[jax.Array, Any], Any]:
        (loss, (_, aux)), grads = gradients(params, None, batch, key)
        if steps == 1:  # stacked all the same, so that aux is no other for one microbatch
            aux = jax.tree.map(lambda x: x[None] if jnp.ndim(x) > 0 else x, aux)
        return (wide(loss), aux), jax.tree.map(wide, grads)

    return whole


def carrying_gradients(
    loss_fn: Callable[..., Any], steps: int, *, weight: str | Callable[[Any], ArrayLike] | None, axis_name: AxisName
) -> Callable[..., tuple[tuple[jax.Array, tuple[Any, Any]], Any]]:
    """`accumulate_gradients` of a loss that hands something on, such as batch statistics.

    ``loss_fn(params, carried, batch, key) -> (loss, (carried, aux))``; each microbatch gets what the one before
    carried. Along ``axis_name`` its floating leaves are averaged at the end, of all others the largest is taken. One
    microbatch on one device is not scanned: its gradients are those of `jax.value_and_grad`, dtypes included.
    """

    def terms(params: Any, carried: Any, batch: Any, key: Any) -> tuple[jax.Array, tuple[jax.Array, Any, Any]]:
        loss, (carried, aux) = loss_fn(params, carried, batch, key)
        if jnp.shape(loss) != ():
            raise ValueError(f"loss_fn: the loss has the shape {jnp.shape(loss)}; a scalar is needed (its mean?)")
        given: Any = 1
        if weight is not None:
            given = weight(batch) if callable(weight) else _entry(aux, weight)
        return loss, (jnp.asarray(given).astype(jnp.float32), carried, aux)

    differentiate = jax.value_and_grad(terms, has_aux=True)

    def total_over_devices(x: jax.Array) -> jax.Array:
        return x if axis_name is None else jax.lax.psum(x, axis_name)

    def same_on_all(x: jax.Array) -> jax.Array:
        if axis_name is None or is_key(x):
            return x
        return (jax.lax.pmean if jnp.issubdtype(x.dtype, jnp.inexact) else jax.lax.pmax)(x, axis_name)

    def whole(params: Any, carried: Any, batch: Any, key: Any = None) -> tuple[tuple[jax.Array, tuple[Any, Any]], Any]:
        params, carried = _local((params, carried), batch, key)
        if steps == 1:
            (loss, (w, carried, aux)), grads = differentiate(params, carried, batch, key)
            if weight is None and axis_name is None:
                return (loss, (carried, aux)), grads
            total = jax.tree.map(lambda g: weighted(w, g), grads)
            losses, weights = loss[None], w[None]
            scalar = jax.tree.map(lambda x: jnp.ndim(x) == 0, aux)
            aux = jax.tree.map(lambda x: jnp.asarray(x)[None] if jnp.ndim(x) == 0 else x, aux)
        else:
            keys = None if key is None else jax.random.split(key, steps)

            def body(so_far: Any, now: Any) -> tuple[Any, Any]:
                total, carried = so_far
                (loss, (w, carried, aux)), grads = differentiate(params, carried, *now)
                return (jax.tree.map(lambda t, g: t + weighted(w, g), total, grads), carried), (loss, w, aux)

            start = (jax.tree.map(zeros, params), carried)
            (total, carried), (losses, weights, aux) = jax.lax.scan(body, start, (_split(batch, steps), keys))
            scalar = jax.tree.map(lambda x: x.ndim == 1, aux)
        weight_sum = total_over_devices(jnp.sum(jnp.maximum(weights, 0)))

        def mean(x: jax.Array) -> jax.Array:
            return over(total_over_devices(x), weight_sum)

        def summary(x: jax.Array, scalar: bool = True) -> jax.Array:
            if scalar and jnp.issubdtype(x.dtype, jnp.floating):
                return mean(jnp.sum(weighted(weights, x)))
            if scalar and jnp.issubdtype(x.dtype, jnp.integer):
                return total_over_devices(jnp.sum(x, dtype=x.dtype))
            return x

        aux = jax.tree.map(summary, aux, scalar)
        if isinstance(weight, str):
            aux = {**aux, weight: weight_sum if jnp.issubdtype(aux[weight].dtype, jnp.floating) else aux[weight]}
        return (summary(losses), (jax.tree.map(same_on_all, carried), aux)), jax.tree.map(mean, total)

    return whole


def _entry(aux: Any, weight: str) -> Any:
    if not isinstance(aux, Mapping) or weight not in aux:
        held = sorted(aux) if isinstance(aux, Mapping) else type(aux).__name__
        raise ValueError(f"weight={weight!r}: the loss must return (loss, aux) with aux[{weight!r}]; aux is {held}")
    return aux[weight]


def _split(batch: Any, steps: int) -> Any:
    """Arrays as ``(steps, size / steps, ...)``, scalars repeated."""
    if batch_size(batch) is None:
        raise ValueError("batch: it holds no array to split into microbatches")
    check_divides(batch, steps, f"steps={steps}")

    def cut(x: Any) -> jax.Array:
        x = jnp.asarray(x)
        if x.ndim == 0:
            return jnp.broadcast_to(x, (steps,))
        return jnp.moveaxis(x.reshape(x.shape[0] // steps, steps, *x.shape[1:]), 1, 0)

    return jax.tree.map(cut, batch)


def _local(tree: Any, batch: Any, key: Any) -> Any:
    """``tree`` as each device's own inside `jax.shard_map`, else every microbatch would sum over devices."""
    axes = frozenset().union(*(varying_over(jnp.asarray(x)) for x in jax.tree.leaves((tree, batch, key))))
    # One cast for each leaf: those that vary already are refused.
    return jax.tree.map(
        lambda p: jax.lax.pcast(p, tuple(sorted(axes - varying_over(jnp.asarray(p)))), to="varying"), tree
    )


# -- over several steps ----------------------------------------------------------------------------


class AccumulateState(NamedTuple):
    """What `accumulate` remembers.

    Attributes:
      inner: the wrapped transformation's state.
      step: int32 scalar, microbatches in the window so far.
      weight: float32 scalar (float64 where a parameter is), what they weigh.
      total: tree like params in at least float32, their gradients' weighted sum.
    """

    inner: Any
    step: jax.Array
    weight: jax.Array
    total: Any


class Accumulate(optax.GradientTransformationExtraArgs):
    """A transformation over windows of steps, made by `accumulate`."""

    def flush(self, state: AccumulateState, params: Any = None, **extra_args: Any) -> tuple[Any, AccumulateState]:
        """End a partial window, such as the last of a training: ``updates, state = tx.flush(state, params)``.

        The updates are zeros, and the state stays as it is, where the window is empty.
        """
        return self.update.__self__.flush(state, params, **extra_args)  # type: ignore[attr-defined]


def accumulate(tx: optax.GradientTransformation, every: int) -> Accumulate:
    """Run ``tx`` once in ``every`` steps, on the weighted mean of their gradients.

    Between, updates are zeros. Where the whole batch is at hand, `accumulate_gradients` does it within one step.

    Unlike with `optax.MultiSteps`, ``tx`` runs only at the end of a window (Muon costs nothing between);
    an inf spoils its own window, not all that follow (and not that one, with ``accumulate(guard(tx), every)``);
    microbatches may weigh differently, ``tx.update(grads, state, params, weight=tokens)``; and
    ``tx.flush(state, params)`` ends a partial window.

    Args:
      tx: the whole optimizer, clipping included. It gets the mean in at least float32, and further extra
        arguments as they are in the window's last step.
      every: steps in a window.

    Returns:
      An `Accumulate`, which is an `optax.GradientTransformationExtraArgs`, with an `AccumulateState`. Updates are in
      the dtypes of ``params`` (of the gradients without them). A weight of 0 counts nothing, even with NaN gradients;
      ``tx`` rests if the whole window weighs 0.

    Raises:
      ValueError: ``every`` below 1.
    """
    if every < 1:
        raise ValueError(f"every={every}: at least one step is needed")
    bound = _Accumulate(optax.with_extra_args_support(tx), every)
    return Accumulate(bound.init, bound.update)


@dataclass(frozen=True)
class _Accumulate:
    tx: optax.GradientTransformationExtraArgs
    every: int

    def init(self, params: Any) -> AccumulateState:
        weight = jnp.zeros((), widest(jnp.result_type(p) for p in jax.tree.leaves(params)))
        return AccumulateState(self.tx.init(params), jnp.zeros((), jnp.int32), weight, jax.tree.map(zeros, params))

    def update(
        self, updates: Any, state: Any, params: Any = None, *, weight: ArrayLike = 1.0, **extra_args: Any
    ) -> tuple[Any, AccumulateState]:
        w = jnp.maximum(jnp.asarray(weight).astype(state.weight.dtype), 0)
        total = jax.tree.map(lambda t, g: t + weighted(w, g).astype(t.dtype), state.total, updates)
        state = AccumulateState(state.inner, state.step + 1, state.weight + w, total)
        return self._end(state.step >= self.every, state, updates if params is None else params, params, extra_args)

    def flush(self, state: AccumulateState, params: Any = None, **extra_args: Any) -> tuple[Any, AccumulateState]:
        return self._end(state.step > 0, state, state.total if params is None else params, params, extra_args)

    def _end(self, due: Any, state: AccumulateState, like: Any, params: Any, extra: Any) -> tuple[Any, AccumulateState]:
        """The inner update where the window is ``due``, with updates in the dtypes of ``like``."""

        def run() -> tuple[Any, Any]:
            mean = jax.tree.map(lambda t: over(t, state.weight), state.total)
            updates, inner = self.tx.update(mean, state.inner, params, **extra)
            return keep_types(updates, like), keep_types(inner, state.inner)

        def hold() -> tuple[Any, Any]:
            return keep_types(jax.tree.map(jnp.zeros_like, state.total), like), state.inner

        now = due & (state.weight > 0)
        updates, inner = jax.lax.cond(now, run, hold) if isinstance(now, Tracer) else (run if now else hold)()
        # Reset by choice: an inf times 0 would stay, as NaN, for ever.
        fresh = jax.tree.map(lambda x: jnp.where(due, jnp.zeros_like(x), x), state._replace(inner=None))
        return updates, fresh._replace(inner=inner)
