"""The picture of a rule's path for its page of the site: what it does on two functions of two weights.

    python tools/pictures.py adam muon --out runs/pictures   # SVG files, to look at

Each rule takes the same rates from the same starts. The picture shows the rate with the lowest mean loss.
"""

from __future__ import annotations

import argparse
import base64
import functools
import hashlib
import html
import io
import json
import pathlib
import re
import shutil
from dataclasses import asdict, dataclass
from typing import Any

import jax
import jax.numpy as jnp
import matplotlib
import numpy as np
from PIL import Image

import jaxsgd
from jaxsgd.plot.landscapes import LANDSCAPES, panel, walk
from jaxsgd.plot.style import COLORS, INK, blank
from jaxsgd.registry import RULES, Rule
from jaxsgd.report import number
from jaxsgd.rules.momentum import look_ahead

__all__ = ["RATES", "STEPS", "Picture", "best", "drawn", "explained", "is_matrix_rule", "pictures", "swept"]

ROOT = pathlib.Path(__file__).parent.parent
CACHE = ROOT / ".cache" / "pictures"
RATES = tuple(float(f"{digit}e{power}") for power in range(-4, 2) for digit in (1, 2, 5)) + (100.0,)
"""The learning rates of the sweep, three a decade."""

STEPS = {"bowl": 50, "rosenbrock": 200}
"""Landscape -> steps that are shown, and by which the rate is chosen."""

SMALL, LARGE = (2, 3), (256, 512)
"""The shapes of a matrix like the one that is drawn, and of one that every rule for matrices sees as such."""


@dataclass(frozen=True)
class Picture:
    """A rule's path on one function.

    Attributes:
      svg: the picture as SVG, without a background, in the ink of the text around it.
      heading: the function, the steps and the learning rate.
    """

    svg: str
    heading: str


# -- paths ----------------------------------------------------------------------------------------


def slot_shapes(rule: Rule, shape: tuple[int, ...]) -> list[list[tuple[int, ...]]]:
    """For each slot of a rule the shapes of the arrays that it keeps of one parameter."""
    state = jax.eval_shape(rule(1e-3).init, {"kernel": jax.ShapeDtypeStruct(shape, jnp.float32)})
    return [[x.shape for x in jax.tree.leaves(slot["kernel"])] for slot in state.slots.values()]


def is_matrix_rule(rule: Rule, shape: tuple[int, int] = SMALL) -> bool:
    """Whether a rule keeps other slots of a matrix than of a vector: factors, bases, or fewer of them."""
    flat = (shape[0] * shape[1],)
    of_matrix = [[flat if s == shape else s for s in shapes] for shapes in slot_shapes(rule, shape)]
    return rule.stacked or of_matrix != slot_shapes(rule, flat)


def diagonal_loss(fn: Any, w: jax.Array) -> jax.Array:
    """A function of two weights as one of a matrix: its diagonal; the other two entries add their squares."""
    return fn(jnp.diagonal(w)) + w[0, 1] ** 2 + w[1, 0] ** 2


@functools.cache
def swept(rule: Rule) -> dict[str, np.ndarray]:
    """Landscape -> the paths of all rates, ``(len(RATES), steps + 1, 2)``. One program computes them all."""
    matrix = is_matrix_rule(rule)
    lands = [LANDSCAPES[name] for name in STEPS]
    fns = [functools.partial(diagonal_loss, land.fn) if matrix else land.fn for land in lands]
    starts = jnp.array([np.diag(land.start) if matrix else land.start for land in lands], jnp.float32)
    ahead = look_ahead if rule is RULES["velocity"] else None

    def one(rate: Any, which: Any) -> Any:
        def loss(params: Any) -> Any:
            return jax.lax.select_n(which, *(fn(params["kernel"]) for fn in fns))

        return walk(rule(rate), loss, {"kernel": starts[which]}, max(STEPS.values()), gradient_at=ahead)["kernel"]

    # LLVM's costly passes would take most of the time, and save none on two weights.
    quick = {"xla_backend_optimization_level": 0, "xla_llvm_disable_expensive_passes": True}
    program = jax.jit(jax.vmap(jax.vmap(one, (0, None)), (None, 0)), compiler_options=quick)
    visited = np.asarray(program(jnp.array(RATES, jnp.float32), jnp.arange(len(lands))))
    visited = np.diagonal(visited, axis1=-2, axis2=-1) if matrix else visited
    return {name: paths[:, : steps + 1] for (name, steps), paths in zip(STEPS.items(), visited, strict=True)}


def best(rule: Rule, name: str) -> int | None:
    """The rate with the lowest mean loss over the steps; None if no rate ends below the start."""
    losses = np.asarray(jax.vmap(jax.vmap(LANDSCAPES[name].fn))(jnp.asarray(swept(rule)[name])), np.float64)
    mean = np.where(losses[:, -1] < losses[:, 0], losses.mean(axis=1), np.inf)
    return int(np.argmin(mean)) if np.isfinite(mean).any() else None


# -- pictures -------------------------------------------------------------------------------------


def pictures(rule: Rule) -> list[Picture]:
    """The path of a rule at its best rate on each function, from the cache if no code has changed since.

    A function on which no rate lowers the loss has no picture.
    """
    file = CACHE / _state_of_the_code() / f"{rule.name}.json"
    if not file.exists():
        made = [drawn(rule, name, index) for name in STEPS if (index := best(rule, name)) is not None]
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(json.dumps([asdict(each) for each in made]))
    return [Picture(**each) for each in json.loads(file.read_text())]


@functools.cache
def _state_of_the_code() -> str:
    """A hash of all code that a path depends on. Pictures of other code are deleted."""
    files = [pathlib.Path(__file__), *sorted(pathlib.Path(jaxsgd.__file__).parent.rglob("*.py"))]
    parts = [file.read_bytes() for file in files] + [jax.__version__.encode(), matplotlib.__version__.encode()]
    name = hashlib.sha256(b"\0".join(parts)).hexdigest()[:16]
    for other in CACHE.glob("*") if CACHE.exists() else ():
        if other.name != name:
            shutil.rmtree(other)
    return name


def drawn(rule: Rule, name: str, index: int) -> Picture:
    """The path of one rate on one landscape."""
    land, points, rate = LANDSCAPES[name], swept(rule)[name][index], number(RATES[index])
    figure = blank(3.3, 2.9)
    panel(figure.subplots(), "last loss", points, land, COLORS[1])
    near = ", ".join(f"{x:.2f}" for x in points[-1])
    alt = (
        f"Path of {rule.name} on the function {land.title.split(':')[0]} at learning rate {rate}: "
        f"{STEPS[name]} steps from {land.start} to ({near}). The minimum is at {land.minimum}."
    )
    label = f'<svg role="img" aria-label="{html.escape(alt)}"'
    svg = as_svg(figure, name).replace("<svg", label, 1)
    return Picture(svg, f"{land.title}. {STEPS[name]} steps, learning rate {rate}")


def explained(rule: Rule) -> str:
    """The explanation of a rule's pictures and of the choice of their rates."""
    lines = [
        "The disc is the start, the star the minimum.",
        f"The learning rate is the one of {len(RATES)} between {number(RATES[0])} and {number(RATES[-1])} that has the "
        "lowest mean loss over the steps. All other arguments have their defaults.",
    ]
    if is_matrix_rule(rule):
        lines.append(
            "The parameter is a 2 x 2 matrix and the picture shows its diagonal. The loss adds the squares of the "
            "other two entries, which start at 0. So the rule sees a matrix whose singular values are the sizes of "
            "the two weights."
        )
    elif is_matrix_rule(rule, LARGE):
        lines.append("This rule treats large matrices in another way, which two weights do not show.")
    if rule is RULES["velocity"]:
        lines.append("The gradient is taken at `jaxsgd.look_ahead`.")
    if any(slot.role for slot in rule.slots.values()):
        lines.append("The path is that of `jaxsgd.eval_params`.")
    return " ".join(lines)


def as_svg(figure: Any, salt: str) -> str:
    """A figure as SVG in one line: ink in the text's colour, no background, contours as pixels of few colours."""
    figure.patch.set_visible(False)
    for ax in figure.axes:
        ax.patch.set_visible(False)
        ax.set_rasterization_zorder(0.25)
        for contours in ax.collections:
            contours.set_zorder(0)
    file = io.StringIO()
    with matplotlib.rc_context({"svg.hashsalt": salt}):
        figure.savefig(file, format="svg", dpi=110, metadata=dict.fromkeys(("Date", "Creator", "Format", "Type")))
    text = file.getvalue()
    text = re.sub(r"<metadata>.*?</metadata>|<!--.*?-->", "", text[text.index("<svg") :], flags=re.DOTALL)
    text = re.sub(r"(?<=base64,)[^\"]+", lambda found: fewer_colors(found[0]), text)
    return re.sub(r"\s*\n\s*", " ", text.replace(INK, "currentColor"))


def fewer_colors(png: str) -> str:
    """A PNG in base64 with 64 colours: a quarter of the bytes."""
    image = Image.open(io.BytesIO(base64.b64decode(png))).convert("RGBA").quantize(64)
    file = io.BytesIO()
    image.save(file, format="png", optimize=True)
    return base64.b64encode(file.getvalue()).decode()


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Draw the paths of rules.")
    parser.add_argument("rules", nargs="*", default=list(RULES), help="names. Default: all.")
    parser.add_argument("--out", type=pathlib.Path, default=pathlib.Path("runs/pictures"), help="a folder")
    args = parser.parse_args(argv)
    args.out.mkdir(parents=True, exist_ok=True)
    for name in args.rules:
        for i, each in enumerate(pictures(RULES[name])):
            (args.out / f"{name}_{i}.svg").write_text(each.svg)
            print(f"{name}: {each.heading}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
