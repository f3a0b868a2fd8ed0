"""One candidate's runs in a race: a grid of rates, then full runs, all through one compiled program."""

from __future__ import annotations

import inspect
import itertools
import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from jaxsgd.batches import batch_size
from jaxsgd.ensemble.feed import Feed, is_one_batch
from jaxsgd.ensemble.losses import apart, pure_loss
from jaxsgd.ensemble.population import Population
from jaxsgd.loss import fold_keys
from jaxsgd.paths import is_function
from jaxsgd.progress import Bar
from jaxsgd.train import make_step
from jaxsgd.train_state import TrainState

__all__ = ["LEAST_STEPS", "Plan", "Race", "Sources", "plan", "plans"]

LEAST_STEPS = 8
COARSE = math.sqrt(10)
"""The factor between neighbours of the grid."""
BESIDE = 10**0.25
"""The factor between the rates of full runs."""
PIECE = 64
"""Steps whose batches are made at once."""


class Plan(NamedTuple):
    """The steps of one candidate.

    Attributes:
      horizon: of a short training.
      rates, refined: short runs on the grid, and around its best.
      finals: rates of the full runs.
      steps, seeds: of a full training, and how many at each rate.
    """

    horizon: int
    rates: int
    refined: int
    finals: int
    steps: int
    seeds: int

    @property
    def cost(self) -> int:
        return (self.rates + self.refined) * self.horizon + self.finals * self.seeds * self.steps


def plan(steps: int, seeds: int) -> Plan:
    """The plan without a budget."""
    return Plan(-(-steps // 4), 9, 4, 3, steps, seeds)


def plans(steps: int, seeds: int) -> list[Plan]:
    """From the richest to the least."""
    ways = [(1, 9, 4, 3), (2, 9, 4, 3), (4, 9, 4, 3), (4, 9, 4, 1), (4, 9, 0, 1), (8, 9, 0, 1), (8, 7, 0, 1)]
    ways.append((8, 5, 0, 1))
    return [Plan(-(-steps // part), rates, refined, finals, steps, seeds) for part, rates, refined, finals in ways]


class Sources:
    """The batches of each seed, from their beginning as often as one asks.

    Args:
      data: as in `jaxsgd.pick`.
      steps: of a full training.
      seeds: of the full runs.
      takes: whether the loss takes a batch. Default: unknown.

    Attributes:
      rows: how many batches a step takes: one for all seeds, or one for each.
    """

    def __init__(self, data: Any, steps: int, seeds: int, takes: Callable[[Any], bool] | None = None) -> None:
        self._of: Callable[[int], Any]
        self._takes = takes
        if is_function(data) or is_one_batch(data, takes) or not isinstance(data, Iterable):
            Feed(data, takes)  # says what is wrong with it
            self.rows, self._of = 1, lambda seed: data
            if is_function(data) and _takes_two(data):
                made: Callable[..., Any] = data
                self.rows, self._of = seeds, lambda seed: lambda step: made(step, seed)
            return
        batches = data if isinstance(data, Sequence) else list(itertools.islice(data, steps))
        if not batches:
            raise ValueError("data: it is empty; at least one batch is needed")
        self.rows = seeds if len(batches) > 1 else 1
        self._of = lambda seed: _shuffled(batches, seed)

    def blocks(self, seeds: Sequence[int], steps: int) -> Iterable[tuple[int, Any]]:
        """``(count, batches)`` with batches ``(count, rows, ...)``, in order: of one seed for all rows, or of each."""
        feeds = [Feed(self._of(seed), self._takes) for seed in seeds[: self.rows]]
        for first in range(0, steps, PIECE):
            count = min(PIECE, steps - first)
            taken = [feed.take(count) for feed in feeds]
            taken *= self.rows // len(taken)
            yield count, jax.tree.map(lambda *xs: np.stack(xs, axis=1), *taken)


def _takes_two(fn: Callable[..., Any]) -> bool:
    try:
        parameters = inspect.signature(fn).parameters.values()
    except ValueError:
        return False
    kinds = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    return sum(p.kind in kinds and p.default is p.empty for p in parameters) >= 2


def _shuffled(batches: Sequence[Any], seed: int) -> Callable[[int], Any]:
    """The batches in an order of the seed's own, another on each pass."""
    orders: dict[int, np.ndarray] = {}

    def at(step: int) -> Any:
        turn, place = divmod(step, len(batches))
        if turn not in orders:
            orders[turn] = np.random.default_rng((seed, turn)).permutation(len(batches))
        return batches[orders[turn][place]]

    return at


class Race:
    """One candidate's runs.

    Attributes:
      used: steps taken, ``tuning`` of them in short runs.
      compiles: how often the training step was compiled.
    """

    def __init__(
        self,
        name: str,
        make: Callable[..., Any],
        usual: float,
        loss_fn: Callable[..., Any],
        init: Callable[..., Any],
        sources: Sources,
        validation: list[Any],
        window: int | None,
        strategy: str,
        devices: Sequence[Any],
        bar: Bar,
    ) -> None:
        self.name, self.usual, self.window, self.bar = name, usual, window, bar
        self.used = self.tuning = 0
        self._sources, self._strategy, self._devices = sources, strategy, devices
        self._population: Population | None = None

        def build(learning_rate: jax.Array, seed: jax.Array, row: jax.Array) -> tuple[Any, Any]:
            tx = make(learning_rate)
            step = make_step(loss_fn, tx).fn
            init_key, key = jax.random.split(jax.random.key(seed))
            graphdef, params, held = apart(init(init_key))
            held = fold_keys(held, seed)
            opt_state = optax.with_extra_args_support(tx).init(params)
            state = TrainState(jnp.zeros((), jnp.int32), params, opt_state, key, held, graphdef)
            return (lambda state, batches: step(state, jax.tree.map(lambda x: x[row], batches))), state

        self._build = build
        self._batches = validation
        self._score = jax.jit(lambda states, index, batch: _validate(loss_fn, states, index, batch))

    @property
    def compiles(self) -> int:
        return 0 if self._population is None else self._population.compiles

    # -- the two parts ---------------------------------------------------------------------------

    def tune(self, plan: Plan) -> tuple[np.ndarray, np.ndarray, float]:
        """``(rates, losses, start)`` of the short runs, in rising order of the rate."""
        places = max(plan.rates, plan.refined, plan.finals * plan.seeds)
        centre = np.arange(plan.rates) - plan.rates // 2
        rates = self.usual * COARSE**centre
        losses, starts, _ = self._train(rates, [0] * len(rates), plan.horizon, places, plan.horizon // 4)
        if plan.refined:
            best = int(np.argmin(losses))
            beside = np.array([-0.25, -0.125, 0.125, 0.25])
            if best in (0, len(rates) - 1):  # the grid goes on
                beside = np.array([-0.25, 0.25, 0.5, 1.0]) * (1 if best else -1)
            more = rates[best] * 10**beside
            found, _, _ = self._train(more, [0] * len(more), plan.horizon, places, plan.horizon // 4)
            rates, losses = np.append(rates, more), np.append(losses, found)
        self.tuning = self.used
        order = np.argsort(rates)
        return rates[order], losses[order], float(starts[0])

    def finish(self, plan: Plan, middle: float) -> tuple[dict[float, np.ndarray], np.ndarray, int]:
        """``(rate -> final losses, first losses, how many diverged)`` of the full runs."""
        rates = [middle] if plan.finals == 1 else [middle / BESIDE, middle, middle * BESIDE]
        seeds = list(range(1, plan.seeds + 1))
        places = max(plan.rates, plan.refined, plan.finals * plan.seeds)
        losses, starts, diverged = self._train(
            np.repeat(rates, plan.seeds), seeds * len(rates), plan.steps, places,
            self.window or plan.steps // 10, list(range(plan.seeds)) * len(rates),
        )  # fmt: skip
        table = losses.reshape(len(rates), plan.seeds)
        return {float(r): row for r, row in zip(rates, table, strict=True)}, starts[: plan.seeds], diverged

    # -- training --------------------------------------------------------------------------------

    def _train(
        self,
        rates: np.ndarray,
        seeds: list[int],
        steps: int,
        places: int,
        window: int,
        rows: list[int] | None = None,
    ) -> tuple[np.ndarray, np.ndarray, int]:
        """``(losses, first losses, how many diverged)`` of runs that begin now; ``window`` steps make a loss."""
        count = len(rates)
        pad = lambda x, dtype: np.resize(np.asarray(x, dtype), places)  # noqa: E731
        own = rows if rows is not None and self._sources.rows > 1 else [0] * count
        values = {"learning_rate": pad(rates, np.float32), "seed": pad(seeds, np.int32), "row": pad(own, np.int32)}
        if self._population is None:
            self._population = Population(self._build, values, strategy=self._strategy, devices=self._devices)
        else:
            self._population.restart(np.ones(places, bool), values)
        population, active = self._population, np.arange(places) < count
        starts = self._validated(range(count)) if self._batches else None
        losses = []
        for taken, block in self._sources.blocks(list(dict.fromkeys(seeds)), steps):
            losses.append(population.advance(block, active)["loss"][:count].astype(np.float64))
            self.bar.advance(taken * count, f"{self.name}, {rates.min():.1e} to {rates.max():.1e}")
        table = np.concatenate(losses, axis=1)
        alive = population.alive[:count]
        self.used += int(np.minimum(population.steps[:count] + ~alive, steps).sum())  # what is not finite is a step too
        if starts is None:
            starts = table[:, 0]
            ends = table[:, -max(1, window) :].mean(1)
        else:
            ends = self._validated(range(count))
        if not np.isfinite(starts).all():
            raise ValueError(f"loss_fn: the first loss is not finite ({self.name}); check init and data")
        return np.where(alive & np.isfinite(ends), ends, starts), starts, int((~alive).sum())

    def _validated(self, members: Iterable[int]) -> np.ndarray:
        assert self._population is not None
        states = self._population.states
        sizes = np.array([batch_size(batch) or 1 for batch in self._batches], float)
        fetch = self._population.fetch
        rows = [[fetch(self._score(states, np.int32(i), batch)) for batch in self._batches] for i in members]
        return np.asarray(rows, np.float64) @ (sizes / sizes.sum())


def _validate(loss_fn: Callable[..., Any], states: Any, index: jax.Array, batch: Any) -> jax.Array:
    state = jax.tree.map(lambda x: x[index], states)
    fn, _ = pure_loss(loss_fn, state)
    return fn(state.eval_params, batch, jax.random.key(0)).astype(jnp.float32)
