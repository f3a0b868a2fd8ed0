"""No file imports from a floor above its own, and no imports go in a circle."""

import ast
import pathlib

import pytest

import jaxsgd

HOUSE = pathlib.Path(jaxsgd.__file__).parent
FLOORS = {
    "numerics": 0, "draws": 0, "paths": 0, "matrices": 0, "meshes": 0, "symmetric": 0, "progress": 0,
    "state": 1, "storage": 1, "blockwise": 1, "hyper": 1, "slots": 1, "rounding": 1, "batches": 1,
    "applying": 1, "rank_one": 1, "elementwise": 1, "pieces": 1, "stacking": 1, "kernels": 1,
    "memory": 1, "annotations": 1, "models": 0, "loss": 1, "report": 1,
    "leaf": 2, "lift": 2, "call": 2, "registry": 2,
    "rules": 3,
    "torch": 4, "transforms": 4, "description": 4, "forms": 4, "cards": 4, "second_order": 4,
    "sharding": 5, "train_state": 5, "placement": 5, "train": 5, "backward": 5, "record": 5, "statistics": 5,
    "checkpoint": 6, "migration": 6, "planning": 6, "ensemble": 6,
    "curvature": 7, "tuning": 7, "diagnosis": 7,
    "plot": 8, "testing": 8,
    "__init__": 9, "__main__": 9,
}  # fmt: skip
FILES = sorted(HOUSE.rglob("*.py"))


def module(file: pathlib.Path) -> str:
    parts = file.relative_to(HOUSE).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" and len(parts) > 1 else parts)


def floor(name: str) -> int:
    return FLOORS[name.split(".")[0]]


def imports(file: pathlib.Path) -> set[str]:
    """The modules of the house that a file imports, at the top or anywhere inside."""
    out = set()
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{file.name}: relative import; say jaxsgd.{node.module}"
            names = [node.module or ""]
            if node.module in ("jaxsgd", "jaxsgd.rules"):
                names = [f"{node.module}.{alias.name}" for alias in node.names]
        elif isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        else:
            continue
        out |= {
            name.removeprefix("jaxsgd.") if name != "jaxsgd" else "__init__"
            for name in names
            if name.split(".")[0] == "jaxsgd"
        }
    return out


@pytest.mark.parametrize("file", FILES, ids=module)
def test_imports_go_down(file):
    here = floor(module(file))
    for name in imports(file):
        assert floor(name) <= here, f"{module(file)} ({here}) imports {name}"


def test_no_cycles():
    edges = {module(file): imports(file) - {"__init__"} for file in FILES if module(file) != "__init__"}
    done: set[str] = set()

    def visit(name, trail):
        assert name not in trail, f"a circle: {' -> '.join([*trail, name])}"
        if name not in done:
            for other in edges.get(name, ()):
                visit(other, [*trail, name])
            done.add(name)

    for name in edges:
        visit(name, [])


def test_no_optax_contrib():
    """Nothing of the product needs optax.contrib, which only the tests compare with."""
    using = [module(file) for file in FILES if "optax.contrib" in file.read_text()]
    assert not using


def test_matplotlib_is_imported_in_one_place():
    def roots(node):
        return [node.module or ""] if isinstance(node, ast.ImportFrom) else [alias.name for alias in node.names]

    def uses(file):
        nodes = (n for n in ast.walk(ast.parse(file.read_text())) if isinstance(n, ast.Import | ast.ImportFrom))
        return any(name.split(".")[0] == "matplotlib" for node in nodes for name in roots(node))

    assert {module(file) for file in FILES if uses(file)} == {"plot.style"}
