"""The optimizer's slots in the host's memory: the same numbers, in their place after each step."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, Mesh
from jax.sharding import PartitionSpec as P

import jaxsgd
from jaxsgd import TrainState, make_step
from jaxsgd.memory import HOST, check_host_memory, on_host
from jaxsgd.planning.accounts import host_bytes
from jaxsgd.planning.plan import plan
from jaxsgd.planning.reading import Reading
from jaxsgd.planning.result import Bound
from jaxsgd.planning.targets import available

RNG = np.random.default_rng(0)
PARAMS = {name: RNG.normal(size=(16, 16)).astype("f") / 4 for name in ("w0", "w1", "w2")} | {"b": np.zeros(16, "f")}
BATCH = {name: RNG.normal(size=(16, 16)).astype("f") for name in ("x", "y")}
ADAMW = jaxsgd.adamw(1e-2)


def loss_fn(params, batch, key):
    x = batch["x"]
    for name in ("w0", "w1", "w2"):
        x = jnp.tanh(x @ params[name] + params["b"])
    return jnp.mean((x - batch["y"]) ** 2)


def kinds(tree):
    return {x.sharding.memory_kind for x in jax.tree.leaves(tree)}


def slots_and_scalars(opt_state):
    leaves = jax.tree.leaves(opt_state)
    return [x for x in leaves if x.ndim], [x for x in leaves if not x.ndim]


def assert_same(one, other):
    def check(a, b):
        a, b = (jax.random.key_data(x) if jnp.issubdtype(x.dtype, jax.dtypes.prng_key) else x for x in (a, b))
        np.testing.assert_array_equal(a, b)

    jax.tree.map(check, one, other)


def assert_on_host(state):
    slots, scalars = slots_and_scalars(state.opt_state)
    assert kinds(slots) == {HOST}
    assert kinds(scalars) == kinds(state.params) == {"device"}


def meshes():
    return {
        "one device": {},
        "auto": {"mesh": Mesh(jax.devices(), ("data",)), "zero1": "data"},
        "explicit": {"mesh": jax.make_mesh((8,), ("data",), axis_types=(AxisType.Explicit,)), "zero1": "data"},
    }


@pytest.mark.parametrize("where", meshes())
@pytest.mark.parametrize(
    ("tx", "accumulate"),
    [
        (ADAMW, 2),
        (jaxsgd.adamw(1e-2, storage=jaxsgd.int8(min_size=0)), 1),
        (optax.chain(jaxsgd.guard(optax.chain(jaxsgd.clip_by_global_norm(0.1), optax.adam(1e-2)))), 1),
    ],
    ids=["adamw", "int8", "guard"],
)
def test_the_same_numbers_from_the_host(where, tx, accumulate):
    """After each step the slots are on the host; bit for bit the state is that of a run without; nothing recompiles."""
    settings, ends = meshes()[where], []
    for offload in (False, True):
        state = TrainState.create(PARAMS, tx, offload=offload, **settings)
        step = make_step(loss_fn, tx, mesh=settings.get("mesh"), accumulate=accumulate)
        for i in range(3):
            before = state
            state, report = step(state, BATCH)
            if offload:
                owned = [x for x in jax.tree.leaves(state.opt_state) if on_host(x)]
                assert len(owned) == len([x for x in jax.tree.leaves(before.opt_state) if on_host(x)]) >= 8
                assert kinds(state.params) == kinds(report) == {"device"}
            if i == 0:
                programs = step.jitted._cache_size()
        assert all(x.is_deleted() for x in jax.tree.leaves(before))  # donated, those on the host too
        assert (step.compiles, step.jitted._cache_size()) == (1, programs if not settings else 2)
        ends.append((state, report))
    assert_same(*ends)
    if tx is ADAMW:
        assert_on_host(ends[1][0])
        assert "donated" in jaxsgd.train.check_donation(step, ends[1][0], BATCH)


def test_other_ways_to_run_the_step():
    """Under scan, in shard_map, and a step that updates during the backward pass; pmap is refused."""
    step, batches = make_step(loss_fn, ADAMW), jax.tree.map(lambda x: jnp.stack([x, x]), BATCH)
    ends = []
    for offload in (False, True):
        state = TrainState.create(PARAMS, ADAMW, offload=offload)
        ends.append(jax.jit(lambda s: jax.lax.scan(step.fn, s, batches))(state)[0])
    assert_same(*ends)
    assert_on_host(ends[1])

    mesh = Mesh(jax.devices(), ("data",))
    mapped = make_step(loss_fn, ADAMW, axis_name="data")
    state = TrainState.create(PARAMS, ADAMW, mesh=mesh, offload=True)
    sharded = jax.jit(jax.shard_map(mapped.fn, mesh=mesh, in_specs=(P(), P("data")), out_specs=P()))
    state, _ = sharded(state, BATCH)
    assert_on_host(state)
    copies = jax.tree.map(lambda x: jnp.stack([x] * 8), TrainState.create(PARAMS, ADAMW, offload=True))
    with pytest.raises(ValueError, match=r"jax\.pmap does not take\. Use make_step"):
        jaxsgd.checked(jax.pmap(mapped.fn, "data"))(copies, jax.tree.map(lambda x: x.reshape(8, 2, 16), BATCH))


def test_a_layer_step():
    stack = {"layers": np.stack([PARAMS["w0"], PARAMS["w1"]]), "head": PARAMS["b"] + 1}
    step = jaxsgd.make_layer_step(
        lambda params, batch, key: batch["x"],
        lambda w, x, key: jnp.tanh(x @ w),
        lambda params, x, batch, key: jnp.mean((x * params["head"] - batch["y"]) ** 2),
        ADAMW,
    )
    ends = [step(TrainState.create(stack, ADAMW, offload=offload), BATCH)[0] for offload in (False, True)]
    assert_same(*ends)
    assert_on_host(ends[1])


def test_a_new_optimizer_state_goes_to_the_host_of_the_mesh():
    mesh = Mesh(jax.devices(), ("data",))
    state = TrainState.create(PARAMS, ADAMW, mesh=mesh, zero1="data", offload=True)
    step = make_step(loss_fn, ADAMW, mesh=mesh)
    state, _ = step(state, BATCH)
    state = state.replace(opt_state=jaxsgd.with_hyper(ADAMW.init(state.params), learning_rate=1e-3))
    state, report = step(state, BATCH)
    assert_on_host(state)
    assert float(report["learning_rate"]) == np.float32(1e-3)
    assert step.compiles == 1


def test_averages_are_evaluated_on_the_device():
    tx = jaxsgd.schedule_free_adamw(1e-2)
    ends = []
    for offload in (False, True):
        state, _ = make_step(loss_fn, tx)(TrainState.create(PARAMS, tx, offload=offload), BATCH)
        ends.append(state.eval_params)
    assert kinds(ends[1]) == {"device"}
    assert_same(*ends)


@pytest.mark.parametrize("where", ["one device", "auto"])
def test_checkpoints_restore_into_the_host(where, tmp_path):
    from jaxsgd.checkpoint import Checkpoints

    settings = meshes()[where]
    step = make_step(loss_fn, ADAMW, mesh=settings.get("mesh"))
    state, _ = step(TrainState.create(PARAMS, ADAMW, offload=True, **settings), BATCH)
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(state)
        checkpoints.wait()
        plain = checkpoints.restore(TrainState.shapes(PARAMS, ADAMW, mesh=Mesh(jax.devices(), ("data",)))).state
        like = TrainState.shapes(PARAMS, ADAMW, offload=True, **settings)
        restored = checkpoints.restore(like).state
        moved = checkpoints.restore(like, migrate=True, tx=ADAMW).state
    assert kinds(plain.opt_state) == {"device"}
    for other in (restored, moved):
        assert_on_host(other)
        assert_same(other, state)
    next_one, _ = step(restored, BATCH)
    assert_on_host(next_one)
    assert step.compiles == 1


def test_the_report_of_a_sharded_state():
    state = TrainState.shapes(PARAMS, ADAMW, mesh=Mesh(jax.devices(), ("data",)), zero1="data", offload=True)
    report = jaxsgd.assert_sharded(state, zero1="data")
    assert "by the host" in report
    assert report.bytes_per_device == 12  # the count, the rate and the decay


class Elsewhere:
    platform, device_kind = "abacus", "Abacus 3"

    def addressable_memories(self):
        return []


def test_clear_errors():
    with pytest.raises(ValueError, match="offload=True: Abacus 3 on the platform 'abacus' has no memory .* Use"):
        check_host_memory("offload=True", Elsewhere())
    mesh = Mesh(jax.devices(), ("data",))
    spread = TrainState.create(PARAMS, ADAMW, mesh=mesh).params
    with pytest.raises(ValueError, match=r"offload=True: the parameters are on 8 devices and mesh=None\. Use mesh="):
        TrainState.create(spread, ADAMW, offload=True)


def test_a_plan_says_what_the_host_keeps():
    shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), (PARAMS, BATCH))
    plans = [plan(loss_fn, shapes[0], ADAMW, shapes[1], offload=offload) for offload in (False, True)]
    kept = 2 * sum(x.nbytes for x in PARAMS.values())
    assert [p.host_bytes for p in plans] == [0, kept]
    assert plans[1].host_traffic == plans[1].to_dict()["host_traffic"] == 2 * kept
    assert plans[1].parts["state: mu"] == plans[0].parts["state: mu"]  # on a CPU the host's memory is the device's
    assert "the host keeps" in str(plans[1])
    assert "the host keeps" not in str(plans[0])
    assert plans[1].settings["offload"] == HOST


def test_the_bound_knows_the_link_to_the_host():
    from jaxsgd.planning.devices import known

    devices, nothing = known(), Reading(None, {}, 0.0, {}, {})
    bound = Bound.of(nothing, devices["h100"], 2**36)
    assert (bound.by, bound.host) == ("host", 1.0)  # 64 GiB at 64 GiB/s
    assert Bound.of(nothing, devices["v5e"], 2**36).host == 0  # not known
    state = TrainState.shapes(PARAMS, ADAMW, offload=True)
    assert host_bytes(state.opt_state) == 2 * sum(x.nbytes for x in PARAMS.values())


@pytest.mark.skipif(not available("tpu"), reason="the TPU compiler is missing: pip install 'jaxsgd[tpu]'")
def test_the_tpu_compiler_leaves_the_slots_on_the_host():
    shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct((512,) * x.ndim, x.dtype), (PARAMS, BATCH))
    inputs = (loss_fn, shapes[0], ADAMW, shapes[1])
    plans = [plan(*inputs, topology="v5e:1x1", offload=offload) for offload in (True, False)]
    kept = 2 * 4 * (3 * 512 * 512 + 512)
    assert plans[0].host_bytes == kept
    assert plans[1].argument - plans[0].argument == pytest.approx(kept, rel=0.01)  # arrays are padded
    assert plans[0].parts["state: mu"] == 0
    assert plans[0].needs < plans[1].needs + kept


@pytest.mark.skipif(not available("cuda"), reason="the CUDA compiler is missing: pip install 'jaxsgd[cuda]'")
def test_a_described_gpu_is_refused():
    shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), (PARAMS, BATCH))
    with pytest.raises(ValueError, match="offload=True: .* on the platform 'gpu' has no memory of kind"):
        plan(loss_fn, shapes[0], ADAMW, shapes[1], topology="h100", offload=True)
