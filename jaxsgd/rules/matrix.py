r"""Rules that see a parameter as a matrix.

Floor 3. Kernels are (in, out), as JAX layers have them, and axes before the last two are a batch: the layers of
a scan, the heads of an attention. What is no hidden matrix goes to Adam within the same rule, so that a model
has one optimizer, one state and one learning rate to set.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh
from optax.contrib import MuonDimensionNumbers

from jaxsgd.matrices import (
    PRECONDITIONINGS,
    USUAL,
    NewtonSchulz,
    adjoint,
    as_matrices,
    eigenbasis,
    frobenius,
    inverse_root,
    reordered_basis,
    rotated,
    rotated_back,
    table_of,
)  # fmt: skip
from jaxsgd.numerics import debias, ema, filled, real_zeros, sq
from jaxsgd.paths import leaf_names, nearest
from jaxsgd.rule import Rule, rule
from jaxsgd.rules.adaptive import adam

__all__ = ["NOT_HIDDEN", "muon", "muon_jordan", "optax_muon", "shampoo", "soap"]

NOT_HIDDEN = (
    r"(?i)embed|(^|[/_])emb([/_]|$)|(^|/)w[tp]e(/|$)|(cls|class|mask|dist|register)_?tokens?"  # embeddings
    r"|(^|/)(?!\w*(multi|att))\w*head(_?\d+)?(/|$)|logits|classifier|readout"  # heads, but not those of attention
    r"|norm|(^|/)ln(_\w+|\d+)?(/|$)|(^|[/_])(scale|gain|gamma|beta|biase?s?|b)$"  # norms and biases of any shape
)
"""A regular expression for the names of leaves that Adam updates, whatever their shape."""

PROJECTION_IN = re.compile(r"(?i)(^|[/_])(query|key|value|qkv)(_proj)?(/kernel)?$")
"""Attention's projections, (in, heads, size): the heads are outputs, not a batch."""


def routed(rule: Rule, arguments: dict[str, Any]) -> Callable[[Any], list[dict[str, Any]]]:
    """Tell each leaf its matrix axes, or None and the settings of Adam: for rules with the extras `ROUTING`."""
    rest: dict[str, Any] = {
        "axes": None,
        "weight_decay": rule.checked("adam_weight_decay", arguments["adam_weight_decay"]),
    }
    if arguments["adam_learning_rate"] is not None:
        rest["learning_rate"] = rule.checked("adam_learning_rate", arguments["adam_learning_rate"])
    adam, dimensions = arguments["adam"], arguments["muon_weight_dimension_numbers"]
    return lambda params: [rest if axes is None else {"axes": axes} for axes in matrix_leaves(params, adam, dimensions)]


def orthogonalized(arguments: dict[str, Any]) -> dict[str, Any]:
    """The arguments with ``how`` to orthogonalise: for rules with the extras `ROUTING`."""
    kind, mesh = arguments["preconditioning"], arguments["mesh"]
    if kind not in PRECONDITIONINGS:
        raise ValueError(f"preconditioning={kind!r}{nearest(str(kind), PRECONDITIONINGS)}")
    if mesh is not None and not isinstance(mesh, Mesh):
        raise TypeError(f"mesh={mesh!r}: a jax.sharding.Mesh is needed")
    table, whole = table_of(arguments["ns_coeffs"])
    return {**arguments, "how": NewtonSchulz(table, whole, kind, mesh)}


def matrix_leaves(params: Any, adam: Any, dimensions: Any) -> list[Any]:
    """For each leaf its axes ``(rows, columns)``, or None where it goes to Adam."""
    leaves, names = jax.tree.leaves(params), leaf_names(params)
    if dimensions is None:
        found = [_dimensions(name, leaf, adam) for name, leaf in zip(names, leaves, strict=True)]
    else:
        found = spread(dimensions, params, MuonDimensionNumbers)
    argument = "muon_weight_dimension_numbers"
    return [axes_of(argument, name, leaf, d) for name, leaf, d in zip(names, leaves, found, strict=True)]


def spread(given: Any, params: Any, kind: type) -> list[Any]:
    """One of ``given`` for each leaf: it is a ``kind`` or None, a tree (or a prefix) of them, or a function of params."""
    found: list[Any] = []
    prefix = given(params) if callable(given) else given
    to_leaves = lambda one, part: found.extend([one] * len(jax.tree.leaves(part)))  # noqa: E731
    jax.tree.map(to_leaves, prefix, params, is_leaf=lambda one: one is None or isinstance(one, kind))
    return found


def _dimensions(name: str, leaf: Any, adam: Any) -> MuonDimensionNumbers | None:
    """What a leaf is where nobody says: the last two axes, unless it is Adam's by shape or name."""
    ndim = jnp.ndim(leaf)
    if ndim < 2 or (ndim != 2 if adam is None else adam(name, leaf) if callable(adam) else re.search(adam, name)):
        return None
    return MuonDimensionNumbers(-3, (-2, -1)) if ndim > 2 and PROJECTION_IN.search(name) else _LAST_TWO


_LAST_TWO = MuonDimensionNumbers(-2, -1)


def axes_of(argument: str, name: str, leaf: Any, dimensions: Any) -> Any:
    """Dimension numbers as two tuples of axes from 0; None for none, and for a leaf without elements.

    Raises:
      ValueError: an axis that the leaf does not have, or has twice.
    """
    ndim = jnp.ndim(leaf)
    if dimensions is None or math.prod(jnp.shape(leaf)) == 0:
        return None
    pair = [(axes,) if isinstance(axes, int) else tuple(axes) for axes in dimensions]
    rows, columns = (tuple(a % ndim if -ndim <= a < ndim else ndim for a in axes) for axes in pair)
    if len({*rows, *columns, ndim}) != len(rows) + len(columns) + 1 or not rows or not columns:
        raise ValueError(f"{argument}: {name!r} of shape {jnp.shape(leaf)} has no {dimensions}")
    return rows, columns


def _scale(shape: tuple[int, ...], consistent_rms: Any) -> Any:
    """What makes the updates of all shapes alike: (in, out) matrices of spectral norm 1 before."""
    rows, columns = shape[-2:]
    if consistent_rms is None:
        return math.sqrt(max(1, columns / rows))
    return math.sqrt(max(rows, columns)) * consistent_rms


def matrix_axes(x: Any, axes: Any) -> Any:
    """The matrix axes of ``x``: as told by the call, else (under a wrapper) the last two of any array that has two."""
    if axes != "last two":
        return axes
    return ((x.ndim - 2,), (x.ndim - 1,)) if x.ndim > 1 else None


def adam_zeros(p: Any, axes: Any) -> Any:
    """The second moment, which only Adam's leaves have."""
    return real_zeros(p) if matrix_axes(p, axes) is None else None


def _last_two(params: Any) -> Any:
    """The default of `muon` for leaves without names, as optax's dimension numbers."""
    return jax.tree.map(lambda p: _LAST_TWO if p.ndim > 1 else None, params)


def _optax_on_last_two(
    learning_rate, ns_steps=5, beta=0.95, eps=1e-8, weight_decay=0.0, nesterov=True, adam_b1=0.9,
    adam_b2=0.999, adam_eps_root=0.0, consistent_rms=None,
):  # fmt: skip
    """optax told to batch over leading axes; not ``adaptive``, where it takes one dual norm for a whole batch."""
    return optax.contrib.muon(muon_weight_dimension_numbers=_last_two, **locals())


ROUTING = {
    "ns_coeffs": (3.4445, -4.7750, 2.0315), "preconditioning": "frobenius", "adam_weight_decay": 0.0,
    "adam_learning_rate": None, "muon_weight_dimension_numbers": None, "adam": NOT_HIDDEN, "mesh": None,
}  # fmt: skip
"""The arguments of a call that decide what is a matrix and how it is made orthogonal."""

BY_NAME: dict[str, Any] = {
    "routes": routed, "prepare": orthogonalized, "hidden": ("axes", "how"), "extras": ROUTING,
}  # fmt: skip
"""What makes a rule one of hidden matrices, with Adam for the rest; its function asks for ``axes`` and ``how``."""


@rule(
    start={"nu": adam_zeros},
    **BY_NAME,
    positional=(
        "learning_rate", "ns_coeffs", "ns_steps", "beta", "eps", "weight_decay", "weight_decay_mask", "mu_dtype",
    ),
    aliases={"weight_decay_mask": "mask", "mu_dtype": "mu"},
    oracle=_optax_on_last_two,
    bounds={"beta": (0, 1)},
    alternatives={"adam_eps": 0.01},
)  # fmt: skip
def muon(
    g, mu, nu, *, t, axes="last two", how=USUAL, ns_steps=5, beta=0.95, eps=1e-8, nesterov=True, adaptive=False,
    bias_correction=True, consistent_rms=None, adam_b1=0.9, adam_b2=0.999, adam_eps=None, adam_eps_root=0.0,
    adam_nesterov=True,
):  # fmt: skip
    r"""Muon (Jordan et al. 2024, kellerjordan.github.io/posts/muon): $U = \sqrt{\max(1, \tfrac{out}{in})}\, \operatorname{orth}(\beta \hat M_{t+1} + (1-\beta) \hat G_t)$.

    The momentum $M$ of a matrix, with Nesterov's look-ahead, made nearly orthogonal by Newton-Schulz steps. What is
    no hidden matrix goes to Adam: leaves below two dimensions, and those whose name matches ``adam`` (embeddings,
    heads, norms, biases; see `NOT_HIDDEN`). ``print(describe(tx, params))`` shows who got what.

    The arguments are those of `optax.contrib.muon`, and further:

    - ``adam``: what Adam updates beside all leaves below two dimensions: a regular expression on the leaf's name,
      or a function ``(name, leaf) -> bool``; None goes by shape alone, as optax does (see `optax_muon`).
    - ``ns_coeffs``: $(a, b, c)$, or one triple a step, or ``"standard"``, ``"dion"``, ``"polar_express"``.
    - ``muon_weight_dimension_numbers``: `optax.contrib.MuonDimensionNumbers` in a tree like the params (or a
      prefix, or a function of the params), None for Adam; by default a leaf is (..., in, out), and attention's
      query, key and value kernels (in, heads, size). A convolution's (h, w, in, out) is one matrix under
      ``MuonDimensionNumbers((0, 1, 2), 3)``, and a matrix for each tap by default.
    - ``mesh``: a mesh over whose devices stacked matrices are computed, each on its own, and any other matrix gathered
      once; without it every Newton-Schulz step of a matrix split by rows gathers three times.
    - ``consistent_rms``: 0.2 is the scaling of Moonshot (Liu et al. 2025, arXiv:2502.16982).
    - ``bias_correction=False`` is Jordan's plain momentum; ``adam_eps`` is ``eps`` where None.
    - ``weight_decay`` and its mask are for the matrices, ``adam_weight_decay`` for all others; groups override both.
    """
    if (axes := matrix_axes(g, axes)) is None:
        same = {"eps": eps if adam_eps is None else adam_eps, "nesterov": nesterov and adam_nesterov}
        return adam.spec.fn(g, mu, nu, t=t, b1=adam_b1, b2=adam_b2, eps_root=adam_eps_root, **same)
    mu, t = ema(mu, g, beta), t if bias_correction else jnp.inf
    mean = ema(debias(mu, beta, t + 1), debias(g, beta, t), beta) if nesterov else debias(mu, beta, t)
    x, back = as_matrices(mean, *axes)
    u = how.orthogonal(x, ns_steps, eps)
    dual = jnp.sum(x.conj() * u, (-2, -1), keepdims=True) if adaptive else 1.0
    return back(_scale(x.shape, consistent_rms) * dual * u), mu, nu


optax_muon = muon.preset(
    "optax_muon",
    r"""Muon as in optax.contrib (Jordan et al. 2024, kellerjordan.github.io/posts/muon): $U = \sqrt{\max(1, \tfrac{out}{in})}\, \operatorname{orth}(\beta \hat M_{t+1} + (1-\beta) \hat G_t)$.

    `muon` on every two-dimensional leaf and on no other: embeddings and heads are orthogonalised too, the stacked
    kernels of a scan go to Adam.
    """,
    oracle=optax.contrib.muon,
    adam=None,
)

muon_jordan = muon.preset(
    "muon_jordan",
    r"""Muon as first written (Jordan et al. 2024, kellerjordan.github.io/posts/muon): $M \leftarrow \beta M + (1-\beta) G,\; U = \sqrt{\max(1, \tfrac{out}{in})}\, \operatorname{orth}(\beta M + (1-\beta) G)$.

    `muon` with the settings of github.com/KellerJordan/Muon: no bias correction, and for Adam's leaves a learning
    rate of 3e-4 of their own. It keeps the parameters' precision where the original computes in bfloat16.
    """,
    learning_rate=0.02,
    eps=1e-7,
    bias_correction=False,
    adam_learning_rate=3e-4,
    adam_b2=0.95,
    adam_eps=1e-10,
    adam_nesterov=False,
)


def _factor(axis: int) -> Callable:
    """The start of a square factor for an axis, or None where the leaf is no matrix or the axis too long."""

    def begin(p: Any, max_precond_dim: Any) -> Any:
        if p.ndim < 2 or p.shape[axis] > max_precond_dim:
            return None
        return jnp.zeros((*p.shape[:-2], p.shape[axis], p.shape[axis]), p.dtype)

    return begin


def _soap_bases(t, nu, factors, bases, frequency):
    """The bases that the next step turns to, and the second moment, its coordinates sorted as they are now."""

    def first(nu, factors, bases):
        return nu, tuple(None if f is None else eigenbasis(f) for f in factors)

    def again(nu, factors, bases):
        made = [(None, None) if f is None else reordered_basis(f, q) for f, q in zip(factors, bases, strict=True)]
        for axis, (order, _) in zip((-2, -1), made, strict=True):
            if order is not None:
                index = jnp.expand_dims(order, -1 if axis == -2 else -2)
                nu = jnp.take_along_axis(nu, jnp.broadcast_to(index, nu.shape), axis=axis)
        return nu, tuple(q for _, q in made)

    which = jnp.where(t == 1, 1, jnp.where((t - 1) % frequency == 0, 2, 0))
    return jax.lax.switch(which, (lambda nu, factors, bases: (nu, bases), first, again), nu, factors, bases)


@rule(
    start={
        "nu": real_zeros, "left": _factor(-2), "right": _factor(-1),
        "left_basis": _factor(-2), "right_basis": _factor(-1),
    },
    positional=("learning_rate", "b1", "b2", "eps", "weight_decay"),
    learning_rate=3e-3,
    weight_decay=0.01,
    alternatives={"max_precond_dim": 4, "shampoo_beta": 0.5},
    bounds={"shampoo_beta": (0, 1), "precondition_frequency": (1, math.inf)},
)  # fmt: skip
def soap(
    g, mu, nu, left, right, left_basis, right_basis, *, t, p, learning_rate, weight_decay, b1=0.95, b2=0.95,
    eps=1e-8, shampoo_beta=None, precondition_frequency=10, max_precond_dim=10000, bias_correction=True,
):  # fmt: skip
    r"""SOAP (Vyas et al. 2024, arXiv:2409.11321): $L, R$ average $G G^T, G^T G$; Adam on $Q_L^T G Q_R$: $U = Q_L\, \tfrac{\hat M}{\sqrt{\hat V} + \epsilon}\, Q_R^T$.

    Adam in the eigenbasis of Shampoo's factors. As in the authors' code: the first step only looks at the gradient
    and moves nothing; every ``precondition_frequency`` steps the bases take one step of the QR iteration; a gradient
    meets the bases of the step before. ``shampoo_beta`` is the decay of $L$ and $R$, ``b2`` where None; an axis
    longer than ``max_precond_dim`` is not rotated; weight decay comes after the step: $x \leftarrow (1 - \eta\lambda)(x - \eta U)$.
    Leaves below two dimensions get Adam; axes before the last two are a batch.
    """
    steps, moves, bases = jnp.maximum(t - 1, 1), t > 1, (left_basis, right_basis)
    turned = sq(rotated(g, *bases))
    mu, nu = jnp.where(moves, ema(mu, g, b1), mu), jnp.where(moves, ema(nu, turned, b2), nu)
    c1, c2 = (filled(b1, steps), filled(b2, steps)) if bias_correction else (1.0, 1.0)
    u = rotated_back(rotated(mu, *bases) / (jnp.sqrt(nu) + eps), *bases) * (jnp.sqrt(c2) / c1)
    delta = jnp.where(moves, -learning_rate * u - learning_rate * weight_decay * (p - learning_rate * u), 0)
    decay = b2 if shampoo_beta is None else shampoo_beta
    left = None if left is None else ema(left, g @ adjoint(g), decay)
    right = None if right is None else ema(right, adjoint(g) @ g, decay)
    nu, bases = _soap_bases(t, nu, (left, right), bases, precondition_frequency)
    return delta, mu, nu, left, right, *bases


def _plus(factor: Any, outer: jax.Array) -> Any:
    return None if factor is None else factor + outer


def _identity_factor(axis: int) -> Callable:
    """Like `_factor`, but ``eps`` times the identity."""

    def begin(p: Any, max_precond_dim: Any, eps: Any) -> Any:
        zeros = _factor(axis)(p, max_precond_dim)
        return (
            None
            if zeros is None
            else zeros + eps * jnp.broadcast_to(jnp.eye(p.shape[axis], dtype=p.dtype), zeros.shape)
        )

    return begin


@rule(
    start={
        "accumulator": real_zeros,
        "left": _identity_factor(-2), "right": _identity_factor(-1),
        "left_root": _factor(-2), "right_root": _factor(-1),
    },
    alternatives={"max_precond_dim": 4, "precondition_frequency": 3, "eps": 1e-2},
    bounds={"precondition_frequency": (1, math.inf), "eps": (math.ulp(0.0), math.inf)},
)  # fmt: skip
def shampoo(
    g, accumulator, left, right, left_root, right_root, *, t, eps=1e-4, precondition_frequency=1, graft=True,
    max_precond_dim=10000,
):  # fmt: skip
    r"""Shampoo (Gupta et al. 2018, arXiv:1802.09568): $L \leftarrow L + G G^T,\; R \leftarrow R + G^T G,\; U = L^{-1/4}\, G\, R^{-1/4}$.

    $L$ and $R$ start at $\epsilon I$; the roots are taken anew every ``precondition_frequency`` steps. With ``graft``
    (Agarwal et al. 2020, arXiv:2002.11803) each matrix moves as far as diagonal Adagrad would, in Shampoo's direction.
    An axis longer than ``max_precond_dim`` has no factor, and the other one's root is then $-1/2$. Leaves below two
    dimensions get diagonal Adagrad, $G / \sqrt{\epsilon + \sum G^2}$; axes before the last two are a batch.
    """
    diagonal = g / jnp.sqrt(eps + (accumulator := accumulator + sq(g)))
    if left is None and right is None:
        return diagonal, accumulator, left, right, left_root, right_root
    left, right = _plus(left, g @ adjoint(g)), _plus(right, adjoint(g) @ g)
    order = 2 if left is None or right is None else 4
    made = lambda: jax.tree.map(lambda factor: inverse_root(factor, order, eps), (left, right))  # noqa: E731
    roots = jax.lax.cond((t - 1) % precondition_frequency == 0, made, lambda: (left_root, right_root))
    size = frobenius(u := rotated_back(g, roots[0], roots[1]))
    u = u * (frobenius(diagonal) / jnp.where(size > 0, size, 1)).astype(u.dtype) if graft else u
    u = jnp.where(size > 0, u, g)  # only a zero gradient has no size; its place in the mesh passes to the step
    return u, accumulator, left, right, *roots
