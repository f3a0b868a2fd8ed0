"""Rules made of rules, by averaging their iterates.

Floor 3.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import optax

from jaxsgd.numerics import wide
from jaxsgd.rule import REQUIRED, Rule, make_rule, register
from jaxsgd.rules.adaptive import adam
from jaxsgd.spec import Spec, signature_of
from jaxsgd.state import find_states

__all__ = ["eval_params", "schedule_free", "schedule_free_adamw"]


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
    inner = base.spec.fix(b1=0.0, nesterov=False)
    if inner.shared is not None or inner.sums is not None:
        raise ValueError(f"schedule_free({base.name}): the base must not have tree-wide sums of its own")
    context = ("p", "learning_rate", "weight_decay", "ck")

    def leaf(g, z, *slots, p, learning_rate, weight_decay, ck, b1, **rest):
        available = {"p": p, "learning_rate": learning_rate, "weight_decay": weight_decay, **rest}
        delta, slots = inner.step(g, slots, available)
        x = (p - (1 - b1) * z) / b1
        z = z + delta
        x = (1 - ck) * x + ck * z
        return b1 * x + (1 - b1) * z - p, z, *slots

    def shared(weight_sum, max_rate, *, learning_rate, weight_lr_power):
        max_rate = jnp.maximum(max_rate, learning_rate)
        weight = max_rate**weight_lr_power
        weight_sum = weight_sum + weight
        ck = weight / jnp.where(weight_sum > 0, weight_sum, 1)
        return {"weight_sum": weight_sum, "max_rate": max_rate, "ck": ck}

    leaf.__signature__ = signature_of(
        ("g", "z", *inner.slots),
        (*context, *(c for c in inner.context if c not in context)),
        {"b1": 0.9, **inner.hyper, "weight_lr_power": 2.0},
    )
    zero = {"weight_sum": lambda: 0.0, "max_rate": lambda: 0.0}
    start = {slot: _settled(inner, slot) for slot in inner.slots}
    spec = Spec.read(
        leaf,
        name=name or f"schedule_free_{base.name}",
        start={"z": lambda p: jnp.array(p, copy=True), **start, **zero},
        shared=shared,
        runtime=("b1",),
    )
    fields = {"learning_rate": base.defaults.get("learning_rate", REQUIRED)} | fields
    return make_rule(
        spec,
        doc or (schedule_free.__doc__ or "").split("\n\n")[0].replace("Schedule-free", f"Schedule-free {base.name}", 1),
        aliases={"state_dtype": "z"},
        extras={"warmup_steps": None},
        prepare=_warm_up,
        needs={**base.needs, "weight_lr_power": {"learning_rate": _rising}},
        **fields,
    )


def _rising(count: Any) -> Any:
    """A schedule under which the weights of the average differ; with a constant rate they are all equal."""
    return 0.01 * (count + 1)


def _settled(spec: Spec, slot: str) -> Any:
    """The start of a wrapped rule's slot, with what the wrapper fixed no longer asked for."""

    def begin(**available):
        return spec.begin(slot, available)

    begin.__signature__ = signature_of(("p", *spec.hyper))  # type: ignore[attr-defined]
    return begin


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
            "learning_rate", "warmup_steps", "b1", "b2", "eps", "weight_decay", "weight_lr_power", "state_dtype",
        ),
        learning_rate=0.0025,
    )
)  # fmt: skip


def eval_params(state: Any, params: Any) -> Any:
    """The parameters to evaluate and to keep: the average $x$ of a schedule-free rule.

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
        if "z" not in held.slots or "weight_sum" not in held.shared:
            continue
        b1 = held.hyper["b1"]
        for i, z in enumerate(treedef.flatten_up_to(held.slots["z"])):
            # Frozen here (None), or another branch's of a partition (MaskedNode).
            if z is not None and not isinstance(z, optax.MaskedNode):
                y, z = wide(leaves[i]), wide(z)
                b = b1.astype(y.real.dtype)
                leaves[i] = ((y - (1 - b) * z) / b).astype(leaves[i].dtype)
    return treedef.unflatten(leaves)
