"""The histories people keep, read into arrays: a list of losses, a list of records, a dict of arrays."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

__all__ = ["History", "Series", "read"]

VALIDATION = ("validation_loss", "val_loss", "validation", "validation_accuracy", "val_accuracy")


class Series(NamedTuple):
    """Values and the steps they belong to."""

    steps: np.ndarray
    values: np.ndarray


class History(NamedTuple):
    """A training in arrays.

    Attributes:
      loss: of each step, in the order of the steps; not finite where it was not.
      others: what else was recorded, by name.
      validation: a loss, lower is better (an accuracy with its sign turned), or None.
      validation_name: what it was called.
      notes: what was done to the history to read it.
    """

    loss: Series
    others: dict[str, Series]
    validation: Series | None
    validation_name: str
    notes: tuple[str, ...]


def read(history: Any, validation: Any = None, loss: str = "loss") -> History:
    """See `jaxsgd.diagnosis.diagnose.diagnose`.

    Raises:
      TypeError: ``history`` is none of the three.
      ValueError: it is empty, has no loss, or its arrays disagree.
    """
    columns = _columns(history, loss)
    if loss not in columns:
        raise ValueError(f"history: a loss is needed under {loss!r}; recorded are {', '.join(sorted(columns))}")
    notes: list[str] = []
    columns = {name: _in_order(series, notes if name == loss else []) for name, series in columns.items()}
    losses = columns.pop(loss)
    if not len(losses.values):
        raise ValueError("history=[]: at least one loss is needed")
    name, held = "validation_loss", None
    if validation is not None:
        held = _in_order(_validation(validation, losses.steps), [])
    else:
        name = next((n for n in VALIDATION if n in columns), name)
        held = columns.get(name)
    if held is not None:
        good = np.isfinite(held.values)
        if not good.all():
            lost = f"{(~good).sum()} of {len(good)}"
            notes.append(
                f"{name}: {lost} values are not finite, the first at step {held.steps[~good][0]:.0f}; left out"
            )
        held = Series(held.steps[good], (-1.0 if name.endswith("accuracy") else 1.0) * held.values[good])
    return History(losses, columns, held, name, tuple(notes))


def _columns(history: Any, loss: str) -> dict[str, Series]:
    if isinstance(history, Mapping):
        if loss not in history:
            raise ValueError(f"history: a loss is needed under {loss!r}; there are {', '.join(map(str, history))}")
        count = len(_line(history[loss], loss))
        steps = _line(history["step"], "step") if "step" in history else np.arange(1, count + 1)
        if len(steps) != count:
            raise ValueError(f"history: {len(steps)} steps but {count} losses")
        out = {}
        for name, values in history.items():
            if name != "step" and values is not None:
                line = _line(values, str(name))
                out[str(name)] = Series(steps if len(line) == count else _spread(len(line), steps), line)
        return out
    if isinstance(history, str | bytes) or not hasattr(history, "__len__"):
        raise TypeError(f"history={type(history).__name__}: losses, records or a dict of arrays are needed")
    if len(history) == 0:
        raise ValueError("history=[]: at least one loss is needed")
    if isinstance(history, Sequence) and all(isinstance(record, Mapping) for record in history):
        found: dict[str, tuple[list[float], list[float]]] = {}
        for i, record in enumerate(history):
            step = float(record.get("step", i + 1))
            for name, value in record.items():
                if name != "step" and np.ndim(value) == 0 and isinstance(value, int | float | np.number | np.ndarray):
                    steps, values = found.setdefault(str(name), ([], []))
                    steps.append(step)
                    values.append(float(value))
        return {name: Series(np.array(steps), np.array(values)) for name, (steps, values) in found.items()}
    losses = _line(history, loss)
    return {loss: Series(np.arange(1, len(losses) + 1), losses)}


def _line(values: Any, name: str) -> np.ndarray:
    try:
        line = np.asarray(values, np.float64)
    except (TypeError, ValueError):
        raise TypeError(f"{name}={type(values).__name__}: numbers are needed, one a step") from None
    if line.ndim != 1:
        raise ValueError(f"{name}: numbers in one row are needed, the shape is {line.shape}")
    return line


def _spread(count: int, steps: np.ndarray) -> np.ndarray:
    """Fewer values than steps are taken to lie evenly, up to the last step."""
    if count > len(steps):
        raise ValueError(f"history: {count} values of a metric but {len(steps)} losses")
    return steps[np.round(np.arange(1, count + 1) * len(steps) / max(count, 1)).astype(int) - 1]


def _validation(validation: Any, steps: np.ndarray) -> Series:
    if isinstance(validation, tuple) and len(validation) == 2 and np.ndim(validation[0]) == 1:
        at, values = (_line(v, "validation") for v in validation)
        if len(at) != len(values):
            raise ValueError(f"validation: {len(at)} steps but {len(values)} values")
        return Series(at, values)
    line = _line(validation, "validation")
    return Series(steps if len(line) == len(steps) else _spread(len(line), steps), line)


def _in_order(series: Series, notes: list[str]) -> Series:
    """By step; of a step that was taken twice (a run that was resumed further back) the later record counts."""
    steps, values = series
    if len(steps) < 2 or (np.diff(steps) > 0).all():
        return series
    last = {step: i for i, step in enumerate(steps.tolist())}
    keep = np.array([last[step] for step in sorted(last)])
    notes.append(
        f"steps not in order or repeated: {len(steps) - len(keep)} of {len(steps)} records replaced by later ones"
    )
    return Series(steps[keep], values[keep])
