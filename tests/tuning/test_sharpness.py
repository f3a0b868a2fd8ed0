"""Sharpness: the Lanczos iteration against dense Hessians, thresholds against closed forms and real training."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from sklearn.datasets import load_digits

import jaxsgd
from jaxsgd.curvature.linear_response import read_rule
from jaxsgd.curvature.sharpness import sharpness

DIGITS = load_digits()


def digits(count=200, dtype=np.float32):
    images = (DIGITS.images[:count] / 16).reshape(count, 64).astype(dtype)
    return {"x": images, "y": DIGITS.target[:count].astype(np.int32)}


def cross_entropy(logits, labels):
    return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()


def mlp_loss(p, batch):
    hidden = jnp.tanh(batch["x"] @ p["w1"] + p["b1"])
    return cross_entropy(hidden @ p["w2"] + p["b2"], batch["y"])


def mlp(dtype=np.float32, width=10):
    rng = np.random.default_rng(0)
    normal = lambda *s: jnp.asarray(rng.normal(size=s) / np.sqrt(s[0]), dtype)
    return {"w1": normal(64, width), "b1": jnp.zeros(width, dtype), "w2": normal(width, 10), "b2": jnp.zeros(10, dtype)}


def trained(loss, params, batch, tx, steps):
    def body(carry, _):
        x, s = carry
        u, s = tx.update(jax.grad(loss)(x, batch), s, x)
        return (optax.apply_updates(x, u), s), None

    return jax.jit(lambda c: jax.lax.scan(body, c, None, length=steps)[0])((params, tx.init(params)))


def dense(loss, params, batch):
    flat, back = jax.flatten_util.ravel_pytree(params)
    h = np.asarray(jax.jit(jax.hessian(lambda v: loss(back(v), batch)))(flat), np.float64)
    return (h + h.T) / 2


def agrees(spectrum, matrix, tolerance=1e-4):
    exact = np.linalg.eigvalsh(matrix)
    size, k = np.abs(exact).max(), len(spectrum.eigenvalues)
    np.testing.assert_allclose(spectrum.eigenvalues, exact[::-1][:k], rtol=0, atol=tolerance * size)
    np.testing.assert_allclose(spectrum.smallest, exact[0], rtol=0, atol=tolerance * size)


def quadratic(p, h):
    return 0.5 * p["x"] @ h @ p["x"]


def random_quadratic(d, seed, dtype=np.float64):
    rng = np.random.default_rng((d, seed))
    q, _ = np.linalg.qr(rng.normal(size=(d, d)))
    values = np.exp(rng.uniform(-4, 3, d))
    return jnp.asarray((q * values) @ q.T, dtype), values, {"x": jnp.asarray(1e-6 * rng.normal(size=d), dtype)}


def corrected(nu, steps, b1=0.9, b2=0.999, eps=1e-8):
    """Adam's preconditioner by hand."""
    return (np.sqrt(np.asarray(nu, np.float64) / (1 - b2**steps)) + eps) * (1 - b1**steps)


# -- eigenvalues ---------------------------------------------------------------------------------


def test_mlp_plain_and_preconditioned():
    batch, tx = digits(), jaxsgd.adam(1e-2)
    params, state = trained(mlp_loss, mlp(), batch, tx, 30)
    found = sharpness(mlp_loss, params, batch, tx=tx, opt_state=state, eigenvalues=4, progress=False)
    h = dense(mlp_loss, params, batch)
    p = corrected(jax.flatten_util.ravel_pytree(state.slots["nu"])[0], 30)
    agrees(found.hessian, h)
    agrees(found.preconditioned, h / np.sqrt(np.outer(p, p)))
    assert found.converged and found.saddle == (np.linalg.eigvalsh(h)[0] < 0) and found.parameters == 760
    np.testing.assert_allclose(found.constant, 38, rtol=1e-4)
    np.testing.assert_allclose(found.preconditioner, (p.min(), np.median(p), p.max()), rtol=1e-3)
    assert "saddle" in str(found) and "preconditioned by adam" in str(found)


@pytest.mark.slow
@pytest.mark.parametrize(
    "kind, rule, wide",
    [
        ("logistic", "adam", False), ("logistic", "rmsprop", True), ("cnn", "adam", True), ("cnn", "adagrad", False),
        ("mlp", "adam", True), ("mlp", "rmsprop", False),
    ],
)  # fmt: skip
def test_models_against_the_dense_hessian(kind, rule, wide):
    with jax.enable_x64(wide):
        dtype = np.float64 if wide else np.float32
        batch = digits(100, dtype)
        if kind == "cnn":

            class CNN(nnx.Module):
                def __init__(self, rngs):
                    self.conv = nnx.Conv(1, 5, (3, 3), rngs=rngs, param_dtype=dtype, dtype=dtype)
                    self.head = nnx.Linear(80, 10, rngs=rngs, param_dtype=dtype, dtype=dtype)

                def __call__(self, x):
                    x = nnx.avg_pool(nnx.gelu(self.conv(x)), (2, 2), (2, 2))
                    return self.head(x.reshape(x.shape[0], -1))

            graphdef, params = nnx.split(CNN(nnx.Rngs(0)))
            loss = lambda p, b: cross_entropy(nnx.merge(graphdef, p)(b["x"].reshape(-1, 8, 8, 1)), b["y"])
        elif kind == "mlp":
            params, loss = mlp(dtype), mlp_loss
        else:
            params = {"w": jnp.zeros((64, 10), dtype), "b": jnp.zeros(10, dtype)}
            loss = lambda p, b: cross_entropy(b["x"] @ p["w"] + p["b"], b["y"])
        tx = jaxsgd.RULES[rule](1e-2)
        params, state = trained(loss, params, batch, tx, 30)
        found = sharpness(loss, params, batch, tx=tx, opt_state=state, eigenvalues=3, progress=False)
        h = dense(loss, params, batch)
        nu = np.asarray(jax.flatten_util.ravel_pytree(state.slots["accumulator" if rule == "adagrad" else "nu"])[0])
        p = {"adam": lambda: corrected(nu, 30), "rmsprop": lambda: np.sqrt(nu + 1e-8)}
        p = p.get(rule, lambda: np.sqrt(nu + 1e-7))()
        agrees(found.hessian, h)
        agrees(found.preconditioned, h / np.sqrt(np.outer(p, p)))


def test_restarts_and_says_when_it_has_not_converged(x64):
    d = 300
    values = np.linspace(1, 2, d)  # no gap anywhere
    loss = lambda p, b: 0.5 * jnp.sum(b * p**2)
    full = sharpness(loss, jnp.ones(d), values, eigenvalues=2, tolerance=1e-6, iterations=2000, progress=False)
    assert full.converged and full.iterations > 64
    np.testing.assert_allclose((*full.eigenvalues, full.smallest), (2, values[-2], 1), rtol=1e-6)
    short = sharpness(loss, jnp.ones(d), values, eigenvalues=2, tolerance=1e-6, iterations=16, progress=False)
    assert not short.converged and short.iterations == 16 and "NOT CONVERGED" in str(short)
    assert short.residuals[0] > 1e-6 and not short.saddle


def test_small_and_degenerate_hessians():
    flat = sharpness(lambda p, b: jnp.sum(p["a"] * b), {"a": jnp.ones(3), "none": None}, jnp.ones(3), eigenvalues=2)
    assert flat.eigenvalues == (0.0, 0.0) and flat.smallest == 0 and flat.threshold == np.inf and not flat.saddle
    assert "no direction curves up" in flat.summary
    scalar = sharpness(lambda p, b: -3 * p**2 * b, jnp.asarray(0.5), jnp.asarray(1.0), eigenvalues=4)
    np.testing.assert_allclose((*scalar.eigenvalues, scalar.smallest), (-6, -6), rtol=1e-5)
    assert scalar.saddle and scalar.threshold == np.inf
    low = sharpness(lambda p, b: jnp.sum((b @ p) ** 2), jnp.ones(50), np.eye(50, dtype=np.float32)[:2], eigenvalues=3)
    np.testing.assert_allclose(low.eigenvalues, (2, 2, 0), atol=1e-4)


def test_batches_microbatches_and_narrow_parameters():
    batch, params = digits(80), mlp(width=4)
    whole = sharpness(mlp_loss, params, batch, eigenvalues=2)
    parts = [jax.tree.map(lambda x: x[i : i + 20], batch) for i in range(0, 80, 20)]  # noqa: B023
    for other in (
        sharpness(mlp_loss, params, parts, eigenvalues=2),
        sharpness(mlp_loss, params, batch, microbatches=4),
    ):
        k = len(other.eigenvalues)
        np.testing.assert_allclose(other.eigenvalues, whole.eigenvalues[:k], rtol=1e-4)
        np.testing.assert_allclose(other.loss, whole.loss, rtol=1e-5)
    narrow = jax.tree.map(lambda p: p.astype(jnp.bfloat16), params)
    same = jax.tree.map(lambda p: p.astype(jnp.float32), narrow)
    found, wanted = sharpness(mlp_loss, narrow, batch), sharpness(mlp_loss, same, batch)
    np.testing.assert_allclose(found.eigenvalues, wanted.eigenvalues, rtol=1e-4)


def test_dropout_is_the_same_in_all_products():
    class Net(nnx.Module):
        def __init__(self, rngs):
            self.a, self.drop = nnx.Linear(64, 10, rngs=rngs), nnx.Dropout(0.5, rngs=rngs)

    def loss(model, batch, key):
        kept = jax.random.bernoulli(key, 0.5, batch["x"].shape)
        return cross_entropy(model.a(batch["x"] * kept), batch["y"]), {"aux": 0.0}

    tx = jaxsgd.momentum(0.1)
    state = jaxsgd.TrainState.create(Net(nnx.Rngs(0)), tx)
    found = sharpness(loss, state, digits(50), tx=tx, key=3)
    assert found.converged and found.rule == "momentum" and found.learning_rate == np.float32(0.1)
    np.testing.assert_allclose(found.threshold * found.eigenvalues[0], 3.8, rtol=1e-4)
    alike = sharpness(loss, Net(nnx.Rngs(0)), digits(50), key=3)
    np.testing.assert_allclose(alike.eigenvalues, found.eigenvalues, rtol=1e-5)


# -- thresholds ----------------------------------------------------------------------------------

CONSTANTS = {
    "sgd": (lambda r: jaxsgd.sgd(r), 2),
    "heavy ball": (lambda r: jaxsgd.momentum(r, momentum=0.8), 2 * 1.8),
    "velocity": (lambda r: jaxsgd.velocity(r, momentum=0.9), 2 * 1.9),
    "nesterov": (lambda r: jaxsgd.nesterov(r, momentum=0.9), 2 * 1.9 / 2.8),
    "trace nesterov": (lambda r: jaxsgd.sgd(r, momentum=0.5, nesterov=True), 2 * 1.5 / 2),
    "adam": (lambda r: jaxsgd.adam(r, b2=1 - 1e-9), 38),
    "adam 0.5": (lambda r: jaxsgd.adam(r, b1=0.5, b2=1 - 1e-9), 6),
    "nadam": (lambda r: jaxsgd.nadam(r, b2=1 - 1e-9), 38 / 2.8),
}


def at_rest(tx, params, seed):
    """The state long after, with some second moments."""
    state = tx.init(params)
    if "nu" not in state.slots:
        return state, np.ones(len(params["x"]))
    nu = np.exp(np.random.default_rng(seed).uniform(-6, 2, len(params["x"]))) * 1e-3
    count = jnp.asarray(10**6, jnp.int32)
    p = np.sqrt(nu / -np.expm1(1e6 * np.log1p(-1e-9))) + 1e-8
    return state._replace(count=count, slots={**state.slots, "nu": {"x": jnp.asarray(nu)}}), p


def largest_stable(tx, state, params, h, weight, guess):
    """By bisection over training: the largest rate at which the parameters do not grow, in the rule's measure.

    Growth ends Adam's linear regime, and with it the growth: all steps count, not the last.
    """

    @jax.jit
    def most(rate):
        def body(carry, _):
            x, s = carry
            u, s = tx.update({"x": h @ x["x"]}, s, x)
            x = optax.apply_updates(x, u)
            return (x, s), jnp.sum(weight * x["x"] ** 2)

        start = params, jaxsgd.with_hyper(state, learning_rate=rate)
        return jnp.max(jax.lax.scan(body, start, None, length=3000)[1])

    low, high = guess / 4, guess * 4
    for _ in range(10):
        middle = (low * high) ** 0.5
        stable = float(most(middle)) <= 1e4 * float(jnp.sum(weight * params["x"] ** 2))
        low, high = (middle, high) if stable else (low, middle)
    return (low * high) ** 0.5


def check_quadratic(name, d, seed):
    make, constant = CONSTANTS[name]
    h, _, params = random_quadratic(d, seed)
    tx = make(1e-2)
    state, p = at_rest(tx, params, seed)
    found = sharpness(quadratic, params, h, tx=tx, opt_state=state, progress=False)
    top = np.linalg.eigvalsh(np.asarray(h) / np.sqrt(np.outer(p, p)))[-1]
    np.testing.assert_allclose(found.threshold, constant / top, rtol=1e-3)
    np.testing.assert_allclose(found.constant, constant, rtol=1e-3)
    np.testing.assert_allclose(largest_stable(tx, state, params, h, p, found.threshold), found.threshold, rtol=0.1)


@pytest.mark.parametrize("name", ["sgd", "heavy ball", "nesterov", "adam"])
def test_the_threshold_is_where_training_diverges(name, x64):
    check_quadratic(name, 6, 0)


@pytest.mark.slow
@pytest.mark.parametrize("name", CONSTANTS)
@pytest.mark.parametrize("d", [1, 20])
def test_thresholds_of_more_quadratics(name, d, x64):
    check_quadratic(name, d, 1)


def test_multipliers_frozen_leaves_and_decay_count(x64):
    h, params = jnp.asarray([3.0, 2.0, 50.0]), {"a": jnp.ones(1), "b": jnp.ones(1), "c": jnp.ones(1)}
    loss = lambda p, b: 0.5 * (b[0] * p["a"] @ p["a"] + b[1] * p["b"] @ p["b"] + b[2] * p["c"] @ p["c"])
    groups = [("^b$", {"lr_mult": 4.0}), ("^c$", {"frozen": True})]
    base = jaxsgd.momentum(0.1, groups=groups)
    for tx in (base, jaxsgd.guard(optax.chain(jaxsgd.clip_by_global_norm(1e3), base))):
        found = sharpness(loss, params, h, tx=tx, eigenvalues=2)
        np.testing.assert_allclose(found.eigenvalues, (3, 2), rtol=1e-6)
        np.testing.assert_allclose(found.preconditioned.eigenvalues, (8, 3), rtol=1e-6)
        np.testing.assert_allclose(found.threshold, 3.8 / 8, rtol=1e-5)
        assert found.rule == "momentum"
    coupled = sharpness(loss, params, h, tx=jaxsgd.torch.SGD(lr=0.1, momentum=0.9, weight_decay=10.0))
    np.testing.assert_allclose(coupled.threshold, 3.8 / 60, rtol=1e-5)
    plain = sharpness(loss, params, h, tx=jaxsgd.sgd(0.1, weight_decay=10.0))
    np.testing.assert_allclose(plain.threshold, 2 / 60, rtol=1e-5)
    assert plain.summary == "learning rate 0.1 is 3x the threshold 0.0333 of sgd: unstable"


def squared_loss(p, batch):
    logits = jnp.tanh(batch["x"] @ p["w1"] + p["b1"]) @ p["w2"] + p["b2"]
    return 0.5 * jnp.mean(jnp.sum((logits - jax.nn.one_hot(batch["y"], 10)) ** 2, -1))


@pytest.mark.slow
@pytest.mark.parametrize("rule, rate", [("sgd", 0.05), ("momentum", 0.03), ("nesterov", 0.03), ("adam", 3e-3)])
def test_digits_within_a_factor_of_two(rule, rate):
    """From the current point, the first rate at which the loss rises lies within 2x of the threshold."""
    batch, tx = digits(400), jaxsgd.RULES[rule](rate)
    params, state = trained(squared_loss, mlp(width=20), batch, tx, 300)
    found = sharpness(squared_loss, params, batch, tx=tx, opt_state=state, progress=False)

    @jax.jit
    def losses(rate):
        def body(carry, _):
            x, s = carry
            value, g = jax.value_and_grad(squared_loss)(x, batch)
            u, s = tx.update(g, s, x)
            return (optax.apply_updates(x, u), s), value

        start = params, jaxsgd.with_hyper(state, learning_rate=rate)
        return jax.lax.scan(body, start, None, length=60)[1]

    rises = lambda rate: bool(np.any(np.diff(np.asarray(losses(rate))) > 1e-6))
    first = next(f for f in 2.0 ** np.arange(-2, 2.1, 0.25) if rises(found.threshold * f))
    assert 0.5 < first < 2, (rule, first)


@pytest.mark.slow
def test_adam_trains_at_the_edge_of_stability():
    """Full-batch Adam drives the preconditioned sharpness up to 38 / learning rate, where it stays."""
    batch, tx = digits(400), jaxsgd.adam(0.01)
    params, state = trained(squared_loss, mlp(width=20), batch, tx, 1200)
    found = sharpness(squared_loss, params, batch, tx=tx, opt_state=state, progress=False)
    assert 0.8 < found.ratio < 1.2, found


# -- what it refuses -----------------------------------------------------------------------------


def test_rules_without_a_diagonal_preconditioner_are_refused_by_name():
    params = {"layer": {"kernel": jnp.ones((6, 6)) + jnp.eye(6)}}
    loss = lambda p, b: jnp.sum((p["layer"]["kernel"] @ b) ** 2)
    for name in ("muon", "lion", "lamb"):
        tx = jaxsgd.RULES[name](1e-3)
        with pytest.raises(ValueError, match=f"{name} has no diagonal preconditioner"):
            sharpness(loss, params, jnp.eye(6), tx=tx, opt_state=trained(loss, params, jnp.eye(6), tx, 2)[1])


def test_the_state_of_an_nnx_optimizer():
    class Net(nnx.Module):
        def __init__(self, rngs):
            self.a = nnx.Linear(64, 10, rngs=rngs)

    loss = lambda model, batch: cross_entropy(model.a(batch["x"]), batch["y"])
    model, batch, tx = Net(nnx.Rngs(0)), digits(50), jaxsgd.adam(1e-2)
    optimizer = nnx.Optimizer(model, tx, wrt=nnx.Param)
    for _ in range(3):
        optimizer.update(model, nnx.grad(loss)(model, batch))
    found = sharpness(loss, model, batch, tx=tx, opt_state=optimizer.opt_state, progress=False)
    np.testing.assert_allclose(found.constant, 38, rtol=1e-3)


def test_a_state_between_two_batches_is_refused():
    batch, tx = digits(), jaxsgd.accumulate(jaxsgd.sgd(1e-2), 2)
    params, state = trained(mlp_loss, mlp(), batch, tx, 5)
    with pytest.raises(ValueError, match="waits for more batches"):
        sharpness(mlp_loss, params, batch, tx=tx, opt_state=state, progress=False)


def test_a_packed_state_is_unpacked_by_migrate():
    batch = digits()
    plain, packed = (jaxsgd.adam(1e-2, storage=s) for s in (None, jaxsgd.cast("bfloat16", stochastic=True)))
    params, state = trained(mlp_loss, mlp(), batch, packed, 30)
    with pytest.raises(ValueError, match=r"Use the optimizer without storage=, and its state by jaxsgd.migrate"):
        sharpness(mlp_loss, params, batch, tx=packed, opt_state=state, progress=False)
    state, _ = jaxsgd.migrate(state, plain, params)
    found = sharpness(mlp_loss, params, batch, tx=plain, opt_state=state, progress=False)
    np.testing.assert_allclose(found.constant, 38, rtol=1e-3)


def test_errors_in_words():
    loss = lambda p, b: sum(jnp.sum(jnp.abs(x) ** 2) for x in jax.tree.leaves(p)) * b
    one, fine = jnp.asarray(1.0), {"a": jnp.ones(2)}
    for params, words in (
        ({"a": jnp.arange(3)}, "'a' is int32"),
        ({"a": jnp.ones(2, jnp.complex64)}, "'a' is complex64"),
        ({}, "there are none"),
    ):
        with pytest.raises(ValueError, match=words):
            sharpness(loss, params, one)
    for options, words in (
        ({"eigenvalues": 0}, "eigenvalues=0"),
        ({"tolerance": 2.0}, "tolerance=2"),
        ({"opt_state": ()}, "opt_state: it needs the rule"),
        ({"tx": optax.sgd(0.1)}, "no jaxsgd state"),
        ({"tx": jaxsgd.adam(0.1)}, "has seen none"),
        ({"tx": jaxsgd.momentum(0.1, storage=jaxsgd.int8(min_size=0))}, "'trace' of momentum is rounded between steps"),
        ({"tx": jaxsgd.momentum(0.1, storage=jaxsgd.cast("bfloat16"))}, "'trace' of momentum is rounded between steps"),
        ({"tx": jaxsgd.momentum(0.1, groups=[("a", {"learning_rate": 0.2})])}, "no multiple of its learning rate"),
    ):
        with pytest.raises(ValueError, match=words):
            sharpness(loss, fine, one, **options)
    with pytest.raises(ValueError, match="the list is empty"):
        sharpness(loss, fine, [])
    with pytest.raises(ValueError, match="batch 1 of the list has the shapes"):
        sharpness(loss, fine, [np.ones(2), np.ones(3)])
    with pytest.raises(TypeError, match="Use list"):
        sharpness(loss, fine, iter([np.ones(2)]))
    with pytest.raises(ValueError, match="the loss is nan"):
        sharpness(loss, fine, jnp.asarray(jnp.nan))


def test_the_response_of_adam_is_read_off_the_rule(x64):
    params = {"x": jnp.ones(3)}
    tx = jaxsgd.adam(0.5, b1=0.8)
    state = tx.init(params)._replace(count=jnp.asarray(500, jnp.int32))
    state = state._replace(slots={**state.slots, "nu": {"x": jnp.asarray([0.0, 1.0, 4.0])}})
    found = read_rule(tx, params, state, [jnp.ones(3)], 1.0)
    np.testing.assert_allclose(found.preconditioner, corrected([0.0, 1.0, 4.0], 500, b1=0.8), rtol=1e-5)
    assert found.trained == (True,) and found.learning_rate == 0.5 and not found.shift.any()
    assert "1 parameters have a gradient here" in found.notes[0]


def test_an_optimizer_is_needed_as_such():
    with pytest.raises(TypeError, match="tx='a': a gradient transformation"):
        sharpness(lambda p, b: jnp.sum(p**2) + 0 * jnp.sum(b), jnp.ones(2), jnp.ones(2), tx="a")
