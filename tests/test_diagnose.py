"""`jaxsgd.diagnosis.diagnose`: real curves, what does not change a verdict, every shape of history, layers."""

import pathlib
import sys

import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import jaxsgd
from jaxsgd.diagnosis import layers, loss_curve
from jaxsgd.diagnosis.diagnose import VERDICTS, Diagnosis, diagnose

sys.path.insert(0, str(pathlib.Path(__file__).parent.parent / "benchmarks"))
import verdict_curves  # noqa: E402

CURVES = verdict_curves.load()
RNG = np.random.default_rng(0)


def noisy(y, sigma=0.02, seed=0):
    return y + sigma * np.random.default_rng(seed).standard_normal(len(y))


T = np.arange(200)
SHAPES = {
    "good": 0.1 + 2 * np.exp(-T / 30),
    "too slow": 2.3 - 0.002 * T,
    "stuck": np.full(200, 2.3),
    "diverged": np.exp(0.05 * T),
    "oscillating": 0.1 + 2 * np.exp(-T / 40) * (1 + 0.6 * np.cos(2 * np.pi * T / 20)),
    "spikes": 0.1 + 2 * np.exp(-T / 30) + 3.0 * np.isin(T, [88, 152]),
}


@pytest.mark.parametrize("half, bar", [("tuned", 0.9), ("held out", 0.9), ("all", 0.9)])
@pytest.mark.parametrize("told", [False, True], ids=["losses", "best_known"])
def test_real_curves(half, bar, told):
    rows = verdict_curves.judged(CURVES, told)
    rows = [(curve, said) for curve, said in rows if half in ("all", verdict_curves.half_of(curve))]
    right = sum(curve.label == said.verdict for curve, said in rows)
    assert right >= bar * len(rows), [(c.task, c.setting, c.label, d.verdict) for c, d in rows if c.label != d.verdict]


def test_there_are_enough_curves():
    labels = {curve.label for curve in CURVES}
    assert len(CURVES) >= 40 and labels == set(VERDICTS) - {"too short"}
    assert verdict_curves.CURVES.stat().st_size < 400_000


def test_no_verdict_without_a_number():
    for _, said in verdict_curves.judged(CURVES[::4], False):
        assert isinstance(said, Diagnosis) and said.verdict == said.findings[0].verdict
        for finding in said.findings:
            assert finding.numbers and finding.text and finding.advice
            assert finding.verdict in {*VERDICTS, *layers.VERDICTS}
            assert any(c.isdigit() for c in finding.text), finding.text


@pytest.mark.parametrize("name", SHAPES)
def test_plain_shapes(name):
    assert diagnose(SHAPES[name]).verdict == name
    assert diagnose(noisy(SHAPES[name])).verdict == name
    assert diagnose(SHAPES[name][::4]).verdict == name  # 50 points


@settings(max_examples=60, deadline=None, derandomize=True)
@given(st.integers(0, len(CURVES) - 1), st.floats(-2, 2), st.floats(-3, 3))
def test_a_factor_and_a_constant_change_nothing(i, power, shift):
    curve = CURVES[i]
    loss = curve.loss.astype(np.float64)
    scale = 10.0**power
    spread = np.ptp(loss[np.isfinite(loss)])
    plain = diagnose(loss, best_known=curve.best_known)
    moved = diagnose(scale * (loss + shift * spread), best_known=scale * (curve.best_known + shift * spread))
    assert moved.verdict == plain.verdict
    assert [f.verdict for f in moved.findings] == [f.verdict for f in plain.findings]


def test_negative_losses():
    assert diagnose(noisy(SHAPES["good"] - 500)).verdict == "good"


@pytest.mark.parametrize("period", [2, 7, 25])
def test_the_period_of_an_oscillation(period):
    y = 1 + np.exp(-T / 60) + 0.2 * np.cos(2 * np.pi * T / period)
    found = next(f for f in diagnose(noisy(y)).findings if f.verdict == "oscillating")
    assert abs(found.numbers["period"] - period) < 0.1 * period
    assert abs(found.numbers["swing"] - 0.4) < 0.1


@pytest.mark.parametrize("seed", range(20))
def test_noise_is_no_oscillation(seed):
    for n in (20, 100, 300):
        y = np.random.default_rng(seed).standard_normal(n)
        assert diagnose(y).verdict == "stuck"
        assert diagnose(10 * np.exp(-np.arange(n) / n * 8) + 0.3 * y).verdict == "good"


def test_the_rhythm_of_an_epoch_is_no_oscillation():
    pattern = np.array([0.3, -0.3, 0.1, -0.1])
    y = noisy(0.5 + 2 * np.exp(-T / 30) + np.resize(pattern, 200), 0.01)
    assert diagnose(y).verdict == "oscillating"
    said = diagnose(y, steps_per_epoch=4)
    assert said.verdict == "good" and said.findings[-1].verdict == "epoch pattern"
    assert said.findings[-1].numbers["period"] == 4


def test_spikes_are_counted_with_their_gradient():
    y = noisy(SHAPES["spikes"])
    norms = np.where(np.isin(T, [88, 152]), 50.0, 1.0)
    said = diagnose({"loss": y, "gradient_norm": norms}, learning_rate=0.1)
    numbers = said.findings[0].numbers
    assert said.verdict == "spikes" and numbers["count"] == 2 and numbers["step"] in (89, 153)
    assert abs(numbers["height"] - 3) < 0.3 and numbers["gradient_norm_over_median"] == 50
    assert "clip" in said.advice


def test_best_known_tells_a_plateau_from_a_finished_training():
    y = noisy(SHAPES["good"])
    assert diagnose(y).verdict == "good" and "converged" in diagnose(y).findings[0].text
    assert diagnose(y, best_known=0.1).verdict == "good"
    said = diagnose(y, best_known=-3.0)
    assert said.verdict == "plateau" and said.findings[0].numbers["gap"] > 0.5


def test_overfitting_by_loss_and_by_accuracy():
    train, held = SHAPES["good"], 0.5 + 2 * np.exp(-T / 30) + 0.005 * T
    said = diagnose(noisy(train), validation=noisy(held)[::10])
    assert said.verdict == "overfitting" and 60 < said.findings[0].numbers["best_step"] < 120
    records = [{"step": i + 1, "loss": x} for i, x in enumerate(train)]
    for record in records[9::10]:
        record["validation_accuracy"] = 1 - held[record["step"] - 1] / 4
    said = diagnose(records)
    assert said.verdict == "overfitting" and 0 < said.findings[0].numbers["best"] < 1
    assert diagnose(noisy(train), validation=noisy(train + 0.2)[::10]).verdict == "good"


def test_histories_of_every_kind():
    y = SHAPES["good"]
    records = [{"step": i + 1, "loss": float(x), "learning_rate": 0.1} for i, x in enumerate(y)]
    same = [diagnose(h) for h in (y, list(y), jnp.asarray(y), records, {"loss": y}, {"loss": list(y), "step": T + 1})]
    assert {said.verdict for said in same} == {"good"}
    resumed = diagnose(records[:120] + records[80:])
    assert resumed.verdict == "good" and "40 of 240" in str(resumed) and resumed.numbers["points"] == 200
    shuffled = diagnose([records[i] for i in np.random.default_rng(0).permutation(200)])
    assert shuffled.verdict == "good"
    assert diagnose({"cost": y}, loss="cost").verdict == "good"


@pytest.mark.parametrize(
    "history, error, words",
    [
        ([], ValueError, "at least one loss"),
        (3.0, TypeError, "losses, records or a dict"),
        ("loss", TypeError, "losses, records or a dict"),
        ({"accuracy": [1.0]}, ValueError, "a loss is needed"),
        ([{"step": 1}], ValueError, "a loss is needed"),
        ({"loss": [1.0, 2.0], "step": [1]}, ValueError, "1 steps but 2 losses"),
        (np.ones((3, 3)), ValueError, "in one row"),
        (["a", "b"], TypeError, "numbers are needed"),
    ],
)
def test_what_is_no_history(history, error, words):
    with pytest.raises(error, match=words):
        diagnose(history)


def test_bad_arguments():
    with pytest.raises(ValueError, match="best_known=nan"):
        diagnose([1.0], best_known=float("nan"))
    with pytest.raises(ValueError, match="steps_per_epoch=0"):
        diagnose([1.0], steps_per_epoch=0)


def test_what_is_not_finite():
    y = SHAPES["good"].copy()
    y[150:] = np.nan
    said = diagnose(y, learning_rate=0.1)
    assert said.verdict == "diverged" and said.findings[0].numbers["first_not_finite"] == 151
    assert "0.01" in said.advice
    y = SHAPES["good"].copy()
    y[[50, 90]] = np.inf  # came back: a guard skipped those steps
    said = diagnose(y)
    assert said.verdict == "good" and said.findings[-1].numbers == {"steps": 2}
    assert diagnose([np.nan]).verdict == diagnose([np.nan] * 5).verdict == "diverged"


@pytest.mark.parametrize("n", range(1, 12))
def test_few_points(n):
    said = diagnose(SHAPES["good"][:n])
    assert said.verdict == ("too short" if n < 5 else "too slow") and said.findings[0].numbers
    assert str(said)


def test_layers():
    n = 50
    ones = np.ones(n)
    columns = {"loss": SHAPES["good"][:n]} | {f"gradient_norm/{name}": ones for name in "abcd"}
    columns |= {f"update_ratio/{name}": 1e-3 * ones for name in "abcd"}
    assert not layers.examine(columns)
    zero_start = 1e-3 * ones * (T[:n] > 0)
    assert not layers.examine(columns | {"update_ratio/a": zero_start})
    changed = columns | {
        "gradient_norm/a": 0 * ones, "gradient_norm/b": 1.2 ** T[:n], "update_ratio/b": 0.5 * ones,
        "update_ratio/c": 1e-7 * ones, "update_ratio/d": 0 * ones,
    }  # fmt: skip
    found = {row[0]: row[2] for row in layers.examine(changed)}
    assert {name: list(numbers) for name, numbers in found.items()} == {
        "dead layers": ["a"], "frozen layers": ["d"], "exploding layers": ["b"], "ratio too large": ["b"],
        "ratio too small": ["c"],
    }  # fmt: skip
    assert {f.verdict for f in diagnose(changed).findings} >= set(found)


def test_a_dead_layer_of_a_real_training():
    """A hidden layer behind biases of -10, through `jaxsgd.monitor` and `jaxsgd.Recorder`."""
    params = {
        "hidden": {"w": jnp.ones((3, 4)), "b": jnp.full(4, -10.0)},
        "head": jnp.zeros((4, 1)),
        "bias": jnp.zeros(1),
    }

    def loss_fn(p, batch, key):
        hidden = jnp.maximum(batch @ p["hidden"]["w"] + p["hidden"]["b"], 0)
        return ((hidden @ p["head"] + p["bias"] - 1.0) ** 2).mean()

    tx = jaxsgd.monitor(optax.sgd(0.1))
    state, recorder = jaxsgd.TrainState.create(params, tx), jaxsgd.Recorder()
    step = jaxsgd.make_step(loss_fn, tx)
    batch = np.random.default_rng(0).standard_normal((16, 3)).astype(np.float32)
    for _ in range(60):
        state, metrics = step(state, batch)
        recorder.add({**metrics, **jaxsgd.transforms.monitor_report(state.opt_state)})
    recorder.flush()
    said = diagnose(recorder.records)
    assert said.verdict == "stuck" and "get no gradient" in str(said)


def test_measurements():
    y = np.array([3.0, 1.0, 2.0, 0.0])
    assert loss_curve.monotone(y).tolist() == [3.0, 1.5, 1.5, 0.0]
    assert loss_curve.smooth(np.arange(9.0))[:-1].tolist() == list(range(8))
    assert 0.9 < loss_curve.noise(RNG.standard_normal(4000)) < 1.1
    slope, error = loss_curve.trend(0.1 * T + RNG.standard_normal(200))
    assert abs(slope - 0.1) < 4 * error < 0.02
    assert loss_curve.autocorrelation(np.tile([1.0, -1.0], 20), 2).round(6).tolist() == [1, -1, 1]
    (spike,) = loss_curve.spikes(np.where(T == 60, 5.0, SHAPES["good"]))
    assert spike.index == 60 and spike.width == 1
    assert loss_curve.spikes(SHAPES["good"]) == []
    assert abs(loss_curve.shape(SHAPES["too slow"]).late_share - 0.5) < 0.05


def test_the_page_is_up_to_date():
    assert verdict_curves.page() == verdict_curves.PAGE.read_text()
