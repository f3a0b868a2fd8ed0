"""The plan of one train step, and several side by side."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from jaxsgd.backward import LayerStep, make_layer_step
from jaxsgd.memory import HOST
from jaxsgd.paths import is_function, leaf_names
from jaxsgd.planning.accounts import (
    arguments,
    host_bytes,
    in_one_memory,
    int8_bytes,
    parts,
    state_buffers,
    tree_bytes,
    unsplit_bytes,
)
from jaxsgd.planning.comparison import Comparison
from jaxsgd.planning.reading import Buffer, read, read_text
from jaxsgd.planning.result import Bound, Plan, Suggestion, human
from jaxsgd.planning.targets import DoesNotFit, Target, lookup
from jaxsgd.sharding import check_axes, shard_batch
from jaxsgd.train import Step, make_step
from jaxsgd.train_state import TrainState

__all__ = ["Comparison", "Plan", "compare", "plan"]

UNTRACEABLE = (
    jax.errors.ConcretizationTypeError,
    jax.errors.TracerArrayConversionError,
    jax.errors.TracerIntegerConversionError,
    jax.errors.UnexpectedTracerError,
    jax.errors.NonConcreteBooleanIndexError,
)

Progress = Callable[[str], None]


def plan(
    step_or_loss: Any,
    params: Any,
    tx: Any = None,
    batch: Any = None,
    *,
    topology: str = "cpu",
    mesh_axes: Mapping[str, int] | None = None,
    specs: Any = None,
    param_spec: Any = None,
    zero1: str | tuple[str, ...] | None = None,
    offload: bool = False,
    batch_axes: str | tuple[str, ...] | None = None,
    accumulate: int | None = None,
    model_state: Any = None,
    key: int | jax.Array = 0,
    label: str | None = None,
    suggest: bool = True,
    variants: Mapping[str, Mapping[str, Any]] | None = None,
    progress: Progress | None = None,
) -> Plan:
    """The cost of a train step on ``topology``: memory, traffic, kernels and transfers of each device.

    Nothing of the model's size is allocated: a model of 70 billion parameters is planned in the memory that its
    compiler takes. If it does not fit, the plan says so; that is no error.

    On the CPU `Plan.needs` was compared with the measured peak of eight programs, see docs/plan.md and
    ``benchmarks/plan_memory.py``: the ratios were 0.98 to 1.00. Small programs are not as close: packed copies
    inside matrix products, of some MiB, are not counted.

    Args:
      step_or_loss: a loss as `jaxsgd.make_step` takes it; or a `jaxsgd.Step` or `jaxsgd.LayerStep`, whose
        transformation, microbatches and so on are then taken.
      params: what is trained: arrays, shapes, an NNX module, or a function of a key that makes either.
      tx: the gradient transformation; left out with a step.
      batch: the batch of one step on all devices, as arrays or shapes.
      topology: ``"v5e:4x4"``, ``"v5p:8x8x16"``, ``"v4:2x2x1"``, ``"v6e:2x4"``, ``"tpu7x:2x2x1"``; ``"h100:8"`` (or
        a100, h200, b200), ``"h100:2x8"`` for two hosts; ``"cpu"``, ``"cpu:8"``: this machine's own compiler.
      mesh_axes: the mesh, ``{"data": -1, "model": 4}``; -1 is the rest. By default ``{"data": -1}``.
      specs, param_spec: how parameters are split (two names of one argument), see `jaxsgd.state_sharding`.
      zero1: mesh axes to split the optimizer's state over.
      offload: keep the optimizer's slots in the host's memory between steps, see `jaxsgd.TrainState.create`. Default:
        False.
      batch_axes: mesh axes to split the batch over, by default ``"data"``.
      accumulate: microbatches per step; a `jaxsgd.LayerStep` has none.
      model_state, key: as `jaxsgd.TrainState.create` takes them.
      label: what to call it in tables.
      suggest: where it does not fit, work out what would take less; this compiles up to two more programs.
      variants: changes to suggest from where it does not fit, by name: arguments of this function to replace, such as
        ``{"remat": {"step_or_loss": loss_with_remat}}``.
      progress: called with a line of text whenever something else begins.

    Returns:
      A `Plan`: print it, or take its attributes.

    Raises:
      ValueError: an unknown topology, mesh sizes that do not make up its devices, a batch that does not divide; what
        `jaxsgd.state_sharding` refuses; offload for a GPU, whose description knows no memory of the host.
      ImportError: the compiler is not installed; the extra that brings it is named.
      TypeError: the step cannot be compiled, with what it was traced; a missing argument.
    """
    say = progress or (lambda text: None)
    if specs is not None and param_spec is not None:
        raise TypeError("specs, param_spec: two names of one argument; give one")
    specs = param_spec if specs is None else specs
    target = lookup(topology)
    if specs is None and mesh_axes is None and len(target.devices) == 1:
        specs = PartitionSpec()  # One device splits nothing, so axes that the model's annotations name need not exist.
    given: dict[str, Any] = {"topology": topology, "mesh_axes": mesh_axes, "specs": specs, "zero1": zero1}
    given["offload"] = offload
    given |= {"batch_axes": batch_axes, "accumulate": accumulate, "model_state": model_state, "key": key}
    mesh = target.mesh(mesh_axes)
    step = _step(step_or_loss, tx, mesh, batch_axes, accumulate)
    if batch is None:
        raise TypeError("batch: the batch of a step is needed, as arrays or shapes")
    state = TrainState.shapes(
        params, step.tx, key=key, model_state=model_state, mesh=mesh, specs=specs, zero1=zero1, offload=offload
    )
    batch = jax.tree.map(lambda x: jax.ShapeDtypeStruct(jnp.shape(x), jax.dtypes.canonicalize_dtype(_dtype(x))), batch)
    count = step.accumulate if isinstance(step, Step) else 1
    placed = shard_batch(batch, mesh, step.batch_axes, multiple=count)
    say(f"tracing for {target.name}")
    lowered = _lower(step, state, placed)
    on_host = host_bytes(state.opt_state)
    if target.device.platform == "cpu":  # The needs count all of its memory.
        state = in_one_memory(state)
    say(f"compiling for {target.name}")
    begin = time.perf_counter()
    named: list[Buffer] = []
    try:
        found = read(target.compile(lowered))
        uncounted = found.scratch if target.device.platform == "cpu" else 0
        needs = uncounted + (found.memory.needs(target.device.platform) if found.memory is not None else 0)
        available = target.device.memory
    except DoesNotFit as refusal:
        found, uncounted = read_text(refusal.text), 0
        # At least the arguments: the compiler counts temporaries alone where these are too many already.
        needs, available = max(refusal.needs, arguments(state, placed)), refusal.has
        named = [Buffer(*entry) for entry in refusal.largest]
    seconds = time.perf_counter() - begin
    memory = found.memory
    settings = {"zero1": zero1, "accumulate": count, **({"offload": HOST} if offload else {})}
    made = sorted([*state_buffers(state, placed)[:8], *(named or found.buffers)], key=lambda b: -b.bytes)
    answer = Plan(
        label=label or _label(target.name, settings),
        topology=target.name,
        description=target.description,
        devices=len(target.devices),
        device=target.device,
        mesh=dict(mesh.shape),
        settings=settings,
        parameters=sum(leaf.size for leaf in jax.tree.leaves(state.params)),
        needs=needs,
        available=available,
        parts=parts(state, placed, needs, uncounted),
        argument=memory.arguments if memory else arguments(state, placed),
        temporary=memory.temporaries if memory else None,
        output=memory.outputs if memory else None,
        alias=memory.aliased if memory else None,
        code=memory.code if memory else None,
        peak=memory.peak if memory else None,
        flops=found.flops,
        hbm_bytes=found.bytes,
        kernels=found.kernels,
        collectives=found.collectives,
        bound=Bound.of(found, target.device, on_host) if found.kernels else None,
        compile_seconds=seconds,
        largest=tuple(made[:8]),
        notes=_notes(target, needs, memory is None),
        host_bytes=on_host,
    )
    if answer.fits or not suggest:
        return answer
    again = {"step_or_loss": step_or_loss, "params": params, "tx": tx, "batch": batch, **given}
    return replace(answer, suggestions=_suggestions(answer, step, state, again, variants or {}, say))


def _dtype(x: Any) -> Any:
    return x.dtype if hasattr(x, "dtype") else jnp.result_type(x)


def _label(topology: str, settings: Mapping[str, Any]) -> str:
    return topology + "".join(f" {name}={value}" for name, value in settings.items() if value not in (None, 1))


def _step(given: Any, tx: Any, mesh: Any, batch_axes: Any, accumulate: int | None) -> Step | LayerStep:
    """The step on the mesh."""
    settings: dict[str, Any]
    if isinstance(given, Step | LayerStep) and tx is not None and tx is not given.tx:
        raise TypeError(f"tx: a jaxsgd.{type(given).__name__} has its own; leave it out")
    if isinstance(given, LayerStep):
        if accumulate not in (None, 1):
            raise ValueError(f"accumulate={accumulate}: a jaxsgd.LayerStep has no microbatches. Use jaxsgd.make_step")
        functions = given.before, given.layer, given.after
        settings = {"layers": given.layers, "layer_clip": given.layer_clip}
        axes = given.batch_axes if batch_axes is None else batch_axes
        return make_layer_step(*functions, given.tx, mesh=mesh, batch_axes=axes, **settings)
    if isinstance(given, Step):
        if given.axis_name is not None:
            raise TypeError(f"step_or_loss: a step with axis_name={given.axis_name!r} is for pmap; plan one without")
        settings = {"gradient_at": given.gradient_at, "weight": given.weight}
        axes = given.batch_axes if batch_axes is None else batch_axes
        count = given.accumulate if accumulate is None else accumulate
        return make_step(given.loss_fn, given.tx, mesh=mesh, batch_axes=axes, accumulate=count, **settings)
    if not is_function(given):
        raise TypeError(f"step_or_loss={given!r}: a loss function, a jaxsgd.Step or a jaxsgd.LayerStep is needed")
    if tx is None:
        raise TypeError("tx: a gradient transformation is needed")
    return make_step(
        given, tx, mesh=mesh, batch_axes=batch_axes or "data", accumulate=1 if accumulate is None else accumulate
    )


def _lower(step: Step | LayerStep, state: Any, batch: Any) -> Any:
    """The lowered step, or a sentence that says why it cannot be lowered."""
    try:
        return step.lower(state, batch)
    except UNTRACEABLE as error:
        shown = ", ".join(
            f"{name or 'array'} {leaf.dtype.name}{list(leaf.shape)}"
            for name, leaf in zip(leaf_names(batch), jax.tree.leaves(batch), strict=True)
        )
        functions = [step.loss_fn] if isinstance(step, Step) else [step.before, step.layer, step.after]
        loss = ", ".join(getattr(each, "__name__", str(each)) for each in functions)
        first = str(error).strip().splitlines()[0]
        raise TypeError(
            f"step_or_loss: {loss} cannot be compiled: {type(error).__name__}: {first} It was traced with "
            f"{len(jax.tree.leaves(state.params))} parameters and the batch {shown}. "
            "Use jnp.where or jax.lax.cond for a choice that depends on values of arrays"
        ) from error


def _notes(target: Target, needs: int, refused: bool) -> tuple[str, ...]:
    notes = []
    device = target.device
    if device.platform == "cuda" and 0.75 * device.memory < needs <= device.memory:
        share = needs / device.memory
        notes.append(
            f"note: JAX takes 75% of a GPU's memory unless told otherwise; this needs {share:.1%}: set "
            f"XLA_PYTHON_CLIENT_MEM_FRACTION={min(0.99, share + 0.02):.2f}"
        )
    if refused:
        notes.append("note: the compiler gave up; kernels, transfers and bytes are of the program as far as it got")
    return tuple(notes)


def _suggestions(
    answer: Plan,
    step: Step | LayerStep,
    state: Any,
    again: dict[str, Any],
    variants: Mapping[str, Any],
    say: Progress,
) -> tuple[Suggestion, ...]:
    """Changes that need less memory, each with its bytes: first by exact arithmetic on the state, then by compiling."""
    out: list[Suggestion] = []
    mesh = lookup(answer.topology).mesh(dict(answer.mesh))
    axes = check_axes("batch_axes", step.batch_axes, mesh)
    copies = 1
    for axis in axes:
        copies *= mesh.shape[axis]
    saved: dict[str, int] = {}
    split = state
    if again["zero1"] is None and copies > 1:
        split = TrainState.shapes(
            again["params"], step.tx, key=again["key"], model_state=again["model_state"], mesh=mesh,
            specs=again["specs"], zero1=axes, offload=again["offload"],
        )  # fmt: skip
        if answer.device.platform == "cpu":
            split = in_one_memory(split)
        name = f"ZeRO-1 (zero1={axes[0] if len(axes) == 1 else axes!r})"
        saved[name] = tree_bytes(state.opt_state) - tree_bytes(split.opt_state)
    saved["int8 state (storage=jaxsgd.int8())"] = int8_bytes(step.tx, state)
    how = "computed from the shapes of the state"
    helpful = {what: size for what, size in saved.items() if size > answer.needs // 1000}
    whole = unsplit_bytes(state.opt_state, split.opt_state)
    kept = f"; {human(whole)} of the state cannot be split" if whole > answer.needs // 1000 else ""
    for what, size in helpful.items():
        note = kept if split is not state and what.startswith("ZeRO-1") else ""
        out.append(Suggestion(what, answer.needs - size, size >= -answer.headroom, how + note))
    if len(helpful) == 2 and split is not state:
        both = saved[next(iter(saved))] + int8_bytes(step.tx, split)
        out.append(Suggestion(" and ".join(helpful), answer.needs - both, both >= -answer.headroom, how))
    fixed = {**again, "zero1": again["zero1"] if split is state else axes}
    also = "" if split is state else ", with ZeRO-1"
    tries = {f"{name}{also}": {**fixed, **change} for name, change in variants.items()}
    rows = next((leaf.shape[0] for leaf in jax.tree.leaves(again["batch"]) if leaf.ndim), 0) // copies
    microbatches = step.accumulate if isinstance(step, Step) else rows
    if rows > microbatches and rows % microbatches == 0 and not any(s.fits for s in out):
        tries[f"accumulate={rows}, one example at a time on a device{also}"] = {**fixed, "accumulate": rows}
    for what, change in list(tries.items())[:2]:
        say(f"trying {what}")
        tried = plan(**change, suggest=False)
        if tried.needs < answer.needs:
            out.append(Suggestion(what, tried.needs, tried.fits, "compiled"))
    return tuple(sorted(out, key=lambda s: not s.fits))


def compare(items: Any, *args: Any, **common: Any) -> Comparison:
    """Several plans side by side: rules, storages, shardings, topologies.

    Args:
      items: plans, or dicts of arguments of `plan` that differ (``{"label": "int8", "tx": ..., "zero1": "data"}``).
      *args, **common: arguments of `plan` that all have alike.

    Returns:
      A `Comparison`: print it, ``to_markdown()``, ``to_json()``, or draw it with `jaxsgd.plot.memory_bars`.

    Raises:
      ValueError: nothing to compare, or as in `plan`.
    """
    names = ("step_or_loss", "params", "tx", "batch")
    shared = {**dict(zip(names, args, strict=False)), **common}
    plans = [item if isinstance(item, Plan) else plan(**{**shared, **item}) for item in items]
    if not plans:
        raise ValueError("items: at least one plan is needed")
    return Comparison(tuple(plans))
