"""The checkpoints that stay when a newer one is complete."""

from __future__ import annotations

import math
import pathlib
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Literal

from jaxsgd.checkpoint.manifest import Found

__all__ = ["Retention"]


@dataclass(frozen=True)
class Retention:
    """The newest ``keep``, the ``best`` by their metric, and those whose step ``every`` divides (0: none)."""

    keep: int
    best: int = 0
    mode: Literal["min", "max"] = "min"
    every: int = 0

    def doomed(self, found: Sequence[Found], bad: Collection[tuple[pathlib.Path, float]]) -> list[Found]:
        """Those to delete of ``found``, the last written first. One in ``bad`` counts as none that is kept."""
        newest: set[int] = set()
        special = {each.step for each in self.ranked(found, bad)[: self.best]}
        special |= {each.step for each in found if self.every and each.step % self.every == 0}
        seen, out = set(), []
        for each in found:
            if each.files is None:
                continue
            good = (each.path, each.serial) not in bad
            again = each.step in seen
            if again or (len(newest) >= self.keep and each.step not in special):
                out.append(each)
            elif good:
                seen.add(each.step)
                if len(newest) < self.keep:
                    newest.add(each.step)
        return out

    def ranked(self, found: Sequence[Found], bad: Collection[tuple[pathlib.Path, float]] = ()) -> list[Found]:
        """The complete ones with a finite metric, the best first; of equals the last written first."""
        steps: dict[int, Found] = {}
        for each in found:
            if each.files is not None and (each.path, each.serial) not in bad:
                steps.setdefault(each.step, each)
        sign = 1 if self.mode == "min" else -1
        known = [(each.metric, each) for each in steps.values() if each.metric is not None]
        known = [(metric, each) for metric, each in known if math.isfinite(metric)]
        return [each for _, each in sorted(known, key=lambda pair: sign * pair[0])]
