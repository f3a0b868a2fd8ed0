"""Rules made of rules, by averaging their iterates.

Floor 3.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

from jaxsgd.numerics import debias, ema, filled, real_zeros, sq, wide
from jaxsgd.rule import Rule, make_rule, register
from jaxsgd.rules.adaptive import adam
from jaxsgd.rules.momentum import sgd
from jaxsgd.rules.wrappers import titled, wrap
from jaxsgd.spec import Spec, by_name, parameter_names, signature_of
from jaxsgd.state import find_states

__all__ = [
    "eval_params", "lookahead", "schedule_free", "schedule_free_adamw", "schedule_free_radam", "schedule_free_sgd",
]  # fmt: skip


def schedule_free(
    base: Rule,
    *,
    name: str | None = None,
    doc: str | None = None,
    length: Callable | None = None,
    **fields: Any,
) -> Rule:
    r"""Schedule-free (Defazio et al. 2024, arXiv:2405.15682): $z \leftarrow z + \Delta,\; x \leftarrow (1-c_t) x + c_t z,\; y = \beta_1 x + (1-\beta_1) z$.

    A rule that needs no learning-rate decay: ``schedule_free(adam)(0.0025)``. The parameters are $y$, where
    gradients are taken; evaluate at `eval_params`, $x$. The base takes its step $\Delta$ on $z$ with its
    own momentum off (``b1=0``), and $c_t = w_t / \sum w$ with $w_t = t^r (\max_{s \le t} \eta_s)^{power}$.

    Args:
      base: any rule without tree-wide sums.
      name, doc, fields: see `jaxsgd.rule.make_rule`.
      length: what the learning rate of a step is multiplied by, in $\Delta$ and in $w_t$ alike: a function of
        ``t`` and of hyperparameters of the base, by name; its own are those with a default. None is 1.

    Returns:
      A `Rule` with the further arguments ``b1`` (0.9), ``weight_lr_power`` (2.0), ``r`` (0.0: late steps weigh
      no more than early ones), ``warmup_steps`` (None: the
      learning rate rises linearly over so many steps, its first value being 1/warmup_steps of it) and
      ``state_dtype`` (what $z$ rests in). It is not registered in `RULES`.

    Raises:
      ValueError: ``base`` has tree-wide sums of its own.
    """

    asked = parameter_names(length) if length is not None else ()

    def leaf(inner, g, own, slots, *, b1, ck, **available):
        (z,), y = own, available["p"]
        rate = available["learning_rate"]
        if length is not None:
            rate = rate * available["stretch"]
        delta, slots = inner.step(g, slots, {**available, "learning_rate": rate})
        x = (y - (1 - b1) * z) / b1
        z = z + delta
        x = (1 - ck) * x + ck * z
        return b1 * x + (1 - b1) * z - y, (z,), slots

    def shared(weight_sum, max_rate, *, t, learning_rate, weight_lr_power, r, **hypers):
        stretch = 1.0 if length is None else by_name(length, {"t": t, **hypers})
        max_rate = jnp.maximum(max_rate, learning_rate * stretch)
        weight = t**r * max_rate**weight_lr_power
        weight_sum = weight_sum + weight
        ck = weight / jnp.where(weight_sum > 0, weight_sum, 1)
        return {"weight_sum": weight_sum, "max_rate": max_rate, "ck": ck, "stretch": stretch}

    names = ("t", "learning_rate", "weight_lr_power", "r", *(name for name in asked if name != "t"))
    shared.__signature__ = signature_of(("weight_sum", "max_rate"), names)  # type: ignore[attr-defined]

    fields = {
        "aliases": {"state_dtype": "z"},
        "extras": {"warmup_steps": None},
        "weight_decay": 0.0,
        "needs": {**base.needs, "weight_lr_power": {"learning_rate": _rising}},
    } | fields
    return wrap(
        base,
        leaf,
        name=name or f"schedule_free_{base.name}",
        doc=doc or titled(schedule_free, base),
        slots=("z",),
        start={"z": lambda p: jnp.array(p, copy=True), "weight_sum": lambda: 0.0, "max_rate": lambda: 0.0},
        context=("ck",) if length is None else ("ck", "stretch"),
        hyper={"b1": 0.9, "weight_lr_power": 2.0, "r": 0.0, **_defaults(length)},
        shared=shared,
        fix={"b1": 0.0, "nesterov": False},
        runtime=("b1",),
        prepare=_warm_up,
        **fields,
    )


def _defaults(fn: Callable | None) -> dict[str, Any]:
    """The parameters of ``fn`` that have a default."""
    parameters = inspect.signature(fn).parameters.values() if fn is not None else ()
    return {p.name: p.default for p in parameters if p.default is not p.empty}


def _rising(count: Any) -> Any:
    """A schedule under which the weights of the average differ; with a constant rate they are all equal."""
    return 0.01 * (count + 1)


def _warm_up(arguments: dict[str, Any]) -> dict[str, Any]:
    """Turn ``warmup_steps`` into a schedule; the first step is already above 0."""
    steps, rate = arguments.pop("warmup_steps"), arguments["learning_rate"]
    if not isinstance(arguments["b1"], jax.Array) and not callable(arguments["b1"]) and arguments["b1"] == 0:
        raise ValueError("schedule_free: b1=0: the gradient would be taken at z alone; it must lie in (0, 1)")
    if steps is None or steps == 0:
        return arguments
    if not isinstance(steps, int) or steps < 0:
        raise ValueError(f"schedule_free: warmup_steps={steps!r}: a number of steps is needed")

    def warming(count: Any) -> Any:
        peak: Any = rate(count) if callable(rate) else rate
        # Of a whole count the quotient would be float32, in float64 too.
        passed = jnp.asarray(count + 1, jnp.result_type(peak, float))
        return peak * jnp.minimum(1.0, passed / steps)

    return {**arguments, "learning_rate": warming}


schedule_free_adamw = register(
    schedule_free(
        adam,
        name="schedule_free_adamw",
        doc=r"""Schedule-free AdamW (Defazio et al. 2024, arXiv:2405.15682): $z \leftarrow z - \eta\,(g / (\sqrt{\hat v_t} + \epsilon) + \lambda y),\; x \leftarrow (1-c_t) x + c_t z,\; y = \beta_1 x + (1-\beta_1) z$.

        The parameters are $y$, where gradients are taken; evaluate at `eval_params`. See `schedule_free`.
        """,
        oracle=optax.contrib.schedule_free_adamw,
        positional=(
            "learning_rate",
            "warmup_steps",
            "b1",
            "b2",
            "eps",
            "weight_decay",
            "weight_lr_power",
            "state_dtype",
        ),
        learning_rate=0.0025,
    )
)

schedule_free_sgd = register(
    schedule_free(
        sgd,
        name="schedule_free_sgd",
        doc=r"""Schedule-free SGD (Defazio et al. 2024, arXiv:2405.15682): $z \leftarrow z - \eta\,(g + \lambda y),\; x \leftarrow (1-c_t) x + c_t z,\; y = \beta_1 x + (1-\beta_1) z$.

        The parameters are $y$, where gradients are taken; evaluate at `eval_params`. See `schedule_free`.
        """,
        oracle=optax.contrib.schedule_free_sgd,
        positional=("learning_rate", "warmup_steps", "b1", "weight_decay", "weight_lr_power", "state_dtype"),
        learning_rate=1.0,
    )
)


def _averaged(t: Any, b2: Any) -> jax.Array:
    """RAdam's $\\rho_t$: over how many gradients the second moment averages after ``t`` steps."""
    return 2 / (1 - b2) - 1 - 2 * t * (1 - filled(b2, t)) / filled(b2, t)


def _rectified(*, t, b2, silent_sgd_phase=True):
    """RAdam's rectification; before it begins 0, or 1 where that phase is not silent."""
    now, full = _averaged(t, b2), 2 / (1 - b2) - 1
    begun = now > 4
    now, full = jnp.where(begun, now, 5), jnp.where(begun, full, 5)  # the branch not taken must not be NaN
    ratio = (now - 4) * (now - 2) * full / ((full - 4) * (full - 2) * now)
    return jnp.where(begun, jnp.sqrt(jnp.where(begun, ratio, 1)), 0.0 if silent_sgd_phase else 1.0)


def _radam(g, nu, *, t, b2=0.999, eps=1e-8):
    """RAdam without momentum, its direction alone: Adam's, and the gradient before the rectification begins."""
    nu = ema(nu, sq(g), b2)
    return jnp.where(_averaged(t, b2) > 4, g / (jnp.sqrt(debias(nu, b2, t)) + eps), g), nu


schedule_free_radam = register(
    schedule_free(
        make_rule(Spec.read(_radam, name="radam", start={"nu": real_zeros}), _radam.__doc__ or ""),
        name="schedule_free_radam",
        doc=r"""Schedule-free RAdam (Defazio et al. 2024, arXiv:2405.15682; Liu et al. 2020, arXiv:1908.03265): $z \leftarrow z - \eta r_t\,(g / (\sqrt{\hat v_t} + \epsilon) + \lambda y),\; x \leftarrow (1-c_t) x + c_t z,\; y = \beta_1 x + (1-\beta_1) z$.

        The rectification $r_t$ of `radam` multiplies the learning rate, in the weights of the average too, so that
        no warmup is needed. While $\rho_t \le 4$ (the first five steps by default) nothing moves; with
        ``silent_sgd_phase=False`` those are steps of SGD. The parameters are $y$, where gradients are taken;
        evaluate at `eval_params`. See `schedule_free`.
        """,
        length=_rectified,
        positional=("learning_rate", "b1", "b2", "eps", "weight_decay", "r", "weight_lr_power", "silent_sgd_phase"),
        learning_rate=0.0025,
        alternatives={"b2": 0.95},
    )
)


def lookahead(base: Rule) -> Rule:
    r"""Lookahead (Zhang et al. 2019, arXiv:1907.08610): every $k$ steps $\phi \leftarrow \phi + \alpha (x - \phi),\; x \leftarrow \phi$.

    The base walks fast; slow weights follow every ``sync_period`` (6) steps by ``slow_step_size`` (0.5).
    """

    def leaf(inner, g, own, slots, *, t, sync_period, slow_step_size, **available):
        (slow,), p = own, available["p"]
        delta, slots = inner.step(g, slots, {**available, "t": t})
        synced = slow + slow_step_size * (p + delta - slow)
        now = t % sync_period == 0
        return jnp.where(now, synced - p, delta), (jnp.where(now, synced, slow),), slots

    return wrap(
        base,
        leaf,
        name=f"lookahead_{base.name}",
        doc=titled(lookahead, base),
        slots=("slow",),
        start={"slow": lambda p: jnp.array(p, copy=True)},
        context=("t",),
        hyper={"sync_period": 6, "slow_step_size": 0.5},
        bounds={**base.bounds, "sync_period": (1, float("inf"))},
        exceptions={**base.exceptions, "narrow": "the slow weights average the parameters, rounded as they are"},
    )


def eval_params(state: Any, params: Any) -> Any:
    """The parameters to evaluate and to keep: $x$ of a schedule-free rule, the average of ASGD and of `ema`.

    The identity for every other rule, so that it can be called always.

    Args:
      state: an optimizer state; a schedule-free rule's is found inside chains, partitions and wrappers.
      params: the parameters as trained; a tree of arrays.

    Returns:
      A tree like ``params``, in its dtypes.
    """
    treedef = jax.tree.structure(params)
    leaves = jax.tree.leaves(params)
    for _, held in find_states(state):
        schedule_free = "z" in held.slots and "weight_sum" in held.shared
        slot = "z" if schedule_free else "average" if "average" in held.slots else None
        for i, kept in enumerate(treedef.flatten_up_to(held.slots[slot]) if slot is not None else ()):
            # Frozen here (None), or another branch's of a partition (MaskedNode).
            if kept is not None and not isinstance(kept, optax.MaskedNode):
                y, x = wide(leaves[i]), wide(kept)
                if schedule_free:
                    b1 = held.hyper["b1"].astype(y.real.dtype)
                    x = (y - (1 - b1) * x) / b1
                leaves[i] = x.astype(leaves[i].dtype)
    for held in filter(_is_average, jax.tree.leaves(state, is_leaf=_is_average)):
        for i, average in enumerate(treedef.flatten_up_to(held.average)):
            if average is not None and not isinstance(average, optax.MaskedNode):
                leaves[i] = jnp.array(average, leaves[i].dtype, copy=True)  # a copy: the step donates its state
    return treedef.unflatten(leaves)


def _is_average(node: Any) -> bool:
    """Whether ``node`` is the `EmaState` of `jaxsgd.transforms`, which is a floor above."""
    return getattr(node, "_fields", None) == ("count", "average")
