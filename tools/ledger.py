"""The cost of each rule's update on hardware, measured by the compilers: docs/ledger.json and docs/ledger.md.

``python tools/ledger.py`` compiles the update of every rule with every storage for a TPU v5e and an H100, and writes
both documents. It also writes the costs in docs/choose_optimizer.md. Programs that have not changed are not compiled
again. ``--check`` fails if a page differs from the measurements, if a rule is missing, or if one beyond a bar has no
explanation.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.metadata
import json
import os
import pathlib
import re
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from explanations import EXPLANATIONS, cost_of
from ledger_rows import DEVICES, STORAGES, TREES, Row, is_small, measure, packs, state_of

from jaxsgd.planning.devices import lookup as describe
from jaxsgd.planning.targets import available, prepare
from jaxsgd.registry import RULES

__all__ = ["BARS", "beyond", "costs", "faults", "ledger", "main", "page", "reasons"]

BARS = {"ratio": 1.10, "fusions": 1.0, "temporaries": 0.05}
"""What needs no explanation: bytes over the minimum, fusions a leaf, temporaries over the parameters' bytes."""

TITLES = {"ratio": "bytes / minimum", "fusions": "fusions a leaf", "temporaries": "temporaries"}

HERE = pathlib.Path("docs")

Ledger = dict[str, Any]


# -- measuring ------------------------------------------------------------------------------------


def versions() -> dict[str, str]:
    """The compilers that the measurements are from."""
    names = ("jax", "jaxlib", "libtpu", "jax-cuda13-plugin", "nvidia-cuda-nvcc")
    out = {}
    for name in names:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            out[name] = importlib.metadata.version(name)
    return out


def ledger(
    path: str | os.PathLike[str] = HERE / "ledger.json",
    *,
    rules: Sequence[str] | None = None,
    devices: Sequence[str] | None = None,
    fresh: bool = False,
    progress: Callable[[str, int, int], None] | None = None,
) -> Ledger:
    """Measure what is not yet measured, and keep it in ``path``.

    Args:
      path: a JSON file, written after each row, so that an interrupted run goes on where it was.
      rules: names of `RULES`; all by default.
      devices: names of `DEVICES`; all whose compilers are installed by default.
      fresh: measure also what has been measured of the same program with the same compilers.
      progress: called with what is being done, how many rows are done, and how many there are.

    Returns:
      ``{"versions": ..., "rows": {rule: {storage: {device: row}}}}``, see `measure`. A storage that changes nothing of
      a rule's state has no rows of its own.

    Raises:
      ValueError: an unknown rule or device.
      ImportError: no compiler is installed.
    """
    prepare()
    names = sorted(RULES) if rules is None else list(rules)
    for name in names:
        RULES[name]
    there = (
        [d for d in DEVICES if available(describe(DEVICES[d]).device.platform)] if devices is None else list(devices)
    )
    for device in there:
        if device not in DEVICES:
            raise ValueError(f"devices: {device!r} is none of {', '.join(DEVICES)}")
    if not there:
        raise ImportError("the ledger needs a compiler: pip install 'jaxsgd[tpu]' or 'jaxsgd[cuda]'")
    path = pathlib.Path(path)
    held: Ledger = json.loads(path.read_text()) if path.exists() else {"versions": {}, "rows": {}}
    now = held["versions"] | versions()
    same = held["versions"] == now and not fresh
    held["versions"] = now
    held["rows"] = {name: row for name, row in held["rows"].items() if name in RULES}
    todo = [(n, s, d) for s in STORAGES for d in reversed(there) for n in names if s == "plain" or packs(n, s)]
    for done, (name, storage, device) in enumerate(todo):
        if progress is not None:
            progress(f"{name} {storage} on {device}", done, len(todo))
        rows = held["rows"].setdefault(name, {}).setdefault(storage, {})
        before = rows.get(device)
        rows[device] = measure(name, storage, device, before if same else None)
        if rows[device] is not before:
            _write(path, json.dumps(_sorted(held), indent=1) + "\n")
    for name in names:
        held["rows"][name] = {s: r for s, r in held["rows"][name].items() if s == "plain" or packs(name, s)}
    _write(path, json.dumps(_sorted(held), indent=1) + "\n")
    return held


def _sorted(held: Ledger) -> Ledger:
    return {**held, "rows": dict(sorted(held["rows"].items()))}


def _write(path: pathlib.Path, text: str) -> None:
    """All rows or none, whenever the process ends."""
    part = path.with_name(path.name + ".part")
    part.write_text(text)
    part.replace(path)


# -- bars and explanations ------------------------------------------------------------------------


def beyond(row: Row) -> list[str]:
    """The bars that a row is beyond."""
    return [bar for bar, most in BARS.items() if row[bar] is not None and row[bar] > most]


def reasons(name: str, storage: str) -> list[Any]:
    """The keys of `EXPLANATIONS` that say why a rule with a storage is beyond a bar."""
    cost = cost_of(RULES[name]) if name in RULES else None
    own = next((key for key in ((cost, storage), cost) if key in EXPLANATIONS), None)
    return [key for key in (own, ("*", storage)) if key in EXPLANATIONS]


def _rows(held: Ledger) -> Iterator[tuple[str, str, str, Row]]:
    for name, stored in held["rows"].items():
        for storage, rows in stored.items():
            for device, row in rows.items():
                yield name, storage, device, row


def faults(held: Ledger) -> list[str]:
    """Rules that are not measured, rows beyond a bar without an explanation, explanations that nothing needs."""
    out = []
    for name in sorted(RULES):
        wanted = [s for s in STORAGES if s == "plain" or packs(name, s)]
        missing = [f"{s} on {d}" for s in wanted for d in DEVICES if d not in held["rows"].get(name, {}).get(s, {})]
        out += [f"{name}: not measured: {', '.join(missing)}"] if missing else []
    out += [f"{name}: measured, but no rule" for name in held["rows"] if name not in RULES]
    used = set()
    for name, storage, device, row in _rows(held):
        now = state_of(name, storage) if name in RULES else row["state"]
        if now != row["state"]:
            out.append(f"{name}, {storage}: keeps {now:g} bytes a parameter, {row['state']:g} when it was measured")
        over = beyond(row)
        if not over:
            continue
        keys = reasons(name, storage)
        used |= set(keys if ("*", storage) not in keys else [key for key in keys if isinstance(key, tuple)])
        if not keys:
            shown = ", ".join(f"{TITLES[bar]} {row[bar]}" for bar in over)
            out.append(f"{name}, {storage} on {device}: {shown}: beyond the bar, and not explained")
    out += [f"EXPLANATIONS[{key!r}]: nothing needs it" for key in EXPLANATIONS if key not in used]
    return out


# -- the page -------------------------------------------------------------------------------------

INTRODUCTION = """# What an update costs on hardware

Made by `python tools/ledger.py` from [ledger.json](ledger.json); not written by hand. Nothing here was run. The
compilers for TPU and CUDA translated the update of each rule for one TPU v5e and one H100, and their programs were
read. The update is `jaxsgd.update_params`, with parameters and state donated.

Parameters and gradients are float32: {large}. With moments at eight bits they are {packed}, since compilers take long
there. Rules that decompose matrices ({few}) are on {small}. There a TPU holds most arrays in its core's memory, so the
bytes are few.

- **state**: bytes kept for a parameter between steps.
- **minimum**: bytes a parameter and step if everything moved once. That is the parameter read and written, its gradient
  read, and its state read and written, in the types of their storage.
- **bytes**: what the program's kernels read from and write to the device's memory, over the minimum. Below 1 where a
  rule does not write all of its state, or not in each step.
- **fusions**: kernels of elementwise work and sums, divided by the number of leaves. Products (kernels that multiply
  matrices) are counted apart. Kernels within loops are not counted.
- **temporaries**: memory beside arguments and results, in % of the parameters' bytes. If the compiler works on one leaf
  after the other, 50% is one array like a matrix of this tree. In a model it is one like its largest.

A number beyond its bar is **bold**, and the section "Why" explains it. The bars are bytes of {ratio} times the minimum,
{fusions:g} fusion a leaf, and temporaries of {temporaries:.0%}.

Donate parameters and state as the first arguments and return them in the same order, as `jaxsgd.make_step` does.
`jax.jit` gives donated arrays to results of the same shape in order. If `update(grads, state, params)` returns
`(params, state)`, Adam moves 16 bytes a parameter more on H100, in copies.
"""


def _cell(row: Row | None, bar: str, products: bool = False) -> str:
    if row is None or row[bar] is None:
        return "-"
    value = row[bar]
    text = {"ratio": f"{value:.2f}", "fusions": f"{value:.3g}", "temporaries": f"{value:.1%}"}[bar]
    text = f"**{text}**" if bar in beyond(row) else text
    return text + (f" + {row['products']} products" if products and row["products"] else "")


def _table(held: Ledger, storage: str) -> list[str]:
    heads = ["rule", "state", "minimum"]
    heads += [f"{device}: {what}" for device in DEVICES for what in ("bytes", "fusions", "temporaries")]
    lines = [f"| {' | '.join(heads)} |", "|" + " --- |" * len(heads)]
    for name, stored in sorted(held["rows"].items()):
        rows = stored.get(storage)
        if not rows:
            continue
        first = next(iter(rows.values()))
        cells = [f"[`{name}`](rules.md#{name})", f"{first['state']:.3g}", f"{first['minimum']:.3g}"]
        for device in DEVICES:
            row = rows.get(device)
            cells += [_cell(row, "ratio"), _cell(row, "fusions", products=True), _cell(row, "temporaries")]
        lines.append(f"| {' | '.join(cells)} |")
    return lines


def page(held: Ledger) -> str:
    """docs/ledger.md."""
    shown = {key: ", ".join(f"{n} {'x'.join(map(str, s))}" for n, s in tree.items()) for key, tree in TREES.items()}
    few = ", ".join(name for name in sorted(RULES) if is_small(RULES[name]))
    lines = [INTRODUCTION.format(**shown, few=few, **BARS)]
    lines += [f"Compilers: {', '.join(f'{name} {number}' for name, number in sorted(held['versions'].items()))}."]
    titles = {
        "plain": "As computed",
        "bf16": "Moments in bfloat16",
        "int8": "Moments at eight bits",
    }
    for storage, title in titles.items():
        lines += ["", f"## {title}", ""]
        if storage != "plain":
            lines += ["A rule that is missing has no moments: with this storage it is as above.", ""]
        lines += _table(held, storage)
    lines += ["", "## Why", ""]
    why: dict[str, list[str]] = {}
    for name, storage, _, row in _rows(held):
        for key in reasons(name, storage) if beyond(row) else ():
            label = f"`{name}`" if isinstance(key, str) else f"`{name}`, {titles[key[1]].lower()}"
            label = titles[key[1]].lower() if key[0] == "*" else label
            why.setdefault(EXPLANATIONS[key], []).append(label)
    lines += [f"- {'; '.join(dict.fromkeys(labels))}: {reason}" for reason, labels in why.items()]
    return "\n".join(lines) + "\n"


COSTS = re.compile(r"(?<=<!-- costs: begin -->\n).*?(?=<!-- costs: end -->)", re.DOTALL)


def costs(held: Ledger, text: str) -> str:
    """``text``, the page of advice, with the measured costs of the rules that its table names.

    Raises:
      ValueError: the table is missing, or it names a rule that is not measured.
    """
    found = COSTS.search(text)
    names = re.findall(r"^\| `(\w+)`", found[0], re.MULTILINE) if found else []
    if not names or set(names) - set(held["rows"]):
        raise ValueError(f"between <!-- costs: begin --> and <!-- costs: end --> stand the rules {names}")
    lines = ["| rule | state | state, bf16 moments | minimum traffic a step | H100: bytes / minimum |"]
    lines += ["| --- | ---: | ---: | ---: | ---: |"]
    for name in names:
        stored = held["rows"][name]
        row, narrow = (stored.get(storage, stored["plain"])["h100"] for storage in ("plain", "bf16"))
        cells = [row["state"], narrow["state"], row["minimum"], row["ratio"]]
        lines.append(f"| `{name}` | {cells[0]:.3g} | {cells[1]:.3g} | {cells[2]:.3g} | {cells[3]:#.3g} |")
    return COSTS.sub(lambda _: "\n".join(lines) + "\n", text)


# -- the command line -----------------------------------------------------------------------------


@contextlib.contextmanager
def _bar() -> Iterator[Callable[[str, int, int], None]]:
    try:
        from rich.console import Console
        from rich.progress import Progress
    except ImportError:
        yield lambda text, done, count: print(f"{done}/{count} {text}", file=sys.stderr, flush=True)
        return
    with Progress(console=Console(stderr=True)) as bar:
        task = bar.add_task("lowering")
        yield lambda text, done, count: bar.update(task, description=text, completed=done, total=count)


def main(argv: Sequence[str] | None = None) -> int:
    """The command line. Returns the exit code: 1 where something is wrong or missing, 2 where nothing can be done."""
    parser = argparse.ArgumentParser(prog="python tools/ledger.py", description=str(__doc__).split("\n\n")[0])
    add = parser.add_argument
    add("--json", type=pathlib.Path, default=HERE / "ledger.json", help="the measurements")
    add("--page", type=pathlib.Path, default=HERE / "ledger.md", help="the page")
    add("--advice", type=pathlib.Path, default=HERE / "choose_optimizer.md", help="the page with a table of costs")
    add("--rules", type=lambda text: re.split(r"[,\s]+", text), help="only these, by commas")
    add("--devices", type=lambda text: re.split(r"[,\s]+", text), help="v5e, h100; by default those with a compiler")
    add("--fresh", action="store_true", help="measure also what has been measured of the same program")
    only = parser.add_mutually_exclusive_group()
    only.add_argument(
        "--check", action="store_true", help="measure nothing; fail if anything is stale or lacks a reason"
    )
    only.add_argument("--write", action="store_true", help="measure nothing; write the page")
    args = parser.parse_args(argv)
    try:
        if not (args.check or args.write):
            begin = time.perf_counter()
            with _bar() as progress:
                ledger(args.json, rules=args.rules, devices=args.devices, fresh=args.fresh, progress=progress)
            print(f"ledger: measured in {(time.perf_counter() - begin) / 60:.1f} minutes")
        held = json.loads(args.json.read_text())
        pages = {args.page: page(held), args.advice: costs(held, args.advice.read_text())}
    except (ImportError, KeyError, OSError, RuntimeError, ValueError) as error:
        print(f"ledger: error: {error}", file=sys.stderr)
        return 2
    wrong = faults(held)
    for path, text in pages.items():
        if not args.check:
            _write(path, text)
        elif not path.exists() or path.read_text() != text:
            wrong.append(f"{path} is out of date; run python tools/ledger.py --write")
    for line in wrong:
        print(f"ledger: {line}", file=sys.stderr)
    count = sum(1 for _ in _rows(held))
    print(f"ledger: {len(held['rows'])} of {len(RULES)} rules, {count} rows in {args.page}")
    return 1 if wrong else 0


if __name__ == "__main__":
    os.environ.setdefault("JAX_PLATFORMS", "cpu")  # nothing runs: no accelerator is asked for
    sys.exit(main())
