"""Findings about single layers: dead, frozen and exploding ones, steps too long or too short."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from jaxsgd.diagnosis.verdict import Verdict
from jaxsgd.report import number

__all__ = ["examine"]

DEAD = 1e-6  # of the median layer: beside it float32 loses smaller gradients
GROWTH = 100.0
RATIOS = (1e-5, 1e-1)
SHORTEST = 10

Row = tuple[Verdict, str, dict[str, float], str]


def examine(columns: Mapping[str, np.ndarray]) -> list[Row]:
    """Findings as (verdict, text, numbers, advice), from columns ``gradient_norm/<leaf>`` and ``update_ratio/<leaf>``.

    Args:
      columns: one value a step in each. Columns of other names and columns of fewer than 10 steps are ignored.
    """
    norms, ratios = _pick(columns, "gradient_norm/"), _pick(columns, "update_ratio/")
    return [*_dead(norms), *_frozen(norms, ratios), *_exploding(norms), *_ratios(ratios)]


def _pick(columns: Mapping[str, np.ndarray], prefix: str) -> dict[str, np.ndarray]:
    named = {n.removeprefix(prefix): np.asarray(v, np.float64) for n, v in columns.items() if n.startswith(prefix)}
    return {name: v for name, v in named.items() if len(v) >= SHORTEST}


def _middle(v: np.ndarray) -> float:
    v = v[np.isfinite(v)]
    return float(np.median(v)) if len(v) else np.nan


def _row(verdict: Verdict, said: str, numbers: dict[str, float], advice: str, of: int) -> list[Row]:
    if not numbers:
        return []
    shown = ", ".join(f"{name} {number(value, 2)}" for name, value in list(numbers.items())[:4])
    more = f" and {len(numbers) - 4} more" if len(numbers) > 4 else ""
    return [(verdict, f"{len(numbers)} of {of} parameters {said}: {shown}{more}", numbers, advice)]


def _dead(norms: dict[str, np.ndarray]) -> list[Row]:
    # Not the first step: behind a head that starts at zero there is no gradient yet.
    middles = {name: _middle(v[1:]) for name, v in norms.items()}
    alive = [m for m in middles.values() if m > 0]
    usual = float(np.median(alive)) if alive else 0.0
    dead = {name: m for name, m in middles.items() if m <= DEAD * usual}
    advice = "check the inputs of those layers: dead ReLUs (start their biases at 0), a stop_gradient, unused inputs"
    return _row(Verdict.DEAD_LAYERS, "get no gradient (median norm)", dead, advice, len(norms))


def _frozen(norms: dict[str, np.ndarray], ratios: dict[str, np.ndarray]) -> list[Row]:
    # A parameter that is zero has the ratio 0 too. If it moves at all, it has moved after the first step.
    frozen = {n: _middle(norms[n][1:]) for n, r in ratios.items() if n in norms and not np.any(r[np.isfinite(r)])}
    frozen = {name: norm for name, norm in frozen.items() if norm > 0}
    advice = "if this is not intended, check the groups: frozen, a mask, a learning rate of 0"
    return _row(
        Verdict.FROZEN_LAYERS, "never move, although they get a gradient (median norm)", frozen, advice, len(ratios)
    )


def _exploding(norms: dict[str, np.ndarray]) -> list[Row]:
    grown = {}
    for name, v in norms.items():
        if not np.isfinite(v).all():
            grown[name] = float("inf")
            continue
        early, late = _middle(v[1 : max(2, len(v) // 2)]), _middle(v[-max(3, len(v) // 10) :])
        if early > 0 and late > GROWTH * early:
            grown[name] = late / early
    advice = "clip by the global norm, warm up, or lower the learning rate 10x; normalize the inputs of those layers"
    return _row(Verdict.EXPLODING_LAYERS, "have growing gradients (growth factor)", grown, advice, len(norms))


def _ratios(ratios: dict[str, np.ndarray]) -> list[Row]:
    middles = {}
    for name, v in ratios.items():
        moved = v[1:][np.isfinite(v[1:]) & (v[1:] > 0)]  # zero: the parameter is zero, or does not move
        if len(moved) >= SHORTEST // 2:
            middles[name] = float(np.median(moved[len(moved) // 4 :]))
    low, high = RATIOS
    large = {name: m for name, m in middles.items() if m > high}
    small = {name: m for name, m in middles.items() if m < low}
    lower = "lower their learning rate 10x: ten such steps replace a parameter (1e-3 is usual)"
    higher = "raise their learning rate 10x: 1,000 such steps move a parameter by 1% at most (1e-3 is usual)"
    return [
        *_row(Verdict.RATIO_TOO_LARGE, "move by more than a tenth of their size in a step", large, lower, len(ratios)),
        *_row(Verdict.RATIO_TOO_SMALL, "move by less than 1e-5 of their size in a step", small, higher, len(ratios)),
    ]
