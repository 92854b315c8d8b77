"""The report as Markdown, for a comment or a wiki."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import TYPE_CHECKING

from eptq_onnx.report.command import command_of
from eptq_onnx.report.console import shown
from eptq_onnx.report.facts import facts, layer_sheet, sheets, warnings_of
from eptq_onnx.report.sheet import Sheet

if TYPE_CHECKING:
    from eptq_onnx.report import Report


def markdown_of(report: Report) -> str:
    """Return a report as GitHub's Markdown."""
    return "\n".join(_lines(report)) + "\n"


def _lines(report: Report) -> Iterator[str]:
    verdict = report.verdict
    yield f"# {text(report.model)} → {text(report.target)}"
    yield ""
    for warning in warnings_of(report):
        yield f"**{text(warning)}**"
        yield ""
    why = "; ".join([*verdict.reasons, *filter(None, [verdict.advice])])
    yield f"**{verdict.assurance.value}**: {text(why)}"
    yield ""
    command = shown(command_of(report.model, report.data, report.config))
    # A fence longer than any in the text cannot be closed by it.
    fence = "`" * max(3, 1 + max(map(len, re.findall("`+", command)), default=0))
    yield from (fence, command, fence, "")
    yield from _table(Sheet("", ("", ""), tuple(facts(report))))
    for sheet in (*sheets(report), layer_sheet(report)):
        yield f"## {text(sheet.title)}"
        yield ""
        yield from _table(sheet)
    if report.notes:
        yield from ("## Notes", "", *(f"- {text(note)}" for note in report.notes))


def _table(sheet: Sheet) -> Iterator[str]:
    yield f"| {' | '.join(map(text, sheet.columns))} |"
    yield f"| {' | '.join('---' for _ in sheet.columns)} |"
    for k, row in enumerate(sheet.rows):
        cells = [text(cell) for cell in row]
        yield f"| {' | '.join(f'**{c}**' if k in sheet.alarming and c else c for c in cells)} |"
    yield ""


def text(value: str) -> str:
    """Return any text so that Markdown shows it as it is, on one line."""
    escaped = shown(value).replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
    return re.sub(r"([\\`*_\[\]|#~])", r"\\\1", escaped)
