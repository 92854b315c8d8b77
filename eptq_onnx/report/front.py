"""Noise against size as a table for the console."""

from __future__ import annotations

from collections.abc import Sequence

from rich.table import Table

from eptq_onnx.placement import FrontPoint


def front_table(front: Sequence[FrontPoint]) -> Table:
    """Return the table of the least noise at several sizes of the file."""
    table = Table(
        "bytes, at most",
        "mean bits of a weight",
        "noise of the weights, foreseen",
        title="Noise against size",
        title_justify="left",
    )
    for point in front:
        size = f"{point.bytes:,}{' (chosen)' if point.chosen else ''}"
        table.add_row(size, f"{point.bits:.2f}", f"{point.noise:.2%}")
    return table
