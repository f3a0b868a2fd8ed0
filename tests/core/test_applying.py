"""The update and the new parameters in one pass: the same numbers, wherever no transformation comes between."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jaxsgd
from jaxsgd import applying, int8, leaf, pieces, update_params

PARAMS = {"w": jnp.sin(jnp.arange(70.0 * 512)).reshape(70, 512), "s": jnp.ones((64, 256)), "b": jnp.ones(3), "n": None}
GRADS = jax.tree.map(lambda p: jnp.cos(40 * p) + 0.1, PARAMS)


def adamw(rate=1e-2, **options):
    return jaxsgd.adamw(rate, storage=int8(), **options)


def reading():
    """It passes updates on and keeps their norm."""

    def update(updates, state, params=None):
        return updates, optax.tree.norm(updates)

    return optax.GradientTransformation(lambda params: jnp.zeros(()), update)


CASES = {
    "a rule": (adamw, 3),
    "a chain": (lambda: optax.chain(optax.clip_by_global_norm(1.0), adamw()), 3),
    "a wrapper": (lambda: jaxsgd.cautious(jaxsgd.adamw)(1e-2, storage=int8()), 3),
    "inject_hyperparams": (lambda: optax.inject_hyperparams(lambda rate: jaxsgd.lion(rate, storage=int8()))(1e-2), 3),
    "a schedule": (lambda: adamw(lambda count: 1e-2 / (1 + count)), 3),
    "a frozen leaf": (lambda: adamw(groups=[("^s$", {"frozen": True})]), 2),
    "groups": (lambda: adamw(groups=[("^b$", {"lr_mult": 3.0}), ("^s$", {"storage": {}})]), 2),
    "partition": (
        lambda: optax.partition({"a": adamw(), "z": jaxsgd.lion(1e-3)}, {"w": "a", "s": "z", "b": "a", "n": None}),
        2,
    ),
    "a chain that scales": (lambda: optax.chain(adamw(), optax.scale(0.5)), 0),
    "a guard": (lambda: jaxsgd.guard(adamw()), 0),
    "accumulate": (lambda: jaxsgd.accumulate(adamw(), 2), 0),
    "an average behind it": (lambda: optax.chain(adamw(), jaxsgd.params_ema(0.9)), 0),
    "a norm behind it": (lambda: optax.chain(adamw(), reading()), 0),
    "norms in the state": (lambda: adamw(norms=True), 0),
    "twice the same update": (lambda: optax.chain(adamw(), optax.trace(0.9)), 0),
    "no storage": (lambda: jaxsgd.adamw(1e-2), 0),
    "optax": (lambda: optax.adamw(1e-2), 0),
}


def by_hand(tx):
    def step(grads, state, params):
        updates, state = optax.with_extra_args_support(tx).update(grads, state, params)
        return optax.apply_updates(params, updates), state

    return step


def assert_close(one, other, atol=1e-6):
    assert jax.tree.structure(one) == jax.tree.structure(other)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=0, atol=atol), one, other)


@pytest.fixture
def final(monkeypatch):
    """How many parameters were stepped in one pass, by each trace."""
    counts, real = [], applying._final
    monkeypatch.setattr(applying, "_final", lambda *a: counts.append(real(*a)) or counts[-1])
    return counts


@pytest.mark.parametrize("case", CASES)
def test_it_is_update_and_apply_updates(case, final):
    make, count = CASES[case]
    tx = make()
    one = two = (PARAMS, tx.init(PARAMS))
    by_one, by_two = jax.jit(by_hand(tx)), jax.jit(lambda g, s, p: update_params(tx, g, s, p))
    for _ in range(2):
        one, two = by_one(GRADS, one[1], one[0]), by_two(GRADS, two[1], two[0])
    assert [len(marks) for marks in final] == [count]
    assert_close(one[0], two[0])
    for a, b in zip(jax.tree.leaves(one[1]), jax.tree.leaves(two[1]), strict=True):
        np.testing.assert_allclose(a, b, atol=1 if a.dtype in ("int8", "uint8") else 1e-6)  # a code's neighbour


def test_without_jit_it_is_the_same_and_what_is_traced_stays_an_update():
    tx = adamw()
    state = tx.init(PARAMS)
    jitted = jax.jit(lambda g, s, p: update_params(tx, g, s, p))(GRADS, state, PARAMS)
    assert_close(update_params(tx, GRADS, state, PARAMS)[0], jitted[0])
    assert float(jnp.abs(tx.update(GRADS, state, PARAMS)[0]["w"]).max()) < 0.02
    assert float(jnp.abs(jax.jit(tx.update)(GRADS, state, PARAMS)[0]["w"]).max()) < 0.02


def test_an_optimizer_that_steps_at_another_place_is_left_alone(final):
    """What it returns is no change of these parameters."""
    tx = adamw()

    def elsewhere(grads, state, params=None):
        return tx.update(grads, state, jax.tree.map(lambda p: p + 1, params))

    step = jax.jit(lambda g, s, p: update_params(optax.GradientTransformation(tx.init, elsewhere), g, s, p))
    got = step(GRADS, tx.init(PARAMS), PARAMS)
    assert [len(marks) for marks in final] == [0]
    updates, _ = jax.jit(elsewhere)(GRADS, tx.init(PARAMS), PARAMS)
    assert_close(got[0], optax.apply_updates(PARAMS, updates))


def test_a_state_stepped_twice_is_left_alone(final):
    tx = adamw()

    def twice(grads, state, params=None):
        tx.update(jax.tree.map(jnp.negative, grads), state, params)
        return tx.update(grads, state, params)

    jax.jit(lambda g, s, p: update_params(optax.GradientTransformation(tx.init, twice), g, s, p))(
        GRADS, tx.init(PARAMS), PARAMS
    )
    assert [len(marks) for marks in final] == [0]


@pytest.mark.parametrize("dtype, rounding", [("float32", None), ("bfloat16", None), ("bfloat16", "compensated")])
def test_a_train_step_reports_the_same(dtype, rounding, final, monkeypatch, retraced):
    monkeypatch.setattr(leaf, "LARGE", 2**10)
    monkeypatch.setattr(pieces, "SMALL", 2**10)
    params = {"w": PARAMS["w"].astype(dtype)}
    tx = adamw(1e-2, rounding=rounding)

    def loss_fn(params, batch):
        return jnp.mean((params["w"].astype("float32") * batch) ** 2)

    batch = jnp.ones((70, 1))
    state, out = jaxsgd.TrainState.create(params, tx), []
    step = jaxsgd.make_step(loss_fn, tx)
    for _ in range(3):
        state, metrics = step(state, batch)
        out.append(float(metrics["update_norm"]))
    assert [len(marks) for marks in final] == [1]

    @jax.jit
    def plain(params, opt_state):
        updates, opt_state = tx.update(jax.grad(loss_fn)(params, batch), opt_state, params)
        return optax.apply_updates(params, updates), opt_state, jaxsgd.numerics.global_norm(updates)

    kept, opt_state, norms = params, tx.init(params), []
    for _ in range(3):
        kept, opt_state, norm = plain(kept, opt_state)
        norms.append(float(norm))
    np.testing.assert_allclose(out, norms, rtol=1e-5)
    digit = 2**-7 if dtype == "bfloat16" else 1e-6
    got, want = (np.asarray(x, np.float32) for x in (state.params["w"], kept["w"]))
    assert np.mean(~np.isclose(got, want, rtol=digit, atol=1e-6)) < 1e-3


def test_an_optimizer_that_changes_its_mind_is_an_error():
    tx, calls = adamw(), []

    def update(grads, state, params=None):
        calls.append(0)
        updates, state = tx.update(grads, state, params)
        return (updates if len(calls) == 1 else jax.tree.map(lambda u: 2 * u, updates)), state

    step = jax.jit(lambda g, s, p: update_params(optax.GradientTransformation(tx.init, update), g, s, p))
    with pytest.raises(RuntimeError, match="Use a pure function as update"):
        step(GRADS, tx.init(PARAMS), PARAMS)


@pytest.mark.parametrize("case", ["a rule", "a chain", "a guard", "accumulate", "MultiSteps", "apply_if_finite"])
def test_nothing_outlives_its_trace(case):
    more = {
        "MultiSteps": lambda: optax.MultiSteps(adamw(), 2),
        "apply_if_finite": lambda: optax.apply_if_finite(adamw(), 2),
    }
    tx = more[case]() if case in more else CASES[case][0]()
    params = {"w": jnp.ones((64, 128)), "b": jnp.ones(7)}
    state = jaxsgd.TrainState.create(params, tx)
    step = jaxsgd.make_step(lambda p, batch, key: jnp.sum((p["w"] - batch) ** 2) + jnp.sum(p["b"]), tx)
    with jax.checking_leaks():
        state, _ = step(state, jnp.zeros(()))
        state, _ = step(state, jnp.zeros(()))
    assert float(jnp.max(state.params["w"])) < 1
