"""Run the benchmarks that compare with other libraries, and write docs/performance.md.

    make bench                          # or: python benchmarks/all.py
    python benchmarks/all.py --only jobs --out page.md

Each benchmark is a script of this folder, in a process of its own. The page has the output of each as it was printed.
"""

from __future__ import annotations

import argparse
import os
import pathlib
import platform
import subprocess
import sys
import time
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version

FOLDER = pathlib.Path(__file__).parent
PAGE = FOLDER.parent / "docs" / "performance.md"
PACKAGES = ("jax", "optax", "flax", "torch", "scipy", "numpy")


@dataclass(frozen=True)
class Section:
    """One benchmark on the page."""

    title: str
    about: str
    script: str
    arguments: tuple[str, ...] = ()

    @property
    def command(self) -> str:
        return " ".join(("python", f"benchmarks/{self.script}", *self.arguments))


SECTIONS = {
    "jobs": Section(
        "Whole runs",
        "Both sides train a perceptron on digits. The time is from the first call to the last loss, with the compile.",
        "jobs.py",
        ("--rounds", "3"),
    ),
    "dispatch": Section(
        "Dispatch",
        "The model has many small layers. The arithmetic is small, so most of the time is Python and dispatch.",
        "step_overhead.py",
        ("--rounds", "5"),
    ),
    "trace": Section(
        "Trace",
        "This is the time to trace the update of a transformer with 192 parameter arrays.",
        "trace.py",
        ("--quick", "--only", "trace"),
    ),
    "compile": Section(
        "Lower and compile",
        "XLA lowers and compiles the same update. The last rows compare 8-bit with float32 state, both of jaxsgd.",
        "trace.py",
        ("--quick", "--only", "compile"),
    ),
    "step": Section(
        "The update",
        "The compiled update of several rules runs on one large array, on 148 arrays and on many small arrays.",
        "trace.py",
        ("--quick", "--only", "step"),
    ),
    "sweep": Section(
        "A sweep",
        "One compiled sweep trains 32 learning rates, beside single runs, and beside optax compiled for each rate.",
        "sweep.py",
        ("--rounds", "3"),
    ),
    "minimize": Section(
        "Minimize",
        "L-BFGS runs on full batches to the same loss, beside a loop of `optax.lbfgs` and SciPy with JAX's gradients.",
        "minimise_time.py",
        ("--rounds", "3"),
    ),
}


def installed(package: str) -> str:
    try:
        return f"{package} {version(package)}"
    except PackageNotFoundError:
        return f"no {package}"


def measured(section: Section) -> tuple[str, float]:
    """The output of a benchmark, and its seconds."""
    begin = time.perf_counter()
    command = [sys.executable, str(FOLDER / section.script), *section.arguments]
    environment = os.environ | {"JAX_PLATFORMS": "cpu"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    if done.returncode:
        raise SystemExit(f"{section.command} failed:\n{done.stderr[-3000:]}")
    return done.stdout.rstrip(), time.perf_counter() - begin


def page(results: dict[str, tuple[str, float]]) -> str:
    total = sum(seconds for _, seconds in results.values())
    lines = [
        "# Performance",
        "",
        f"`make bench` writes this page. The last run took {total / 60:.1f} minutes on {os.cpu_count()} CPU cores",
        f"({platform.machine()}, Python {platform.python_version()}).",
        f"Versions: {', '.join(map(installed, PACKAGES))}.",
        "",
        "The two sides of a ratio run in turn in one process, so that a busy machine slows both. Each ratio is",
        "jaxsgd's time divided by the other's, except where a line says otherwise: above 1, jaxsgd is slower.",
        "Nothing was measured on a GPU or a TPU. The [ledger](ledger.md) has bytes and kernels from their compilers.",
    ]
    for name, (output, seconds) in results.items():
        section = SECTIONS[name]
        lines += ["", f"## {section.title}", "", section.about, f"`{section.command}`, {seconds:.0f} s:", ""]
        lines += ["```text", *(line.rstrip() for line in output.splitlines()), "```"]
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", nargs="+", choices=SECTIONS, default=list(SECTIONS), help="some of the benchmarks")
    parser.add_argument("--out", type=pathlib.Path, default=PAGE, help="Default: docs/performance.md")
    args = parser.parse_args()
    results = {}
    for name in args.only:
        print(f"{name}: {SECTIONS[name].command}", flush=True)
        results[name] = measured(SECTIONS[name])
        print(results[name][0], flush=True)
    args.out.write_text(page(results))
    print(f"wrote {args.out}")


if __name__ == "__main__":
    main()
