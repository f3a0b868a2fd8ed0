"""The two conventions of momentum and the two forms of Nesterov, as facts."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import jaxsgd

FALL = optax.piecewise_constant_schedule(0.1, {10: 0.1})


def anneal(t):
    """From 0.5 to 0.9 over 20 steps, in float64 (optax's schedules compute in float32)."""
    return 0.5 + 0.4 * jnp.minimum(jnp.asarray(t, jnp.float64) / 20, 1)


def loss(w):
    return w[0] ** 2 + 4 * w[1] ** 2 + 0.1 * jnp.sin(5 * w[0])


START = np.array([-2.0, 1.5])


def walk(tx, steps=30, at=lambda state, w: w, start=START):
    w, state, points = jnp.asarray(start), tx.init(jnp.asarray(start)), []
    for _ in range(steps):
        updates, state = tx.update(jax.grad(loss)(at(state, w)), state, w)
        w = optax.apply_updates(w, updates)
        points.append(np.asarray(w))
    return np.stack(points), state


def test_trace_and_velocity_agree_under_a_constant_rate(x64):
    np.testing.assert_allclose(walk(jaxsgd.momentum(0.05))[0], walk(jaxsgd.velocity(0.05))[0], rtol=1e-12, atol=1e-14)
    np.testing.assert_array_equal(walk(jaxsgd.momentum(0.05))[0], walk(jaxsgd.sgd(0.05, momentum=0.9))[0])


def test_trace_and_velocity_part_under_a_schedule(x64):
    trace, velocity = walk(jaxsgd.momentum(FALL))[0], walk(jaxsgd.velocity(FALL))[0]
    np.testing.assert_allclose(trace[:10], velocity[:10], rtol=1e-12, atol=1e-14)
    # At the drop the velocity still carries the old steps, ten times what the trace moves.
    moved = [np.linalg.norm(path[10] - path[9]) for path in (trace, velocity)]
    assert moved[1] > 3 * moved[0]


def test_momentum_anneals_from_half_to_nine_tenths(x64):
    """v = mu_t v - lr g with mu from 0.5 to 0.9, by hand."""
    ours, state = walk(jaxsgd.velocity(0.05, momentum=anneal))
    w, v = START.copy(), np.zeros(2)
    for step in range(30):
        v = (0.5 + 0.4 * min(step / 20, 1)) * v - 0.05 * np.asarray(jax.grad(loss)(jnp.asarray(w)))
        w = w + v
        np.testing.assert_allclose(ours[step], w, rtol=1e-10)
    assert float(jaxsgd.metrics(state)["momentum"]) == pytest.approx(0.9)


@pytest.mark.parametrize("annealed", [False, True], ids=["constant", "annealed"])
def test_nesterov_forms_walk_the_same_path(x64, annealed):
    """With z = x + mu v, the look-ahead form on x is the variable transform on z."""
    mu = anneal if annealed else 0.9
    tx = jaxsgd.velocity(0.02, momentum=mu)
    at = lambda state, w: jaxsgd.look_ahead(state, w, momentum=mu)
    x, state, ahead = jnp.asarray(START), tx.init(jnp.asarray(START)), []
    for _ in range(30):
        updates, state = tx.update(jax.grad(loss)(at(state, x)), state, x)
        x = optax.apply_updates(x, updates)
        ahead.append(np.asarray(at(state, x)))
    transformed, _ = walk(jaxsgd.nesterov(0.02, momentum=mu))
    if not annealed:
        np.testing.assert_allclose(transformed, np.stack(ahead), rtol=1e-12, atol=1e-14)
    else:
        # The transform steps on with this step's mu, the look-ahead with the next one's; undo that.
        mus = np.array([float(anneal(t)) for t in range(31)])
        x, v = START.copy(), np.zeros(2)
        for t in range(30):
            v_new = mus[t] * v - 0.02 * np.asarray(jax.grad(loss)(jnp.asarray(x + mus[t] * v)))
            x, v = x + v_new, v_new
            np.testing.assert_allclose(ahead[t], x + mus[t + 1] * v, rtol=1e-10)


def test_look_ahead_is_not_momentum(x64):
    """The helper matters: without it the velocity form is plain momentum, and slower here."""
    tx = jaxsgd.velocity(0.05)
    plain, ahead = walk(tx, 60)[0], walk(tx, 60, at=jaxsgd.look_ahead)[0]
    assert np.abs(plain - ahead).max() > 0.1
    assert float(loss(ahead[-1])) < float(loss(plain[-1]))


def test_look_ahead_in_words():
    w = jnp.ones(2)
    with pytest.raises(ValueError, match="one state of jaxsgd.velocity is needed, found 0"):
        jaxsgd.look_ahead(jaxsgd.momentum(0.1).init(w), w)
    with pytest.raises(ValueError, match="momentum: it follows a schedule; pass look_ahead"):
        jaxsgd.look_ahead(jaxsgd.velocity(0.1, momentum=optax.linear_schedule(0.5, 0.9, 5)).init(w), w)


def test_look_ahead_through_a_chain_and_a_frozen_leaf():
    params = {"a": jnp.ones(2), "b": jnp.ones(2)}
    tx = optax.chain(optax.clip(10.0), jaxsgd.velocity(0.1, groups=[("b", {"frozen": True})]))
    _, state = tx.update(params, tx.init(params), params)
    ahead = jaxsgd.look_ahead(state, params)
    np.testing.assert_allclose(ahead["a"], 1 - 0.9 * 0.1)
    np.testing.assert_array_equal(ahead["b"], params["b"])


def test_plain_sgd_keeps_nothing():
    assert jax.tree.leaves(jaxsgd.sgd(0.1).init(jnp.ones(5)).slots) == []


@pytest.mark.parametrize("pure", [False, True])
def test_look_ahead_with_an_nnx_optimizer(pure):
    model = nnx.Linear(2, 3, rngs=nnx.Rngs(0))
    optimizer = nnx.Optimizer(model, jaxsgd.velocity(0.1, groups=[("bias", {"frozen": True})]), wrt=nnx.Param)
    params = nnx.state(model, nnx.Param)
    optimizer.update(model, jax.tree.map(jnp.ones_like, params))
    params = nnx.state(model, nnx.Param)
    params = nnx.to_pure_dict(params) if pure else params
    ahead = jaxsgd.look_ahead(optimizer.opt_state, params)
    assert jax.tree.structure(ahead) == jax.tree.structure(params)
    moved = jax.tree.map(lambda a, p: np.asarray(a - p), ahead, params)
    assert np.allclose(jax.tree.leaves(moved["kernel"])[0], -0.09) and not np.any(jax.tree.leaves(moved["bias"])[0])


@pytest.mark.parametrize(
    "storage",
    [
        jaxsgd.cast("bfloat16"),
        jaxsgd.int8(min_size=1, stochastic=False),
        jaxsgd.fp8(min_size=1, stochastic=False),
    ],
    ids=["bfloat16", "int8", "fp8"],
)
def test_look_ahead_of_a_stored_velocity(storage):
    params = {"a": jnp.ones(4)}
    tx = jaxsgd.velocity(0.1, storage=storage)
    _, state = tx.update(params, tx.init(params), params)
    np.testing.assert_allclose(jaxsgd.look_ahead(state, params)["a"], 1 - 0.9 * 0.1, rtol=2**-8)


def test_look_ahead_names_a_parameter_without_velocity():
    state = jaxsgd.velocity(0.1).init({"a": jnp.ones(2)})
    with pytest.raises(ValueError, match="it holds no velocity of 'b'"):
        jaxsgd.look_ahead(state, {"b": jnp.ones(2)})
