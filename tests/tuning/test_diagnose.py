"""`jaxsgd.diagnosis.diagnose`: real curves, what does not change a verdict, every shape of history, layers."""

import jax.numpy as jnp
import numpy as np
import optax
import pytest
import verdict_curves
from hypothesis import given, settings
from hypothesis import strategies as st

import jaxsgd
from jaxsgd.diagnosis import layers, loss_curve
from jaxsgd.diagnosis.diagnose import Diagnosis, diagnose
from jaxsgd.diagnosis.verdict import Verdict

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
    "oscillating": 0.1 + 2 * np.exp(-T / 40) * (1 + 0.6 * np.cos(2 * np.pi * T / 21)),
    "spikes": 0.1 + 2 * np.exp(-T / 30) + 3.0 * np.isin(T, [88, 152]),
}


@pytest.mark.parametrize("half, bar", [("tuned", 0.92), ("held out", 0.92), ("all", 0.93)])
@pytest.mark.parametrize("told", [False, True], ids=["losses", "best_known"])
def test_real_curves(half, bar, told):
    rows = verdict_curves.judged(CURVES, told)
    rows = [(curve, said) for curve, said in rows if half in ("all", verdict_curves.half_of(curve))]
    right = sum(curve.label == said.verdict for curve, said in rows)
    assert right >= bar * len(rows), [(c.task, c.setting, c.label, d.verdict) for c, d in rows if c.label != d.verdict]


def test_there_are_enough_curves():
    labels = {curve.label for curve in CURVES}
    assert len(CURVES) >= 40 and labels == set(Verdict.of_curves()) - {"too short"}
    assert verdict_curves.CURVES.stat().st_size < 400_000


def test_no_verdict_without_a_number():
    for _, said in verdict_curves.judged(CURVES[::4], False):
        assert isinstance(said, Diagnosis) and said.verdict == said.findings[0].verdict
        for finding in said.findings:
            assert finding.numbers and finding.text and finding.advice
            assert isinstance(finding.verdict, Verdict) and finding.verdict.sentence
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


@pytest.mark.parametrize("period", [2, 5.3, 7.3, 25])
def test_the_period_of_an_oscillation(period):
    y = 1 + np.exp(-T / 60) + 0.2 * np.cos(2 * np.pi * T / period)
    said = diagnose(noisy(y), steps_per_epoch=1 if period == 2 else None)  # else it may be an epoch of two batches
    found = next(f for f in said.findings if f.verdict == "oscillating")
    assert abs(found.numbers["period"] - period) < 0.1 * period
    assert abs(found.numbers["swing"] - 0.4) < 0.1


@pytest.mark.parametrize("seed", range(20))
def test_noise_is_no_oscillation(seed):
    for n in (20, 100, 300):
        y = np.random.default_rng(seed).standard_normal(n)
        assert diagnose(y).verdict == "stuck"
        assert diagnose(10 * np.exp(-np.arange(n) / n * 8) + 0.3 * y).verdict == "good"


def test_batches_in_a_fixed_order_are_no_oscillation():
    """Real trainings whose loss repeats each epoch, because the batches do."""
    ordered = [c for c in CURVES if c.setting.startswith(verdict_curves.ORDERED)]
    assert len(ordered) >= 20
    asked = 0
    for curve in ordered:
        said = diagnose(curve.loss)
        assert all(f.verdict != "oscillating" for f in said.findings), (curve.task, curve.setting, str(said))
        asked += any(f.verdict == "epoch pattern" for f in said.findings)
    assert asked > len(ordered) / 2


@pytest.mark.parametrize("epoch", [2, 3, 5, 11, 40])
@pytest.mark.parametrize("seed", range(4))
def test_the_rhythm_of_an_epoch_is_no_oscillation(epoch, seed):
    """Told or not, whatever the batches are; the question names the epoch."""
    rng = np.random.default_rng(seed)
    pattern = 0.3 * np.resize([1.0, -0.5, -0.8], epoch) * rng.uniform(0.8, 1.2, epoch)
    t = np.arange(max(200, 8 * epoch))
    y = noisy(0.5 + 2 * np.exp(-t / 30) + np.resize(rng.permutation(pattern), len(t)), 0.01)
    said = diagnose(y)
    assert said.verdict == "good" and f"a pattern of {epoch} steps: is that your epoch" in said.why[-1], str(said)
    said = diagnose(y, steps_per_epoch=epoch)
    assert said.verdict == "good" and said.findings[-1].verdict == "epoch pattern"
    assert said.findings[-1].numbers["period"] == epoch and "shuffle each epoch" in said.next[-1]
    if epoch < 5:  # all data in each step: no order can make it
        assert diagnose(y, steps_per_epoch=1).verdict == "oscillating"


@pytest.mark.parametrize("spacing", [2, 10])
def test_steps_are_counted_where_not_all_are_recorded(spacing):
    """Of batches in a fixed order, 22 an epoch, every second or tenth loss: the pattern is of 22 or 110 steps."""
    rng, t = np.random.default_rng(0), np.arange(2400)
    y = noisy(0.5 + 2 * np.exp(-t / 300) + np.resize(0.3 * rng.standard_normal(22), 2400), 0.01)
    records = [{"step": int(i) + 1, "loss": float(y[i])} for i in t[::spacing]]
    length = {2: 22, 10: 110}[spacing]
    assert f"a pattern of {length} steps" in diagnose(records).why[-1]
    said = diagnose(records, steps_per_epoch=22)
    assert said.verdict == "good" and said.findings[-1].numbers["period"] == length
    ring = noisy(0.5 + 2 * np.exp(-t / 300) + 0.3 * np.sin(2 * np.pi * t / 175), 0.01)
    said = diagnose([{"step": int(i) + 1, "loss": float(ring[i])} for i in t[::spacing]], steps_per_epoch=22)
    assert said.verdict == "oscillating" and abs(said.findings[0].numbers["period"] - 175) < 3


def test_a_ring_in_batches_of_a_fixed_order_is_seen():
    """A period that is no multiple of the epoch, and a sine of a whole period, which is asked about."""
    pattern = np.array([0.3, -0.3, 0.1, -0.2, 0.1])
    calm = 0.5 + 2 * np.exp(-T / 30)
    y = noisy(calm + np.resize(0.3 * pattern, 200) + 0.3 * np.sin(2 * np.pi * T / 17.3), 0.01)
    assert diagnose(y, steps_per_epoch=5).verdict == "oscillating"
    said = diagnose(noisy(calm + 0.3 * np.sin(2 * np.pi * T / 20)))
    assert said.verdict == "oscillating" and "is that your epoch?" in said.advice
    assert "epoch" not in diagnose(noisy(calm + 0.3 * np.sin(2 * np.pi * T / 20)), steps_per_epoch=1).advice


def test_advice_points_to_the_best_rate():
    """No curve whose rate the sweep knows is sent away from the best one."""
    for curve in CURVES:
        if not curve.setting.startswith(("rate ", verdict_curves.ORDERED)) or "decays" in curve.setting:
            continue
        ratio, said = float(curve.setting.split("rate ")[1].split()[0]), diagnose(curve.loss)
        away = verdict_curves.direction(said) == (1 if ratio > 2 else -1 if ratio < 0.5 else 2)
        known = curve.task == "characters adamw 32" and ratio == 256  # of the page: called too slow
        assert not away or known, (curve.task, curve.setting, str(said))


def test_advice_names_only_what_the_rule_has():
    ring = 0.1 + 2 * np.exp(-T / 40) * (1 + 0.6 * np.cos(2 * np.pi * T / 17.3))
    assert "momentum" not in diagnose(ring, rule="sgd").advice
    assert "lower momentum from 0.95 (to 0.9)" in diagnose(ring, tx=jaxsgd.momentum(0.1, momentum=0.95)).advice
    assert (
        "lower b1 from 0.9" in diagnose(ring, tx=jaxsgd.guard(optax.chain(optax.clip(1.0), jaxsgd.adamw(3e-3)))).advice
    )
    assert "(to 0.001)" in diagnose(ring, tx=jaxsgd.adamw(3e-3)).advice  # the rate of tx itself
    assert "(to 0.1)" in diagnose(ring, tx=jaxsgd.adamw(3e-3), learning_rate=0.3).advice
    assert "if the rule has one" in diagnose(ring, tx=optax.sgd(0.1)).advice  # nothing is known of it
    slow = SHAPES["too slow"]
    assert "set momentum=0.9" in diagnose(slow, rule=jaxsgd.sgd).advice
    assert "momentum" not in diagnose(slow, rule=jaxsgd.momentum).advice + diagnose(slow, rule="lion").advice
    for wrong, error in (({"tx": 3}, TypeError), ({"rule": 3}, TypeError), ({"rule": "sdg"}, KeyError)):
        with pytest.raises(error, match="3|sdg"):
            diagnose(slow, **wrong)
    with pytest.raises(TypeError, match="Use one of them"):
        diagnose(slow, tx=jaxsgd.sgd(0.1), rule="sgd")


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("height", [10, 26_140])
def test_a_loss_that_ends_far_above_its_start_has_diverged(height, seed):
    """However it swings up there, and wherever zero is."""
    rng = np.random.default_rng(seed)
    y = 2.34 + (height - 2.34) * (1 - np.exp(-T / 20)) * rng.lognormal(0, 0.8, 200)
    y[0] = 2.34
    for shift in (0, -1000, 50_000):
        said = diagnose(y + shift)
        assert said.verdict == "diverged", str(said)


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
    assert resumed.verdict == "good" and "40 of 240" in resumed.why[-1] and resumed.numbers["points"] == 200
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
    assert "and fell to" in said.findings[0].text and "rose" not in said.findings[0].text
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
    assert said.verdict == "stuck" and "get no gradient" in said.summary


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


def test_what_is_said_of_the_end_is_true_of_it():
    """A step down may be late and level for long; what rises is not level; nothing that is left out is unsaid."""
    t, noise = np.arange(300), 0.01 * np.random.default_rng(0).standard_normal(300)
    dropped = jaxsgd.diagnose(np.where(t < 200, 1 + 1.3 * np.exp(-t / 20), 0.4) + noise)
    assert dropped.verdict == "good" and "is level from step 2" in dropped.summary
    risen = jaxsgd.diagnose(np.where(t < 60, 2.3 - 2.2 * t / 60, 0.1 + 0.88 * (t - 60) / 240) + noise)
    assert "has risen by 0.7" in risen.summary or "has risen by 0.8" in risen.summary, risen.summary
    assert "level" not in risen.summary and "lower" in str(risen.next)
    lost = np.r_[1.5 * np.exp(-np.arange(15) / 3) + 0.3, [np.nan] * 15]
    said = jaxsgd.diagnose(2.3 * np.exp(-t / 30) + 0.1 + noise, validation=lost).text()
    assert "15 of 30 values are not finite" in " ".join(said.split())


@pytest.mark.parametrize("rate", [-1.0, 0, float("nan"), "a"])
def test_a_rate_that_is_none_is_refused(rate):
    with pytest.raises(ValueError, match="learning_rate=.*a number above 0 is needed"):
        jaxsgd.diagnose(np.linspace(2, 1, 50), learning_rate=rate)


def test_a_clear_fall_in_noisy_batches_is_not_stuck():
    """Single losses of four examples say little at first; a tenth of them says enough."""
    rng = np.random.default_rng(0)
    inputs = rng.normal(size=(2000, 20))
    targets = inputs @ rng.normal(size=20) + 2 * rng.normal(size=2000)
    said = []
    for seed in range(20):
        draws, w, losses = np.random.default_rng(seed), np.zeros(20), []
        for _ in range(300):
            i = draws.integers(0, 2000, 8)
            error = inputs[i] @ w - targets[i]
            losses.append(np.mean(error**2))
            w -= 0.02 * 2 * inputs[i].T @ error / 8
        said.append(str(jaxsgd.diagnose(losses, rule="sgd", learning_rate=0.02).verdict))
    assert said.count("stuck") <= 1 and said.count("good") >= 17, said
