"""Pictures: the paths of rules on landscapes in two dimensions, and loss curves.

Floor 7. The only file that imports matplotlib; install it with ``jaxsgd[plot]``. Every function returns a
`matplotlib.figure.Figure` of its own and leaves pyplot's global state alone.
"""

from __future__ import annotations

import pathlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from jaxsgd.rules.averaging import eval_params

try:
    from matplotlib.colors import LogNorm
    from matplotlib.figure import Figure
except ImportError as error:  # pragma: no cover
    raise ImportError("jaxsgd.plot needs matplotlib: pip install 'jaxsgd[plot]'") from error

__all__ = ["LANDSCAPES", "Landscape", "loss_curves", "memory_bars", "path", "paths", "save"]

INK, PAPER = "#1b1e28", "#ffffff"
COLORS = ("#3b6fd4", "#d4553b", "#2b9a66", "#8a4fd0", "#c98a12", "#1aa3b8", "#c23f86", "#6b7280", "#7a5230")
"""Nine hues told apart on white, in the order in which curves are drawn."""


@dataclass(frozen=True)
class Landscape:
    """A function of two weights to walk down.

    Attributes:
      fn: ``(2,) -> ()``.
      start: where paths begin.
      bounds: ``(x from, x to, y from, y to)`` of the picture.
      minimum: where the lowest point is, or None.
    """

    title: str
    fn: Callable[[jax.Array], jax.Array]
    start: tuple[float, float]
    bounds: tuple[float, float, float, float]
    minimum: tuple[float, float] | None


LANDSCAPES: dict[str, Landscape] = {
    "bowl": Landscape(
        "Elongated bowl: $w_0^2 + 4 w_1^2$",
        lambda w: w[0] ** 2 + 4 * w[1] ** 2,
        (-2.5, 1.6), (-3.0, 1.5, -2.0, 2.0), (0.0, 0.0),
    ),
    "rosenbrock": Landscape(
        "Rosenbrock: $(1 - w_0)^2 + 100 (w_1 - w_0^2)^2$",
        lambda w: (1 - w[0]) ** 2 + 100 * (w[1] - w[0] ** 2) ** 2,
        (-1.2, 1.0), (-2.0, 2.0, -1.0, 3.0), (1.0, 1.0),
    ),
    "saddle": Landscape(
        "Saddle: $w_0^2 - w_1^2 + w_1^4 / 4$",
        lambda w: w[0] ** 2 - w[1] ** 2 + w[1] ** 4 / 4,
        (-1.8, 0.01), (-2.2, 2.2, -2.2, 2.2), (0.0, 2**0.5),
    ),
    "plateau": Landscape(
        "Plateau: $1 - e^{-|w|^2 / 2}$",
        lambda w: 1 - jnp.exp(-(w[0] ** 2 + w[1] ** 2) / 2),
        (-2.8, 1.8), (-3.5, 2.5, -2.5, 2.5), (0.0, 0.0),
    ),
}  # fmt: skip
"""Landscapes by name."""


def path(
    tx: optax.GradientTransformation,
    fn: Callable[[jax.Array], jax.Array],
    start: Sequence[float],
    steps: int = 60,
    *,
    gradient_at: Callable[[Any, Any], Any] | None = None,
) -> np.ndarray:
    """The points that a transformation visits on ``fn``: ``(steps + 1, len(start))``, the start first.

    Schedule-free rules are shown at their average (`jaxsgd.eval_params`). ``gradient_at(state, params)`` says
    where the gradient is taken, if not at the point itself (`jaxsgd.look_ahead`).
    """
    w = jnp.asarray(start, jnp.float32)
    tx = optax.with_extra_args_support(tx)

    def step(carry: tuple[Any, Any], _: Any) -> tuple[tuple[Any, Any], jax.Array]:
        w, state = carry
        value, grads = jax.value_and_grad(fn)(w if gradient_at is None else gradient_at(state, w))
        updates, state = tx.update(grads, state, w, value=value)
        w = optax.apply_updates(w, updates)
        return (w, state), eval_params(state, w)

    _, visited = jax.jit(lambda: jax.lax.scan(step, (w, tx.init(w)), length=steps))()
    return np.concatenate([np.asarray(w)[None], np.asarray(visited)])


def _style(ax: Any) -> None:
    ax.set_facecolor(PAPER)
    ax.tick_params(colors=INK, labelsize=8)
    for side in ("top", "right"):
        ax.spines[side].set_visible(False)
    for side in ("left", "bottom"):
        ax.spines[side].set_color("#9aa0ac")


def paths(
    transformations: Mapping[str, optax.GradientTransformation | np.ndarray],
    landscape: str | Landscape = "bowl",
    steps: int = 60,
    *,
    columns: int | None = None,
) -> Figure:
    """Paths of several rules on one landscape, each in a panel of its own with the loss it ends at.

    Args:
      transformations: title -> transformation, or points ``(n, 2)`` computed already (by `path`).
      landscape: a name in `LANDSCAPES`, or one of your own.
      steps: steps to take.
      columns: panels in a row; 3 by default, fewer if there are fewer.

    Raises:
      ValueError: an unknown landscape, or nothing to draw.
    """
    if isinstance(landscape, str):
        if landscape not in LANDSCAPES:
            raise ValueError(f"landscape={landscape!r}: known are {', '.join(LANDSCAPES)}")
        landscape = LANDSCAPES[landscape]
    if not transformations:
        raise ValueError("transformations: at least one is needed")
    columns = min(columns or 3, len(transformations))
    rows = -(-len(transformations) // columns)
    figure = Figure(figsize=(3.3 * columns, 2.9 * rows + 0.4), layout="constrained", facecolor=PAPER)
    figure.suptitle(f"{landscape.title}, {steps} steps", fontsize=11, color=INK)
    x0, x1, y0, y1 = landscape.bounds
    grid_x, grid_y = np.meshgrid(np.linspace(x0, x1, 160), np.linspace(y0, y1, 160))
    points = jnp.asarray(np.stack([grid_x.ravel(), grid_y.ravel()], axis=1), jnp.float32)
    heights = np.asarray(jax.vmap(landscape.fn)(points)).reshape(grid_x.shape)
    lowest = float(heights.min())
    raised = heights - lowest + 1e-3 * float(np.ptp(heights))
    levels = np.geomspace(raised.min(), raised.max(), 22)
    panels = figure.subplots(rows, columns, squeeze=False, sharex=True, sharey=True).ravel()
    for ax in panels[len(transformations) :]:
        ax.set_visible(False)
    for i, (title, tx) in enumerate(transformations.items()):
        ax = panels[i]
        _style(ax)
        walked = tx if isinstance(tx, np.ndarray) else path(tx, landscape.fn, landscape.start, steps)
        ax.contourf(grid_x, grid_y, raised, levels=levels, norm=LogNorm(), cmap="Blues", alpha=0.55)
        ax.contour(grid_x, grid_y, raised, levels=levels, colors="white", linewidths=0.4)
        color = COLORS[i % len(COLORS)]
        shown = walked[np.isfinite(walked).all(axis=1)]
        ax.plot(shown[:, 0], shown[:, 1], "-o", color=color, markersize=2.4, linewidth=1.3)
        ax.plot(*walked[0], "o", color=INK, markersize=5)
        if landscape.minimum is not None:
            ax.plot(*landscape.minimum, "*", color="#f2b705", markersize=11, markeredgecolor=INK, markeredgewidth=0.6)
        end = float(landscape.fn(jnp.asarray(walked[-1])))
        ends_at = f"{end:.2g}" if np.isfinite(end) else "diverged"
        ax.set_title(f"{title}: {ends_at}", fontsize=9, color=INK)
        ax.set_xlim(x0, x1)
        ax.set_ylim(y0, y1)
    return figure


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
    figure = Figure(figsize=(7.2, 4.2), layout="constrained", facecolor=PAPER)
    ax = figure.subplots()
    _style(ax)
    positive = True
    for i, (name, curve) in enumerate(curves.items()):
        given = curve if isinstance(curve, tuple) else (np.arange(1, len(curve) + 1), curve)
        x, y = (np.asarray(v, dtype=float) for v in given)
        positive &= bool(np.all(y[np.isfinite(y)] > 0))
        color = COLORS[i % len(COLORS)]
        if smooth and len(y) > 2:
            ax.plot(x, y, color=color, alpha=0.25, linewidth=0.8)
            mean, averaged = y[0], []
            for value in y:
                mean = smooth * mean + (1 - smooth) * value
                averaged.append(mean)
            y = np.asarray(averaged)
        ax.plot(x, y, color=color, linewidth=1.6, label=name)
    if log and positive:
        ax.set_yscale("log")
    ax.grid(True, axis="y", color="#e5e7eb", linewidth=0.6)
    ax.set_title(title, fontsize=11, color=INK, loc="left")
    ax.set_xlabel(xlabel, fontsize=9, color=INK)
    ax.set_ylabel(ylabel, fontsize=9, color=INK)
    ax.legend(frameon=False, fontsize=8, ncols=1 if len(curves) < 6 else 2)
    return figure


def memory_bars(plans: Iterable[Any], *, title: str = "Memory of a device") -> Figure:
    """The bytes that plans take on a device, as stacked bars against what the device has.

    Args:
      plans: what `jaxsgd.plan` gives, or a `jaxsgd.plan.Comparison`. The parts of all are stacked in one order; those
        below a thousandth of every bar are drawn as one, "other". A bar of what does not fit is hatched.
      title: above the picture.

    Raises:
      ValueError: nothing to draw.
    """
    plans = list(plans)
    if not plans:
        raise ValueError("plans: at least one is needed")
    names = list(dict.fromkeys(name for plan in plans for name in plan.parts))
    shown = [name for name in names if any(plan.parts.get(name, 0) > plan.needs / 1000 for plan in plans)]
    most = max(max(plan.needs, plan.available if plan.available < 4 * plan.needs else 0) for plan in plans)
    power = min(4, max(0, int(np.log2(max(most, 1)) // 10)))
    unit = ("bytes", "KiB", "MiB", "GiB", "TiB")[power]
    figure = Figure(figsize=(8.2, 1.5 + 0.5 * len(plans)), layout="constrained", facecolor=PAPER)
    ax = figure.subplots()
    _style(ax)
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


def save(figure: Figure, file: str | pathlib.Path, *, dpi: int = 100) -> pathlib.Path:
    """Write a figure as PNG (or what the ending says) at ``dpi`` dots an inch, making its folder; returns the path."""
    file = pathlib.Path(file)
    file.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(file, dpi=dpi)
    return file
