"""Pictures of `jaxsgd.probe` and `jaxsgd.range_test`."""

from __future__ import annotations

from typing import Any

import numpy as np

from jaxsgd.plot.style import COLORS, INK, Figure, blank, labelled, log_axis, loss_axis, off_scale, styled
from jaxsgd.report import number
from jaxsgd.tuning.probe_result import Probe
from jaxsgd.tuning.range_test import RangeTest

__all__ = ["probe", "range_test"]

VERDICTS = {
    "good": COLORS[2],
    "too low": COLORS[5],
    "too high": COLORS[4],
    "oscillating": COLORS[3],
    "diverged": COLORS[1],
}
"""The colour of each verdict of a probe."""


def probe(result: Probe) -> Figure:
    """The loss at the end of each run of a `jaxsgd.probe`, by verdict, with the suggestion and its range.

    Runs of one length are connected; the longer they are, the larger and darker their points. The best of the longest
    runs has a ring. Arrows at the upper edge are losses off the scale, or runs that diverged. Beside it is the range
    test, if there was one.
    """
    figure = blank(7.2 if result.range_test is None else 10.4, 4.4)
    panels = figure.subplots(1, 1 if result.range_test is None else 2, squeeze=False)[0]
    ax = styled(panels[0])
    if result.rates:
        _runs(ax, result)
    if result.learning_rate is not None and result.range is not None:
        label = f"range {number(result.range[0])} to {number(result.range[1])}"
        ax.axvspan(*result.range, color=COLORS[2], alpha=0.12, linewidth=0, label=label)
        suggested = f"suggested {number(result.learning_rate)}"
        ax.axvline(result.learning_rate, color=COLORS[2], linewidth=1.6, label=suggested)
        title = f"Probe: {number(result.learning_rate)}, confidence {result.confidence}"
    else:
        title = "Probe: no good rate found"
    if not result.rates and result.learning_rate is not None:
        title = f"Probe: leave the rate at {number(result.learning_rate)}"
    log_axis(ax.xaxis)
    labelled(ax, title, "learning rate", "loss at the end of the short run")
    ax.legend(frameon=False, fontsize=8)
    if result.range_test is not None:
        _range_test(styled(panels[1]), result.range_test)
    return figure


def _runs(ax: Any, result: Probe) -> None:
    """The points of all runs, a line for each length."""
    start = max(rate.start for rate in result.rates)
    top = start + 0.3 * abs(start)
    shown = [rate for rate in result.rates if np.isfinite(rate.end) and rate.end <= top]
    above = [rate for rate in result.rates if rate not in shown]
    for steps in sorted({rate.steps for rate in shown}):
        line = [rate for rate in shown if rate.steps == steps]
        x, y = [rate.learning_rate for rate in line], [rate.end for rate in line]
        weight = steps / max(rate.steps for rate in shown)
        ax.plot(x, y, "-", color=INK, linewidth=1.2, alpha=0.2 + 0.5 * weight, zorder=1)
        ax.annotate(f"{steps} steps", (x[-1], y[-1]), (6, 3), textcoords="offset points", fontsize=7, color="#6b7280")
    longest = max((rate.steps for rate in shown), default=1)
    for verdict, color in VERDICTS.items():
        points = [rate for rate in shown if rate.verdict == verdict]
        if points:
            sizes = [20 + 40 * rate.steps / longest for rate in points]
            x, y = [rate.learning_rate for rate in points], [rate.end for rate in points]
            ax.scatter(x, y, s=sizes, color=color, label=verdict, zorder=3)
    for verdict in dict.fromkeys(rate.verdict for rate in above):
        here = [rate.learning_rate for rate in above if rate.verdict == verdict]
        off_scale(ax, here, f"{verdict}, off the scale" if verdict != "diverged" else "diverged", VERDICTS[verdict])
    best = [rate for rate in shown if rate.learning_rate == result.best]
    if best:
        point = best[0]
        label = f"lowest in {point.steps} steps"
        ax.plot(point.learning_rate, point.end, "o", mfc="none", mec=INK, markersize=13, label=label, zorder=4)
    ax.axhline(start, color=INK, linewidth=0.8, linestyle=":", label="at the start")
    loss_axis(ax, [rate.end for rate in shown])


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
            ax.axvline(rate, color=color, linewidth=1.4, label=f"{name} {number(rate)}")
    log_axis(ax.xaxis)
    low, high = float(np.min(result.smoothed)), float(result.smoothed[0])
    room = max(high - low, 1e-12)
    ax.set_ylim(low - 0.3 * room, high + 0.8 * room)
    labelled(ax, f"Range test, {result.steps} steps", "learning rate", "loss")
    ax.legend(frameon=False, fontsize=8)
