"""The least noise at several times and sizes as a table."""

from __future__ import annotations

from collections.abc import Sequence

from eptq_onnx.placement import FrontPoint
from eptq_onnx.report.sheet import Sheet


def front_sheet(front: Sequence[FrontPoint]) -> Sheet:
    """Return the table of the least noise at several times of one run and sizes of the file."""
    places, widths = front[0].seconds is not None, front[0].bytes is not None
    of = "weights and activations" if places and widths else "activations" if places else "weights"
    axes = [name for name, there in (("time", places), ("size", widths)) if there]
    rows = []
    for p in front:
        cells = []
        if p.seconds is not None:
            cells += [f"{p.seconds * 1e3:.3g} ms", str(p.regions)]
        if p.bytes is not None:
            cells += [f"{p.bytes:,}", "-" if p.bits is None else f"{p.bits:.2f}"]
        cells[0] += " (chosen)" if p.chosen else ""
        rows.append((*cells, f"{p.noise:.2%}"))
    return Sheet(
        f"Noise against {' and '.join(axes)}, foreseen",
        (
            *(("time", "regions on integers") if places else ()),
            *(("bytes, at most", "mean bits of a weight") if widths else ()),
            f"noise of the {of}",
        ),
        tuple(rows),
    )
