"""Many values of a hyperparameter, or many seeds, from one compile.

Floor 6.
"""

from __future__ import annotations

import inspect
import itertools
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from jaxsgd.paths import Text, aligned
from jaxsgd.probe.feed import Feed
from jaxsgd.probe.population import STRATEGIES, Population
from jaxsgd.progress import Bar
from jaxsgd.state import find_states, with_hyper
from jaxsgd.train import Step
from jaxsgd.train_state import TrainState, refuse_deleted

__all__ = ["Sweep", "sweep"]


@dataclass(frozen=True)
class Sweep:
    """What `sweep` found; print it.

    Attributes:
      values: name -> ``(members,)``, what each member was given.
      metrics: name -> ``(members, steps)`` float32, among them ``loss``; NaN from where a member diverged.
      diverged_at: ``(members,)``, the steps taken when it diverged, or -1.
      final: ``(members,)``, the mean loss of the last ``window`` steps; inf for a member that diverged.
      window: how many steps that mean is of.
      states: the members' last states, stacked along a first axis (before the update that diverged); None where the
        training gave none.
      strategy: what was chosen, and ``why``.
      compiles, compile_seconds, seconds: how often a step was compiled; time for it; time of the training itself.
    """

    values: dict[str, np.ndarray]
    metrics: dict[str, np.ndarray]
    diverged_at: np.ndarray
    final: np.ndarray
    window: int
    states: Any = field(repr=False)
    strategy: str
    why: str
    compiles: int
    compile_seconds: float
    seconds: float

    @property
    def losses(self) -> np.ndarray:
        """``(members, steps)``."""
        return self.metrics["loss"]

    @property
    def diverged(self) -> np.ndarray:
        """``(members,)`` bool."""
        return self.diverged_at >= 0

    @property
    def best(self) -> dict[str, float]:
        """The values with the least final loss; where seeds were swept, the least of the mean over seeds.

        Raises:
          ValueError: all members diverged.
        """
        rows = self.over_seeds()
        found = min(rows, key=lambda row: row["mean"])
        if not np.isfinite(found["mean"]):
            raise ValueError(f"sweep: all {len(self.final)} members diverged; {_span(self.values)}")
        return {name: found[name] for name in self.values if name != "seed"} or {"seed": found["seed"]}

    def over_seeds(self) -> list[dict[str, float]]:
        """For each combination of the other values ``mean`` and ``sd`` of the final loss, ``diverged``, ``members``."""
        names = [name for name in self.values if name != "seed"] or ["seed"]
        groups: dict[tuple[float, ...], list[int]] = {}
        for i in range(len(self.final)):
            groups.setdefault(tuple(self.values[name][i].item() for name in names), []).append(i)
        out = []
        for key, index in groups.items():
            final = self.final[index]
            sd = float(np.std(final, ddof=1)) if len(index) > 1 and np.all(np.isfinite(final)) else float("nan")
            row = {"mean": float(np.mean(final)), "sd": sd, "diverged": int(self.diverged[index].sum())}
            out.append(dict(zip(names, key, strict=True)) | row | {"members": len(index)})
        return out

    def member(self, index: int) -> Any:
        """The last state of one member."""
        if self.states is None:
            raise ValueError("sweep: the training gave no states")
        return jax.tree.map(lambda x: x[index], self.states)

    def table(self) -> str:
        """A line for each combination of values: final loss, or where it diverged."""
        names = [name for name in self.values if name != "seed"] or ["seed"]
        seeds = "seed" in self.values and names != ["seed"]
        best = self.best if np.any(np.isfinite(self.final)) else {}
        lines = [(*names, f"loss, mean of the last {self.window}", *(("sd over seeds",) if seeds else ()), "")]
        for row in self.over_seeds():
            said = "best" if best == {name: row[name] for name in names} else ""
            if row["diverged"]:
                where = [self.values[name] == row[name] for name in names]
                first = min(self.diverged_at[np.logical_and.reduce(where) & self.diverged])
                many = f"{row['diverged']} of {row['members']} " if row["members"] > 1 else ""
                said = f"{many}diverged at step {first}"
            shown = [f"{row[name]:.4g}" for name in names]
            spread = (f"{row['sd']:.2g}",) if seeds else ()
            lines.append((*shown, f"{row['mean']:.6g}", *spread, said))
        return Text(aligned(lines))

    def __str__(self) -> str:
        head = (
            f"{len(self.final)} trainings of {self.losses.shape[1]} steps by {self.strategy} ({self.why}): "
            f"{self.compiles} compile{'s' if self.compiles != 1 else ''} in {self.compile_seconds:.1f} s, "
            f"{self.seconds:.1f} s of training, {int(self.diverged.sum())} diverged"
        )
        return f"{head}\n{self.table()}"


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
    progress: bool | None = None,
    **values: Any,
) -> Sweep:
    """Train with many values at once, from one compile: ``sweep(step, state, batches, learning_rate=rates)``.

    What is swept is given by name, ``learning_rate=[1e-4, 1e-3]``, ``seed=range(3)``; of several names all combinations
    train, or with ``paired=True`` the first of each, the second of each, .... All see the same batches.

    Args:
      train: one of

        - a `jaxsgd.Step`, with the ``state`` to begin from. Names are runtime values of that state (the learning rate,
          weight decay, what is in ``dynamic=`` of the rule: see `jaxsgd.with_hyper`), or ``seed``, the state's key.
        - a function of the names, ``build(learning_rate, head) -> (step, state)``, called once inside a trace, for
          whatever else the members differ in: any hyperparameter, a group's override
          (``groups=[("^head/", {"lr_mult": head})]``), the seed of the initial weights.
        - a whole training of your own, ``train(state, data)`` or ``train(state, data, **others)``, that jits:
          it gives the losses ``(steps,)``, or metrics with them, or ``(state, either)``. What the state has under a
          name is set there, the rest is passed by name.
      state: where all begin.
      data: batches, for a step: a list (gone through again from its end), an iterator, a function of the step, or one
        batch for all steps. For a training of your own whatever it takes.
      steps: steps to train; by default the length of the list.
      paired: the n-th of every name together.
      strategy: vmap, map, a loop of single steps, or ``"auto"``, which says what it chose and why; see
        `jaxsgd.probe.population.Population`.
      mesh: the devices to share the members out to: a mesh, whatever its axes, or a list; all by default.
      limit: three losses in a row so many times above the usual loss are a divergence, see there.
      progress: whether to show a bar; by default where somebody looks.

    Returns:
      A `Sweep`: arrays, ``table()``, and `jaxsgd.plot.sweep` of it.

    Raises:
      ValueError: no values, an empty list of them, another length than the others' when paired; a name that the state
        does not have as a runtime value; a negative value; ``steps`` below 1 or unknown; what `Feed` refuses.
      TypeError: ``train`` is none of the three.
      RuntimeError: the state's memory was given to an earlier step.
    """
    if strategy not in STRATEGIES:
        raise ValueError(f"strategy={strategy!r}: known are {', '.join(STRATEGIES)}")
    members = _combined(values, paired)
    devices = list(mesh.devices.flat) if isinstance(mesh, Mesh) else jax.local_devices() if mesh is None else list(mesh)
    if isinstance(train, Step):
        if state is None:
            raise ValueError("state=None: a step needs the TrainState to begin from")
        _check_runtime(state, values)
        step = train
        build = lambda given, **scalars: (step, _with_values(given, scalars))  # noqa: E731
        return _stepped(build, state, members, data, steps, strategy, devices, limit, progress)
    if not callable(train):
        raise TypeError(f"train={train!r}: a jaxsgd.Step, or a function that builds one or trains, is needed")
    if state is None and _builds(train, members):
        return _stepped(train, None, members, data, steps, strategy, devices, limit, progress)
    return _whole(train, state, data, members, strategy, devices, limit)


# -- what is swept --------------------------------------------------------------------------------


def _combined(values: Mapping[str, Any], paired: bool) -> dict[str, np.ndarray]:
    """The values of each member by name."""
    if not values:
        raise ValueError("values: nothing to sweep; give for example learning_rate=[1e-4, 1e-3]")
    lists = {name: list(np.atleast_1d(np.asarray(given))) for name, given in values.items()}
    for name, given in lists.items():
        if not given:
            raise ValueError(f"{name}=[]: at least one value is needed")
        if np.ndim(given[0]) or not np.issubdtype(np.asarray(given).dtype, np.number):
            raise ValueError(f"{name}={values[name]!r}: a list of numbers is needed")
        if not np.all(np.isfinite(np.asarray(given, float))):
            raise ValueError(f"{name}={values[name]!r}: finite numbers are needed")
    if paired and len({len(given) for given in lists.values()}) > 1:
        raise ValueError(f"paired: lists of one length are needed, got { {n: len(v) for n, v in lists.items()} }")
    rows = list(zip(*lists.values(), strict=True) if paired else itertools.product(*lists.values()))
    columns = {name: np.asarray([row[i] for row in rows]) for i, name in enumerate(lists)}
    whole = lambda x: np.issubdtype(x.dtype, np.integer)  # noqa: E731
    return {n: x.astype(np.int32 if n == "seed" and whole(x) else float) for n, x in columns.items()}


def _check_runtime(state: Any, values: Mapping[str, Any]) -> None:
    """That the state has every name, and takes every value of it."""
    refuse_deleted("state", state)
    for name, given in values.items():
        for value in np.atleast_1d(np.asarray(given)):
            if name == "seed":
                if not isinstance(state, TrainState) or not np.issubdtype(value.dtype, np.integer):
                    raise ValueError(
                        f"seed={value!r}: a whole number, and a jaxsgd.TrainState to put it in, are needed"
                    )
            elif not find_states(state):
                raise ValueError(f"{name}: the state holds no jaxsgd rule; sweep a function that builds step and state")
            else:
                try:
                    with_hyper(state, at=None, **{name: float(value)})
                except ValueError as error:
                    raise ValueError(f"{error}; or sweep a function that builds step and state from it") from None


def _with_values(state: Any, scalars: Mapping[str, Any]) -> Any:
    """``state`` with the runtime values of one member."""
    others = {name: value for name, value in scalars.items() if name != "seed"}
    if others:
        state = with_hyper(state, **others)
    return state.replace(key=jax.random.key(scalars["seed"])) if "seed" in scalars else state


def _span(values: Mapping[str, np.ndarray]) -> str:
    return ", ".join(f"{name} from {x.min():.3g} to {x.max():.3g}" for name, x in values.items())


# -- by steps -------------------------------------------------------------------------------------


def _builds(train: Callable[..., Any], members: Mapping[str, np.ndarray]) -> bool:
    """Whether a function of the values gives a step and a state, and not the losses of a training of its own."""
    found: list[bool] = []
    try:
        inspect.signature(train).bind(**members)
    except TypeError:  # it wants data
        return False

    def look(scalars: Any) -> None:
        out = train(**scalars)
        found.append(isinstance(out, tuple) and len(out) == 2 and callable(out[0]))

    jax.eval_shape(look, {name: jax.ShapeDtypeStruct((), x.dtype) for name, x in members.items()})
    return found[0]


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
) -> Sweep:
    if data is None:
        raise ValueError("data=None: batches are needed")
    if steps is None:
        if not isinstance(data, Sequence) or isinstance(data, tuple):
            raise ValueError(
                "steps=None: how many? Only a list of batches has a length; a dict, a tuple or an array is one batch, "
                "for every step, and arrays of many are given as lambda i: jax.tree.map(lambda x: x[i], arrays)"
            )
        steps = len(data)
    if steps < 1:
        raise ValueError(f"steps={steps}: at least 1 is needed")
    feed = Feed(data)
    population = Population(build, members, given=state, strategy=strategy, devices=devices, limit=limit)
    parts: list[dict[str, np.ndarray]] = []
    begin = time.perf_counter()
    with Bar(f"{population.members} trainings", total=steps, show=progress) as bar:
        while feed.taken < steps:
            count = min(4 * population.chunk, steps - feed.taken)
            parts.append(population.advance(feed.take(count)))
            last = parts[-1]["loss"][:, -1]
            least = f"{np.nanmin(last):.4g}" if np.any(np.isfinite(last)) else "none left"
            bar.advance(count, f"least loss {least}, {int((~population.alive).sum())} diverged")
            if not np.any(population.alive):
                missing = steps - feed.taken
                parts.append({n: np.full((population.members, missing), np.nan, x.dtype) for n, x in parts[0].items()})
                break
    metrics = {name: np.concatenate([part[name] for part in parts], axis=1) for name in parts[0]}
    window, final = _ends(metrics["loss"], population.diverged_at)
    return Sweep(
        values=dict(members), metrics=metrics, diverged_at=population.diverged_at, final=final, window=window,
        states=population.states,
        strategy=population.strategy, why=population.why, compiles=population.compiles,
        compile_seconds=population.compile_seconds,
        seconds=time.perf_counter() - begin - population.compile_seconds,
    )  # fmt: skip


def _ends(losses: np.ndarray, diverged_at: np.ndarray) -> tuple[int, np.ndarray]:
    """``window, final``: the last twentieth of the steps, and its mean."""
    window = max(1, losses.shape[1] // 20)
    mean = losses[:, -window:].astype(float).mean(axis=1)
    return window, np.where((diverged_at >= 0) | ~np.isfinite(mean), np.inf, mean)


# -- whole trainings ------------------------------------------------------------------------------


def _whole(
    train: Callable[..., Any],
    state: Any,
    data: Any,
    members: Mapping[str, np.ndarray],
    strategy: str,
    devices: list[Any],
    limit: float,
) -> Sweep:
    """Trainings of the user's own, each as one step of a population."""
    inside = set()
    if state is not None:
        refuse_deleted("state", state)
        inside = {"seed"} if isinstance(state, TrainState) else set()
        inside |= {name for _, found in find_states(state) for name in found.hyper}
        inside -= {name for name in inspect.signature(train).parameters if name in members}
        _check_runtime(state, {name: members[name] for name in members if name in inside})

    def one(given: Any, scalars: Mapping[str, Any]) -> tuple[Any, dict[str, jax.Array]]:
        state, data = given
        others = {name: value for name, value in scalars.items() if name not in inside}
        if state is None:
            out = train(**others) if data is None else train(data, **others)
        else:
            held = _with_values(state, {name: value for name, value in scalars.items() if name in inside})
            out = train(held, data, **others)
        last, given_back = out if isinstance(out, tuple) and len(out) == 2 else (None, out)
        metrics: dict[str, Any] = dict(given_back) if isinstance(given_back, Mapping) else {"loss": given_back}
        if "loss" not in metrics or jnp.ndim(metrics["loss"]) != 1:
            raise ValueError("train: losses of the shape (steps,) are needed, or metrics with such a 'loss'")
        return last, {name: x for name, x in metrics.items() if jnp.shape(x) == jnp.shape(metrics["loss"])}

    chosen = devices[: len(next(iter(members.values())))]
    way, why = strategy, "as asked"
    if strategy == "auto":
        way = "map" if chosen[0].platform == "cpu" else "vmap"
        why = "a training of your own: map on CPU, vmap elsewhere"
    if way == "loop":
        raise ValueError("strategy='loop': it is for a Step; a training of your own runs by map or vmap")
    return _trained(one, (state, data), members, way, why, chosen, limit)


def _trained(one: Any, given: Any, members: Any, way: str, why: str, devices: list[Any], limit: float) -> Sweep:
    count = len(next(iter(members.values())))
    mesh = Mesh(np.asarray(devices), ("members",))
    split, everywhere = (NamedSharding(mesh, PartitionSpec(*axes)) for axes in (("members",), ()))
    more = -count % len(devices)
    rows = {n: jax.device_put(np.pad(x, (0, more), mode="edge"), split) for n, x in members.items()}

    def run(given: Any, rows: Any) -> Any:
        each = lambda row: one(given, row)  # noqa: E731
        return jax.vmap(each)(rows) if way == "vmap" else jax.lax.map(each, rows)

    parts = PartitionSpec("members")
    sharded = jax.shard_map(run, mesh=mesh, in_specs=(PartitionSpec(), parts), out_specs=parts, check_vma=False)
    given = jax.device_put(given, everywhere)
    begin = time.perf_counter()
    program = jax.jit(sharded).lower(given, rows).compile()
    compiled = time.perf_counter()
    states, metrics = jax.block_until_ready(program(given, rows))
    seconds = time.perf_counter() - compiled
    states, metrics = jax.tree.map(lambda x: x[:count], (states, metrics))
    metrics = {name: np.asarray(x, np.float32) for name, x in metrics.items()}
    losses = metrics["loss"]
    bound = losses[:, :1] + limit * np.maximum(np.abs(losses[:, :1]), np.finfo(np.float32).tiny)
    bad = ~(np.isfinite(losses) & (losses <= bound))
    diverged_at = np.where(bad.any(axis=1), bad.argmax(axis=1), -1)
    gone = np.maximum.accumulate(bad, axis=1)
    metrics = {name: np.where(gone, np.nan, x) for name, x in metrics.items()}
    window, final = _ends(metrics["loss"], diverged_at)
    return Sweep(
        values=dict(members), metrics=metrics, diverged_at=diverged_at, final=final, window=window, states=states,
        strategy=way, why=why, compiles=1, compile_seconds=compiled - begin, seconds=seconds,
    )  # fmt: skip
