"""The examples as a user runs them."""

import importlib.util
import json
import pathlib
import re
import subprocess
import sys

import numpy as np
import pytest

import jaxsgd

EXAMPLES = pathlib.Path(__file__).parents[2] / "examples"


def load(name):
    spec = importlib.util.spec_from_file_location(name, EXAMPLES / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


digits, paths, choose_lr = load("digits"), load("paths"), load("choose_lr")
second_order, fits = load("second_order"), load("fits")
fine_tune, gan = load("fine_tune"), load("gan")


def records(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


MAIN = {
    "sgd": "0.2", "momentum": "0.03", "nesterov": "0.03", "adagrad": "0.06", "rmsprop": "0.001", "adam": "0.002",
    "adamw": "0.002", "schedule_free_adamw": "0.01", "lion": "0.001",
}  # fmt: skip
"""The rates of the README's table."""


@pytest.mark.parametrize("name", [pytest.param(name, marks=[pytest.mark.slow] * (name != "adamw")) for name in MAIN])
def test_digits_reaches_its_accuracy(name, tmp_path, capsys):
    bar = 0.975 if name == "adamw" else 0.95
    assert digits.main(["--rule", name, "--learning-rate", MAIN[name], "--out", str(tmp_path)]) >= bar
    *steps, last = records(tmp_path)
    assert len(steps) == 19 * 20 and last["test_accuracy"] >= bar and last["train_s"] > 0 and last["compile_s"] > 0
    assert steps[-1]["loss"] < 0.1 * steps[0]["loss"] and steps[-1]["step"] == 380
    assert {"loss", "accuracy", "learning_rate", "gradient_norm", "update_norm", "validation_accuracy"} <= set(
        steps[-1]
    )
    assert (tmp_path / "loss.png").stat().st_size > 10_000
    out = capsys.readouterr().out
    assert "test accuracy 0.9" in out and "compile" in out and "train" in out


@pytest.mark.parametrize(
    "name",
    [
        "muon",
        *(
            pytest.param(name, marks=pytest.mark.slow)
            for name in ("polyak_sgd", "torch_nadam", "adadelta", "prodigy", "soap")
        ),
    ],
)
def test_digits_takes_rules_of_every_kind(name, tmp_path):
    takes(name, tmp_path)


def takes(name, tmp_path):
    digits.main(["--rule", name, "--epochs", "4", "--batch-size", "256", "--out", str(tmp_path)])
    losses = [record["loss"] for record in records(tmp_path)[:-1]]
    assert len(losses) == 16 and np.isfinite(losses).all() and len(set(losses)) == 16
    assert min(losses) < losses[0], "sixteen steps and never below the start"


@pytest.mark.parametrize(("size", "steps"), [("1", 1257), ("500", 2), ("full", 1)])
def test_digits_takes_any_batch_size(size, steps, tmp_path):
    arguments = [
        "--rule",
        "sgd",
        "--learning-rate",
        "0.01",
        "--batch-size",
        size,
        "--epochs",
        "1",
        "--out",
        str(tmp_path),
    ]
    digits.main(arguments)
    assert len(records(tmp_path)) == steps + 1


@pytest.mark.slow
def test_digits_schedules_differ_and_seeds_repeat(tmp_path):
    def curve(*arguments):
        digits.main(["--epochs", "1", "--out", str(tmp_path), *arguments])
        return records(tmp_path)[:-1]

    rates = {s: [r["learning_rate"] for r in curve("--schedule", s)] for s in digits.SCHEDULES}
    assert len({tuple(rate) for rate in rates.values()}) == len(rates)
    assert rates["constant"] == [np.float32(jaxsgd.adamw.usual_rate)] * 19
    losses = [[r["loss"] for r in curve("--seed", seed)] for seed in ("1", "1", "2")]
    assert losses[0] == losses[1] != losses[2]


def test_the_split_has_no_overlap():
    data = digits.load()
    images = [x.tobytes() for part in data.values() for x in part[0]]
    assert [len(labels) for _, labels in data.values()] == [1257, 180, 360]
    assert sum(len(labels) for _, labels in data.values()) == 1797 >= len(set(images)) > 1790


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--rule", "adamm"], "unknown rule 'adamm'; did you mean 'adam'"),
        (["--learning-rate", "-1"], "adamw: learning_rate=-1.0: it must be 0 or more"),
        (["--learning-rate", "nan"], "learning_rate=nan: a finite number is needed"),
        (["--learning-rate", "x"], "argument --learning-rate: invalid float value: 'x'"),
        (["--batch-size", "0"], "--batch-size 0: a number from 1 to 1257 is needed, or 'full'"),
        (["--batch-size", "5000"], "--batch-size 5000: a number from 1 to 1257"),
        (["--batch-size", "half"], "--batch-size half"),
        (["--epochs", "0"], "--epochs 0: at least 1 is needed"),
        (["--schedule", "cosin"], "invalid choice: 'cosin'"),
        (["--out", "/dev/null/x"], "/dev/null/x"),
    ],
)
def test_digits_refuses_in_one_line(arguments, message, capsys):
    with pytest.raises(SystemExit) as stop:
        digits.main(arguments)
    error = capsys.readouterr().err
    assert stop.value.code == 2 and message in error and error.count("\n") == 1


def test_digits_from_the_command_line():
    done = subprocess.run(
        [sys.executable, str(EXAMPLES / "digits.py"), "--rule", "nope"], capture_output=True, text=True, check=False
    )
    assert done.returncode == 2 and done.stdout == "" and done.stderr.count("\n") == 1


def test_paths_draws_and_refuses(tmp_path, capsys):
    out = paths.main(["--landscape", "saddle", "--rules", "sgd=0.1,adam=0.1", "--out", str(tmp_path / "a" / "p.png")])
    assert out.stat().st_size > 10_000
    for rules, message in (("adamm=1", "did you mean 'adam'"), ("adam=x", "'adam=x' is not rule=learning_rate")):
        with pytest.raises(SystemExit) as stop:
            paths.main(["--rules", rules])
        assert stop.value.code == 2 and message in capsys.readouterr().err


def test_choose_lr_shuffles_every_epoch():
    """Each epoch has all digits but a rest, in an order of its own."""
    data, _ = choose_lr.batches(64, epochs=3)
    epochs = [np.concatenate([batch["label"] for batch in data[i : i + 22]]) for i in (0, 22, 44)]
    assert len(data) == 66
    for one, other in ((0, 1), (0, 2), (1, 2)):
        assert 0.05 < (epochs[one] == epochs[other]).mean() < 0.2, "as often equal as by chance"


@pytest.mark.slow
@pytest.mark.parametrize("rule", [*MAIN, "muon"])
def test_choose_lr_does_not_contradict_itself(rule, tmp_path, capsys):
    """Probe, diagnosis and sweep agree."""
    rate = choose_lr.main(["--rule", rule, "--steps", "200", "--out", str(tmp_path)])
    said = capsys.readouterr().out
    probed, training, swept = (part.split("\n== ")[0] for part in (
        said.split("== Probe")[1], said.split("== A training")[1], said.split("== A sweep")[1]
    ))  # fmt: skip
    found = re.search(r"learning rate (\S+), range (\S+) to (\S+); confidence (\w+)", probed)
    assert found and rate is not None
    suggested, low, high = (float(x.replace(",", "")) for x in found.groups()[:3])
    assert suggested == pytest.approx(rate, rel=6e-3) and low <= suggested <= high
    rows = re.findall(r"^\W*([\d.e-]+) +\d+ +\S+ +\S+ +(good|too low|too high|oscillating|diverged)", probed, re.M)
    assert len(rows) >= 4
    inside = {verdict for x, verdict in rows if low <= float(x) <= high}
    assert inside <= {"good"}, probed
    assert found[4] != "high" or "good" in dict(rows).values()

    best = float(re.search(r"learning_rate (\S+) is best", swept)[1])
    advice = training.split("Next:")[1].split("measure")[0]
    if "lower the learning rate" in advice or "rate 2-3x lower" in advice:
        assert best <= 1.01 * rate, training + swept
    if "raise the learning rate" in advice or "higher learning rate" in advice:
        assert best >= 0.99 * rate, training + swept

    share = float(said.split("the suggestion reaches ")[1].split("%")[0])
    assert share > 90
    assert ("not treat" in said or "muon" in said.split("== Sharpness")[1]) if rule == "muon" else "stable" in said
    wanted = {"probe.png", "curve.png", "sharpness.png", "sweep.png"}
    assert wanted <= {file.name for file in tmp_path.iterdir()}


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--rule", "adamm"], "unknown rule 'adamm'"),
        (["--steps", "50"], "--steps 50: at least 120"),
        (["--batch-size", "0"], "--batch-size 0: a number from 1"),
    ],
)
def test_choose_lr_says_what_is_wrong(arguments, words, capsys):
    with pytest.raises(SystemExit) as end:
        choose_lr.main(arguments)
    said = capsys.readouterr().err
    assert end.value.code == 2 and words in said and said.count("\n") == 1


@pytest.mark.slow
def test_second_order_reaches_97_percent_on_digits(capsys):
    rows = second_order.main([])
    for name in ("newton_cg", "gauss_newton"):
        assert rows[name]["accuracy"] >= 0.97 and rows[name]["reached"][0] < rows["adamw"]["reached"][0] / 5
    said = capsys.readouterr().out.splitlines()
    assert len(said) == 1 + len(second_order.RUNS) and "seconds to 97%" in said[0]
    with pytest.raises(SystemExit):
        second_order.main(["--shorten", "0"])


@pytest.mark.slow
def test_fits_end_at_the_truth_and_the_penalty_improves(capsys):
    results, errors = fits.main(["--count", "300", "--steps", "8"])
    assert bool(results.success.all()) and results.value.shape == (300,)
    assert errors[-1] < errors[0]
    slope, difference = capsys.readouterr().out.split("0.135: ")[1].split("\n")[0].split("; by differences ")
    assert float(slope) == pytest.approx(float(difference), rel=1e-5)


def test_fine_tune_adapts_a_checkpoints_weights(tmp_path, capsys):
    """With so few steps 20% is chance; the frozen body keeps no state, and the adapters are all that is new."""
    scores = fine_tune.main(["--steps", "60", "--out", str(tmp_path)])
    assert scores.keys() == fine_tune.WAYS.keys() and min(scores.values()) > 0.6
    said = capsys.readouterr().out
    rows = {line[:14].strip(): int(line.split()[-3].replace(",", "")) for line in said.splitlines()[3:]}
    assert rows == {"new head": 325, "LoRA": 325 + 2 * 2 * 64 * 4, "all weights": 8645, "from scratch": 8645}
    assert "34,580 bytes of params are read" in said and (tmp_path / "60").is_dir()
    with pytest.raises(SystemExit):
        fine_tune.main(["--images", "3"])
    assert "--images 3: a number from 5" in capsys.readouterr().err


def test_gan_trains_two_networks_in_one_step(tmp_path, capsys):
    """300 steps halve the untrained generator's distance of 3.3 to real images, and lose no digit."""
    scores = gan.main(["--steps", "300", "--out", str(tmp_path)])
    assert scores["distance"] < 1.9 and scores["classes"] >= 8
    assert (tmp_path / "samples.png").stat().st_size > 5_000
    assert "share judged right" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        gan.main(["--steps", "0"])
    assert "--steps 0: a number from 1 is needed" in capsys.readouterr().err
