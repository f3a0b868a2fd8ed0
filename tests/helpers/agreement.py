"""Measure how far every rule is from those it is compared with, and write it where the documents read it.

    make tables        # writes jaxsgd/agreement.json and the documents that quote it, some minutes

An error is the largest difference over the largest value of its leaf's trajectory, the worst of 50 steps in float64,
of every leaf and of every kind of gradients. The bars are those of the tests: 1e-12 for optax and for the NumPy twins
(`laws.law_1_oracle`, which also runs every hyperparameter), 1e-9 for everybody else.
"""

from __future__ import annotations

import json
import pathlib
import sys

import conftest  # noqa: F401  # eight devices and the cache of compiled programs, as in the tests
import jax
import laws
import numpy as np
import test_authors
import test_torch
import torch_cases
from cases import case_of

from jaxsgd import RULES

FILE = pathlib.Path(__file__).parents[2] / "jaxsgd" / "agreement.json"
KINDS = ("normal", "sparse", "heavy", "constant")
TORCH = {
    "SGD": "torch_sgd", "Adam": "adam", "AdamW": "adamw", "NAdam": "torch_nadam", "Adamax": "adamax",
    "RMSprop": "torch_rmsprop", "Adagrad": "torch_adagrad", "Adadelta": "adadelta", "RAdam": "torch_radam",
    "ASGD": "torch_asgd", "Rprop": "torch_rprop", "Adafactor": "torch_adafactor", "SparseAdam": "torch_sparse_adam",
    "Muon": "torch.Muon",
}  # fmt: skip
"""torch.optim's classes -> our rules behind them; Muon, which takes matrices only, is no entry of `RULES`."""


def from_oracle(name: str) -> tuple[str, float]:
    """Who the rule is compared with by law 1, and how far it is from them with its defaults."""
    rule, worst = RULES[name], 0.0
    with jax.enable_x64(True):
        for kind in KINDS:
            params, grads = laws.tree(1), laws.gradients(2, kind)
            worst = max(
                worst, laws.relative(laws.run(rule, {}, params, grads), laws.reference(rule, {}, params, grads))
            )
    return "NumPy twin" if case_of(name).oracle is None else "optax", worst


def from_torch() -> dict[str, float]:
    """Rule -> the worst error over the recorded cases of torch.optim, but Muon's in bfloat16."""
    out: dict[str, float] = {}
    with jax.enable_x64(True), np.load(torch_cases.DATA) as data:
        for name, case in torch_cases.CASES.items():
            rule = "torch_amsgrad" if case.kwargs.get("amsgrad") else TORCH[case.cls]
            for key, ours in test_torch.trajectory(name).items() if not case.as_it_is else ():
                out[rule] = max(out.get(rule, 0.0), float(np.abs(ours - data[key]).max() / np.abs(data[key]).max()))
    return out


def measure() -> dict[str, dict[str, float]]:
    """Rule -> package -> error."""
    table: dict[str, dict[str, float]] = {}
    for name in sorted(RULES):
        package, error = from_oracle(name)
        table[name] = {package: error}
        print(f"{name}: {package} {error:.1e}", file=sys.stderr, flush=True)
    for name, error in from_torch().items():
        table.setdefault(name, {})["torch"] = error
    for name, row in test_authors.measured().items():
        table.setdefault(name, {}).update(row)
    return table


if __name__ == "__main__":
    rows = {name: {p: float(f"{e:.1e}") for p, e in sorted(row.items())} for name, row in sorted(measure().items())}
    FILE.write_text(json.dumps(rows, indent=1) + "\n")
    print(f"{len(rows)} rules measured, written to {FILE.name}")
