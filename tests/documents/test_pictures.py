"""The pictures of the rules' pages show what the rules do."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pictures
import pytest

import jaxsgd
from jaxsgd.plot.landscapes import LANDSCAPES
from jaxsgd.registry import RULES

BOWL = LANDSCAPES["bowl"]


def by_hand(rule, rate, fn, start, steps, gradient_at=lambda state, params: params):
    """The last parameters of a plain loop."""
    tx = rule(rate)

    @jax.jit
    def step(params, state):
        value, grads = jax.value_and_grad(fn)(gradient_at(state, params))
        updates, state = tx.update(grads, state, params, value=value)
        return optax.apply_updates(params, updates), state

    params = {"kernel": jnp.array(start, jnp.float32)}
    state = tx.init(params)
    for _ in range(steps):
        params, state = step(params, state)
    return np.asarray(jaxsgd.eval_params(state, params)["kernel"])


@pytest.mark.parametrize("name", ["momentum", "adam", "velocity", "schedule_free_sgd"])
def test_a_path_ends_where_the_rule_ends_by_hand(name):
    rate = pictures.RATES.index(0.05)
    path = pictures.swept(RULES[name])["bowl"][rate]
    ahead = {"gradient_at": jaxsgd.look_ahead} if name == "velocity" else {}
    end = by_hand(RULES[name], 0.05, lambda params: BOWL.fn(params["kernel"]), BOWL.start, 50, **ahead)
    assert path.shape == (51, 2)
    np.testing.assert_allclose(path[0], BOWL.start)
    np.testing.assert_allclose(path[-1], end, rtol=1e-4, atol=1e-5)  # one program adds in another order than the other


@pytest.mark.parametrize("name", ["shampoo", "sm3"])
def test_a_matrix_rule_moves_the_diagonal_of_a_matrix(name):
    def loss(params):
        (a, b), (c, d) = params["kernel"]
        return BOWL.fn(jnp.stack([a, d])) + b**2 + c**2

    end = by_hand(RULES[name], 0.5, loss, np.diag(BOWL.start), 50)
    path = pictures.swept(RULES[name])["bowl"][pictures.RATES.index(0.5)]
    np.testing.assert_allclose(path[-1], np.diag(end), rtol=1e-4, atol=1e-5)
    assert "2 x 2 matrix" in pictures.explained(RULES[name])


def test_matrix_rules_are_told_by_their_state():
    seen = {name for name, rule in RULES.items() if pictures.is_matrix_rule(rule)}
    assert {"muon", "soap", "shampoo", "kron", "dion", "normuon", "sm3", "adalomo", "torch_adafactor"} <= seen
    assert not seen & {"sgd", "adam", "lion", "lars", "novograd", "prodigy", "adafactor", "schedule_free_adamw"}
    assert "large matrices" in pictures.explained(RULES["adafactor"])


def test_the_rate_is_the_best_of_the_sweep():
    index = pictures.best(RULES["sgd"], "bowl")
    # On 4 w^2 and w^2 the loop is (1 - 8 rate)^t and (1 - 2 rate)^t.
    (a, b), t = BOWL.start, np.arange(51)
    means = [np.mean(((1 - 2 * r) ** t * a) ** 2 + 4 * ((1 - 8 * r) ** t * b) ** 2) for r in pictures.RATES]
    assert index == int(np.argmin(means))


def test_no_picture_where_no_rate_lowers_the_loss(monkeypatch):
    climbs = np.linspace(BOWL.start, 2 * np.array(BOWL.start), 51)
    paths = {name: np.stack([climbs] * len(pictures.RATES)) for name in pictures.STEPS}
    monkeypatch.setattr(pictures, "swept", lambda rule: paths)
    assert pictures.best(RULES["sgd"], "bowl") is None
    paths["bowl"][3, 20:], paths["bowl"][4, -1] = np.nan, 0.0  # one is lost, one ends lower
    assert pictures.best(RULES["sgd"], "bowl") == 4


def test_a_picture_is_drawn_from_the_path_and_says_so():
    rule, index = RULES["sgd"], pictures.RATES.index(0.1)
    path = pictures.swept(rule)["bowl"][index]
    made = pictures.drawn(rule, "bowl", index)
    assert "learning rate 0.1" in made.heading and "50 steps" in made.heading
    assert f"to ({path[-1, 0]:.2f}, {path[-1, 1]:.2f})" in re.search('aria-label="([^"]*)"', made.svg)[1]
    lines = [
        np.array(re.findall(r"[-\d.]+", d), float).reshape(-1, 2) for d in re.findall(r' d="(M[^"QCz]*)"', made.svg)
    ]
    (line,) = [line for line in lines if len(line) == len(path)]
    for axis in (0, 1):  # the picture is the path, moved and scaled
        slope, offset = np.polyfit(path[:, axis], line[:, axis], 1)
        np.testing.assert_allclose(slope * path[:, axis] + offset, line[:, axis], atol=0.01)
    assert "#1b1e28" not in made.svg and "currentColor" in made.svg, "its ink follows light and dark"
    assert "xtick_1" in made.svg and "ytick_1" in made.svg, "its ticks are no pixels of one ink"


def test_a_picture_is_drawn_once(monkeypatch, tmp_path):
    monkeypatch.setattr(pictures, "CACHE", tmp_path)
    pictures._state_of_the_code.cache_clear()
    (tmp_path / "of_other_code").mkdir()
    first = pictures.pictures(RULES["sgd"])
    monkeypatch.setattr(pictures, "drawn", None)
    assert pictures.pictures(RULES["sgd"]) == first and len(first) == 2
    assert not (tmp_path / "of_other_code").exists()
    pictures._state_of_the_code.cache_clear()
