"""The settings of an optimizer that advice may name."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import jax.numpy as jnp
import numpy as np
import optax

from jaxsgd.lift import lifts_in
from jaxsgd.registry import AnyRule, all_rules
from jaxsgd.report import number

__all__ = ["Knobs", "knobs_of"]

AVERAGING = ("momentum", "b1", "beta")
"""The hyperparameters that keep an average, or a sum, of gradients."""


@dataclass(frozen=True)
class Knobs:
    """The settings of an optimizer that advice may name.

    Attributes:
      name: the rule's, empty if it is not known.
      learning_rate: its value, or None.
      averaging: the argument that averages gradients, as it is called and set: ``("momentum", 0.9)``; None if the rule
        has none, or has it off.
      unset: such an argument that is off, or None.
    """

    name: str = ""
    learning_rate: float | None = None
    averaging: tuple[str, float] | None = None
    unset: str | None = None

    def rate(self, factor: float) -> str:
        """``" (to 0.01)"``, the learning rate times a factor, if it is known."""
        return "" if not self.learning_rate else f" (to {number(self.learning_rate * factor, 2)})"

    def damped(self) -> str:
        """Advice to average gradients over fewer steps, to go before "or": empty if the rule cannot."""
        if self.averaging is not None:
            name, value = self.averaging
            less = " (to 0.9)" if value > 0.92 else f" (to {number(1 - 2 * (1 - value), 2)})" if value > 0.5 else ""
            return f"lower {name} from {number(value)}{less}, or "
        return "" if self.name else "lower the momentum if the rule has one, or "

    def momentum(self) -> str:
        """Advice to add momentum, to go last: empty if the rule cannot."""
        if self.unset is not None:
            return f"; or set {self.unset}=0.9"
        return "" if self.name else "; or add momentum if the rule takes it"


def knobs_of(tx: Any, rule: Any, learning_rate: float | None) -> Knobs:
    """The settings of ``tx``, or of a rule with its defaults.

    Args:
      tx: a gradient transformation, or None.
      rule: a rule, its name, or None.
      learning_rate: the value to report. Default: that of ``tx``, if it is a number.

    Raises:
      TypeError: both are given; ``tx`` is no gradient transformation; ``rule`` is neither a rule nor a name.
      UnknownRule: no rule has this name.
    """
    if tx is not None and rule is not None:
        raise TypeError("tx, rule: both name the optimizer. Use one of them")
    if tx is not None:
        if not (hasattr(tx, "init") and hasattr(tx, "update")):
            raise TypeError(f"tx={tx!r}: it is no gradient transformation. Use rule= for a rule")
        return _of_transformation(tx, learning_rate)
    if rule is None:
        return Knobs(learning_rate=learning_rate)
    found = all_rules()[rule] if isinstance(rule, str) else rule
    if not isinstance(found, AnyRule):
        raise TypeError(f"rule={rule!r}: it is no rule of jaxsgd. Use a rule or its name, or tx=")
    return _of(found.name, found.defaults, learning_rate)


def _of_transformation(tx: optax.GradientTransformation, learning_rate: float | None) -> Knobs:
    try:
        lifts = lifts_in(tx, {"w": jnp.ones((2, 2))})
    except Exception:  # a transformation for certain parameters alone
        lifts = []
    if not lifts:
        return Knobs(learning_rate=learning_rate)
    first = lifts[0]
    return _of(first.rule.name, first.hyper, learning_rate)


def _of(name: str, values: Any, learning_rate: float | None) -> Knobs:
    rate = values.get("learning_rate")
    if learning_rate is None and _is_number(rate):
        learning_rate = float(rate)
    known = [argument for argument in AVERAGING if argument in values]
    on = [(argument, float(values[argument])) for argument in known if _is_number(values[argument])]
    on = [(argument, value) for argument, value in on if 0 < value < 1]
    off = next((argument for argument in known if not values[argument]), None) if not on else None
    return Knobs(name, learning_rate, on[0] if on else None, off)


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float | np.number) and not isinstance(value, bool) and math.isfinite(value)
