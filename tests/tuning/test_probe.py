"""The probe and the range test: against the truth, under their budgets, and where there is nothing to find."""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from learning_rate_tasks import TASKS
from probe_learning_rates import train

import jaxsgd
from jaxsgd.tuning.answer import answer
from jaxsgd.tuning.probe import probe
from jaxsgd.tuning.range_test import range_test
from jaxsgd.tuning.search import Search
from jaxsgd.tuning.short_runs import manner, usual_rate

VERDICTS = {"diverged", "oscillating", "too low", "too high", "good"}
CURVATURE = jnp.array([1.0, 3.0, 10.0])


def bowl(params, batch):
    """A quadratic: gradient descent is stable below 2 / 10."""
    return 0.5 * jnp.sum(CURVATURE * params["x"] ** 2) + 0.0 * batch.sum()


def noisy(params, batch, key):
    """A regression: with noise from the batches."""
    return jnp.mean((batch["x"] @ params["w"] - batch["y"]) ** 2), {"extra": jnp.zeros(())}


def regression(step: int) -> dict[str, np.ndarray]:
    rng = np.random.default_rng([7, step])
    x = rng.normal(size=(16, 4)).astype(np.float32)
    return {"x": x, "y": (x @ np.array([1.0, -2.0, 3.0, 0.5]) + 0.3 * rng.normal(size=16)).astype(np.float32)}


START = {"x": jnp.ones(3)}
WEIGHTS = {"w": jnp.zeros(4)}
ONE = np.zeros(2, np.float32)


def agrees_with_itself(found) -> None:
    """The suggestion is in its range, no bad rate is, and the table shows a good rate where confidence is high."""
    low, high = found.range
    assert low <= found.learning_rate <= high
    inside = {rate.verdict for rate in found.rates if low <= rate.learning_rate <= high}
    assert inside <= {"good"}, str(found)
    assert found.confidence != "high" or any(rate.verdict == "good" for rate in found.rates)
    for rate in found.rates:
        assert rate.verdict == "diverged" or rate.end <= 4 * rate.start, "above four times the start is diverged"


def against_the_truth(name: str, *, every: int) -> None:
    """The suggestion reaches 95% of what the best rate reaches, and its training does not diverge."""
    task = TASKS[name]()
    found = probe(task.loss_fn, task.init(jax.random.key(0)), task.data(0), task.rule, steps=task.steps)
    assert found.learning_rate is not None and found.range is not None
    assert found.steps <= task.steps and found.share == found.steps / task.steps
    agrees_with_itself(found)
    rates = [found.learning_rate, *found.usual * 10.0 ** (np.arange(-12, 15, every) / 6)]
    runs = train(task, rates, 0)
    assert not runs.diverged[0]
    reached = (runs.start - runs.ends[0]) / (runs.start - runs.ends.min())
    assert reached >= 0.95, f"{name}: {reached:.3f} at {found.learning_rate}"


@pytest.mark.parametrize("name", ["wine tanh momentum full", "diabetes linear sgd"])
def test_reaches_what_the_best_rate_reaches(name):
    against_the_truth(name, every=3)


@pytest.mark.slow
@pytest.mark.parametrize(
    "name", ["digits mlp sgd full", "digits layernorm lion", "topics bigram adam", "cancer mlp adagrad"]
)
def test_reaches_what_the_best_rate_reaches_slow(name):
    against_the_truth(name, every=2)


def test_the_edge_of_stability_of_a_bowl():
    found = probe(bowl, START, ONE, jaxsgd.sgd, steps=400, around=1e-3)  # a hundred times too low
    assert found.learning_rate is not None and 0.05 < found.learning_rate < 0.2
    verdicts = {rate.learning_rate: rate.verdict for rate in found.rates}
    assert set(verdicts.values()) <= VERDICTS
    assert all(v in ("diverged", "oscillating") for r, v in verdicts.items() if r > 0.21), verdicts
    assert verdicts[min(verdicts)] == "too low"
    agrees_with_itself(found)
    assert all(math.isfinite(rate.number) and rate.why for rate in found.rates)
    assert np.allclose(START["x"], 1.0)  # left as it is


def of_two_runs(low, high, error=0.0, steps=40, shorter=40, whole=1000):
    """The suggestion of a search whose last runs, at 0.1 (``shorter``) and 0.316, ended at ``low`` and ``high``.

    Without noise they fall by 0.0025 a step at the end.
    """
    rng = np.random.default_rng(0)
    falling = 0.0025 * np.arange(steps)[::-1]
    curves = {0.1: low + falling, 10**-0.5: high + falling + error * rng.normal(size=steps)}
    curves[10**-0.5] += high - curves[10**-0.5][-steps // 4 :].mean() + falling[-steps // 4 :].mean()
    for curve in curves.values():
        curve[0] = 1.0
    curves[0.1] = curves[0.1][:shorter]

    class Members:
        constant, spent = False, 2 * steps

        def __init__(self):
            self.curves = curves

        def run(self, rate, steps):
            return curves[rate][:steps] if len(curves[rate]) >= steps else None

        def alive(self, rate):
            return True

    search = Search(Members(), 0.1, whole, whole, 1)
    search.horizon, search.p_value = steps, 0.0
    return answer(search, None, [])


def test_noisy_batches_need_a_lower_rate_in_a_longer_run():
    """By the cube root of the steps, but not down to a rate that was too low. Runs of all the steps need no factor."""
    found = of_two_runs(0.2, 0.2 - 1e-3, 0.05)
    assert found.best == 10**-0.5
    assert found.learning_rate == pytest.approx(found.best * (40 / 1000) ** (1 / 3), rel=5e-3)
    assert "needs a lower rate, by the cube root of the steps" in found.why[0]
    assert found.range[0] <= found.learning_rate <= found.range[1]
    above = of_two_runs(0.5, 0.2, 0.05)
    assert above.rates[0].verdict == "too low" and "needs a lower rate, halfway to 0.1" in above.why[0]
    assert above.learning_rate == above.range[0] == pytest.approx(10**-0.75, rel=5e-3)
    assert of_two_runs(0.5, 0.2, 0.05, whole=40).learning_rate == 0.316


def test_without_noise_a_lower_rate_that_does_as_well_counts():
    """The suggestion moves to the lower rate as their losses meet. As well is a tenth of the steps later, here 0.01."""
    found = [of_two_runs(0.2 + gap, 0.2).learning_rate for gap in np.linspace(-0.002, 0.012, 29)]
    assert found[0] == found[4] == 0.1 and found[-1] == found[-4] == 0.316
    assert np.all(np.diff(found) >= 0) and np.abs(np.diff(np.log(found))).max() < 0.1
    alike = of_two_runs(0.205, 0.2)
    assert "did as well in 40 steps" in alike.why[0] and "is between the two" in alike.why[0]
    assert alike.best == 10**-0.5 and alike.learning_rate == pytest.approx(10**-0.75, rel=2e-2)
    assert alike.range[0] <= alike.learning_rate <= alike.range[1]
    assert "no factor is taken off" in of_two_runs(0.211, 0.2).why[0]
    # However fast the losses fall, a rate that is not good pulls at nothing: 0.32 is 85% of the decrease.
    assert of_two_runs(0.32, 0.2, whole=40).learning_rate == 0.316


def test_the_lower_neighbour_counts_by_the_steps_that_both_have():
    """The upper one may have been trained on; the lower one then speaks after fewer steps."""
    assert "did as well in 20 steps" in of_two_runs(0.2, 0.2, shorter=20).why[0]


def test_the_curves_are_the_trainings():
    """A row of losses is what a loop over optax gives, as far as it was trained, and NaN from there."""
    found = probe(noisy, WEIGHTS, regression, jaxsgd.adam, steps=300)
    assert found.losses.shape[0] == len(found.rates) == len(found.learning_rates)
    assert np.all(np.diff(found.learning_rates) > 0)
    for rate, row in zip(found.rates, found.losses, strict=True):
        assert np.isfinite(row[: rate.steps]).all() and np.isnan(row[rate.steps :]).all()
    longest = max(found.rates, key=lambda r: r.steps)
    tx, params = optax.adam(longest.learning_rate), WEIGHTS
    state, losses = tx.init(params), []
    loss_and_grad = jax.jit(jax.value_and_grad(lambda p, b: noisy(p, b, None)[0]))
    for step in range(longest.steps):
        loss, grads = loss_and_grad(params, regression(step))
        updates, state = tx.update(grads, state)
        params = optax.apply_updates(params, updates)
        losses.append(float(loss))
    row = found.losses[found.rates.index(longest)]
    np.testing.assert_allclose(row[: longest.steps], losses, rtol=1e-4)
    text = str(found)
    assert text.startswith(f"learning rate {found.learning_rate:g}") and "verdict" in text
    assert f"{found.steps} steps taken" in text and "the longest runs" in text


@pytest.mark.parametrize("steps", [24, 100, 1000])
def test_the_budget_holds(steps):
    found = probe(noisy, WEIGHTS, regression, jaxsgd.momentum, steps=steps, share=0.25)
    assert found.steps <= steps // 4
    # What a row shows is what was spent, but for the step that a diverging rate did not live through and the control.
    rows = sum(rate.steps + (rate.verdict == "diverged") for rate in found.rates)
    assert rows <= found.steps <= rows + max(4, steps // 64)
    if steps == 24:
        assert found.learning_rate is None or found.confidence == "low", str(found)


def test_the_range_test_shares_the_budget():
    found = probe(noisy, WEIGHTS, regression, jaxsgd.sgd, steps=400, range_test=True, share=0.25)
    assert found.steps <= 100 and found.range_test is not None and 0 < found.range_test.steps <= 33
    assert "range test" in found.text(verbose=True)


def logistic(params, batch):
    z = batch["x"] @ params["w"]
    return jnp.mean(jnp.logaddexp(0.0, z) - batch["y"] * z)


def drawn(seed, size, columns=100, rows=600):
    """Batches with replacement of a logistic regression; all of its rows in every batch with ``size=None``."""
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(rows, columns)).astype(np.float32)
    y = (x @ rng.normal(size=columns) + rng.logistic(size=rows) > 0).astype(np.float32)

    def at(step):
        chosen = np.random.default_rng([seed, step]).integers(0, rows, size)
        return {"x": x[chosen], "y": y[chosen]}

    return at if size else {"x": x, "y": y}


@pytest.mark.parametrize("seed", [1, 2])
def test_first_steps_that_tell_nothing_lead_nowhere(seed):
    """From zero weights the first small batches raise the loss of the next at any rate: a lower one is no answer."""
    found = probe(logistic, {"w": jnp.zeros(100)}, drawn(seed, 4), jaxsgd.adamw, steps=300)
    assert found.learning_rate is not None and 0.01 <= found.learning_rate <= 0.1, str(found)
    assert min(found.learning_rates) >= 1e-5, "the grid did not go down to rates that do nothing"


def test_noise_at_the_end_is_a_doubt():
    zeros = {"w": jnp.zeros(20)}
    small = probe(logistic, zeros, drawn(1, 4, 20), jaxsgd.sgd, steps=200)
    assert small.confidence != "high" and any("noise makes the end" in reason for reason in small.why), str(small)
    whole = probe(logistic, zeros, drawn(1, None, 20), jaxsgd.sgd, steps=200)
    assert whole.confidence == "high" and not any("noise" in reason for reason in whole.why), str(whole)


def test_a_decrease_shows_where_batches_differ_by_factors():
    def scaled(step):
        rng = np.random.default_rng([5, step])
        size = np.exp(3 * rng.normal())
        x = rng.normal(size=(8, 4)).astype(np.float32)
        return {"x": x * size, "y": x @ np.array([1.0, -2.0, 3.0, 0.5], np.float32) * size}

    def loss(params, batch):
        return jnp.sqrt(jnp.mean((batch["x"] @ params["w"] - batch["y"]) ** 2) + 1e-12)

    found = probe(loss, WEIGHTS, scaled, jaxsgd.adam, steps=300)
    assert found.learning_rate is not None and found.p_value < 0.01, str(found)


def nothing(params, batch):
    return jnp.mean(batch) + 0.0 * params["x"].sum()


def broken(params, batch):
    return jnp.log(-1.0 - params["x"].sum() ** 2)


def cliff(params, batch):
    return jnp.where(jnp.all(params["x"] == 0.0), 1.0 + params["x"].sum(), jnp.inf)


def noise(params, batch):
    return 1.0 + jnp.mean(batch @ params["x"])


def endless(params, batch):
    return -jnp.sum(jnp.abs(params["x"])) + jnp.mean(batch)


def white(step):
    return np.random.default_rng([3, step]).normal(size=(8, 3)).astype(np.float32)


@pytest.mark.parametrize(
    "loss, data, words",
    [
        (nothing, ONE, "no rate lowers the loss"),
        (nothing, white, "no rate lowers the loss"),
        (broken, ONE, "not finite"),
        (cliff, ONE, "every rate diverges"),
        (noise, white, "noise"),
        (endless, ONE, "falls without end"),
        (endless, white, "falls without end"),
    ],
)
def test_no_good_rate(loss, data, words):
    rule = jaxsgd.adam if loss is noise else jaxsgd.sgd
    start = {"x": jnp.zeros(3)} if loss is cliff else START
    found = probe(loss, start, data, rule, steps=300)
    if loss is noise and found.learning_rate is not None:  # chance, and said to be
        assert found.confidence == "low", str(found)
        return
    assert found.learning_rate is None and found.range is None
    assert str(found).startswith("no good rate found") and words in found.why[0], str(found)
    assert all(rate.verdict != "good" for rate in found.rates), "none is good, none is called so"
    if loss is nothing and data is ONE:
        assert {rate.verdict for rate in found.rates} == {"too low"}, "no rate raises the loss"
    assert found.steps <= 300


def test_models_and_data_in_every_form():
    class Line(nnx.Module):
        def __init__(self):
            self.w = nnx.Param(jnp.zeros(4))

    def of_model(model, batch):
        return jnp.mean((batch["x"] @ model.w[...] - batch["y"]) ** 2)

    def of_state(params, held, batch, key):
        return jnp.mean((batch["x"] @ params["w"] - batch["y"]) ** 2), (held, None)

    batches = [regression(i) for i in range(120)]
    state = jaxsgd.TrainState.create(WEIGHTS, jaxsgd.sgd(0.1), model_state={"seen": jnp.zeros(())})
    found = [
        probe(noisy, WEIGHTS, regression, jaxsgd.sgd, steps=200),
        probe(of_model, Line(), batches, jaxsgd.sgd, steps=200),
        probe(of_state, state, iter(batches), jaxsgd.sgd, steps=200),
    ]
    for other in found[1:]:
        assert other.learning_rate == found[0].learning_rate
        np.testing.assert_allclose(other.losses, found[0].losses, rtol=1e-5)
    assert np.allclose(state.params["w"], 0.0)


def test_rules_in_every_form():
    def clipped(learning_rate):
        return optax.chain(optax.clip_by_global_norm(1.0), jaxsgd.momentum(learning_rate))

    assert usual_rate(clipped) == (0.03, "momentum") and usual_rate(optax.adamw) == (1e-3, "adamw")
    unknown = lambda learning_rate: optax.sgd(learning_rate)  # noqa: E731
    assert usual_rate(unknown) == (1e-2, "")
    found = probe(noisy, WEIGHTS, regression, unknown, steps=200)
    assert found.learning_rate is not None and any("around=" in reason for reason in found.why)
    with pytest.raises(TypeError, match="learning rate already"):
        probe(noisy, WEIGHTS, regression, jaxsgd.sgd(0.1))  # type: ignore[arg-type]


@pytest.mark.parametrize("of", [jaxsgd.sgd, optax.sgd, optax.adam])
def test_a_schedule_is_seen(of):
    """Of any transformation, by its state alone."""
    shape = optax.warmup_cosine_decay_schedule(0.0, 1.0, 20, 100)
    seen = manner(lambda learning_rate: of(lambda count: learning_rate * shape(count)), 100)
    np.testing.assert_allclose(seen.schedule, shape(np.arange(100)), atol=1e-5)
    assert seen.every == 1 and not seen.constant and manner(of, 50).constant


def test_short_runs_see_the_whole_schedule():
    """A long warm-up does not make the suggestion too high: at its peak the rate has to be stable."""
    shape = optax.linear_schedule(0.0, 1.0, 200)
    warmed = lambda learning_rate: jaxsgd.sgd(lambda count: learning_rate * shape(count))  # noqa: E731
    found = probe(bowl, START, ONE, warmed, steps=400)
    assert found.learning_rate is not None and 0.02 < found.learning_rate < 0.2, str(found)
    assert any("schedule" in reason for reason in found.why)
    agrees_with_itself(found)


@pytest.mark.parametrize("wrap", [jaxsgd.accumulate, lambda tx, k: optax.MultiSteps(tx, k).gradient_transformation()])
def test_microbatches_are_not_steps(wrap):
    """A run counts updates: with one in 16 calls, the suggestion is that of as many updates."""
    rule = lambda learning_rate: wrap(jaxsgd.sgd(learning_rate), 16)  # noqa: E731
    assert manner(rule, 200).every == 16
    found = probe(bowl, START, ONE, rule, steps=1600, around=0.01)
    plain = probe(bowl, START, ONE, jaxsgd.sgd, steps=100, around=0.01)
    assert found.learning_rate is not None and plain.learning_rate is not None
    assert 1 / 4 < found.learning_rate / plain.learning_rate < 4, f"{found}\n{plain}"


@pytest.mark.parametrize(
    "rule",
    [jaxsgd.prodigy, jaxsgd.dog, optax.contrib.prodigy, lambda r: jaxsgd.mechanize(jaxsgd.adam(r)),
     lambda r: optax.chain(optax.clip_by_global_norm(1.0), jaxsgd.dowg(r))],
)  # fmt: skip
def test_rules_that_set_their_rate_are_left_alone(rule):
    found = probe(noisy, WEIGHTS, regression, rule, steps=200)
    assert found.learning_rate == 1.0 and found.range == (1.0, 1.0) and found.steps == 0
    assert "sets its own step size" in str(found) and "leave learning_rate at 1" in str(found)


def slope(params, batch):
    return -params["x"].sum()


@pytest.mark.parametrize("rule", [jaxsgd.sgd, optax.sgd, lambda r: jaxsgd.sgd(lambda count: r), jaxsgd.adam])
def test_the_rate_of_a_range_test_rises(rule):
    """On a slope each step shows the rate before it."""
    found = range_test(slope, {"x": jnp.zeros(())}, ONE, rule, steps=40, low=1e-3, high=1.0)
    np.testing.assert_allclose(found.rates, np.geomspace(1e-3, 1.0, 40), rtol=1e-5)
    np.testing.assert_allclose(np.diff(found.losses), -found.rates[:-1], rtol=2e-3)
    assert found.steps == 40 and found.diverged is None


def test_a_range_test_of_a_bowl():
    found = range_test(bowl, START, ONE, jaxsgd.sgd, steps=100, low=1e-5, high=10.0)
    assert found.diverged is not None and 0.2 < found.diverged < 5.0
    assert found.steepest is not None and 1e-3 < found.steepest < found.diverged
    assert found.valley is not None and 1e-4 < found.valley < found.diverged
    assert len(found.rates) == len(found.losses) == len(found.smoothed) < found.steps <= len(found.rates) + 16
    assert found.losses.max() <= 4 * found.losses[0]
    assert "steepest" in str(found) and "it diverged at" in str(found)
    flat = range_test(nothing, START, ONE, jaxsgd.sgd, steps=20)
    assert flat.steepest is None and flat.valley is None and "never fell" in str(flat)


@pytest.mark.parametrize(
    "arguments, words",
    [
        ({"share": 0.0}, "share=0.0"),
        ({"share": math.inf}, "share=inf"),
        ({"steps": 5}, "steps=5"),
        ({"around": -1.0}, "around=-1.0"),
        ({"around": "a"}, "around='a'"),
        ({"steps": 20, "range_test": True}, "at least 30"),
    ],
)
def test_arguments_are_checked(arguments, words):
    with pytest.raises(ValueError, match=words):
        probe(bowl, START, ONE, jaxsgd.sgd, **arguments)


def test_arguments_of_the_range_test_are_checked():
    with pytest.raises(ValueError, match="low=1.0, high=0.1"):
        range_test(bowl, START, ONE, jaxsgd.sgd, low=1.0, high=0.1)
    with pytest.raises(ValueError, match="steps=5"):
        range_test(bowl, START, ONE, jaxsgd.sgd, steps=5)


def test_a_rule_that_ignores_its_rate_is_named():
    def loss(w, x):
        return jnp.mean((x @ w - x @ jnp.arange(4.0)) ** 2)

    batches = [np.random.default_rng(i).normal(size=(16, 4)).astype(np.float32) for i in range(60)]
    found = jaxsgd.probe(loss, jnp.zeros(4), batches, lambda rate: jaxsgd.adamw(1e-2), steps=60, progress=False)
    assert found.learning_rate is None and "does rule(learning_rate) use its argument?" in str(found)


def test_a_lower_rate_is_compared_by_whole_runs_of_a_schedule():
    """The first steps of a longer schedule are its warm-up."""
    batches = np.random.default_rng(0).normal(size=(400, 32, 4)).astype(np.float32)
    data = [{"x": x, "y": np.tanh(x @ np.array([1, -0.5, 0.5, 0.2], np.float32))} for x in batches]
    params = {"w": 0.3 * jax.random.normal(jax.random.key(0), (4, 8)), "v": jnp.full(8, 0.3)}

    def loss(p, b):
        return jnp.mean((jnp.tanh(b["x"] @ p["w"]) @ p["v"] - b["y"]) ** 2)

    def rule(rate):
        return jaxsgd.adamw(optax.warmup_cosine_decay_schedule(0.0, rate, 60, 200))

    found = jaxsgd.probe(loss, params, data, rule, steps=200, progress=False)
    assert found.learning_rate > 0.02, str(found)
