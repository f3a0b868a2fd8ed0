"""Docstrings as mkdocstrings reads them: a run of ``>>>`` lines is an example. A griffe extension, see mkdocs.yml."""

from __future__ import annotations

import re
import textwrap
from typing import Any

import griffe

__all__ = ["Doctests", "with_sections"]

HEADING = re.compile(r"^Example:$", re.MULTILINE)
BARE = re.compile(r"(?<=\n\n)>>> .*?(?=\n\n(?!>>> )|\Z)", re.DOTALL)


def with_sections(text: str) -> str:
    """A docstring whose ``Example:``, and whose doctests without a heading, stand below ``Examples:``."""
    text = HEADING.sub("Examples:", text)
    return BARE.sub(lambda found: "Examples:\n" + textwrap.indent(found[0].rstrip(), "    "), text)


class Doctests(griffe.Extension):
    """Gives doctests their heading in each docstring."""

    def on_object(self, *, obj: griffe.Object, **_: Any) -> None:
        if obj.docstring is not None:
            obj.docstring.value = with_sections(obj.docstring.value)
