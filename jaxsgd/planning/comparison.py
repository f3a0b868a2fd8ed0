"""Plans side by side."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from jaxsgd.planning.result import Plan, human
from jaxsgd.report import Column, Report, Table

__all__ = ["Comparison"]


@dataclass(frozen=True, repr=False)
class Comparison(Report):
    """Several plans; the table comes first, ``text(verbose=True)`` has each plan after it.

    Attributes:
      plans: in the order asked for.
    """

    picture = "memory_bars"

    plans: tuple[Plan, ...]

    def __iter__(self) -> Iterator[Plan]:
        return iter(self.plans)

    def __len__(self) -> int:
        return len(self.plans)

    def __getitem__(self, index: int) -> Plan:
        return self.plans[index]

    @property
    def best(self) -> Plan | None:
        """The plan with the shortest bound, of those that fit; None if none fits.

        If a bound is not known, it is the plan with the most memory to spare."""
        fitting = [p for p in self.plans if p.fits]
        timed = all(p.bound is not None for p in fitting)
        return min(fitting, key=lambda p: p.bound.seconds if timed and p.bound else -p.headroom, default=None)

    @property
    def summary(self) -> str:
        count, best = sum(p.fits for p in self.plans), self.best
        if best is None:
            least = min(self.plans, key=lambda p: -p.headroom)
            return f"none of {len(self)} plans fits; {least.label} is {human(-least.headroom)} short"
        reason = "the shortest bound" if all(p.bound for p in self.plans if p.fits) else "the most memory to spare"
        return f"{count} of {len(self)} plans fit; of them {best.label} has {reason}"

    @property
    def why(self) -> tuple[str, ...]:
        said = "; the bound is the least time of a step by the datasheet, no prediction" if self._timed else ""
        return (f"bytes are of one device{said}",)

    @property
    def _timed(self) -> bool:
        """Whether a bound is known of any."""
        return any(p.bound is not None for p in self.plans)

    @property
    def next(self) -> tuple[str, ...]:
        return tuple(f"{p.label}: {p.next[0]}" for p in self.plans if not p.fits and p.next)

    @property
    def table(self) -> Table:
        """A row for each plan."""
        columns = [
            Column("plan", kind="text"), Column("devices"), Column("needs", kind="bytes"), Column("has", kind="bytes"),
            Column("spare", kind="bytes"), Column("fits"),
        ]  # fmt: skip
        columns += [Column("bound", "ms"), Column("by", kind="text")] if self._timed else []
        columns += [
            Column("params", kind="bytes"), Column("state", kind="bytes"), Column("temporaries", kind="bytes"),
            Column("operations"), Column("bytes moved", kind="bytes"), Column("sent", kind="bytes"),
            Column("compile time", "s"),
        ]  # fmt: skip
        best = self.best
        index = None if best is None else self.plans.index(best)
        return Table(
            tuple(columns), tuple(_row(p, self._timed) for p in self.plans), index, self.summary.rpartition(" has ")[2]
        )

    @property
    def details(self) -> tuple[Plan, ...]:
        return self.plans


def _row(p: Plan, timed: bool) -> tuple[object, ...]:
    rest = p.needs - p.parts["params"] - p.state_bytes - p.parts["batch"] - p.parts.get("model state", 0)
    bound = () if not timed else (None, None) if p.bound is None else (p.bound.seconds * 1e3, p.bound.by)
    return (
        p.label, p.devices, p.needs, p.available, p.headroom, p.fits, *bound, p.parts["params"], p.state_bytes, rest,
        float(sum(p.flops.values())), p.hbm_bytes, sum(c.wire for c in p.collectives.values()), p.compile_seconds,
    )  # fmt: skip
