r"""Rules that keep the state of a matrix in a space of low rank.

One axis of each gradient matrix is compressed to ``rank``, by its own singular vectors (GaLore) or at random (APOLLO).
The moments are those of the compressed gradient. Axes before the matrix axes are a batch.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable
from dataclasses import replace
from typing import Annotated, Any

import jax
import jax.numpy as jnp
from optax import GradientTransformation

from jaxsgd.hyper import Count, Decay, Seed, Static, Whole, is_off, one_of
from jaxsgd.leaf import Leaf
from jaxsgd.matrices import (
    as_matrices,
    completed,
    frobenius,
    gathered,
    known,
    matrix_shape,
    orthonormal,
    rotated,
    rotated_back,
    singular_vectors,
)
from jaxsgd.numerics import ema, filled, real_dtype, real_zeros, sq, zeros
from jaxsgd.paths import is_function, leaf_names
from jaxsgd.registry import Inner, Rule, make_rule, register, rule, titled, wrapped
from jaxsgd.rules.adaptive import adam
from jaxsgd.rules.matrix import (
    LAST_TWO,
    NOT_HIDDEN,
    MuonDimensionNumbers,
    axes_of,
    is_dimensions,
    matrix_axes,
    matrix_leaves,
    spread,
)
from jaxsgd.slots import Basis, Mean, Other, Slot, Square, by_name, parameter_names, start, unless

__all__ = ["GaLoreDimensionNumbers", "apollo", "apollo_mini", "galore", "low_rank"]

# -- which axes are compressed -------------------------------------------------------------------


GaLoreDimensionNumbers = MuonDimensionNumbers
"""The same under the name that optax has for GaLore's."""


def facing(x: jax.Array, axes: Any, side: str) -> tuple[jax.Array, Callable[[jax.Array], jax.Array], bool] | None:
    """``x`` as matrices whose rows are the axis to compress, the way back, and whether that transposed them.

    Args:
      x: a leaf.
      axes: its matrix axes ``(rows, columns)``, None where it has none.
      side: which of the two is compressed, the ``"long"`` or the ``"short"`` one; of equal ones the rows.
    """
    if (oriented := _oriented(x, axes, side)) is None:
        return None
    rows, columns, turned = oriented
    x, there = gathered(x)
    matrices, back = as_matrices(x, rows, columns)
    return matrices, lambda u: there(back(u)), turned


def _oriented(x: Any, axes: Any, side: str) -> tuple[Any, Any, bool] | None:
    """The axes to compress, the others, and whether the former are the columns; None where there is no matrix."""
    if (axes := matrix_axes(x, axes)) is None or x.size == 0:
        return None
    rows, columns = matrix_shape(x.shape, *axes)[-2:]
    turned = rows < columns if side == "long" else rows > columns
    return *(axes[::-1] if turned else axes), turned


def _faced(p: Any, axes: Any, side: str) -> tuple[int, ...] | None:
    """The shape of the matrices of `facing`."""
    oriented = _oriented(p, axes, side)
    return None if oriented is None else matrix_shape(p.shape, *oriented[:2])


def _compressed(p: Any, axes: Any, side: str, rank: Any) -> Any:
    """Zeros for a gradient of ``p`` as the moments see it; ``p`` itself where that is the whole gradient."""
    if (shape := _faced(p, axes, side)) is None:
        return p
    *batch, rows, columns = shape
    return jnp.zeros((*batch, min(int(known("rank", rank)), rows, columns), columns), p.dtype)


def _dimensions(params: Any, dimensions: Any) -> list[Any]:
    """Each leaf's ``(rows, columns)`` by dimension numbers: one for all, a tree of them, or a function of the params."""
    numbers = dimensions(params) if is_function(dimensions) else dimensions
    one, argument = is_dimensions(numbers), "weight_dimension_numbers"  # one is for all leaves that are matrices
    leaves = zip(leaf_names(params), jax.tree.leaves(params), spread(numbers, params), strict=True)
    return [axes_of(argument, name, leaf, None if one and jnp.ndim(leaf) < 2 else d) for name, leaf, d in leaves]


# -- GaLore --------------------------------------------------------------------------------------


def leading_basis(x: jax.Array, rank: int, turned: bool) -> jax.Array:
    """The left singular vectors of the ``rank`` largest singular values, in columns.

    A solver picks those of the singular value 0 by its rounding. Here they are cosines, made orthogonal to the others
    and to each other. So the basis is always complete, and the same on every machine but for the others' signs.
    ``turned`` says that ``x`` is a transpose; the signs are then those of the matrix as it was.
    """
    left, values, right = singular_vectors(jnp.swapaxes(x, -1, -2) if turned else x)
    vectors = (jnp.swapaxes(right, -1, -2) if turned else left)[..., :rank]
    values = jnp.expand_dims(values, -2)
    null = values[..., :rank] <= max(x.shape[-2:]) * float(jnp.finfo(values.dtype).eps) * values[..., :1]
    basis, triangle = orthonormal(completed(vectors, null), values[..., 0, :1])
    signs = jnp.sign(jnp.expand_dims(jnp.diagonal(triangle, axis1=-2, axis2=-1), -2))
    return jnp.where(null, basis * signs, vectors)


def _start_projector(p, axes, side, rank):
    shape = _faced(p, axes, side)
    return None if shape is None else jnp.zeros((*shape[:-1], min(int(known("rank", rank)), *shape[-2:])), p.dtype)


def _in_low_rank(
    inner: Inner,
    leaf: Leaf,
    projector: Annotated[Basis, start(_start_projector)],
    *,
    t,
    rank: Whole = 128,
    update_proj_gap: Count = 200,
    scale=1.0,
    side: Annotated[str, one_of("long", "short")] = "long",
    axes: Static = LAST_TWO,
):
    found, g = facing(leaf.g, axes, side), leaf.g
    if found is None:
        u, leaf = inner.direction(leaf)
    else:
        x, back, turned = found
        due = (t - 1) % update_proj_gap == 0
        projector = jax.lax.cond(due, lambda: leading_basis(x, projector.shape[-1], turned), lambda: projector)
        u, leaf = inner.direction(leaf.replace(g=rotated(x, projector, None)))
        u = scale * back(rotated_back(u, projector, None))
    u = u if is_off(leaf.weight_decay) else u + leaf.weight_decay * leaf.p
    return leaf.replace(g=g, delta=-leaf.learning_rate * u), projector


def _low(slot: Slot) -> Slot:
    """A slot that starts from the compressed gradient in place of the parameter."""

    def begin(p: Any, axes: Any, side: Any, rank: Any, **hyper: Any) -> Any:
        return by_name(slot.begin, {**hyper, "p": _compressed(p, axes, side, rank)})

    asked = dict.fromkeys(("p", "axes", "side", "rank", *parameter_names(slot.begin)))
    keyword = [inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY) for name in asked]
    begin.__signature__ = inspect.Signature(keyword)  # type: ignore[attr-defined]  # read by `by_name`
    return replace(slot, begin=begin, zero=False)


def _by_dimensions(weight_dimension_numbers=None, **rest) -> dict[str, Any]:
    """A call that gives each leaf its matrix axes; by default those of two-dimensional leaves."""

    def routes(params: Any) -> list[dict[str, Any]]:
        if weight_dimension_numbers is None:
            return [{"axes": None} if jnp.ndim(p) > 2 else {} for p in jax.tree.leaves(params)]
        return [{"axes": axes} for axes in _dimensions(params, weight_dimension_numbers)]

    return rest | {"routes": routes}


def _low_rank(base: Rule, name: str, doc: str, **options: Any) -> Rule:
    for asked in sorted({"p", "learning_rate", "weight_decay"} & {*base.context}):
        raise ValueError(f"{name}: {base.name} asks for {asked!r}; in a low-rank space there is only the gradient")
    if base.sums is not None or base.shared is not None or base.coupled:
        raise ValueError(f"{name}: {base.name} must see the parameters, or all leaves at once")
    options = {
        "call": _by_dimensions,
        "positional": "learning_rate rank update_proj_gap scale",
        "weight_decay": base.defaults["weight_decay"] or 0.0,
        "cost": "decomposed",
    } | options
    slots = {key: _low(slot) for key, slot in base.slots.items()}
    made = wrapped(base, _in_low_rank, name=name, doc=doc, slots=slots, **options)
    return replace(made, context=tuple(asked for asked in made.context if asked != "p"))


def low_rank(base: Rule) -> Rule:
    r"""GaLore (Zhao et al. 2024, arXiv:2403.03507): $u = \alpha P\, \rho(P^T g)$.

    The wrapped rule $\rho$ sees gradients of ``rank`` rows. $P$ are the leading left singular vectors of $g$, computed
    every ``update_proj_gap`` steps. $\alpha$ is ``scale``. The arguments are those of `galore`, then the base's own.

    Raises:
      ValueError: the base asks for more than a gradient, has sums over the tree, or treats leaves by their axes.
    """
    name = f"low_rank_{base.name}"
    for static in (hyper.name for hyper in base.hypers.values() if hyper.static):
        raise ValueError(f"{name}: {base.name} has {static!r} too, or treats whole parameters by it")
    return _low_rank(base, name, titled(low_rank, base))


def _adam_or_optimizer(
    g,
    inner: Annotated[Other, unless("optimizer"), start(lambda p, optimizer: optimizer.init(p))],
    mu: Annotated[Mean, unless("b1"), start(lambda p, optimizer: zeros(p) if optimizer is None else None)],
    nu: Annotated[Square, start(lambda p, optimizer: real_zeros(p) if optimizer is None else None)],
    *,
    t,
    b1: Decay = 0.9,
    b2: Decay = 0.999,
    eps=1e-8,
    eps_root=0.0,
    nesterov=False,
    bias_correction=True,
    optimizer: Static = None,
):
    """Adam, or a transformation of optax on one array."""
    if optimizer is not None:
        u, inner = optimizer.update(g, inner)
        return u, inner, mu, nu
    settings = {"b1": b1, "b2": b2, "eps": eps, "eps_root": eps_root, "nesterov": nesterov}
    u, mu, nu = adam.fn(g, mu, nu, t=t, bias_correction=bias_correction, **settings)
    return u, inner, mu, nu


def _galore_call(base_optimizer=None, weight_dimension_numbers=None, **rest) -> dict[str, Any]:
    """``base_optimizer`` where it is one: a transformation that needs gradients only."""
    if isinstance(base_optimizer, Rule):
        name = base_optimizer.name
        raise TypeError(f"base_optimizer={base_optimizer!r}: for a rule of jaxsgd use low_rank({name})(...)")
    if base_optimizer is not None and not isinstance(base_optimizer, GradientTransformation):
        raise TypeError(f"base_optimizer={base_optimizer!r}: a transformation is needed, such as optax.scale_by_lion()")
    for name, default in adam.hyper.items() if base_optimizer is not None else ():
        if rest[name] != default:
            raise TypeError(f"{name}={rest[name]!r} is Adam's. Give it to base_optimizer")
    return _by_dimensions(weight_dimension_numbers, **rest) | {"optimizer": base_optimizer}


galore = _low_rank(
    make_rule(_adam_or_optimizer, name="adam"),
    "galore",
    r"""GaLore (Zhao et al. 2024, arXiv:2403.03507): $R = P^T G,\; U = \alpha P\, \hat M_R / (\sqrt{\hat V_R} + \epsilon)$.

    Adam in the space of the gradient's ``rank`` leading singular vectors $P$. They are computed every
    ``update_proj_gap`` steps, and the moments keep their numbers in the new coordinates. ``scale`` is $\alpha$. All
    other leaves get Adam. Weight decay acts on the full parameters.

    The arguments are those of optax's galore, and further:

    - ``side``: the axis that is compressed. ``"long"``, as in optax, keeps the least state. But at any rank it drops
      the part of a gradient outside the span of the one that gave $P$. ``"short"`` is the paper's: nothing is lost
      where ``rank`` reaches the short axis. The authors' code has it, with ``scale=0.25``.
    - ``b1``, ``b2``, ``eps``, ``eps_root``, ``nesterov``, ``bias_correction``: of `jaxsgd.adam`.
    - ``base_optimizer``: in Adam's place, an optax transformation that needs gradients only; it runs on each leaf by
      itself. For a rule of jaxsgd in its place use ``low_rank(lion)(...)``.
    - ``weight_dimension_numbers``: `GaLoreDimensionNumbers`, ours or optax's, for all leaves, or None for Adam. Also a
      tree of these like the params, a prefix of such a tree, or a function of the params. Default: the two-dimensional
      leaves are matrices. Axes that it does not name are a batch: ``GaLoreDimensionNumbers(-2, -1)`` takes each layer
      of a scan by itself.

    The singular vectors are computed in the precision of the moments. Where a gradient is of lower rank than ``rank``,
    the missing vectors are fixed, and rounding is no signal. So neither depends on the machine.

    Use it when memory is short and the gradients of matrices have low rank. Avoid it when ``rank`` must be large: the
    bases then cost more than Adam's state.
    """,
    call=_galore_call,
    positional="learning_rate rank update_proj_gap scale base_optimizer weight_decay mask weight_dimension_numbers",
    usual_rate=0.01,
)
register(galore)


# -- APOLLO --------------------------------------------------------------------------------------


def _start_seed(p, axes):
    return None if _faced(p, axes, "short") is None else jnp.zeros((), jnp.int32)


def _start_size(p, axes):
    shape = _faced(p, axes, "short")
    return None if shape is None else jnp.zeros((*shape[:-2], 1, 1), real_dtype(p.dtype))


def drawn(seed: jax.Array, shape: tuple[int, ...], dtype: Any) -> jax.Array:
    """Normal numbers that a seed stands for, of variance 1 over the number of rows."""
    return jax.random.normal(jax.random.key(seed), shape, real_dtype(dtype)).astype(dtype) / math.sqrt(shape[-2])


def _image(x: jax.Array, shape: tuple[int, ...], seed: Any, key: jax.Array, due: jax.Array) -> tuple[Any, Any]:
    """The projection of ``x`` to ``shape``, and the seed of the random matrix: a fresh one where it is ``due``."""
    if shape == x.shape:
        return x, seed
    fresh = jax.lax.bitcast_convert_type(jax.random.bits(key, (), jnp.uint32), jnp.int32)
    seed = jnp.where(due, fresh, seed)
    return drawn(seed, (*x.shape[:-2], shape[-2], x.shape[-2]), x.dtype) @ x, seed


def _norms(x: jax.Array, scale_type: str) -> jax.Array:
    """The norm of each column, or of the whole matrix, with the derivative 0 where it is 0."""
    if scale_type == "tensor":
        return frobenius(x)
    total = jnp.sum(sq(x), axis=-2, keepdims=True)
    return jnp.where(total == 0, 0, jnp.sqrt(jnp.where(total == 0, 1, total)))


def grown(x: jax.Array, size: jax.Array | None, growth: Any) -> tuple[jax.Array, jax.Array | None]:
    """``x``, its norm at most ``growth`` times the one before (Fira's limiter), and its norm.

    After a norm of 0 there is no limit, which would stop a layer whose first gradient is zero for thousands of steps.
    """
    if size is None:
        return x, None
    norm, most = frobenius(x), growth * (size + 1e-8)
    over = (size > 0) & (norm > most)
    return x * jnp.where(over, most / jnp.where(over, norm, 1), 1).astype(x.dtype), jnp.where(over, most, norm)


def _start_low(zeros: Callable) -> Callable:
    """The start of a moment of the compressed gradient."""

    def begin(p: Any, axes: Any, rank: Any) -> Any:
        return zeros(_compressed(p, axes, "short", rank))

    return begin


def _apollo_call(growth=1.01, adam=NOT_HIDDEN, weight_dimension_numbers=None, **rest) -> dict[str, Any]:
    """A call that gives each leaf its matrix axes, by ``weight_dimension_numbers`` or else by ``adam``."""

    def routes(params: Any) -> list[dict[str, Any]]:
        if weight_dimension_numbers is not None:
            return [{"axes": axes} for axes in _dimensions(params, weight_dimension_numbers)]
        return [{"axes": axes} for axes in matrix_leaves(params, adam, None)]

    return rest | {"growth": 0.0 if growth is None else growth, "routes": routes}


@rule(positional="learning_rate rank update_proj_gap scale", call=_apollo_call, usual_rate=0.01, cost="low_rank")
def apollo(
    g,
    mu: Annotated[Mean, start(_start_low(zeros))],
    nu: Annotated[Square, start(_start_low(real_zeros))],
    size: Annotated[Other, unless("growth"), start(_start_size)],
    seed: Annotated[Other, start(_start_seed)],
    *,
    t,
    leaf_key,
    axes: Static = LAST_TWO,
    rank: Whole = 256,
    update_proj_gap: Count = 200,
    scale=1.0,
    scale_type: Annotated[str, one_of("channel", "tensor")] = "channel",
    b1: Decay = 0.9,
    b2: Decay = 0.999,
    eps=1e-6,
    growth=1.01,
    key: Seed = 0,
):
    r"""APOLLO (Zhu et al. 2024, arXiv:2412.05270): $R = P G,\; u_j = \sqrt\alpha\, G_j\, \lVert \hat M_{R,j} / (\sqrt{\hat V_{R,j}} + \epsilon) \rVert / \lVert R_j \rVert$.

    Adam's moments are kept of $R$ only, with ``rank`` rows in the place of a matrix's shorter axis. Each channel $j$ of
    the gradient itself (the longer axis) is scaled as much as Adam scales its image. $P$ is random: it is not kept but
    drawn at each step from a ``seed``, which changes every ``update_proj_gap`` steps. Leaves below two dimensions, and
    those whose name matches ``adam``, get Adam, as in `muon`.

    - ``scale``: $\alpha$, whose root multiplies the step, as in the authors' code.
    - ``scale_type``: ``"channel"``, or ``"tensor"`` for one factor a matrix.
    - ``growth``: the largest factor by which a matrix's step grows at each step, before $\sqrt\alpha$ and Adam's bias
      correction. This is the limiter of Fira (Chen et al. 2024, arXiv:2410.01623). None or 0: no limit.
    - ``key``: the seed of the projections. They differ between leaves and are the same on every replica.
    - ``adam``, ``weight_dimension_numbers``: as in `muon` and `galore`; the latter goes before the former.

    Where ``rank`` reaches the shorter axis, $P$ is the identity, which loses nothing.

    Use it when memory is short and matrices are large. Avoid it when matrices are hardly larger than ``rank``: the
    state is then Adam's.
    """
    found = facing(g, axes, "short")
    x, back = (g, None) if found is None else found[:2]
    low, seed = _image(x, mu.shape, seed, leaf_key, (t - 1) % update_proj_gap == 0)
    mu, nu = ema(mu, low, b1), ema(nu, sq(low), b2)
    u, correction = mu / (jnp.sqrt(nu) + eps), jnp.sqrt(filled(b2, t)) / filled(b1, t)
    if back is not None:
        scaled = _norms(u, scale_type) / (_norms(low, scale_type) + 1e-8)
        u, size = grown(x * scaled.astype(x.dtype), size, growth)
        u = scale**0.5 * back(u)
    return correction * u, mu, nu, size, seed


apollo_mini = apollo.preset(
    "apollo_mini",
    r"""APOLLO-Mini (Zhu et al. 2024, arXiv:2412.05270): $R = P G,\; U = \sqrt\alpha\, G\, \lVert \hat M_R / (\sqrt{\hat V_R} + \epsilon) \rVert / \lVert R \rVert$.

    `apollo` with one random row $P$, one factor for each matrix, and $\alpha = 128$: a state of nearly the size of SGD's.

    Use it when even the state of `apollo` is too large. Avoid it when channels of a matrix need different scales.
    """,
    rank=1,
    scale=128.0,
    scale_type="tensor",
)
