"""The jobs of a batch as texts."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import PurePath

from eptq_onnx.endings import Ended, differing
from eptq_onnx.report.plain import size_text
from eptq_onnx.report.sheet import Sheet

FIGURES = ("size", "smaller", "worst output (dB)", "speed", "verdict", "front", "seconds")
"""Columns behind the name and the options."""
NUMBERS = (0, 1, 2, 6)
"""Those of them that hold numbers."""


def rows_of(ended: Sequence[Ended]) -> tuple[list[str], list[tuple[str, ...]]]:
    """Return the options in which jobs differ, and a row of texts for each job."""
    options = differing(ended)
    return options, [(e.name, *(_text(e.options.get(n, "")) for n in options), *_figures(e)) for e in ended]


def _text(value: object) -> str:
    return ", ".join(map(str, value)) if isinstance(value, (list, tuple)) else str(value)


def _figures(e: Ended) -> tuple[str, ...]:
    if e.error:
        return ("-", "-", "-", "-", "failed", "", "-")
    return (
        size_text(e.bytes),
        f"{e.float_bytes / max(e.bytes, 1):.2f}×",
        "exact" if e.sqnr_db is None else f"{e.sqnr_db:.1f}",
        e.pace or "-",
        e.verdict,
        "yes" if e.best else "",
        f"{e.seconds:.1f}",
    )


def sheet_of(ended: Sequence[Ended]) -> Sheet:
    """Return all jobs as a table; those that failed are alarming."""
    options, rows = rows_of(ended)
    alarming = frozenset(k for k, e in enumerate(ended) if e.error)
    return Sheet("Jobs", ("job", *options, *FIGURES), tuple(rows), names=(0,), alarming=alarming)


def line_of(e: Ended, number: int, count: int) -> str:
    """Return how one job has ended, in a line."""
    what = f"failed: {e.error}" if e.error else f"{_figures(e)[0]}, {_figures(e)[2]} dB, {e.verdict}"
    return f"{number}/{count} {e.name}: {what}"


def in_words(ended: Sequence[Ended]) -> str:
    """Return the number of jobs, and what has become of them."""
    failed = sum(bool(e.error) for e in ended)
    models = len({PurePath(e.model) for e in ended})
    of = f"{len(ended)} jobs of {models} model{'s' * (models > 1)}"
    return f"{of}, {failed} of them failed" if failed else f"{of}, all done"
