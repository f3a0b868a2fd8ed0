"""The ledger: every rule is in it, what is beyond a bar is explained, and the compilers still say the same."""

import json
import pathlib
import re

import jax
import ledger as book
import ledger_rows
import pytest

import jaxsgd
from jaxsgd.planning.hlo import Program

ROOT = pathlib.Path(__file__).parents[2]
JSON, PAGE, ADVICE = (ROOT / "docs" / name for name in ("ledger.json", "ledger.md", "choose_optimizer.md"))
HELD = json.loads(JSON.read_text())
REAL = ["--json", str(JSON), "--page", str(PAGE), "--advice", str(ADVICE)]


@pytest.fixture
def held():
    return json.loads(JSON.read_text())


def test_every_rule_is_measured_and_explained_and_the_page_is_current(capsys):
    assert book.main(["--check", *REAL]) == 0
    assert f"{len(jaxsgd.RULES)} of {len(jaxsgd.RULES)} rules" in capsys.readouterr().out


def test_minima_are_what_the_arrays_weigh():
    for name, stored in HELD["rows"].items():
        for storage, rows in stored.items():
            for row in rows.values():
                assert row["minimum"] == pytest.approx(12 + 2 * row["state"], abs=2e-3), (name, storage)
                assert row["ratio"] == pytest.approx(row["bytes"] / row["minimum"], abs=2e-3), (name, storage)
    adam = {storage: rows["h100"]["state"] for storage, rows in HELD["rows"]["adam"].items()}
    assert adam["plain"] == 8 and adam["bf16"] == 4 and 2 < adam["int8"] < 2.05


def test_faults_are_named(held, monkeypatch, tmp_path, capsys):
    rows = held["rows"]
    rows["adam"]["plain"]["h100"] |= {"temporaries": 0.06, "fusions": 1.5}
    rows["adamw"]["plain"]["v5e"]["state"] = 12.0
    del rows["lion"]["bf16"]["v5e"], rows["yogi"]
    rows["nobody"] = rows["sgd"]
    monkeypatch.setitem(book.EXPLANATIONS, ("sgd", "plain"), "nothing is wrong with it")
    monkeypatch.delitem(book.EXPLANATIONS, "leaf_norms")
    said = "\n".join(book.faults(held))
    for fault in (
        "adam, plain on h100: fusions a leaf 1.5, temporaries 0.06: beyond the bar, and not explained",
        "adamw, plain: keeps 8 bytes a parameter, 12 when it was measured",
        "lion: not measured: bf16 on v5e", "yogi: not measured: plain on v5e, plain on h100",
        "nobody: measured, but no rule", "lamb, plain on v5e: bytes / minimum 1.4", "lars, plain on v5e",
        "EXPLANATIONS[('sgd', 'plain')]: nothing needs it",
    ):  # fmt: skip
        assert fault in said

    monkeypatch.undo()
    stale, page = tmp_path / "ledger.json", tmp_path / "ledger.md"
    stale.write_text(JSON.read_text())
    page.write_text(PAGE.read_text().replace("| [`adam`]", "| [`adan`]"))
    assert book.main(["--check", *REAL, "--json", str(stale), "--page", str(page)]) == 1
    assert f"{page} is out of date" in capsys.readouterr().err
    assert book.main(["--check", *REAL, "--json", str(tmp_path / "none.json")]) == 2


def test_the_costs_on_the_page_of_advice_are_those_of_the_ledger(held, tmp_path, capsys):
    """Each figure of the table is read from the ledger again, and the rules are the page's own choice."""
    text, advice = ADVICE.read_text(), tmp_path / "advice.md"
    names = re.findall(r"^\| `(\w+)` \|", text, re.MULTILINE)
    assert len(names) >= 10 and book.costs(held, text) == text
    held["rows"]["muon"]["plain"]["h100"]["ratio"] = 12.345
    assert "| `muon` | 4 | 2 | 20 | 12.3 |" in book.costs(held, text)
    advice.write_text(text.replace("| `lion` | 4 | 2 | 20 |", "| `lion` | 4 | 2 | 24 |"))
    assert book.main(["--check", *REAL, "--advice", str(advice)]) == 1
    assert f"{advice} is out of date" in capsys.readouterr().err
    assert book.main(["--write", *REAL, "--page", str(tmp_path / "page.md"), "--advice", str(advice)]) == 0
    assert advice.read_text() == text
    advice.write_text(text.replace("| `lion` |", "| `loin` |"))
    assert book.main(["--check", *REAL, "--advice", str(advice)]) == 2
    assert "loin" in capsys.readouterr().err


@pytest.fixture
def on_cpu(monkeypatch):
    """The ledger of this machine's own compiler."""
    for module in (book, ledger_rows):
        monkeypatch.setattr(module, "DEVICES", {"cpu": "cpu"})


def test_what_is_measured_is_not_measured_again(on_cpu, tmp_path):
    path, said = tmp_path / "ledger.json", []
    say = lambda text, done, count: said.append((text, done, count))
    first = book.ledger(path, rules=["sgd", "adam"], progress=say)
    assert json.loads(path.read_text()) == first
    assert said[0] == ("sgd plain on cpu", 0, 4) and len(said) == 4, "SGD without momentum has nothing to pack"
    row = first["rows"]["adam"]["plain"]["cpu"]
    assert row["state"] == 8 and row["minimum"] == 28 and row["bytes"] >= 28 and row["temporaries"] < 0.01

    def again(name, storage, **changes):
        """The row after another run, having held ``changes``."""
        doctored = json.loads(path.read_text())
        doctored["rows"][name][storage]["cpu"] |= changes
        path.write_text(json.dumps(doctored))
        return book.ledger(path, rules=[name])["rows"][name][storage]["cpu"]

    assert again("adam", "plain", bytes=1.0)["bytes"] == 1, "the same program: not measured again"
    assert again("adam", "plain", program="another")["bytes"] == row["bytes"]
    assert again("sgd", "plain", bytes=1.0)["bytes"] == 1
    assert book.ledger(path, rules=["sgd"], fresh=True)["rows"]["sgd"]["plain"]["cpu"]["bytes"] == 12
    with pytest.raises(KeyError, match="adam"):  # by its public name
        book.ledger(path, rules=["adma"])
    with pytest.raises(ValueError, match="devices: 'v9'"):
        book.ledger(path, rules=["sgd"], devices=["v9"])


def test_a_row_of_another_order_of_donation_is_dearer(on_cpu):
    """What the page says of donated arrays: in another order than results have, compilers copy."""
    lowered, params, _ = ledger_rows.lower(jaxsgd.RULES["adam"], "plain", "cpu")
    straight = ledger_rows.kernels(Program(lowered.compile().as_text()))["copies"]
    tx = jaxsgd.adam(1e-3)

    def update(grads, state, params):
        updates, state = tx.update(grads, state, params)
        return jax.tree.map(lambda p, u: p + u, params, updates), state

    shapes = (params, jax.eval_shape(tx.init, params), params)
    crossed = jax.jit(update, donate_argnums=(1, 2)).lower(*shapes).compile()
    assert straight == 0 < ledger_rows.kernels(Program(crossed.as_text()))["copies"]


COMPILERS = {"v5e": pytest.mark.compiler("tpu"), "h100": pytest.mark.compiler("cuda")}


@pytest.mark.parametrize("device", [pytest.param(device, marks=mark) for device, mark in COMPILERS.items()])
@pytest.mark.parametrize(("rule", "storage"), [("adam", "plain"), ("lion", "bf16"), ("lamb", "plain")])
def test_the_compilers_say_the_same(rule, storage, device):
    versions = {k: v for k, v in book.versions().items() if HELD["versions"].get(k) != v}
    if versions:
        pytest.skip(f"the ledger is of other compilers than {versions}")
    row = ledger_rows.measure(rule, storage, device)
    expected = HELD["rows"][rule][storage][device]
    assert {k: v for k, v in row.items() if k != "seconds"} == {k: v for k, v in expected.items() if k != "seconds"}
