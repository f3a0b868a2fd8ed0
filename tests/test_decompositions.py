"""No decomposition sees a number that is not finite: inf and NaN never hang, at any step, and stay in their matrix.

`jnp.linalg.svd` on CPU never returns for a small matrix with an inf, so the steps run in a process with a time limit.
"""

import functools
import pathlib
import re
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.extend.core import jaxpr_as_fun  # noqa: F401  # jax.extend must be imported to read primitives

import jaxsgd
from jaxsgd import RULES, galore, kron, low_rank, muon
from jaxsgd.matrices import on_finite, singular_vectors
from jaxsgd.rules.lowrank import GaLoreDimensionNumbers

LIMIT = 900
"""Seconds for the process: it takes about 100 on two idle cores."""
STEPS, CLEAN = 15, 2
"""Steps with a gradient that is not finite, after some that are."""
OFTEN = {"precondition_frequency": 3, "update_proj_gap": 4, "rank": 2}
"""Settings under which a walk of 15 steps decomposes several times."""
DECOMPOSITIONS = re.compile(r"\b(svd|eigh|householder_product|geqrf|cholesky|lu|schur|eig)\b")
BAD = {"inf": np.inf, "nan": np.nan, "overflow": 1e30}


def transformations():
    """Every rule that decomposes, by name, and variants of some."""
    made = {}
    for name, rule in RULES.items():
        often = {key: value for key, value in OFTEN.items() if key in rule.defaults}
        made[name] = functools.partial(rule, 0.1, **often)
    made["muon, spectral"] = functools.partial(muon, 0.1, preconditioning="spectral")
    made["kron, a batch"] = functools.partial(kron, 0.1, merge_dims=False)
    made["galore, short"] = functools.partial(galore, 0.1, rank=2, update_proj_gap=4, side="short")
    numbers = GaLoreDimensionNumbers(-2, -1)
    made["galore, a batch"] = functools.partial(
        galore, 0.1, rank=2, update_proj_gap=4, weight_dimension_numbers=numbers
    )
    made["low_rank(lion)"] = functools.partial(low_rank(jaxsgd.lion), 0.1, rank=2, update_proj_gap=4)
    return made


INDEPENDENT = ("kron", "galore", "galore, short", "low_rank(lion)")
"""These see a stack as one matrix, or not as a matrix at all."""


def params():
    rng = np.random.RandomState(0)
    shapes = {"small": (5, 3), "large": (64, 48), "other": (4, 6), "stack": (3, 5, 4), "vector": (7,)}
    return {name: jnp.asarray(rng.standard_normal(shape), jnp.float32) for name, shape in shapes.items()}


def poisoned(grads, value):
    """One number of two matrices, and of the middle one of a stack, is ``value``."""
    return {
        **grads,
        "small": grads["small"].at[1, 2].set(value),
        "large": grads["large"].at[10, 7].set(value),
        "stack": grads["stack"].at[1, 2, 3].set(value),
    }


def stepped(tx, p, bad):
    return tx.update(poisoned(p, bad) if bad is not None else p, tx.init(p), p, value=jnp.float32(1.0))


def decomposes(make):
    """Whether the program of an update has a decomposition in it."""
    p = params()
    extra = {"value": jnp.float32(1.0), "obj_fn": lambda q: sum(jnp.sum(x**2) for x in q.values())}
    tx = make()
    return bool(DECOMPOSITIONS.search(str(jax.make_jaxpr(lambda s: tx.update(p, s, p, **extra))(tx.init(p)))))


def walk(tx, p, bad):
    """The updates of the last step, after ``CLEAN`` clean steps and ``STEPS`` others."""
    state = tx.init(p)

    def step(state, t):
        grads = jax.tree.map(lambda clean, other: jnp.where(t < CLEAN, clean, other), p, poisoned(p, bad))
        updates, state = tx.update(grads, state, p)
        return state, updates

    _, updates = jax.lax.scan(step, state, jnp.arange(CLEAN + STEPS))
    return jax.tree.map(lambda u: u[-1], updates)


def check(name, tx):
    p = params()
    compiled = jax.jit(functools.partial(walk, tx, p))
    clean = compiled(p["small"][1, 2])  # nearly: this number stands in three places
    for kind, bad in BAD.items():
        print(name, kind, flush=True)
        updates = compiled(jnp.float32(bad))
        for leaf in ("small", "large", "stack"):
            if kind != "overflow":
                assert not jnp.all(jnp.isfinite(updates[leaf])), f"{name}: {kind} left no trace in {leaf}"
        for leaf in ("other", "vector"):
            assert jnp.all(jnp.isfinite(updates[leaf])), f"{name}: {kind} spread to {leaf}"
        if name not in INDEPENDENT:
            for i in (0, 2):
                np.testing.assert_allclose(updates["stack"][i], clean["stack"][i], rtol=1e-4, atol=1e-6, err_msg=name)
        state = tx.init(p)
        for _ in range(STEPS):
            _, state = tx.update(poisoned(p, bad), state, p)


@pytest.mark.slow
@pytest.mark.processes
def test_inf_and_nan_never_hang():
    try:
        found = subprocess.run([sys.executable, __file__], capture_output=True, text=True, timeout=LIMIT)
    except subprocess.TimeoutExpired as late:
        pytest.fail(f"still running after {LIMIT} s, at {(late.stdout or b'').decode().splitlines()[-1:]}")
    assert found.returncode == 0, found.stdout[-500:] + found.stderr[-3000:]
    seen = {line.split(",")[0].split()[0] for line in found.stdout.splitlines()}
    assert {"muon", "soap", "shampoo", "dion", "galore"} <= seen


def test_a_matrix_that_is_not_finite_has_a_decomposition_of_nan():
    x = jnp.asarray(np.random.RandomState(0).standard_normal((3, 4, 3)), jnp.float32).at[1, 0, 0].set(jnp.inf)
    u, s, vh = singular_vectors(x)
    assert all(bool(jnp.all(jnp.isnan(part[1]))) for part in (u, s, vh))
    for i in (0, 2):
        np.testing.assert_array_equal(s[i], jnp.linalg.svd(x[i], full_matrices=False)[1])
    values, _ = on_finite(jnp.linalg.eigh, jnp.full((2, 2), 3e38))  # finite, but not when added to its transpose
    assert bool(jnp.all(jnp.isnan(values)))


def test_decompositions_are_called_in_one_place():
    package = pathlib.Path(jaxsgd.__file__).parent
    pattern = re.compile(r"(?<!np\.)\blinalg\.(?!norm\b|triangular_solve\b)\w+")
    calls = {
        f"{path.name}: {line.strip()}"
        for path in package.rglob("*.py")
        for line in path.read_text().splitlines()
        if pattern.search(line) and "on_finite" not in line and "np.linalg" not in line.replace("jnp.linalg", "")
    }
    assert {call for call in calls if "`" not in call} == set()


if __name__ == "__main__":
    for name, make in transformations().items():
        if decomposes(make):
            check(name, make())
