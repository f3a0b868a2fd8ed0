"""What all pictures share: matplotlib, colours, axes, files.

The only file that imports matplotlib.
"""

from __future__ import annotations

import pathlib
from typing import Any

import numpy as np

try:
    from matplotlib import colormaps
    from matplotlib.colors import LogNorm
    from matplotlib.figure import Figure
except ImportError as error:  # pragma: no cover
    raise ImportError("jaxsgd.plot needs matplotlib: pip install 'jaxsgd[plot]'") from error

__all__ = ["COLORS", "INK", "PAPER", "Figure", "LogNorm", "averaged", "blank", "labelled", "save", "shades", "styled"]

INK, PAPER = "#1b1e28", "#ffffff"
COLORS = ("#3b6fd4", "#d4553b", "#2b9a66", "#8a4fd0", "#c98a12", "#1aa3b8", "#c23f86", "#6b7280", "#7a5230")
"""Nine hues told apart on white, in the order in which curves are drawn."""


def blank(width: float, height: float) -> Figure:
    """An empty figure of so many inches."""
    return Figure(figsize=(width, height), layout="constrained", facecolor=PAPER)


def styled(ax: Any) -> Any:
    """Plain axes in the house's colours; returns them."""
    ax.set_facecolor(PAPER)
    ax.tick_params(colors=INK, labelsize=8)
    for side in ("top", "right"):
        ax.spines[side].set_visible(False)
    for side in ("left", "bottom"):
        ax.spines[side].set_color("#9aa0ac")
    return ax


def averaged(values: Any, decay: float) -> np.ndarray:
    """A moving average that starts at the first value."""
    mean, out = values[0], []
    for value in values:
        mean = decay * mean + (1 - decay) * value
        out.append(mean)
    return np.asarray(out)


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
