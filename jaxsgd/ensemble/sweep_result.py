"""What a sweep found."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import jax
import numpy as np

from jaxsgd.paths import Text, aligned

__all__ = ["Sweep"]


@dataclass(frozen=True)
class Sweep:
    """What `sweep` found; print it.

    Attributes:
      values: name -> ``(members,)``, what each member was given.
      metrics: name -> ``(members, steps)`` float32, among them ``loss``; NaN from where a member diverged.
      diverged_at: ``(members,)``, the steps taken when it diverged, or -1.
      final: ``(members,)``, the mean loss of the last ``window`` steps; inf for a member that diverged.
      window: how many steps that mean is of.
      states: the members' last states, stacked along a first axis (before the update that diverged); None where the
        training gave none.
      strategy: what was chosen, and ``why``.
      compiles, compile_seconds, seconds: how often a step was compiled; time for it; time of the training itself.
    """

    values: dict[str, np.ndarray]
    metrics: dict[str, np.ndarray]
    diverged_at: np.ndarray
    final: np.ndarray
    window: int
    states: Any = field(repr=False)
    strategy: str
    why: str
    compiles: int
    compile_seconds: float
    seconds: float

    @property
    def losses(self) -> np.ndarray:
        """``(members, steps)``."""
        return self.metrics["loss"]

    @property
    def diverged(self) -> np.ndarray:
        """``(members,)`` bool."""
        return self.diverged_at >= 0

    @property
    def best(self) -> dict[str, float]:
        """The values with the least final loss; where seeds were swept, the least of the mean over seeds.

        Raises:
          ValueError: all members diverged.
        """
        rows = self.over_seeds()
        found = min(rows, key=lambda row: row["mean"])
        if not np.isfinite(found["mean"]):
            raise ValueError(f"sweep: all {len(self.final)} members diverged; {_span(self.values)}")
        return {name: found[name] for name in self.values if name != "seed"} or {"seed": found["seed"]}

    def over_seeds(self) -> list[dict[str, float]]:
        """For each combination of the other values: ``mean`` and ``sd`` of the final loss, ``start``, the mean of the
        first, how many ``diverged``, how many ``members``."""
        names = [name for name in self.values if name != "seed"] or ["seed"]
        groups: dict[tuple[float, ...], list[int]] = {}
        for i in range(len(self.final)):
            groups.setdefault(tuple(self.values[name][i].item() for name in names), []).append(i)
        out = []
        for key, index in groups.items():
            final = self.final[index]
            sd = float(np.std(final, ddof=1)) if len(index) > 1 and np.all(np.isfinite(final)) else float("nan")
            row = {"mean": float(np.mean(final)), "sd": sd, "diverged": int(self.diverged[index].sum())}
            row["start"] = float(np.mean(self.losses[index, 0]))
            out.append(dict(zip(names, key, strict=True)) | row | {"members": len(index)})
        return out

    def member(self, index: int) -> Any:
        """The last state of one member."""
        if self.states is None:
            raise ValueError("sweep: the training gave no states")
        return jax.tree.map(lambda x: x[index], self.states)

    def table(self) -> str:
        """A line for each combination of values: final loss, or where it diverged."""
        names = [name for name in self.values if name != "seed"] or ["seed"]
        seeds = "seed" in self.values and names != ["seed"]
        best = self.best if np.any(np.isfinite(self.final)) else {}
        lines = [(*names, f"loss, mean of the last {self.window}", *(("sd over seeds",) if seeds else ()), "")]
        for row in self.over_seeds():
            said = "best" if best == {name: row[name] for name in names} else ""
            if row["start"] < row["mean"] < np.inf:
                said = f"{said}, " * bool(said) + f"above its start, {row['start']:.4g}"
            if row["diverged"]:
                where = [self.values[name] == row[name] for name in names]
                first = min(self.diverged_at[np.logical_and.reduce(where) & self.diverged])
                many = f"{row['diverged']} of {row['members']} " if row["members"] > 1 else ""
                said = f"{many}diverged at step {first}"
            shown = [f"{row[name]:.4g}" for name in names]
            spread = (f"{row['sd']:.2g}",) if seeds else ()
            lines.append((*shown, f"{row['mean']:.6g}", *spread, said))
        return Text(aligned(lines))

    def __str__(self) -> str:
        head = (
            f"{len(self.final)} trainings of {self.losses.shape[1]} steps by {self.strategy} ({self.why}): "
            f"{self.compiles} compile{'s' if self.compiles != 1 else ''} in {self.compile_seconds:.1f} s, "
            f"{self.seconds:.1f} s of training, {int(self.diverged.sum())} diverged"
        )
        return f"{head}\n{self.table()}"


def _span(values: Mapping[str, np.ndarray]) -> str:
    return ", ".join(f"{name} from {x.min():.3g} to {x.max():.3g}" for name, x in values.items())
