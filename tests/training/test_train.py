"""The train step on one device: linen, NNX and plain functions; compiled once, donating, clear errors."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from flax.core import freeze

import jaxsgd
from jaxsgd import TrainState, make_step
from jaxsgd.batches import batch_size

X = np.random.RandomState(0).standard_normal((32, 4)).astype(np.float32)
Y = (X @ np.arange(1.0, 5.0, dtype=np.float32)[:, None] + 0.5).astype(np.float32)
BATCH = {"x": X, "y": Y}


def mse(prediction, batch):
    return ((prediction - batch["y"]) ** 2).mean()


def linear_loss(params, batch, key):
    return mse(batch["x"] @ params["w"] + params["b"], batch)


LINEAR = {"w": jnp.zeros((4, 1)), "b": jnp.zeros(1)}


def train(loss_fn, tx, model, steps=60, **kwargs):
    state, step = TrainState.create(model, tx, **kwargs), make_step(loss_fn, tx)
    for _ in range(steps):
        state, report = step(state, BATCH)
    assert step.compiles == 1
    return state, jax.device_get(report)


def test_a_plain_function_on_a_dict():
    state, report = train(linear_loss, jaxsgd.adam(0.2), LINEAR, 200)
    assert report["loss"] < 1e-2
    assert int(report["step"]) == 200 == int(state.step)
    assert set(report) == {"step", "loss", "gradient_norm", "update_norm", "learning_rate"}


def test_the_step_is_the_loop_by_hand():
    tx = jaxsgd.adamw(0.1, weight_decay=0.1)
    state, report = train(linear_loss, tx, LINEAR, 5)
    params, opt_state = LINEAR, tx.init(LINEAR)
    for _ in range(5):
        loss, grads = jax.value_and_grad(linear_loss)(params, BATCH, None)
        updates, opt_state = tx.update(grads, opt_state, params)
        params = optax.apply_updates(params, updates)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5), state.params, params)
    assert report["loss"] == pytest.approx(float(loss), rel=1e-5)
    assert report["gradient_norm"] == pytest.approx(float(optax.tree.norm(grads)), rel=1e-5)
    assert report["update_norm"] == pytest.approx(float(optax.tree.norm(updates)), rel=1e-5)
    assert report["weight_decay"] == np.float32(0.1)


def test_linen_apply():
    model = nn.Sequential([nn.Dense(8), nn.relu, nn.Dense(1)])
    params = model.init(jax.random.key(0), X)["params"]
    _, report = train(lambda p, b, key: mse(model.apply({"params": p}, b["x"]), b), jaxsgd.adam(0.05), params, 200)
    assert report["loss"] < 0.5


def test_linen_with_batch_statistics():
    class Net(nn.Module):
        @nn.compact
        def __call__(self, x):
            return nn.Dense(1)(nn.BatchNorm(use_running_average=False, momentum=0.5)(x))

    variables = Net().init(jax.random.key(0), X)

    def loss_fn(params, stats, batch, key):
        out, new = Net().apply({"params": params, "batch_stats": stats}, batch["x"], mutable=["batch_stats"])
        return mse(out, batch), (new["batch_stats"], {"mean_prediction": out.mean()})

    state, report = train(loss_fn, jaxsgd.sgd(0.1), variables["params"], 30, model_state=variables["batch_stats"])
    np.testing.assert_allclose(state.model_state["BatchNorm_0"]["mean"], X.mean(0), atol=1e-5)
    assert np.isfinite(report["aux"]["mean_prediction"])
    with pytest.raises(ValueError, match=r"returns \(loss, \(model_state, aux\)\)"):
        make_step(lambda p, m, b, k: jnp.float32(0), jaxsgd.sgd(0.1))(
            TrainState.create(LINEAR, jaxsgd.sgd(0.1), model_state={"a": jnp.ones(1)}), BATCH
        )


class Net(nnx.Module):
    def __init__(self, rngs):
        self.dense = nnx.Linear(4, 8, rngs=rngs)
        self.norm = nnx.BatchNorm(8, momentum=0.5, rngs=rngs)
        self.drop = nnx.Dropout(0.2, rngs=rngs)
        self.head = nnx.Linear(8, 1, rngs=rngs)
        self.calls = nnx.Variable(jnp.zeros((), jnp.int32))

    def __call__(self, x):
        self.calls[...] += 1
        return self.head(self.drop(nnx.relu(self.norm(self.dense(x)))))


def test_nnx_module_with_statistics_dropout_and_counters():
    model = Net(nnx.Rngs(0))
    before = jax.tree.map(np.asarray, nnx.to_pure_dict(nnx.state(model, nnx.Param)))
    state, report = train(lambda m, b, key: mse(m(b["x"]), b), jaxsgd.adam(0.05), model, 150)
    trained = state.model
    assert int(trained.calls[...]) == 150 and int(model.calls[...]) == 0
    assert np.abs(trained.norm.mean[...]).max() > 0
    trained.eval()
    assert float(mse(trained(X), BATCH)) < 2.0 < float(np.var(Y))
    # The caller's model is untouched and alive: the step donates its own copies only.
    jax.tree.map(np.testing.assert_array_equal, nnx.to_pure_dict(nnx.state(model, nnx.Param)), before)


def test_nnx_group_names_are_the_same_in_init_and_update():
    tx = jaxsgd.adamw(0.1, groups=[("dense/kernel$", {"frozen": True}), (r"(bias|scale)$", {"weight_decay": 0.0})])
    model = Net(nnx.Rngs(0))
    state, _ = train(lambda m, b, key: mse(m(b["x"]), b), tx, model, 3)
    np.testing.assert_array_equal(state.model.dense.kernel[...], model.dense.kernel[...])
    assert np.abs(state.model.dense.bias[...] - model.dense.bias[...]).max() > 0
    optimizer = nnx.Optimizer(model, tx, wrt=nnx.Param)
    optimizer.update(model, nnx.grad(lambda m: mse(m(X), BATCH))(model))


def test_three_learning_rates_one_compile():
    tx = jaxsgd.adam(1e-3)
    step, losses = make_step(linear_loss, tx), []
    for rate in (1e-3, 1e-2, 1e-1):
        state = TrainState.create(LINEAR, tx)
        state = state.replace(opt_state=jaxsgd.with_hyper(state.opt_state, learning_rate=rate))
        for _ in range(20):
            state, report = step(state, BATCH)
        losses.append(float(report["loss"]))
        assert float(report["learning_rate"]) == np.float32(rate)
    assert step.compiles == 1 and step.jitted._cache_size() == 1
    assert losses == sorted(losses, reverse=True)


def test_the_state_is_donated_and_the_callers_params_are_not():
    tx = jaxsgd.adam(0.1)
    params = {"w": jnp.zeros((4, 1)), "b": jnp.zeros(1)}
    state, step = TrainState.create(params, tx), make_step(linear_loss, tx)
    new, _ = step(state, BATCH)
    assert state.params["w"].is_deleted() and state.opt_state.slots["mu"]["w"].is_deleted()
    assert not params["w"].is_deleted()
    with pytest.raises(RuntimeError, match="state: an earlier step took this state's memory"):
        step(state, BATCH)
    keep = make_step(linear_loss, tx, donate=False)
    once, twice = keep(new, BATCH)[0], keep(new, BATCH)[0]
    np.testing.assert_array_equal(once.params["w"], twice.params["w"])


def test_the_key_differs_by_step_and_repeats_by_seed():
    def noisy(params, batch, key):
        return linear_loss(params, batch, key) + 0 * params["b"].sum(), jax.random.uniform(key)

    def draws(seed):
        tx = jaxsgd.sgd(0.01)
        state, step, out = TrainState.create(LINEAR, tx, key=seed), make_step(noisy, tx), []
        for _ in range(3):
            state, report = step(state, BATCH)
            out.append(float(report["aux"]))
        return out

    assert len(set(draws(1))) == 3 and draws(1) == draws(1) and draws(1) != draws(2)
    assert draws(1) == [float(jax.random.uniform(jax.random.fold_in(jax.random.key(1), i))) for i in range(3)]


def test_the_pure_step_scans():
    tx = jaxsgd.momentum(0.02)
    step = make_step(linear_loss, tx)
    batches = jax.tree.map(lambda x: jnp.stack([x] * 40), BATCH)
    state, report = jax.jit(lambda s: jax.lax.scan(step.fn, s, batches))(TrainState.create(LINEAR, tx))
    assert report["loss"].shape == (40,) and report["loss"][-1] < report["loss"][0]
    assert int(state.step) == 40


def test_gradient_at_the_look_ahead_point():
    tx = jaxsgd.velocity(0.02)
    state, ahead = TrainState.create(LINEAR, tx), make_step(linear_loss, tx, gradient_at=jaxsgd.look_ahead)
    other = jaxsgd.nesterov(0.02)
    transformed, step = TrainState.create(LINEAR, other), make_step(linear_loss, other)
    for _ in range(10):
        state, _ = ahead(state, BATCH)
        transformed, _ = step(transformed, BATCH)
    points = jaxsgd.look_ahead(state.opt_state, state.params)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4), points, transformed.params)


def test_any_optax_transformation_works():
    _, report = train(linear_loss, optax.adam(0.2), LINEAR, 5)
    assert set(report) == {"step", "loss", "gradient_norm", "update_norm"}
    tx = optax.chain(optax.clip_by_global_norm(1.0), jaxsgd.adam(0.2))
    assert train(linear_loss, tx, LINEAR, 5)[1]["learning_rate"] == np.float32(0.2)


def test_evaluation_uses_the_average_of_a_schedule_free_rule():
    tx = jaxsgd.schedule_free_adamw(0.1)
    state, _ = train(linear_loss, tx, LINEAR, 20)
    expected = jaxsgd.eval_params(state.opt_state, state.params)
    np.testing.assert_array_equal(state.eval_params["w"], expected["w"])
    assert np.abs(state.eval_params["w"] - state.params["w"]).max() > 1e-3


@pytest.mark.parametrize(
    ("batch", "message"),
    [
        ({"x": X, "y": Y[:31]}, "'x' has 32 examples, 'y' has 31; they must be the same"),
        ({"x": X[:0], "y": Y[:0]}, "'x' is empty; at least one example"),
    ],
)
def test_a_batch_that_does_not_fit(batch, message):
    tx = jaxsgd.sgd(0.1)
    state = TrainState.create(LINEAR, tx)
    with pytest.raises(ValueError, match=message):
        make_step(linear_loss, tx)(state, batch)
    assert not state.params["w"].is_deleted(), "a refused batch must not cost the state"


def test_another_batch_size_warns():
    tx = jaxsgd.sgd(0.1)
    state, step = TrainState.create(LINEAR, tx), make_step(linear_loss, tx)
    state, _ = step(state, BATCH)
    with pytest.warns(UserWarning, match="batch: 8 examples, so far 32: the step compiles again"):
        state, _ = step(state, {"x": X[:8], "y": Y[:8]})
    state, _ = step(state, BATCH)
    assert step.compiles == 2
    assert batch_size({"scalar": 3.0}) is None


def test_bad_input_raises_a_clear_error():
    tx = jaxsgd.sgd(0.1)
    with pytest.raises(ValueError, match=r"loss_fn: the loss has the shape \(32, 1\); a scalar is needed"):
        per_example = lambda p, b, k: (b["x"] @ p["w"] - b["y"]) ** 2
        make_step(per_example, tx)(TrainState.create(LINEAR, tx), BATCH)
    with pytest.raises(ValueError, match="params: 'w' is int32"):
        TrainState.create({"w": jnp.arange(3)}, tx)
    with pytest.raises(ValueError, match="model_state: an nnx.Module carries its own"):
        TrainState.create(Net(nnx.Rngs(0)), tx, model_state={})
    with pytest.raises(ValueError, match="was not made from an nnx.Module"):
        _ = TrainState.create(LINEAR, tx).model


@pytest.mark.parametrize("part", ["params", "opt_state", "key"])
def test_a_state_of_which_a_part_was_donated_is_refused_in_words(part):
    tx = jaxsgd.adam(1e-2)
    old = TrainState.create({"w": jnp.ones(3)}, tx)
    step = make_step(lambda p, batch, key: jnp.sum(p["w"] ** 2) * batch.mean(), tx)
    new, _ = step(old, jnp.ones(4))
    with pytest.raises(RuntimeError, match=r"state: an earlier step took this state's memory.*donate=False"):
        step(new.replace(**{part: getattr(old, part)}), jnp.ones(4))
    assert np.isfinite(step(new, jnp.ones(4))[1]["loss"])  # nothing is lost


STATE_PARAMS = {"w": np.ones((3, 2), np.float32)}
STATE_X = np.ones((4, 3), np.float32)


def trained_with(change, given, accumulate=1):
    """The model's state after a step whose loss changes it so."""

    def loss_fn(params, carried, batch, key):
        return jnp.mean((batch @ params["w"]) ** 2), (change(carried), None)

    tx = jaxsgd.sgd(0.1)
    state = TrainState.create(STATE_PARAMS, tx, model_state=jax.tree.map(jnp.copy, given))
    step = make_step(loss_fn, tx, accumulate=accumulate)
    for _ in range(2):
        state, _ = step(state, STATE_X)
    assert step.compiles == 1
    return state.model_state


GIVEN = {"mean": jnp.zeros(4), "seen": jnp.zeros((), jnp.int32)}


@pytest.mark.parametrize("accumulate", [1, 2])
def test_a_models_state_keeps_its_dtypes_and_containers(accumulate):
    def change(carried):
        new = {"seen": carried["seen"] + 1, "mean": (carried["mean"] + 1).astype(jnp.bfloat16)}
        return freeze(new)

    found = trained_with(change, GIVEN, accumulate)
    assert found["mean"].dtype == jnp.float32 and found["seen"] == 2 * accumulate
    assert jax.tree.structure(found) == jax.tree.structure(GIVEN)


@pytest.mark.parametrize("accumulate", [1, 2])
@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda s: {**s, "seen": s["seen"] + 1.0}, "state 'seen' is float32 after it, int32 before"),
        (lambda s: {**s, "mean": jnp.zeros(5)}, r"state 'mean' has the shape \(5,\) after it, \(4,\) before"),
        (lambda s: {"mean": s["mean"]}, r"other leaves after it \(missing: seen\)"),
        (lambda s: {**s, "more": s["mean"]}, r"other leaves after it \(new: more\)"),
    ],
    ids=["kind", "shape", "missing", "new"],
)
def test_a_models_state_that_changes_its_form_is_refused(change, words, accumulate):
    with pytest.raises(ValueError, match=words):
        trained_with(change, GIVEN, accumulate)


def test_a_model_that_makes_variables_says_what_to_take_away():
    class Sowing(nnx.Module):
        def __init__(self, rngs):
            self.linear = nnx.Linear(3, 2, rngs=rngs)

        def __call__(self, x):
            x = self.linear(x)
            self.seen = nnx.Intermediate(x)
            return x

    def popped(model, batch, key):
        loss = jnp.mean(model(batch) ** 2)
        nnx.pop(model, nnx.Intermediate)
        return loss

    tx = jaxsgd.sgd(0.1)
    with pytest.raises(ValueError, match=r"other leaves after it \(new: seen.*nnx.pop"):
        make_step(lambda model, batch, key: jnp.mean(model(batch) ** 2), tx)(
            TrainState.create(Sowing(nnx.Rngs(0)), tx), STATE_X
        )
    assert np.isfinite(make_step(popped, tx)(TrainState.create(Sowing(nnx.Rngs(0)), tx), STATE_X)[1]["loss"])


@pytest.mark.parametrize("accumulate", [1, 2])
def test_aux_that_is_no_array_is_named(accumulate):
    step = make_step(
        lambda p, batch, key: (jnp.sum(p["w"]) * batch.mean(), {"name": "x"}), jaxsgd.sgd(0.1), accumulate=accumulate
    )
    with pytest.raises(TypeError, match="aux 'name' is a str; arrays and numbers are needed"):
        step(TrainState.create(STATE_PARAMS, jaxsgd.sgd(0.1)), STATE_X)


@pytest.mark.parametrize("weight", [None, "tokens", lambda batch: jnp.sum(batch)], ids=["none", "aux", "batch"])
def test_scalars_in_aux_keep_their_form_under_a_weight(weight):
    def loss(params, batch):
        found = {"tokens": jnp.sum(batch), "any": jnp.any(batch > 0), "phase": jnp.exp(1j * jnp.sum(batch))}
        return jnp.sum(params["w"] ** 2) * jnp.mean(batch), found

    tx = jaxsgd.sgd(0.1)
    _, report = make_step(loss, tx, weight=weight)(TrainState.create({"w": jnp.ones(3)}, tx), np.ones(4, np.float32))
    assert {name: x.shape for name, x in report["aux"].items()} == {"tokens": (), "any": (), "phase": ()}
    assert report["aux"]["any"] and report["aux"]["tokens"] == 4
