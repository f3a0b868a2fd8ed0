"""No decomposition hangs: none sees a number that is not finite, and none a batch on CPU.

`jnp.linalg.svd` on CPU never returns for a small matrix with an inf, so the steps run in a process with a time limit;
and inf and NaN stay in their matrix, at any step. Batches at the same time wait for each other: see `matrices.singly`.
"""

import functools
import inspect
import pathlib
import re
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.test_util import check_grads

import jaxsgd
from jaxsgd import RULES, GaLoreDimensionNumbers, galore, kron, low_rank, muon
from jaxsgd.matrices import cholesky, eigenvectors, inverse, orthonormal, singular_vectors, spectral, triangle
from jaxsgd.second_order.squares import METHODS as SQUARES
from jaxsgd.testing import loss_of

LIMIT = 900
"""Seconds for the process: it takes 130 of CPU time."""
CLEAN, STEPS = 2, 15
"""Steps before the gradient is not finite, and steps after."""
OFTEN = {"precondition_frequency": 3, "update_proj_gap": 4, "rank": 2}
"""Settings under which a walk of 15 steps decomposes several times."""
DECOMPOSITIONS = re.compile(r"\b(svd|eigh|eig|qr|geqrf|householder_product|cholesky|lu|schur)\[")
BAD = {"inf": np.inf, "nan": np.nan, "overflow": 1e30}
ONE_MATRIX = ("kron", "galore", "galore, short", "low_rank(lion)", "optax_muon")
"""These see a stack as one matrix, or as none."""


def transformations():
    """Functions that make a transformation of each rule, and of some with other settings, by name."""
    made = {
        name: functools.partial(rule, 0.1, **{key: value for key, value in OFTEN.items() if key in rule.defaults})
        for name, rule in RULES.items()
    }
    low = {"rank": 2, "update_proj_gap": 4}
    return made | {
        "muon, spectral": functools.partial(muon, 0.1, preconditioning="spectral"),
        "kron, a batch": functools.partial(kron, 0.1, merge_dims=False),
        "galore, short": functools.partial(galore, 0.1, **low, side="short"),
        "galore, a batch": functools.partial(
            galore, 0.1, **low, weight_dimension_numbers=GaLoreDimensionNumbers(-2, -1)
        ),
        "low_rank(lion)": functools.partial(low_rank(jaxsgd.lion), 0.1, **low),
    }


def params():
    rng = np.random.RandomState(0)
    shapes = {"small": (5, 3), "large": (64, 48), "other": (4, 6), "stack": (3, 5, 4), "vector": (7,)}
    return {name: jnp.asarray(rng.standard_normal(shape), jnp.float32) for name, shape in shapes.items()}


def poisoned(grads, value):
    """One number of two matrices, and one of the middle matrix of a stack, is ``value``."""
    places = {"small": (1, 2), "large": (10, 7), "stack": (1, 2, 3)}
    return grads | {name: grads[name].at[place].set(value) for name, place in places.items()}


def stepper(tx):
    tx = optax.with_extra_args_support(tx)
    return lambda grads, state, p: tx.update(grads, state, p, value=loss_of(p), obj_fn=loss_of)


def decomposes(tx):
    """Whether the program of an update has a decomposition in it."""
    p = params()
    return bool(DECOMPOSITIONS.search(str(jax.make_jaxpr(lambda s: stepper(tx)(p, s, p))(tx.init(p)))))


def last_of(tx, p, bad):
    """The updates of the last step, after ``CLEAN`` steps without and ``STEPS`` steps with a bad number."""

    def step(state, t):
        grads = jax.tree.map(lambda clean, other: jnp.where(t < CLEAN, clean, other), p, poisoned(p, bad))
        updates, state = stepper(tx)(grads, state, p)
        return state, updates

    _, updates = jax.lax.scan(step, tx.init(p), jnp.arange(CLEAN + STEPS))
    return jax.tree.map(lambda u: u[-1], updates)


def survive(name, tx):
    """Steps outside a compiled program return, whatever they return."""
    p = params()
    for kind, bad in BAD.items():
        print("stepping", name, kind, flush=True)
        state = tx.init(p)
        for _ in range(STEPS):
            _, state = stepper(tx)(poisoned(p, bad), state, p)


def check(name, tx):
    p = params()
    compiled = jax.jit(functools.partial(last_of, tx, p))
    clean = compiled(jnp.float32(1))
    for kind, bad in BAD.items():
        print(name, kind, sep=": ", flush=True)
        updates = compiled(jnp.float32(bad))
        for leaf in ("small", "large") if name in ONE_MATRIX else ("small", "large", "stack"):
            trace = not jnp.all(jnp.isfinite(updates[leaf]))
            assert trace or kind == "overflow", f"{name}: {kind} left no trace in {leaf}"
        for leaf in ("other", "vector"):
            assert jnp.all(jnp.isfinite(updates[leaf])), f"{name}: {kind} spread to {leaf}"
        for i in (0, 2) if name not in ONE_MATRIX else ():
            # Another program may round differently; what a basis makes of it is a few digits more.
            np.testing.assert_allclose(updates["stack"][i], clean["stack"][i], 1e-3, 1e-5, err_msg=f"{name}: {kind}")


@pytest.mark.slow
@pytest.mark.processes
def test_inf_and_nan_never_hang():
    try:
        ended = subprocess.run([sys.executable, __file__], capture_output=True, text=True, timeout=LIMIT)
    except subprocess.TimeoutExpired as late:
        pytest.fail(f"still running after {LIMIT} s, at {(late.stdout or b'').decode().splitlines()[-1:]}")
    assert ended.returncode == 0, ended.stdout[-500:] + ended.stderr[-3000:]
    checked = {line.split(":")[0] for line in ended.stdout.splitlines()}
    assert checked >= {"soap", "shampoo", "dion", "galore", "low_rank(lion)", "muon, spectral"}


@pytest.mark.parametrize("decompose", [singular_vectors, orthonormal, eigenvectors, spectral])
def test_a_matrix_that_is_not_finite_has_values_of_nan_and_vectors_of_zeros(decompose):
    x = jnp.asarray(np.random.RandomState(0).standard_normal((3, 4, 4)), jnp.float32)
    x = x + jnp.swapaxes(x, -1, -2)
    plain, zeros = jax.tree.leaves(decompose(x)), jax.tree.leaves(decompose(jnp.zeros((4, 4))))
    for bad in (jnp.inf, jnp.nan):
        parts = jax.tree.leaves(decompose(x.at[1, 0, 3].set(bad)))
        for part, whole, zero in zip(parts, plain, zeros, strict=True):
            matrix = part.ndim == 3 and decompose is not spectral
            np.testing.assert_array_equal(part[1], zero if matrix else jnp.full_like(zero, jnp.nan))
            np.testing.assert_array_equal(part[::2], whole[::2])


def test_a_matrix_that_overflows_when_added_to_its_transpose_has_no_eigenvalues():
    values, _ = eigenvectors(jnp.full((2, 2), 3e38, jnp.float32))
    assert bool(jnp.all(jnp.isnan(values)))


def test_decompositions_are_called_in_one_place():
    called = re.compile(r"\b(jnp|jax|jsp|lax)(\.\w+)?\.linalg\.(?!norm\b|cho_solve\b|triangular_solve\b)\w+")
    package = pathlib.Path(jaxsgd.__file__).parent
    files = {path.name for path in package.rglob("*.py") if called.search(path.read_text())}
    assert files == {"matrices.py"}, "use jaxsgd.matrices, which passes finite matrices only"


def batches(f, *args):
    """The decompositions by LAPACK in a program for CPU, and those of them with several matrices."""
    program = jax.jit(f).trace(*args).lower(lowering_platforms=("cpu",)).as_text()
    calls = re.findall(r"@lapack_(?!\w+trsm)\w+_ffi\(.*?: \((.*?)\) ->", program)
    shapes = [[int(n) for n in re.findall(r"(\d+)x", kinds.split(", ")[0])] for kinds in calls]
    assert all(len(shape) >= 2 for shape in shapes)
    return shapes, [shape for shape in shapes if np.prod(shape[:-2]) > 1]


def decomposing():
    """The transformations whose rule is in a file that takes parts from `jaxsgd.matrices`, where decompositions are."""
    files = {name: inspect.getsource(inspect.getmodule(rule.fn)) for name, rule in RULES.items()}
    return [name for name in transformations() if "jaxsgd.matrices" in files.get(name, "jaxsgd.matrices")]


@pytest.mark.parametrize("name", decomposing())
def test_rules_decompose_one_matrix_at_a_time_on_cpu(name):
    tx, p = transformations()[name](), params()
    two = jax.tree.map(lambda leaf: jnp.stack([leaf, leaf]), p)
    for f, args in (
        (lambda grads: stepper(tx)(grads, tx.init(p), p), p),
        (jax.vmap(lambda grads: stepper(tx)(grads, tx.init(p), p)), two),
    ):
        calls, several = batches(f, args)
        assert bool(calls) == decomposes(tx) and not several


BOX = (-jnp.ones(3), jnp.ones(3))


FITS = {f"{method}, {kind}": (method, box) for method in SQUARES for kind, box in (("free", None), ("bounded", BOX))}
SOON = ("lm, free", "gauss_newton, bounded")


@pytest.mark.parametrize(
    ("method", "bounds"),
    [pytest.param(*how, marks=[pytest.mark.slow] * (name not in SOON), id=name) for name, how in FITS.items()],
)
def test_fits_decompose_one_matrix_at_a_time_on_cpu(method, bounds):
    def fit(start):
        return jaxsgd.least_squares(
            lambda p: jnp.cos(p * jnp.arange(8.0)[:, None]).sum(1), start, method=method, bounds=bounds
        )

    calls, several = batches(jax.vmap(fit), 0.1 * jnp.ones((2, 3)))
    assert calls and not several


@pytest.mark.parametrize("method", ["newton", "trust_region", "lbfgsb"])
def test_minimizations_decompose_one_matrix_at_a_time_on_cpu(method):
    def end(start):
        bounds = BOX if method == "lbfgsb" else None
        return jaxsgd.minimize(lambda p: jnp.sum(jnp.cos(p)), start, method=method, bounds=bounds)

    calls, several = batches(jax.vmap(end), 0.1 * jnp.ones((2, 3)))
    assert calls and not several


@pytest.mark.parametrize(
    "decompose", [singular_vectors, orthonormal, eigenvectors, spectral, cholesky, triangle, inverse]
)
def test_a_batch_is_decomposed_as_its_matrices_are(decompose):
    x = jnp.asarray(np.random.RandomState(0).standard_normal((2, 3, 4, 4)), jnp.float32)
    x = x @ jnp.swapaxes(x, -1, -2)
    whole, mapped = decompose(x), jax.vmap(jax.vmap(decompose))(x)
    single = jax.tree.map(
        lambda *parts: jnp.stack(parts).reshape(2, 3, *parts[0].shape), *map(decompose, x.reshape(6, 4, 4))
    )
    jax.tree.map(np.testing.assert_array_equal, whole, single)
    jax.tree.map(np.testing.assert_array_equal, mapped, single)


@pytest.mark.parametrize("decompose", [orthonormal, eigenvectors, cholesky, inverse])
@pytest.mark.usefixtures("x64")
def test_a_decomposition_has_both_derivatives(decompose):
    x = jnp.asarray(np.random.RandomState(0).standard_normal((2, 3, 3)), jnp.float64)
    x = x @ jnp.swapaxes(x, -1, -2)
    check_grads(lambda x: jax.tree.map(jnp.abs, decompose(x)), (x,), 1, ["fwd", "rev"])


if __name__ == "__main__":
    for name, make in transformations().items():
        tx = make()
        survive(name, tx)
        if decomposes(tx):
            check(name, tx)
