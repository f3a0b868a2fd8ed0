"""The table of rules, made from `RULES`, and its place in the README.

Floor 7. ``python -m jaxsgd.catalog`` prints the table, ``--write`` puts it into the README between its markers,
``--check`` fails where the README says something else.
"""

from __future__ import annotations

import argparse
import pathlib
import re
import sys

import jax
import jax.numpy as jnp

from jaxsgd.rule import Rule
from jaxsgd.rules import RULES

__all__ = ["entry", "main", "table"]

BEGIN, END = "<!-- rules: begin -->", "<!-- rules: end -->"
TITLE = re.compile(r"(?P<name>.+?) \((?P<source>[^$]+)\): (?P<equation>\$.+?\$)\.?( |$)")


def entry(rule: Rule) -> dict[str, str]:
    """One row: rule, what it is, where it comes from, what it keeps, who agrees.

    Raises:
      ValueError: the docstring's first line is not ``Name (Authors Year, source): $equation$.``
    """
    match = TITLE.match(rule.title)
    if match is None:
        raise ValueError(
            f"{rule.name}: the docstring begins 'Name (Authors Year, arXiv:id): $equation$.', not {rule.title!r}"
        )
    state = jax.eval_shape(rule(1e-3).init, jnp.zeros((1,)))
    kept = ", ".join(f"`{slot}`" for slot in state.slots) or "nothing"
    oracle = rule.oracle
    package = "NumPy twin" if oracle is None else "optax"
    if rule.module.endswith("rules.torch"):
        package = "torch"
    return {
        "rule": f"`{rule.name}`",
        "name": match["name"],
        "update": match["equation"].replace("|", r"\vert "),
        "source": match["source"],
        "state": kept,
        "agrees with": package,
    }


def table() -> str:
    """All rules as a Markdown table, in alphabetical order."""
    rows = [entry(RULES[name]) for name in sorted(RULES)]
    head = list(rows[0])
    lines = [head, ["---"] * len(head), *(list(row.values()) for row in rows)]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def replaced(text: str) -> str:
    """``text`` with the table between its markers.

    Raises:
      ValueError: a marker is missing.
    """
    if BEGIN not in text or END not in text:
        raise ValueError(f"the markers {BEGIN} and {END} are missing")
    before, rest = text.split(BEGIN, 1)
    return f"{before}{BEGIN}\n{table()}\n{END}{rest.split(END, 1)[1]}"


def main(argv: list[str] | None = None) -> int:
    """The command line. Returns the exit code: 1 where ``--check`` finds another table."""
    parser = argparse.ArgumentParser(prog="python -m jaxsgd.catalog", description="The table of rules.")
    parser.add_argument("--readme", type=pathlib.Path, default=pathlib.Path("README.md"))
    action = parser.add_mutually_exclusive_group()
    action.add_argument("--check", action="store_true", help="fail if the README's table is not this one")
    action.add_argument("--write", action="store_true", help="put the table into the README")
    args = parser.parse_args(argv)
    if not (args.check or args.write):
        print(table())
        return 0
    try:
        text = args.readme.read_text()
        wanted = replaced(text)
    except (OSError, ValueError) as error:
        print(f"catalog: error: {args.readme}: {error}", file=sys.stderr)
        return 2
    if args.write:
        args.readme.write_text(wanted)
    elif text != wanted:
        print(f"catalog: {args.readme} is out of date; run python -m jaxsgd.catalog --write", file=sys.stderr)
        return 1
    print(f"catalog: {len(RULES)} rules in {args.readme}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
