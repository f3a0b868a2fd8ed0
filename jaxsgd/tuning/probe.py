"""The learning rate by short runs: the recipe that people follow by hand.

Rates a factor of ten apart are trained for a few steps from the same start on the same batches. Where the best is at
the edge, the grid grows; where it is so by noise alone, all are trained further. Of rates that the lowest beats by
noise alone the highest counts. Then the gaps beside the best are filled. The best and its neighbours are trained further, and
the best two continue until the steps are used up. If the next lower rate does as well as the best, up to noise, the
suggestion is between the two. A long run needs a lower rate than a short one. A schedule is applied as a whole in each
run, however short.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, NamedTuple

import jax
import numpy as np

from jaxsgd.diagnosis.verdict import Verdict
from jaxsgd.ensemble.feed import Feed
from jaxsgd.ensemble.losses import takes
from jaxsgd.hyper import is_constant
from jaxsgd.progress import Bar
from jaxsgd.report import Column, Report, Table, number, span
from jaxsgd.rules.adaptive import adamw
from jaxsgd.tuning.range_test import RangeTest, rising
from jaxsgd.tuning.short_runs import (
    Members,
    beginning,
    budget,
    chance,
    checked_rule,
    manner,
    noise_of,
    sets_rate,
    tail,
    usual_rate,
)

__all__ = ["Probe", "Rate", "probe"]

COARSE, FINE = 10.0, math.sqrt(10.0)
"""Factors between rates: of the first grid, and beside its best."""
FIRST, MIDDLE, CONTROL, LEAST = 48, 8, 16, 4
"""Parts of the budget: a first run, a middle run, the comparison with the start; and the least steps of a run."""
UPDATES = 4
"""The least updates of a run of a rule that updates once in several steps."""
EXPLORING, WALKING = 0.4, 0.75
"""The parts of the budget after which the grid no longer grows, and the middle runs no longer move."""
GOOD = 0.9
"""A rate is good if it lowers the loss by this part of the best rate's decrease, in as many steps."""
ALIKE = 0.95
"""The range takes in rates that do so to this part in the longest runs."""
LOWER = 0.98
"""The lower neighbour of the best is trained on, not the upper, if it does so to this part."""
HIGH = 4.0
"""A loss that ends so many times above the start has diverged."""
RATES = 24
"""At most so many."""
STILL = 1e-3
"""The part of the lowest rate that does not move the weights."""
NEIGHBOUR = 4.0
"""A rate so many times higher or lower than another is not its neighbour on the grid."""
UNSURE = 0.05
"""The confidence is not high where the standard error of the best's end is more than this part of its decrease."""
CLEARLY = 3.0
"""The grid grows where its edge is better by more than so many standard errors: several rates are looked at."""
ERRORS, SOONER = 2.0, 0.1
"""Two losses are alike where they differ by less than the sum of so many standard errors of the difference and the
decrease of the better run in this last part of its steps."""


class Rate(NamedTuple):
    """The result of one learning rate.

    Attributes:
      learning_rate, steps: the rate, and the steps of its run.
      start: the first loss, or the mean of the lowest rate over its first steps where that is higher.
      end: the mean over the last quarter of its steps.
      decrease: ``start - end``.
      verdict: a `Verdict`: ``"diverged"``, ``"oscillating"``, ``"too low"``, ``"too high"`` or ``"good"``.
      number: the evidence for the verdict: the step it diverged at; the swing of the loss, or its climb, as a multiple
        of the best run's decrease; the decrease as a part of the best run's in as many steps.
      why: the same as text.
    """

    learning_rate: float
    steps: int
    start: float
    end: float
    decrease: float
    verdict: str
    number: float
    why: str


@dataclass(frozen=True, repr=False)
class Probe(Report):
    """A learning rate with the evidence for it.

    Attributes:
      learning_rate: the suggestion; None if no good rate was found, for the reason in ``why``.
      range: the rates ``(low, high)`` between which about as much is expected, or None.
      confidence: ``"high"``, ``"medium"`` or ``"low"``.
      why: the evidence, a sentence each.
      rates: a `Rate` for each learning rate tried, in rising order.
      losses: ``(rates, steps)``, the loss of each step, NaN where a rate was not trained any more.
      horizon: steps of the longest runs.
      p_value: how likely noise alone makes such a decrease, against the weights of the start on the same batches.
      steps, share: steps taken in all, and as a multiple of a full run's.
      usual: where the search began.
      range_test: the classical test, where it was asked for.
      best: the rate with the lowest loss of the longest runs, or None.
    """

    learning_rate: float | None
    range: tuple[float, float] | None
    confidence: str
    why: tuple[str, ...]  # type: ignore[misc]  # a field of this report
    rates: tuple[Rate, ...] = field(repr=False)
    losses: np.ndarray = field(repr=False)
    horizon: int
    p_value: float
    steps: int
    share: float
    usual: float
    range_test: RangeTest | None = None
    best: float | None = None
    picture: ClassVar[str] = "probe"

    @property
    def learning_rates(self) -> np.ndarray:
        """The rates of the rows of ``losses``."""
        return np.array([rate.learning_rate for rate in self.rates])

    @property
    def summary(self) -> str:
        """The suggestion in one sentence."""
        if self.learning_rate is None or self.range is None:
            return f"no good rate found: {self.why[0]}"
        if not self.rates:
            return f"learning rate {number(self.learning_rate)}: {self.why[0]}"
        return f"learning rate {number(self.learning_rate)}, range {span(*self.range)}; confidence {self.confidence}"

    @property
    def next(self) -> tuple[str, ...]:
        """Advice."""
        if not self.rates:
            return (f"leave learning_rate at {number(self.usual)}",)
        if self.learning_rate is None:
            return ("give more steps or larger batches, or check the loss; around= moves the search",)
        if self.confidence == "high":
            return (f"train with {number(self.learning_rate)}",)
        return (f"train with {number(self.learning_rate)}; a larger share= or a sweep around it makes sure",)

    @property
    def table(self) -> Table:
        """A row for each rate; the best of the longest runs is marked."""
        columns = (
            Column("rate"), Column("steps"), Column("loss"), Column("to"), Column("verdict", kind="text"),
            Column("because", kind="text"),
        )  # fmt: skip
        rows = tuple((r.learning_rate, r.steps, r.start, r.end, str(r.verdict), r.why) for r in self.rates)
        best = next((i for i, r in enumerate(self.rates) if r.learning_rate == self.best), None)
        mark = f"best of the longest runs ({self.horizon} steps)"
        return Table(columns, rows, best, mark, f"{self.steps} steps taken, {self.share:.1%} of a full run")

    @property
    def details(self) -> tuple[Table | Report | str, ...]:
        """The range test, where there was one."""
        return () if self.range_test is None else (self.range_test,)


def probe(
    loss_fn: Callable[..., Any],
    params: Any,
    data: Any,
    rule: Callable[[Any], Any] = adamw,
    *,
    steps: int = 1000,
    share: float = 1.0,
    around: float | None = None,
    range_test: bool = False,
    key: int | jax.Array = 0,
    progress: bool | None = None,
) -> Probe:
    """Learning rate for a run of ``steps`` steps, from short runs at several rates.

    All runs begin at ``params``, see the same batches and are one compiled program. The steps of all of them together
    are at most ``share`` times ``steps``. A run that diverges stops there.

    The suggestion is the rate with the lowest loss of the longest runs. If the next lower rate is like it, the
    suggestion moves down towards that one, further if they differ less. The two are alike if their losses on the same
    batches differ by little. The limit is two standard errors plus the decrease of the last tenth of the steps.

    Args:
      loss_fn: ``(params, batch, key) -> loss``, ``(loss, aux)`` too, or of ``(params, batch)``; for a TrainState with a
        model state as in `jaxsgd.make_step`.
      params: a tree of parameters, an ``nnx.Module`` or a `jaxsgd.TrainState`; left as it is. The optimizer
        starts fresh.
      data: a list of batches, an iterator, a function of the step, or the one batch of all steps. As many batches as
        the longest run takes stay in memory. A list ``[x, y]`` of arrays is one batch where the loss takes only
        the whole list.
      rule: a rule, or a function of the learning rate that returns a gradient transformation, with clipping or a
        schedule in it. Any schedule of optax works. Short runs see the whole schedule, compressed. Default: AdamW.
      steps: calls of the train step in the run that the rate is for. With `jaxsgd.accumulate` or MultiSteps a call
        takes one microbatch. Default: 1000.
      share: the cost, in whole runs. Default: 1, the cost of one whole run.
      around: the rate at which the search begins. Default: the rule's usual rate.
      range_test: also make the range test, with a third of the steps. Default: False.
      key: a seed or a key for the random numbers in the loss. Default: 0.
      progress: show a bar after two seconds. Default: on if stderr is a terminal.

    Returns:
      A `Probe`. For a rule that sets its own step size, such as Prodigy, it says so and trains nothing.

    Raises:
      ValueError: fewer than 6 steps to spend (30 with the range test); ``around`` not above 0.
      TypeError: ``rule`` is a gradient transformation.

    >>> import jax.numpy as jnp
    >>> found = probe(lambda p, batch: jnp.sum((p - batch) ** 2), jnp.zeros(3), jnp.ones(3), jaxsgd.sgd, steps=200)
    >>> found.learning_rate is not None and found.range[0] <= found.learning_rate <= found.range[1]
    True
    """
    rule = checked_rule(rule)
    spend = budget(steps, share, 30 if range_test else 6)
    if around is not None and not (is_constant(around) and 0 < around < math.inf):
        raise ValueError(f"around={around!r}: a learning rate above 0 is needed")
    given, begin = beginning(loss_fn, params, key)
    usual, name = usual_rate(rule, given[0]) if around is None else (float(around), "around")
    if around is None and (own := sets_rate(rule, given[0])):
        return _left_alone(*own)
    feed, tested = Feed(data, takes(loss_fn, params)), None
    with Bar("probe", spend, progress) as bar:
        if range_test:
            tested = rising(given, begin, rule, feed.take(spend // 3), usual * 1e-4, usual * 1e3)
            spend -= spend // 3
            bar.advance(tested.steps, "range test")
        shape = manner(rule, steps)
        members = Members(given, begin, rule, feed, bar, None if shape.constant else shape.schedule)
        search = _Search(members, usual, spend, steps, shape.every)
        search.run()
    doubts = [] if name else [f"no usual rate is known for this rule: the search began at {usual:.2g}. Use around="]
    if not shape.constant:
        doubts.append("each run saw the whole schedule, compressed into its steps")
    return search.answer(tested, doubts)


def _left_alone(name: str, rate: float) -> Probe:
    why = f"{name} sets its own step size from the gradients; leave learning_rate at {number(rate)}"
    return Probe(rate, (rate, rate), "medium", (why,), (), np.zeros((0, 0)), 0, math.nan, 0, 0.0, rate)


class _Search:
    """The search, and its answer."""

    def __init__(self, members: Members, usual: float, spend: int, steps: int, every: int) -> None:
        self.members, self.usual, self.spend, self.steps, self.every = members, usual, spend, steps, every
        self.curves = members.curves
        least = LEAST if every == 1 else UPDATES * every
        self.first = self._whole(min(max(least, spend // FIRST), max(2, spend // 8)))
        self.middle = self._whole(max(self.first + 1, spend // MIDDLE), up=True)
        self.horizon = self.first
        self.p_value, self.early = math.nan, usual
        self.bracketed = False

    def _whole(self, steps: int, up: bool = False) -> int:
        """A multiple of the steps that one update takes, at least one."""
        return max(1, (steps + (self.every - 1) * up) // self.every) * self.every

    def run(self) -> None:
        members = self.members
        members.train([self.usual / COARSE, self.usual, self.usual * COARSE], self.first)
        if not any(len(c) and np.isfinite(c[0]) for c in self.curves.values()):
            return
        while rates := self._more():
            members.train(rates, self.first)
        best = self._early()
        if best is None:
            return
        told = best > min(self.curves) or self._tells(best)
        best = best if told else self._known(self.usual)
        for rate in (best / FINE, best * FINE):
            if not self._near(rate) and self._affords([rate], self.first):
                members.train([rate], self.first)
        self.early = (self._early() or best) if told else best
        self._walk()
        self._go_on()
        if self.best is not None:
            self._compare()

    # -- which runs next ----------------------------------------------------------------------

    @property
    def _reserve(self) -> int:
        return max(4, self.spend // CONTROL)

    def _affords(self, rates: Sequence[float], horizon: int, part: float = 1.0) -> bool:
        cost = sum(self.members.cost(rate, horizon) for rate in rates)
        return self.members.spent + cost <= min(part * self.spend, self.spend - self._reserve)

    def _near(self, rate: float) -> bool:
        return any(1 / 1.2 < r / rate < 1.2 for r in self.curves)

    def _known(self, rate: float) -> float:
        """The rate among those tried that is nearest, or ``rate`` itself."""
        return next((r for r in self.curves if 1 / 1.2 < r / rate < 1.2), rate)

    def _tail(self, rate: float, steps: int) -> float:
        """The mean loss at the end of a run of so many steps; infinite where it diverged or was not made."""
        curve = self.members.run(rate, steps)
        if curve is None or not self.members.alive(rate) and len(self.curves[rate]) <= steps:
            return math.inf
        whole = len(curve) >= self.every and self.every > 1
        last = curve[-self.every :] if whole and len(curve) < 4 * self.every else None
        return float(last.mean()) if last is not None else tail(curve, 0.5 if steps <= self.first else 0.25)

    def _at(self, steps: int) -> list[float]:
        """The rates with a finite run of so many steps, in rising order."""
        return sorted(r for r in self.curves if math.isfinite(self._tail(r, steps)))

    def _best(self, steps: int) -> float | None:
        return min(self._at(steps), key=lambda rate: (self._tail(rate, steps), rate), default=None)

    def _early(self) -> float | None:
        """The best of the first runs; where that is the lowest rate of all, the highest that is like it.

        Few steps with small batches tell noise, not rates: a low rate that does nothing has the lowest loss as often
        as not. The higher one says more in a longer run.
        """
        best = self._best(self.first)
        if best is None or self.members.constant or best > min(self.curves):
            return best
        highest = best
        for rate in self._at(self.first):
            gap, error = _apart(self.curves[rate][: self.first], self.curves[best][: self.first])
            if gap <= ERRORS * error and self._tail(rate, self.first) <= self._begun:
                highest = rate
        return highest

    def _more(self) -> list[float]:
        """The rates to train now: one more while the best is at the edge of the grid, or all, further than before."""
        if self.members.spent + self.first > EXPLORING * self.spend or len(self.curves) >= RATES:
            return []
        best, low, high = self._early(), min(self.curves), max(self.curves)
        if best is None:
            return [low / COARSE]
        if len({self._tail(rate, self.first) for rate in self.curves}) == 1:  # nothing depends on the rate
            return []
        if low < best < high:
            return []
        if self._tells(best):
            return [high * COARSE if best == high else low / COARSE]
        longer, rates = self._whole(2 * self.first), self._at(self.first)
        if not self._affords(rates, longer, EXPLORING):
            return []
        self.first = longer
        return rates

    def _tells(self, edge: float) -> bool:
        """Whether it says something that the best is at this edge of the grid.

        The highest rate has to be lower than the next by more than noise. The lowest has to learn, or the next one not
        to hold: the first steps with small batches may raise the loss on other batches, and then a lower rate is always
        better and learns even less.
        """
        if self.members.constant:
            return True
        lower, curve = [rate for rate in self.curves if rate < edge], self.curves[edge][: self.first]
        if lower:
            other = self.curves[max(lower)][: self.first]
        else:
            above = min((rate for rate in self.curves if rate > edge), default=edge)
            if self._tail(above, self.first) > self._begun + (HIGH - 1) * abs(self._begun):
                return True
            other = self.members.control(edge * STILL, range(self.first))
        if len(other) < len(curve) or not np.isfinite(other).all():  # it diverged
            return True
        gain, error = _apart(other, curve)
        return gain > CLEARLY * error

    def _walk(self) -> None:
        """The middle runs: the best and its neighbours, on to where the best has a neighbour on both sides."""
        trio = [self._known(self.early * f) for f in (1.0, 1 / FINE, FINE)]
        while not self._affords(trio, self.middle):
            if self.middle <= self.first + self.every:
                trio.pop()
            if not trio:
                self.middle = self.first
                return
            self.middle = self._whole(max(self.first + 1, int(0.8 * self.middle)), up=True)
        self.members.train(trio, self.middle)
        self.horizon = self.middle
        for _ in range(RATES):
            at, tried = self._at(self.middle), [r for r in self.curves if len(self.curves[r]) >= self.middle]
            best = self._best(self.middle)
            lowest = min(r for r in self.curves if r in at or r in trio)
            if best is None:  # all diverged: what lasted so far below them, or lower still
                below = max((r for r in self.curves if r < lowest and self.members.alive(r)), default=lowest / FINE)
                wanted = [below]
            else:
                wanted = [best / FINE, best * FINE]
            new = [self._known(r) for r in wanted]
            new = [r for r in new if r not in tried and (r not in self.curves or self.members.alive(r))]
            if not new:
                self.bracketed = best is not None
                return
            if not self._affords(new[:1], self.middle, 1.0 if best is None else WALKING):
                return
            self.members.train(new[:1], self.middle)
            trio.append(new[0])

    def _go_on(self) -> None:
        """The last runs: the best and a neighbour, the lower one if it does about as well, as far as the steps last."""
        best = self._best(self.middle)
        if best is None:
            return
        near = self._beside(best, self.middle)
        enough = self._begun - LOWER * (self._begun - self._tail(best, self.middle))
        lower = [rate for rate in near if rate < best and self._tail(rate, self.middle) <= enough]
        pair = [best, *(lower or near)[:1]]
        for rates in (pair, [best]):
            furthest = self._furthest(rates)
            if furthest > self.middle:
                self.members.train(rates, furthest)
                self.horizon = furthest
                break
        while self._best(self.horizon) is None:  # all diverged after all: what is below goes on
            below = [r for r in self._at(self.middle) if r < min(pair)]
            if not below or not self._affords([max(below)], self.horizon):
                self.horizon = self.middle
                return
            pair = [max(below)]
            self.members.train(pair, self.horizon)

    def _beside(self, rate: float, steps: int) -> list[float]:
        """The neighbours of a rate that have a finite run of so many steps, the better one first."""
        near = [r for r in self._at(steps) if r != rate and 1 / NEIGHBOUR < r / rate < NEIGHBOUR]
        return sorted(near, key=lambda r: self._tail(r, steps))

    def _furthest(self, rates: Sequence[float]) -> int:
        """The horizon that the rest of the budget pays for, at most that of a full run."""
        low, high = self.middle, min(self.steps, self.spend)
        while low < high:
            middle = (low + high + 1) // 2
            low, high = (middle, high) if self._affords(rates, middle) else (low, middle - 1)
        return self._whole(low)

    @property
    def best(self) -> float | None:
        """The best of the longest runs; where they say nothing, of the middle ones that did not diverge later."""
        return self._best(self.horizon)

    def _below(self, best: float) -> tuple[float, float, int] | None:
        """The next lower rate whose loss is like the best's, how far to go there (1: all the way), and their steps.

        Both had the same batches, so the error is that of the mean of the differences, in as many steps as both have.
        A tenth of the steps more or less decides nothing either. The way is shorter the more the losses differ, and 0
        at the sum of both, or where the lower rate is not good any more. There is no way up: the best rate falls as
        runs get longer.
        """
        rate = max((r for r in self.curves if best / NEIGHBOUR < r < best and self.members.alive(r)), default=None)
        if rate is None:
            return None
        steps = min(self.horizon, len(self.curves[rate]))
        # Whole runs: under a schedule the first steps of a longer one are others.
        curve, other = self.members.run(best, steps), self.members.run(rate, steps)
        if curve is None or other is None:
            return None
        last, sooner = max(2, steps // 4), max(1, round(SOONER * steps))
        apart = (other - curve)[-last:]
        margin = ERRORS * float(apart.std(ddof=1)) / math.sqrt(last)
        margin += max(float(curve[-last - sooner : -sooner].mean()) - float(curve[-last:].mean()), 0.0)
        margin = min(margin, (1 - GOOD) * (self._begun - self._tail(best, steps)))
        gap = max(float(apart.mean()), 0.0)
        if gap > margin:
            return None
        return rate, 1 - gap / margin if margin else 1.0, steps

    def _compare(self) -> None:
        """Whether the best is lower than the start on the same batches by more than noise."""
        best = self.best
        assert best is not None
        late = self.members.run(best, self.horizon)
        assert late is not None
        last = min(self._reserve, self.spend - self.members.spent, self.horizon - self.horizon // 2)
        if last < 3:
            return
        at = np.linspace(self.horizon // 2, self.horizon - 1, last).astype(int)
        start, after = self.members.control(min(self.curves) * STILL, at.tolist()), late[at]
        gain = start - after
        if not np.isfinite(gain).all() or gain.mean() <= 1e-6 * np.abs(start).mean():
            self.p_value = 1.0
        elif self.members.constant and np.ptp(start) <= 1e-4 * np.abs(start).mean():  # no noise to mistake
            self.p_value = 0.0
        else:  # several looks, and as many times the chance to be taken in by noise
            ps = [chance(gain.mean(), noise_of(gain) / math.sqrt(last), last - 2)]  # the same batches in pairs
            if min(start.min(), after.min()) > 0:  # where batches differ by factors, so do their gains
                part = np.log(start / after)
                ps += [chance(part.mean(), noise_of(part) / math.sqrt(last), last - 2)]
            # All of the second half against the start, with the first steps of the lowest rate, which hardly moved.
            whole, before = late[self.horizon // 2 :], np.append(start, self.curves[self._lowest][: self.first])
            apart = math.sqrt(before.var(ddof=1) / len(before) + whole.var(ddof=1) / len(whole))
            ps += [chance(before.mean() - whole.mean(), apart, len(before) - 1)]
            self.p_value = min(len(ps) * min(ps), 1.0)

    # -- its answer ---------------------------------------------------------------------------

    @property
    def _lowest(self) -> float:
        """The lowest rate that has not diverged, or the lowest of all."""
        return min((r for r in self.curves if self.members.alive(r)), default=min(self.curves))

    @property
    def _begun(self) -> float:
        """The loss to begin with: the first, or the lowest rate's over its first steps where that is higher."""
        curve = self.curves[self._lowest]
        first, later = float(curve[0]), tail(curve[: self.first], 0.5)
        return max(first, later) if math.isfinite(later) else first

    def _judge(self, rate: float, best: float | None, noise: float) -> Rate:
        curve = self.curves[rate]
        steps = int(np.isfinite(curve).sum())
        start, end = self._begun, self._tail(rate, len(curve))

        def say(verdict: Verdict, value: float, why: str) -> Rate:
            return Rate(rate, steps, start, end, start - end, verdict, float(value), why)

        if steps < len(curve):
            return say(Verdict.DIVERGED, steps, f"at step {steps}")._replace(end=math.nan, decrease=math.nan)
        if end > start + (HIGH - 1) * abs(start) and start:
            return say(Verdict.DIVERGED, end / start, f"ended {number(end / start)} times above the start")
        others = {r: self._tail(r, steps) for r in self.curves}
        lowest = min(others, key=lambda r: others[r])
        most = start - others[lowest]
        if best is None or most <= 0:
            side = Verdict.TOO_HIGH if best is not None and rate > best else Verdict.TOO_LOW
            return say(side, 0.0, f"no decrease in {steps} steps")
        part = (start - end) / most
        against = "the lowest" if rate == lowest else f"{part:.0%} of the decrease of {number(lowest)}"
        why = f"{against} in {steps} steps"
        if part >= GOOD or rate == best:
            return say(Verdict.GOOD, part, why)
        beside = None if best is None else self.members.run(best, steps)
        beside = np.full(steps, start) if beside is None else np.maximum(beside, start)
        climbs = curve - beside  # some batches are hard for all
        at = int(climbs.argmax())
        peak, rise = float(curve[at]), float(climbs[at]) - 4 * noise
        if rise > (HIGH - 1) * abs(start) and start:
            return say(
                Verdict.DIVERGED, peak / start, f"rose to {number(peak)}, {number(peak / start)} times the start"
            )
        swing = max(noise_of(curve[steps // 2 :]) - max(4 * noise, noise_of(beside[steps // 2 :])), 0.0) / most
        climb = max(rise, 0.0) / most
        if climb > 0.5 or swing > 0.2:
            size, does = (climb, "rose") if climb > 0.5 else (swing, "swings")
            why = f"{does} {number(size)} times as much as the best run lowered the loss"
            return say(Verdict.OSCILLATING, size, why)
        return say(Verdict.TOO_LOW if rate < best else Verdict.TOO_HIGH, part, why)

    def answer(self, tested: RangeTest | None, doubts: list[str]) -> Probe:
        best = self.best
        lowest = self.curves[self._lowest]
        noise = noise_of(lowest[: self.first]) if np.isfinite(lowest[: self.first]).all() else 0.0
        rates = tuple(self._judge(rate, best, noise) for rate in sorted(self.curves))
        curves = [self.curves[rate.learning_rate] for rate in rates]
        longest = max(map(len, curves))
        losses = np.stack([np.pad(curve, (0, longest - len(curve)), constant_values=np.nan) for curve in curves])
        spent = self.members.spent + (0 if tested is None else tested.steps)
        rest = (losses, self.horizon, self.p_value, spent, spent / self.steps, self.usual, tested)
        if (reason := self._none(rates, best)) is not None:
            rates = tuple(
                r._replace(verdict=Verdict.TOO_LOW, why="no gain") if r.verdict == "good" else r for r in rates
            )
            return Probe(None, None, "low", (reason,), rates, *rest)
        assert best is not None
        below = self._below(best)
        chosen = float(f"{best if below is None else best * (below[0] / best) ** below[1]:.3g}")
        confidence, why = self._confidence(best, rates)
        why.insert(0, self._reason(best, chosen, below))
        return Probe(
            chosen, _range(chosen, best, rates, self.horizon), confidence, (*why, *doubts), rates, *rest, best=best
        )

    def _none(self, rates: Sequence[Rate], best: float | None) -> str | None:
        if all(r.steps == 0 for r in rates):
            return "the loss at the start is not finite"
        if best is None:
            blown = [r.learning_rate for r in rates if r.verdict == Verdict.DIVERGED]
            if rates[0].learning_rate in blown:
                return f"every rate diverges, down to {rates[0].learning_rate:.2g}"
            return (
                f"the rates that were best in {self.first} steps diverge later, down to {min(blown):.2g}; "
                "no steps were left to try lower ones for as long"
            )
        tried = self._at(self.first)
        tails = [self._tail(rate, self.first) for rate in tried]
        apart = len(tried) > 2 and tried[-1] / tried[0] > COARSE
        if apart and np.ptp(tails) <= 1e-6 * (self._begun - min(tails)) > 1e-9 * abs(self._begun):
            return "every rate gives the same losses: does rule(learning_rate) use its argument?"
        if all(r.decrease <= 1e-6 * abs(r.start) for r in rates if math.isfinite(r.decrease)) and self.p_value != 0:
            blown = [r.learning_rate for r in rates if r.verdict == "diverged"]
            return "no rate lowers the loss" + (f"; from {min(blown):.2g} up it diverges" if blown else "")
        if self.p_value > 0.1:
            return f"no rate lowers the loss by more than its noise (p = {self.p_value:.2g})"
        return None

    def _reason(self, best: float, chosen: float, below: tuple[float, float, int] | None) -> str:
        lowest = f"{number(best)} had the lowest loss of the longest runs, {self.horizon} of {self.steps} steps"
        if below is None or chosen == float(f"{best:.3g}"):
            return f"{lowest}; it is the suggestion as it is: no factor is taken off"
        rate, _, steps = below
        place = "is that one" if chosen == float(f"{rate:.3g}") else "is between the two"
        return (
            f"{lowest}; the lower {number(rate)} did as well in {steps} steps, up to noise and a tenth of the steps, "
            f"so the suggestion {place}"
        )

    def _confidence(self, best: float, rates: Sequence[Rate]) -> tuple[str, list[str]]:
        doubts, reasons = 0, []
        moved = best / self.early
        if not 1 / 12 < moved < 12:
            doubts += 1
        if not 1 / 2 < moved < 2:
            reasons.append(
                f"after {self.first} steps {number(self.early)} was best: the best rate moves with the steps"
            )
        if not self.bracketed:
            doubts += 1
            reasons.append("the steps did not last to try a rate on both sides of the best")
        higher = [r for r in rates if r.learning_rate > best and r.verdict in ("diverged", "oscillating")]
        if higher:
            reasons.append(f"from {number(higher[0].learning_rate)} up the loss is unstable ({higher[0].verdict})")
        if self.horizon < 15 * self.every or self.horizon < 0.04 * self.steps:
            doubts += 1
            updates = f" with {self.horizon // self.every} updates" if self.every > 1 else ""
            reasons.append(f"the longest runs took {self.horizon} steps{updates}, which is little")
        part = 1 - self._tail(best, self.horizon) / self._begun if self._begun > 0 else 1.0
        if part < 0.02:
            doubts += 2
            reasons.append(f"the best lowered the loss by {part:.2%}, which is little to judge by")
        ends = self.members.run(best, self.horizon)
        last = ends[-max(4, self.horizon // 4) :] if ends is not None else np.zeros(0)
        error = noise_of(last) / math.sqrt(max(len(last), 1))
        if error > UNSURE * (self._begun - self._tail(best, self.horizon)):
            doubts += 1
            reasons.append(f"noise makes the end of its loss uncertain by {number(error)}")
        if self.p_value > 0.01:
            doubts += 2
            reasons.append(f"such a decrease may be noise (p = {self.p_value:.2g})")
        if math.isnan(self.p_value):
            doubts += 1
            reasons.append("no steps were left to compare the decrease with the loss's noise")
        return ("high", "medium", "low")[min(doubts, 2)], reasons


def _apart(one: np.ndarray, other: np.ndarray) -> tuple[float, float]:
    """How much higher the second half of a run is than that of another on the same batches, and the standard error."""
    apart, last = one - other, max(2, len(one) // 2)
    return float(apart[-last:].mean()), noise_of(apart[-max(4, last) :]) / math.sqrt(last)


def _range(chosen: float, best: float, rates: Sequence[Rate], horizon: int) -> tuple[float, float]:
    """Half to twice the suggestion, and on to rates as good in the longest runs, without rates that are not good."""
    bad = [r.learning_rate for r in rates if r.verdict != Verdict.GOOD]
    alike = [r.learning_rate for r in rates if r.steps == horizon and r.verdict == Verdict.GOOD and r.number >= ALIKE]
    low = max([min([chosen / 2, *alike]), *(math.sqrt(r * best) for r in bad if r < best)])
    high = min([max([chosen * 2, *alike]), *(math.sqrt(r * best) for r in bad if r > best)])
    return min(float(f"{low:.3g}"), chosen), max(float(f"{high:.3g}"), chosen)
