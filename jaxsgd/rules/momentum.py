r"""Gradient descent with and without memory of the last step.

Floor 3. Two conventions of momentum live here. The *trace* $b \leftarrow \mu b + g;\; x \leftarrow x - \eta b$
scales by the learning rate after the average, the *velocity* $v \leftarrow \mu v - \eta g;\; x \leftarrow x + v$
before it. Under a constant learning rate they walk the same path; under a schedule the velocity still
carries the old rate's steps, the trace rescales them.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import optax

from jaxsgd.numerics import wide
from jaxsgd.rule import rule
from jaxsgd.spec import seed, without_when_off
from jaxsgd.state import PIN, find_states

__all__ = [
    "look_ahead", "momentum", "nesterov", "noisy_sgd", "optimistic_gradient_descent", "sgd", "velocity",
]  # fmt: skip


@rule(
    start={"trace": without_when_off("momentum")},
    oracle=optax.sgd,
    positional=("learning_rate", "momentum", "nesterov", "accumulator_dtype"),
    aliases={"accumulator_dtype": "trace"},
    needs={"nesterov": {"momentum": 0.9}},
)
def sgd(g, trace, *, momentum=None, nesterov=False):
    r"""SGD (Robbins & Monro 1951, doi:10.1214/aoms/1177729586): $x \leftarrow x - \eta g$.

    With ``momentum`` the direction is the trace $b \leftarrow \mu b + g$, with ``nesterov`` it is
    $g + \mu b$ (Sutskever et al. 2013). Without, no state is kept.
    """
    if trace is None:
        return g, None
    trace = momentum * trace + g
    return (momentum * trace + g if nesterov else trace), trace


@rule(oracle=lambda learning_rate, momentum=0.9: optax.sgd(learning_rate, momentum))
def momentum(g, trace, *, momentum=0.9):
    r"""Momentum, trace form (Polyak 1964, doi:10.1016/0041-5553(64)90137-5): $b \leftarrow \mu b + g,\; x \leftarrow x - \eta b$."""
    trace = momentum * trace + g
    return trace, trace


@rule(
    runtime=("momentum",),
    oracle=lambda learning_rate, momentum=0.9: optax.chain(
        optax.scale_by_learning_rate(learning_rate), optax.trace(momentum)
    ),
)
def velocity(g, v, *, learning_rate, momentum=0.9):
    r"""Momentum, velocity form (Sutskever et al. 2013, PMLR 28:1139): $v \leftarrow \mu v - \eta g,\; x \leftarrow x + v$.

    With the gradient taken at `look_ahead`, $x + \mu v$, this is Nesterov's look-ahead form.
    """
    v = momentum * v - learning_rate * g
    return v, v


@rule(
    oracle=lambda learning_rate, momentum=0.9: optax.chain(
        optax.scale_by_learning_rate(learning_rate), optax.trace(momentum, nesterov=True)
    ),
)
def nesterov(g, v, *, learning_rate, momentum=0.9):
    r"""Nesterov momentum (Bengio et al. 2013, arXiv:1212.0901): $v' = \mu v - \eta g,\; x \leftarrow x - \mu v + (1 + \mu) v'$.

    The look-ahead form after the change of variables: the parameters are the look-ahead points.
    """
    v_prev, v = v, momentum * v - learning_rate * g
    return -momentum * v_prev + (1 + momentum) * v, v


def look_ahead(state: Any, params: Any, momentum: Any = None) -> Any:
    r"""Where Nesterov's look-ahead form takes the gradient: $x + \mu v$, a tree like ``params``.

    Use with `velocity`::

        grads = jax.grad(loss)(look_ahead(state, params))
        updates, state = tx.update(grads, state, params)

    Args:
      state: an optimizer state that holds that of `velocity`.
      params: the parameters $x$.
      momentum: $\mu$ of the coming step, a number or a schedule; by default the state's. A schedule must
        be given here again: the state knows the last step's value only.

    Raises:
      ValueError: no velocity in ``state``, or its momentum follows a schedule and is not given.
    """
    found = [s for _, s in find_states(state) if "v" in s.slots and "momentum" in s.hyper]
    if len(found) != 1:
        raise ValueError(f"state: one state of jaxsgd.velocity is needed, found {len(found)}")
    (held,) = found
    if momentum is None and PIN + "momentum" in held.hyper:
        raise ValueError("momentum: it follows a schedule; pass look_ahead(state, params, momentum=schedule)")
    mu = held.hyper["momentum"] if momentum is None else momentum
    mu = mu(held.count) if callable(mu) else mu

    def ahead(p, v):
        # A frozen leaf has no velocity.
        return p if v is None else (wide(p) + jax.numpy.asarray(mu, v.real.dtype) * wide(v)).astype(p.dtype)

    treedef = jax.tree.structure(params)
    pairs = zip(jax.tree.leaves(params), treedef.flatten_up_to(held.slots["v"]), strict=True)
    return treedef.unflatten(ahead(p, v) for p, v in pairs)


@rule(oracle=optax.optimistic_gradient_descent)
def optimistic_gradient_descent(g, g_prev, *, t, alpha=1.0, beta=1.0):
    r"""Optimistic gradient descent (Mokhtari et al. 2020, arXiv:1901.08511): $u_t = (\alpha + \beta) g_t - \beta g_{t-1}$.

    The first step, which has no gradient before it, is $\alpha g_1$.
    """
    return (alpha + beta) * g - beta * jnp.where(t == 1, g, g_prev), g


def _seeded(arguments: dict[str, Any]) -> dict[str, Any]:
    """As in optax, a key of None is 0."""
    return {**arguments, "key": seed(0 if arguments["key"] is None else arguments["key"], "noisy_sgd")}


@rule(
    prepare=_seeded,
    alternatives={"key": 1},
    exceptions={
        "zero": "the noise moves a parameter whose gradient is zero",
        "complex": "the noise is drawn on the axes, it does not turn with the gradient",
    },
)
def noisy_sgd(g, *, t, leaf_key, eta=0.01, gamma=0.55, key=0):
    r"""Noisy SGD (Neelakantan et al. 2015, arXiv:1511.06807): $u_t = g_t + \sigma_t \xi_t,\; \xi_t \sim N(0, 1),\; \sigma_t^2 = \eta / t^\gamma$.

    ``key`` is the seed. The noise of an array depends on it, on the step and on the array's place in the tree.
    """
    return (g + jnp.sqrt(eta / t**gamma) * jax.random.normal(leaf_key, g.shape, g.dtype),)
