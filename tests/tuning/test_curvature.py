"""Sophia: its estimates of the Hessian's diagonal, and what the laws, under a separable loss, cannot see."""

import collections
import zlib
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import jaxsgd
from jaxsgd.paths import leaf_names
from jaxsgd.rules.curvature import gauss_newton_bartlett, hutchinson, sophia
from jaxsgd.testing import GRADIENTS, draw_gradients, draw_params, loss_of

pytestmark = pytest.mark.slow  # half a minute on two cores; CI runs it

HESSIAN = np.asarray([[2.0, 0.5, -0.3], [0.5, 1.0, 0.2], [-0.3, 0.2, 0.4]])
OPTAX_HUTCHINSON = optax.contrib.hutchinson_estimator_diag_hessian


def quadratic(x):
    return 0.5 * x @ jnp.asarray(HESSIAN, x.dtype) @ x


def coupled(params):
    """A loss whose Hessian is neither constant nor diagonal: the signs matter."""
    total = sum(jnp.sum(p) for p in jax.tree.leaves(params))
    return jnp.cosh(total / 10) + sum(jnp.sum(jnp.sin(p) + p**4 / 12) for p in jax.tree.leaves(params))


def walk(tx, params, grads, objective=coupled):
    @jax.jit
    def run(params, grads):
        def step(carry, g):
            params, state = carry
            updates, state = tx.update(g, state, params, obj_fn=objective)
            params = optax.apply_updates(params, updates)
            return (params, state), params

        return jax.lax.scan(step, (params, tx.init(params)), grads)[1]

    return run(params, grads)


def relative(ours, theirs):
    pairs = zip(jax.tree.leaves(ours), jax.tree.leaves(theirs), strict=True)
    return max(float(np.max(np.abs(a - b)) / np.max(np.abs(b))) for a, b in pairs)


def same_signs(update_interval, seed=0):
    """Hutchinson's estimate for optax, which keeps a count: the signs of our steps 1, 1 + interval, ..."""

    def update(updates, count, params=None, *, obj_fn):
        key = jax.random.fold_in(jax.random.key(seed), count * update_interval + 1)
        leaves, treedef = jax.tree.flatten(params)
        signs = [
            jax.random.rademacher(jax.random.fold_in(key, zlib.crc32(name.encode())), p.shape, p.dtype)
            for name, p in zip(leaf_names(params), leaves, strict=True)
        ]
        signs = treedef.unflatten(signs)
        along = jax.jvp(jax.grad(obj_fn), (params,), (signs,))[1]
        return jax.tree.map(jnp.multiply, along, signs), count + 1

    return optax.GradientTransformationExtraArgs(lambda params: jnp.zeros((), jnp.int32), update)


ARGUMENTS = {
    "default": {},
    "soft": {"clip_threshold": 20.0, "gamma": 1.0, "b1": 0.8, "b2": 0.6, "update_interval": 3, "eps": 1e-3},
    "unclipped": {"clip_threshold": None, "gamma": 1.0, "b2": 0.9, "update_interval": 1, "eps": 0.1},
    "masked": {
        "weight_decay": 0.1,
        "weight_decay_mask": {"scalar": True, "vector": False, "matrix": True, "cube": False},
    },
}


@pytest.mark.parametrize("arguments", ARGUMENTS.values(), ids=ARGUMENTS)
def test_sophia_is_optax_sophia_under_the_same_signs(arguments, x64):
    params, interval = draw_params(1), arguments.get("update_interval", 10)
    ours = sophia(0.02, **arguments)
    theirs = optax.contrib.sophia(0.02, **arguments, hessian_diagonal_fn=same_signs(interval))
    for kind in ("normal", "sparse", "heavy", "constant"):
        assert kind in GRADIENTS
        grads = draw_gradients(kind, 2, 50)
        error = relative(walk(ours, params, grads), walk(theirs, params, grads))
        assert error <= 1e-12, f"{kind}: {error:.1e} from optax"


def test_arguments_stand_where_optax_has_them(x64):
    params, grads = draw_params(1), draw_gradients("normal", 2, 20)
    by_position = (0.02, 0.9, 0.95, 1e-6, 0.01, None, 0.5, 2.0, 4)
    theirs = optax.contrib.sophia(*by_position, same_signs(4), None, False, 0)
    assert (
        relative(walk(sophia(*by_position, None, None, False, 0), params, grads), walk(theirs, params, grads)) <= 1e-12
    )
    assert sophia(0.1, mu_dtype="bfloat16").init(params).slots["mu"]["cube"].dtype == jnp.bfloat16


def test_the_key_and_the_step_make_the_signs():
    params, grads = draw_params(1), draw_gradients("normal", 2, 8)
    soft = partial(sophia, 0.02, gamma=1.0, clip_threshold=20.0, update_interval=2)
    visited = [walk(soft(key=key), params, grads) for key in (0, 0, 1)]
    assert relative(visited[0], visited[1]) == 0 and relative(visited[2], visited[0]) > 1e-3
    tx, x = sophia(1.0, b2=0.0, update_interval=1), jnp.ones(3)
    state, seen = tx.init(x), set()
    for _ in range(8):
        _, state = tx.update(x, state, x, obj_fn=quadratic)
        seen.add(tuple(np.asarray(state.slots["nu"]).round(4).tolist()))
    assert len(seen) > 2  # other signs at each estimate


# -- estimates -----------------------------------------------------------------------------------


def estimates(factory, params, objective, times):
    def one(key):
        tx = factory(key)
        return tx.update(params, tx.init(params), params, obj_fn=objective)[0]

    return jax.jit(jax.vmap(one))(jax.random.split(jax.random.key(3), times))


@pytest.mark.parametrize("factory", [hutchinson, OPTAX_HUTCHINSON], ids=["ours", "optax"])
def test_hutchinson_is_unbiased(factory):
    found = estimates(factory, jnp.ones(3), quadratic, 4000)
    # Off the diagonal at most 0.8 in absolute value: a mean of 4,000 is within 0.8 / sqrt(4000) = 0.013, times four.
    np.testing.assert_allclose(found.mean(0), np.diag(HESSIAN), atol=0.05)
    assert found.std(0).min() > 0.1


def test_hutchinson_is_exact_for_a_diagonal_hessian():
    params = {"a": jnp.asarray([1.0, -2.0]), "n": jnp.arange(3), "none": None, "z": jnp.asarray([1 + 1j, 2j])}
    loss = lambda p: jnp.sum(p["a"] ** 4) + 3 * jnp.sum(jnp.abs(p["z"]) ** 2)
    found = estimates(hutchinson, params, loss, 5)
    np.testing.assert_allclose(found["a"], np.broadcast_to([12.0, 48.0], (5, 2)), rtol=1e-6)
    np.testing.assert_allclose(found["z"], np.full((5, 2), 6.0), rtol=1e-6)
    assert found["z"].dtype == jnp.float32 and found["none"] is None
    np.testing.assert_array_equal(found["n"], np.zeros((5, 3)))


def test_gauss_newton_bartlett_is_unbiased():
    """The diagonal of the Gauss-Newton matrix, X^2 (p - p^2) in mean over examples, from gradients alone."""
    rng = np.random.RandomState(0)
    x, w = rng.standard_normal((6, 3)).astype(np.float32), rng.standard_normal((3, 4)).astype(np.float32)

    def loss(params, key):
        logits = x @ params["w"]
        labels = jax.random.categorical(key, jax.lax.stop_gradient(logits))
        return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()

    params = {"w": jnp.asarray(w), "n": jnp.arange(2)}
    found = estimates(gauss_newton_bartlett(6), params, loss, 20000)
    prob = np.asarray(jax.nn.softmax(x @ w))
    want = np.einsum("bi,bj->ij", x**2, prob - prob**2) / 6
    spread = np.asarray(found["w"]).std(0) / np.sqrt(20000)
    assert (np.abs(found["w"].mean(0) - want) < 5 * spread).all() and (found["w"] >= 0).all()
    np.testing.assert_array_equal(found["n"], np.zeros((20000, 2)))

    tx = sophia(0.1, hessian_diagonal_fn=gauss_newton_bartlett(6), groups=[("n", {"frozen": True})])
    updates, state = jax.jit(partial(tx.update, obj_fn=loss))(params, tx.init(params), params)
    assert float(state.slots["nu"]["w"].sum()) > 0 and updates["w"].shape == w.shape
    with pytest.raises(ValueError, match="batch_size=0"):
        gauss_newton_bartlett(0)


@pytest.mark.parametrize("eager", [False, True])
def test_the_estimate_is_made_once_in_an_interval(eager):
    calls = collections.Counter()

    def factory(key):
        def update(updates, state, params=None, *, obj_fn):
            jax.debug.callback(lambda: calls.update(["estimate"]))
            return hutchinson(key).update(updates, state, params, obj_fn=obj_fn)

        return optax.GradientTransformationExtraArgs(lambda params: optax.EmptyState(), update)

    tx, x = sophia(0.1, update_interval=4, hessian_diagonal_fn=factory), jnp.ones(3)
    update = partial(tx.update, obj_fn=quadratic)
    update, state = update if eager else jax.jit(update), tx.init(x)
    for step in range(9):
        before = state.slots["nu"]
        _, state = update(x, state, x)
        assert bool((state.slots["nu"] != before).any()) == (step % 4 == 0)
    jax.effects_barrier()
    assert calls["estimate"] == 3


def test_the_first_step_has_no_curvature_yet():
    """As in optax: the step divides by the average before this estimate; at first it is the sign of the gradient."""
    tx, x, g = sophia(0.1, weight_decay=0.0), jnp.ones(3), jnp.asarray([0.3, -2.0, 0.0])
    updates, state = tx.update(g, tx.init(x), x, obj_fn=quadratic)
    np.testing.assert_allclose(updates, [-0.1, 0.1, 0.0], rtol=1e-6)
    signs = np.asarray(state.slots["nu"] / 0.01)
    assert any(
        np.allclose(signs, (HESSIAN @ s) * s, rtol=1e-5) for s in np.array(np.meshgrid(*[[1, -1]] * 3)).T.reshape(-1, 3)
    )


def test_sophia_descends_where_curvatures_differ():
    curvature = jnp.asarray([1.0, 100.0, 0.01])
    loss = lambda x: jnp.sum(curvature * x**2) / 2

    def train(tx):
        def step(carry, _):
            x, state = carry
            updates, state = tx.update(jax.grad(loss)(x), state, x, obj_fn=loss)
            return (x + updates, state), None

        return jax.lax.scan(step, (jnp.ones(3), tx.init(jnp.ones(3))), length=300)[0][0]

    ours = jax.jit(lambda: train(sophia(0.05, gamma=1.0, b2=0.9, update_interval=1, weight_decay=0.0)))()
    assert (
        jnp.abs(ours).max() < 1e-2
    )  # the flat direction too, which for gradient descent takes a thousand times longer


# -- edges ---------------------------------------------------------------------------------------


def test_edges():
    tx = sophia(0.1, eps=0.0, weight_decay=0.0, update_interval=1)
    zeros = jnp.zeros(3)
    updates, state = tx.update(zeros, tx.init(zeros), zeros, obj_fn=quadratic)
    np.testing.assert_array_equal(updates, zeros)  # 0 / 0

    params = {"w": jnp.ones(3), "v": jnp.ones(2), "n": jnp.arange(2), "none": None}
    tx = sophia(0.1, groups=[("n", {"frozen": True})])
    loss = lambda p: quadratic(p["w"]) + jnp.sum(p["v"] ** 2)
    grads = {**params, "v": jnp.asarray([jnp.nan, jnp.inf])}
    updates, state = tx.update(grads, tx.init(params), params, obj_fn=loss)
    assert np.isfinite(updates["w"]).all() and updates["none"] is None and (updates["n"] == 0).all()
    assert np.isnan(updates["v"][0])

    narrow = jax.tree.map(lambda p: p.astype(jnp.bfloat16), {"w": params["w"], "v": params["v"]})
    seen = []

    def watched(p):
        seen.append({x.dtype.name for x in jax.tree.leaves(p)})
        return loss(p)

    tx = sophia(0.1)
    updates, state = tx.update(narrow, tx.init(narrow), narrow, obj_fn=watched)
    assert seen[0] == {"bfloat16"}  # a model may take no other params
    assert {x.dtype.name for x in jax.tree.leaves(state.slots)} == {"float32"}
    assert updates["w"].dtype == jnp.bfloat16


def test_parts_of_a_tree_and_shards_of_an_array_have_the_same_signs():
    params = {"a": jnp.ones((8, 2)), "b": jnp.arange(3.0)}
    tx = sophia(0.1, gamma=1.0, clip_threshold=None, update_interval=1)

    def twice(tx, params, loss):
        state = tx.init(params)
        for _ in range(2):
            updates, state = jax.jit(partial(tx.update, obj_fn=loss))(params, state, params)
        return updates

    separate = lambda p: sum(coupled({"x": leaf}) for leaf in jax.tree.leaves(p))
    whole = twice(tx, params, separate)
    parts = twice(optax.partition({"x": tx, "y": tx}, {"a": "x", "b": "y"}), params, separate)
    jax.tree.map(partial(np.testing.assert_allclose, rtol=1e-5), parts, whole)

    mesh = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,))
    split = {"a": jax.device_put(params["a"], NamedSharding(mesh, P("data"))), "b": params["b"]}
    jax.tree.map(partial(np.testing.assert_allclose, rtol=1e-5), twice(tx, split, coupled), twice(tx, params, coupled))


def test_the_win_rate_is_printed(capfd):
    tx = sophia(0.1, b1=0.0, gamma=1.0, update_interval=1, b2=0.0, verbose=True, print_win_rate_every_n_steps=2)
    params = {"a": jnp.ones(3), "b": jnp.ones(1)}
    grads = {"a": jnp.asarray([0.1, 0.2, 50.0]), "b": jnp.asarray([0.0])}  # by twice the curvature: three of four win
    state, update = tx.init(params), jax.jit(partial(tx.update, obj_fn=loss_of))
    for _ in range(4):
        _, state = update(grads, state, params)
    jax.effects_barrier()
    lines = capfd.readouterr().out.split("\n")[:-1]
    assert lines == ["sophia: step 2, win rate 0.75", "sophia: step 4, win rate 0.75"]

    for quiet in ({"print_win_rate_every_n_steps": 1}, {"verbose": True}):
        tx = sophia(0.1, **quiet)
        tx.update(grads, tx.init(params), params, obj_fn=loss_of)
    jax.effects_barrier()
    assert capfd.readouterr().out == ""


def test_sophia_says_what_is_wrong():
    x = jnp.ones(3)
    with pytest.raises(TypeError, match="without its parentheses"):
        sophia(0.1, hessian_diagonal_fn=OPTAX_HUTCHINSON())
    with pytest.raises(TypeError, match="hessian_diagonal_fn=3"):
        sophia(0.1, hessian_diagonal_fn=3)
    with pytest.raises(TypeError, match="key=1.5"):
        sophia(0.1, key=1.5)
    for name, value in (("update_interval", 0), ("update_interval", 2.5), ("print_win_rate_every_n_steps", -1)):
        with pytest.raises((TypeError, ValueError), match=f"{name}={value}"):
            sophia(0.1, **{name: value})
    with pytest.raises(ValueError, match="clip_threshold=-1"):
        sophia(0.1, clip_threshold=-1)
    tx = sophia(0.1)
    with pytest.raises(ValueError, match=r"obj_fn: sophia needs it: tx.update\(grads, state, params, obj_fn=...\)"):
        tx.update(x, tx.init(x), x)
    with pytest.raises(ValueError, match="params: sophia needs them"):
        tx.update(x, tx.init(x), obj_fn=quadratic)
    with pytest.raises(ValueError, match="obj_fn: the estimate needs the objective"):
        hutchinson(jax.random.key(0)).update(x, optax.EmptyState(), x)


def test_sophia_as_a_neighbour():
    tx = optax.chain(optax.clip_by_global_norm(1.0), sophia(0.1, hessian_diagonal_fn=OPTAX_HUTCHINSON))
    x = jnp.ones(3)
    many = optax.MultiSteps(tx, 2)
    state = many.init(x)
    for _ in range(4):
        updates, state = many.update(x, state, x, obj_fn=quadratic)
    assert int(jaxsgd.metrics(state)["step"]) == 2 and (updates != 0).all()
    wrapped = jaxsgd.cautious(sophia)(0.1)
    updates, _ = wrapped.update(x, wrapped.init(x), x, obj_fn=quadratic)
    np.testing.assert_allclose(updates, -0.10001, rtol=1e-5)
