"""The ``jaxsgd`` command: plan a script, list the rules, show one.

jaxsgd plan examples/char_lm.py --topology v5e:4x4 --topology h100:8
jaxsgd rules --like adam
jaxsgd rule adamw
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from typing import NoReturn

from jaxsgd.planning import command


class Parser(argparse.ArgumentParser):
    """An error is one line on standard error, with exit code 2."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: error: {message}\n")


def parse(argv: Sequence[str] | None) -> tuple[argparse.Namespace, list[str]]:
    """The arguments, and those that go to the script."""
    parser = Parser(prog="jaxsgd", description="Plan a train step, or look up an update rule.", allow_abbrev=False)
    commands = parser.add_subparsers(dest="command", required=True, metavar="plan | rules | rule")
    plan = commands.add_parser(
        "plan", help="show memory, time and transfers of a script's train step on hardware you do not have",
        description="Plan the train step of a script for hardware that you do not have.", allow_abbrev=False,
    )  # fmt: skip
    command.add_arguments(plan)
    rules = commands.add_parser("rules", help="list the update rules", allow_abbrev=False)
    rules.add_argument("--like", metavar="NAME", help="list only rules of the same family, or with this in the name")
    rule = commands.add_parser("rule", help="show one rule: equation, arguments, state, agreement", allow_abbrev=False)
    rule.add_argument("name", help="name of a rule, such as adamw")
    args, rest = parser.parse_known_args(argv)
    if rest and args.command != "plan":
        commands.choices[args.command].error(f"unrecognized arguments: {' '.join(rest)}")
    return args, rest


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command.

    Returns:
      The exit code: 0; 1 if a plan does not fit; 2 for arguments that cannot be used.
    """
    args, rest = parse(argv)
    os.environ.setdefault("JAX_PLATFORMS", "cpu")  # nothing runs: no accelerator is asked for
    try:
        if args.command == "plan":
            return command.run(args, rest)
        from jaxsgd import cards
        from jaxsgd.registry import all_rules

        if args.command == "rule":
            print(cards.card(all_rules()[args.name]))
        else:
            print(cards.rules_table(cards.like(args.like) if args.like else all_rules().values()))
    except (ImportError, KeyError, RuntimeError, TypeError, ValueError) as error:
        message = error.args[0] if isinstance(error, KeyError) and error.args else error
        print(f"jaxsgd {args.command}: error: {message}", file=sys.stderr)
        return 2
    except BrokenPipeError:  # of a pager that was closed
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return 0


if __name__ == "__main__":
    sys.exit(main())
