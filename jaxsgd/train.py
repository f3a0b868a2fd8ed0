"""The train step: from a loss and a gradient transformation to one compiled, donating function.

Floor 5.
"""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable
from typing import Any

import jax
import optax
from flax import nnx
from jax.sharding import Mesh

from jaxsgd.batches import batch_size, check_divides
from jaxsgd.numerics import global_norm, is_key
from jaxsgd.paths import leaf_names
from jaxsgd.sharding import check_axes, local_bytes, moment_sharding, shard_batch
from jaxsgd.state import find_states, metrics
from jaxsgd.train_state import TrainState, refuse_deleted
from jaxsgd.transforms.accumulate import carrying_gradients
from jaxsgd.transforms.clip import AxisName
from jaxsgd.transforms.guard import skipped_steps

__all__ = ["Step", "check_donation", "checked", "make_step"]


def checked(fn: Callable[..., Any]) -> Callable[..., Any]:
    """``fn(state, ...)`` that refuses a state whose memory an earlier call took: ``checked(jax.pmap(step.fn, ...))``.

    Without it, jaxlib ends the process when a program over several devices gets a donated array again.
    `Step` itself does not need it.

    Raises:
      RuntimeError: at the call, in words.
    """

    @functools.wraps(fn)
    def call(state: Any, *args: Any, **kwargs: Any) -> Any:
        refuse_deleted("state", state)
        return fn(state, *args, **kwargs)

    return call


Loss = Callable[..., Any]


def make_step(
    loss_fn: Loss,
    tx: optax.GradientTransformation,
    *,
    gradient_at: Callable[[Any, Any], Any] | None = None,
    donate: bool = True,
    axis_name: AxisName = None,
    mesh: Mesh | None = None,
    batch_axes: str | tuple[str, ...] = "data",
    accumulate: int = 1,
    weight: str | Callable[[Any], Any] | None = None,
) -> Step:
    """A train step: ``state, metrics = step(state, batch)``. The same on one device and on many:

    - on one device, compiled, as it stands;
    - on a mesh, compiled: ``make_step(loss_fn, tx, mesh=mesh)`` with a state of ``TrainState.create(..., mesh=mesh)``.
      The state says by where it lies what is split: data parallel, ZeRO-1, FSDP, tensor parallel;
    - inside `jax.pmap` or `jax.shard_map`: ``step = make_step(loss_fn, tx, axis_name="batch")`` is pure there, and
      averages the gradients, the loss, metrics and model state: ``checked(jax.pmap(step.fn, "batch",
      donate_argnums=0))``.

    Args:
      loss_fn: ``loss_fn(params, batch, key) -> loss`` or ``(loss, aux)``, a mean over the batch. With an NNX model,
        ``params`` is the model itself, whose other variables (batch statistics, counters) are carried along. With a
        ``model_state`` of its own: ``loss_fn(params, model_state, batch, key) -> (loss, (model_state, aux))``.
      tx: any optax gradient transformation; it receives the loss as the extra argument ``value``. It sees the whole
        batch's gradients, so that `jaxsgd.guard` and `jaxsgd.clip_by_global_norm` in it decide alike on all devices.
      gradient_at: optional ``(opt_state, params) -> params`` where the gradient is taken, for example
        `jaxsgd.look_ahead`.
      donate: give the state's memory to the next state. The old state cannot be used again then.
      axis_name: the axis, or axes, of the `jax.pmap` or `jax.shard_map` that the step is called in.
      mesh: the mesh, with Auto axes, whose devices share the work.
      batch_axes: the axes of ``mesh`` over which the examples are split.
      accumulate: microbatches per step, see `jaxsgd.accumulate_gradients`; the batch is split into so many.
      weight: by what the mean of a microbatch, or of a device's part of the batch, counts: ``"tokens"`` (by
        ``aux["tokens"]``) or a function of the batch, see `jaxsgd.accumulate_gradients`. On a mesh without
        accumulation the loss is of the whole batch and nothing is weighed.

    Returns:
      A `Step`. Its metrics are device scalars: ``loss``, ``gradient_norm``, ``update_norm``, what
      `jaxsgd.metrics` reads in the optimizer's state (``step``, ``learning_rate``, ...), ``skipped`` (steps in all)
      where there is a `jaxsgd.guard`, and ``aux``. Random numbers come from ``fold_in(state.key, state.step)``; inside
      pmap and shard_map each device folds in its index too.

    Raises:
      ValueError: ``accumulate`` below 1; an axis that the mesh lacks; both ``mesh`` and ``axis_name``.
    """
    return Step(
        loss_fn, optax.with_extra_args_support(tx), gradient_at, donate, axis_name, mesh, batch_axes, accumulate, weight
    )


class Step:
    """One train step. Call it, or use the pure function ``step.fn`` under scan, vmap, pmap, shard_map or your own jit.

    Attributes:
      fn: ``(state, batch) -> (state, metrics)``, pure and not compiled.
      jitted: ``fn`` compiled, donating the state (on a mesh: for where the last state lay).
      compiles: how often ``fn`` was traced.
    """

    def __init__(
        self,
        loss_fn: Loss,
        tx: Any,
        gradient_at: Any,
        donate: bool,
        axis_name: AxisName,
        mesh: Mesh | None,
        batch_axes: str | tuple[str, ...],
        accumulate: int,
        weight: Any,
    ) -> None:
        if accumulate < 1:
            raise ValueError(f"accumulate={accumulate}: at least one microbatch is needed")
        if mesh is not None and axis_name is not None:
            raise ValueError(f"axis_name={axis_name!r}: on a mesh the step is whole; leave out one of the two")
        if mesh is not None:
            check_axes("batch_axes", batch_axes, mesh)
        self.loss_fn, self.tx, self.gradient_at = loss_fn, tx, gradient_at
        self.axis_name, self.mesh, self.batch_axes = axis_name, mesh, batch_axes
        self.accumulate, self.weight = accumulate, weight
        self.compiles = 0
        self._donated = (0,) if donate else ()
        self._home: Any = None
        self._moments: list[Any] | None = None
        self._sizes: set[int] = set()
        self.jitted = jax.jit(self._counted, donate_argnums=self._donated)

    def __call__(self, state: TrainState, batch: Any) -> tuple[TrainState, dict[str, Any]]:
        """One step.

        Args:
          state: a `TrainState`; on a mesh, one that lies there.
          batch: a tree of arrays that share their first axis. On a mesh this process's part of the batch (all of it
            where there is one process), or arrays that lie there already, see `jaxsgd.shard_batch`.

        Raises:
          ValueError: the batch is empty, its arrays disagree on their first axis, or it does not divide by the
            devices and microbatches; the loss is no scalar; the state lies elsewhere than on the mesh.
          RuntimeError: the state was given to an earlier step, which reused its memory; the step is of a pmap or
            shard_map and not called in one.
        """
        if self.axis_name is not None:
            try:
                return self.fn(state, batch)
            except NameError:
                raise RuntimeError(
                    f"axis_name={self.axis_name!r}: this step is for the inside of jax.pmap or jax.shard_map over such "
                    "an axis; on one device, or with mesh=, leave it out"
                ) from None
        # Over several devices jaxlib would end the process; on one it raises, and the step alone tells.
        refuse_deleted("state", state.step if self.mesh is None else state)
        size = batch_size(batch)
        if size is not None and size not in self._sizes:
            if self.mesh is None:
                check_divides(batch, self.accumulate, f"accumulate={self.accumulate} microbatches")
            if self._sizes:
                seen = ", ".join(map(str, sorted(self._sizes)))
                warnings.warn(
                    f"batch: {size} examples, so far {seen}: the step is compiled anew for each size; "
                    "drop or pad the odd batch",
                    stacklevel=2,
                )
            self._sizes.add(size)
        batch = self._settle(state, batch)
        return self.jitted(state, batch)

    def lower(self, state: TrainState, batch: Any) -> Any:
        """The step lowered for this state and batch, to compile or to look at: `jax.stages.Lowered`."""
        batch = self._settle(state, batch)
        return self.jitted.lower(state, batch)

    def _settle(self, state: TrainState, batch: Any) -> Any:
        """The batch on the mesh; the compiled function for where the state lies."""
        if self.mesh is None:
            return batch
        home = [x.sharding for x in jax.tree.leaves(state)]
        if home != self._home:
            names = leaf_names(state)
            for name, sharding in zip(names, home, strict=True):
                if getattr(sharding, "mesh", None) != self.mesh:
                    raise ValueError(
                        f"state: {name!r} lies on {sharding}, not on the step's mesh {dict(self.mesh.shape)}; "
                        "make the state by TrainState.create(..., mesh=mesh)"
                    )
            self._home, self._moments = home, moment_sharding(state.opt_state, state.params)
            where = jax.tree.unflatten(jax.tree.structure(state), home)
            self.jitted = jax.jit(
                self._counted, donate_argnums=self._donated, in_shardings=(where, None), out_shardings=(where, None)
            )
        return shard_batch(batch, self.mesh, self.batch_axes, multiple=self.accumulate)

    def _counted(self, state: TrainState, batch: Any) -> tuple[TrainState, dict[str, Any]]:
        self.compiles += 1
        return self.fn(state, batch)

    def fn(self, state: TrainState, batch: Any) -> tuple[TrainState, dict[str, Any]]:
        """The step as a pure function."""
        key, carried = jax.random.fold_in(state.key, state.step), state.model_state
        if self.axis_name is not None:  # other random numbers on each device
            index = jax.lax.axis_index(self.axis_name)
            key = jax.random.fold_in(key, index)
            carried = jax.tree.map(lambda x: jax.random.fold_in(x, index) if is_key(x) else x, carried)
        at = state.params if self.gradient_at is None else self.gradient_at(state.opt_state, state.params)
        loss_fn = functools.partial(self._loss, state.graphdef)
        gradients = carrying_gradients(loss_fn, self.accumulate, weight=self.weight, axis_name=self.axis_name)
        (loss, (carried, aux)), grads = gradients(at, carried, batch, key)
        carried = jax.tree.map(lambda new, old: old if is_key(old) else new, carried, state.model_state)
        if self._moments is not None:
            # Where the moments lie: under ZeRO-1 the sum over devices is then a reduce-scatter.
            leaves, treedef = jax.tree.flatten(grads)
            pairs = zip(leaves, self._moments, strict=True)
            place = jax.lax.with_sharding_constraint
            grads = treedef.unflatten(g if where is None else place(g, where) for g, where in pairs)
        updates, opt_state = self.tx.update(grads, state.opt_state, state.params, value=loss)
        new = state.replace(  # type: ignore[attr-defined]
            step=state.step + 1,
            params=optax.apply_updates(state.params, updates),
            opt_state=opt_state,
            model_state=carried,
        )
        report = (metrics(opt_state) if find_states(opt_state) else {}) | skipped_steps(opt_state)
        report |= {
            "step": new.step,
            "loss": loss,
            "gradient_norm": global_norm(grads),
            "update_norm": global_norm(updates),
        }
        return new, report if aux is None else {**report, "aux": aux}

    def _loss(
        self, graphdef: Any, params: Any, model_state: Any, batch: Any, key: jax.Array
    ) -> tuple[jax.Array, tuple[Any, Any]]:
        """The user's loss in one form: ``loss, (model_state, aux)``."""
        if graphdef is not None:
            model = nnx.merge(graphdef, params, model_state, copy=True)
            out = self.loss_fn(model, batch, key)
            model_state = nnx.state(model, nnx.Not(nnx.Param))
        elif model_state is not None:
            out = self.loss_fn(params, model_state, batch, key)
            try:
                loss, (model_state, aux) = out
            except (TypeError, ValueError):
                raise ValueError("loss_fn: with a model_state it returns (loss, (model_state, aux))") from None
            out = (loss, aux)
        else:
            out = self.loss_fn(params, batch, key)
        loss, aux = out if isinstance(out, tuple) else (out, None)
        return loss, (model_state, aux)


def check_donation(step: Step, state: TrainState, batch: Any) -> str:
    """What a step takes on a device, and a check that the next state reuses the memory of the last one.

    Args:
      step: a compiled one (on a device, or on a mesh); it is compiled once more, not run.
      state, batch: what it is to be called with; they are left as they are.

    Returns:
      Bytes on a device: of the state, of the temporaries, at the peak.

    Raises:
      AssertionError: part of the state's memory is not given on; both states are then alive at once.
    """
    used = step.lower(state, batch).compile().memory_analysis()
    size, given = sum(map(local_bytes, jax.tree.leaves(state))), used.alias_size_in_bytes
    text = (
        f"state {size:,} bytes on a device, {given:,} of them given on; "
        f"temporaries {used.temp_size_in_bytes:,}, peak {used.peak_memory_in_bytes:,}"
    )
    if given < size:
        raise AssertionError(f"step: {size - given:,} bytes of the state are not reused: {text}")
    return text
