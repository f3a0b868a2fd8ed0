"""Find words in our prose that read as translated, and say what to write instead.

    python tools/prose.py              # the whole repository; exit status 1 if a word is found
    python tools/prose.py README.md    # some files

Prose is Markdown outside code, Markdown cells of notebooks, docstrings outside examples, and the strings of errors,
warnings and command help. Code between backticks is not prose.
"""

from __future__ import annotations

import argparse
import ast
import json
import pathlib
import re
from collections.abc import Iterator
from typing import NamedTuple

__all__ = ["BANNED", "Finding", "check", "files", "main", "markdown_prose", "notebook_prose", "python_prose"]

ROOT = pathlib.Path(__file__).parent.parent

BANNED = {
    "in words": "the error itself: raise a clear error",
    "anew": "again; of programs: recompile",
    "wholly": "entirely, or nothing",
    "by and by": "gradually, or a number of steps",
    "somebody": "the user",
    "lies": "is, or is placed on",
    "trainings": "runs",
    r"floor \d+": "nothing: the layer test holds the layers",
    "compiles? anything": "recompile",
    "hurts? elsewhere": "what the library adds",
    "does not see": "cannot represent",
    "by where it": "the state's sharding decides",
    "saves and leaves": "it saves and exits",
    "leaves? with status": "exits with status",
    "is an answer, with": "it says so and suggests changes",
    "in the measure of": "preconditioned by the optimizer's state",
    "a tie takes": "ties go to",
    "which holds 0": "not significant, with the interval",
    "of now": "the current ...",
    "by default where": "Default: ...",
    "than the call says": "per-leaf overrides",
    "was given away": "was donated",
    "takes? its memory": "uses N bytes",
    "for ever": "forever, or the condition that ends it",
    "of it": "its ..., or the noun",
    "nobody": "the noun that is meant, or the passive",
    "everybody": "all ..., with the noun",
    "one's own": "your own",
    "(?:say|tell|show|know|keep|report|see|decide)s? what": "a noun: says the reason, keeps the leaves that fit",
    "(?:said|told|kept) what": "a noun: reported the leaves that differ",
    "what (?:is|are|was|were) (?:said|told|shown|reset|kept|left)": "a noun: the report, the values that are reset",
    "go(?:es)? on from": "continue from",
}
"""A regular expression of words, and the text to write instead. Spaces match line ends."""

PATTERN = re.compile(
    "|".join(rf"(?P<w{i}>\b{words}\b)" for i, words in enumerate(BANNED)).replace(" ", r"\s+"), re.IGNORECASE
)
FENCE = re.compile(r"^[ \t]*(```|~~~).*?^[ \t]*\1[ \t]*$", re.DOTALL | re.MULTILINE)
INLINE = re.compile(r"``.+?``|`[^`]*`|<!--.*?-->|\]\([^)]*\)", re.DOTALL)
DOCTEST = re.compile(r"^[ \t]*(?:>>>|\.\.\.).*(?:\n(?![ \t]*$)(?![ \t]*>>>).*)*", re.MULTILINE)
SPEAKS = {"warn", "error", "exit", "fail"}
"""Functions whose string arguments the user reads, besides exceptions."""


class Finding(NamedTuple):
    """A banned word.

    Attributes:
      file: path, relative to the repository.
      line: line number, from 1. In a notebook: the line in the file's JSON text.
      word: the words as they were written.
      instead: what to write.
    """

    file: str
    line: int
    word: str
    instead: str


def _blank(found: re.Match[str]) -> str:
    return re.sub(r"[^\n]", "#", found[0])


def markdown_prose(text: str) -> str:
    """The text with code, comments and link targets blanked, of the same length in lines."""
    return INLINE.sub(_blank, FENCE.sub(_blank, text))


def _strings(node: ast.AST) -> Iterator[ast.Constant]:
    for child in ast.walk(node):
        if isinstance(child, ast.Constant) and isinstance(child.value, str):
            yield child


def _spoken(node: ast.AST) -> Iterator[ast.AST]:
    """The parts of a node whose strings a user reads."""
    if isinstance(node, ast.Raise) and node.exc is not None:
        yield node.exc
    if isinstance(node, ast.Call):
        name = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
        if name in SPEAKS or name.endswith(("Error", "Warning")):
            yield from node.args
        yield from (word.value for word in node.keywords if word.arg in ("help", "description", "epilog"))


def python_prose(source: str) -> Iterator[tuple[int, str]]:
    """Line and text of each docstring, also those below an assignment, and of each string that a user reads."""
    seen: set[int] = set()
    for node in ast.walk(ast.parse(source)):
        strings: list[ast.Constant] = []
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str):
            strings.append(node.value)
        for part in _spoken(node):
            strings.extend(_strings(part))
        for string in strings:
            if id(string) not in seen:
                seen.add(id(string))
                yield string.lineno, markdown_prose(DOCTEST.sub(_blank, str(string.value)))


def notebook_prose(text: str) -> Iterator[tuple[int, str]]:
    """Line in the JSON text, and text, of each Markdown cell."""
    lines = text.split("\n")
    at = 0
    for cell in json.loads(text)["cells"]:
        if cell["cell_type"] != "markdown":
            continue
        source = "".join(cell["source"])
        first = json.dumps(source.split("\n")[0], ensure_ascii=False)[:-1]
        at = next((i for i in range(at, len(lines)) if lines[i].lstrip().startswith(first)), at)
        yield at + 1, markdown_prose(source)


def check(path: pathlib.Path) -> list[Finding]:
    """The banned words in one file.

    Args:
      path: a Markdown, Python or notebook file.

    Returns:
      Its findings, by line.
    """
    text = path.read_text(encoding="utf-8")
    if path.suffix == ".py":
        parts = python_prose(text)
    elif path.suffix == ".ipynb":
        parts = notebook_prose(text)
    else:
        parts = iter([(1, markdown_prose(text))])
    name = str(path.relative_to(ROOT)) if path.is_relative_to(ROOT) else str(path)
    findings = []
    for line, prose in parts:
        for match in PATTERN.finditer(prose):
            instead = list(BANNED.values())[int((match.lastgroup or "w0")[1:])]
            findings.append(Finding(name, line + prose.count("\n", 0, match.start()), match[0], instead))
    return sorted(findings)


def files(root: pathlib.Path = ROOT) -> list[pathlib.Path]:
    """The files of the repository that hold prose."""
    found = [root / name for name in ("README.md", "CHANGELOG.md", "CONTRIBUTING.md", "SECURITY.md")]
    for pattern in ("docs/*.md", "jaxsgd/**/*.py", "tools/*.py", "notebooks/*.ipynb"):
        found.extend(sorted(root.glob(pattern)))
    return [path for path in found if path.exists() and path.name != "prose.py"]


def main(argv: list[str] | None = None) -> int:
    """Print each finding as `file:line: word`. Returns the exit status: 1 if there is a finding."""
    parser = argparse.ArgumentParser(description="Find banned words in prose.")
    parser.add_argument("paths", nargs="*", type=pathlib.Path, help="files. Default: the whole repository")
    paths = [path.resolve() for path in parser.parse_args(argv).paths] or files()
    findings = [finding for path in paths for finding in check(path)]
    for finding in findings:
        word = " ".join(finding.word.split())
        print(f"{finding.file}:{finding.line}: {word!r}. Use {finding.instead}.")
    return 1 if findings else 0


if __name__ == "__main__":
    raise SystemExit(main())
