"""A choice of a rule: a small race on the user's own task, under a budget, with error bars.

"Adam when unsure; gradient descent with momentum when tuned for the last point" is what people say. This
runs it: every candidate has the same number of steps to find its learning rate, then trains in full on fresh seeds.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import jax
import numpy as np
import scipy
from jax.sharding import Mesh

from jaxsgd.batches import as_arrays, batch_size
from jaxsgd.ensemble.dealer import devices_of
from jaxsgd.ensemble.feed import is_one_batch
from jaxsgd.ensemble.losses import apart, takes
from jaxsgd.loss import is_stateful, with_all_arguments
from jaxsgd.models import is_module
from jaxsgd.numerics import check_count
from jaxsgd.paths import is_function
from jaxsgd.progress import Bar
from jaxsgd.registry import AnyRule, all_rules
from jaxsgd.report import Column, Report, Table, number, span
from jaxsgd.tuning.race import LEAST_STEPS, Plan, Race, Sources, plan, plans
from jaxsgd.tuning.short_runs import checked_rule, usual_rate

__all__ = ["Comparison", "Entry", "Pick", "pick"]

DEFAULT = ("adamw", "momentum")
SAFE = "adamw"
REACHED = 0.95
"""A rate is good that reaches this part of the best one's decrease."""


@dataclass(frozen=True)
class Entry:
    """The result of one candidate.

    Attributes:
      name: the candidate's.
      learning_rate: the best of those it trained in full with, over all seeds.
      scores: ``(seeds,)``, the final loss of each seed, at the rate that the *other* seeds chose: no seed is judged at
        a rate that it helped to choose. A seed that diverged scores its first loss.
      start: the mean of the first losses.
      mean, standard_error: of ``scores``.
      low, high: the rates between which 95% of the best decrease is reached in the short runs; the grid's end
        where nothing bounded them.
      bounded: whether the grid went beyond ``low``, and beyond ``high``.
      edge: whether the best rate of the short runs is the grid's last.
      rates, losses: the short runs, in rising order of the rate; a rate that diverged has its first loss.
      finals: rate -> the final losses of its seeds.
      diverged: full runs that diverged.
      steps, tuning: steps taken in all, and those of them in short runs.
      compiles: how often its training step was compiled.
    """

    name: str
    learning_rate: float
    scores: np.ndarray
    start: float
    mean: float
    standard_error: float
    low: float
    high: float
    bounded: tuple[bool, bool]
    edge: bool
    rates: np.ndarray = field(repr=False)
    losses: np.ndarray = field(repr=False)
    finals: Mapping[float, np.ndarray] = field(repr=False)
    diverged: int
    steps: int
    tuning: int
    compiles: int

    @property
    def decades(self) -> float:
        """The width of the range of good rates; how forgiving the rule is of a wrong one."""
        return math.log10(self.high / self.low)


class Comparison(NamedTuple):
    """The candidate of the lowest mean and another, seed by seed: same beginning, same batches.

    Attributes:
      best, other: names.
      difference: the mean of the other's loss minus the best's.
      low, high: its t-interval, at 95% for all comparisons together.
    """

    best: str
    other: str
    difference: float
    low: float
    high: float

    @property
    def decided(self) -> bool:
        """Whether the interval is clear of 0."""
        return self.low > 0

    def __str__(self) -> str:
        said = "significant" if self.decided else "not significant"
        return (
            f"{self.other} ends {number(self.difference)} above {self.best} "
            f"(95% CI {span(self.low, self.high)}): {said}"
        )


@dataclass(frozen=True, repr=False)
class Pick(Report):
    """The result of `pick`.

    Attributes:
      winner: the candidate whose loss is lower than every other's by more than chance; None where there is none.
      choice: what to take: the winner; of those that tie AdamW, or the lowest mean where it is not among them; None
        where none lowered the loss.
      learning_rate: of the choice.
      summary: the answer in a sentence.
      entries: an `Entry` for each candidate, the lowest mean first.
      comparisons: the first of them with each other one.
      score: what the losses are of.
      steps, seeds, budget: as asked for.
      used: steps taken by all; ``tuning_share`` of them to find learning rates.
    """

    picture = "pick"

    winner: str | None
    choice: str | None
    learning_rate: float | None
    summary: str
    entries: tuple[Entry, ...]
    comparisons: tuple[Comparison, ...]
    score: str
    steps: int
    seeds: int
    budget: int
    used: int
    tuning_share: float

    def __getitem__(self, name: str) -> Entry:
        """The entry of a candidate."""
        return next(entry for entry in self.entries if entry.name == name)

    @property
    def why(self) -> tuple[str, ...]:
        return (
            *(map(str, self.comparisons) if len(self.comparisons) > 1 else ()),
            f"losses are {self.score} after {self.steps} steps, mean and standard error over {self.seeds} seeds",
            f"{self.used:,} of {self.budget:,} steps used, {self.tuning_share:.0%} of them to find learning rates",
        )

    @property
    def next(self) -> tuple[str, ...]:
        if self.choice is None or self.learning_rate is None:
            return ("check the data, the loss and the budget: a rule that works lowers the loss",)
        out = [f"train with {self.choice} at learning rate {number(self.learning_rate)}"]
        if self.winner is None:
            out.append(f"more than {self.seeds} seeds can tell smaller differences: seeds={2 * self.seeds}")
        if edges := [e.name for e in self.entries if e.edge]:
            which = ", ".join(edges)
            out.append(f"the best rate of {which} is the last that was tried: search around it with (rule, rate)")
        return tuple(out)

    @property
    def table(self) -> Table:
        """A row for each candidate, the lowest mean first."""
        columns = (
            Column("rule", kind="text"), Column("loss"), Column("error"), Column("rate"),
            Column("good rates"), Column("width", "decades"), Column("steps"), Column("diverged"),
        )  # fmt: skip
        rows = tuple(
            (e.name, e.mean, e.standard_error, e.learning_rate, _good(e), e.decades, e.steps, e.diverged)
            for e in self.entries
        )
        best = next((i for i, e in enumerate(self.entries) if e.name == self.choice), None)
        return Table(columns, rows, best, "the choice")


def _good(e: Entry) -> str:
    """The range of good rates; an end that nothing bounded is marked."""
    low, high = "" if e.bounded[0] else "<= ", "" if e.bounded[1] else ">= "
    return f"{low}{number(e.low)} to {high}{number(e.high)}"


def pick(
    loss_fn: Callable[..., Any],
    init: Callable[[jax.Array], Any],
    data: Any,
    *,
    candidates: Mapping[str, Any] | Iterable[str | AnyRule] | None = None,
    steps: int = 300,
    budget: int | None = None,
    seeds: int = 3,
    validation: Any = None,
    window: int | None = None,
    strategy: str = "auto",
    mesh: Mesh | Sequence[Any] | None = None,
    progress: bool | None = None,
) -> Pick:
    """Race rules on your own task: by default AdamW against gradient descent with momentum 0.9.

    Each candidate gets the same steps. First it trains a grid of learning rates around the rule's usual one, for a part
    of ``steps`` with one seed. Then it refines the grid around the best. Full runs on fresh seeds follow, in the middle
    of the rates that did well. The best rate alone is the luck of a short run, and often too high for a long one. If
    the budget allows, it also tries a factor of 1.8 below and above. Candidates share beginnings, batches and random
    numbers, so that they are compared seed by seed.

    A candidate wins only where the interval of the difference is clear of 0, whoever it is compared with. With few
    seeds that takes a large difference: a tie says that these seeds cannot tell, not that the rules are the same.

    Args:
      loss_fn: ``loss_fn(params, batch, key) -> loss`` or ``(loss, aux)``, or of ``(params, batch)``.
      init: ``init(key)`` makes the parameters or an ``nnx.Module``; another for each seed. Or a `jaxsgd.TrainState`
        with a model state, whose optimizer state is not used; the loss is then as in `jaxsgd.make_step`. The random
        keys of an NNX model are folded with the seed.
      data: a list of batches, which each seed goes through in an order of its own, another on each pass; an iterator,
        of which the first ``steps`` batches are kept as such a list; a function ``(step, seed) -> batch``, or of the
        step, which is then the same for all seeds; or the one batch of every step.
      candidates: names of rules, rules, or ``{name: rule}``. A rule is one of jaxsgd, or any function of the learning
        rate that gives a gradient transformation. ``(rule, rate)`` also gives the rate to search around.
      steps: of a full training. A schedule in a candidate should be as long.
      budget: training steps over everything; by default 12.25 times ``steps`` a candidate. With less the short
        runs become fewer and shorter and full ones are run at one rate only.
      seeds: full runs at a rate, at least 2.
      validation: a batch, or a list of them, to score on; by default the training loss over the last ``window`` steps
        counts. Rules that average their parameters are validated at the average.
      window: steps at the end of a training over which its loss is averaged; a tenth of them by default.
      strategy: how runs are run side by side, see `jaxsgd.sweep`.
      mesh: the devices to share the runs: a mesh with any axes, or a list. They may belong to several processes, which
        then all make this call with the same data. Default: all local devices.
      progress: show a bar after two seconds. Default: on if stderr is a terminal.

    Returns:
      A `Pick`.

    Raises:
      ValueError: a budget too small (the least is named); fewer than 2 seeds or candidates.
      TypeError: ``init`` is no function; a candidate is no rule.
    """
    if is_module(init) or not is_function(init):
        raise TypeError("init: a function of a key is needed that makes the parameters: seeds begin differently")
    loss_fn, shapes = _looked_at(loss_fn, init)
    entrants = _candidates(candidates, shapes)
    for name, value, least in (("steps", steps, LEAST_STEPS), ("seeds", seeds, 2)):
        check_count(name, value, least)
    if window is not None and not 1 <= window <= steps:
        raise ValueError(f"window={window}: from 1 to {steps} steps are needed")
    possible = plans(steps, seeds)
    if budget is None:
        budget = len(entrants) * plan(steps, seeds).cost
    chosen = next((p for p in possible if p.cost <= budget // len(entrants)), None)
    if chosen is None:
        least = len(entrants) * possible[-1].cost
        raise ValueError(
            f"budget={budget}: too few for {len(entrants)} candidates of {seeds} seeds and {steps} steps; "
            f"the least is {least}"
        )
    taking = takes(loss_fn, init)
    sources = Sources(data, steps, seeds, taking)
    scored = _listed(validation, taking)
    races = []
    with Bar("pick", len(entrants) * chosen.cost, progress) as bar:
        for name, (make, usual) in entrants.items():
            race = Race(name, make, usual, loss_fn, init, sources, scored, window, strategy, devices_of(mesh), bar)
            races.append(_entry(race, chosen))
    return _picked(races, steps, seeds, budget, "training losses" if validation is None else "validation losses")


def _listed(validation: Any, taking: Callable[[Any], bool]) -> list[Any]:
    """The batches to score on; none if the training loss counts."""
    if validation is None:
        return []
    if not is_function(validation) and is_one_batch(validation, taking):
        batch_size(validation)
        return [as_arrays(validation)]
    if is_function(validation) or isinstance(validation, Iterator) or not isinstance(validation, Iterable):
        raise TypeError(f"validation={validation!r}: a batch, or a list of batches, is needed")
    if not (batches := [as_arrays(batch) for batch in validation]):
        raise ValueError("validation: it is empty; a batch, or a list of them, is needed")
    return batches


def _looked_at(loss_fn: Callable[..., Any], init: Callable[..., Any]) -> tuple[Callable[..., Any], Any]:
    """The loss with all its arguments, and the shapes of the parameters."""
    stateful = False

    def look(key: jax.Array) -> Any:
        nonlocal stateful
        graphdef, params, model_state = apart(init(key))
        stateful = is_stateful(graphdef, model_state)
        return params

    shapes = jax.eval_shape(look, jax.random.key(0))
    return with_all_arguments(loss_fn, stateful), shapes


def _candidates(given: Any, params: Any) -> dict[str, tuple[Callable[..., Any], float]]:
    """Name -> rule and usual rate; ``params`` may be shapes."""
    if given is None:
        given = DEFAULT
    if isinstance(given, str | AnyRule) or not isinstance(given, Iterable):
        raise TypeError(f"candidates={given!r}: a list of rules, or a dict of them by name, is needed")
    if not isinstance(given, Mapping):
        listed = [all_rules()[rule] if isinstance(rule, str) else rule for rule in given]
        if not all(isinstance(rule, AnyRule) for rule in listed):
            raise TypeError("candidates: functions need names: give a dict {name: function of the learning rate}")
        given = {rule.name: rule for rule in listed}
    if len(given) < 2:
        raise ValueError(f"candidates={list(given)}: at least two different ones are needed to compare")
    out = {}
    for name, rule in given.items():
        rule, rate = rule if type(rule) is tuple else (all_rules()[rule] if isinstance(rule, str) else rule, None)
        rule = checked_rule(rule)
        rate = usual_rate(rule, params)[0] if rate is None else rate
        if not 0 < rate < math.inf:
            raise ValueError(f"candidates: {name}: the rate to search around is {rate}; one above 0 is needed")
        out[name] = rule, float(rate)
    return out


# -- judging -----------------------------------------------------------------------------------------


def _entry(race: Race, plan: Plan) -> Entry:
    """Run one candidate's runs and sum them up."""
    rates, losses, start = race.tune(plan)
    low, high, bounded = good_range(rates, losses, start)
    finals, starts, diverged = race.finish(plan, math.sqrt(low * high))
    table = np.stack(list(finals.values()))
    scores = held_out(table)
    return Entry(
        name=race.name, learning_rate=list(finals)[int(np.argmin(table.mean(1)))], scores=scores,
        start=float(starts.mean()), mean=float(scores.mean()),
        standard_error=float(scores.std(ddof=1) / math.sqrt(len(scores))),
        low=low, high=high, bounded=bounded, edge=int(np.argmin(losses)) in (0, len(rates) - 1),
        rates=rates, losses=losses, finals=finals, diverged=diverged,
        steps=race.used, tuning=race.tuning, compiles=race.compiles,
    )  # fmt: skip


def held_out(table: np.ndarray) -> np.ndarray:
    """``(rates, seeds)`` -> for each seed its loss at the rate that is best in the mean of the others."""
    others = (table.sum(1, keepdims=True) - table) / (table.shape[1] - 1)
    return table[np.argmin(others, axis=0), np.arange(table.shape[1])]


def good_range(rates: np.ndarray, losses: np.ndarray, start: float) -> tuple[float, float, tuple[bool, bool]]:
    """The rates around the best that reach `REACHED` of its decrease, between grid points by a line in log rate."""
    best = int(np.argmin(losses))
    target = start - REACHED * (start - losses[best])
    if not losses[best] < start:
        return float(rates[best]), float(rates[best]), (True, True)
    ends, bounded = [], []
    for way in (-1, 1):
        at = best
        while 0 <= at + way < len(rates) and losses[at + way] <= target:
            at += way
        beyond = at + way
        bounded.append(0 <= beyond < len(rates))
        if bounded[-1]:
            part = (target - losses[at]) / (losses[beyond] - losses[at])
            ends.append(float(rates[at] * (rates[beyond] / rates[at]) ** part))
        else:
            ends.append(float(rates[at]))
    return ends[0], ends[1], (bounded[0], bounded[1])


def compare(best: str, other: str, a: np.ndarray, b: np.ndarray, comparisons: int = 1) -> Comparison:
    """The paired t-interval of ``b - a``, wide enough for so many comparisons at 95% together (Bonferroni)."""
    difference = b - a
    mean, count = float(difference.mean()), len(difference)
    half = (
        float(scipy.special.stdtrit(count - 1, 1 - 0.025 / comparisons))
        * float(difference.std(ddof=1))
        / math.sqrt(count)
    )
    return Comparison(best, other, mean, mean - half, mean + half)


def _picked(entries: list[Entry], steps: int, seeds: int, budget: int, score: str) -> Pick:
    entries = sorted(entries, key=lambda e: e.mean)
    best, others = entries[0], entries[1:]
    comparisons = tuple(compare(best.name, o.name, best.scores, o.scores, len(others)) for o in others)
    tied = [best, *(o for o, c in zip(others, comparisons, strict=True) if not c.decided)]
    same = all(np.ptp(e.scores) == 0 for e in entries)
    winner = choice = None
    if not best.mean < best.start:
        summary = (
            f"no candidate lowered the loss: it was {number(best.start)} and is {number(best.mean)} with {best.name}"
        )
    elif same:
        choice = _safer(entries)
        summary = (
            "cannot tell: all seeds ended alike, so there is no error bar; let init use its key, or data its seed; "
            f"until then {_why(choice, entries)}"
        )
    elif len(tied) == 1:
        winner, choice = best.name, best
        closest = min(comparisons, key=lambda c: c.low)
        summary = f"{best.name} wins, with learning rate {number(best.learning_rate)}: {closest}"
    else:
        choice = _safer(tied)
        undecided = [c for c in comparisons if not c.decided]
        summary = f"{' and '.join(e.name for e in tied)} tie: {undecided[0]}; {_why(choice, tied)}"
    used, tuning = sum(e.steps for e in entries), sum(e.tuning for e in entries)
    return Pick(
        winner, None if choice is None else choice.name, None if choice is None else choice.learning_rate, summary,
        tuple(entries), comparisons, score, steps, seeds, budget, used, tuning / used,
    )  # fmt: skip


def _safer(tied: list[Entry]) -> Entry:
    """Of those that tie AdamW, if it is among them, else the lowest mean."""
    return next((e for e in tied if e.name == SAFE), tied[0])


def _why(choice: Entry, tied: list[Entry]) -> str:
    spans = " and ".join(f"{e.name}'s a factor of {number(10**e.decades, 2)}" for e in tied if e is not choice)
    reason = "the safer one when unsure" if choice.name == SAFE else "whose mean is the lowest"
    return (
        f"take {choice.name} at {number(choice.learning_rate)}, {reason} "
        f"(its good rates span a factor of {number(10**choice.decades, 2)}, {spans})"
    )
