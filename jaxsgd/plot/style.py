"""The style of all pictures: matplotlib, colours, axes, files.

The only file that imports matplotlib.
"""

from __future__ import annotations

import pathlib
from typing import Any

import numpy as np

from jaxsgd.report import number

try:
    from matplotlib import colormaps
    from matplotlib.colors import LogNorm
    from matplotlib.figure import Figure
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter, NullLocator
except ImportError as error:  # pragma: no cover
    raise ImportError("jaxsgd.plot needs matplotlib: pip install 'jaxsgd[plot]'") from error

__all__ = [
    "COLORS", "INK", "PAPER", "Figure", "LogNorm", "blank", "labelled", "log_axis", "loss_axis", "off_scale", "save",
    "shades", "styled",
]  # fmt: skip

INK, PAPER = "#1b1e28", "#ffffff"
COLORS = ("#3b6fd4", "#d4553b", "#2b9a66", "#8a4fd0", "#c98a12", "#1aa3b8", "#c23f86", "#6b7280", "#7a5230")
"""Nine hues told apart on white, in the order in which curves are drawn."""


def blank(width: float, height: float) -> Figure:
    """An empty figure of so many inches."""
    return Figure(figsize=(width, height), layout="constrained", facecolor=PAPER)


def styled(ax: Any) -> Any:
    """Plain axes in the house's colours; returns them."""
    ax.set_facecolor(PAPER)
    ax.set_axisbelow(True)
    ax.tick_params(which="both", colors=INK, labelsize=8)
    for side in ("top", "right"):
        ax.spines[side].set_visible(False)
    for side in ("left", "bottom"):
        ax.spines[side].set_color("#9aa0ac")
    return ax


def log_axis(axis: Any) -> None:
    """A logarithmic axis with plain numbers; between the decades numbers too where there are less than two of them."""
    getattr(axis.axes, f"set_{axis.axis_name}scale")("log")
    low, high = sorted(axis.get_view_interval())
    decades = np.log10(high / low) if low > 0 else 1.0
    shown = FuncFormatter(lambda value, _: number(value, 2))
    axis.set_major_formatter(shown)
    if decades > 6:
        axis.set_major_locator(LogLocator(numticks=7))
        axis.set_minor_locator(NullLocator())
    elif decades < 2:
        axis.set_minor_locator(LogLocator(subs=(2.0, 5.0) if decades > 0.7 else (1.5, 2.0, 3.0, 4.0, 5.0, 7.0)))
        axis.set_minor_formatter(shown)
    else:
        axis.set_minor_formatter(NullFormatter())


def loss_axis(ax: Any, losses: Any) -> None:
    """A logarithmic axis where all losses are above 0 and span more than a factor of three."""
    fine = np.asarray(losses, float)
    fine = fine[np.isfinite(fine)]
    if len(fine) and fine.min() > 0 and fine.max() > 3 * fine.min():
        log_axis(ax.yaxis)


def off_scale(ax: Any, x: Any, label: str, color: str) -> None:
    """Arrows at the upper edge for points above it."""
    ax.plot(
        x, np.full(len(x), 0.97), "^", transform=ax.get_xaxis_transform(), color=color, markersize=6, clip_on=False,
        label=label,
    )  # fmt: skip


def shades(count: int) -> list[Any]:
    """So many colours in order, from dark to light."""
    return [colormaps["viridis"](0.92 * i / max(1, count - 1)) for i in range(count)]


def labelled(ax: Any, title: str, xlabel: str, ylabel: str) -> None:
    """Title above on the left, names of the axes, faint horizontal lines."""
    ax.grid(True, axis="y", color="#e5e7eb", linewidth=0.6)
    ax.set_title(title, fontsize=11, color=INK, loc="left")
    ax.set_xlabel(xlabel, fontsize=9, color=INK)
    ax.set_ylabel(ylabel, fontsize=9, color=INK)


def save(figure: Figure, file: str | pathlib.Path, *, dpi: int = 100) -> pathlib.Path:
    """Write a figure as PNG (or what the ending says) at ``dpi`` dots an inch, making its folder; returns the path."""
    file = pathlib.Path(file)
    file.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(file, dpi=dpi)
    return file
