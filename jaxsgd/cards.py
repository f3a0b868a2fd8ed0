"""The card of each rule, to print: equation, arguments, state, agreement, relatives."""

from __future__ import annotations

import functools
import inspect
import json
import math
import pathlib
import re
import sys
from collections.abc import Iterable, Mapping
from typing import Any

import jax
import jax.numpy as jnp

from jaxsgd.call import FRAME, type_text
from jaxsgd.paths import aligned, nearest
from jaxsgd.registry import AnyRule, Rule, all_rules
from jaxsgd.report import Column, Table
from jaxsgd.second_order.tree_rule import TreeRule
from jaxsgd.state import State

__all__ = [
    "agreement",
    "arguments",
    "card",
    "default_text",
    "description",
    "digits",
    "family",
    "like",
    "needs",
    "relatives",
    "rules_table",
    "state_bytes",
    "titled",
]

TITLE = re.compile(r"(?P<name>.+?) \((?P<source>[^$]+)\): (?P<equation>[^$]*\$.+?\$([^$.]*\$.+?\$)*)\.?( |$)")
KERNEL = (256, 512)
"""The kernel whose state is counted."""
SMALL = (64, 64)
"""The same for a rule of the whole tree: Newton's method takes no larger one."""


def titled(where: str, title: str) -> tuple[str, str, str]:
    """Name, source and equation of a docstring's first line.

    Raises:
      ValueError: it has another form.
    """
    match = TITLE.match(title)
    if match is None:
        raise ValueError(f"{where}: the docstring begins 'Name (Authors Year, arXiv:id): $equation$.', not {title!r}")
    return match["name"], match["source"], match["equation"].replace("|", r"\vert ")


def state_bytes(rule: AnyRule) -> dict[str, float]:
    """Slot -> bytes a parameter, for a float32 kernel of 256 x 512; 0 where such a kernel has no such slot.

    L-BFGS has optax's state, without slots: all its arrays count as ``"memory"``.
    """
    tx = rule(1e-3)
    shape = KERNEL if isinstance(rule, Rule) else SMALL
    sizes = lambda tree: sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(tree))  # noqa: E731
    state = jax.eval_shape(tx.init, {"kernel": jnp.zeros(shape), "bias": jnp.zeros(shape[1:])})
    if not isinstance(state, State):
        alone = jax.eval_shape(tx.init, jnp.zeros(shape))
        return {"memory": sum(sizes(x) for x in jax.tree.leaves(alone) if x.ndim) / math.prod(shape)}
    return {slot: sizes(held["kernel"]) / math.prod(shape) for slot, held in state.slots.items()}


def family(rule: AnyRule) -> str:
    """The title of the file that a rule is written in."""
    module = sys.modules.get(rule.module)
    return (inspect.getdoc(module) or rule.module).split("\n")[0].rstrip(".")


def arguments(rule: AnyRule) -> dict[str, Any]:
    """The rule's own arguments with their defaults; those that every rule of one array has are left out."""
    if not isinstance(rule, Rule):
        return dict(rule.defaults)
    return {n: d for n, d in rule.defaults.items() if n not in FRAME or n == "weight_decay" and d != FRAME[n]}


def description(rule: AnyRule) -> list[str]:
    """The docstring's text between the first line and the arguments, if there is any."""
    return [text.split("\n\nArgs:")[0] for text in rule.doc.split("\n\n", 1)[1:]]


def default_text(default: Any) -> str:
    """A default as it is written; empty where there is none, "see above" for an object whose text is an address."""
    text = "" if default is inspect.Parameter.empty else repr(default)
    return "see above" if " at 0x" in text else text


@functools.cache
def agreement() -> Mapping[str, Mapping[str, float]]:
    """Rule -> package -> largest relative error of 50 steps in float64 (``tests/helpers/agreement.py``)."""
    return json.loads(pathlib.Path(__file__).with_name("agreement.json").read_text())


def digits(error: float) -> str:
    """An error as digits: ``"14 digits (2e-15)"``."""
    return "exactly" if error == 0 else f"{-math.ceil(math.log10(error))} digits ({error:.0e})"


def like(name: str) -> list[AnyRule]:
    """The rules of the same family as ``name``, and those whose name or title contains it.

    Raises:
      ValueError: there is none.
    """
    word, known = name.lower(), all_rules()
    families = {known[word].module} if word in known else set()
    found = [r for r in known.values() if r.module in families or word in r.name.lower() or word in r.title.lower()]
    if not found:
        raise ValueError(f"--like {name}: no rule has this name or mentions it{nearest(name, known)}")
    return sorted(found, key=lambda rule: (rule.name != word, rule.module not in families, rule.name))


def relatives(rule: AnyRule) -> list[str]:
    """The names of the other rules of a family."""
    return [other.name for other in all_rules().values() if other.module == rule.module and other is not rule]


def needs(rule: TreeRule) -> str:
    """Two sentences about the extra arguments of the update."""
    *most, last = (f"`{name}`" for name in rule.needs if name != "split_loss")
    listed = f"{', '.join(most)} and {last}" if most else last
    split = ", a `jaxsgd.split_loss`" if "split_loss" in rule.needs else ""
    return f"The update also needs {listed}{split}. `jaxsgd.make_step` supplies {'them' if most else 'it'}."


def rules_table(rules: Iterable[AnyRule]) -> Table:
    """Rules as a table: name, bytes of state, what it is with its source."""
    columns = (
        Column("rule", kind="text"),
        Column("state", unit="bytes a parameter"),
        Column("description", kind="text"),
    )
    rows = []
    for rule in rules:
        name, source, _ = titled(rule.name, rule.title)
        rows.append((rule.name, round(sum(state_bytes(rule).values()), 2), f"{name} ({source})"))
    return Table(columns, tuple(rows))


def card(rule: AnyRule) -> str:
    """A rule in full: equation, source, arguments, state, agreement, relatives."""
    name, source, equation = titled(rule.name, rule.title)
    lines = [f"jaxsgd.{rule.name}: {name} ({source})", "", f"  {equation}", ""]
    rest = rule.doc.split("\n\n", 1)[1:]
    lines += [*rest, ""] if rest else []
    parameters = inspect.signature(rule).parameters
    own = arguments(rule)
    shown = {name: default_text(default) for name, default in own.items()}
    rows = [(name, shown[name], type_text(parameters[name])) for name in own]
    lines += [aligned([("argument", "default", "type"), *rows]), ""]
    if isinstance(rule, TreeRule):
        lines += [needs(rule).replace("`", "")]
    else:
        lines += [f"Every rule of one array also takes {', '.join(n for n in FRAME if n not in own)}:"]
        lines += [f"help(jaxsgd.{rule.name})"]
    kept = state_bytes(rule)
    slots = rule.slots if isinstance(rule, Rule) else {}
    lines += ["", f"state: {sum(kept.values()):.3g} bytes a parameter"]
    for name, slot in slots.items():
        by = f", switched on by {slot.unless}" if slot.unless else ""
        lines.append(f"  {name}: {slot.kind}, {f'{kept[name]:.3g}' if name in kept else f'none by default{by}'}")
    lines += [f"  {name}: {size:.3g}" for name, size in kept.items() if name not in slots]
    if rule.usual_rate is not None:
        lines += ["", f"usual learning rate: {rule.usual_rate:g}"]
    measured = agreement().get(rule.name)
    if measured is not None:
        lines += ["", "agreement after 50 steps in float64"]
        lines += [f"  {package}: {digits(error)}" for package, error in measured.items()]
    lines += ["", f"related: {', '.join(relatives(rule)) or 'none'}"]
    return "\n".join(lines)
