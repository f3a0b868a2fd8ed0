"""What the README and the notebook say is so."""

import json
import os
import pathlib
import re
import subprocess
import sys

import catalog
import nbformat
import numpy as np
import optax
import pytest
from nbclient import NotebookClient

import jaxsgd
from jaxsgd import RULES
from jaxsgd.registry import all_rules
from jaxsgd.testing import LAWS, check_rule

ROOT = pathlib.Path(__file__).parents[2]
README = (ROOT / "README.md").read_text()
BLOCKS = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))


@pytest.fixture
def forget_rules():
    before = set(RULES)
    yield
    for name in set(RULES) - before:
        del RULES[name]


def test_the_quickstart_is_short_and_learns(capsys):
    lines = [line for line in BLOCKS[0].splitlines() if line.strip()]
    assert len(lines) <= 15
    names: dict = {}
    exec(BLOCKS[0], names)
    assert names["metrics"]["loss"] < 1e-2 and "'learning_rate': 0.1" in capsys.readouterr().out


@pytest.mark.parametrize("index", range(1, len(BLOCKS)))
def test_every_other_block_runs_as_it_stands(index):
    """In an interpreter of its own, where nothing was imported before."""
    done = subprocess.run([sys.executable, "-c", BLOCKS[index]], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr


def test_the_guide_runs_from_top_to_bottom(forget_rules, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    names: dict = {}
    for block in re.findall(r"```python\n(.*?)```", (ROOT / "docs" / "guide.md").read_text(), re.DOTALL):
        exec(block, names)
    assert float(names["metrics"]["loss"]) < 1.5


@pytest.mark.slow
@pytest.mark.processes
def test_the_first_hour_runs_from_top_to_bottom(tmp_path):
    """Its files are saved under their titles, and its commands run; all but make, which needs an environment."""
    page = (ROOT / "docs" / "first-hour.md").read_text()
    said = []
    path = f"{pathlib.Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    for language, title, text in re.findall(
        r'^```(\w+)(?: title="([^"\n]+)")?\n(.*?)^```', page, re.DOTALL | re.MULTILINE
    ):
        if title:
            (tmp_path / title).write_text(text)
        elif language == "bash":
            command = ["bash", "-e", "-c", text]
            done = subprocess.run(
                command, cwd=tmp_path, env=os.environ | {"PATH": path}, capture_output=True, text=True, timeout=300
            )
            assert done.returncode == 0, done.stderr
            said.append(done.stdout.splitlines())
    ported, rate, killed, rule = said
    assert len(ported) == 3 and len({line[:9] for line in ported}) == 1, "the port trains like the script"
    assert rate[0].startswith("learning rate 0.0")
    assert killed[1] == "killed" and int(killed[2].split()[-1]) >= 100, "it continues from a checkpoint"
    assert killed[3] == killed[5], "as a run that was never killed"
    assert [line.split(":")[0] for line in rule[:3]] == ["all laws hold", "responds", "first_step"]


@pytest.mark.parametrize("page", ["choose_optimizer.md", "choose_rate.md"])
def test_the_pages_of_advice_run_from_top_to_bottom(page, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    names: dict = {}
    for block in re.findall(r"```python\n(.*?)```", (ROOT / "docs" / page).read_text(), re.DOTALL):
        exec(block, names)
    if page == "choose_optimizer.md":
        assert {entry.name for entry in names["race"].entries} == {"momentum", "adamw"}
        assert np.allclose(names["fit"].params, [2, 3], atol=1e-4)
    else:
        assert names["result"].best["learning_rate"] not in (1e-2, 1.0), "the sweep's best rate is inside its list"
        assert names["found"].learning_rate > 0 and len(names["recorder"].records) == len(names["batches"])


def test_links_lead_somewhere():
    for page in [ROOT / "README.md", *(ROOT / "docs").glob("*.md")]:
        text = re.sub(r"```.*?```", "", page.read_text(), flags=re.DOTALL)
        for target in re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", text):
            assert (page.parent / target).exists(), f"{page.name}: {target}"


def test_the_site_loads_no_script_from_elsewhere():
    """The offline plugin takes a script from a server, unless one of the site has its name."""
    config = (ROOT / "mkdocs.yml").read_text()
    assert re.search(r"^  - offline$", config, re.MULTILINE)
    (scripts,) = re.findall(r"^  polyfills: \[(.*)\]$", config, re.MULTILINE)
    assert "iframe-worker" in scripts and "://" not in config
    assert all((ROOT / "docs" / script.strip()).is_file() for script in scripts.split(","))


def test_table_and_page_of_rules_are_current(tmp_path, capsys):
    agreement, page = ROOT / "jaxsgd" / "agreement.json", ROOT / "docs" / "rules.md"
    real = ["--readme", str(ROOT / "README.md"), "--page", str(page), "--agreement", str(agreement)]
    assert catalog.main(["--check", *real]) == 0
    said = capsys.readouterr().out
    assert all(f"\n{name}: " in f"\n{said}" for name in RULES), "each is listed with its agreement"

    stale, wrong = tmp_path / "README.md", tmp_path / "agreement.json"
    stale.write_text(README.replace("[adam]", "[adan]"))
    copies = ["--readme", str(stale), "--page", str(tmp_path / "rules.md"), "--agreement", str(agreement)]
    assert catalog.main(["--check", *copies]) == 1
    assert catalog.main(["--write", *copies]) == 0 and stale.read_text() == README
    assert (tmp_path / "rules.md").read_text() == page.read_text()
    stale.write_text("no markers")
    assert catalog.main(["--check", *copies]) == 2
    assert "markers" in capsys.readouterr().err

    held = json.loads(agreement.read_text())
    held["adam"]["optax"], held["nobody"] = 2e-12, {"optax": 0.0}
    wrong.write_text(json.dumps({k: v for k, v in held.items() if k != "lion"}))
    assert catalog.main(["--check", *real[:4], "--agreement", str(wrong)]) == 1
    said = capsys.readouterr().err
    for fault in ("lion: not measured", "nobody: measured, but no rule", "adam: 2.0e-12 from optax, the bar is 1e-12"):
        assert fault in said
    assert catalog.main([]) == 0 and "[`adam`](#adam) | Adam |" in capsys.readouterr().out


@pytest.mark.parametrize("rule", all_rules().values(), ids=lambda rule: rule.name)
def test_a_rule_says_when_to_use_it_and_when_not(rule):
    last = " ".join(rule.doc.split("\n\nArgs:")[0].split("\n\n")[-1].split())
    use, avoid = re.fullmatch(r"Use it when (.+)\. Avoid it (?:when|in) (.+)\.", last).groups()
    assert len(use) > 15 and len(avoid) > 15
    assert set(re.findall(r"`(\w+)`", last)) <= {*jaxsgd.__all__, *re.findall(r"``(\w+)``", last)}


@pytest.mark.parametrize("page", sorted(path.name for path in (ROOT / "docs").glob("*.md")))
def test_every_test_that_a_page_names_is_there(page):
    paths = {path.name: path for path in (ROOT / "tests").rglob("*.py")}
    file, missing, count = "", [], 0
    for named, test in re.findall(
        r"`(?:((?:test_\w+|kills)\.py)(?:::)?)?(test_\w+)?`", (ROOT / "docs" / page).read_text()
    ):
        file = named or file
        path = paths.get(file, ROOT)
        if named or test:
            count += 1
            if not path.is_file() or test and f"def {test}(" not in path.read_text():
                missing.append(f"{file}::{test}")
    assert not missing
    assert count >= 30 or page != "reliability.md"


NAMES = {
    "optax": """adabelief adadelta adafactor adagrad adam adamax adamaxw adamw adan amsgrad fromage lamb lars lion nadam
        nadamw noisy_sgd novograd optimistic_gradient_descent optimistic_adam optimistic_adam_v2 polyak_sgd radam
        rmsprop rprop sgd sign_sgd signum sm3 yogi""",
    "optax.contrib": """acprop ademamix simplified_ademamix adopt cocob dadapt_adamw dog dowg galore madgrad momo
        momo_adam muon prodigy schedule_free_sgd schedule_free_adamw sophia""",
    "elsewhere": """momentum nesterov velocity schedule_free_radam mars soap shampoo kron normuon adamuon muon_jordan
        dion adam_mini grams apollo apollo_mini adalomo""",
}


def test_every_name_is_there():
    for names in NAMES.values():
        assert [name for name in names.split() if name not in RULES] == []
    functions = """mechanize sam normalize reduce_on_plateau clip_by_global_norm accumulate accumulate_gradients guard
        ema eval_params monitor schedule_free cautious cautious_decay lookahead grokfast centralized adaptive_clip
        low_rank"""
    assert [name for name in functions.split() if not callable(getattr(jaxsgd, name, None))] == []
    torch = "SGD Adam AdamW NAdam Adamax RMSprop Adagrad Adadelta RAdam ASGD Rprop Adafactor Muon SparseAdam"
    assert sorted(torch.split()) == sorted(jaxsgd.torch.__all__)


def test_measured_agreement_is_within_its_bars():
    held = json.loads((ROOT / "jaxsgd" / "agreement.json").read_text())
    assert catalog.faults(held) == []
    packages = {package for row in held.values() for package in row}
    assert {"optax", "torch", "schedulefree", "prodigyopt", "lion-pytorch", "pytorch-optimizer"} <= packages


@pytest.mark.parametrize("name", sorted(RULES))
def test_a_rule_reads_like_its_equation(name):
    """Its docstring begins with name, source and equation; its body has at most 12 lines."""
    import ast
    import inspect
    import textwrap

    entry = catalog.entry(RULES[name], {})
    assert re.search(r"\d{4}", entry["source"]) and entry["update"].count("$") % 2 == 0
    function = ast.parse(textwrap.dedent(inspect.getsource(RULES[name].fn))).body[0]
    body = [node for node in function.body if not (isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant))]
    assert sum(node.end_lineno - node.lineno + 1 for node in body) <= 12


@pytest.mark.filterwarnings("ignore")
@pytest.mark.slow
@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: p.stem)
def test_notebook_runs(path):
    notebook = nbformat.read(path, as_version=4)
    client = NotebookClient(notebook, timeout=600, resources={"metadata": {"path": str(path.parent)}})
    client.execute()
    pictures = sum("image/png" in o.get("data", {}) for c in notebook.cells for o in c.get("outputs", []))
    assert pictures >= (12 if path.stem.startswith("01") else 1)
    assert all(c.get("outputs") is not None for c in notebook.cells if c.cell_type == "code")


def test_notebooks_are_kept_with_their_pictures():
    for path in NOTEBOOKS:
        assert "image/png" in path.read_text()


def test_the_page_of_conformance_has_every_law_and_its_block_runs(capsys):
    page = (ROOT / "docs" / "conformance.md").read_text()
    laws = {name: " ".join((law.__doc__ or "").split()) for name, law in LAWS.items()}
    assert dict(re.findall(r"^\| (\w+) \| (.*) \| \d+ \|$", page, re.MULTILINE)) == laws
    (block,) = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
    exec(block, {})
    (said,) = capsys.readouterr().out.splitlines()
    (adam,) = re.findall(r"^\| `adam` \| (.*) \|$", page, re.MULTILINE)
    assert said in adam.split("<br>"), "one finding, and the one on the page"


@pytest.mark.filterwarnings("ignore:Explicitly requested dtype")
def test_the_divergences_reproduce(capsys):
    """If one no longer prints what its comment says, optax was mended: follow it again."""
    (block,) = re.findall(r"```python\n(.*?)```", (ROOT / "docs" / "divergences.md").read_text(), re.DOTALL)
    exec(block, {})
    said = dict(line.split(": ", 1) for line in capsys.readouterr().out.splitlines())
    assert float(said["adadelta climbs"]) > 0 and float(said["schedule-free rests"]) == 0
    assert float(said["acprop's residual"]) == pytest.approx(1e-3)
    assert float(said["adan's second step"]) == pytest.approx(-0.946, abs=1e-3)
    assert float(said["yogi moves without a gradient"]) != 0 and float(said["rprop's first update"].strip("[]")) == 0
    assert said["polyak scaled by 0.5"].split() == ["[-1.", "-2.", "-3.]"]
    assert said["momo with decay"].startswith("[0.459") and said["madgrad's root"] == "float32"
    three = "[3. 3. 3.]"
    assert said["mechanize after 50 steps"] == three and float(said["sam of period 1"]) == pytest.approx(0.8)
    nans = ("mechanize in float16", "sam where the second gradient is 0", "normalize", "sophia, eps=0")
    assert all(said[name] == "[nan nan nan]" for name in nans)
    plateaus = {name: float(value) for name, value in said.items() if name.startswith("plateau")}
    assert list(plateaus.values()) == pytest.approx([1, 0.25, 0.5, 0.5, 0.1])
    assert said["prodigy under a warmup"] == said["adafactor before its offset"] == "[nan nan nan]"


@pytest.mark.parametrize(
    ("ours", "theirs"),
    [
        (jaxsgd.adan(0.1, weight=1 - 0.92), optax.adan(0.1)),
        (jaxsgd.acprop(0.1, stale_mean=True), optax.contrib.acprop(0.1)),
        (jaxsgd.yogi(0.1, initial_mean=1e-6), optax.yogi(0.1)),
    ],
    ids=["adan", "acprop", "yogi"],
)
def test_optaxs_way_is_one_option_away(ours, theirs):
    check_rule(ours, like=theirs)
