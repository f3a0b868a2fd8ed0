"""The train step: from a loss and a gradient transformation to one compiled, donating function."""

from __future__ import annotations

import functools
import inspect
import warnings
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.core import Tracer
from jax.sharding import Mesh, PartitionSpec

from jaxsgd.applying import step_params
from jaxsgd.batches import as_arrays, batch_size, check_divides
from jaxsgd.loss import call_loss, is_stateful, with_all_arguments
from jaxsgd.memory import on_host
from jaxsgd.meshes import auto_sharding, in_mesh, is_explicit, on_auto_axes
from jaxsgd.models import carried_state, merge_model
from jaxsgd.numerics import check_count, conjugated, differentiable, global_norm, is_key, root_of
from jaxsgd.paths import check_optimizer, leaf_names, named_leaves, owners
from jaxsgd.placement import brought_home, compiled_for, with_slots_on_device
from jaxsgd.second_order.batch_loss import SplitLoss, mean_loss, split_mean_loss, taken_by
from jaxsgd.sharding import check_axes, local_bytes, moment_sharding, on_every_device, shard_batch
from jaxsgd.state import find_states, metrics
from jaxsgd.train_state import TrainState, check_kind, refuse_deleted
from jaxsgd.transforms.accumulation import carrying_gradients
from jaxsgd.transforms.clip import AxisName
from jaxsgd.transforms.moving import moving
from jaxsgd.transforms.skipping import kept_where_skipped, skipped_now, skipped_steps

__all__ = ["Step", "check_donation", "checked", "make_step"]


def checked(fn: Callable[..., Any]) -> Callable[..., Any]:
    """``fn(state, ...)`` that refuses a donated state: ``checked(jax.pmap(step.fn, ...))``.

    Without it, jaxlib ends the process when a program over several devices gets a donated array again.
    `Step` itself does not need it.

    Raises:
      RuntimeError: at the call, if the state was donated to an earlier call.
      ValueError: at the call, if ``fn`` is from `jax.pmap` and the host keeps the state's slots.
    """

    @functools.wraps(fn)
    def call(state: Any, *args: Any, **kwargs: Any) -> Any:
        refuse_deleted("state", state)
        try:
            return fn(state, *args, **kwargs)
        except ValueError as error:
            # jax.pmap wants each array where it would put it. Its words are about the first one that is not there.
            elsewhere = str(error).startswith(("Memory kinds passed to", "Sharding passed to"))
            if not elsewhere or not any(map(on_host, jax.tree.leaves(state))):
                raise
            raise ValueError(
                "state: its slots are in the host's memory, which jax.pmap does not take. "
                "Use make_step(..., mesh=mesh) or jax.shard_map, or TrainState.create(..., offload=False)"
            ) from error

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
    """A train step: ``state, metrics = step(state, batch)``. It is the same on one device and on many.

    - On one device it is compiled and needs no further argument.
    - On a mesh it is compiled too: ``make_step(loss_fn, tx, mesh=mesh)`` with a state from
      ``TrainState.create(..., mesh=mesh)``. The state's sharding decides which arrays are split: data
      parallel, ZeRO-1, FSDP, tensor parallel.
    - Inside `jax.pmap` or `jax.shard_map`, ``step = make_step(loss_fn, tx, axis_name="batch")`` is a pure function. It
      averages the gradients, the loss, the metrics and the model state: ``checked(jax.pmap(step.fn, "batch",
      donate_argnums=0))``.

    Parameters may be complex: the step descends in both their parts. Integer parameters get a gradient of zeros; the
    optimizer has to freeze them. Parameters that the optimizer never moves, in a group with ``frozen`` or under
    `optax.set_to_zero`, are not differentiated. Their gradient is zeros, in the norm and in every clip.

    Args:
      loss_fn: ``loss_fn(params, batch, key) -> loss`` or ``(loss, aux)``, a mean over the batch. With an NNX model,
        ``params`` is the model itself, and the step carries its other variables (batch statistics, counters) along.
        With a ``model_state``: ``loss_fn(params, model_state, batch, key) -> (loss, (model_state, aux))``. Arrays that
        are neither examples nor trained, such as a teacher's weights, come last where the call has them:
        ``step(state, batch, constants)`` and ``loss_fn(params, batch, key, constants)``.
      tx: any optax gradient transformation. It sees the whole batch's gradients, so that `jaxsgd.guard` and
        `jaxsgd.clip_by_global_norm` in it decide alike on all devices. It receives three extra arguments: ``value``,
        the loss, ``grad``, the gradients, and ``value_fn(params) -> loss``. That function is the loss of the whole
        batch, with the same random numbers and the model's state before the step. So `jaxsgd.lbfgs`, `jaxsgd.newton_cg`
        and `optax.lbfgs` need nothing more. For `jaxsgd.gauss_newton` ``loss_fn`` has to be a `jaxsgd.split_loss`.
      gradient_at: ``(opt_state, params) -> params``, the point where the gradient is taken, such as
        `jaxsgd.look_ahead`. Default: at the parameters.
      donate: reuse the state's memory for the next state. The old state cannot be used again then. Default: True.
      axis_name: the axis, or axes, of the `jax.pmap` or `jax.shard_map` that the step is called in.
      mesh: the mesh whose devices share the work. Its axes may be Explicit: inside the step they are Auto, and the
        next state has the types of this one. ``aux`` is then whole on every device.
      batch_axes: the axes of ``mesh`` over which the examples are split. Default: ``"data"``.
      accumulate: the number of microbatches that the batch is split into, see `jaxsgd.accumulate_gradients`.
        Default: 1.
      weight: the weight of a microbatch's mean, or of a device's part of the batch: ``"tokens"`` (for
        ``aux["tokens"]``) or a function of the batch, see `jaxsgd.accumulate_gradients`. On a mesh without
        accumulation the loss is that of the whole batch and needs no weight. Default: all weigh the same.

    Returns:
      A `Step`. Its metrics are device scalars: ``loss``, ``gradient_norm``, ``update_norm``, the entries of
      `jaxsgd.metrics` (``step``, ``learning_rate``, ...), ``skipped`` (the number of steps that `jaxsgd.guard`,
      `optax.apply_if_finite` or a state with a field ``skipped`` has counted), and ``aux``. A skipped step leaves
      the model's state (batch statistics, counters) as it was. Random numbers come from ``fold_in(state.key,
      state.step)``; inside pmap and shard_map each device folds in its index too.

    Raises:
      ValueError: ``accumulate`` below 1; an axis that the mesh lacks; both ``mesh`` and ``axis_name``.
      TypeError: ``loss_fn`` is no function; ``tx`` is no gradient transformation.
    """
    if not callable(loss_fn):
        raise TypeError(f"loss_fn={loss_fn!r}: a function (params, batch, key) -> loss is needed")
    check_optimizer(tx)
    return Step(
        loss_fn, optax.with_extra_args_support(tx), gradient_at, donate, axis_name, mesh, batch_axes, accumulate, weight
    )


class Step:
    """One train step. Call it, or use the pure function ``step.fn`` under scan, vmap, pmap, shard_map or your own jit.

    Attributes:
      fn: ``(state, batch, constants=None) -> (state, metrics)``, pure and not compiled.
      jitted: ``fn`` compiled, donating the state (on a mesh: for the last state's sharding).
      compiles: the number of times ``fn`` was traced.
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
        check_count("accumulate", accumulate)
        if mesh is not None and axis_name is not None:
            raise ValueError(
                f"axis_name={axis_name!r}: a step on a mesh needs no axis name; leave out axis_name or mesh"
            )
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

    def __call__(self, state: TrainState, batch: Any, constants: Any = None) -> tuple[TrainState, dict[str, Any]]:
        """One step.

        Args:
          state: a `TrainState`; on a mesh, one that was made there.
          batch: a tree of arrays that share their first axis. On a mesh this process's part of the batch (the whole
            batch if there is one process), or arrays that are sharded already, see `jaxsgd.shard_batch`.
          constants: a tree of arrays that are neither examples nor trained: another network's parameters, a teacher's,
            the weights of classes. The loss gets it as its last argument. It is never split into microbatches, never
            differentiated and never donated. On a mesh it keeps its sharding there, else each device gets the whole;
            put large arrays there once, before the loop. Default: None, and the loss has no such argument.

        Raises:
          ValueError: the batch is empty, its arrays disagree on their first axis, or it does not divide by the
            devices and microbatches; the loss is no real scalar; the state is not on the mesh; the optimizer's state
            was made for parameters of other shapes.
          TypeError: the state is no `TrainState`.
          RuntimeError: the state was donated to an earlier step; the step is for pmap or shard_map and called outside.
        """
        if self.axis_name is not None:
            try:
                return self.fn(state, batch, constants)
            except NameError:
                raise RuntimeError(
                    f"axis_name={self.axis_name!r}: call this step inside jax.pmap or jax.shard_map over that axis; "
                    "on one device, or with mesh=, leave axis_name out"
                ) from None
        check_kind(state)
        # On several devices jaxlib would end the process. On one it raises, and is asked why then.
        refuse_deleted("state", state.step if self.mesh is None else state)
        batch = as_arrays(batch)
        size = batch_size(batch)
        if size is not None and size not in self._sizes:
            if self.mesh is None:
                check_divides(batch, self.accumulate, f"accumulate={self.accumulate} microbatches")
            if self._sizes:
                seen = ", ".join(map(str, sorted(self._sizes)))
                warnings.warn(
                    f"batch: {size} examples, so far {seen}: the step compiles again for each size; "
                    "drop or pad the odd batch",
                    stacklevel=2,
                )
            self._sizes.add(size)
        if self.mesh is not None and any(isinstance(x, Tracer) for x in jax.tree.leaves(state)):
            return self._traced(self.mesh, state, batch, constants)
        self._check_constants(state, constants)
        state, batch, constants = self._settle(state, batch, constants)  # first: it may replace self.jitted
        with self._entered():
            try:
                return self.jitted(state, batch, constants)
            except (RuntimeError, ValueError):
                refuse_deleted("state", state)
                raise

    def _check_constants(self, state: TrainState, constants: Any) -> None:
        """Check that ``constants`` can be read while the state is donated.

        Raises:
          ValueError: they share an array with the state.
          RuntimeError: an earlier step took their memory.
        """
        if constants is None:
            return
        refuse_deleted("constants", constants)
        mine = {id(x) for x in jax.tree.leaves(state)} if self._donated else set()
        shared = [name for name, x in named_leaves(constants, "constants").items() if id(x) in mine]
        if shared:
            raise ValueError(
                f"constants: {shared[0]!r} is an array of the state, whose memory the step reuses. "
                "Use a copy, or make_step(..., donate=False)"
            )

    def _traced(self, mesh: Mesh, state: TrainState, batch: Any, constants: Any) -> tuple[TrainState, dict[str, Any]]:
        """The step in the caller's own jit, where arrays have no place yet."""
        if not is_explicit(mesh):
            return self.fn(state, batch, constants)
        specs = jax.tree.map(lambda x: jax.typeof(x).sharding.spec, state)
        with in_mesh(mesh, abstract=True):
            return on_auto_axes(self.fn, mesh, (specs, PartitionSpec()))(state, batch, constants)

    def _entered(self) -> AbstractContextManager[Any]:
        return in_mesh(self.mesh if is_explicit(self.mesh) else None)

    def lower(self, state: TrainState, batch: Any, constants: Any = None) -> Any:
        """The step lowered for these arguments of a call: a `jax.stages.Lowered` to compile or to print."""
        check_kind(state)
        state, batch, constants = self._settle(state, batch, constants)
        with self._entered():
            return self.jitted.lower(state, batch, constants)

    def _settle(self, state: TrainState, batch: Any, constants: Any) -> tuple[TrainState, Any, Any]:
        """The arguments on the mesh. The step is compiled for the state's sharding."""
        if self.mesh is None:
            return state, batch, constants
        home = [getattr(x, "sharding", None) for x in jax.tree.leaves(state)]
        if home != self._home:
            state, home = brought_home(self.mesh, state, self._home)
        if home != self._home:
            self._home = home
            self._moments = [*map(auto_sharding, moment_sharding(state.opt_state, state.params))]
            where = jax.tree.unflatten(jax.tree.structure(state), home)
            self.jitted = compiled_for(self._counted, self.mesh, where, self._donated, others=2)
        batch = shard_batch(batch, self.mesh, self.batch_axes, multiple=self.accumulate)
        return state, batch, on_every_device(constants, self.mesh)

    def _counted(self, state: TrainState, batch: Any, constants: Any) -> tuple[TrainState, dict[str, Any]]:
        self.compiles += 1
        return self.fn(state, batch, constants)

    @with_slots_on_device
    def fn(self, state: TrainState, batch: Any, constants: Any = None) -> tuple[TrainState, dict[str, Any]]:
        """The step as a pure function."""
        user_loss = _with_constants(self.loss_fn, constants, is_stateful(state.graphdef, state.model_state))
        _check_shapes(self.tx, state)
        key, carried = jax.random.fold_in(state.key, state.step), state.model_state
        if self.axis_name is not None:  # other random numbers on each device
            index = jax.lax.axis_index(self.axis_name)
            key = jax.random.fold_in(key, index)
            carried = jax.tree.map(lambda x: jax.random.fold_in(x, index) if is_key(x) else x, carried)
        at = state.params if self.gradient_at is None else self.gradient_at(state.opt_state, state.params)
        value_fn = self._value_fn(user_loss, state, batch, key, carried)
        # Only what moves is differentiated; the others have gradients of zeros, as integers have.
        leaves, whole = differentiable(at, moving(self.tx.update, state.opt_state, state.params, value_fn))

        def loss_fn(leaves: Any, carried: Any, batch: Any, key: jax.Array) -> tuple[jax.Array, tuple[Any, Any]]:
            return call_loss(user_loss, state.graphdef, whole(leaves), carried, batch, key)

        gradients = carrying_gradients(loss_fn, self.accumulate, weight=self.weight, axis_name=self.axis_name)
        (loss, (carried, aux)), grads = gradients(leaves, carried, batch, key)
        # Not float0 for integers, which few transformations know.
        grads = whole(conjugated(grads), jnp.zeros_like)
        carried = jax.tree.map(lambda new, old: old if is_key(old) else new, carried, state.model_state)
        if self._moments is not None:
            # Sharded like the moments: under ZeRO-1 the sum over devices is then a reduce-scatter.
            leaves, treedef = jax.tree.flatten(grads)
            pairs = zip(leaves, self._moments, strict=True)
            place = jax.lax.with_sharding_constraint
            grads = treedef.unflatten(g if where is None else place(g, where) for g, where in pairs)
        extra = taken_by(self.tx.update, {"value": loss, "grad": grads, "value_fn": value_fn})
        params, opt_state, squares = step_params(self.tx.update, grads, state.opt_state, state.params, **extra)
        skipped = skipped_now(state.opt_state, opt_state)
        if skipped is not None:
            carried = kept_where_skipped(skipped, state.model_state, carried)
        new = state.replace(  # type: ignore[attr-defined]
            step=state.step + 1,
            params=params,
            opt_state=opt_state,
            model_state=carried,
        )
        report = (metrics(opt_state) if find_states(opt_state) else {}) | skipped_steps(opt_state)
        report |= {
            "step": new.step,
            "loss": loss,
            "gradient_norm": global_norm(grads),
            "update_norm": root_of(squares),
        }
        return new, report if aux is None else {**report, "aux": aux}

    def _value_fn(
        self, user_loss: Loss, state: TrainState, batch: Any, key: jax.Array, carried: Any
    ) -> Callable[[Any], jax.Array]:
        """The loss of this batch as a function of the parameters. Nothing is traced until it is called."""
        shared: dict[str, Any] = {"weight": self.weight, "axis_name": self.axis_name}
        rest = (self.accumulate, batch, key, carried)
        if not isinstance(user_loss, SplitLoss):
            return mean_loss(functools.partial(call_loss, user_loss, state.graphdef), *rest, **shared)
        outputs = functools.partial(_outputs, user_loss, state.graphdef)
        return split_mean_loss(outputs, user_loss.loss, *rest, **shared)


def _with_constants(loss_fn: Loss, constants: Any, stateful: bool) -> Loss:
    """``loss_fn`` as a function of ``(params, batch, key)``, or of ``(params, model_state, batch, key)``.

    Raises:
      TypeError: it takes no constants.
    """
    if constants is None:
        return with_all_arguments(loss_fn, stateful)
    if isinstance(loss_fn, SplitLoss):
        return SplitLoss(lambda *args: loss_fn.outputs_fn(*args, constants), loss_fn.loss)
    names = ["params", *["model_state"] * stateful, "batch", "key", "constants"]
    try:
        inspect.signature(loss_fn).bind(*names)
    except TypeError:
        wanted = ", ".join(names)
        raise TypeError(f"loss_fn: the step was called with constants; it needs the arguments ({wanted})") from None
    except ValueError:  # a builtin has no signature
        pass
    return lambda *args: loss_fn(*args, constants)


def _outputs(
    split: SplitLoss, graphdef: Any, params: Any, model_state: Any, batch: Any, key: jax.Array
) -> tuple[Any, Any]:
    """The outputs of a split loss in one form: ``outputs, model_state``."""
    if graphdef is not None:
        model = merge_model(graphdef, params, model_state)
        outputs = split.outputs_fn(model, batch, key)
        return outputs, carried_state(model)
    if model_state is not None:
        return split.outputs_fn(params, model_state, batch, key)
    return split.outputs_fn(params, batch, key), None


def _check_shapes(tx: Any, state: TrainState) -> None:
    """Check that the optimizer's state was made for parameters of these shapes: others may broadcast in silence.

    Raises:
      ValueError: names the first leaf of another shape than ``tx.init(params)`` gives it.
    """
    shapes = [jnp.shape(x) for x in jax.tree.leaves(state.opt_state)]
    owner = owners(state.opt_state, state.params, map(jnp.shape, jax.tree.leaves(state.params)))
    other = [i for i, (shape, of) in enumerate(zip(shapes, owner, strict=True)) if of is not None and shape != of]
    if not other:
        return  # the usual case costs no trace of init
    try:
        fresh = jax.eval_shape(tx.init, state.params)
    except jax.errors.JAXTypeError:  # it looks at values
        return
    wanted = [x.shape for x in jax.tree.leaves(fresh)]
    if jax.tree.structure(fresh) != jax.tree.structure(state.opt_state):
        return  # the optimizer refuses it by itself
    for i in other:
        if shapes[i] != wanted[i]:
            raise ValueError(
                f"state: 'opt_state/{leaf_names(state.opt_state)[i]}' has the shape {shapes[i]}; for these parameters "
                f"it needs {wanted[i]}. Use TrainState.create(params, tx), or jaxsgd.migrate to carry the state over"
            )


def check_donation(step: Step, state: TrainState, batch: Any, constants: Any = None) -> str:
    """Check that the next state reuses the memory of the last one, and report the bytes of a step.

    Args:
      step: a step for one device or for a mesh. It is compiled once more, not run.
      state, batch, constants: the arguments of a call. They are not changed.

    Returns:
      A line with the bytes per device: state, donated, temporaries, peak.

    Raises:
      AssertionError: part of the state's memory is not donated; two states then exist at once.
    """
    used = step.lower(state, batch, constants).compile().memory_analysis()
    size = sum(map(local_bytes, jax.tree.leaves(state)))
    reused = used.alias_size_in_bytes + used.host_alias_size_in_bytes
    text = (
        f"state {size:,} bytes on a device, {reused:,} of them donated; "
        f"temporaries {used.temp_size_in_bytes:,}, peak {used.peak_memory_in_bytes:,}"
    )
    if reused < size:
        raise AssertionError(f"step: {size - reused:,} bytes of the state are not reused: {text}")
    return text
