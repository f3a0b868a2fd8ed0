"""Paths of rules on landscapes in two dimensions."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from jaxsgd.lift import lifts_in
from jaxsgd.plot.style import COLORS, INK, Figure, LogNorm, blank, styled
from jaxsgd.rules.averaging import eval_params
from jaxsgd.second_order.batch_loss import taken_by

__all__ = ["LANDSCAPES", "Landscape", "panel", "path", "paths", "walk"]


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


def walk(
    tx: optax.GradientTransformation,
    fn: Callable[[Any], jax.Array],
    start: Any,
    steps: int,
    *,
    gradient_at: Callable[[Any, Any], Any] | None = None,
) -> Any:
    """`path` for use under `jax.jit` and `jax.vmap`, on a pytree of parameters.

    Returns:
      A tree like ``start``, each array with a new first axis of length ``steps + 1``.
    """
    tx = optax.with_extra_args_support(tx)
    # L-BFGS hands the arguments that it does not know to ``value_fn``.
    objective = {"obj_fn": fn} if any("obj_fn" in lift.rule.extra for lift in lifts_in(tx, start)) else {}

    def step(carry: tuple[Any, Any], _: Any) -> tuple[tuple[Any, Any], Any]:
        w, state = carry
        value, grads = jax.value_and_grad(fn)(w if gradient_at is None else gradient_at(state, w))
        extra = taken_by(tx.update, {"value": value, "grad": grads, "value_fn": fn} | objective)
        updates, state = tx.update(grads, state, w, **extra)
        w = optax.apply_updates(w, updates)
        return (w, state), eval_params(state, w)

    _, visited = jax.lax.scan(step, (start, tx.init(start)), length=steps)
    return jax.tree.map(lambda first, rest: jnp.concatenate([first[None], rest]), start, visited)


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
    return np.asarray(jax.jit(lambda: walk(tx, fn, w, steps, gradient_at=gradient_at))())


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
    figure = blank(3.3 * columns, 2.9 * rows + 0.4)
    figure.suptitle(f"{landscape.title}, {steps} steps", fontsize=11, color=INK)
    panels = figure.subplots(rows, columns, squeeze=False, sharex=True, sharey=True).ravel()
    for ax in panels[len(transformations) :]:
        ax.set_visible(False)
    for i, (title, tx) in enumerate(transformations.items()):
        points = tx if isinstance(tx, np.ndarray) else path(tx, landscape.fn, landscape.start, steps)
        panel(panels[i], title, points, landscape, COLORS[i % len(COLORS)])
    for ax in figure.axes:
        ax.label_outer()
    return figure


def panel(ax: Any, title: str, points: np.ndarray, landscape: Landscape, color: str = COLORS[0]) -> None:
    """One path on the contours of its landscape: a disc at the start, a star at the minimum, the last loss above.

    Args:
      ax: matplotlib axes.
      title: stands before the loss.
      points: the path, ``(steps + 1, 2)``.
      landscape: the function.
      color: of the path.
    """
    styled(ax)
    x0, x1, y0, y1 = landscape.bounds
    grid_x, grid_y = np.meshgrid(np.linspace(x0, x1, 160), np.linspace(y0, y1, 160))
    nodes = jnp.asarray(np.stack([grid_x.ravel(), grid_y.ravel()], axis=1), jnp.float32)
    heights = np.asarray(jax.vmap(landscape.fn)(nodes)).reshape(grid_x.shape)
    raised = heights - heights.min() + 1e-3 * np.ptp(heights)
    levels = np.geomspace(raised.min(), raised.max(), 22)
    ax.contourf(grid_x, grid_y, raised, levels=levels, norm=LogNorm(), cmap="Blues", alpha=0.55)
    ax.contour(grid_x, grid_y, raised, levels=levels, colors="white", linewidths=0.4)
    shown = points[np.isfinite(points).all(axis=1)]
    ax.plot(shown[:, 0], shown[:, 1], "-o", color=color, markersize=2.4, linewidth=1.3)
    ax.plot(*points[0], "o", color=INK, markersize=5)
    if landscape.minimum is not None:
        ax.plot(*landscape.minimum, "*", color="#f2b705", markersize=11, markeredgecolor=INK, markeredgewidth=0.6)
    end = float(landscape.fn(jnp.asarray(points[-1])))
    ends_at = f"{end:.2g}" if np.isfinite(end) else "diverged"
    ax.set_title(f"{title}: {ends_at}", fontsize=9, color=INK)
    ax.set_xlabel("$w_0$", fontsize=9, color=INK)
    ax.set_ylabel("$w_1$", fontsize=9, color=INK)
    ax.set_xlim(x0, x1)
    ax.set_ylim(y0, y1)
