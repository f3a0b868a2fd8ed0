"""What only a device can show: one command for a machine with a GPU (or a TPU), made for ten minutes, set-up included.

    python benchmarks/gpu.py [--out docs] [--layers 12 --width 768] [--skip rules,products,updates,examples]

rules: three steps of every rule in float32 on the device beside the same on the CPU: the largest difference of an
update, over the largest update. Of some rules with ``storage=int8()`` and ``fp8()`` too, in its kernel, and of those
that make products on a matrix large enough for the kernel of symmetric ones.
products: that kernel beside XLA's products: medians of runs in turns, and the difference of their results.
updates: the compiled step from gradients to new parameters on those of GPT-2 (124M), all donated: medians of runs in
turns beside optax, and torch's fused AdamW where torch sees the device; bytes that the program moves, their share of
the device's bandwidth, and temporaries as the compiler states them.
examples: digits and the character model, their last lines.

Writes ``gpu.json`` and ``gpu.md`` with the device's name. On a CPU alone it refuses, unless ``--cpu`` tries the script.
"""

from __future__ import annotations

import argparse
import functools
import json
import pathlib
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import optax.contrib
from muon import gpt2
from rich.progress import track

import jaxsgd
from jaxsgd.matrices import JORDAN
from jaxsgd.planning.devices import known
from jaxsgd.planning.reading import read
from jaxsgd.symmetric import halves, symmetric_product

HERE = pathlib.Path(__file__).parent
STEPS = 3
PACKED = ("adamw", "lion", "momentum", "adagrad", "rmsprop", "schedule_free_adamw")
"""Rules that are compared at eight bits too."""
SHAPES = {"kernel": (64, 256), "stack": (2, 32, 256), "bias": (32,)}
LARGE = {"kernel": (256, 512)}
SECTIONS = ("rules", "products", "updates", "examples")


def loss(params: Any) -> jax.Array:
    """For rules that look at a loss: their Hessian products cost little more than the parameters."""
    return sum((jnp.vdot(x, x) for x in jax.tree.leaves(params)), jnp.float32(0)) / 2


def followed(tx: optax.GradientTransformation, device: Any, shapes: Any = SHAPES) -> list[np.ndarray]:
    """All updates of some steps on a device."""
    extended = optax.with_extra_args_support(tx)
    rng = np.random.default_rng(0)
    params = {name: rng.standard_normal(shape).astype(np.float32) for name, shape in shapes.items()}
    with jax.default_device(device):
        params = jax.device_put(params, device)
        state = extended.init(params)
        update = jax.jit(lambda g, s, p: extended.update(g, s, p, value=loss(p), obj_fn=loss))
        out = []
        for i in range(STEPS):
            grads = jax.tree.map(lambda p, i=i: (i + 1) * jnp.sin((i + 1) * p), params)
            updates, state = update(grads, state, params)
            params = optax.apply_updates(params, updates)
            out += [np.asarray(x, np.float64) for x in jax.tree.leaves(updates)]
    return out


def apart(one: list[np.ndarray], other: list[np.ndarray]) -> float:
    """The largest difference over the largest value."""
    largest = max(float(np.max(np.abs(x))) for x in one)
    return max(float(np.max(np.abs(x - y))) for x, y in zip(one, other, strict=True)) / max(largest, 1e-30)


def rules(device: Any) -> dict[str, Any]:
    """Each rule's difference from the CPU, or why it has none."""
    host, out = jax.devices("cpu")[0], {}
    packed = {make.__name__: make(min_size=0, stochastic=False) for make in (jaxsgd.int8, jaxsgd.fp8)}
    for name in track(sorted(jaxsgd.RULES), "rules"):
        make = jaxsgd.RULES[name]
        out[name] = {"float32": apart(followed(make(1e-2), host), followed(make(1e-2), device))}
        for how, storage in packed.items() if name in PACKED else ():
            out[name][how] = apart(*(followed(make(1e-2, storage=storage), place) for place in (host, device)))
        if make.cost == "products":
            out[name]["large"] = apart(*(followed(make(1e-2), place, LARGE) for place in (host, device)))
    return out


def products(device: Any, width: int, runs: int) -> dict[str, Any]:
    """Symmetric products of a stack of twelve matrices, as Newton-Schulz makes them."""
    a, b, c = JORDAN[0]
    one = jnp.eye(width)
    kinds = {
        "Gram matrix, 1:4": ((width, 4 * width), lambda x, how: how(lambda x: x @ x.mT, x)),
        "Gram matrix, 4:1": ((4 * width, width), lambda x, how: how(lambda x: x.mT @ x, x, tall=True)),
        "polynomial": (
            (width, width),
            lambda x, how: how(lambda x: a * one.astype(x.dtype) + b * x + c * x @ x, x, scalars=(a, b, c)),
        ),
    }
    ways = {
        "kernel": functools.partial(symmetric_product, halves(jax.device_put(one, device))),
        "XLA": functools.partial(symmetric_product, False),
    }
    out: dict[str, Any] = {}
    for name, (shape, make) in kinds.items():
        for dtype in ("float32", "bfloat16"):
            half = np.random.default_rng(0).standard_normal((12, *shape)) / np.sqrt(4 * width)
            x = jax.device_put(
                jnp.asarray((half + half.swapaxes(1, 2)) if shape[0] == shape[1] else half, dtype), device
            )
            compiled = {way: jax.jit(lambda x, make=make, how=how: make(x, how)) for way, how in ways.items()}
            results = {way: np.asarray(run(x), np.float64) for way, run in compiled.items()}
            times: dict[str, list[float]] = {way: [] for way in ways}
            for _ in range(runs):
                for way, run in compiled.items():
                    begin = time.perf_counter()
                    jax.block_until_ready(run(x))
                    times[way].append(1e3 * (time.perf_counter() - begin))
            out[f"{name}, {dtype}"] = {f"{way}, ms": statistics.median(times[way][2:]) for way in ways} | {
                "difference": apart([results["XLA"]], [results["kernel"]])
            }
    return out


def contenders() -> dict[str, dict[str, Callable[[], optax.GradientTransformation]]]:
    """Optimizers by pair: ours and the one it stands beside."""
    orthogonal = optax.contrib.muon
    return {
        "adamw": {"jaxsgd": lambda: jaxsgd.adamw(1e-3), "optax": lambda: optax.adamw(1e-3)},
        "adamw int8": {
            "jaxsgd": lambda: jaxsgd.adamw(1e-3, storage=jaxsgd.int8()), "optax": lambda: optax.adamw(1e-3)
        },
        "adamw fp8": {
            "jaxsgd": lambda: jaxsgd.adamw(1e-3, storage=jaxsgd.fp8()), "optax": lambda: optax.adamw(1e-3)
        },
        "lion": {"jaxsgd": lambda: jaxsgd.lion(1e-4), "optax": lambda: optax.lion(1e-4)},
        "adafactor": {"jaxsgd": lambda: jaxsgd.adafactor(1e-3), "optax": lambda: optax.adafactor(1e-3)},
        "muon": {"jaxsgd": lambda: jaxsgd.muon(1e-3), "optax": lambda: orthogonal(1e-3)},
        "muon_jordan": {"jaxsgd": lambda: jaxsgd.muon_jordan(1e-3), "optax": lambda: orthogonal(1e-3)},
        "soap": {"jaxsgd": lambda: jaxsgd.soap(1e-3, max_precond_dim=1024)},
    }  # fmt: skip


def updates(device: Any, layers: int, width: int, vocabulary: int, runs: int) -> dict[str, Any]:
    """Time, traffic and memory of each pair."""
    rng = np.random.default_rng(0)
    shapes = gpt2(layers, width, vocabulary)

    def make() -> Any:
        def drawn(shape: tuple[int, ...]) -> jax.Array:
            return jax.device_put(rng.standard_normal(shape, np.float32) * 0.02, device)

        return jax.tree.map(drawn, shapes, is_leaf=_is_shape)

    grads = make()
    count, bandwidth = sum(x.size for x in jax.tree.leaves(grads)), _bandwidth(device)
    out: dict[str, Any] = {"parameters": count}
    for name, pair in track(contenders().items(), "updates"):
        sides = {side: _Side(tx(), grads, make()) for side, tx in pair.items()}
        for _ in range(runs):
            for side in sides.values():
                side.run(grads)
        out[name] = {side: held.row(bandwidth) for side, held in sides.items()}
        if "optax" in sides:
            ours, other = (np.asarray(sides[s].times[2:]) for s in ("jaxsgd", "optax"))
            out[name]["ratio"] = float(np.median(ours / other))
        del sides
    out["torch fused adamw, ms"] = _torch(shapes, runs)
    return out


class _Side:
    """One optimizer, compiled."""

    def __init__(self, tx: optax.GradientTransformation, grads: Any, params: Any) -> None:
        self.state, self.params, self.times = jax.jit(tx.init)(params), params, []

        def update(params: Any, state: Any, grads: Any) -> tuple[Any, Any]:
            return jaxsgd.update_params(tx, grads, state, params)

        lowered = jax.jit(update, donate_argnums=(0, 1)).lower(params, self.state, grads)
        begin = time.perf_counter()
        self.step = lowered.compile()
        self.compiling = time.perf_counter() - begin

    def run(self, grads: Any) -> None:
        begin = time.perf_counter()
        self.params, self.state = jax.block_until_ready(self.step(self.params, self.state, grads))
        self.times.append(time.perf_counter() - begin)

    def row(self, bandwidth: float | None) -> dict[str, Any]:
        found, seconds = read(self.step), statistics.median(self.times[2:])
        return {
            "ms": 1e3 * seconds,
            "compile, s": self.compiling,
            "state, bytes": sum(x.nbytes for x in jax.tree.leaves(self.state)),
            "moved, bytes": found.bytes,
            "share of bandwidth": None if bandwidth is None else found.bytes / seconds / bandwidth,
            "temporaries, bytes": found.memory.temporaries if found.memory else None,
        }


def _is_shape(x: Any) -> bool:
    return isinstance(x, tuple)


def _bandwidth(device: Any) -> float | None:
    """Of the device that has this name in `jaxsgd.planning.devices`; None if there is none."""
    kind = device.device_kind.lower()
    return next((d.bandwidth for name, d in known().items() if name in kind), None)


def _torch(shapes: Any, runs: int) -> float | str:
    """Milliseconds of torch's fused AdamW."""
    try:
        import torch
    except ImportError:
        return "torch is not installed"
    if not torch.cuda.is_available():
        return "torch sees no GPU"
    params = [torch.nn.Parameter(torch.zeros(s, device="cuda")) for s in jax.tree.leaves(shapes, is_leaf=_is_shape)]
    for p in params:
        p.grad = torch.randn_like(p)
    optimizer, times = torch.optim.AdamW(params, fused=True), []
    for _ in range(runs):
        torch.cuda.synchronize()
        begin = time.perf_counter()
        optimizer.step()
        torch.cuda.synchronize()
        times.append(time.perf_counter() - begin)
    return 1e3 * statistics.median(times[2:])


def examples() -> dict[str, Any]:
    """The last line of each example, and its seconds."""
    out = {}
    for name in ("digits", "char_lm"):
        begin = time.perf_counter()
        ran = subprocess.run([sys.executable, HERE.parent / "examples" / f"{name}.py"], capture_output=True, text=True)
        lines = (ran.stdout if ran.returncode == 0 else ran.stderr).strip().splitlines()
        out[name] = {"exit": ran.returncode, "seconds": time.perf_counter() - begin, "last line": lines[-1:]}
    return out


def page(found: dict[str, Any]) -> str:
    """The figures as Markdown."""
    out = [f"# Measured on {found['device']}", "", f"By `python benchmarks/gpu.py`, jax {found['jax']}.", ""]
    if "rules" in found:
        far = {n: r for n, r in found["rules"].items() if r["float32"] > 1e-3}
        out += ["## Rules beside the CPU", ""]
        out += [
            f"{len(found['rules']) - len(far)} of {len(found['rules'])} rules are within 1e-3 after {STEPS} steps.",
            "",
        ]
        columns = ("float32", "int8", "fp8", "large")
        out += [f"| rule | {' | '.join(columns)} |", "| --- | --- | --- | --- | --- |"]
        for name, row in found["rules"].items():
            out.append(f"| `{name}` | " + " | ".join(f"{row[k]:.1e}" if k in row else "" for k in columns) + " |")
        out.append("")
    if "products" in found:
        out += [
            "## Symmetric products",
            "",
            "| product | kernel, ms | XLA, ms | difference |",
            "| --- | --- | --- | --- |",
        ]
        for name, row in found["products"].items():
            out.append(f"| {name} | {row['kernel, ms']:.3g} | {row['XLA, ms']:.3g} | {row['difference']:.1e} |")
        out.append("")
    if "updates" in found:
        rows = {n: r for n, r in found["updates"].items() if isinstance(r, dict)}
        out += [f"## Updates of {found['updates']['parameters']:,} parameters", ""]
        out += ["| optimizer | ms | beside optax | share of bandwidth | state | temporaries | compile, s |"]
        out += ["| --- | --- | --- | --- | --- | --- | --- |"]
        for name, row in rows.items():
            own, ratio = row["jaxsgd"], row.get("ratio")
            share, temps = own["share of bandwidth"], own["temporaries, bytes"]
            out.append(
                f"| `{name}` | {own['ms']:.3g} | {'' if ratio is None else f'{ratio:.2f}x'} | "
                f"{'' if share is None else f'{share:.0%}'} | {own['state, bytes'] / 2**20:,.0f} MiB | "
                f"{0 if temps is None else temps / 2**20:,.0f} MiB | {own['compile, s']:.1f} |"
            )
        out += ["", f"torch's fused AdamW, ms: {found['updates']['torch fused adamw, ms']}", ""]
    for name, row in found.get("examples", {}).items():
        out.append(f"- `examples/{name}.py`: exit {row['exit']}, {row['seconds']:.0f} s: {' '.join(row['last line'])}")
    return "\n".join(out).rstrip() + "\n"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--out", type=pathlib.Path, default=HERE.parent / "docs", help="where gpu.json and gpu.md go")
    parser.add_argument("--layers", type=int, default=12)
    parser.add_argument("--width", type=int, default=768)
    parser.add_argument("--vocabulary", type=int, default=50257)
    parser.add_argument("--runs", type=int, default=22)
    parser.add_argument("--skip", default="", help="sections to leave out, by commas")
    parser.add_argument("--cpu", action="store_true", help="try the script without an accelerator")
    options = parser.parse_args()
    device, skipped = jax.devices()[0], options.skip.split(",")
    if unknown := set(filter(None, skipped)) - {*SECTIONS}:
        parser.error(f"--skip {','.join(unknown)}: sections are {', '.join(SECTIONS)}")
    if device.platform == "cpu" and not options.cpu:
        parser.error("JAX sees no accelerator here. Install jaxsgd[cuda] or jaxsgd[tpu]; --cpu tries the script")
    found: dict[str, Any] = {"device": device.device_kind, "jax": jax.__version__}
    if "rules" not in skipped:
        found["rules"] = rules(device)
    if "products" not in skipped:
        found["products"] = products(device, options.width, options.runs)
    if "updates" not in skipped:
        found["updates"] = updates(device, options.layers, options.width, options.vocabulary, options.runs)
    if "examples" not in skipped:
        found["examples"] = examples()
    options.out.mkdir(parents=True, exist_ok=True)
    (options.out / "gpu.json").write_text(json.dumps(found, indent=1) + "\n")
    (options.out / "gpu.md").write_text(page(found))
    print(page(found))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
