"""``python -m jaxsgd.planning examples/char_lm.py --topology v5e:4x4 --scale 1.3b``: plan what a script trains.

The script says what that is by a function ``plan_inputs``; arguments that are not of this program are the
script's.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import json
import os
import pathlib
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NoReturn

HOOK = """def plan_inputs(argv, mesh):
    return {"step_or_loss": loss_fn, "params": init, "tx": tx, "batch": shapes}  # and specs, zero1, variants"""


class Parser(argparse.ArgumentParser):
    """Errors in one line."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"jaxsgd.plan: error: {message}\n")


def parse(argv: Sequence[str] | None) -> tuple[argparse.Namespace, list[str]]:
    parser = Parser(
        prog="python -m jaxsgd.planning",
        allow_abbrev=False,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        description="What the training of a script takes on hardware that you do not have.",
        epilog=f"All other arguments go to the script, which says what it trains by a function:\n\n{HOOK}",
    )
    add = parser.add_argument
    add("script", type=pathlib.Path, help="a Python file with a function plan_inputs(argv, mesh) -> dict")
    add("--topology", action="append", help="v5e:4x4, h100:8, cpu; several are compared")
    add("--mesh-axes", metavar="data=-1,model=4", help="the mesh; -1 is the rest; by default data=-1")
    add("--format", choices=("text", "markdown", "json"), default="text")
    add("--no-suggestions", action="store_true", help="do not work out what would fit where this does not")
    return parser.parse_known_args(argv)


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


def load(script: pathlib.Path) -> Callable[..., Any]:
    """The hook of a script, run as a module that is not ``__main__``.

    Raises:
      ValueError: no such file, or it has no hook.
    """
    if not script.is_file():
        raise ValueError(f"script {script}: no such file")
    spec = importlib.util.spec_from_file_location(script.stem, script)
    if spec is None or spec.loader is None:
        raise ValueError(f"script {script}: a Python file is needed")
    sys.path.insert(0, str(script.parent))  # as Python does for a script
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    hook = getattr(module, "plan_inputs", None)
    if not callable(hook):
        raise ValueError(f"script {script}: it has no function plan_inputs, which says what is trained:\n\n{HOOK}")
    return hook


@contextlib.contextmanager
def progress() -> Iterator[Callable[[str], None]]:
    """A line that says what goes on and for how long, on standard error."""
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


def show(answers: Sequence[Any], form: str) -> None:
    from jaxsgd.planning.comparison import Comparison

    together = Comparison(tuple(answers))
    if form == "json":
        print(together.to_json() if len(answers) > 1 else json.dumps(answers[0].to_dict(), indent=2))
    elif form == "markdown":
        print(together.to_markdown())
    else:
        print("\n\n".join(map(str, answers)))
        if len(answers) > 1:
            print()
            with contextlib.suppress(ImportError):
                from rich.console import Console

                return Console().print(together)
            print(together)


def main(argv: Sequence[str] | None = None) -> int:
    """Plan and print; 0 where it fits on all, 1 where it does not, 2 for arguments that cannot be used."""
    args, rest = parse(argv)
    os.environ.setdefault("JAX_PLATFORMS", "cpu")  # nothing runs: no accelerator is asked for
    from jaxsgd.planning.plan import plan
    from jaxsgd.planning.targets import lookup, prepare

    prepare()
    answers = []
    try:
        axes = axes_of(args.mesh_axes)
        hook = load(args.script)
        with progress() as say:
            for topology in args.topology or ["cpu"]:
                say(f"reading {args.script.name}")
                inputs = hook(rest, lookup(topology).mesh(axes))
                settings = {"topology": topology, "mesh_axes": axes, "suggest": not args.no_suggestions}
                answers.append(plan(**inputs, **settings, progress=say))
    except (ImportError, KeyError, RuntimeError, TypeError, ValueError) as error:
        print(f"jaxsgd.plan: error: {error}", file=sys.stderr)
        return 2
    show(answers, args.format)
    return 0 if all(answer.fits for answer in answers) else 1


if __name__ == "__main__":
    sys.exit(main())
