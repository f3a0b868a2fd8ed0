"""The language model example as a user runs it."""

import json
import os
import pathlib
import signal
import struct
import subprocess
import sys

import char_lm
import char_model
import jax
import numpy as np
import pytest

EXAMPLES = pathlib.Path(__file__).parents[2] / "examples"

pytestmark = pytest.mark.xdist_group("char_lm")

TINY = ["--scale", "tiny", "--rule", "adamw", "--sample-length", "40"]


def run(out, *arguments):
    """The records of the steps, the other records, and the validation loss."""
    loss = char_lm.main([*TINY, "--out", str(out), *map(str, arguments)])
    records = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    steps = [r for r in records if "loss" in r]
    assert [r["step"] for r in steps] == list(range(1, len(steps) + 1))
    return steps, [r for r in records if "loss" not in r], loss


@pytest.fixture(scope="module")
def single(tmp_path_factory):
    return run(tmp_path_factory.mktemp("single"), "--steps", 20)


def test_it_learns_and_writes_what_it_says(tmp_path, capsys):
    arguments = ["--steps", 120, "--sample-every", 50, "--guard", "--nan-rate", 0.1, "--ema", 0.9, "--tensorboard"]
    steps, others, loss = run(tmp_path, *arguments)
    finite = [r["loss"] for r in steps if np.isfinite(r["loss"])]
    # The text's characters have 3.3 nats on their own; half a nat below that is more than their counts.
    assert finite[0] > 4 and np.mean(finite[-10:]) < 2.9 and loss < 2.8
    bad = 120 - len(finite)
    assert bad == sum(np.isnan(char_model.batch_at(i, TEXT.train, CONFIG, 0, 0.1)["weight"]).all() for i in range(120))
    assert 4 < bad < 24 and steps[-1]["skipped"] == bad
    first = next(r for r in steps if np.isfinite(r["loss"]))
    assert first["bits_per_char"] == pytest.approx(first["loss"] / np.log(2), rel=1e-6)
    assert {"learning_rate", "gradient_norm", "update_norm"} <= set(first)

    assert [r.get("step") for r in others] == [50, 100, None] and others[-1]["train_s"] > 0
    assert others[-1]["validation_loss"] == loss < others[1]["validation_loss"] < others[0]["validation_loss"]
    samples = [r["sample"] for r in others]
    assert all(len(s) == 40 and set(s) <= set(TEXT.characters) for s in samples) and len(set(samples)) == 3
    written = (tmp_path / "samples.txt").read_text()
    assert all(sample in written for sample in samples)
    assert (tmp_path / "loss.png").stat().st_size > 10_000
    out = capsys.readouterr().out
    assert f"good: {bad} steps skipped" in out and f"validation loss {loss:.4f} nats" in out

    logged = events(tmp_path / "tensorboard")
    assert logged["loss"] == {r["step"]: np.float32(r["loss"]) for r in steps if np.isfinite(r["loss"])}
    assert set(logged["validation_loss"]) == {50, 100} and samples[0].encode() in logged["sample/text_summary"][50]


def events(folder):
    """TensorBoard's records, read without its library's reader: ``{tag: {step: value}}``."""
    from tensorboardX.proto.event_pb2 import Event

    (file,) = folder.iterdir()
    data, at, out = file.read_bytes(), 0, {}
    while at < len(data):
        (length,) = struct.unpack("<Q", data[at : at + 8])
        event = Event.FromString(data[at + 12 : at + 12 + length])
        for value in event.summary.value:
            text = value.tensor.string_val
            out.setdefault(value.tag, {})[event.step] = text[0] if text else np.float32(value.simple_value)
        at += 16 + length
    return out


TEXT = char_model.corpus()
CONFIG = char_model.PRESETS["tiny"]

MESHES = {
    "zero1": ["--rule", "adamw", "--mesh", "data=4,model=2", "--zero1", "--accumulate", 2, "--devices", 8],
    "fsdp": ["--rule", "adamw", "--mesh", "model=2,data=2", "--fsdp", "--remat"],
}


@pytest.mark.parametrize("kind", ["zero1", pytest.param("fsdp", marks=pytest.mark.slow)])
def test_a_mesh_changes_nothing_but_where_it_runs(kind, single, tmp_path):
    steps, _, loss = run(tmp_path, "--steps", 20, *MESHES[kind])
    # Sums over devices and microbatches are taken in another order, in float32.
    np.testing.assert_allclose([r["loss"] for r in steps], [r["loss"] for r in single[0]], rtol=1e-4)
    assert loss == pytest.approx(single[2], rel=1e-4)


def test_the_mesh_splits_what_it_says():
    mesh = jax.sharding.Mesh(np.reshape(jax.devices(), (4, 2)), ("data", "model"))
    P = jax.sharding.PartitionSpec
    leaf = jax.ShapeDtypeStruct((2, 32, 128), np.float32)
    heads = jax.ShapeDtypeStruct((2, 32, 2, 16), np.float32)
    tensor, whole = char_model.split(mesh, False), char_model.split(mesh, True)
    assert tensor("blocks/up/kernel", leaf) == P(None, None, "model")
    assert tensor("blocks/down/kernel", jax.ShapeDtypeStruct((2, 128, 32), np.float32)) == P(None, "model", None)
    assert tensor("blocks/query/kernel", heads) == P(None, None, "model", None)
    assert whole("blocks/query/kernel", heads) == P(None, "data", "model", None)
    assert whole("blocks/up/kernel", leaf) == P(None, "data", "model")
    assert whole("embed/embedding", jax.ShapeDtypeStruct((128, 32), np.float32)) == P("model", "data")
    assert whole("blocks/mlp_norm/scale", jax.ShapeDtypeStruct((4, 32), np.float32)) == P(None, None)


@pytest.mark.slow
def test_a_stopped_run_goes_on_as_if_it_had_not_been(tmp_path, monkeypatch):
    arguments = ["--steps", 20, "--dropout", 0.1, "--sample-every", 5, "--checkpoint-every", 6]
    unbroken = run(tmp_path / "a", *arguments)
    arguments += ["--checkpoint", tmp_path / "checkpoints"]
    seen, draw = [], char_lm.batch_at

    def stopping(position, *rest):
        seen.append(position)
        if position == 12 and seen.count(12) == 1:
            os.kill(os.getpid(), signal.SIGTERM)
        return draw(position, *rest)

    monkeypatch.setattr(char_lm, "batch_at", stopping)
    with pytest.raises(SystemExit) as stop:
        run(tmp_path / "b", *arguments)
    assert stop.value.code == 143 and seen == list(range(13))
    with (tmp_path / "b" / "metrics.jsonl").open("a") as file:  # what a kill may leave of a later step
        file.write('{"step": 14, "loss": 1.0}\n{"step": 15, "lo')
    with pytest.raises(SystemExit):
        run(tmp_path / "b", *arguments, "--resume", "--seed", 1)
    resumed = run(tmp_path / "b", *arguments, "--resume")
    assert seen == list(range(20))

    def untimed(records):
        return [{k: v for k, v in r.items() if not k.endswith("_s")} for r in records]

    assert resumed[0] == unbroken[0] and untimed(resumed[1]) == untimed(unbroken[1]) and resumed[2] == unbroken[2]
    samples = [(tmp_path / name / "samples.txt").read_text() for name in "ab"]
    assert samples[0] == samples[1]
    assert run(tmp_path / "b", *arguments, "--resume")[::2] == resumed[::2], "it was complete"
    with pytest.raises(SystemExit) as stop:
        run(tmp_path / "c", *arguments)
    assert stop.value.code == 2


def test_batches_come_from_seed_and_position_alone():
    one, same, later, other = (
        char_model.batch_at(*where)["tokens"]
        for where in ((3, TEXT.train, CONFIG, 0), (3, TEXT.train, CONFIG, 0), (4, TEXT.train, CONFIG, 0),
                      (3, TEXT.train, CONFIG, 1))
    )  # fmt: skip
    assert one.shape == (8, 33) and (one == same).all() and (one != later).any() and (one != other).any()
    assert all(TEXT.text(row) in TEXT.text(TEXT.train) for row in one)
    ends = [char_model.batch_at(i, np.arange(34), CONFIG, 0)["tokens"] for i in range(20)]
    assert {x.min() for x in ends} == {0} and {x.max() for x in ends} == {33}, "the first and the last are drawn too"


def test_the_text_is_whole_and_split_once():
    from pydoc_data.topics import topics

    whole = TEXT.text(np.concatenate([TEXT.train, TEXT.validation]))
    original = "\n".join(topics[name] for name in sorted(topics))
    assert len(whole) == len(original) and len(TEXT.train) == len(whole) * 9 // 10
    rare = {a for a, b in zip(original, whole, strict=True) if a != b}
    assert all(original.count(c) < 10 for c in rare) and len(TEXT.characters) <= CONFIG.vocabulary


@pytest.mark.parametrize(("scale", "millions"), [("124m", 124), ("1.3b", 1311)])
def test_large_models_are_planned_without_an_array(scale, millions):
    config = char_model.PRESETS[scale]
    built = char_model.build(config)
    key = jax.eval_shape(lambda: jax.random.key(0))
    params = jax.eval_shape(built.init, key)
    assert round(sum(leaf.size for leaf in jax.tree.leaves(params)) / 1e6) == millions
    loss, aux = jax.eval_shape(built.loss_fn, params, built.batch, key)
    assert loss.shape == aux["bits_per_char"].shape == () and loss.dtype == np.float32
    assert built.batch["tokens"].shape == (config.batch_size, config.context + 1)


@pytest.mark.slow
def test_bfloat16_parameters_and_arithmetic_learn(tmp_path):
    steps, _, loss = run(tmp_path, "--steps", 40, "--dtype", "bfloat16", "--param-dtype", "bfloat16")
    assert steps[0]["loss"] > 4 and steps[-1]["loss"] < 3.6 and loss < 3.2


def test_muon_takes_the_kernels_and_adam_the_embedding():
    params = jax.eval_shape(char_model.build(CONFIG).init, jax.random.key(0))
    state = jax.eval_shape(char_lm.jaxsgd.muon(0.01).init, params)
    second = {
        "/".join(key.key for key in path) for path, _ in jax.tree_util.tree_flatten_with_path(state.slots["nu"])[0]
    }
    assert second == {
        "embed/embedding", "final_norm/scale", "blocks/attention_norm/scale", "blocks/mlp_norm/scale"
    }  # fmt: skip


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--rule", "adamm"], "unknown rule 'adamm'; did you mean 'adam'"),
        (["--rule", "sophia"], "obj_fn: sophia needs it"),
        (["--learning-rate", "-1"], "learning_rate=-1.0: it must be 0 or more"),
        (["--heads", "3"], "--heads 3: an even share of --width 32 is needed for each"),
        (["--context", "100000"], "--context 100000: the text for validation has"),
        (["--steps", "0"], "--steps 0: at least 1 is needed"),
        (["--dropout", "1"], "--dropout 1.0: it must lie in [0, 1)"),
        (["--nan-rate", "2"], "--nan-rate 2.0 must lie in [0, 1]"),
        (["--clip", "0"], "max_norm=0.0"),
        (["--ema", "1"], "decay=1.0: it must lie in [0, 1)"),
        (["--scale", "huge"], "invalid choice: 'huge'"),
        (["--zero1"], "need --mesh"),
        (["--zero1", "--fsdp", "--mesh", "data=2"], "not allowed with argument"),
        (["--mesh", "data=16"], "--mesh data=16: 16 devices are needed, 8 are there (see --devices)"),
        (["--mesh", "rows=2"], "--mesh rows=2: 'rows=2' is not data=NUMBER or model=NUMBER"),
        (["--mesh", "model=4"], "--mesh model=4: 2 heads do not divide by model=4"),
        (["--devices", "9", "--mesh", "data=8"], "--devices 9: this process has 8 already"),
        (["--mesh", "data=4", "--batch-size", "10"], "--batch-size 10: it does not divide by data=4"),
        (["--accumulate", "3"], "times --accumulate 3; 6 or 9 would"),
        (["--resume"], "--resume: say from where, by --checkpoint DIR"),
        (["--checkpoint", "/dev/null/x"], "/dev/null"),
        (["--out", "/dev/null/x"], "/dev/null/x"),
    ],
)
def test_it_refuses_in_one_line(arguments, message, capsys):
    with pytest.raises(SystemExit) as stop:
        char_lm.main([*TINY, *arguments])
    error = capsys.readouterr().err
    assert stop.value.code == 2 and message in error and error.count("\n") == 1


def test_from_the_command_line():
    command = [sys.executable, str(EXAMPLES / "char_lm.py"), "--rule", "nope"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 2 and done.stdout == "" and done.stderr.count("\n") == 1


def test_tensorboard_is_asked_for_by_name(monkeypatch, capsys, tmp_path):
    monkeypatch.setitem(sys.modules, "tensorboardX", None)
    with pytest.raises(SystemExit):
        char_lm.main([*TINY, "--tensorboard", "--out", str(tmp_path)])
    assert "--tensorboard needs tensorboardX: pip install 'jaxsgd[examples]'" in capsys.readouterr().err
