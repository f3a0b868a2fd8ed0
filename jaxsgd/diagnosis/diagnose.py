"""Describe a loss curve, with the numbers behind each sentence."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np

from jaxsgd.diagnosis.history import History, Series, read
from jaxsgd.diagnosis.knobs import Knobs, knobs_of
from jaxsgd.diagnosis.layers import examine
from jaxsgd.diagnosis.loss_curve import (
    Oscillation,
    Shape,
    Spike,
    monotone,
    noise,
    oscillation,
    shape,
    smooth,
    spikes,
    without,
    without_pattern,
)
from jaxsgd.diagnosis.verdict import Verdict
from jaxsgd.hyper import WholeFrom, is_array, is_constant
from jaxsgd.report import OMITTED, Column, Report, Table, number

__all__ = ["Diagnosis", "Finding", "diagnose"]

SIGNIFICANT = 4.0  # standard errors, of a fall or a rise
LEVEL = 0.05  # of the fall in the second half: no more to gain
LATE = 0.22  # of the fall in the second half: an exponential decay that has run through 2.5 of its time constants
TALL = 0.75  # of the fall: the height of spikes that are the main thing to say
LEAP = 10.0  # of the fall: the same in the first twentieth of the steps
SWING = 0.04  # of the fall, from trough to crest
GAP = 0.25  # of the way from the start to the best known loss, at which a level curve is a plateau
QUIET = 0.01  # of the fall: noise that a smaller batch could well double
OVERFIT = 0.1  # of the validation loss's own fall, lost again
SHORTEST = 5
MOVES = 3.0  # times the noise: how far the mean of seven steps wanders if the weights do
ABOVE = 0.9  # of the last third, where a loss that has diverged lies above its start
HUGE = 1e100  # what counts as not finite: its square is out of range


class Finding(NamedTuple):
    """One thing that the curve shows.

    Attributes:
      verdict: its name.
      text: what the curve shows, in a sentence.
      numbers: what it is read from, never empty.
      advice: the step to take.
    """

    verdict: Verdict
    text: str
    numbers: dict[str, float]
    advice: str


ROWS = {
    "points": "points", "start": "loss at the start", "end": "loss at the end", "lowest": "lowest smoothed loss",
    "fall": "fall", "noise": "noise of a step", "significance": "fall over its standard error",
    "late_share": "share of the fall in the second half", "level_since": "level from step", "finite": "finite losses",
}  # fmt: skip
"""The names of `Diagnosis.numbers` in the table."""
LARGEST = 1000.0
"""A fall of more standard errors is beyond doubt; how many says nothing."""


@dataclass(frozen=True, repr=False)
class Diagnosis(Report):
    """The result of `diagnose`.

    Attributes:
      verdict: the main one, of `Verdict.of_curves`.
      findings: all of them, the main one first.
      numbers: of the curve: ``points``, ``start``, ``end``, ``lowest``, ``fall``, ``noise`` (of a single step),
        ``significance`` (of the fall, in standard errors), ``late_share`` (the second half's share of the fall),
        ``level_since`` (a step).
      notes: what was done to the history to read it.
      steps, losses: the curve, for `plot`.
    """

    picture = "diagnosis"

    verdict: Verdict
    findings: tuple[Finding, ...]
    numbers: dict[str, float]
    notes: tuple[str, ...] = ()
    steps: np.ndarray = field(default_factory=lambda: np.zeros(0), compare=False, metadata=OMITTED)
    losses: np.ndarray = field(default_factory=lambda: np.zeros(0), compare=False, metadata=OMITTED)

    @property
    def advice(self) -> str:
        """The step to take for the main verdict."""
        return self.findings[0].advice

    @property
    def summary(self) -> str:
        return f"{self.verdict}: {self.findings[0].text}"

    @property
    def why(self) -> tuple[str, ...]:
        return (*(f"{f.verdict}: {f.text}" for f in self.findings[1:]), *self.notes)

    @property
    def next(self) -> tuple[str, ...]:
        return (self.advice, *(f"{f.verdict}: {f.advice}" for f in self.findings[1:]))

    @property
    def table(self) -> Table:
        rows: list[tuple[Any, ...]] = []
        for name, value in self.numbers.items():
            beyond = name == "significance" and abs(value) > LARGEST
            shown = ("over " if value > 0 else "below -") + number(int(LARGEST)) if beyond else value
            rows.append((ROWS.get(name, name.replace("_", " ")), shown))
        return Table((Column("measure", kind="text"), Column("value")), tuple(rows))


def diagnose(
    history: Any,
    *,
    validation: Any = None,
    learning_rate: float | None = None,
    best_known: float | None = None,
    steps_per_epoch: int | None = None,
    tx: Any = None,
    rule: Any = None,
    loss: str = "loss",
) -> Diagnosis:
    """Diagnose a run from its loss curve: ``print(jaxsgd.diagnose(recorder.records, tx=tx))``.

    The verdicts rest on shares of the curve's own fall and on its noise. So a constant added to the loss, or a factor,
    changes none. Losses alone cannot tell a finished run from one that is stuck above the best loss. ``best_known`` or
    the measurements of layers can.

    Args:
      history: losses, one a step; or records, such as `jaxsgd.Recorder.records`, dicts with ``"loss"`` and perhaps
        ``"step"``, ``"gradient_norm"``, ``"learning_rate"``, ``"validation_loss"`` or ``"validation_accuracy"`` (in
        some of them) and what `jaxsgd.monitor_report` gives; or a dict of arrays of such names.
      validation: validation losses, evenly spaced up to the last step, or ``(steps, losses)``; instead of the
        history's own.
      learning_rate: named in the advice. Default: the history's largest, or that of ``tx``.
      best_known: the loss that another run is known to reach, or its lower bound (0 for a model that can fit all
        its examples).
      steps_per_epoch: the number of batches; 1 if every step sees all data. A pattern of that length comes from the
        order of the batches, and is no oscillation. Default: unknown; a pattern that may be the order of the batches is
        then reported as a question.
      tx: the gradient transformation of the training. Advice names only settings that it has. Default: unknown.
      rule: instead of ``tx`` a rule, or its name.
      loss: the name of the loss in the history. Default: ``"loss"``.

    Returns:
      A `Diagnosis`, whose ``verdict`` is one of `Verdict.of_curves`.

    Raises:
      TypeError: ``history`` is none of these; ``tx`` is no gradient transformation, or ``rule`` is given too.
      ValueError: it is empty or has no loss; arrays disagree on their length; ``best_known`` is not finite.

    >>> import numpy as np
    >>> noise = 0.01 * np.random.default_rng(0).standard_normal(100)
    >>> print(diagnose(2.3 - 0.002 * np.arange(100.0) + noise, rule="sgd", learning_rate=0.01).advice)
    try a rate 10x higher (to 0.1), for a straight line has no end in sight; or set momentum=0.9
    """
    if best_known is not None and not math.isfinite(best_known):
        raise ValueError(f"best_known={best_known}: a finite loss is needed")
    if steps_per_epoch is not None:
        WholeFrom(1).check(f"steps_per_epoch={steps_per_epoch!r}", steps_per_epoch)
    if learning_rate is not None and not (_is_number(learning_rate) and 0 < float(learning_rate) < math.inf):
        raise ValueError(f"learning_rate={learning_rate!r}: a number above 0 is needed, or None")
    told = read(history, validation, loss)
    if learning_rate is None and "learning_rate" in told.others:
        learning_rate = float(np.nanmax(told.others["learning_rate"].values))
    knobs = knobs_of(tx, rule, learning_rate)
    found, numbers = _of_curve(told, knobs, best_known, steps_per_epoch)
    layers = [Finding(*one) for one in examine({name: s.values for name, s in told.others.items()})]
    dead = next((f for f in layers if f.verdict is Verdict.DEAD_LAYERS), None)
    level = numbers.get("late_share", 1.0) <= LEVEL
    level &= found[0].verdict not in (Verdict.DIVERGED, Verdict.STUCK, Verdict.OSCILLATING)
    if dead is not None and level:
        text = f"the loss is level from step {numbers['level_since']:.0f} on, and {dead.text}"
        rest = [f for f in found if f.verdict not in (Verdict.GOOD, Verdict.PLATEAU)]
        found = [Finding(Verdict.STUCK, text, numbers | dead.numbers, dead.advice), *rest]
    return Diagnosis(found[0].verdict, (*found, *layers), numbers, told.notes, *told.loss)


def _is_number(x: Any) -> bool:
    return is_constant(x) or is_array(x) and x.shape == ()


def _of_curve(
    told: History, knobs: Knobs, best_known: float | None, epoch: int | None
) -> tuple[list[Finding], dict[str, float]]:
    steps, raw = told.loss
    finite = np.abs(raw) < HUGE
    if not finite.any() or not finite[-1] or finite.sum() < 0.5 * len(raw):
        return [_not_finite(steps, raw, finite, knobs)], {"points": len(raw), "finite": int(finite.sum())}
    steps, y = steps[finite], raw[finite].astype(np.float64)
    if len(y) < SHORTEST:
        numbers = {"points": len(y), "start": float(y[0]), "end": float(y[-1]), "fall": float(y[0] - y[-1])}
        text = f"{len(y)} points; at least {SHORTEST} are needed"
        return [Finding(Verdict.TOO_SHORT, text, numbers, "record more steps")], numbers
    spacing = max(1, round(float(np.median(np.diff(steps)))))  # not every step may be recorded
    epoch = None if epoch is None else epoch // math.gcd(epoch, spacing)
    y, pattern = _without_order(y, epoch)
    jumps = spikes(y)
    calm = without(y, jumps)
    seen = shape(calm)
    numbers = {
        "points": seen.points, "start": seen.start, "end": seen.end, "lowest": seen.lowest, "fall": seen.fall,
        "noise": seen.noise, "significance": seen.significance, "late_share": seen.late_share,
        "level_since": float(steps[seen.level_since]),
    }  # fmt: skip
    swings = _swings(y, epoch, pattern)
    if jumps and (swings is None or swings.regularity < 0.5):  # of a strong rhythm the spikes are the crests
        swings = _swings(calm, epoch, pattern)
    out = [
        _diverged(y, seen, knobs), *_jumping(steps, y, jumps, seen, told, knobs),
        _swinging(seen, swings, knobs, epoch, spacing), _overfitting(told, seen),
        _levels(steps, calm, seen, best_known, knobs, numbers),
    ]  # fmt: skip
    found = [f for f in out if f is not None]
    order = list(Verdict)
    if any(f.verdict in (Verdict.DIVERGED, Verdict.STUCK) for f in found):
        found = [f for f in found if f.verdict is not Verdict.OSCILLATING or f.numbers["regularity"] > 0.6]
    found.sort(key=lambda f: order.index(f.verdict) + len(order) * (f.numbers.get("gravity", 1.0) < 1))
    if found[0].verdict is not Verdict.GOOD:  # these say how it falls: only where nothing worse is the matter
        calmly = {Verdict.GOOD}
        if found[0].verdict is Verdict.DIVERGED:
            calmly |= {Verdict.STUCK, Verdict.TOO_SLOW, Verdict.PLATEAU}
        found = [f for f in found if f.verdict not in calmly]
    if pattern is not None:
        found.append(_ordered(pattern, epoch, knobs, spacing))
    if not finite.all():
        lost = int((~finite).sum())
        text = f"the loss was not finite in {lost} of {len(raw)} steps and came back"
        advice = "find those batches; jaxsgd.guard skips such steps"
        found.append(Finding(Verdict.NOT_FINITE, text, {"steps": lost}, advice))
    return found, numbers


# -- the order of the batches --------------------------------------------------------------------------


class _Pattern(NamedTuple):
    """What repeats exactly: its length in points, and its share of the noise."""

    period: int
    share: float


def _without_order(y: np.ndarray, epoch: int | None) -> tuple[np.ndarray, _Pattern | None]:
    """The curve without the pattern that the order of the batches makes, and the pattern."""
    period = epoch
    if epoch is None:
        swings = oscillation(y)
        period = round(swings.period) if swings is not None and swings.ordered and _large(swings, shape(y)) else None
    if period is None or period < 2 or len(y) < 3 * period:
        return y, None
    rest, share = without_pattern(y, period)
    return rest, _Pattern(period, share) if share or epoch is None else None


def _swings(y: np.ndarray, epoch: int | None, pattern: _Pattern | None) -> Oscillation | None:
    """An oscillation that is not the order of the batches."""
    found = oscillation(y)
    if found is None or epoch == 1:
        return found
    if epoch is None and pattern is None:
        return None if found.ordered else found
    length = pattern.period if pattern is not None else epoch or 1
    calm = 3 * float(np.median(np.abs(y - monotone(y))))  # from trough to crest, nearly
    if pattern is not None and calm < SWING * (y.max() - y.min()):
        return None  # remains of the pattern where it was not the usual one
    ratio = max(found.period, length) / min(found.period, length)
    return None if abs(ratio - round(ratio)) < 0.03 else found


def _large(swings: Oscillation, seen: Shape) -> float:
    """The swing as a share of the fall if it is worth a word, else 0."""
    reference = max(seen.start, seen.highest) - seen.lowest
    share = swings.swing / reference if reference > 0 else math.inf
    return share if share >= SWING else 0.0


def _ordered(pattern: _Pattern, epoch: int | None, knobs: Knobs, spacing: int) -> Finding:
    period, share = pattern.period * spacing, pattern.share
    numbers = {"period": float(period), "share": share}
    copy = "shuffle each epoch, and copy the indices of each batch: a shuffle in place changes the slices of its array"
    if epoch is not None:
        text = f"{share:.0%} of the noise repeats every {period} steps: the batches come in the same order each epoch"
        return Finding(Verdict.EPOCH_PATTERN, text, numbers, copy)
    text = (
        f"the loss repeats a pattern of {period} steps: is that your epoch, with batches in the same order each time?"
    )
    calmer = _calmer(pattern.period, knobs)
    advice = f"if so, pass steps_per_epoch={period}, {copy}; if not, the steps overshoot: {calmer}"
    return Finding(Verdict.EPOCH_PATTERN, text, numbers, advice)


# -- findings ------------------------------------------------------------------------------------------


def _calmer(period: float, knobs: Knobs) -> str:
    """What ends an oscillation."""
    return f"{'' if period < 4 else knobs.damped()}try a learning rate 3x lower{knobs.rate(1 / 3)}"


def _not_finite(steps: np.ndarray, raw: np.ndarray, finite: np.ndarray, knobs: Knobs) -> Finding:
    bad = np.flatnonzero(~finite)
    first, start = float(steps[bad[0]]), float(raw[0])
    numbers = {"first_not_finite": first, "not_finite": len(bad), "points": len(raw), "start": start}
    if bad[0] == 0:
        text = f"the loss is not finite from the first step on ({len(bad)} of {len(raw)} steps)"
        return Finding(Verdict.DIVERGED, text, numbers, "look at the data and the loss itself: no rate is at fault yet")
    top = float(np.max(raw[finite]))
    numbers["highest"] = top
    way = f"rose to {number(top)}" if top > start else f"fell to {number(float(np.min(raw[finite])))}"
    text = f"the loss is not finite from step {first:.0f} on; it began at {number(start)} and {way}"
    advice = f"lower the learning rate 10x{knobs.rate(0.1)}, or warm up and clip"
    return Finding(Verdict.DIVERGED, text, numbers, advice)


def _diverged(raw: np.ndarray, seen: Shape, knobs: Knobs) -> Finding | None:
    rise, error = seen.end - seen.start, math.hypot(seen.start_error, seen.end_error)
    lost, gained = seen.end - seen.lowest, seen.start - seen.lowest
    numbers = {"start": seen.start, "end": seen.end, "lowest": seen.lowest, "highest": seen.highest, "rise": rise}
    advice = f"lower the learning rate 10x{knobs.rate(0.1)}; warm up and clip if it began well"
    last = raw[-max(3, len(raw) // 3) :]
    above_all = float(np.median(last)) - seen.start > max(gained, 4 * seen.start_error)
    if above_all and (last > seen.start).mean() >= ABOVE or rise > 0 and seen.significance < -SIGNIFICANT:
        text = f"the loss goes from {number(seen.start)} to {number(seen.end)}"
        return Finding(Verdict.DIVERGED, text, numbers | {"significance": seen.significance}, advice)
    surely = SIGNIFICANT * (error + seen.noise)
    if lost > surely and gained > surely and lost > 0.5 * gained:
        text = (
            f"the loss fell from {number(seen.start)} to {number(seen.lowest)} and has since lost {lost / gained:.0%} "
            "of that"
        )
        return Finding(Verdict.DIVERGED, text, numbers | {"lost_share": lost / gained}, advice)
    early = raw[: max(4, len(raw) // 10)].max()
    above = max(seen.highest, float(early)) - seen.start
    if above > surely and abs(rise) < max(surely, 0.01 * above) and abs(rise) < 0.1 * above:
        text = (
            f"the loss leaped by {number(above)} above its start; apart from that it ends where it began, at "
            f"{number(seen.end)} after {number(seen.start)}"
        )
        return Finding(Verdict.DIVERGED, text, numbers | {"above_start": float(above)}, advice)
    return None


def _jumping(
    steps: np.ndarray, y: np.ndarray, jumps: list[Spike], seen: Shape, told: History, knobs: Knobs
) -> list[Finding]:
    if not jumps:
        return []
    tallest = max(jumps, key=lambda s: s.height)
    # A leap in the first steps, which all came back from, is a matter of warming up.
    early = max(3, len(y) // 20)
    grave = max(s.height / (LEAP if s.index <= early else TALL) for s in jumps) / max(abs(seen.fall), 1e-300)
    numbers = {
        "count": len(jumps), "height": tallest.height, "height_over_fall": tallest.height / max(abs(seen.fall), 1e-300),
        "step": float(steps[tallest.index]), "width": tallest.width,
        "gravity": grave,
    }  # fmt: skip
    text = (
        f"{len(jumps)} of {len(y)} steps jump; the tallest, at step {numbers['step']:.0f}, by {number(tallest.height)} "
        f"({number(numbers['height_over_fall'], 2)} of the whole fall) "
        f"for {tallest.width} step{'s' * (tallest.width > 1)}"
    )
    advice = "clip the gradients (jaxsgd.clip_by_global_norm) and look at the batches of those steps"
    norms = told.others.get("gradient_norm")
    if norms is not None and len(norms.values) and np.isfinite(norms.values).any():
        usual = float(np.nanmedian(norms.values))
        at = norms.values[np.isin(norms.steps, steps[[s.index for s in jumps]])]
        if usual > 0 and len(at) and np.isfinite(at).any():
            numbers["gradient_norm_over_median"] = float(np.nanmax(at)) / usual
            text += f", where the gradient is {number(numbers['gradient_norm_over_median'])} times its median"
            advice = f"clip the gradients at about {number(2 * usual, 2)}, and look at the batches of those steps"
    if tallest.index < max(3, len(y) // 20):
        advice = "warm up: raise the rate from 0 over the first steps; or " + advice
    if len(jumps) >= 3:
        advice += f"; if the batches are fine try a learning rate 2-3x lower{knobs.rate(0.4)}"
    return [Finding(Verdict.SPIKES, text, numbers, advice)]


def _swinging(seen: Shape, swings: Oscillation | None, knobs: Knobs, epoch: int | None, spacing: int) -> Finding | None:
    share = 0.0 if swings is None else _large(swings, seen)
    if swings is None or not share:
        return None
    period = swings.period * spacing
    numbers = {
        "period": period, "regularity": swings.regularity, "reversal": swings.reversal, "swing": swings.swing,
        "swing_over_fall": share,
    }  # fmt: skip
    text = (
        f"the loss swings by {number(swings.swing)} ({number(share, 2)} of its fall) every {number(period)} "
        f"steps (autocorrelation {swings.regularity:.2f} there, {swings.reversal:.2f} half-way)"
    )
    advice = ("the steps overshoot: " if swings.period < 4 else "the loss oscillates: ") + _calmer(swings.period, knobs)
    if epoch is None and swings.whole:
        advice = f"period {round(period)}: is that your epoch? Then pass steps_per_epoch; if not, {advice}"
    return Finding(Verdict.OSCILLATING, text, numbers, advice)


def _overfitting(told: History, seen: Shape) -> Finding | None:
    held: Series | None = told.validation
    if held is None or len(held.values) < 4:
        return None
    v = smooth(held.values, max(1, len(held.values) // 20))
    low = int(v.argmin())
    end = float(v[-max(1, len(v) // 10) :].mean())
    gained, lost = float(v[0] - v[low]), end - float(v[low])
    if lost <= OVERFIT * max(gained, 0) or lost <= 0 or seen.fall <= 0:
        return None
    after = told.loss.values[told.loss.steps >= held.steps[low]]
    after = after[np.isfinite(after)]
    rough = noise(held.values[-max(8, len(v) // 3) :]) * math.sqrt(2 / max(1, len(v) // 10))
    if lost < SIGNIFICANT * rough or (len(after) > 8 and shape(after).significance < -SIGNIFICANT):
        return None  # noise; or the training loss rises too
    sign = -1.0 if told.validation_name.endswith("accuracy") else 1.0
    name = "accuracy" if sign < 0 else "loss"
    numbers = {
        "best_step": float(held.steps[low]), "best": sign * float(v[low]), "end": sign * end, "lost": lost,
        "lost_share": lost / gained if gained > 0 else math.inf,
    }  # fmt: skip
    text = (
        f"the validation {name} was best at step {held.steps[low]:.0f} ({number(numbers['best'])}) and is "
        f"{number(numbers['end'])} at the end, while the training loss falls"
    )
    advice = f"stop at step {held.steps[low]:.0f} (keep that checkpoint), regularise, or get more data"
    return Finding(Verdict.OVERFITTING, text, numbers, advice)


def _levels(
    steps: np.ndarray, calm: np.ndarray, seen: Shape, best_known: float | None, knobs: Knobs, numbers: dict[str, float]
) -> Finding:
    """One of stuck, plateau, too slow and good."""
    late, error, since = seen.late_share, seen.late_error, f"{steps[seen.level_since]:.0f}"
    level = late <= LEVEL or late < 2 * error < 2 * LEVEL
    # A step down, as of a schedule, may be late and level for long. In noise the level says less.
    surely = seen.points >= 30 and seen.end_error < 0.015 * abs(seen.fall)
    level |= surely and seen.level_since <= 0.75 * seen.points
    risen = seen.end - seen.lowest
    if seen.significance < SIGNIFICANT or (level and seen.fall < seen.noise):
        text = (
            f"{seen.points} steps move the loss by {number(seen.fall)}, its noise from step to step is "
            f"{number(seen.noise)}"
        )
        advice = (
            f"try a rate 10x higher{knobs.rate(10)}; if that does not move it either, look for dead units, "
            "frozen parameters, or a loss that does not depend on them"
        )
        if np.ptp(smooth(calm, 3)) > MOVES * noise(calm):
            advice = (
                "the loss moves and does not stay lower, so the rate is not too low: smooth it over more steps, or "
                "compare rates, lower ones too (jaxsgd.sweep)"
            )
        return Finding(Verdict.STUCK, text, numbers, advice)
    gap = None
    if best_known is not None and seen.start > best_known:
        gap = (seen.end - best_known) / (seen.start - best_known)
        numbers = numbers | {"gap": gap, "best_known": best_known}
    slow = late > LATE and not level
    if gap is not None:
        slow = (gap > GAP and not level) or (slow and gap > 0.05)
    if gap is not None and gap > GAP and level:
        text = f"level from step {since} on at {number(seen.end)}, {gap:.0%} of the way above the best known"
        advice = (
            f"try another learning rate: 3x lower where it is noisy{knobs.rate(1 / 3)}; or start from other weights"
        )
        return Finding(Verdict.PLATEAU, text, numbers, advice)
    if slow:
        text = f"the second half still brings {late:.0%} of the fall (0% when level, 50% for a straight line)"
        factor, reason = (10, "a straight line has no end in sight") if late > 0.35 else (3, "the end is not level yet")
        advice = f"try a rate {factor}x higher{knobs.rate(factor)}, for {reason}{knobs.momentum()}"
        if seen.noise < QUIET * seen.fall:
            advice += (
                f"; a step's noise is {number(seen.noise / seen.fall, 1)} of the fall: a smaller batch buys more steps"
            )
        return Finding(Verdict.TOO_SLOW, text, numbers, advice)
    if level and late < -LEVEL and risen > 0.1 * seen.fall:
        text = (
            f"fell by {number(seen.fall)}, to {number(seen.end)}; it was at {number(seen.lowest)} before and has risen "
            f"by {number(risen)} since"
        )
        advice = f"keep the weights of the lowest loss, and try a learning rate 3x lower{knobs.rate(1 / 3)} or a decay"
        return Finding(Verdict.GOOD, text, numbers, advice)
    if level:
        text = f"fell by {number(seen.fall)} and is level from step {since} on at {number(seen.end)}: converged"
        advice = "more steps gain nothing; a decaying rate lowers the noise at the end"
        if seen.noise > 0.1 * seen.fall:
            advice = "average or decay the rate at the end: the noise of a step is a tenth of the fall or more"
        if best_known is None:
            advice += "; if a lower loss is possible, pass it as best_known"
        return Finding(Verdict.GOOD, text, numbers, advice)
    text = f"fell by {number(seen.fall)}, {late:.0%} in the second half: fast first, then slower"
    more = "keep it; more steps still help a little" if late > 0.05 else "keep it"
    return Finding(Verdict.GOOD, text, numbers, more)
