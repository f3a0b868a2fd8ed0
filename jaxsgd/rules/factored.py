r"""Rules that keep less than one second moment for each parameter.

They keep a matrix's $v$ by rows and columns (Adafactor, SM3) or by blocks. The state then grows with the sides of a
matrix, not with its area.
"""

from __future__ import annotations

import functools
import itertools
import re
from collections.abc import Mapping
from typing import Annotated, Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxsgd.hyper import Decay, Static, is_off
from jaxsgd.numerics import debias, ema, real_dtype, real_zeros, sq
from jaxsgd.paths import leaf_names, resolve_groups
from jaxsgd.registry import rule
from jaxsgd.rules.layerwise import norm
from jaxsgd.slots import Mean, Square, kept_in, start, unless

__all__ = ["adafactor", "adalomo", "adam_mini", "sm3"]


def _rms(x: jax.Array) -> jax.Array:
    """The root of the mean square of one array."""
    return norm(x) / max(x.size, 1) ** 0.5


def _mix(mean: jax.Array, x: jax.Array, weight: Any) -> jax.Array:
    """An `ema` by the weight of its new value: late in training, 1 minus a decay near 1 would lose its digits."""
    return (1 - weight) * mean + weight * x


def _largest_axes(shape: tuple[int, ...]) -> tuple[int, int]:
    """The largest axis and the second largest; of equal ones the later is larger."""
    *_, second, first = np.argsort(shape, kind="stable")
    return int(first), int(second)


def _factors(p: jax.Array, factored: bool, min_size: Any) -> bool:
    """Whether an array's statistics are factored: two axes are at least ``min_size`` long."""
    return bool(factored and p.ndim >= 2 and sorted(p.shape)[-2] >= min_size)


def _start_row(p, factored, min_dim_size_to_factor):
    if not _factors(p, factored, min_dim_size_to_factor):
        return real_zeros(p)
    return real_zeros(jnp.sum(p, _largest_axes(p.shape)[0], keepdims=True))


def _start_col(p, factored, min_dim_size_to_factor):
    if not _factors(p, factored, min_dim_size_to_factor):
        return jnp.ones((), real_dtype(p.dtype))
    return real_zeros(jnp.sum(p, _largest_axes(p.shape)[1], keepdims=True))


def _scaled(g: jax.Array, row: jax.Array, col: jax.Array, weight: Any, eps: Any) -> tuple[jax.Array, ...]:
    """``g / sqrt(v)`` by the factors of ``v``, and the factors with the new ``g`` in them at ``weight``."""
    squared = sq(g) + eps
    if not col.ndim:
        row = _mix(row, squared, weight)
        return g / jnp.sqrt(row), row, col
    first, second = _largest_axes(g.shape)
    row = _mix(row, jnp.mean(squared, first, keepdims=True), weight)
    col = _mix(col, jnp.mean(squared, second, keepdims=True), weight)
    # Each factor has a root of its own: the product of two tiny ones would be 0.
    return g / jnp.sqrt(row / jnp.mean(row, second, keepdims=True)) / jnp.sqrt(col), row, col


def _optax_decay(
    learning_rate: Any = None, clipping_threshold: Any = 1.0, weight_decay_rate: Any = None, **rest: Any
) -> dict[str, Any]:
    """optax's arguments: None, and ``weight_decay_rate``, which the learning rate does not scale."""
    if weight_decay_rate is not None:
        if not is_off(rest["weight_decay"]):
            raise ValueError("adafactor: weight_decay and weight_decay_rate are two forms of the same; give one")
        rest |= {"weight_decay": weight_decay_rate, "independent_decay": True}
    clip = 0.0 if clipping_threshold is None else clipping_threshold
    return rest | {"learning_rate": 1.0 if learning_rate is None else learning_rate, "clipping_threshold": clip}


@rule(
    positional="learning_rate min_dim_size_to_factor decay_rate decay_offset multiply_by_parameter_scale "
    "clipping_threshold momentum dtype_momentum weight_decay_rate eps factored weight_decay_mask",
    call=_optax_decay,
    usual_rate=0.01,
    cost="factored",
)
def adafactor(
    g,
    row: Annotated[Square, start(_start_row)],
    col: Annotated[Square, start(_start_col)],
    mu: Annotated[Mean, unless("momentum"), kept_in("dtype_momentum")],
    *,
    t,
    p,
    learning_rate,
    weight_decay,
    min_dim_size_to_factor=128,
    decay_rate=0.8,
    decay_offset=0,
    multiply_by_parameter_scale=True,
    clipping_threshold=1.0,
    momentum: Decay = None,
    eps=1e-30,
    factored=True,
    independent_decay=False,
):
    r"""Adafactor (Shazeer & Stern 2018, arXiv:1804.04235): $V \leftarrow R C / \operatorname{mean}(R),\; u = \operatorname{clip}(g / \sqrt V),\; x \leftarrow x - \eta \max(10^{-3}, \operatorname{rms}(x))\, u$.

    $R$ and $C$ are averages of $g^2 + \epsilon$ over the largest and the second largest axis. If one is shorter than
    ``min_dim_size_to_factor``, ``row`` is $V$ itself and ``col`` is 1. The new value weighs $(t - t_0)^{-c}$, with
    ``decay_rate`` $c$ and ``decay_offset`` $t_0$, the step where the average starts again. Without ``learning_rate``,
    $\eta = 1$. ``weight_decay_rate`` is optax's weight decay: the learning rate does not scale it, like
    ``weight_decay`` with ``independent_decay=True``. ``clipping_threshold`` None or 0: no clipping.

    Use it when memory is short: a large matrix keeps one number a row and a column. Avoid it when AdamW's state fits:
    an update here reads the gradient three times.
    """
    weight = jnp.where(t > decay_offset, t - decay_offset, 1) ** -decay_rate
    u, row, col = _scaled(g, row, col, weight, eps)
    u = u if is_off(clipping_threshold) else u / jnp.maximum(1, _rms(u) / clipping_threshold)
    u = u * jnp.maximum(_rms(p), 1e-3) if multiply_by_parameter_scale else u
    mu = ema(mu, learning_rate * u, momentum)
    decay = weight_decay if independent_decay else learning_rate * weight_decay
    return -mu if is_off(weight_decay) else -mu - decay * p, row, col, mu


@rule(usual_rate=1e-3, cost="factored")
def adalomo(
    g,
    row: Annotated[Square, start(lambda p: _start_row(p, True, 1))],
    col: Annotated[Square, start(lambda p: _start_col(p, True, 1))],
    *,
    t,
    p,
    weight_decay,
    decay_rate=0.8,
    clipping_threshold=1.0,
    eps=1e-30,
):
    r"""AdaLomo (Lv et al. 2023, arXiv:2310.10195): $V \leftarrow R C / \operatorname{mean}(R),\; u = \operatorname{clip}(g / \sqrt V),\; x \leftarrow x - \eta \max(10^{-3}, \operatorname{rms}(x))\, (u + \lambda x)$.

    The size of the parameters scales weight decay too, and every matrix is factored. The paper also saves the memory of
    gradients by stepping during the backward pass. That is left to the training loop.

    Use it when you fine-tune a large model in little memory. Avoid it when the model is small: AdamW's state then costs
    nothing.
    """
    u, row, col = _scaled(g, row, col, t**-decay_rate, eps)
    u = u / jnp.maximum(1, _rms(u) / clipping_threshold)
    return jnp.maximum(_rms(p), 1e-3) * (u + weight_decay * p), row, col


def _covers(maxima: jax.Array, shape: tuple[int, ...]) -> list[jax.Array]:
    """The kept maximum of each slice, one array for each axis, ready to broadcast to ``shape``."""
    if not shape:
        return [maxima.reshape(())]
    parts = jnp.split(maxima, list(itertools.accumulate(shape))[:-1])
    return [part.reshape([-1 if i == axis else 1 for i in range(len(shape))]) for axis, part in enumerate(parts)]


def _maxima(nu: jax.Array) -> jax.Array:
    """The maximum of each slice along each axis, one after another in a vector."""
    axes = range(max(nu.ndim, 1))
    nu = jnp.atleast_1d(nu)
    maxima = [jnp.max(nu, tuple(a for a in axes if a != axis), initial=0) for axis in axes]
    return jnp.concatenate([_replicated(x) for x in maxima])


def _replicated(x: jax.Array) -> jax.Array:
    """``x`` replicated, where its type says that it is sharded: arrays must be sharded alike to be joined."""
    held = jax.typeof(x).sharding
    return jax.sharding.reshard(x, held.update(spec=jax.P())) if any(held.spec) else x


def _no_momentum(momentum: Any = 0.9, **rest: Any) -> dict[str, Any]:
    """``momentum=None`` is 0."""
    return rest | {"momentum": 0.0 if momentum is None else momentum}


def _start_maxima(p):
    return jnp.zeros((sum(p.shape) if p.ndim else 1,), real_dtype(p.dtype))


@rule(positional="learning_rate momentum", call=_no_momentum, usual_rate=0.01, cost="bounds")
def sm3(
    g,
    accumulator: Annotated[Square, start(_start_maxima)],
    mu: Annotated[Mean, unless("momentum")],
    *,
    momentum: Decay = 0.9,
    eps=1e-8,
):
    r"""SM3-II (Anil et al. 2019, arXiv:1901.11150): $\nu_i = \min_{S \ni i} \mu_S + g_i^2,\; u = g / \sqrt{\nu + \epsilon},\; \mu_S \leftarrow \max_{i \in S} \nu_i$.

    The sets $S$ are the slices along each axis; ``accumulator`` holds their $\mu_S$ axis after axis. The step is
    the moving average of $u$, or $u$ itself with ``momentum`` 0 or None.

    Use it when memory is short and embeddings are large. Avoid it when a deep network trains for long: the steps only
    shrink.
    """
    nu = sq(g) + functools.reduce(jnp.minimum, _covers(accumulator, g.shape))
    u = g * jnp.where(nu > 0, 1 / jnp.sqrt(nu + eps), 0)
    mu = ema(mu, u, momentum)
    return mu, _maxima(nu), mu


BIAS = re.compile(r"(?i)bias|(^|/)b$")
NORM = re.compile(r"(?i)norm|(^|/)ln(_\w+|\d+)?(/|$)")
EMBEDDING = re.compile(r"(?i)(embed|embd|(^|[/_])emb([/_]|$)|(^|/)w[tp]e(/|$))(?!.*kernel$)")
QUERY_KEY = re.compile(r"(?i)(^|[/_.])(q|k|query|key|w[qk])(_proj)?([/.](kernel|weight))?$")
VALUE = re.compile(r"(?i)(^|[/_.])(v|value|wv)(_proj)?([/.](kernel|weight))?$")


def _in_blocks(blocks: Any = (), head_dim: int | None = None, **rest: Any) -> dict[str, Any]:
    """Routes to the axes that a block of each leaf spans: by ``blocks``, or else by its name and shape."""
    if head_dim is not None and (not isinstance(head_dim, int) or head_dim < 1):
        raise TypeError(f"adam_mini: head_dim={head_dim!r}: a whole number is needed, the columns of one head")
    given = [(pattern, {"span": span}) for pattern, span in blocks]

    def block(name: str, leaf: Any, own: Mapping[str, Any]) -> dict[str, Any]:
        return {"span": _axes(name, leaf, own["span"])} if own else _usual_block(name, leaf, head_dim)

    def routes(params: Any) -> list[dict[str, Any]]:
        names, leaves = leaf_names(params), jax.tree.leaves(params)
        return [block(*leaf) for leaf in zip(names, leaves, resolve_groups(given, names, leaves), strict=True)]

    return rest | {"routes": routes}


def _axes(name: str, leaf: Any, span: Any) -> tuple[int, ...]:
    """The axes that a block spans, counted from the end.

    Raises:
      ValueError: an axis that the leaf does not have, or has twice.
    """
    ndim = jnp.ndim(leaf)
    if span == "all":
        return tuple(range(-ndim, 0))
    axes = tuple(axis - ndim if axis >= 0 else axis for axis in ((span,) if isinstance(span, int) else span))
    if len({*axes}) != len(axes) or not {*axes} <= {*range(-ndim, 0)}:
        raise ValueError(f"blocks: {name!r} of shape {jnp.shape(leaf)} has no axes {span}")
    return axes


def _usual_block(name: str, leaf: Any, head_dim: int | None) -> dict[str, Any]:
    """The axes that a block spans by default: the smallest dense block of the Hessian, as measured in the paper."""
    ndim, span, columns = jnp.ndim(leaf), (-2,), None
    if BIAS.search(name) or ndim == 0:
        span = ()
    elif ndim == 1 or NORM.search(name) or EMBEDDING.search(name):
        span = (-1,)
    elif QUERY_KEY.search(name):
        width = jnp.shape(leaf)[-1]
        columns = head_dim if head_dim is not None and (ndim == 2 or width != head_dim) else None
        if columns is not None and width % columns:
            raise ValueError(f"head_dim={columns}: {name!r} of shape {jnp.shape(leaf)} is not made of such heads")
        span = (-3, -1) if columns is not None or ndim > 2 else (-2,)
    elif VALUE.search(name) and ndim > 2:
        span = (-3,)
    return {"span": span} if columns is None else {"span": span, "columns": columns}


def _in_heads(x: jax.Array, columns: int | None) -> jax.Array:
    """``x`` with its last axis split into heads of so many columns, where they stand side by side."""
    return x if columns is None else x.reshape(*x.shape[:-1], -1, columns)


def _block_mean(x: jax.Array, span: tuple[int, ...] | None, columns: int | None) -> jax.Array:
    """The mean over each block, every axis kept; by default a block for each output of a matrix."""
    x = _in_heads(x, columns)
    usual = (-2,) if x.ndim > 1 else (-1,) * x.ndim
    total = jnp.sum(x, usual if span is None else span, keepdims=True)
    return total * (total.size / max(x.size, 1))


@rule(
    positional="learning_rate b1 b2 eps weight_decay",
    call=_in_blocks,
    learning_rate=1e-3,
    batch_scaling="sqrt",
    cost="leaf_norms",
)
def adam_mini(
    g,
    mu: Mean,
    nu: Annotated[Square, start(lambda p, span, columns: real_zeros(_block_mean(p, span, columns)))],
    *,
    t,
    span: Static = None,
    columns: Static = None,
    b1: Decay = 0.9,
    b2: Decay = 0.999,
    eps=1e-8,
):
    r"""Adam-mini (Zhang et al. 2024, arXiv:2406.16793): $v_b \leftarrow \beta_2 v_b + (1-\beta_2) \operatorname{mean}(g_b^2),\; u_b = \hat m_b / (\sqrt{\hat v_b} + \epsilon)$.

    Adam with one second moment for each block $b$ of a leaf. Kernels are (..., in, out). A leaf's name and shape decide
    its blocks. A block of query and key is one head, of embeddings one token. A block of any other matrix (values,
    projections, MLPs, heads) is the weights into one output. Norms and vectors are one block, and each coordinate of a
    bias is one. Axes before these are a batch. ``print(describe(tx, params))`` shows the axes that a block spans.

    - ``head_dim``: the columns of one head, where query and key are (in, heads * head_dim). Flax's (in, heads,
      head_dim) do not need it; without either, a block of query and key is the weights into one output.
    - ``blocks``: ``[(pattern, axes), ...]`` for other names, with patterns as in ``groups``. ``axes`` are those that a
      block spans, ``()`` for Adam, or ``"all"`` for one block. The authors' code takes ``"all"`` for unknown names.

    Use it when memory is short and the model is a transformer, whose blocks have known names. Avoid it when names do
    not tell the blocks: say them by ``blocks``, or take `adamw`.
    """
    mu, nu = ema(mu, g, b1), ema(nu, _block_mean(sq(g), span, columns), b2)
    u = _in_heads(debias(mu, b1, t), columns) / (jnp.sqrt(debias(nu, b2, t)) + eps)
    return u.reshape(g.shape), mu, nu
