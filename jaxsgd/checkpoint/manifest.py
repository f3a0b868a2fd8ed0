"""The files of one checkpoint: which they are, whether they still are what was written, and how they go away.

Knows of directories and bytes only.
"""

from __future__ import annotations

import concurrent.futures
import hashlib
import json
import math
import os
import pathlib
import re
import shutil
from typing import NamedTuple

__all__ = ["Found", "clear_partial", "damage", "find", "inspect", "remove", "seal"]

MANIFEST = "jaxsgd-manifest"
PARTIAL = ".orbax-checkpoint-tmp"  # what Orbax appends to the name until all files are written
ASIDE = "replaced"


class Found(NamedTuple):
    """One directory that is named after a step.

    Attributes:
      path: the directory.
      step: its name.
      serial: counts the saves into the directory, so that the last written is known; infinite where nothing tells it.
      files: of a complete checkpoint ``{name: [bytes, sha256]}``, else None.
      fault: why it is not complete, else None.
      metric: the number it was saved with, or None.
    """

    path: pathlib.Path
    step: int
    serial: float = math.inf
    files: dict[str, list] | None = None
    fault: str | None = None
    metric: float | None = None


def find(directory: pathlib.Path) -> list[Found]:
    """All checkpoints, complete or not, the last written first."""
    paths = [*directory.glob("*"), *directory.glob(f"{ASIDE}/*")]
    found = [inspect(path) for path in paths if re.fullmatch(r"\d+", path.name)]
    return sorted(found, key=lambda each: (each.serial, each.step), reverse=True)


def inspect(path: pathlib.Path) -> Found:
    """The contents of a directory's manifest. The files themselves are looked at by `damage`."""
    step = int(path.name)
    try:
        text = (path / MANIFEST).read_bytes()
    except OSError as error:
        cut = isinstance(error, FileNotFoundError)
        return Found(path, step, fault=f"no {MANIFEST}: the save was cut short" if cut else str(error))
    # Exactly the digest, a line feed, and what it is the digest of, so that no byte can change unseen.
    if text[:65] != _sha256(text[65:]).encode() + b"\n":
        return Found(path, step, fault=f"{MANIFEST} is damaged: its checksum differs")
    about = json.loads(text[65:])
    if about["step"] != step:
        return Found(path, step, fault=f"{MANIFEST} is that of step {about['step']}")
    return Found(path, step, about["serial"], about["files"], metric=about.get("metric"))


def damage(found: Found) -> str | None:
    """Read every file of a complete checkpoint and say which is not what was saved; None if all are."""

    def look(item: tuple[str, list]) -> str | None:
        name, (size, digest) = item
        try:
            here = (found.path / name).stat().st_size
            if here != size:
                return f"{name} has {here} bytes instead of {size}"
            return None if _file_sha256(found.path / name) == digest else f"{name} is damaged: its checksum differs"
        except FileNotFoundError:
            return f"{name} is missing"
        except OSError as error:
            return f"{name} cannot be read: {error}"

    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        return next(filter(None, pool.map(look, (found.files or {}).items())), None)


def seal(path: pathlib.Path, step: int, serial: int, metric: float | None = None) -> None:
    """Bring every file to the disk, then write the manifest: from here on the checkpoint is complete."""

    def settle(file: pathlib.Path) -> tuple[str, list]:
        _sync(file)
        return str(file.relative_to(path)), [file.stat().st_size, _file_sha256(file)]

    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        files = dict(pool.map(settle, sorted(file for file in path.rglob("*") if file.is_file())))
    for folder in [*(each for each in path.rglob("*") if each.is_dir()), path, path.parent]:
        _sync(folder)
    body = json.dumps({"step": step, "serial": serial, "metric": metric, "files": files}, indent=1).encode()
    draft = path / f"{MANIFEST}.draft"
    draft.write_bytes(_sha256(body).encode() + b"\n" + body)
    _sync(draft)
    draft.rename(path / MANIFEST)
    _sync(path)


def remove(directory: pathlib.Path, found: Found) -> None:
    """Delete one checkpoint of ``directory``. Killed in the middle, it leaves what `clear_partial` clears."""
    if found.path.exists():
        doomed = directory / f"{found.step}{PARTIAL}"
        shutil.rmtree(doomed, ignore_errors=True)
        found.path.rename(doomed)
        shutil.rmtree(doomed, ignore_errors=True)


def clear_partial(directory: pathlib.Path) -> None:
    """Delete what saves and deletions that were killed left behind."""
    for path in directory.glob(f"*{PARTIAL}"):
        if path.name.removesuffix(PARTIAL).isdecimal():
            shutil.rmtree(path, ignore_errors=True)


def _sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def _file_sha256(path: pathlib.Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _sync(path: pathlib.Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
