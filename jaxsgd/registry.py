"""Rules by name: `rule` turns a function on one array into a `Rule`, `wrapper` a function around one.

A rule's signature is its spec. The first positional parameter is the gradient. Further positionals are slots, annotated
by their kind (`jaxsgd.slots`). Keyword-only parameters without a default are context. Those with a default are
hyperparameters, annotated by their domain (`jaxsgd.hyper`).
"""

from __future__ import annotations

import dis
import inspect
import typing
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import optax

from jaxsgd.call import FRAME, REQUIRED, bind, defaults_of, named_by, signature_of, type_text
from jaxsgd.hyper import Hyper, is_off
from jaxsgd.leaf import Equation, Leaf
from jaxsgd.lift import Transformation
from jaxsgd.paths import nearest
from jaxsgd.slots import Slot, Start, by_name

__all__ = [
    "FRAME",
    "RULES",
    "TREE_RULES",
    "AnyRule",
    "Inner",
    "Registry",
    "Rule",
    "UnknownRule",
    "all_rules",
    "make_rule",
    "register",
    "rule",
    "wrapper",
]

RESERVED = {
    "g",
    "p",
    "t",
    "learning_rate",
    "weight_decay",
    "leaf_key",
    "params",
    "updates",
    "lr_mult",
    "frozen",
    *FRAME,
}
"""Names that the lift gives a meaning to."""


class UnknownRule(KeyError):
    """A name that no rule has; the message names the nearest."""

    def __str__(self) -> str:
        return str(self.args[0])


class Registry(dict):
    """Rules by name; for an unknown one the error names the nearest."""

    def __missing__(self, name: str) -> Any:
        raise UnknownRule(f"unknown rule {name!r}{nearest(str(name), self)}")


class AnyRule:
    """The common part of all rules. Call a rule to get a gradient transformation.

    Attributes:
      name: its name.
      doc: first line ``Name (Authors Year, arXiv:id): $equation$.``
      defaults: argument -> default, of the call.
      usual_rate: the learning rate at which a search begins, or None.
      batch_scaling: how the learning rate goes with the batch size: ``"linear"``, ``"sqrt"`` or None, unknown.
      module: where the rule's function is written.
    """

    name: str
    doc: str
    defaults: Mapping[str, Any]
    usual_rate: float | None
    batch_scaling: str | None
    module: str

    @property
    def title(self) -> str:
        """The docstring's first sentence: name, source, equation."""
        return " ".join(self.doc.split("\n\n")[0].split())

    def __repr__(self) -> str:
        return f"<rule {self.name}>"

    def __call__(self, *args: Any, **kwargs: Any) -> optax.GradientTransformationExtraArgs:
        raise NotImplementedError


RULES: dict[str, Rule] = Registry()
"""The rules that step one array at a time, by name."""
TREE_RULES: dict[str, AnyRule] = Registry()
"""The second-order rules by name: they see the whole tree and evaluate the loss."""


def all_rules() -> dict[str, AnyRule]:
    """The rules of `RULES` and `TREE_RULES` by name, in alphabetical order.

    As in both, an unknown name raises `UnknownRule`, whose message names the nearest.
    """
    return Registry(sorted({**RULES, **TREE_RULES}.items()))


@dataclass(frozen=True, eq=False, repr=False)
class Rule(AnyRule, Equation):
    """An update rule of one array. Call it to get a gradient transformation.

    Attributes, beside those of `AnyRule` and `jaxsgd.leaf.Equation`:
      defaults: argument -> default, of the call (`REQUIRED` where there is none).
      positional: the arguments that may be given by position, in order; None for the learning rate, then all
        hyperparameters.
      call: optional, the arguments of the call -> those of the rule: see `rule`.
      usual_rate: by default the learning rate of the call.
      cost: why an update moves more bytes than its arrays have, a key of `tools/explanations.py`, or None.
    """

    doc: str = ""
    defaults: Mapping[str, Any] = field(default_factory=dict)
    positional: tuple[str, ...] | None = None
    call: Callable[..., dict[str, Any]] | None = None
    usual_rate: float | None = None
    batch_scaling: str | None = None
    cost: str | None = None
    module: str = ""

    def __post_init__(self) -> None:
        signature = signature_of(self, self.defaults, self.positional)
        doc = f"{self.name}{_typed(signature)}\n\n{self.doc}\n\n{_SHARED_ARGUMENTS}"
        about = {"__signature__": signature, "__doc__": doc, "__name__": self.name, "__qualname__": self.name}
        rate = self.defaults["learning_rate"]
        if self.usual_rate is None and isinstance(rate, float):
            about["usual_rate"] = rate
        for name, value in {**about, "__module__": self.module}.items():
            object.__setattr__(self, name, value)

    @property
    def hyper(self) -> dict[str, Any]:
        """The hyperparameters that the call offers, with their defaults in the function's signature."""
        return {name: h.default for name, h in self.hypers.items() if not h.static and name in self.defaults}

    def __call__(self, *args: Any, **kwargs: Any) -> Transformation:
        """Bind the hyperparameters; all rules share these arguments.

        Args:
          learning_rate: a number, or a schedule of the 0-based step. It is part of the state: `jaxsgd.with_hyper` sets
            it without a new compile, `jaxsgd.metrics` reads it.
          weight_decay: decoupled: the update is ``-learning_rate * (direction + weight_decay * p)`` (rules that say so
            add it to the gradient instead). A number or a schedule. Default: None, no decay, unless the call above says
            otherwise.
          mask: where weight decay applies: a tree of booleans like the params, a prefix of one, or a function of the
            params that makes one. Default: everywhere.
          groups: ``[(pattern, overrides), ...]`` with a regular expression on the leaf's name (``"encoder/kernel"``)
            or a function ``(name, leaf) -> bool``; overrides are hyperparameters, ``lr_mult`` (times the learning
            rate), ``frozen`` (no state, zero updates), ``storage``. Later matches win, setting by setting.
          storage: how slots are stored between steps: one storage for all slots that it takes, or
            ``{"mu": jaxsgd.cast("bfloat16")}``.
          dynamic: names of further hyperparameters to keep in the state as runtime values. All others are compiled in
            as exact constants, unless they are schedules or arrays. An array counts as it is at each step.
          norms: keep the norms of gradients and updates in the state, for `jaxsgd.metrics`. Default: False.
          rounding: how steps below half a digit of 16-bit parameters are kept from being lost: ``"stochastic"``
            (bfloat16: to a neighbour at random, with the right mean, the same on every replica) or ``"compensated"``
            (Kahan's sum: the part that was rounded off is kept in a slot of the parameter's dtype). Updates of such
            parameters are then float32, for `optax.apply_updates` to add exactly: nothing may change them after.
            `optax.apply_if_finite` needs updates in the dtype of the gradients; use `jaxsgd.guard`. Default: None, to
            nearest.

        Returns:
          A `jaxsgd.lift.Transformation`, an `optax.GradientTransformationExtraArgs` with the attribute ``rule``.

        Raises:
          TypeError: an unknown argument, or one of the wrong kind.
          ValueError: a value out of its range, an unknown group key, slot or dynamic name.
        """
        signature: inspect.Signature = self.__signature__  # type: ignore[attr-defined]  # set in __post_init__
        return bind(self, signature, self.call, args, kwargs)

    def preset(self, name: str, doc: str, *, positional: str | None = None, **changes: Any) -> Rule:
        """The same rule under another name, with defaults or facts of its own, registered in `RULES`.

        Args:
          name, doc: of the new rule.
          positional: its positional arguments, see `rule`; by default those of this one.
          changes: arguments of the call -> other defaults; ``usual_rate``, ``batch_scaling``, ``cost``.
        """
        facts = {key: changes.pop(key) for key in ("usual_rate", "batch_scaling", "cost") if key in changes}
        order = self.positional if positional is None else tuple(positional.split())
        defaults = dict(self.defaults)
        if order is not None and "weight_decay" in order and defaults["weight_decay"] is None:
            defaults["weight_decay"] = 0.0
        unknown = [key for key in changes if key not in defaults]
        if unknown:
            raise TypeError(f"{name}: {self.name} has no argument {unknown[0]}{nearest(unknown[0], defaults)}")
        defaults |= {argument: None for argument in order or () if argument == "weight_decay_mask"}
        if "learning_rate" in changes and "usual_rate" not in facts:
            facts["usual_rate"] = None
        made = replace(
            self, name=name, doc=inspect.cleandoc(doc), defaults={**defaults, **changes}, positional=order, **facts
        )
        return register(made)


def _typed(signature: inspect.Signature) -> str:
    """The call in plain types."""
    parts, keyword = [], False
    for p in signature.parameters.values():
        if p.kind is p.KEYWORD_ONLY and not keyword:
            parts.append("*")
            keyword = True
        default = "" if p.default is REQUIRED else f" = {p.default!r}"
        parts.append(f"{p.name}: {type_text(p)}{default}")
    return f"({', '.join(parts)}) -> GradientTransformationExtraArgs"


_SHARED_ARGUMENTS = inspect.cleandoc(Rule.__call__.__doc__ or "").split("\n\n", 1)[1]


def register(entry: Rule) -> Rule:
    """Put a rule into `RULES`.

    Raises:
      ValueError: the name is taken.
    """
    if entry.name in RULES:
        raise ValueError(f"rule {entry.name!r} exists already, in {RULES[entry.name].module}")
    RULES[entry.name] = entry
    return entry


# -- reading a signature ---------------------------------------------------------------------------


def _hints(fn: Callable) -> dict[str, list[Any]]:
    """The metadata of every annotated parameter."""
    try:
        types = typing.get_type_hints(fn, include_extras=True)
    except NameError as error:
        raise TypeError(f"an annotation cannot be read: {error}") from None
    return {name: list(getattr(t, "__metadata__", ())) for name, t in types.items()}


def _read(name: str, fn: Callable, skip: int) -> dict[str, Any]:
    """Slots, context and hyperparameters of a function, whose first ``skip`` positionals are not slots.

    Raises:
      TypeError: a parameter without a role, a reserved or doubled name, an annotation that says nothing here, or a
        return of another number of values.
    """
    slots: dict[str, Slot] = {}
    context: list[str] = []
    hyper: dict[str, Hyper] = {}
    first: list[str] = []
    try:
        hints = _hints(fn)
    except TypeError as error:
        raise TypeError(f"rule {name}: {error}") from None
    for p in inspect.signature(fn).parameters.values():
        own = hints.get(p.name, [])
        if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD) and p.default is p.empty:
            if len(first) < skip:
                first.append(p.name)
                continue
            if p.name in RESERVED:
                raise TypeError(f"rule {name}: a slot cannot be called {p.name!r}, which the lift gives a meaning to")
            try:
                slots[p.name] = Slot.read(p.name, own)
            except TypeError as error:
                raise TypeError(f"rule {name}: slot {p.name!r}: {error}") from None
        elif p.kind is p.KEYWORD_ONLY and p.default is p.empty:
            context.append(p.name)
        elif p.kind is p.KEYWORD_ONLY:
            if p.name in RESERVED:
                raise TypeError(
                    f"rule {name}: a hyperparameter cannot be called {p.name!r}, which the lift gives a meaning to"
                )
            if any(isinstance(hint, Start) for hint in own):
                raise TypeError(f"rule {name}: hyperparameter {p.name!r}: start is for slots")
            hyper[p.name] = Hyper.read(p.name, p.default, own)
        else:
            raise TypeError(f"rule {name}: the parameter '{p}' carries no role; see jaxsgd.rule")
    if len(first) < skip:
        raise TypeError(f"rule {name}: the first positional parameter is the gradient")
    for slot in slots.values():
        if slot.unless is not None and slot.unless not in hyper:
            raise TypeError(f"rule {name}: slot {slot.name!r}: unless({slot.unless!r}) names no hyperparameter")
    return {"slots": slots, "context": tuple(context), "hypers": hyper}


def _check_returns(name: str, fn: Callable, count: int) -> None:
    """That each ``return a, b, c`` has as many values as the rule owes.

    Raises:
      TypeError: one has not.
    """
    code = list(dis.get_instructions(fn))
    for before, after in zip(code, code[1:], strict=False):
        if after.opname == "RETURN_VALUE" and before.opname == "BUILD_TUPLE" and before.arg != count:
            raise TypeError(f"rule {name}: it returns {before.arg} values; {count} are needed, one and each slot")


def _kept(name: str, shared: Callable | None) -> dict[str, Callable]:
    """The scalars that ``shared`` keeps: its positional parameters, and how they start."""
    kept: dict[str, Callable] = {}
    for p in inspect.signature(shared).parameters.values() if shared is not None else ():
        if p.kind is p.KEYWORD_ONLY:
            continue
        if p.default is p.empty:
            raise TypeError(f"rule {name}: shared keeps {p.name!r}; its default says how it starts")
        kept[p.name] = p.default.fn if isinstance(p.default, Start) else _constantly(p.default)
    return kept


def _constantly(value: Any) -> Callable:
    return lambda: value


def _disjoint(name: str, roles: Mapping[str, Iterable[str]]) -> None:
    seen: dict[str, str] = {}
    for role, names in roles.items():
        for one in names:
            if one in seen:
                raise TypeError(f"rule {name}: {one!r} is both a {seen[one]} and a {role}")
            seen[one] = role


def make_rule(
    fn: Callable,
    *,
    name: str | None = None,
    doc: str | None = None,
    positional: str | None = None,
    call: Callable[..., dict[str, Any]] | None = None,
    learning_rate: Any = REQUIRED,
    weight_decay: Any = REQUIRED,
    shared: Callable | None = None,
    **fields: Any,
) -> Rule:
    """A `Rule` of ``fn``, not registered; see `rule` for the arguments."""
    name = fn.__name__ if name is None else name
    roles, kept = _read(name, fn, 1), _kept(name, shared)
    _check_returns(name, fn, 1 + len(roles["slots"]))
    _disjoint(name, {"slot": roles["slots"], "hyperparameter": roles["hypers"], "kept scalar": kept})
    equation = Equation(name, fn, **roles, shared=shared, kept=kept)
    order = None if positional is None else tuple(positional.split())
    return Rule(
        name,
        fn,
        **roles,
        shared=shared,
        kept=kept,
        doc=inspect.cleandoc(doc or fn.__doc__ or ""),
        defaults=defaults_of(equation, call, order, learning_rate, weight_decay),
        positional=order,
        call=call,
        module=fn.__module__,
        **fields,
    )


def rule(
    fn: Callable | None = None,
    /,
    *,
    name: str | None = None,
    positional: str | None = None,
    call: Callable[..., dict[str, Any]] | None = None,
    learning_rate: Any = REQUIRED,
    weight_decay: Any = REQUIRED,
    coupled: bool = False,
    sums: Callable | None = None,
    shared: Callable | None = None,
    trees: Callable | None = None,
    usual_rate: float | None = None,
    batch_scaling: str | None = None,
    cost: str | None = None,
    stacked: bool = False,
) -> Any:
    """Decorate a function on one array: its signature is its spec, see `jaxsgd.rule`.

    Args:
      fn: the function, ``fn(g, *slots, **context, **hyper) -> (direction, *slots)``; a rule that asks for
        ``learning_rate`` returns the change of the parameter in place of a direction.
      name: the rule's name. Default: the function's.
      positional: the arguments that may be given by position, one string of names. Default: the learning rate, then
        all hyperparameters.
      call: a function that translates the arguments of the call: it names those that need it, with their real defaults,
        takes all others as ``**rest``, and returns all as a dictionary; ``"routes"`` in it is a function of the params
        that gives the overrides of each leaf. Default: none.
      learning_rate, weight_decay: their defaults. Default: required, and no decay.
      coupled: weight decay is added to the gradient. Default: False.
      sums, shared, trees: see `jaxsgd.leaf.Equation`. Default: none.
      usual_rate, batch_scaling, cost: facts, see `Rule`. Default: unknown.
      stacked: leaves of one shape take their step as one stack, see `jaxsgd.stacking`. Default: False.

    Raises:
      TypeError: a signature that is not a rule's.
      ValueError: a name that is taken.

    Example::

        @jaxsgd.rule(usual_rate=0.1)
        def heavy_ball(g, trace: Mean, *, momentum: Decay = 0.9):
            r\"\"\"Heavy ball (Polyak 1964, doi:10.1016/0041-5553(64)90137-5): $b \\leftarrow \\mu b + g$.\"\"\"
            trace = momentum * trace + g
            return trace, trace
    """
    if batch_scaling not in (None, "linear", "sqrt"):
        raise ValueError(f"batch_scaling={batch_scaling!r}: known are 'linear', 'sqrt' and None")

    def decorate(fn: Callable) -> Rule:
        made = make_rule(
            fn, name=name, positional=positional, call=call, learning_rate=learning_rate, weight_decay=weight_decay,
            coupled=coupled, sums=sums, shared=shared, trees=trees, usual_rate=usual_rate,
            batch_scaling=batch_scaling, cost=cost, stacked=stacked,
        )  # fmt: skip
        return register(made)

    return decorate if fn is None else decorate(fn)


# -- rules around rules ----------------------------------------------------------------------------


@dataclass(frozen=True)
class Inner:
    """The rule inside a wrapper, as the wrapper's function gets it."""

    base: Equation

    def __call__(self, leaf: Leaf) -> Leaf:
        """The base's step: the leaf with its ``delta`` and the base's new slots."""
        return self._outside(leaf, self.base.step(self._inside(leaf)))

    def direction(self, leaf: Leaf) -> tuple[Any, Leaf]:
        """The base's direction, without learning rate and decay, and the leaf with its new slots."""
        direction, after = self.base.direction(self._inside(leaf))
        return direction, self._outside(leaf, after)

    def _inside(self, leaf: Leaf) -> Leaf:
        return leaf.replace(hyper={**leaf.hyper, **self.base.fixed})

    def _outside(self, before: Leaf, after: Leaf) -> Leaf:
        return after.replace(hyper=before.hyper)


def wrapped(
    base: Rule,
    fn: Callable,
    *,
    name: str,
    doc: str,
    fix: Mapping[str, Any] | None = None,
    shared: Callable | None = None,
    call: Callable[..., dict[str, Any]] | None = None,
    positional: str | None = None,
    learning_rate: Any = None,
    weight_decay: Any = REQUIRED,
    slots: Mapping[str, Slot] | None = None,
    **fields: Any,
) -> Rule:
    """A rule around ``base``, not registered: see `wrapper`.

    Args:
      slots: the base's slots where the wrapper starts them otherwise. Default: as they are.
    """
    roles = _read(name, fn, 2)
    own_slots, own_hyper = roles["slots"], roles["hypers"]
    fixed = {key: value for key, value in (fix or {}).items() if key in base.hypers}
    inner = replace(_equation(base), fixed=fixed, hypers={k: h for k, h in base.hypers.items() if k not in fixed})
    if shared is not None and (inner.shared is not None or inner.sums is not None):
        raise ValueError(f"{name}: {base.name} must not have tree-wide sums of its own")
    for taken in (*set(own_slots) & set(inner.slots), *set(own_hyper) & set(inner.hypers)):
        raise ValueError(f"{name}: {base.name} has {taken!r} too")
    both = {*own_slots} & {*inner.hypers} | {*own_hyper} & {*inner.slots}
    for taken in both:
        raise ValueError(f"{name}: {base.name} has {taken!r} too")
    held = {
        key: _settled(slot, fixed) for key, slot in (slots or inner.slots).items() if not _is_settled_off(slot, fixed)
    }
    inside = Inner(inner)

    def advance(leaf: Leaf) -> Leaf:
        asked = {key: leaf.hyper[key] if key != "p" else leaf.p for key in (*roles["context"], *own_hyper)}
        out = fn(inside, leaf, *(leaf.slots[key] for key in own_slots), **asked)
        after, *own = out if isinstance(out, tuple) else (out,)
        if len(own) != len(own_slots):
            raise TypeError(f"{name}: it returned {1 + len(own)} values; a leaf and {len(own_slots)} slots are needed")
        return after.replace(slots={**after.slots, **dict(zip(own_slots, own, strict=True))})

    context = ("p", "learning_rate", "weight_decay", *roles["context"], *inner.context)
    hyper = {**own_hyper, **inner.hypers}
    kept = {key: _fixed_in(begin, fixed) for key, begin in inner.kept.items()} | _kept(name, shared)
    sums, of_base, trees = (
        None if asked is None else _fixed_in(asked, fixed) for asked in (inner.sums, inner.shared, inner.trees)
    )
    shared = of_base if shared is None else shared
    asked = tuple(dict.fromkeys(context))
    equation = Equation(name, fn, {**own_slots, **held}, asked, hyper, sums, shared, kept, trees, advance=advance)
    equation = replace(equation, stacked=inner.stacked)
    chosen = _in_turn(call, base.call)
    order = None if positional is None else tuple(positional.split())
    rate = base.defaults["learning_rate"] if learning_rate is None else learning_rate
    decay = base.defaults["weight_decay"] if weight_decay is REQUIRED else weight_decay
    defaults = defaults_of(equation, chosen, order, rate, decay)
    defaults |= {key: base.defaults[key] for key in defaults if key in base.defaults and key in inner.hypers}
    defaults |= {key: base.defaults[key] for key in named_by(base.call) if key in base.defaults}
    facts = {"usual_rate": base.usual_rate, "batch_scaling": base.batch_scaling, "cost": base.cost, **fields}
    return Rule(
        **{key: getattr(equation, key) for key in Equation.__dataclass_fields__},
        doc=inspect.cleandoc(doc),
        defaults=defaults,
        positional=order,
        call=chosen,
        module=fn.__module__,
        **facts,
    )


def _equation(rule: Rule) -> Equation:
    return Equation(**{key: getattr(rule, key) for key in Equation.__dataclass_fields__})


def _is_settled_off(slot: Slot, fixed: Mapping[str, Any]) -> bool:
    return slot.unless is not None and slot.unless in fixed and is_off(fixed[slot.unless])


def _settled(slot: Slot, fixed: Mapping[str, Any]) -> Slot:
    """A slot of the base, with settled hyperparameters no longer asked for."""
    unless = None if slot.unless in fixed else slot.unless
    return replace(slot, begin=_fixed_in(slot.begin, fixed), unless=unless) if fixed else slot


def _fixed_in(begin: Callable, fixed: Mapping[str, Any]) -> Callable:
    asked = [name for name in inspect.signature(begin).parameters if name not in fixed]
    if len(asked) == len(inspect.signature(begin).parameters):
        return begin

    def settled(**available: Any) -> Any:
        return by_name(begin, {**available, **fixed})

    parameters = [inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY) for name in asked]
    settled.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]  # read by `by_name`
    return settled


def _in_turn(first: Callable | None, then: Callable | None) -> Callable | None:
    """The wrapper's translation of a call, then the base's."""
    if first is None or then is None:
        return first or then

    def both(**arguments: Any) -> dict[str, Any]:
        return then(**first(**arguments))

    own = named_by(first)
    parameters = [*own.values(), *(p for name, p in named_by(then).items() if name not in own)]
    rest = inspect.Parameter("rest", inspect.Parameter.VAR_KEYWORD)
    keyword = [p.replace(kind=inspect.Parameter.KEYWORD_ONLY) for p in parameters]
    both.__signature__ = inspect.Signature([*keyword, rest])  # type: ignore[attr-defined]  # read by `named_by`
    return both


def titled(fn: Callable, base: Rule) -> str:
    """A wrapper's title as that of the rule it makes."""
    return (fn.__doc__ or "").split("\n\n")[0].replace(" (", f" of {base.name} (", 1)


def wrapper(fn: Callable | None = None, /, **options: Any) -> Any:
    """Decorate ``fn(inner, leaf, *slots, **context, **hyper) -> (leaf, *slots)``: a rule around any rule.

    ``inner(leaf)`` takes the base's step and ``inner.direction(leaf)`` gives its direction; ``leaf.replace(g=...)``
    changes what the base sees. The result is a function ``(base) -> Rule``. The new rule has the wrapper's slots and
    hyperparameters, then the base's. It keeps the base's kinds, call and routes. It is not registered in `RULES`.

    Args:
      fn: the function on one leaf.
      options: ``fix`` (hyperparameters of the base that the wrapper settles), ``shared``, ``call``, ``positional``,
        ``learning_rate``, ``weight_decay`` and facts, as in `rule`.
    """

    def decorate(fn: Callable) -> Callable[[Rule], Rule]:
        name = fn.__name__

        def wrap(base: Rule) -> Rule:
            if not isinstance(base, Rule):
                raise TypeError(
                    f"{name}: base={base!r}: a rule such as jaxsgd.adamw is needed, not a transformation. "
                    f"Use jaxsgd.{name}(jaxsgd.adamw)(learning_rate)"
                )
            return wrapped(base, fn, name=f"{name}_{base.name}", doc=titled(fn, base), **options)

        wrap.__name__ = wrap.__qualname__ = name
        wrap.__doc__, wrap.__module__ = fn.__doc__, fn.__module__
        return wrap

    return decorate if fn is None else decorate(fn)
