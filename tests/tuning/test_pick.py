"""A race of rules: winners only where the interval says so."""

from __future__ import annotations

import functools
import itertools
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from sklearn.datasets import load_digits

import jaxsgd
from jaxsgd.tuning.pick import compare, good_range, held_out
from jaxsgd.tuning.pick import pick as race
from jaxsgd.tuning.race import Sources, plan, plans

pick = functools.partial(race, strategy="map")  # half the compiling
TRUTH = jnp.array([1.0, -2.0, 0.5])


def regression(params, batch):
    return jnp.mean((batch["x"] @ params["w"] - batch["y"]) ** 2)


def begin(key):
    return {"w": 0.1 * jax.random.normal(key, (3,))}


def batches(count, seed=0, noise=0.3):
    rng = np.random.default_rng(seed)
    x = rng.standard_normal((count, 16, 3)).astype(np.float32)
    y = x @ np.asarray(TRUTH) + noise * rng.standard_normal((count, 16)).astype(np.float32)
    return [{"x": a, "y": b} for a, b in zip(x, y, strict=True)]


def lazy(learning_rate):
    """Gradient descent on one coordinate: whatever the rate, it cannot win."""
    return optax.chain(jaxsgd.sgd(learning_rate), optax.stateless(lambda u, p: {"w": u["w"].at[1:].set(0.0)}))


# -- races -------------------------------------------------------------------------------------------


def test_says_who_wins_and_what_it_took():
    found = pick(regression, begin, batches(10), candidates={"sgd": jaxsgd.sgd, "lazy": (lazy, 0.1)}, steps=48)
    assert found.winner == found.choice == "sgd" and found.learning_rate == found["sgd"].learning_rate
    (comparison,) = found.comparisons
    assert comparison.decided and 0 < comparison.low < comparison.difference < comparison.high
    assert found.summary.startswith("sgd wins") and "95%" in found.summary
    expected = found["lazy"].mean - found["sgd"].mean
    assert comparison.difference == pytest.approx(expected)
    for entry in found.entries:
        assert entry.compiles == 1  # tuning and full trainings, whatever the rate and seed
        assert entry.scores.shape == (3,) and len(entry.rates) == 13 and len(entry.finals) == 3
        assert np.all(np.diff(entry.rates) > 0) and entry.low / 2 < entry.learning_rate < 2 * entry.high
        assert entry.steps <= plan(48, 3).cost and entry.tuning <= 13 * 12
    assert found.used <= found.budget == 2 * plan(48, 3).cost
    text = " ".join(found.why)
    assert f"{found.used:,} of {found.budget:,} steps used" in text and "over 3 seeds" in text
    assert all(line in str(found) for line in found.summary.split()) and max(map(len, str(found).splitlines())) <= 80
    # The best that there is: the noise of y, 0.09.
    assert 0.05 < found["sgd"].mean < 0.2


def test_the_same_rule_twice_ties_exactly():
    twice = dict.fromkeys(("one", "two"), (jaxsgd.adam, 0.1))
    found = pick(regression, begin, batches(10), candidates=twice, steps=16, budget=2 * plans(16, 2)[-1].cost, seeds=2)
    np.testing.assert_array_equal(found["one"].scores, found["two"].scores)
    assert found.comparisons[0][2:] == (0, 0, 0)
    assert found.winner is None and found.choice in ("one", "two")
    assert " tie: " in found.summary and "not significant" in found.summary and "take one at" in found.summary
    assert len(found["one"].rates) == 5 and list(found["one"].finals) == [found["one"].learning_rate]


def test_without_seeds_that_differ_there_is_no_error_bar():
    still = lambda key: {"w": jnp.zeros(3)}  # noqa: E731
    full = {name: np.concatenate([b[name] for b in batches(4)]) for name in ("x", "y")}
    budget = 2 * plans(16, 2)[-1].cost
    rules = {"sgd": jaxsgd.sgd, "lazy": (lazy, 0.1)}
    found = pick(regression, still, full, candidates=rules, steps=16, seeds=2, budget=budget)
    assert found.winner is None and found.summary.startswith("cannot tell: all seeds ended alike")
    frozen = dict.fromkeys(("one", "two"), lambda rate: optax.set_to_zero())
    found = pick(regression, begin, full, candidates=frozen, steps=8, seeds=2, budget=2 * plans(8, 2)[-1].cost)
    assert found.winner is found.choice is found.learning_rate is None
    assert "no candidate lowered the loss" in str(found)


def test_validates_at_the_average_and_pays_for_divergence():
    def build(rate):  # beyond the usual rate it diverges
        return optax.scale_by_learning_rate(rate * jnp.where(rate > 0.02, 1e6, 5.0))

    rules = {"schedule_free": (jaxsgd.schedule_free_sgd, 0.1), "cliff": (build, 0.01)}
    held = batches(3, seed=9)
    found = pick(regression, begin, batches(10), candidates=rules, steps=24, seeds=2, validation=held)
    assert "validation losses" in str(found)
    entry = found["cliff"]
    assert (entry.losses[entry.rates > 0.025] == entry.losses[-1]).all()  # the first loss: nothing gained
    assert found["cliff"].steps < found["schedule_free"].steps
    assert all(e.mean < e.start for e in found.entries)


# -- what it rests on --------------------------------------------------------------------------------


def test_false_winners_are_as_rare_as_said():
    rng = np.random.default_rng(0)
    for others in (1, 3):
        wins = 0
        for _ in range(1000):
            shared = rng.standard_normal(4)  # seeds are harder or easier for all alike
            scores = sorted(shared + rng.standard_normal((others + 1, 4)), key=np.mean)
            found = [compare("a", "b", scores[0], other, others) for other in scores[1:]]
            wins += all(c.decided for c in found)
        # The best is compared with the other: either may be it, so both tails count.
        assert wins / 1000 < 0.07


def test_interval_of_a_paired_difference():
    from scipy.stats import ttest_rel

    a, b = np.array([1.0, 2.0, 4.0]), np.array([1.5, 2.1, 4.9])
    found, want = compare("a", "b", a, b), ttest_rel(b, a).confidence_interval(0.95)
    assert (found.low, found.high) == pytest.approx((want.low, want.high))
    assert not found.decided and "not significant" in str(found)


def test_no_seed_is_judged_at_a_rate_it_chose():
    table = np.array([[1.0, 5.0, 5.0], [2.0, 2.0, 6.0], [9.0, 3.0, 3.0]])
    # Without the first seed the last rate is best, whose loss on it is 9.
    np.testing.assert_array_equal(held_out(table), [9.0, 5.0, 6.0])
    np.testing.assert_array_equal(held_out(table[:1]), table[0])


def test_range_of_good_rates():
    rates = 10.0 ** np.arange(-4, 1)
    losses = np.array([1.0, 0.5, 0.0, 0.02, 1.0])
    low, high, bounded = good_range(rates, losses, 1.0)
    assert bounded == (True, True)
    assert low == pytest.approx(10 ** (-2 - 0.1)) and high == pytest.approx(10 ** (-1 + 0.03 / 0.98))
    low, high, bounded = good_range(rates, np.array([1.0, 1.0, 0.5, 0.01, 0.0]), 1.0)
    assert high == 1.0 and bounded == (True, False)
    assert good_range(rates, np.ones(5), 1.0)[:2] == (1e-4, 1e-4)


def test_batches_are_the_seeds_own_and_come_again():
    held = [np.full((2, 1), i) for i in range(6)]
    order = lambda source, seeds: np.concatenate([b[:, :, 0, 0] for _, b in source.blocks(seeds, 12)])  # noqa: E731
    source = Sources(held, 12, 3)
    first = order(source, [1, 2, 3])
    assert first.shape == (12, 3) and (first == order(source, [1, 2, 3])).all()
    for column in first.T:
        assert sorted(column[:6]) == sorted(column[6:]) == list(range(6))  # a pass, and another
    assert (first[:6] != first[6:]).any() and (first[:, 0] != first[:, 1]).any()
    assert (order(source, [0]) == order(source, [0])[:, :1]).all()
    assert (order(Sources(itertools.cycle(held), 4, 2), [1, 2]) < 4).all()  # of an iterator so many are kept
    by_step = Sources(lambda step: np.full((2, 1), step), 12, 3)
    assert by_step.rows == 1 and (order(by_step, [1, 2, 3])[:, 0] == np.arange(12)).all()
    by_seed = Sources(lambda step, seed: np.full((2, 1), 100 * seed + step), 12, 3)
    assert (order(by_seed, [1, 2, 3])[5] == [105, 205, 305]).all()


def test_plans_fit_their_budget():
    costs = [p.cost for p in plans(300, 3)]
    assert costs == sorted(costs, reverse=True) and plan(300, 3).cost == 12.25 * 300 in costs


@pytest.mark.parametrize(
    ("given", "error", "message"),
    [
        ({"budget": 100}, ValueError, "budget=100: too few for 2 candidates of 3 seeds and 48 steps; the least is 348"),
        ({"seeds": 1}, ValueError, "seeds=1: a whole number is needed, at least 2"),
        ({"steps": 2}, ValueError, "steps=2: a whole number is needed, at least 8"),
        ({"window": 49}, ValueError, "window=49: from 1 to 48"),
        ({"candidates": ["adam"]}, ValueError, "at least two"),
        ({"candidates": "adam"}, TypeError, "a list of rules"),
        ({"candidates": ["adam", "adamm"]}, KeyError, "did you mean 'adam'?"),
        ({"candidates": ["adam", optax.adam]}, TypeError, "functions need names"),
        ({"candidates": {"a": jaxsgd.adam, "b": optax.adam(0.1)}}, TypeError, "has its learning rate already"),
        ({"candidates": {"a": jaxsgd.adam, "b": (optax.adam, 0.0)}}, ValueError, "b: the rate to search around is 0"),
        ({"init": {"w": jnp.zeros(3)}}, TypeError, "init: a function of a key"),
        ({"data": []}, ValueError, "data: it is empty"),
        ({"data": None}, TypeError, "data=None"),
        ({"validation": []}, ValueError, "validation: it is empty"),
        ({"init": lambda key: {"w": jnp.full(3, jnp.nan)}, "steps": 8}, ValueError, "the first loss is not finite"),
    ],
)
def test_refuses_in_words(given, error, message):
    arguments = {"init": begin, "data": batches(2), "steps": 48, **given}
    with pytest.raises(error, match=re.escape(message)):
        pick(regression, arguments.pop("init"), arguments.pop("data"), **arguments)


# -- digits ------------------------------------------------------------------------------------------


class MLP(nnx.Module):
    def __init__(self, rngs):
        self.hidden, self.head = nnx.Linear(64, 32, rngs=rngs), nnx.Linear(32, 10, rngs=rngs)

    def __call__(self, images):
        return self.head(nnx.relu(self.hidden(images)))


@pytest.mark.slow
def test_adam_when_unsure():
    """On digits AdamW and momentum are about as good, and AdamW is the more forgiving."""
    images, labels = load_digits(return_X_y=True)
    images, labels = (images / 16.0).astype(np.float32), labels.astype(np.int32)
    data = [(images[i : i + 64], labels[i : i + 64]) for i in range(0, 1216, 64)]

    def loss_fn(model, batch, key):
        logits = model(batch[0])
        return optax.softmax_cross_entropy_with_integer_labels(logits, batch[1]).mean(), {"logits": logits}

    found = pick(loss_fn, lambda key: MLP(nnx.Rngs(key)), data, steps=80, validation=(images[1216:], labels[1216:]))
    assert {e.compiles for e in found.entries} == {1}
    adam, momentum = found["adamw"], found["momentum"]
    assert adam.decades > momentum.decades > 0.1
    assert all(e.mean < 0.4 * e.start and e.diverged == 0 for e in found.entries)
    if found.winner is None:
        assert found.choice == "adamw" and "the safer one when unsure" in found.summary
