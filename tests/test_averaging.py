"""Schedule-free: what it evaluates, what it wraps, how it warms up."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jaxsgd
from jaxsgd import schedule_free

PARAMS = {"w": jnp.asarray([1.0, -2.0, 3.0]), "b": jnp.asarray(0.5)}


def march(tx, params, steps=20, seed=0):
    state = tx.init(params)
    for key in jax.random.split(jax.random.key(seed), steps):
        grads = optax.tree.random_like(key, params, jax.random.normal)
        updates, state = tx.update(grads, state, params)
        params = optax.apply_updates(params, updates)
    return params, state


def test_pain_16_eval_params_is_found_anywhere_and_the_identity_elsewhere():
    tx = jaxsgd.schedule_free_adamw(0.1)
    y, state = march(tx, PARAMS)
    x = jaxsgd.eval_params(state, y)
    assert np.abs(x["w"] - y["w"]).max() > 1e-3
    for wrapped in (optax.chain(optax.identity(), tx), optax.apply_if_finite(tx, 2), optax.masked(tx, True)):
        inside, state = march(wrapped, PARAMS)
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5), jaxsgd.eval_params(state, inside), x)
    y, state = march(jaxsgd.adam(0.1), PARAMS)
    assert jaxsgd.eval_params(state, y) is not None
    jax.tree.map(np.testing.assert_array_equal, jaxsgd.eval_params(state, y), y)
    y, state = march(optax.partition({"s": tx, "a": jaxsgd.adam(0.1)}, {"w": "s", "b": "a"}), PARAMS)
    x = jaxsgd.eval_params(state, y)
    assert np.abs(x["w"] - y["w"]).max() > 1e-3
    np.testing.assert_array_equal(x["b"], y["b"])


def test_pain_16_bf16_weight_sum_does_not_stall():
    tx, p = jaxsgd.schedule_free_adamw(1.0), jnp.ones(4, jnp.bfloat16)
    step = lambda s, _: (tx.update(jnp.zeros_like(p), s, p)[1], None)
    state = jax.jit(lambda: jax.lax.scan(step, tx.init(p), length=2000)[0])()
    assert float(state.shared["weight_sum"]) == 2000.0  # a bf16 sum of ones stops at 256
    assert state.slots["z"].dtype == jnp.float32


def test_eval_params_equals_optax(x64):
    start = jax.tree.map(lambda p: p.astype(np.float64), PARAMS)
    y, state = march(jaxsgd.schedule_free_adamw(0.1, weight_decay=0.1), start)
    theirs, their_state = march(optax.contrib.schedule_free_adamw(0.1, weight_decay=0.1), start)
    x = optax.contrib.schedule_free_eval_params(their_state, theirs)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-12), jaxsgd.eval_params(state, y), x)


@pytest.mark.parametrize("steps", [1, 7, 30])
def test_x_is_the_average_of_z(x64, steps):
    """With plain SGD inside and equal weights, x is the mean of all z, and y lies between."""
    tx = schedule_free(jaxsgd.sgd)(0.1, b1=0.7)
    w, state, zs = jnp.asarray([1.0, -2.0]), tx.init(jnp.asarray([1.0, -2.0])), []
    for _ in range(steps):
        updates, state = tx.update(2 * w, state, w)
        w = optax.apply_updates(w, updates)
        zs.append(np.asarray(state.slots["z"]))
    x = jaxsgd.eval_params(state, w)
    np.testing.assert_allclose(x, np.mean(zs, axis=0), rtol=1e-12)
    np.testing.assert_allclose(w, 0.7 * x + 0.3 * zs[-1], rtol=1e-12)


@pytest.mark.parametrize("base", ["sgd", "rmsprop", "adam", "lion", "adamax", "nesterov", "adadelta", "amsgrad"])
def test_any_rule_can_be_wrapped(base):
    rule = schedule_free(jaxsgd.RULES[base])
    assert rule.name == f"schedule_free_{base}" and rule is not jaxsgd.RULES.get(rule.name)
    rate = 1.0 if base == "adadelta" else 0.02
    tx = optax.chain(rule(rate, warmup_steps=5, weight_decay=0.01))
    step = lambda c, _: ((lambda u, s: (optax.apply_updates(c[0], u), s))(*tx.update(2 * c[0], c[1], c[0])), None)
    start = jnp.asarray([0.3, -0.2])
    w, state = jax.jit(lambda: jax.lax.scan(step, (start, tx.init(start)), length=400)[0])()
    x = jaxsgd.eval_params(state, w)
    assert jnp.abs(x).max() < 0.5 * jnp.abs(start).max(), f"{base}: {x}"


def test_the_base_keeps_no_momentum():
    assert set(schedule_free(jaxsgd.adam)(0.1).init(PARAMS).slots) == {"z", "nu"}


def test_warmup_moves_on_the_first_step():
    """optax's warmup has rate 0 at first, which freezes z; here the first of n steps has 1/n of the rate."""
    tx = jaxsgd.schedule_free_adamw(0.4, warmup_steps=4)
    state, rates = tx.init(PARAMS), []
    for _ in range(6):
        _, state = tx.update(PARAMS, state, PARAMS)
        rates.append(float(jaxsgd.metrics(state)["learning_rate"]))
    assert rates == pytest.approx([0.1, 0.2, 0.3, 0.4, 0.4, 0.4])


def test_bad_arguments_in_words():
    with pytest.raises(ValueError, match="b1=0"):
        jaxsgd.schedule_free_adamw(0.1, b1=0.0)
    with pytest.raises(ValueError, match="warmup_steps=-3"):
        jaxsgd.schedule_free_adamw(0.1, warmup_steps=-3)
    with pytest.raises(TypeError, match="unknown hyperparameter nesterov=True"):
        jaxsgd.schedule_free_adamw(0.1, nesterov=True)
    with pytest.raises(ValueError, match="must not have tree-wide sums"):
        schedule_free(schedule_free(jaxsgd.sgd))


def test_state_dtype_is_what_z_rests_in():
    assert jaxsgd.schedule_free_adamw(0.1, state_dtype="bfloat16").init(PARAMS).slots["z"]["w"].dtype == jnp.bfloat16


def test_eval_params_finds_the_average_of_parameters():
    for wrap in (lambda tx: tx, lambda tx: optax.chain(optax.identity(), tx), jaxsgd.guard):
        tx = wrap(optax.chain(jaxsgd.sgd(0.1), jaxsgd.ema(0.5)))
        y, state = march(tx, PARAMS, steps=3)
        expected = optax.tree.get(state, "average")
        jax.tree.map(np.testing.assert_array_equal, jaxsgd.eval_params(state, y), expected)
        assert np.abs(expected["w"] - y["w"]).max() > 1e-3
