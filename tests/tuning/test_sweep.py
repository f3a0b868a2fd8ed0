"""Many trainings from one compile: equal to single ones, diverged ones frozen, on one device and on several."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from jax.sharding import Mesh

import jaxsgd
from jaxsgd.ensemble import population
from jaxsgd.ensemble.feed import Feed
from jaxsgd.ensemble.population import STRATEGIES, Population
from jaxsgd.ensemble.sweep import sweep

STEPS = 20
RATES = [1e-3, 1e-2, 1e-1, 1e4]


@pytest.fixture(scope="module")
def task():
    """A two-layer net on noisy targets: parameters, a step, a list of batches."""
    rng = np.random.default_rng(0)
    x = rng.normal(size=(STEPS, 16, 8)).astype(np.float32)
    y = np.tanh(x @ rng.normal(size=8)) + 0.1 * rng.normal(size=(STEPS, 16))
    params = {"in": jnp.asarray(rng.normal(size=(8, 16)) / 3, jnp.float32), "out": jnp.zeros(16)}

    def loss_fn(params, batch, key):
        hidden = jnp.tanh(batch["x"] @ params["in"]) + 1e-3 * jax.random.normal(key, (16, 16))
        return jnp.mean((hidden @ params["out"] - batch["y"]) ** 2), {"size": jnp.abs(params["out"]).max()}

    batches = [{"x": a, "y": b.astype(np.float32)} for a, b in zip(x, y, strict=True)]
    return params, loss_fn, batches


@pytest.fixture(scope="module")
def started(task):
    params, loss_fn, batches = task
    tx = jaxsgd.momentum(1e-2, dynamic=("momentum",))
    return jaxsgd.make_step(loss_fn, tx, donate=False), jaxsgd.TrainState.create(params, tx), batches


@pytest.fixture(scope="module")
def single(started):
    """The losses and the last state of one training at each rate."""
    step, state, batches = started
    out = {}
    for rate in RATES:
        now = state.replace(opt_state=jaxsgd.with_hyper(state.opt_state, learning_rate=rate))
        losses = []
        for batch in batches:
            now, metrics = step(now, batch)
            losses.append(float(metrics["loss"]))
        out[rate] = np.asarray(losses), now
    return out


@pytest.mark.parametrize("devices", [1, 2, 3])
@pytest.mark.parametrize("strategy", [s for s in STRATEGIES])
def test_members_are_single_trainings(started, single, strategy, devices):
    result = sweep(*started, learning_rate=RATES, strategy=strategy, mesh=jax.devices()[:devices])
    assert result.compiles == 1
    assert result.losses.shape == (4, STEPS)
    for i, rate in enumerate(RATES[:3]):
        losses, state = single[rate]
        np.testing.assert_allclose(result.losses[i], losses, rtol=2e-5)
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), result.member(i).params, state.params)
    assert list(result.diverged) == [False, False, False, True]
    assert result.best == {"learning_rate": RATES[int(np.argmin(result.final))]}
    assert result.strategy in ("vmap", "map", "loop") and str(result)


def test_what_is_not_finite_is_frozen_before_it_spreads(started):
    step, state, batches = started
    alone = sweep(step, state, batches, learning_rate=RATES[:3], strategy="vmap")
    result = sweep(step, state, batches, learning_rate=[*RATES[:3], 1e12], strategy="vmap")
    at = result.diverged_at[3]
    assert 0 < at < STEPS
    assert np.all(np.isfinite(result.losses[3, :at])) and np.all(np.isnan(result.losses[3, at:]))
    assert np.isinf(result.final[3])
    assert all(np.all(np.isfinite(x)) for x in jax.tree.leaves(result.member(3).params))
    assert int(result.member(3).step) == at
    np.testing.assert_allclose(result.losses[:3], alone.losses, rtol=1e-5)
    assert re.search(rf"diverged at step {at}", str(result.table))


def test_limit_says_how_far_a_loss_may_rise(started):
    step, state, batches = started
    rates = [1e-2, 0.7]
    result = sweep(step, state, batches, learning_rate=rates, strategy="map")
    free = sweep(step, state, batches, learning_rate=rates, strategy="map", limit=np.inf)
    at = result.diverged_at[1]
    assert list(result.diverged) == [False, True] and not free.diverged.any()
    usual = free.losses[:, :8].min(axis=0).max()
    assert np.all(free.losses[1, at : at + 3] > 11 * usual) and free.losses[1, at - 1] <= 11 * usual
    np.testing.assert_array_equal(result.losses[1, :at], free.losses[1, :at])
    assert np.all(np.isnan(result.losses[1, at:])) and "diverged" in str(result)


def test_batches_of_one_are_not_taken_for_divergence():
    """Losses of single examples vary by orders of magnitude; that is not the rate's doing."""
    targets = np.abs(np.random.default_rng(1).normal(size=60)).astype(np.float32) ** 2
    targets[0] = 1e-3
    tx = jaxsgd.sgd(1e-3)
    step = jaxsgd.make_step(lambda w, y, key: (w - y.sum()) ** 2, tx)
    state = jaxsgd.TrainState.create(jnp.zeros(()), tx)
    result = sweep(step, state, [y[None] for y in targets], learning_rate=[1e-4, 1e-3, 1e-2], strategy="vmap")
    assert result.losses[0].max() > 1000 * result.losses[0, 0] and not result.diverged.any()

    def train(state, data):
        return jax.lax.scan(step.fn, state, data)[1]["loss"]

    whole = sweep(train, state, targets[:, None], learning_rate=[1e-4, 1e-3, 1e-2])
    np.testing.assert_allclose(whole.losses, result.losses, rtol=1e-5)
    assert not whole.diverged.any(), "a training of one's own is judged by the same limit"


def test_seeds_and_runtime_values_are_combined(started):
    step, state, batches = started
    result = sweep(step, state, batches, learning_rate=[1e-2, 3e-2], momentum=[0.5, 0.9], seed=[0, 1], strategy="vmap")
    assert result.losses.shape == (8, STEPS)
    rows = result.over_seeds()
    assert len(rows) == 4 and all(row["members"] == 2 and row["sd"] > 0 for row in rows)
    assert set(result.best) == {"learning_rate", "momentum"}
    assert "sd over seeds" in str(result)
    assert result.compiles == 1


def test_paired_values_go_side_by_side(started):
    step, state, batches = started
    result = sweep(step, state, batches, learning_rate=[1e-2, 3e-2], momentum=[0.5, 0.9], paired=True, strategy="vmap")
    assert list(zip(*result.values.values(), strict=True)) == [(1e-2, 0.5), (3e-2, 0.9)]


def test_a_function_that_builds_sweeps_anything_once(task):
    """A group's override, a hyperparameter compiled in elsewhere, the seed of the weights; the loss is traced twice."""
    params, loss_fn, batches = task
    traced = []

    def build(learning_rate, head, b2, seed):
        traced.append(1)
        tx = jaxsgd.adamw(learning_rate, b2=b2, groups=[("^out$", {"lr_mult": head})])
        noise = 0.01 * jax.random.normal(jax.random.key(seed), (8, 16))
        state = jaxsgd.TrainState.create({**params, "in": params["in"] + noise}, tx)
        return jaxsgd.make_step(loss_fn, tx), state

    given = {"learning_rate": [1e-3, 1e-2], "head": [1.0, 10.0], "b2": [0.9, 0.999], "seed": [0, 1]}
    result = sweep(build, data=batches, **given, strategy="vmap")
    assert result.losses.shape == (16, STEPS) and result.compiles == 1 and len(traced) <= 6
    for name in given:  # every one of them does something
        others = [n for n in given if n != name]
        rows = [tuple(result.values[n][i] for n in others) for i in range(16)]
        first = [i for i in range(16) if rows[i] == rows[0]]
        assert len({float(result.final[i]) for i in first}) == 2, name

    tx = jaxsgd.adamw(1e-2, b2=0.9, groups=[("^out$", {"lr_mult": 10.0})])
    noise = 0.01 * jax.random.normal(jax.random.key(1), (8, 16))
    state = jaxsgd.TrainState.create({**params, "in": params["in"] + noise}, tx)
    step = jaxsgd.make_step(loss_fn, tx)
    losses = []
    for batch in batches:
        state, metrics = step(state, batch)
        losses.append(float(metrics["loss"]))
    wanted = {"learning_rate": 1e-2, "head": 10.0, "b2": 0.9, "seed": 1}
    same = [all(result.values[n][i] == wanted[n] for n in wanted) for i in range(16)]
    np.testing.assert_allclose(result.losses[same.index(True)], losses, rtol=2e-5)


@pytest.mark.parametrize("devices", [1, 2])
def test_a_training_of_ones_own(started, single, devices):
    step, state, batches = started
    stacked = jax.tree.map(lambda *xs: np.stack(xs), *batches)

    def train(state, data, scale):
        state, metrics = jax.lax.scan(step.fn, state, data)
        return state, metrics["loss"] * scale

    result = sweep(train, state, stacked, learning_rate=RATES, scale=[1.0, 2.0], mesh=jax.devices()[:devices])
    for i, rate in enumerate(RATES[:3]):
        np.testing.assert_allclose(result.losses[2 * i], single[rate][0], rtol=2e-5)
        np.testing.assert_allclose(result.losses[2 * i + 1], 2 * single[rate][0], rtol=2e-5)
    assert list(result.diverged) == [False] * 6 + [True] * 2 and np.isnan(result.losses[7, -1])


def test_convolutions_on_cpu_are_stepped_one_by_one():
    class Net(nnx.Module):
        def __init__(self, rngs):
            self.conv = nnx.Conv(1, 2, (3, 3), rngs=rngs)
            self.norm = nnx.BatchNorm(2, rngs=rngs)

        def __call__(self, x):
            return self.norm(self.conv(x)).mean()

    tx = jaxsgd.adamw(1e-3)
    state = jaxsgd.TrainState.create(Net(nnx.Rngs(0)), tx)
    step = jaxsgd.make_step(lambda model, batch, key: (model(batch["x"]) - 1.0) ** 2, tx)
    batch = {"x": np.random.default_rng(0).normal(size=(4, 5, 5, 1)).astype(np.float32)}
    result = sweep(
        step, state, batch, steps=5, learning_rate=[1e-4, 1e-2, 1e-1], mesh=Mesh(jax.devices()[:2], ("data",))
    )
    assert result.strategy == "loop" and "convolutions" in result.reason and result.compiles == 1
    assert result.losses[1, -1] < result.losses[0, -1] < result.losses[0, 0]
    assert int(state.step) == 0  # the caller's state is left alone


def test_a_population_can_be_restarted_in_part(started):
    step, state, batches = started
    stacked = jax.tree.map(lambda *xs: np.stack(xs), *batches)
    build = lambda given, learning_rate: (
        step,
        given.replace(opt_state=jaxsgd.with_hyper(given.opt_state, learning_rate=learning_rate)),
    )
    members = Population(build, {"learning_rate": np.asarray([1e-3, 1e4, 1e-2])}, given=state, strategy="map", chunk=8)
    first = members.advance(jax.tree.map(lambda x: x[:10], stacked), active=[True, True, False])["loss"]
    assert np.all(np.isnan(first[2])) and list(members.steps[[0, 2]]) == [10, 0] and list(members.alive) == [1, 0, 1]
    members.restart([False, True, False], {"learning_rate": np.full(3, 1e-1)})
    assert list(members.steps) == [10, 0, 0] and np.all(members.alive)
    more = members.advance(stacked, active=[False, True, True])["loss"]
    fresh = sweep(step, state, batches, learning_rate=[1e-1, 1e-2], strategy="map").losses
    np.testing.assert_allclose(more[1:], fresh, rtol=1e-5)
    assert members.compiles == 1


def test_vmap_is_left_out_where_its_memory_is_not_there(started, monkeypatch):
    monkeypatch.setattr(population, "free_bytes", lambda device: 1.0)
    result = sweep(*started, learning_rate=RATES, mesh=jax.devices()[:1])
    assert result.strategy == "map" and "GiB" in result.reason and result.compiles == 2


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({}, "nothing to sweep"),
        ({"learning_rate": []}, r"learning_rate=\[\]: at least one"),
        ({"learning_rate": [-1.0]}, "learning_rate=-1.0: a hyperparameter must be 0 or more"),
        ({"learning_rate": [np.nan]}, "finite numbers"),
        ({"learning_rate": ["a"]}, "a list of numbers"),
        ({"b7": [1.0]}, "b7: not a runtime value"),
        ({"seed": [0.5]}, "seed=.*whole number"),
        ({"learning_rate": [1, 2], "momentum": [0.5], "paired": True}, "lists of one length"),
        ({"learning_rate": [1.0], "strategy": "best"}, "strategy='best': known are auto"),
        ({"learning_rate": [1.0], "steps": 0}, "steps=0: at least 1"),
        ({"learning_rate": [1.0], "limit": 0}, "limit=0"),
        ({"learning_rate": [1.0], "data": iter([])}, "steps=None: how many"),
        ({"learning_rate": [1.0], "data": []}, "data: it is empty"),
        ({"learning_rate": [1.0], "data": [], "steps": 3}, "data: it is empty"),
        ({"learning_rate": [1.0], "data": None}, "data=None"),
        ({"learning_rate": [1.0], "state": None}, "state=None"),
    ],
)
def test_bad_input_is_told_in_words(started, change, words):
    step, state, batches = started
    arguments = {"state": state, "data": batches, **change}
    with pytest.raises(ValueError, match=words):
        sweep(step, **arguments)


def test_a_wrong_train_is_told_in_words(started):
    _, state, batches = started
    with pytest.raises(TypeError, match="a jaxsgd.Step, or a function"):
        sweep(3, state, batches, learning_rate=[1.0])
    with pytest.raises(ValueError, match=r"losses of the shape \(steps,\)"):
        sweep(lambda state, data: jnp.zeros(()), state, {}, learning_rate=[1.0])
    with pytest.raises(ValueError, match="a scalar 'loss'"):
        sweep(lambda learning_rate: (lambda s, b: (s, {}), 0.0), data=batches, learning_rate=[1.0])


def test_all_diverged_is_told(started):
    step, state, batches = started
    result = sweep(step, state, batches, learning_rate=[1e5, 1e6], strategy="map")
    assert np.all(result.diverged) and result.losses.shape == (2, STEPS)
    with pytest.raises(ValueError, match="all 2 runs diverged: learning_rate from 100,000"):
        _ = result.best
    assert "diverged" in str(result)


@pytest.mark.parametrize("devices", [1, 2])
def test_32_rates_are_one_program(task, devices):
    params, loss_fn, batches = task
    traced = []

    def counted(params, batch, key):
        traced.append(1)
        return loss_fn(params, batch, key)

    tx = jaxsgd.sgd(1e-2)
    step, state = jaxsgd.make_step(counted, tx), jaxsgd.TrainState.create(params, tx)
    few = sweep(step, state, batches, learning_rate=[1e-2, 2e-2], mesh=jax.devices()[:devices])
    before = len(traced)
    many = sweep(step, state, batches, learning_rate=np.geomspace(1e-3, 1e-1, 32), mesh=jax.devices()[:devices])
    assert few.compiles == many.compiles == 1 and len(traced) - before <= before, "more rates, no more traces"
    assert many.losses.shape == (32, STEPS) and len(set(many.final.tolist())) == 32


def test_a_rate_that_only_harms_is_no_silent_best(started):
    step, state, batches = started
    result = sweep(step, state, batches, learning_rate=[0.5], limit=np.inf)
    assert result.final[0] > result.losses[0, 0] and "above its start, 0.75" in str(result)


def test_a_feed_goes_around_lists_and_refuses_what_ends():
    assert [Feed([1, 2]).take(3).tolist()] == [[1, 2, 1]]
    assert Feed(lambda i: np.float32(i)).take(3).tolist() == [0, 1, 2]
    assert Feed({"x": np.ones(2)}).take(2)["x"].shape == (2, 2)
    feed = Feed(iter([np.ones(2), np.ones(2)]))
    with pytest.raises(ValueError, match="ended after 2 batches"):
        feed.take(3)
    with pytest.raises(ValueError, match="have other shapes|must be alike"):
        Feed([np.ones(2), np.ones(3)]).take(2)
    with pytest.raises(TypeError, match="data=3.5j|batches are needed"):
        Feed(object())


def test_optax_steps_sweep_through_a_function(task):
    params, loss_fn, batches = task

    def build(learning_rate):
        tx = optax.adam(learning_rate)
        return jaxsgd.make_step(loss_fn, tx), jaxsgd.TrainState.create(params, tx)

    result = sweep(build, data=batches, learning_rate=[1e-3, 1e-2], strategy="vmap")
    assert result.losses[1, -1] < result.losses[0, -1]
