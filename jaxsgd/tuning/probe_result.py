"""The result of a probe: a suggestion, its range, and the evidence."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar, NamedTuple

import numpy as np

from jaxsgd.diagnosis.verdict import Verdict
from jaxsgd.report import Column, Report, Table, number, span
from jaxsgd.tuning.range_test import RangeTest

__all__ = ["Probe", "Rate"]


class Rate(NamedTuple):
    """The result of one learning rate.

    Attributes:
      learning_rate, steps: the rate, and the steps of its run.
      start: the first loss, or the mean of the lowest rate over its first steps where that is higher.
      end: the mean over the last quarter of its steps.
      decrease: ``start - end``.
      verdict: a `Verdict`: ``"diverged"``, ``"oscillating"``, ``"too low"``, ``"too high"`` or ``"good"``.
      number: the evidence for the verdict: the step it diverged at; the swing of the loss, or its climb, as a multiple
        of the best run's decrease; the decrease as a part of the best run's in as many steps.
      why: the same as text.
    """

    learning_rate: float
    steps: int
    start: float
    end: float
    decrease: float
    verdict: Verdict
    number: float
    why: str


@dataclass(frozen=True, repr=False)
class Probe(Report):
    """A learning rate with the evidence for it.

    Attributes:
      learning_rate: the suggestion; None if no good rate was found, for the reason in ``why``.
      range: the rates ``(low, high)`` between which about as much is expected, or None.
      confidence: ``"high"``, ``"medium"`` or ``"low"``.
      why: the evidence, a sentence each.
      rates: a `Rate` for each learning rate tried, in rising order.
      losses: ``(rates, steps)``, the loss of each step, NaN where a rate was not trained any more.
      horizon: steps of the longest runs.
      p_value: how likely noise alone makes such a decrease, against the weights of the start on the same batches.
      steps, share: steps taken in all, and as a multiple of a full run's.
      usual: where the search began.
      range_test: the classical test, where it was asked for.
      best: the rate with the lowest loss of the longest runs, or None.
    """

    learning_rate: float | None
    range: tuple[float, float] | None
    confidence: str
    why: tuple[str, ...]  # type: ignore[misc]  # a field of this report
    rates: tuple[Rate, ...] = field(repr=False)
    losses: np.ndarray = field(repr=False)
    horizon: int
    p_value: float
    steps: int
    share: float
    usual: float
    range_test: RangeTest | None = None
    best: float | None = None
    picture: ClassVar[str] = "probe"

    @property
    def learning_rates(self) -> np.ndarray:
        """The rates of the rows of ``losses``."""
        return np.array([rate.learning_rate for rate in self.rates])

    @property
    def summary(self) -> str:
        """The suggestion in one sentence."""
        if self.learning_rate is None or self.range is None:
            return f"no good rate found: {self.why[0]}"
        if not self.rates:
            return f"learning rate {number(self.learning_rate)}: {self.why[0]}"
        return f"learning rate {number(self.learning_rate)}, range {span(*self.range)}; confidence {self.confidence}"

    @property
    def next(self) -> tuple[str, ...]:
        """Advice."""
        if not self.rates:
            return (f"leave learning_rate at {number(self.usual)}",)
        if self.learning_rate is None:
            return ("give more steps or larger batches, or check the loss; around= moves the search",)
        if self.confidence == "high":
            return (f"train with {number(self.learning_rate)}",)
        return (f"train with {number(self.learning_rate)}; a larger share= or a sweep around it makes sure",)

    @property
    def table(self) -> Table:
        """A row for each rate; the best of the longest runs is marked."""
        columns = (
            Column("rate"), Column("steps"), Column("loss"), Column("to"), Column("verdict", kind="text"),
            Column("because", kind="text"),
        )  # fmt: skip
        rows = tuple((r.learning_rate, r.steps, r.start, r.end, str(r.verdict), r.why) for r in self.rates)
        best = next((i for i, r in enumerate(self.rates) if r.learning_rate == self.best), None)
        mark = f"best of the longest runs ({self.horizon} steps)"
        return Table(columns, rows, best, mark, f"{self.steps} steps taken, {self.share:.1%} of a full run")

    @property
    def details(self) -> tuple[Table | Report | str, ...]:
        """The range test, where there was one."""
        return () if self.range_test is None else (self.range_test,)
