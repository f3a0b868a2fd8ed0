"""What the optimizer does not move is not differentiated and counts nothing: ways to freeze x roads x models."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

import jaxsgd
from jaxsgd import TrainState, make_step
from jaxsgd.transforms.moving import moving

WIDTH, LAYERS = 32, 4
FROZEN = [("layer_[01]", {"frozen": True})]
MOVES = [False, False, False, False, True, True, True, True]
X = np.random.default_rng(0).normal(size=(64, WIDTH)).astype(np.float32)


def start():
    keys = jax.random.split(jax.random.key(0), LAYERS)
    scale = WIDTH**-0.5
    return {
        f"layer_{i}": {"b": jnp.zeros(WIDTH), "w": scale * jax.random.normal(k, (WIDTH, WIDTH))}
        for i, k in enumerate(keys)
    }


def loss(params, batch, key=None, stop=False):
    del key
    x = batch
    for i in range(LAYERS):
        layer = params[f"layer_{i}"]
        if stop and i < 2:
            layer = jax.lax.stop_gradient(layer)
        x = jnp.tanh(x @ layer["w"] + layer["b"])
    return jnp.mean((x - 1) ** 2)


def stopped(params, batch, key=None):
    return loss(params, batch, key, stop=True)


def labels(params):
    return {name: "rest" if name in ("layer_0", "layer_1") else "train" for name in params}


def is_rest(params):
    return {name: label == "rest" for name, label in labels(params).items()}


def zeroed():
    return optax.chain(optax.adam(1e-2), optax.masked(optax.set_to_zero(), is_rest))


WAYS = {
    "groups": lambda: jaxsgd.adamw(1e-2, groups=FROZEN),
    "groups, clipped": lambda: optax.chain(jaxsgd.clip_by_global_norm(0.01), jaxsgd.adamw(1e-2, groups=FROZEN)),
    "groups, guarded": lambda: jaxsgd.guard(jaxsgd.adamw(1e-2, groups=FROZEN)),
    "groups, accumulated": lambda: jaxsgd.accumulate(jaxsgd.sgd(1e-2, groups=FROZEN), 2),
    "groups, int8": lambda: jaxsgd.adamw(1e-2, groups=FROZEN, storage=jaxsgd.int8()),
    "groups, schedule-free": lambda: jaxsgd.schedule_free_adamw(1e-2, groups=FROZEN),
    "groups, matrices": lambda: jaxsgd.muon_jordan(1e-2, groups=FROZEN),
    "groups, apply_if_finite": lambda: optax.apply_if_finite(jaxsgd.adamw(1e-2, groups=FROZEN), 4),
    "groups, plateau": lambda: optax.chain(jaxsgd.adam(1e-2, groups=FROZEN), optax.contrib.reduce_on_plateau()),
    "partition": lambda: optax.chain(
        optax.clip_by_global_norm(0.01),
        optax.partition({"train": optax.adam(1e-2), "rest": optax.set_to_zero()}, labels),
    ),
    "masked": zeroed,
    "MultiSteps": lambda: optax.MultiSteps(zeroed(), 2).gradient_transformation(),
    "injected": lambda: optax.inject_hyperparams(jaxsgd.adamw, static_args=("groups",))(1e-2, groups=FROZEN),
}


def moves(tx):
    params = start()
    update = optax.with_extra_args_support(tx).update
    return moving(update, tx.init(params), params, lambda p: loss(p, X))


@pytest.mark.parametrize("way", WAYS)
def test_what_rests_is_known(way):
    assert moves(WAYS[way]()) == MOVES


@pytest.mark.parametrize(
    "tx",
    [
        optax.sgd(0.0),
        jaxsgd.sgd(0.0),
        optax.sgd(optax.constant_schedule(0.0)),
        jaxsgd.adamw(1e-2, groups=[("w", {"lr_mult": 0.5})]),
        jaxsgd.momo(1.0),  # asks for the value
        optax.lbfgs(),  # asks for the loss
        jaxsgd.newton_cg(),
        jaxsgd.torch.Adam(1e-2),
    ],
    ids=["rate 0", "our rate 0", "schedule of 0", "lr_mult", "momo", "optax.lbfgs", "newton_cg", "torch"],
)
def test_what_only_looks_still_is_not_frozen(tx):
    assert all(moves(tx))


@pytest.mark.parametrize("way", ["groups", "groups, clipped", "groups, guarded", "partition"])
def test_frozen_leaves_cost_no_backward_pass(way):
    tx = WAYS[way]()

    def taken(loss_fn):
        state, step = TrainState.create(start(), tx), make_step(loss_fn, tx)
        program = step.lower(state, X).compile()
        state, report = step(state, X)
        memory = program.memory_analysis().temp_size_in_bytes
        return program.cost_analysis()["flops"], memory, report["gradient_norm"], state.params

    flops, memory, norm, params = taken(loss)
    least, least_memory, least_norm, wanted = taken(stopped)
    assert flops <= 1.05 * least
    assert memory <= 1.05 * least_memory
    np.testing.assert_allclose(norm, least_norm, rtol=1e-6)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6), params, wanted)


def frozen_is_bad(params, batch, key=None):
    """A loss whose gradient is inf in the frozen part alone."""
    return loss(params, batch, key) + jnp.sum(jnp.sqrt(jnp.abs(params["layer_0"]["b"])))


def test_a_gradient_that_is_not_wanted_skips_no_step():
    tx = jaxsgd.guard(optax.chain(jaxsgd.clip_by_global_norm(1.0), jaxsgd.adamw(1e-2, groups=FROZEN)))
    state, report = make_step(frozen_is_bad, tx)(TrainState.create(start(), tx), X)
    assert report["skipped"] == 0
    assert np.isfinite(report["gradient_norm"])


def one_device(tx):
    return make_step(loss, tx)(TrainState.create(start(), tx), X)


def in_microbatches(tx):
    return make_step(loss, tx, accumulate=2)(TrainState.create(start(), tx), X)


def on_a_mesh(tx, **create):
    mesh = Mesh(np.array(jax.devices()[:4]), ("data",))
    return make_step(loss, tx, mesh=mesh)(TrainState.create(start(), tx, mesh=mesh, **create), X)


def mapped(tx):
    step, state = make_step(loss, tx, axis_name="data"), TrainState.create(start(), tx)
    state = jax.tree.map(lambda x: jnp.stack([x, x]), state)
    state, report = jax.pmap(step.fn, "data")(state, X.reshape(2, -1, WIDTH))
    return jax.tree.map(lambda x: x[0], (state, report))


def in_shard_map(tx):
    mesh = Mesh(np.array(jax.devices()[:2]), ("data",))
    step = make_step(loss, tx, axis_name="data")
    fn = jax.shard_map(step.fn, mesh=mesh, in_specs=(P(), P("data")), out_specs=P())
    return jax.jit(fn)(TrainState.create(start(), tx), X)


ROADS = {
    "accumulate": in_microbatches,
    "mesh": on_a_mesh,
    "ZeRO-1": lambda tx: on_a_mesh(tx, zero1="data"),
    "pmap": mapped,
    "shard_map": in_shard_map,
}


@pytest.mark.parametrize("road", ROADS)
def test_every_road_agrees(road):
    tx = WAYS["groups, clipped"]()
    state, report = ROADS[road](tx)
    wanted, alone = one_device(tx)
    for name in ("loss", "gradient_norm", "update_norm"):
        np.testing.assert_allclose(report[name], alone[name], rtol=1e-5, err_msg=name)
    for (path, a), b in zip(jax.tree.leaves_with_path(state.params), jax.tree.leaves(wanted.params), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6, err_msg=str(path))
    jax.tree.map(
        lambda a, b: np.testing.assert_array_equal(a, b),
        {n: state.params[n] for n in ("layer_0", "layer_1")},
        {n: start()[n] for n in ("layer_0", "layer_1")},
    )


def test_an_nnx_model_keeps_its_frozen_part_and_its_statistics_move():
    class Net(nnx.Module):
        def __init__(self, rngs):
            self.body = nnx.Linear(WIDTH, WIDTH, rngs=rngs)
            self.norm = nnx.BatchNorm(WIDTH, rngs=rngs)
            self.head = nnx.Linear(WIDTH, 1, rngs=rngs)

        def __call__(self, x):
            return self.head(self.norm(self.body(x)))

    model = Net(nnx.Rngs(0))
    tx = optax.chain(jaxsgd.clip_by_global_norm(1.0), jaxsgd.adamw(1e-2, groups=[("body", {"frozen": True})]))
    step = make_step(lambda model, batch, key: jnp.mean((model(batch) - 1) ** 2), tx)
    state, report = step(TrainState.create(model, tx), X)
    np.testing.assert_array_equal(state.model.body.kernel[...], model.body.kernel[...])
    assert np.any(state.model.head.kernel[...] != model.head.kernel[...])
    assert np.any(state.model.norm.mean[...] != model.norm.mean[...])
    head = jax.grad(lambda p: jnp.mean((_with(model, p)(X) - 1) ** 2))(nnx.state(model, nnx.Param))
    moving_norm = optax.tree.norm({"norm": head["norm"], "head": head["head"]})
    np.testing.assert_allclose(report["gradient_norm"], moving_norm, rtol=1e-5)


def _with(model, params):
    graphdef, _, rest = nnx.split(model, nnx.Param, ...)
    return nnx.merge(graphdef, params, rest, copy=True)
