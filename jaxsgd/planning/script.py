"""The loss, parameters, optimizer and batch of a user's script."""

from __future__ import annotations

import importlib
import importlib.util
import inspect
import pathlib
import sys
from collections.abc import Mapping, Sequence
from types import ModuleType
from typing import Any

from jax.sharding import Mesh

from jaxsgd.paths import is_function, nearest
from jaxsgd.planning.plan import plan
from jaxsgd.registry import all_rules
from jaxsgd.train import Step

__all__ = ["HOOK", "plan_arguments"]

HOOK = """    def plan_inputs():
        return {"loss_fn": loss_fn, "params": init, "tx": tx, "batch": batch}"""
DEFAULT = "plan_inputs"
NAMES = {
    "step_or_loss": ("step_or_loss", "loss_fn", "loss", "step"),
    "params": ("params", "init", "model"),
    "tx": ("tx", "optimizer"),
    "batch": ("batch",),
}
"""An argument of `jaxsgd.plan` and the names that scripts have for it, the first that is there counts."""


def plan_arguments(target: str, argv: Sequence[str], mesh: Mesh, optimizer: str | None = None) -> dict[str, Any]:
    """The arguments of `jaxsgd.plan` for what a script trains.

    Args:
      target: ``"train.py"``, ``"train.py:function"``, ``"package.module"`` or ``"package.module:function"``. The
        function returns a dict, or ``(loss_fn, params, batch)``, or ``(loss_fn, params, tx, batch)``. It takes nothing,
        or ``argv``, or ``argv`` and ``mesh``. Default function: ``plan_inputs``. A script without it may have
        ``loss_fn``, ``params`` (or ``init``, ``model``), ``tx`` (or ``optimizer``) and ``batch`` as variables.
      argv: arguments for the function.
      mesh: the mesh that is planned for.
      optimizer: the name of a rule, for a script without an optimizer. Default: ``"adamw"``.

    Raises:
      ValueError: no such file, module or function; something is missing, unknown or too much.
    """
    place, _, name = target.partition(":") if not pathlib.Path(target).is_file() else (target, "", "")
    module = _load(place)
    hook = getattr(module, name or DEFAULT, None)
    if name and not is_function(hook):
        functions = [n for n, x in vars(module).items() if inspect.isfunction(x) and x.__module__ == module.__name__]
        raise ValueError(f"{target}: {place} has no function {name!r}{nearest(name, functions)}")
    where = f"{place}: {name or DEFAULT}()" if hook is not None else place
    if hook is not None:
        given = _named(where, _call(where, hook, argv, mesh))
    else:
        if argv:
            raise ValueError(f"unrecognized arguments: {' '.join(argv)}. {place} has no function that takes them")
        given = _variables(module)
    names = {key: next((n for n in names if n in given), None) for key, names in NAMES.items()}
    out = {key: given.pop(name) for key, name in names.items() if name is not None}
    settings = [n for n in inspect.signature(plan).parameters if n not in {*NAMES, "topology", "mesh_axes", "progress"}]
    for key in given:
        if key not in settings:
            raise ValueError(f"{where}: {key!r} is no argument of jaxsgd.plan{nearest(key, [*NAMES, *settings])}")
    is_step = isinstance(out.get("step_or_loss"), Step)
    missing = [n for n in ("step_or_loss", "params", "batch") if n not in out]
    if missing:
        shown = ", ".join(n.replace("step_or_loss", "loss_fn") for n in missing)
        raise ValueError(f"{where}: {shown} is missing. Add a function that returns them:\n\n{HOOK}\n")
    if out.get("tx") is not None and optimizer is not None:
        raise ValueError(f"--optimizer {optimizer}: {place} has an optimizer of its own. Leave the option out")
    if out.get("tx") is None and not is_step:
        rule = all_rules()[optimizer or "adamw"]
        out["tx"] = rule(rule.usual_rate or 1e-3)
    return {**out, **given}


def _load(place: str) -> ModuleType:
    """A file or a module, run as a module that is not ``__main__``."""
    file = pathlib.Path(place)
    if file.suffix != ".py":
        sys.path.insert(0, "")  # as ``python -m`` does
        try:
            return importlib.import_module(place)
        except ModuleNotFoundError as error:
            if error.name is not None and place.startswith(error.name):
                raise ValueError(f"{place}: no such file or module. Use train.py or package.module") from None
            raise
    if not file.is_file():
        raise ValueError(f"{place}: no such file")
    spec = importlib.util.spec_from_file_location(f"planned_{file.stem}", file)  # hides no module
    assert spec is not None and spec.loader is not None
    sys.path.insert(0, str(file.parent))  # as Python does for a script
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def _call(where: str, hook: Any, argv: Sequence[str], mesh: Mesh) -> Any:
    """The function's answer to as many of ``argv`` and ``mesh`` as it takes."""
    parameters = list(inspect.signature(hook).parameters.values())
    needed = [
        p.name for p in parameters if p.default is p.empty and p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)
    ]
    by_name = {"argv": list(argv), "mesh": mesh}
    if not set(needed) <= set(by_name):
        raise ValueError(f"{where}: it takes {', '.join(needed)}; it may take argv and mesh, or nothing")
    wanted = {name: value for name, value in by_name.items() if name in inspect.signature(hook).parameters}
    if argv and "argv" not in wanted:
        raise ValueError(f"unrecognized arguments: {' '.join(argv)}. {where} takes no argv")
    return hook(**wanted)


def _named(where: str, answer: Any) -> dict[str, Any]:
    if isinstance(answer, Mapping):
        return dict(answer)
    if isinstance(answer, tuple) and len(answer) in (3, 4):
        return dict(zip(("loss_fn", "params", "batch") if len(answer) == 3 else tuple(NAMES), answer, strict=True))
    raise ValueError(
        f"{where}: it returns a {type(answer).__name__}. Use a dict, or (loss_fn, params, tx, batch) with or without tx"
    )


def _variables(module: ModuleType) -> dict[str, Any]:
    """The variables of a module that have the name of an argument; the first name of each counts."""
    held = vars(module)
    first = {key: next((n for n in names if n in held), None) for key, names in NAMES.items()}
    out = {key: held[name] for key, name in first.items() if name is not None}
    return out | {n: held[n] for n in ("model_state", "specs", "zero1", "accumulate") if n in held}
