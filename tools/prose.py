"""Find words in our prose that read as translated, and sentences that are too long.

    python tools/prose.py              # the whole repository; exit status 1 if there is a finding
    python tools/prose.py README.md    # some files

Prose is Markdown outside code, Markdown cells of notebooks, docstrings outside examples, and strings: those of errors,
warnings and command help, and all of three words or more. Code between backticks is not prose.

The length of a sentence is held in Markdown and in public docstrings. There a code span, an equation, a source in
brackets, and a list of code spans or links count as one word. Tables are left out. A public docstring begins with a
noun or a verb, not with "What" or "How".
"""

from __future__ import annotations

import argparse
import ast
import inspect
import itertools
import json
import pathlib
import re
from collections.abc import Iterable, Iterator
from typing import NamedTuple

__all__ = [
    "BANNED",
    "LONGEST",
    "Finding",
    "check",
    "files",
    "long_sentences",
    "main",
    "markdown_prose",
    "notebook_cells",
    "public_docstrings",
    "python_prose",
]

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
LONGEST = 24
"""Words of the longest sentence. The guide says about 20."""

UNLIMITED = ("CHANGELOG.md",)
"""Files whose sentences may be longer: items of a list.

In these only the strings of errors, warnings and command help are checked, besides docstrings.
"""

CLAUSE = "a noun to begin a docstring"
NO_PROSE = re.compile(r"^[ \t]*\|[^\n]*$|^[ \t]*=+ +=[^\n]*(?:\n[^\n]*\S[^\n]*)*$|<!--.*?-->|<[^>\n]+>", re.M | re.S)
"""Tables of Markdown and of plain text, comments and tags."""

INDENTED = re.compile(r"(?<=\n\n)(?: {4}.*\n?)+")
SPAN = re.compile(r"``.+?``|`[^`]*`|\$\$.+?\$\$|\$[^$]+\$|\([^()]*\b(?:1[89]|20)\d\d\b[^()]*\)", re.DOTALL)
"""Code, an equation, or a source in brackets."""

LINK = re.compile(r"!?\[((?:[^\[\]]|\[[^\[\]]*\])*)\]\([^)]*\)")
LISTED = re.compile(r"\x00(?:(?:,?\s+(?:and|or)\s+|[,;]\s+)\x00)+")
PARAGRAPH = re.compile(r"\n[ \t]*\n|\n(?=[ \t]*(?:[-*+]|\d+\.|#+)[ \t])")
"""Where a paragraph, an item of a list or a heading ends."""

ENTRIES = re.compile(r"^(?:Args|Attributes|Example|Examples|Raises|Returns|Yields):\n(?: .*\n?)*", re.MULTILINE)
"""A section of a docstring: noun phrases, which colons, semicolons and line ends without indentation separate."""

ENDS = re.compile(r"(?<!\bal)(?<!\bno)[.!?][\"')\]*]*(?=\s|$)")
ENDS_ENTRY = re.compile(rf"{ENDS.pattern}|[:;](?=\s|$)|\n(?=  \S)")
SPEAKS = {"warn", "error", "exit", "fail"}
"""Functions whose string arguments the user reads, besides exceptions."""


class Finding(NamedTuple):
    """A banned word, or a sentence that is too long.

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


def _newlines(found: re.Match[str]) -> str:
    return "\n" * found[0].count("\n")


def _one_word(found: re.Match[str]) -> str:
    """One word that no sentence ends in, and the line ends of the text that it replaces."""
    return "\x00" + _newlines(found)


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


def python_prose(source: str, printed: bool = True) -> Iterator[tuple[int, str]]:
    """Line and text of each docstring, also those below an assignment, and of each string that a user reads.

    Args:
      source: Python code.
      printed: take every string of three words or more, such as those of reports. Default: True.
    """
    seen: set[int] = set()
    for node in ast.walk(ast.parse(source)):
        strings: list[ast.Constant] = []
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str):
            strings.append(node.value)
        for part in _spoken(node):
            strings.extend(_strings(part))
        if printed and isinstance(node, ast.Constant) and isinstance(node.value, str) and len(node.value.split()) > 2:
            strings.append(node)
        for string in strings:
            if id(string) not in seen:
                seen.add(id(string))
                yield string.lineno, markdown_prose(DOCTEST.sub(_blank, str(string.value)))


def notebook_cells(text: str) -> Iterator[tuple[int, str]]:
    """Line in the JSON text, and source, of each Markdown cell."""
    lines = text.split("\n")
    at = 0
    for cell in json.loads(text)["cells"]:
        if cell["cell_type"] != "markdown":
            continue
        source = "".join(cell["source"])
        first = json.dumps(source.split("\n")[0], ensure_ascii=False)[:-1]
        at = next((i for i in range(at, len(lines)) if lines[i].lstrip().startswith(first)), at)
        yield at + 1, source


def public_docstrings(source: str) -> Iterator[tuple[int, str]]:
    """Line and text of the docstring of the module, and of each public class, method and function, without examples."""

    def walk(node: ast.AST) -> Iterator[tuple[int, str]]:
        body: list[ast.stmt] = getattr(node, "body", [])
        first = body[0].value if body and isinstance(body[0], ast.Expr) else None
        if isinstance(first, ast.Constant) and isinstance(first.value, str):
            yield first.lineno, DOCTEST.sub(_newlines, inspect.cleandoc(first.value))
        for child in () if isinstance(node, ast.FunctionDef) else body:
            if isinstance(child, ast.FunctionDef | ast.ClassDef) and not child.name.startswith("_"):
                yield from walk(child)

    return walk(ast.parse(source))


def long_sentences(text: str) -> Iterator[tuple[int, str, int]]:
    """Line from 0, text and number of words of each sentence with more than `LONGEST` words.

    Code, an equation and a source in brackets are one word, and so is a list of these. Tables are left out.
    """
    for unread in (FENCE, INDENTED, NO_PROSE):
        text = unread.sub(_newlines, text)
    text = LISTED.sub(_one_word, SPAN.sub(_one_word, text))
    text = LISTED.sub(_one_word, LINK.sub(lambda found: found[1] if " " in found[1].strip() else "\x00", text))
    entries = [found.span() for found in ENTRIES.finditer(text)]
    stops = {0, len(text), *(found.start() for found in PARAGRAPH.finditer(text))}
    stops.update(at for span in entries for at in span)
    for begin, end in itertools.pairwise(sorted(stops)):
        ends = ENDS_ENTRY if any(first <= begin < last for first, last in entries) else ENDS
        at = begin
        for stop in [*(found.end() for found in ends.finditer(text, begin, end)), end]:
            sentence = text[at:stop]
            words = [word for word in sentence.split() if re.search(r"[^\W_]|\x00", word)]
            if len(words) > LONGEST:
                line = text.count("\n", 0, stop - len(sentence.lstrip()))
                yield line, " ".join(sentence.split()).replace("\x00", "`...`"), len(words)
            at = stop


def _unlimited(path: pathlib.Path) -> bool:
    return path.is_relative_to(ROOT) and str(path.relative_to(ROOT)).startswith(UNLIMITED)


def _too_long(path: pathlib.Path, text: str) -> Iterator[tuple[int, str, int]]:
    """Line from 1, text and number of words of the long sentences of a page, a notebook or public docstrings."""
    parts: Iterable[tuple[int, str]] = ()
    if _unlimited(path):
        return
    if path.suffix == ".py":
        parts = public_docstrings(text)
    elif path.suffix == ".ipynb":
        parts = notebook_cells(text)
    else:
        parts = [(1, text)]
    for line, part in parts:
        for at, sentence, words in long_sentences(part):
            yield line + at, sentence, words


def check(path: pathlib.Path) -> list[Finding]:
    """The banned words and the long sentences of one file.

    Args:
      path: a Markdown, Python or notebook file.

    Returns:
      Its findings, by line.
    """
    text = path.read_text(encoding="utf-8")
    if path.suffix == ".py":
        parts = python_prose(text, printed=not _unlimited(path))
    elif path.suffix == ".ipynb":
        parts = ((line, markdown_prose(cell)) for line, cell in notebook_cells(text))
    else:
        parts = iter([(1, markdown_prose(text))])
    name = str(path.relative_to(ROOT)) if path.is_relative_to(ROOT) else str(path)
    findings = []
    for line, prose in parts:
        for match in PATTERN.finditer(prose):
            instead = list(BANNED.values())[int((match.lastgroup or "w0")[1:])]
            findings.append(Finding(name, line + prose.count("\n", 0, match.start()), match[0], instead))
    if path.suffix == ".py" and not _unlimited(path):
        for line, part in public_docstrings(text):
            findings += [Finding(name, line, part.split()[0], CLAUSE)] if part.startswith(("What ", "How ")) else []
    for line, sentence, words in _too_long(path, text):
        findings.append(Finding(name, line, sentence, f"sentences of at most {LONGEST} words; it has {words}"))
    return sorted(findings)


def files(root: pathlib.Path = ROOT) -> list[pathlib.Path]:
    """The files of the repository that hold prose."""
    found = [root / name for name in ("README.md", "CHANGELOG.md", "CONTRIBUTING.md", "SECURITY.md")]
    for pattern in ("docs/*.md", "jaxsgd/**/*.py", "tools/*.py", "notebooks/*.ipynb"):
        found.extend(sorted(root.glob(pattern)))
    return [path for path in found if path.exists() and path.name != "prose.py"]


def main(argv: list[str] | None = None) -> int:
    """Print each finding as `file:line: word`. Returns the exit status: 1 if there is a finding."""
    parser = argparse.ArgumentParser(description="Find banned words and long sentences in prose.")
    parser.add_argument("paths", nargs="*", type=pathlib.Path, help="files. Default: the whole repository")
    paths = [path.resolve() for path in parser.parse_args(argv).paths] or files()
    findings = [finding for path in paths for finding in check(path)]
    for finding in findings:
        word = " ".join(finding.word.split())
        print(f"{finding.file}:{finding.line}: {word!r}. Use {finding.instead}.")
    return 1 if findings else 0


if __name__ == "__main__":
    raise SystemExit(main())
