"""The answer: a `Plan`, what bounds its time, and what would make it fit."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from jaxsgd.planning.devices import Device
from jaxsgd.planning.reading import Buffer, Collective, Reading

__all__ = ["Bound", "Plan", "Suggestion", "human"]

GRADIENTS = "gradients (estimate)"
REST = "activations and other temporaries"
SCRATCH = "copies inside kernels (estimate)"


def human(size: float) -> str:
    """Bytes in words: ``15.75 GiB``."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if abs(size) < 1024:
            return f"{size:.4g} {unit}" if unit != "B" else f"{size:.0f} B"
        size /= 1024
    return f"{size:,.4g} TiB"


def scientific(number: float) -> str:
    """A rate or a count: ``9.9e14``."""
    return f"{number:.3g}".replace("e+", "e")


class Suggestion(NamedTuple):
    """A change that takes less memory.

    Attributes:
      what: the change, in words.
      needs: bytes on a device with it.
      fits: whether the device has so many.
      how: ``"compiled"``, or ``"computed from the shapes of the state"``.
    """

    what: str
    needs: int
    fits: bool
    how: str


@dataclass(frozen=True)
class Bound:
    """A rough lower bound on the seconds of a step: a device cannot work, load or send faster than its datasheet says.

    What a step does besides, and what waits for what, is not in it: no prediction.

    Attributes:
      compute: ``flops`` at the rates of the device.
      memory: ``bytes`` at its bandwidth; a cache can make this one smaller.
      link: ``wire`` bytes sent at the speed of all its links together.
    """

    compute: float
    memory: float
    link: float

    @property
    def seconds(self) -> float:
        return max(self.compute, self.memory, self.link)

    @property
    def by(self) -> str:
        """Which of the three it is."""
        return max(("compute", self.compute), ("memory", self.memory), ("link", self.link), key=lambda x: x[1])[0]

    @classmethod
    def of(cls, reading: Reading, device: Device) -> Bound | None:
        """The bound for what a program does; None for a device whose speed is not known."""
        if device.bandwidth is None or device.link is None:
            return None
        slowest = min(device.flops.values())
        compute = sum(flops / device.flops.get(_rate(dtype), slowest) for dtype, flops in reading.flops.items())
        wire = sum(c.wire for c in reading.collectives.values())
        return cls(compute, reading.bytes / device.bandwidth, wire / device.link)


def _rate(dtype: str) -> str:
    return "bf16" if dtype in ("bf16", "f16") else "f32"


@dataclass(frozen=True)
class Plan:
    """What a train step takes on hardware, by its own compiler. All bytes are of one device.

    Attributes:
      label: what it is called in tables.
      topology, description, devices, mesh: what it was compiled for.
      device: one of the devices, see `jaxsgd.planning.devices.Device`.
      settings: what was asked for: ``zero1``, ``accumulate``.
      parameters: how many numbers are trained.
      fits: whether the device has the memory.
      needs, available: bytes needed, and there; `headroom` is the difference.
      parts: ``needs`` split: ``"params"``, ``"gradients (estimate)"`` (an array like each parameter, where its moments
        lie), ``"state: mu"`` and so on for each slot, ``"state: other"``, ``"batch"``, on a
        CPU what one kernel copies beyond the compiler's count, and the rest: activations and other temporaries,
        padding, the program itself.
      argument, temporary, output, alias, code, peak: the compiler's own account, see
        `jaxsgd.planning.reading.Memory`; None where it gave up before.
      flops: of matrix products and convolutions, by type.
      hbm_bytes: moved between memory and cores.
      kernels: in the entry computation, by kind.
      collectives: transfers between devices by kind, see `jaxsgd.planning.reading.Collective`.
      bound: see `Bound`; None on the CPU.
      compile_seconds: how long the compiler took.
      largest: the largest arrays: of the state, and that the program makes.
      suggestions: where it does not fit, what would take less.
      notes: what else there is to say.
    """

    label: str
    topology: str
    description: str
    devices: int
    device: Device = field(repr=False)
    mesh: Mapping[str, int]
    settings: Mapping[str, Any]
    parameters: int
    needs: int
    available: int
    parts: Mapping[str, int]
    argument: int
    temporary: int | None
    output: int | None
    alias: int | None
    code: int | None
    peak: int | None
    flops: Mapping[str, float]
    hbm_bytes: float
    kernels: Mapping[str, int]
    collectives: Mapping[str, Collective]
    bound: Bound | None
    compile_seconds: float
    largest: tuple[Buffer, ...] = field(repr=False, default=())
    suggestions: tuple[Suggestion, ...] = ()
    notes: tuple[str, ...] = ()

    @property
    def fits(self) -> bool:
        return self.needs <= self.available

    @property
    def headroom(self) -> int:
        """Bytes left; below 0 where it does not fit."""
        return self.available - self.needs

    @property
    def state_bytes(self) -> int:
        """Bytes of the optimizer's state."""
        return sum(size for name, size in self.parts.items() if name.startswith("state: "))

    @property
    def verdict(self) -> str:
        """Whether it fits, in a sentence."""
        if self.fits:
            return f"fits: needs {human(self.needs)}, has {human(self.available)}, {human(self.headroom)} to spare"
        shown = ", ".join(f"{b.shape} {human(b.bytes)} ({_short(b.what)})" for b in self.largest[:4])
        text = f"does not fit: needs {human(self.needs)}, has {human(self.available)}"
        if shown:
            text += f"; the largest are {shown}"
        tries = "; ".join(
            f"{s.what}: with it {human(s.needs)}, {'which fits' if s.fits else 'still too much'} ({s.how})"
            for s in self.suggestions
        )
        return f"{text}; try {tries}" if tries else text

    def __str__(self) -> str:
        axes = " x ".join(f"{name}={size}" for name, size in self.mesh.items())
        asked = "".join(f", {name} {value}" for name, value in self.settings.items() if value not in (None, 1))
        lines = [
            f"{self.label}: {self.parameters:,} parameters on {self.description}, mesh {axes}{asked}",
            self.verdict,
        ]
        lines += ["", "bytes on a device"]
        lines += [
            f"  {name:<34} {human(size):>12}  {size / max(self.needs, 1):>6.1%}" for name, size in self.parts.items()
        ]
        account = {
            "arguments": self.argument, "temporaries": self.temporary, "outputs": self.output,
            "of them aliased": self.alias, "program": self.code, "peak": self.peak,
        }  # fmt: skip
        known = ", ".join(f"{name} {human(size)}" for name, size in account.items() if size is not None)
        lines += [f"  as the compiler counts: {known}"]
        flops = ", ".join(f"{scientific(count)} {dtype}" for dtype, count in self.flops.items()) or "none"
        lines += ["", f"operations of matrix products: {flops}", f"bytes moved in memory: {human(self.hbm_bytes)}"]
        lines += ["kernels: " + (", ".join(f"{count} {kind}" for kind, count in self.kernels.items()) or "none")]
        sent = ", ".join(f"{c.count} {kind} of {human(c.bytes)}" for kind, c in self.collectives.items())
        lines += [f"between devices: {sent or 'nothing'}"]
        if self.bound is not None:
            lines += [self._bound_line(self.bound)]
        lines += [f"compiled in {self.compile_seconds:.1f} s", *self.notes]
        return "\n".join(lines)

    def _bound_line(self, bound: Bound) -> str:
        wire = sum(c.wire for c in self.collectives.values())
        rates = "/".join(f"{dtype} {scientific(rate)}" for dtype, rate in self.device.flops.items())
        return (
            f"bound: a step takes at least {bound.seconds * 1e3:,.2f} ms, by {bound.by} (compute "
            f"{bound.compute * 1e3:,.2f} ms at {rates} operations/s; memory {bound.memory * 1e3:,.2f} ms at "
            f"{scientific(self.device.bandwidth or math.nan)} bytes/s; link {bound.link * 1e3:,.2f} ms for "
            f"{human(wire)} at {scientific(self.device.link or math.nan)} bytes/s)"
        )

    def to_dict(self) -> dict[str, Any]:
        """All of it, for JSON."""
        bound = None
        if self.bound is not None:
            bound = {
                "seconds": self.bound.seconds, "by": self.bound.by, "compute": self.bound.compute,
                "memory": self.bound.memory, "link": self.bound.link,
                "inputs": {
                    "flops": dict(self.flops), "flops_per_second": dict(self.device.flops),
                    "bytes": self.hbm_bytes, "bytes_per_second": self.device.bandwidth,
                    "wire_bytes": sum(c.wire for c in self.collectives.values()),
                    "link_bytes_per_second": self.device.link,
                },
            }  # fmt: skip
        return {
            "label": self.label, "topology": self.topology, "description": self.description, "devices": self.devices,
            "source": self.device.source, "mesh": dict(self.mesh), "settings": dict(self.settings),
            "parameters": self.parameters, "fits": self.fits, "needs": self.needs, "available": self.available,
            "headroom": self.headroom, "parts": dict(self.parts), "argument": self.argument,
            "temporary": self.temporary, "output": self.output, "alias": self.alias, "code": self.code,
            "peak": self.peak, "flops": dict(self.flops), "hbm_bytes": self.hbm_bytes, "kernels": dict(self.kernels),
            "collectives": {kind: c._asdict() for kind, c in self.collectives.items()}, "bound": bound,
            "compile_seconds": self.compile_seconds, "largest": [b._asdict() for b in self.largest],
            "suggestions": [s._asdict() for s in self.suggestions], "notes": list(self.notes), "verdict": self.verdict,
        }  # fmt: skip


def _short(text: str) -> str:
    """The end of a long name."""
    text = text.removeprefix("jit(_counted)/")
    return text if len(text) <= 60 else "..." + text[-57:]
