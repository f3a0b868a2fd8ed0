"""Kinds of slots: what a rule remembers of each array, said where the slot is named.

A rule annotates each slot by its kind, ``mu: Mean, nu: Square``. Storage, planning, migration and evaluation ask the
kind; nothing is guessed from names or values.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Annotated, Any

import jax.numpy as jnp

from jaxsgd.hyper import is_off
from jaxsgd.numerics import real_zeros, zeros

__all__ = [
    "Basis",
    "Iterate",
    "Mean",
    "Other",
    "Slot",
    "Square",
    "Start",
    "by_name",
    "evaluated",
    "kept_in",
    "parameter_names",
    "start",
    "unless",
]


@functools.lru_cache(maxsize=4096)
def parameter_names(fn: Callable) -> tuple[str, ...]:
    """The names of the parameters of ``fn``, in order."""
    return tuple(inspect.signature(fn).parameters)


def by_name(fn: Callable, available: Mapping[str, Any]) -> Any:
    """Call ``fn`` with those of the ``available`` values that its parameters name."""
    return fn(**{name: available[name] for name in parameter_names(fn)})


def copied(p: Any) -> Any:
    """A copy, so that donating the parameters does not take the state's."""
    return jnp.array(p, copy=True)


# -- what an annotation says -----------------------------------------------------------------------


@dataclass(frozen=True)
class Kind:
    """A kind of slot, and how one starts unless it says otherwise."""

    name: str
    begin: Callable[[Any], Any]


@dataclass(frozen=True)
class Start:
    """The start of a slot, or of a scalar that ``shared`` keeps."""

    fn: Callable


@dataclass(frozen=True)
class Unless:
    hyper: str


@dataclass(frozen=True)
class KeptIn:
    argument: str


@dataclass(frozen=True)
class Evaluated:
    role: str


Mean = Annotated[Any, Kind("mean", zeros)]
"""A signed moment: an average or a sum of gradients. It starts at zero."""
Square = Annotated[Any, Kind("square", real_zeros)]
"""Never negative: a second moment, a sum of squares, a maximum of them. It starts at zero, and is real."""
Iterate = Annotated[Any, Kind("iterate", copied)]
"""A copy or an average of the parameters. It starts as a copy."""
Basis = Annotated[Any, Kind("basis", zeros)]
"""A factor, a basis or a projector. It starts at zero unless `start` says otherwise."""
Other = Annotated[Any, Kind("other", zeros)]
"""Anything else. It starts at zero unless `start` says otherwise."""
OTHER = Kind("other", zeros)

ROLES = ("average", "extrapolated")


def start(fn: Callable) -> Start:
    """The start of a slot: a function of ``p``, the wide array, and of hyperparameters, by name; None is no slot."""
    return Start(fn)


def unless(hyper: str) -> Unless:
    """No slot while the hyperparameter is off (None, False, 0)."""
    return Unless(hyper)


def kept_in(argument: str) -> KeptIn:
    """The call takes an argument of this name: the dtype in which the slot is stored."""
    return KeptIn(argument)


def evaluated(role: str) -> Evaluated:
    """`jaxsgd.eval_params` reads this slot: ``"average"`` is returned as it is, from an ``"extrapolated"`` z comes
    ``(p - (1 - b1) z) / b1``."""
    if role not in ROLES:
        raise ValueError(f"evaluated({role!r}): known are {', '.join(map(repr, ROLES))}")
    return Evaluated(role)


@dataclass(frozen=True)
class Slot:
    """One slot of a rule.

    Attributes:
      name: its name, the key in ``state.slots``.
      kind: ``"mean"``, ``"square"``, ``"iterate"``, ``"basis"`` or ``"other"``.
      begin: a function of ``p`` and of hyperparameters by name -> the first value, or None for no slot.
      unless: the hyperparameter that switches it off, or None.
      kept_in: the argument of the call that is its dtype, or None.
      role: how `jaxsgd.eval_params` reads it, or None.
      zero: it has the parameter's shape and starts at zero.
    """

    name: str
    kind: str
    begin: Callable
    unless: str | None = None
    kept_in: str | None = None
    role: str | None = None
    zero: bool = False

    @classmethod
    def read(cls, name: str, hints: Iterable[Any]) -> Slot:
        """A slot by the metadata of its annotation.

        Raises:
          TypeError: metadata that says nothing of a slot.
        """
        found: dict[type, Any] = {}
        for hint in hints:
            if not isinstance(hint, Kind | Start | Unless | KeptIn | Evaluated):
                raise TypeError(f"the annotation {hint!r} says nothing of a slot")
            found[type(hint)] = hint
        kind = found.get(Kind, OTHER)
        begin = found[Start].fn if Start in found else kind.begin
        return cls(
            name,
            kind.name,
            begin,
            found[Unless].hyper if Unless in found else None,
            found[KeptIn].argument if KeptIn in found else None,
            found[Evaluated].role if Evaluated in found else None,
            begin in (zeros, real_zeros),
        )

    def off(self, hyper: Mapping[str, Any]) -> bool:
        """Whether these hyperparameters switch the slot off."""
        return self.unless is not None and is_off(hyper[self.unless])

    def first(self, p: Any, hyper: Mapping[str, Any]) -> Any:
        """The value before the first step, or None."""
        return None if self.off(hyper) else by_name(self.begin, {**hyper, "p": p})
