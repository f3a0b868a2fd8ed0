"""What a loss curve shows, in words, with the numbers behind them."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from jaxsgd.diagnosis.history import History, Series, read
from jaxsgd.diagnosis.layers import examine
from jaxsgd.diagnosis.loss_curve import Oscillation, Shape, Spike, oscillation, shape, smooth, spikes, without

__all__ = ["VERDICTS", "Diagnosis", "Finding", "diagnose"]

VERDICTS = {
    "diverged": "the loss is not finite, or has gone back up to where it began and beyond",
    "stuck": "the loss has not moved by more than its noise",
    "spikes": "the loss jumps for a few steps and comes back",
    "oscillating": "the loss swings with a period around its way down",
    "overfitting": "the validation loss rises while the training loss falls",
    "plateau": "the loss is level, well above what is known to be possible",
    "too slow": "the loss falls steadily, and the end is far from level",
    "good": "the loss falls fast and then slower, or has become level",
    "too short": "too few points to say anything else",
}
"""Every main verdict. Findings may also be of single layers: those of `jaxsgd.diagnosis.layers.VERDICTS`."""

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
HUGE = 1e100  # what counts as not finite: its square is out of range


class Finding(NamedTuple):
    """One thing that the curve shows.

    Attributes:
      verdict: one of `VERDICTS`, or of a layer's.
      text: it in a sentence.
      numbers: what it is read from, never empty.
      advice: the step to take.
    """

    verdict: str
    text: str
    numbers: dict[str, float]
    advice: str


@dataclass(frozen=True)
class Diagnosis:
    """What `diagnose` found.

    Attributes:
      verdict: the main one, of `VERDICTS`.
      findings: all of them, the main one first.
      numbers: of the curve: ``points``, ``start``, ``end``, ``lowest``, ``fall``, ``noise`` (of a single step),
        ``significance`` (of the fall, in standard errors), ``late_share`` (the second half's share of the fall),
        ``level_since`` (a step).
      notes: what was done to the history to read it.
    """

    verdict: str
    findings: tuple[Finding, ...]
    numbers: dict[str, float]
    notes: tuple[str, ...] = ()

    @property
    def advice(self) -> str:
        """The step to take for the main verdict."""
        return self.findings[0].advice

    def __str__(self) -> str:
        lines = []
        for finding in self.findings:
            lines += [f"{finding.verdict}: {finding.text}", f"  -> {finding.advice}"]
        numbers = ", ".join(f"{name.replace('_', ' ')} {value:.4g}" for name, value in self.numbers.items())
        return "\n".join([*lines, f"numbers: {numbers}", *self.notes])

    __repr__ = __str__


def diagnose(
    history: Any,
    *,
    validation: Any = None,
    learning_rate: float | None = None,
    best_known: float | None = None,
    steps_per_epoch: int | None = None,
    loss: str = "loss",
) -> Diagnosis:
    """Say what a training's history shows: ``print(jaxsgd.diagnose(recorder.records))``.

    The verdicts rest on shares of the curve's own fall and on its noise, so that a constant added to the loss, or a
    factor, changes none. From losses alone a finished training cannot be told from one that is caught above the best
    loss: ``best_known`` or the measurements of layers can tell them apart.

    Args:
      history: losses, one a step; or records, such as `jaxsgd.Recorder.records`, dicts with ``"loss"`` and perhaps
        ``"step"``, ``"gradient_norm"``, ``"learning_rate"``, ``"validation_loss"`` or ``"validation_accuracy"`` (in
        some of them) and what `jaxsgd.monitor_report` gives; or a dict of arrays of such names.
      validation: validation losses, evenly spaced up to the last step, or ``(steps, losses)``; instead of the
        history's own.
      learning_rate: named in the advice; by default the history's largest.
      best_known: the loss that another run is known to reach, or a lower bound of it (0 for a model that can fit all
        its examples).
      steps_per_epoch: where the batches come in the same order each epoch: that rhythm is then no oscillation.
      loss: what the loss is called in the history.

    Returns:
      A `Diagnosis`, whose ``verdict`` is one of `VERDICTS`.

    Raises:
      TypeError: ``history`` is none of these.
      ValueError: it is empty or has no loss; arrays disagree on their length; ``best_known`` is not finite.
    """
    if best_known is not None and not math.isfinite(best_known):
        raise ValueError(f"best_known={best_known}: a finite loss is needed")
    if steps_per_epoch is not None and steps_per_epoch < 1:
        raise ValueError(f"steps_per_epoch={steps_per_epoch}: at least 1 is needed")
    told = read(history, validation, loss)
    rate = learning_rate
    if rate is None and "learning_rate" in told.others:
        rate = float(np.nanmax(told.others["learning_rate"].values))
    found, numbers = _of_curve(told, rate, best_known, steps_per_epoch)
    layers = [Finding(*one) for one in examine({name: s.values for name, s in told.others.items()})]
    dead = next((f for f in layers if f.verdict == "dead layers"), None)
    level = numbers.get("late_share", 1.0) <= LEVEL and found[0].verdict not in ("diverged", "stuck", "oscillating")
    if dead is not None and level:
        text = f"the loss is level from step {numbers['level_since']:.0f} on, and {dead.text}"
        rest = [f for f in found if f.verdict not in ("good", "plateau")]
        found = [Finding("stuck", text, numbers | dead.numbers, dead.advice), *rest]
    return Diagnosis(found[0].verdict, (*found, *layers), numbers, told.notes)


def _of_curve(
    told: History, rate: float | None, best_known: float | None, epoch: int | None
) -> tuple[list[Finding], dict[str, float]]:
    steps, raw = told.loss
    finite = np.abs(raw) < HUGE
    if not finite.any() or not finite[-1] or finite.sum() < 0.5 * len(raw):
        return [_not_finite(steps, raw, finite, rate)], {"points": len(raw), "finite": int(finite.sum())}
    steps, y = steps[finite], raw[finite].astype(np.float64)
    if len(y) < SHORTEST:
        numbers = {"points": len(y), "start": float(y[0]), "end": float(y[-1]), "fall": float(y[0] - y[-1])}
        text = f"{len(y)} points; at least {SHORTEST} are needed"
        return [Finding("too short", text, numbers, "record more steps")], numbers
    rhythm = None
    if epoch is not None and epoch > 1 and len(y) >= 3 * epoch:
        y, rhythm = _without_rhythm(y, epoch)
    jumps = spikes(y)
    calm = without(y, jumps)
    seen = shape(calm)
    numbers = {
        "points": seen.points, "start": seen.start, "end": seen.end, "lowest": seen.lowest, "fall": seen.fall,
        "noise": seen.noise, "significance": seen.significance, "late_share": seen.late_share,
        "level_since": float(steps[seen.level_since]),
    }  # fmt: skip
    swings = oscillation(y)
    if jumps and (swings is None or swings.regularity < 0.5):  # of a strong rhythm the spikes are the crests
        swings = oscillation(calm)
    out = [
        _diverged(y, seen, rate), *_jumping(steps, y, jumps, seen, told, rate), _swinging(seen, swings, jumps, rate),
        _overfitting(told, seen), _levels(steps, seen, best_known, rate, numbers),
    ]  # fmt: skip
    found = [f for f in out if f is not None]
    order = list(VERDICTS)
    if any(f.verdict in ("diverged", "stuck") for f in found):
        found = [f for f in found if f.verdict not in ("oscillating",) or f.numbers["regularity"] > 0.6]
    found.sort(key=lambda f: order.index(f.verdict) + len(order) * (f.numbers.get("gravity", 1.0) < 1))
    if found[0].verdict != "good":  # these say how it falls: only where nothing worse is the matter
        calmly = {"good"} | ({"stuck", "too slow", "plateau"} if found[0].verdict == "diverged" else set())
        found = [f for f in found if f.verdict not in calmly]
    if rhythm:
        text = f"{rhythm:.0%} of the noise repeats every {epoch} steps, as the batches do"
        found.append(
            Finding("epoch pattern", text, {"period": float(epoch or 0), "share": rhythm}, "shuffle each epoch")
        )
    if not finite.all():
        lost = int((~finite).sum())
        text = f"the loss was not finite in {lost} of {len(raw)} steps and came back"
        found.append(Finding("not finite", text, {"steps": lost}, "find those batches; jaxsgd.guard skips such steps"))
    return found, numbers


def _per(rate: float | None, factor: float) -> str:
    return "" if not rate else f" (to {rate * factor:.2g})"


def _not_finite(steps: np.ndarray, raw: np.ndarray, finite: np.ndarray, rate: float | None) -> Finding:
    bad = np.flatnonzero(~finite)
    first, start = float(steps[bad[0]]), float(raw[0])
    numbers = {"first_not_finite": first, "not_finite": len(bad), "points": len(raw), "start": start}
    if bad[0] == 0:
        text = f"the loss is not finite from the first step on ({len(bad)} of {len(raw)} steps)"
        return Finding("diverged", text, numbers, "look at the data and the loss itself: no rate is at fault yet")
    top = float(np.max(raw[finite]))
    numbers["highest"] = top
    text = f"the loss is not finite from step {first:.0f} on; it began at {start:.4g} and rose to {top:.4g}"
    return Finding("diverged", text, numbers, f"lower the learning rate 10x{_per(rate, 0.1)}, or warm up and clip")


def _diverged(raw: np.ndarray, seen: Shape, rate: float | None) -> Finding | None:
    rise, error = seen.end - seen.start, math.hypot(seen.start_error, seen.end_error)
    lost, gained = seen.end - seen.lowest, seen.start - seen.lowest
    numbers = {"start": seen.start, "end": seen.end, "lowest": seen.lowest, "highest": seen.highest, "rise": rise}
    advice = f"lower the learning rate 10x{_per(rate, 0.1)}; warm up and clip if it began well"
    if rise > 0 and seen.significance < -SIGNIFICANT:
        text = f"the loss ends {rise:.4g} above where it began ({seen.start:.4g}, at the end {seen.end:.4g})"
        return Finding("diverged", text, numbers | {"significance": seen.significance}, advice)
    surely = SIGNIFICANT * (error + seen.noise)
    if lost > surely and gained > surely and lost > 0.5 * gained:
        text = (
            f"the loss fell from {seen.start:.4g} to {seen.lowest:.4g} and has since lost {lost / gained:.0%} of that"
        )
        return Finding("diverged", text, numbers | {"lost_share": lost / gained}, advice)
    early = raw[: max(4, len(raw) // 10)].max()
    above = max(seen.highest, float(early)) - seen.start
    if above > surely and abs(rise) < max(surely, 0.01 * above) and abs(rise) < 0.1 * above:
        text = (
            f"the loss leaped by {above:.4g} above its start; beside that it ends where it began, at {seen.end:.4g} "
            f"after {seen.start:.4g}"
        )
        return Finding("diverged", text, numbers | {"above_start": float(above)}, advice)
    return None


def _jumping(
    steps: np.ndarray, y: np.ndarray, jumps: list[Spike], seen: Shape, told: History, rate: float | None
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
        f"{len(jumps)} of {len(y)} steps jump; the tallest, at step {numbers['step']:.0f}, by {tallest.height:.4g} "
        f"({numbers['height_over_fall']:.2g} of the whole fall) for {tallest.width} steps"
    )
    advice = "clip the gradients (jaxsgd.clip_by_global_norm) and look at the batches of those steps"
    norms = told.others.get("gradient_norm")
    if norms is not None and len(norms.values) and np.isfinite(norms.values).any():
        usual = float(np.nanmedian(norms.values))
        at = norms.values[np.isin(norms.steps, steps[[s.index for s in jumps]])]
        if usual > 0 and len(at) and np.isfinite(at).any():
            numbers["gradient_norm_over_median"] = float(np.nanmax(at)) / usual
            text += f", where the gradient is {numbers['gradient_norm_over_median']:.3g} times its median"
            advice = f"clip the gradients at about {2 * usual:.2g}, and look at the batches of those steps"
    if tallest.index < max(3, len(y) // 20):
        advice = "warm up: raise the rate from 0 over the first steps; or " + advice
    if len(jumps) >= 3:
        advice += f"; if the batches are fine lower the learning rate 2-3x{_per(rate, 0.4)}"
    return [Finding("spikes", text, numbers, advice)]


def _swinging(seen: Shape, swings: Oscillation | None, jumps: list[Spike], rate: float | None) -> Finding | None:
    if swings is None:
        return None
    reference = max(seen.start, seen.highest) - seen.lowest
    share = swings.swing / reference if reference > 0 else math.inf
    if share < SWING:
        return None
    numbers = {
        "period": swings.period, "regularity": swings.regularity, "reversal": swings.reversal, "swing": swings.swing,
        "swing_over_fall": share,
    }  # fmt: skip
    text = (
        f"the loss swings by {swings.swing:.4g} ({share:.2g} of its fall) every {swings.period:.3g} steps "
        f"(autocorrelation {swings.regularity:.2f} there, {swings.reversal:.2f} half-way)"
    )
    if swings.period < 4:
        advice = f"steps overshoot: lower the learning rate 2-4x{_per(rate, 0.33)}"
    else:
        advice = f"it rings: lower the momentum (0.99 to 0.9) or the learning rate 3x{_per(rate, 0.33)}"
    return Finding("oscillating", text, numbers, advice)


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
    rough = shape(held.values).noise * math.sqrt(2 / max(1, len(v) // 10))
    if lost < SIGNIFICANT * rough or (len(after) > 8 and shape(after).significance < -SIGNIFICANT):
        return None  # noise; or the training loss rises too
    sign = -1.0 if told.validation_name.endswith("accuracy") else 1.0
    name = "accuracy" if sign < 0 else "loss"
    numbers = {
        "best_step": float(held.steps[low]), "best": sign * float(v[low]), "end": sign * end, "lost": lost,
        "lost_share": lost / gained if gained > 0 else math.inf,
    }  # fmt: skip
    text = (
        f"the validation {name} was best at step {held.steps[low]:.0f} ({numbers['best']:.4g}) and is "
        f"{numbers['end']:.4g} at the end, while the training loss falls"
    )
    advice = f"stop at step {held.steps[low]:.0f} (keep that checkpoint), regularise, or get more data"
    return Finding("overfitting", text, numbers, advice)


def _levels(
    steps: np.ndarray, seen: Shape, best_known: float | None, rate: float | None, numbers: dict[str, float]
) -> Finding:
    """One of stuck, plateau, too slow and good."""
    late, error, since = seen.late_share, seen.late_error, f"{steps[seen.level_since]:.0f}"
    level = late <= LEVEL or late < 2 * error < 2 * LEVEL
    if seen.significance < SIGNIFICANT or (level and seen.fall < seen.noise):
        text = f"{seen.points} steps move the loss by {seen.fall:.3g}, its noise from step to step is {seen.noise:.3g}"
        advice = (
            f"raise the learning rate 10x{_per(rate, 10)}; if that does not move it either, look for dead units, "
            "frozen parameters, or a loss that does not depend on them"
        )
        return Finding("stuck", text, numbers, advice)
    gap = None
    if best_known is not None and seen.start > best_known:
        gap = (seen.end - best_known) / (seen.start - best_known)
        numbers = numbers | {"gap": gap, "best_known": best_known}
    slow = late > LATE
    if gap is not None:
        slow = (gap > GAP and not level) or (slow and gap > 0.05)
    if gap is not None and gap > GAP and level:
        text = f"level from step {since} on at {seen.end:.4g}, {gap:.0%} of the way above the best known"
        advice = f"change the learning rate: 3x lower where it is noisy{_per(rate, 0.33)}; or start from other weights"
        return Finding("plateau", text, numbers, advice)
    if slow:
        text = f"the second half still brings {late:.0%} of the fall (0% when level, 50% for a straight line)"
        factor = 10 if late > 0.35 else 3
        advice = f"raise the learning rate 2-10x, {factor}x first{_per(rate, factor)}; or add momentum"
        if seen.noise < QUIET * seen.fall:
            advice += f"; a step's noise is {seen.noise / seen.fall:.1g} of the fall: a smaller batch buys more steps"
        return Finding("too slow", text, numbers, advice)
    if level:
        text = f"fell by {seen.fall:.4g} and is level from step {since} on at {seen.end:.4g}: converged"
        advice = "nothing to gain by more steps; a decaying rate lowers the noise at the end"
        if seen.noise > 0.1 * seen.fall:
            advice = "average or decay the rate at the end: the noise of a step is a tenth of the fall or more"
        if best_known is None:
            advice += "; if a lower loss is known to be possible, say so with best_known"
        return Finding("good", text, numbers, advice)
    text = f"fell by {seen.fall:.4g}, the second half brings {late:.0%} of it: fast first, then slower"
    return Finding("good", text, numbers, "keep it; more steps still help a little" if late > 0.05 else "keep it")


def _without_rhythm(y: np.ndarray, epoch: int) -> tuple[np.ndarray, float | None]:
    """The curve without what repeats each epoch, and which share of its noise that was, where it is significant."""
    weights = np.ones(epoch) if epoch % 2 else np.array([0.5, *np.ones(epoch - 1), 0.5])
    half = len(weights) // 2
    rest = y[half : len(y) - half] - np.convolve(y, weights / epoch, "valid")
    phase = np.arange(len(y)) % epoch
    pattern = np.array([np.median(rest[phase[half : half + len(rest)] == i]) for i in range(epoch)])
    pattern = pattern - pattern.mean()
    repeated = pattern[phase]
    shown = repeated[half : half + len(rest)]
    before, after = float(np.median(np.abs(rest))), float(np.median(np.abs(rest - shown)))
    if before == 0 or after > 0.7 * before:
        return y, None
    return y - repeated, 1 - (after / before) ** 2
