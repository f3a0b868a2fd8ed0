"""The documents made from `RULES`: the README's list of rules and the page of rules, with measured agreement.

``python tools/catalog.py`` prints the table of rules, ``--write`` writes both documents. ``--check`` lists each rule
with its measured agreement. It fails if a document is out of date, if a rule has no measurement, or if one misses its
bar. The measurements are in jaxsgd/agreement.json, which ``make tables`` writes.
"""

from __future__ import annotations

import argparse
import inspect
import json
import pathlib
import re
import sys
from collections.abc import Mapping

from jaxsgd import torch
from jaxsgd.cards import (
    TITLE,
    arguments,
    default_text,
    description,
    digits,
    family,
    needs,
    state_bytes,
    titled,
)
from jaxsgd.registry import TREE_RULES, AnyRule, all_rules
from jaxsgd.rules import FAMILIES, RULES
from jaxsgd.second_order.tree_rule import TreeRule

__all__ = ["BARS", "Agreement", "entry", "main", "page", "table"]

BEGIN, END = "<!-- rules: begin -->", "<!-- rules: end -->"
BARS = {"optax": 1e-12, "NumPy twin": 1e-12}
"""How close a rule has to be to each package; to all others 1e-9."""

SHORT = {
    "momentum": "SGD and momentum",
    "adaptive": "Adam and adaptive",
    "adam_variants": "Adam variants",
    "sign": "Sign and layerwise",
    "layerwise": "Sign and layerwise",
    "factored": "Small state",
    "lowrank": "Small state",
    "matrix": "Matrix and curvature",
    "muon_kin": "Matrix and curvature",
    "psgd": "Matrix and curvature",
    "curvature": "Matrix and curvature",
    "adaptive_lr": "No learning rate or schedule",
    "averaging": "No learning rate or schedule",
    "torch": "As in torch",
    "second_order": "Second order, with the loss itself",
}
"""File of `jaxsgd/rules`, or room -> the short name of its family in the README, in the README's order."""

Agreement = Mapping[str, Mapping[str, float]]
"""Rule -> package -> largest relative error of 50 steps in float64."""


def entry(rule: AnyRule, agreement: Agreement) -> dict[str, str]:
    """One row: rule, what it is, where it comes from, what it keeps, who agrees.

    Raises:
      ValueError: the docstring's first line is not ``Name (Authors Year, source): $equation$.``
    """
    name, source, equation = titled(rule.name, rule.title)
    return {
        "rule": f"[`{rule.name}`](#{rule.name})",
        "name": name,
        "update": equation,
        "source": source,
        "state": ", ".join(f"`{slot}`" for slot in state_bytes(rule)) or "nothing",
        "agrees with": ", ".join(agreement.get(rule.name, {})) or "see below",
    }


def by_family() -> str:
    """All rules as a list with a line for each short name of a family, with links."""
    lines: dict[str, list[str]] = {name: [] for name in SHORT.values()}
    for name, rule in all_rules().items():
        short = next((SHORT[part] for part in rule.module.split(".") if part in SHORT), family(rule))
        lines.setdefault(short, []).append(f"[{name}](docs/rules.md#{name})")
    wrappers = ", ".join(f"`{name}`" for name in _wrappers())
    families = [f"- {name}: {', '.join(links)}" for name, links in lines.items()]
    return "\n".join([*families, f"- Wrappers, such as `jaxsgd.cautious(jaxsgd.adamw)(1e-3)`: {wrappers}"])


def table(agreement: Agreement) -> str:
    """All rules as a Markdown table, in alphabetical order."""
    rows = [entry(rule, agreement) for rule in all_rules().values()]
    head = list(rows[0])
    lines = [head, ["---"] * len(head), *(list(row.values()) for row in rows)]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


# -- the page -------------------------------------------------------------------------------------


def page(agreement: Agreement) -> str:
    """Every rule at length, family by family: equation, paper, arguments, state, who agrees."""
    lines = [
        "# The rules",
        "",
        "Made from `jaxsgd.RULES` and `jaxsgd.TREE_RULES` by `python tools/catalog.py --write`; not written by hand.",
        "",
        "Agreement is the largest difference over 50 steps in float64, relative to the largest value of the leaf's",
        "trajectory. It is the worst of four kinds of gradients: normal, sparse, heavy-tailed and constant. The leaves",
        "have the shapes `()`, `(7,)`, `(5, 3)` and `(4, 3, 2)`. The tests hold it below 1e-12 for optax and the NumPy",
        "twins, and below 1e-9 for all others. [divergences.md](divergences.md) lists the intended differences.",
        "State is that of a float32 kernel of 256 x 512, in bytes a parameter. Beside its own arguments every rule of",
        "`jaxsgd.RULES` takes `weight_decay`, `mask`, `groups`, `storage`, `dynamic`, `norms` and `rounding`: see",
        "`help(jaxsgd.Rule.__call__)`. The second-order rules see the whole tree and evaluate the loss.",
        "",
        table(agreement),
    ]
    for title, members in _families().items():
        lines += ["", f"## {title}"]
        for rule in members:
            lines += ["", *_section(rule, agreement)]
    lines += [
        "",
        "## Wrappers",
        "",
        "Each takes a rule and returns a rule: `jaxsgd.cautious(jaxsgd.adamw)(1e-3)`.",
        "",
    ]
    lines += ["| wrapper | update | source | agrees |", "| --- | --- | --- | --- |"]
    for name, title in _wrappers().items():
        _, source, equation = titled(name, title)
        lines.append(f"| `{name}` | {equation} | {source} | {_wrapped(name, agreement)} |")
    lines += ["", "## torch.optim's names", "", "`jaxsgd.torch` has torch's arguments and defaults.", ""]
    lines += ["| class | description |", "| --- | --- |"]
    for name in torch.__all__:
        first = " ".join((inspect.getdoc(getattr(torch, name)) or "").split("\n\n")[0].split())
        lines.append(f"| `jaxsgd.torch.{name}` | {first} |")
    return "\n".join(lines) + "\n"


def _families() -> dict[str, list[AnyRule]]:
    """A family's title -> its rules; the title is the first line of the file that they are written in."""
    out: dict[str, list[AnyRule]] = {}
    for rule in sorted(all_rules().values(), key=lambda rule: (rule.name in TREE_RULES, rule.module, rule.name)):
        out.setdefault(family(rule), []).append(rule)
    return out


def _section(rule: AnyRule, agreement: Agreement) -> list[str]:
    name, source, equation = titled(rule.name, rule.title)
    kept = state_bytes(rule)
    slots = ", ".join(f"`{slot}` {size:.3g}" for slot, size in kept.items())
    rest = description(rule)
    given = {name: default_text(default) for name, default in arguments(rule).items()}
    call = ", ".join(f"{name}={text}" if text else name for name, text in given.items())
    agrees = "; ".join(f"{package} to {digits(error)}" for package, error in agreement.get(rule.name, {}).items())
    lines = [f"### {rule.name}", "", f"{name} ({source})", "", equation, "", *rest, *([""] if rest else [])]
    lines += [f"- Call: `{rule.name}({call})`", f"- State: {sum(kept.values()):.3g} bytes a parameter"]
    lines[-1] += f": {slots}" if slots else ""
    return [*lines, f"- {needs(rule)}" if isinstance(rule, TreeRule) else f"- Agrees with {agrees or 'nothing yet'}"]


def _wrappers() -> dict[str, str]:
    """The functions that make a rule of a rule -> the first line of their docstrings."""
    made = {name: getattr(module, name) for module in FAMILIES for name in module.__all__}
    functions = {name: fn for name, fn in sorted(made.items()) if inspect.isfunction(fn)}
    titles = {name: " ".join((inspect.getdoc(fn) or "").split("\n\n")[0].split()) for name, fn in functions.items()}
    return {name: title for name, title in titles.items() if TITLE.match(title)}


def _wrapped(name: str, agreement: Agreement) -> str:
    found = {rule: row for rule, row in agreement.items() if rule.startswith(f"{name}(")}
    said = [f"`{rule}`: {p} to {digits(error)}" for rule, row in found.items() for p, error in row.items()]
    return "; ".join(said) or "NumPy twins (`tests/rules/test_wrappers.py`)"


# -- the command line -----------------------------------------------------------------------------


def replaced(text: str) -> str:
    """``text`` with the list of rules between its markers.

    Raises:
      ValueError: a marker is missing.
    """
    if BEGIN not in text or END not in text:
        raise ValueError(f"the markers {BEGIN} and {END} are missing")
    before, rest = text.split(BEGIN, 1)
    return f"{before}{BEGIN}\n{by_family()}\n{END}{rest.split(END, 1)[1]}"


def faults(agreement: Agreement) -> list[str]:
    """Rules without a measurement, measurements without a rule, and measurements beyond a bar."""
    out = [f"{name}: not measured; run make tables" for name in sorted(RULES) if name not in agreement]
    for name, row in agreement.items():
        if name not in RULES and not re.fullmatch(r"torch\.\w+|\w+\(.+\)", name):
            out.append(f"{name}: measured, but no rule")
        bars = {package: BARS.get(package, 1e-9) for package in row}
        out += [f"{name}: {e:.1e} from {p}, the bar is {bars[p]:.0e}" for p, e in row.items() if not e <= bars[p]]
    return out


def main(argv: list[str] | None = None) -> int:
    """The command line. Returns the exit code: 1 where ``--check`` finds something wrong, 2 for unreadable files."""
    parser = argparse.ArgumentParser(prog="python tools/catalog.py", description="The lists of rules in the documents.")
    parser.add_argument("--readme", type=pathlib.Path, default=pathlib.Path("README.md"))
    parser.add_argument("--page", type=pathlib.Path, default=pathlib.Path("docs/rules.md"))
    parser.add_argument("--agreement", type=pathlib.Path, default=pathlib.Path("jaxsgd/agreement.json"))
    action = parser.add_mutually_exclusive_group()
    action.add_argument("--check", action="store_true", help="list the measured agreement; fail if anything is stale")
    action.add_argument("--write", action="store_true", help="write the README's list and the page")
    args = parser.parse_args(argv)
    try:
        agreement = json.loads(args.agreement.read_text()) if args.check or args.write else {}
        wanted = {}
        if args.check or args.write:
            wanted = {args.readme: replaced(args.readme.read_text()), args.page: page(agreement)}
    except (OSError, ValueError) as error:
        print(f"catalog: error: {error}", file=sys.stderr)
        return 2
    if args.write:
        for path, text in wanted.items():
            path.write_text(text)
        print(f"catalog: {len(RULES)} rules in {args.readme} and {args.page}")
        return 0
    return _check(agreement, wanted) if args.check else print(table({})) or 0


def _check(agreement: Agreement, wanted: Mapping[pathlib.Path, str]) -> int:
    for name, row in agreement.items():
        print(f"{name}: {'; '.join(f'{package} {digits(error)}' for package, error in row.items())}")
    wrong = faults(agreement)
    for path, text in wanted.items():
        if not path.exists() or path.read_text() != text:
            wrong.append(f"{path} is out of date; run python tools/catalog.py --write")
    for line in wrong:
        print(f"catalog: {line}", file=sys.stderr)
    if not wrong:
        print(f"catalog: {len(RULES)} rules, each measured and in {' and '.join(map(str, wanted))}")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
