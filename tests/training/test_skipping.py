"""A step that is skipped changes nothing that training carries: faults x skippers x roads x kinds of model."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen, nnx
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

import jaxsgd
from jaxsgd import TrainState, make_step

SIZE, FEATURES, BAD = 32, 4, 3
RNG = np.random.default_rng(0)
BATCHES = [
    {"x": RNG.normal(size=(SIZE, FEATURES)).astype(np.float32), "y": RNG.normal(size=SIZE).astype(np.float32)}
    for _ in range(7)
]


class OwnState(NamedTuple):
    inner: optax.OptState
    skipped: jax.Array


def own_skipper(tx):
    """A transformation of one's own: its state counts in a field called ``skipped``."""

    def init(params):
        return OwnState(tx.init(params), jnp.zeros((), jnp.int32))

    def update(updates, state, params=None, **extra):
        bad = ~jnp.isfinite(optax.tree.norm(updates))
        out, inner = tx.update(jax.tree.map(lambda u: jnp.where(bad, 0, u), updates), state.inner, params)
        inner = jax.tree.map(lambda new, old: jnp.where(bad, old, new), inner, state.inner)
        return jax.tree.map(lambda u: jnp.where(bad, 0, u), out), OwnState(inner, state.skipped + bad)

    return optax.GradientTransformationExtraArgs(init, update)


def skippers(axis=None):
    return {
        "guard": jaxsgd.guard(jaxsgd.adam(1e-2), axis_name=axis),
        "guard in a chain": optax.chain(optax.identity(), jaxsgd.guard(jaxsgd.adam(1e-2), axis_name=axis)),
        "outliers": jaxsgd.guard(jaxsgd.adam(1e-2), z_score=6.0, window=4, axis_name=axis),
        "apply_if_finite": optax.apply_if_finite(jaxsgd.adam(1e-2), 5),
        "own": own_skipper(jaxsgd.adam(1e-2)),
    }


class Linen(linen.Module):
    @linen.compact
    def __call__(self, x):
        return linen.Dense(1)(linen.BatchNorm(use_running_average=False, momentum=0.5)(x))[:, 0]


class Nnx(nnx.Module):
    def __init__(self, rngs):
        self.norm, self.dense = nnx.BatchNorm(FEATURES, momentum=0.5, rngs=rngs), nnx.Linear(FEATURES, 1, rngs=rngs)
        self.calls = nnx.Variable(jnp.zeros((), jnp.int32))

    def __call__(self, x):
        self.calls[...] += 1
        return self.dense(self.norm(x))[:, 0]


def mean_square(out, batch):
    return jnp.mean((out - batch["y"]) ** 2)


def linen_case():
    variables = Linen().init(jax.random.key(0), BATCHES[0]["x"])

    def loss_fn(params, state, batch, key):
        out, new = Linen().apply({"params": params, "batch_stats": state}, batch["x"], mutable=["batch_stats"])
        return mean_square(out, batch), (new["batch_stats"], None)

    return loss_fn, variables["params"], {"model_state": variables["batch_stats"]}


def nnx_case():
    return lambda model, batch, key: mean_square(model(batch["x"]), batch), Nnx(nnx.Rngs(0)), {}


def plain_case():
    def loss_fn(params, state, batch, key):
        mean = 0.5 * state["mean"] + 0.5 * batch["x"].mean(0)
        out = (batch["x"] - mean) @ params["w"]
        return mean_square(out, batch), ({"mean": mean, "calls": state["calls"] + 1}, None)

    state = {"mean": jnp.zeros(FEATURES), "calls": jnp.zeros((), jnp.int32)}
    return loss_fn, {"w": jnp.ones(FEATURES)}, {"model_state": state}


MODELS = {"linen": linen_case, "nnx": nnx_case, "plain": plain_case}
ROADS = ("one device", "accumulate", "mesh", "mesh, ZeRO-1", "pmap", "shard_map")


def spoilt(batch, fault):
    batch = {name: x.copy() for name, x in batch.items()}
    if fault == "NaN input":
        batch["x"][5, 1] = np.nan
    elif fault == "inf target":
        batch["y"][5] = np.inf
    else:
        batch["x"] *= 1e4
        batch["y"] *= 1e4
    return batch


def stepper(model, skipper, road):
    """A function from batches to the state at the end."""
    loss_fn, params, options = MODELS[model]()
    tx = skippers("data" if road in ("pmap", "shard_map") else None)[skipper]
    mesh = Mesh(jax.devices(), ("data",))
    if road in ("mesh", "mesh, ZeRO-1"):
        zero1 = {"zero1": "data"} if road.endswith("ZeRO-1") else {}
        begin = lambda: TrainState.create(params, tx, mesh=mesh, **zero1, **options)
        step, shape = make_step(loss_fn, tx, mesh=mesh), lambda b: b
    elif road == "pmap":
        begin = lambda: jax.tree.map(lambda x: jnp.stack([x] * 8), TrainState.create(params, tx, **options))
        step = jaxsgd.checked(jax.pmap(make_step(loss_fn, tx, axis_name="data").fn, "data", donate_argnums=0))
        shape = lambda b: {name: x.reshape(8, -1, *x.shape[1:]) for name, x in b.items()}
    elif road == "shard_map":
        begin = lambda: TrainState.create(params, tx, mesh=mesh, **options)
        inner = make_step(loss_fn, tx, axis_name="data").fn
        mapped = jax.shard_map(inner, mesh=mesh, in_specs=(P(), P("data")), out_specs=P(), check_vma=False)
        step, shape = jaxsgd.checked(jax.jit(mapped, donate_argnums=0)), lambda b: b
    else:
        begin = lambda: TrainState.create(params, tx, **options)
        step, shape = make_step(loss_fn, tx, accumulate=4 if road == "accumulate" else 1), lambda b: b

    def run(batches):
        state = begin()
        for batch in batches:
            state, _ = step(state, shape(batch))
        return jax.device_get((state.params, state.model_state, state.opt_state))

    return run


def moved(opt_state):
    """The optimizer's state without what tells of skipped steps: the wrapped rule's."""
    (found,) = jaxsgd.state.find_states(opt_state)
    return found[1]


CASES = [(model, "guard", road) for model in MODELS for road in ROADS]
CASES += [("nnx", skipper, "one device") for skipper in skippers() if skipper != "guard"]
CASES += [("linen", "apply_if_finite", "mesh"), ("plain", "own", "pmap"), ("linen", "outliers", "accumulate")]


@pytest.mark.parametrize("model, skipper, road", CASES)
def test_a_skipped_step_leaves_no_trace(model, skipper, road):
    run = stepper(model, skipper, road)
    clean = run([batch for i, batch in enumerate(BATCHES) if i != BAD])
    faults = ["NaN input", "inf target"] + ["outlier"] * (skipper == "outliers")
    for fault in faults:
        got = run([spoilt(batch, fault) if i == BAD else batch for i, batch in enumerate(BATCHES)])
        assert all(np.all(np.isfinite(x)) for x in jax.tree.leaves((got[0], got[1])))
        for part, whole in ((got[0], clean[0]), (got[1], clean[1]), (moved(got[2]), moved(clean[2]))):
            jax.tree.map(np.testing.assert_array_equal, part, whole)


def test_without_a_skipper_the_statistics_are_what_the_loss_says():
    loss_fn, params, options = plain_case()
    tx = jaxsgd.adam(1e-2)
    state, _ = make_step(loss_fn, tx)(TrainState.create(params, tx, **options), spoilt(BATCHES[0], "NaN input"))
    assert np.isnan(state.model_state["mean"]).any()


def test_each_of_several_guards_counts_and_any_of_them_keeps_the_models_state():
    loss_fn, params, options = plain_case()
    params = {"w": params["w"], "b": jnp.zeros(())}

    def both(p, *rest):
        loss, out = loss_fn({"w": p["w"]}, *rest)
        return loss + 0 * p["b"], out

    labels = {"w": "first", "b": "second"}
    tx = optax.multi_transform({name: jaxsgd.guard(jaxsgd.adam(1e-2)) for name in ("first", "second")}, labels)
    step, state = make_step(both, tx, donate=False), TrainState.create(params, tx, **options)
    after, report = step(state, spoilt(BATCHES[0], "NaN input"))
    names = [f"inner_states/{name}/inner_state/skipped" for name in ("first", "second")]
    assert [int(report[name]) for name in names] == [1, 1] and set(names) <= set(jaxsgd.guard_report(after.opt_state))
    for old, new in zip(jax.tree.leaves(state.model_state), jax.tree.leaves(after.model_state), strict=True):
        np.testing.assert_array_equal(old, new)


def test_a_microbatch_without_weight_carries_nothing():
    loss_fn, params, options = plain_case()
    tx = jaxsgd.sgd(1e-2)
    step = make_step(loss_fn, tx, accumulate=2, weight=lambda b: jnp.where(jnp.isfinite(b["x"]).all(), 1.0, 0.0))
    batch = {name: x.copy() for name, x in BATCHES[0].items()}
    batch["x"][1::2] = np.nan  # the second microbatch takes every other example
    state, _ = step(TrainState.create(params, tx, **options), batch)
    np.testing.assert_allclose(state.model_state["mean"], 0.5 * batch["x"][::2].mean(0), rtol=1e-6)
    assert state.model_state["calls"] == 1


def test_statistics_that_are_not_finite_are_not_carried_within_a_window():
    """The window ends, and is skipped, later than its bad batch."""
    loss_fn, params, options = plain_case()
    tx = jaxsgd.accumulate(jaxsgd.guard(jaxsgd.sgd(1e-2)), 2)
    step, state = make_step(loss_fn, tx), TrainState.create(params, tx, **options)
    for i in range(4):
        state, report = step(state, spoilt(BATCHES[i], "NaN input") if i == 0 else BATCHES[i])
    assert np.isfinite(state.model_state["mean"]).all() and int(report["skipped"]) == 1


# -- tools that train ------------------------------------------------------------------------------


def regression(every, count=120, place=5):
    """Batches of a linear regression; one of ``every`` so many, if any, holds a NaN."""
    rng = np.random.default_rng(1)
    weight, out = rng.normal(size=8), []
    for i in range(count):
        x = rng.normal(size=(16, 8))
        batch = x, x @ weight
        if every and i % every == place:
            batch[0][3, 2] = np.nan
        out.append(jax.tree.map(np.float32, batch))
    return out


def square_loss(params, batch, key):
    return jnp.mean((batch[0] @ params["w"] - batch[1]) ** 2)


ZEROS = {"w": jnp.zeros(8)}


def guarded(rate):
    return jaxsgd.guard(jaxsgd.adam(rate))


@pytest.mark.parametrize("every", [17, 50])
def test_probe_finds_the_same_rate_with_batches_that_the_guard_skips(every):
    """6% and 2% of the batches at four places each; the loss falls to a millionth, so nothing hides behind noise."""
    clean = jaxsgd.probe(square_loss, ZEROS, regression(None), guarded, steps=480).learning_rate
    for place in (2, 5, 11, every - 2):
        bad = regression(every, place=place)
        assert 1 / 1.5 <= jaxsgd.probe(square_loss, ZEROS, bad, guarded, steps=480).learning_rate / clean <= 1.5


def test_probe_and_range_test_do_not_judge_what_the_guard_skips():
    probed = jaxsgd.probe(square_loss, ZEROS, regression(17), guarded, steps=480)
    assert probed.learning_rate is not None and 0.01 <= probed.learning_rate <= 0.5
    assert np.isfinite(jaxsgd.range_test(square_loss, ZEROS, regression(17), guarded, steps=60).losses[:30]).all()
    unguarded = jaxsgd.range_test(square_loss, ZEROS, regression(17), jaxsgd.adam, steps=60)
    assert len(unguarded.losses) < 30 or not np.isfinite(unguarded.losses[:30]).all()


@pytest.mark.parametrize("strategy", ["vmap", "map", "loop"])
def test_a_sweep_trains_on_through_skipped_steps(strategy):
    tx, rates = guarded(0.1), [0.01, 0.1]
    step, begin = make_step(square_loss, tx), TrainState.create(ZEROS, tx)
    found = jaxsgd.sweep(step, begin, regression(17), learning_rate=rates, strategy=strategy)
    assert (found.diverged_at == -1).all() and np.isfinite(found.metrics["loss"]).all()
    np.testing.assert_array_equal(found.metrics["loss"][:, 5], found.metrics["loss"][:, 4])
    assert found.metrics["skipped"][0, -1] == 7
    bare = jaxsgd.adam(0.1)
    step, begin = make_step(square_loss, bare), TrainState.create(ZEROS, bare)
    lost = jaxsgd.sweep(step, begin, regression(17), learning_rate=rates, strategy=strategy)
    assert (lost.diverged_at == 5).all()


def test_an_entry_of_aux_named_skipped_is_no_count_of_steps():
    def loss_fn(params, batch, key):
        return square_loss(params, batch, key), {"skipped": jnp.float32(7)}

    tx, batches = jaxsgd.adam(0.1), regression(None, 8)
    found = jaxsgd.sweep(make_step(loss_fn, tx), TrainState.create(ZEROS, tx), batches, learning_rate=[0.01, 0.1])
    assert "skipped" not in found.metrics and (found.metrics["aux/skipped"] == 7).all()


def test_a_sweep_over_a_training_of_ones_own_reads_skipped_too():
    batches = jax.tree.map(lambda *xs: jnp.stack(xs), *regression(17))

    def train(learning_rate):
        tx = guarded(learning_rate)
        step = make_step(square_loss, tx)
        return jax.lax.scan(step.fn, TrainState.create(ZEROS, tx), batches)

    found = jaxsgd.sweep(train, learning_rate=[0.01, 0.1])
    assert (found.diverged_at == -1).all() and np.isfinite(found.metrics["loss"]).all()
