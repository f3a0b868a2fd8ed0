r"""Rules that see a parameter as a matrix.

Kernels are (in, out), as JAX layers have them. Axes before the last two are a batch: the layers of a scan, the heads of
an attention. Leaves that are no hidden matrix go to Adam within the same rule. So a model has one optimizer, one state
and one learning rate to set.
"""

from __future__ import annotations

import functools
import math
import re
from collections.abc import Callable
from typing import Annotated, Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from jaxsgd.hyper import Count, Decay, Positive, Static, checked
from jaxsgd.matrices import (
    JORDAN,
    PRECONDITIONINGS,
    USUAL,
    NewtonSchulz,
    as_matrices,
    eigenbasis,
    frobenius,
    gram,
    inverse_root,
    known,
    partitioned,
    reordered_basis,
    rotated,
    rotated_back,
    table_of,
)
from jaxsgd.numerics import debias, ema, filled, real_zeros, sq
from jaxsgd.paths import is_function, leaf_names, nearest
from jaxsgd.registry import rule
from jaxsgd.rules.adaptive import adam
from jaxsgd.slots import Basis, Mean, Square, kept_in, start

__all__ = ["NOT_HIDDEN", "MuonDimensionNumbers", "muon", "muon_jordan", "optax_muon", "shampoo", "soap"]

NOT_HIDDEN = (
    r"(?i)embed|(^|[/_])emb([/_]|$)|(^|/)w[tp]e(/|$)|(cls|class|mask|dist|register)_?tokens?"  # embeddings
    r"|(^|/)(?!\w*(multi|att))\w*head(_?\d+)?(/|$)|logits|classifier|readout"  # heads, but not those of attention
    r"|norm|(^|/)ln(_\w+|\d+)?(/|$)|(^|[/_])(scale|gain|gamma|beta|biase?s?|b)$"  # norms and biases of any shape
)
"""A regular expression for the names of leaves that Adam updates, whatever their shape."""

PROJECTION_IN = re.compile(r"(?i)(^|[/_])(query|key|value|qkv)(_proj)?(/kernel)?$")
"""Attention's projections, (in, heads, size): the heads are outputs, not a batch."""

# -- which axes are a matrix -----------------------------------------------------------------------

Axes = tuple[tuple[int, ...], tuple[int, ...]]
LAST_TWO: Axes = ((-2,), (-1,))


class MuonDimensionNumbers(NamedTuple):
    """The axes of a matrix, as in optax; axes that it does not name are a batch.

    Attributes:
      reduction_axis: the axis, or axes, of the inputs.
      output_axis: the axis, or axes, of the outputs.
    """

    reduction_axis: int | tuple[int, ...] = 0
    output_axis: int | tuple[int, ...] = 1


def is_dimensions(value: Any) -> bool:
    """Whether ``value`` is dimension numbers, ours or optax's."""
    return hasattr(value, "reduction_axis") and hasattr(value, "output_axis")


def spread(dimensions: Any, params: Any) -> list[Any]:
    """Dimension numbers or None for each leaf, from one for all, a tree (or a prefix) of them, or a function of the
    params."""
    out: list[Any] = []
    prefix = dimensions(params) if is_function(dimensions) else dimensions

    def to_leaves(one: Any, part: Any) -> None:
        out.extend([one] * len(jax.tree.leaves(part)))

    jax.tree.map(to_leaves, prefix, params, is_leaf=lambda one: one is None or is_dimensions(one))
    return out


def axes_of(argument: str, name: str, leaf: Any, dimensions: Any) -> Axes | None:
    """Dimension numbers as two tuples of axes from 0; None for none, and for a leaf without elements.

    Raises:
      ValueError: an axis that the leaf does not have, or has twice.
    """
    ndim = jnp.ndim(leaf)
    if dimensions is None or math.prod(jnp.shape(leaf)) == 0:
        return None
    pair = [(a,) if isinstance(a, int) else tuple(a) for a in (dimensions.reduction_axis, dimensions.output_axis)]
    rows, columns = (tuple(a % ndim if -ndim <= a < ndim else ndim for a in axes) for axes in pair)
    if len({*rows, *columns, ndim}) != len(rows) + len(columns) + 1 or not rows or not columns:
        raise ValueError(f"{argument}: {name!r} of shape {jnp.shape(leaf)} has no {dimensions}")
    return rows, columns


def _by_name(name: str, leaf: Any, adam: Any) -> MuonDimensionNumbers | None:
    """The last two axes, unless the leaf goes to Adam by its shape or name."""
    ndim = jnp.ndim(leaf)
    if ndim < 2 or (ndim != 2 if adam is None else adam(name, leaf) if callable(adam) else re.search(adam, name)):
        return None
    projects = ndim > 2 and PROJECTION_IN.search(name)
    return MuonDimensionNumbers(*((-3, (-2, -1)) if projects else (-2, -1)))


def matrix_leaves(params: Any, adam: Any, dimensions: Any) -> list[Axes | None]:
    """For each leaf its axes ``(rows, columns)``, or None where it goes to Adam."""
    leaves, names, argument = jax.tree.leaves(params), leaf_names(params), "muon_weight_dimension_numbers"
    if dimensions is None:
        numbers = [_by_name(name, leaf, adam) for name, leaf in zip(names, leaves, strict=True)]
    else:
        numbers = spread(dimensions, params)
    return [axes_of(argument, *each) for each in zip(names, leaves, numbers, strict=True)]


def matrix_axes(x: Any, axes: Axes | None) -> Axes | None:
    """The matrix axes of ``x``, from 0; None where it is no matrix."""
    if axes is None or x.ndim < 2:
        return None
    rows, columns = (tuple(axis % x.ndim for axis in side) for side in axes)
    return rows, columns


def adam_zeros(p: Any, axes: Any) -> Any:
    """The second moment, which only Adam's leaves have."""
    return real_zeros(p) if matrix_axes(p, axes) is None else None


# -- Muon ------------------------------------------------------------------------------------------


def hidden_matrices(
    *, adam_weight_decay=0.0, adam_learning_rate=None, muon_weight_dimension_numbers=None, adam=NOT_HIDDEN, **rest
) -> dict[str, Any]:
    """A call that gives each leaf its matrix axes, or None and the settings of Adam."""
    others: dict[str, Any] = {"axes": None, "weight_decay": checked("adam_weight_decay", adam_weight_decay)}
    if adam_learning_rate is not None:
        others["learning_rate"] = checked("adam_learning_rate", adam_learning_rate)

    def routes(params: Any) -> list[dict[str, Any]]:
        found = matrix_leaves(params, adam, muon_weight_dimension_numbers)
        return [others if axes is None else {"axes": axes} for axes in found]

    return rest | {"routes": routes}


def orthogonalized(
    *,
    ns_coeffs=JORDAN[0],
    preconditioning="frobenius",
    adam_weight_decay=0.0,
    adam_learning_rate=None,
    muon_weight_dimension_numbers=None,
    adam=NOT_HIDDEN,
    mesh=None,
    ns_dtype=None,
    **rest,
) -> dict[str, Any]:
    """A call that says, too, how matrices are made orthogonal."""
    if preconditioning not in PRECONDITIONINGS:
        raise ValueError(f"preconditioning={preconditioning!r}{nearest(str(preconditioning), PRECONDITIONINGS)}")
    if mesh is not None and not isinstance(mesh, Mesh):
        raise TypeError(f"mesh={mesh!r}: a jax.sharding.Mesh is needed")
    if ns_dtype is not None:
        ns_dtype = jnp.dtype(ns_dtype).name
        if not jnp.issubdtype(ns_dtype, jnp.floating):
            raise ValueError(f"ns_dtype={ns_dtype!r}: a floating type is needed. Use 'bfloat16', 'float32' or None")
    arguments = hidden_matrices(
        adam_weight_decay=adam_weight_decay,
        adam_learning_rate=adam_learning_rate,
        muon_weight_dimension_numbers=muon_weight_dimension_numbers,
        adam=adam,
        **rest,
    )
    return arguments | {"how": NewtonSchulz(*table_of(ns_coeffs), preconditioning, mesh, ns_dtype)}


def _scale(shape: tuple[int, ...], consistent_rms: Any) -> Any:
    """The factor that makes the updates of all shapes alike: (in, out) matrices of spectral norm 1 before."""
    rows, columns = shape[-2:]
    if consistent_rms is None:
        return math.sqrt(max(1, columns / rows))
    return math.sqrt(max(rows, columns)) * consistent_rms


@rule(
    positional="learning_rate ns_coeffs ns_steps beta eps weight_decay weight_decay_mask mu_dtype",
    call=orthogonalized,
    usual_rate=0.02,
    cost="products",
    stacked=True,
)
@partitioned
def muon(
    g,
    mu: Annotated[Mean, kept_in("mu_dtype")],
    nu: Annotated[Square, start(adam_zeros)],
    *,
    t,
    axes: Static = LAST_TWO,
    how: Static = USUAL,
    ns_steps=5,
    beta: Decay = 0.95,
    eps=1e-8,
    nesterov=True,
    adaptive=False,
    bias_correction=True,
    consistent_rms=None,
    adam_b1: Decay = 0.9,
    adam_b2: Decay = 0.999,
    adam_eps=None,
    adam_eps_root=0.0,
    adam_nesterov=True,
):
    r"""Muon (Jordan et al. 2024, kellerjordan.github.io/posts/muon): $U = \sqrt{\max(1, \tfrac{out}{in})}\, \operatorname{orth}(\beta \hat M_{t+1} + (1-\beta) \hat G_t)$.

    The momentum $M$ of a matrix, with Nesterov's look-ahead, made nearly orthogonal by Newton-Schulz steps. Leaves below
    two dimensions go to Adam, and so do those whose name matches ``adam`` (embeddings, heads, norms, biases; see
    `NOT_HIDDEN`). ``print(describe(tx, params))`` shows which leaf goes where.

    The arguments are those of optax's muon, and further:

    - ``adam``: the leaves that Adam updates, beside all below two dimensions. A regular expression on the leaf's name,
      or a function ``(name, leaf) -> bool``. None goes by shape alone, as optax does (see `optax_muon`).
    - ``ns_coeffs``: $(a, b, c)$, or one triple a step, or ``"standard"``, ``"dion"``, ``"polar_express"``.
    - ``muon_weight_dimension_numbers``: `MuonDimensionNumbers`, ours or optax's, in a tree like the params (or a prefix,
      or a function of the params), None for Adam. Default: a leaf is (..., in, out), and attention's query, key and value
      kernels (in, heads, size). A convolution's (h, w, in, out) is one matrix under
      ``MuonDimensionNumbers((0, 1, 2), 3)``, and a matrix for each tap by default.
    - ``mesh``: a mesh over whose devices matrices are spread. Leaves of one shape are computed as one stack, each
      matrix on one device; any other matrix is gathered once. Without it every Newton-Schulz step of a matrix split by
      rows gathers three times.
    - ``ns_dtype``: the type that Newton-Schulz computes in, such as ``"bfloat16"``: half the bytes, two digits. float64
      parameters are computed in float64. Default: the parameters' type.
    - ``consistent_rms``: 0.2 is the scaling of Moonshot (Liu et al. 2025, arXiv:2502.16982).
    - ``bias_correction=False`` is Jordan's plain momentum; ``adam_eps`` is ``eps`` where None.
    - ``weight_decay`` and its mask are for the matrices, ``adam_weight_decay`` for all others; groups override both.

    Use it when most parameters are hidden matrices, as in a transformer. Avoid it when the model has few matrices: the
    rest is plain Adam.
    """
    if (axes := matrix_axes(g, axes)) is None:
        same = {"eps": eps if adam_eps is None else adam_eps, "nesterov": nesterov and adam_nesterov}
        return adam.fn(g, mu, nu, t=t, b1=adam_b1, b2=adam_b2, eps_root=adam_eps_root, **same)
    mu, t = ema(mu, g, beta), t if bias_correction else jnp.inf
    mean = ema(debias(mu, beta, t + 1), debias(g, beta, t), beta) if nesterov else debias(mu, beta, t)
    x, back = as_matrices(mean, *axes)
    u = how.orthogonal(x, ns_steps, eps)
    dual = jnp.sum(x.conj() * u, (-2, -1), keepdims=True) if adaptive else 1.0
    return back(_scale(x.shape, consistent_rms) * dual * u), mu, nu


optax_muon = muon.preset(
    "optax_muon",
    r"""Muon as in optax (Jordan et al. 2024, kellerjordan.github.io/posts/muon): $U = \sqrt{\max(1, \tfrac{out}{in})}\, \operatorname{orth}(\beta \hat M_{t+1} + (1-\beta) \hat G_t)$.

    `muon` on every two-dimensional leaf and on no other: embeddings and heads are orthogonalised too, the stacked
    kernels of a scan go to Adam.

    Use it when you repeat a run of optax. Avoid it when the model has embeddings or a scan over layers: take `muon`.
    """,
    adam=None,
)

muon_jordan = muon.preset(
    "muon_jordan",
    r"""Muon as first written (Jordan et al. 2024, kellerjordan.github.io/posts/muon): $M \leftarrow \beta M + (1-\beta) G,\; U = \sqrt{\max(1, \tfrac{out}{in})}\, \operatorname{orth}(\beta M + (1-\beta) G)$.

    `muon` with the settings of github.com/KellerJordan/Muon: no bias correction, and for Adam's leaves a learning
    rate of 3e-4 of their own. Newton-Schulz computes in bfloat16, as the original does; ``ns_dtype="float32"`` keeps the
    parameters' precision.

    Use it when you repeat a run of its authors. Avoid it in a new run: `muon` has bias correction and one learning
    rate.
    """,
    learning_rate=0.02,
    eps=1e-7,
    bias_correction=False,
    ns_dtype="bfloat16",
    adam_learning_rate=3e-4,
    adam_b2=0.95,
    adam_eps=1e-10,
    adam_nesterov=False,
)

# -- SOAP and Shampoo ------------------------------------------------------------------------------


def _factor(axis: int) -> Callable:
    """The start of a square factor for an axis, or None where the leaf is no matrix or the axis too long."""

    def begin(p: Any, max_precond_dim: Any) -> Any:
        if p.ndim < 2 or p.size == 0 or p.shape[axis] > known("max_precond_dim", max_precond_dim):
            return None
        return jnp.zeros((*p.shape[:-2], p.shape[axis], p.shape[axis]), p.dtype)

    return begin


Left = Annotated[Basis, start(_factor(-2))]
Right = Annotated[Basis, start(_factor(-1))]


def _staggered(*, stagger=False, **rest) -> dict[str, Any]:
    """A call that spreads the refreshes of the leaves over the steps: each has an ``offset`` of its own."""
    if not isinstance(stagger, bool):
        raise TypeError(f"stagger={stagger!r}: a boolean is needed. Use True or False")
    if not stagger:
        return rest
    frequency, longest = rest["precondition_frequency"], rest["max_precond_dim"]
    if not isinstance(frequency, int):
        raise TypeError(f"precondition_frequency={frequency!r}: stagger=True needs a whole number. Use stagger=False")
    return rest | {"routes": functools.partial(_offsets, frequency=frequency, longest=longest)}


def _offsets(params: Any, frequency: int, longest: Any) -> list[dict[str, Any]]:
    """The step of each matrix within the interval: the costliest first, each to the step with the least work."""
    leaves = jax.tree.leaves(params)
    costs = [_refresh_cost(jnp.shape(x), longest) for x in leaves]
    work, out = [0] * frequency, [{} for _ in leaves]
    for i in sorted(range(len(leaves)), key=lambda i: -costs[i]):
        if costs[i]:
            offset = min(range(frequency), key=work.__getitem__)
            work[offset] += costs[i]
            out[i] = {"offset": offset}
    return out


def _refresh_cost(shape: tuple[int, ...], longest: Any) -> int:
    if len(shape) < 2:
        return 0
    return math.prod(shape[:-2]) * sum(size**3 for size in shape[-2:] if size <= longest)


def _soap_bases(t, nu, factors, bases, frequency, offset):
    """The bases that the next step turns to, and the second moment, its coordinates sorted as they are now."""

    def first(nu, factors, bases):
        return nu, tuple(None if f is None else eigenbasis(f) for f in factors)

    def again(nu, factors, bases):
        pairs = [(None, None) if f is None else reordered_basis(f, q) for f, q in zip(factors, bases, strict=True)]
        for axis, (order, _) in zip((-2, -1), pairs, strict=True):
            if order is not None:
                index = jnp.expand_dims(order, -1 if axis == -2 else -2)
                nu = jnp.take_along_axis(nu, jnp.broadcast_to(index, nu.shape), axis=axis)
        return nu, tuple(q for _, q in pairs)

    which = jnp.where(t == 1, 1, jnp.where((t - 1 - offset) % frequency == 0, 2, 0))
    return jax.lax.switch(which, (lambda nu, factors, bases: (nu, bases), first, again), nu, factors, bases)


@rule(
    positional="learning_rate b1 b2 eps weight_decay",
    learning_rate=3e-3,
    call=_staggered,
    weight_decay=0.01,
    cost="decomposed",
    stacked=True,
)
@partitioned
def soap(
    g,
    mu: Mean,
    nu: Square,
    left: Left,
    right: Right,
    left_basis: Left,
    right_basis: Right,
    *,
    t,
    p,
    learning_rate,
    weight_decay,
    b1: Decay = 0.95,
    b2: Decay = 0.95,
    eps=1e-8,
    shampoo_beta: Decay = None,
    precondition_frequency: Count = 10,
    max_precond_dim=10000,
    bias_correction=True,
    offset: Static = 0,
):
    r"""SOAP (Vyas et al. 2024, arXiv:2409.11321): $L, R$ average $G G^T, G^T G$; Adam on $Q_L^T G Q_R$: $U = Q_L\, \tfrac{\hat M}{\sqrt{\hat V} + \epsilon}\, Q_R^T$.

    Adam in the eigenbasis of Shampoo's factors. As in the authors' code, the first step only reads the gradient and
    moves nothing. Every ``precondition_frequency`` steps the bases take one step of the QR iteration. A gradient meets
    the bases of the step before. ``shampoo_beta`` is the decay of $L$ and $R$; None means ``b2``. An axis longer than
    ``max_precond_dim`` is not rotated. Weight decay comes after the step: $x \leftarrow (1 - \eta\lambda)(x - \eta U)$.
    Leaves below two dimensions get Adam. Axes before the last two are a batch. ``stagger=True`` refreshes the bases of
    the leaves in turn, a few in each step. Then no step but the first takes several times as long as the others.

    Use it when fewer steps are worth more time and memory for each. Avoid it when layers are wide: the eigenbases take
    more memory than the moments.
    """
    steps, moves, bases = jnp.maximum(t - 1, 1), t > 1, (left_basis, right_basis)
    turned = sq(rotated(g, *bases))
    mu, nu = jnp.where(moves, ema(mu, g, b1), mu), jnp.where(moves, ema(nu, turned, b2), nu)
    c1, c2 = (filled(b1, steps), filled(b2, steps)) if bias_correction else (1.0, 1.0)
    u = rotated_back(rotated(mu, *bases) / (jnp.sqrt(nu) + eps), *bases) * (jnp.sqrt(c2) / c1)
    delta = jnp.where(moves, -learning_rate * u - learning_rate * weight_decay * (p - learning_rate * u), 0)
    decay = b2 if shampoo_beta is None else shampoo_beta
    left = None if left is None else ema(left, gram(g), decay)
    right = None if right is None else ema(right, gram(g, tall=True), decay)
    nu, bases = _soap_bases(t, nu, (left, right), bases, precondition_frequency, offset)
    return delta, mu, nu, left, right, *bases


def _plus(factor: Any, outer: jax.Array) -> Any:
    return None if factor is None else factor + outer


def _identity_factor(axis: int) -> Callable:
    """Like `_factor`, but ``eps`` times the identity."""
    zeros = _factor(axis)

    def begin(p: Any, max_precond_dim: Any, eps: Any) -> Any:
        factor = zeros(p, max_precond_dim)
        if factor is None:
            return None
        return factor + eps * jnp.broadcast_to(jnp.eye(p.shape[axis], dtype=p.dtype), factor.shape)

    return begin


def _roots(left, right, eps):
    """The inverse fourth roots of both factors; of the only one the square root."""
    order = 2 if left is None or right is None else 4
    return jax.tree.map(lambda factor: inverse_root(factor, order, eps), (left, right))


@rule(call=_staggered, usual_rate=0.01, cost="decomposed", stacked=True)
@partitioned
def shampoo(
    g,
    accumulator: Square,
    left: Annotated[Basis, start(_identity_factor(-2))],
    right: Annotated[Basis, start(_identity_factor(-1))],
    left_root: Left,
    right_root: Right,
    *,
    t,
    eps: Positive = 1e-4,
    precondition_frequency: Count = 1,
    graft=True,
    max_precond_dim=10000,
    offset: Static = 0,
):
    r"""Shampoo (Gupta et al. 2018, arXiv:1802.09568): $L \leftarrow L + G G^T,\; R \leftarrow R + G^T G,\; U = L^{-1/4}\, G\, R^{-1/4}$.

    $L$ and $R$ start at $\epsilon I$; the roots are computed every ``precondition_frequency`` steps. With ``graft``
    (Agarwal et al. 2020, arXiv:2002.11803) each matrix moves as far as diagonal Adagrad would, in Shampoo's direction.
    An axis longer than ``max_precond_dim`` has no factor, and the other one's root is then $-1/2$. Leaves below two
    dimensions get diagonal Adagrad, $G / \sqrt{\epsilon + \sum G^2}$; axes before the last two are a batch.
    ``stagger=True`` computes the roots of the leaves in turn, a few in each step; the first step computes all.

    Use it when fewer steps are worth more time for each. Avoid it when axes are long: the roots of the factors take
    time and memory.
    """
    diagonal = g / jnp.sqrt(eps + (accumulator := accumulator + sq(g)))
    if left is None and right is None:
        return diagonal, accumulator, left, right, left_root, right_root
    left, right = _plus(left, gram(g)), _plus(right, gram(g, tall=True))
    due = (t == 1) | ((t - 1 - offset) % precondition_frequency == 0)
    roots = jax.lax.cond(due, lambda: _roots(left, right, eps), lambda: (left_root, right_root))
    size = frobenius(u := rotated_back(g, roots[0], roots[1]))
    u = u * (frobenius(diagonal) / jnp.where(size == 0, 1, size)).astype(u.dtype) if graft else u
    u = jnp.where(size == 0, g, u)  # only a zero gradient has no size; its sharding passes to the step
    return u, accumulator, left, right, *roots
