"""What docs/reliability.md says of bad batches, accumulation and dispatch, made to happen. (Checkpoints, kills and
several processes have files of their own.)"""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P
from sklearn.datasets import load_digits

import jaxsgd
from jaxsgd import TrainState, make_step

DIGITS = load_digits()
ORDER = np.random.default_rng(0).permutation(len(DIGITS.target))
IMAGES, LABELS = (DIGITS.data[ORDER] / 16).astype(np.float32), DIGITS.target[ORDER].astype(np.int32)
STEPS, SIZE = 600, 64


@pytest.fixture(scope="module")
def mesh():
    return Mesh(jax.devices(), ("data",))


@jax.custom_vjp
def poisoned(x, factor):
    """``x``, whose gradient is multiplied by ``factor``: the loss stays finite."""
    return x


poisoned.defvjp(lambda x, factor: (x, factor), lambda factor, g: (g * factor, None))


def init(key):
    first, second = jax.random.split(key)
    return {
        "hidden": jax.random.normal(first, (64, 64)) / 8, "bias": jnp.zeros(64),
        "head": jax.random.normal(second, (64, 10)) / 8,
    }  # fmt: skip


def logits_of(p, images):
    return jax.nn.relu(images @ p["hidden"] + p["bias"]) @ p["head"]


def loss_fn(p, batch, key):
    logits = poisoned(logits_of(p, batch["image"]), batch["factor"][0])
    return optax.softmax_cross_entropy_with_integer_labels(logits, batch["label"]).mean()


def trained(step, tx, seed, bad=None, **place):
    """The state after 600 steps on digits, of which 1% are ``bad``, and its accuracy on the last fifth."""
    rng = np.random.default_rng(seed)
    state = TrainState.create(init, tx, key=seed, **place)
    chosen = set(rng.choice(STEPS, STEPS // 100, replace=False).tolist())
    for i in range(STEPS):
        rows = rng.choice(1437, SIZE, replace=False)
        batch = {"image": IMAGES[rows], "label": LABELS[rows], "factor": np.ones(SIZE, np.float32)}
        if bad == "NaN batches" and i in chosen:
            batch["image"] = batch["image"].copy()
            batch["image"][rng.integers(SIZE), rng.integers(64)] = np.nan  # one pixel is enough
        if bad == "inf gradients" and i in chosen:
            batch["factor"] = np.full(SIZE, np.inf, np.float32)
        state, _ = step(state, batch)
    right = np.asarray(logits_of(state.params, IMAGES[1437:])).argmax(-1) == LABELS[1437:]
    return state, right.mean()


def guarded():
    return jaxsgd.guard(optax.chain(jaxsgd.clip_by_global_norm(1.0), jaxsgd.adamw(3e-3)))


def test_pain_11_bad_batches_cost_no_accuracy(mesh):
    tx = guarded()
    step, seeds = make_step(loss_fn, tx), range(5)
    clean = np.array([trained(step, tx, seed)[1] for seed in seeds])
    assert clean.mean() > 0.92
    good = {"image": IMAGES[:SIZE], "label": LABELS[:SIZE], "factor": np.ones(SIZE, np.float32)}
    for bad in ("NaN batches", "inf gradients"):
        states, accuracies = zip(*(trained(step, tx, seed, bad) for seed in seeds), strict=True)
        for state in states:
            report = jaxsgd.guard_report(state.opt_state)
            assert report["skipped"] == STEPS // 100 and not report["halted"]
            assert int(step.fn(state, good)[1]["skipped"]) == STEPS // 100, "a metric of every step"
            assert int(optax.tree.get(state.opt_state, "GuardState").inner[1].count) == STEPS - STEPS // 100
            assert int(state.step) == STEPS
        # Noise: two standard errors of a difference of two means over the seeds.
        error = np.sqrt((clean.var(ddof=1) + np.var(accuracies, ddof=1)) / len(seeds))
        assert abs(np.mean(accuracies) - clean.mean()) <= 2 * error, bad
    assert step.compiles == 1
    # Without the guard one NaN is the end of the run.
    bare = jaxsgd.adamw(3e-3)
    assert np.isnan(trained(make_step(loss_fn, bare), bare, 0, "NaN batches")[0].params["head"]).all()


def test_pain_11_all_replicas_skip_the_batch_that_one_of_them_finds_bad(mesh):
    tx = guarded()
    rows = np.arange(SIZE)
    good = {"image": IMAGES[rows], "label": LABELS[rows], "factor": np.ones(SIZE, np.float32)}
    bad = good | {"image": np.where(np.arange(SIZE)[:, None] == 37, np.nan, good["image"])}  # the fifth device's
    batches = [good, bad, good]
    alone = TrainState.create(init, tx)
    for batch in (good, good):
        alone, _ = make_step(loss_fn, tx, donate=False)(alone, batch)
    for road in ("mesh", "shard_map", "pmap"):
        place = {} if road == "pmap" else {"mesh": mesh, "zero1": "data" if road == "mesh" else None}
        state = TrainState.create(init, tx, **place)
        if road == "mesh":
            step = make_step(loss_fn, tx, mesh=mesh)
        elif road == "shard_map":
            inner = make_step(loss_fn, tx, axis_name="data")
            step = jax.jit(jax.shard_map(inner, mesh=mesh, in_specs=(P(), P("data")), out_specs=P()))
        else:
            inner = make_step(loss_fn, tx, axis_name="data")
            step = jax.pmap(inner, axis_name="data")
            state = jax.tree.map(lambda x: jnp.stack([x] * 8), state)
        for batch in batches:
            split = jax.tree.map(lambda x: x.reshape(8, -1, *x.shape[1:]), batch) if road == "pmap" else batch
            state, _ = step(state, split)
        assert np.all(np.asarray(jaxsgd.guard_report(state.opt_state)["skipped"]) == 1), road
        for name, p in state.params.items():
            whole = np.asarray(p) if road == "pmap" else np.asarray(p)[None]
            assert (whole == whole[:1]).all(), f"{road}: replicas differ"
            np.testing.assert_allclose(whole[0], alone.params[name], rtol=0, atol=1e-6, err_msg=road)


def test_a_guard_that_halts_keeps_the_last_good_step_until_resume():
    tx = jaxsgd.guard(jaxsgd.adam(1e-2), max_consecutive=3)
    step, state = make_step(lambda p, batch, key: jnp.mean((batch @ p) ** 2), tx), TrainState.create(jnp.ones(4), tx)
    good = np.ones((8, 4), np.float32)
    state, _ = step(state, good)
    kept = np.asarray(state.params)
    for count in range(1, 6):
        state, _ = step(state, good * np.nan)
        assert jaxsgd.guard_report(state.opt_state)["halted"] == (count >= 3)
    state, metrics = step(state, good)
    np.testing.assert_array_equal(state.params, kept)
    assert int(metrics["skipped"]) == 6
    state, _ = step(state.replace(opt_state=jaxsgd.resume(state.opt_state)), good)
    assert np.all(np.asarray(state.params) != kept) and step.compiles == 1


def test_a_misspelt_axis_in_specs_is_named(mesh):
    with pytest.raises(ValueError, match=r"specs: 'w'=.*the mesh has no axis 'date'; did you mean 'data'\?"):
        TrainState.create({"w": jnp.ones(8)}, jaxsgd.sgd(0.1), mesh=mesh, specs=P("date"))


def test_float16_weights_train_and_an_overflow_is_skipped():
    tx = jaxsgd.guard(jaxsgd.adamw(3e-3))
    half = lambda key: jax.tree.map(lambda p: p.astype(jnp.float16), init(key))
    state, step = TrainState.create(half, tx), make_step(loss_fn, tx, donate=False)
    rows = np.arange(SIZE)
    batch = {"image": IMAGES[rows].astype(np.float16), "label": LABELS[rows], "factor": np.ones(SIZE, np.float16)}
    losses = []
    for i in range(60):
        factor = np.float16(np.inf if i == 30 else 1)  # what an overflow in the backward pass leaves
        state, metrics = step(state, batch | {"factor": np.full(SIZE, factor)})
        losses.append(float(metrics["loss"]))
    assert jaxsgd.guard_report(state.opt_state)["skipped"] == 1
    assert losses[31] == losses[30] and losses[-1] < 0.3 * losses[0]
    assert all(p.dtype == jnp.float16 and jnp.isfinite(p).all() for p in jax.tree.leaves(state.params))


# -- accumulation inside the step ------------------------------------------------------------------


def tokens_loss(p, batch, key):
    each = optax.softmax_cross_entropy_with_integer_labels(logits_of(p, batch["image"]), batch["label"])
    tokens = batch["mask"].sum()
    return jnp.where(tokens > 0, (each * batch["mask"]).sum() / tokens, jnp.nan), {"tokens": tokens}


def test_pain_4_microbatches_are_one_batch_on_every_road(mesh):
    """Token-weighted: a plain mean of means would differ, since the masks are uneven."""
    tx = jaxsgd.muon(0.02)
    rng = np.random.default_rng(0)
    batch = {"image": IMAGES[:SIZE], "label": LABELS[:SIZE], "mask": (rng.random(SIZE) < 0.4).astype(np.float32)}
    found = {}
    for road, options in {
        "whole": {}, "4 microbatches": {"accumulate": 4, "weight": "tokens"},
        "mesh": {"mesh": mesh}, "mesh, 4": {"mesh": mesh, "accumulate": 4, "weight": "tokens"},
        "shard_map, 4": {"axis_name": "data", "accumulate": 4, "weight": "tokens"},
        "shard_map": {"axis_name": "data", "weight": "tokens"},
    }.items():  # fmt: skip
        place = {} if road in ("whole", "4 microbatches") else {"mesh": mesh, "zero1": "data"}
        if "shard_map" in road:
            place = {"mesh": mesh}
        state, step = TrainState.create(init, tx, **place), make_step(tokens_loss, tx, **options)
        if "shard_map" in road:
            step = jax.jit(jax.shard_map(step, mesh=mesh, in_specs=(P(), P("data")), out_specs=P()))
        for _ in range(5):
            state, metrics = step(state, batch)
        assert int(state.opt_state.count) == 5, "the optimizer runs once a step, not once a microbatch"
        assert float(metrics["aux"]["tokens"]) == batch["mask"].sum()
        found[road] = state.params, metrics["loss"]
    for road, (params, loss) in found.items():
        np.testing.assert_allclose(loss, found["whole"][1], rtol=1e-5, err_msg=road)
        for name, p in params.items():
            np.testing.assert_allclose(p, found["whole"][0][name], rtol=0, atol=1e-6, err_msg=f"{road}: {name}")


def test_pain_4_microbatches_take_the_memory_of_one():
    def deep(p, batch, key):
        x = batch
        for _ in range(8):
            x = jnp.tanh(x @ p)
        return jnp.mean(x**2)

    tx, x = jaxsgd.sgd(0.1), np.zeros((4096, 32), np.float32)
    state = TrainState.create(jnp.eye(32), tx)
    used = {
        n: make_step(deep, tx, accumulate=n).lower(state, x).compile().memory_analysis().temp_size_in_bytes
        for n in (1, 16)
    }
    assert used[16] < 0.25 * used[1], used


def test_pain_4_one_inf_microbatch_is_one_skipped_step_and_nothing_after():
    tx = jaxsgd.guard(jaxsgd.adamw(1e-2))
    step = make_step(loss_fn, tx, accumulate=4, donate=False)
    start = TrainState.create(init, tx)
    batch = {"image": IMAGES[:SIZE], "label": LABELS[:SIZE], "factor": np.ones(SIZE, np.float32)}
    bad = batch | {"factor": np.where(np.arange(SIZE) == 2, np.inf, 1).astype(np.float32)}  # the third microbatch's
    spoiled, _ = step(start, bad)
    jax.tree.map(np.testing.assert_array_equal, spoiled.params, start.params)
    after, _ = step(spoiled, batch)
    wanted, _ = step(start.replace(step=start.step + 1), batch)
    jax.tree.map(np.testing.assert_array_equal, after.params, wanted.params)


def test_batch_statistics_pass_from_microbatch_to_microbatch():
    def loss(p, mean, batch, key):
        new = 0.5 * mean + 0.5 * batch.mean()
        return jnp.mean((batch - p) ** 2), (new, None)

    x = np.arange(8, dtype=np.float32)
    state = TrainState.create(jnp.float32(0), jaxsgd.sgd(0.1), model_state=jnp.float32(0))
    state, metrics = make_step(loss, jaxsgd.sgd(0.1), accumulate=4)(state, x)
    wanted = 0.0
    for i in range(4):
        wanted = 0.5 * wanted + 0.5 * x[i::4].mean()
    assert float(state.model_state) == wanted and "aux" not in metrics


# -- what a step costs the host --------------------------------------------------------------------


def test_pain_13_a_module_is_split_once_and_merged_inside_the_program(monkeypatch):
    """nnx.jit walks the module's graph before and after each step; here no step after the first does."""

    class Net(nnx.Module):
        def __init__(self, rngs):
            self.layers = nnx.List([nnx.Linear(4, 4, rngs=rngs) for _ in range(10)])
            self.norm = nnx.BatchNorm(4, rngs=rngs)

        def __call__(self, x):
            for layer in self.layers:
                x = layer(x)
            return self.norm(x)

    walks = []
    for name in ("split", "merge", "state", "flatten", "unflatten", "update"):
        if hasattr(nnx, name):
            walk = getattr(nnx, name)
            monkeypatch.setattr(
                nnx, name, lambda *a, _walk=walk, _name=name, **k: walks.append(_name) or _walk(*a, **k)
            )
    tx = jaxsgd.adam(1e-3)
    state = TrainState.create(Net(nnx.Rngs(0)), tx)
    step = make_step(lambda m, b, key: jnp.mean(m(b) ** 2), tx)
    state, _ = step(state, np.ones((8, 4), np.float32))
    assert {"split", "merge"} <= set(walks)
    walks.clear()
    for _ in range(5):
        state, _ = step(state, np.ones((8, 4), np.float32))
    assert walks == [] and step.compiles == 1
