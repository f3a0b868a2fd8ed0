"""Pictures of sweeps, curvature, gradient noise, loss curves and races."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Sequence
from typing import Any

import numpy as np

from jaxsgd.curvature.sharpness import Sharpness
from jaxsgd.diagnosis.diagnose import Diagnosis
from jaxsgd.diagnosis.loss_curve import running_median, smooth
from jaxsgd.ensemble.sweep_result import Sweep
from jaxsgd.plot.style import COLORS, INK, Figure, blank, labelled, log_axis, loss_axis, off_scale, shades, styled
from jaxsgd.report import number
from jaxsgd.tuning.pick import Pick
from jaxsgd.tuning.scaling import NoiseScale

__all__ = ["diagnosis", "noise_scale", "pick", "sharpness", "sweep"]

ABOVE = 3.0
"""The curves of a sweep are cut so far above the largest first loss, in multiples of what the best run gained."""


def sweep(result: Sweep, by: str | None = None) -> Figure:
    """Loss curves of all runs, the best on top, beside the final losses: the mean and its spread over the other values.

    Curves and means far above the start are cut, and marked at the upper edge.

    Args:
      result: of `jaxsgd.sweep`.
      by: the name on the axis. Default: the first that was swept.

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
    start = float(np.nanmax(result.losses[:, 0])) if np.isfinite(result.losses[:, 0]).any() else 1.0
    final = result.final[np.isfinite(result.final)]
    low = float(min(final.min(initial=start), start))
    top = start + ABOVE * max(start - low, 0.1 * abs(start), 1e-12) if low < start else float(final.max(initial=start))
    drawn = np.concatenate([[start], *_curves(left, result, x, colors, top)])
    loss_axis(left, np.clip(drawn, None, top))
    _bounded(left, low, top, drawn)
    labelled(left, "Loss of each run", "step", "loss")
    for i, value in enumerate(values):  # a legend of a few will do
        if i in {0, len(values) // 2, len(values) - 1}:
            left.plot([], [], color=colors[value.item()], label=f"{by} {number(value)}")
    left.legend(frameon=False, fontsize=8)
    _finals(right, result, x, top)
    if np.all(values > 0) and len(values) > 1:
        right.set_xlim(values.min() / 1.5, values.max() * 1.5)
        log_axis(right.xaxis)
    labelled(right, f"Mean of the last {result.window} steps", by.replace("_", " "), "loss")
    return figure


def _curves(ax: Any, result: Sweep, x: np.ndarray, colors: dict[float, Any], top: float) -> list[np.ndarray]:
    """The running medians, drawn the worst first; an arrow where one leaves the scale or its run diverged."""
    left_at, curves = [], []
    for i in np.argsort(-np.nan_to_num(result.final, posinf=np.inf), kind="stable"):
        losses = result.losses[i]
        losses = losses[np.isfinite(losses)]
        if not len(losses):
            continue
        steps, color = np.arange(1, len(losses) + 1), colors[x[i].item()]
        if len(losses) > 40:
            ax.plot(steps, losses, color=color, linewidth=0.6, alpha=0.15)
        curves.append(running_median(losses, len(losses) // 40) if len(losses) > 40 else losses)  # spikes stay faint
        ax.plot(steps, curves[-1], color=color, linewidth=1.2)
        if (losses > top).any() or result.diverged[i]:
            left_at.append(int(np.argmax(losses > top)) + 1 if (losses > top).any() else len(losses))
    if left_at:
        off_scale(ax, left_at, "diverged, or off the scale", COLORS[1])
    return curves


def _finals(ax: Any, result: Sweep, x: np.ndarray, top: float) -> None:
    kept, means, spreads, above = [], [], [], []
    for value in np.unique(x):
        fine = result.final[x == value]
        fine = fine[np.isfinite(fine)]
        if len(fine) and fine.mean() > top:
            above.append(value)
        elif len(fine):
            kept.append(value)
            means.append(fine.mean())
            spreads.append(fine.std(ddof=1) if len(fine) > 1 else 0.0)
    ax.errorbar(kept, means, yerr=spreads, fmt="-o", color=COLORS[0], markersize=4, linewidth=1.4, capsize=2)
    loss_axis(ax, means)
    lost = np.unique(x[result.diverged])
    if len(above):
        off_scale(ax, above, "off the scale", COLORS[4])
    if len(lost):
        off_scale(ax, lost, "diverged", COLORS[1])
    if len(above) or len(lost):
        ax.legend(frameon=False, fontsize=8)


def _bounded(ax: Any, low: float, top: float, losses: np.ndarray) -> None:
    """The limits of the loss, from the lowest shown up to ``top``."""
    fine = losses[np.isfinite(losses)]
    low, high = float(min(fine.min(), low)), min(top, float(fine.max()))
    if ax.get_yscale() == "log":
        ax.set_ylim(low / 1.15, high * 1.15)
        log_axis(ax.yaxis)
    else:
        room = 0.05 * max(high - low, 1e-12)
        ax.set_ylim(low - room, high + room)


def sharpness(result: Sharpness) -> Figure:
    """The outermost eigenvalues of a `jaxsgd.sharpness`, and the learning rate against the largest stable one."""
    figure = blank(9.6, 3.6)
    left, right = (styled(ax) for ax in figure.subplots(1, 2))
    rows = [("Hessian", result.hessian)]
    if result.preconditioned is not None and result.preconditioner is not None:
        rows.append((f"preconditioned\nby {result.rule}", result.preconditioned))
    for i, (_, part) in enumerate(rows):
        values = [part.smallest, *part.eigenvalues]
        left.plot(values, np.full(len(values), i), "|", color=COLORS[i], markersize=20, markeredgewidth=2)
        for value, side in ((part.smallest, "left"), (part.largest, "right")):
            left.annotate(
                f"{number(value)}", (value, i), (0, 16), textcoords="offset points", ha=side, fontsize=8, color=INK
            )
    left.axvline(0, color=INK, linewidth=0.8, linestyle=":")
    left.set_yticks(range(len(rows)), [name for name, _ in rows])
    left.set_ylim(len(rows) - 0.4, -0.6)
    _both_signs(left, [x for _, part in rows for x in (part.smallest, *part.eigenvalues)])
    labelled(left, "Outermost eigenvalues", "eigenvalue (symmetric logarithm)", "")
    bars = {f"stable below:\n{name}": value for name, value in result.thresholds.items() if np.isfinite(value)}
    if result.learning_rate is not None:
        bars["learning rate"] = result.learning_rate
    for i, (name, value) in enumerate(bars.items()):
        beyond = name == "learning rate" and value > result.threshold
        right.barh(i, value, height=0.5, color=COLORS[1] if beyond else COLORS[2 if name == "learning rate" else 0])
        right.text(value, i, f" {number(value)}", va="center", fontsize=8, color=INK)
    right.set_yticks(range(len(bars)), list(bars))
    right.invert_yaxis()
    right.set_xlim(0, 1.25 * max(bars.values(), default=1.0))
    right.locator_params(axis="x", nbins=5)
    labelled(right, "Learning rates", "learning rate", "")
    return figure


def _both_signs(ax: Any, values: Sequence[float]) -> None:
    """A symmetric logarithmic axis of three decades on a side, with few numbers on it."""
    reach = max(max(map(abs, values)), 1e-12)
    top, least = math.ceil(math.log10(reach)), max(-min(values), 0.0)
    threshold = 10.0 ** (top - 3)
    ax.set_xscale("symlog", linthresh=threshold)
    left = -(10.0 ** math.ceil(math.log10(least))) if least > threshold else -threshold
    ticks = [10.0 ** (top - k) for k in (2, 1, 0)]
    shown = [*(-t for t in reversed(ticks) if -t >= 1.01 * left), 0.0, *(t for t in ticks if t <= 1.5 * max(values))]
    ax.set_xticks(shown, [number(tick) for tick in shown])
    ax.minorticks_off()
    ax.set_xlim(1.5 * left, 10.0**top * 1.5)


def noise_scale(result: NoiseScale) -> Figure:
    """Steps and examples over the batch size, as multiples of the fewest, with the critical batch size.

    Raises:
      ValueError: the noise scale is not known, and there is nothing to draw.
    """
    if not result.known:
        raise ValueError("result: the noise scale could not be told. Use one that is measured on more batches")
    figure = blank(7.2, 4.2)
    ax = styled(figure.subplots())
    sizes = np.geomspace(max(1.0, result.critical_batch_size / 100), max(10.0, result.critical_batch_size * 100), 200)
    ax.plot(sizes, [result.steps(size) for size in sizes], color=COLORS[0], linewidth=1.6, label="steps")
    ax.plot(sizes, [result.examples(size) for size in sizes], color=COLORS[4], linewidth=1.6, label="examples")
    if result.low < result.high:
        ax.axvspan(result.low, result.high, color=COLORS[2], alpha=0.12, linewidth=0, label="95% of the noise scale")
    ax.axvline(result.scale, color=COLORS[2], linewidth=1.4)
    ax.axvline(result.batch_size, color=INK, linewidth=1.0, linestyle=":", label=f"batch of {result.batch_size}")
    log_axis(ax.xaxis)
    log_axis(ax.yaxis)
    title = f"Noise scale {number(result.scale)}: cost of getting equally far"
    labelled(ax, title, "batch size", "multiple of the fewest")
    figure.legend(loc="outside lower center", frameon=False, fontsize=8, ncols=4)
    return figure


def diagnosis(result: Diagnosis, losses: Sequence[float] | None = None) -> Figure:
    """A loss curve with the verdict of `jaxsgd.diagnose`.

    Args:
      result: the diagnosis.
      losses: another curve to draw, one loss a step. Default: the one that it was made from.
    """
    figure = blank(7.2, 4.8)
    ax = styled(figure.subplots())
    y = result.losses if losses is None else np.asarray(losses, float)
    x = result.steps if losses is None else np.arange(1, len(y) + 1)
    if len(y) > 100 and np.isfinite(y).all():
        ax.plot(x, y, color=COLORS[0], linewidth=0.7, alpha=0.35)
        ax.plot(x, smooth(y, len(y) // 100), color=COLORS[0], linewidth=1.5)
    else:
        ax.plot(x, y, color=COLORS[0], linewidth=1.2)
    loss_axis(ax, y)
    labelled(ax, f"Verdict: {result.verdict}", "step", "loss")
    said = [f"{finding.verdict}: {finding.text}" for finding in result.findings[:3]] + [f"\u2192 {result.advice}"]
    lines = [textwrap.fill(line, 105, subsequent_indent="    ") for line in said]
    figure.supxlabel("\n".join(lines), fontsize=8, color=INK, x=0.02, ha="left")
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
    ax.set_yticks(range(len(result.entries)), [f"{e.name}, {number(e.learning_rate)}" for e in result.entries])
    ax.set_ylim(len(result.entries) - 0.5, -0.5)
    title = f"Winner: {result.winner}" if result.winner else f"No winner; take {result.choice}"
    labelled(ax, title, f"{result.score}: every seed, mean and standard error", "")
    return figure
