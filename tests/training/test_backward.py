"""The optimizer in the backward pass: the numbers of an ordinary step, without the gradients of all layers at once."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jaxsgd
from jaxsgd import TrainState, make_layer_step, make_step

COUNT, WIDTH, ROWS = 5, 64, 8
KEYS = jax.random.split(jax.random.key(0), 5)
PARAMS = {
    "layers": {"w": jax.random.normal(KEYS[0], (COUNT, WIDTH, WIDTH)) / 8, "b": jnp.zeros((COUNT, WIDTH))},
    "embed": jax.random.normal(KEYS[1], (8, WIDTH)),
    "head": jax.random.normal(KEYS[2], (WIDTH,)) / 8,
}
BATCH = {"x": jax.random.normal(KEYS[3], (ROWS, 8)), "y": jax.random.normal(KEYS[4], (ROWS,))}


def before(params, batch, key):
    return batch["x"] @ params["embed"]


def layer(params, x, key):
    return x + jnp.tanh(x @ params["w"] + params["b"])


def after(params, x, batch, key):
    return jnp.mean((x @ params["head"] - batch["y"]) ** 2)


def loss_fn(params, batch, key):
    x, _ = jax.lax.scan(lambda x, p: (layer(p, x, key), None), before(params, batch, key), params["layers"])
    return after(params, x, batch, key)


def trained(step, tx, params=PARAMS, count=4):
    state = TrainState.create(params, tx)
    for _ in range(count):
        state, metrics = step(state, BATCH)
    return state, metrics


INT8 = jaxsgd.int8(min_size=0, stochastic=False)
SAME = {
    "adamw": lambda: jaxsgd.adamw(1e-2, weight_decay=0.1),
    "optax.adamw": lambda: optax.adamw(1e-2),
    "a chain": lambda: optax.chain(optax.clip(0.1), optax.trace(0.9), optax.scale(-0.01)),
    "a schedule": lambda: jaxsgd.momentum(optax.linear_schedule(0.1, 0.01, 4)),
    "lion": lambda: jaxsgd.lion(1e-3),
    "int8": lambda: jaxsgd.adamw(1e-2, storage=INT8),
    "muon": lambda: jaxsgd.muon(1e-2),
    "groups": lambda: jaxsgd.adamw(1e-2, groups=[("layers/b", {"frozen": True}), ("head", {"lr_mult": 2.0})]),
    "partition": lambda: optax.partition(
        {"a": jaxsgd.lion(1e-3), "z": optax.sgd(0.1)}, {"layers": "a", "embed": "z", "head": "a"}
    ),
    "schedule-free": lambda: jaxsgd.schedule_free_adamw(1e-2),
}


@pytest.mark.parametrize("case", SAME)
def test_it_is_the_ordinary_step(case):
    tx = SAME[case]()
    one, first = trained(make_step(loss_fn, tx), tx)
    two, second = trained(make_layer_step(before, layer, after, tx), tx)
    assert jax.tree.structure(one) == jax.tree.structure(two)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6), one.params, two.params)
    assert set(first) == set(second)
    for name in first:
        np.testing.assert_allclose(first[name], second[name], rtol=1e-4, err_msg=name)
    # The state goes on in the other step.
    make_step(loss_fn, tx)(two, BATCH)


def test_it_is_the_ordinary_step_in_float64(x64):
    params = jax.tree.map(lambda x: x.astype("float64"), PARAMS)
    tx = jaxsgd.adamw(1e-2)
    one, _ = trained(make_step(loss_fn, tx), tx, params)
    two, _ = trained(make_layer_step(before, layer, after, tx), tx, params)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-11, atol=1e-13), one.params, two.params)


def test_layers_are_clipped_one_by_one():
    clip = 0.01
    step = make_layer_step(before, layer, after, jaxsgd.sgd(1.0), layer_clip=clip)
    state, metrics = step(TrainState.create(PARAMS, jaxsgd.sgd(1.0)), BATCH)
    moved = jax.tree.map(lambda a, b: np.asarray(a - b, np.float64), PARAMS, state.params)
    norms = np.sqrt(sum((x**2).reshape(COUNT, -1).sum(1) for x in jax.tree.leaves(moved.pop("layers"))))
    np.testing.assert_allclose(norms, clip, rtol=1e-3)
    np.testing.assert_allclose(np.sqrt(sum((x**2).sum() for x in jax.tree.leaves(moved))), clip, rtol=1e-3)
    grads = jax.grad(loss_fn)(PARAMS, BATCH, None)
    np.testing.assert_allclose(metrics["gradient_norm"], optax.tree.norm(grads), rtol=1e-5)


def test_each_layer_has_its_own_key_and_each_step():
    def dropped(params, x, key):
        return x + jnp.where(jax.random.bernoulli(key, 0.5, x.shape), jnp.tanh(x @ params["w"]), 0)

    params = {**PARAMS, "layers": {"w": jnp.zeros((COUNT, WIDTH, WIDTH))}}
    tx = jaxsgd.sgd(1.0)
    step = make_layer_step(before, dropped, after, tx)
    state, _ = step(TrainState.create(params, tx, key=1), BATCH)
    other, _ = step(TrainState.create(params, tx, key=2), BATCH)
    again, _ = step(TrainState.create(params, tx, key=1), BATCH)
    w = np.asarray(state.params["layers"]["w"])
    assert not np.allclose(w[0], w[1]) and not np.allclose(w, other.params["layers"]["w"])
    np.testing.assert_array_equal(w, again.params["layers"]["w"])


NOISY = {
    "a rule": (jnp.float32, lambda: jaxsgd.noisy_sgd(1e-2)),
    "optax": (jnp.float32, lambda: optax.chain(optax.add_noise(1.0, 0.5, 0), optax.sgd(1e-2))),
    "rounding": (jnp.bfloat16, lambda: jaxsgd.sgd(2e-3, rounding="stochastic")),
    "a packed state": (jnp.float32, lambda: jaxsgd.adamw(1e-2, storage=jaxsgd.int8(min_size=0))),
}


@pytest.mark.parametrize("case", NOISY)
def test_each_layer_draws_its_own_random_numbers(case):
    dtype, make = NOISY[case]
    params = {"layers": jnp.ones((3, 64), dtype), "head": jnp.ones((), dtype)}
    tx, slope = make(), jnp.linspace(1, 2, 64, dtype=dtype)
    step = make_layer_step(
        lambda params, batch, key: batch,
        lambda w, x, key: x + w * slope,  # every layer has the same gradient
        lambda params, x, batch, key: jnp.sum(x).astype(jnp.float32) * params["head"].astype(jnp.float32),
        tx,
    )
    state = TrainState.create(params, tx)
    for _ in range(3):
        state, _ = step(state, jnp.zeros(64, dtype))
    w = np.asarray(state.params["layers"], np.float32)
    apart = [np.mean(w[i] != w[j]) for i, j in ((0, 1), (0, 2), (1, 2))]
    assert min(apart) > 0.1 and np.ptp(w.mean(1)) < 0.02


@pytest.mark.parametrize(
    "tx, words",
    [
        (optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(1e-2)), "Use layer_clip="),
        (jaxsgd.guard(jaxsgd.adamw(1e-2)), "depends on the gradient of 'head'"),
        (jaxsgd.prodigy(1.0), "takes two passes"),
        (jaxsgd.adamw(1e-2, norms=True), "its state depends on the gradient"),
        (jaxsgd.accumulate(jaxsgd.sgd(0.1), 2), "depends on the gradient"),
        (jaxsgd.soap(1e-3), "Use a storage with min_size=0, or jaxsgd.make_step"),
        (jaxsgd.adamw(1e-2, storage=jaxsgd.int8(min_size=5000)), "Use a storage with min_size=0"),
    ],
    ids=["clip", "guard", "prodigy", "norms", "accumulate", "soap", "min_size"],
)
def test_what_needs_all_gradients_is_refused(tx, words):
    state = TrainState.create(PARAMS, tx)
    with pytest.raises(ValueError, match=words):
        make_layer_step(before, layer, after, tx)(state, BATCH)
    assert not state.step.is_deleted()


def test_bad_input_is_refused_by_name():
    tx = jaxsgd.sgd(0.1)
    step = make_layer_step(before, layer, after, tx)
    for params, words in (
        ({"head": jnp.ones(3)}, r"layers='layers': the parameters have no such key.*'head'"),
        ([jnp.ones(3)], "Use a dict with it; got list"),
        ({"layers": {"a": jnp.ones((3, 2)), "b": jnp.ones(2)}}, r"counts the layers; got .*'layers/b' \(2,\)"),
        ({"layers": {"a": jnp.ones(())}}, "counts the layers"),
        ({"layers": {}, "head": jnp.ones(2)}, "got none"),
    ):
        with pytest.raises(ValueError, match=words):
            step(TrainState.create(params, tx), BATCH)
    vector = make_layer_step(before, layer, lambda params, x, batch, key: x, tx)
    with pytest.raises(ValueError, match=r"after: it returned float32\[8, 64\]; a loss is a real scalar"):
        vector(TrainState.create(PARAMS, tx), BATCH)
    with pytest.raises(ValueError, match="a model state has no place"):
        step(TrainState.create(PARAMS, tx, model_state={"mean": jnp.ones(2)}), BATCH)
    with pytest.raises(TypeError, match="a jaxsgd.TrainState is needed, got a dict"):
        step(PARAMS, BATCH)
    with pytest.raises(ValueError, match="layer_clip=0"):
        make_layer_step(before, layer, after, tx, layer_clip=0)
    with pytest.raises(TypeError, match="tx"):
        make_layer_step(before, layer, after, "adam")
    state = TrainState.create(PARAMS, tx)
    step(state, BATCH)
    with pytest.raises(RuntimeError, match="took this state's memory"):
        step(state, BATCH)


def test_the_gradients_of_all_layers_are_never_there():
    shapes = {
        "layers": {"w": jax.ShapeDtypeStruct((24, 256, 256), jnp.float32)},
        "embed": jax.ShapeDtypeStruct((8, 256), jnp.float32),
        "head": jax.ShapeDtypeStruct((256,), jnp.float32),
    }
    plain_layer = lambda params, x, key: x + jnp.tanh(x @ params["w"])

    def whole(params, batch, key):
        body = jax.checkpoint(lambda x, p: (plain_layer(p, x, key), None), prevent_cse=False)
        return after(params, jax.lax.scan(body, before(params, batch, key), params["layers"])[0], batch, key)

    tx = jaxsgd.adamw(1e-3)
    state = TrainState.shapes(shapes, tx)
    steps = make_step(whole, tx), make_layer_step(before, plain_layer, after, tx)
    used = [step.lower(state, BATCH).compile().memory_analysis().temp_size_in_bytes for step in steps]
    gradients = 4 * sum(x.size for x in jax.tree.leaves(shapes))
    assert used[0] - used[1] > 0.8 * gradients


@pytest.mark.parametrize("kind", list(jax.sharding.AxisType)[:2])
@pytest.mark.parametrize("zero1", [None, "data"])
def test_on_a_mesh_the_state_keeps_its_sharding_and_the_step_its_program(zero1, kind):
    tx, mesh = jaxsgd.momentum(1e-3), jax.make_mesh((8,), ("data",), axis_types=(kind,))
    ordinary, other = make_step(loss_fn, tx, mesh=mesh), TrainState.create(PARAMS, tx, mesh=mesh, zero1=zero1)
    traced = []

    def counted(params, batch, key):
        traced.append(1)
        return before(params, batch, key)

    step = make_layer_step(counted, layer, after, tx, mesh=mesh)
    state = TrainState.create(PARAMS, tx, mesh=mesh, zero1=zero1)
    home = [x.sharding for x in jax.tree.leaves(state)]
    for _ in range(3):
        (state, _), (other, _) = step(state, BATCH), ordinary(other, BATCH)
    assert len(traced) == 1
    for name, x, where in zip(jaxsgd.paths.leaf_names(state), jax.tree.leaves(state), home, strict=True):
        assert x.sharding.is_equivalent_to(where, x.ndim), name
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6), other.params, state.params)
    with pytest.raises(ValueError, match="is on .*, not on the step's mesh"):
        make_layer_step(before, layer, after, tx, mesh=mesh)(TrainState.create(PARAMS, tx), BATCH)
    with pytest.raises(ValueError, match="batch_axes.*'dat'"):
        make_layer_step(before, layer, after, tx, mesh=mesh, batch_axes="dat")


def test_plan_takes_it():
    tx = jaxsgd.adamw(1e-2)
    gradients = sum(x.nbytes for x in jax.tree.leaves(PARAMS["layers"]))
    checkpointed = jax.checkpoint(layer)

    def whole(params, batch, key):
        x, _ = jax.lax.scan(lambda x, p: (checkpointed(p, x, key), None), before(params, batch, key), params["layers"])
        return after(params, x, batch, key)

    shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), PARAMS)
    ordinary = jaxsgd.plan(whole, shapes, tx, BATCH)
    layered = jaxsgd.plan(make_layer_step(before, layer, after, tx), shapes, None, BATCH)
    assert layered.argument == ordinary.argument == layered.alias + sum(x.nbytes for x in BATCH.values())
    assert ordinary.temporary - layered.temporary > 0.5 * gradients
    with pytest.raises(TypeError, match="tx: a jaxsgd.LayerStep has its own"):
        jaxsgd.plan(make_layer_step(before, layer, after, tx), shapes, optax.sgd(0.1), BATCH)
    with pytest.raises(ValueError, match="accumulate=2: a jaxsgd.LayerStep has no microbatches"):
        jaxsgd.plan(make_layer_step(before, layer, after, tx), shapes, None, BATCH, accumulate=2)
    bad = make_layer_step(before, lambda params, x, key: x if x.sum() > 0 else -x, after, tx)
    with pytest.raises(TypeError, match="step_or_loss: before, <lambda>, after cannot be compiled"):
        jaxsgd.plan(bad, shapes, None, BATCH)
