"""The least noise at several times and sizes as a table."""

from __future__ import annotations

from collections.abc import Sequence

from eptq_onnx.placement import FrontPoint
from eptq_onnx.report.sheet import Sheet

_LEAST = 1e-4
"""Share from which on two decimals of a per cent do."""


def front_sheet(front: Sequence[FrontPoint]) -> Sheet:
    """Return the table of the least noise at several times of one run, sizes of the file, or bits."""
    places, widths = front[0].seconds is not None, front[0].bytes is not None
    alone = front[0].activation_bits is not None
    of = "weights and activations" if places and widths else "weights" if widths else "activations"
    axes = [name for name, there in (("time", places), ("size", widths), ("bits", alone)) if there]
    rows = []
    for p in front:
        cells = []
        if p.seconds is not None:
            cells += [f"{p.seconds * 1e3:.3g} ms", str(p.regions)]
        if p.bytes is not None:
            cells += [f"{p.bytes:,}", "-" if p.bits is None else f"{p.bits:.2f}"]
        if p.activation_bits is not None:
            cells.append(f"{p.activation_bits:.2f}")
        cells[0] += " (chosen)" if p.chosen else ""
        rows.append((*cells, _share(p.noise)))
    return Sheet(
        f"Noise against {' and '.join(axes)}, foreseen",
        (
            *(("time", "regions on integers") if places else ()),
            *(("bytes, at most", "mean bits of a weight") if widths else ()),
            *(("mean bits of an activation",) if alone else ()),
            f"noise of the {of}",
        ),
        tuple(rows),
    )


def _share(noise: float) -> str:
    return f"{noise:.2%}" if noise >= _LEAST else f"{100 * noise:.1g}%"
