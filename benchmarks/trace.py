"""What an update costs before and while it runs: jaxsgd beside optax, in one process.

    python benchmarks/trace.py [--quick] [--cpu] [--only trace|compile|init|step]

trace, compile: `jax.jit(tx.update)` on the 192 leaves of a transformer of 12 layers: its seconds in `.trace`, `.lower`
and `.compile`. Each run makes a new transformation and clears JAX's caches first. The persistent cache is off.
init: the seconds of `tx.init` with `int8()`, caches cleared, so that a compile counts.
step: the compiled update with `apply_updates`, parameters and state donated. On many small leaves where arrays and code
are in memory counts up to 20%, and the first to be compiled is mostly faster. So each side comes first in one of two
halves, and each run copies parameters and state to new addresses.

Runs of the two sides are interleaved. The times are medians, a ratio is the median over pairs of neighbouring runs (of
a step: the geometric mean of the two orders). The last columns are the largest ratio (or time) that is allowed, and
whether this run stays within it. On a busy machine `--cpu` counts the process's CPU seconds, of all threads, instead.
"""

from __future__ import annotations

import argparse
import functools
import gc
import math
import os
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

os.environ.setdefault("JAX_PLATFORMS", "cpu")

import jax
import jax.numpy as jnp
import numpy as np
import optax
import optax.contrib

import jaxsgd

Shapes = dict[str, Any]
Make = Callable[[], optax.GradientTransformation]
Stages = dict[str, float]

STEP_BAR = 1.03
INIT_BAR = 0.5
CLOCK: list[Callable[[], float]] = [time.perf_counter]
BUDGET = 60.0
"""Seconds after which a case is not repeated any more."""


@dataclass(frozen=True)
class Row:
    """One line of the table: seconds, and the largest ``ours / other`` (or ``ours``, if there is no other)."""

    case: str
    measure: str
    ours: float
    other: float | None = None
    ratio: float | None = None
    bar: float | None = None

    def cells(self) -> tuple[str, ...]:
        numbers = (None if x is None else 1e3 * x for x in (self.ours, self.other))
        judged = self.ours if self.ratio is None else self.ratio
        unit = "s" if self.ratio is None else "x"
        bar = "" if self.bar is None else f"<= {self.bar:g}{unit}"
        mark = "" if self.bar is None else "ok" if judged <= self.bar else "above"
        return self.case, self.measure, *(f"{digits(x)}" for x in (*numbers, self.ratio)), bar, mark


def digits(value: float | None) -> str:
    """Three significant digits."""
    if value is None:
        return "-"
    return f"{value:,.0f}" if value >= 100 else f"{value:#.3g}"


def separate_layers(width: int) -> Shapes:
    """192 leaves: 12 layers of q, k, v, o and two MLP kernels, a bias for each of the six, and two layer norms."""
    square = {name: {"kernel": (width, width), "bias": (width,)} for name in ("q", "k", "v", "o")}
    mlp = {
        "up": {"kernel": (width, 4 * width), "bias": (4 * width,)},
        "down": {"kernel": (4 * width, width), "bias": (width,)},
    }
    norms = {name: {"scale": (width,), "bias": (width,)} for name in ("norm_1", "norm_2")}
    return {f"layer_{i}": {**square, **mlp, **norms} for i in range(12)}


def fused_layers(width: int) -> Shapes:
    """148 leaves, as GPT-2 has: 12 layers of 12, with q, k, v in one kernel; two embeddings; the last layer norm."""
    layers = separate_layers(width)
    fused = {"qkv": {"kernel": (width, 3 * width), "bias": (3 * width,)}}
    slim = {name: fused | {k: v for k, v in layer.items() if k not in "qkv"} for name, layer in layers.items()}
    ends = {"tokens": (1024, width), "places": (128, width), "norm": {"scale": (width,), "bias": (width,)}}
    return {**slim, **ends}


def many(count: int, side: int) -> Shapes:
    return {f"w_{i}": (side, side) for i in range(count)}


def is_shape(x: Any) -> bool:
    return isinstance(x, tuple)


def abstract(shapes: Shapes) -> Any:
    return jax.tree.map(lambda s: jax.ShapeDtypeStruct(s, jnp.float32), shapes, is_leaf=is_shape)


def random_arrays(shapes: Shapes, seed: int) -> Any:
    rng = np.random.default_rng(seed)
    return jax.tree.map(lambda s: jnp.asarray(rng.standard_normal(s, np.float32)) * 0.02, shapes, is_leaf=is_shape)


def schedule() -> optax.Schedule:
    return optax.warmup_cosine_decay_schedule(0.0, 1e-3, 100, 10_000)


def clipped(clip: Any, adamw: Any, rate: Any) -> optax.GradientTransformation:
    return optax.chain(clip(1.0), adamw(rate))


def clip_schedule_adamw(source: Any) -> optax.GradientTransformation:
    return clipped(source.clip_by_global_norm, source.adamw, schedule())


def packed_adamw() -> optax.GradientTransformation:
    return jaxsgd.adamw(1e-3, storage=jaxsgd.int8())


def clear() -> None:
    jax.clear_caches()
    gc.collect()


def now() -> float:
    return CLOCK[0]()


def seconds(run: Callable[[], Any]) -> tuple[Any, float]:
    begin = now()
    out = jax.block_until_ready(run())
    return out, now() - begin


def stages(make: Make, params: Any, compiled: bool) -> Stages:
    """The seconds of each stage for a new transformation, nothing of it cached."""
    tx = make()
    state = jax.eval_shape(tx.init, params)
    clear()
    traced, trace = seconds(lambda: jax.jit(tx.update).trace(params, state, params))
    if not compiled:
        return {"trace": trace}
    lowered, lower = seconds(traced.lower)
    _, compile_ = seconds(lowered.compile)
    return {"trace": trace, "lower": lower, "compile": compile_, "lower + compile": lower + compile_}


def interleaved(one: Callable[[], Stages], other: Callable[[], Stages], runs: int) -> dict[str, list[list[float]]]:
    """Pairs of seconds of the two sides, by stage. Each side comes first every other time."""
    pairs: list[tuple[Stages, Stages]] = []
    begin = time.perf_counter()
    for i in range(runs):
        if i % 2:
            b, a = other(), one()
        else:
            a, b = one(), other()
        pairs.append((a, b))
        if time.perf_counter() - begin > BUDGET:
            break
    return {stage: [[a[stage], b[stage]] for a, b in pairs] for stage in pairs[0][0]}


def compared(case: str, measure: str, pairs: list[list[float]], bar: float | None) -> Row:
    ours, other = (statistics.median(side) for side in zip(*pairs, strict=True))
    return Row(case, measure, ours, other, statistics.median(a / b for a, b in pairs), bar)


def compare_stages(
    case: str, ours: Make, other: Make, params: Any, runs: int, bars: dict[str, float | None]
) -> Iterator[Row]:
    """A row for each stage that ``bars`` names."""
    compiled = set(bars) != {"trace"}
    measured = interleaved(lambda: stages(ours, params, compiled), lambda: stages(other, params, compiled), runs)
    for stage, bar in bars.items():
        yield compared(case, stage, measured[stage], bar)


CASES: dict[str, tuple[Make, Make, float]] = {
    "adamw": (lambda: jaxsgd.adamw(1e-3), lambda: optax.adamw(1e-3), 0.5),
    "clip + schedule + adamw": (lambda: clip_schedule_adamw(jaxsgd), lambda: clip_schedule_adamw(optax), 0.6),
}
"""Ours, optax's, and the bar of tracing."""


def trace_rows(runs: int) -> Iterator[Row]:
    params = abstract(separate_layers(256))
    for case, (ours, other, bar) in CASES.items():
        stages(ours, params, False), stages(other, params, False)
        yield from compare_stages(case, ours, other, params, runs, {"trace": bar})


def compile_rows(runs: int) -> Iterator[Row]:
    params = abstract(separate_layers(256))
    for case, (ours, other, _) in CASES.items():
        bars = {"lower": None, "compile": None, "lower + compile": 1.0}
        yield from compare_stages(case, ours, other, params, runs, bars)
    bars = {"trace": None, "lower": None, "compile": 2.5}
    yield from compare_stages("adamw int8() / plain", packed_adamw, CASES["adamw"][0], params, runs, bars)


def init_seconds(params: Any, jitted: bool) -> float:
    tx = packed_adamw()
    clear()
    return seconds(lambda: (jax.jit(tx.init) if jitted else tx.init)(params))[1]


def init_rows(runs: int) -> Iterator[Row]:
    trees = {"192 leaves": separate_layers(256), "one leaf of 16M": {"w": (4096, 4096)}}
    for name, shapes in trees.items():
        params = random_arrays(shapes, 0)
        for jitted in (False, True):
            measured: list[float] = []
            while len(measured) < runs and sum(measured) < BUDGET / 2:
                measured.append(init_seconds(params, jitted))
            measure = f"init {'jitted' if jitted else 'eager'}"
            yield Row(f"adamw int8(), {name}", measure, statistics.median(measured), bar=INIT_BAR)


def stepper(tx: optax.GradientTransformation, shapes: Shapes) -> Callable[[int], Stages]:
    """A function that takes some steps, each on the last one's parameters and state: the seconds of one step."""

    @functools.partial(jax.jit, donate_argnums=(0, 1))
    def step(params: Any, state: Any, grads: Any) -> tuple[Any, Any]:
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    grads, params = random_arrays(shapes, 1), random_arrays(shapes, 2)
    held = [step(params, jax.jit(tx.init)(params), grads)]  # compiles

    def run(steps: int) -> Stages:
        held[0] = step(*jax.tree.map(jnp.copy, held[0]), grads)  # at new addresses
        jax.block_until_ready(held[0])
        begin = now()
        for _ in range(steps):
            held[0] = step(*held[0], grads)
        jax.block_until_ready(held[0])
        return {"step": (now() - begin) / steps}

    return run


def step_pairs(ours: Make, other: Make, shapes: Shapes, runs: int, ours_first: bool) -> list[list[float]]:
    """Seconds of a step of both sides, the first being compiled first."""
    clear()
    first, second = (stepper(make(), shapes) for make in ((ours, other) if ours_first else (other, ours)))
    first(1), second(1)
    steps = min(50, math.ceil(0.02 / second(2)["step"]))
    pairs = interleaved(lambda: first(steps), lambda: second(steps), runs)["step"]
    return pairs if ours_first else [pair[::-1] for pair in pairs]


def step_row(case: str, ours: Make, other: Make, shapes: Shapes, runs: int, bar: float | None = STEP_BAR) -> Row:
    pairs = [step_pairs(ours, other, shapes, runs, ours_first) for ours_first in (True, False)]
    rows = [compared(case, "step", measured, bar) for measured in pairs]
    ratio = math.prod(row.ratio for row in rows if row.ratio) ** 0.5
    return replace(compared(case, "step", pairs[0] + pairs[1], bar), ratio=ratio)


def clip_adamw(source: Any) -> optax.GradientTransformation:
    return clipped(source.clip_by_global_norm, source.adamw, 1e-3)


STEPS: dict[str, tuple[Make, Make]] = {
    "sgd": (lambda: jaxsgd.sgd(1e-3), lambda: optax.sgd(1e-3)),
    "adamw": CASES["adamw"][:2],
    "lion": (lambda: jaxsgd.lion(1e-4), lambda: optax.lion(1e-4)),
    "adafactor": (lambda: jaxsgd.adafactor(1e-3), lambda: optax.adafactor(1e-3)),
    "clip + adamw": (lambda: clip_adamw(jaxsgd), lambda: clip_adamw(optax)),
    "muon": (lambda: jaxsgd.optax_muon(1e-3), lambda: optax.contrib.muon(1e-3)),
}
"""Ours and optax's."""


def step_trees(rule: str) -> dict[str, Shapes]:
    """Newton-Schulz is slow on a CPU: muon gets a smaller leaf and fewer of them."""
    side, count = (512, 100) if rule == "muon" else (4096, 1000)
    return {
        f"one leaf {side} x {side}": {"w": (side, side)},
        "148 leaves": fused_layers(64),
        f"{count:,} leaves 32 x 32": many(count, 32),
    }


def step_rows(runs: int) -> Iterator[Row]:
    pairs = 2 * runs + 1
    for rule, (ours, other) in STEPS.items():
        for tree, shapes in step_trees(rule).items():
            yield step_row(f"{rule}, {tree}", ours, other, shapes, pairs)
    for tree, shapes in step_trees("adamw").items():
        yield step_row(f"adamw int8() / plain, {tree}", packed_adamw, CASES["adamw"][0], shapes, runs, bar=None)


SECTIONS = {"trace": trace_rows, "compile": compile_rows, "init": init_rows, "step": step_rows}
HEAD = ("case", "measure", "ours (ms)", "optax (ms)", "ratio", "bar", "")
FORMAT = "{:46s} {:16s} {:>10s} {:>10s} {:>7s}  {:9s} {}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="two runs of each case instead of five")
    parser.add_argument("--cpu", action="store_true", help="CPU seconds of the process, for a busy machine")
    parser.add_argument("--only", choices=SECTIONS, help="one section of the table")
    args = parser.parse_args()
    jax.config.update("jax_enable_compilation_cache", False)
    if args.cpu:
        CLOCK[0] = time.process_time
    runs = 2 if args.quick else 5
    print(f"jax {jax.__version__}, optax {optax.__version__}, {jax.devices()[0].platform}, {os.cpu_count()} cores")
    print(f"{'CPU' if args.cpu else 'wall-clock'} time, medians of {runs} interleaved runs ({4 * runs + 2} of a step)")
    print("int8() / plain: both columns are ours")
    print(FORMAT.format(*HEAD))
    for section in [args.only] if args.only else SECTIONS:
        for row in SECTIONS[section](runs):
            print(FORMAT.format(*row.cells()), flush=True)


if __name__ == "__main__":
    main()
