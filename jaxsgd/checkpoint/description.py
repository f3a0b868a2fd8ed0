"""The contents of a checkpoint, from its table alone: no array is read."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import jax.numpy as jnp

from jaxsgd.migration.names import Leaves
from jaxsgd.paths import aligned

__all__ = ["Description", "LeafInfo", "described"]

SHOWN = 40
"""The most leaves that a printed description has."""


@dataclass(frozen=True)
class LeafInfo:
    """One array of a checkpoint.

    Attributes:
      name: its path in the state, joined by ``/``.
      shape, dtype: as saved.
      bytes: in memory.
    """

    name: str
    shape: tuple[int, ...]
    dtype: str
    bytes: int


@dataclass(frozen=True, repr=False)
class Description:
    """The contents of a checkpoint; ``print(description)`` shows it.

    Attributes:
      step: completed steps.
      data: the position in the data, as saved.
      metric: the metric it was saved with, or None.
      steps: the steps of all complete checkpoints of the directory, oldest first.
      metrics: step -> metric, of those that have one.
      leaves: every array.
      optimizer: for each transformation with a state of its own, by its path in ``opt_state``: the slots it keeps for
        parameters and its scalars. Empty for a state without ``opt_state``.
      averages: the parameters that have an averaged twin (``restore_params(averaged=True)``).
      files: bytes on the disk.
    """

    step: int
    data: Any
    metric: float | None
    steps: tuple[int, ...]
    metrics: dict[int, float]
    leaves: tuple[LeafInfo, ...]
    optimizer: dict[str, tuple[str, ...]]
    averages: tuple[str, ...]
    files: int

    @property
    def bytes(self) -> dict[str, int]:
        """The bytes in memory of each part: ``{"params": 421642, "opt_state": ...}``."""
        out: dict[str, int] = {}
        for leaf in self.leaves:
            part = leaf.name.partition("/")[0]
            out[part] = out.get(part, 0) + leaf.bytes
        return out

    def __str__(self) -> str:
        metric = "" if self.metric is None else f", metric {self.metric:.6g}"
        lines = [f"step {self.step} of {list(self.steps)}{metric}, {self.files:,} bytes on the disk"]
        lines += [f"data: {self.data}"] * (self.data is not None)
        lines += [f"{part}: {size:,} bytes" for part, size in self.bytes.items()]
        lines += [f"optimizer {path or '(top)'}: {', '.join(names)}" for path, names in self.optimizer.items()]
        lines += [f"averages of {len(self.averages)} parameters"] * bool(self.averages)
        rows = [[leaf.name, f"{leaf.dtype}{list(leaf.shape)}", f"{leaf.bytes:,}"] for leaf in self.leaves[:SHOWN]]
        lines += aligned([["leaf", "type", "bytes"], *rows]).splitlines()
        lines += [f"and {len(self.leaves) - SHOWN} more"] * (len(self.leaves) > SHOWN)
        return "\n".join(lines)

    __repr__ = __str__


@dataclass(frozen=True)
class _Saved:
    shape: tuple[int, ...]
    dtype: Any


def described(
    about: dict[str, Any], steps: list[int], metrics: dict[int, float], metric: float | None, files: int
) -> Description:
    """The description of the checkpoint that ``about`` was saved with."""
    leaves, saved = [], {}
    for name, row in about["leaves"].items():
        shape, raw = tuple(row["shape"]), row["stored"]
        size = math.prod(raw["shape"]) * jnp.dtype(raw["dtype"]).itemsize
        leaves.append(LeafInfo(name, shape, row["dtype"], size))
        saved[name] = _Saved(tuple(raw["shape"]), jnp.dtype(raw["dtype"]))
    params, opt_state = (_below(saved, part) for part in ("params", "opt_state"))
    optimizer: dict[str, tuple[str, ...]] = {}
    if params and opt_state:
        known = Leaves(opt_state, params)
        for path in sorted({*known.kinds, *known.scalars}):
            optimizer[path] = (*sorted(known.kinds.get(path, ())), *known.scalars.get(path, ()))
    averages = tuple(about.get("averages", ()))
    return Description(
        about["step"], about["data"], metric, tuple(steps), metrics, tuple(leaves), optimizer, averages, files
    )


def _below(leaves: dict[str, Any], part: str) -> dict[str, Any]:
    named = {name.partition("/") for name in leaves}
    return {rest: leaves[f"{first}/{rest}" if slash else first] for first, slash, rest in named if first == part}
