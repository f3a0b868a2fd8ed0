"""``jaxsgd plan examples/char_lm.py --topology v5e:4x4``: what the training of a script takes."""

from __future__ import annotations

import argparse
import contextlib
import json
import re
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

__all__ = ["add_arguments", "run"]

EPILOG = """The script describes its run by a function of two lines:

    def plan_inputs():  # or plan_inputs(argv), plan_inputs(argv, mesh)
        return {"loss_fn": loss_fn, "params": init, "tx": tx, "batch": batch}

The parameters may be arrays, shapes, a model, or a function of a key that makes one. The batch may be shapes. The dict
may have further arguments of jaxsgd.plan, such as specs and zero1. Without the function, the script's variables of
these names are used. Arguments that are not listed here go to the function.
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of the command."""
    parser.epilog = EPILOG
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    add = parser.add_argument
    add("script", nargs="?", help="train.py, train.py:function, package.module or package.module:function")
    add("--model", metavar="MODULE:FUNCTION", help="the same as the first argument")
    add("--topology", action="append", help="hardware: v5e:4x4, h100:8, cpu. Give it twice to compare. Default: cpu")
    add("--optimizer", metavar="RULE", help="rule to use if the script has no optimizer. Default: adamw")
    add("--mesh-axes", metavar="data=-1,model=4", help="axes of the mesh; -1 takes all other devices. Default: data=-1")
    add("--format", choices=("text", "markdown", "json"), default="text", help="form of the report. Default: text")
    add("--no-suggestions", action="store_true", help="skip the suggestions for a plan that does not fit")
    add("-v", "--verbose", action="store_true", help="show where memory and time go")


def axes_of(text: str | None) -> dict[str, int] | None:
    """``data=-1,model=4`` as a dict. Raises ValueError for another form."""
    if text is None:
        return None
    sizes = {}
    for part in text.split(","):
        name, _, size = part.partition("=")
        if not name or not size.removeprefix("-").isdigit():
            raise ValueError(f"--mesh-axes {text}: {part!r} is not NAME=NUMBER")
        sizes[name] = int(size)
    return sizes


@contextlib.contextmanager
def progress() -> Iterator[Callable[[str], None]]:
    """A line with the present task and its time, on standard error."""
    try:
        from rich.console import Console
        from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn
    except ImportError:
        begin = time.perf_counter()
        yield lambda text: print(f"{time.perf_counter() - begin:6.1f} s  {text}", file=sys.stderr, flush=True)
        return
    columns = (SpinnerColumn(), TextColumn("{task.description}"), TimeElapsedColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task("starting", total=None)
        yield lambda text: bar.update(task, description=text)


def show(answers: Sequence[Any], form: str, verbose: bool) -> None:
    """Print one plan, or several side by side."""
    from jaxsgd.planning.comparison import Comparison
    from jaxsgd.report import MORE

    answer = answers[0] if len(answers) == 1 else Comparison(tuple(answers))
    if form == "json":
        print(json.dumps([plan.to_dict() for plan in answers] if len(answers) > 1 else answer.to_dict(), indent=2))
    elif form == "markdown":
        print(answer.to_markdown())
    else:
        print(answer.text(verbose=verbose).replace(MORE, "More: -v"))


def _make_cpus(topologies: Sequence[str]) -> None:
    """Give this process as many CPU devices as the largest ``"cpu:8"`` names, if JAX has not started yet."""
    import jax

    counts = [int(text.partition(":")[2]) for text in topologies if re.fullmatch(r"cpu:[1-9]\d*", text)]
    if counts:
        with contextlib.suppress(RuntimeError):  # it has: the plan says what is missing
            jax.config.update("jax_num_cpu_devices", max(counts))


def run(args: argparse.Namespace, rest: Sequence[str]) -> int:
    """Plan and print.

    Returns:
      0 if it fits everywhere, 1 if it does not.

    Raises:
      ImportError, KeyError, RuntimeError, TypeError, ValueError: arguments that cannot be used; see `jaxsgd.plan`.
    """
    from jaxsgd.planning.plan import plan
    from jaxsgd.planning.script import plan_arguments
    from jaxsgd.planning.targets import lookup, prepare

    if (args.script is None) == (args.model is None):
        raise ValueError("a script is needed: jaxsgd plan train.py, or jaxsgd plan --model module:function")
    target = args.script or args.model
    _make_cpus(args.topology or [])
    prepare()
    axes, answers = axes_of(args.mesh_axes), []
    with progress() as say:
        for topology in args.topology or ["cpu"]:
            say(f"reading {target}")
            inputs = plan_arguments(target, rest, lookup(topology).mesh(axes), args.optimizer)
            settings = {"topology": topology, "mesh_axes": axes, "suggest": not args.no_suggestions}
            answers.append(plan(**inputs, **settings, progress=say))
    show(answers, args.format, args.verbose)
    return 0 if all(answer.fits for answer in answers) else 1
