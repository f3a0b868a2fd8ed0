r"""Matrices in, matrices out: the parts of rules on whole matrices.

Every function works on the last two axes and is batched over all before them. No decomposition sees a matrix that is
not finite, for `jnp.linalg.svd` on CPU may never return from one; its values are NaN then. And none sees more than one
matrix at a time on CPU: see `singly`.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jax.core import Tracer
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from jaxsgd.numerics import sq
from jaxsgd.symmetric import Product, halves, symmetric_product

__all__ = [
    "JORDAN",
    "USUAL",
    "NewtonSchulz",
    "PRECONDITIONINGS",
    "PRESETS",
    "adjoint",
    "as_matrices",
    "cholesky",
    "completed",
    "eigenbasis",
    "eigenvectors",
    "frobenius",
    "gathered",
    "gram",
    "inverse",
    "inverse_root",
    "known",
    "matrix_shape",
    "orthonormal",
    "newton_schulz",
    "partitioned",
    "reordered_basis",
    "rotated",
    "rotated_back",
    "singular_vectors",
    "spectral",
    "table_of",
    "triangle",
]

Triple = tuple[float, float, float]

JORDAN: tuple[Triple, ...] = ((3.4445, -4.7750, 2.0315),)
"""Jordan's quintic: the steepest slope at zero, with singular values left between 0.7 and 1.2."""

DION: tuple[Triple, ...] = (
    (4.0848, -6.8946, 2.9270),
    (3.9505, -6.3029, 2.6377),
    (3.7418, -5.5913, 2.3037),
    (2.8769, -3.1427, 1.2046),
    (2.8366, -3.0525, 1.2012),
)  # fmt: skip
"""One quintic a step, as in Dion (Ahn et al. 2025, arXiv:2504.05295)."""

_OPTIMAL: tuple[Triple, ...] = (
    (8.28721201814563, -23.595886519098837, 17.300387312530933),
    (4.107059111542203, -2.9478499167379106, 0.5448431082926601),
    (3.9486908534822946, -2.908902115962949, 0.5518191394370137),
    (3.3184196573706015, -2.488488024314874, 0.51004894012372),
    (2.300652019954817, -1.6689039845747493, 0.4188073119525673),
    (1.891301407787398, -1.2679958271945868, 0.37680408948524835),
    (1.8750014808534479, -1.2500016453999487, 0.3750001645474248),
    (1.875, -1.25, 0.375),
)


def _damped(abc: Triple, by: float) -> Triple:
    """The odd quintic $p(x / by)$."""
    a, b, c = abc
    return a / by, b / by**3, c / by**5


POLAR_EXPRESS: tuple[Triple, ...] = (
    _damped(_OPTIMAL[0], 1.01**2),
    *(_damped(abc, 1.01) for abc in _OPTIMAL[1:-1]),
    _OPTIMAL[-1],
)
"""The Polar Express (Amsel et al. 2025, arXiv:2505.16932, appendix A): the best quintic of each step for
singular values in [0.001, 1]. Damped by the paper's 1.01 against rounding; the first once more, for the 1.01 by
which the paper divides the matrix."""

PRESETS = {"standard": JORDAN, "muon": JORDAN, "dion": DION, "polar_express": POLAR_EXPRESS}
PRECONDITIONINGS = ("frobenius", "spectral", "aol", "schatten")


def table_of(coefficients: str | Sequence[Any]) -> tuple[tuple[Triple, ...], bool]:
    """Newton-Schulz coefficients as ``(a triple for each step, whether the table has a length of its own)``.

    A single triple, and the Polar Express, serve any number of steps; any other table is all of its steps.

    Raises:
      ValueError: an unknown preset, or anything but triples of numbers.
    """
    if isinstance(coefficients, str):
        if coefficients not in PRESETS:
            raise ValueError(f"ns_coeffs={coefficients!r}: known presets are {', '.join(PRESETS)}")
        return PRESETS[coefficients], coefficients == "dion"
    rows = list(coefficients)
    whole = bool(rows) and all(isinstance(row, Sequence) for row in rows)
    rows = rows if whole else [rows]
    if any(len(row) != 3 for row in rows):
        raise ValueError(f"ns_coeffs={coefficients!r}: (a, b, c) or a sequence of such triples is needed")
    return tuple((row[0], row[1], row[2]) for row in rows), whole


def adjoint(x: jax.Array) -> jax.Array:
    """The conjugate transpose."""
    return jnp.swapaxes(x, -1, -2).conj() if jnp.iscomplexobj(x) else jnp.swapaxes(x, -1, -2)


def gram(x: jax.Array, *, tall: bool = False, product: Product | None = None) -> jax.Array:
    r"""The Gram matrix $X X^*$, or $X^* X$ if ``tall``; ``product`` of `symmetric_product`."""
    product = functools.partial(symmetric_product, halves(x)) if product is None else product
    return product(lambda x: adjoint(x) @ x if tall else x @ adjoint(x), x, tall=tall)


def frobenius(x: jax.Array) -> jax.Array:
    """The Frobenius norm, with shape ``(..., 1, 1)``; its derivative at zero is zero."""
    total = jnp.sum(sq(x), axis=(-2, -1), keepdims=True)
    return jnp.where(total == 0, 0, jnp.sqrt(jnp.where(total == 0, 1, total)))


# -- decompositions ------------------------------------------------------------------------------


def singly(decompose: Callable[[jax.Array], Any]) -> Callable[[jax.Array], Any]:
    """A function of matrices that takes them one by one on CPU, in a batch of `jax.vmap` too.

    On CPU, jaxlib before 0.11 shares a batch out to the threads that run the program, and waits for them in one of
    these. If all of them wait for a batch, the program never ends; with two cores, two batches are enough.
    """

    @jax.custom_batching.sequential_vmap
    def one(x: jax.Array) -> Any:
        return decompose(x)

    def on_cpu(x: jax.Array) -> Any:
        mapped = one
        for _ in range(x.ndim - 2):
            mapped = jax.vmap(mapped)
        return mapped(x)

    @jax.custom_jvp
    def call(x: jax.Array) -> Any:
        return jax.lax.platform_dependent(x, cpu=on_cpu, default=decompose)

    @call.defjvp
    def _(primals: Any, tangents: Any) -> Any:
        return jax.jvp(decompose, primals, tangents)

    return call


_eigh = singly(lambda x: tuple(jnp.linalg.eigh(x)))
_svd = singly(lambda x: tuple(jnp.linalg.svd(x, full_matrices=False)))
_qr = singly(lambda x: tuple(jnp.linalg.qr(x)))
_r = singly(lambda x: jnp.linalg.qr(x, mode="r"))
_cholesky = singly(jnp.linalg.cholesky)
_inverse = singly(jnp.linalg.inv)
_largest = singly(lambda x: jnp.linalg.norm(x, ord=2, axis=(-2, -1), keepdims=True))


def finite(x: jax.Array, witness: jax.Array | None = None, instead: Any = 0) -> tuple[jax.Array, jax.Array]:
    """Whether each matrix is finite, with shape ``(..., 1)``, and ``x`` with ``instead`` in place of the others.

    Args:
      x: matrices, ``(..., m, n)``.
      witness: numbers ``(..., k)`` that are not finite if the matrix is not; they spare a pass over it.
    """
    seen = x.reshape(*x.shape[:-2], -1) if witness is None else witness
    whole = jnp.all(jnp.isfinite(seen + seen), axis=-1, keepdims=True)  # eigh adds a matrix to its transpose
    return whole, jnp.where(whole[..., None], x, instead)


def eigenvectors(x: jax.Array, witness: jax.Array | None = None) -> tuple[jax.Array, jax.Array]:
    """Eigenvalues of a Hermitian matrix, the smallest first, and eigenvectors in columns.

    A matrix that is not finite has the values NaN, and the vectors of a zero matrix. ``witness`` as in `finite`.
    """
    whole, known = finite(x, witness)
    values, vectors = _eigh(known)
    return jnp.where(whole, values, jnp.nan), vectors


def singular_vectors(x: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
    """The reduced singular value decomposition $U, s, V^*$; where ``x`` is not finite, of zeros with NaN for $s$."""
    whole, known = finite(x)
    left, values, right = _svd(known)
    return left, jnp.where(whole, values, jnp.nan), right


def orthonormal(x: jax.Array, witness: jax.Array | None = None, instead: Any = 0) -> tuple[jax.Array, jax.Array]:
    """The reduced QR decomposition; where ``x`` is not finite, that of ``instead``. ``witness`` as in `finite`."""
    return _qr(finite(x, witness, instead)[1])


def triangle(x: jax.Array) -> jax.Array:
    """R of the QR decomposition; where ``x`` is not finite, that of zeros."""
    return _r(finite(x)[1])


def cholesky(x: jax.Array) -> jax.Array:
    """The lower Cholesky factor; NaN where ``x`` is not positive definite or not finite."""
    return _cholesky(finite(x)[1])


def inverse(x: jax.Array) -> jax.Array:
    """The inverse; not finite where ``x`` is singular or not finite."""
    return _inverse(x)


def spectral(x: jax.Array) -> jax.Array:
    """The largest singular value, with shape ``(..., 1, 1)``."""
    whole, known = finite(x)
    return jnp.where(whole[..., None], _largest(known), jnp.nan)


# -- Newton-Schulz -------------------------------------------------------------------------------


def _prescaled(x: jax.Array, kind: str, eps: Any, tall: bool, product: Product) -> tuple[jax.Array, jax.Array | None]:
    """``x`` with singular values at most 1, and its Gram matrix where that came for free."""
    if kind == "frobenius":
        return x / (frobenius(x) + eps), None
    if kind == "spectral":
        return x / (spectral(x) + eps), None
    # Squares: eps bounds their root, so that small gradients are scaled like large ones.
    squares = gram(x, tall=tall, product=product)
    if kind == "aol":  # almost orthogonal layers: Gershgorin's bound, row by row of the shorter side
        scale = jax.lax.rsqrt(jnp.maximum(jnp.sum(jnp.abs(squares), axis=-1, keepdims=True), eps * eps))
    elif kind == "schatten":  # the Schatten-4 norm, squared, is the Gram matrix's Frobenius norm
        scale = jax.lax.rsqrt(jnp.maximum(frobenius(squares), eps * eps))
    else:
        raise ValueError(f"preconditioning={kind!r}: known are {', '.join(PRECONDITIONINGS)}")
    wide = scale.astype(x.dtype)
    across = jnp.swapaxes(wide, -1, -2)
    return x * (across if tall else wide), squares * wide * across


TOGETHER = 2
"""The Newton-Schulz steps of a long matrix that come from one Gram matrix. Each further step multiplies the rounding of
its small eigenvalues by up to $a^2$; of three, bfloat16 diverges."""


def _composed(squares: jax.Array, abcs: Sequence[Any], one: jax.Array, product: Product) -> jax.Array:
    """The product of the polynomials of some steps: after each the Gram matrix is $P A P$."""
    factor = None
    for i, (a, b, c) in enumerate(abcs):
        # With a I in it, x is read once, by the product.
        plain = functools.partial(lambda a, b, c, squares: a * one + b * squares + c * squares @ squares, a, b, c)
        polynomial = product(plain, squares, scalars=(a, b, c))
        # All of these commute, so that their products are symmetric too.
        factor = polynomial if factor is None else product(jnp.matmul, polynomial, factor)
        if i + 1 < len(abcs):
            squares = product(jnp.matmul, product(jnp.matmul, polynomial, squares), polynomial)
    assert factor is not None
    return factor


def newton_schulz(
    x: jax.Array,
    table: Sequence[Triple],
    steps: Any,
    *,
    eps: Any = 1e-8,
    preconditioning: str = "frobenius",
    dtype: Any = None,
) -> jax.Array:
    r"""The nearest (semi-)orthogonal matrix, nearly: $X \leftarrow (a I + b A + c A^2) X,\; A = X X^*$.

    A tall matrix is multiplied from the right, by the polynomial of $X^* X$: nothing is transposed.

    Args:
      x: matrices in the last two axes.
      table: $(a, b, c)$ of each step; steps beyond its end repeat the last.
      steps: how many: a number, or an array for a loop whose length is known at run time only.
      eps: keeps a zero matrix zero.
      preconditioning: how singular values are brought to at most 1: by the ``"frobenius"`` or ``"spectral"``
        norm, ``"aol"`` (Boissin et al. 2025, arXiv:2512.04632) or ``"schatten"`` (Grishina et al. 2025,
        arXiv:2506.10935).
      dtype: the type that the steps compute in, after the scaling. Default: that of ``x``.

    Returns:
      Matrices like ``x``, in its dtype.
    """
    tall, like, product = x.shape[-2] > x.shape[-1], x.dtype, functools.partial(symmetric_product, halves(x))
    x, squares = _prescaled(x, preconditioning, eps, tall, product)
    if dtype is not None:
        x, squares = x.astype(dtype), None if squares is None else squares.astype(dtype)
    size = min(x.shape[-2:])
    one = jnp.broadcast_to(jnp.eye(size, dtype=x.dtype), (*x.shape[:-2], size, size))

    def step(x: jax.Array, squares: jax.Array, abcs: Any) -> jax.Array:
        factor = _composed(squares, abcs, one, product)
        return x @ factor if tall else factor @ x

    if isinstance(steps, jax.Array):
        rows = jnp.asarray(table, x.dtype)

        def body(i: jax.Array, x: jax.Array) -> jax.Array:
            return step(x, gram(x, tall=tall, product=product), [rows[jnp.minimum(i, len(table) - 1)]])

        x = jax.lax.fori_loop(0, steps.astype(jnp.int32), body, x)
    else:
        abcs = [table[min(i, len(table) - 1)] for i in range(int(steps))]
        at_once = TOGETHER if max(x.shape[-2:]) > 2 * size else 1
        for i in range(0, len(abcs), at_once):
            known = squares if i == 0 and squares is not None else gram(x, tall=tall, product=product)
            x = step(x, known, abcs[i : i + at_once])
    return x.astype(like)


@dataclass(frozen=True)
class NewtonSchulz:
    """A method to orthogonalise: `newton_schulz` with its settings and its devices.

    Attributes:
      table, whole: see `table_of`; the number of steps counts unless the table is whole.
      preconditioning: see `newton_schulz`.
      mesh: if given, the steps run without communication. If a stack of matrices divides among all devices, each matrix
        is computed on one device. Any other matrix is gathered once and computed on each. Leaves of one shape are such
        a stack too, see `jaxsgd.stacking`.
      dtype: the type that the steps compute in, for float32 and narrower matrices. Default: that of the matrix.
    """

    table: Sequence[Triple] = JORDAN
    whole: bool = False
    preconditioning: str = "frobenius"
    mesh: Mesh | None = None
    dtype: str | None = None

    def orthogonal(self, x: jax.Array, steps: Any, eps: Any) -> jax.Array:
        """The nearest orthogonal matrices, nearly."""
        if self.mesh is not None:
            owned = x.ndim > 2 and x.shape[0] % self.mesh.size == 0
            spec = PartitionSpec(self.mesh.axis_names) if owned else PartitionSpec()
            explicit = AxisType.Explicit in self.mesh.axis_types  # then `partitioned` has set the mesh
            x = jax.lax.with_sharding_constraint(x, spec if explicit else NamedSharding(self.mesh, spec))
        steps = len(self.table) if self.whole else steps
        wide = jnp.iscomplexobj(x) or jnp.finfo(x.dtype).bits > 32
        dtype = None if wide else self.dtype
        return newton_schulz(x, self.table, steps, eps=eps, preconditioning=self.preconditioning, dtype=dtype)


USUAL = NewtonSchulz()
"""Jordan's quintic, from the Frobenius norm."""


def known(name: str, value: Any) -> Any:
    """``value``, a hyperparameter that decides the shape of the state.

    Raises:
      TypeError: it is not known while tracing.
    """
    if isinstance(value, Tracer):
        raise TypeError(
            f"{name} decides the shape of the state: a number known while tracing is needed. Under "
            "optax.inject_hyperparams use static_args for it"
        )
    return value


# -- where a matrix is ---------------------------------------------------------------------------


def partitioned(fn: Callable) -> Callable:
    """``fn(g, *slots, **rest)``, a rule on whole matrices, with explicit mesh axes left to the compiler.

    The types of sharded matrices alone do not decide how a product or a decomposition is sharded. Each result is
    sharded like its argument: the first like ``g``, the others like their slots.
    """

    @functools.wraps(fn)
    def on_mesh(*arrays: Any, **rest: Any) -> Any:
        given = {name: x for name, x in rest.items() if isinstance(x, jax.Array)}
        meshes = [jax.typeof(x).sharding.mesh for x in jax.tree.leaves((arrays, given))]
        mesh = next((mesh for mesh in meshes if AxisType.Explicit in mesh.axis_types), None)
        if mesh is None:
            return fn(*arrays, **rest)
        out = jax.tree.map(lambda x: NamedSharding(mesh, jax.typeof(x).sharding.spec), arrays)

        def inside(arrays: Any, given: Any) -> Any:
            return fn(*arrays, **{**rest, **given})

        on_compiler: Any = jax.sharding.auto_axes(inside, axes=mesh.explicit_axes, out_sharding=out)
        return on_compiler(arrays, given)

    return on_mesh


def gathered(x: jax.Array) -> tuple[jax.Array, Callable[[jax.Array], jax.Array]]:
    """``x`` whole on every device if its mesh axes are explicit, else as it is, and the way back."""
    there = jax.typeof(x).sharding
    if AxisType.Explicit not in there.mesh.axis_types:
        return x, lambda whole: whole
    return jax.sharding.reshard(x, NamedSharding(there.mesh, PartitionSpec())), lambda w: jax.sharding.reshard(w, there)


def matrix_shape(shape: tuple[int, ...], rows: tuple[int, ...], columns: tuple[int, ...]) -> tuple[int, ...]:
    """The shape of an array with the axes ``rows`` and ``columns`` flattened into its last two."""
    batch = [size for axis, size in enumerate(shape) if axis not in rows + columns]
    return *batch, *(math.prod(shape[axis] for axis in axes) for axes in (rows, columns))


def as_matrices(
    x: jax.Array, rows: tuple[int, ...], columns: tuple[int, ...]
) -> tuple[jax.Array, Callable[[jax.Array], jax.Array]]:
    """``x`` with the axes ``rows`` and ``columns`` flattened into its last two, and the way back."""
    batch = tuple(axis for axis in range(x.ndim) if axis not in rows + columns)
    order = (*batch, *rows, *columns)
    if order == tuple(range(x.ndim)) and len(rows) == len(columns) == 1:
        return x, lambda matrices: matrices
    there = [x.shape[axis] for axis in order]
    back = sorted(range(x.ndim), key=order.__getitem__)
    flat = x.transpose(order).reshape(matrix_shape(x.shape, rows, columns))
    return flat, lambda matrices: matrices.reshape(there).transpose(back)


# -- bases ---------------------------------------------------------------------------------------


def completed(vectors: jax.Array, null: jax.Array) -> jax.Array:
    """The columns ``vectors``, those that are ``null`` replaced by cosines orthogonal to the others.

    ``null`` broadcasts along the columns' axis. A QR decomposition makes the result a basis.
    """
    known, (n, count) = jnp.where(null, 0, vectors), vectors.shape[-2:]
    places = jnp.arange(n, dtype=jnp.finfo(vectors.dtype).dtype)
    cosines = jnp.cos(math.pi / n * jnp.outer(places + 0.5, places[:count])).astype(vectors.dtype)
    cosines = jnp.broadcast_to(cosines, vectors.shape)
    return jnp.where(null, cosines - known @ (adjoint(known) @ cosines), vectors)


def eigenbasis(x: jax.Array) -> jax.Array:
    """Eigenvectors of a positive semidefinite matrix in columns, those of the largest eigenvalues first.

    A solver picks the eigenvectors of the eigenvalue 0 by its rounding. Here they are the same on every machine:
    cosines, made orthogonal to the others and to each other. The basis of a zero matrix is the identity.
    """
    n, real = x.shape[-1], jnp.finfo(x.dtype).dtype
    values, vectors = eigenvectors(x, _diagonal(x))
    values, vectors = jnp.flip(values, -1), jnp.flip(vectors, -1)
    largest = values[..., :1]
    null = jnp.expand_dims(values <= 8 * n * float(jnp.finfo(real).eps) * largest, -2)
    basis, _ = orthonormal(completed(vectors, null), largest)
    return jnp.where(jnp.expand_dims(largest, -1) <= 0, jnp.broadcast_to(jnp.eye(n, dtype=x.dtype), x.shape), basis)


def _diagonal(x: jax.Array) -> jax.Array:
    """Of a sum of products with their adjoints it is finite only if the whole matrix is."""
    return jnp.diagonal(x, axis1=-2, axis2=-1)


def reordered_basis(x: jax.Array, basis: jax.Array) -> tuple[jax.Array, jax.Array]:
    """One step of the QR iteration from ``basis`` to the eigenbasis of ``x``.

    Returns:
      The order in which the old columns were taken (largest Rayleigh quotient first), and the new basis.
    """
    image = x @ basis
    quotients = jnp.sum(basis.conj() * image, axis=-2)
    order = jnp.argsort(-jnp.real(quotients), axis=-1)
    index = jnp.broadcast_to(jnp.expand_dims(order, -2), image.shape)
    return order, orthonormal(jnp.take_along_axis(image, index, axis=-1), quotients)[0]


def rotated(x: jax.Array, left: jax.Array | None, right: jax.Array | None) -> jax.Array:
    """$Q_L^* X Q_R$, with zeros where only rounding is left; a side without a basis stays as it is.

    Some rules divide by the size of a coordinate's history. Where a gradient is of low rank, they would make full steps
    of that rounding.
    """
    if left is None and right is None:
        return x
    y = x if left is None else adjoint(left) @ x
    y = y if right is None else y @ right
    rounding = 64 * float(jnp.finfo(x.dtype).eps) / math.sqrt(max(x.shape[-2:])) * frobenius(x)
    return jnp.where((jnp.abs(y) <= rounding) & (rounding < jnp.inf), 0, y)


def rotated_back(x: jax.Array, left: jax.Array | None, right: jax.Array | None) -> jax.Array:
    """$Q_L X Q_R^*$; a side without a basis stays as it is."""
    x = x if left is None else left @ x
    return x if right is None else x @ adjoint(right)


def inverse_root(x: jax.Array, order: int, floor: Any) -> jax.Array:
    """``x**(-1 / order)`` of a positive definite matrix whose eigenvalues are ``floor`` or more."""
    values, vectors = eigenvectors(x, _diagonal(x))
    powers = jnp.maximum(values, floor) ** (-1 / order)
    return (vectors * jnp.expand_dims(powers, -2).astype(x.dtype)) @ adjoint(vectors)
