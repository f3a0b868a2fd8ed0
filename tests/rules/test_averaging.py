"""Schedule-free: what it evaluates, what it wraps, how it warms up."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import jaxsgd
from jaxsgd import schedule_free, schedule_free_eval_params

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
    state = schedule_free(jaxsgd.adam)(0.1).init(PARAMS)
    assert set(state.slots) == {"z", "nu"} and state.roles == {"extrapolated z": None}


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
    for wrapper in (schedule_free, jaxsgd.lookahead):
        for wrong in (optax.adam, jaxsgd.torch.Adam, "adam", None):
            with pytest.raises(TypeError, match="a rule such as jaxsgd.adam, or a gradient transformation"):
                wrapper(wrong)
        with pytest.raises(TypeError, match="give these arguments to the new rule"):
            wrapper(jaxsgd.adam, 0.1)
        with pytest.raises(TypeError, match="needed"):
            wrapper(optax.adam(0.1))
    with pytest.raises(ValueError, match="b1=0"):
        schedule_free(optax.sgd(0.1), 0.1, b1=0.0)


def test_state_dtype_is_what_z_rests_in():
    assert jaxsgd.schedule_free_adamw(0.1, state_dtype="bfloat16").init(PARAMS).slots["z"]["w"].dtype == jnp.bfloat16


def test_eval_params_finds_the_average_of_parameters():
    for wrap in (lambda tx: tx, lambda tx: optax.chain(optax.identity(), tx), jaxsgd.guard):
        tx = wrap(optax.chain(jaxsgd.sgd(0.1), jaxsgd.params_ema(0.5)))
        y, state = march(tx, PARAMS, steps=3)
        expected = optax.tree.get(state, "average")
        jax.tree.map(np.testing.assert_array_equal, jaxsgd.eval_params(state, y), expected)
        assert np.abs(expected["w"] - y["w"]).max() > 1e-3


# -- optax's calls -------------------------------------------------------------------------------

OPTAX_SCHEDULE_FREE = optax.contrib.schedule_free
WARMING = optax.linear_schedule(0.0, 0.1, 5)
CALLS = {
    "sgd": (optax.sgd(0.1), (0.1,)),
    "positional": (optax.adam(0.1, b1=0.0), (0.1, 0.8, 1.0)),
    "schedule": (optax.adamw(WARMING, b1=0.0), (WARMING, 0.95)),
    "ours": (jaxsgd.adamw(0.1, b1=0.0), (0.1,)),
    "b1=1": (optax.sgd(0.1), (0.1, 1.0)),
}


@pytest.mark.parametrize("call", CALLS)
def test_schedule_free_around_a_transformation_is_optax_schedule_free(x64, call):
    base, arguments = CALLS[call]
    start = jax.tree.map(lambda p: p.astype(np.float64), PARAMS)
    ours, state = march(schedule_free(base, *arguments), start)
    theirs, their_state = march(OPTAX_SCHEDULE_FREE(base, *arguments), start)
    x = optax.contrib.schedule_free_eval_params(their_state, theirs)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-12), (ours, state.z), (theirs, their_state.z))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-11), schedule_free_eval_params(state, ours), x)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-11), jaxsgd.eval_params(their_state, theirs), x)
    assert [x.dtype for x in jax.tree.leaves(state)] == [x.dtype for x in jax.tree.leaves(their_state)]


def test_schedule_free_around_a_transformation_keeps_float32_under_bf16():
    tx, p = schedule_free(optax.sgd(1.0), 1.0), jnp.ones(4, jnp.bfloat16)
    step = lambda s, _: (tx.update(jnp.zeros_like(p), s, p)[1], None)
    state = jax.jit(lambda: jax.lax.scan(step, tx.init(p), length=2000)[0])()
    assert float(state.weight_sum) == 2000.0 and state.z.dtype == jnp.float32
    assert tx.update(p, state, p)[0].dtype == jaxsgd.eval_params(state, p).dtype == jnp.bfloat16
    assert schedule_free(optax.sgd(1.0), 1.0, state_dtype="bfloat16").init(PARAMS).z["w"].dtype == jnp.bfloat16


def test_schedule_free_around_a_transformation_is_one():
    tx = schedule_free(optax.sgd(0.1), 0.1)
    with pytest.raises(ValueError, match=r"params: schedule_free needs them"):
        tx.update(PARAMS, tx.init(PARAMS))
    y, state = march(tx, PARAMS)
    x = jaxsgd.eval_params(state, y)
    parts = optax.partition({"s": tx, "a": optax.set_to_zero()}, {"w": "s", "b": "a"})
    for wrapped in (optax.chain(optax.identity(), tx), optax.apply_if_finite(tx, 2), optax.MultiSteps(tx, 1), parts):
        inside, state = march(wrapped, PARAMS)
        np.testing.assert_allclose(jaxsgd.eval_params(state, inside)["w"], x["w"], rtol=1e-5)
    before = tx.init(PARAMS)
    _, after = tx.update(PARAMS, before, PARAMS)
    assert jax.tree.map(lambda x: (x.shape, x.dtype, x.weak_type), before) == jax.tree.map(
        lambda x: (x.shape, x.dtype, x.weak_type), after
    )


def test_lookahead_around_a_transformation_is_optax_lookahead():
    pair = optax.LookaheadParams.init_synced(PARAMS)
    ours, theirs = (make(optax.sgd(0.1), 5, slow_step_size=0.5) for make in (jaxsgd.lookahead, optax.lookahead))
    jax.tree.map(
        np.testing.assert_array_equal,
        ours.update(PARAMS, ours.init(pair), pair),
        theirs.update(PARAMS, theirs.init(pair), pair),
    )


# -- what is evaluated -----------------------------------------------------------------------------


def test_eval_params_asks_for_the_role_and_not_for_the_name():
    rules = dict(jaxsgd.RULES)
    try:

        @jaxsgd.rule(name="named_average")
        def named(g, average, z, *, t):
            r"""Named (Nobody 2000, none): $u = g$."""
            return g, average + g + t, z + g

        y, state = march(named(0.1), PARAMS)
        jax.tree.map(np.testing.assert_array_equal, jaxsgd.eval_params(state, y), y)
        assert state.roles == {}
    finally:
        jaxsgd.RULES.clear()
        jaxsgd.RULES.update(rules)


@pytest.mark.parametrize("make", [jaxsgd.schedule_free_sgd, jaxsgd.torch.ASGD], ids=["z", "average"])
def test_eval_params_of_other_parameters_is_refused(make):
    state = make(0.1).init({"w": jnp.ones((8, 1))})
    with pytest.raises(ValueError, match=r"'w' has the shape \(8, 1\), the parameter \(8, 10\)"):
        jaxsgd.eval_params(state, {"w": jnp.ones((8, 10))})
    with pytest.raises(ValueError, match="the leaf 'w', the params have none"):
        jaxsgd.eval_params(state, {"v": jnp.ones((8, 1))})


@pytest.mark.parametrize(
    "tx",
    [
        jaxsgd.schedule_free_adamw(0.1),
        schedule_free(optax.sgd(0.1), 0.1),
        jaxsgd.torch.ASGD(0.1, t0=0.0),
        optax.chain(optax.sgd(0.1), jaxsgd.params_ema(0.5)),
    ],
    ids=["rule", "transformation", "asgd", "ema"],
)
def test_eval_params_of_an_nnx_optimizer(tx):
    model = nnx.Linear(2, 3, rngs=nnx.Rngs(0))
    optimizer = nnx.Optimizer(model, tx, wrt=nnx.Param)
    params = nnx.to_pure_dict(nnx.state(model, nnx.Param))
    state = tx.init(params)
    for step in range(4):
        optimizer.update(model, jax.tree.map(lambda p, s=step: p + s, nnx.state(model, nnx.Param)))
        updates, state = tx.update(jax.tree.map(lambda p, s=step: p + s, params), state, params)
        params = optax.apply_updates(params, updates)
    expected = jaxsgd.eval_params(state, params)
    assert np.abs(expected["kernel"] - params["kernel"]).max() > 1e-4
    of_variables = jaxsgd.eval_params(optimizer.opt_state, nnx.state(model, nnx.Param))
    of_arrays = jaxsgd.eval_params(optimizer.opt_state, nnx.to_pure_dict(nnx.state(model, nnx.Param)))
    assert jax.tree.structure(of_variables) == jax.tree.structure(nnx.state(model, nnx.Param))
    for found in (nnx.to_pure_dict(of_variables), of_arrays):
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6), found, expected)


def test_eval_params_does_not_share_arrays_with_the_state():
    tx = optax.chain(jaxsgd.torch.ASGD(0.1, t0=0.0), jaxsgd.params_ema(0.5))
    y, state = march(tx, PARAMS, steps=3)
    x = jaxsgd.eval_params(state, y)
    held = {id(leaf) for leaf in jax.tree.leaves(state)}
    assert not any(id(leaf) in held for leaf in jax.tree.leaves(x))


def test_states_can_be_donated():
    """No array stands for two."""
    params = jnp.ones(3)
    for tx in (jaxsgd.schedule_free(optax.sgd(0.1), 0.1), jaxsgd.params_ema(0.9), jaxsgd.ema(0.9)):
        update = jax.jit(tx.update, donate_argnums=1)
        state = update(params, tx.init(params), params)[1]
        update(params, state, params)
