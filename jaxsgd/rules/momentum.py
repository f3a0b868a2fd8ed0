r"""Gradient descent with and without memory of the last step.

There are two conventions of momentum. The *trace* $b \leftarrow \mu b + g;\; x \leftarrow x - \eta b$ scales by the
learning rate after the average, the *velocity* $v \leftarrow \mu v - \eta g;\; x \leftarrow x + v$ before it. Under a
constant learning rate both walk the same path. Under a schedule the velocity keeps the old rate's steps, and the trace
rescales them.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any

import jax
import jax.numpy as jnp

from jaxsgd.blockwise import Packed, decode, packed_as
from jaxsgd.hyper import Decay, Seed, in_state, scheduled
from jaxsgd.numerics import wide
from jaxsgd.paths import leaf_names
from jaxsgd.registry import rule
from jaxsgd.slots import Mean, kept_in, unless
from jaxsgd.state import find_states

__all__ = ["look_ahead", "momentum", "nesterov", "noisy_sgd", "optimistic_gradient_descent", "sgd", "velocity"]

Trace = Annotated[Mean, unless("momentum"), kept_in("accumulator_dtype")]


@rule(positional="learning_rate momentum nesterov accumulator_dtype", usual_rate=0.1, batch_scaling="linear")
def sgd(g, trace: Trace, *, momentum: Decay = None, nesterov=False):
    r"""SGD (Robbins & Monro 1951, doi:10.1214/aoms/1177729586): $x \leftarrow x - \eta g$.

    With ``momentum`` the direction is the trace $b \leftarrow \mu b + g$, with ``nesterov`` it is
    $g + \mu b$ (Sutskever et al. 2013). Without, no state is kept.

    Use it when memory is short, or the loss is well scaled. Avoid it when layers have gradients of very different
    sizes, as in a transformer.
    """
    if trace is None:
        return g, None
    trace = momentum * trace + g
    return (momentum * trace + g if nesterov else trace), trace


@rule(usual_rate=0.03, batch_scaling="linear")
def momentum(g, trace: Mean, *, momentum: Decay = 0.9):
    r"""Momentum, trace form (Polyak 1964, doi:10.1016/0041-5553(64)90137-5): $b \leftarrow \mu b + g,\; x \leftarrow x - \eta b$.

    Use it when a convolutional network has a tuned schedule. Avoid it when layers have gradients of very different
    sizes.
    """
    trace = momentum * trace + g
    return trace, trace


@rule(usual_rate=0.03, batch_scaling="linear")
def velocity(g, v: Mean, *, learning_rate, momentum: Annotated[Decay, in_state] = 0.9):
    r"""Momentum, velocity form (Sutskever et al. 2013, PMLR 28:1139): $v \leftarrow \mu v - \eta g,\; x \leftarrow x + v$.

    With the gradient taken at `look_ahead`, $x + \mu v$, this is Nesterov's look-ahead form.

    Use it when you want Nesterov's look-ahead as first written, with `look_ahead`. Avoid it when a schedule changes the
    rate fast: old rates stay in the velocity.
    """
    v = momentum * v - learning_rate * g
    return v, v


@rule(usual_rate=0.03, batch_scaling="linear")
def nesterov(g, v: Mean, *, learning_rate, momentum: Decay = 0.9):
    r"""Nesterov momentum (Bengio et al. 2013, arXiv:1212.0901): $v' = \mu v - \eta g,\; x \leftarrow x - \mu v + (1 + \mu) v'$.

    The look-ahead form after the change of variables: the parameters are the look-ahead points.

    Use it when `momentum` works: the look-ahead costs nothing more. Avoid it when noise is large: looking ahead then
    gains nothing.
    """
    v_prev, v = v, momentum * v - learning_rate * g
    return -momentum * v_prev + (1 + momentum) * v, v


def look_ahead(state: Any, params: Any, momentum: Any = None) -> Any:
    r"""The point where Nesterov's look-ahead form takes the gradient: $x + \mu v$, a tree like ``params``.

    Use with `velocity`::

        grads = jax.grad(loss)(look_ahead(state, params))
        updates, state = tx.update(grads, state, params)

    Args:
      state: an optimizer state that holds that of `velocity`, such as ``nnx.Optimizer.opt_state``.
      params: the parameters $x$.
      momentum: $\mu$ of the coming step, a number or a schedule. Default: the state's. A schedule must be given here
        again: the state knows the last step's value only.

    Raises:
      ValueError: no velocity in ``state``, or none of a parameter; its momentum follows a schedule and is not given.
    """
    found = [s for _, s in find_states(state) if "v" in s.slots and "momentum" in s.hyper]
    if len(found) != 1:
        raise ValueError(f"state: one state of jaxsgd.velocity is needed, found {len(found)}")
    count, hyper, velocity = found[0].count, found[0].hyper, found[0].slots["v"]
    if momentum is None and found[0].follows("momentum"):
        raise ValueError("momentum: it follows a schedule; pass look_ahead(state, params, momentum=schedule)")
    mu = scheduled(hyper["momentum"] if momentum is None else momentum, count)
    # By name: params may be boxed where the state is not.
    velocities = dict(zip(leaf_names(velocity, _whole), jax.tree.leaves(velocity, is_leaf=_whole), strict=True))

    def ahead(name: str, p: Any) -> Any:
        if name not in velocities:
            raise ValueError(f"state: it holds no velocity of {name!r}; it holds those of {sorted(velocities)}")
        v: Any = velocities[name]
        if v is None:  # a frozen leaf
            return p
        v = packed_as(v) if isinstance(v, Mapping) else v
        v = decode(v) if isinstance(v, Packed) else wide(v)
        return (wide(p) + jnp.asarray(mu, v.real.dtype) * v).astype(p.dtype)

    leaves, treedef = jax.tree.flatten(params)
    return treedef.unflatten(map(ahead, leaf_names(params), leaves))


def _whole(node: Any) -> bool:
    # `nnx.Optimizer` makes a mapping of packed blocks.
    return node is None or isinstance(node, Packed) or isinstance(node, Mapping) and packed_as(node) is not None


@rule(usual_rate=0.1, cost="gradient_kept")
def optimistic_gradient_descent(g, g_prev: Mean, *, t, alpha=1.0, beta=1.0):
    r"""Optimistic gradient descent (Mokhtari et al. 2020, arXiv:1901.08511): $u_t = (\alpha + \beta) g_t - \beta g_{t-1}$.

    The first step has no gradient before it. It is $\alpha g_1$.

    Use it when two players train against each other and plain steps would circle. Avoid it when you minimise one loss:
    it gains nothing.
    """
    return (alpha + beta) * g - beta * jnp.where(t == 1, g, g_prev), g


@rule(usual_rate=0.1, batch_scaling="linear", cost="random")
def noisy_sgd(g, *, t, leaf_key, eta=0.01, gamma=0.55, key: Seed = 0):
    r"""Noisy SGD (Neelakantan et al. 2015, arXiv:1511.06807): $u_t = g_t + \sigma_t \xi_t,\; \xi_t \sim N(0, 1),\; \sigma_t^2 = \eta / t^\gamma$.

    ``key`` is the seed. The noise of an array depends on the seed, the step and the array's name.

    Use it when a very deep network does not start to learn. Avoid it when the last digits of the loss count: the noise
    stays.
    """
    return (g + jnp.sqrt(eta / t**gamma) * jax.random.normal(leaf_key, g.shape, g.dtype),)
