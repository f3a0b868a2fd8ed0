"""Rules made of rules, by averaging their iterates.

Floor 3.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import optax

from jaxsgd.numerics import wide
from jaxsgd.rule import Rule, register
from jaxsgd.rules.adaptive import adam
from jaxsgd.rules.momentum import sgd
from jaxsgd.rules.wrappers import titled, wrap
from jaxsgd.state import find_states

__all__ = ["eval_params", "lookahead", "schedule_free", "schedule_free_adamw", "schedule_free_sgd"]


def schedule_free(base: Rule, *, name: str | None = None, doc: str | None = None, **fields: Any) -> Rule:
    r"""Schedule-free (Defazio et al. 2024, arXiv:2405.15682): $z \leftarrow z + \Delta,\; x \leftarrow (1-c_t) x + c_t z,\; y = \beta_1 x + (1-\beta_1) z$.

    A rule that needs no learning-rate decay: ``schedule_free(adam)(0.0025)``. The parameters are $y$, where
    gradients are taken; evaluate at `eval_params`, $x$. The base takes its step $\Delta$ on $z$ with its
    own momentum off (``b1=0``), and $c_t = w_t / \sum w$ with $w_t = (\max_{s \le t} \eta_s)^{power}$.

    Args:
      base: any rule without tree-wide sums.
      name, doc, fields: see `jaxsgd.rule.make_rule`.

    Returns:
      A `Rule` with the further arguments ``b1`` (0.9), ``weight_lr_power`` (2.0), ``warmup_steps`` (None: the
      learning rate rises linearly over so many steps, its first value being 1/warmup_steps of it) and
      ``state_dtype`` (what $z$ rests in). It is not registered in `RULES`.

    Raises:
      ValueError: ``base`` has tree-wide sums of its own.
    """

    def leaf(inner, g, own, slots, *, b1, ck, weight_lr_power, **available):
        (z,), y = own, available["p"]
        delta, slots = inner.step(g, slots, available)
        x = (y - (1 - b1) * z) / b1
        z = z + delta
        x = (1 - ck) * x + ck * z
        return b1 * x + (1 - b1) * z - y, (z,), slots

    def shared(weight_sum, max_rate, *, learning_rate, weight_lr_power):
        max_rate = jnp.maximum(max_rate, learning_rate)
        weight = max_rate**weight_lr_power
        weight_sum = weight_sum + weight
        ck = weight / jnp.where(weight_sum > 0, weight_sum, 1)
        return {"weight_sum": weight_sum, "max_rate": max_rate, "ck": ck}

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
        context=("ck",),
        hyper={"b1": 0.9, "weight_lr_power": 2.0},
        shared=shared,
        fix={"b1": 0.0, "nesterov": False},
        runtime=("b1",),
        prepare=_warm_up,
        **fields,
    )


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
        return peak * jnp.minimum(1.0, (count + 1) / steps)

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
