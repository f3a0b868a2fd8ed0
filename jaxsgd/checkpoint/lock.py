"""One run a directory: a file that names the run that saves there, and tells a live one from a dead one.

Knows of files and processes only.
"""

from __future__ import annotations

import contextlib
import json
import os
import pathlib
import socket
import threading
import time
import uuid
from collections.abc import Iterator
from typing import Any

try:
    import fcntl
except ImportError:  # not on Windows
    fcntl = None

__all__ = ["LOCK", "DirectoryInUse", "Lock"]

LOCK = ".jaxsgd-lock"
BEAT, LIMIT = 5.0, 60.0
"""Seconds between two signs of life, and after how many without one a run on another host counts as dead."""


class DirectoryInUse(RuntimeError):
    """Another run saves into the directory. The message names its process, its host and the lock's file."""


class Lock:
    """The right of one run to save into a directory, from `Lock` to `release`.

    On the same host the owner's process id and its start time decide whether it is alive. An owner on another host
    touches the file every 5 s. After 60 s without a touch the lock is stale.
    """

    def __init__(self, directory: pathlib.Path) -> None:
        """
        Raises:
          DirectoryInUse: a live run has it.
          OSError: nothing can be written into the directory.
        """
        self.path = directory / LOCK
        self.owner = _myself()
        draft = directory / f"{LOCK}.{self.owner['token']}"
        try:
            draft.write_text(json.dumps(self.owner))
            with _alone(directory):
                self._take(draft)
        finally:
            with contextlib.suppress(OSError):
                draft.unlink(missing_ok=True)
        self._stop = threading.Event()
        threading.Thread(target=_beat, args=(self.path, self.owner, self._stop), name=LOCK, daemon=True).start()

    def _take(self, draft: pathlib.Path) -> None:
        for _ in range(10):
            try:
                os.link(draft, self.path)  # fails if it is there, on network file systems too
                return
            except FileExistsError:
                pass
            except OSError:  # no hard links here
                with contextlib.suppress(FileExistsError), self.path.open("x") as file:
                    file.write(json.dumps(self.owner))
                    return
            now = draft.stat().st_mtime  # of the file system's clock, as the lock's own
            owner, age = _read(self.path), _age(self.path, now)
            if age is None:
                continue
            alive = _is_alive(owner)
            if alive or (alive is None and age < LIMIT):
                raise DirectoryInUse(_refusal(self.path, owner, alive, age))
            os.replace(draft, self.path)
            if self.is_mine:
                return
            draft.write_text(json.dumps(self.owner))
        raise DirectoryInUse(f"{self.path.parent}: several runs start here at once. Use one directory a run")

    @property
    def is_mine(self) -> bool:
        """Whether the file still names this run."""
        return (_read(self.path) or {}).get("token") == self.owner["token"]

    def check(self) -> None:
        """Raise if the lock is no longer this run's.

        Raises:
          DirectoryInUse: another run took it, after this one gave no sign of life for a minute; or it was deleted.
        """
        owner = _read(self.path)
        if owner is None and not self.path.exists():
            raise DirectoryInUse(f"{self.path} was deleted while this run saves there. Start the run again")
        if owner is None or owner["token"] != self.owner["token"]:
            raise DirectoryInUse(
                f"{self.path.parent}: the lock of this run was taken over by {_who(owner)}. Use one directory a run"
            )

    def release(self) -> None:
        """Give the directory back. In a forked child it does nothing: the lock is its parent's."""
        if os.getpid() != self.owner["pid"]:
            return
        self._stop.set()
        if self.is_mine:
            with contextlib.suppress(OSError):
                self.path.unlink()


def _beat(path: pathlib.Path, owner: dict[str, Any], stop: threading.Event) -> None:
    while not stop.wait(BEAT):
        if (_read(path) or {}).get("token") == owner["token"]:
            with contextlib.suppress(OSError):
                os.utime(path)


def _myself() -> dict[str, Any]:
    pid = os.getpid()
    place = {"host": socket.gethostname(), "boot": _boot(), "space": _space()}
    return {"pid": pid, **place, "started": _started(pid), "since": time.time(), "token": uuid.uuid4().hex}


def _is_alive(owner: dict[str, Any] | None) -> bool | None:
    """Whether the owner's process is alive; None if that cannot be seen from here."""
    if owner is None or owner["host"] != socket.gethostname() or os.name == "nt":
        return None
    if owner["boot"] != _boot():
        # The host was started again. Of two hosts of one name nothing is known, as on those that name no boot.
        return None if None in (owner["boot"], _boot()) else False
    if owner["space"] != _space():
        return None  # another container: its process ids mean nothing here
    try:
        os.kill(owner["pid"], 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass
    return _started(owner["pid"]) == owner["started"]


def _boot() -> str | None:
    with contextlib.suppress(OSError):
        return pathlib.Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    return None


def _space() -> str | None:
    with contextlib.suppress(OSError):
        return os.readlink("/proc/self/ns/pid")
    return None


def _started(pid: int) -> str | None:
    """When a process started, so that a later one of the same id is another; "dead" of one that only waits to be
    collected; None where it cannot be seen."""
    try:
        fields = pathlib.Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except FileNotFoundError:
        return "dead" if pathlib.Path("/proc/self/stat").exists() else None
    except OSError:
        return None
    return "dead" if fields[0] in "ZX" else fields[19]


def _read(path: pathlib.Path) -> dict[str, Any] | None:
    try:
        owner = json.loads(path.read_text())
        return owner if isinstance(owner, dict) and {"pid", "host", "token"} <= owner.keys() else None
    except (OSError, ValueError):
        return None


def _age(path: pathlib.Path, now: float) -> float | None:
    try:
        return now - path.stat().st_mtime
    except OSError:
        return None


def _who(owner: dict[str, Any] | None) -> str:
    if owner is None:
        return "a run that cannot be read"
    since = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(owner["since"]))
    return f"process {owner['pid']} on host {owner['host']!r}, since {since}"


def _refusal(path: pathlib.Path, owner: dict[str, Any] | None, alive: bool | None, age: float) -> str:
    text = f"directory={str(path.parent)!r}: another run saves there ({_who(owner)}). "
    if owner is not None and owner["pid"] == os.getpid() and alive:
        text += "It is this process: close its other Checkpoints first. "
    text += "Use another directory; to read only, call restore without `with`"
    if alive is None:
        text += (
            f". Its last sign of life is {max(age, 0):.0f} s old; after {LIMIT:.0f} s without one the lock counts as "
            f"stale. If you know that the run is dead, delete {path}"
        )
    return text


@contextlib.contextmanager
def _alone(directory: pathlib.Path) -> Iterator[None]:
    """Of several processes on this host that find a stale lock one after the other. On a file system without such
    locks this does nothing, and the reading after the writing decides."""
    if fcntl is None:
        yield
        return
    handle = os.open(directory, os.O_RDONLY)
    try:
        for _ in range(50):
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                time.sleep(0.1)
            except OSError:
                break
        yield
    finally:
        os.close(handle)
