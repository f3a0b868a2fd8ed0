"""Every storage under every rule with moments, split over devices: one program for all of them.

Each pair of a rule and a storage has a parameter of its own under `optax.partition`.
"""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jaxsgd
from jaxsgd import RULES, TrainState, make_step
from jaxsgd.checkpoint import Checkpoints
from jaxsgd.storage import accepts

STORAGES = {
    "int8": jaxsgd.int8(),
    "dynamic": jaxsgd.int8(map="dynamic"),
    "int4": jaxsgd.int4(),
    "fp8": jaxsgd.fp8(),
    "bf16": jaxsgd.cast("bfloat16", stochastic=True),
    "factored": jaxsgd.factored(),
}
NAMES = ("adamw", "lion", "momentum", "rmsprop", "adagrad", "schedule_free_adamw", "adan", "yogi")
SHAPE = (128, 256)
STEPS = 20


def pairs():
    out = {}
    for rule in NAMES:
        for how, storage in STORAGES.items():
            kept = {name: RULES[rule].slots[name] for name in RULES[rule](1e-3).lift.slots}
            taken = {name: storage for name, slot in kept.items() if accepts(storage, slot.kind)}
            if taken:
                out[f"{rule}-{how}"] = RULES[rule](1e-3, storage=taken)
    return out


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """The states after 20 steps on one device and with ZeRO-1 on eight, and the second one from a checkpoint."""
    transformations = pairs()
    tx = optax.partition(transformations, {name: name for name in transformations})
    keys = jax.random.split(jax.random.key(0), len(transformations))
    params = {name: jax.random.normal(key, SHAPE) for name, key in zip(transformations, keys, strict=True)}

    def loss_fn(params, batch, key):
        return sum(jnp.mean((batch @ p - 1) ** 2) for p in params.values())

    mesh = jax.make_mesh((8,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    batches = np.random.default_rng(0).normal(size=(STEPS + 1, 16, SHAPE[0])).astype(np.float32)
    out = []
    for where in ({}, {"mesh": mesh, "zero1": "data"}):
        state, step = TrainState.create(params, tx, **where), make_step(loss_fn, tx, mesh=where.get("mesh"))
        for batch in batches[:STEPS]:
            state, _ = step(state, batch)
        out.append(jax.tree.map(np.asarray, jax.device_get((state.params, state.opt_state))))
    jaxsgd.assert_sharded(state, zero1="data")
    with Checkpoints(tmp_path_factory.mktemp("run")) as checkpoints:
        checkpoints.save(state)
        checkpoints.wait()
        restored = checkpoints.restore(TrainState.shapes(params, tx, **where)).state
    before, after = ((s.params, s.opt_state) for s in (state, restored))
    same = jax.tree.map(lambda a, b: bool((a == b).all()) and a.sharding == b.sharding, before, after)
    again, _ = step(restored, batches[STEPS])
    on, _ = step(state, batches[STEPS])
    return out, same, (again.params, on.params)


@pytest.mark.slow
@pytest.mark.parametrize("pair", sorted(pairs()))
def test_split_over_devices_it_takes_the_same_steps(pair, trained):
    (one, _), (many, _) = trained[0]
    assert np.abs(one[pair] - many[pair]).max() < 2e-3  # a code may go to its neighbour; 20 steps of 1e-3
    assert np.mean(np.abs(one[pair] - many[pair]) > 1e-5) < 0.02
    again, on = trained[2]
    np.testing.assert_array_equal(again[pair], on[pair])


@pytest.mark.slow
def test_a_checkpoint_keeps_every_array_and_its_place(trained):
    assert all(jax.tree.leaves(trained[1]))
