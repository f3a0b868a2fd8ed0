"""Many runs of one step as one compiled program, each with its own values.

The engine of `jaxsgd.sweep`, `jaxsgd.probe` and `jaxsgd.pick`.
"""

from __future__ import annotations

import itertools
import math
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxsgd.ensemble.concrete import Concrete
from jaxsgd.ensemble.dealer import Dealer
from jaxsgd.ensemble.divergence import EARLY, IN_A_ROW, least_losses, risen, without_skipped
from jaxsgd.numerics import is_key, strong
from jaxsgd.paths import is_function, leaf_names
from jaxsgd.record import flat_metrics
from jaxsgd.train import Step
from jaxsgd.transforms.skipping import skipped_now

__all__ = ["STRATEGIES", "Population"]

STRATEGIES = ("auto", "vmap", "map", "loop")
TIMED = 0.05
"""Seconds that ``strategy="auto"`` spends on the timing of each form, roughly."""


class Fate(NamedTuple):
    """The fate of a member.

    Attributes:
      alive: bool scalar, whether all its numbers were finite so far.
      steps: int32 scalar, steps taken.
      diverged_at: int32 scalar, the steps it had taken when it diverged, or -1.
    """

    alive: jax.Array
    steps: jax.Array
    diverged_at: jax.Array


class Population:
    """Runs that differ in some values, trained together on the same batches. Each run is a member.

    Args:
      build: ``build(**scalars) -> (step, state)``, or ``build(given, **scalars)``, called inside a trace: a
        `jaxsgd.Step` or a pure ``step(state, batch) -> (state, metrics)``, and the initial state. One that refuses
        traced scalars, since it tests them in Python, is called with the numbers of each member.
      values: name -> array ``(members,)``, the values in which the members differ.
      given: a tree of arrays for ``build``, such as the initial parameters. It is an argument of the compiled program,
        not a constant in it.
      strategy: the way one compiled program serves all members.

        - ``"vmap"``: all at once in one batched program, which fills a wide device;
        - ``"map"``: one after the other (`jax.lax.map`), with the temporaries of one; frozen members cost nothing;
        - ``"loop"``: a program of one step of one member, called for each in turn. XLA for CPU runs the gradients of
          convolutions dozens of times slower inside any loop or branch, so it is the best choice for them;
        - ``"auto"``: loop for convolutions on CPU. Otherwise one program with vmap and map; the first steps are timed
          and the faster one is used. Only map if vmap does not fit in memory.
      devices: the devices that share the members. Their number need not divide the members. Default: the first device.
      limit: three losses in a row so many times above the usual loss are a divergence. The usual loss of a step is the
        lowest of all members; of the first eight steps the largest such loss counts. With small batches the first loss
        alone says little. With inf, only numbers that are not finite are a divergence. Default: 10.
      chunk: steps per call of the program (1 for the loop). Default: 16.
      memory: bytes of a device for states and temporaries, by which ``"auto"`` decides. Default: what is free.

    A member whose loss, gradient or update is not finite is frozen before that update, so its state stays finite. A
    member whose losses exceed the limit is frozen at the end of `advance`. The metrics of both are NaN from then on.

    Attributes:
      members: the number of members.
      strategy: the strategy in use (``"auto"`` before the first steps), and ``why``, the reason.
      compiles, compile_seconds: the number of compiles of a step, and their time.
      names: the names of the metrics, once a batch was seen.
    """

    def __init__(
        self,
        build: Callable[..., tuple[Any, Any]],
        values: Mapping[str, Any],
        *,
        given: Any = None,
        strategy: str = "auto",
        devices: Sequence[Any] | None = None,
        limit: float = 10.0,
        chunk: int = 16,
        memory: float | None = None,
    ) -> None:
        if strategy not in STRATEGIES:
            raise ValueError(f"strategy={strategy!r}: known are {', '.join(STRATEGIES)}")
        if not limit > 0:
            raise ValueError(f"limit={limit}: a number above 0 is needed. Use inf to ignore the size of the loss")
        self._build, self._given = build, given
        self.limit, self.chunk = limit, chunk
        self.values = {name: np.asarray(value) for name, value in values.items()}
        sizes = {name: value.shape for name, value in self.values.items()}
        if not sizes or len(set(sizes.values())) != 1 or len(next(iter(sizes.values()))) != 1:
            raise ValueError(f"values: one array of the shape (members,) for each name is needed, got {sizes}")
        self.members = len(next(iter(self.values.values())))
        self.strategy, self.why = strategy, "as asked"
        self.compiles, self.compile_seconds = 0, 0.0
        self._dealer = Dealer(list(devices) if devices else jax.devices()[:1], self.members)
        self.devices, self._rows = self._dealer.devices, self._dealer.rows
        self._memory = memory
        self._program: Any = None
        self._form = 0
        self.names: list[str] = []
        self._step = jax.jit(self._stepped, inline=True)  # traced once for all forms
        if self._given is not None:
            self._given = self._dealer.share(jax.tree.map(strong, self._given))
        self._concrete: Concrete | None = None
        self._gone_at = -np.ones(self.members, int)  # of members above the limit, the steps they had taken
        self._over = np.zeros((self.members, IN_A_ROW - 1), bool)
        self._least: list[float] = []
        self._elsewhere: list[float] = []  # the least losses of runs that were trained before these
        self._last = np.zeros((0, 0), np.float32)  # the metrics of each member's last step
        self._row = jax.jit(self._dealer.on_each(_row, 1))
        self._with_row = jax.jit(self._dealer.on_each(_with_row, 1), donate_argnums=(2,))
        self._inputs: Any = self.values
        self._carry: Any = None
        self._compile_starts()
        self._try_concrete(self._start_all)
        _refuse_narrow(self._carry[0])

    # -- members ------------------------------------------------------------------------------

    @property
    def states(self) -> Any:
        """The members' states, stacked along a first axis."""
        return self._dealer.cut(self._carry[0])

    @property
    def host_states(self) -> Any:
        """The members' states on the host."""
        return self._dealer.host(self._carry[0])

    def share(self, tree: Any) -> Any:
        """Arrays on all devices of the members."""
        return self._dealer.share(tree)

    def fetch(self, x: jax.Array) -> np.ndarray:
        """An array on the host, of several processes on each."""
        return self._dealer.fetch(x)

    @property
    def alive(self) -> np.ndarray:
        """``(members,)`` bool: has not diverged."""
        return self._dealer.fetch(self._carry[1].alive)[: self.members] & (self._gone_at < 0)

    @property
    def diverged_at(self) -> np.ndarray:
        """``(members,)`` int: the steps a member had taken when it diverged, or -1."""
        return np.where(
            self._gone_at >= 0, self._gone_at, self._dealer.fetch(self._carry[1].diverged_at)[: self.members]
        )

    @property
    def steps(self) -> np.ndarray:
        """``(members,)`` int: the steps a member has taken since its start."""
        return self._dealer.fetch(self._carry[1].steps)[: self.members]

    def restart(self, mask: Any, values: Mapping[str, Any]) -> None:
        """Restart the members in ``mask`` ``(members,)`` with ``values`` ``(members,)``; the others continue."""
        mask = np.asarray(mask, bool)
        self.values = {name: np.where(mask, np.asarray(values[name]), old) for name, old in self.values.items()}
        self._gone_at, self._over = np.where(mask, -1, self._gone_at), self._over & ~mask[:, None]
        if len(self._last):
            self._last[mask] = np.nan
        self._read_values()
        self._carry = self._restart(self._given, self._dealer.deal(self._inputs), self._dealer.deal(mask), self._carry)

    def renew(self, values: Mapping[str, Any]) -> None:
        """Replace all members by new runs with ``values`` ``(members,)``; the compiled program is kept.

        The usual loss, against which a divergence is judged, is that of the runs before and of the new ones.
        """
        self._elsewhere, self._least = _lower(self._least, self._elsewhere), []
        self.restart(np.ones(self.members, bool), values)

    def _compile_starts(self) -> None:
        born, again = jax.vmap(self._born, in_axes=(None, 0)), jax.vmap(self._again, in_axes=(None, 0, 0, 0))
        self._begin = jax.jit(self._dealer.on_each(born, 1))
        self._restart = jax.jit(self._dealer.on_each(again, 1), donate_argnums=(3,))

    def _start_all(self) -> None:
        self._carry = self._begin(self._given, self._dealer.deal(self._inputs))

    def _try_concrete(self, call: Callable[[], Any]) -> Any:
        """``call()``, where need be with a builder that gets numbers instead of tracers: rates, or all values."""
        floats = [name for name, x in self.values.items() if np.issubdtype(x.dtype, np.floating)]
        ways = [None, floats, list(self.values)] if 0 < len(floats) < len(self.values) else [None, list(self.values)]
        for names in ways:
            try:
                if names is not None:
                    self._concrete = Concrete(self._build_one, self._given, names)
                    self._read_values()
                    self._compile_starts()
                    if self._carry is not None:  # no step was taken yet
                        self._start_all()
                return call()
            except TypeError:  # a tracer was asked for its value
                if names is ways[-1]:
                    raise
        raise AssertionError("unreachable")

    def _read_values(self) -> None:
        """What the programs get of each member: its values, or the constants that its numbers make."""
        if self._concrete is None:
            self._inputs = self.values
            return
        before = self._concrete.version
        self._inputs = self._concrete.inputs(self.values)
        if self._concrete.version != before:
            self._program, self._form = None, 0
            self._step = jax.jit(self._stepped, inline=True)
            self._compile_starts()

    # -- resuming -----------------------------------------------------------------------------

    @property
    def snapshot(self) -> dict[str, Any]:
        """Everything that changes in training, as arrays of fixed shapes; assign one to continue there.

        After `look` only: the number of metrics is not known before.
        """
        least = np.full((2, EARLY), np.inf, np.float32)
        for row, losses in zip(least, (self._least, self._elsewhere), strict=True):
            row[: len(losses)] = losses
        judged = {"gone_at": self._gone_at.astype(np.int32), "over": self._over, "least": least, "last": self._last}
        return {"carry": self._carry, "judged": self._dealer.share(judged)}

    @snapshot.setter
    def snapshot(self, saved: Mapping[str, Any]) -> None:
        judged = jax.tree.map(lambda x: np.array(self._dealer.fetch(x)), saved["judged"])
        self._carry, self._gone_at, self._over = saved["carry"], judged["gone_at"].astype(int), judged["over"]
        self._least, self._elsewhere = ([x for x in row.tolist() if x < np.inf] for row in judged["least"])
        self._last = judged["last"]

    # -- one member ---------------------------------------------------------------------------

    def _build_one(self, given: Any, /, **values: Any) -> tuple[Callable[..., Any], Any]:
        built = self._build(**values) if given is None else self._build(given, **values)
        if not isinstance(built, tuple) or len(built) != 2 or not is_function(built[0]):
            raise TypeError(f"build: (step, state) is needed; it returns a {type(built).__name__}")
        step, state = built
        return (step.fn if isinstance(step, Step) else step), state

    def _born(self, given: Any, inputs: Any) -> tuple[Any, Fate]:
        state = self._build_one(given, **inputs)[1] if self._concrete is None else self._concrete.start(given, inputs)
        zero = jnp.zeros((), jnp.int32)
        return state, Fate(jnp.ones((), bool), zero, zero - 1)

    def _again(self, given: Any, inputs: Any, restarts: jax.Array, carry: Any) -> Any:
        return _where(restarts, self._born(given, inputs), carry)

    def _stepped(self, given: Any, batch: Any, inputs: Any, active: jax.Array, carry: Any) -> Any:
        """A member after a step, and the row of its metrics: unchanged and NaN if it does not train."""
        state, fate = carry
        if self._concrete is None:
            new, report = self._build_one(given, **inputs)[0](state, batch)
        else:
            new, report = self._concrete.move(given, inputs, state, batch)
        scalars = _scalars(report)
        self.names = list(scalars)
        sound = jnp.ones((), bool)
        for name in ("loss", "gradient_norm", "update_norm"):
            sound &= jnp.isfinite(scalars.get(name, scalars["loss"]))
        skipped = skipped_now(state, new)
        skipped = jnp.zeros((), bool) if skipped is None else skipped
        trains = active & fate.alive
        ok = trains & (sound | skipped)
        left = jnp.where(trains & ~ok, fate.steps, fate.diverged_at)
        fate = Fate(fate.alive & (ok | ~active), fate.steps + ok, left)
        row = jnp.stack([x.astype(jnp.float32) for x in scalars.values()])
        return (_where(ok, new, state), fate), jnp.where(ok & ~skipped, row, jnp.nan)

    def _chunk(self, forms: tuple[str, ...]) -> Callable[..., Any]:
        """``(form, given, batches, on, values, active, carry) -> (carry, metrics)``; ``form`` indexes ``forms``."""

        def one(given: Any, batches: Any, on: jax.Array, values: Any, active: jax.Array, carry: Any) -> Any:
            def train(carry: Any, batch: Any) -> Any:
                return self._step(given, batch, values, active, carry)

            def skip(carry: Any, batch: Any) -> Any:
                return carry, jnp.full(len(self.names), jnp.nan, jnp.float32)

            def body(carry: Any, x: tuple[Any, jax.Array]) -> Any:
                batch, on = x
                trains = lambda carry, batch: jax.lax.cond(carry[1].alive & active, train, skip, carry, batch)  # noqa: E731
                return jax.lax.cond(on, trains, skip, carry, batch)  # under vmap this stays a branch

            return jax.lax.scan(body, carry, (batches, on))

        def run(form: jax.Array, given: Any, batches: Any, on: jax.Array, *rows: Any) -> Any:
            each = lambda row: one(given, batches, on, *row)  # noqa: E731
            ways = {"vmap": jax.vmap(each), "map": lambda rows: jax.lax.map(each, rows)}
            return jax.lax.switch(form, [ways[name] for name in forms], rows)

        def single(form: jax.Array, given: Any, batch: Any, on: jax.Array, *row: Any) -> Any:
            values, active, carry = jax.tree.map(lambda x: x[0], row)
            return jax.tree.map(lambda x: x[None], self._step(given, batch, values, active, carry))

        return self._dealer.on_each(single if forms == ("loop",) else run, 4)

    # -- the program --------------------------------------------------------------------------

    def _compile(self, forms: tuple[str, ...], *args: Any) -> Any:
        begin = time.perf_counter()
        program = jax.jit(self._chunk(forms), donate_argnums=(6,)).lower(*args).compile()
        self.compiles += 1
        self.compile_seconds += time.perf_counter() - begin
        return program

    def look(self, batches: Any) -> None:
        """Trace a step of one member, to learn the names of its metrics and the form that suits it; once."""
        if self.names:
            return
        one = lambda x: jax.ShapeDtypeStruct(x.shape[1:], x.dtype)  # noqa: E731
        on, batch = jax.ShapeDtypeStruct((), jnp.bool_), jax.tree.map(one, batches)

        def trace() -> Any:
            if self._concrete is not None:
                self._concrete.sees(batch)
                self._read_values()
            inputs, carry = (jax.tree.map(one, x) for x in (self._dealer.deal(self._inputs), self._carry))
            return self._step.trace(self._given, batch, inputs, on, carry)

        traced = self._try_concrete(trace)
        self._last = np.full((self.members, len(self.names)), np.nan, np.float32)
        if self.strategy != "auto":
            return
        if self.devices[0].platform == "cpu" and "conv_general_dilated" in str(traced.jaxpr):
            self.strategy, self.why = "loop", "XLA for CPU is slow at convolutions inside a loop"
        elif self._rows == 1:
            self.strategy, self.why = "map", "one member a device"

    def _prepare(self, *args: Any) -> Any:
        """Compile for these arguments; under auto without vmap if it does not fit in memory."""
        if self.strategy != "auto":
            return self._compile((self.strategy,), *args)
        room = self._room()
        try:
            program = self._compile(("vmap", "map"), *args)
            needs = program.memory_analysis().temp_size_in_bytes
        except jax.errors.JaxRuntimeError as error:
            if "RESOURCE_EXHAUSTED" not in str(error):
                raise
            needs, room = math.inf, 0.0
        if room is None or self._dealer.least(float(needs <= room)):
            return program
        self.why = f"vmap needs {needs / 2**30:.3g} GiB beside the states, {room / 2**30:.3g} GiB are free"
        self.strategy, self._form = "map", 0
        return self._compile(("map",), *args)

    def _room(self) -> float | None:
        """Bytes of a device that temporaries may take."""
        if self._memory is None:
            return free_bytes(self._dealer.local)
        states = sum(x.dtype.itemsize * x.size for x in jax.tree.leaves(self._carry)) / len(self.devices)
        return max(0.0, self._memory - states)

    # -- going forward ------------------------------------------------------------------------

    def advance(self, batches: Any, active: Any = None) -> dict[str, np.ndarray]:
        """Train every member on ``batches``, arrays of the shape ``(steps, ...)``.

        Args:
          batches: the same for all members.
          active: ``(members,)`` bool: the members to train. Members that diverged never train. Default: all.

        Returns:
          name -> ``(members, steps)`` float32, the scalar metrics of each step; NaN where a member did not train. A
          step that the optimizer skipped, see `jaxsgd.guard`, has those of the step before.
        """
        active = (np.ones(self.members, bool) if active is None else np.asarray(active, bool)) & (self._gone_at < 0)
        before = self.steps
        self.look(batches)
        if self.strategy == "loop":
            table = self._looped(batches, active)
        else:
            steps, tables = len(jax.tree.leaves(batches)[0]), []
            rows, done = (self._dealer.deal(self._inputs), self._dealer.deal(active)), 0
            while done < steps:
                for form, count in self._turns(steps - done):
                    row = self._run(batches, done, count, rows, form)
                    tables.append((count, row))
                    done += count
            table = np.concatenate([self._dealer.fetch(row)[:, :count] for count, row in tables], axis=1)
        table = table[: self.members].copy()
        self._fill(table, self.steps - before)
        self._judge(table, before)
        return {name: table[:, :, i] for i, name in enumerate(self.names)}

    def _fill(self, table: np.ndarray, taken: np.ndarray) -> None:
        """Give the steps that an optimizer skipped the metrics of the step before, or of the first that it took."""
        for rows, last, count in zip(table, self._last, taken, strict=True):
            rows[:count] = without_skipped(rows[:count], np.isnan(rows[:count]).all(axis=1), last)
            if count:
                last[:] = rows[count - 1]

    def _judge(self, table: np.ndarray, before: np.ndarray) -> None:
        """Freeze members whose losses are above the limit, and set their metrics to NaN from there on."""
        losses = table[:, :, self.names.index("loss")]
        self._least += least_losses(losses, EARLY - len(self._least))
        least = _lower(self._least, self._elsewhere)
        rises, self._over = risen(losses, least, self.limit, self._over)
        for member in np.flatnonzero((rises >= 0) & (self._gone_at < 0)):
            self._gone_at[member] = before[member] + rises[member]
            table[member, rises[member] :] = np.nan

    def _run(self, batches: Any, first: int, count: int, rows: tuple[Any, ...], form: int) -> Any:
        """One call of the program over ``count`` batches, padded to a chunk with the last one."""
        index = np.minimum(np.arange(first, first + self.chunk), first + count - 1)
        cut = jax.tree.map(lambda x: x[first : first + count] if count == self.chunk else x[index], batches)
        on = np.arange(self.chunk) < count
        cut, on, which = self._dealer.share((cut, on, np.int32(form)))
        if self._program is None:
            self._program = self._prepare(which, self._given, cut, on, *rows, self._carry)
            if self.strategy != "auto":  # there may be one form only
                which = self._dealer.share(np.int32(self._form))
        self._carry, row = self._program(which, self._given, cut, on, *rows, self._carry)
        return row

    def _turns(self, left: int) -> Iterator[tuple[int, int]]:
        """The next calls, as (form, steps); under auto the first ones time each form."""
        if self.strategy != "auto":
            yield self._form, min(self.chunk, left)
            return
        seconds: dict[str, float] = {}
        count = 1
        for timed in (False, True):
            for form, name in enumerate(("vmap", "map")):
                if left < count or self.strategy != "auto":
                    return
                begin = time.perf_counter()
                yield form, count
                jax.block_until_ready(self._carry)
                seconds[name] = (time.perf_counter() - begin) / count
                left -= count
            if not timed:
                count = int(self._dealer.least(int(np.clip(TIMED / max(seconds.values()), 2, self.chunk))))
        self._form = int(self._dealer.least(float(seconds["map"] < seconds["vmap"])))
        self.strategy = ("vmap", "map")[self._form]
        self.why = ", ".join(f"{name} {1e3 * s:.3g} ms" for name, s in seconds.items()) + " a step of all runs"

    def _looped(self, batches: Any, active: np.ndarray) -> np.ndarray:
        """Steps of single members, one on each device, called in turn: ``(members, steps, names)``."""
        index = [self._dealer.share(np.int32(r)) for r in range(self._rows)]
        whole = (self._dealer.deal(self._inputs), self._dealer.deal(active), self._carry)
        rows = [self._row(r, whole) for r in index]
        steps, left = len(jax.tree.leaves(batches)[0]), []
        form, on = self._dealer.share((np.int32(0), np.bool_(True)))
        carry = [row[2] for row in rows]
        for i in range(steps):
            batch = jax.tree.map(lambda x, i=i: x[i], batches)
            shared = (form, self._given, self._dealer.share(batch), on)
            if self._program is None:
                self._program = self._prepare(*shared, *rows[0])
            if i % self.chunk == 0:  # looking waits for the device
                going = [
                    bool(np.any(self._dealer.fetch(h[1].alive & row[1]))) for h, row in zip(carry, rows, strict=True)
                ]
            for r in np.flatnonzero(going):
                carry[r], metrics = self._program(*shared, *rows[r][:2], carry[r])
                left.append((r, i, metrics))
        for r, member in zip(index, carry, strict=True):
            self._carry = self._with_row(r, member, self._carry)
        table = np.full((len(self.devices), self._rows, steps, len(self.names)), np.nan, np.float32)
        for r, i, metrics in left:
            table[:, r, i] = self._dealer.fetch(metrics)
        return table.reshape(-1, steps, len(self.names))


def _lower(some: list[float], others: list[float]) -> list[float]:
    """The lower of two lists in each place; a list that ends has nothing to say."""
    return [min(pair) for pair in itertools.zip_longest(some, others, fillvalue=math.inf)]


def _refuse_narrow(states: Any) -> None:
    """Check that no leaf has less than 8 bits: a compiled program over devices refuses their layout.

    Raises:
      ValueError: names the leaf.
    """
    for name, leaf in zip(leaf_names(states), jax.tree.leaves(states), strict=True):
        if not is_key(leaf) and jax.dtypes.itemsize_bits(leaf.dtype) < 8:
            raise ValueError(f"state: {name!r} is {leaf.dtype.name}; runs side by side need at least 8 bits. Use int8")


def _scalars(report: Mapping[str, Any]) -> dict[str, jax.Array]:
    """The scalar metrics of a step by name, including those of ``aux``."""
    scalars = flat_metrics(report)
    if "loss" not in scalars or scalars["loss"].shape:
        raise ValueError(f"step: its metrics need a scalar 'loss'; it has {sorted(scalars)}")
    real = lambda x: x.shape == () and not jnp.issubdtype(x.dtype, jnp.complexfloating)  # noqa: E731
    return {name: x for name, x in scalars.items() if real(x)}


def _row(r: jax.Array, tree: Any) -> Any:
    return jax.tree.map(lambda x: jax.lax.dynamic_slice_in_dim(x, r, 1), tree)


def _with_row(r: jax.Array, row: Any, tree: Any) -> Any:
    return jax.tree.map(lambda x, new: jax.lax.dynamic_update_slice_in_dim(x, new, r, 0), tree, row)


def _where(condition: jax.Array, new: Any, old: Any) -> Any:
    return jax.tree.map(lambda a, b: jnp.where(condition, a, b), new, old)


def free_bytes(device: Any) -> float | None:
    """The free memory of a device, or None if it is unknown."""
    stats = device.memory_stats() or {}
    if "bytes_limit" in stats:
        return 0.9 * (stats["bytes_limit"] - stats.get("bytes_in_use", 0))
    try:
        return 0.8 * os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (ValueError, OSError, AttributeError):
        return None
