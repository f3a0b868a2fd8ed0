"""The call of a rule: its arguments, and the `Lift` that they bind.

A call takes the learning rate, the rule's hyperparameters and the arguments of `FRAME`, which all rules share. Where a
rule's call differs, one function with real parameters translates it.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import optax

from jaxsgd.hyper import Hyper, checked, is_array, is_off
from jaxsgd.leaf import Equation
from jaxsgd.lift import Lift, Transformation
from jaxsgd.paths import nearest
from jaxsgd.rounding import ROUNDINGS
from jaxsgd.storage import Storage, accepts, cast, of_kind

__all__ = ["FRAME", "REQUIRED", "bind", "call_text", "defaults_of", "signature_of"]

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
FRAME_TYPES = {
    "groups": "Groups",
    "storage": "Storage | dict[str, Storage] | None",
    "dynamic": "tuple[str, ...]",
    "rounding": "str | None",
}
MASK = "weight_decay_mask"
"""The other name that optax has for the mask."""


def named_by(call: Callable | None) -> dict[str, inspect.Parameter]:
    """The parameters that a translating function names."""
    parameters = inspect.signature(call).parameters.values() if call is not None else ()
    return {p.name: p for p in parameters if p.kind is not p.VAR_KEYWORD}


def dtype_arguments(rule: Equation) -> dict[str, list[str]]:
    """Arguments that say in which dtype slots are stored -> those slots."""
    out: dict[str, list[str]] = {}
    for slot in rule.slots.values():
        if slot.kept_in is not None:
            out.setdefault(slot.kept_in, []).append(slot.name)
    return out


def defaults_of(
    rule: Equation, call: Callable | None, positional: Sequence[str] | None, learning_rate: Any, weight_decay: Any
) -> dict[str, Any]:
    """Every argument of the call with its default, in order; `REQUIRED` where there is none."""
    defaults = {"learning_rate": learning_rate}
    defaults |= {name: h.default for name, h in rule.hypers.items() if not h.static}
    defaults |= {name: p.default for name, p in named_by(call).items()}
    defaults |= dict.fromkeys(dtype_arguments(rule))
    if positional is not None and MASK in positional:
        defaults[MASK] = None
    # None, not 0, where it is only ours: what injects hyperparameters makes arrays of numbers, which are never off.
    own = 0.0 if positional is not None and "weight_decay" in positional else None
    return {**defaults, **FRAME, "weight_decay": own if weight_decay is REQUIRED else weight_decay}


def signature_of(rule: Equation, defaults: Mapping[str, Any], positional: Sequence[str] | None) -> inspect.Signature:
    """The signature of the call, in plain types."""
    if positional is None:
        positional = ("learning_rate", *(name for name, h in rule.hypers.items() if not h.static))
    unknown = [name for name in positional if name not in defaults]
    if unknown:
        raise TypeError(f"rule {rule.name}: positional names {unknown[0]!r}{nearest(unknown[0], defaults)}")
    return inspect.Signature(
        [
            inspect.Parameter(
                name,
                inspect.Parameter.POSITIONAL_OR_KEYWORD if name in positional else inspect.Parameter.KEYWORD_ONLY,
                default=defaults[name],
                annotation=_plain_type(name, defaults[name]),
            )
            for name in [*positional, *(n for n in defaults if n not in positional)]
        ],
        return_annotation=optax.GradientTransformationExtraArgs,
    )


def _plain_type(name: str, default: Any) -> Any:
    if name == "learning_rate":
        return optax.ScalarOrSchedule  # optax's own tools look for it
    if name == "weight_decay":
        return "float | Schedule"
    if isinstance(default, bool):
        return "bool"
    if isinstance(default, str):
        return "str"
    if isinstance(default, int | float):
        return "float | Schedule"
    return FRAME_TYPES.get(name, "Any")


def type_text(p: inspect.Parameter) -> str:
    """The plain type of an argument."""
    return p.annotation if isinstance(p.annotation, str) else "float | Schedule"


def call_text(signature: inspect.Signature) -> str:
    """A signature in a line, without types."""
    plain = [p.replace(annotation=inspect.Parameter.empty) for p in signature.parameters.values()]
    return str(inspect.Signature(plain))


def bind(
    rule: Equation, signature: inspect.Signature, call: Callable | None, args: tuple, kwargs: Mapping[str, Any]
) -> Transformation:
    """The transformation of one call.

    Raises:
      TypeError: an unknown argument, or one of the wrong kind.
      ValueError: a value out of its range, an unknown group key, slot or dynamic name.
    """
    for name in kwargs:
        if name not in signature.parameters:
            known = nearest(name, signature.parameters)
            raise TypeError(f"{rule.name}: unknown hyperparameter {name}={kwargs[name]!r}{known}")
    try:
        bound = signature.bind(*args, **kwargs)
    except TypeError as error:
        raise TypeError(f"{rule.name}: {error}; call it as {rule.name}{call_text(signature)}") from None
    shown = dict(bound.arguments)
    bound.apply_defaults()
    arguments = dict(bound.arguments)
    defaults = {name: p.default for name, p in signature.parameters.items()}
    shown = {name: value for name, value in shown.items() if not _is_same(value, defaults[name])}
    if MASK in arguments and (mask := arguments.pop(MASK)) is not None:
        arguments["mask"] = mask
    given = arguments["storage"]
    arguments["storage"] = storages(rule, given)
    for argument, slots in dtype_arguments(rule).items():
        if (dtype := arguments.pop(argument)) is not None:
            arguments["storage"] = dict.fromkeys(slots, cast(dtype)) | arguments["storage"]
    if call is not None:
        arguments = call(**arguments)
    if arguments["weight_decay"] is None:  # as some of optax's aliases say none
        arguments["weight_decay"] = 0.0
    hyper = {name: checked(f"{rule.name}: {name}", arguments[name]) for name in ("learning_rate", "weight_decay")}
    for name, h in rule.hypers.items():
        default = defaults.get(name, h.default)
        hyper[name] = h.check(rule.name, arguments.get(name, h.default), default)
    lift = Lift(
        rule,
        hyper,
        mask=arguments["mask"],
        groups=_groups(rule, arguments["groups"], defaults),
        storage=arguments["storage"],
        dynamic=_dynamic(rule, arguments["dynamic"], hyper),
        norms=checked_flag(rule, "norms", arguments["norms"]),
        rounding=_rounding(rule, arguments["rounding"]),
        routes=arguments.get("routes"),
        shown=shown,
        decay_is_off=is_off(defaults["weight_decay"]),
    )
    _check_used(lift, given)
    return lift.transformation


def _check_used(lift: Lift, storage: Any) -> None:
    """Refuse a storage for slots that these settings switch off.

    Raises:
      ValueError: none of the slots of a storage is kept, or one that is named is not.
    """
    named = storage if isinstance(storage, Mapping) else lift.storage if storage is not None else {}
    unused = [name for name in named if name not in lift.slots]
    if unused and (isinstance(storage, Mapping) or len(unused) == len(named)):
        kept = ", ".join(lift.slots) or "none"
        raise ValueError(
            f"{lift.rule.name}: storage={storage!r}: no slot {', '.join(unused)} with these settings; kept are: {kept}"
        )


def _is_same(value: Any, default: Any) -> bool:
    return value is default or type(value) is type(default) and not is_array(value) and value == default


def checked_flag(rule: Equation, name: str, value: Any) -> bool:
    return Hyper.read(name, False, ()).check(rule.name, value, False)


def _rounding(rule: Equation, value: Any) -> Any:
    if value not in ROUNDINGS:
        raise ValueError(f"{rule.name}: rounding={value!r}: known are {', '.join(map(repr, ROUNDINGS))}")
    return value


def _dynamic(rule: Equation, dynamic: Any, hyper: Mapping[str, Any]) -> tuple[str, ...]:
    names = (dynamic,) if isinstance(dynamic, str) else tuple(dynamic)
    static = {name for name, h in rule.hypers.items() if h.static}
    numeric = [n for n, v in hyper.items() if n not in static and not isinstance(v, bool | str | None)]
    for name in names:
        if name not in numeric:
            raise ValueError(f"dynamic={name!r}: {rule.name} has no such number{nearest(str(name), numeric)}")
    return names


def _groups(rule: Equation, groups: Any, defaults: Mapping[str, Any]) -> list[tuple[Any, dict[str, Any]]]:
    """Parameter groups, each override checked like the argument that it replaces."""
    pairs = list(groups.items()) if isinstance(groups, Mapping) else groups
    if isinstance(pairs, str) or not isinstance(pairs, Sequence):
        raise TypeError(f"{rule.name}: groups={groups!r}: a list of (pattern, overrides) is needed")
    out = []
    for pair in pairs:
        if (
            not isinstance(pair, Sequence)
            or isinstance(pair, str)
            or len(pair) != 2
            or not isinstance(pair[1], Mapping)
        ):
            raise TypeError(f"{rule.name}: groups: {pair!r}: a pair (pattern, overrides) is needed")
        pattern, overrides = pair
        if not isinstance(pattern, str) and not callable(pattern):
            raise TypeError(
                f"{rule.name}: groups: {pattern!r}: a regular expression or a function (name, leaf) -> bool is needed"
            )
        out.append((pattern, {key: _override(rule, key, value, defaults) for key, value in overrides.items()}))
    return out


def _override(rule: Equation, key: str, value: Any, defaults: Mapping[str, Any]) -> Any:
    offered = {name: h for name, h in rule.hypers.items() if not h.static}
    if key == "frozen":
        return checked_flag(rule, "groups: frozen", value)
    if key == "storage":
        return storages(rule, value)
    if key in rule.tree_wide:
        raise ValueError(f"{rule.name}: groups: {key!r} is one value for the whole tree")
    if key in ("learning_rate", "weight_decay", "lr_mult"):
        return checked(f"{rule.name}: groups: {key}", value)
    if key in offered:
        return offered[key].check(f"{rule.name}: groups", value, defaults.get(key, offered[key].default))
    known = ("frozen", "lr_mult", "storage", "learning_rate", "weight_decay", *offered)
    raise ValueError(f"{rule.name}: groups: unknown key {key!r}{nearest(str(key), known)}")


def storages(rule: Equation, storage: Any) -> dict[str, Storage]:
    """``storage=`` as slot name -> storage, in the form for the slot's kind.

    Raises:
      TypeError: it is no storage, nor a dictionary of them.
      ValueError: a slot that the rule does not have, or one that the storage does not take; no slot that it takes.
    """
    if storage is None:
        return {}
    if isinstance(storage, Storage):
        taken = {name: storage for name, slot in rule.slots.items() if accepts(storage, slot.kind)}
        if not taken:
            kinds = ", ".join(f"{name} ({slot.kind})" for name, slot in rule.slots.items()) or "none"
            raise ValueError(f"{rule.name}: storage={storage!r}: it takes no slot of this rule; its slots are: {kinds}")
        storage = taken
    if not isinstance(storage, Mapping):
        raise TypeError(f"{rule.name}: storage={storage!r}: a storage such as jaxsgd.cast('bfloat16') is needed")
    for name, held in storage.items():
        if name not in rule.slots:
            raise ValueError(f"{rule.name}: storage: no slot {name!r}{nearest(str(name), rule.slots)}")
        if not isinstance(held, Storage) or isinstance(held, type):
            raise TypeError(f"{rule.name}: storage[{name!r}]={held!r}: a storage is needed")
        try:
            inspect.signature(held.pack).bind(None, None)
        except TypeError:
            raise TypeError(
                f"{rule.name}: storage[{name!r}]={held!r}: its pack needs the arguments (x, key); "
                "key is None unless needs_key is True"
            ) from None
        if not accepts(held, rule.slots[name].kind):
            raise ValueError(
                f"{rule.name}: storage[{name!r}]={held!r}: "
                f"it does not take a slot of the kind {rule.slots[name].kind!r}"
            )
        try:
            hash(held)
        except TypeError:
            raise TypeError(
                f"{rule.name}: storage[{name!r}]={held!r}: use a frozen dataclass; it is not hashable"
            ) from None
    return {name: of_kind(held, rule.slots[name].kind) for name, held in storage.items()}
