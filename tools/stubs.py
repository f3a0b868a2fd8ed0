"""Write jaxsgd/__init__.pyi, in which an editor sees the arguments of every rule.

python tools/stubs.py            # writes it
python tools/stubs.py --check    # fails if it is out of date
"""

from __future__ import annotations

import argparse
import inspect
import pathlib
import sys
from typing import Any

import jaxsgd
from jaxsgd.call import type_text
from jaxsgd.registry import Rule

FILE = pathlib.Path(jaxsgd.__file__).with_suffix(".pyi")
HEAD = '''"""Made by `python tools/stubs.py` from the rules' signatures; not written by hand."""

# pyright: reportIncompatibleMethodOverride=false
# (a rule's call is narrower than that of its class)
from typing import Any

import optax

from jaxsgd import checkpoint as checkpoint
from jaxsgd import planning as planning
from jaxsgd import plot as plot
from jaxsgd import testing as testing
from jaxsgd import torch as torch
from jaxsgd.lift import Transformation
from jaxsgd.paths import Groups
{imports}

Schedule = optax.Schedule
__version__: str
__all__: list[str]

'''


def homes() -> dict[str, str]:
    """Public name -> the module that it comes from, for what is no rule."""
    out = {}
    for name in sorted(set(jaxsgd.__all__) - {"torch"}):
        value = getattr(jaxsgd, name)
        if isinstance(value, Rule):
            continue
        module = getattr(value, "__module__", None)
        if not str(module).startswith(("jaxsgd", "optax")) or getattr(value, "__name__", name) != name:
            module = next(m for m in sorted(sys.modules) if m.startswith("jaxsgd.") and _defines(m, name, value))
        out[name] = str(module)
    return out


def _defines(module: str, name: str, value: Any) -> bool:
    return name in getattr(sys.modules[module], "__all__", ()) and getattr(sys.modules[module], name, None) is value


def shown(p: inspect.Parameter) -> str:
    if p.default is p.empty:
        return f"{p.name}: {type_text(p)}"
    simple = p.default is None or isinstance(p.default, bool | int | float | str)
    annotation = type_text(p)
    if p.default is None and "None" not in annotation and annotation != "Any":
        annotation += " | None"
    return f"{p.name}: {annotation} = {repr(p.default) if simple or p.default == () else '...'}"


def of_rule(rule: Rule, name: str) -> str:
    """The class of one rule, whose call has its signature."""
    signature: inspect.Signature = rule.__signature__  # type: ignore[attr-defined]  # set by the rule
    parts, keyword = ["self"], False
    for p in signature.parameters.values():
        if p.kind is p.KEYWORD_ONLY and not keyword:
            parts.append("*")
            keyword = True
        parts.append(shown(p))
    lines = ",\n        ".join(parts)
    return (
        f"class _{name}(Rule):\n    def __call__(\n        {lines},\n    ) -> Transformation: ...\n\n{name}: _{name}\n"
    )


def stub() -> str:
    imports = "\n".join(f"from {module} import {name} as {name}" for name, module in homes().items())
    rules = {name: getattr(jaxsgd, name) for name in sorted(set(jaxsgd.__all__))}
    classes = [of_rule(rule, name) for name, rule in rules.items() if isinstance(rule, Rule)]
    return HEAD.format(imports=imports) + "\n".join(classes)


def main() -> int:
    parser = argparse.ArgumentParser(description="The stub that shows editors the arguments of every rule.")
    parser.add_argument("--check", action="store_true", help="fail if the file is out of date")
    if parser.parse_args().check:
        current = FILE.exists() and FILE.read_text() == stub()
        print(f"stubs: {FILE.name} is {'current' if current else 'out of date; run python tools/stubs.py'}")
        return 0 if current else 1
    FILE.write_text(stub())
    print(f"stubs: {FILE.name} written")
    return 0


if __name__ == "__main__":
    sys.exit(main())
