"""Rules that see the whole tree and the loss itself, where a `jaxsgd.registry.Rule` sees one array and its gradient."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Generic, ParamSpec

import jax
import jax.numpy as jnp
import optax

from jaxsgd.hyper import NOT_NEGATIVE, checked, first_values, is_array, scheduled
from jaxsgd.lift import Bound
from jaxsgd.numerics import wide, wide_dtype, widest
from jaxsgd.paths import check_params, leaf_names, same_structure
from jaxsgd.registry import RULES, TREE_RULES, AnyRule
from jaxsgd.second_order.batch_loss import SplitLoss
from jaxsgd.state import State, unpinned

__all__ = ["TreeRule", "TreeTransformation", "tree_rule"]

P = ParamSpec("P")


@dataclass(frozen=True, eq=False, repr=False)
class TreeRule(AnyRule, Generic[P]):
    """A rule of the whole tree. Call it to get a gradient transformation.

    Attributes, beside those of `jaxsgd.registry.AnyRule`:
      fn: the function that makes the transformation; its signature is the call.
      needs: the extra arguments that the update needs. `jaxsgd.make_step` supplies them; ``"split_loss"`` says that
        ``value_fn`` has to be a `jaxsgd.split_loss`.
    """

    name: str
    fn: Callable[P, optax.GradientTransformationExtraArgs]
    needs: tuple[str, ...]
    usual_rate: float | None = None
    batch_scaling: str | None = None

    def __post_init__(self) -> None:
        doc, signature = inspect.getdoc(self.fn) or "", inspect.signature(self.fn)
        defaults = {name: p.default for name, p in signature.parameters.items()}
        about = {"doc": doc, "defaults": defaults, "module": self.fn.__module__}
        about |= {"__wrapped__": self.fn, "__doc__": doc, "__signature__": signature}
        for name, value in {**about, "__name__": self.name, "__module__": self.fn.__module__}.items():
            object.__setattr__(self, name, value)

    def __call__(self, *args: P.args, **kwargs: P.kwargs) -> optax.GradientTransformationExtraArgs:
        return self.fn(*args, **kwargs)


def tree_rule(
    *, needs: tuple[str, ...], usual_rate: float | None = None
) -> Callable[[Callable[P, optax.GradientTransformationExtraArgs]], TreeRule[P]]:
    """Decorate a function that makes a transformation; it is put into `TREE_RULES`. See `TreeRule` for the arguments.

    Raises:
      ValueError: the name is taken.
    """

    def register(fn: Callable[P, optax.GradientTransformationExtraArgs]) -> TreeRule[P]:
        if fn.__name__ in TREE_RULES or fn.__name__ in RULES:
            raise ValueError(f"rule {fn.__name__!r} exists already")
        made = TreeRule(fn.__name__, fn, needs, usual_rate)
        TREE_RULES[made.name] = made
        return made

    return register


class TreeTransformation(Bound):
    """A gradient transformation that knows its `TreeRule`.

    Attributes:
      lift: the rule with its hyperparameters bound.
      rule: the rule.
    """

    @property
    def rule(self) -> AnyRule:
        return TREE_RULES[self.lift.name]

    def __repr__(self) -> str:
        if self.lift is None:
            return super().__repr__()
        return f"{self.lift.name}({', '.join(f'{n}={v!r}' for n, v in self.lift.shown.items())})"


@dataclass(frozen=True)
class Problem:
    """The inputs of one update: lists of arrays in at least float32, in flattening order.

    Attributes:
      params, grads: the parameters and their gradient.
      value_fn: list of arrays -> the loss.
      split: ``outputs_fn`` of a list of arrays and ``loss`` of the outputs, or None.
      value: the loss at ``params``.
      dtype: the dtype of scalars.
      noise: the relative rounding error of a loss, from the narrowest dtype of a parameter.
    """

    params: list[jax.Array]
    grads: list[jax.Array]
    value_fn: Callable[[list[jax.Array]], jax.Array]
    split: SplitLoss | None
    value: Callable[[], jax.Array]
    dtype: Any
    noise: float


Solve = Callable[
    [Problem, Mapping[str, jax.Array], Mapping[str, list[jax.Array]], Mapping[str, jax.Array]],
    tuple[list[jax.Array], dict[str, list[jax.Array]], dict[str, jax.Array]],
]
"""``(problem, hyper, slots, shared) -> (updates, slots, shared)``."""


@dataclass(eq=False)
class TreeLift:
    """A tree rule with its hyperparameters bound: ``init`` and ``update``.

    Attributes:
      name: of the rule.
      solve: the rule.
      hyper: runtime hyperparameters: numbers, schedules of the 0-based step, or arrays.
      slots: names of trees like the params that are kept; they start at zero.
      shared: scalars that are kept -> how they start, from the hyperparameters.
      split: whether ``value_fn`` has to be a `jaxsgd.split_loss`.
      refuse: optional, ``refuse(params)`` raises where the rule does not take them.
    """

    name: str
    solve: Solve
    hyper: Mapping[str, Any]
    shown: Mapping[str, Any]
    slots: tuple[str, ...] = ()
    shared: Mapping[str, Callable[[Mapping[str, jax.Array]], Any]] | None = None
    split: bool = False
    refuse: Callable[[Any], None] | None = None

    def __post_init__(self) -> None:
        for name, value in self.hyper.items():
            checked(f"{self.name}: {name}", value, NOT_NEGATIVE)

    def init(self, params: Any) -> State:
        """The state before the first step; its slots are sharded like ``params``."""
        check_params(params)
        leaves, treedef = jax.tree.flatten(params)
        for name, leaf in zip(leaf_names(params), leaves, strict=True):
            if not jnp.issubdtype(jnp.result_type(leaf), jnp.floating):
                raise ValueError(
                    f"params: {name!r} is {jnp.result_type(leaf).name}; {self.name} takes real floating parameters. "
                    "Use optax.partition to give it another rule"
                )
        if self.refuse is not None:
            self.refuse(params)
        dtype = widest(jnp.result_type(x) for x in leaves)
        hyper = {}
        for name, value in first_values(self.hyper, dtype).items():
            if value.shape != ():
                raise ValueError(f"{name}: a scalar is needed; got the shape {value.shape}")
            hyper[name] = value
        shared = {name: jnp.asarray(start(hyper), dtype) for name, start in (self.shared or {}).items()}
        kinds = [wide_dtype(jnp.result_type(x)) for x in leaves]
        # Of a parameter, zeros have its sharding too.
        zeros = [
            jnp.zeros(x.shape, kind) if isinstance(x, jax.ShapeDtypeStruct) else jnp.zeros_like(x, kind)
            for x, kind in zip(leaves, kinds, strict=True)
        ]
        slots = {name: treedef.unflatten(zeros) for name in self.slots}
        return State(jnp.zeros((), jnp.int32), hyper, slots, shared, unpinned(self.hyper, dtype))

    def update(self, updates: Any, state: Any, params: Any = None, **extra_args: Any) -> tuple[Any, State]:
        """One step: ``(updates, new state)``; updates are in the dtype of ``params``.

        Raises:
          ValueError: ``params`` or an extra argument is missing; another structure or shape than ``params``.
          TypeError: the state of another optimizer.
        """
        if not isinstance(state, State) or set(state.slots) != set(self.slots):
            raise TypeError(f"state: {self.name} needs its own State; got {type(state).__name__}. Use tx.init(params)")
        if params is None:
            raise ValueError(f"params: {self.name} needs them: tx.update(grads, state, params, value_fn=...)")
        value_fn = extra_args.get("value_fn")
        if value_fn is None:
            raise ValueError(
                f"value_fn: {self.name} needs it. Use jaxsgd.make_step, or tx.update(grads, state, params, "
                "value_fn=loss) with loss(params) -> scalar"
            )
        if self.split and not isinstance(value_fn, SplitLoss):
            raise ValueError(
                f"value_fn: {self.name} needs the model's outputs apart from the loss. Use "
                "jaxsgd.split_loss(outputs_fn, loss) in place of the loss"
            )
        same_structure(params, updates)
        dtype = next(iter(state.hyper.values())).dtype
        count = jnp.asarray(optax.safe_increment(state.count))
        now = {}
        for name, own in self.hyper.items():
            value = state.hyper[name]
            if callable(own) or is_array(own):
                value = jnp.asarray(scheduled(own, state.count), dtype)
            now[name] = state.applied(name, value)
        leaves, treedef = jax.tree.flatten(updates)
        if not leaves:
            return updates, state._replace(count=count, hyper=now)
        slots = {name: treedef.flatten_up_to(state.slots[name]) for name in self.slots}
        problem = _problem(leaves, params, extra_args, dtype)
        steps, kept, shared = self.solve(problem, now, slots, state.shared)
        like = jax.tree.leaves(params)
        out = treedef.unflatten(s.astype(jnp.result_type(p)) for s, p in zip(steps, like, strict=True))
        trees = {name: treedef.unflatten(kept[name]) for name in self.slots}
        scalars = {name: jnp.asarray(x, state.shared[name].dtype) for name, x in shared.items()}
        return out, State(count, now, trees, scalars, state.pins, state.roles)

    @property
    def transformation(self) -> TreeTransformation:
        return TreeTransformation.of(self)


def _problem(grads: list[Any], params: Any, extra: Mapping[str, Any], dtype: Any) -> Problem:
    """The parameters, and the functions of them, as lists of wide arrays."""
    leaves, treedef = jax.tree.flatten(params)
    ps = [jnp.asarray(p) for p in leaves]

    def of_list(fn: Callable[[Any], Any]) -> Callable[[list[jax.Array]], Any]:
        return lambda xs: fn(treedef.unflatten(x.astype(p.dtype) for x, p in zip(xs, ps, strict=True)))

    value_fn = extra["value_fn"]
    loss = of_list(value_fn)

    def scalar(xs: list[jax.Array]) -> jax.Array:
        out = jnp.asarray(loss(xs))
        if out.shape != () or not jnp.issubdtype(out.dtype, jnp.floating):
            raise ValueError(
                f"value_fn: it returns {out.dtype.name}{list(out.shape)}; a real floating scalar is needed"
            )
        return out.astype(dtype)

    def value() -> jax.Array:
        given = extra.get("value")
        return scalar(xs) if given is None else jnp.asarray(given).astype(dtype)

    xs = [wide(p) for p in ps]
    gs = [wide(jnp.asarray(g), x.dtype) for g, x in zip(grads, xs, strict=True)]
    split = SplitLoss(of_list(value_fn.outputs_fn), value_fn.loss) if isinstance(value_fn, SplitLoss) else None
    noise = max(10 * float(jnp.finfo(dtype).eps), *(float(jnp.finfo(p.dtype).eps) for p in ps))
    return Problem(xs, gs, scalar, split, value, dtype, noise)
