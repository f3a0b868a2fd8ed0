"""One step, from one device to eight: the same parameters on every road, and the state is split as asked."""

import re
from collections import Counter

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

import jaxsgd
from jaxsgd import TrainState, make_step

RNG = np.random.default_rng(0)
SHAPES = {"first": (16, 32), "bias": (32,), "second": (32, 8), "shift": (8,), "odd": (5,)}
PARAMS = {name: 0.3 * RNG.normal(size=shape) for name, shape in SHAPES.items()}
BATCHES = [{"x": RNG.normal(size=(32, 16)), "y": RNG.normal(size=(32, 8))} for _ in range(20)]
RULES = {
    "sgd": lambda **kw: jaxsgd.sgd(0.05, momentum=0.9, **kw),
    "adamw": lambda **kw: jaxsgd.adamw(1e-2, **kw),
    "lion": lambda **kw: jaxsgd.lion(1e-3, **kw),
    "adafactor": lambda **kw: jaxsgd.adafactor(1e-2, min_dim_size_to_factor=4, **kw),
    "muon": lambda **kw: jaxsgd.muon(0.02, **kw),
    "schedule_free_adamw": lambda **kw: jaxsgd.schedule_free_adamw(1e-2, **kw),
}


@pytest.fixture(scope="module")
def mesh():
    return Mesh(jax.devices(), ("data",))


def loss_fn(p, b, key):
    h = jnp.tanh(b["x"] @ p["first"] + p["bias"])
    out = h @ p["second"] + p["shift"] + p["odd"].mean()
    return jnp.mean((out - b["y"]) ** 2), {"mean": out.mean(), "positive": jnp.sum(out > 0)}


def as_dtype(tree, dtype):
    return jax.tree.map(lambda x: np.asarray(x, dtype), tree)


def train(step, state, batches, shape=lambda b: b):
    for batch in batches:
        state, report = step(state, shape(batch))
    return state, report


def apart(got, wanted):
    """The largest difference of two trees of parameters."""
    gaps = jax.tree.map(lambda a, b: np.abs(np.asarray(a) - np.asarray(b)).max(), got, wanted)
    return max(jax.tree.leaves(gaps))


def roads(tx, dtype, mesh):
    """Parameters and last metrics after 20 steps, by road."""
    params, batches = as_dtype(PARAMS, dtype), as_dtype(BATCHES, dtype)
    out = {}
    state, report = train(make_step(loss_fn, tx), TrainState.create(params, tx), batches)
    out["single"] = state.params, report

    step = make_step(loss_fn, tx, axis_name="batch")
    state = jax.tree.map(lambda x: jnp.stack([x] * 8), TrainState.create(params, tx))
    pmapped = jaxsgd.checked(jax.pmap(step, axis_name="batch", donate_argnums=0))
    state, report = train(pmapped, state, batches, lambda b: jax.tree.map(lambda x: x.reshape(8, -1, x.shape[-1]), b))
    out["pmap"] = jax.tree.map(lambda x: x[3], (state.params, report))

    step = make_step(loss_fn, tx, axis_name="data")
    mapped = jax.shard_map(step, mesh=mesh, in_specs=(P(), P("data")), out_specs=P())
    state, report = train(
        jaxsgd.checked(jax.jit(mapped, donate_argnums=0)), TrainState.create(params, tx, mesh=mesh), batches
    )
    out["shard_map"] = state.params, report

    state, report = train(make_step(loss_fn, tx, mesh=mesh), TrainState.create(params, tx, mesh=mesh), batches)
    out["mesh"] = state.params, report

    step = make_step(loss_fn, tx, mesh=mesh)
    state, report = train(step, TrainState.create(params, tx, mesh=mesh, zero1="data"), batches)
    assert step.compiles == 1
    assert all(p.sharding.is_fully_replicated for p in jax.tree.leaves(state.params))
    jaxsgd.assert_sharded(state, zero1="data")
    out["mesh, ZeRO-1"] = state.params, report
    return out


@pytest.mark.slow  # the next test holds all roads to 1e-12
@pytest.mark.parametrize("name", RULES)
def test_every_road_leads_to_the_same_parameters_and_reports(name, mesh):
    found = roads(RULES[name](), np.float32, mesh)
    for road, (params, report) in found.items():
        assert apart(params, found["single"][0]) < 1e-6, road
        assert report["aux"]["positive"] == found["single"][1]["aux"]["positive"], road
        for number in ("loss", "gradient_norm", "update_norm", "learning_rate"):
            np.testing.assert_allclose(
                report[number], found["single"][1][number], rtol=1e-5, err_msg=f"{road}: {number}"
            )


@pytest.mark.parametrize("name", RULES)
def test_every_road_leads_to_the_same_parameters_in_float64(name, mesh, x64):
    found = roads(RULES[name](), np.float64, mesh)
    for road, (params, _) in found.items():
        assert apart(params, found["single"][0]) < 1e-12, road


def test_sharded_parameters_and_tensor_parallel_specs():
    """FSDP over one axis, tensor parallel over the other, with accumulation: still the same parameters."""
    mesh = Mesh(np.reshape(jax.devices(), (4, 2)), ("data", "model"))
    tx = jaxsgd.guard(optax.chain(jaxsgd.clip_by_global_norm(0.5), jaxsgd.adamw(1e-2), jaxsgd.params_ema(0.9)))
    params, batches = as_dtype(PARAMS, np.float32), as_dtype(BATCHES[:8], np.float32)
    wanted, _ = train(make_step(loss_fn, tx), TrainState.create(params, tx), batches)
    for specs in (
        {"first": P(None, "model"), "bias": P("model"), "second": P("model"), "shift": None, "odd": None},
        lambda name, leaf: P("data", "model") if len(leaf.shape) == 2 else P(),
    ):
        state = TrainState.create(params, tx, mesh=mesh, specs=specs, zero1="data")
        step = make_step(loss_fn, tx, mesh=mesh, accumulate=2)
        state, _ = train(step, state, batches)
        assert apart(state.params, wanted.params) < 1e-6
        assert apart(state.eval_params, wanted.eval_params) < 1e-6
        assert state.params["first"].addressable_shards[0].data.shape[1] == 16
        moments = optax.tree.get(state.opt_state, "slots")["mu"]
        assert moments["first"].addressable_shards[0].data.size == 16 * 32 // 8
        assert step.compiles == 1


# -- where state lives -----------------------------------------------------------------------------

BIG = {"wide": jax.ShapeDtypeStruct((256, 1024), jnp.float32), "tall": jax.ShapeDtypeStruct((1024, 256), jnp.float32),
       "stack": jax.ShapeDtypeStruct((4, 128, 256), jnp.float32), "bias": jax.ShapeDtypeStruct((1024,), jnp.float32),
       "odd": jax.ShapeDtypeStruct((7,), jnp.float32)}  # fmt: skip


@pytest.mark.parametrize("storage", [None, jaxsgd.int8()], ids=["plain", "int8"])
@pytest.mark.parametrize("name", RULES)
def test_zero1_takes_an_eighth_of_the_bytes(name, storage, mesh):
    tx = RULES[name](**({} if storage is None else {"storage": storage}))
    where = jaxsgd.state_sharding(tx, BIG, mesh, zero1="data")
    shapes = jax.eval_shape(tx.init, BIG)
    report = jaxsgd.assert_sharded(
        jax.tree.map(lambda s, h: jax.ShapeDtypeStruct(s.shape, s.dtype, sharding=h), shapes, where), zero1="data"
    )
    assert report.bytes_per_device <= (1 / 8 + 0.02) * report.bytes_in_all
    assert all("odd" in leaf or np.prod(dict(named(shapes))[leaf].shape) < 8 for leaf in report.replicated)
    copied = jaxsgd.state_sharding(tx, BIG, mesh)
    assert all(h.is_fully_replicated for h in jax.tree.leaves(copied))


def named(tree):
    return zip(jaxsgd.paths.leaf_names(tree), jax.tree.leaves(tree), strict=True)


def test_packed_and_factored_slots_follow_their_parameter():
    mesh = Mesh(np.reshape(jax.devices(), (4, 2)), ("data", "model"))
    specs = {"wide": P(None, "model"), "tall": P("model"), "stack": P(None, "model"), "bias": None, "odd": None}
    held = jaxsgd.state_sharding(jaxsgd.adamw(1e-3, storage=jaxsgd.int8()), BIG, mesh, specs=specs).slots["mu"]
    assert held["wide"].codes.spec == held["wide"].scale.spec == P(None, "model")
    assert held["tall"].codes.spec == held["tall"].scale.spec == P("model")
    held = jaxsgd.state_sharding(jaxsgd.adafactor(1e-3), BIG, mesh, specs=specs).slots
    rows_and_columns = {held["row"]["wide"].spec, held["col"]["wide"].spec}
    assert rows_and_columns == {P(), P(None, "model")}, "the one of the second dimension, which keeps the rank"
    further = jaxsgd.state_sharding(jaxsgd.adamw(1e-3, storage=jaxsgd.int8()), BIG, mesh, specs=specs, zero1="data")
    assert further.slots["nu"]["wide"].codes.spec == P(None, ("model", "data"))


def test_pain_5_state_is_made_in_place(mesh):
    """On an Auto mesh jit(init) puts the moments on one device; and ZeRO-1 may be a no-op that nobody notices."""
    params = jax.tree.map(lambda s: jnp.ones(s.shape), BIG)
    tx = jaxsgd.adamw(1e-3)
    lost = jax.jit(tx.init)(jax.device_put(params, NamedSharding(mesh, P())))
    with pytest.raises(AssertionError, match="is on no mesh|could be split over 'data' and are not"):
        jaxsgd.assert_sharded(lost, zero1="data")
    state = jaxsgd.init_sharded(tx, params, mesh, zero1="data")
    report = jaxsgd.assert_sharded(state, zero1="data")
    assert "slots/mu/odd" in report.replicated and "slots/mu/wide" not in report.replicated
    assert "slots/nu/wide" in report and f"{256 * 1024 * 4 // 8:,}" in report
    with pytest.raises(AssertionError, match=r"8 leaves could be split over 'data' and are not: slots/mu/bias"):
        jaxsgd.assert_sharded(jaxsgd.init_sharded(tx, params, mesh), zero1="data")
    # In the program that makes it no array is whole: every zero is made at an eighth of the size.
    where = jaxsgd.state_sharding(tx, BIG, mesh, zero1="data")
    text = jax.jit(tx.init, out_shardings=where).lower(BIG).compile().as_text()
    assert "f32[256,1024]" not in text.split("entry_computation_layout")[1].split("\n", 1)[1]
    assert "f32[256,128]" in text


def test_a_model_is_made_in_place(mesh):
    class Net(nnx.Module):
        def __init__(self, rngs):
            self.hidden = nnx.Linear(8, 64, rngs=rngs)
            self.drop = nnx.Dropout(0.1, rngs=rngs)
            self.head = nnx.Linear(64, 1, rngs=rngs)

        def __call__(self, x):
            return self.head(self.drop(nnx.relu(self.hidden(x))))

    def loss(model, batch, key):
        return jnp.mean((model(batch["x"])[:, 0] - batch["x"].sum(-1)) ** 2)

    tx, batch = jaxsgd.adam(1e-2), {"x": np.asarray(RNG.normal(size=(64, 8)), np.float32)}
    specs = lambda name, leaf: P(None, "data") if name == "hidden/kernel" else P()
    alone = TrainState.create(lambda key: Net(nnx.Rngs(params=key, dropout=1)), tx, key=3)
    state = TrainState.create(
        lambda key: Net(nnx.Rngs(params=key, dropout=1)), tx, key=3, mesh=mesh, specs=specs, zero1="data"
    )
    assert apart(nnx.to_pure_dict(state.params), nnx.to_pure_dict(alone.params)) < 1e-6
    assert state.params["hidden"]["kernel"].get_value().addressable_shards[0].data.shape == (8, 8)
    state, first = train(make_step(loss, tx, mesh=mesh), state, [batch])
    state, last = train(make_step(loss, tx, mesh=mesh), state, [batch] * 30)
    assert last["loss"] < 0.2 * first["loss"]
    alone, _ = train(make_step(loss, tx), alone, [batch] * 31)
    assert apart(nnx.to_pure_dict(state.params), nnx.to_pure_dict(alone.params)) < 1e-4, "dropout is that of the whole"

    # A given module, and given arrays that are on the mesh already.
    given = TrainState.create(Net(nnx.Rngs(0)), tx, mesh=mesh, zero1="data")
    jaxsgd.assert_sharded(given, zero1="data")
    placed = jax.device_put({"w": jnp.ones((16, 8))}, NamedSharding(mesh, P("data")))
    assert TrainState.create(placed, tx, mesh=mesh).params["w"].sharding.spec == P("data")


def test_shapes_alone_give_the_same_program(mesh):
    """For a mesh whose devices need not be there; nothing is allocated."""
    tx, batch = jaxsgd.adamw(1e-2), as_dtype(BATCHES[0], np.float32)
    params = as_dtype(PARAMS, np.float32)
    state = TrainState.create(params, tx, mesh=mesh, zero1="data")
    shapes = jax.eval_shape(lambda: params)
    abstract = TrainState.shapes(shapes, tx, mesh=mesh, zero1="data")
    for a, b in zip(jax.tree.leaves(abstract), jax.tree.leaves(state), strict=True):
        assert a.shape == b.shape and a.dtype == b.dtype and a.sharding == b.sharding
    step = make_step(loss_fn, tx, mesh=mesh)
    of_shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), batch)
    assert step.lower(abstract, of_shapes).as_text() == step.lower(state, batch).as_text()
    assert jaxsgd.assert_sharded(abstract, "data") == jaxsgd.assert_sharded(state, "data")


def test_batch_statistics_and_keys_inside_a_map(mesh):
    """Averaged over the devices; dropout differs from device to device, and its key is handed on as it was."""

    class Net(nnx.Module):
        def __init__(self):
            self.norm = nnx.BatchNorm(4, momentum=0.0, rngs=nnx.Rngs(0))
            self.drop = nnx.Dropout(0.5, rngs=nnx.Rngs(1))

    def loss(model, batch, key):
        return jnp.mean(model.norm(batch) ** 2), {
            "dropped": model.drop(jnp.ones(16)), "drawn": jax.random.uniform(key, (2,))
        }  # fmt: skip

    x = np.asarray(RNG.normal(size=(32, 4)), np.float32)
    tx = jaxsgd.sgd(0.1)
    step = make_step(loss, tx, axis_name="data")
    state = TrainState.create(Net(), tx, mesh=mesh)
    specs = {name: P() for name in ("step", "loss", "gradient_norm", "update_norm", "learning_rate")}
    specs |= {"aux": {"dropped": P("data"), "drawn": P("data")}}
    new, report = jax.jit(jax.shard_map(step, mesh=mesh, in_specs=(P(), P("data")), out_specs=(P(), specs)))(state, x)
    statistics = nnx.merge(new.graphdef, new.params, new.model_state)
    np.testing.assert_allclose(statistics.norm.mean[...], x.mean(0), atol=1e-6)
    assert len({tuple(row) for row in np.asarray(report["aux"]["dropped"]).reshape(8, 16).tolist()}) > 4
    assert len(np.unique(np.asarray(report["aux"]["drawn"]))) == 16
    keys = [
        x for x in jax.tree.leaves((state.model_state, new.model_state)) if jnp.issubdtype(x.dtype, jax.dtypes.prng_key)
    ]
    assert len({tuple(jax.random.key_data(k).tolist()) for k in keys}) == len(keys) // 2


# -- what the compiler makes of it -----------------------------------------------------------------


def collectives(text):
    pattern = r"\s(all-reduce|all-gather|reduce-scatter|all-to-all|collective-permute)(?:-start)?\("
    return Counter(m[1] for line in text.splitlines() if (m := re.search(pattern, line)))


def test_collectives_are_counted(mesh):
    """XLA for CPU has no reduce-scatter pass: the gradients' sum is one all-reduce of all leaves together, of which
    each device takes its part; parameters are gathered once for each leaf that is split. Nothing else moves."""
    tx = jaxsgd.adamw(1e-2)
    params, batch = as_dtype(PARAMS, np.float32), as_dtype(BATCHES[0], np.float32)
    counted = {}
    for zero1 in (None, "data"):
        state = TrainState.create(params, tx, mesh=mesh, zero1=zero1)
        counted[zero1] = collectives(make_step(loss_fn, tx, mesh=mesh).lower(state, batch).compile().as_text())
    assert counted[None] == {"all-reduce": 2}, "all gradients and metrics in one; the integer metric"
    split = sum(name != "odd" for name in PARAMS)
    assert counted["data"]["all-gather"] == split and set(counted["data"]) == {"all-reduce", "all-gather"}
    assert counted["data"]["all-reduce"] == 3, "and the norms of what is split"


def test_pain_14_the_state_is_given_on(mesh):
    tx = jaxsgd.adamw(1e-2)
    params, batch = as_dtype(PARAMS, np.float32), as_dtype(BATCHES[0], np.float32)
    for place in ({}, {"mesh": mesh, "zero1": "data"}):
        state = TrainState.create(params, tx, **place)
        step = make_step(loss_fn, tx, mesh=place.get("mesh"))
        assert "of them donated; temporaries" in jaxsgd.check_donation(step, state, batch)
        with pytest.raises(AssertionError, match="bytes of the state are not reused"):
            jaxsgd.check_donation(make_step(loss_fn, tx, mesh=place.get("mesh"), donate=False), state, batch)
        step(state, batch)  # looking did not take the state


# -- bad input -------------------------------------------------------------------------------------


def test_a_state_used_twice_raises_a_clear_error_on_every_road(mesh):
    """jaxlib ends the process where a program over several devices gets a donated array again."""
    tx = jaxsgd.adam(1e-2)
    params, batch = as_dtype(PARAMS, np.float32), as_dtype(BATCHES[0], np.float32)
    step = make_step(loss_fn, tx, mesh=mesh)
    state = TrainState.create(params, tx, mesh=mesh, zero1="data")
    new, _ = step(state, batch)
    with pytest.raises(RuntimeError, match="state: an earlier step took this state's memory; go on with the state it"):
        step(state, batch)
    with pytest.raises(RuntimeError, match="state: an earlier step took"):  # one part of it is enough
        step(new.replace(opt_state=state.opt_state), batch)
    with pytest.raises(RuntimeError, match="model: an earlier step took"):
        TrainState.create(state.params, tx)
    step(new, batch)

    inner = make_step(loss_fn, tx, axis_name="batch")
    mapped = jaxsgd.checked(jax.pmap(inner, axis_name="batch", donate_argnums=0))
    stacked = jax.tree.map(lambda x: jnp.stack([x] * 8), TrainState.create(params, tx))
    split = jax.tree.map(lambda x: x.reshape(8, -1, x.shape[-1]), batch)
    again, _ = mapped(stacked, split)
    mapped(again, split)
    with pytest.raises(RuntimeError, match="state: an earlier step took"):
        mapped(again, split)


def test_errors_name_what_is_wrong(mesh):
    tx = jaxsgd.adam(1e-2)
    params, batch = as_dtype(PARAMS, np.float32), as_dtype(BATCHES[0], np.float32)
    state = TrainState.create(params, tx, mesh=mesh)
    with pytest.raises(ValueError, match=r"batch_axes='batch': the mesh has no axis 'batch'"):
        make_step(loss_fn, tx, mesh=mesh, batch_axes="batch")
    with pytest.raises(ValueError, match=r"zero1='date': the mesh has no axis 'date'; did you mean 'data'\?"):
        TrainState.create(params, tx, mesh=mesh, zero1="date")
    with pytest.raises(ValueError, match="mesh=None: specs and zero1 need a mesh"):
        TrainState.create(params, tx, zero1="data")
    with pytest.raises(ValueError, match=r"specs: 'odd' has the shape \(5,\); its dimension 0 does not divide"):
        TrainState.create(params, tx, mesh=mesh, specs=lambda name, leaf: P("data"))
    with pytest.raises(ValueError, match=r"specs: 'bias' has the shape \(32,\), .* has 2 entries"):
        TrainState.create(params, tx, mesh=mesh, specs=lambda name, leaf: P(None, "data"))
    with pytest.raises(ValueError, match=r"mesh: its axes are .*Manual.*; Auto or Explicit ones are needed"):
        make_step(loss_fn, tx, mesh=Mesh(jax.devices(), ("data",), axis_types=(AxisType.Manual,)))
    with pytest.raises(ValueError, match="axis_name='data': a step on a mesh needs no axis name"):
        make_step(loss_fn, tx, mesh=mesh, axis_name="data")
    with pytest.raises(ValueError, match="accumulate=0: a whole number is needed, at least 1"):
        make_step(loss_fn, tx, accumulate=0)
    odd = jax.tree.map(lambda x: x[:20], batch)
    with pytest.raises(ValueError, match="batch: 'x' has 20 examples, not divisible by 8 devices; nearest: 16 or 24"):
        make_step(loss_fn, tx, mesh=mesh)(state, odd)
    with pytest.raises(ValueError, match="by 8 devices x 2 microbatches; nearest: 16 or 32"):
        make_step(loss_fn, tx, mesh=mesh, accumulate=2)(state, odd)
    with pytest.raises(ValueError, match="not divisible by accumulate=3 microbatches; nearest: 18 or 21"):
        make_step(loss_fn, tx, accumulate=3)(TrainState.create(params, tx), odd)
    with pytest.raises(ValueError, match="state: 'step' is on SingleDeviceSharding.*not on the step's mesh"):
        make_step(loss_fn, tx, mesh=mesh)(TrainState.create(params, tx), batch)
    with pytest.raises(RuntimeError, match="axis_name='batch': call this step inside jax.pmap"):
        make_step(loss_fn, tx, axis_name="batch")(TrainState.create(params, tx), batch)
    assert not state.step.is_deleted(), "nothing was lost on the way"


# -- what is put into a state ----------------------------------------------------------------------


@pytest.mark.parametrize("zero1", [None, "data"])
def test_what_is_put_into_a_state_goes_where_the_state_is(mesh, zero1):
    """A rate, a key, NumPy arrays, numbers, a fresh optimizer state: no error and no compile."""
    tx = jaxsgd.adamw(1e-3)
    step = make_step(loss_fn, tx, mesh=mesh)
    state = TrainState.create(PARAMS, tx, mesh=mesh, zero1=zero1)
    places = jax.tree.map(lambda x: x.sharding, state)

    def edited(state, i):
        if i == 1:
            return jaxsgd.with_hyper(state, learning_rate=0.5)
        if i == 2:
            return state.replace(key=jax.random.key(3), step=5)
        if i == 3:
            return state.replace(params=jax.tree.map(np.asarray, state.params))
        if i == 4:
            return state.replace(opt_state=jax.tree.map(np.asarray, state.opt_state))
        return state.replace(opt_state=tx.init(state.params)) if i == 5 else state

    for i in range(7):
        state, report = step(edited(state, i), BATCHES[0])
        assert step.compiles == 1 and np.isfinite(report["loss"])
        same = jax.tree.map(lambda x, place: x.sharding.is_equivalent_to(place, x.ndim), state, places)
        assert all(jax.tree.leaves(same)), i
        if i == 1:
            assert float(report["learning_rate"]) == 0.5
    assert int(state.step) == 10 and int(state.opt_state.count) == 2


def test_a_rate_set_in_mid_run_equals_one_from_a_schedule_bit_for_bit(mesh):
    def run(tx, edit):
        step = make_step(loss_fn, tx, mesh=mesh)
        state = TrainState.create(PARAMS, tx, mesh=mesh, zero1="data")
        for i, batch in enumerate(BATCHES):
            state, _ = step(edit(state) if i == 10 else state, batch)
        assert step.compiles == 1
        return state.params

    schedule = lambda count: jnp.where(count < 10, 1e-2, 1e-3)
    wanted = run(jaxsgd.adamw(schedule), lambda state: state)
    got = run(jaxsgd.adamw(1e-2), lambda state: jaxsgd.with_hyper(state, learning_rate=1e-3))
    jax.tree.map(np.testing.assert_array_equal, got, wanted)


def test_a_step_on_a_mesh_inside_the_callers_jit(mesh):
    tx = jaxsgd.adamw(1e-2)
    step = make_step(loss_fn, tx, mesh=mesh)
    begin = lambda: TrainState.create(PARAMS, tx, mesh=mesh)
    batch = jaxsgd.shard_batch(BATCHES[0], mesh)
    inside, _ = jax.jit(step)(begin(), batch)
    outside, _ = step(begin(), BATCHES[0])
    assert apart(inside.params, outside.params) < 1e-6


@pytest.mark.parametrize("specs", [P(), None, {"w": P("data"), "none": None}, {"w": None, "none": P()}])
def test_parameters_with_none_among_them(mesh, specs):
    state = TrainState.create(
        {"w": np.ones((8, 2), np.float32), "none": None}, jaxsgd.adam(1e-2), mesh=mesh, specs=specs
    )
    split = isinstance(specs, dict) and specs["w"] is not None
    assert state.params["w"].sharding.is_fully_replicated != split
