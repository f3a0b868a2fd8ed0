"""Rules by name, and how to call one.

Floor 2. `rule` turns a function on one array into a `Rule`; calling a rule with a learning rate and
hyperparameters gives an optax gradient transformation; `RULES` holds all of them by name.
"""

from __future__ import annotations

import inspect
import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import jax
import optax

from jaxsgd.lift import ROUNDINGS, Lift, is_constant
from jaxsgd.paths import nearest
from jaxsgd.spec import Spec
from jaxsgd.storage import Int8, Storage, cast

__all__ = ["RULES", "Rule", "UnknownRule", "rule"]

REQUIRED = inspect.Parameter.empty
FRAME = {
    "weight_decay": None,
    "mask": None,
    "groups": (),
    "storage": None,
    "dynamic": (),
    "norms": False,
    "rounding": None,
}
DECAYS = re.compile(r"b\d|.*_b\d|decay|momentum|rho")
"""Hyperparameters that are the decay of an average: they lie in [0, 1), unless a rule's ``bounds`` say otherwise."""


class UnknownRule(KeyError):
    """A name that is not in `RULES`; the message names the nearest."""

    def __str__(self) -> str:
        return str(self.args[0])


class Registry(dict):
    """Rules by name; an unknown one says what is near."""

    def __missing__(self, name: str) -> Rule:
        raise UnknownRule(f"unknown rule {name!r}{nearest(str(name), self)}")


RULES: dict[str, Rule] = Registry()


@dataclass(frozen=True, eq=False)
class Rule:
    """An update rule. Call it to get a gradient transformation.

    Attributes:
      spec: the function on one array and its roles.
      doc: first line ``Name (Authors Year, arXiv:id): $equation$.``
      defaults: argument -> default, of the call (`REQUIRED` where there is none).
      positional: the names of the arguments that may be given by position, in order.
      aliases: other names of arguments, as optax has them: ``"mask"`` under another name, or
        ``{"mu_dtype": "mu"}``, the dtype that a slot rests in.
      prepare: optional, bound arguments -> arguments, for what is not of one array (a warmup).
      routes: optional, ``(rule, bound arguments) -> (params -> overrides of each leaf)``, as groups have them: for
        rules that treat a leaf by its name or shape.
      hidden: hyperparameters that the call does not offer; ``prepare`` or ``routes`` sets them.
      extras: further arguments of the call with their defaults, for ``prepare`` and ``routes`` to consume.
      oracle: the same rule by others, ``oracle(**arguments) -> GradientTransformation``, or None.
      needs: hyperparameter -> the other settings without which it has no effect.
      exceptions: part of a law -> the reason why it cannot hold for this rule: ``"zero"`` (no gradient, no
        step), ``"complex"``, ``"narrow"`` (bf16 parameters leave the state as it is), ``"derivative"``,
        ``"oracle:argument"`` (follows nobody when it is set), ``"flax"`` (needs extra arguments).
      bounds: hyperparameter -> (lowest, first too large); by default [0, 1) for decays and 0 or more for others.
      alternatives: hyperparameter -> another valid value, for the tests, where half of the default is none.
    """

    spec: Spec
    doc: str
    defaults: Mapping[str, Any]
    positional: tuple[str, ...]
    aliases: Mapping[str, str] = field(default_factory=dict)
    prepare: Callable[[dict[str, Any]], dict[str, Any]] | None = None
    routes: Callable[[Rule, dict[str, Any]], Callable[[Any], list[dict[str, Any]]] | None] | None = None
    hidden: tuple[str, ...] = ()
    extras: Mapping[str, Any] = field(default_factory=dict)
    oracle: Callable[..., optax.GradientTransformation] | None = None
    needs: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    exceptions: Mapping[str, str] = field(default_factory=dict)
    bounds: Mapping[str, tuple[float, float]] = field(default_factory=dict)
    alternatives: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        by_position = inspect.Parameter.POSITIONAL_OR_KEYWORD
        names = [*self.positional, *(n for n in self.defaults if n not in self.positional)]
        parameters = [
            inspect.Parameter(
                name,
                by_position if name in self.positional else inspect.Parameter.KEYWORD_ONLY,
                default=self.defaults[name],
                annotation=optax.ScalarOrSchedule if name == "learning_rate" else inspect.Parameter.empty,
            )
            for name in names
        ]
        signature = inspect.Signature(parameters, return_annotation=optax.GradientTransformationExtraArgs)
        doc = f"{self.doc}\n\nCall: {self.name}{_call_text(signature)}\n\n{_SHARED_ARGUMENTS}"
        about = {"__signature__": signature, "__doc__": doc, "__name__": self.name, "__qualname__": self.name}
        for name, value in {**about, "__module__": self.module}.items():
            object.__setattr__(self, name, value)

    @property
    def name(self) -> str:
        return self.spec.name

    @property
    def hyper(self) -> dict[str, Any]:
        """The hyperparameters that the call offers, with their defaults in the function's signature."""
        return {name: default for name, default in self.spec.hyper.items() if name not in self.hidden}

    @property
    def module(self) -> str:
        """Where the rule's function is written."""
        return self.spec.fn.__module__

    @property
    def title(self) -> str:
        """The docstring's first sentence: name, source, equation."""
        return " ".join(self.doc.split("\n\n")[0].split())

    def __repr__(self) -> str:
        return f"<rule {self.name}>"

    def __call__(self, *args: Any, **kwargs: Any) -> optax.GradientTransformationExtraArgs:
        """Bind the hyperparameters; the arguments that all rules share are these.

        Args:
          learning_rate: a number, or a schedule of the 0-based step. It lives in the state:
            `jaxsgd.with_hyper` sets it without a new compile, `jaxsgd.metrics` reads it.
          weight_decay: decoupled: the update is ``-learning_rate * (direction + weight_decay * p)``
            (rules that say so add it to the gradient instead). A number or a schedule; None is none.
          mask: where weight decay applies: a tree of booleans like the params, a prefix of one, or a
            function of the params that makes one.
          groups: ``[(pattern, overrides), ...]`` with a regular expression on the leaf's name
            (``"encoder/kernel"``) or a function ``(name, leaf) -> bool``; overrides are hyperparameters,
            ``lr_mult`` (times the learning rate), ``frozen`` (no state, zero updates), ``storage``.
            Later matches win, setting by setting.
          storage: how slots rest between steps: a storage for all, or ``{"mu": jaxsgd.cast("bfloat16")}``.
          dynamic: names of further hyperparameters to keep in the state as runtime values. All others
            are compiled in as exact constants, unless they are schedules.
          norms: keep the norms of gradients and updates in the state, for `jaxsgd.metrics`.
          rounding: what keeps steps below half a digit of 16-bit parameters from being lost: ``"stochastic"``
            (bfloat16: to a neighbour at random, with the right mean, the same on every replica) or
            ``"compensated"`` (Kahan's sum: what was rounded off is kept in a slot of the parameter's dtype).
            Updates of such parameters are then float32, for `optax.apply_updates` to add exactly: nothing
            may change them after. None rounds to nearest.

        Returns:
          An `optax.GradientTransformationExtraArgs`.

        Raises:
          TypeError: an unknown argument, or one of the wrong kind.
          ValueError: a value out of its range, an unknown group key, slot or dynamic name.
        """
        signature: inspect.Signature = self.__signature__  # type: ignore[attr-defined]
        for name in kwargs:
            if name not in signature.parameters:
                known = nearest(name, signature.parameters)
                raise TypeError(f"{self.name}: unknown hyperparameter {name}={kwargs[name]!r}{known}")
        try:
            bound = signature.bind(*args, **kwargs)
        except TypeError as error:
            raise TypeError(f"{self.name}: {error}; call it as {self.name}{_call_text(signature)}") from None
        bound.apply_defaults()
        arguments = dict(bound.arguments)
        arguments["storage"] = self._storage(arguments["storage"], arguments)
        for alias, meaning in self.aliases.items():
            value = arguments.pop(alias)
            if value is not None and meaning == "mask":
                arguments["mask"] = value
            elif value is not None:
                arguments["storage"] = {meaning: cast(value), **arguments["storage"]}
        routes = None if self.routes is None else self.routes(self, arguments)
        if self.prepare is not None:
            arguments = self.prepare(arguments)
        if arguments["weight_decay"] is None:  # as some of optax's aliases say none
            arguments["weight_decay"] = 0.0
        names = ("learning_rate", "weight_decay", *self.hyper)
        hyper = {name: self.checked(name, arguments[name]) for name in names}
        hyper |= {name: arguments.get(name, self.spec.hyper[name]) for name in self.hidden}
        if arguments["rounding"] not in ROUNDINGS:
            known = ", ".join(map(repr, ROUNDINGS))
            raise ValueError(f"{self.name}: rounding={arguments['rounding']!r}: known are {known}")
        dynamic = arguments["dynamic"]
        dynamic = (dynamic,) if isinstance(dynamic, str) else tuple(dynamic)
        for name in dynamic:
            numeric = [n for n in names if not isinstance(hyper[n], bool | str | None)]
            if name not in numeric:
                raise ValueError(f"dynamic={name!r}: {self.name} has no such number{nearest(name, numeric)}")
        return Lift(
            self.spec,
            hyper,
            mask=arguments["mask"],
            groups=[(pattern, self._group(overrides)) for pattern, overrides in arguments["groups"]],
            storage=arguments["storage"],
            dynamic=dynamic,
            norms=arguments["norms"],
            routes=routes,
            rounding=arguments["rounding"],
        ).transformation

    # -- making new rules --------------------------------------------------------------------

    def preset(
        self,
        name: str,
        doc: str,
        *,
        positional: tuple[str, ...] | None = None,
        oracle: Callable | None = None,
        **defaults: Any,
    ) -> Rule:
        """The same rule under a name and defaults of its own, registered in `RULES`."""
        unknown = [key for key in defaults if key not in self.defaults]
        if unknown:
            raise TypeError(f"{name}: {self.name} has no argument {unknown[0]}{nearest(unknown[0], self.defaults)}")
        made = replace(
            self,
            spec=replace(self.spec, name=name),
            doc=inspect.cleandoc(doc),
            defaults={**self.defaults, **defaults},
            positional=self.positional if positional is None else positional,
            oracle=oracle,
        )
        return register(made)

    # -- checks ------------------------------------------------------------------------------

    def checked(self, name: str, value: Any) -> Any:
        """A hyperparameter's value if it is one, in words why not otherwise."""
        where, default = f"{self.name}: {name}={value!r}", self.defaults.get(name)
        if isinstance(default, bool):
            if not isinstance(value, bool):
                raise TypeError(f"{where}: True or False is needed")
            return value
        if value is None and default is None or isinstance(value, str) and isinstance(default, str):
            return value
        if callable(value) or isinstance(value, jax.Array):
            return value
        if not is_constant(value):
            raise TypeError(f"{where}: a number or a schedule (a function of the step) is needed")
        if math.isnan(value) or math.isinf(value):
            raise ValueError(f"{where}: a finite number is needed")
        if name in self.bounds:
            low, high = self.bounds[name]
            if not low <= value < high:
                raise ValueError(f"{where}: it must lie in [{low:g}, {high:g})")
        elif name != "weight_decay" and DECAYS.fullmatch(name) and not 0 <= value < 1:
            raise ValueError(f"{where}: it is the decay of an average, in [0, 1)")
        elif value < 0:
            raise ValueError(f"{where}: it must be 0 or more")
        return value

    def _group(self, overrides: Mapping[str, Any]) -> dict[str, Any]:
        """One group's overrides, each checked like the argument it replaces."""
        out = {}
        for key, value in overrides.items():
            if key == "frozen":
                out[key] = bool(value)
            elif key == "lr_mult":
                out[key] = self.checked(key, value)
            elif key == "storage":
                out[key] = self._storage(value, {})
            elif key in self.spec.tree_wide:
                raise ValueError(f"{self.name}: groups: {key!r} is one value for the whole tree")
            elif key in ("learning_rate", "weight_decay", *self.hyper):
                out[key] = self.checked(key, value)
            else:
                known = ("frozen", "lr_mult", "storage", "learning_rate", "weight_decay", *self.hyper)
                raise ValueError(f"{self.name}: groups: unknown key {key!r}{nearest(str(key), known)}")
        return out

    def _storage(self, storage: Any, arguments: Mapping[str, Any]) -> dict[str, Storage]:
        """``storage=`` as slot name -> storage."""
        if storage is None:
            return {}
        if isinstance(storage, Storage):
            packs = [s for s in self.spec.slots if self.spec.is_moment(s) or not isinstance(storage, Int8)]
            storage = dict.fromkeys(packs, storage)
        if not isinstance(storage, Mapping):
            raise TypeError(f"{self.name}: storage={storage!r}: a storage such as jaxsgd.cast('bfloat16') is needed")
        for slot, kept in storage.items():
            if slot not in self.spec.slots:
                raise ValueError(f"{self.name}: storage: no slot {slot!r}{nearest(str(slot), self.spec.slots)}")
            if not isinstance(kept, Storage):
                raise TypeError(f"{self.name}: storage[{slot!r}]={kept!r}: a storage is needed")
            if isinstance(kept, Int8) and not self.spec.is_moment(slot):
                raise ValueError(f"{self.name}: storage[{slot!r}]: eight bits are for moments, and it is none")
        return {
            slot: kept.of_squares() if isinstance(kept, Int8) and self.spec.is_of_squares(slot) else kept
            for slot, kept in storage.items()
        }


def _call_text(signature: inspect.Signature) -> str:
    plain = [p.replace(annotation=inspect.Parameter.empty) for p in signature.parameters.values()]
    return str(inspect.Signature(plain))


_SHARED_ARGUMENTS = inspect.cleandoc(Rule.__call__.__doc__ or "").split("\n\n", 1)[1]


def make_rule(
    spec: Spec,
    doc: str,
    *,
    positional: tuple[str, ...] | None = None,
    learning_rate: Any = REQUIRED,
    weight_decay: Any = REQUIRED,
    aliases: Mapping[str, str] | None = None,
    hidden: tuple[str, ...] = (),
    extras: Mapping[str, Any] | None = None,
    **fields: Any,
) -> Rule:
    """A `Rule` of ``spec``, not registered; see `rule` for the arguments."""
    aliases, extras = aliases or {}, extras or {}
    offered = {name: default for name, default in spec.hyper.items() if name not in hidden}
    defaults = {"learning_rate": learning_rate, **offered, **dict.fromkeys(aliases), **extras, **FRAME}
    if positional is None:
        positional = ("learning_rate", *offered)
    # None, not 0, where it is only ours: what injects hyperparameters makes arrays of numbers, which are never off.
    none = 0.0 if "weight_decay" in positional else None
    defaults["weight_decay"] = none if weight_decay is REQUIRED else weight_decay
    return Rule(spec, inspect.cleandoc(doc), defaults, positional, aliases, hidden=hidden, extras=extras, **fields)


def register(entry: Rule) -> Rule:
    """Put a rule into `RULES`.

    Raises:
      ValueError: the name is taken.
    """
    if entry.name in RULES:
        raise ValueError(f"rule {entry.name!r} exists already, in {RULES[entry.name].module}")
    RULES[entry.name] = entry
    return entry


def rule(
    *,
    start: Mapping[str, Callable] | None = None,
    sums: Callable | None = None,
    shared: Callable | None = None,
    trees: Callable | None = None,
    coupled: bool = False,
    runtime: tuple[str, ...] = (),
    name: str | None = None,
    **fields: Any,
) -> Callable[[Callable], Rule]:
    """Decorate a function on one array: its signature is its spec (see `jaxsgd.spec`).

    Args:
      start, sums, shared, trees, coupled, runtime: see `jaxsgd.spec.Spec`.
      name: the rule's name; the function's by default.
      oracle, needs, exceptions, bounds, alternatives, aliases, prepare, routes, hidden, extras: see `Rule`.
      positional: arguments that may be given by position, in order; by default the learning rate, then
        all hyperparameters.
      learning_rate, weight_decay: their defaults; by default there is none, and no decay.

    Raises:
      TypeError: a signature that is not a rule's.
      ValueError: a name that is taken.
    """

    def decorate(fn: Callable) -> Rule:
        roles = {"sums": sums, "shared": shared, "trees": trees, "coupled": coupled, "runtime": runtime}
        spec = Spec.read(fn, name=name or fn.__name__, start=start, **roles)
        return register(make_rule(spec, fn.__doc__ or "", **fields))

    return decorate
