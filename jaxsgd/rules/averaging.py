"""Rules around rules that average their iterates, and the parameters to evaluate."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated, Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from optax import lookahead as optax_lookahead

from jaxsgd.hyper import Count, Decay, in_state, is_constant, scheduled
from jaxsgd.memory import in_device_memory
from jaxsgd.numerics import debias, ema, filled, sq, wide, wide_dtype, widest
from jaxsgd.paths import named_leaves
from jaxsgd.registry import Rule, make_rule, titled, wrapped
from jaxsgd.rules.adaptive import adam
from jaxsgd.rules.momentum import sgd
from jaxsgd.slots import Iterate, Square, evaluated, kept_in
from jaxsgd.state import State

__all__ = [
    "ScheduleFreeState",
    "eval_params",
    "lookahead",
    "schedule_free",
    "schedule_free_adamw",
    "schedule_free_eval_params",
    "schedule_free_radam",
    "schedule_free_sgd",
]


# -- schedule-free ---------------------------------------------------------------------------------


def schedule_free(
    base_optimizer: Any, learning_rate: Any = None, b1: Any = 0.9, weight_lr_power: Any = 2.0, state_dtype: Any = None
) -> Any:
    r"""Schedule-free (Defazio et al. 2024, arXiv:2405.15682): $z \leftarrow z + \Delta,\; x \leftarrow (1-c_t) x + c_t z,\; y = \beta_1 x + (1-\beta_1) z$.

    It needs no learning-rate decay: ``schedule_free(adam)(0.0025)``. The parameters are $y$, where gradients are taken.
    Evaluate at `eval_params`, $x$. The base takes its step $\Delta$ on $z$ with its own momentum off (``b1=0``), and
    $c_t = w_t / \sum w$ with $w_t = t^r (\max_{s \le t} \eta_s)^{power}$.

    Args:
      base_optimizer: a rule without tree-wide sums; or a gradient transformation, as in optax's ``schedule_free``.
      learning_rate: that of the transformation, a number or a schedule, which sees 1 at the first step, as in optax.
        Around a rule, this and all further arguments are given to the new rule.
      b1: $\beta_1$ in (0, 1].
      weight_lr_power: the power of the learning rate in $w_t$.
      state_dtype: the dtype that $z$ is stored in. Default: that of the parameters, float32 for narrower ones.

    Returns:
      Around a rule: a `Rule` with the further arguments ``b1`` (0.9), ``weight_lr_power`` (2.0), ``r`` (0.0: late steps
      weigh no more than early ones), ``warmup_steps`` (None; the learning rate rises linearly over so many steps from
      1/warmup_steps of its value) and ``state_dtype``. It is not registered in `RULES`. Around a transformation: a
      transformation with a `ScheduleFreeState`.

    Raises:
      TypeError: ``base_optimizer`` is neither; the learning rate of a transformation is missing.
      ValueError: a rule has tree-wide sums of its own; ``b1`` is 0.
    """
    settings = (learning_rate, b1, weight_lr_power, state_dtype)
    if isinstance(base_optimizer, Rule):
        _no_settings("schedule_free", "schedule_free(jaxsgd.adam)(0.0025, b1=0.9)", settings, (None, 0.9, 2.0, None))
        return _around(base_optimizer)
    if not isinstance(base_optimizer, optax.GradientTransformation):
        raise _neither("schedule_free", "base_optimizer", base_optimizer)
    if learning_rate is None:
        raise TypeError("schedule_free: learning_rate=None: the transformation's own is needed here too")
    return _of_transformation(base_optimizer, *settings)


def _neither(name: str, argument: str, value: Any) -> TypeError:
    return TypeError(
        f"{name}: {argument}={value!r}: a rule such as jaxsgd.adam, or a gradient transformation such as optax.adam(1e-3), "
        "is needed"
    )


def _no_settings(name: str, example: str, given: tuple, defaults: tuple) -> None:
    """Raise if an argument of the new rule is given too early."""
    if any(value is not default and value != default for value, default in zip(given, defaults, strict=True)):
        raise TypeError(f"{name}: around a rule, give these arguments to the new rule: {example}")


def _around(base: Rule, shared: Any = None) -> Rule:
    return wrapped(
        base,
        _schedule_free,
        name=f"schedule_free_{base.name}",
        doc=titled(schedule_free, base),
        shared=shared or _weights,
        fix={"b1": 0.0, "nesterov": False},
        call=_warm_up,
        weight_decay=0.0,
        batch_scaling=None,
    )


def _schedule_free(
    inner,
    leaf,
    z: Annotated[Iterate, kept_in("state_dtype"), evaluated("extrapolated")],
    *,
    ck,
    stretch,
    b1: Annotated[Decay, in_state] = 0.9,
    weight_lr_power=2.0,
    r=0.0,
):
    after = inner(leaf.replace(learning_rate=leaf.learning_rate * stretch))
    y, x = leaf.p, extrapolated(leaf.p, z, b1)
    z = z + after.delta
    x = (1 - ck) * x + ck * z
    return after.replace(delta=b1 * x + (1 - b1) * z - y), z


def extrapolated(y: Any, z: Any, b1: Any) -> Any:
    """$x$ where $y$ is between it and $z$."""
    return (y - (1 - b1) * z) / b1


def _weighed(weight_sum: Any, max_lr: Any, rate: Any, power: Any, scale: Any = 1.0) -> dict[str, Any]:
    """The weight of a step in the average, $c_t$."""
    max_lr = jnp.maximum(max_lr, rate)
    weight = scale * max_lr**power
    weight_sum = weight_sum + weight
    return {"weight_sum": weight_sum, "max_lr": max_lr, "ck": weight / jnp.where(weight_sum > 0, weight_sum, 1)}


def _weights(weight_sum=0.0, max_lr=0.0, *, t, learning_rate, weight_lr_power, r):
    return _weighed(weight_sum, max_lr, learning_rate, weight_lr_power, t**r) | {"stretch": 1.0}


def _warm_up(warmup_steps: int | None = None, **rest: Any) -> dict[str, Any]:
    """Turn ``warmup_steps`` into a schedule whose first value is above 0."""
    _check_b1(rest["b1"])
    rate = rest["learning_rate"]
    if warmup_steps is None or warmup_steps == 0:
        return rest
    if not isinstance(warmup_steps, int) or warmup_steps < 0:
        raise ValueError(f"schedule_free: warmup_steps={warmup_steps!r}: a number of steps is needed")

    def warming(count: Any) -> Any:
        peak: Any = scheduled(rate, count)
        # Of a whole count the quotient would be float32, in float64 too.
        passed = jnp.asarray(count + 1, jnp.result_type(peak, float))
        return peak * jnp.minimum(1.0, passed / warmup_steps)

    return rest | {"learning_rate": warming}


def _check_b1(b1: Any) -> None:
    if is_constant(b1) and b1 == 0:
        raise ValueError(f"schedule_free: b1={b1!r}: the gradient would be taken at z alone; it must be above 0")


schedule_free_adamw = _around(adam).preset(
    "schedule_free_adamw",
    r"""Schedule-free AdamW (Defazio et al. 2024, arXiv:2405.15682): $z \leftarrow z - \eta\,(g / (\sqrt{\hat v_t} + \epsilon) + \lambda y),\; x \leftarrow (1-c_t) x + c_t z,\; y = \beta_1 x + (1-\beta_1) z$.

    The parameters are $y$, where gradients are taken; evaluate at `eval_params`. See `schedule_free`.

    Use it when you do not know how long the run will be. Avoid it when you can evaluate only the parameters that you
    train.
    """,
    positional="learning_rate warmup_steps b1 b2 eps weight_decay weight_lr_power state_dtype",
    learning_rate=0.0025,
)

schedule_free_sgd = _around(sgd).preset(
    "schedule_free_sgd",
    r"""Schedule-free SGD (Defazio et al. 2024, arXiv:2405.15682): $z \leftarrow z - \eta\,(g + \lambda y),\; x \leftarrow (1-c_t) x + c_t z,\; y = \beta_1 x + (1-\beta_1) z$.

    The parameters are $y$, where gradients are taken; evaluate at `eval_params`. See `schedule_free`.

    Use it when SGD works and you do not know how long the run will be. Avoid it when you can evaluate only the
    parameters that you train.
    """,
    positional="learning_rate warmup_steps b1 weight_decay weight_lr_power state_dtype",
    learning_rate=1.0,
)


def _averaged(t: Any, b2: Any) -> jax.Array:
    """RAdam's $\\rho_t$: over how many gradients the second moment averages after ``t`` steps."""
    return 2 / (1 - b2) - 1 - 2 * t * (1 - filled(b2, t)) / filled(b2, t)


def _rectification(t: Any, b2: Any, silent_sgd_phase: bool) -> jax.Array:
    """RAdam's $r_t$. Before it begins it is 0, or 1 where that phase is not silent."""
    now, full = _averaged(t, b2), 2 / (1 - b2) - 1
    begun = now > 4
    now, full = jnp.where(begun, now, 5), jnp.where(begun, full, 5)  # the branch not taken must not be NaN
    ratio = (now - 4) * (now - 2) * full / ((full - 4) * (full - 2) * now)
    return jnp.where(begun, jnp.sqrt(jnp.where(begun, ratio, 1)), 0.0 if silent_sgd_phase else 1.0)


def _rectified_weights(weight_sum=0.0, max_lr=0.0, *, t, learning_rate, weight_lr_power, r, b2, silent_sgd_phase):
    stretch = _rectification(t, b2, silent_sgd_phase)
    return _weighed(weight_sum, max_lr, learning_rate * stretch, weight_lr_power, t**r) | {"stretch": stretch}


def _radam(g, nu: Square, *, t, b2: Decay = 0.999, eps=1e-8, silent_sgd_phase=True):
    """RAdam without momentum and without its rectification, which scales the learning rate."""
    nu = ema(nu, sq(g), b2)
    return jnp.where(_averaged(t, b2) > 4, g / (jnp.sqrt(debias(nu, b2, t)) + eps), g), nu


schedule_free_radam = _around(make_rule(_radam, name="radam"), _rectified_weights).preset(
    "schedule_free_radam",
    r"""Schedule-free RAdam (Defazio et al. 2024, arXiv:2405.15682; Liu et al. 2020, arXiv:1908.03265): $z \leftarrow z - \eta r_t\,(g / (\sqrt{\hat v_t} + \epsilon) + \lambda y),\; x \leftarrow (1-c_t) x + c_t z,\; y = \beta_1 x + (1-\beta_1) z$.

    The rectification $r_t$ of `radam` multiplies the learning rate, in the weights of the average too, so that
    no warmup is needed. While $\rho_t \le 4$ (the first five steps by default) nothing moves; with
    ``silent_sgd_phase=False`` those are steps of SGD. The parameters are $y$, where gradients are taken;
    evaluate at `eval_params`. See `schedule_free`.

    Use it when you want neither a schedule nor a warm-up. Avoid it when you can evaluate only the parameters that you
    train.
    """,
    positional="learning_rate b1 b2 eps weight_decay r weight_lr_power silent_sgd_phase",
    learning_rate=0.0025,
)


class ScheduleFreeState(NamedTuple):
    """The state of `schedule_free` around a transformation, with the fields of optax's.

    Attributes:
      b1: scalar.
      weight_sum: the sum of the weights so far.
      step_count: int32 scalar, 1 at the first step.
      max_lr: the largest learning rate so far.
      base_optimizer_state: of the transformation inside.
      z: tree like params, the iterates of the transformation.
    """

    b1: jax.Array
    weight_sum: jax.Array
    step_count: jax.Array
    max_lr: jax.Array
    base_optimizer_state: Any
    z: Any


def _of_transformation(
    base: optax.GradientTransformation, learning_rate: Any, b1: Any, weight_lr_power: Any, state_dtype: Any
) -> optax.GradientTransformationExtraArgs:
    _check_b1(b1)
    tx = optax.with_extra_args_support(base)

    def init(params: Any) -> ScheduleFreeState:
        dtype = widest(jnp.result_type(p) for p in jax.tree.leaves(params))
        z = jax.tree.map(lambda p: jnp.array(p, state_dtype or wide_dtype(jnp.result_type(p)), copy=True), params)
        # An array each, or the state could not be donated.
        weight_sum, max_lr = jnp.zeros((), dtype), jnp.zeros((), dtype)
        b, one = jnp.array(b1, dtype, copy=True), jnp.ones((), jnp.int32)
        return ScheduleFreeState(b, weight_sum, one, max_lr, tx.init(params), z)

    def update(updates: Any, state: Any, params: Any = None, **extra_args: Any) -> tuple[Any, ScheduleFreeState]:
        if params is None:
            raise ValueError("params: schedule_free needs them: tx.update(grads, state, params)")
        rate = jnp.asarray(scheduled(learning_rate, state.step_count), state.max_lr.dtype)
        now = _weighed(state.weight_sum, state.max_lr, rate, weight_lr_power)
        steps, inner = tx.update(updates, state.base_optimizer_state, params, **extra_args)
        z = jax.tree.map(lambda z, step: (wide(z) + wide(step)).astype(z.dtype), state.z, steps)

        def change(p: jax.Array, z_before: jax.Array, z: jax.Array) -> jax.Array:
            y = wide(p)
            b, ck = (x.astype(y.real.dtype) for x in (state.b1, now["ck"]))
            x = (1 - ck) * extrapolated(y, wide(z_before), b) + ck * wide(z)
            return (b * x + (1 - b) * wide(z) - y).astype(p.dtype)

        count = jnp.asarray(optax.safe_increment(state.step_count))
        after = ScheduleFreeState(state.b1, now["weight_sum"], count, now["max_lr"], inner, z)
        return jax.tree.map(change, params, state.z, z), after

    return optax.GradientTransformationExtraArgs(init, update)


# -- lookahead -------------------------------------------------------------------------------------


def lookahead(
    fast_optimizer: Any, sync_period: Any = None, slow_step_size: Any = None, reset_state: bool = False
) -> Any:
    r"""Lookahead (Zhang et al. 2019, arXiv:1907.08610): every $k$ steps $\phi \leftarrow \phi + \alpha (x - \phi),\; x \leftarrow \phi$.

    The base takes fast steps; slow weights follow every ``sync_period`` (6) steps by ``slow_step_size`` (0.5).

    Args:
      fast_optimizer: a rule, whose new rule takes ``sync_period`` and ``slow_step_size``; or a gradient transformation,
        for `optax.lookahead` with the further arguments, whose parameters are `optax.LookaheadParams`.
      sync_period, slow_step_size, reset_state: see `optax.lookahead`.

    Raises:
      TypeError: ``fast_optimizer`` is neither; an argument that `optax.lookahead` needs is missing.
    """
    settings = (sync_period, slow_step_size, reset_state)
    if isinstance(fast_optimizer, Rule):
        _no_settings("lookahead", "lookahead(jaxsgd.sgd)(0.1, sync_period=6)", settings, (None, None, False))
        name, doc = f"lookahead_{fast_optimizer.name}", titled(lookahead, fast_optimizer)
        return wrapped(fast_optimizer, _lookahead, name=name, doc=doc)
    if not isinstance(fast_optimizer, optax.GradientTransformation):
        raise _neither("lookahead", "fast_optimizer", fast_optimizer)
    if sync_period is None or slow_step_size is None:
        raise TypeError("lookahead: around a transformation sync_period and slow_step_size are needed, as in optax")
    return optax_lookahead(fast_optimizer, *settings)


def _lookahead(inner, leaf, slow: Iterate, *, t, sync_period: Count = 6, slow_step_size=0.5):
    after = inner(leaf)
    synced = slow + slow_step_size * (leaf.p + after.delta - slow)
    now = t % sync_period == 0
    return after.replace(delta=jnp.where(now, synced - leaf.p, after.delta)), jnp.where(now, synced, slow)


# -- evaluation ------------------------------------------------------------------------------------


def eval_params(state: Any, params: Any) -> Any:
    """The parameters to evaluate and to keep: $x$ of a schedule-free rule, the average of ASGD and of `ema`.

    The identity for every other rule, so that it can be called always.

    Args:
      state: an optimizer state. Averages are found inside chains, partitions and wrappers, in optax's schedule-free
        state, and in the ``opt_state`` of an `nnx.Optimizer`.
      params: the parameters as trained, a tree of arrays.

    Returns:
      A tree like ``params``, in its dtypes.

    Raises:
      ValueError: the state belongs to other parameters: a leaf has another name or shape.
    """
    averages = list(averages_in(state))
    if not averages:
        return params
    trained = named_leaves(params, "params")
    out = dict(trained)
    for tree, b1 in averages:
        for name, x in named_leaves(tree, "state").items():  # a frozen leaf, or one of another partition, has none
            if name not in trained:
                raise ValueError(f"state: its average has the leaf {name!r}, the params have none. {_USE}")
            y = trained[name]
            if jnp.shape(x) != jnp.shape(y):
                shapes = f"has the shape {jnp.shape(x)}, the parameter {jnp.shape(y)}"
                raise ValueError(f"state: the average of {name!r} {shapes}. {_USE}")
            x = in_device_memory(x)
            if b1 is not None:
                x = extrapolated(wide(y), wide(x), jnp.asarray(b1, wide(y).real.dtype))
            out[name] = jnp.array(x, y.dtype, copy=True)  # a copy, because the next step donates its state
    return jax.tree.structure(params).unflatten(out.values())


_USE = "Use the params that the state was made for"

schedule_free_eval_params = eval_params
"""optax's name of `eval_params`."""


def averages_in(state: Any) -> Iterator[tuple[Any, Any]]:
    """Each tree to evaluate, with ``b1`` where it is the z of an extrapolation."""
    for node in jax.tree.leaves(state, is_leaf=lambda node: isinstance(node, State) or _is_average(node)):
        if isinstance(node, State):
            for role, slot in map(str.split, node.roles):
                yield node.slots[slot], _scalar(node.hyper["b1"]) if role == "extrapolated" else None
        elif _is_average(node):
            yield (node.z, _scalar(node.b1)) if hasattr(node, "z") else (node.average, None)


def _is_average(node: Any) -> bool:
    """Whether ``node`` is the state of schedule-free around a transformation (ours or optax's), or an `EmaState`."""
    fields = getattr(node, "_fields", ())
    return {"b1", "z"} <= {*fields} or fields == ("count", "average")


def _scalar(x: Any) -> Any:
    """A scalar, also out of an `nnx.Variable`."""
    return jax.tree.leaves(x)[0]
