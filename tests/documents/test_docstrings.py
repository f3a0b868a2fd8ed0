"""The API pages show doctests as code."""

import doctest

import pytest

import jaxsgd

docstrings = pytest.importorskip("docstrings", reason="needs griffe, of the extra docs", exc_type=ImportError)


def test_a_bare_doctest_gets_a_heading():
    text = "A sum.\n\nRaises:\n  ValueError: none.\n\n>>> 1 + 1\n2\n\n>>> 2 + 2\n4\n\nMore words."
    made = docstrings.with_sections(text)
    assert made.count("Examples:") == 1 and made.endswith("\n\nMore words.")
    assert "\n\nExamples:\n    >>> 1 + 1\n    2\n" in made and "\n    >>> 2 + 2\n    4\n" in made
    assert docstrings.with_sections("A.\n\nExample:\n  >>> 1\n  1") == "A.\n\nExamples:\n  >>> 1\n  1"
    assert docstrings.with_sections("No example, but a >>> b.") == "No example, but a >>> b."


@pytest.mark.parametrize("name", ["probe", "sweep", "minimize", "make_step"])
def test_the_examples_of_a_docstring_stay_what_they_are(name):
    griffe = pytest.importorskip("griffe")
    text = docstrings.with_sections(getattr(jaxsgd, name).__doc__.replace("\n    ", "\n"))
    sections = griffe.Docstring(text).parse("google")
    shown = [part for s in sections if s.kind.value == "examples" for kind, part in s.value if kind.value == "examples"]
    sources = [example.source for example in doctest.DocTestParser().get_examples(getattr(jaxsgd, name).__doc__)]
    assert [e.source for part in shown for e in doctest.DocTestParser().get_examples(part)] == sources
