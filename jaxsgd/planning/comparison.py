"""Plans side by side."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from jaxsgd.paths import aligned
from jaxsgd.planning.result import Plan, human, scientific

__all__ = ["Comparison", "table"]

COLUMNS = (
    "plan", "devices", "needs", "has", "fits", "params", "state", "temporaries", "operations", "bytes moved",
    "sent", "bound", "compiled",
)  # fmt: skip


def table(plans: tuple[Plan, ...]) -> list[tuple[str, ...]]:
    """The cells, a row for each plan, with `COLUMNS` for a head; bytes are of one device."""
    rows = []
    for p in plans:
        rest = p.needs - p.parts["params"] - p.state_bytes - p.parts["batch"] - p.parts.get("model state", 0)
        rows.append((
            p.label, str(p.devices), human(p.needs), human(p.available),
            "yes" if p.fits else f"no, {human(-p.headroom)} short",
            human(p.parts["params"]), human(p.state_bytes), human(rest), scientific(sum(p.flops.values())),
            human(p.hbm_bytes), human(sum(c.wire for c in p.collectives.values())),
            f"{p.bound.seconds * 1e3:,.2f} ms by {p.bound.by}" if p.bound else "-", f"{p.compile_seconds:.1f} s",
        ))  # fmt: skip
    return rows


@dataclass(frozen=True)
class Comparison:
    """Several plans; prints as a table, in a terminal with rich as a coloured one.

    Attributes:
      plans: in the order asked for.
    """

    plans: tuple[Plan, ...]

    def __iter__(self) -> Iterator[Plan]:
        return iter(self.plans)

    def __len__(self) -> int:
        return len(self.plans)

    def __getitem__(self, index: int) -> Plan:
        return self.plans[index]

    def __str__(self) -> str:
        return aligned([COLUMNS, *table(self.plans)])

    __repr__ = __str__

    def __rich__(self) -> Any:
        from rich.table import Table

        columns = ("plan", "needs", "has", "fits", "params", "state", "temporaries", "bound")
        places = [COLUMNS.index(name) for name in columns]
        shown = Table(title="bytes of one device; 'bound' is a rough lower bound on the time of a step")
        for name in columns:
            shown.add_column(name, no_wrap=name not in ("plan", "fits", "bound"))
        for row, p in zip(table(self.plans), self.plans, strict=True):
            shown.add_row(*(row[place] for place in places), style=None if p.fits else "red")
        return shown

    def to_markdown(self) -> str:
        """A table of Markdown."""
        lines = [COLUMNS, ("---",) * len(COLUMNS), *table(self.plans)]
        return "\n".join(f"| {' | '.join(cell.replace('|', '/') for cell in row)} |" for row in lines)

    def to_json(self) -> str:
        """Everything, see `Plan.to_dict`."""
        return json.dumps([p.to_dict() for p in self.plans], indent=2)
