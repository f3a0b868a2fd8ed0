"""A compiled program as text, read: what it computes, moves and sends, loops counted as often as they run.

The compilers' own cost analysis counts the body of a loop once, and the CUDA compiler gives none.
"""

from __future__ import annotations

import functools
import itertools
import math
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

__all__ = ["Instruction", "Program", "Shape", "Totals", "shapes"]

BITS = {"pred": 8, "token": 0, "opaque": 0, "bf16": 16, "c64": 64, "c128": 128}
FREE = {
    "parameter", "constant", "tuple", "get-tuple-element", "bitcast", "after-all", "partition-id", "replica-id",
    "domain", "opt-barrier", "copy-done", "add-dependency", "async-update", "async-done", "while", "conditional",
    "call",
}  # fmt: skip
"""Instructions that are no work of their own."""
CARRIERS = {
    "AllocateBuffer", "ConcatBitcast", "AssumeGatherIndicesInBound", "GatherScatterIndicesBitpacked", "Sharding",
}  # fmt: skip
COLLECTIVES = (
    "all-reduce", "all-gather", "reduce-scatter", "all-to-all", "collective-permute", "collective-broadcast",
    "ragged-all-to-all",
)  # fmt: skip
HALF = "/half_product/pallas_call"
"""The end of the label of the kernel in `jaxsgd.symmetric`."""
VIEWS = {"bitcast", "reshape", "copy", "convert", "transpose"}


class Shape(NamedTuple):
    """One array of a shape: ``f32[8,128]``; ``near`` if it is in a core's own memory or on the host."""

    dtype: str
    dims: tuple[int, ...]
    near: bool

    @property
    def size(self) -> int:
        """Bytes."""
        bits = BITS.get(self.dtype)
        if bits is None:
            bits = int((re.match(r"[a-z]+(\d+)", self.dtype) or [0, 0])[1])
        return math.prod(self.dims) * bits // 8

    @property
    def text(self) -> str:
        return f"{self.dtype}[{','.join(map(str, self.dims))}]"


SHAPE = re.compile(r"([a-z]\w*)\[([\d,]*)\](?:\{([^{}]*)\})?")


@functools.lru_cache(maxsize=100_000)
def shapes(text: str) -> tuple[Shape, ...]:
    """The arrays of a shape, of a tuple all of them."""
    return tuple(
        Shape(dtype, tuple(map(int, dims.split(","))) if dims else (), bool(re.search(r"S\([1-9]", layout or "")))
        for dtype, dims, layout in SHAPE.findall(text)
    )


class Instruction(NamedTuple):
    """One line of a computation."""

    name: str
    shape: str
    opcode: str
    operands: tuple[str, ...]
    rest: str
    inside: str

    def attribute(self, name: str) -> str:
        """A computation that it names, ``""`` where it names none."""
        found = re.search(rf"\b{name}=%?([\w.\-]+)", self.rest)
        return found[1] if found else ""

    @property
    def label(self) -> str:
        """The operation of the source that it is from."""
        found = re.search(r'op_name="([^"]*)"', self.rest)
        return found[1].replace("\\'", "'") if found else self.name


@dataclass
class Totals:
    """The work of a computation that runs once.

    Attributes:
      flops: of matrix products and convolutions, by the type of what is multiplied.
      bytes: read from and written to the device's memory.
      collectives: for each kind and channel, ``(kind, channel) -> [times, bytes, wire]``.
    """

    flops: Counter[str] = field(default_factory=Counter)
    bytes: float = 0
    collectives: dict[tuple[str, str], list[float]] = field(default_factory=dict)

    def add(self, other: Totals, times: float = 1) -> None:
        for dtype, flops in other.flops.items():
            self.flops[dtype] += flops * times  # type: ignore[assignment]
        self.bytes += other.bytes * times
        for key, (count, size, wire) in other.collectives.items():
            here = self.collectives.setdefault(key, [0, 0, 0])
            if times * count > here[0]:  # the parts of one transfer share its channel
                here[:] = [times * count, times * size, times * wire]


def _closing(text: str, start: int) -> int:
    """Where the bracket that opens at ``start`` closes."""
    depth = 0
    for i in range(start, len(text)):
        depth += (text[i] == "(") - (text[i] == ")")
        if not depth:
            return i
    return len(text)


def _instruction(line: str) -> Instruction | None:
    head, found, tail = line.strip().removeprefix("ROOT ").partition(" = ")
    if not found:
        return None
    end = _closing(tail, 0) + 1 if tail.startswith("(") else tail.find(" ")
    shape, tail = tail[:end], tail[end:].lstrip()
    opened = tail.find("(")
    closed = _closing(tail, opened)
    inside = tail[opened + 1 : closed]
    operands = tuple(re.findall(r"%([\w.\-]+)", inside))
    return Instruction(head.lstrip("%"), shape, tail[:opened], operands, tail[closed + 1 :], inside)


class Program:
    """A compiled program.

    Attributes:
      computations: by name, the instructions by name in their order.
      roots: what each computation returns, an instruction's name.
      entry: the computation that is the program.
    """

    def __init__(self, text: str) -> None:
        self.computations: dict[str, dict[str, Instruction]] = {}
        self.roots: dict[str, str] = {}
        self.entry = ""
        self._totals: dict[str, Totals] = {}
        current = ""
        for line in text.splitlines():
            if line.startswith(("%", "ENTRY")) and line.endswith("{"):
                current = line.removeprefix("ENTRY ").lstrip("%").split(" ", 1)[0]
                self.computations[current] = {}
                self.entry = current if line.startswith("ENTRY") else self.entry
            elif current and line.startswith("  "):
                instruction = _instruction(line)
                if instruction is not None:
                    self.computations[current][instruction.name] = instruction
                    if line.lstrip().startswith("ROOT "):
                        self.roots[current] = instruction.name

    def totals(self, computation: str | None = None) -> Totals:
        """The work of a computation, with all computations that it calls. Default: the entry."""
        name = self.entry if computation is None else computation
        if name not in self._totals:
            out = Totals()
            for instruction in self.computations.get(name, {}).values():
                out.add(self.work(name, instruction))
            self._totals[name] = out
        return self._totals[name]

    def work(self, computation: str, i: Instruction) -> Totals:
        """The work of one instruction of a computation."""
        out = Totals()
        if i.opcode == "while":
            out.add(self.totals(i.attribute("body")), self.trips(computation, i))
        elif i.opcode == "conditional":
            named = re.search(r"branch_computations=\{([^}]*)\}", i.rest)
            branches = re.findall(r"[\w.\-]+", named[1]) if named else []
            branches += [b for b in (i.attribute("true_computation"), i.attribute("false_computation")) if b]
            out.add(max(map(self.totals, branches), key=lambda t: (sum(t.flops.values()), t.bytes), default=Totals()))
        elif i.opcode in ("call", "async-start"):
            out.add(self.totals(i.attribute("to_apply") or i.attribute("calls")))
        elif i.opcode == "fusion":
            called = i.attribute("calls")
            within = self.totals(called)
            out.flops.update(within.flops)
            out.collectives = self._scattered(called, i) or {k: list(v) for k, v in within.collectives.items()}
            out.bytes = self._moved(computation, i)
        else:
            out.flops.update(self._flops(computation, i))
            out.bytes = self._moved(computation, i)
            kind = i.opcode.removesuffix("-start")
            if kind in COLLECTIVES:
                out.collectives = self._collective(computation, i, kind)
        return out

    def _operands(self, computation: str, i: Instruction) -> list[Instruction]:
        here = self.computations[computation]
        return [here[name] for name in i.operands if name in here]

    def _moved(self, computation: str, i: Instruction) -> float:
        """Bytes that an instruction reads and writes. A fusion reads of a large array only what it slices."""
        if i.opcode in FREE or i.opcode.endswith("-done") or carries(i):
            return 0
        operands = self._operands(computation, i)
        if i.opcode == "copy-start":
            return sum(s.size for s in shapes(i.shape)[:2] if not s.near)
        if i.opcode in ("dynamic-slice", "slice", "gather"):
            return 2 * _far(i.shape)
        if i.opcode in ("dynamic-update-slice", "scatter") and len(operands) > 1:
            return 2 * _far(operands[-1 if i.opcode == "scatter" else 1].shape)
        if i.opcode != "fusion":
            written = _far(i.shape) if not i.opcode.endswith("-start") else sum(s.size for s in _results(i))
            return sum(_far(o.shape) for o in operands) + written
        called = i.attribute("calls")
        parameters, read = self._parameters(called), 0
        for index, operand in enumerate(operands):
            whole = _far(operand.shape)
            read += min(whole, self._read(called, parameters[index])) if whole else 0
        return read + self._wrote(called, self.roots.get(called, ""), shapes(i.shape))

    def _parameters(self, computation: str) -> dict[int, str]:
        named = self.computations.get(computation, {}).values()
        return {int(i.inside): i.name for i in named if i.opcode == "parameter"}

    def _read(self, computation: str, name: str) -> float:
        """Bytes that a fusion reads of one of its parameters."""
        total = 0
        for user in (i for i in self.computations[computation].values() if name in i.operands):
            place = user.operands.index(name)
            if user.opcode in ("dynamic-slice", "slice", "gather") and place == 0:
                total += sum(s.size for s in shapes(user.shape))
            elif user.opcode in ("dynamic-update-slice", "scatter") and place == 0:
                continue
            elif user.opcode in VIEWS:
                total += self._read(computation, user.name)
            elif user.opcode == "fusion":
                inner = user.attribute("calls")
                total += self._read(inner, self._parameters(inner)[place])
            elif user.opcode != "tuple":
                return math.inf
        return total

    def _wrote(self, computation: str, name: str, into: Sequence[Shape]) -> float:
        """Bytes that a fusion writes: of an array updated in place only the update."""
        here = self.computations.get(computation, {})
        i = here.get(name)
        while i is not None and i.opcode in ("bitcast", "reshape") and i.operands and i.operands[0] in here:
            i = here[i.operands[0]]
        if i is not None and i.opcode == "tuple" and len(i.operands) == len(into):
            pairs = zip(i.operands, into, strict=True)
            return sum(self._wrote(computation, operand, [shape]) for operand, shape in pairs)
        whole = sum(s.size for s in into if not s.near)
        if i is not None and i.opcode == "dynamic-update-slice" and i.operands[1] in here:
            return min(whole, sum(s.size for s in shapes(here[i.operands[1]].shape)))
        if i is not None and i.opcode == "fusion":
            inner = i.attribute("calls")
            return self._wrote(inner, self.roots.get(inner, ""), into)
        return whole

    def _flops(self, computation: str, i: Instruction) -> dict[str, float]:
        operands = self._operands(computation, i)
        if operands and i.label.endswith(HALF):
            [left], [out] = shapes(operands[0].shape), shapes(i.shape)
            return {left.dtype: math.prod(left.dims) * out.dims[-1]}
        if len(operands) < 2:
            return {}
        firsts = [found[0] for o in (*operands[:2], i) if (found := shapes(o.shape))]
        if len(firsts) < 3:
            return {}
        left, right, out = firsts
        if i.opcode == "dot" or i.opcode == "custom-call" and "lhs_contracting_dim" in i.rest:
            found = re.search(r'lhs_contracting_dim(?:s|ensions)"?[=:]\s*[\[{]([^\]}]*)[\]}]', i.rest)
            over = [int(d) for d in re.findall(r"\d+", found[1])] if found else []
            return {left.dtype: 2 * math.prod(out.dims) * math.prod(left.dims[d] for d in over)}
        if i.opcode == "convolution" or i.opcode == "custom-call" and "dim_labels=" in i.rest:
            # cuDNN's gradients are described by the convolution that they belong to.
            if "$convBackwardInput" in i.rest:
                left, out = out, left
            elif "$convBackwardFilter" in i.rest:
                right, out = out, right
            return {left.dtype: _convolution(i, left, right, out)}
        return {}

    def trips(self, computation: str, i: Instruction) -> int:
        """The number of runs of a while loop, by the compiler or else by its condition; 1 if both are unknown."""
        said = re.search(r'"known_trip_count":\{"n":"(\d+)"', i.rest)
        if said:
            return int(said[1])
        condition = i.attribute("condition")
        body = i.attribute("body")
        test = self.computations.get(condition, {}).get(self.roots.get(condition, ""))
        if test is None or test.opcode != "compare" or "direction=LT" not in test.rest or len(test.operands) != 2:
            return 1
        counter = self.computations[condition].get(test.operands[0])
        last = self._constant(condition, test.operands[1])
        where = re.search(r"index=(\d+)", counter.rest) if counter and counter.opcode == "get-tuple-element" else None
        if where is None or last is None:
            return 1
        index = int(where[1])
        carried = self.computations[computation].get(i.operands[0])
        first = self._constant(computation, carried.operands[index]) if carried and carried.opcode == "tuple" else 0
        step, new = 1, self.computations.get(body, {}).get(self.roots.get(body, ""))
        if new is not None and new.opcode == "tuple":
            added = self.computations[body].get(new.operands[index])
            if added is not None and added.opcode == "add":
                steps = (self._constant(body, operand) for operand in added.operands)
                step = next((s for s in steps if s), 1)
        return max(1, -(-(last - (first or 0)) // step))

    def _constant(self, computation: str, name: str) -> int | None:
        i = self.computations[computation].get(name)
        while i is not None and i.opcode in ("copy", "bitcast", "convert") and i.operands:
            i = self.computations[computation].get(i.operands[0])
        return int(i.inside) if i is not None and i.opcode == "constant" and re.fullmatch(r"-?\d+", i.inside) else None

    def _collective(self, computation: str, i: Instruction, kind: str) -> dict[tuple[str, str], list[float]]:
        received = sum(s.size for s in _results(i))
        sent = sum(s.size for o in self._operands(computation, i) for s in shapes(o.shape))
        channel = re.search(r"channel_id=(\d+)", i.rest)
        return {
            (kind, channel[1] if channel else i.name): [1, max(received, sent), _wire(kind, sent, received, _group(i))]
        }

    def _scattered(self, called: str, i: Instruction) -> dict[tuple[str, str], list[float]]:
        """A reduce-scatter, which the TPU compiler writes as an all-reduce within a fusion that keeps a part."""
        if "all-reduce-scatter" not in called:
            return {}
        inside = next((j for j in self.computations[called].values() if j.opcode == "all-reduce"), None)
        if inside is None:
            return {}
        (size, kept) = (sum(s.size for s in shapes(j.shape)) for j in (inside, i))
        return {("reduce-scatter", i.name): [1, size, _wire("reduce-scatter", size, kept, _group(inside))]}


def carries(i: Instruction) -> bool:
    """Whether it is a call that only names or arranges memory."""
    return i.opcode == "custom-call" and any(f'"{target}"' in i.rest for target in CARRIERS)


def _far(shape: str) -> int:
    """Bytes of the arrays in the device's memory."""
    return sum(s.size for s in shapes(shape) if not s.near)


def _results(i: Instruction) -> tuple[Shape, ...]:
    """What an instruction makes; one that starts a transfer shows its operands before."""
    found = shapes(i.shape)
    if not i.opcode.endswith("-start") or not i.shape.startswith("("):
        return found
    kept = tuple(s for s in found if s.dtype != "u32" or s.dims)
    return kept[len(i.operands) :] or kept


def _group(i: Instruction) -> int:
    """How many devices share a transfer."""
    text = i.rest
    by_axes = re.search(r"replica_groups=mesh\[([^\]]*)\]\s*\{([^}]*)\}", text)
    if by_axes:
        sizes = dict(re.findall(r"'([^']+)'=(\d+)", by_axes[1]))
        return math.prod(int(sizes.get(axis, 1)) for axis in re.findall(r"'([^']+)'", by_axes[2]))
    iota = re.search(r"replica_groups=\[(\d+),(\d+)\]", text)
    if iota:
        return int(iota[2])
    listed = re.search(r"replica_groups=\{\{([\d,]*)\}", text)
    return len(listed[1].split(",")) if listed else 2


def _wire(kind: str, sent: float, received: float, group: int) -> float:
    """Bytes that a device sends at least, of a whole that is ``sent`` or ``received``."""
    if kind in ("collective-permute", "collective-broadcast"):
        return sent
    share = (group - 1) / group if group > 1 else 0
    return share * (2 * received if kind == "all-reduce" else max(sent, received))


def _convolution(i: Instruction, left: Shape, right: Shape, out: Shape) -> float:
    """Operations of a convolution: those of the window's places that meet data."""
    labels = re.search(r"dim_labels=(\w+)_(\w+)->(\w+)", i.rest)
    if labels is None:
        return 0
    window = re.search(r"window=\{([^}]*)\}", i.rest)
    said = dict(re.findall(r"(\w+)=(\S+)", window[1])) if window else {}
    spatial = sorted(c for c in labels[1] if c.isdigit())
    per = {key: value.split("x") for key, value in said.items()}

    def number(key: str, place: int, default: int) -> int:
        return int(per[key][place]) if key in per else default

    total = 2.0 * out.dims[labels[3].index("b")] * out.dims[labels[3].index("f")] * right.dims[labels[2].index("i")]
    for place, axis in enumerate(spatial):
        data, made = left.dims[labels[1].index(axis)], out.dims[labels[3].index(axis)]
        size, stride = number("size", place, 1), number("stride", place, 1)
        spread, apart = number("lhs_dilate", place, 1), number("rhs_dilate", place, 1)
        before = int(per["pad"][place].split("_")[0]) if "pad" in per else 0
        met = 0
        for k, o in itertools.product(range(size), range(made)):
            at = o * stride + k * apart - before
            met += at >= 0 and at % spread == 0 and at // spread < data
        total *= met
    return total
