"""A progress bar for what takes longer than one wants to wait in silence.

Drawn by rich.
"""

from __future__ import annotations

import sys
import time
from typing import Any

__all__ = ["Bar"]

PATIENCE = 2.0
"""Seconds before a bar appears."""


class Bar:
    """A bar on the standard error that appears after two seconds of work, and only on a terminal or in a notebook::

        with Bar("sweep", total=1000) as bar:
            bar.advance(10, "loss 0.31")

    Args:
      title: what is being done.
      total: units of work.
      show: True or False; by default, where the standard error is a terminal or a notebook.
    """

    def __init__(self, title: str, total: float, show: bool | None = None) -> None:
        self.title, self.total = title, total
        self.show = _watched() if show is None else show
        self._done, self._said = 0.0, ""
        self._begin = time.perf_counter()
        self._progress: Any = None
        self._task: Any = None

    def __enter__(self) -> Bar:
        return self

    def __exit__(self, *_: object) -> None:
        if self._progress is not None:
            self._progress.stop()

    def advance(self, amount: float = 1, saying: str = "") -> None:
        """So much more is done; ``saying`` stands beside the bar."""
        self._done += amount
        self._said = saying or self._said
        if not self.show:
            return
        if self._progress is None:
            if time.perf_counter() - self._begin < PATIENCE:
                return
            self._progress = self._made()
        self._progress.update(self._task, completed=min(self._done, self.total), said=self._said)

    def _made(self) -> Any:
        from rich.console import Console
        from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

        columns = (
            TextColumn("{task.description}"), BarColumn(bar_width=24), TextColumn("{task.percentage:3.0f}%"),
            TimeElapsedColumn(), TextColumn("left"), TimeRemainingColumn(), TextColumn("{task.fields[said]}"),
        )  # fmt: skip
        progress = Progress(*columns, console=Console(stderr=True))
        progress.start()
        self._task = progress.add_task(self.title, total=self.total, said=self._said)
        return progress


def _watched() -> bool:
    return sys.stderr.isatty() or "ipykernel" in sys.modules
