"""One program for functions that were traced at concrete numbers.

A schedule such as `optax.warmup_cosine_decay_schedule` tests its peak in Python, which no traced number allows. So the
function is traced once for each value. Traces that differ only in their constants are one program, and the constants
are its arguments. Traces that differ in more are branches of a switch.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.core import Tracer
from jax.extend.core import ClosedJaxpr, Jaxpr, Literal

from jaxsgd.numerics import is_key

__all__ = ["Concrete", "Merged", "by_index", "merged"]

CALLS = frozenset(("jit", "closed_call", "core_call", "checkpoint", "remat2", "custom_jvp_call", "custom_vjp_call"))
"""Primitives that call one jaxpr with their own arguments."""
LOOPS = frozenset(("cond", "scan", "while"))


@dataclass(frozen=True, eq=False)
class Constant:
    """A constant of a trace, equal to another one of the same bits."""

    value: Any

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Constant):
            return False
        a, b = self.value, other.value
        if a is b:
            return True
        if isinstance(a, Tracer) or isinstance(b, Tracer):
            return False
        if isinstance(a, jax.Array | np.ndarray | np.generic | int | float | complex):
            return _bits(a) == _bits(b)
        try:
            return bool(a == b)
        except Exception:  # whatever a parameter of a primitive says to a comparison
            return False


def _bits(x: Any) -> Any:
    x = np.asarray(jax.random.key_data(x) if is_key(x) else x)
    return x.shape, x.dtype, x.tobytes()


def _inner(equation: Any) -> list[tuple[str, int, Any]]:
    """The jaxprs in the parameters of an equation, in an order of their own: ``(name, index, jaxpr)``."""
    out = []
    for name, value in sorted(equation.params.items()):
        entries = value if isinstance(value, tuple | list) else (value,)
        out += [(name, i, x) for i, x in enumerate(entries) if isinstance(x, Jaxpr | ClosedJaxpr)]
    return out


def _open(jaxpr: Any) -> tuple[Jaxpr, Sequence[Any]]:
    return (jaxpr.jaxpr, jaxpr.consts) if isinstance(jaxpr, ClosedJaxpr) else (jaxpr, ())


def _read(jaxpr: Any, constants: list[Constant]) -> list[Any]:
    """The structure of a jaxpr; its constants are appended to ``constants`` in the order of evaluation."""
    jaxpr, consts = _open(jaxpr)
    constants += [Constant(x) for x in consts]
    number = {v: i for i, v in enumerate((*jaxpr.constvars, *jaxpr.invars))}

    def seen(x: Any) -> Any:
        if not isinstance(x, Literal):
            return number[x]
        constants.append(Constant(_literal(x)))
        return str(x.aval)

    out: list[Any] = [[str(v.aval) for v in number]]
    for equation in jaxpr.eqns:
        name = equation.primitive.name
        inputs, inner = [seen(x) for x in equation.invars], _inner(equation)
        if name in CALLS or name in LOOPS:
            parts = [_read(x, constants) for _, _, x in inner]
        else:  # inside of other primitives no constant may differ
            fixed: list[Constant] = []
            parts = [[_read(x, fixed) for _, _, x in inner], fixed]
        nested = {key for key, _, _ in inner}
        params = [] if name in CALLS else [(k, Constant(v)) for k, v in equation.params.items() if k not in nested]
        number.update((v, len(number) + i) for i, v in enumerate(equation.outvars))
        out.append([name, inputs, parts, params, [str(v.aval) for v in equation.outvars]])
    return [*out, [seen(x) for x in jaxpr.outvars]]


def _literal(x: Any) -> Any:
    return x.val if is_key(x.val) else np.asarray(x.val, x.aval.dtype)


def _evaluate(jaxpr: Any, args: Sequence[Any], at: int, given: Mapping[int, Any]) -> list[Any]:
    """The outputs of a jaxpr whose constants begin at number ``at``; those in ``given`` are replaced."""
    numbers = itertools.count(at)
    jaxpr, consts = _open(jaxpr)
    env = dict(zip(jaxpr.constvars, [given.get(next(numbers), x) for x in consts], strict=True))
    env |= dict(zip(jaxpr.invars, args, strict=True))

    def read(x: Any) -> Any:
        return given.get(next(numbers), x.val) if isinstance(x, Literal) else env[x]

    for equation in jaxpr.eqns:
        inputs = [read(x) for x in equation.invars]
        starts: dict[tuple[str, int], int] = {}
        changed = False
        if equation.primitive.name in CALLS or equation.primitive.name in LOOPS:
            for name, i, x in _inner(equation):
                within: list[Constant] = []
                _read(x, within)
                taken = list(itertools.islice(numbers, len(within)))
                starts[name, i] = taken[0] if taken else 0
                changed |= any(number in given for number in taken)
        with equation.ctx.manager:
            if changed:
                outs = _again(equation, inputs, starts, given)
            else:
                outs = equation.primitive.bind(*inputs, **equation.primitive.get_bind_params(equation.params))
        outs = outs if equation.primitive.multiple_results else [outs]
        env.update(zip(equation.outvars, outs, strict=True))
    return [read(x) for x in jaxpr.outvars]


def _again(equation: Any, inputs: list[Any], starts: Mapping[tuple[str, int], int], given: Mapping[int, Any]) -> Any:
    """A call, a branch or a loop whose inside has constants in ``given``."""

    def inside(name: str, index: int = 0) -> Callable[..., list[Any]]:
        value = equation.params[name]
        jaxpr = value[index] if isinstance(value, tuple | list) else value
        return lambda *args: _evaluate(jaxpr, args, starts[name, index], given)

    kind, params = equation.primitive.name, equation.params
    if kind == "cond":
        branches = [inside("branches", i) for i in range(len(params["branches"]))]
        return jax.lax.switch(inputs[0], branches, *inputs[1:])
    if kind == "scan":
        first = params["num_consts"]
        many = first + params["num_carry"]
        step = inside("jaxpr")

        def body(carry: Any, xs: Any) -> tuple[Any, Any]:
            outs = step(*inputs[:first], *carry, *xs)
            return outs[: many - first], outs[many - first :]

        options = {name: params[name] for name in ("length", "reverse", "unroll")}
        carry, ys = jax.lax.scan(body, inputs[first:many], inputs[many:], **options)
        return [*carry, *ys]
    if kind == "while":
        a = params["cond_nconsts"]
        b = a + params["body_nconsts"]
        test, step = inside("cond_jaxpr"), inside("body_jaxpr")
        return jax.lax.while_loop(
            lambda carry: test(*inputs[:a], *carry)[0], lambda carry: step(*inputs[a:b], *carry), inputs[b:]
        )
    name, index = next(iter(starts))
    return inside(name, index)(*inputs)


class Trace(NamedTuple):
    """One trace: the number of its kind, and its constants."""

    kind: int
    constants: list[Constant]


class _Kind:
    """Traces of one structure: the first of them, and the numbers of the constants that differ."""

    def __init__(self, jaxpr: ClosedJaxpr, structure: list[Any], constants: list[Constant]) -> None:
        self.jaxpr, self.structure, self.constants = jaxpr, structure, constants
        self.differ: list[int] = []


class Merged:
    """Traces of a function as one function: ``merged(row, *inputs) -> outputs``, both flat.

    Attributes:
      version: rises where a new trace needs another program.
    """

    def __init__(self) -> None:
        self.version = 0
        self._kinds: list[_Kind] = []

    def add(self, jaxpr: ClosedJaxpr) -> Trace:
        """Take one trace more."""
        constants: list[Constant] = []
        structure = _read(jaxpr, constants)
        for number, kind in enumerate(self._kinds):
            if kind.structure != structure:
                continue
            pairs = zip(kind.constants, constants, strict=True)
            differ = sorted({*kind.differ, *(i for i, (a, b) in enumerate(pairs) if a != b)})
            if any(isinstance(constants[i].value, Tracer) for i in differ):
                continue
            self.version += differ != kind.differ
            kind.differ = differ
            return Trace(number, constants)
        self._kinds.append(_Kind(jaxpr, structure, constants))
        self.version += 1
        return Trace(len(self._kinds) - 1, constants)

    def rows(self, traces: Sequence[Trace]) -> Any:
        """The constants of each trace: a tree of arrays ``(traces, ...)``."""

        def column(kind: int, number: int) -> np.ndarray:
            own = [(t if t.kind == kind else self._kinds[kind]).constants[number].value for t in traces]
            return np.stack([np.asarray(jax.random.key_data(x) if is_key(x) else x) for x in own])

        tables = [[column(k, number) for number in kind.differ] for k, kind in enumerate(self._kinds)]
        return np.asarray([t.kind for t in traces], np.int32), tables

    def __call__(self, row: Any, *inputs: Any) -> list[Any]:
        which, tables = row

        def of(kind: _Kind, table: Sequence[Any]) -> Callable[..., list[Any]]:
            given = {}
            for number, x in zip(kind.differ, table, strict=True):
                like = kind.constants[number].value
                given[number] = jax.random.wrap_key_data(x, impl=jax.random.key_impl(like)) if is_key(like) else x
            return lambda *inputs: _evaluate(kind.jaxpr, inputs, 0, given)

        branches = [of(kind, table) for kind, table in zip(self._kinds, tables, strict=True)]
        return branches[0](*inputs) if len(branches) == 1 else jax.lax.switch(which, branches, *inputs)


class Concrete:
    """A builder of steps that is called with numbers, not with tracers.

    Args:
      build: ``build(given, **values) -> (step function, state)``.
      given: a tree of arrays for it.
      names: the values that it gets as numbers; it gets the others as tracers.
    """

    def __init__(self, build: Callable[..., tuple[Any, Any]], given: Any, names: Sequence[str]) -> None:
        self._build, self._names = build, tuple(names)
        self._given = jax.tree.map(_shape, given)
        self._first, self._next = Merged(), Merged()
        self._starts: dict[Any, Trace] = {}
        self._moves: dict[Any, Trace] = {}
        self._state: Any = None
        self._report: Any = None
        self._batch: Any = None

    @property
    def version(self) -> tuple[int, int]:
        """Changes where the programs have to be compiled again."""
        return self._first.version, self._next.version

    def sees(self, batch: Any) -> None:
        """Take the shapes of a batch, without which no step is traced."""
        self._batch = batch

    def inputs(self, values: Mapping[str, np.ndarray]) -> Any:
        """The arguments of each member, as arrays ``(members, ...)``."""
        traced = {name: x for name, x in values.items() if name not in self._names}
        keys = list(zip(*(values[name].tolist() for name in self._names), strict=True))
        for key in dict.fromkeys(keys):
            self._trace(dict(zip(self._names, key, strict=True)), key, {n: _shape(x[0]) for n, x in traced.items()})
        moves = [self._moves[key] for key in keys] if self._batch is not None else []
        return traced, self._first.rows([self._starts[key] for key in keys]), self._next.rows(moves) if moves else ()

    def _trace(self, numbers: Mapping[str, Any], key: Any, traced: Any) -> None:
        if key in self._moves or key in self._starts and self._batch is None:
            return
        structure: Any = None

        def start(given: Any, traced: Any) -> Any:
            nonlocal structure
            state = self._build(given, **numbers, **traced)[1]
            structure = jax.tree.structure(state)
            return state

        def move(given: Any, traced: Any, leaves: Any, batch: Any) -> Any:
            step, _ = self._build(given, **numbers, **traced)
            new, report = step(jax.tree.unflatten(structure, leaves), batch)
            return jax.tree.leaves(new), report

        jaxpr, state = jax.make_jaxpr(start, return_shape=True)(self._given, traced)
        self._state = state if self._state is None else self._state
        leaves = [_shape(x) for x in jax.tree.leaves(self._state)]
        if [_shape(x) for x in jax.tree.leaves(state)] != leaves:
            raise ValueError(f"build: at {dict(numbers)} its state has other shapes. Use one sweep for each of them")
        if key not in self._starts:
            self._starts[key] = self._first.add(jaxpr)
        if self._batch is not None:
            traces = jax.make_jaxpr(move, return_shape=True)(self._given, traced, leaves, self._batch)
            self._report = traces[1][1] if self._report is None else self._report
            if jax.tree.structure(self._report) != jax.tree.structure(traces[1][1]):
                raise ValueError(f"step: at {dict(numbers)} it has other metrics. Use one sweep for each of them")
            self._moves[key] = self._next.add(traces[0])

    def start(self, given: Any, inputs: Any) -> Any:
        """The initial state of a member."""
        traced, row, _ = inputs
        return jax.tree.unflatten(jax.tree.structure(self._state), self._first(row, *jax.tree.leaves((given, traced))))

    def move(self, given: Any, inputs: Any, state: Any, batch: Any) -> tuple[Any, Any]:
        """``(state, metrics)`` of a member after a step."""
        traced, _, row = inputs
        outs = self._next(row, *jax.tree.leaves((given, traced, jax.tree.leaves(state), batch)))
        many = len(jax.tree.leaves(self._state))
        new = jax.tree.unflatten(jax.tree.structure(state), outs[:many])
        return new, jax.tree.unflatten(jax.tree.structure(self._report), outs[many:])


def _shape(x: Any) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(jnp.shape(x), jnp.result_type(x) if not is_key(x) else x.dtype)


def merged(calls: Iterable[Callable[..., Any]], *args: Any) -> tuple[Callable[..., Any], Any]:
    """Functions of the same arguments as ``fn(row, *args)``, and a tree of arrays whose rows make each of them.

    Args:
      calls: the functions; they return trees of one structure and shapes.
      args: trees of arrays, tracers or shapes.
    """
    both, traces, shapes = Merged(), [], []
    for call in calls:
        jaxpr, shape = jax.make_jaxpr(call, return_shape=True)(*args)
        traces.append(both.add(jaxpr))
        shapes.append(shape)
    if any(jax.tree.map(_shape, shape) != jax.tree.map(_shape, shapes[0]) for shape in shapes):
        raise ValueError("values: the results have other shapes at some of them. Use one sweep for each of these")
    structure = jax.tree.structure(shapes[0])
    return lambda row, *args: jax.tree.unflatten(structure, both(row, *jax.tree.leaves(args))), both.rows(traces)


def by_index(rule: Callable[[Any], Any], rates: Sequence[float], index: jax.Array) -> optax.GradientTransformation:
    """``rule(rates[index])`` where the rule takes numbers alone.

    Args:
      rule: a function of the learning rate.
      rates: all rates that it may have.
      index: an integer scalar, which may be a tracer.
    """
    transformations = [optax.with_extra_args_support(rule(float(rate))) for rate in rates]

    def called(calls: Iterable[Callable[..., Any]], *args: Any) -> Any:
        fn, rows = merged(calls, *args)
        return fn(jax.tree.map(lambda x: jnp.asarray(x)[index], rows), *args)

    def init(params: Any) -> Any:
        return called((tx.init for tx in transformations), params)

    def update(updates: Any, state: Any, params: Any = None, **extra: Any) -> Any:
        def of(tx: Any) -> Callable[..., Any]:
            return lambda updates, state, params: tx.update(updates, state, params, **extra)

        return called(map(of, transformations), updates, state, params)

    return optax.GradientTransformationExtraArgs(init, update)
