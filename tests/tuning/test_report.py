"""One form for all results: text, rich, HTML, Markdown, JSON and records say the same; numbers have three digits."""

import dataclasses
import html.parser
import io
import json
import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import transcript
from hypothesis import given, settings
from hypothesis import strategies as st
from rich.console import Console

import jaxsgd
from jaxsgd.curvature.sharpness import Sharpness
from jaxsgd.diagnosis.diagnose import Diagnosis
from jaxsgd.diagnosis.verdict import Verdict
from jaxsgd.planning import Comparison, Plan, compare
from jaxsgd.report import KINDS, OMITTED, Column, Report, Table, bytes_text, number, plus_minus, span
from jaxsgd.tuning.pick import Pick
from jaxsgd.tuning.scaling import NoiseScale

# -- numbers ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0.0568888, "0.0569"), (0.0032, "0.0032"), (26140.3, "26,100"), (2.434e6, "2.43e6"), (1437, "1,437"),
        (0.1, "0.1"), (1e-5, "1e-5"), (999.6, "1,000"), (-3.204, "-3.2"), (0.0, "0"), (True, "yes"), (None, "-"),
        (math.nan, "-"), (math.inf, "inf"), (-math.inf, "-inf"), (np.float32(0.25), "0.25"), (np.int64(7), "7"),
        (np.bool_(False), "no"), (999999.9, "1e6"), (1.797e308, "1.8e308"), (0.99951, "1"), (12345678, "12,345,678"),
    ],
)  # fmt: skip
def test_numbers(value, text):
    assert number(value) == text


@settings(max_examples=300, deadline=None, derandomize=True)
@given(st.floats(1e-290, 1e290), st.sampled_from([1, -1]), st.integers(1, 5))
def test_a_number_says_what_it_is(size, sign, digits):
    """Read again it is the value to that many digits, in at most so many characters."""
    text = number(sign * size, digits)
    assert float(text.replace(",", "")) == pytest.approx(sign * size, rel=0.5 * 10 ** (1 - digits) * 1.001)
    mantissa = text.replace(",", "").split("e")[0].strip("-").replace(".", "").strip("0")
    assert len(mantissa) <= digits and "e+" not in text and "e0" not in text


def test_bytes_and_ranges():
    said = [bytes_text(size) for size in (17, 1023, 1024**2, 15.75 * 1024**3, 1023.9 * 1024**2, 0)]
    assert said == ["17 B", "0.999 KiB", "1 MiB", "15.8 GiB", "1 GiB", "0 B"]
    assert span(0.004, 0.016) == "0.004 to 0.016" and plus_minus(95.26, 4.123) == "95.3 +- 4.1"


# -- tables ----------------------------------------------------------------------------------------

WORDS = st.text(st.sampled_from("abcdef -|<&"), max_size=60)
CELLS = {
    "number": st.none() | st.floats() | st.integers(-(10**6), 10**6), "share": st.floats(0, 1),
    "bytes": st.integers(0, 2**50), "range": st.tuples(st.floats(0, 1), st.floats(0, 1)), "text": WORDS,
}  # fmt: skip


@st.composite
def tables(draw):
    kinds = ["text", *draw(st.lists(st.sampled_from(KINDS), min_size=1, max_size=14))]
    columns = tuple(Column(f"column {i}", draw(st.sampled_from(["", "s"])), kind) for i, kind in enumerate(kinds))
    rows = draw(st.lists(st.tuples(*(CELLS[kind] for kind in kinds)), min_size=1, max_size=5))
    return Table(columns, tuple(rows), draw(st.none() | st.integers(0, len(rows) - 1)))


@settings(max_examples=150, deadline=None, derandomize=True)
@given(tables())
def test_a_table_fits_into_80_columns_and_loses_nothing(table):
    lines = table.text().splitlines()
    assert max(map(len, lines)) <= 80
    heads, _, rows = table.cells()
    squeezed = re.sub(r"\s", "", table.text())
    for i, column in enumerate(table.columns):
        for row in rows:
            if column.kind != "text":
                assert re.sub(r"\s", "", row[i]) in squeezed
        assert all(word in table.text() for word in heads[i].split())
    marked = table.best is not None
    assert (sum(line.startswith("* ") for line in lines) > 0) == marked
    assert table.markdown().count("\n") == len(rows) + 1 + 2 * marked
    assert [list(record) for record in table.records()] == [[c.key for c in table.columns]] * len(rows)


def test_numbers_are_on_the_right_and_the_best_is_marked():
    table = Table(
        (Column("rule", kind="text"), Column("loss"), Column("time", "s")), (("a", 0.5, 1.0), ("bc", 12.25, 10)), 1
    )
    assert table.text().splitlines() == [
        "  rule  loss  time", "               (s)", "  a      0.5     1", "* bc    12.2    10", "* best",
    ]  # fmt: skip
    with pytest.raises(ValueError, match="kind='money'"):
        Column("price", kind="money")
    with pytest.raises(ValueError, match="1 values under 2 columns"):
        Table((Column("a"), Column("b")), ((1,),))


def test_bytes_have_the_unit_of_the_largest_or_their_own():
    column = (Column("size", kind="bytes"),)
    assert Table(column, ((2**30,), (2**28,))).cells()[1:] == (["GiB"], [["1"], ["0.25"]])
    assert Table(column, ((2**30,), (8,), (0,))).cells()[1:] == ([""], [["1 GiB"], ["8 B"], ["0 B"]])


# -- the results of all tools ----------------------------------------------------------------------


def loss_fn(params, batch, key):
    return jnp.mean((batch["x"] @ params["w"] - batch["y"]) ** 2)


def init(key):
    return {"w": 0.1 * jax.random.normal(key, (3,))}


def batches(count):
    rng = np.random.default_rng(0)
    x = rng.standard_normal((count, 16, 3)).astype(np.float32)
    return [{"x": a, "y": a.sum(-1) + 0.1 * rng.standard_normal(16).astype(np.float32)} for a in x]


@pytest.fixture(scope="module")
def reports():
    data, tx = batches(24), jaxsgd.momentum(0.02)
    state, step = jaxsgd.TrainState.create(init, tx), jaxsgd.make_step(loss_fn, tx)
    shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), data[0])
    both = compare([{"label": "one"}, {"label": "two", "tx": jaxsgd.sgd(0.1)}], loss_fn, init, tx, shapes)
    found = [
        jaxsgd.sweep(step, state, data, learning_rate=[1e-3, 1e-2, 1e9], strategy="vmap"),
        jaxsgd.pick(loss_fn, init, data, steps=16, seeds=2, budget=400),
        jaxsgd.probe(loss_fn, init(jax.random.key(0)), data, jaxsgd.momentum, steps=40),
        jaxsgd.range_test(loss_fn, init(jax.random.key(0)), data, jaxsgd.momentum, steps=20),
        jaxsgd.sharpness(loss_fn, state, data[0], tx=tx, eigenvalues=2),
        jaxsgd.noise_scale(loss_fn, init(jax.random.key(0)), data),
        jaxsgd.diagnose(2.0 * 0.95 ** np.arange(60), tx=tx),
        both[0],
        both,
    ]
    return {type(report): report for report in found}


TOOLS = [jaxsgd.Sweep, Pick, jaxsgd.Probe, jaxsgd.RangeTest, Sharpness, NoiseScale, Diagnosis, Plan, Comparison]


class Text(html.parser.HTMLParser):
    """The text of a page; every tag is closed."""

    def __init__(self, page):
        super().__init__()
        self.text, self.open = "", []
        self.feed(page)
        assert not self.open

    def handle_starttag(self, tag, attrs):
        self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text += data + " "


def words(text):
    return " ".join(re.sub(r"[*|`\\]", " ", text).split())


@pytest.mark.parametrize("tool", TOOLS)
def test_every_form_says_the_same(reports, tool):
    report = reports[tool]
    assert isinstance(report, Report) and report.summary and "\n" not in report.summary
    assert report.table.rows and report.picture
    out = io.StringIO()
    Console(file=out, width=80).print(report)
    forms = {
        "text": str(report), "rich": out.getvalue(), "html": Text(report._repr_html_()).text,
        "markdown": report.to_markdown(),
    }  # fmt: skip
    for name, form in forms.items():
        for sentence in (report.summary, *report.why, *report.next):
            assert words(sentence).replace(" ", "") in words(form).replace(" ", ""), (name, sentence)
        for cell in (cell for row in report.table.cells()[2] for cell in row):
            assert words(cell).replace(" ", "") in words(form).replace(" ", ""), (name, cell)
        if report.table.best is not None:
            assert words(report.table.mark).replace(" ", "") in words(form).replace(" ", ""), name
    assert repr(report) == str(report) and forms["text"].startswith(report.summary[:40])


@pytest.mark.parametrize("tool", TOOLS)
def test_text_is_80_columns_wide_with_all_details(reports, tool):
    whole = reports[tool].text(verbose=True)
    assert max(map(len, whole.splitlines())) <= 80
    assert len(whole) >= len(str(reports[tool])) - len("\n\nMore: text(verbose=True)")
    for text in re.findall(r"[\d,]+\.\d+", whole):
        assert len(re.sub(r"[,.]", "", text).lstrip("0")) <= 3, text
    assert "e+" not in whole and "e0" not in whole


@pytest.mark.parametrize("tool", TOOLS)
def test_to_dict_json_and_records(reports, tool):
    report = reports[tool]
    plain = json.loads(report.to_json())
    names = {f.name for f in dataclasses.fields(report) if f.metadata != OMITTED}
    assert plain["tool"] == tool.__name__ and names | {"summary", "why", "next", "table"} <= set(plain)
    assert plain["summary"] == report.summary and plain["next"] == list(report.next)
    assert len(report.records()) == len(report.table.rows) == len(plain["table"])
    assert list(report.records()[0]) == [column.key for column in report.table.columns]
    json.dumps(report.to_dict())  # plain Python


@pytest.mark.parametrize("tool", TOOLS)
def test_every_result_draws_itself(reports, tool):
    pytest.importorskip("matplotlib")
    report = reports[tool]
    if tool is NoiseScale:
        assert report.known
    figure = report.plot()
    figure.draw_without_rendering()
    assert figure.axes


def test_what_is_not_finite_is_null_in_json_and_states_are_left_out(reports):
    sweep = reports[jaxsgd.Sweep]
    plain = json.loads(sweep.to_json())
    assert plain["final"][2] is None and "states" not in plain and math.isinf(sweep.to_dict()["final"][2])
    assert plain["diverged_at"][2] >= 0 and len(plain["metrics"]["loss"][0]) == 24


def test_a_comparison_comes_before_its_plans(reports):
    whole = reports[Comparison].text(verbose=True)
    assert (
        whole.index("plans fit") < whole.index("temporaries") < whole.index("one fits: needs") < whole.index("kernels")
    )
    assert "one fits: needs" not in str(reports[Comparison]) and "More: text(verbose=True)" in str(reports[Comparison])


def test_one_vocabulary():
    assert Verdict.GOOD == "good" and f"{Verdict.TOO_LOW}" == "too low" and json.dumps(Verdict.STUCK) == '"stuck"'
    assert len({v.value for v in Verdict}) == len({v.sentence for v in Verdict}) == len(Verdict)
    assert all(len(v.sentence.split()) <= 20 for v in Verdict) and len(Verdict.of_curves()) == 9


def swept(rates, finals, start=2.0, seeds=1):
    finals = np.asarray(finals, float)
    losses = np.stack([np.full(len(finals), start), np.where(np.isfinite(finals), finals, np.nan)], 1)
    values = {"learning_rate": np.repeat(rates, seeds)}
    values |= {"seed": np.tile(np.arange(seeds), len(rates))} if seeds > 1 else {}
    diverged = np.where(np.isfinite(finals), -1, 1)
    return jaxsgd.Sweep(values, {"loss": losses}, diverged, finals, 1, None, "map", "few runs", 1, 0.1, 0.2)


def test_a_sweep_says_what_to_do_next():
    assert swept([0.1, 0.2, 0.4], [1.0, 0.5, 0.8]).next == ("train with learning_rate=0.2",)
    assert "sweep further up" in swept([0.1, 0.2, 0.4], [1.0, 0.8, 0.5]).next[0]
    assert "sweep further down" in swept([0.1, 0.2, 0.4], [0.1, 0.8, np.inf]).next[0]
    lost = swept([0.1, 0.2], [np.inf, np.inf])
    assert lost.summary == "all 2 runs diverged: learning_rate from 0.1 to 0.2" and "10 times lower" in lost.next[0]
    risen = swept([0.1, 0.2, 0.3], [3.0, 2.5, 2.6])
    assert risen.summary.startswith("no run lowered its loss") and "other values" in risen.next[0]
    close = swept([0.1, 0.2, 0.4], [1.0, 1.2, 0.9, 1.1, 2.0, 2.1], seeds=2)
    assert "cannot tell it from learning_rate 0.1:" in close.why[-1]
    assert "cannot tell" not in " ".join(swept([0.1, 0.2, 0.4], [1.0, 1.01, 0.5, 0.51, 2.0, 2.1], seeds=2).why)


# -- a new user's session --------------------------------------------------------------------------


def test_the_page_of_the_tools_has_the_calls_of_its_script():
    assert transcript.faults(transcript.PAGE.read_text()) == []


@pytest.mark.slow
def test_the_page_of_the_tools_is_current():
    assert transcript.faults(transcript.PAGE.read_text(), transcript.run()) == []


def test_a_page_that_is_out_of_date_is_noticed():
    text = transcript.PAGE.read_text()
    assert transcript.faults(text.replace("steps=200", "steps=300"))
    assert transcript.faults(text.replace("is best, with loss", "is best, with loss" + 80 * "!"))
    assert transcript.faults(text.replace("## Which rule?", "## Which?"))
