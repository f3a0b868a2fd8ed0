"""The learning rate by short trainings: the recipe that people follow by hand.

Rates a factor of ten apart are trained for a few steps from the same start on the same batches; where the best
lies at the edge the grid grows; the gaps beside the best are filled; the best and its neighbours go on, for longer.
What is best on a short horizon is too high for a long one, as noise and instability take their time: the suggestion
lies below it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import jax
import numpy as np

from jaxsgd.ensemble.feed import Feed
from jaxsgd.ensemble.losses import takes
from jaxsgd.paths import aligned
from jaxsgd.progress import Bar
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
    tail,
    usual_rate,
)

__all__ = ["Probe", "Rate", "probe"]

COARSE, FINE = 10.0, math.sqrt(10.0)
"""Factors between rates: of the first grid, and beside its best."""
BELOW = {"same batch": 1.5, "proportional": 2.0, "normalised": 3.0}
"""So far below the best of the short trainings lies the suggestion: without noise; where steps shrink with a gradient;
and where they do not: there the floor under the loss, which takes long to reach, grows with the rate."""
MARGIN = 2.5
"""At least so far below the lowest rate that diverged or oscillated."""
FIRST, CONTROL, LEAST = 16, 16, 4
"""The first trainings take this part of the budget each; the control's another."""
EXPLORING = 0.6
"""The part of the budget after which the grid no longer grows."""
GOOD = 0.8
"""A rate is good that lowers the loss by this much of what the best does in as many steps."""
RATES = 24
"""At most so many."""


class Rate(NamedTuple):
    """How one learning rate fared.

    Attributes:
      learning_rate, steps: the rate, and the steps it took.
      start: the first loss, or, where that was a lucky one, the mean of the slowest rate over its first steps.
      end: the mean over the second half of its steps.
      decrease: ``start - end``.
      verdict: ``"diverged"``, ``"oscillating"``, ``"too slow"``, ``"plateau"`` (above the best) or ``"good"``.
      number: what the verdict rests on: the step it diverged at; the swing of the loss, or its climb, as a part of the
        best's decrease; the decrease as a part of the best's in as many steps.
      why: the same in words.
    """

    learning_rate: float
    steps: int
    start: float
    end: float
    decrease: float
    verdict: str
    number: float
    why: str


@dataclass(frozen=True)
class Probe:
    """A learning rate with the evidence for it.

    Attributes:
      learning_rate: the suggestion; None where no good rate was found, for the reason in ``why``.
      range: the rates ``(low, high)`` between which about as much is expected, or None.
      confidence: ``"high"``, ``"medium"`` or ``"low"``; ``why`` says in words what it rests on.
      rates: a `Rate` for each learning rate tried, in rising order.
      losses: ``(rates, steps)``, the loss of each step, NaN where a rate was not trained any more.
      horizon: steps of the longest trainings.
      p_value: how likely noise alone makes such a decrease, against the weights of the start on the same batches.
      steps, share: steps taken in all, and as a part of a full training's.
      usual: where the search began.
      range_test: the classical test, where it was asked for.
    """

    learning_rate: float | None
    range: tuple[float, float] | None
    confidence: str
    why: tuple[str, ...]
    rates: tuple[Rate, ...] = field(repr=False)
    losses: np.ndarray = field(repr=False)
    horizon: int
    p_value: float
    steps: int
    share: float
    usual: float
    range_test: RangeTest | None = None

    @property
    def learning_rates(self) -> np.ndarray:
        """The rates of the rows of ``losses``."""
        return np.array([rate.learning_rate for rate in self.rates])

    def __str__(self) -> str:
        first = f"no good rate found: {self.why[0]}"
        if self.range is not None:
            span = f"range {self.range[0]:.2g} to {self.range[1]:.2g}"
            first = f"learning rate {self.learning_rate:.2g}, {span}; confidence {self.confidence}"
        lines = [first, *(f"  {reason}" for reason in self.why[self.learning_rate is None :])]
        rows = [("rate", "steps", "loss", "to", "verdict", "")]
        rows += [
            (f"{r.learning_rate:.2g}", str(r.steps), f"{r.start:.4g}", f"{r.end:.4g}", r.verdict, r.why)
            for r in self.rates
        ]
        lines += [f"  {self.steps} steps taken, {self.share:.1%} of a training", "", aligned(rows)]
        return "\n".join(lines if self.range_test is None else [*lines, "", str(self.range_test)])


def probe(
    loss_fn: Callable[..., Any],
    params: Any,
    data: Any,
    rule: Callable[[Any], Any] = adamw,
    *,
    steps: int = 1000,
    share: float = 0.25,
    around: float | None = None,
    range_test: bool = False,
    key: int | jax.Array = 0,
    progress: bool | None = None,
) -> Probe:
    """A learning rate for a training of ``steps`` steps, from short trainings at several rates.

    All trainings begin at ``params``, see the same batches and are one compiled program. The steps of all of them
    together are at most ``share`` of ``steps``; one that diverges costs nothing more.

    Args:
      loss_fn: ``(params, batch, key) -> loss``, ``(loss, aux)`` too, or of ``(params, batch)``; for a TrainState with a
        model state as in `jaxsgd.make_step`.
      params: a tree of parameters, an ``nnx.Module`` or a `jaxsgd.TrainState`; left as it is. The optimizer
        begins anew.
      data: a list of batches, an iterator, a function of the step, or the one batch of all steps. As many batches as
        the longest training takes are held on to. A list ``[x, y]`` of arrays is one batch where the loss takes only
        the whole of it.
      rule: a rule, or a function of the learning rate that gives a gradient transformation, with clipping or a schedule
        in it. Any schedule of optax will do, those that test their peak in Python too.
      steps: of the training that the rate is for.
      share: the part of them that the probe may take.
      around: where to begin; by default the rule's usual rate.
      range_test: also make the range test, with a third of the steps.
      key: of the random numbers in the loss.
      progress: a bar, after two seconds; by default where somebody looks.

    Raises:
      ValueError: fewer than 6 steps to spend (30 with the range test); ``around`` not above 0.
      TypeError: ``rule`` is a gradient transformation.
    """
    rule = checked_rule(rule)
    spend = budget(steps, share, 30 if range_test else 6)
    if around is not None and not 0 < around < math.inf:
        raise ValueError(f"around={around}: a learning rate above 0 is needed")
    given, begin = beginning(loss_fn, params, key)
    usual, name = usual_rate(rule, given[0]) if around is None else (float(around), "around")
    feed, tested = Feed(data, takes(loss_fn, params)), None
    with Bar("probe", spend, progress) as bar:
        if range_test:
            tested = rising(given, begin, rule, feed.take(spend // 3), usual * 1e-4, usual * 1e3)
            spend -= spend // 3
            bar.advance(tested.steps, "range test")
        search = _Search(Members(given, begin, rule, feed, bar), usual, spend, manner(rule, steps))
        search.run()
    doubts = [] if name else [f"no usual rate is known for this rule: the search began at {usual:.2g}. Use around="]
    return search.answer(steps, tested, doubts)


class _Search:
    """The search, and what it says of what it saw."""

    def __init__(self, members: Any, usual: float, spend: int, manner: Any) -> None:
        self.members, self.usual, self.spend, self.manner = members, usual, spend, manner
        self.curves: dict[float, np.ndarray] = members.curves
        self.first = self.horizon = min(max(LEAST, spend // FIRST), max(2, spend // 8))
        self.p_value, self.early = math.nan, usual

    def run(self) -> None:
        members, first = self.members, self.first
        members.train([self.usual / COARSE, self.usual, self.usual * COARSE], first)
        if not any(len(c) and np.isfinite(c[0]) for c in self.curves.values()):
            return
        while (best := self._grown()) is not None:
            members.train([best], first)
        best = self._best(self.curves, first)
        if best is None:
            return
        for rate in (best / FINE, best * FINE):
            if not self._near(rate) and members.spent + first <= self.spend:
                members.train([rate], first)
        self.early = self._best(self.curves, first) or best
        last = max(4, self.spend // CONTROL)
        last = last if self.spend - members.spent >= last + 2 else 0
        self._prolong(self.early, last)
        if last and self.best is not None:
            self._compare(min(last, self.horizon - self.horizon // 2))

    @property
    def _slowest(self) -> np.ndarray:
        """The curve of the lowest rate that has not diverged."""
        return self.curves[min((r for r in self.curves if self.members.alive(r)), default=min(self.curves))]

    @property
    def _begun(self) -> float:
        """The loss to begin with: the first, or the slowest rate's over its first steps where the first was lucky."""
        first, later = float(self._slowest[0]), tail(self._slowest, self.first)
        return max(first, later) if math.isfinite(later) else first

    def _near(self, rate: float) -> bool:
        return any(1 / 1.2 < r / rate < 1.2 for r in self.curves)

    def _best(self, rates: Any, steps: int | None = None) -> float | None:
        best = min(rates, key=lambda rate: (tail(self.curves[rate], steps), rate), default=None)
        return None if best is None or math.isinf(tail(self.curves[best], steps)) else best

    def _grown(self) -> float | None:
        """The rate to add while the best lies at the edge of the grid."""
        if self.members.spent + self.first > EXPLORING * self.spend or len(self.curves) >= RATES:
            return None
        best, low, high = self._best(self.curves, self.first), min(self.curves), max(self.curves)
        if best is None:
            return low / COARSE
        if len({tail(curve) for curve in self.curves.values()}) == 1:  # nothing depends on the rate
            return None
        return high * COARSE if best == high else low / COARSE if best == low else None

    def _prolong(self, best: float, reserve: int) -> None:
        """Take the best and its neighbours on, twice as far each time, as long as the steps last.

        Where the best moves, so do the neighbours; where all diverge or rise, it goes on with what lies below.
        """
        before, ceiling = self.horizon, math.inf
        while True:
            keep = [r for r in self.curves if 1 / 4 < r / best < 4 and r < ceiling and self.members.ready(r)]
            beside = [r for r in (best / FINE, best * FINE) if r < ceiling and not self._near(r)]
            for extra in (beside, []):  # neighbours not tried yet join where they can catch up
                rates = [*keep, *extra]
                taken = [len(self.curves[r]) for r in keep]
                left = self.spend - reserve - self.members.spent
                furthest = (left + sum(taken)) // max(1, len(rates))
                if furthest > self.horizon:
                    break
            if rates and (furthest <= self.horizon or left < len(rates)):
                return
            if rates:
                before, twice = self.horizon, 2 * self.horizon
                self.horizon = twice if furthest >= 1.5 * twice else furthest
                self.members.train(rates, self.horizon)
            found = self.best
            below = [r for r in self.curves if r < min(rates, default=best) and self.members.ready(r)]
            if found is not None and (tail(self.curves[found]) < self._begun or not below):
                if not rates:
                    return
                best = found
            elif below:
                best, self.horizon, ceiling = max(below), before, min(rates, default=best)
            else:
                return

    @property
    def longest(self) -> list[float]:
        """The rates that reached the horizon."""
        return [r for r, c in self.curves.items() if len(c) == self.horizon and np.isfinite(c).all()]

    @property
    def best(self) -> float | None:
        return self._best(self.longest)

    def _compare(self, last: int) -> None:
        """Whether the best is lower than the start on the same batches by more than noise."""
        assert self.best is not None
        at = np.linspace(self.horizon // 2, self.horizon - 1, last).astype(int)
        start, after = self.members.control(min(self.curves) * 1e-3, at), self.curves[self.best][at]
        gain = start - after
        if not np.isfinite(gain).all() or gain.mean() <= 1e-6 * np.abs(start).mean():
            self.p_value = 1.0
        elif self.members.constant and np.ptp(start) <= 1e-4 * np.abs(start).mean():  # no noise to mistake
            self.p_value = 0.0
        else:  # the same batches in pairs, or all of the second half; twice the chance to be taken in by noise
            whole = self.curves[self.best][self.horizon // 2 :]
            apart = math.sqrt(start.var(ddof=1) / last + whole.var(ddof=1) / len(whole))
            ps = [chance(gain.mean(), noise_of(gain) / math.sqrt(last), last - 2)]
            ps += [chance(start.mean() - whole.mean(), apart, last - 1)]
            self.p_value = min(2 * min(ps), 1.0)

    # -- what it says -------------------------------------------------------------------------------

    def _peak(self, best: float) -> float:
        """Where a parabola through the best and its neighbours, over the logarithm of the rate, is lowest."""
        rates = sorted(self.longest)
        i = rates.index(best)
        if not 0 < i < len(rates) - 1:
            return best
        start = self.curves[best][0]
        x = np.log(np.array(rates[i - 1 : i + 2]) / best)
        y = np.array([min(tail(self.curves[r]), max(start, tail(self.curves[best]))) for r in rates[i - 1 : i + 2]])
        curved, slope, _ = np.polyfit(x, y, 2)
        if curved <= 0:
            return best
        return best * math.exp(float(np.clip(-slope / (2 * curved), x[0] / 2, x[2] / 2)))

    def _judge(self, rate: float, best: float | None, noise: float) -> Rate:
        curve = self.curves[rate]
        steps = int(np.isfinite(curve).sum())
        start, end = self._begun, tail(curve)
        say = lambda verdict, number, why: Rate(rate, steps, start, end, start - end, verdict, float(number), why)  # noqa: E731
        if steps < len(curve):
            return say("diverged", steps, f"at step {steps}")._replace(end=math.nan, decrease=math.nan)
        most = max((start - tail(c, steps) for c in self.curves.values() if len(c) >= steps), default=0.0)
        if best is None or most <= 0:
            return say("plateau", 0.0, "no decrease")
        swing = max(noise_of(curve[steps // 2 :]) - 4 * noise, 0.0) / most
        climb = max(float(curve.max()) - start - 4 * noise, 0.0) / most
        part = (start - end) / most
        if climb > 0.5 or swing > 0.2:
            size, does = (climb, "rose") if climb > 0.5 else (swing, "swings")
            return say("oscillating", size, f"{does} by {size:.2g} of the best's decrease")
        why = f"{part:.0%} of the best's decrease in {steps} steps"
        return say("good" if part >= GOOD else "too slow" if rate < best else "plateau", part, why)

    def answer(self, steps: int, tested: RangeTest | None, doubts: list[str]) -> Probe:
        best, slowest = self.best, self._slowest[: self.first]
        noise = noise_of(slowest) if np.isfinite(slowest).all() else 0.0
        rates = tuple(self._judge(rate, best, noise) for rate in sorted(self.curves))
        curves = [self.curves[rate.learning_rate] for rate in rates]
        longest = max(map(len, curves))
        losses = np.stack([np.pad(curve, (0, longest - len(curve)), constant_values=np.nan) for curve in curves])
        spent = self.members.spent + (0 if tested is None else tested.steps)
        rest = (rates, losses, self.horizon, self.p_value, spent, spent / steps, self.usual, tested)
        if (reason := self._none(rates, best)) is not None:
            rates = tuple(r._replace(verdict="plateau", why="no gain") if r.verdict == "good" else r for r in rates)
            return Probe(None, None, "low", (reason,), rates, *rest[1:])
        assert best is not None
        peak = self._peak(best)
        risen = [r.learning_rate for r in rates if r.verdict == "oscillating" and r.learning_rate >= best]
        unstable = risen + [r.learning_rate for r in rates if r.verdict == "diverged"]
        kind = "same batch" if self.members.constant else "proportional" if self.manner.proportional else "normalised"
        schedule, limit = self.manner.schedule, min(unstable, default=math.inf) / MARGIN
        seen = float(schedule[self.horizon // 2 : self.horizon].mean() / schedule.max())
        # A rate that was still rising was not held for long enough to blow up.
        below = max(BELOW[kind], MARGIN if seen < 0.9 else 0)
        chosen = _rounded(min(peak / below, limit) * min(seen, 1.0))
        confidence, why = self._confidence(best, rates, seen)
        if limit < peak / below:
            why.append(f"held {MARGIN:g} times below {min(unstable):.2g}, the lowest rate that was unstable")
        ends = _rounded(chosen / 2), _rounded(max(chosen, min(peak * min(seen, 1.0), 2 * chosen, limit)))
        return Probe(chosen, ends, confidence, (*why, *doubts), *rest)

    def _none(self, rates: Sequence[Rate], best: float | None) -> str | None:
        if all(r.steps == 0 for r in rates):
            return "the loss at the start is not finite"
        if best is None:
            return f"every rate diverges, down to {rates[0].learning_rate:.2g}"
        if all(r.decrease <= 1e-6 * abs(r.start) for r in rates if math.isfinite(r.decrease)) and self.p_value != 0:
            blown = [r.learning_rate for r in rates if r.verdict == "diverged"]
            return "no rate lowers the loss" + (f"; from {min(blown):.2g} up it diverges" if blown else "")
        if self.p_value > 0.05:
            return f"no rate lowers the loss by more than its noise (p = {self.p_value:.2g})"
        return None

    def _confidence(self, best: float, rates: Sequence[Rate], seen: float) -> tuple[str, list[str]]:
        doubts, reasons = 0, []
        below, above = (any(r.learning_rate < best for r in rates), any(r.learning_rate > best for r in rates))
        if not (below and above):
            doubts += 2
            reasons.append(f"the best, {best:.2g}, lies at the edge of what the steps allowed to try")
        if not 1 / 4 < best / self.early < 4:
            doubts += 1
            reasons.append(f"after {self.first} steps {self.early:.2g} was best, after {self.horizon} {best:.2g}")
        else:
            reasons.append(f"after {self.first} and {self.horizon} steps the same rates were best, around {best:.2g}")
        if seen < 0.9:
            doubts += 1
            reasons.append(f"the schedule was at {seen:.0%} of its peak: the rate is so much lower than without it")
        if self.horizon < 15:
            doubts += 1
            reasons.append(f"the longest trainings took {self.horizon} steps, which is little")
        part = 1 - tail(self.curves[best]) / self._begun if self._begun > 0 else 1.0
        if part < 0.02:
            doubts += 2
            reasons.append(f"the best lowered the loss by {part:.2%}, which is little to judge by")
        if self.p_value > 0.01:
            doubts += 2
            reasons.append(f"such a decrease may be noise (p = {self.p_value:.2g})")
        if math.isnan(self.p_value):
            doubts += 1
            reasons.append("no steps were left to compare the decrease with the loss's noise")
        return ("high", "medium", "low")[min(doubts, 2)], reasons


def _rounded(rate: float) -> float:
    return float(f"{rate:.2g}")
