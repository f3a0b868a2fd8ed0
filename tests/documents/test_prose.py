"""The prose linter: it finds a planted word or long sentence wherever a user reads, and nothing in code."""

import json
import re

import prose
import pytest

MARKDOWN = """# Title

A new value never compiles anything
anew.

```python
message = "raises in words"
```

The name `anew` is code, and [this](anew.md) is a link.
"""
PYTHON = '''"""Trainings by rate.

>>> print("anew")
anew
"""

anew = "wholly"  # neither a name nor a value nor a comment is prose: anew


class Thing:
    """A thing.

    Attributes:
      ``anew``: code.
    """

    size: int = 0
    """Where it lies."""


def refuse(x):
    if x < 0:
        raise ValueError(f"x={x} is refused in words")
    parser.add_argument("--x", help="set by somebody")


def summary(x):
    return f"the rate {x} lies between the two"
'''


def found(path, text):
    path.write_text(text)
    return [(finding.line, " ".join(finding.word.lower().split())) for finding in prose.check(path)]


def test_markdown_is_read_outside_code(tmp_path):
    assert found(tmp_path / "page.md", MARKDOWN) == [(3, "compiles anything"), (4, "anew")]


def test_docstrings_errors_and_help_are_read_and_code_is_not(tmp_path):
    assert found(tmp_path / "module.py", PYTHON) == [
        (1, "trainings"),
        (18, "lies"),
        (23, "in words"),
        (24, "somebody"),
        (28, "lies"),
    ]


def test_markdown_cells_are_read_at_their_line(tmp_path):
    cells = [
        {"cell_type": "code", "source": ["x = 'anew'\n"]},
        {"cell_type": "markdown", "source": ["A title\n", "It is said in words.\n"]},
    ]
    text = json.dumps({"cells": cells}, indent=1)
    ((line, word),) = found(tmp_path / "notebook.ipynb", text)
    assert word == "in words" and "in words" in text.split("\n")[line - 1]


@pytest.mark.parametrize(
    ("sentence", "word"),
    [
        ("The report says what was reset.", "says what"),
        ("It will keep what fits.", "keep what"),
        ("An estimate of it is printed.", "of it"),
        ("The next run goes on from step 3.", "goes on from"),
        ("So what is left is small.", "what is left"),
    ],
)
def test_clauses_that_stand_for_nouns_are_found(tmp_path, sentence, word):
    assert found(tmp_path / "page.md", sentence) == [(1, word)]


@pytest.mark.parametrize(
    "sentence",
    [
        "What does my loss curve show?",
        "One half of its items, of items, of iterations.",
        "Print what=3 to see that what-if runs exist.",
        "Errors: what is wrong, the value, then a remedy.",
    ],
)
def test_other_uses_of_the_same_words_are_no_findings(tmp_path, sentence):
    assert found(tmp_path / "page.md", sentence) == []


@pytest.mark.parametrize("words", [words for words in prose.BANNED if re.fullmatch(r"[a-z, ]+", words)])
def test_every_plain_word_is_found_across_a_line_end(tmp_path, words):
    assert found(tmp_path / "page.md", f"A sentence {words}.".replace(" ", "\n"))


def words(count, last="words"):
    return " ".join(["many"] * (count - 1) + [last])


def lengths(path, text):
    path.write_text(text)
    return [(finding.line, finding.instead.split()[-1]) for finding in prose.check(path)]


@pytest.mark.parametrize(
    "page",
    [
        f"A title\n\n{words(13)}\n{words(12)}.\n",
        f"# Title\n\n- {words(25)}.\n- {words(24)}.\n",
        f"Short.\n\nIt ends: {words(12)}; {words(11)}.\n",
        f"{words(24)}.\nShort (Weiss et al. says so) and {words(20)}.\n",
    ],
)
def test_a_long_sentence_of_a_page_is_found_at_its_line(tmp_path, page):
    ((line, count),) = lengths(tmp_path / "page.md", page)
    assert line == next(i for i, text in enumerate(page.split("\n"), 1) if "many" in text and words(24) + "." != text)
    assert count == "25" or "Weiss" in page and count == "27"


@pytest.mark.parametrize(
    "page",
    [
        f"{words(24)}. {words(24)}? {words(24)}!\n",
        f"{words(20)}\n\n{words(20)}\n\n- {words(20)}\n- {words(20)}\n",
        f"```python\n{words(40)}\n```\n\n| {words(40)} |\n| --- |\n| {words(40)} |\n",
        f"{words(22)} `code {words(30)}` $x {words(30)}$.\n",
        f"The rules are {', '.join(['[a](b.md)'] * 30)} and {', '.join(['`a`'] * 30)}.\n",
        f"{words(23)} (Kingma & Ba 2015, arXiv:1412.6980, and others who wrote in that year).\n",
    ],
)
def test_code_equations_tables_and_lists_of_names_are_not_long(tmp_path, page):
    assert lengths(tmp_path / "page.md", page) == []


def test_a_long_sentence_of_a_notebook_is_found_at_its_cell(tmp_path):
    cells = [
        {"cell_type": "code", "source": [words(40)]},
        {"cell_type": "markdown", "source": ["A title\n", f"`code` {words(24)}.\n"]},
    ]
    text = json.dumps({"cells": cells}, indent=1)
    ((line, count),) = lengths(tmp_path / "notebook.ipynb", text)
    assert count == "27" and "A title" in text.split("\n")[line - 1]


DOCUMENTED = f'''"""{words(25)}."""


def shown(x, y):
    """A title.

    {words(25)}.

    Args:
      x: {words(12)}; {words(13)}. Default: 1.
      y: {words(25)}.

    >>> shown({words(30)})
    {words(30)}
    """

    def inner():
        """{words(25)}."""


def _hidden():
    """{words(25)}."""


class Thing:
    def method(self):
        """{words(26)}."""
'''


def test_long_sentences_of_public_docstrings_are_found(tmp_path):
    assert lengths(tmp_path / "module.py", DOCUMENTED) == [(1, "25"), (7, "25"), (11, "25"), (27, "26")]


@pytest.mark.parametrize(("text", "count"), [("What it does.", 1), ("How it is.", 1), ("The work. What it does.", 0)])
def test_a_docstring_begins_with_no_clause(tmp_path, text, count):
    assert len(found(tmp_path / "module.py", f'def shown():\n    """{text}"""\n')) == count


def test_the_exit_status_tells_a_finding(tmp_path, capsys):
    clean, planted = tmp_path / "clean.md", tmp_path / "planted.md"
    clean.write_text("A clear sentence, `anew`.\n")
    planted.write_text("A sentence.\nIt compiles anew.\n")
    assert prose.main([str(clean)]) == 0 and capsys.readouterr().out == ""
    assert prose.main([str(clean), str(planted)]) == 1
    assert "planted.md:2: 'anew'. Use again" in capsys.readouterr().out


def test_the_repository_is_clean():
    paths = prose.files()
    names = {path.name for path in paths}
    assert {"README.md", "guide.md", "lift.py", "01_from_gradient_to_update.ipynb"} <= names
    assert [finding for path in paths for finding in prose.check(path)] == []
