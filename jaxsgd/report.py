"""One form for the result of every tool: an answer, its reasons, what to do next, a table.

A tool's result is a dataclass that inherits from `Report` and has four attributes. Text, rich, HTML, Markdown, JSON and
the picture all follow from them.
"""

from __future__ import annotations

import dataclasses
import enum
import html
import importlib
import json
import math
import textwrap
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np

__all__ = ["MORE", "OMITTED", "Column", "Report", "Table", "bytes_text", "number", "plus_minus", "span"]

MORE = "More: text(verbose=True)"
"""The last line of a text without its details."""
WIDTH = 80
DIGITS = 3
GAP = 2
NARROWEST = 16
"""A column of text is wrapped to no less than this."""
UNITS = ("B", "KiB", "MiB", "GiB", "TiB", "PiB")
KINDS = ("number", "share", "bytes", "range", "text")

OMITTED: Mapping[str, Any] = {"omitted": True}
"""The metadata of a field that is in no dict and no JSON, such as the states of runs: ``field(metadata=OMITTED)``."""


# -- numbers ---------------------------------------------------------------------------------------


def number(value: Any, digits: int = DIGITS) -> str:
    """A number as text with three significant digits.

    Args:
      value: a number, a bool (``"yes"`` or ``"no"``), None or NaN (``"-"``). Integers keep all their digits.
      digits: significant digits of a float. Default: 3.

    >>> number(0.0568888), number(26140.3), number(2434000.0), number(1437)
    ('0.0569', '26,100', '2.43e6', '1,437')
    """
    if value is None:
        return "-"
    if isinstance(value, bool | np.bool_):
        return "yes" if value else "no"
    if isinstance(value, int | np.integer) and abs(int(value)) < 10**12:
        return f"{int(value):,}"
    value = float(value)
    if math.isnan(value):
        return "-"
    if math.isinf(value) or value == 0:
        return "0" if value == 0 else "inf" if value > 0 else "-inf"
    exact = f"{value:.{digits - 1}e}"
    mantissa, _, exponent = exact.partition("e")
    power = int(exponent)
    text = f"{float(exact):,.{max(0, digits - 1 - power)}f}" if -4 <= power < 6 else mantissa
    text = text.rstrip("0").rstrip(".") if "." in text else text
    return text if -4 <= power < 6 else f"{text}e{power}"


def plus_minus(value: float, error: float) -> str:
    """A value and its error: ``"95.3 +- 4.1"``."""
    return f"{number(value)} +- {number(error, 2)}"


def span(low: Any, high: Any) -> str:
    """Two ends: ``"0.004 to 0.016"``."""
    return f"{number(low)} to {number(high)}"


def bytes_text(size: float) -> str:
    """Bytes with a unit: ``"15.8 GiB"``."""
    power = _power(abs(size))
    return f"{number(int(size) if power == 0 else size / 1024**power)} {UNITS[power]}"


def _power(size: float) -> int:
    power = 0
    while power < len(UNITS) - 1 and size >= 1000 * 1024**power:
        power += 1
    return power


# -- tables ----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Column:
    """A column of a `Table`.

    Attributes:
      name: the head; with underscores for spaces the key in `Report.records`.
      unit: below the head, such as ``"s"``. Default: none.
      kind: ``"number"``; ``"share"``, shown in percent; ``"bytes"``, shown in the unit of the largest, or each in
        its own if they differ a thousandfold; ``"range"``, a pair of numbers; or ``"text"``, on the left. All others
        are on the right. Default: ``"number"``.
    """

    name: str
    unit: str = ""
    kind: str = "number"

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise ValueError(f"kind={self.kind!r}: a column has no such kind. Use one of {', '.join(KINDS)}")

    @property
    def key(self) -> str:
        return self.name.replace(" ", "_")


@dataclass(frozen=True, repr=False)
class Table:
    """Rows of values under typed columns.

    Attributes:
      columns: a `Column` for each value of a row.
      rows: the values themselves, not text: numbers, pairs, strings, or None where there is none.
      best: the index of the row to mark. Default: none.
      mark: what the mark means. Default: ``"best"``.
      title: a line above. Default: none.
    """

    columns: tuple[Column, ...]
    rows: tuple[tuple[Any, ...], ...]
    best: int | None = None
    mark: str = "best"
    title: str = ""

    def __post_init__(self) -> None:
        for row in self.rows:
            if len(row) != len(self.columns):
                raise ValueError(f"rows: {len(row)} values under {len(self.columns)} columns. Use one value a column")

    def __str__(self) -> str:
        return self.text()

    __repr__ = __str__

    def records(self) -> list[dict[str, Any]]:
        """A dict for each row, with the columns' names (``_`` for spaces) as keys."""
        return [{c.key: value for c, value in zip(self.columns, row, strict=True)} for row in self.rows]

    def cells(self) -> tuple[list[str], list[str], list[list[str]]]:
        """``(heads, units, rows)`` as text."""
        units, out = [], [[] for _ in self.rows]
        for i, column in enumerate(self.columns):
            values = [row[i] for row in self.rows]
            unit, texts = _formatted(column, values)
            units.append(unit)
            for cells, text in zip(out, texts, strict=True):
                cells.append(text)
        return [column.name for column in self.columns], units, out

    def text(self, width: int = WIDTH) -> str:
        """The table in at most ``width`` columns; columns that find no room follow below, after the first again."""
        heads, units, rows = self.cells()
        marked = ["*" if i == self.best else "" for i in range(len(rows))]
        gutter = 2 if self.best is not None else 0
        blocks = []
        start = " " * gutter
        for index, widths in _blocks(self.columns, heads, units, rows, width - gutter):
            tops = [_top(heads[i], units[i], widths[i]) for i in index]
            lines = []
            for k in range(max(map(len, tops))):
                lines += [_line([top[k] if k < len(top) else "" for top in tops], widths, self._aligned(index), start)]
            for row, mark in zip(rows, marked, strict=True):
                wrapped = [textwrap.wrap(row[i], w, break_long_words=True) or [""] for i, w in widths.items()]
                for k in range(max(map(len, wrapped))):
                    cells = [part[k] if k < len(part) else "" for part in wrapped]
                    lines += [_line(cells, widths, self._aligned(index), f"{mark if k == 0 else '':<{gutter}}")]
            blocks.append("\n".join(lines))
        out = "\n\n".join(blocks)
        if self.title:
            out = f"{textwrap.fill(self.title, width)}\n{out}"
        return f"{out}\n* {self.mark}" if self.best is not None else out

    def _aligned(self, index: Sequence[int]) -> list[bool]:
        """Which columns are on the left."""
        return [self.columns[i].kind == "text" for i in index]

    def rich(self, width: int = WIDTH) -> list[Any]:
        """The same as tables of rich, one for each block of columns."""
        from rich.table import Table as Drawn

        heads, units, rows = self.cells()
        out: list[Any] = [self.title] if self.title else []
        marked = self.best is not None
        gutter = 1 + GAP if marked else 0
        for index, widths in _blocks(self.columns, heads, units, rows, width - gutter):
            drawn = Drawn(box=None, pad_edge=False, padding=(0, GAP, 0, 0), header_style="bold")
            if marked:
                drawn.add_column(width=1)
            for i in index:
                head = f"{heads[i]}\n({units[i]})" if units[i] else heads[i]
                side = "left" if self.columns[i].kind == "text" else "right"
                drawn.add_column(head, justify=side, max_width=widths[i], overflow="fold")
            for k, row in enumerate(rows):
                mark = ["*" if k == self.best else ""] if marked else []
                style = "bold green" if k == self.best else None
                drawn.add_row(*mark, *(_literal(row[i]) for i in index), style=style)
            out += [drawn]
        return [*out, _literal(f"* {self.mark}")] if marked else out

    def html(self) -> str:
        heads, units, rows = self.cells()
        side = ["left" if c.kind == "text" else "right" for c in self.columns]

        def row_of(tag: str, cells: Sequence[str], style: str = "") -> str:
            made = (
                f'<{tag} style="text-align:{s};padding:2px 10px">{html.escape(cell)}</{tag}>'
                for cell, s in zip(cells, side, strict=True)
            )
            return f"<tr{style}>{''.join(made)}</tr>"

        top = [f"{head} ({unit})" if unit else head for head, unit in zip(heads, units, strict=True)]
        marked = f' style="font-weight:bold;background:rgba(43,154,102,.18)" title="{html.escape(self.mark)}"'
        body = "".join(row_of("td", row, marked if i == self.best else "") for i, row in enumerate(rows))
        title = f"<caption>{html.escape(self.title)}</caption>" if self.title else ""
        note = f"<small>bold: {html.escape(self.mark)}</small>" if self.best is not None else ""
        return (
            '<div style="overflow-x:auto"><table style="border-collapse:collapse">'
            f"{title}<thead>{row_of('th', top)}</thead><tbody>{body}</tbody></table>{note}</div>"
        )

    def markdown(self) -> str:
        heads, units, rows = self.cells()
        top = [f"{head} ({unit})" if unit else head for head, unit in zip(heads, units, strict=True)]
        rule = ["---" if c.kind == "text" else "---:" for c in self.columns]
        shown = [[f"**{cell}**" if i == self.best and cell else cell for cell in row] for i, row in enumerate(rows)]
        lines = ["| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |" for row in (top, rule, *shown)]
        lines += ["", f"Bold: {self.mark}."] if self.best is not None else []
        return "\n".join([self.title, "", *lines] if self.title else lines)


def _formatted(column: Column, values: Sequence[Any]) -> tuple[str, list[str]]:
    """``(unit, cells)`` of a column."""
    if column.kind == "text":
        return column.unit, ["" if value is None else str(value) for value in values]
    if column.kind == "range":
        return column.unit, ["-" if value is None else span(*value) for value in values]
    if column.kind == "share":
        return "%", ["-" if value is None else number(round(100 * float(value), 1)) for value in values]
    if column.kind == "bytes":
        sizes = [abs(value) for value in values if value]
        if sizes and max(sizes) > 1000 * min(sizes):
            return "", ["-" if value is None else bytes_text(value) for value in values]
        power = _power(max(sizes, default=0))
        scaled = [value if value is None or power == 0 else value / 1024**power for value in values]
        return UNITS[power], [number(value) for value in scaled]
    return column.unit, [value if isinstance(value, str) else number(value) for value in values]


def _blocks(
    columns: Sequence[Column], heads: list[str], units: list[str], rows: list[list[str]], width: int
) -> list[tuple[list[int], dict[int, int]]]:
    """Columns that fit side by side, with their widths; each block begins with the first column."""
    sizes = [max(len(units[i]) + 2 if units[i] else 0, *(len(row[i]) for row in rows), 0) for i in range(len(columns))]
    natural = [max(n, len(head)) for n, head in zip(sizes, heads, strict=True)]
    if sum(natural) + GAP * (len(columns) - 1) > width:  # heads of several words take several lines
        natural = [max(n, *map(len, head.split())) for n, head in zip(sizes, heads, strict=True)]
    least = [min(n, NARROWEST) if c.kind == "text" else n for n, c in zip(natural, columns, strict=True)]
    blocks: list[list[int]] = []
    for i in range(len(columns)):
        if blocks and sum(least[k] + GAP for k in blocks[-1]) + least[i] <= width:
            blocks[-1].append(i)
        else:
            blocks.append([0, i] if i else [0])
    out = []
    for index in blocks:
        widths = {i: natural[i] for i in index}
        while sum(widths.values()) + GAP * (len(index) - 1) > width:
            wide = max((i for i in index if widths[i] > least[i]), key=widths.__getitem__, default=None)
            if wide is None:
                break
            widths[wide] -= 1
        out.append((index, widths))
    return out


def _top(head: str, unit: str, width: int) -> list[str]:
    """The lines above a column."""
    return [*textwrap.wrap(head, width), *([f"({unit})"] if unit else [])]


def _line(cells: Sequence[str], widths: Mapping[int, int], left: Sequence[bool], start: str) -> str:
    placed = zip(cells, widths.values(), left, strict=True)
    return (start + (" " * GAP).join(c.ljust(w) if on_left else c.rjust(w) for c, w, on_left in placed)).rstrip()


# -- reports ---------------------------------------------------------------------------------------


class Report:
    """The result of a tool.

    A subclass is a ``@dataclass(frozen=True, repr=False)`` with the four attributes below, each a field or a property.
    (They have no default here: a dataclass would take it for a field's.) It names its picture.

    Attributes:
      summary: the answer, in one sentence.
      why: what it rests on, a sentence each.
      next: what to do, an action each.
      table: the evidence, a `Table`.
      picture: the function of `jaxsgd.plot` that draws it.
      in_dict: properties that `to_dict` has beside the fields.

    >>> @dataclass(frozen=True, repr=False)
    ... class Race(Report):
    ...     seconds: dict
    ...     @property
    ...     def summary(self): return f"{min(self.seconds, key=self.seconds.get)} is fastest"
    ...     @property
    ...     def why(self): return ("each ran once",)
    ...     @property
    ...     def next(self): return ("run each five times",)
    ...     @property
    ...     def table(self):
    ...         rows = tuple(self.seconds.items())
    ...         return Table((Column("rule", kind="text"), Column("time", "s")), rows, best=1)
    >>> Race({"adam": 2.0, "sgd": 1.23456})
    sgd is fastest
      - each ran once
    Next: run each five times
    <BLANKLINE>
      rule  time
             (s)
      adam     2
    * sgd   1.23
    * best
    """

    summary: str
    why: tuple[str, ...]
    next: tuple[str, ...]
    table: Table
    picture: ClassVar[str] = ""
    in_dict: ClassVar[tuple[str, ...]] = ()

    @property
    def details(self) -> tuple[Table | Report | str, ...]:
        """The rest, for ``text(verbose=True)``."""
        return ()

    def text(self, *, verbose: bool = False, width: int = WIDTH) -> str:
        """The report as text, the answer first.

        Args:
          verbose: append the details. Default: False.
          width: columns of the terminal. Default: 80.
        """
        lines = [_wrapped(self.summary, width)]
        lines += [_wrapped(reason, width, "  - ", "    ") for reason in self.why]
        actions = list(self.next)
        if len(actions) == 1:
            lines += [_wrapped(actions[0], width, "Next: ", "      ")]
        elif actions:
            lines += ["Next:", *(_wrapped(action, width, "  - ", "    ") for action in actions)]
        if self.table.rows:
            lines += ["", self.table.text(width)]
        if verbose:
            for part in self.details:
                lines += ["", part if isinstance(part, str) else _text(part, width)]
        elif self.details:
            lines += ["", MORE]
        return "\n".join(lines)

    def __str__(self) -> str:
        return self.text()

    def __repr__(self) -> str:
        return self.text()

    def __rich__(self) -> Any:
        from rich.console import Group
        from rich.text import Text

        parts: list[Any] = [Text(self.summary, style="bold")]
        parts += [Text(f"  - {reason}") for reason in self.why]
        parts += [Text(f"Next: {action}", style="cyan") for action in self.next]
        if self.table.rows:
            parts += [Text(""), *self.table.rich()]
        return Group(*parts)

    def _repr_html_(self) -> str:
        parts = [f"<p><b>{html.escape(self.summary)}</b></p>", _list(self.why)]
        if self.next:
            parts += [f"<p>Next:</p>{_list(self.next)}"]
        if self.table.rows:
            parts += [self.table.html()]
        more = "".join(_html(part) for part in self.details)
        if more:
            parts += [f"<details><summary>details</summary>{more}</details>"]
        return f"<div>{''.join(parts)}</div>"

    def to_markdown(self, *, verbose: bool = False) -> str:
        """The report as Markdown.

        Args:
          verbose: append the details. Default: False.
        """
        parts = [f"**{self.summary}**"]
        if self.why:
            parts += ["\n".join(f"- {reason}" for reason in self.why)]
        if self.next:
            parts += ["Next:", "\n".join(f"- {action}" for action in self.next)]
        if self.table.rows:
            parts += [self.table.markdown()]
        for part in self.details if verbose else ():
            if isinstance(part, str):
                parts += [f"```\n{part}\n```"]
            else:
                parts += [part.markdown() if isinstance(part, Table) else part.to_markdown(verbose=True)]
        return "\n\n".join(parts)

    def records(self) -> list[dict[str, Any]]:
        """The rows of ``table`` as dicts, for ``pandas.DataFrame(report.records())``."""
        return [{key: _plain(value) for key, value in row.items()} for row in self.table.records()]

    def to_dict(self) -> dict[str, Any]:
        """The result as plain Python: the four attributes and every field, arrays as lists."""
        plain = {name: _plain(getattr(self, name)) for name in (*_names(self), "summary", "why", "next")}
        return {"tool": type(self).__name__} | plain | {"table": self.records()}

    def to_json(self, *, indent: int | None = 2) -> str:
        """`to_dict` as JSON, with null for what is not finite.

        Args:
          indent: spaces a level; None for one line. Default: 2.
        """
        return json.dumps(_finite(self.to_dict()), indent=indent, allow_nan=False)

    def plot(self, *args: Any, **kwargs: Any) -> Any:
        """Draw it: the function of `jaxsgd.plot` named by ``picture``, with the same further arguments.

        Returns:
          A matplotlib figure.

        Raises:
          ImportError: matplotlib is not installed.
        """
        # By name: pictures are a floor above.
        return getattr(importlib.import_module("jaxsgd.plot"), self.picture)(self, *args, **kwargs)


def _wrapped(text: str, width: int, first: str = "", rest: str = "") -> str:
    """Lines of at most ``width`` columns; those of the text itself are kept."""
    out = []
    for i, line in enumerate(text.split("\n")):
        out += [textwrap.fill(line, width, initial_indent=rest if i else first, subsequent_indent=rest)]
    return "\n".join(out)


def _text(part: Table | Report, width: int) -> str:
    return part.text(width) if isinstance(part, Table) else part.text(verbose=True, width=width)


def _html(part: Table | Report | str) -> str:
    if isinstance(part, str):
        return f"<pre>{html.escape(part)}</pre>"
    return part.html() if isinstance(part, Table) else part._repr_html_()


def _list(items: Iterable[str]) -> str:
    made = "".join(f"<li>{html.escape(item)}</li>" for item in items)
    return f"<ul>{made}</ul>" if made else ""


def _literal(text: str) -> Any:
    """Text whose brackets rich does not read as markup."""
    from rich.text import Text

    return Text(text)


def _names(value: Any) -> list[str]:
    """The fields of a dataclass, without those omitted, and the properties that it names in ``in_dict``."""
    fields = [f.name for f in dataclasses.fields(value) if not f.metadata.get("omitted")]
    return [*fields, *getattr(value, "in_dict", ())]


def _plain(value: Any) -> Any:
    """A value as JSON knows it, but for numbers that are not finite."""
    if isinstance(value, Report):
        return value.to_dict()
    if isinstance(value, enum.Enum):
        return value.value
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if names := getattr(value, "_fields", None):  # a NamedTuple
        return {name: _plain(getattr(value, name)) for name in names}
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {name: _plain(getattr(value, name)) for name in _names(value)}
    if isinstance(value, Mapping):
        return {str(key): _plain(v) for key, v in value.items()}
    if isinstance(value, list | tuple | set | frozenset):
        return [_plain(v) for v in value]
    return np.asarray(value).tolist() if hasattr(value, "dtype") else str(value)


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _finite(v) for key, v in value.items()}
    if isinstance(value, list):
        return [_finite(v) for v in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
