"""Sharding as others state it: meshes with Explicit axes, and annotations of NNX and linen models."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen, nnx
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

import jaxsgd
from jaxsgd import TrainState, make_step
from jaxsgd.paths import leaf_names

RNG = np.random.default_rng(0)
PARAMS = {"w": RNG.normal(size=(16, 32)).astype(np.float32) / 4, "v": RNG.normal(size=(32, 8)).astype(np.float32) / 6}
SPECS = {"w": P(None, "model"), "v": P("model", None)}
BATCH = {"x": RNG.normal(size=(32, 16)).astype(np.float32), "y": RNG.normal(size=(32, 8)).astype(np.float32)}


@pytest.fixture(scope="module")
def explicit():
    return jax.make_mesh((4, 2), ("data", "model"))


@pytest.fixture(scope="module")
def auto(explicit):
    return Mesh(explicit.devices, explicit.axis_names)


def loss_fn(params, batch, key):
    noise = 0.01 * jax.random.normal(key, batch["y"].shape)
    error = jnp.tanh(batch["x"] @ params["w"]) @ params["v"] - batch["y"] + noise
    return jnp.mean(error**2), {"largest": jnp.max(jnp.abs(error)), "errors": error}


def close(got, wanted, tolerance=2e-6):
    def same(a, b):
        np.testing.assert_allclose(np.asarray(a, np.float32), np.asarray(b, np.float32), rtol=tolerance, atol=tolerance)

    jax.tree.map(lambda a, b: None if jnp.issubdtype(a.dtype, jax.dtypes.prng_key) else same(a, b), got, wanted)


# -- Explicit axes ---------------------------------------------------------------------------------

KINDS = {
    "adamw": (lambda: jaxsgd.adamw(1e-2), {}, {}),
    "adamw, clip, guard": (
        lambda: jaxsgd.guard(optax.chain(jaxsgd.clip_by_global_norm(0.1), jaxsgd.adamw(1e-2))),
        {},
        {"zero1": "data"},
    ),
    "adamw in int8": (lambda: jaxsgd.adamw(1e-2, storage=jaxsgd.int8(min_size=64)), {}, {"specs": SPECS}),
    "adamw in fp8": (lambda: jaxsgd.adamw(1e-2, storage=jaxsgd.fp8(min_size=64)), {}, {"specs": SPECS}),
    "muon": (lambda: jaxsgd.muon(0.02), {}, {"specs": SPECS}),
    "adafactor, microbatches": (
        lambda: jaxsgd.adafactor(1e-2, min_dim_size_to_factor=4),
        {"accumulate": 2},
        {"specs": SPECS, "zero1": "data"},
    ),
    "schedule-free": (lambda: jaxsgd.schedule_free_adamw(1e-2), {"gradient_at": None}, {"specs": SPECS}),
    "optax.adam": (lambda: optax.adam(1e-2), {}, {"specs": SPECS, "zero1": "data"}),
}


@pytest.mark.parametrize("kind", KINDS)
def test_an_explicit_mesh_gives_what_an_auto_one_gives(kind, explicit, auto):
    make, stepping, creating = KINDS[kind]
    found = {}
    for mesh in (explicit, auto):
        tx = make()
        state, step = (
            TrainState.create(PARAMS, tx, mesh=mesh, **creating),
            make_step(loss_fn, tx, mesh=mesh, **stepping),
        )
        where = jax.tree.map(lambda x: x.sharding, state)
        assert all(s.mesh == mesh for s in jax.tree.leaves(where))
        for _ in range(3):
            state, report = step(state, BATCH)
        assert jax.tree.map(lambda x: x.sharding, state) == where
        assert step.compiles == 1
        found[mesh] = state, report
    close(*found.values())
    assert jax.typeof(found[explicit][0].params["w"]).sharding.mesh == explicit.abstract_mesh


def test_on_an_explicit_mesh_a_state_can_be_edited(explicit):
    tx = jaxsgd.adamw(1e-2)
    state, step = TrainState.create(PARAMS, tx, mesh=explicit, specs=SPECS), make_step(loss_fn, tx, mesh=explicit)
    state, _ = step(state, jaxsgd.shard_batch(BATCH, explicit))
    edited = state.replace(
        opt_state=jaxsgd.with_hyper(state.opt_state, learning_rate=1e-3),
        key=jax.random.key(7),
        params=jax.tree.map(np.asarray, state.params),
    )
    state, report = step(edited, BATCH)
    assert step.compiles == 1
    assert report["learning_rate"] == np.float32(1e-3)
    assert state.params["w"].sharding == NamedSharding(explicit, SPECS["w"])


def test_an_explicit_mesh_in_the_callers_jit(explicit):
    tx = jaxsgd.adamw(1e-2)
    state, step = TrainState.create(PARAMS, tx, mesh=explicit, specs=SPECS), make_step(loss_fn, tx, mesh=explicit)
    wanted = make_step(loss_fn, tx, mesh=explicit, donate=False)(state, BATCH)
    batch = jaxsgd.shard_batch(BATCH, explicit)
    with jax.set_mesh(explicit):
        close(jax.jit(step)(state, batch), wanted)


def test_a_state_of_one_kind_of_mesh_goes_on_in_the_other(explicit, auto):
    tx = jaxsgd.adamw(1e-2)
    state = TrainState.create(PARAMS, tx, mesh=auto, specs=SPECS)
    state, _ = make_step(loss_fn, tx, mesh=explicit)(state, BATCH)
    assert state.params["w"].sharding == NamedSharding(explicit, SPECS["w"])


def test_shapes_and_a_bare_optimizer_state_on_an_explicit_mesh(explicit):
    tx = jaxsgd.adamw(1e-2)
    shapes = TrainState.shapes(PARAMS, tx, mesh=explicit, specs=SPECS, zero1="data")
    state = TrainState.create(PARAMS, tx, mesh=explicit, specs=SPECS, zero1="data")
    assert jax.tree.map(lambda s: s.sharding, shapes) == jax.tree.map(lambda x: x.sharding, state)
    bare = jaxsgd.init_sharded(tx, PARAMS, explicit, specs=SPECS, zero1="data")
    assert jaxsgd.assert_sharded(bare, zero1="data").bytes_per_device < 2 * 2 * 4 * 16 * 32


# -- annotations -----------------------------------------------------------------------------------


def annotated(names, rules=None):
    kwargs = {} if rules is None else {"sharding_rules": rules}
    return nnx.with_partitioning(nnx.initializers.lecun_normal(), names, **kwargs)


class Net(nnx.Module):
    def __init__(self, rngs, names=(None, "model"), rules=None):
        self.inner = nnx.Linear(16, 32, kernel_init=annotated(names, rules), rngs=rngs)
        self.outer = nnx.Linear(32, 8, rngs=rngs)

    def __call__(self, x):
        return self.outer(nnx.tanh(self.inner(x)))


class Boxed(linen.Module):
    logical: bool = False

    @linen.compact
    def __call__(self, x):
        box = linen.with_logical_partitioning if self.logical else linen.with_partitioning
        init = box(linen.initializers.lecun_normal(), ("in", "hidden") if self.logical else (None, "model"))
        inner = linen.Dense(32, kernel_init=init, name="inner")
        return linen.Dense(8, name="outer")(jnp.tanh(inner(x)))


def nnx_loss(model, batch, key):
    return jnp.mean((model(batch["x"]) - batch["y"]) ** 2)


def boxed_params(key, **kwargs):
    return Boxed(**kwargs).init(key, BATCH["x"])["params"]


def linen_loss(params, batch, key):
    return jnp.mean((Boxed().apply({"params": params}, batch["x"]) - batch["y"]) ** 2)


def eager_net(mesh):
    with jax.set_mesh(mesh):
        return Net(nnx.Rngs(0))


def eager_boxes(mesh):
    return boxed_params(jax.random.key(0))


MODELS = {
    "nnx, a function": (lambda mesh: lambda key: Net(nnx.Rngs(key)), nnx_loss),
    "nnx, a model": (eager_net, nnx_loss),
    "linen, a function": (lambda mesh: boxed_params, linen_loss),
    "linen, boxes": (eager_boxes, linen_loss),
}


def spec_of(tree, name):
    """The spec of the leaf whose name ends so, within the mesh's two axes."""
    found = [x.sharding.spec for n, x in zip(leaf_names(tree), jax.tree.leaves(tree), strict=True) if n.endswith(name)]
    assert len(found) == 1, (name, found)
    return P(*found[0], *[None] * (2 - len(found[0])))


@pytest.mark.parametrize("kind", ["auto", "explicit"])
@pytest.mark.parametrize("model", MODELS)
def test_a_model_is_sharded_as_it_states(model, kind, request):
    mesh = request.getfixturevalue(kind)
    make, loss = MODELS[model]
    tx = jaxsgd.adamw(1e-2)
    shapes = TrainState.shapes(make(mesh), tx, mesh=mesh)
    state, step = TrainState.create(make(mesh), tx, mesh=mesh), make_step(loss, tx, mesh=mesh)
    assert jax.tree.map(lambda s: s.sharding, shapes) == jax.tree.map(lambda x: x.sharding, state)
    state, report = step(state, BATCH)
    for params in (state.params, state.opt_state.slots["mu"]):
        assert spec_of(params, "inner/kernel") == P(None, "model")
        assert spec_of(params, "outer/kernel") == P(None, None)
    assert step.compiles == 1
    assert np.isfinite(report["loss"])


def test_specs_replace_what_the_model_states(auto):
    state = TrainState.create(lambda key: Net(nnx.Rngs(key)), jaxsgd.sgd(1e-2), mesh=auto, specs=P())
    assert spec_of(state.params, "inner/kernel") == P(None, None)


def test_logical_names_are_translated(auto):
    rules = (("hidden", "model"), ("in", None))
    tx = jaxsgd.sgd(1e-2)
    own = TrainState.create(lambda key: Net(nnx.Rngs(key), ("in", "hidden"), rules), tx, mesh=auto)
    assert spec_of(own.params, "inner/kernel") == P(None, "model")
    with linen.logical_axis_rules(rules):
        boxed = TrainState.create(lambda key: boxed_params(key, logical=True), tx, mesh=auto)
    assert spec_of(boxed.params, "inner/kernel") == P(None, "model")


def test_an_annotation_that_does_not_fit_is_named(auto):
    with pytest.raises(ValueError, match=r"model's annotation \(specs= replaces it\): 'inner/kernel'.*no axis 'model'"):
        TrainState.create(boxed_params, jaxsgd.sgd(1e-2), mesh=Mesh(auto.devices.ravel(), ("data",)))
    state = TrainState.create(boxed_params, jaxsgd.sgd(1e-2), mesh=Mesh(auto.devices.ravel(), ("data",)), specs=P())
    assert spec_of(state.params, "inner/kernel") == P(None, None)
