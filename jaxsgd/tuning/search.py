"""The learning rate by short runs: the recipe that people follow by hand.

Rates a factor of ten apart are trained for a few steps from the same start on the same batches. Where the best is at
the edge, the grid grows; where it is so by noise alone, all are trained further. Of rates that the lowest beats by
noise alone the highest counts. Then the gaps beside the best are filled. The best and its neighbours are trained
further, and the best two continue until the steps are used up. A long run needs a lower rate than a short one. On noisy
batches the suggestion is below the best by the cube root of the steps. Without noise it is between the best and the
next lower rate if that does about as well. A schedule is applied as a whole in each run, however short.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from jaxsgd.tuning.short_runs import Members, chance, noise_of, tail

__all__ = ["COARSE", "GOOD", "HIGH", "Search"]

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
CLEARLY = 3.0
"""The grid grows where its edge is better by more than so many standard errors: several rates are looked at."""
ERRORS = 2.0
"""First runs are alike that differ by less than so many standard errors."""
SOONER = 0.1
"""The lower neighbour does as well as the best if it takes this part of the steps longer."""


class Search:
    """Which rates are trained, and for how many steps.

    Args:
      members: the runs.
      usual: the rate to begin at.
      spend: steps to spend on all runs.
      steps: of the training that the rate is for.
      every: calls of the train step for one update.

    Attributes:
      curves: learning rate -> the loss of each step of its last run.
      first, middle, horizon: steps of the first, the middle and the longest runs.
      early: the rate that was best in the first runs.
      bracketed: whether the best of the middle runs has one on both sides.
      p_value: how likely noise alone makes the best's decrease; NaN where no steps were left to tell.
    """

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
        """Train, until the steps are spent."""
        members = self.members
        members.train([self.usual / COARSE, self.usual, self.usual * COARSE], self.first)
        if not any(len(c) and np.isfinite(c[0]) for c in self.curves.values()):
            return
        while rates := self._more():
            members.train(rates, self.first)
        self.middle = max(self.middle, self._whole(self.first + 1, up=True))
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

    def end(self, rate: float, steps: int) -> float:
        """The mean loss at the end of a run of so many steps; infinite where it diverged or was not made."""
        curve = self.members.run(rate, steps)
        if curve is None or not self.members.alive(rate) and len(self.curves[rate]) <= steps:
            return math.inf
        whole = len(curve) >= self.every and self.every > 1
        last = curve[-self.every :] if whole and len(curve) < 4 * self.every else None
        return float(last.mean()) if last is not None else tail(curve, 0.5 if steps <= self.first else 0.25)

    def at(self, steps: int) -> list[float]:
        """The rates with a finite run of so many steps, in rising order."""
        return sorted(r for r in self.curves if math.isfinite(self.end(r, steps)))

    def _best(self, steps: int) -> float | None:
        return min(self.at(steps), key=lambda rate: (self.end(rate, steps), rate), default=None)

    def _early(self) -> float | None:
        """The best of the first runs; where that is the lowest rate of all, the highest that is like it.

        Few steps with small batches tell noise, not rates: a low rate that does nothing has the lowest loss as often
        as not. The higher one says more in a longer run.
        """
        best = self._best(self.first)
        if best is None or self.members.constant or best > min(self.curves):
            return best
        highest = best
        for rate in self.at(self.first):
            gap, error = _apart(self.curves[rate][: self.first], self.curves[best][: self.first])
            if gap <= ERRORS * error and self.end(rate, self.first) <= self.begun:
                highest = rate
        return highest

    def _more(self) -> list[float]:
        """The rates to train now: one more while the best is at the edge of the grid, or all, further than before."""
        if self.members.spent + self.first > EXPLORING * self.spend or len(self.curves) >= RATES:
            return []
        best, low, high = self._early(), min(self.curves), max(self.curves)
        if best is None:
            return [low / COARSE]
        if len({self.end(rate, self.first) for rate in self.curves}) == 1:  # nothing depends on the rate
            return []
        if low < best < high:
            return []
        if self._tells(best):
            return [high * COARSE if best == high else low / COARSE]
        longer, rates = self._whole(2 * self.first), self.at(self.first)
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
            if self.end(above, self.first) > self.begun + (HIGH - 1) * abs(self.begun):
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
            at, tried = self.at(self.middle), [r for r in self.curves if len(self.curves[r]) >= self.middle]
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
        enough = self.begun - LOWER * (self.begun - self.end(best, self.middle))
        lower = [rate for rate in near if rate < best and self.end(rate, self.middle) <= enough]
        pair = [best, *(lower or near)[:1]]
        for rates in (pair, [best]):
            furthest = self._furthest(rates)
            if furthest > self.middle:
                self.members.train(rates, furthest)
                self.horizon = furthest
                break
        while self._best(self.horizon) is None:  # all diverged after all: what is below goes on
            below = [r for r in self.at(self.middle) if r < min(pair)]
            if not below or not self._affords([max(below)], self.horizon):
                self.horizon = self.middle
                return
            pair = [max(below)]
            self.members.train(pair, self.horizon)

    def _beside(self, rate: float, steps: int) -> list[float]:
        """The neighbours of a rate that have a finite run of so many steps, the better one first."""
        near = [r for r in self.at(steps) if r != rate and 1 / NEIGHBOUR < r / rate < NEIGHBOUR]
        return sorted(near, key=lambda r: self.end(r, steps))

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

    def below(self, best: float) -> tuple[float, float, int] | None:
        """The next lower rate whose loss is like the best's, how far to go there (1: all the way), and their steps.

        Alike is what the best did a tenth of the steps sooner, in as many steps as both have. The way is shorter the
        more the losses differ. It is 0 at that limit, or where the lower rate is not good any more. There is no way up:
        the best rate falls as runs get longer.
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
        margin = max(float(curve[-last - sooner : -sooner].mean() - curve[-last:].mean()), 0.0)
        margin = min(margin, (1 - GOOD) * (self.begun - self.end(best, steps)))
        gap = max(float((other - curve)[-last:].mean()), 0.0)
        if gap > margin:
            return None
        return rate, 1 - gap / margin if margin else 1.0, steps

    def doubt(self, rate: float) -> tuple[float, float]:
        """The standard error of the end of a longest run, and how far the run lowered the loss."""
        curve = self.members.run(rate, self.horizon)
        last = curve[-max(4, self.horizon // 4) :] if curve is not None else np.zeros(0)
        return noise_of(last) / math.sqrt(max(len(last), 1)), self.begun - self.end(rate, self.horizon)

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
            whole, before = late[self.horizon // 2 :], np.append(start, self.curves[self.lowest][: self.first])
            apart = math.sqrt(before.var(ddof=1) / len(before) + whole.var(ddof=1) / len(whole))
            ps += [chance(before.mean() - whole.mean(), apart, len(before) - 1)]
            self.p_value = min(len(ps) * min(ps), 1.0)

    @property
    def lowest(self) -> float:
        """The lowest rate that has not diverged, or the lowest of all."""
        return min((r for r in self.curves if self.members.alive(r)), default=min(self.curves))

    @property
    def begun(self) -> float:
        """The loss to begin with: the first, or the lowest rate's over its first steps where that is higher."""
        curve = self.curves[self.lowest]
        first, later = float(curve[0]), tail(curve[: self.first], 0.5)
        return max(first, later) if math.isfinite(later) else first


def _apart(one: np.ndarray, other: np.ndarray) -> tuple[float, float]:
    """How much higher the second half of a run is than that of another on the same batches, and the standard error."""
    apart, last = one - other, max(2, len(one) // 2)
    return float(apart[-last:].mean()), noise_of(apart[-max(4, last) :]) / math.sqrt(last)
