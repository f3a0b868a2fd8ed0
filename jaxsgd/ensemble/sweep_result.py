"""The result of a sweep."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import jax
import numpy as np

from jaxsgd.report import OMITTED, Column, Report, Table, number, span

__all__ = ["Sweep"]


@dataclass(frozen=True, repr=False)
class Sweep(Report):
    """The result of `sweep`.

    Attributes:
      values: name -> ``(members,)``, what each member was given.
      metrics: name -> ``(members, steps)`` float32, among them ``loss``; NaN from where a member diverged.
      diverged_at: ``(members,)``, the steps taken when it diverged, or -1.
      final: ``(members,)``, the mean loss of the last ``window`` steps; inf for a member that diverged.
      window: how many steps that mean is of.
      states: the runs' last states, stacked along a first axis (before the update that diverged); None where the
        training gave none.
      strategy, reason: how runs were trained side by side, and the reason for it.
      waves: how many groups of runs were trained one after the other; the states are then on the host.
      compiles, compile_seconds, seconds: how often a step was compiled; time for it; time of the training itself.
    """

    picture = "sweep"

    values: dict[str, np.ndarray]
    metrics: dict[str, np.ndarray]
    diverged_at: np.ndarray
    final: np.ndarray
    window: int
    states: Any = field(metadata=OMITTED)
    strategy: str
    reason: str
    compiles: int
    compile_seconds: float
    seconds: float
    waves: int = 1

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
            raise ValueError(
                f"sweep: all {len(self.final)} runs diverged: {_span(self.values)}. Use lower learning rates"
            )
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

    # -- the report ---------------------------------------------------------------------------------

    @property
    def _names(self) -> list[str]:
        """What the rows of the table are by: all that was swept, seeds only if there is nothing else."""
        return [name for name in self.values if name != "seed"] or ["seed"]

    def _lowest(self) -> tuple[int | None, list[dict[str, float]]]:
        """The index of the best row, None where all diverged, and the rows of `over_seeds`."""
        rows = self.over_seeds()
        means = np.array([row["mean"] for row in rows])
        return (int(means.argmin()) if np.isfinite(means).any() else None), rows

    @property
    def summary(self) -> str:
        best, rows = self._lowest()
        if best is None:
            return f"all {len(self.final)} runs diverged: {_span(self.values)}"
        row = rows[best]
        at = _at(row, self._names)
        runs = f", the mean of {row['members']} runs" if row["members"] > 1 else ""
        none = "no run lowered its loss: " if row["mean"] >= row["start"] else ""
        return f"{none}{at} is best, with loss {number(row['mean'])}{runs}"

    @property
    def why(self) -> tuple[str, ...]:
        waves = f" in {self.waves} waves" if self.waves > 1 else ""
        out = [
            f"the loss is the mean of the last {self.window} of {self.losses.shape[1]} steps",
            f"{len(self.final)} runs{waves}, {int(self.diverged.sum())} diverged; by {self.strategy} ({self.reason})",
            f"{self.compiles} compile{'s' if self.compiles != 1 else ''} in {number(self.compile_seconds)} s, "
            f"training {number(self.seconds)} s",
        ]
        if tied := self._tied():
            out.append(f"the seeds cannot tell it from {', '.join(tied)}: less than two standard errors apart")
        return tuple(out)

    def _tied(self) -> list[str]:
        """The other rows whose mean is within two standard errors of the best's."""
        best, rows = self._lowest()
        if best is None or not np.isfinite(rows[best]["sd"]):
            return []
        out, low = [], rows[best]
        for row in rows:
            error = math.sqrt(row["sd"] ** 2 / row["members"] + low["sd"] ** 2 / low["members"])
            if row is not low and row["mean"] - low["mean"] < 2 * error:
                out.append(_at(row, self._names))
        return out

    @property
    def next(self) -> tuple[str, ...]:
        best, rows = self._lowest()
        if best is None:
            return ("sweep learning rates 10 times lower",) if "learning_rate" in self.values else ()
        if rows[best]["mean"] >= rows[best]["start"]:
            return ("no run lowered its loss: sweep other values before you train",)
        out = []
        for name in self._names:
            tried = np.unique(self.values[name])
            if name == "seed" or len(tried) < 2 or rows[best][name] not in (tried[0], tried[-1]):
                continue
            end, way = ("lowest", "down") if rows[best][name] == tried[0] else ("highest", "up")
            out.append(f"{name} {number(rows[best][name])} is the {end} of those swept: sweep further {way}")
        given = ", ".join(f"{name}={number(rows[best][name])}" for name in self._names)
        return tuple(out) or (f"train with {given}",)

    @property
    def table(self) -> Table:
        """A row for each combination of values: the final loss, or where it diverged."""
        best, rows = self._lowest()
        names, seeds = self._names, "seed" in self.values and self._names != ["seed"]
        columns = [*map(Column, names), Column("loss"), *([Column("sd over seeds")] if seeds else [])]
        lines = [
            (*(row[name] for name in names), row["mean"], *([row["sd"]] if seeds else []), self._note(row))
            for row in rows
        ]
        return Table((*columns, Column("note", kind="text")), tuple(lines), best, "the lowest mean loss")

    def _note(self, row: Mapping[str, float]) -> str:
        if row["diverged"]:
            where = [self.values[name] == row[name] for name in self._names]
            first = min(self.diverged_at[np.logical_and.reduce(where) & self.diverged])
            many = f"{row['diverged']} of {row['members']} " if row["members"] > 1 else ""
            return f"{many}diverged at step {first}"
        return f"above its start, {number(row['start'])}" if row["start"] < row["mean"] < np.inf else ""


def _at(row: Mapping[str, float], names: list[str]) -> str:
    return ", ".join(f"{name} {number(row[name])}" for name in names)


def _span(values: Mapping[str, np.ndarray]) -> str:
    return ", ".join(f"{name} from {span(x.min(), x.max())}" for name, x in values.items())
