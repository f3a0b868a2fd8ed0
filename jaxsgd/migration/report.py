"""The report of a migration."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

__all__ = ["SECTIONS", "Entry", "Report", "listed"]

SECTIONS = ("kept", "reset", "dropped", "changed")
LINES = 20
"""The most lines that a section of a printed report has."""


@dataclass(frozen=True)
class Entry:
    """The outcome for one leaf, or for one value in packed blocks.

    Attributes:
      name: its name: in the new state, of what was dropped in the old one.
      reason: why or how, a sentence; empty where a slot was kept as it was.
      slot: the slot, or the scalar's own name.
      parameter: the parameter that it belongs to, None for a scalar.
      elements: how many numbers it holds.
    """

    name: str
    reason: str
    slot: str
    parameter: str | None
    elements: int


@dataclass(frozen=True, repr=False)
class Report:
    """The report of `migrate`; ``print(report)`` shows it.

    Attributes:
      kept: carried over, as they were or in another form.
      reset: as in a new state: they were there in another shape, or not at all.
      dropped: of the old state, without a place in the new one.
      changed: scalars that are as the new optimizer says, and what follows from it.
    """

    kept: tuple[Entry, ...]
    reset: tuple[Entry, ...]
    dropped: tuple[Entry, ...]
    changed: tuple[Entry, ...]

    @property
    def complete(self) -> bool:
        """Whether nothing was reset or dropped."""
        return not self.reset and not self.dropped

    def __str__(self) -> str:
        out = []
        for name in SECTIONS:
            lines = _lines(getattr(self, name))
            if len(lines) > LINES:
                lines = [*lines[: LINES - 1], f"... and {len(lines) - LINES + 1} more lines"]
            out += [f"{name:8} {line}" for line in lines]
        return "\n".join(out)

    __repr__ = __str__


def _lines(entries: Sequence[Entry]) -> list[str]:
    """Entries in few lines: slots and parameters with the same reason together."""
    slots: dict[tuple[str, str], dict[str, int]] = defaultdict(dict)
    for entry in entries:
        if entry.parameter is not None:
            held = slots[entry.reason, entry.parameter]
            held[entry.slot] = held.get(entry.slot, 0) + entry.elements
    groups: dict[tuple[str, tuple[str, ...]], list[tuple[str, int]]] = defaultdict(list)
    for (reason, parameter), held in slots.items():
        groups[reason, tuple(held)].append((parameter, sum(held.values())))
    out = []
    for (reason, names), members in groups.items():
        total = sum(size for _, size in members)
        amount = f"{total / 1e6:,.1f} M" if total >= 1e6 else f"{total:,}"
        whose = [parameter for parameter, _ in members if parameter]
        whose = f"{len(members)} parameters" if len(whose) > 3 else listed(whose) or "the parameter"
        elements = "1 element" if total == 1 else f"{amount} elements"
        out.append(f"{listed(names)} of {whose} ({elements})" + (f": {reason}" if reason else ""))
    scalars: dict[str, list[str]] = defaultdict(list)
    for entry in entries:
        if entry.parameter is None:
            scalars[entry.reason].append(entry.name)
    return out + [f"{listed(names)}: {reason}" if reason else listed(names) for reason, names in scalars.items()]


def listed(names: Iterable[str]) -> str:
    """Names with commas between them."""
    return ", ".join(names)
