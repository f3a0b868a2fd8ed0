"""NorMuon, AdaMuon, Dion and PSGD Kron: against others' packages, and what each of them is for."""

import functools

import jax
import jax.numpy as jnp
import laws
import muon_kin_cases as recorded
import numpy as np
import optax
import pytest
import twins_psgd
from optax.contrib import MuonDimensionNumbers

from jaxsgd.rules import psgd
from jaxsgd.rules.muon_kin import adamuon, dion, normuon
from jaxsgd.rules.psgd import kron

pytestmark = pytest.mark.slow  # most of a minute; CI runs it

RATE = 0.05
RULES = {"normuon": normuon, "adamuon": adamuon, "dion": dion, "kron": kron}


def visited(tx, params, grads):
    return jax.device_get(laws.walk(tx)(params, grads))[0]


def step(tx, g, params=None, state=None):
    """``(update, state)`` of one gradient."""
    params = jax.tree.map(jnp.zeros_like, g) if params is None else params
    return tx.update(g, tx.init(params) if state is None else state, params)


def rms(x):
    return float(np.sqrt(np.mean(np.square(x))))


def matrices(*shape, seed=0):
    return jnp.asarray(np.random.RandomState(seed).standard_normal(shape))


# -- against others' packages ----------------------------------------------------------------------


@functools.cache
def walker(rule, ours, leaves):
    """One compiled walk for the cases that differ in their gradients alone."""
    ours = dict(ours)
    falling = ours.get("preconditioner_update_probability", ())
    if isinstance(falling, tuple) and (falling := dict(falling)):  # kron_torch's schedule, of the same three numbers
        rate = lambda n: jnp.exp(-falling["decay"] * (n.astype(jnp.float32) - falling["flat_start"]))
        ours["preconditioner_update_probability"] = lambda n: jnp.clip(rate(n), falling["min_prob"], 1)
    if rule == "kron":
        ours["mask"] = {leaf: dimensions > 1 for leaf, dimensions in leaves}  # as it decays weights
    return laws.walk(RULES[rule](RATE, **ours))


def frozen(value):
    return tuple(sorted((k, frozen(v)) for k, v in value.items())) if isinstance(value, dict) else value


@pytest.mark.parametrize("name", recorded.CASES)
def test_recorded(x64, name):
    case = recorded.CASES[name]
    walk = walker(case.rule, frozen(case.ours), frozen({leaf: len(shape) for leaf, shape in case.shapes.items()}))
    points = jax.device_get(walk(*recorded.problem(case)))[0]
    kept = np.array(recorded.KEPT) - 1
    with np.load(recorded.FOLDER / f"{recorded.FILES[case.rule]}_trajectories.npz") as data:
        for leaf, value in points.items():
            theirs = data[f"{name}/{leaf}"]
            np.testing.assert_allclose(value[kept], theirs, rtol=0, atol=1e-9 * np.abs(theirs).max(), err_msg=leaf)


# -- what each is for --------------------------------------------------------------------------------


def quadratic():
    """A quadratic of a matrix with condition number 1e6."""
    rng = np.random.RandomState(0)
    left, right = (np.linalg.qr(rng.standard_normal((n, n)))[0] for n in (8, 6))
    a, b, target = left * np.geomspace(1, 0.01, 8), right * np.geomspace(1, 0.1, 6), rng.standard_normal((8, 6))
    return lambda p: jnp.sum((a.T @ (p["w"] - target) @ b) ** 2) / 2, {"w": jnp.zeros((8, 6))}


def network():
    """A regression by a network with one hidden layer."""
    rng = np.random.RandomState(0)
    x = rng.standard_normal((64, 8))
    y = np.sin(x @ rng.standard_normal((8, 3)))
    params = {
        "in": {"kernel": rng.standard_normal((8, 16)) / 3, "bias": np.zeros(16)},
        "out": {"kernel": rng.standard_normal((16, 3)) / 4, "bias": np.zeros(3)},
    }

    def loss(p):
        hidden = jnp.tanh(x @ p["in"]["kernel"] + p["in"]["bias"])
        return jnp.mean((hidden @ p["out"]["kernel"] + p["out"]["bias"] - y) ** 2)

    return loss, jax.tree.map(jnp.asarray, params)


def fallen(tx, problem, steps=300):
    """The loss at the start over that at the end."""
    loss, params = problem

    @jax.jit
    def run(params):
        def step(carry, _):
            p, state = carry
            updates, state = tx.update(jax.grad(loss)(p), state, p)
            return (optax.apply_updates(p, updates), state), None

        (end, _), _ = jax.lax.scan(step, (params, tx.init(params)), length=steps)
        return loss(params) / loss(end)

    return float(run(params))


@pytest.mark.parametrize(
    ("name", "rate", "on_quadratic", "on_network"),
    # Measured: 3,690,000 and 282; 970 and 341; 59,900 and 198; 251,000 and 3,350. Adam at its best: 1,660 and 161.
    [("normuon", 0.1, 5e5, 100), ("adamuon", 0.1, 300, 100), ("dion", 0.1, 1e4, 60), ("kron", 0.03, 5e4, 1000)],
)
def test_losses_fall(x64, name, rate, on_quadratic, on_network):
    tx = RULES[name](optax.linear_schedule(rate, 0, 300), weight_decay=0.0)
    assert fallen(tx, quadratic()) > on_quadratic
    assert fallen(tx, network()) > on_network


# -- Muon's routing --------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["normuon", "adamuon", "dion"])
def test_names_and_shapes_decide_who_is_adams(x64, name):
    params = {"Dense_0/kernel": jnp.zeros((3, 2)), "lm_head/kernel": jnp.zeros((3, 2)), "gain": jnp.zeros(4)}
    grads = {n: matrices(*p.shape) for n, p in params.items()}
    adam = {k: np.asarray(u) for k, u in step(optax.adam(1.0, 0.9, 0.95, eps=1e-10), grads)[0].items()}
    updates, _ = step(RULES[name](1.0, adam_eps=1e-10), grads)
    same = {n for n in params if np.allclose(updates[n], adam[n], rtol=1e-12, atol=0)}
    assert same == set(params) - {"Dense_0/kernel"}
    everyone, _ = step(RULES[name](1.0, adam=lambda name, leaf: False), grads)
    assert not np.allclose(everyone["lm_head/kernel"], adam["lm_head/kernel"], rtol=0.01)
    rates, _ = step(RULES[name](1.0, adam_learning_rate=1e-3, adam_eps=1e-10), grads)
    np.testing.assert_allclose(rates["gain"], 1e-3 * adam["gain"], rtol=1e-12)
    np.testing.assert_array_equal(rates["Dense_0/kernel"], updates["Dense_0/kernel"])


@pytest.mark.parametrize("name", ["normuon", "adamuon", "dion"])
def test_a_stack_is_its_layers(x64, name):
    params, grads = laws.tree(1)["cube"], laws.gradients(2)["cube"]
    whole = visited(RULES[name](RATE), {"stack": params}, {"stack": grads})["stack"]
    layers = lambda x, axis: {str(i): np.take(x, i, axis) for i in range(4)}
    alone = visited(RULES[name](RATE), layers(params, 0), layers(grads, 1))
    for i in range(4):
        np.testing.assert_allclose(whole[:, i], alone[str(i)], rtol=1e-12)


@pytest.mark.parametrize(
    ("name", "axes"),
    [
        ("normuon", MuonDimensionNumbers((0, 1), 2)),
        ("normuon", MuonDimensionNumbers(1, (0, 2))),
        ("adamuon", MuonDimensionNumbers(1, (0, 2))),
        ("dion", MuonDimensionNumbers(1, (0, 2))),
    ],
)
def test_dimension_numbers_say_what_is_a_matrix(x64, name, axes):
    params, grads = laws.tree(1)["cube"], laws.gradients(2)["cube"]
    if axes.reduction_axis == 1:
        turned = lambda x: np.moveaxis(x, -2, -3).reshape(*x.shape[:-3], 3, 8)
    else:
        turned = lambda x: x.reshape(*x.shape[:-3], 12, 2)
    whole = visited(RULES[name](RATE, muon_weight_dimension_numbers={"w": axes}), {"w": params}, {"w": grads})["w"]
    plain = visited(RULES[name](RATE), turned(params), turned(grads))
    np.testing.assert_allclose(turned(whole), plain, rtol=1e-11)


@pytest.mark.parametrize(("name", "preset"), [("normuon", "polar_express"), ("adamuon", "dion")])
def test_presets_of_newton_schulz(x64, name, preset):
    g = {"w": matrices(6, 4)}
    update, _ = step(RULES[name](1.0, ns_coeffs=preset, consistent_rms=0.2), g)
    assert rms(update["w"]) == pytest.approx(0.2, rel=1e-6)
    assert jnp.sum(update["w"] * g["w"]) < 0


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: normuon(RATE, ns_coeffs="jordan"), ValueError, "known presets are standard"),
        (lambda: adamuon(RATE, beta2=1.0), ValueError, "beta2=1.0"),
        (lambda: dion(rank_fraction=0.0), ValueError, "rank_fraction=0.0"),
        (lambda: dion(rank_fraction=1.5), ValueError, "rank_fraction=1.5"),
        (lambda: dion(key=0.5), TypeError, "key=0.5: a whole number"),
        (lambda: dion(ns_steps=3), TypeError, "unknown hyperparameter ns_steps=3"),
        (lambda: kron(key="a"), TypeError, "key='a': a whole number"),
        (lambda: kron(memory_save_mode="one_dag"), ValueError, "known are 'one_diag', 'smart_one_diag'"),
        (lambda: kron(preconditioner_update_probability=0.0), ValueError, "preconditioner_update_probability=0.0"),
    ],
)
def test_what_is_wrong_is_said_at_construction(call, error, message):
    with pytest.raises(error, match=message):
        call()


# -- NorMuon and AdaMuon ---------------------------------------------------------------------------


def test_normuons_neurons_step_alike(x64):
    g = {"w": matrices(9, 5) * np.geomspace(1, 1e-3, 5)}
    update, state = step(normuon(1.0, consistent_rms=0.1), g)
    np.testing.assert_allclose(np.sqrt(np.mean(np.square(update["w"]), axis=0)), 0.1, rtol=1e-6)
    assert state.slots["nu"]["w"].shape == (1, 5)
    kept, _ = step(normuon(1.0), g)
    np.testing.assert_allclose(kept["w"] / np.linalg.norm(kept["w"]), update["w"] / np.linalg.norm(update["w"]))
    assert 0.7 * 5**0.5 < np.linalg.norm(kept["w"]) < 1.2 * 5**0.5


def test_adamuons_orthogonal_update_depends_on_signs_alone(x64):
    g, size = matrices(4, 3), jnp.exp(2 * matrices(4, 3, seed=1))
    squares = lambda tx, g: step(tx, {"w": g})[1].slots["nu"]["w"]
    np.testing.assert_array_equal(squares(adamuon(1.0), g * size), squares(adamuon(1.0), g))
    plain = adamuon(1.0, sign=False)
    assert not np.allclose(squares(plain, g * size), squares(plain, g), rtol=0.01)


def test_adamuon_makes_no_step_of_rounding():
    # The middle of the polar factor's right column is 0, and Newton-Schulz leaves -1e-8 of float32 there.
    state, seen = None, [[-1.0, -1.0], [-1.0, 0.0], [-1.0, 1.0]]
    for _ in range(3):
        update, state = step(adamuon(1.0), {"w": jnp.asarray(seen)}, state=state)
    assert update["w"][1, 1] == 0 and update["w"][1, 0] > 0.1


# -- Dion ------------------------------------------------------------------------------------------


def test_full_rank_dion_finds_the_polar_factor(x64):
    # A constant gradient: the power iteration converges on its singular vectors.
    tx, g = dion(1.0, weight_decay=0.0), {"tall": matrices(6, 4), "wide": matrices(4, 6), "square": matrices(5, 5)}
    run = jax.jit(lambda s: jax.lax.scan(lambda s, _: tx.update(g, s, g)[::-1], s, length=200)[1])
    for name, update in run(tx.init(g)).items():
        left, _, right = np.linalg.svd(g[name], full_matrices=False)
        inputs, outputs = g[name].shape
        np.testing.assert_allclose(update[-1], -np.sqrt(outputs / inputs) * left @ right, atol=1e-5)


def test_dion_keeps_what_it_leaves_out(x64):
    g = {"w": matrices(12, 8)}
    tx = dion(1.0, rank_fraction=0.5, weight_decay=0.0)
    assert tx.init(g).slots["q"]["w"].shape == (8, 4)
    run = jax.jit(lambda s: jax.lax.scan(lambda s, _: tx.update(g, s, g)[::-1], s, length=400)[1])
    steps = np.asarray(run(tx.init(g))["w"])
    assert all(np.linalg.matrix_rank(u) == 4 for u in steps[::50])
    # Error feedback: in time every direction of the gradient has its turn.
    left, _, right = np.linalg.svd(g["w"], full_matrices=False)
    assert np.all(np.diag(left.T @ steps.sum(0) @ right.T) < -30)


def test_dion_does_not_depend_on_the_layout(x64):
    g = matrices(6, 4)
    one, _ = step(dion(1.0), {"w": g})
    other, _ = step(dion(1.0), {"w": g.T})
    np.testing.assert_allclose(one["w"] / np.sqrt(4 / 6), other["w"].T / np.sqrt(6 / 4), rtol=1e-12)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.float64])
def test_dion_makes_no_step_of_rounding(x64, dtype):
    rng = np.random.RandomState(0)
    u, v = (x / np.linalg.norm(x) for x in (rng.standard_normal(9), rng.standard_normal(6)))
    tx, state = dion(1.0, weight_decay=0.0), None
    g = {"w": jnp.asarray(3.0 * np.outer(u, v), dtype)}  # of rank 1
    for _ in range(5):
        update, state = step(tx, g, state=state)
        np.testing.assert_allclose(update["w"], -np.sqrt(6 / 9) * np.outer(u, v), atol=1e-5)
    new = {"w": jnp.asarray(rng.standard_normal((9, 6)), dtype)}  # the columns that waited serve again
    update, state = step(tx, new, state=state)
    assert np.linalg.matrix_rank(update["w"]) == 6
    assert all(np.all(np.isfinite(x)) for x in jax.tree.leaves(state))


def test_dions_groups_have_ranks_of_their_own():
    params = {"a": jnp.zeros((8, 6)), "c": jnp.zeros((3, 8, 6)), "bias": jnp.zeros(6)}
    state = dion(rank_fraction=0.5, groups=[("^c$", {"rank_fraction": 0.01})]).init(params)
    assert state.slots["q"]["a"].shape == (6, 3) and state.slots["q"]["c"].shape == (3, 6, 1)
    assert state.slots["q"]["bias"] is None and state.slots["nu"]["a"] is None
    assert dion(rank_fraction=0.7).init({"a": jnp.zeros((10, 10))}).slots["q"]["a"].shape == (10, 7)
    with pytest.raises(TypeError, match="rank_fraction decides the shape of the state"):
        jax.jit(lambda rank: dion(rank_fraction=rank).init(params))(0.5)


# -- PSGD Kron -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("leaf", "arguments"),
    [
        ("cube", {"merge_dims": False, "memory_save_mode": "one_diag"}),
        ("cube", {"merge_dims": False, "max_size_triangular": 2, "momentum_into_precond_update": False}),
        ("scalar", {"min_ndim_triangular": 0, "b1": 0.0}),
    ],
)
def test_kron_is_its_twin(x64, leaf, arguments):
    params, grads = ({leaf: tree[leaf]} for tree in (laws.tree(1), laws.gradients(2)))
    ours = visited(kron(RATE, **arguments), params, grads)[leaf]
    given = {k: kron.defaults[k] for k in kron.hyper} | arguments
    theirs = np.stack(twins_psgd.kron(params[leaf], grads[leaf], RATE, **given))
    np.testing.assert_allclose(ours, theirs, rtol=0, atol=1e-12 * np.abs(theirs).max())


def test_krons_schedule_is_that_of_kron_torch():
    # float32 decides here, as there: its own exponential may move a step by one.
    due, waited = [], 0
    for n in range(5000):
        waited += 1
        if waited >= 1 / min(max(np.exp(-0.001 * (n - 500)), 0.03), 1):
            due.append(n + 1)
            waited = 0

    def count(waited, t):
        made = psgd._due(waited, t=t, preconditioner_update_probability=None)
        return made["waited"], made["due"]

    with jax.enable_x64(True):
        ours = jax.lax.scan(count, jnp.zeros(()), jnp.arange(1.0, 5001.0))[1]
        np.testing.assert_array_equal(np.flatnonzero(ours) + 1, due)
    assert due[:500] == list(range(1, 501)) and due[-1] - due[-2] == 34


def test_kron_whitens(x64):
    # Gradients with a covariance of condition 1e4 on each side: what comes out has one of nearly 1.
    rng = np.random.RandomState(0)
    sides = [np.linalg.qr(rng.standard_normal((n, n)))[0] * np.geomspace(1, 0.01, n) for n in (4, 3)]
    draws = jnp.asarray(np.einsum("ij,tjk,lk->til", sides[0], rng.standard_normal((4000, 4, 3)), sides[1]))
    tx = kron(1.0, b1=0.0, preconditioner_update_probability=1.0)

    @jax.jit
    def run(draws):
        return jax.lax.scan(lambda s, g: tx.update(g, s, g)[::-1], tx.init(draws[0]), draws)[1]

    out = np.asarray(run(draws))[2000:].reshape(2000, 12)
    before = np.linalg.cond(np.cov(np.asarray(draws).reshape(-1, 12).T))
    after = np.linalg.cond(np.cov(out.T))
    assert before > 1e7 and after < 30, (before, after)
    assert rms(out) == pytest.approx(1, abs=0.15)


def test_krons_steps_are_clipped_and_zeros_fit_nothing():
    g = {"w": 1e3 * jnp.ones((4, 3)), "b": jnp.zeros(3)}
    tx = kron(1.0)
    run = jax.jit(lambda s: jax.lax.scan(lambda s, _: tx.update(g, s, g)[::-1], s, length=2000))
    state, updates = run(tx.init(g))
    assert rms(updates["w"][0]) == pytest.approx(1.1, rel=1e-5)
    assert all(np.all(np.isfinite(x)) for x in jax.tree.leaves((state, updates)))
    np.testing.assert_array_equal(state.slots["right"]["b"], 1)


def test_krons_factors_by_shape():
    params = {"w": jnp.zeros((4, 3)), "conv": jnp.zeros((3, 3, 2, 5)), "row": jnp.zeros((1, 4)), "b": jnp.zeros(3)}
    params |= {"s": jnp.zeros(()), "none": jnp.zeros((0, 3))}

    def shapes(**given):
        slots = jax.eval_shape(kron(**given).init, params).slots
        return {k: tuple(getattr(slots[side][k], "shape", None) for side in ("left", "right")) for k in params}

    plain = shapes()
    assert plain["w"] == ((4, 4), (3, 3)) and plain["conv"] == ((18, 18), (5, 5)) and plain["row"] == ((1,), (4, 4))
    assert plain["b"] == (None, (3,)) and plain["s"] == (None, (1,)) and plain["none"] == (None, None)
    assert shapes(max_size_triangular=8)["conv"] == ((18,), (5, 5))
    assert shapes(merge_dims=False)["conv"] == ((3, 3, 2, 2), (3, 3, 5, 5))
    assert shapes(memory_save_mode="one_diag")["w"] == ((4,), (3, 3))
    assert shapes(min_ndim_triangular=1)["b"] == (None, (3, 3))
    updates = jax.eval_shape(lambda g: step(kron(1.0), g)[0], params)
    assert jax.tree.map(jnp.shape, updates) == jax.tree.map(jnp.shape, params)


def test_krons_complex_matrices_are_whitened():
    rng = np.random.RandomState(0)
    g = rng.standard_normal((3000, 4, 3)) + 1j * rng.standard_normal((3000, 4, 3))
    mixed = (rng.standard_normal((4, 4)) + 1j * rng.standard_normal((4, 4))) * np.geomspace(1, 0.1, 4)
    draws = jnp.asarray(mixed @ g, jnp.complex64)
    tx = kron(1.0, b1=0.0, preconditioner_update_probability=1.0)
    run = jax.jit(lambda d: jax.lax.scan(lambda s, g: tx.update(g, s, g)[::-1], tx.init(d[0]), d)[1])
    rows = np.moveaxis(np.asarray(run(draws))[2000:], 1, 0).reshape(4, -1)
    assert np.linalg.cond(np.cov(mixed @ np.moveaxis(g[2000:], 1, 0).reshape(4, -1))) > 100
    assert np.linalg.cond(np.cov(rows)) < 5
