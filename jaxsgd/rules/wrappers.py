"""Rules made of rules, one array at a time: what changes a gradient before a rule or its step after.

Floor 3. A wrapper takes a `Rule` and gives a `Rule`, which is not registered: ``cautious(adamw)(1e-3)``. It has
the base's arguments and its own. All of them need ``params`` at update.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax.numpy as jnp

from jaxsgd.numerics import sq
from jaxsgd.rule import REQUIRED, Rule, make_rule
from jaxsgd.spec import Spec, signature_of

__all__ = ["adaptive_clip", "cautious", "cautious_decay", "centralized", "grokfast"]

CONTEXT = ("p", "learning_rate", "weight_decay")


def wrap(
    base: Rule,
    leaf: Callable,
    *,
    name: str,
    doc: str,
    slots: tuple[str, ...] = (),
    start: Mapping[str, Callable] | None = None,
    context: tuple[str, ...] = (),
    hyper: Mapping[str, Any] | None = None,
    shared: Callable | None = None,
    fix: Mapping[str, Any] | None = None,
    runtime: tuple[str, ...] = (),
    prepare: Callable[[dict[str, Any]], dict[str, Any]] | None = None,
    extras: Mapping[str, Any] | None = None,
    **fields: Any,
) -> Rule:
    """A rule around a rule.

    Args:
      base: the rule inside.
      leaf: ``leaf(inner, g, own, slots, **available) -> (delta, own, slots)``, where ``inner.step(g, slots,
        available)`` takes the base's step and ``own`` are the wrapper's slots.
      name, doc: of the new rule.
      slots, start, context, hyper, shared, runtime: what the wrapper itself keeps and asks for, as in
        `jaxsgd.spec.Spec`; its hyperparameters come first.
      fix: hyperparameters of the base that the wrapper settles.
      prepare, extras: the wrapper's own, as in `jaxsgd.rule.Rule`; the base's come after.
      fields: see `jaxsgd.rule.make_rule`.

    Raises:
      ValueError: a slot or hyperparameter that both have, or tree-wide sums in both.
    """
    inner, own_hyper = base.spec.fix(**(fix or {})), dict(hyper or {})
    if shared is not None and (inner.shared is not None or inner.sums is not None):
        raise ValueError(f"{name}: {base.name} must not have tree-wide sums of its own")
    for taken in (*set(slots) & set(inner.slots), *set(own_hyper) & set(inner.hyper)):
        raise ValueError(f"{name}: {base.name} has {taken!r} too")

    def fn(g, *held, **available):
        delta, own, rest = leaf(inner, g, held[: len(slots)], held[len(slots) :], **available)
        return delta, *own, *rest

    asked = (*CONTEXT, *context)
    fn.__signature__ = signature_of(  # type: ignore[attr-defined]
        ("g", *slots, *inner.slots),
        (*asked, *(c for c in inner.context if c not in asked)),
        {**own_hyper, **inner.hyper},
    )
    fn.__module__ = leaf.__module__
    starts = {name: _settled(inner, name) for name in (*inner.slots, *inner.kept)}
    spec = Spec.read(
        fn,
        name=name,
        start={**starts, **(start or {})},
        sums=inner.sums,
        shared=shared or inner.shared,
        trees=inner.trees,
        runtime=(*inner.runtime, *runtime),
    )
    fields = {
        "learning_rate": base.defaults.get("learning_rate", REQUIRED),
        "weight_decay": base.defaults["weight_decay"],
        "needs": base.needs,
        "exceptions": base.exceptions,
        "bounds": base.bounds,
        "alternatives": base.alternatives,
        "hidden": base.hidden,
        "routes": base.routes,
        "extras": {**(extras or {}), **base.extras},
        "prepare": _in_turn(prepare, base.prepare),
    } | fields
    return make_rule(spec, doc, **fields)


def _in_turn(*prepares: Callable | None) -> Callable | None:
    """What the wrapper prepares, then what the base does; None where neither does."""
    asked = [prepare for prepare in prepares if prepare is not None]
    if not asked:
        return None
    return lambda arguments: functools.reduce(lambda given, prepare: prepare(given), asked, arguments)


def _settled(spec: Spec, slot: str) -> Callable:
    """The start of a wrapped rule's slot, with what the wrapper fixed no longer asked for."""

    def begin(**available):
        return spec.begin(slot, available)

    begin.__signature__ = signature_of((*(("p",) if slot in spec.slots else ()), *spec.hyper))  # type: ignore[attr-defined]
    return begin


def cautious(base: Rule) -> Rule:
    r"""Cautious updates (Liang et al. 2024, arXiv:2411.16085): $\phi = [u g > 0],\; u \leftarrow u \phi / \max(\operatorname{mean} \phi, 10^{-3})$.

    Coordinates whose step would climb along the current gradient rest; the others grow to keep the mean step.
    Weight decay is not masked.
    """

    def leaf(inner, g, own, slots, **available):
        undecayed = {**available, "weight_decay": 0.0}
        delta, slots = inner.step(g, slots, undecayed)
        agrees = jnp.real(delta * jnp.conj(g)) < 0
        delta = jnp.where(agrees, delta / jnp.maximum(agrees.mean(dtype=delta.real.dtype), 1e-3), 0)
        return delta - available["learning_rate"] * available["weight_decay"] * available["p"], own, slots

    return wrap(base, leaf, name=f"cautious_{base.name}", doc=titled(cautious, base))


def cautious_decay(base: Rule) -> Rule:
    r"""Cautious weight decay (Chen et al. 2025, arXiv:2510.12402): $x \leftarrow x - \eta\,(u + \lambda [u x \ge 0]\, x)$.

    Decay acts only where it pulls the way the step goes.
    """

    def leaf(inner, g, own, slots, **available):
        p = available["p"]
        delta, slots = inner.step(g, slots, {**available, "weight_decay": 0.0})
        agrees = jnp.real(delta * jnp.conj(p)) <= 0
        return delta - available["learning_rate"] * available["weight_decay"] * jnp.where(agrees, p, 0), own, slots

    return wrap(base, leaf, name=f"cautious_decay_{base.name}", doc=titled(cautious_decay, base))


def grokfast(base: Rule) -> Rule:
    r"""Grokfast-EMA (Lee et al. 2024, arXiv:2405.20233): $h \leftarrow \alpha h + (1-\alpha) g,\; g \leftarrow g + \lambda h$.

    Amplifies the slow part of the gradients, which begins as the first of them. Its arguments are ``alpha`` (0.98) and ``lamb`` (2.0).
    """

    def leaf(inner, g, own, slots, *, t, alpha, lamb, **available):
        (slow,) = own
        slow = jnp.where(t == 1, g, alpha * slow + (1 - alpha) * g)
        delta, slots = inner.step(g + lamb * slow, slots, {**available, "t": t})
        return delta, (slow,), slots

    return wrap(
        base,
        leaf,
        name=f"grokfast_{base.name}",
        doc=titled(grokfast, base),
        slots=("slow",),
        context=("t",),
        hyper={"alpha": 0.98, "lamb": 2.0},
        bounds={**base.bounds, "alpha": (0, 1)},
    )


def centralized(base: Rule) -> Rule:
    r"""Gradient centralization (Yong et al. 2020, arXiv:2004.01461): $g \leftarrow g - \operatorname{mean}(g)$.

    The mean is over all axes but the last, the outputs of a Flax kernel; vectors and scalars are left alone.
    """

    def leaf(inner, g, own, slots, **available):
        if g.ndim > 1:
            g = g - g.mean(axis=tuple(range(g.ndim - 1)), keepdims=True)
        delta, slots = inner.step(g, slots, available)
        return delta, own, slots

    return wrap(base, leaf, name=f"centralized_{base.name}", doc=titled(centralized, base))


def adaptive_clip(base: Rule) -> Rule:
    r"""Adaptive gradient clipping (Brock et al. 2021, arXiv:2102.06171): $g_i \leftarrow g_i \min(1, c \max(\lVert W_i \rVert, \epsilon) / \lVert g_i \rVert)$.

    Unit-wise: $i$ runs over the last axis, the outputs of a Flax kernel; a vector is one unit. Its
    arguments are ``clipping`` (0.01) and ``eps_clip`` (1e-3).
    """

    def leaf(inner, g, own, slots, *, clipping, eps_clip, **available):
        axes = tuple(range(max(g.ndim - 1, 1)))[: g.ndim]
        norm, room = (jnp.sqrt(sq(x).sum(axis=axes, keepdims=True)) for x in (g, available["p"]))
        room = clipping * jnp.maximum(room, eps_clip)
        g = jnp.where(norm > room, g * (room / jnp.where(norm > room, norm, 1)), g)
        delta, slots = inner.step(g, slots, available)
        return delta, own, slots

    return wrap(
        base,
        leaf,
        name=f"adaptive_clip_{base.name}",
        doc=titled(adaptive_clip, base),
        hyper={"clipping": 0.01, "eps_clip": 1e-3},
        alternatives={**base.alternatives, "eps_clip": 10.0},
    )


def titled(wrapper: Callable, base: Rule) -> str:
    """The wrapper's docstring as that of the rule it makes."""
    return (wrapper.__doc__ or "").split("\n\n")[0].replace(" (", f" of {base.name} (", 1)
