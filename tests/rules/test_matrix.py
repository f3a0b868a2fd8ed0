"""Rules on matrices: what is orthogonalised, what goes to Adam, and optax.contrib.muon's every argument."""

import re

import jax
import jax.numpy as jnp
import laws
import numpy as np
import optax
import pytest
import twins_matrix
from jax.sharding import AxisType, NamedSharding, PartitionSpec
from optax.contrib import MuonDimensionNumbers

import jaxsgd
from jaxsgd.matrices import PRECONDITIONINGS, PRESETS, as_matrices, eigenbasis, newton_schulz, rotated, table_of
from jaxsgd.rules.matrix import muon, muon_jordan, optax_muon, soap

pytestmark = pytest.mark.slow  # a minute on two cores; CI runs it

RATE = laws.RATE


def same(ours, theirs, seed=1, tolerance=1e-12):
    """Two transformations walk the same path."""
    params, grads = laws.tree(seed), laws.gradients(seed + 1)
    a, b = (jax.device_get(laws.walk(tx)(params, grads))[0] for tx in (ours, theirs))
    assert laws.relative(a, b) <= tolerance


# -- Newton-Schulz -------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(16, 64), (2, 64, 16)])
@pytest.mark.parametrize("preset", PRESETS)
def test_steps_of_a_long_matrix_from_one_gram_matrix(x64, preset, shape):
    """The polynomial of each step, also where narrow types round small singular values away."""
    left, _, right = np.linalg.svd(np.random.RandomState(0).standard_normal(shape), full_matrices=False)
    x = (left * np.arange(1.0, 17) ** -1.5) @ right
    x /= np.linalg.norm(x, axis=(-2, -1), keepdims=True)
    expected = x
    for i in range(5):
        a, b, c = PRESETS[preset][min(i, len(PRESETS[preset]) - 1)]
        gram = expected @ expected.swapaxes(-1, -2)
        expected = a * expected + (b * gram + c * gram @ gram) @ expected
    # One step at a time is 1e-6 away in float32 and 0.08 in bfloat16; three from one Gram matrix diverge in bfloat16.
    for dtype, most in {"float64": 1e-13, "float32": 1e-5, "bfloat16": 0.1}.items():
        out = np.asarray(newton_schulz(jnp.asarray(x, dtype), PRESETS[preset], 5, eps=0.0), np.float64)
        assert np.linalg.norm(out - expected) < most * np.linalg.norm(expected), dtype


@pytest.mark.parametrize("kind", PRECONDITIONINGS)
@pytest.mark.parametrize("shape", [(5, 3), (3, 5), (4, 3, 2), (2, 2, 3, 6), (1, 1)])
def test_newton_schulz_is_a_polynomial_of_the_singular_values(x64, shape, kind):
    x = np.random.RandomState(0).standard_normal(shape)
    table, _ = table_of("standard")
    out = newton_schulz(jnp.asarray(x), table, 5, preconditioning=kind)
    for i in np.ndindex(shape[:-2]):
        expected = twins_matrix.orthogonalised(x[i], list(table) * 5, 1e-8, kind)
        np.testing.assert_allclose(out[i], expected, rtol=0, atol=1e-11)


@pytest.mark.parametrize(
    ("preset", "steps", "error"), [("standard", 5, 0.35), ("dion", 5, 0.1), ("polar_express", 8, 1e-4)]
)
def test_presets_lead_to_the_polar_factor(x64, preset, steps, error):
    rng = np.random.RandomState(0)
    left, right = (np.linalg.qr(rng.standard_normal((n, n)))[0] for n in (6, 4))
    x = (left[:, :4] * np.geomspace(1, 0.05, 4)) @ right
    out = np.asarray(newton_schulz(jnp.asarray(x), PRESETS[preset], steps))
    assert np.max(np.abs(np.linalg.svd(out, compute_uv=False) - 1)) < error
    np.testing.assert_allclose(out @ right.T @ left[:, :4].T, (out @ right.T @ left[:, :4].T).T, atol=1e-10)


def test_a_run_time_number_of_steps_is_the_same_loop(x64):
    x = jnp.asarray(np.random.RandomState(0).standard_normal((3, 4)))
    for preset in PRESETS.values():
        known = newton_schulz(x, preset, 6)
        np.testing.assert_allclose(jax.jit(newton_schulz)(x, preset, jnp.float32(6)), known, rtol=1e-12)


def test_complex_matrices_turn_with_their_phase():
    rng = np.random.RandomState(0)
    z = jnp.asarray(rng.standard_normal((4, 3)) + 1j * rng.standard_normal((4, 3)), jnp.complex64)
    turn = jnp.exp(1j * jnp.float32(0.7)).astype(jnp.complex64)
    for kind in PRECONDITIONINGS:
        u = newton_schulz(z, PRESETS["polar_express"], 8, preconditioning=kind)
        np.testing.assert_allclose(u.conj().T @ u, np.eye(3), atol=1e-3)
        np.testing.assert_allclose(
            newton_schulz(turn * z, PRESETS["polar_express"], 8, preconditioning=kind), turn * u, atol=1e-4
        )


@pytest.mark.parametrize("kind", PRECONDITIONINGS[:1] + PRECONDITIONINGS[2:])
def test_a_zero_matrix_stays_zero_and_has_a_derivative(kind):
    f = lambda x: newton_schulz(x, PRESETS["standard"], 5, preconditioning=kind)
    value, tangent = jax.jvp(f, (jnp.zeros((3, 2)),), (jnp.ones((3, 2)),))
    assert np.all(value == 0) and np.all(np.isfinite(tangent))


@pytest.mark.parametrize("kind", PRECONDITIONINGS)
def test_small_gradients_are_scaled_like_large_ones(kind):
    x = jnp.asarray(np.random.RandomState(0).standard_normal((4, 3)), jnp.float32)
    large, small = (newton_schulz(s * x, PRESETS["standard"], 5, preconditioning=kind) for s in (1.0, 1e-6))
    np.testing.assert_allclose(small, large, rtol=0.05)


def test_matrices_and_back():
    x = jnp.arange(2.0 * 3 * 4 * 5).reshape(2, 3, 4, 5)
    for rows, columns, shape in [((2,), (3,), (2, 3, 4, 5)), ((0, 1, 2), (3,), (24, 5)), ((1,), (0, 3), (4, 3, 10))]:
        matrices, back = as_matrices(x, rows, columns)
        assert matrices.shape == shape
        np.testing.assert_array_equal(back(matrices), x)


# -- Muon against optax --------------------------------------------------------------------------

TABLE = ((4.0, -6.5, 2.9), (3.9, -6.2, 2.6), (2.9, -3.1, 1.2))


@pytest.mark.parametrize(
    "arguments",
    [
        {"ns_coeffs": "dion"},
        {"ns_coeffs": "standard"},
        {"ns_coeffs": TABLE},
        {"ns_coeffs": (3.0, -3.2, 1.2), "ns_steps": 7},
        *({"preconditioning": kind} for kind in PRECONDITIONINGS),
        {"preconditioning": "aol", "ns_coeffs": "dion"},
        {"weight_decay": 0.1, "adam_weight_decay": 0.3},
        {"weight_decay": 0.1, "weight_decay_mask": {"scalar": True, "vector": False, "matrix": False, "cube": True}},
        {"adam_learning_rate": 0.01},
        {"adam_learning_rate": lambda count: 0.1 / (1 + count)},
        {"mu_dtype": jnp.float32},
        {"consistent_rms": 0.2},
        {"adaptive": True, "nesterov": False},
        {
            "muon_weight_dimension_numbers": {
                "scalar": None, "vector": None,
                "matrix": MuonDimensionNumbers(1, 0), "cube": MuonDimensionNumbers((0, -1), 1),
            }
        },
        {
            "muon_weight_dimension_numbers": lambda ps: {
                k: MuonDimensionNumbers((1,), (0, 2)) if k == "cube" else None for k in ps
            }
        },
    ],
    ids=lambda arguments: ",".join(arguments),
)  # fmt: skip
def test_a_call_for_optax_walks_the_same_path(x64, arguments):
    tolerance = 1e-6 if "mu_dtype" in arguments else 1e-12  # float32 rounds where it may
    same(optax_muon(RATE, **arguments), optax.contrib.muon(RATE, **arguments), tolerance=tolerance)


def test_positional_arguments_are_those_of_optax(x64):
    arguments = (RATE, "dion", 5, 0.9, 1e-6, 0.1, None, None)
    same(optax_muon(*arguments), optax.contrib.muon(*arguments))


def test_polar_express_is_the_papers_loop(x64):
    x = np.random.RandomState(3).standard_normal((6, 4))
    first = (
        (8.28721201814563, -23.595886519098837, 17.300387312530933),
        (4.107059111542203, -2.9478499167379106, 0.5448431082926601),
    )
    y = x.T / (1.01 * np.linalg.norm(x))
    for a, b, c in first:
        gram = y @ y.T
        y = a / 1.01 * y + (b / 1.01**3 * gram + c / 1.01**5 * gram @ gram) @ y
    np.testing.assert_allclose(newton_schulz(jnp.asarray(x), PRESETS["polar_express"], 2), y.T, atol=1e-7)


def test_the_dual_norm_is_of_each_matrix(x64):
    params, grads = laws.tree(1)["cube"], laws.gradients(2)["cube"]
    whole = jax.device_get(laws.walk(muon(RATE, adaptive=True))(params, grads))[0]
    for i in range(len(params)):
        alone = jax.device_get(laws.walk(muon(RATE, adaptive=True))(params[i], grads[:, i]))[0]
        np.testing.assert_allclose(whole[:, i], alone, rtol=1e-12)


# -- who gets what -------------------------------------------------------------------------------

HIDDEN = [
    "Dense_0/kernel", "layers/mlp/up_proj/kernel", "blocks/attn/out/kernel",
    "MultiHeadDotProductAttention_0/out/kernel",
    "multi_head/w", "encoder/member/kernel", "token_mixing/Dense_0/kernel", "attention_head/kernel", "beta_net/kernel",
]  # fmt: skip
OTHERS = [
    "Embed_0/embedding", "wte/embedding", "wpe", "embed_tokens/weight", "pos_embedding",
    "PatchEmbed_0/kernel", "tok_emb", "cls_token", "lm_head/kernel", "head/kernel", "LMHead_0/kernel", "logits/kernel",
    "classifier/kernel", "unembed/kernel",
    "LayerNorm_0/scale", "norm/weight", "ln_f/g", "ln_1/w", "attention/query/bias", "Dense_0/bias", "linear/b",
]  # fmt: skip


def adams(tx, params):
    """The names of the leaves that Adam updates."""
    return {k for k, nu in tx.init(params).slots["nu"].items() if nu is not None}


def test_pain_12_names_decide_for_matrices():
    params = {name: jnp.ones((3, 2)) for name in (*HIDDEN, *OTHERS)}
    assert adams(muon(RATE), params) == set(OTHERS)
    assert adams(optax_muon(RATE), params) == set()
    assert adams(muon(RATE, adam="mlp"), params) == {"layers/mlp/up_proj/kernel"}
    assert adams(muon(RATE, adam=lambda name, leaf: leaf.shape == (3, 2)), params) == set(params)
    assert adams(muon(RATE), {k: jnp.ones(3) for k in params}) == set(params)
    assert adams(muon(RATE), {"kernel": jnp.ones((0, 2))}) == {"kernel"}


def test_pain_12_the_heads_of_query_key_and_value_are_outputs():
    g = jnp.asarray(np.random.RandomState(0).standard_normal((8, 2, 4)), jnp.float32)
    tx = muon(1.0, ns_coeffs="polar_express", ns_steps=8, adam="^$")
    for name, shape in [("attn/query/kernel", (8, 8)), ("attn/out/kernel", (8, 2, 4))]:
        u = tx.update({name: g}, tx.init({name: g}), {name: g})[0][name].reshape(shape)
        u = u / np.sqrt(max(1, shape[-1] / shape[-2]))
        gram = u @ np.swapaxes(u, -1, -2)
        np.testing.assert_allclose(gram, np.broadcast_to(np.eye(shape[-2]), gram.shape), atol=2e-2)


def test_pain_12_groups_and_describe_see_the_routing():
    params = {"Dense_0": {"kernel": jnp.ones((3, 2)), "bias": jnp.ones(2)}, "head": {"kernel": jnp.ones((2, 2))}}
    tx = muon(0.02, weight_decay=0.1, adam_learning_rate=1e-3, groups=[("head", {"lr_mult": 2.0, "weight_decay": 0.5})])
    rows = {line.split()[0]: line for line in str(jaxsgd.describe(tx, params)).splitlines()[1:-1]}
    assert (
        "0.02" in rows["Dense_0/kernel"]
        and "0.1" in rows["Dense_0/kernel"]
        and "axes=((0,), (1,))" in rows["Dense_0/kernel"]
    )
    assert "0.001 x 2" in rows["head/kernel"] and "0.5" in rows["head/kernel"]
    assert "0.001" in rows["Dense_0/bias"] and "0.1" not in rows["Dense_0/bias"]
    zeros = jax.tree.map(jnp.zeros_like, params)
    updates, _ = tx.update(zeros, tx.init(params), params)
    np.testing.assert_allclose(updates["head"]["kernel"], -2e-3 * 0.5, rtol=1e-6)
    np.testing.assert_allclose(updates["Dense_0"]["kernel"], -0.02 * 0.1, rtol=1e-6)
    assert np.all(updates["Dense_0"]["bias"] == 0)


@pytest.mark.parametrize(
    ("shape", "split"), [((256, 512), ("data", None)), ((64, 64), ("data", None)), ((16, 32, 64), (None, "data", None))]
)
def test_pain_12_a_split_matrix_is_gathered_once(shape, split):
    mesh = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,))
    there = NamedSharding(mesh, PartitionSpec(*split))
    params = jax.device_put(
        {"kernel": jnp.asarray(np.random.RandomState(0).standard_normal(shape), jnp.float32)}, there
    )

    def moved(tx):
        state = jax.device_put(tx.init(params), jax.tree.map(lambda x: there if x.ndim else None, tx.init(params)))
        compiled = jax.jit(tx.update).lower(params, state, params).compile()
        counted = len(re.findall(r" = \S+ (?:all-gather|all-to-all)(?:-start)?\(", compiled.as_text()))
        return counted, compiled(params, state, params)[0]["kernel"]

    many, without = moved(muon(RATE))
    few, gathered = moved(muon(RATE, mesh=mesh))
    assert many == 15 and few <= 2, "three a step of five; one on the way in, and at most one on the way out"
    np.testing.assert_allclose(gathered, without, rtol=1e-4, atol=1e-5)


RANK = {"galore": {"rank": 4}, "apollo": {"rank": 4}}
MATRIX_RULES = [
    "muon", "optax_muon", "normuon", "adamuon", "dion", "soap", "shampoo", "kron", "galore", "apollo", "apollo_mini",
]  # fmt: skip


@pytest.mark.parametrize("split", [("data",), (None, "data")], ids=str)
@pytest.mark.parametrize("name", MATRIX_RULES)
def test_explicit_axes_are_kept_and_change_nothing(name, split):
    mesh, rng = jax.make_mesh((8,), ("data",)), np.random.RandomState(0)
    tx = jaxsgd.RULES[name](0.05, **RANK.get(name, {}))
    whole = {"w": (16, 8), "stack": (8, 16, 8), "b": (8,)}
    whole = {k: jnp.asarray(rng.standard_normal(shape), jnp.float32) for k, shape in whole.items()}
    with jax.set_mesh(mesh):
        there = {"w": PartitionSpec(*split), "stack": PartitionSpec(*split), "b": PartitionSpec()}
        params = {k: jax.device_put(x, NamedSharding(mesh, there[k])) for k, x in whole.items()}
        first = tx.init(params)
        _, state = tx.update(params, first, params)
        updates, after = tx.update(params, state, params)
        assert jax.tree.map(jax.typeof, updates) == jax.tree.map(jax.typeof, params)
        assert jax.tree.map(jax.typeof, after) == jax.tree.map(jax.typeof, first)
    _, state = tx.update(whole, tx.init(whole), whole)
    expected, _ = tx.update(whole, state, whole)
    for k in params:
        np.testing.assert_allclose(updates[k], expected[k], atol=2e-6)  # sums over shards round differently


@pytest.mark.parametrize("name", ["muon_jordan", *MATRIX_RULES])
def test_a_rate_of_zero_moves_nothing(name):
    given = {"adam_learning_rate": None} if name == "muon_jordan" else {}  # it has a rate of its own for Adam's leaves
    params = {"w": jnp.ones((5, 3)), "b": jnp.ones(3)}
    tx = jaxsgd.RULES[name](0.0, weight_decay=0.1, **given)
    state = tx.init(params)
    for _ in range(2):
        updates, state = tx.update(params, state, params)
        assert all(np.all(u == 0) for u in jax.tree.leaves(updates))


def test_a_frozen_matrix_and_a_new_learning_rate():
    params = {"a": jnp.ones((3, 2)), "b": jnp.eye(2)}
    tx = muon(0.02, groups=[("^a$", {"frozen": True})])
    state = jaxsgd.with_hyper(tx.init(params), learning_rate=0.5)
    updates, _ = tx.update(params, state, params)
    assert np.all(updates["a"] == 0)
    slow, _ = tx.update(params, tx.init(params), params)
    np.testing.assert_allclose(updates["b"], 25 * slow["b"], rtol=1e-5)


def test_jordans_leaves_have_two_learning_rates():
    params = {"w": jnp.eye(4), "b": jnp.ones(4)}
    updates, _ = (tx := muon_jordan()).update(params, tx.init(params), params)
    np.testing.assert_allclose(updates["b"], -3e-4, rtol=1e-4)
    assert 0.7 * 0.02 < float(-updates["w"][0, 0]) < 1.3 * 0.02


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"ns_coeffs": "jordan"}, "known presets are standard"),
        ({"ns_coeffs": (1.0, 2.0)}, r"\(a, b, c\)"),
        ({"ns_coeffs": ()}, r"\(a, b, c\)"),
        ({"preconditioning": "frobenus"}, "did you mean 'frobenius'"),
        ({"adam_learning_rate": -1.0}, "adam_learning_rate=-1.0: it must be 0 or more"),
        ({"adam_weight_decay": -1.0}, "adam_weight_decay"),
        ({"beta": 1.0}, "beta=1.0"),
    ],
)
def test_what_is_wrong_is_said_at_construction(arguments, message):
    with pytest.raises(ValueError, match=message):
        muon(RATE, **arguments)


@pytest.mark.parametrize("dimensions", [(0, 0), (0, 2), ((0, 1), ()), (0, -3)])
def test_wrong_dimension_numbers_are_named(dimensions):
    tx = muon(RATE, muon_weight_dimension_numbers={"w": MuonDimensionNumbers(*dimensions)})
    with pytest.raises(ValueError, match=r"muon_weight_dimension_numbers: 'w' of shape \(3, 2\)"):
        tx.init({"w": jnp.ones((3, 2))})


# -- SOAP ----------------------------------------------------------------------------------------


def test_eigenbasis_of_low_rank_does_not_depend_on_rounding(x64):
    g = np.random.RandomState(0).standard_normal((6, 2))
    bases = [np.abs(eigenbasis(jnp.asarray(x @ x.T))) for x in (g, g * (1 + 1e-15), g[:, ::-1])]
    for basis in bases[1:]:
        np.testing.assert_allclose(basis, bases[0], atol=1e-12)
    q = eigenbasis(jnp.asarray(g @ g.T))
    np.testing.assert_allclose(q.T @ q, np.eye(6), atol=1e-14)
    turned = q.T @ (g @ g.T) @ q
    np.testing.assert_allclose(turned, np.diag(np.diag(turned)), atol=1e-13)
    np.testing.assert_array_equal(eigenbasis(jnp.zeros((2, 3, 3))), np.broadcast_to(np.eye(3), (2, 3, 3)))


def test_rounding_is_no_signal():
    g = jnp.asarray(np.outer(np.arange(1, 6), np.arange(1, 4)), jnp.float32)  # of rank 1
    turned = rotated(g, eigenbasis(g @ g.T), eigenbasis(g.T @ g))
    assert np.count_nonzero(turned) == 1


def test_soaps_first_step_only_looks():
    params = {"w": jnp.ones((3, 2)), "b": jnp.ones(2)}
    tx = soap()
    updates, state = tx.update(params, tx.init(params), params)
    assert all(np.all(u == 0) for u in jax.tree.leaves(updates))
    assert np.any(state.slots["left"]["w"] != 0) and state.slots["left"]["b"] is None
    updates, _ = tx.update(params, state, params)
    assert all(np.all(u != 0) for u in jax.tree.leaves(updates))


def test_long_axes_are_not_rotated():
    state = soap(max_precond_dim=4).init({"w": jnp.ones((5, 3))})
    assert state.slots["left"]["w"] is None and state.slots["right"]["w"].shape == (3, 3)
