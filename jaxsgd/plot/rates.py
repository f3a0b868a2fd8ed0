"""What the tools for the learning rate found, drawn."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from jaxsgd.curvature.sharpness import Sharpness
from jaxsgd.diagnosis.diagnose import Diagnosis
from jaxsgd.ensemble.sweep import Sweep
from jaxsgd.plot.style import COLORS, INK, Figure, averaged, blank, labelled, shades, styled
from jaxsgd.tuning.noise import NoiseScale
from jaxsgd.tuning.pick import Pick
from jaxsgd.tuning.probe import Probe
from jaxsgd.tuning.range_test import RangeTest

__all__ = ["diagnosis", "noise_scale", "pick", "probe", "range_test", "sharpness", "sweep"]

VERDICTS = {
    "good": COLORS[2],
    "too slow": COLORS[5],
    "plateau": COLORS[4],
    "oscillating": COLORS[3],
    "diverged": COLORS[1],
}
"""The colour of each verdict of a probe."""


def sweep(result: Sweep, by: str | None = None) -> Figure:
    """Loss curves of all members beside the final losses: the mean and its spread over the others, crosses where some
    diverged.

    Args:
      result: of `jaxsgd.sweep`.
      by: the name on the axis; by default the first that was swept.

    Raises:
      ValueError: ``by`` was not swept.
    """
    by = next(iter(result.values)) if by is None else by
    if by not in result.values:
        raise ValueError(f"by={by!r}: swept were {', '.join(result.values)}")
    figure = blank(9.6, 4.2)
    left, right = (styled(ax) for ax in figure.subplots(1, 2))
    x = result.values[by]
    values = np.unique(x)
    colors = dict(zip(values.tolist(), shades(len(values)), strict=True))
    for value, losses in zip(x.tolist(), result.losses, strict=True):
        steps = np.arange(1, len(losses) + 1)
        if len(losses) > 40:
            left.plot(steps, losses, color=colors[value], linewidth=0.6, alpha=0.15)
        left.plot(steps, averaged(losses, 0.9 if len(losses) > 40 else 0.0), color=colors[value], linewidth=1.2)
    _loss_axis(left, result.losses)
    labelled(left, "Loss of each member", "step", "loss")
    for i, value in enumerate(values):  # a legend of a few will do
        if i in {0, len(values) // 2, len(values) - 1}:
            left.plot([], [], color=colors[value.item()], label=f"{by} {value:.2g}")
    left.legend(frameon=False, fontsize=8)
    means, spreads, kept = [], [], []
    for value in values:
        final = result.final[x == value]
        fine = final[np.isfinite(final)]
        if len(fine):
            kept.append(value)
            means.append(fine.mean())
            spreads.append(fine.std(ddof=1) if len(fine) > 1 else 0.0)
    right.errorbar(kept, means, yerr=spreads, fmt="-o", color=COLORS[0], markersize=4, linewidth=1.4, capsize=2)
    lost = np.unique(x[result.diverged])
    if len(lost):
        top = max(means, default=1.0)
        right.plot(lost, np.full(len(lost), top), "x", color=COLORS[1], markersize=6, label="diverged")
        right.legend(frameon=False, fontsize=8)
    if np.all(values > 0) and len(values) > 1:
        right.set_xscale("log")
    _loss_axis(right, np.asarray(means))
    labelled(right, f"Mean of the last {result.window} steps", by.replace("_", " "), "loss")
    return figure


def probe(result: Probe) -> Figure:
    """Where each rate of a `jaxsgd.probe` ended, by verdict, with the suggestion and its range; beside it the range
    test, where there was one."""
    figure = blank(7.2 if result.range_test is None else 10.4, 4.4)
    panels = figure.subplots(1, 1 if result.range_test is None else 2, squeeze=False)[0]
    ax = styled(panels[0])
    ends = np.asarray([rate.end for rate in result.rates])
    finite = np.isfinite(ends)
    start = max(rate.start for rate in result.rates)
    top = float(max(np.max(ends[finite & (ends <= 2 * abs(start) + start)], initial=start), start))
    for verdict, color in VERDICTS.items():
        index = [i for i, rate in enumerate(result.rates) if rate.verdict == verdict]
        if index:
            heights = np.where(finite[index] & (ends[index] < top), ends[index], top)
            marker = "x" if verdict == "diverged" else "o"
            ax.plot(result.learning_rates[index], heights, marker, color=color, markersize=6, label=verdict)
    ax.axhline(start, color=INK, linewidth=0.8, linestyle=":", label="at the start")
    if result.learning_rate is not None and result.range is not None:
        ax.axvspan(*result.range, color=COLORS[2], alpha=0.12, linewidth=0)
        ax.axvline(result.learning_rate, color=COLORS[2], linewidth=1.6, label=f"suggested {result.learning_rate:.2g}")
        title = f"Probe: {result.learning_rate:.2g}, confidence {result.confidence}"
    else:
        title = "Probe: no good rate found"
    ax.set_xscale("log")
    _loss_axis(ax, ends[finite])
    labelled(ax, title, "learning rate", "loss at the end of the short training")
    ax.legend(frameon=False, fontsize=8)
    if result.range_test is not None:
        _range_test(styled(panels[1]), result.range_test)
    return figure


def range_test(result: RangeTest) -> Figure:
    """The loss of a `jaxsgd.range_test` over its rising rate, with the two classical suggestions."""
    figure = blank(7.2, 4.2)
    _range_test(styled(figure.subplots()), result)
    return figure


def _range_test(ax: Any, result: RangeTest) -> None:
    ax.plot(result.rates, result.losses, color=COLORS[0], alpha=0.3, linewidth=0.9, label="loss")
    ax.plot(result.rates, result.smoothed, color=COLORS[0], linewidth=1.6, label="smoothed")
    for name, rate, color in (("steepest", result.steepest, COLORS[1]), ("valley", result.valley, COLORS[2])):
        if rate is not None:
            ax.axvline(rate, color=color, linewidth=1.4, label=f"{name} {rate:.2g}")
    ax.set_xscale("log")
    low, high = float(np.min(result.smoothed)), float(result.smoothed[0])
    room = max(high - low, 1e-12)
    ax.set_ylim(low - 0.3 * room, high + 0.8 * room)
    labelled(ax, f"Range test, {result.steps} steps", "learning rate", "loss")
    ax.legend(frameon=False, fontsize=8)


def sharpness(result: Sharpness) -> Figure:
    """The outermost eigenvalues of a `jaxsgd.sharpness`, and the learning rate against the largest stable one."""
    figure = blank(9.6, 3.6)
    left, right = (styled(ax) for ax in figure.subplots(1, 2))
    rows = [("Hessian", result.hessian)]
    if result.preconditioned is not None:
        rows.append((f"as {result.rule} sees it", result.preconditioned))
    for i, (_, part) in enumerate(rows):
        values = [part.smallest, *part.eigenvalues]
        left.plot(values, np.full(len(values), i), "|", color=COLORS[i], markersize=22, markeredgewidth=2)
    left.axvline(0, color=INK, linewidth=0.8, linestyle=":")
    left.set_yticks(range(len(rows)), [name for name, _ in rows])
    left.set_ylim(len(rows) - 0.5, -0.5)
    labelled(left, "Outermost eigenvalues", "eigenvalue (symmetric logarithm)", "")
    reach = max(abs(x) for _, part in rows for x in (part.smallest, *part.eigenvalues))
    left.set_xscale("symlog", linthresh=max(1e-2 * reach, 1e-12))
    named = {name: value for name, value in result.thresholds.items() if np.isfinite(value)}
    bars = {f"stable up to, {name}": value for name, value in named.items()}
    if result.learning_rate is not None:
        bars["learning rate"] = result.learning_rate
    for i, (name, value) in enumerate(bars.items()):
        beyond = name == "learning rate" and value > result.threshold
        right.barh(i, value, height=0.5, color=COLORS[1] if beyond else COLORS[2 if name == "learning rate" else 0])
        right.text(value, i, f" {value:.3g}", va="center", fontsize=8, color=INK)
    right.set_yticks(range(len(bars)), list(bars))
    right.invert_yaxis()
    right.set_xlim(0, 1.25 * max(bars.values(), default=1.0))
    labelled(right, "Learning rates", "learning rate", "")
    return figure


def noise_scale(result: NoiseScale) -> Figure:
    """Steps and examples over the batch size, as multiples of the fewest, with the critical batch size.

    Raises:
      ValueError: the noise scale is not known, and there is nothing to draw.
    """
    if not result.known:
        raise ValueError("result: the noise scale could not be told; measure it on more batches")
    figure = blank(7.2, 4.2)
    ax = styled(figure.subplots())
    sizes = np.geomspace(max(1.0, result.critical_batch_size / 100), max(10.0, result.critical_batch_size * 100), 200)
    ax.plot(sizes, [result.steps(size) for size in sizes], color=COLORS[0], linewidth=1.6, label="steps")
    ax.plot(sizes, [result.examples(size) for size in sizes], color=COLORS[4], linewidth=1.6, label="examples")
    if result.low < result.high:
        ax.axvspan(result.low, result.high, color=COLORS[2], alpha=0.12, linewidth=0, label="95% of the noise scale")
    ax.axvline(result.scale, color=COLORS[2], linewidth=1.4)
    ax.axvline(result.batch_size, color=INK, linewidth=1.0, linestyle=":", label=f"batch of {result.batch_size}")
    ax.set_xscale("log")
    ax.set_yscale("log")
    title = f"Noise scale {result.scale:.3g}: cost of getting equally far"
    labelled(ax, title, "batch size", "multiple of the fewest")
    ax.legend(frameon=False, fontsize=8)
    return figure


def diagnosis(result: Diagnosis, losses: Sequence[float]) -> Figure:
    """A loss curve with what `jaxsgd.diagnose` says of it.

    Args:
      result: the diagnosis.
      losses: what it was made from, one a step.
    """
    figure = blank(7.2, 4.6)
    ax = styled(figure.subplots())
    y = np.asarray(losses, float)
    ax.plot(np.arange(1, len(y) + 1), y, color=COLORS[0], linewidth=1.1)
    _loss_axis(ax, y)
    labelled(ax, f"Verdict: {result.verdict}", "step", "loss")
    said = "\n".join(f"{finding.verdict}: {finding.text}" for finding in result.findings[:3])
    figure.supxlabel(f"{said}\n\u2192 {result.advice}", fontsize=8, color=INK, x=0.02, ha="left", wrap=True)
    return figure


def pick(result: Pick) -> Figure:
    """The final loss of each candidate of a `jaxsgd.pick`: every seed, the mean and its standard error."""
    figure = blank(7.2, 1.6 + 0.6 * len(result.entries))
    ax = styled(figure.subplots())
    for i, entry in enumerate(result.entries):
        fine = entry.scores[np.isfinite(entry.scores)]
        ax.plot(fine, np.full(len(fine), i), "o", color=COLORS[i % len(COLORS)], alpha=0.45, markersize=6)
        if np.isfinite(entry.mean):
            error = entry.standard_error if np.isfinite(entry.standard_error) else 0.0
            ax.errorbar(entry.mean, i, xerr=error, fmt="|", color=INK, markersize=16, capsize=4, linewidth=1.4)
    ax.set_yticks(range(len(result.entries)), [f"{e.name}, {e.learning_rate:.2g}" for e in result.entries])
    ax.set_ylim(len(result.entries) - 0.5, -0.5)
    title = f"Winner: {result.winner}" if result.winner else f"No winner; take {result.choice}"
    labelled(ax, title, f"{result.score}: every seed, mean and standard error", "")
    return figure


def _loss_axis(ax: Any, losses: np.ndarray) -> None:
    """A logarithmic axis where all losses are above 0 and span more than a factor of three."""
    fine = losses[np.isfinite(losses)]
    if len(fine) and fine.min() > 0 and fine.max() > 3 * fine.min():
        ax.set_yscale("log")
