"""Gradient accumulation for batches that do not fit: within one step, or over several."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.core import Tracer
from jax.typing import ArrayLike

from jaxsgd.batches import as_arrays, batch_size, check_divides
from jaxsgd.loss import call_loss, with_all_arguments
from jaxsgd.numerics import check_count, differentiable, is_float0, is_key, wide, widest, zeros
from jaxsgd.paths import check_optimizer, check_params
from jaxsgd.state import plain
from jaxsgd.transforms.clip import AxisName, varying_over
from jaxsgd.transforms.trees import check_like, is_inexact, keep_types, or_zeros, scalar, update_types

__all__ = ["Accumulate", "AccumulateState", "accumulate", "accumulate_gradients"]


@jax.jit
def weighted(weight: jax.Array, x: Any) -> jax.Array:
    """``weight * x``, widened; 0 where the weight is 0, even if ``x`` is NaN there (the mean of no tokens)."""
    x = wide(x)
    scale = weight.astype(x.dtype).reshape(weight.shape + (1,) * (x.ndim - weight.ndim))
    return jnp.where(scale.real > 0, scale * x, jnp.zeros_like(x))


@jax.jit
def over(total: jax.Array, weight: jax.Array) -> jax.Array:
    """``total / weight``; ``total``, which is 0 then, where the weights add up to 0."""
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

    ``(loss, aux), grads = accumulate_gradients(loss_fn, 8, weight="tokens")(params, batch, key)`` gives the same as
    ``jax.value_and_grad(loss_fn, has_aux=True)`` on the whole batch. A `jax.lax.scan` adds up the gradients in at
    least float32. The optimizer then runs once.

    Args:
      loss_fn: ``loss_fn(params, batch, key) -> loss`` or ``(loss, aux)``, or of ``(params, batch)``; a mean over a
        microbatch. With a model state: ``loss_fn(params, model_state, batch, key) -> (loss, (model_state, aux))``. Each
        microbatch gets the state of the one before.
      steps: the number of microbatches. It must divide the first axis of the batch's arrays; scalars go to every
        microbatch. Microbatch i has the examples i, i + steps, ..., so that splitting a sharded batch moves nothing
        between devices.
      weight: the weight of a microbatch in the mean. ``"tokens"``: ``aux["tokens"]``, which becomes that of the whole
        batch; or a function ``weight(batch) -> scalar``. A microbatch of weight 0 does not count, even if its loss is
        NaN. If all weigh 0, loss and gradients are 0. Default: None, equal weights.
      axis_name: mesh axes inside `jax.shard_map` or `jax.pmap` along which the batch is sharded and ``params`` are
        replicated. Loss, gradients and scalars in aux are then of the whole batch, reduced once at the end. Without
        it they are each device's own. Not needed under `jax.jit`. Default: None.

    Returns:
      A function ``(params, batch, key=None, model_state=None) -> ((loss, aux), grads)``; with a model state
      ``((loss, (model_state, aux)), grads)``. Gradients have the shapes of ``params``, in
      float32 for narrower ones; those of integers are float0 zeros. As in `jax.grad`, gradients of complex parameters
      are not conjugated. In aux, floating scalars are weighted means, integer scalars sums; all other leaves are
      stacked along a new first axis of length ``steps``. ``key`` is split between the microbatches.

    Raises:
      ValueError: ``steps`` below 1; the batch cannot be split (the error names the nearest sizes); the loss is no
        scalar; aux lacks the weight.
    """
    check_count("steps", steps)

    def run(params: Any, batch: Any, key: Any = None, model_state: Any = None) -> tuple[tuple[jax.Array, Any], Any]:
        batch = as_arrays(batch)
        leaves, whole = differentiable(params)
        whole_loss = with_all_arguments(loss_fn, model_state is not None)

        def carrying(leaves: Any, carried: Any, batch: Any, key: Any) -> tuple[jax.Array, tuple[Any, Any]]:
            return call_loss(whole_loss, None, whole(leaves), carried, batch, key)

        gradients = carrying_gradients(carrying, steps, weight=weight, axis_name=axis_name)
        (loss, (carried, aux)), grads = gradients(leaves, model_state, batch, key)
        if steps == 1:  # stacked too, so that aux has the same form for one microbatch
            aux = jax.tree.map(lambda x: x[None] if jnp.ndim(x) > 0 else x, aux)
        aux = aux if model_state is None else (carried, aux)
        return (wide(loss), aux), whole(map(wide, grads), lambda p: np.zeros(jnp.shape(p), jax.dtypes.float0))

    return run


def carrying_gradients(
    loss_fn: Callable[..., Any], steps: int, *, weight: str | Callable[[Any], ArrayLike] | None, axis_name: AxisName
) -> Callable[..., tuple[tuple[jax.Array, tuple[Any, Any]], Any]]:
    """`accumulate_gradients` of a loss that carries something on, such as batch statistics.

    ``loss_fn(params, carried, batch, key) -> (loss, (carried, aux))``; each microbatch gets ``carried`` of the one
    before. Along ``axis_name`` its floating leaves are averaged at the end; of all others the largest counts. One
    microbatch on one device is not scanned: its gradients are those of `jax.value_and_grad`, dtypes included.
    """

    def terms(params: Any, carried: Any, batch: Any, key: Any) -> tuple[jax.Array, tuple[jax.Array, Any, Any]]:
        loss, (carried, aux) = loss_fn(params, carried, batch, key)
        if jnp.shape(loss) != ():
            raise ValueError(f"loss_fn: the loss has the shape {jnp.shape(loss)}; a scalar is needed (its mean?)")
        return loss, (weight_of(weight, batch, aux), carried, aux)

    differentiate = jax.value_and_grad(terms, has_aux=True)

    def total_over_devices(x: jax.Array) -> jax.Array:
        return x if axis_name is None else jax.lax.psum(x, axis_name)

    def counted(w: jax.Array, new: Any, old: Any) -> Any:
        """What a microbatch carries on: nothing if it has no weight."""
        if weight is None:
            return new
        return jax.tree.map(lambda n, o: n if is_key(n) else jnp.where(w > 0, n, jnp.asarray(o, n.dtype)), new, old)

    def same_on_all(x: jax.Array) -> jax.Array:
        if axis_name is None or is_key(x):
            return x
        return (jax.lax.pmean if jnp.issubdtype(x.dtype, jnp.inexact) else jax.lax.pmax)(x, axis_name)

    def whole(params: Any, carried: Any, batch: Any, key: Any = None) -> tuple[tuple[jax.Array, tuple[Any, Any]], Any]:
        params, carried = _local((params, carried), batch, key)
        if steps == 1:
            before = carried
            (loss, (w, carried, aux)), grads = differentiate(params, carried, batch, key)
            if weight is None and axis_name is None:
                return (loss, (carried, aux)), grads
            carried = counted(w, carried, before)
            total = jax.tree.map(partial(weighted, w), grads)
            losses, weights = loss[None], w[None]
            scalar = jax.tree.map(lambda x: jnp.ndim(x) == 0, aux)
            aux = jax.tree.map(lambda x: jnp.asarray(x)[None] if jnp.ndim(x) == 0 else x, aux)
        else:
            keys = None if key is None else jax.random.split(key, steps)

            def body(so_far: Any, now: Any) -> tuple[Any, Any]:
                total, before = so_far
                (loss, (w, carried, aux)), grads = differentiate(params, before, *now)
                total = jax.tree.map(lambda t, g: t + weighted(w, g), total, grads)
                return (total, counted(w, carried, before)), (loss, w, aux)

            start = (jax.tree.map(zeros, params), carried)
            (total, carried), (losses, weights, aux) = jax.lax.scan(
                body, start, (split_microbatches(batch, steps), keys)
            )
            scalar = jax.tree.map(lambda x: x.ndim == 1, aux)
        weight_sum = total_over_devices(jnp.sum(jnp.maximum(weights, 0)))

        def mean(x: jax.Array) -> jax.Array:
            return over(total_over_devices(x), weight_sum)

        def summary(x: jax.Array, scalar: bool = True) -> jax.Array:
            if scalar and jnp.issubdtype(x.dtype, jnp.floating):
                return mean(jnp.sum(weighted(weights, x)))
            if scalar and jnp.issubdtype(x.dtype, jnp.integer):
                return total_over_devices(jnp.sum(x, dtype=x.dtype))
            return x[0] if scalar and steps == 1 else x

        aux = jax.tree.map(summary, aux, scalar)
        if isinstance(weight, str):
            aux = {**aux, weight: weight_sum if jnp.issubdtype(aux[weight].dtype, jnp.floating) else aux[weight]}
        return (summary(losses), (jax.tree.map(same_on_all, carried), aux)), jax.tree.map(mean, total)

    return whole


def weight_of(weight: str | Callable[[Any], Any] | None, batch: Any, aux: Any) -> jax.Array:
    """The weight of a microbatch, a float32 scalar: 1, a function of the batch, or an entry of ``aux``.

    Raises:
      ValueError: it is no scalar, or ``aux`` lacks the entry.
    """
    if weight is None:
        return jnp.ones((), jnp.float32)
    size = weight(batch) if callable(weight) else _entry(aux, weight)
    if jnp.shape(size) != ():
        raise ValueError(f"weight: it has the shape {jnp.shape(size)}; a scalar is needed. Use its sum")
    return jnp.asarray(size).astype(jnp.float32)


def _entry(aux: Any, weight: str) -> Any:
    if not isinstance(aux, Mapping) or weight not in aux:
        names = sorted(aux) if isinstance(aux, Mapping) else type(aux).__name__
        raise ValueError(f"weight={weight!r}: the loss must return (loss, aux) with aux[{weight!r}]; aux is {names}")
    return aux[weight]


def split_microbatches(batch: Any, steps: int) -> Any:
    """Arrays as ``(steps, size / steps, ...)``, scalars repeated."""
    if batch_size(batch) is None:
        raise ValueError("batch: it has no array to split into microbatches")
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
    """The state of `accumulate`.

    Attributes:
      inner: the wrapped transformation's state.
      step: int32 scalar, microbatches in the window so far.
      weight: float32 scalar (float64 where a parameter is), the sum of their weights.
      total: tree like params in at least float32, the weighted sum of their gradients; zeros for integers.
    """

    inner: Any
    step: jax.Array
    weight: jax.Array
    total: Any


class Accumulate(optax.GradientTransformationExtraArgs):
    """A transformation over windows of steps, made by `accumulate`.

    Attributes:
      tx: the wrapped transformation.
      every: steps in a window.
    """

    # As in `jaxsgd.lift.Bound`: a pair of functions, so that it can be taken apart and put together.
    @property
    def tx(self) -> optax.GradientTransformationExtraArgs:
        update: Any = self.update
        return update.args[0]

    @property
    def every(self) -> int:
        update: Any = self.update
        return update.args[1]

    def __repr__(self) -> str:
        known = isinstance(self.update, partial)
        return f"accumulate({self.tx!r}, every={self.every})" if known else super().__repr__()

    def flush(self, state: Any, params: Any = None, **extra_args: Any) -> tuple[Any, Any]:
        """End a partial window, such as the last one of a run: ``updates, state = tx.flush(state, params)``.

        Args:
          state: the `AccumulateState`. It may hold Flax variables, as ``nnx.Optimizer.opt_state`` does.
          params: the parameters, arrays or Flax variables. Default: None.
          **extra_args: for the wrapped transformation.

        Returns:
          The updates in the containers of ``params``, and the state in its own. Where the window is empty, the updates
          are zeros and the state is unchanged.
        """
        arrays, ps = plain(state), plain(params)
        like = arrays.total if params is None else update_types(self.tx, ps)
        updates, new = _end(self.tx, arrays.step > 0, arrays, arrays.total, like, ps, extra_args)
        # A variable holds one array: the leaves are the same.
        structure = jax.tree.structure(arrays.total if params is None else params)
        updates = jax.tree.unflatten(structure, jax.tree.leaves(updates))
        return updates, jax.tree.unflatten(jax.tree.structure(state), jax.tree.leaves(new))


def accumulate(tx: optax.GradientTransformation, every: int) -> Accumulate:
    """Run ``tx`` once in ``every`` steps, on the weighted mean of their gradients.

    In between, updates are zeros. If the whole batch is available at once, use `accumulate_gradients` in one step.

    `optax.MultiSteps` differs in four ways. Here ``tx`` runs only at the end of a window, so that Muon costs nothing in
    between. An inf spoils its own window only, and not even that with ``accumulate(guard(tx), every)``. Microbatches
    may have weights: ``tx.update(grads, state, params, weight=tokens)``. And ``tx.flush(state, params)`` ends a partial
    window.

    Args:
      tx: the whole optimizer, clipping included. It gets the mean in at least float32, and the extra arguments of the
        window's last step. A rule that asks for ``value_fn``, such as `jaxsgd.newton_cg`, would see the last batch
        alone: use ``make_step(..., accumulate=every)`` for it.
      every: steps in a window.

    Returns:
      An `Accumulate`, which is an `optax.GradientTransformationExtraArgs`, with an `AccumulateState`. Updates are in
      the dtypes of ``params`` (of the gradients without them), and in float32 where ``rounding=`` of ``tx`` makes them
      so. A weight of 0 does not count, even with NaN gradients. If a whole window weighs 0, ``tx`` does not run.

    Raises:
      ValueError: ``every`` below 1; in the update, a state that was made for parameters of other shapes.
    """
    check_count("every", every)
    check_optimizer(tx)
    tx = optax.with_extra_args_support(tx)
    return Accumulate(partial(_init, tx), partial(_update, tx, every))


def _init(tx: optax.GradientTransformationExtraArgs, params: Any) -> AccumulateState:
    check_params(params)
    weight = jnp.zeros((), widest(jnp.result_type(p) for p in jax.tree.leaves(params)))
    return AccumulateState(tx.init(params), jnp.zeros((), jnp.int32), weight, jax.tree.map(zeros, params))


def _update(
    tx: optax.GradientTransformationExtraArgs,
    every: int,
    /,
    updates: Any,
    state: Any,
    params: Any = None,
    *,
    weight: ArrayLike = 1.0,
    **extra_args: Any,
) -> tuple[Any, AccumulateState]:
    check_like(updates, state.total, "accumulate")
    w = jnp.maximum(scalar(weight, "weight").astype(state.weight.dtype), 0)
    total = jax.tree.map(partial(_add, w), state.total, updates)
    state = AccumulateState(state.inner, state.step + 1, state.weight + w, total)
    like = updates if params is None else update_types(tx, params)
    return _end(tx, state.step >= every, state, updates, like, params, extra_args)


@jax.jit
def _add(weight: jax.Array, total: jax.Array, g: Any) -> jax.Array:
    if not is_inexact(total) or is_float0(g):
        return total
    return total + weighted(weight, wide(g, total.dtype)).astype(total.dtype)


def _end(
    tx: optax.GradientTransformationExtraArgs,
    due: Any,
    state: AccumulateState,
    last: Any,
    like: Any,
    params: Any,
    extra_args: dict[str, Any],
) -> tuple[Any, AccumulateState]:
    """The inner update where the window is ``due``, with updates in the dtypes of ``like``.

    Leaves that are not floating are those of the ``last`` gradients.
    """

    def run() -> tuple[Any, Any]:
        mean = jax.tree.map(lambda t, g: over(t, state.weight) if is_inexact(t) else g, state.total, last)
        updates, inner = tx.update(mean, state.inner, params, **extra_args)
        return keep_types(updates, like, "accumulate"), keep_types(inner, state.inner, "accumulate")

    def rest() -> tuple[Any, Any]:
        return keep_types(jax.tree.map(jnp.zeros_like, state.total), like, "accumulate"), state.inner

    now = due & (state.weight > 0)
    updates, inner = jax.lax.cond(now, run, rest) if isinstance(now, Tracer) else (run if now else rest)()
    # Reset by choice: an inf times 0 would stay as NaN.
    rest_of_state = jax.tree.map(partial(or_zeros, jnp.logical_not(due)), state._replace(inner=None))
    return updates, rest_of_state._replace(inner=inner)
