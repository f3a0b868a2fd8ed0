"""The answer: a `Plan`, what bounds its time, and what would make it fit."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

from jaxsgd.planning.devices import Device
from jaxsgd.planning.reading import Buffer, Collective, Reading
from jaxsgd.report import Column, Report, Table, bytes_text, number

__all__ = ["Bound", "Plan", "Suggestion", "human"]

GRADIENTS = "gradients (estimate)"
REST = "activations and other temporaries"
SCRATCH = "copies inside kernels (estimate)"


human = bytes_text


class Suggestion(NamedTuple):
    """A change that takes less memory.

    Attributes:
      what: the change, a phrase.
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

    It leaves out all other work and all waiting, so it is no prediction.

    Attributes:
      compute: ``flops`` at the rates of the device.
      memory: ``bytes`` at its bandwidth; a cache can make this one smaller.
      link: ``wire`` bytes sent at the speed of all its links together.
      host: the bytes that come from the host at the speed of its link, while as many go back. 0 if it is not known.
    """

    in_dict: ClassVar[tuple[str, ...]] = ("seconds", "by")

    compute: float
    memory: float
    link: float
    host: float = 0.0

    @property
    def seconds(self) -> float:
        return max(self.compute, self.memory, self.link, self.host)

    @property
    def by(self) -> str:
        """The name of the largest."""
        times = {"compute": self.compute, "memory": self.memory, "link": self.link, "host": self.host}
        return max(times, key=lambda name: times[name])

    @classmethod
    def of(cls, reading: Reading, device: Device, host_bytes: int = 0) -> Bound | None:
        """The bound for what a program does; None for a device whose speed is not known."""
        if device.bandwidth is None or device.link is None:
            return None
        slowest = min(device.flops.values())
        compute = sum(flops / device.flops.get(_rate(dtype), slowest) for dtype, flops in reading.flops.items())
        wire = sum(c.wire for c in reading.collectives.values())
        host = host_bytes / device.host_link if device.host_link is not None else 0.0
        return cls(compute, reading.bytes / device.bandwidth, wire / device.link, host)


def _rate(dtype: str) -> str:
    return "bf16" if dtype in ("bf16", "f16") else "f32"


@dataclass(frozen=True, repr=False)
class Plan(Report):
    """The cost of a train step on hardware, by its own compiler. All bytes are of one device.

    Attributes:
      label: what it is called in tables.
      topology, description, devices, mesh: what it was compiled for.
      device: one of the devices, see `jaxsgd.planning.devices.Device`.
      settings: what was asked for: ``zero1``, ``accumulate``, ``offload``.
      parameters: how many numbers are trained.
      fits: whether the device has the memory.
      needs, available: bytes needed, and there; `headroom` is the difference.
      parts: ``needs`` in parts. ``"gradients (estimate)"`` is an array like each parameter, sharded like its moments.
        ``"state: mu"`` and so on are the slots, beside ``"params"``, ``"state: other"`` and ``"batch"``. On a CPU one
        part is the copies of one kernel that the compiler does not count. The rest is activations and other
        temporaries, padding, and the program itself.
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
      host_bytes: of the optimizer's state, what the host keeps between steps. ``parts`` has them only on a CPU, whose
        memory is the host's.
    """

    picture = "memory_bars"
    in_dict = ("fits", "headroom", "state_bytes", "host_traffic")

    label: str
    topology: str
    description: str
    devices: int
    device: Device
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
    largest: tuple[Buffer, ...] = ()
    suggestions: tuple[Suggestion, ...] = ()
    notes: tuple[str, ...] = ()
    host_bytes: int = 0

    @property
    def host_traffic(self) -> int:
        """Bytes that a step moves between the device and its host: the slots there, and the new ones back."""
        return 2 * self.host_bytes

    @property
    def fits(self) -> bool:
        return self.needs <= self.available

    @property
    def headroom(self) -> int:
        """Bytes left; below 0 where it does not fit."""
        return self.available - self.needs

    @property
    def state_bytes(self) -> int:
        """Bytes of the optimizer's state in the device's memory."""
        return sum(size for name, size in self.parts.items() if name.startswith("state: "))

    # -- the report ---------------------------------------------------------------------------------

    @property
    def summary(self) -> str:
        """Whether it fits, in a sentence."""
        each = "" if self.devices == 1 else f" on each of {self.devices} devices"
        needs = f"needs {human(self.needs)}, has {human(self.available)}{each}"
        if self.fits:
            return f"{self.label} fits: {needs}, {human(self.headroom)} to spare"
        return f"{self.label} does not fit: {needs}, {human(-self.headroom)} short"

    @property
    def why(self) -> tuple[str, ...]:
        axes = " x ".join(f"{name}={size}" for name, size in self.mesh.items())
        asked = "".join(f", {name} {value}" for name, value in self.settings.items() if value not in (None, 1))
        out = [f"{self.parameters:,} parameters on {self.description}, mesh {axes}{asked}"]
        if not self.fits and self.largest:
            shown = ", ".join(f"{b.shape} {human(b.bytes)} ({_short(b.what)})" for b in self.largest[:4])
            out.append(f"the largest arrays are {shown}")
        if self.bound is not None:
            out.append(
                f"a step takes at least {number(self.bound.seconds * 1e3)} ms, bound by {self.bound.by}; no prediction"
            )
        if self.host_bytes:
            which = "one memory here, counted above" if self.device.platform == "cpu" else "not counted above"
            out.append(
                f"the host keeps {human(self.host_bytes)} of the optimizer's state ({which}); "
                f"a step moves {human(self.host_traffic)} between host and device"
            )
        return (*out, *self.notes)

    @property
    def next(self) -> tuple[str, ...]:
        return tuple(
            f"{s.what}: needs {human(s.needs)}, {'which fits' if s.fits else 'still too much'} ({s.how})"
            for s in self.suggestions
        )

    @property
    def table(self) -> Table:
        """The bytes of a device by what they are for."""
        columns = (
            Column("bytes on a device", kind="text"),
            Column("size", kind="bytes"),
            Column("share", kind="share"),
        )
        rows = [(name, size, size / max(self.needs, 1)) for name, size in self.parts.items()]
        return Table(columns, (*rows, ("all", self.needs, 1.0)))

    @property
    def details(self) -> tuple[Table | str, ...]:
        """The compiler's account, operations, traffic, transfers and what bounds the time."""
        account = {
            "arguments": self.argument, "temporaries": self.temporary, "outputs": self.output,
            "outputs aliased to arguments": self.alias, "program": self.code, "peak": self.peak,
        }  # fmt: skip
        known = tuple((name, size) for name, size in account.items() if size is not None)
        wire = sum(c.wire for c in self.collectives.values())
        work = [(f"{dtype} operations of matrix products", number(float(count))) for dtype, count in self.flops.items()]
        work += [("bytes moved in memory", human(self.hbm_bytes))]
        work += [(f"{kind} kernels", number(count)) for kind, count in self.kernels.items()]
        work += [
            (f"{kind} between devices", f"{c.count}, together {human(c.bytes)}") for kind, c in self.collectives.items()
        ]
        if not self.collectives:
            work += [("between devices", "nothing")]
        work += [("compile time", f"{number(self.compile_seconds)} s")]
        parts = [
            Table((Column("the compiler's account", kind="text"), Column("size", kind="bytes")), known),
            Table((Column("a step on a device", kind="text"), Column("amount")), tuple(work)),
        ]
        if self.bound is not None and self.device.bandwidth and self.device.link:
            rates = "/".join(f"{dtype} {number(rate)}" for dtype, rate in self.device.flops.items())
            rows = (
                ("compute", self.bound.compute * 1e3, f"at {rates} operations/s"),
                ("memory", self.bound.memory * 1e3, f"at {number(self.device.bandwidth)} bytes/s"),
                ("link", self.bound.link * 1e3, f"{human(wire)} at {number(self.device.link)} bytes/s"),
            )
            if self.host_bytes and self.device.host_link:
                each = f"{human(self.host_bytes)} each way at {number(self.device.host_link)} bytes/s"
                rows += (("host", self.bound.host * 1e3, each),)
            columns = (Column("bound", kind="text"), Column("time", "ms"), Column("from", kind="text"))
            best = [row[0] for row in rows].index(self.bound.by)
            parts.append(Table(columns, rows, best, f"the bound; datasheet: {self.device.source}"))
        if self.largest:
            columns = (Column("array", kind="text"), Column("size", kind="bytes"), Column("where", kind="text"))
            parts.append(Table(columns, tuple((b.shape, b.bytes, _short(b.what)) for b in self.largest)))
        return tuple(parts)


def _short(text: str) -> str:
    """The end of a long name."""
    text = text.removeprefix("jit(_counted)/")
    return text if len(text) <= 60 else "..." + text[-57:]
