"""A table of a report, before it is shown anywhere."""

from __future__ import annotations

from dataclasses import dataclass

from rich.table import Table

from eptq_onnx.report.console import line

_NAME = 200
"""Characters of a name that a console shows."""


@dataclass(frozen=True)
class Sheet:
    """A table of texts.

    Parameters
    ----------
    title : str
    columns : tuple of str
    rows : tuple of tuple of str
    names : tuple of int
        Columns that hold names, which may be long, or contain anything.
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


def for_console(sheet: Sheet, *, everything: bool = True) -> Table:
    """Return a sheet as a table for a console; what is left out is counted below it."""
    most = len(sheet.rows) if everything or sheet.most is None else sheet.most
    left = len(sheet.rows) - most
    more = f"and {left} more, which --verbose and --report show" if left > 0 else None
    table = Table(*sheet.columns, title=line(sheet.title), title_justify="left", caption=more)
    table.caption_justify = "left"
    for k, row in enumerate(sheet.rows[:most]):
        style = "bold red" if k in sheet.alarming else ""
        cells = [
            line(text, style, most=_NAME) if c in sheet.names else line(text, style)
            for c, text in enumerate(row)
        ]
        for cell in cells:
            cell.overflow = "fold"  # what is cut off cannot be copied
        table.add_row(*cells)
    return table
