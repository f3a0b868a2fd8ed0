"""Pages of the site that are made from the code, and equations as MathML. mkdocs calls the functions `on_...`.

    make site   # builds site/, a warning is an error

The hooks write the front page (README.md), a page for each rule, and a page for each notebook with its saved outputs.
They also write the API, with the docstring of every public name.
"""

from __future__ import annotations

import inspect
import itertools
import json
import pathlib
import re
from collections.abc import Mapping
from types import ModuleType
from typing import Any

import latex2mathml.converter
from mkdocs.structure.files import File, Files
from pictures import explained, pictures
from stubs import homes

import jaxsgd
from jaxsgd.cards import (
    agreement,
    arguments,
    default_text,
    description,
    digits,
    family,
    needs,
    relatives,
    state_bytes,
    titled,
)
from jaxsgd.registry import RULES, AnyRule, Rule, all_rules
from jaxsgd.second_order.tree_rule import TreeRule

ROOT = pathlib.Path(__file__).parent.parent
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
CODE = re.compile(r"(```.*?```|`[^`\n]*`)", re.DOTALL)
FORMULA = re.compile(r"\$\$[^$]+\$\$|\$[^$]+\$")
DISPLAYED = re.compile(r"\$\$([^$]+)\$\$")
EQUATION = re.compile(r"\$([^$\n]+)\$")
REFERENCE = re.compile(r"(?<!`)`(jaxsgd\.[\w.]+)`(?!`)")
NO_PICTURE = "No learning rate of the sweep lowers a function of two weights, so there is no picture."
FRAME_ARGUMENTS = (
    "Every rule of one array also takes `weight_decay`, `mask`, `groups`, `storage`, `dynamic`, `norms` and `rounding`."
)
TOPICS = {
    "Train": ["TrainState", "make_step", "Step", "Recorder", "checked", "check_donation", "batch_statistics", "metrics",
              "with_hyper", "eval_params", "look_ahead", "describe", "State"],
    "Shard": ["shard_batch", "init_sharded", "assert_sharded", "state_sharding"],
    "Store": ["Storage", "plain", "cast", "int8", "fp8", "migrate"],
    "Tune": ["probe", "Probe", "range_test", "RangeTest", "sweep", "Sweep", "pick", "Pick", "sharpness", "Sharpness",
             "noise_scale", "NoiseScale", "scale_learning_rate", "diagnose", "Diagnosis"],
    "Plan": ["plan"],
    "Second order": ["minimize", "least_squares", "lbfgs", "newton", "newton_cg", "gauss_newton", "split_loss"],
    "Write a rule": ["rule", "wrapper", "Rule"],
}  # fmt: skip
"""Headings of the API page and the names below them; all others follow under the rooms that they are written in."""


def on_config(config: Any) -> Any:
    """List the notebooks in the navigation, after the first two pages."""
    config["nav"].insert(2, {"Notebooks": [{notebook_title(p): f"notebooks/{p.stem}.md"} for p in NOTEBOOKS]})
    return config


def on_files(files: Files, config: Any) -> Files:
    """Add the pages that are made."""
    pages = {"index.md": front_page(), "api.md": api_index()}
    pages |= {f"rules/{name}.md": rule_page(rule) for name, rule in all_rules().items()}
    pages |= {f"notebooks/{path.stem}.md": notebook_page(path) for path in NOTEBOOKS}
    pages |= api_pages()
    for uri, text in pages.items():
        files.append(File.generated(config, uri, content=text))
    return files


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Equations between dollars as MathML; names of rules in the table of rules lead to their pages."""
    if page.file.src_uri == "rules.md":
        markdown = re.sub(r"\[`(\w+)`\]\(#\w+\)", r"[`\1`](rules/\1.md)", markdown)
        markdown = "\n".join(narrow(line) for line in markdown.split("\n"))
    if page.file.src_uri.startswith("notebooks/"):
        markdown = re.sub(r"\]\(\.\./docs/", "](../", markdown)
    markdown = re.sub(r"\]\((\.\./)?notebooks/(\w+)\.ipynb", r"](notebooks/\2.md", markdown)
    parts = CODE.split(markdown)  # code is every second one
    parts[::2] = [DISPLAYED.sub(lambda found: mathml(found[1], "block"), part) for part in parts[::2]]
    parts[::2] = [EQUATION.sub(lambda found: mathml(found[1]), part) for part in parts[::2]]
    return "".join(parts)


def narrow(line: str) -> str:
    """A row of the table of rules in three columns, its equations one below the other: it fits without scrolling."""
    cells = re.split(r"(?<!\\) \| ", line.strip().removeprefix("| ").removesuffix(" |"))
    if not line.startswith("| ") or len(cells) != 6:
        return line
    rule, name, update, source, state, agrees = cells
    if set(rule) == {"-"}:
        return "| --- | --- | --- |"
    if rule == "rule":
        return "| rule, state | update | source; agrees with |"
    return f"| {rule}<br>{name}<br>{state} | {EQUATION.sub(stacked, update)} | {source}<br>agrees with {agrees} |"


def stacked(found: re.Match[str]) -> str:
    """``$a,\\; b$`` as ``$a$`` and ``$b$`` on lines of their own."""
    return "<br>".join(f"${part}$" for part in parts_of(found[1]))


def parts_of(equations: str) -> list[str]:
    """Equations of one line that a comma and a space separate, outside of any bracket."""
    parts, depth, begin = [], 0, 0
    for found in re.finditer(r"[({\[]|[)}\]]|,\s*\\[;,]", equations):
        if found[0][0] != ",":
            depth += 1 if found[0] in "({[" else -1
        elif depth == 0:
            parts.append(equations[begin : found.start()])
            begin = found.end()
    return [part.strip() for part in (*parts, equations[begin:])]


def mathml(text: str, display: str = "inline") -> str:
    """LaTeX as MathML in one line."""
    made = latex2mathml.converter.convert(text, display=display).replace("\n", " ")
    return f"<span>{made}</span>" if display == "inline" else made  # Markdown takes <math> for a block of its own


def front_page() -> str:
    """README.md with links that work below docs/."""
    text = (ROOT / "README.md").read_text()
    text = re.sub(r"\]\(docs/rules\.md#(\w+)\)", r"](rules/\1.md)", text)
    return re.sub(r"\]\(docs/", "](", text)


# -- notebooks ------------------------------------------------------------------------------------


def notebook_page(path: pathlib.Path) -> str:
    """A notebook as Markdown: its text, its code, and its outputs as they were saved."""
    parts = []
    for cell in json.loads(path.read_text())["cells"]:
        text = "".join(cell["source"])
        if cell["cell_type"] == "markdown":
            parts.append(FORMULA.sub(lambda found: found[0].replace("\n", " "), text))
            continue
        parts.append(fenced(text.removeprefix("%matplotlib inline\n"), "python"))
        for written, group in itertools.groupby(cell["outputs"], lambda saved: "text" in saved):
            outputs = list(group)
            parts += [fenced("".join(line for o in outputs for line in o["text"]).rstrip(), "text")] if written else []
            parts += [] if written else [shown(o["data"]) for o in outputs if "data" in o]
    return "\n\n".join(parts) + "\n"


def shown(data: Mapping[str, Any]) -> str:
    """One result of a cell: Markdown as it is, a picture in the page itself, anything else as text."""
    if "text/markdown" in data:
        return "".join(data["text/markdown"])
    if "image/png" in data:
        return f'<img alt="Figure" src="data:image/png;base64,{"".join(data["image/png"]).strip()}">'
    return fenced("".join(data.get("text/plain", "")).rstrip(), "text")


def notebook_title(path: pathlib.Path) -> str:
    return "".join(json.loads(path.read_text())["cells"][0]["source"]).split("\n")[0].removeprefix("# ")


def fenced(text: str, language: str) -> str:
    """A code block; its fence is longer than any in the text."""
    fence = "`" * max(3, 1 + max((len(run) for run in re.findall("`+", text)), default=0))
    return f"{fence}{language}\n{text}\n{fence}"


# -- rules ----------------------------------------------------------------------------------------


def rule_page(rule: AnyRule) -> str:
    """A rule in full: equation, paths, arguments, state, agreement, cost, code, relatives."""
    name, source, equation = titled(rule.name, rule.title)
    kept = state_bytes(rule)
    shown = {n: text and f"`{text}`" for n, d in arguments(rule).items() for text in [default_text(d)]}
    slots = [(f"`{n}`", kind(rule, n), f"{b:.3g}") for n, b in kept.items()]
    parts = [
        [
            f"# {rule.name}",
            "",
            f"**{name}** ({source})",
            "",
            shown_equation(equation),
            "",
            *map(ours, description(rule)),
        ],
        ["```python", f"tx = jaxsgd.{rule.name}({example(rule)})", "```"],
        paths(rule) if isinstance(rule, Rule) else [],
        ["## Arguments", "", *table(("argument", "default"), [(f"`{n}`", d) for n, d in shown.items()])],
        [needs(rule) if isinstance(rule, TreeRule) else FRAME_ARGUMENTS],
        ["## State", "", f"{sum(kept.values()):.3g} bytes a parameter in float32."],
        table(("slot", "kind", "bytes a parameter"), slots),
        measured(rule) if isinstance(rule, Rule) else [],
        ["## Related", "", ", ".join(f"[{other}]({other}.md)" for other in relatives(rule)) or "None."],
        [f"Family: {family(rule)}."],
    ]
    lines = [line for part in parts for line in (*part, "")]
    return "\n".join(lines) + "\n"


def measured(rule: Rule) -> list[str]:
    """A rule's agreement with other packages, its cost on hardware, and its code."""
    agrees = [(package, digits(error)) for package, error in agreement().get(rule.name, {}).items()]
    return [
        *["## Agreement", "", "The largest relative difference over 50 steps in float64.", ""],
        *[*table(("compared with", "agrees"), agrees), ""],
        *cost(rule.name),
        *["## The code", "", "```python", code(rule), "```"],
    ]


def shown_equation(text: str) -> str:
    """Equations on lines of their own; words with equations among them as a sentence."""
    alone = re.fullmatch(r"\$([^$]+)\$", text)
    return "\n".join(mathml(part, "block") for part in parts_of(alone[1])) if alone else text


def ours(text: str) -> str:
    """A docstring's text, in which names of the package are code, not links."""
    return REFERENCE.sub(r"`\1`", text)


def example(rule: AnyRule) -> str:
    rate = "1e-3" if rule.usual_rate is None else f"{rule.usual_rate:g}"
    first = next(iter(arguments(rule)), "")
    return rate if first == "learning_rate" else ""


def paths(rule: Rule) -> list[str]:
    """Pictures of the rule's paths, or a sentence where there is none."""
    made = "".join(f"<figure>{p.svg}<figcaption>{p.heading}</figcaption></figure>" for p in pictures(rule))
    shown = [f'<div class="paths">{made}</div>', "", explained(rule)] if made else [NO_PICTURE]
    return ["## Its path", "", *shown]


def kind(rule: AnyRule, slot: str) -> str:
    return rule.slots[slot].kind if isinstance(rule, Rule) and slot in rule.slots else "other"


def code(rule: Rule) -> str:
    """The function that is the rule, without decorator and docstring."""
    text = inspect.getsource(rule.fn)
    text = text[text.index("def ") :]
    return re.sub(r'\n    r?""".*?"""', "", text, count=1, flags=re.DOTALL).rstrip()


def table(head: tuple[str, ...], rows: list[tuple[str, ...]]) -> list[str]:
    if not rows:
        return ["None."]
    return [f"| {' | '.join(row)} |" for row in (head, ("---",) * len(head), *rows)]


def cost(name: str) -> list[str]:
    """The cost of the update by the compilers for a v5e and an H100."""
    held: Mapping[str, Any] = json.loads((ROOT / "docs" / "ledger.json").read_text())["rows"].get(name, {})
    rows = [
        (device, storage, f"{row['bytes']:.3g}", f"{row['ratio']:.2f}", f"{row['fusions']:.3g}")
        for storage, devices in held.items()
        for device, row in devices.items()
    ]
    head = ("device", "storage", "bytes moved a parameter", "over the least", "fusions a parameter array")
    return (
        ["## Cost of an update", "", *table(head, rows), "", "From the compilers: [ledger](../ledger.md).", ""]
        if rows
        else []
    )


# -- the API --------------------------------------------------------------------------------------


def public() -> dict[str, str]:
    """Public name -> where it is written, for all names of `jaxsgd` that are no update rules and no modules."""
    out = {}
    for name, home in homes().items():
        thing = getattr(jaxsgd, name)
        if name not in RULES and not isinstance(thing, ModuleType) and not name.startswith("_"):
            out[name] = f"{home}.{name}"
    return out


def topics() -> dict[str, list[str]]:
    """Heading -> public names."""
    names = public()
    out = {title: [n for n in listed if n in names] for title, listed in TOPICS.items()}
    placed = {n for listed in out.values() for n in listed}
    out["Transform"] = sorted(n for n in names if n not in placed and ".transforms." in names[n])
    placed |= set(out["Transform"])
    out["Wrappers, and their tools"] = sorted(n for n in names if n not in placed)
    return out


def slug(title: str) -> str:
    return re.sub(r"\W+", "_", title.lower()).strip("_")


def api_index() -> str:
    """A list of all public names."""
    lines = ["# API", "", "Every public name. The update rules have [pages of their own](rules.md).", ""]
    for title, names in topics().items():
        links = ", ".join(f"[`{name}`](api/{slug(title)}.md#{public()[name]})" for name in names)
        lines += [f"**{title}**: {links}", ""]
    return "\n".join(lines)


def api_pages() -> dict[str, str]:
    """A page for each heading, on which mkdocstrings writes the docstrings."""
    places = public()
    return {
        f"api/{slug(title)}.md": "\n\n".join([f"# {title}", *(f"::: {places[name]}" for name in names)]) + "\n"
        for title, names in topics().items()
    }
