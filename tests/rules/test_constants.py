"""What a loss reads and nothing trains: constants of a step, on every road."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

import jaxsgd
from jaxsgd import TrainState, make_step, split_loss

RNG = np.random.default_rng(0)
PARAMS = {"w": np.float32(RNG.normal(size=(6, 4)))}
X = np.float32(RNG.normal(size=(16, 6)))
TEACHER = {"w": np.float32(RNG.normal(size=(6, 4))), "scale": np.float32(0.5), "classes": np.arange(4, dtype=np.int32)}


def loss_fn(params, batch, key, teacher):
    wanted = teacher["scale"] * (batch @ teacher["w"]) + teacher["classes"]
    return jnp.mean((batch @ params["w"] - wanted) ** 2)


def closed_over(params, batch, key):
    return loss_fn(params, batch, key, TEACHER)


def tx():
    return jaxsgd.adam(1e-2)


@pytest.fixture(scope="module")
def wanted():
    state, step = TrainState.create(PARAMS, tx()), make_step(closed_over, tx())
    for _ in range(2):
        state, report = step(state, X)
    return state.params, report["loss"]


def train(step, state, batch=X, constants=TEACHER):
    for _ in range(2):
        state, report = step(state, batch, constants)
    return state.params, report["loss"]


def mesh():
    return Mesh(np.array(jax.devices()[:4]), ("data",))


def one_device():
    return train(make_step(loss_fn, tx()), TrainState.create(PARAMS, tx()))


def in_microbatches():
    # Its leading axis of 16 is that of the batch: it would be split if it counted as examples.
    odd = {**TEACHER, "unused": np.zeros((16, 3), np.float32)}
    return train(make_step(loss_fn, tx(), accumulate=4), TrainState.create(PARAMS, tx()), constants=odd)


def on_a_mesh(**create):
    step = make_step(loss_fn, tx(), mesh=mesh())
    return train(step, TrainState.create(PARAMS, tx(), mesh=mesh(), **create))


def on_a_mesh_already():
    there = jax.device_put(TEACHER, jax.NamedSharding(mesh(), P()))
    step = make_step(loss_fn, tx(), mesh=mesh())
    return train(step, TrainState.create(PARAMS, tx(), mesh=mesh()), constants=there)


def explicit():
    there = jax.make_mesh((4,), ("data",), devices=jax.devices()[:4])
    return train(make_step(loss_fn, tx(), mesh=there), TrainState.create(PARAMS, tx(), mesh=there))


def mapped():
    step = make_step(loss_fn, tx(), axis_name="data")
    fn = jaxsgd.checked(jax.pmap(step.fn, "data", in_axes=(0, 0, None)))
    state = jax.tree.map(lambda x: jnp.stack([x, x]), TrainState.create(PARAMS, tx()))
    return jax.tree.map(lambda x: x[0], train(fn, state, X.reshape(2, 8, 6)))


def in_shard_map():
    step = make_step(loss_fn, tx(), axis_name="data")
    fn = jax.shard_map(step.fn, mesh=mesh(), in_specs=(P(), P("data"), P()), out_specs=P())
    return train(jax.jit(fn), TrainState.create(PARAMS, tx()))


ROADS = [one_device, in_microbatches, on_a_mesh, functools.partial(on_a_mesh, zero1="data"), on_a_mesh_already]
ROADS += [explicit, mapped, in_shard_map]


@pytest.mark.parametrize("road", ROADS, ids=lambda road: getattr(road, "__name__", "zero1"))
def test_a_step_reads_constants_as_if_closed_over(road, wanted):
    params, loss = road()
    np.testing.assert_allclose(params["w"], wanted[0]["w"], rtol=1e-5)
    np.testing.assert_allclose(loss, wanted[1], rtol=1e-5)


def test_new_constants_compile_nothing_and_are_not_donated():
    state, step = TrainState.create(PARAMS, tx()), make_step(loss_fn, tx())
    teacher = jax.tree.map(jnp.asarray, TEACHER)
    state, first = step(state, X, teacher)
    state, second = step(state, X, {**teacher, "scale": jnp.float32(2.0)})
    assert step.compiles == 1
    assert second["loss"] != first["loss"]
    np.testing.assert_array_equal(teacher["w"], TEACHER["w"])
    assert "donated" in jaxsgd.check_donation(step, state, X, teacher)


def test_models_and_rules_that_ask_for_the_loss_see_them():
    class Net(nnx.Module):
        def __init__(self, rngs):
            self.linear = nnx.Linear(6, 4, rngs=rngs)
            self.norm = nnx.BatchNorm(4, rngs=rngs)

        def __call__(self, x):
            return self.norm(self.linear(x))

    def nnx_loss(model, batch, key, teacher):
        return jnp.mean((model(batch) - batch @ teacher["w"]) ** 2)

    def stateful(params, model_state, batch, key, teacher):
        return loss_fn(params, batch, key, teacher), (model_state + 1, None)

    step = make_step(nnx_loss, jaxsgd.lbfgs())
    state, first = step(TrainState.create(Net(nnx.Rngs(0)), jaxsgd.lbfgs()), X, TEACHER)
    assert step(state, X, TEACHER)[1]["loss"] < first["loss"]
    state = TrainState.create(PARAMS, tx(), model_state=jnp.zeros(()))
    assert make_step(stateful, tx())(state, X, TEACHER)[0].model_state == 1
    split = split_loss(
        lambda p, batch, key, teacher: batch @ p["w"] - batch @ teacher["w"], lambda out, batch: jnp.mean(out**2)
    )
    gauss = jaxsgd.gauss_newton()
    state = TrainState.create(PARAMS, gauss)
    state, first = make_step(split, gauss)(state, X, TEACHER)
    assert make_step(split, gauss)(state, X, TEACHER)[1]["loss"] < first["loss"]


def test_wrong_calls_are_refused_in_words():
    state, step = TrainState.create(PARAMS, tx()), make_step(loss_fn, tx())
    with pytest.raises(TypeError, match=r"loss_fn: it needs the arguments \(params, batch, key\)"):
        step(state, X)
    with pytest.raises(TypeError, match=r"called with constants; it needs the arguments \(params, batch, key, consta"):
        make_step(closed_over, tx())(state, X, TEACHER)
    with pytest.raises(ValueError, match=r"constants: 'w' is an array of the state.*donate=False"):
        step(state, X, {**TEACHER, "w": state.params["w"]})
    gone = jax.tree.map(jnp.asarray, TEACHER)
    gone["w"].delete()
    with pytest.raises(RuntimeError, match="constants: an earlier step took"):
        step(state, X, gone)


def test_two_networks_read_each_other_in_one_program():
    """Each trains against the other's parameters, which no step may donate."""

    def first_loss(params, batch, key, other):
        return jnp.mean((batch @ params["w"] - batch @ other["w"]) ** 2)

    def second_loss(params, batch, key, other):
        return jnp.mean((batch @ params["w"] + batch @ other["w"]) ** 2)

    tx_1, tx_2 = jaxsgd.sgd(0.1), optax.adam(0.1)
    step_1, step_2 = make_step(first_loss, tx_1), make_step(second_loss, tx_2)

    @functools.partial(jax.jit, donate_argnums=(0, 1))
    def both(first, second, batch):
        new, report = step_1.fn(first, batch, second.params)
        second, other = step_2.fn(second, batch, first.params)
        return new, second, report["loss"], other["loss"]

    first, second = TrainState.create(PARAMS, tx_1), TrainState.create({"w": -PARAMS["w"]}, tx_2)
    for _ in range(30):
        first, second, loss, other = both(first, second, X)
    assert loss < 0.3 and other < 0.3
