"""Batch sizes from a gradient's noise, and learning rates for them."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from jaxsgd.registry import AnyRule, all_rules
from jaxsgd.report import Column, Report, Table, number, plus_minus, span
from jaxsgd.tuning.short_runs import OWN_RATE

__all__ = ["Doubling", "NoiseScale", "scale_learning_rate"]

WAYS = {"linear": "linear", "sqrt": "square_root"}
"""A rule's `Rule.batch_scaling` -> its name here."""


class Doubling(NamedTuple):
    """The gain of twice the batch, for the same progress.

    Attributes:
      batch_size: before.
      steps_saved: share of the steps, 0 to 0.5.
      examples_added: share of the examples, 0 to 1.
      known: False where the first is the least and the second the most that it may be.
    """

    batch_size: int
    steps_saved: float
    examples_added: float
    known: bool

    def __str__(self) -> str:
        least, most = ("", "") if self.known else ("at least ", "at most ")
        return (
            f"doubling the batch from {self.batch_size} to {2 * self.batch_size} saves {least}{self.steps_saved:.0%} "
            f"of the steps and costs {most}{self.examples_added:.0%} more examples"
        )


@dataclass(frozen=True, repr=False)
class NoiseScale(Report):
    """The noise scale of a gradient at one point of training, made by `noise_scale`.

    Attributes:
      scale: examples, the estimate of tr(Sigma) / |G|^2; inf where that of |G|^2 is not above 0. Not to be relied on
        where ``known`` is False.
      standard_error: of ``scale``, by the jackknife; inf where ``known`` is False.
      low, high: the 95% interval (Fieller's); ``high`` is inf where ``known`` is False.
      known: whether |G|^2 is told from 0; else ``low`` is all that one can say.
      gradient_norm_sq, gradient_norm_sq_error: |G|^2 of the gradient without noise; its standard error.
      variance, variance_error: tr(Sigma), the variance of one example's gradient, added over parameters; its error.
      small: examples in a part.
      parts: how many parts were compared.
      population: examples in the data set; inf where they are fresh, None where that is not known.
      as_sample: the scale, if the batches are a sample of more data than they hold.
      batch_size: of the first batch.
    """

    picture = "noise_scale"
    in_dict = ("critical_batch_size",)

    scale: float
    standard_error: float
    low: float
    high: float
    known: bool
    gradient_norm_sq: float
    gradient_norm_sq_error: float
    variance: float
    variance_error: float
    small: int
    parts: int
    population: float | None
    as_sample: float
    batch_size: int

    @property
    def critical_batch_size(self) -> float:
        """The batch size at which steps and examples are each twice their least: ``scale``, or ``low`` if not known.

        This is an approximation. The exact value is tr(H Sigma) / G^T H G with the Hessian H. It equals the noise scale
        only where H is a multiple of the identity. It grows as the loss falls, so measure it again later in training.
        """
        return self.scale if self.known else self.low

    def steps(self, batch_size: float) -> float:
        """Steps with this batch size over the fewest possible: S / S_min = 1 + B_crit / B."""
        return 1 + self.critical_batch_size / _positive("batch_size", batch_size)

    def examples(self, batch_size: float) -> float:
        """Examples with this batch size over the fewest possible: E / E_min = 1 + B / B_crit."""
        size = _positive("batch_size", batch_size)
        return 1 + size / self.critical_batch_size if self.critical_batch_size > 0 else math.inf

    def doubling(self, batch_size: int | None = None) -> Doubling:
        """The gain of twice the batch. Default: twice the batch size of the measurement."""
        size = self.batch_size if batch_size is None else batch_size
        saved = 1 - self.steps(2 * size) / self.steps(size)
        return Doubling(size, saved, 1 - 2 * saved, self.known)

    def learning_rate(self, batch_size: float, largest: float = 1.0) -> float:
        """The best learning rate of gradient descent at a batch size: eps_max / (1 + B_noise / B).

        Args:
          batch_size: B.
          largest: eps_max, the best rate at an endless batch. By default the answer is a share of eps_max. To go from
            one batch size to another see `scale_learning_rate`.
        """
        return largest / self.steps(batch_size)

    # -- the report ---------------------------------------------------------------------------------

    @property
    def examples_measured(self) -> int:
        """The number of examples in the measurement."""
        return self.small * self.parts

    @property
    def bounded(self) -> bool:
        """Whether ``low`` says something: at least one example."""
        return self.low >= 1

    @property
    def summary(self) -> str:
        if self.known:
            interval = "" if self.low == self.high else f" (95% CI {span(self.low, self.high)})"
            return f"the noise scale is {plus_minus(self.scale, self.standard_error)} examples{interval}"
        on = f"{self.examples_measured:,} examples"
        if self.bounded:
            return (
                f"the noise scale is not known, only that it is above {number(self.low)} examples (95%): "
                f"the gradient is lost in the noise of {on}"
            )
        return f"nothing is known of the noise scale: the gradient is lost in the noise of {on}"

    @property
    def why(self) -> tuple[str, ...]:
        out = []
        if self.population is None:
            out.append(
                f"it is {number(self.scale)} if the batches are all the data (population='all'), "
                f"{number(self.as_sample)} if they are a sample of more (population=)"
            )
        if self.known or self.bounded:
            about = "about" if self.known else "at least"
            out.append(
                f"at the critical batch size, {about} {number(self.critical_batch_size)}, "
                "steps and examples are each twice their fewest"
            )
            out.append(str(self.doubling()))
        return tuple(out)

    @property
    def next(self) -> tuple[str, ...]:
        if not self.known:
            many = 4 * self.examples_measured
            return (f"measure again on {many:,} examples or more, or later in training for a model that has moved",)
        if self.batch_size < self.scale / 2:
            return ("a larger batch saves steps at little cost in examples, if the hardware has room",)
        if self.batch_size > 2 * self.scale:
            return ("a smaller batch costs few steps and saves examples",)
        return ("keep the batch size; measure again later, since the noise scale grows as the loss falls",)

    @property
    def table(self) -> Table:
        columns = (Column("quantity", kind="text"), Column("value"), Column("standard error"))
        scale = [("noise scale, examples", self.scale, self.standard_error)] if self.known else []
        return Table(columns, (
            *scale,
            ("|G|^2, gradient without noise", self.gradient_norm_sq, self.gradient_norm_sq_error),
            ("tr(Sigma), noise of one example", self.variance, self.variance_error),
            ("parts compared", self.parts, None),
            ("examples in a part", self.small, None),
            ("examples in a batch", self.batch_size, None),
        ))  # fmt: skip


def scale_learning_rate(
    learning_rate: float,
    batch_size: float,
    new_batch_size: float,
    rule: str | AnyRule = "linear",
    *,
    noise_scale: float | NoiseScale | None = None,
) -> float:
    """The learning rate for another batch size, from one that works.

    Args:
      learning_rate: what works at ``batch_size``.
      batch_size: before.
      new_batch_size: after.
      rule: how the rate goes with the batch:

        - ``"linear"``, for gradient descent with or without momentum (Goyal et al. 2017, arXiv:1706.02677): k small
          steps go as far as one of k times the rate. It ends where the rate is no longer stable, and wants warmup.
        - ``"square_root"``, for Adam, RMSprop and their kin (Malladi et al. 2022, arXiv:2205.10287): they divide by
          the gradient's size, which for small batches is its noise, and so shrinks by the root of k.
        - ``"noise_scale"``, for gradient descent near its critical batch size (McCandlish et al. 2018,
          arXiv:1812.06162): eps_max / (1 + B_noise / B), linear far below the noise scale and constant far above.
        - a `Rule` or its name, ``"adamw"``: the one that is published for it, `jaxsgd.registry.Rule.batch_scaling`.
      noise_scale: for ``"noise_scale"``, examples or a `NoiseScale`.

    Raises:
      ValueError: an unknown way; a rule for which no scaling is published, with what to do instead; a noise scale
        missing or not needed.

    >>> scale_learning_rate(1e-3, 64, 256, "adamw")
    0.002
    """
    rate = _positive("learning_rate", learning_rate)
    before, after = _positive("batch_size", batch_size), _positive("new_batch_size", new_batch_size)
    way = rule if rule in ("linear", "square_root", "noise_scale") else _way(rule, rate)
    if (noise_scale is None) == (way == "noise_scale"):
        wanted = "one is needed" if noise_scale is None else "it counts nothing; leave it out"
        raise ValueError(f"noise_scale={noise_scale!r}: with rule={rule!r}, {wanted}")
    if way == "linear":
        return rate * after / before
    if way == "square_root":
        return rate * math.sqrt(after / before)
    scale = noise_scale
    if isinstance(scale, NoiseScale):
        if not scale.known:
            raise ValueError("noise_scale: it is not known. Use one that is measured on more examples")
        scale = scale.critical_batch_size
    scale = _positive("noise_scale", scale)
    return rate * (1 + scale / before) / (1 + scale / after)


def _way(rule: Any, learning_rate: float) -> str:
    if not isinstance(rule, AnyRule | str):
        raise TypeError(f"rule={rule!r}: 'linear', 'square_root', 'noise_scale', a rule or its name is needed")
    if isinstance(rule, str) and rule not in all_rules():
        raise ValueError(f"rule={rule!r}: 'linear', 'square_root', 'noise_scale', a rule or its name is needed")
    known = all_rules()[rule] if isinstance(rule, str) else rule
    if known.module == OWN_RATE:
        raise ValueError(
            f"rule={known.name!r}: it sets its own step size from the gradients, at any batch size. "
            f"Leave learning_rate at {number(known.usual_rate or 1.0)}"
        )
    if known.batch_scaling is None:
        raise ValueError(
            f"rule={known.name!r}: no scaling of its learning rate with the batch size is published. Use jaxsgd.probe "
            f"at a batch of the new size, around={learning_rate:g}"
        )
    return WAYS[known.batch_scaling]


def _positive(name: str, value: Any) -> float:
    if not isinstance(value, int | float | np.number) or isinstance(value, bool) or not 0 < float(value) < math.inf:
        raise ValueError(f"{name}={value!r}: a number above 0 is needed")
    return float(value)
