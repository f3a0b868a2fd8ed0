"""The processes of one run, while they save: they wait for one another, and when one fails all raise at once."""

from __future__ import annotations

import itertools
import time
from typing import Any

import jax
from jax._src import distributed  # the store of names and texts that all processes share; jax exports none

__all__ = ["PeerError", "Peers"]

POLL = 0.05
_opened = itertools.count()


class PeerError(RuntimeError):
    """Another process of the run failed; the message says which and why."""


class Peers:
    """Messages between the processes of a run about a save. A single process gets its own answers.

    All processes make one at the same point of the program and call `begin` for the same saves.
    """

    def __init__(self) -> None:
        self.count, self.index = jax.process_count(), jax.process_index()
        self.root = f"jaxsgd/checkpoints/{next(_opened)}"
        self.save = 0

    def begin(self) -> None:
        """The next save: its messages are apart from those of the one before."""
        if self.count > 1 and self.index == 0 and self.save > 1:
            self._store.key_value_delete(f"{self.root}/{self.save - 2}/")
        self.save += 1

    def gather(self, stage: str, text: str, seconds: float = float("inf"), alert: bool = False) -> list[str]:
        """The text of each process at a stage of this save.

        Raises:
          PeerError: with ``alert``, as soon as a process called `fail`.
          TimeoutError: not all came here within ``seconds``.
        """
        if self.count == 1:
            return [text]
        place, end = f"{self.root}/{self.save}", time.monotonic() + seconds
        self._store.key_value_set(f"{place}/{stage}/{self.index}", text, allow_overwrite=True)
        while True:
            there = self._read(f"{place}/{stage}")
            if len(there) == self.count:
                return [there[index] for index in range(self.count)]
            failed = self._read(f"{place}/failed") if alert else {}
            if failed:
                index = min(failed)
                raise PeerError(f"process {index} of {self.count} failed: {failed[index]}")
            if time.monotonic() > end:
                absent = sorted(set(range(self.count)) - set(there))
                raise TimeoutError(f"after {seconds:.0f} s the processes {absent} had not come to {stage!r}")
            time.sleep(POLL)

    def barrier(self, *, key: str, timeout_ms: int) -> None:
        """The wait that Orbax does between writing and committing; it ends when any process fails."""
        self.gather(key.replace("/", "."), "", timeout_ms / 1000, alert=True)

    def fail(self, text: str) -> None:
        """End the waiting of the other processes for this one."""
        if self.count > 1:
            place = f"{self.root}/{self.save}/failed/{self.index}"
            self._store.key_value_set(place, text, allow_overwrite=True)

    def _read(self, place: str) -> dict[int, str]:
        return {int(name.rpartition("/")[2]): text for name, text in self._store.key_value_dir_get(f"{place}/")}

    @property
    def _store(self) -> Any:
        return distributed.global_state.client
