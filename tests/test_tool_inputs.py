"""One table of inputs for all learning-rate tools: schedules, skipped steps, batches, losses, seeds, aux."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jaxsgd
from jaxsgd.probe.concrete import Merged

WEIGHTS = {"w": jnp.zeros(4)}


@functools.cache
def regression(step: int) -> dict[str, np.ndarray]:
    rng = np.random.default_rng([7, step])
    x = rng.normal(size=(16, 4)).astype(np.float32)
    return {"x": x, "y": (x @ np.array([1.0, -2.0, 3.0, 0.5]) + 0.3 * rng.normal(size=16)).astype(np.float32)}


def squares(params, batch, key):
    return jnp.mean((batch["x"] @ params["w"] - batch["y"]) ** 2)


def losses_of(loss_fn, params, tx, data, steps):
    """The losses of one run by the train step."""
    state, step = jaxsgd.TrainState.create(params, tx), jaxsgd.make_step(loss_fn, tx)
    out = []
    for i in range(steps):
        state, metrics = step(state, data(i))
        out.append(float(metrics["loss"]))
    return np.asarray(out)


# -- schedules -------------------------------------------------------------------------------------

CYCLES = [{"init_value": 0.0, "warmup_steps": 2, "decay_steps": 10}] * 2
SCHEDULES = {
    "constant": optax.constant_schedule,
    "warmup_cosine": lambda r: optax.warmup_cosine_decay_schedule(0.0, r, 3, 30),
    "warmup_exponential": lambda r: optax.warmup_exponential_decay_schedule(0.0, r, 3, 10, 0.9),
    "warmup_constant": lambda r: optax.warmup_constant_schedule(0.0, r, 3),
    "cosine": lambda r: optax.cosine_decay_schedule(r, 30),
    "exponential": lambda r: optax.exponential_decay(r, 10, 0.9),
    "linear": lambda r: optax.linear_schedule(r, 0.0, 30),
    "polynomial": lambda r: optax.polynomial_schedule(r, 1e-3, 2, 30),
    "piecewise": lambda r: optax.piecewise_constant_schedule(r, {5: 0.5}),
    "interpolated": lambda r: optax.piecewise_interpolate_schedule("cosine", r, {9: 0.5}),
    "onecycle": lambda r: optax.cosine_onecycle_schedule(30, r),
    "linear_onecycle": lambda r: optax.linear_onecycle_schedule(30, r),
    "sgdr": lambda r: optax.sgdr_schedule([c | {"peak_value": r / (i + 1)} for i, c in enumerate(CYCLES)]),
    "joined": lambda r: optax.join_schedules([optax.linear_schedule(0.0, r, 3), optax.cosine_decay_schedule(r, 9)], [3]),  # noqa: E501
    "by hand": lambda r: lambda count: r * jnp.minimum(count, 3) if r > 0 else 0.0,
    "from a list": lambda r: lambda count: jnp.asarray([0.1 * r, float(r), min(r, 0.02)])[jnp.minimum(count, 2)],
}  # fmt: skip
RATES, STEPS = [1e-3, 1e-2, 0.1], 12


def built(make):
    """A sweep's builder."""

    def build(learning_rate):
        tx = make(learning_rate)
        return jaxsgd.make_step(squares, tx), jaxsgd.TrainState.create(WEIGHTS, tx)

    return build


@pytest.mark.parametrize("name", SCHEDULES)
def test_sweep_runs_every_schedule_of_optax(name):
    """Each run is the one with its own schedule; all are one program."""
    make = lambda rate: optax.sgd(SCHEDULES[name](rate))  # noqa: E731
    batches = [regression(i) for i in range(STEPS)]
    result = jaxsgd.sweep(built(make), data=batches, learning_rate=RATES, strategy="vmap", mesh=jax.devices()[:2])
    assert result.compiles == 1
    wanted = [losses_of(squares, WEIGHTS, make(rate), regression, STEPS) for rate in RATES]
    np.testing.assert_allclose(result.losses, wanted, rtol=1e-5)


@pytest.mark.parametrize("name", ["warmup_cosine", "sgdr", "by hand"])
def test_probe_and_range_test_take_schedules_that_test_their_rate(name):
    make = lambda rate: jaxsgd.adam(SCHEDULES[name](rate))  # noqa: E731
    found = jaxsgd.probe(squares, WEIGHTS, regression, make, steps=120)
    for rate in (found.rates[0], max(found.rates, key=lambda r: r.steps)):
        row = found.losses[found.rates.index(rate)][: rate.steps]
        np.testing.assert_allclose(
            row, losses_of(squares, WEIGHTS, make(rate.learning_rate), regression, rate.steps), rtol=2e-5
        )
    rising = jaxsgd.range_test(squares, WEIGHTS, regression, make, steps=12, low=1e-3, high=0.1)
    params, state, seen = WEIGHTS, make(1.0).init(WEIGHTS), []
    for i, rate in enumerate(np.geomspace(1e-3, 0.1, 12)):
        value, grads = jax.value_and_grad(squares)(params, regression(i), None)
        updates, state = make(float(rate)).update(grads, state, params)
        params = optax.apply_updates(params, updates)
        seen.append(float(value))
    np.testing.assert_allclose(rising.losses, seen, rtol=2e-5)


def test_pick_takes_a_schedule_that_tests_its_rate():
    make = lambda rate: optax.sgd(optax.warmup_cosine_decay_schedule(0.0, rate, 2, 40))  # noqa: E731
    plain = lambda rate: optax.sgd(optax.linear_schedule(rate, 0.0, 40))  # noqa: E731
    start = lambda key: {"w": 0.1 * jax.random.normal(key, (4,))}  # noqa: E731
    race = jaxsgd.pick(squares, start, regression, candidates={"warm": (make, 0.1), "cold": (plain, 0.1)}, steps=40)
    for entry in race.entries:
        assert entry.mean < 0.2 * entry.start and entry.compiles <= 3
    rate, finals = next(iter(race["warm"].finals.items()))
    init = jax.random.split(jax.random.key(1))[0]  # of the first seed, as TrainState.create splits it
    wanted = losses_of(squares, start(init), make(float(np.float32(rate))), regression, 40)
    np.testing.assert_allclose(finals[0], wanted[-4:].mean(), rtol=1e-4)


WRAPPED = {
    "chain": lambda r: optax.chain(optax.clip_by_global_norm(1.0), jaxsgd.adamw(SCHEDULES["warmup_cosine"](r))),
    "MultiSteps": lambda r: optax.MultiSteps(optax.adamw(SCHEDULES["warmup_cosine"](r)), 2),
    "apply_if_finite": lambda r: optax.apply_if_finite(optax.sgd(SCHEDULES["warmup_cosine"](r)), 5),
    "guard": lambda r: jaxsgd.guard(jaxsgd.momentum(SCHEDULES["sgdr"](r))),
    "another structure": lambda r: optax.sgd(r) if r > 0.02 else optax.chain(optax.clip(0.5), optax.sgd(r)),
}


@pytest.mark.parametrize("strategy", ["vmap", "map", "loop"])
@pytest.mark.parametrize("name", WRAPPED)
def test_schedules_inside_of_wrappers(name, strategy):
    batches = [regression(i) for i in range(STEPS)]
    result = jaxsgd.sweep(built(WRAPPED[name]), data=batches, learning_rate=RATES, strategy=strategy)
    assert result.compiles == 1
    wanted = [losses_of(squares, WEIGHTS, WRAPPED[name](rate), regression, STEPS) for rate in RATES]
    np.testing.assert_allclose(result.losses, wanted, rtol=1e-5)


def test_values_of_any_kind_are_numbers_where_need_be():
    """A seed for NumPy, a table of constants, a loop: each run has its own."""

    def build(learning_rate, seed):
        weights = {"w": jnp.asarray(np.random.default_rng(seed).normal(size=4), jnp.float32)}
        table = jnp.asarray([learning_rate * 0.5**i for i in range(4)])

        def rate(count):
            times = lambda _, x: x * (0.9 if learning_rate > 0.05 else 1.0)  # noqa: E731
            return jax.lax.fori_loop(0, 2, times, table[count % 4])

        tx = optax.sgd(rate)
        return jaxsgd.make_step(squares, tx), jaxsgd.TrainState.create(weights, tx)

    batches = [regression(i) for i in range(5)]
    result = jaxsgd.sweep(build, data=batches, learning_rate=[0.01, 0.1], seed=[0, 1], strategy="vmap")
    for i, row in enumerate(result.losses):
        step, state = build(float(result.values["learning_rate"][i]), int(result.values["seed"][i]))
        for batch, loss in zip(batches, row, strict=True):
            state, metrics = step(state, batch)
            np.testing.assert_allclose(float(metrics["loss"]), loss, rtol=1e-5)


def test_a_run_of_ones_own_takes_numbers():
    def train(learning_rate):
        tx = optax.sgd(optax.warmup_cosine_decay_schedule(0.0, learning_rate, 3, 30))
        step, state = jaxsgd.make_step(squares, tx), jaxsgd.TrainState.create(WEIGHTS, tx)
        stacked = jax.tree.map(lambda *xs: jnp.stack(xs), *(regression(i) for i in range(STEPS)))
        return jax.lax.scan(step.fn, state, stacked)[1]["loss"]

    result = jaxsgd.sweep(train, learning_rate=RATES)
    make = lambda rate: optax.sgd(optax.warmup_cosine_decay_schedule(0.0, rate, 3, 30))  # noqa: E731
    wanted = [losses_of(squares, WEIGHTS, make(rate), regression, STEPS) for rate in RATES]
    np.testing.assert_allclose(result.losses, wanted, rtol=1e-5)


def test_traces_that_differ_in_constants_are_one():
    """Constants in calls, branches and loops; keys; and a structure of its own for each branch of an ``if``."""

    def at(rate):
        def fn(x):
            key = jax.random.key(3)
            x = jax.jit(lambda x: x * rate)(x) + jax.random.normal(jax.random.fold_in(key, 1), x.shape)
            x = jax.lax.cond(x.sum() > 0, lambda x: x - rate, lambda x: x + 2 * rate, x)
            x = jax.lax.scan(lambda c, y: (c * rate + y, None), x, jnp.ones((3, 2)))[0]
            x = jax.lax.while_loop(lambda x: x.sum() > 100.0 * rate, lambda x: x * rate, x)
            return jnp.sin(x) if rate > 0.6 else x

        return fn

    both, x = Merged(), jnp.arange(2.0)
    rates = [0.3, 0.5, 0.7]
    rows = both.rows([both.add(jax.make_jaxpr(at(rate))(x)) for rate in rates])
    got = jax.jit(jax.vmap(both, in_axes=(0, None)))(rows, x)[0]
    np.testing.assert_allclose(got, [at(rate)(x) for rate in rates], rtol=1e-6)
    before = both.version
    both.add(jax.make_jaxpr(at(0.4))(x))
    assert both.version == before, "another rate of a known kind needs no other program"


def test_other_shapes_at_some_values_are_refused():
    def build(learning_rate):
        tx = optax.sgd(learning_rate, momentum=0.9 if learning_rate > 0.05 else None)
        return jaxsgd.make_step(squares, tx), jaxsgd.TrainState.create(WEIGHTS, tx)

    with pytest.raises(ValueError, match="its state has other shapes. Use one sweep for each"):
        jaxsgd.sweep(build, data=regression(0), steps=2, learning_rate=RATES)


# -- skipped steps ---------------------------------------------------------------------------------

SKIPPERS = {"guard": jaxsgd.guard, "apply_if_finite": lambda tx: optax.apply_if_finite(tx, 100)}


def with_nans(step):
    """One batch in 49 is NaN, the first among them."""
    batch = regression(step)
    return batch if step % 49 else batch | {"x": np.full_like(batch["x"], np.nan)}


@pytest.mark.parametrize("name", SKIPPERS)
def test_tools_leave_skipped_steps_out(name):
    make = lambda rate: SKIPPERS[name](jaxsgd.adam(rate))  # noqa: E731
    clean, dirty = (jaxsgd.probe(squares, WEIGHTS, data, make, steps=400) for data in (regression, with_nans))
    assert clean.learning_rate is not None and dirty.learning_rate is not None
    assert 1 / 1.5 < dirty.learning_rate / clean.learning_rate < 1.5 and dirty.confidence == clean.confidence
    clean, dirty = (jaxsgd.range_test(squares, WEIGHTS, data, make, steps=60) for data in (regression, with_nans))
    assert len(dirty.losses) >= len(clean.losses) - 2 and 1 / 2 < dirty.steepest / clean.steepest < 2  # type: ignore[operator]

    def build(learning_rate):
        tx = make(learning_rate)
        return jaxsgd.make_step(squares, tx), jaxsgd.TrainState.create(WEIGHTS, tx)

    for strategy in ("vmap", "loop"):
        both = [
            jaxsgd.sweep(build, data=data, steps=60, learning_rate=[0.01, 0.1, 0.3], strategy=strategy)
            for data in (regression, with_nans)
        ]
        assert not both[1].diverged.any() and both[0].best == both[1].best and np.isfinite(both[1].losses).all()
        np.testing.assert_array_equal(both[1].losses[:, 49], both[1].losses[:, 48])

    def start(key):
        return {"w": 0.1 * jax.random.normal(key, (4,))}

    bad = lambda rate: SKIPPERS[name](jaxsgd.sgd(1e-4 * rate))  # noqa: E731
    race = jaxsgd.pick(squares, start, with_nans, candidates={"good": (make, 0.1), "bad": (bad, 0.1)}, steps=60)
    assert race.winner == "good" and race["good"].diverged == 0
