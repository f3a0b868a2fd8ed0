"""One table of inputs for all learning-rate tools: schedules, skipped steps, batches, losses, seeds, aux."""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen, nnx
from jax.flatten_util import ravel_pytree

import jaxsgd
from jaxsgd.ensemble.concrete import Merged
from jaxsgd.tuning.short_runs import compressed, manner

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
    "joined": lambda r: optax.join_schedules(
        [optax.linear_schedule(0.0, r, 3), optax.cosine_decay_schedule(r, 9)], [3]
    ),
    "by hand": lambda r: lambda count: r * jnp.minimum(count, 3) if r > 0 else 0.0,
    "from a list": lambda r: lambda count: jnp.asarray([0.1 * r, float(r), min(r, 0.02)])[jnp.minimum(count, 2)],
}
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
        # A short run sees the whole schedule, compressed.
        tx = optax.chain(make(rate.learning_rate), compressed(manner(make, 120).schedule, rate.steps))
        np.testing.assert_allclose(row, losses_of(squares, WEIGHTS, tx, regression, rate.steps), rtol=2e-5)
    rising = jaxsgd.range_test(squares, WEIGHTS, regression, make, steps=12, low=1e-3, high=0.1)
    params, state, seen = WEIGHTS, make(1.0).init(WEIGHTS), []
    for i, rate in enumerate(np.geomspace(1e-3, 0.1, 12)):
        value, grads = jax.value_and_grad(squares)(params, regression(i), None)
        updates, state = make(float(rate)).update(grads, state, params)
        params = optax.apply_updates(params, updates)
        seen.append(float(value))
    np.testing.assert_allclose(rising.losses, seen, rtol=2e-5)


def test_a_long_range_test_of_such_a_rule_rises_in_stairs():
    """On a slope each step shows the rate before it."""
    make = lambda rate: optax.sgd(lambda count: rate if rate > 0 else 0.0)  # noqa: E731
    slope = lambda params, batch, key: -params["x"].sum()  # noqa: E731
    found = jaxsgd.range_test(slope, {"x": jnp.zeros(())}, np.zeros(2), make, steps=96, low=1e-3, high=1.0)
    np.testing.assert_allclose(found.rates, np.repeat(np.geomspace(1e-3, 1.0, 32), 3), rtol=1e-6)
    np.testing.assert_allclose(np.diff(found.losses), -found.rates[:-1], rtol=2e-3)


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


# -- batches ---------------------------------------------------------------------------------------

ADAM = jaxsgd.adam(0.1)


def started(key):
    return {"w": 0.1 * jax.random.normal(key, (4,))}


def sweep_step(loss_fn, data):
    step = jaxsgd.make_step(loss_fn, ADAM)
    rates = [0.01, 0.1]
    return jaxsgd.sweep(
        step, jaxsgd.TrainState.create(WEIGHTS, ADAM), data, steps=4, learning_rate=rates, strategy="map"
    )


MANY = {
    "probe": lambda loss, data: jaxsgd.probe(loss, WEIGHTS, data, jaxsgd.adam, steps=40).losses,
    "range_test": lambda loss, data: jaxsgd.range_test(loss, WEIGHTS, data, jaxsgd.adam, steps=10).losses,
    "sweep": lambda loss, data: sweep_step(loss, data).losses,
    "pick": lambda loss, data: jaxsgd.pick(loss, started, data, steps=8, seeds=2, strategy="map")["adamw"].scores,
    "noise_scale": lambda loss, data: jaxsgd.noise_scale(loss, WEIGHTS, data, small=4).variance,
}
"""Tools that take batches."""
ONE = {
    "sharpness": lambda loss, batch: jaxsgd.sharpness(loss, WEIGHTS, batch).hessian.largest,
    "accumulate_gradients": lambda loss, batch: jaxsgd.accumulate_gradients(loss, 2)(WEIGHTS, batch)[0][0],
}
"""Tools that take one batch."""
TOOLS = MANY | ONE


class Tensor:
    """An array of another library, such as a torch tensor on the CPU."""

    def __init__(self, array):
        self._array = array

    shape = property(lambda self: self._array.shape)

    def __array__(self, dtype=None, copy=None):
        return self._array


class Loader:
    """A torch DataLoader: it has a length, can be walked again, and gives lists of tensors."""

    def __len__(self):
        return 3

    def __iter__(self):
        return (list(map(Tensor, regression(i).values())) for i in range(3))


@dataclasses.dataclass
class Plain:
    x: object
    y: object


@jax.tree_util.register_dataclass
@dataclasses.dataclass
class Registered:
    x: object
    y: object


def of_pair(params, batch, key):
    x, y = batch
    return jnp.mean((x @ params["w"] - y) ** 2)


def of_fields(params, batch, key):
    return of_pair(params, (batch.x, batch.y), key)


def by_index(params, batch, key):
    return jnp.mean((jnp.sum(batch[0] * params["w"]) - jnp.sum(batch[1])) ** 2)


PAIR = tuple(regression(0).values())
SAME = {  # one batch in several forms: they read alike
    "a tuple": (of_pair, PAIR),
    "a list of its arrays": (of_pair, list(PAIR)),
    "tensors": (of_pair, list(map(Tensor, PAIR))),
    "a dataclass": (of_fields, Registered(*PAIR)),
    "no key": (lambda params, batch: of_pair(params, batch, None), PAIR),
}


@pytest.mark.parametrize("tool", TOOLS)
def test_one_batch_reads_alike_in_every_form(tool):
    wanted = TOOLS[tool](squares, regression(0))
    for name, (loss_fn, batch) in SAME.items():
        np.testing.assert_allclose(TOOLS[tool](loss_fn, batch), wanted, rtol=1e-5, err_msg=name)


@pytest.mark.parametrize("tool", [*MANY, "sharpness"])
def test_several_batches_read_alike_in_every_form(tool):
    batches = [regression(i) for i in range(3)]
    wanted = TOOLS[tool](squares, batches)
    forms = {
        "lists": (of_pair, [list(batch.values()) for batch in batches]),
        "dataclasses": (of_fields, [Registered(*batch.values()) for batch in batches]),
        "loader": (of_pair, Loader()),
    }
    for name, (loss_fn, data) in forms.items():
        data = list(data) if tool == "sharpness" else data
        np.testing.assert_allclose(TOOLS[tool](loss_fn, data), wanted, rtol=1e-4, err_msg=name)


BAD = {
    "no pytree": (of_fields, Plain(*PAIR), TypeError, r"is a Plain, no pytree. Use jax.tree_util.register_dataclass"),
    "no numbers": (squares, regression(0) | {"name": "a"}, TypeError, "'name' is a str; arrays and numbers are needed"),
    "of several lengths": (squares, regression(0) | {"y": PAIR[1][:4]}, ValueError, "'x' has 16 examples, 'y' has 4"),
    "empty": (squares, {"x": np.zeros((0, 4)), "y": np.zeros(0)}, ValueError, "'x' is empty"),
}


@pytest.mark.parametrize("tool", TOOLS)
@pytest.mark.parametrize("name", BAD)
def test_a_batch_is_refused_by_one_sentence(name, tool):
    loss_fn, batch, kind, words = BAD[name]
    with pytest.raises(kind, match=words):
        TOOLS[tool](loss_fn, batch)


@pytest.mark.parametrize("tool", [*MANY, "sharpness"])
def test_a_list_that_may_be_one_batch_or_several_is_refused(tool):
    """The loss takes ``[x, y]`` as a batch, and ``x`` too."""
    with pytest.raises(ValueError, match="as one batch and as 2 batches. Use a tuple for one batch, or a list of tup"):
        TOOLS[tool](by_index, [np.ones((16, 4), np.float32)] * 2)


@pytest.mark.parametrize("tool", ["probe", "range_test", "sweep"])
def test_an_iterator_that_ends_is_told(tool):
    with pytest.raises(ValueError, match="ended after 1 batches; more are needed. Use a list, or a longer iterator"):
        TOOLS[tool](squares, iter([regression(0)]))


@pytest.mark.parametrize("tool", ONE)
def test_a_loader_in_place_of_a_batch_is_told(tool):
    with pytest.raises(TypeError, match=r"Use .*next\(iter\(...\)\)"):
        TOOLS[tool](of_pair, Loader())


RETURNS = {
    "too much": (lambda p, b, key: (squares(p, b, key), 1, 2), "returns a tuple of 3; loss or .loss, aux. is needed"),
    "a dict": (lambda p, b, key: {"loss": squares(p, b, key)}, "returns a dict"),
    "nothing": (lambda p, b, key: None, "returns a NoneType"),
    "each example's": (lambda p, b, key: (b["x"] @ p["w"]) ** 2, "a scalar is needed"),
    "an integer": (lambda p, b, key: jnp.ones((), jnp.int32), "the loss is int32; a real floating scalar is needed"),
}


@pytest.mark.parametrize("tool", TOOLS)
@pytest.mark.parametrize("name", RETURNS)
def test_a_loss_that_returns_something_else_is_refused(name, tool):
    loss_fn, words = RETURNS[name]
    with pytest.raises(ValueError, match=words):
        TOOLS[tool](loss_fn, regression(0))


@pytest.mark.parametrize("tool", TOOLS)
def test_a_loss_of_other_arguments_is_refused(tool):
    with pytest.raises(TypeError, match="it takes 4. Use a jaxsgd.TrainState with model_state="):
        TOOLS[tool](lambda params, held, batch, key: 0.0, regression(0))


@pytest.mark.parametrize("weight", [lambda b: b["x"].sum(0), lambda b: b["y"][:1]])
def test_a_weight_that_is_no_scalar_is_refused(weight):
    with pytest.raises(ValueError, match="weight: it has the shape .*; a scalar is needed. Use its sum"):
        jaxsgd.accumulate_gradients(squares, 2, weight=weight)(WEIGHTS, regression(0))


# -- losses with a model state ---------------------------------------------------------------------


class Normalised(linen.Module):
    @linen.compact
    def __call__(self, x):
        x = linen.BatchNorm(use_running_average=False, momentum=0.5)(linen.Dense(3)(x))
        return linen.Dense(1)(jnp.tanh(x))[:, 0]


def of_state(params, held, batch, key):
    variables = {"params": params, "batch_stats": held}
    out, new = Normalised().apply(variables, batch["x"], mutable=["batch_stats"])
    return jnp.mean((out - batch["y"]) ** 2), (new["batch_stats"], {"size": jnp.abs(out).max()})


def start_normalised(key):
    variables = Normalised().init(key, jnp.ones((4, 4)))
    tx = optax.identity()
    return jaxsgd.TrainState.create(variables["params"], tx, model_state=variables["batch_stats"])


def test_every_tool_takes_a_loss_with_a_model_state():
    state, batch = start_normalised(jax.random.key(0)), regression(0)
    flat, back = ravel_pytree(state.params)
    stateless = lambda params, batch, key: of_state(params, state.model_state, batch, key)[0]  # noqa: E731
    hessian = jax.jit(jax.hessian(lambda x: stateless(back(x), batch, None)))(flat)
    found = jaxsgd.sharpness(of_state, state, batch)
    np.testing.assert_allclose(found.hessian.largest, np.linalg.eigvalsh(hessian)[-1], rtol=1e-4)

    noise = [jaxsgd.noise_scale(fn, at, batch, small=4) for fn, at in ((of_state, state), (stateless, state.params))]
    assert noise[0].variance == noise[1].variance and noise[0].gradient_norm_sq == noise[1].gradient_norm_sq

    accumulated = jax.jit(jaxsgd.accumulate_gradients(of_state, 2))
    (loss, (held, aux)), grads = accumulated(state.params, batch, None, state.model_state)
    wanted, carried, differentiate = [], state.model_state, jax.jit(jax.value_and_grad(of_state, has_aux=True))
    for part in (slice(0, None, 2), slice(1, None, 2)):
        half = jax.tree.map(lambda x, part=part: x[part], batch)
        (value, (carried, _)), grad = differentiate(state.params, carried, half, None)
        wanted.append((value, grad))
    mean = jax.tree.map(lambda a, b: (a + b) / 2, *wanted)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6), (loss, grads), mean)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5), held, carried)
    assert aux["size"].shape == ()

    race = jaxsgd.pick(of_state, start_normalised, regression, steps=8, seeds=2, validation=batch, strategy="map")
    assert all(np.isfinite(entry.scores).all() for entry in race.entries)
    probed = jaxsgd.probe(of_state, state, regression, steps=40)
    rising = jaxsgd.range_test(of_state, state, regression, steps=10)
    assert np.isfinite(probed.losses[:, 0]).any() and len(rising.losses) > 1
    with pytest.raises(TypeError, match="with a model_state it needs the arguments"):
        jaxsgd.sharpness(squares, state, batch)


# -- seeds -----------------------------------------------------------------------------------------


class Dropped(nnx.Module):
    def __init__(self, rngs):
        self.first, self.last = nnx.Linear(4, 16, rngs=rngs), nnx.Linear(16, 1, rngs=rngs)
        self.drop = nnx.Dropout(0.5, rngs=rngs)

    def __call__(self, x):
        return self.last(self.drop(jnp.tanh(self.first(x))))[:, 0]


def of_model(model, batch, key):
    return jnp.mean((model(batch["x"]) - batch["y"]) ** 2)


def test_each_seed_has_its_own_dropout():
    step = jaxsgd.make_step(of_model, ADAM)
    state = jaxsgd.TrainState.create(Dropped(nnx.Rngs(0)), ADAM)
    result = jaxsgd.sweep(step, state, regression, steps=4, seed=[0, 1, 2, 1], strategy="map")
    assert len(set(result.final.tolist())) == 3 and result.losses[1].tolist() == result.losses[3].tolist()
    assert len(set(result.losses[:, 0].tolist())) == 3, "from the first step on"
    rows = jaxsgd.sweep(step, state, regression, steps=4, learning_rate=[0.1], seed=[0, 1, 2], strategy="map")
    assert rows.over_seeds()[0]["sd"] > 0

    def train(state, data):
        return jax.lax.scan(step.fn, state, data)[1]["loss"]

    stacked = jax.tree.map(lambda *xs: jnp.stack(xs), *(regression(i) for i in range(4)))
    whole = jaxsgd.sweep(train, state, stacked, seed=[0, 1, 2, 1])
    np.testing.assert_allclose(whole.losses, result.losses, rtol=1e-5)

    # A start that ignores its key: seeds differ by dropout alone.
    race = jaxsgd.pick(of_model, lambda key: Dropped(nnx.Rngs(0)), regression, steps=8, seeds=3, strategy="map")
    assert all(len(set(finals.tolist())) == 3 for finals in race["adamw"].finals.values())


def test_the_parts_of_a_noise_scale_have_their_own_dropout():
    """All examples are the same: without dropout there is no noise, with it there is."""
    batch = jax.tree.map(lambda x: np.repeat(x[:1], 32, axis=0), regression(0))
    model = Dropped(nnx.Rngs(0))
    noisy = jaxsgd.noise_scale(of_model, model, batch, small=1)
    model.eval()
    still = jaxsgd.noise_scale(of_model, model, batch, small=1)
    assert noisy.variance > 1e-2 > 1e-6 > still.variance


# -- several optimizers, and an aux that is named like a metric -------------------------------------


def with_aux(params, batch, key):
    """As of a VAE: aux holds a loss, a step and a rate of its own, all of them misleading."""
    loss = squares(params, batch, key)
    return loss, {"loss": -loss, "step": jnp.float32(-7), "learning_rate": -1 / loss, "update_norm": jnp.nan}


def test_an_aux_named_like_a_metric_changes_no_tool():
    for name in ("probe", "range_test", "sweep", "pick"):
        np.testing.assert_array_equal(MANY[name](with_aux, regression), MANY[name](squares, regression), name)
    result = sweep_step(with_aux, regression)
    assert result.best == sweep_step(squares, regression).best
    np.testing.assert_array_equal(result.metrics["aux/loss"], -result.losses)
    state, step, recorder = (
        jaxsgd.TrainState.create(WEIGHTS, ADAM),
        jaxsgd.make_step(with_aux, ADAM),
        jaxsgd.Recorder(2),
    )
    for i in range(4):
        state, metrics = step(state, regression(i))
        recorder.add(metrics)
    assert [record["step"] for record in recorder.records] == [1, 2, 3, 4]
    assert all(r["aux/loss"] == -r["loss"] and r["aux/step"] == -7 for r in recorder.records)


def two_optimizers(learning_rate):
    """A generator and a critic: two steps, two optimizers, one state."""
    first, second = jaxsgd.adam(learning_rate), jaxsgd.sgd(0.1)
    steps = jaxsgd.make_step(squares, first), jaxsgd.make_step(with_aux, second)

    def step(states, batch):
        one, metrics = steps[0].fn(states["one"], batch)
        two, other = steps[1].fn(states["two"], batch)
        return {"one": one, "two": two}, {"loss": metrics["loss"] + other["loss"], "one": metrics, "two": other}

    states = {"one": jaxsgd.TrainState.create(WEIGHTS, first), "two": jaxsgd.TrainState.create(WEIGHTS, second)}
    return step, states


def test_two_optimizers_in_one_state():
    data = [regression(i) for i in range(4)]
    result = jaxsgd.sweep(two_optimizers, data=data, learning_rate=[0.01, 0.1], strategy="vmap")
    step, states = two_optimizers(0.1)
    recorder = jaxsgd.Recorder(4)
    for batch in data:
        states, metrics = jax.jit(step)(states, batch)
        recorder.add(metrics)
    for name in ("loss", "one/loss", "two/loss", "two/aux/loss"):
        np.testing.assert_allclose(result.metrics[name][1], [r[name] for r in recorder.records], rtol=1e-5)
    np.testing.assert_allclose(result.metrics["loss"], result.metrics["one/loss"] + result.metrics["two/loss"])

    def train(states, data):
        return jax.lax.scan(step, states, data)[1]["loss"]

    stacked = jax.tree.map(lambda *xs: jnp.stack(xs), *data)
    whole = jaxsgd.sweep(train, two_optimizers(0.1)[1], stacked, seed=[0, 1])
    np.testing.assert_allclose(whole.losses[0], result.losses[1], rtol=1e-5)


def test_two_optimizers_in_one_loss():
    labels = {"a": "adam", "b": "sgd"}
    make = lambda rate: optax.partition({"adam": jaxsgd.adam(rate), "sgd": optax.sgd(0.01)}, labels)  # noqa: E731
    both = lambda params, batch, key: squares(params["a"], batch, key) + squares(params["b"], batch, key)  # noqa: E731
    params = {"a": WEIGHTS, "b": WEIGHTS}
    found = jaxsgd.probe(both, params, regression, make, steps=120)
    longest = max(found.rates, key=lambda r: r.steps)
    wanted = losses_of(both, params, make(longest.learning_rate), regression, longest.steps)
    np.testing.assert_allclose(found.losses[found.rates.index(longest)][: longest.steps], wanted, rtol=1e-4)
    assert jaxsgd.range_test(both, params, regression, make, steps=10).steps == 10


COUNTS = {
    "accumulate": ("every", lambda n: jaxsgd.accumulate(jaxsgd.sgd(0.1), n)),
    "make_step": ("accumulate", lambda n: jaxsgd.make_step(lambda p, b: p, jaxsgd.sgd(0.1), accumulate=n)),
    "Recorder": ("every", lambda n: jaxsgd.Recorder(every=n)),
    "guard": ("max_consecutive", lambda n: jaxsgd.guard(jaxsgd.sgd(0.1), max_consecutive=n)),
    "int8": ("min_size", lambda n: jaxsgd.int8(min_size=n)),
    "sharpness": ("iterations", lambda n: jaxsgd.sharpness(lambda p, b: p, 1.0, np.ones(2), iterations=n)),
    "noise_scale": ("small", lambda n: jaxsgd.noise_scale(lambda p, b: p * b.mean(), 1.0, [np.ones(2)] * 2, small=n)),
    "pick": ("steps", lambda n: jaxsgd.pick(lambda p, b: p * b.mean(), lambda key: 1.0, [np.ones(2)] * 2, steps=n)),
}


@pytest.mark.parametrize("count", [1.5, "2", True, -1], ids=repr)
@pytest.mark.parametrize("tool", COUNTS)
def test_a_count_is_a_whole_number(tool, count):
    name, call = COUNTS[tool]
    with pytest.raises(ValueError, match=f"{name}={count!r}: a whole number is needed, at least"):
        call(count)
