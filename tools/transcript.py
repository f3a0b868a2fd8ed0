"""Write docs/tools.md: what a new user sees of every tool, on a small model of their own.

    python tools/transcript.py            # writes it
    python tools/transcript.py --check    # fails if its calls, or the form of its answers, are out of date
    python tools/transcript.py --html page.html    # the reports as a notebook shows them

Each call is run, and its answer written down. Numbers differ a little from machine to machine. So the check compares
the calls and the heads of the tables.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import pathlib
import re
import sys
from typing import Any, NamedTuple

from jaxsgd.report import Report

PAGE = pathlib.Path(__file__).parent.parent / "docs" / "tools.md"
HEAD = """# The tools, call by call

This page shows every tool on a small model and real data. `python tools/transcript.py` ran these calls and wrote their
output. Every result has the same form: a sentence, its reasons, the next step, a table.

| call | form |
|---|---|
| `print(found)`, `found.text(verbose=True)` | text of 80 columns, and with all details |
| `found` at the end of a notebook's cell | a table in HTML |
| `rich.print(found)` | colours |
| `found.to_dict()`, `found.to_json()`, `found.to_markdown()` | all fields, the same as JSON, a Markdown report |
| `pandas.DataFrame(found.records())` | the rows of the table |
| `found.plot()` | a picture, with `jaxsgd[plot]` |
"""


class Section(NamedTuple):
    """One call.

    Attributes:
      title: above it.
      text: what it is for.
      code: Python; it runs in the names of the sections before, and prints.
      name: the variable that holds the report, or None.
    """

    title: str
    text: str
    code: str
    name: str | None = None


SECTIONS = (
    Section(
        "The model",
        "The data are 569 tumours with 30 measurements each, from scikit-learn. The model is a perceptron in plain "
        "JAX. Each epoch has its own index array, because a shuffle in place would change earlier batches.",
        """
import textwrap

import jax
import jax.numpy as jnp
import numpy as np
import optax
from sklearn.datasets import load_breast_cancer

import jaxsgd

x, y = load_breast_cancer(return_X_y=True)
x = ((x - x.mean(0)) / x.std(0)).astype(np.float32)
rng = np.random.default_rng(0)


def epochs(count, size=32):
    orders = [rng.permutation(len(x)) for _ in range(count)]
    return [(x[i], y[i]) for order in orders for i in np.array_split(order[: len(x) // size * size], len(x) // size)]


def init(key):
    first, second = jax.random.split(key)
    return {
        "hidden": {"kernel": 0.2 * jax.random.normal(first, (30, 16)), "bias": jnp.zeros(16)},
        "head": {"kernel": 0.2 * jax.random.normal(second, (16,)), "bias": jnp.zeros(())},
    }


def loss_fn(params, batch):
    inputs, labels = batch
    hidden = jnp.tanh(inputs @ params["hidden"]["kernel"] + params["hidden"]["bias"])
    logits = hidden @ params["head"]["kernel"] + params["head"]["bias"]
    return optax.sigmoid_binary_cross_entropy(logits, labels).mean()


params, batches = init(jax.random.key(0)), epochs(12)
print(len(batches), "batches,", len(x) // 32, "an epoch")
""",
    ),
    Section(
        "Which learning rate?",
        "`probe` trains a few rates for a short time, from the same start on the same batches.",
        """
found = jaxsgd.probe(loss_fn, params, batches, jaxsgd.momentum, steps=200)
print(found)
""",
        "found",
    ),
    Section(
        "The classical test",
        "`range_test` lets the rate rise in one run.",
        """
rising = jaxsgd.range_test(loss_fn, params, batches, jaxsgd.momentum, steps=60)
print(rising)
""",
        "rising",
    ),
    Section(
        "A run and its loss curve",
        "`diagnose` reads the losses. With `tx` its advice names settings that the optimizer has.",
        """
tx = jaxsgd.momentum(found.learning_rate or 0.03)
state, step = jaxsgd.TrainState.create(params, tx), jaxsgd.make_step(loss_fn, tx)
losses = []
for batch in batches:
    state, metrics = step(state, batch)
    losses.append(float(metrics["loss"]))
seen = jaxsgd.diagnose(losses, tx=tx, steps_per_epoch=17)
print(seen)
""",
        "seen",
    ),
    Section(
        "A common mistake",
        "Every epoch here has the same batches in the same order, so the loss repeats a pattern. `diagnose` does not "
        "know the length of an epoch, and asks.",
        """
state = jaxsgd.TrainState.create(params, tx)
losses = []
for batch in 12 * batches[:17]:
    state, metrics = step(state, batch)
    losses.append(float(metrics["loss"]))
print(jaxsgd.diagnose(losses, tx=tx))
""",
    ),
    Section(
        "Was the rate good?",
        "`sweep` trains many values through one compiled program.",
        """
def build(learning_rate, seed):
    tx = jaxsgd.momentum(learning_rate)
    return jaxsgd.make_step(loss_fn, tx), jaxsgd.TrainState.create(init(jax.random.key(seed)), tx)


rates = [0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1.0, 30.0]
swept = jaxsgd.sweep(build, data=batches, learning_rate=rates, seed=[0, 1])
print(swept)
""",
        "swept",
    ),
    Section(
        "How sharp is the loss there?",
        "`sharpness` computes the largest and the smallest eigenvalue of the Hessian, and the largest stable learning "
        "rate.",
        """
sharp = jaxsgd.sharpness(loss_fn, state, batches[:17], tx=tx, eigenvalues=3)
print(sharp)
""",
        "sharp",
    ),
    Section(
        "Would a larger batch help?",
        "`noise_scale` compares the gradients of small parts of a batch. `scale_learning_rate` converts a rate to "
        "another batch size, by the published law for the rule. Without a law it raises.",
        """
noise = jaxsgd.noise_scale(loss_fn, params, batches[:17], population=len(x))
print(noise)
print(jaxsgd.scale_learning_rate(0.03, 32, 128, "momentum"))
try:
    jaxsgd.scale_learning_rate(1e-4, 32, 128, "lion")
except ValueError as error:
    print(textwrap.fill(str(error), 80))
""",
        "noise",
    ),
    Section(
        "Which rule?",
        "`pick` gives each rule the same number of steps to find its rate, and compares them seed by seed.",
        """
race = jaxsgd.pick(loss_fn, init, batches, steps=48, seeds=2)
print(race)
""",
        "race",
    ),
    Section(
        "What does a step cost?",
        "`plan` compiles the step, here for this machine, and reads the compiler's report. The hardware need not be "
        "present.",
        """
cost = jaxsgd.plan(loss_fn, init, tx, batches[0])
print(cost)
""",
        "cost",
    ),
    Section(
        "Which setting costs less?",
        "`compare` shows plans side by side; `text(verbose=True)` adds the full reports.",
        """
from jaxsgd.planning import compare

settings = [{"label": "momentum"}, {"label": "adamw", "tx": jaxsgd.adamw(1e-3)}, {"label": "split", "accumulate": 4}]
plans = compare(settings, loss_fn, init, tx, batches[0])
print(plans)
""",
        "plans",
    ),
)


def run() -> list[tuple[Section, str, Any]]:
    """Each section with what it printed and its report."""
    names: dict[str, Any] = {}
    out = []
    for section in SECTIONS:
        said = io.StringIO()
        with contextlib.redirect_stdout(said):
            exec(compile(section.code, f"<{section.title}>", "exec"), names)
        out.append((section, said.getvalue().rstrip(), names.get(section.name or "")))
    return out


def page(ran: list[tuple[Section, str, Any]]) -> str:
    parts = [HEAD]
    for section, said, _ in ran:
        parts.append(
            f"## {section.title}\n\n{section.text}\n\n```python\n{section.code.strip()}\n```\n\n```text\n{said}\n```\n"
        )
    return "\n".join(parts)


def blocks(text: str) -> list[tuple[str, str, str]]:
    """The title, the call and the answer of each section of the page."""
    found = re.findall(r"^## (.*?)\n.*?```python\n(.*?)\n```\n\n```text\n(.*?)\n```", text, re.DOTALL | re.MULTILINE)
    return [(title, code, said) for title, code, said in found]


def faults(text: str, ran: list[tuple[Section, str, Any]] | None = None) -> list[str]:
    """The parts of the page that are out of date: calls, long lines, and after a run the heads of tables."""
    shown, out = blocks(text), []
    if [title for title, _, _ in shown] != [section.title for section in SECTIONS]:
        return ["its sections are others"]
    for (title, code, said), section in zip(shown, SECTIONS, strict=True):
        if code != section.code.strip():
            out.append(f"{title}: the call has changed")
        out += [f"{title}: {len(line)} columns in {line!r}" for line in said.splitlines() if len(line) > 80]
    if ran is None:
        return out
    for (title, _, said), (_, now, report) in zip(shown, ran, strict=True):
        heads = [column.name for column in report.table.columns] if isinstance(report, Report) else []
        words = {word for head in heads for word in head.split()}
        out += [f"{title}: {word!r} of the table's head is missing" for word in sorted(words) if word not in said]
        out += [f"{title}: {len(line)} columns in {line!r} now" for line in now.splitlines() if len(line) > 80]
    return out


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    action = parser.add_mutually_exclusive_group()
    action.add_argument("--check", action="store_true")
    action.add_argument("--html", type=pathlib.Path, metavar="FILE")
    args = parser.parse_args(argv)
    ran = run()
    if args.html:
        reports = [report._repr_html_() for _, _, report in ran if isinstance(report, Report)]
        args.html.write_text(
            f"<meta charset='utf-8'><body style='font-family:sans-serif'>{'<hr>'.join(reports)}</body>"
        )
    elif args.check:
        wrong = faults(PAGE.read_text(), ran)
        print("\n".join(f"docs/tools.md: {fault}" for fault in wrong) or "docs/tools.md is current", file=sys.stderr)
        return bool(wrong)
    else:
        PAGE.write_text(page(ran))
        print(f"wrote {PAGE}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
