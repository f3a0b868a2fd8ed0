"""Many values of a hyperparameter, or many seeds, from one compile."""

from __future__ import annotations

import functools
import inspect
import itertools
import os
import pathlib
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from jaxsgd.ensemble.concrete import merged
from jaxsgd.ensemble.dealer import Dealer, devices_of
from jaxsgd.ensemble.divergence import without_skipped
from jaxsgd.ensemble.feed import Feed, is_one_batch
from jaxsgd.ensemble.population import STRATEGIES
from jaxsgd.ensemble.sweep_result import Sweep
from jaxsgd.ensemble.waves import described, gone, stacked_rows, train_in_waves, wave_size
from jaxsgd.loss import fold_keys
from jaxsgd.paths import is_function
from jaxsgd.progress import Bar
from jaxsgd.state import find_states, with_hyper
from jaxsgd.train import Step
from jaxsgd.train_state import TrainState, refuse_deleted

__all__ = ["Sweep", "sweep"]


def sweep(
    train: Any,
    state: Any = None,
    data: Any = None,
    *,
    steps: int | None = None,
    paired: bool = False,
    strategy: str = "auto",
    mesh: Mesh | Sequence[Any] | None = None,
    limit: float = 10.0,
    memory: float | None = None,
    directory: str | os.PathLike[str] | None = None,
    save_every: int = 1000,
    progress: bool | None = None,
    **values: Any,
) -> Sweep:
    """Train with many values at once, from one compile: ``sweep(step, state, batches, learning_rate=rates)``.

    The values are given by name: ``learning_rate=[1e-4, 1e-3]``, ``seed=range(3)``. With several names, every
    combination is a run, or with ``paired=True`` the first value of each name, the second of each, and so on. All runs
    see the same batches.

    Args:
      train: one of

        - a `jaxsgd.Step`, with its initial ``state``. Names are runtime values of that state (the learning rate,
          weight decay, the rule's ``dynamic=``: see `jaxsgd.with_hyper`), or ``seed``, the state's key, which is
          folded into the keys of an NNX model too (`flax.nnx.Rngs`).
        - a function of the names, ``build(learning_rate, head) -> (step, state)``, called once inside a trace. The runs
          may then differ in anything else: any hyperparameter, a group's override
          (``groups=[("^head/", {"lr_mult": head})]``), the seed of the initial weights. One that tests a value in
          Python (``if rate > 0``, some optax schedules) is called with the numbers of each run. Runs whose programs
          differ only in constants are still one program.
        - your own run, a function ``train(state, data)`` or ``train(state, data, **others)`` that jits. It returns the
          losses ``(steps,)``, or metrics with them, or ``(state, either)``. Names that the state has are set there,
          the others are passed by name.
      state: the initial state of every run.
      data: a list of batches (repeated from its end), an iterator, a function of the step, or one batch for all steps.
        For your own run: its second argument.
      steps: the number of steps. Default: the length of the list.
      paired: combine the n-th values of all names. Default: all combinations.
      strategy: ``"vmap"``, ``"map"``, ``"loop"`` (single steps), or ``"auto"``, which reports its choice and the
        reason; see `jaxsgd.ensemble.population.Population`. Default: ``"auto"``.
      mesh: the devices to share the runs: a mesh with any axes, or a list. They may belong to several processes, which
        then all make this call with the same values and data. Default: all local devices.
      limit: three losses in a row so many times above the usual loss are a divergence, see
        `jaxsgd.ensemble.population.Population`. Default: 10.
      memory: bytes of one device that the runs may take. Runs that do not fit are trained in waves, one after the
        other, by the same compiled program. Their last states are then on the host. Default: half of what is free.
      directory: where to save the sweep, so that the same call continues after it was stopped. It needs
        ``jaxsgd[checkpoint]`` and a `jaxsgd.Step` or a function that builds one. Default: None, nothing is saved.
      save_every: steps from one save to the next; the end of a wave is always saved. Default: 1000.
      progress: show a bar. Default: on if stderr is a terminal.
      **values: a list of numbers for each name.

    Returns:
      A `Sweep`: arrays and ``table()``; `jaxsgd.plot.sweep` draws it.

    Raises:
      ValueError: no values, an empty list, lists of several lengths when paired; a name that the state does not have as
        a runtime value; a negative value; ``steps`` below 1 or unknown; `Feed` refuses the batches.
      TypeError: ``train`` is none of the three.
      RuntimeError: the state was donated to an earlier step.
      ValueError: ``memory`` is too small for one run, ``directory`` holds another sweep.
    """
    if strategy not in STRATEGIES:
        raise ValueError(f"strategy={strategy!r}: known are {', '.join(STRATEGIES)}")
    members = _combined(values, paired)
    devices = devices_of(mesh)
    if isinstance(train, Step):
        if state is None:
            raise ValueError("state=None: a step needs its initial TrainState")
        _check_runtime(state, values)
        step = train
        build = lambda start, **scalars: (step, _with_values(start, scalars))  # noqa: E731
        return _stepped(
            build, state, members, data, steps, strategy, devices, limit, progress, memory, directory, save_every
        )
    if not callable(train):
        raise TypeError(f"train={train!r}: a jaxsgd.Step, or a function that builds one or trains, is needed")
    if state is None and _builds(train, members):
        return _stepped(
            train, None, members, data, steps, strategy, devices, limit, progress, memory, directory, save_every
        )
    if directory is not None:
        raise ValueError("directory: only a Step, or a function that builds one, can be saved. Use directory=None")
    return _whole(train, state, data, members, strategy, devices, limit, memory)


# -- values ----------------------------------------------------------------------------------------


def _combined(values: Mapping[str, Any], paired: bool) -> dict[str, np.ndarray]:
    """The values of each run by name."""
    if not values:
        raise ValueError("values: nothing to sweep. Use for example learning_rate=[1e-4, 1e-3]")
    lists = {name: list(np.atleast_1d(np.asarray(entries))) for name, entries in values.items()}
    for name, entries in lists.items():
        if not entries:
            raise ValueError(f"{name}=[]: at least one value is needed")
        if np.ndim(entries[0]) or not np.issubdtype(np.asarray(entries).dtype, np.number):
            raise ValueError(f"{name}={values[name]!r}: a list of numbers is needed")
        if not np.all(np.isfinite(np.asarray(entries, float))):
            raise ValueError(f"{name}={values[name]!r}: finite numbers are needed")
    if paired and len({len(entries) for entries in lists.values()}) > 1:
        raise ValueError(f"paired: lists of one length are needed, got { {n: len(v) for n, v in lists.items()} }")
    rows = list(zip(*lists.values(), strict=True) if paired else itertools.product(*lists.values()))
    columns = {name: np.asarray([row[i] for row in rows]) for i, name in enumerate(lists)}
    whole = lambda x: np.issubdtype(x.dtype, np.integer)  # noqa: E731
    return {n: x.astype(np.int32 if n == "seed" and whole(x) else float) for n, x in columns.items()}


def _check_runtime(state: Any, values: Mapping[str, Any]) -> None:
    """Check that the state has every name and takes every value."""
    refuse_deleted("state", state)
    for name, entries in values.items():
        for value in np.atleast_1d(np.asarray(entries)):
            if name == "seed":
                states = jax.tree.leaves(state, is_leaf=_is_train_state)
                if not any(map(_is_train_state, states)) or not np.issubdtype(value.dtype, np.integer):
                    raise ValueError(f"seed={value!r}: a whole number and a jaxsgd.TrainState are needed")
            elif not find_states(state):
                raise ValueError(f"{name}: the state holds no jaxsgd rule; sweep a function that builds step and state")
            else:
                try:
                    with_hyper(state, at=None, **{name: float(value)})
                except ValueError as error:
                    raise ValueError(f"{error}; or sweep a function that builds step and state from it") from None


def _with_values(state: Any, scalars: Mapping[str, Any]) -> Any:
    """``state`` with the runtime values of one run."""
    others = {name: value for name, value in scalars.items() if name != "seed"}
    if others:
        state = with_hyper(state, **others)
    return _seeded(state, scalars["seed"]) if "seed" in scalars else state


def _is_train_state(node: Any) -> bool:
    return isinstance(node, TrainState)


def _seeded(states: Any, seed: Any) -> Any:
    """A `TrainState`, or a tree of several, with the random numbers of a seed; each of several has its own."""
    leaves, treedef = jax.tree.flatten(states, is_leaf=_is_train_state)
    key, among = jax.random.key(seed), len(list(filter(_is_train_state, leaves)))
    for i, state in enumerate(leaves):
        if _is_train_state(state):
            own = key if among == 1 else jax.random.fold_in(key, i)
            leaves[i] = state.replace(key=own, model_state=fold_keys(state.model_state, seed))
    return treedef.unflatten(leaves)


# -- by steps -------------------------------------------------------------------------------------


def _builds(train: Callable[..., Any], members: Mapping[str, np.ndarray]) -> bool:
    """Whether a function of the values returns a step and a state, not the losses of a run."""
    answers: list[bool] = []
    try:
        inspect.signature(train).bind(**members)
    except TypeError:  # it needs data
        return False

    def look(scalars: Any) -> None:
        out = train(**scalars)
        answers.append(isinstance(out, tuple) and len(out) == 2 and is_function(out[0]))

    try:
        jax.eval_shape(look, {name: jax.ShapeDtypeStruct((), x.dtype) for name, x in members.items()})
    except TypeError:  # it asks a tracer for its value
        jax.eval_shape(lambda: look({name: x[0].item() for name, x in members.items()}))
    return answers[0]


def _stepped(
    build: Callable[..., Any],
    state: Any,
    members: Mapping[str, np.ndarray],
    data: Any,
    steps: int | None,
    strategy: str,
    devices: list[Any],
    limit: float,
    progress: bool | None,
    memory: float | None,
    directory: str | os.PathLike[str] | None,
    save_every: int,
) -> Sweep:
    if data is None:
        raise ValueError("data=None: batches are needed")

    def built(state: Any) -> Any:
        numbers = {name: x[0].item() for name, x in members.items()}
        return build(**numbers) if state is None else build(state, **numbers)

    def first(state: Any) -> Any:
        return built(state)[1]

    def takes(batch: Any) -> bool:
        def one(state: Any) -> Any:
            step, start = built(state)
            return (step.fn if isinstance(step, Step) else step)(start, batch)[1]

        try:
            jax.eval_shape(one, state)
        except Exception:  # whatever a loss says to a batch that is none
            return False
        return True

    if steps is None:
        if not hasattr(data, "__len__") or is_one_batch(data, takes):
            raise ValueError(
                "steps=None: how many? Only a list of batches has a length. A dict, a tuple or an array is one batch "
                "for every step. For stacked batches use data=lambda i: jax.tree.map(lambda x: x[i], arrays)"
            )
        steps = len(data)
        if not steps:
            raise ValueError("data: it is empty; at least one batch is needed")
    if steps < 1:
        raise ValueError(f"steps={steps}: at least 1 is needed")
    count = len(next(iter(members.values())))
    shapes = jax.eval_shape(first, state)
    size = wave_size(count, devices, _bytes(shapes), memory, _bytes(state))
    if directory is not None:
        about = {name: x.tolist() for name, x in members.items()} | {"steps": steps, "limit": limit}
        size = described(pathlib.Path(directory), about, size)
    feed = Feed(data, takes, replay=size < count)
    begin = time.perf_counter()
    waves = -(-count // size)
    with Bar(f"{count} runs", total=steps * waves, show=progress) as bar:
        done = train_in_waves(
            build, members, feed, steps, given=state, size=size, strategy=strategy, devices=devices, limit=limit,
            memory=memory, directory=directory, save_every=save_every, bar=bar,
        )  # fmt: skip
    window, final = _ends(done.metrics["loss"], done.diverged_at)
    runs = done.population
    return Sweep(
        values=dict(members), metrics=done.metrics, diverged_at=done.diverged_at, final=final, window=window,
        states=done.states, strategy=runs.strategy, reason=runs.why, compiles=runs.compiles,
        compile_seconds=runs.compile_seconds, seconds=time.perf_counter() - begin - runs.compile_seconds,
        waves=done.waves,
    )  # fmt: skip


def _bytes(tree: Any) -> float:
    return float(sum(x.dtype.itemsize * x.size for x in jax.tree.leaves(tree) if hasattr(x, "dtype")))


def _ends(losses: np.ndarray, diverged_at: np.ndarray) -> tuple[int, np.ndarray]:
    """``window, final``: the last twentieth of the steps, and its mean."""
    window = max(1, losses.shape[1] // 20)
    mean = losses[:, -window:].astype(float).mean(axis=1)
    return window, np.where((diverged_at >= 0) | ~np.isfinite(mean), np.inf, mean)


# -- whole runs ------------------------------------------------------------------------------------


def _whole(
    train: Callable[..., Any],
    state: Any,
    data: Any,
    members: Mapping[str, np.ndarray],
    strategy: str,
    devices: list[Any],
    limit: float,
    memory: float | None,
) -> Sweep:
    """The user's own runs, from beginning to end."""
    inside = set()
    if state is not None:
        refuse_deleted("state", state)
        states = jax.tree.leaves(state, is_leaf=_is_train_state)
        inside = {"seed"} if any(map(_is_train_state, states)) else set()
        inside |= {name for _, node in find_states(state) for name in node.hyper}
        inside -= {name for name in inspect.signature(train).parameters if name in members}
        _check_runtime(state, {name: members[name] for name in members if name in inside})

    def one(inputs: Any, scalars: Mapping[str, Any]) -> tuple[Any, dict[str, jax.Array]]:
        state, data = inputs
        others = {name: value for name, value in scalars.items() if name not in inside}
        if state is None:
            out = train(**others) if data is None else train(data, **others)
        else:
            first = _with_values(state, {name: value for name, value in scalars.items() if name in inside})
            out = train(first, data, **others)
        last, report = out if isinstance(out, tuple) and len(out) == 2 else (None, out)
        metrics: dict[str, Any] = dict(report) if isinstance(report, Mapping) else {"loss": report}
        if "loss" not in metrics or jnp.ndim(metrics["loss"]) != 1:
            raise ValueError("train: losses of the shape (steps,) are needed, or metrics with such a 'loss'")
        return last, {name: x for name, x in metrics.items() if jnp.shape(x) == jnp.shape(metrics["loss"])}

    chosen = devices[: len(next(iter(members.values())))]
    way, why = strategy, "as asked"
    if strategy == "auto":
        way = "map" if chosen[0].platform == "cpu" else "vmap"
        why = "your own run: map on CPU, vmap elsewhere"
    if way == "loop":
        raise ValueError("strategy='loop': only a Step has single steps. Use 'map' or 'vmap' for your own run")
    return _trained(one, (state, data), members, way, why, chosen, limit, memory)


def _at(one: Callable[..., Any], scalars: Mapping[str, Any], inputs: Any) -> Any:
    return one(inputs, scalars)


def _swapped(fn: Callable[..., Any], inputs: Any, row: Any) -> Any:
    return fn(row, inputs)


def _trained(
    one: Any, inputs: Any, members: Any, way: str, why: str, devices: list[Any], limit: float, memory: float | None
) -> Sweep:
    count = len(next(iter(members.values())))
    try:
        jax.eval_shape(one, inputs, {name: jax.ShapeDtypeStruct((), x.dtype) for name, x in members.items()})
        rows: Any = dict(members)
    except TypeError:  # it asks a tracer for its value: it gets the numbers of each run
        numbers = [{name: x[i].item() for name, x in members.items()} for i in range(count)]
        fn, rows = merged((functools.partial(_at, one, scalars) for scalars in numbers), inputs)
        one = functools.partial(_swapped, fn)
    row = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape[1:], x.dtype), rows)
    size = wave_size(count, devices, _bytes(jax.eval_shape(one, inputs, row)), memory, _bytes(inputs))
    dealer = Dealer(devices, size)

    def run(inputs: Any, rows: Any) -> Any:
        each = lambda row: one(inputs, row)  # noqa: E731
        return jax.vmap(each)(rows) if way == "vmap" else jax.lax.map(each, rows)

    inputs, program, parts = dealer.share(inputs), None, []
    begin = compiled = time.perf_counter()
    for start in range(0, count, size):
        index = np.minimum(np.arange(start, start + size), count - 1)
        wave = dealer.deal(jax.tree.map(lambda x, i=index: x[i], rows))
        if program is None:
            program = jax.jit(dealer.on_each(run, 1)).lower(inputs, wave).compile()
            compiled = time.perf_counter()
        states, metrics = program(inputs, wave)
        metrics = {name: dealer.fetch(x)[:size] for name, x in metrics.items()}
        states = dealer.cut(states) if size == count else dealer.host(states)
        parts.append(jax.tree.map(lambda x, n=count - start: x[:n], (states, metrics)))
    seconds = time.perf_counter() - compiled
    states, metrics = parts[0] if len(parts) == 1 else jax.tree.map(lambda *xs: stacked_rows(xs), *parts)
    metrics = {name: np.asarray(x, np.float32) for name, x in metrics.items()}
    if "skipped" in metrics:  # of a guard, as `make_step` reports it
        skipped = np.diff(metrics["skipped"], prepend=0) > 0
        pairs = {name: zip(x, skipped, strict=True) for name, x in metrics.items() if x.shape == skipped.shape}
        metrics |= {name: np.stack([without_skipped(*pair) for pair in rows]) for name, rows in pairs.items()}
    losses = metrics["loss"]
    dead = gone(losses, limit)
    diverged_at = np.where(dead.any(axis=1), dead.argmax(axis=1), -1)
    metrics = {name: np.where(dead, np.nan, x) for name, x in metrics.items()}
    window, final = _ends(metrics["loss"], diverged_at)
    return Sweep(
        values=dict(members), metrics=metrics, diverged_at=diverged_at, final=final, window=window, states=states,
        strategy=way, reason=why, compiles=1, compile_seconds=compiled - begin, seconds=seconds,
        waves=len(parts),
    )  # fmt: skip
