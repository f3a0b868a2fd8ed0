"""The classical range test: one run whose learning rate rises from far too low to far too high.

It costs a single short run. `jaxsgd.probe` trains each rate from the same start instead, which costs more and says
more.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np

from jaxsgd.ensemble.concrete import by_index
from jaxsgd.ensemble.feed import Feed
from jaxsgd.ensemble.losses import takes
from jaxsgd.ensemble.population import Population
from jaxsgd.progress import Bar
from jaxsgd.report import Column, Report, Table, number
from jaxsgd.rules.adaptive import adamw
from jaxsgd.state import State
from jaxsgd.train_state import TrainState
from jaxsgd.tuning.short_runs import beginning, budget, checked_rule, usual_rate

__all__ = ["RangeTest", "range_test", "rising"]

STAIRS = 32
"""So many rates at most for a rule that is traced at each of them."""
PIECE = 16
"""Steps between two looks at whether the loss has blown up."""
KEEP, LAST = 0.98, 5
"""fastai's smoothing, and the steps at the end that its suggestions leave out; they leave out a tenth at the start."""
ROWS = 8
"""Rows of the table."""


@dataclass(frozen=True, repr=False)
class RangeTest(Report):
    """The loss under a rising learning rate, with fastai's two suggestions.

    Attributes:
      rates: the learning rate of each step taken.
      losses: the loss of each step, up to the one that diverged.
      smoothed: their exponential average, without its bias towards zero.
      steepest: the rate where the average fell fastest, by the logarithm of the rate; None where it never fell.
      valley: the rate in the middle of the longest descent; None where there is none.
      diverged: the rate at which the loss diverged, or None.
      steps: steps taken, some of them after it diverged.
    """

    rates: np.ndarray = field(repr=False)
    losses: np.ndarray = field(repr=False)
    smoothed: np.ndarray = field(repr=False)
    steepest: float | None
    valley: float | None
    diverged: float | None
    steps: int
    picture: ClassVar[str] = "range_test"

    @property
    def summary(self) -> str:
        """The two suggestions in one sentence."""
        end = "it did not diverge" if self.diverged is None else f"it diverged at {number(self.diverged)}"
        if self.steepest is None or self.valley is None:
            return f"range test, {self.steps} steps: the loss never fell; {end}"
        found = f"steepest {number(self.steepest)}, valley {number(self.valley)}"
        return f"range test, {self.steps} steps: {found}; {end}"

    @property
    def why(self) -> tuple[str, ...]:
        """The meaning of the two."""
        if self.steepest is None or self.valley is None:
            return ()
        return ("steepest: the smoothed loss fell fastest there; valley: the middle of its longest descent",)

    @property
    def next(self) -> tuple[str, ...]:
        """Advice."""
        return ("jaxsgd.probe trains each rate from the same start; its suggestion is better, see docs",)

    @property
    def table(self) -> Table:
        """The loss at some of the rates."""
        index = np.unique(np.linspace(0, len(self.rates) - 1, min(ROWS, len(self.rates))).astype(int))
        columns = (Column("rate"), Column("loss"), Column("smoothed"))
        rows = tuple((float(self.rates[i]), float(self.losses[i]), float(self.smoothed[i])) for i in index)
        return Table(columns, rows if len(self.rates) else ())


def range_test(
    loss_fn: Callable[..., Any],
    params: Any,
    data: Any,
    rule: Callable[[Any], Any] = adamw,
    *,
    steps: int = 100,
    low: float | None = None,
    high: float | None = None,
    key: int | jax.Array = 0,
    progress: bool | None = None,
) -> RangeTest:
    """Range test (Smith 2015, arXiv:1506.01186): a run whose learning rate rises by a constant factor a step.

    The suggestions are fastai's, with its smoothing and the points that it leaves out.

    Args:
      loss_fn: ``(params, batch, key) -> loss``, ``(loss, aux)`` too, or of ``(params, batch)``.
      params: a tree of parameters, an ``nnx.Module`` or a `jaxsgd.TrainState`; left as it is.
      data: see `jaxsgd.ensemble.feed.Feed`.
      rule: a rule, or a function of the learning rate that gives a gradient transformation. For one that tests the
        rate in Python (some schedules of optax) the rate rises in at most 32 stairs.
      steps: the number of steps, which is the cost. Default: 100.
      low, high: the first and the last rate. Default: four decades below and three above the rule's usual rate.
      key: a seed or a key for the random numbers in the loss. Default: 0.
      progress: show a bar after two seconds. Default: on if stderr is a terminal.

    Returns:
      A `RangeTest`.

    Raises:
      ValueError: fewer than 10 steps; rates that do not rise.
      TypeError: ``rule`` is a gradient transformation.

    >>> import jax.numpy as jnp
    >>> found = range_test(lambda p, batch: jnp.sum((p - batch) ** 2), jnp.zeros(3), jnp.ones(3), jaxsgd.sgd)
    >>> found.valley < found.diverged
    True
    """
    rule = checked_rule(rule)
    steps = budget(steps, 1.0, 10)
    given, begin = beginning(loss_fn, params, key)
    usual, _ = usual_rate(rule, given[0])
    low, high = (usual * 1e-4 if low is None else low), (usual * 1e3 if high is None else high)
    if not 0 < low < high < math.inf:
        raise ValueError(f"low={low}, high={high}: rates that rise are needed, both above 0")
    with Bar("range test", steps, progress) as bar:
        test = rising(given, begin, rule, Feed(data, takes(loss_fn, params)).take(steps), low, high)
        bar.advance(steps)
    return test


def rising(given: Any, begin: Callable[..., Any], rule: Any, batches: Any, low: float, high: float) -> RangeTest:
    """The test over stacked ``batches`` with what `beginning` gave."""
    steps = len(jax.tree.leaves(batches)[0])
    growth = math.log(high / low) / (steps - 1)
    rates = low * np.exp(growth * np.arange(steps))
    stairs = np.arange(steps) * min(steps, STAIRS) // steps
    levels = np.geomspace(low, high, min(steps, STAIRS))
    in_stairs = False

    def build(given: Any, first: Any) -> tuple[Any, Any]:
        def rated(state: TrainState, batch: Any) -> Any:
            rate = first * jnp.exp(growth * state.step.astype(jnp.float32))
            try:
                return at(rule(rate), state, batch)
            except TypeError:  # the rule asks a tracer for its value
                nonlocal in_stairs
                in_stairs = True
                index = jnp.asarray(stairs, jnp.int32)[jnp.minimum(state.step, steps - 1)]
                return at(by_index(rule, levels.tolist(), index), state, batch)

        def at(tx: Any, state: TrainState, batch: Any) -> Any:
            # A transformation of its own each step. What its state holds as the rate is brought up to date.
            step, fresh = begin((state.params, state.model_state, state.key), tx)
            return step(state.replace(opt_state=_rated(state.opt_state, fresh.opt_state)), batch)  # type: ignore[attr-defined]

        try:
            return rated, begin(given, rule(first))[1]
        except TypeError:
            return rated, begin(given, rule(low))[1]

    population = Population(build, {"first": np.array([low], np.float32)}, given=given, limit=math.inf)
    losses, taken = np.zeros(0), 0
    while taken < steps and len(losses) == taken:
        piece = jax.tree.map(lambda x, first=taken: x[first : first + PIECE], batches)
        losses = np.append(losses, population.advance(piece)["loss"][0])
        taken = len(losses)
        losses = losses[: _blown(losses)]
    smoothed = _smoothed(losses, KEEP)
    rates = levels[stairs] if in_stairs else rates
    seen = rates[: len(losses)]
    blown = None if len(losses) == taken else float(rates[len(losses)])
    cut = slice(steps // 10, max(len(seen) - LAST, 0))
    suggested = _steepest(seen[cut], smoothed[cut]), _valley(seen[cut], smoothed[cut])
    return RangeTest(seen, losses, smoothed, *suggested, blown, taken)


def _blown(losses: np.ndarray) -> int:
    """The steps before the loss is not finite, or four times what it was at the smallest rates."""
    usual = np.nanmax(losses[: max(1, min(8, len(losses) // 4))])
    bad = ~(losses <= usual + 3 * abs(usual))
    return int(bad.argmax()) if bad.any() else len(losses)


def _rated(held: Any, fresh: Any) -> Any:
    """The held state with the learning rates of a fresh one, but for those that a schedule sets in any case."""

    def update(old: Any, new: Any) -> Any:
        if not isinstance(old, State) or old.follows("learning_rate"):
            return old
        return old._replace(hyper={**old.hyper, "learning_rate": new.hyper["learning_rate"]})

    return jax.tree.map(update, held, fresh, is_leaf=lambda x: isinstance(x, State))


def _smoothed(losses: np.ndarray, keep: float) -> np.ndarray:
    average, out = 0.0, np.empty_like(losses)
    for i, loss in enumerate(losses):
        average = keep * average + (1 - keep) * loss
        out[i] = average / (1 - keep ** (i + 1))
    return out


def _steepest(rates: np.ndarray, smoothed: np.ndarray) -> float | None:
    """fastai's ``steep``."""
    if len(smoothed) < 3:
        return None
    slopes = np.diff(smoothed)  # the rates grow by a constant factor
    best = int(np.argmin(slopes))
    return float(rates[best]) if slopes[best] < 0 else None


def _valley(rates: np.ndarray, smoothed: np.ndarray) -> float | None:
    """fastai's ``valley``: the middle of the longest falling subsequence, which is taken as if it had no gaps."""
    if len(smoothed) < 3:
        return None
    length, last = np.ones(len(smoothed), int), 0
    for i in range(1, len(smoothed)):
        higher = smoothed[:i] > smoothed[i]
        length[i] = 1 + (length[:i][higher].max() if higher.any() else 0)
        last = i if length[i] > length[last] else last
    if length[last] < 3:
        return None
    first = max(0, last - int(length[last]))
    third = (last - first) / 3
    return float(rates[first + int(third) + int(third / 2)])
