"""Hyperparameters: the values that each may have, and what is off, constant or a schedule."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Annotated, Any, TypeGuard

import jax
import jax.numpy as jnp
import numpy as np

from jaxsgd.numerics import is_key

__all__ = [
    "Bounds",
    "Choice",
    "Count",
    "Decay",
    "Fraction",
    "Hyper",
    "IN_STATE",
    "Positive",
    "Real",
    "Seed",
    "Static",
    "Whole",
    "checked",
    "in_state",
    "is_array",
    "is_constant",
    "is_off",
    "narrow",
    "one_of",
    "scheduled",
    "within",
]


def is_constant(value: Any) -> TypeGuard[float]:
    """Whether ``value`` is a plain number, in contrast to a schedule, an array or a tracer."""
    return isinstance(value, int | float | np.number) and not isinstance(value, bool | np.bool_)


def is_array(value: Any) -> bool:
    """Whether ``value`` is an array, which a caller may change from step to step."""
    return isinstance(value, jax.Array | np.ndarray)


def _is_whole_array(value: Any) -> bool:
    return is_array(value) and jnp.isdtype(value.dtype, "integral")


def is_off(value: Any) -> bool:
    """Whether a hyperparameter is known, while tracing, to switch its term off."""
    return value is None or value is False or (isinstance(value, int | float) and value == 0)


def narrow(x: Any, dtype: Any) -> Any:
    """A scalar array in ``dtype``; everything else as it is."""
    scalar = isinstance(x, jax.Array) and x.ndim == 0 and not is_key(x) and jnp.isdtype(x.dtype, "numeric")
    return x.astype(dtype) if scalar else x


def scheduled(value: Any, count: Any) -> Any:
    """The value of a schedule at ``count``, of anything else the value itself."""
    return value(count) if callable(value) else value


# -- domains ---------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Bounds:
    """Finite numbers in [low, high); schedules and arrays are taken as they are."""

    low: float = 0.0
    high: float = math.inf
    words: str = ""

    def check(self, where: str, value: Any) -> Any:
        if callable(value) or is_array(value):
            return value
        if not is_constant(value):
            raise TypeError(f"{where}: a number or a schedule (a function of the step) is needed")
        if not math.isfinite(value):
            raise ValueError(f"{where}: a finite number is needed")
        if not self.low <= value < self.high:
            raise ValueError(f"{where}: {self.words or f'it must lie in [{self.low:g}, {self.high:g})'}")
        return value


@dataclass(frozen=True)
class Choice:
    """One of some strings."""

    known: tuple[str, ...]

    def check(self, where: str, value: Any) -> Any:
        if value not in self.known:
            raise ValueError(f"{where}: known are {', '.join(map(repr, self.known))}")
        return value


@dataclass(frozen=True)
class SeedOf:
    """A seed: a whole number, or an array of one as `optax.inject_hyperparams` passes it; None is 0."""

    def check(self, where: str, value: Any) -> Any:
        whole = isinstance(value, int | np.integer) and not isinstance(value, bool)
        if value is not None and not whole and not _is_whole_array(value):
            raise TypeError(f"{where}: a whole number is needed, a seed")
        return 0 if value is None else value


@dataclass(frozen=True)
class WholeFrom:
    """A whole number that is known while tracing, such as the length of an axis."""

    low: int = 1

    def check(self, where: str, value: Any) -> Any:
        array = _is_whole_array(value)
        if isinstance(value, bool) or not (isinstance(value, int | np.integer) or array):
            raise TypeError(f"{where}: a whole number is needed")
        if not array and value < self.low:
            raise ValueError(f"{where}: it must be {self.low} or more")
        return value


@dataclass(frozen=True)
class Flag:
    """True or False."""

    def check(self, where: str, value: Any) -> Any:
        if not isinstance(value, bool | np.bool_):
            raise TypeError(f"{where}: True or False is needed")
        return bool(value)


@dataclass(frozen=True)
class Anything:
    """Not checked."""

    def check(self, where: str, value: Any) -> Any:
        return value


NOT_NEGATIVE = Bounds(words="it must be 0 or more")
STATIC, IN_STATE = "static", "in state"

Decay = Annotated[Any, Bounds(0, 1, "it is the decay of an average, in [0, 1)")]
"""The decay of an average."""
Positive = Annotated[Any, Bounds(math.ulp(0.0), math.inf, "it must be above 0")]
Fraction = Annotated[Any, Bounds(math.ulp(0.0), math.nextafter(1, 2), "it must lie in (0, 1]")]
Real = Annotated[Any, Bounds(-math.inf, math.inf)]
Count = Annotated[Any, Bounds(1, math.inf, "it must be 1 or more")]
Seed = Annotated[Any, SeedOf()]
Whole = Annotated[Any, WholeFrom()]
Static = Annotated[Any, STATIC]
"""A setting of one leaf that the call does not offer: ``call`` or its routes set it. Any hashable value."""
in_state = IN_STATE
"""In an `Annotated`: always a runtime value of the state."""


def within(low: float, high: float) -> Bounds:
    """In an `Annotated`: a number in [low, high)."""
    return Bounds(low, high)


def one_of(*known: str) -> Choice:
    """In an `Annotated`: one of these strings."""
    return Choice(known)


def checked(where: str, value: Any, domain: Any = NOT_NEGATIVE) -> Any:
    """``value`` if it is in ``domain``; ``where`` names the argument.

    Raises:
      TypeError, ValueError: it does not.
    """
    return domain.check(f"{where}={value!r}", value)


@dataclass(frozen=True)
class Hyper:
    """One hyperparameter of a rule.

    Attributes:
      name: its name.
      default: in the rule's signature.
      domain: its values, see `checked`.
      static: the call does not offer it.
      in_state: it is always a runtime value of the state.
    """

    name: str
    default: Any
    domain: Any = NOT_NEGATIVE
    static: bool = False
    in_state: bool = False

    @classmethod
    def read(cls, name: str, default: Any, hints: Iterable[Any]) -> Hyper:
        """A hyperparameter by its default and the metadata of its annotation."""
        hints = list(hints)
        domain = next((hint for hint in hints if hasattr(hint, "check")), None)
        if domain is None and isinstance(default, bool):
            domain = Flag()
        if domain is None and (STATIC in hints or isinstance(default, str)):
            domain = Anything()
        return cls(name, default, domain or NOT_NEGATIVE, STATIC in hints, IN_STATE in hints)

    def check(self, rule: str, value: Any, default: Any) -> Any:
        """``value`` if the hyperparameter may have it; its default is always allowed.

        Raises:
          TypeError, ValueError: it may not.
        """
        if self.static or value is None and default is None and not isinstance(self.domain, SeedOf):
            return value
        return self.domain.check(f"{rule}: {self.name}={value!r}", value)


def first_values(values: Mapping[str, Any], dtype: Any) -> dict[str, jax.Array]:
    """Runtime hyperparameters as the first step applies them.

    Raises:
      TypeError: a schedule returns no number.
    """

    def first(name: str, value: Any) -> jax.Array:
        # The count is a NumPy number, so that a schedule in plain Python works under jit too.
        value = scheduled(value, np.int32(0))
        try:
            return jnp.asarray(value, dtype)
        except (TypeError, ValueError):
            raise TypeError(f"{name}: its schedule returns {value!r} at step 0; a number is needed") from None

    return {name: first(name, value) for name, value in values.items()}


Schedule = Callable[[Any], Any]
