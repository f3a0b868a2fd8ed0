"""When a training has diverged: a finite loss has risen too far. Steps that an optimizer skipped do not count."""

from __future__ import annotations

import numpy as np

__all__ = ["EARLY", "IN_A_ROW", "least_losses", "risen", "without_skipped"]

EARLY, IN_A_ROW = 8, 3
"""Steps that say how large a loss is usual; losses in a row that have to exceed it by far."""


def least_losses(losses: np.ndarray, count: int = EARLY) -> list[float]:
    """The least loss of all members ``(members, steps)`` in each of the first ``count`` steps that has a finite one."""
    return [float(np.nanmin(column)) for column in losses.T[:count] if np.any(np.isfinite(column))]


def risen(losses: np.ndarray, least: list[float], limit: float, before: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Where `IN_A_ROW` losses begin that exceed the usual one, the largest of ``least``, by ``limit`` times its size.

    Args:
      losses: ``(members, steps)``.
      least: of `least_losses`.
      limit: inf for none.
      before: ``(members, IN_A_ROW - 1)`` bool, which of the losses before these exceeded it.

    Returns:
      ``(members,)`` int, the step, or -1; and ``before`` for the losses to come.
    """
    usual = max(least, default=0.0)
    bound = usual + limit * abs(usual) if usual else np.inf
    over = np.concatenate([before, losses > bound], axis=1)
    runs = np.lib.stride_tricks.sliding_window_view(over, IN_A_ROW, axis=1).min(axis=2)  # where one begins
    at = np.where(runs.max(axis=1), np.maximum(0, runs.argmax(axis=1) - (IN_A_ROW - 1)), -1)
    return at, over[:, -(IN_A_ROW - 1) :]


def without_skipped(rows: np.ndarray, skipped: np.ndarray, last: np.ndarray | None = None) -> np.ndarray:
    """The metrics of a run with those of the step before where the optimizer skipped one.

    Args:
      rows: ``(steps, ...)``.
      skipped: ``(steps,)`` bool.
      last: the metrics of the step before the first, NaN if there is none. The first ones skipped then have those of
        the first step that was taken. Default: none.
    """
    if not skipped.any() or skipped.all() and last is None:
        return rows
    at = np.maximum.accumulate(np.where(skipped, -1, np.arange(len(rows))))
    first = np.asarray(np.nan) if last is None else last
    if not skipped.all() and np.isnan(first).all():
        first = rows[skipped.argmin()]
    return np.where((at >= 0).reshape(-1, *[1] * (rows.ndim - 1)), rows[at], first)
