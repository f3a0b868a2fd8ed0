"""The cost of a compiled program: memory, arithmetic, traffic, kernels and transfers, on each device."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from jaxsgd.planning.hlo import COLLECTIVES, FREE, VIEWS, Instruction, Program, carries, shapes

__all__ = ["Buffer", "Collective", "Memory", "Reading", "read", "read_text"]

LIBRARY = '"__ynn_fusion"'
"""The mark of a fusion that XLA for the CPU gives to the YNNPACK library."""


class Buffer(NamedTuple):
    """One large array: its bytes, its shape, and what it is."""

    bytes: int
    shape: str
    what: str


class Collective(NamedTuple):
    """The transfers of a kind in one run.

    Attributes:
      count: how many.
      bytes: of the arrays, each whole.
      wire: bytes that a device sends at least: ``(n - 1) / n`` of the whole among ``n`` devices, twice that for an
        all-reduce.
    """

    count: int
    bytes: float
    wire: float


@dataclass(frozen=True)
class Memory:
    """Bytes on a device, as the compiler states them.

    Attributes:
      arguments, outputs, temporaries, code: of each. The TPU compiler counts among the temporaries those in the
        memory of donated arguments.
      aliased: of the outputs, what takes the memory of donated arguments.
      peak: the most that is in use at once, without what the host keeps; on a CPU without the temporaries.
    """

    arguments: int
    outputs: int
    aliased: int
    temporaries: int
    code: int
    peak: int

    def needs(self, platform: str) -> int:
        """The bytes that a device needs. On TPU that is the peak, which its compiler compares with the memory; else all
        that is allocated."""
        whole = self.arguments + self.outputs - self.aliased + self.temporaries + self.code
        return self.peak if platform == "tpu" else max(self.peak, whole)


@dataclass(frozen=True)
class Reading:
    """The cost of one run on a device.

    Attributes:
      memory: see `Memory`; None where the compiler gave up before it was laid out.
      flops: operations of matrix products and convolutions by the type multiplied: ``{"bf16": 2e13}``.
      bytes: read from and written to the device's memory, as far as kernels do it; loops as often as they run.
      kernels: in the entry computation by kind: ``{"fusion": 12, "copy": 1}``; those on scalars alone count as
        ``"scalar"``, and a loop as one.
      collectives: transfers between devices by kind.
      buffers: the largest arrays that are made, largest first.
      scratch: bytes that one kernel allocates by itself on a CPU, which its compiler does not count: those of the
        largest, see `scratch`.
    """

    memory: Memory | None
    flops: Mapping[str, float]
    bytes: float
    kernels: Mapping[str, int]
    collectives: Mapping[str, Collective]
    buffers: tuple[Buffer, ...] = field(repr=False, default=())
    scratch: int = 0


def read(compiled: Any) -> Reading:
    """The cost of a `jax.stages.Compiled`."""
    used = compiled.memory_analysis()
    memory = Memory(
        used.argument_size_in_bytes,
        used.output_size_in_bytes,
        used.alias_size_in_bytes,
        used.temp_size_in_bytes,
        used.generated_code_size_in_bytes,
        used.peak_memory_in_bytes - used.host_argument_size_in_bytes,  # the compiler counts them as if on the device
    )
    return read_text(compiled.as_text(), memory)


def read_text(text: str, memory: Memory | None = None) -> Reading:
    """The same of a compiled program as text."""
    program = Program(text)
    totals = program.totals()
    grouped: dict[str, Collective] = {}
    for (kind, _), (count, size, wire) in sorted(totals.collectives.items()):
        before = grouped.get(kind, Collective(0, 0.0, 0.0))
        grouped[kind] = Collective(before.count + round(count), before.bytes + size, before.wire + wire)
    large = tuple(buffers(program))
    return Reading(memory, dict(totals.flops), totals.bytes, kernels(program), grouped, large, scratch(program))


def kernels(program: Program) -> dict[str, int]:
    """The number of kernels that the entry computation starts, by kind, without transfers between devices."""
    entry = program.computations.get(program.entry, {})
    out: Counter[str] = Counter()
    for i in entry.values():
        kind = i.opcode.removesuffix("-start")
        if kind == "while":
            out[kind] += 1
        elif i.opcode in FREE or i.opcode.endswith("-done") or kind in COLLECTIVES or carries(i):
            continue
        elif all(not s.dims for name in (i.name, *i.operands) if name in entry for s in shapes(entry[name].shape)):
            out["scalar"] += 1
        else:
            out[kind] += 1
    return dict(sorted(out.items()))


def buffers(program: Program, most: int = 8) -> list[Buffer]:
    """The largest arrays that kernels make, each once; what a fusion keeps to itself is none."""
    fused = {i.attribute("calls") for c in program.computations.values() for i in c.values() if i.opcode == "fusion"}
    found: dict[tuple[str, str], Buffer] = {}
    for name, computation in program.computations.items():
        if name in fused:
            continue
        for i in computation.values():
            if i.opcode in FREE - {"copy-done"} or i.opcode.endswith(("-start", "-update")):
                continue
            for s in shapes(i.shape):
                if not s.near and s.dims:
                    found.setdefault((s.text, i.label), Buffer(s.size, s.text, i.label))
    return sorted(found.values(), key=lambda b: (-b.bytes, b.shape, b.what))[:most]


def scratch(program: Program) -> int:
    """Bytes of the arrays that the largest kernel of a CPU allocates by itself, an estimate.

    A convolution copies its padded input and its kernel. A fusion of the YNNPACK library computes an operand of a
    matrix product itself, such as a softmax before its product with the values. It allocates that operand.
    """
    found = [0]
    for computation in program.computations.values():
        for i in computation.values():
            if i.opcode == "convolution":
                found.append(_padded(computation, i))
            elif i.opcode == "fusion" and LIBRARY in i.rest:
                found.append(_operands_inside(program.computations.get(i.attribute("calls"), {})))
    return max(found)


def _padded(computation: Mapping[str, Instruction], i: Instruction) -> int:
    """Bytes of the padded input and the kernel of a convolution."""
    labels = re.search(r"dim_labels=(\w+)_", i.rest)
    if labels is None or any(name not in computation for name in i.operands):
        return 0
    left, right = (shapes(computation[name].shape)[0] for name in i.operands[:2])
    said = re.search(r"\bpad=([\d_x\-]+)", i.rest)
    pads = [sum(map(int, p.split("_"))) for p in said[1].split("x")] if said else []
    dims = list(left.dims)
    for axis, pad in enumerate(pads):
        dims[labels[1].index(str(axis))] += pad
    return left._replace(dims=tuple(dims)).size + right.size


def _operands_inside(computation: Mapping[str, Instruction]) -> int:
    """Bytes of the operands of matrix products that a fusion computes, each operand once."""
    made: dict[str, int] = {}
    for product in (i for i in computation.values() if i.opcode == "dot"):
        for name in product.operands:
            i = computation.get(name)
            while i is not None and i.opcode in VIEWS | {"broadcast"} and i.operands:
                i = computation.get(i.operands[0])
            if i is not None and i.opcode not in ("parameter", "constant"):
                made[i.name] = sum(s.size for s in shapes(i.shape))
    return sum(made.values())
