"""The `jaxsgd` command: plans of scripts in every form, the list of rules, one rule."""

import json
import pathlib
import subprocess
import sys

import pytest

import jaxsgd
from jaxsgd.__main__ import main

ROOT = pathlib.Path(__file__).parents[2]
MODEL = """
import jax, jax.numpy as jnp, jaxsgd
shape = lambda *sizes: jax.ShapeDtypeStruct(sizes, jnp.float32)
def loss_fn(params, batch):
    return jnp.mean((batch["x"] @ params["w"]) ** 2)
"""
PIECES = {
    "variables": """
params, batch, tx = {"w": shape(64, 64)}, {"x": shape(8, 64)}, jaxsgd.adam(1e-3)
""",
    "other names": """
loss, model, batch, optimizer = loss_fn, {"w": shape(64, 64)}, {"x": shape(8, 64)}, jaxsgd.adam(1e-3)
del loss_fn
""",
    "no optimizer": """
params, batch = {"w": shape(64, 64)}, {"x": shape(8, 64)}
""",
    "a dict": """
def plan_inputs():
    return {"loss_fn": loss_fn, "params": {"w": shape(64, 64)}, "tx": jaxsgd.adam(1e-3), "batch": {"x": shape(8, 64)}}
""",
    "a tuple of four": """
def plan_inputs(argv):
    return loss_fn, {"w": shape(64, 64)}, jaxsgd.adam(1e-3), {"x": shape(8, 64)}
""",
    "a tuple of three": """
def plan_inputs(argv=(), mesh=None):
    return loss_fn, {"w": shape(64, 64)}, {"x": shape(8 * mesh.size, 64)}
""",
    "a step": """
def plan_inputs():
    step = jaxsgd.make_step(loss_fn, jaxsgd.adam(1e-3))
    return {"step": step, "init": lambda key: {"w": jax.random.normal(key, (64, 64))}, "batch": {"x": shape(8, 64)}}
""",
    "arguments": """
def plan_inputs(argv, mesh):
    size = int(argv[argv.index("--size") + 1])
    return {"loss_fn": loss_fn, "params": {"w": shape(size, size)}, "tx": jaxsgd.adam(1e-3),
            "batch": {"x": shape(8 * mesh.size, size)}}
""",
}


@pytest.fixture
def run(monkeypatch, capsys):
    def call(*arguments):
        monkeypatch.setattr(sys, "path", list(sys.path))
        try:
            code = main(list(map(str, arguments)))
        except SystemExit as end:
            code = end.code
        return code, *capsys.readouterr()

    return call


@pytest.fixture
def script(tmp_path):
    def write(text):
        file = tmp_path / "job.py"
        file.write_text(MODEL + text)
        return file

    return write


@pytest.mark.parametrize("form", [form for form in PIECES if form != "arguments"])
def test_a_script_says_what_it_trains(run, script, form):
    code, out, err = run("plan", script(PIECES[form]), "--format", "json")
    assert code == 0, err
    assert json.loads(out)["topology"] == "cpu" and json.loads(out)["parts"]["params"] == 4 * 64 * 64


def test_arguments_go_to_the_script_and_topologies_are_compared(run, script):
    file = script(PIECES["arguments"])
    code, out, err = run("plan", file, "--topology", "cpu:8", "--size", 64)
    assert code == 0 and "4,096 parameters" in out, err
    both = ["--topology", "cpu", "--topology", "cpu:8", "--mesh-axes", "data=-1", "--size", 64]
    code, out, err = run("plan", file, *both, "--format", "json")
    assert code == 0 and [entry["devices"] for entry in json.loads(out)] == [1, 8]
    _, short, _ = run("plan", file, *both)
    _, long, _ = run("plan", file, *both, "-v")
    assert len(short.splitlines()) < 25 < len(long.splitlines())
    code, out, err = run("plan", file, "--size", 2**18, "--no-suggestions")
    assert code == 1 and "does not fit" in out


def test_a_function_by_name_in_a_file_or_a_module(run, script, monkeypatch):
    file = script(PIECES["a tuple of four"].replace("plan_inputs", "small"))
    code, out, err = run("plan", f"{file}:small", "--format", "json")
    assert code == 0, err
    monkeypatch.chdir(file.parent)
    file.rename("a_job_of_mine.py")
    for arguments in (["--model", "a_job_of_mine:small"], ["a_job_of_mine:small"]):
        code, again, err = run("plan", *arguments, "--format", "json")
        assert code == 0 and json.loads(again)["parts"] == json.loads(out)["parts"], err


def test_an_optimizer_for_a_script_without_one(run, script):
    file = script(PIECES["no optimizer"])
    states = []
    for rule in ("sgd", "adamw"):
        code, out, err = run("plan", file, "--optimizer", rule, "--format", "json")
        assert code == 0, err
        states.append(json.loads(out)["argument"])
    code, out, _ = run("plan", file, "--format", "json")
    assert json.loads(out)["argument"] == states[1] != states[0]


def test_the_examples_can_be_planned(run):
    for name in ("digits.py", "char_lm.py"):
        code, out, err = run("plan", ROOT / "examples" / name, "--format", "json")
        assert code == 0 and json.loads(out)["needs"] > 2**20, err


@pytest.mark.parametrize(
    "text, arguments, says",
    [
        (
            "x = 1",
            [],
            "params, batch is missing. Add a function that returns them:\n\n    def plan_inputs()",
        ),
        (PIECES["variables"], ["--topology", "v5x"], "no such device; did you mean 'v5e' or 'v5p'?"),
        (PIECES["variables"], ["--mesh-axes", "data"], "NAME=NUMBER"),
        (PIECES["variables"], ["--size", "8"], "unrecognized arguments: --size 8"),
        (PIECES["a dict"], ["--size", "8"], "unrecognized arguments: --size 8"),
        (PIECES["variables"], ["--optimizer", "sgd"], "has an optimizer of its own"),
        (PIECES["no optimizer"], ["--optimizer", "adamm"], "did you mean 'adam'"),
        ("def plan_inputs(model): ...", [], "it takes model; it may take argv and mesh"),
        ("def plan_inputs(): return 1", [], "it returns a int. Use a dict"),
        ("def plan_inputs(): return {'spec': 1}", [], "'spec' is no argument of jaxsgd.plan; did you mean 'specs'"),
    ],
)
def test_a_script_in_error(run, script, text, arguments, says):
    code, out, err = run("plan", script(text), *arguments)
    assert code == 2 and not out
    assert says in err, err


def test_no_such_target(run, script):
    file = script(PIECES["a dict"])
    for target, says in (
        ("nothing.py", "nothing.py: no such file"),
        ("no.such.module", "no.such.module: no such file or module"),
        (f"{file}:plan_input", "has no function 'plan_input'; did you mean 'plan_inputs'?"),
    ):
        code, _, err = run("plan", target)
        assert code == 2 and says in err
    for arguments in ([], [str(file), "--model", "m:f"]):
        code, _, err = run("plan", *arguments)
        assert code == 2 and "a script is needed" in err


def test_rules(run):
    code, out, _ = run("rules")
    assert code == 0 and all(f"\n{name} " in out for name in {**jaxsgd.RULES, **jaxsgd.TREE_RULES})
    assert max(map(len, out.splitlines())) <= 80
    code, out, _ = run("rules", "--like", "muon")
    listed = [line.split()[0] for line in out.splitlines()[2:] if line[:1].strip()]
    assert listed[0] == "muon" and "normuon" in listed and "sgd" not in listed
    code, _, err = run("rules", "--like", "adamm")
    assert code == 2 and "did you mean 'adam'" in err
    code, _, err = run("rules", "--liek", "adam")
    assert code == 2 and "unrecognized arguments: --liek adam" in err


@pytest.mark.parametrize("name", sorted(jaxsgd.TREE_RULES))
def test_every_second_order_rule_has_a_card(run, name):
    code, out, err = run("rule", name)
    rule = jaxsgd.TREE_RULES[name]
    assert code == 0, err
    assert f"jaxsgd.{name}: {rule.title.split(' (')[0]}" in out and " at 0x" not in out
    assert "jaxsgd.make_step supplies" in out and f"related: {', '.join(sorted({*jaxsgd.TREE_RULES} - {name}))}" in out
    for argument in rule.defaults:
        assert f"\n{argument} " in out
    code, out, _ = run("rules", "--like", name)
    assert code == 0 and set(jaxsgd.TREE_RULES) <= {line.split()[0] for line in out.splitlines() if line[:1].strip()}


@pytest.mark.parametrize("name", sorted(jaxsgd.RULES))
def test_every_rule_has_a_card(run, name):
    code, out, err = run("rule", name)
    assert code == 0, err
    assert jaxsgd.RULES[name].title.split(" (")[0] in out and "\nagreement after" in out
    for slot in jaxsgd.RULES[name].slots:
        assert f"\n  {slot}: " in out
    for argument in jaxsgd.RULES[name].hyper:
        assert f"\n{argument} " in out


def test_an_unknown_rule(run):
    code, _, err = run("rule", "adamm")
    assert code == 2 and err == "jaxsgd rule: error: unknown rule 'adamm'; did you mean 'adam'?\n"
    code, _, err = run("rule", "newton-cg")
    assert code == 2 and err == "jaxsgd rule: error: unknown rule 'newton-cg'; did you mean 'newton_cg'?\n"
    assert "did you mean 'adamw'?" in run("rule", "AdamW")[2]


def test_it_is_installed():
    for command in ([str(pathlib.Path(sys.executable).with_name("jaxsgd"))], [sys.executable, "-m", "jaxsgd"]):
        if not pathlib.Path(command[0]).exists():
            pytest.fail("the package is not installed with its command: pip install -e .")
        done = subprocess.run([*command, "rule", "lion"], capture_output=True, text=True, check=False, timeout=300)
        assert done.returncode == 0 and "Lion" in done.stdout
