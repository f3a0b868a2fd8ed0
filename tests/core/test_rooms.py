"""Every module can be imported as a module, and every reference in a docstring names something that exists."""

import ast
import builtins
import importlib
import pathlib
import pkgutil
import re
import sys
import types

import pytest

import jaxsgd

ROOT = pathlib.Path(jaxsgd.__file__).parent
MODULES = sorted(
    found.name
    for found in pkgutil.walk_packages(jaxsgd.__path__, "jaxsgd.")
    if not found.name.endswith("__main__")  # a command
)
REFERENCE = re.compile(r"(?<!`)`([A-Za-z_]\w*(?:\.\w+)*)(?:\([^`]*\))?`(?!`)")
"""A name in single backticks; code that is no name has two."""
SHORT = {"nnx": "flax.nnx"}
"""Packages that everybody calls by a short name."""


@pytest.fixture(scope="module")
def modules():
    return {name: importlib.import_module(name) for name in MODULES}


def test_no_name_hides_a_module(modules):
    for name, module in modules.items():
        room, _, last = name.rpartition(".")
        assert getattr(sys.modules[room], last) is module, f"{room} has something else by the name of its module {last}"
        assert isinstance(module, types.ModuleType)


def docstrings(file):
    """The docstrings of a file with the classes around them, and the strings that stand below a constant."""
    stack = [(ast.parse(file.read_text()), ())]
    while stack:
        node, classes = stack.pop()
        for child in ast.iter_child_nodes(node):
            inside = (*classes, child.name) if isinstance(child, ast.ClassDef) else classes
            if isinstance(child, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
                stack.append((child, inside))
            if (
                isinstance(child, ast.Expr)
                and isinstance(child.value, ast.Constant)
                and isinstance(child.value.value, str)
            ):
                yield child.value.value, classes


def found(owner, parts):
    for part in parts:
        fields = getattr(owner, "__dataclass_fields__", {}) or getattr(owner, "_fields", ())
        own = getattr(owner, "__annotations__", {}) or {}
        if hasattr(owner, part):
            owner = getattr(owner, part)
        else:
            return part in fields or part in own
    return True


def resolves(name, module, classes):
    parts = name.split(".")
    parts[:1] = SHORT.get(parts[0], parts[0]).split(".")
    owners = [module, jaxsgd, builtins]
    owners += [owner for owner in (getattr(module, c, None) for c in classes) if owner is not None]
    if any(found(owner, parts) for owner in owners):
        return True
    for cut in range(len(parts), 0, -1):
        try:
            return found(importlib.import_module(".".join(parts[:cut])), parts[cut:])
        except ImportError:
            continue
    return False


@pytest.mark.parametrize("module", MODULES)
def test_references_resolve(module):
    module = importlib.import_module(module)
    wrong = sorted(
        {
            name
            for text, classes in docstrings(pathlib.Path(module.__file__))
            for name in REFERENCE.findall(text)
            if not resolves(name, module, classes)
        }
    )
    assert not wrong, f"{module.__name__}: no such name: {', '.join(wrong)}"
