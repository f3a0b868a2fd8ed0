"""Accelerators as data, in devices.json, and the names that stand for several of them: ``"v5e:4x4"``, ``"h100:8"``.

Every number comes from public documents, which each entry names under ``source``.
"""

from __future__ import annotations

import functools
import json
import math
import os
import pathlib
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from jaxsgd.paths import nearest

__all__ = ["Device", "Topology", "known", "lookup"]

FORM = "'v5e:4x4' (a TPU slice), 'h100:8' (GPUs of one host), 'h100:2x8' (hosts x GPUs), 'cpu' or 'cpu:8'"


@dataclass(frozen=True)
class Device:
    """One device, as a program sees it.

    Attributes:
      name, title: how it is asked for, and what it is.
      platform: ``"tpu"``, ``"cuda"`` or ``"cpu"``.
      memory: bytes for programs: on TPU what the compiler leaves to them, on a GPU all that it has, on a CPU its part
        of the host's memory.
      bandwidth: bytes a second between memory and cores; None where it is not known.
      host_link: bytes a second between it and its host, each way. For a GPU that of PCIe in OpenXLA's target
        description; None where it is not known.
      link: bytes a second that it sends to other devices, over all its links; None where it is not known.
      flops: operation rate of matrix products by type, as JAX computes them by default: float32 in bfloat16 passes on
        TPU, in TF32 on a GPU. Empty where it is not known.
      source: the public documents that the numbers are from.
      most: the largest slice; empty where there is no limit.
      devices_per_chip: how many devices JAX sees in a chip.
      options: what the compiler's topology takes besides its shape.
      target: numbers of a GPU for its compiler.
    """

    name: str
    title: str
    platform: str
    memory: int
    bandwidth: float | None
    link: float | None
    flops: Mapping[str, float]
    source: str
    most: tuple[int, ...] = ()
    devices_per_chip: int = 1
    options: Mapping[str, Any] = field(default_factory=dict)
    target: Mapping[str, Any] = field(default_factory=dict)

    @property
    def host_link(self) -> float | None:
        return self.target.get("pcie_bandwidth")


@dataclass(frozen=True)
class Topology:
    """Several devices of a kind.

    Attributes:
      name: in its full form, such as ``"v5e:4x4"``.
      device: what each of them is.
      shape: chips of a TPU slice along its axes; ``(hosts, GPUs of a host)``; ``(devices,)`` of a CPU.
      count: devices in all.
    """

    name: str
    device: Device
    shape: tuple[int, ...]
    count: int


@functools.cache
def _entries() -> dict[str, Any]:
    return json.loads(pathlib.Path(__file__).with_name("devices.json").read_text())


def known() -> dict[str, Device]:
    """The accelerators by name. The CPU is `lookup`'s ``"cpu"``."""
    return {name: _device(name) for name in _entries()}


@functools.cache
def _device(name: str) -> Device:
    entry = {k: v for k, v in _entries()[name].items() if k != "aliases"}
    return Device(name=name, **{**entry, "most": tuple(entry.get("most", ()))})


def _cpu(count: int) -> Device:
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return Device("cpu", "CPU of this host", "cpu", memory // count, None, None, {}, "the operating system")


def lookup(topology: str) -> Topology:
    """The hardware of a name, which is a kind of device, a colon and a number.

    Args:
      topology: ``"v5e:4x4"``, ``"v5p:8x8x16"``, ``"h100:8"``, ``"h100:2x8"`` (hosts x GPUs), ``"cpu"``, ``"cpu:8"``;
        without a number one device.

    Raises:
      ValueError: an unknown kind (the nearest is named), a shape of another form or beyond the largest slice.
    """
    if not isinstance(topology, str):
        raise ValueError(f"topology={topology!r}: a name is needed, such as {FORM}")
    kind, _, given = topology.strip().lower().partition(":")
    names = {alias: name for name, entry in _entries().items() for alias in [name, *entry["aliases"]]}
    if kind != "cpu" and kind not in names:
        raise ValueError(f"topology={topology!r}: no such device{nearest(kind, [*names, 'cpu'])}; the form is {FORM}")
    if given and not re.fullmatch(r"[1-9]\d*(x[1-9]\d*)*", given) or topology.rstrip().endswith(":"):
        raise ValueError(f"topology={topology!r}: {given!r} is no shape; the form is {FORM}")
    sizes = tuple(int(size) for size in given.split("x")) if given else ()
    if kind == "cpu":
        if len(sizes) > 1:
            raise ValueError(f"topology={topology!r}: a CPU has devices in a row, such as 'cpu:8'")
        sizes = sizes or (1,)
        return Topology(f"cpu:{sizes[0]}" if sizes[0] > 1 else "cpu", _cpu(sizes[0]), sizes, sizes[0])
    device = _device(names[kind])
    if device.platform == "cuda":
        if len(sizes) > 2:
            raise ValueError(f"topology={topology!r}: GPUs are counted as '{kind}:8', or '{kind}:2x8' on two hosts")
        shape = sizes if len(sizes) == 2 else (1, *(sizes or (1,)))
        shown = "x".join(map(str, shape if shape[0] > 1 else shape[1:]))
        return Topology(f"{device.name}:{shown}", device, shape, math.prod(shape))
    rank = len(device.most)
    sizes = sizes or (1,) * rank
    if len(sizes) != rank:
        example = "x".join("4" * rank)
        raise ValueError(
            f"topology={topology!r}: a slice of {device.title} has {rank} axes, such as '{kind}:{example}'"
        )
    if any(size > most for size, most in zip(sorted(sizes), sorted(device.most), strict=True)):
        largest = "x".join(map(str, device.most))
        raise ValueError(f"topology={topology!r}: the largest slice of {device.title} is {kind}:{largest}")
    name = f"{device.name}:{'x'.join(map(str, sizes))}"
    return Topology(name, device, sizes, math.prod(sizes) * device.devices_per_chip)
