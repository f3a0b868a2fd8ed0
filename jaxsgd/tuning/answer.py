"""The answer of a search for a learning rate: a verdict on each rate, the suggestion, and the confidence in it."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from jaxsgd.diagnosis.verdict import Verdict
from jaxsgd.report import number
from jaxsgd.tuning.probe_result import Probe, Rate
from jaxsgd.tuning.range_test import RangeTest
from jaxsgd.tuning.search import COARSE, GOOD, HIGH, Search
from jaxsgd.tuning.short_runs import noise_of

__all__ = ["answer"]

ALIKE = 0.95
"""The range takes in rates that do so to this part in the longest runs."""
NOISY, UNSURE = 0.004, 0.05
"""Standard errors of the best's end as parts of its decrease: from the first on noise decides how far the rate should
fall, from the second on the confidence is not high."""
ENDLESS = 1e3
"""A loss that falls by so many times its size, or 1, has no minimum."""
LONGER = 1 / 3
"""With noise the best rate falls with the steps to this power (0.32 by Bjorck et al. 2024, arXiv:2409.19913)."""


def answer(search: Search, tested: RangeTest | None, doubts: list[str]) -> Probe:
    """The result of a search that has run.

    Args:
      search: the runs.
      tested: the range test that was made beside it, if any.
      doubts: further sentences for ``why``.
    """
    best = search.best
    lowest = search.curves[search.lowest]
    noise = noise_of(lowest[: search.first]) if np.isfinite(lowest[: search.first]).all() else 0.0
    rates = tuple(_judge(search, rate, best, noise) for rate in sorted(search.curves))
    curves = [search.curves[rate.learning_rate] for rate in rates]
    longest = max(map(len, curves))
    losses = np.stack([np.pad(curve, (0, longest - len(curve)), constant_values=np.nan) for curve in curves])
    spent = search.members.spent + (0 if tested is None else tested.steps)
    rest = (losses, search.horizon, search.p_value, spent, spent / search.steps, search.usual, tested)
    if (reason := _none(search, rates, best)) is not None:
        rates = tuple(r._replace(verdict=Verdict.TOO_LOW, why="no gain") if r.verdict == "good" else r for r in rates)
        return Probe(None, None, "low", (reason,), rates, *rest)
    assert best is not None
    chosen, reason = _chosen(search, best, rates)
    confidence, why = _confidence(search, best, rates)
    return Probe(
        chosen,
        _range(chosen, best, rates, search.horizon),
        confidence,
        (reason, *why, *doubts),
        rates,
        *rest,
        best=best,
    )


def _judge(search: Search, rate: float, best: float | None, noise: float) -> Rate:
    curve = search.curves[rate]
    steps = int(np.isfinite(curve).sum())
    start, end = search.begun, search.end(rate, len(curve))

    def say(verdict: Verdict, value: float, why: str) -> Rate:
        return Rate(rate, steps, start, end, start - end, verdict, float(value), why)

    if steps < len(curve):
        return say(Verdict.DIVERGED, steps, f"at step {steps}")._replace(end=math.nan, decrease=math.nan)
    if end > start + (HIGH - 1) * abs(start) and start:
        return say(Verdict.DIVERGED, end / start, f"ended {number(end / start)} times above the start")
    others = {r: search.end(r, steps) for r in search.curves}
    lowest = min(others, key=lambda r: others[r])
    most = start - others[lowest]
    if best is None or most <= 0:
        side = Verdict.TOO_HIGH if best is not None and rate > best and end > start else Verdict.TOO_LOW
        return say(side, 0.0, f"no decrease in {steps} steps")
    part = (start - end) / most
    against = "the lowest" if rate == lowest else f"{part:.0%} of the decrease of {number(lowest)}"
    why = f"{against} in {steps} steps"
    if part >= GOOD or rate == best:
        return say(Verdict.GOOD, part, why)
    beside = None if best is None else search.members.run(best, steps)
    beside = np.full(steps, start) if beside is None else np.maximum(beside, start)
    climbs = curve - beside  # some batches are hard for all
    at = int(climbs.argmax())
    peak, rise = float(curve[at]), float(climbs[at]) - 4 * noise
    if rise > (HIGH - 1) * abs(start) and start:
        return say(Verdict.DIVERGED, peak / start, f"rose to {number(peak)}, {number(peak / start)} times the start")
    swing = max(noise_of(curve[steps // 2 :]) - max(4 * noise, noise_of(beside[steps // 2 :])), 0.0) / most
    climb = max(rise, 0.0) / most
    if climb > 0.5 or swing > 0.2:
        size, does = (climb, "rose") if climb > 0.5 else (swing, "swings")
        why = f"{does} {number(size)} times as much as the best run lowered the loss"
        return say(Verdict.OSCILLATING, size, why)
    return say(Verdict.TOO_LOW if rate < best else Verdict.TOO_HIGH, part, why)


def _none(search: Search, rates: Sequence[Rate], best: float | None) -> str | None:
    if all(r.steps == 0 for r in rates):
        return "the loss at the start is not finite"
    if best is None:
        blown = [r.learning_rate for r in rates if r.verdict == Verdict.DIVERGED]
        if rates[0].learning_rate in blown:
            return f"every rate diverges, down to {rates[0].learning_rate:.2g}"
        return (
            f"the rates that were best in {search.first} steps diverge later, down to {min(blown):.2g}; "
            "no steps were left to try lower ones for as long"
        )
    falls = max((r.decrease for r in rates if math.isfinite(r.decrease)), default=0.0)
    if falls > ENDLESS * max(abs(search.begun), 1):
        return f"the loss falls without end, from {number(search.begun)} by {number(falls)}: has it the wrong sign?"
    tried = search.at(search.first)
    tails = [search.end(rate, search.first) for rate in tried]
    apart = len(tried) > 2 and tried[-1] / tried[0] > COARSE
    if apart and np.ptp(tails) <= 1e-6 * (search.begun - min(tails)) > 1e-9 * abs(search.begun):
        return "every rate gives the same losses: does rule(learning_rate) use its argument?"
    if all(r.decrease <= 1e-6 * abs(r.start) for r in rates if math.isfinite(r.decrease)) and search.p_value != 0:
        blown = [r.learning_rate for r in rates if r.verdict == "diverged"]
        return "no rate lowers the loss" + (f"; from {min(blown):.2g} up it diverges" if blown else "")
    if search.p_value > 0.1:
        return f"no rate lowers the loss by more than its noise (p = {search.p_value:.2g})"
    return None


def _chosen(search: Search, best: float, rates: Sequence[Rate]) -> tuple[float, str]:
    """The suggestion, and a sentence on how it follows from the best of the longest runs."""
    lowest = f"{number(best)} had the lowest loss of the longest runs, {search.horizon} of {search.steps} steps"
    error, decrease = search.doubt(best)
    if error > NOISY * decrease and search.horizon < search.steps:
        chosen, how = best * (search.horizon / search.steps) ** LONGER, "by the cube root of the steps"
        bad = max((r.learning_rate for r in rates if r.learning_rate < best and r.verdict != Verdict.GOOD), default=0)
        if chosen < (middle := math.sqrt(bad * best)):
            chosen, how = middle, f"halfway to {number(bad)}"
        return float(f"{chosen:.3g}"), f"{lowest}; a longer run on noisy batches needs a lower rate, {how}"
    below = search.below(best)
    chosen = float(f"{best if below is None else best * (below[0] / best) ** below[1]:.3g}")
    if below is None or chosen == float(f"{best:.3g}"):
        return chosen, f"{lowest}; it is the suggestion as it is: no factor is taken off"
    rate, _, steps = below
    place = "is that one" if chosen == float(f"{rate:.3g}") else "is between the two"
    return chosen, (
        f"{lowest}; the lower {number(rate)} did as well in {steps} steps, up to a tenth of the steps, "
        f"so the suggestion {place}"
    )


def _confidence(search: Search, best: float, rates: Sequence[Rate]) -> tuple[str, list[str]]:
    doubts, reasons = 0, []
    moved = best / search.early
    if not 1 / 12 < moved < 12:
        doubts += 1
    if not 1 / 2 < moved < 2:
        reasons.append(
            f"after {search.first} steps {number(search.early)} was best: the best rate moves with the steps"
        )
    if not search.bracketed:
        doubts += 1
        reasons.append("the steps did not last to try a rate on both sides of the best")
    higher = [r for r in rates if r.learning_rate > best and r.verdict in ("diverged", "oscillating")]
    if higher:
        reasons.append(f"from {number(higher[0].learning_rate)} up the loss is unstable ({higher[0].verdict})")
    if search.horizon < 15 * search.every or search.horizon < 0.04 * search.steps:
        doubts += 1
        updates = f" with {search.horizon // search.every} updates" if search.every > 1 else ""
        reasons.append(f"the longest runs took {search.horizon} steps{updates}, which is little")
    part = 1 - search.end(best, search.horizon) / search.begun if search.begun > 0 else 1.0
    if part < 0.02:
        doubts += 2
        reasons.append(f"the best lowered the loss by {part:.2%}, which is little to judge by")
    error, decrease = search.doubt(best)
    if error > UNSURE * decrease:
        doubts += 1
        reasons.append(f"noise makes the end of its loss uncertain by {number(error)}")
    if search.p_value > 0.01:
        doubts += 2
        reasons.append(f"such a decrease may be noise (p = {search.p_value:.2g})")
    if math.isnan(search.p_value):
        doubts += 1
        reasons.append("no steps were left to compare the decrease with the loss's noise")
    return ("high", "medium", "low")[min(doubts, 2)], reasons


def _range(chosen: float, best: float, rates: Sequence[Rate], horizon: int) -> tuple[float, float]:
    """Half to twice the suggestion, and on to rates as good in the longest runs, without rates that are not good."""
    bad = [r.learning_rate for r in rates if r.verdict != Verdict.GOOD]
    alike = [r.learning_rate for r in rates if r.steps == horizon and r.verdict == Verdict.GOOD and r.number >= ALIKE]
    low = max([min([chosen / 2, *alike]), *(math.sqrt(r * best) for r in bad if r < best)])
    high = min([max([chosen * 2, *alike]), *(math.sqrt(r * best) for r in bad if r > best)])
    return min(float(f"{low:.3g}"), chosen), max(float(f"{high:.3g}"), chosen)
