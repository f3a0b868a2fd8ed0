"""What the tests know of a rule and the product does not need: its reference, and the exceptions of the laws."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import optax

DEFAULT = "optax by name"


@dataclass(frozen=True)
class Case:
    """One rule's entry.

    Attributes:
      oracle: the same rule by others, ``oracle(**arguments) -> GradientTransformation``; None where there is none. By
        default ``optax.<name>`` or ``optax.contrib.<name>``, if there is such a function.
      needs: hyperparameter -> the other settings without which it has no effect.
      exceptions: part of a law -> the reason why it cannot hold for this rule: ``"zero"`` (no gradient, no step),
        ``"complex"``, ``"narrow"`` (bf16 parameters leave the state as it is), ``"derivative"``, ``"oracle:argument"``
        (follows nobody when it is set), ``"flax"`` (needs extra arguments).
      alternatives: hyperparameter -> another valid value, where half of the default is none.
      like: the rule whose needs, exceptions and alternatives hold here too.
    """

    oracle: Any = DEFAULT
    needs: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    exceptions: Mapping[str, str] = field(default_factory=dict)
    alternatives: Mapping[str, Any] = field(default_factory=dict)
    like: str | None = None


def of_optax(name: str) -> Callable | None:
    """optax's function of this name."""
    return getattr(optax, name, None) or getattr(optax.contrib, name, None)


def resolved(name: str, cases: Mapping[str, Case]) -> Case:
    """The case of a rule, with what it takes from others."""
    case = cases.get(name, Case())
    oracle = of_optax(name) if isinstance(case.oracle, str) else case.oracle
    if case.like is None:
        return Case(oracle, case.needs, case.exceptions, case.alternatives)
    other = resolved(case.like, cases)
    return Case(
        oracle,
        {**other.needs, **case.needs},
        {**other.exceptions, **case.exceptions},
        {**other.alternatives, **case.alternatives},
    )
