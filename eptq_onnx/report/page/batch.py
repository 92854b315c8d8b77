"""The page of a batch: a table of each model's jobs, and the front of size and quality."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from markupsafe import Markup

from eptq_onnx._version import __version__
from eptq_onnx.endings import Ended, fronts
from eptq_onnx.report.batch import FIGURES, NUMBERS, in_words, rows_of
from eptq_onnx.report.page import plots
from eptq_onnx.report.page.page import rendered

_MOST_DB = 100.0
"""Ratios above are drawn there."""


@dataclass(frozen=True)
class _Model:
    name: str
    plot: Markup | None
    rows: Sequence[tuple[str, ...]]


def batch_page(title: str, ended: Sequence[Ended]) -> str:
    """Return the page of a batch, which fetches nothing."""
    found = fronts(ended)
    options, rows = rows_of(found)
    models = []
    for k, name in enumerate(dict.fromkeys(e.model for e in found if not e.error)):
        own = [(e, row) for e, row in zip(found, rows, strict=True) if e.model == name and not e.error]
        points = [(float(e.bytes), min(e.quality, _MOST_DB), e.best) for e, _ in own]
        plot = plots.sizes(points, f"sizes-{k}") if len(points) > 1 else None
        models.append(_Model(name, plot, [row for _, row in own]))
    return rendered(
        "batch.html.j2",
        title=title,
        version=__version__,
        summary=in_words(ended),
        columns=("job", *options, *FIGURES),
        numbers=[1 + len(options) + k for k in NUMBERS],
        models=models,
        failures=[(e.name, e.error) for e in found if e.error],
    )
