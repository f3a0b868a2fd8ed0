"""Pictures of `jaxsgd.probe` and `jaxsgd.range_test`."""

from __future__ import annotations

from typing import Any

import numpy as np

from jaxsgd.plot.style import COLORS, INK, Figure, blank, labelled, log_axis, loss_axis, styled
from jaxsgd.tuning.probe import Probe
from jaxsgd.tuning.range_test import RangeTest

__all__ = ["probe", "range_test"]

VERDICTS = {
    "good": COLORS[2],
    "too slow": COLORS[5],
    "plateau": COLORS[4],
    "oscillating": COLORS[3],
    "diverged": COLORS[1],
}
"""The colour of each verdict of a probe."""


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
    log_axis(ax.xaxis)
    loss_axis(ax, ends[finite])
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
    log_axis(ax.xaxis)
    low, high = float(np.min(result.smoothed)), float(result.smoothed[0])
    room = max(high - low, 1e-12)
    ax.set_ylim(low - 0.3 * room, high + 0.8 * room)
    labelled(ax, f"Range test, {result.steps} steps", "learning rate", "loss")
    ax.legend(frameon=False, fontsize=8)
