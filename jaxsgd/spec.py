"""What a rule says of itself, read from its function's signature.

Floor 1. Python's parameter kinds carry the roles, so nothing is said twice:

- first positional: the gradient of one array, widened to at least float32;
- further positionals: slots, the state kept for that array;
- keyword-only without a default: context (``t``, ``p``, ``learning_rate``, ``weight_decay``,
  ``leaf_key``: a PRNG key of this step and array, made from the hyperparameter ``key``; the scalars of
  ``shared``; extra arguments of ``update`` such as ``value``, the loss);
- keyword-only with a default: hyperparameters.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxsgd.numerics import real_zeros, zeros

__all__ = ["Spec", "by_name", "is_off", "parameter_names", "seed", "signature_of", "without_when_off"]


@functools.lru_cache(maxsize=4096)
def parameter_names(fn: Callable) -> tuple[str, ...]:
    """The names of the parameters of ``fn``, in order."""
    return tuple(inspect.signature(fn).parameters)


def by_name(fn: Callable, available: Mapping[str, Any]) -> Any:
    """Call ``fn`` with those of the ``available`` values that its parameters name."""
    return fn(**{name: available[name] for name in parameter_names(fn)})


def is_off(value: Any) -> bool:
    """Whether a hyperparameter is known, while tracing, to switch its term off."""
    return value is None or value is False or (isinstance(value, int | float) and value == 0)


def seed(key: Any, what: str) -> Any:
    """``key`` if it is a seed: a whole number, or an array of one (as `optax.inject_hyperparams` hands it over).

    Raises:
      TypeError: it is something else; ``what`` says whose seed is needed.
    """
    whole = isinstance(key, int) and not isinstance(key, bool)
    if not whole and not (isinstance(key, jax.Array | np.ndarray) and jnp.isdtype(key.dtype, "integral")):
        raise TypeError(f"{what}: key={key!r}: a whole number is needed, a seed")
    return key


def without_when_off(hyper: str, start: Callable = zeros) -> Callable:
    """A slot's start that keeps no slot while the hyperparameter ``hyper`` is off (None, False, 0)."""

    def begin(p: Any, **hypers: Any) -> Any:
        return None if is_off(hypers[hyper]) else start(p)

    begin.__signature__ = signature_of(("p", hyper))  # type: ignore[attr-defined]
    begin.zeros = start  # type: ignore[attr-defined]
    return begin


def signature_of(
    positional: Iterable[str], context: Iterable[str] = (), hyper: Mapping[str, Any] | None = None
) -> inspect.Signature:
    """The signature of a function made by another function: the three roles by name."""
    P = inspect.Parameter
    return inspect.Signature(
        [
            *(P(name, P.POSITIONAL_OR_KEYWORD) for name in positional),
            *(P(name, P.KEYWORD_ONLY) for name in context),
            *(P(name, P.KEYWORD_ONLY, default=default) for name, default in (hyper or {}).items()),
        ]
    )


@dataclass(frozen=True, eq=False)
class Spec:
    """One rule as data. Built by `Spec.read`; the lift needs nothing else of a rule.

    Attributes:
      fn: the rule, ``fn(g, *slots, **context, **hyper) -> (direction, *slots)``; where it asks for
        ``learning_rate`` it owns its step and returns the change of the parameter instead.
      start: for each slot a function of ``p`` and hyperparameters, by name; None starts no slot. For
        each scalar that ``shared`` keeps, a function of hyperparameters. A missing slot starts at zero.
      sums: optional, one leaf (named ``g``, slots, context, hyperparameters) -> dict of scalars, which
        are added over the tree.
      shared: optional, once a step: kept scalars as positionals; sums, ``t``, ``learning_rate`` and
        hyperparameters as keywords -> dict of scalars for the rule to ask for by name.
      trees: optional, once a step: ``params``, ``updates`` (the gradients), ``t``, hyperparameters and extra
        arguments by name -> dict of trees like the params; the rule asks for its leaf of one by name.
      coupled: weight decay is added to the gradient (L2) instead of the direction.
      runtime: hyperparameters that always live in the state, one value for the whole tree.
      fixed: hyperparameters that a wrapper has settled; they are no longer asked of the caller.
    """

    name: str
    fn: Callable
    slots: tuple[str, ...]
    context: tuple[str, ...]
    hyper: Mapping[str, Any]
    start: Mapping[str, Callable] = field(default_factory=dict)
    sums: Callable | None = None
    shared: Callable | None = None
    trees: Callable | None = None
    coupled: bool = False
    runtime: tuple[str, ...] = ()
    fixed: Mapping[str, Any] = field(default_factory=dict)

    @classmethod
    def read(cls, fn: Callable, *, name: str, start: Mapping[str, Callable] | None = None, **fields: Any) -> Spec:
        """Read the roles off ``fn``'s signature.

        Raises:
          TypeError: a parameter of a kind that carries no role, or a ``start`` for nothing.
        """
        positional, context, hyper = [], [], {}
        for p in inspect.signature(fn).parameters.values():
            if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD) and p.default is p.empty:
                positional.append(p.name)
            elif p.kind is p.KEYWORD_ONLY and p.default is p.empty:
                context.append(p.name)
            elif p.kind is p.KEYWORD_ONLY:
                hyper[p.name] = p.default
            else:
                raise TypeError(f"rule {name}: the parameter '{p}' carries no role; see jaxsgd.rule")
        if not positional:
            raise TypeError(f"rule {name}: the first positional parameter is the gradient")
        spec = cls(name, fn, tuple(positional[1:]), tuple(context), hyper, dict(start or {}), **fields)
        for key in spec.start:
            if key not in spec.slots and key not in spec.kept:
                raise TypeError(f"rule {name}: start[{key!r}] is neither a slot nor kept by shared")
        for key in spec.kept:
            if key not in spec.start:
                raise TypeError(f"rule {name}: shared keeps {key!r}; give start[{key!r}]")
        return spec

    @property
    def kept(self) -> tuple[str, ...]:
        """The scalars that ``shared`` keeps from step to step: its positional parameters."""
        if self.shared is None:
            return ()
        parameters = inspect.signature(self.shared).parameters.values()
        return tuple(p.name for p in parameters if p.kind is not p.KEYWORD_ONLY)

    @property
    def tree_wide(self) -> frozenset[str]:
        """The hyperparameters that have one value for the whole tree: no group may override them."""
        asked = {*(parameter_names(self.shared) if self.shared is not None else ())}
        for name in self.kept:
            asked |= set(parameter_names(self.start[name]))
        return frozenset(self.runtime) | {name for name in asked if name in self.hyper}

    @property
    def extra(self) -> frozenset[str]:
        """The extra arguments of ``update`` that the rule, its sums or its tree-wide scalars ask for."""
        functions = [fn for fn in (self.sums, self.shared, self.trees) if fn is not None]
        asked = {*self.context, *(name for fn in functions for name in parameter_names(fn))}
        made = {"g", "p", "t", "learning_rate", "weight_decay", "leaf_key", "params", "updates"}
        return frozenset(asked - made - {*self.slots, *self.kept, *self.hyper})

    def _zeros(self, slot: str) -> Callable:
        """The function that a slot starts by; one around it says so by its attribute ``zeros``."""
        start = self.start.get(slot, zeros)
        return getattr(start, "zeros", start)

    def is_moment(self, slot: str) -> bool:
        """Whether a slot is an average of gradients: it starts at zero, with the shape of the parameter."""
        return self._zeros(slot) in (zeros, real_zeros)

    def is_of_squares(self, slot: str) -> bool:
        """Whether a slot is a moment that is never negative: it starts as `real_zeros`."""
        return self._zeros(slot) is real_zeros

    @property
    def owns_step(self) -> bool:
        """Whether the rule returns the whole change of the parameter."""
        return "learning_rate" in self.context

    def fix(self, **values: Any) -> Spec:
        """The same rule with some hyperparameters settled; names it does not have are ignored."""
        fixed = {name: value for name, value in values.items() if name in self.hyper}
        hyper = {name: default for name, default in self.hyper.items() if name not in fixed}
        return replace(self, hyper=hyper, fixed={**self.fixed, **fixed})

    def begin(self, name: str, available: Mapping[str, Any]) -> Any:
        """How a slot or a kept scalar starts, from ``p`` and the hyperparameters."""
        return by_name(self.start.get(name, zeros), {**available, **self.fixed})

    def step(self, g: Any, slots: Sequence[Any], available: Mapping[str, Any]) -> tuple[Any, tuple[Any, ...]]:
        """The rule on one array, then learning rate and decay: ``(delta, slots)``.

        ``available`` holds by name what the rule may ask for, and in any case ``p`` (or None where nothing
        needs it), ``learning_rate`` and ``weight_decay``.
        """
        p, rate, decay = available["p"], available["learning_rate"], available["weight_decay"]
        decays = not is_off(decay) and "weight_decay" not in self.context
        if decays and self.coupled:
            g, decays = g + decay * p, False
        arguments = {name: available[name] for name in (*self.context, *self.hyper)}
        out = self.fn(g, *slots, **arguments, **self.fixed)
        direction, *slots = out if isinstance(out, tuple) else (out,)
        if not self.owns_step:
            return -rate * (direction + decay * p if decays else direction), tuple(slots)
        return direction - rate * decay * p if decays else direction, tuple(slots)
