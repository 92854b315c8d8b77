"""Tables and lists of a report, before they are shown anywhere, and how a console of any width shows them."""

from __future__ import annotations

import textwrap
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from rich.cells import cell_len
from rich.console import Console, ConsoleOptions, RenderableType
from rich.table import Table
from rich.text import Text

from eptq_onnx.report.console import line, shown

_INDENT = 4
"""Columns by which the second and further lines of an entry are moved."""
_BORDER = 3
"""Columns between two columns of a table."""
_LEAST = 24
"""Columns that the text of a labelled line gets, however narrow the console is."""


@dataclass(frozen=True)
class Sheet:
    """A table of texts.

    Parameters
    ----------
    title : str
    columns : tuple of str
    rows : tuple of tuple of str
    names : tuple of int
        Columns that hold names or options, which may be long, contain anything, and are there to be copied. A
        console breaks none of them, and elsewhere no word.
    alarming : frozenset of int
        Rows that say that something is wrong.
    most : int or None
        Rows that a console shows, unless it is to show everything; None for all.
    """

    title: str
    columns: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    names: tuple[int, ...] = ()
    alarming: frozenset[int] = frozenset()
    most: int | None = None


def for_console(sheet: Sheet, *, everything: bool = True) -> RenderableType:
    """Return a sheet for a console; what is left out is counted below it.

    It is a table, or where that would break a name, a list of entries, each of which begins with its name
    on a line of its own.
    """
    return _Shown(sheet, everything)


@dataclass(frozen=True)
class _Shown:
    """A sheet that looks at the width of the console."""

    sheet: Sheet
    everything: bool

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> Iterator[RenderableType]:
        widths = self._widths(options.max_width)
        if widths:
            yield self._table(widths)
            return
        yield line(self.sheet.title, "italic")
        for row, style in self._rows():
            yield from _entry(self.sheet, row, style, options.max_width)
        if self._left():
            yield line(self._left(), "italic")

    def _rows(self) -> Iterator[tuple[tuple[str, ...], str]]:
        most = len(self.sheet.rows) if self.everything or self.sheet.most is None else self.sheet.most
        for k, row in enumerate(self.sheet.rows[:most]):
            yield row, "bold red" if k in self.sheet.alarming else ""

    def _left(self) -> str:
        left = len(self.sheet.rows) - sum(1 for _ in self._rows())
        return f"and {left} more, which --verbose and --report show" if left > 0 else ""

    def _widths(self, most: int) -> list[int]:
        """Return the widths of the columns; none if a word of any would have to be broken."""
        least, full = [], []
        for k, head in enumerate(self.sheet.columns):
            cells = [shown(row[k]) for row, _ in self._rows()]
            whole = cells if k in self.sheet.names else [word for cell in cells for word in cell.split()]
            least.append(max(map(cell_len, [*whole, *head.split()]), default=1))
            full.append(max(map(cell_len, [*cells, head]), default=1))
        left = most - _BORDER * len(least) - 1 - sum(least)
        if left < 0:
            return []
        for _ in range(left):
            # The column that has most to wrap gets one more.
            k = max(range(len(least)), key=lambda k: full[k] / max(least[k], 1))
            if full[k] <= least[k]:
                break
            least[k] += 1
        return least

    def _table(self, widths: Sequence[int]) -> Table:
        table = Table(title=line(self.sheet.title), title_justify="left", caption=self._left() or None)
        table.caption_justify = "left"
        for name, width in zip(self.sheet.columns, widths, strict=True):
            table.add_column(name, width=width, overflow="fold")
        for row, style in self._rows():
            table.add_row(*(line(text, style) for text in row))
        return table


def _entry(sheet: Sheet, row: Sequence[str], style: str, width: int) -> Iterator[Text]:
    """Yield a row as lines: its name, and below that all else with the heads of the columns."""
    first = sheet.names[0] if sheet.names else 0
    yield unbroken(row[first], style)
    rest = "; ".join(
        f"{head}: {text}" if head else text
        for k, (head, text) in enumerate(zip(sheet.columns, row, strict=True))
        if k != first and text not in ("", "-")
    )
    for part in wrapped(rest, width - _INDENT):
        yield unbroken(" " * _INDENT + part, style)


def of_all(count: int, given: int, option: str = "") -> str:
    """Return ``128 of 250 samples (more with --samples)``, or ``128 samples`` if those are all."""
    if count >= given:
        return f"{count} sample{'s' * (count != 1)}"
    return f"{count} of {given} samples{f' (more with {option})' * bool(option)}"


def unbroken(text: str, style: str = "") -> Text:
    """Return a line that a console neither wraps nor cuts, if it prints without cropping."""
    found = line(text, style)
    found.no_wrap, found.overflow = True, "ignore"
    return found


def wrapped(text: str, width: int) -> list[str]:
    """Return lines of at most a width, but for words that are longer: recipes and names are to be copied."""
    return textwrap.wrap(shown(text), max(width, _LEAST), break_long_words=False, break_on_hyphens=False) or [
        ""
    ]


@dataclass(frozen=True)
class Labelled:
    """Lines, each with a label.

    Parameters
    ----------
    rows : tuple of (str, str, str)
        Label, text and style of the text.
    """

    rows: tuple[tuple[str, str, str], ...]

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> Iterator[RenderableType]:
        most = max((len(label) for label, _, _ in self.rows), default=0) + 2
        for label, text, style in self.rows:
            for k, part in enumerate(wrapped(text, options.max_width - most)):
                found = Text((label if k == 0 else "").ljust(most), style="bold")
                found.append_text(line(part, style))
                found.no_wrap, found.overflow = True, "ignore"
                yield found
