"""Every kind of leaf and of container, through every entry point of the step and of the tools around it."""

from __future__ import annotations

import math
import re

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from containers import CONTAINERS, NAMES, Gain, Holder, Pair, Struct, boxed, names_of
from flax import nnx
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

import jaxsgd
from jaxsgd import TrainState, make_step, sweep
from jaxsgd.ensemble.feed import Feed
from jaxsgd.numerics import conjugated, differentiable, global_norm, strong, wide
from jaxsgd.paths import check_params, find_nodes, is_function, leaf_names, leaf_paths, owners

STEPS = 3
HALVING = 0.25
"""The learning rate at which a step on |x - t|^2 halves x - t."""
ONES = {"x": np.ones((16, 2), np.float32)}


def by_name(tree):
    return {name: np.asarray(x) for name, x in zip(leaf_names(tree), jax.tree.leaves(tree), strict=True)}


def distance(params, batch):
    """The squared distance of all leaves to 0, as a mean over the batch."""
    leaves = differentiable(params)[0]
    total = sum(jnp.sum(jnp.abs(wide(x)) ** 2) for x in leaves)
    return total * jnp.mean(batch["x"])


def loss_fn(params, batch, key):
    return distance(params, batch)


def mesh():
    return Mesh(jax.devices(), ("data",))


# -- the roads of a step --------------------------------------------------------------------------


def looped(step, state, batch=ONES):
    for _ in range(STEPS):
        state, report = step(state, batch)
    return state, report


def one_device(loss, tx, params):
    return looped(make_step(loss, tx), TrainState.create(params, tx))


def eager(loss, tx, params):
    with jax.disable_jit():
        return looped(make_step(loss, tx).fn, TrainState.create(params, tx))


def scanned(loss, tx, params):
    batches = jax.tree.map(lambda x: jnp.stack([x] * STEPS), ONES)
    state, reports = jax.jit(lambda s: jax.lax.scan(make_step(loss, tx).fn, s, batches))(TrainState.create(params, tx))
    return state, jax.tree.map(lambda x: x[-1], reports)


def accumulated(loss, tx, params):
    return looped(make_step(loss, tx, accumulate=4), TrainState.create(params, tx))


def on_a_mesh(loss, tx, params):
    return looped(make_step(loss, tx, mesh=mesh()), TrainState.create(params, tx, mesh=mesh()))


def zero1(loss, tx, params):
    state = TrainState.create(params, tx, mesh=mesh(), zero1="data")
    return looped(make_step(loss, tx, mesh=mesh(), accumulate=2), state)


def pmapped(loss, tx, params):
    state = jax.tree.map(lambda x: jnp.stack([x] * 8), TrainState.create(params, tx))
    batch = jax.tree.map(lambda x: x.reshape(8, -1, *x.shape[1:]), ONES)
    out = looped(jax.pmap(make_step(loss, tx, axis_name="data").fn, axis_name="data"), state, batch)
    return jax.tree.map(lambda x: x[3], out)


def shard_mapped(loss, tx, params):
    step = make_step(loss, tx, axis_name="data", accumulate=2)
    mapped = jax.shard_map(step.fn, mesh=mesh(), in_specs=(P(), P("data")), out_specs=P())
    return looped(jax.jit(mapped), TrainState.create(params, tx, mesh=mesh()))


ROADS = {
    road.__name__: road for road in (one_device, eager, scanned, accumulated, on_a_mesh, zero1, pmapped, shard_mapped)
}


# -- kinds of leaves ------------------------------------------------------------------------------


def leaves():
    """Every kind of leaf, each at 8 or (8 + 8i)."""
    return {
        "complex": jnp.full(8, 8 + 8j, jnp.complex64),
        "empty": jnp.zeros((0, 4)),
        "scalar": jnp.asarray(8, jnp.float32),
        "number": 8.0,
        "complex number": 8 + 8j,
        "numpy": np.full(8, 8, np.float32),
        "numpy scalar": np.float32(8),
        "none": None,
        "bf16": jnp.full(8, 8, jnp.bfloat16),
        "f16": jnp.full(8, 8, jnp.float16),
        "f8": jnp.full(8, 8, jnp.float8_e4m3fn),
        "integers": jnp.arange(8),
        "integer": 3,
        "boolean": np.ones(8, bool),
        "int4": jnp.arange(8, dtype=jnp.int4),
    }


FREEZE = [("^(integers?|boolean|int4)$", {"frozen": True})]
OPTIMIZERS = {
    "sgd": lambda: jaxsgd.sgd(HALVING, groups=FREEZE),
    # Optax multiplies integers by the rate, which JAX refuses for four bits.
    "optax": lambda: optax.masked(optax.sgd(HALVING), {name: name != "int4" for name in leaves()}),
    "guard and clip": lambda: jaxsgd.guard(
        optax.chain(jaxsgd.clip_by_global_norm(1e6), jaxsgd.sgd(HALVING, groups=FREEZE))
    ),
}


def check_halved(params, report):
    found = by_name(params)
    assert set(found) == {name for name, x in leaves().items() if x is not None}
    for name, x in found.items():
        start = np.asarray(strong(leaves()[name]))
        assert x.dtype == start.dtype and x.shape == start.shape, name
        frozen = re.search(FREEZE[0][0], name)
        wanted = start if frozen else start / 2**STEPS
        np.testing.assert_array_equal(x.astype(wanted.dtype), wanted, err_msg=name)
    # The gradient of |x|^2 is 2 x, in both parts of a complex number. Four leaves are real arrays of 8, one is
    # complex; three scalars are real, one is complex.
    last = 2 * 8 / 2 ** (STEPS - 1)
    np.testing.assert_allclose(report["gradient_norm"], last * math.sqrt(4 * 8 + 2 * 8 + 3 + 2), rtol=1e-6)


@pytest.mark.parametrize("road", ROADS)
def test_every_kind_of_leaf_takes_the_same_step_on_every_road(road):
    state, report = ROADS[road](loss_fn, OPTIMIZERS["sgd"](), leaves())
    check_halved(state.params, report)


@pytest.mark.parametrize("optimizer", ["optax", "guard and clip"])
def test_every_kind_of_leaf_with_other_optimizers(optimizer):
    state, report = one_device(loss_fn, OPTIMIZERS[optimizer](), leaves())
    check_halved(state.params, report)


def test_numbers_start_strongly_typed_so_that_a_step_compiles_once():
    tx = jaxsgd.adam(0.1, groups=FREEZE)
    state, step = TrainState.create(leaves(), tx), make_step(loss_fn, tx)
    assert not any(jax.typeof(x).weak_type for x in jax.tree.leaves(state.params))
    jaxsgd.check_donation(step, state, ONES)
    looped(step, state)
    assert step.compiles == 1
    abstract = TrainState.shapes(leaves(), tx)
    again = TrainState.create(leaves(), tx)
    assert [(x.shape, x.dtype) for x in jax.tree.leaves(abstract)] == [
        (x.shape, x.dtype) for x in jax.tree.leaves(again)
    ]


@pytest.mark.parametrize("strategy", ["vmap", "map", "loop"])
def test_every_kind_of_leaf_in_a_sweep(strategy):
    tx = OPTIMIZERS["sgd"]()
    state, step = TrainState.create(leaves(), tx), make_step(loss_fn, tx)
    run = lambda state: sweep(
        step, state, ONES, steps=3, learning_rate=[0.0, HALVING], strategy=strategy, progress=False
    )
    with pytest.raises(ValueError, match="state: 'params/int4' is int4; runs side by side need at least 8 bits"):
        run(state)
    kept = {**leaves(), "int4": np.arange(8, dtype=np.int8)}
    result = run(TrainState.create(kept, tx))
    report = {"gradient_norm": result.metrics["gradient_norm"][1, -1]}
    found = jax.tree.map(lambda x: x[1], result.states.params)
    check_halved({**found, "int4": found["int4"].astype(jnp.int4)}, report)


def test_every_kind_of_leaf_in_the_tools():
    noise = jaxsgd.noise_scale(loss_fn, leaves(), {"x": np.linspace(0, 2, 16, dtype=np.float32)}, population="all")
    assert noise.gradient_norm_sq == pytest.approx(4 * 8**2 * (4 * 8 + 2 * 8 + 3 + 2), rel=0.02)  # f8 rounds
    tx = OPTIMIZERS["sgd"]()
    params = {name: strong(x) for name, x in leaves().items() if "complex" not in name}
    found = jaxsgd.sharpness(loss_fn, params, ONES, tx=tx, opt_state=tx.init(params), progress=False)
    assert found.parameters == 4 * 8 + 3 and found.eigenvalues[0] == pytest.approx(2)


def test_integers_that_are_not_frozen_are_refused_by_name():
    with pytest.raises(ValueError, match="'index' is int32"):
        TrainState.create({"w": jnp.ones(2), "index": jnp.arange(2)}, jaxsgd.sgd(0.1))


def test_frozen_integers_serve_the_loss():
    """An index into a table: the loss reads it, the optimizer leaves it alone."""

    def gathered(params, batch, key):
        return jnp.sum((params["table"][params["index"]] - 1) ** 2) * jnp.mean(batch["x"])

    params = {"table": jnp.zeros(8), "index": jnp.asarray([1, 5])}
    tx = jaxsgd.sgd(HALVING, groups=[("index", {"frozen": True})])
    for road in (one_device, shard_mapped, zero1):
        state, _ = road(gathered, tx, params)
        wanted = np.zeros(8)
        wanted[[1, 5]] = 1 - 0.5**STEPS
        np.testing.assert_allclose(state.params["table"], wanted, rtol=1e-6, err_msg=road.__name__)
        np.testing.assert_array_equal(state.params["index"], [1, 5])


# -- complex parameters ---------------------------------------------------------------------------


def aim(params, batch, key):
    return jnp.sum(jnp.abs(params["z"] - (1 + 2j)) ** 2) * jnp.mean(batch["x"])


Z = {"z": jnp.zeros((), jnp.complex64)}


@pytest.mark.parametrize("road", ROADS)
def test_complex_parameters_descend_in_both_parts(road):
    """``sgd(0.05)`` on ``abs(z - (1 + 2j))**2``, also where JAX promotes no dtype."""
    with jax.numpy_dtype_promotion("strict"):
        state, report = ROADS[road](aim, jaxsgd.sgd(0.05), Z)
    np.testing.assert_allclose(state.params["z"], (1 + 2j) * (1 - 0.9**STEPS), rtol=1e-5)
    assert report["loss"] < 5


def test_complex_parameters_of_an_nnx_module_converge():
    class Spin(nnx.Module):
        def __init__(self):
            self.z = nnx.Param(jnp.zeros(2, jnp.complex64))

    tx = jaxsgd.sgd(0.05)
    step = make_step(lambda m, b, k: jnp.sum(jnp.abs(m.z[...] - (1 + 2j)) ** 2), tx)
    state = TrainState.create(Spin(), tx)
    for _ in range(200):
        state, report = step(state, ONES)
    assert report["loss"] < 1e-6
    np.testing.assert_allclose(state.model.z[...], (1 + 2j) * np.ones(2), rtol=1e-4)


def test_complex_parameters_through_a_network_match_their_real_and_imaginary_parts():
    rng = np.random.default_rng(0)
    x, y = (rng.normal(size=(16, 3)) + 1j * rng.normal(size=(16, 3)) for _ in range(2))
    batch = {"x": x.astype(np.complex64), "y": y.astype(np.complex64)}
    w = (rng.normal(size=(3, 3)) + 1j * rng.normal(size=(3, 3))).astype(np.complex64)

    def of_complex(p, b, key):
        return jnp.mean(jnp.abs(jnp.sin(b["x"] @ p["w"]) - b["y"]) ** 2)

    def of_parts(p, b, key):
        return of_complex({"w": p["re"] + 1j * p["im"]}, b, key)

    tx = jaxsgd.momentum(0.01)
    whole, _ = looped(make_step(of_complex, tx), TrainState.create({"w": w}, tx), batch)
    parts, _ = looped(make_step(of_parts, tx), TrainState.create({"re": w.real, "im": w.imag}, tx), batch)
    np.testing.assert_allclose(whole.params["w"], parts.params["re"] + 1j * parts.params["im"], rtol=1e-4)
    noise = [jaxsgd.noise_scale(f, p, batch) for f, p in ((of_complex, {"w": w}), (of_parts, parts_of(w)))]
    np.testing.assert_allclose(noise[0].scale, noise[1].scale, rtol=1e-4)
    np.testing.assert_allclose(noise[0].gradient_norm_sq, noise[1].gradient_norm_sq, rtol=1e-4)


def parts_of(w):
    return {"re": w.real, "im": w.imag}


def test_a_sweep_of_complex_parameters_is_finite_and_falls():
    tx = jaxsgd.sgd(0.05)
    step, state = make_step(aim, tx), TrainState.create(Z, tx)
    result = sweep(step, state, ONES, steps=20, learning_rate=[0.01, 0.1], strategy="vmap", progress=False)
    rates = np.array([[0.01], [0.1]])
    np.testing.assert_allclose(result.losses, 5 * (1 - 2 * rates) ** (2 * np.arange(20)), rtol=1e-3, atol=1e-5)


def test_a_range_test_of_complex_parameters_falls():
    found = jaxsgd.range_test(aim, Z, ONES, jaxsgd.sgd, steps=40, low=1e-3, high=0.5, progress=False)
    assert np.isfinite(found.losses).all() and found.losses[-1] < 1e-2 * found.losses[0]


def test_sharpness_refuses_complex_parameters_by_name():
    with pytest.raises(ValueError, match="params: 'z' is complex64.*real floating parameters"):
        jaxsgd.sharpness(aim, Z, ONES, progress=False)


def test_conjugated_and_norms_of_every_kind_of_gradient():
    float0 = np.zeros(3, jax.dtypes.float0)
    grads = {"z": jnp.asarray([3 + 4j]), "i": float0, "x": jnp.asarray([12.0], jnp.bfloat16)}
    assert global_norm(grads) == 13
    turned = conjugated(grads)
    assert turned["z"][0] == 3 - 4j and turned["i"] is float0 and turned["x"].dtype == jnp.bfloat16


# -- containers -----------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", CONTAINERS)
def test_a_field_called_value_keeps_its_name(kind):
    tree = CONTAINERS[kind](jnp.ones(8), jnp.ones(8))
    wanted = names_of(kind)
    assert leaf_names(tree) == wanted
    assert leaf_names({"attn": tree}) == [f"attn/{name}" for name in wanted]
    state = optax.adam(1e-3).init(tree)
    found = owners(state, tree, wanted)
    assert found == [None, *wanted, *wanted]


def test_a_box_has_the_name_of_its_place_boxed_or_bare():
    module = Holder(jnp.ones(2), jnp.ones(2))
    for tree in (module, nnx.state(module), nnx.to_pure_dict(nnx.state(module)), nn.unbox(boxed(1.0, 2.0))):
        assert leaf_names(tree) == ["query", "value"]
    assert leaf_names({"a": nnx.Param(Pair(1.0, 2.0)), "b": nn.Partitioned(Struct(1.0, 2.0), ())}) == [
        "a/value", "a/query", "b/value", "b/query"
    ]  # fmt: skip
    assert leaf_names(nnx.Param({"value": 1.0})) == ["value"]
    assert leaf_paths(nnx.Param(jnp.ones(2))) == [()]
    assert leaf_names([None, jnp.ones(2)]) == ["1"]
    nodes = find_nodes({"a": Pair(1.0, Pair(2.0, 3.0)), "b": nnx.Param(4.0)}, (Pair, nnx.Param))
    assert [name for name, _ in nodes] == ["a", "b"]


def targets(model, batch, key):
    return distance(nnx.state(model, nnx.Param) if isinstance(model, nnx.Module) else model, batch)


@pytest.mark.parametrize("kind", CONTAINERS)
def test_every_container_takes_a_step_with_one_leaf_frozen_by_name(kind):
    value, _ = names_of(kind) if kind in NAMES else ("value", "query")
    tx = jaxsgd.adam(0.1, groups=[(f"^{value}$", {"frozen": True})])
    model = CONTAINERS[kind](jnp.full(8, 2.0), jnp.full(8, 4.0))
    state = TrainState.create(model, tx)
    after, _ = looped(make_step(targets, tx), state)
    found = by_name(after.params)
    assert list(found) == names_of(kind)
    np.testing.assert_array_equal(found.pop(value), np.full(8, 2.0))
    np.testing.assert_allclose(*found.values(), 4 - 0.1 * STEPS, rtol=1e-3)
    if not isinstance(model, nnx.Module):
        assert jax.tree.structure(after.params) == jax.tree.structure(model)


def everything():
    """All containers in one tree of a callable class, so that one program serves for all."""
    kinds = {k: make(jnp.full(8, 2.0), jnp.full(8, 4.0)) for k, make in CONTAINERS.items() if k != "nnx.Module"}
    return Gain(kinds, {"none": None, "empty": [], "number": 2.0})


@pytest.mark.parametrize("road", ["on_a_mesh", "zero1", "shard_mapped", "accumulated"])
def test_all_containers_in_one_tree_on_every_road(road):
    state, _ = ROADS[road](loss_fn, jaxsgd.sgd(HALVING, momentum=0.0), everything())
    before = everything()
    assert jax.tree.structure(state.params) == jax.tree.structure(before)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, np.asarray(b) / 2**STEPS), state.params, before)


def test_all_containers_in_the_tools():
    tx, params = jaxsgd.sgd(HALVING), everything()
    found = jaxsgd.sharpness(loss_fn, params, ONES, tx=tx, opt_state=tx.init(params), progress=False)
    assert found.eigenvalues[0] == pytest.approx(2)
    assert found.threshold == pytest.approx(1)
    noise = jaxsgd.noise_scale(loss_fn, params, {"x": np.linspace(0, 2, 16, dtype=np.float32)})
    assert noise.gradient_norm_sq == pytest.approx(4 * (10 * 8 * (4 + 16) + 4), rel=0.5)
    step, state = make_step(loss_fn, tx), TrainState.create(params, tx)
    result = sweep(step, state, ONES, steps=2, learning_rate=[0.0, HALVING], strategy="map", progress=False)
    np.testing.assert_allclose(result.losses[:, 1] / result.losses[:, 0], [1, 0.25], rtol=1e-6)
    assert jax.tree.structure(result.states.params) == jax.tree.structure(params)


def test_all_containers_in_sharding():
    tx, params = jaxsgd.adam(1e-3), everything()
    where = jaxsgd.state_sharding(tx, params, mesh(), zero1="data")
    assert jax.tree.structure(where) == jax.tree.structure(jax.eval_shape(tx.init, params))
    state = jaxsgd.init_sharded(tx, params, mesh(), zero1="data")
    report = jaxsgd.assert_sharded(state, zero1="data")
    assert report.replicated == [] and "slots/mu/value/callable/value" in report


def test_specs_in_every_container_and_as_a_function():
    tx, placed = jaxsgd.adam(1e-3), []
    for specs in (
        Gain(P("data"), None),
        Gain(value=P("data"), query=P()),
        lambda name, leaf: P("data") if name == "value" else None,
        jax.tree_util.Partial(lambda split, name, leaf: P(split) if name == "value" else P(), "data"),
    ):
        state = TrainState.create(Gain(jnp.ones(8), jnp.ones(8)), tx, mesh=mesh(), specs=specs)
        mu = state.opt_state.slots["mu"]
        placed.append((state.params.value.sharding.spec, mu.value.sharding.spec, mu.query.sharding.spec))
    assert set(placed) == {(P("data"), P("data"), P())}
    boxes = boxed(jnp.ones(8), jnp.ones(8))
    where = jaxsgd.state_sharding(tx, boxes, mesh(), specs=nn.get_partition_spec(boxes))
    assert where.slots["nu"]["value"].value.spec == P("data") and where.slots["nu"]["query"].value.spec == P()
    nnx_state = CONTAINERS["nnx.State"](jnp.ones(8), jnp.ones(8))
    by_field = jax.tree_util.tree_map_with_path(lambda path, _: P("data") if path[0].key == "value" else P(), nnx_state)
    where = jaxsgd.state_sharding(tx, nnx_state, mesh(), specs=by_field)
    assert where.slots["mu"]["value"].get_value().spec == P("data")


@pytest.mark.parametrize(
    ("specs", "error", "message"),
    [
        (Gain("data", None), TypeError, "specs: 'value' has 'data'; a jax.sharding.PartitionSpec or None is needed"),
        ({"value": P()}, ValueError, "specs: .* is no prefix of the parameters"),
        (lambda name, leaf: "data", TypeError, "specs: 'value' has 'data'"),
    ],
)
def test_wrong_specs_are_refused_by_name(specs, error, message):
    with pytest.raises(error, match=message):
        jaxsgd.init_sharded(jaxsgd.adam(1e-3), Gain(jnp.ones(8), jnp.ones(8)), mesh(), specs=specs)


# -- functions, and what only looks like one -------------------------------------------------------


def test_a_function_is_what_is_no_pytree_with_leaves():
    arrays = Gain(jnp.ones(2), 1.0)
    functions = (jax.nn.relu, lambda k: k, Gain, nn.Dense(2), jax.tree_util.Partial(jnp.add, jnp.ones(2)), max)
    assert all(map(is_function, functions))
    others = (
        arrays,
        Gain(None, jnp.ones(2)),
        Gain(jax.nn.relu, 1.0),
        nnx.Linear(2, 2, rngs=nnx.Rngs(0)),
        jnp.ones(2),
        3,
    )
    assert not any(map(is_function, others))


def test_a_callable_tree_is_trained_and_not_called():
    """``TrainState.create(Gain(w=1)).params`` was ``[2 2 2]``."""
    tx = jaxsgd.sgd(0.1)
    state = TrainState.create(Gain(1.0, jnp.ones(2)), tx)
    assert isinstance(state.params, Gain) and state.params.value == 1 and state.params.value.dtype == jnp.float32
    with pytest.raises(ValueError, match="'value' is int32"):
        TrainState.create(Gain(1, 1), tx)


def test_a_function_still_makes_the_model():
    tx = jaxsgd.sgd(0.1)

    def init(scale, key):
        return Gain(scale * jax.random.normal(key, (8,)), jnp.zeros(()))

    for model in (lambda key: init(2.0, key), jax.tree_util.Partial(init, 2.0)):
        for place in ({}, {"mesh": mesh(), "zero1": "data"}):
            state = TrainState.create(model, tx, **place)
            assert isinstance(state.params, Gain) and np.ptp(state.params.value) > 0


WRONG = {
    "a function": (Gain(jnp.ones(2), jax.nn.relu), "'query' is the function relu.*eqx.filter"),
    "a function in an nnx.Param": (nnx.State({"a": nnx.Param(jnp.tanh)}), "'a' is the function.*eqx.filter"),
    "a string": ({"a": {"b": "relu"}}, "'a/b' is a str"),
    "an object": ({"a": object()}, "'a' is a object"),
    "a key": ({"a": jax.random.key(0)}, "'a' has the dtype key<fry>"),
    "an array of strings": ({"a": np.array(["b"])}, "'a' has the dtype <U1"),
    "the whole": ("w", "params is a str"),
}
ENTRIES = {
    "create": lambda params: TrainState.create(params, jaxsgd.sgd(0.1)),
    "create on a mesh": lambda params: TrainState.create(params, jaxsgd.sgd(0.1), mesh=mesh()),
    "create by a function": lambda params: TrainState.create(lambda key: params, jaxsgd.sgd(0.1)),
    "shapes": lambda params: TrainState.shapes(params, jaxsgd.sgd(0.1)),
    "state_sharding": lambda params: jaxsgd.state_sharding(jaxsgd.sgd(0.1), params, mesh()),
    "init_sharded": lambda params: jaxsgd.init_sharded(jaxsgd.sgd(0.1), params, mesh()),
    "noise_scale": lambda params: jaxsgd.noise_scale(loss_fn, params, ONES),
    "sharpness": lambda params: jaxsgd.sharpness(loss_fn, params, ONES),
    "range_test": lambda params: jaxsgd.range_test(loss_fn, params, ONES, steps=10),
}


@pytest.mark.parametrize("entry", ENTRIES)
@pytest.mark.parametrize("wrong", WRONG)
def test_a_leaf_that_is_no_array_is_refused_by_name_everywhere(wrong, entry):
    params, message = WRONG[wrong]
    with pytest.raises(TypeError, match=message):
        ENTRIES[entry](params)


def test_shapes_are_parameters_too():
    check_params({"a": jax.ShapeDtypeStruct((2,), jnp.int4), "b": jnp.ones(2, jnp.float8_e5m2), "c": None, "d": True})


def test_other_wrong_kinds_are_refused_in_a_sentence():
    tx = jaxsgd.sgd(0.1)
    with pytest.raises(TypeError, match=r"model: a linen module has no parameters. Use Dense\(...\).init"):
        TrainState.create(nn.Dense(2), tx)
    for call in (
        lambda: make_step(loss_fn, jaxsgd.sgd),
        lambda: TrainState.create({"w": jnp.ones(2)}, jaxsgd.sgd),
        lambda: jaxsgd.state_sharding(jaxsgd.sgd, {"w": jnp.ones(2)}, mesh()),
    ):
        with pytest.raises(TypeError, match="a gradient transformation such as .* is needed; call it"):
            call()
    with pytest.raises(TypeError, match="loss_fn=3: a function"):
        make_step(3, tx)
    step = make_step(loss_fn, tx)
    for call in (step, step.fn, step.lower):
        with pytest.raises(TypeError, match="state: a jaxsgd.TrainState is needed, got a dict"):
            call({"w": jnp.ones(2)}, ONES)
    for loss, name in ((lambda p, b, k: p["z"], "complex64"), (lambda p, b, k: 1, "int32")):
        with pytest.raises(ValueError, match=f"loss_fn: the loss is {name}; a real floating scalar is needed"):
            make_step(loss, tx)(TrainState.create(Z, tx), ONES)
    with pytest.raises(ValueError, match="no floating or complex parameter"):
        jaxsgd.noise_scale(loss_fn, {"i": jnp.arange(3)}, ONES)


# -- a state of other parameters --------------------------------------------------------------------


@pytest.mark.parametrize("make", [jaxsgd.adam, optax.adam, jaxsgd.adafactor, jaxsgd.momentum])
@pytest.mark.parametrize("road", ["jit", "scan", "mesh", "accumulate"])
def test_a_state_made_for_other_shapes_is_refused_by_name(make, road):
    """(8, 1) meets (8, 10): each product broadcasts in silence."""
    tx, on = make(1e-3), {"mesh": mesh()} if road == "mesh" else {}
    old, new = (TrainState.create({"w": jnp.ones(s), "b": jnp.ones(8)}, tx, **on) for s in ((8, 1), (8, 10)))
    step = make_step(loss_fn, tx, accumulate=2 if road == "accumulate" else 1, **on)
    call = step if road != "scan" else lambda s, b: jax.lax.scan(lambda s, _: step.fn(s, b), s, None, length=2)
    with pytest.raises(ValueError, match=r"state: 'opt_state/\S*w\S*' has the shape .*for these parameters it needs"):
        call(new.replace(opt_state=old.opt_state), ONES)


# -- integers in the tools, and batches of every kind -----------------------------------------------


def test_integers_have_no_part_in_the_noise_nor_in_the_curvature():
    with_index = {"w": jnp.ones(2), "index": jnp.arange(2)}
    batch = {"x": np.linspace(0, 2, 16, dtype=np.float32)}
    with_ints, without = (jaxsgd.noise_scale(loss_fn, p, batch) for p in (with_index, {"w": jnp.ones(2)}))
    assert with_ints.scale == without.scale
    tx = jaxsgd.sgd(0.1, groups=[("index", {"frozen": True})])
    found = jaxsgd.sharpness(loss_fn, with_index, ONES, tx=tx, progress=False)
    assert found.parameters == 2 and found.threshold == pytest.approx(1)
    with pytest.raises(ValueError, match="'index' is int32"):
        jaxsgd.sharpness(loss_fn, with_index, ONES, progress=False)
    with pytest.raises(ValueError, match="params: there are none"):
        jaxsgd.sharpness(loss_fn, {"w": jnp.zeros((0, 2))}, ONES, progress=False)


BATCHES = {
    kind: make(np.ones(4), np.ones(4)) for kind, make in CONTAINERS.items() if kind not in ("list", "nnx.Module")
}


@pytest.mark.parametrize("kind", BATCHES)
def test_one_batch_of_every_kind_is_the_batch_of_every_step(kind):
    batch = BATCHES[kind]
    assert Feed(batch).next() is batch
    assert Feed([batch, batch]).next() is batch
    assert Feed(lambda step: batch).next() is batch
    assert Feed(iter([batch])).next() is batch
    total = lambda p, b: sum(jnp.sum(p["w"] ** 2) * jnp.mean(x) for x in jax.tree.leaves(b))
    assert jaxsgd.noise_scale(total, {"w": jnp.ones(2)}, batch).scale == 0


def test_a_sweep_takes_a_callable_batch_and_a_run_that_returns_a_callable_model():
    tx = jaxsgd.sgd(HALVING)

    def loss(params, batch, key):
        return jnp.mean((params.value * batch.value - batch.query) ** 2)

    batch = Gain(np.ones(4, np.float32), np.zeros(4, np.float32))
    params = Gain(jnp.asarray(2.0), None)
    step, state = make_step(loss, tx), TrainState.create(params, tx)
    result = sweep(step, state, batch, steps=2, learning_rate=[0.0, HALVING], strategy="map", progress=False)
    np.testing.assert_allclose(result.losses, [[4, 4], [4, 1]])
    with pytest.raises(ValueError, match="steps=None: how many"):
        sweep(step, state, batch, learning_rate=[0.1])

    def run(learning_rate):
        return Gain(learning_rate, jnp.ones(2)), jnp.full(3, learning_rate)

    own = sweep(run, learning_rate=[0.5, 2.0])
    np.testing.assert_array_equal(own.losses, [[0.5] * 3, [2.0] * 3])
    assert isinstance(own.states, Gain)
