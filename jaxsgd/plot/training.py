"""Loss curves, and the memory of training."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from jaxsgd.diagnosis.loss_curve import averaged
from jaxsgd.plot.style import COLORS, INK, PAPER, Figure, blank, labelled, log_axis, styled

__all__ = ["loss_curves", "memory_bars"]


def loss_curves(
    curves: Mapping[str, Sequence[float] | tuple[Sequence[float], Sequence[float]]],
    *,
    title: str = "Loss",
    xlabel: str = "step",
    ylabel: str = "loss",
    log: bool = True,
    smooth: float = 0.0,
) -> Figure:
    """Loss curves in one picture, with a legend.

    Args:
      curves: name -> losses, one a step (counted from 1), or ``(steps, losses)``.
      log: a logarithmic loss axis, where all losses are above 0.
      smooth: decay of a moving average drawn over the faint raw curve; 0 draws the raw curve only.

    Raises:
      ValueError: nothing to draw, or ``smooth`` outside [0, 1).
    """
    if not curves:
        raise ValueError("curves: at least one is needed")
    if not 0 <= smooth < 1:
        raise ValueError(f"smooth={smooth}: it is the decay of an average, in [0, 1)")
    figure = blank(7.2, 4.2)
    ax = styled(figure.subplots())
    positive = True
    for i, (name, curve) in enumerate(curves.items()):
        given = curve if isinstance(curve, tuple) else (np.arange(1, len(curve) + 1), curve)
        x, y = (np.asarray(v, dtype=float) for v in given)
        positive &= bool(np.all(y[np.isfinite(y)] > 0))
        color = COLORS[i % len(COLORS)]
        if smooth and len(y) > 2:
            ax.plot(x, y, color=color, alpha=0.25, linewidth=0.8)
            y = averaged(y, smooth)
        ax.plot(x, y, color=color, linewidth=1.6, label=name)
    if log and positive:
        log_axis(ax.yaxis)
    labelled(ax, title, xlabel, ylabel)
    ax.legend(frameon=False, fontsize=8, ncols=1 if len(curves) < 6 else 2)
    return figure


def memory_bars(plans: Any, *, title: str = "Memory of a device") -> Figure:
    """The bytes that plans take on a device, as stacked bars against what the device has.

    Args:
      plans: one or several of `jaxsgd.plan`, or a `jaxsgd.planning.Comparison`. The parts of all are stacked in one
        order; those below a thousandth of every bar are drawn as one, "other". A bar of what does not fit is hatched.
      title: above the picture.

    Raises:
      ValueError: nothing to draw.
    """
    plans = list(plans) if isinstance(plans, Iterable) else [plans]
    if not plans:
        raise ValueError("plans: at least one is needed")
    names = list(dict.fromkeys(name for plan in plans for name in plan.parts))
    shown = [name for name in names if any(plan.parts.get(name, 0) > plan.needs / 1000 for plan in plans)]
    most = max(max(plan.needs, plan.available if plan.available < 4 * plan.needs else 0) for plan in plans)
    power = min(4, max(0, int(np.log2(max(most, 1)) // 10)))
    unit = ("bytes", "KiB", "MiB", "GiB", "TiB")[power]
    figure = blank(8.2, 1.5 + 0.5 * len(plans))
    ax = styled(figure.subplots())
    rows, left = np.arange(len(plans)), np.zeros(len(plans))
    stacks = {name: [plan.parts.get(name, 0) for plan in plans] for name in shown}
    other = [plan.needs - sum(stack[i] for stack in stacks.values()) for i, plan in enumerate(plans)]
    if any(other):
        stacks["other"] = other
    for i, (name, stack) in enumerate(stacks.items()):
        widths = np.asarray(stack, dtype=float) / 1024**power
        bars = ax.barh(rows, widths, left=left, height=0.62, color=COLORS[i % len(COLORS)], label=name, linewidth=0)
        for bar, plan in zip(bars, plans, strict=True):
            if not plan.fits:
                bar.set(hatch="////", edgecolor=PAPER)
        left += widths
    for row, plan in enumerate(plans):
        there = plan.available / 1024**power
        if plan.available <= 4 * most:
            ax.plot([there, there], [row - 0.42, row + 0.42], color=INK, linewidth=2, label="_")
        verdict = "fits" if plan.fits else "does not fit"
        ax.text(left[row], row, f"  {left[row]:.3g} {unit}, {verdict}", va="center", fontsize=8, color=INK)
    ax.set_yticks(rows, [plan.label for plan in plans])
    ax.invert_yaxis()
    ax.set_xlim(0, 1.28 * max(left.max(), *(p.available / 1024**power for p in plans if p.available <= 4 * most), 0))
    ax.set_xlabel(f"{unit} on a device; the black line is what it has", fontsize=9, color=INK)
    ax.set_title(title, fontsize=11, color=INK, loc="left")
    figure.legend(loc="outside lower center", frameon=False, fontsize=8, ncols=4)
    return figure
