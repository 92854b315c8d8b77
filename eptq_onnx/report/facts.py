"""What a report says, in texts and tables that every form of it shows."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator
from typing import TYPE_CHECKING

from eptq_onnx.outcome import LAYER_SAMPLES
from eptq_onnx.report import placement as by_time
from eptq_onnx.report import trail as scores
from eptq_onnx.report.front import front_sheet
from eptq_onnx.report.outputs import COLUMNS, output_row
from eptq_onnx.report.plain import size_text
from eptq_onnx.report.sheet import Sheet
from eptq_onnx.report.speed import in_words, operator_sheet, warning
from eptq_onnx.report.verdict import of_made_up

if TYPE_CHECKING:
    from eptq_onnx.report import LayerReport, Report

_LATE = 1.5
"""How many times the estimate a run takes that other programs have slowed down, or the search for causes."""
_WEAKEST = 5
"""Layers that are named."""
_REASONS = 8
"""Reasons for floating point that a console shows, unless it is to show everything."""


def warnings_of(report: Report) -> list[str]:
    """Return what is to be said before all else."""
    made_up = of_made_up(report.data) if report.data.made_up else ""
    return [text for text in (made_up, scores.warning(report.trail), warning(report.speed)) if text]


def facts(report: Report) -> list[tuple[str, str]]:
    """Return labels and texts, one line each, without the verdict."""
    v = report.verification
    return [
        *([("score", scores.in_words(report.trail))] if report.trail is not None else []),
        ("size", smaller(v.float_bytes, v.quantized_bytes)),
        ("parts", ", ".join(f"{part} {size_text(count)}" for part, count in report.sizes.items() if count)),
        ("speed", in_words(report.speed)),
        ("model", f"{report.model} → {report.target}, opset {report.opset}"),
        ("data", f"{report.samples} samples of {report.data}" if report.samples else str(report.data)),
        ("bits", _bits(report)),
        ("rotation", _rotation(report)),
        ("equalization", _equalization(report)),
        *([("placement", by_time.in_words(report.placement))] if report.placement is not None else []),
        ("optimization", _optimization(report)),
        ("time, memory", _cost(report)),
    ]


def sheets(report: Report) -> Iterator[Sheet]:
    """Yield the tables, without that of all layers."""
    if report.advice:
        yield advice_sheet(report)
    if report.trail is not None:
        yield scores.trail_sheet(report.trail)
    if report.verification.planned:
        yield kernel_sheet(report)
    if report.samples:
        yield output_sheet(report)
        yield _weakest(report)
    if report.speed is not None and report.speed.operators:
        yield operator_sheet(report.speed)
    if report.placement is not None:
        yield from by_time.sheets(report.placement)
    if report.front:
        yield front_sheet(report.front)
    if report.kept_float:
        yield _float_sheet(report)


def advice_sheet(report: Report) -> Sheet:
    """Return what to try."""
    worst = min((s.sqnr_db for s in report.verification.statistics.values()), default=0.0)
    return Sheet(
        f"What to try, cheapest first; the worst output keeps {worst:.1f} dB now",
        ("option", "why", "expected"),
        tuple((a.option, a.why, a.expected or "-") for a in report.advice),
        names=(0,),
    )


def kernel_sheet(report: Report) -> Sheet:
    """Return how many nodes should run on integers, and how many kernels do."""
    v = report.verification
    found = [v.kernels.get(op, 0) for op in v.planned]
    return Sheet(
        f"Integer kernels in {report.target}",
        ("operator", "planned", "integer kernels"),
        tuple((op, str(n), str(k)) for (op, n), k in zip(v.planned.items(), found, strict=True)),
        alarming=frozenset(k for k, n in enumerate(v.planned.values()) if found[k] < n),
    )


def output_sheet(report: Report) -> Sheet:
    """Return how each output differs."""
    v = report.verification
    what = "held-out samples" if v.held_out else "samples that calibration has seen"
    rows = []
    for name, value in v.outputs.items():
        s = v.statistics.get(name)
        rows.append((name, f"{value:.2f}", "", "", "") if s is None else output_row(name, s))
    return Sheet(
        f"Float against quantized, {v.samples} {what}",
        COLUMNS,
        tuple(rows),
        names=(0,),
    )


def layer_sheet(report: Report) -> Sheet:
    """Return all layers in the order of execution, without columns that nothing is known for."""
    columns = {
        "#": [str(k + 1) for k in range(len(report.layers))],
        "layer": [x.node for x in report.layers],
        "operator": [x.op_type for x in report.layers],
        "bits": [x.bits for x in report.layers],
        "weights": [weights_of(x).removeprefix("in ").removeprefix("are ") for x in report.layers],
        "own (dB)": [decibels(x.own_db) for x in report.layers],
        "accumulated (dB)": [decibels(x.sqnr_db) for x in report.layers],
        "nearest (dB)": [decibels(x.nearest_db) for x in report.layers],
        "attention": ["-" if x.attention is None else f"{x.attention:.3g}" for x in report.layers],
    }
    known = {name: cells for name, cells in columns.items() if not set(cells) <= {"-"} or not cells}
    return Sheet("Layers", tuple(known), tuple(zip(*known.values(), strict=True)), names=(1,))


def decibels(value: float | None) -> str:
    """Return a ratio as text."""
    return "-" if value is None or math.isnan(value) else f"{value:.2f}"


def smaller(before: int, after: int) -> str:
    """Return two sizes and their ratio in words."""
    ratio = before / max(after, 1)
    sizes = f"{size_text(before)} → {size_text(after)}"
    return f"{sizes} ({ratio:.2f}× smaller)" if ratio >= 1 else f"{sizes}: not smaller"


def weights_of(layer: LayerReport) -> str:
    """Return what the weights of a layer are."""
    if layer.weight_type.startswith("float"):
        return f"are {layer.weight_type}"
    low, high = layer.weight_range
    return f"in [{low}, {high}]{' less zero points' if layer.weight_zero_points else ''}"


def _bits(report: Report) -> str:
    counts = Counter((x.bits, weights_of(x)) for x in report.layers)
    return ", ".join(
        f"{n} layer{'s' * (n > 1)} {name} (weights {kind})" for (name, kind), n in counts.items()
    )


def _rotation(report: Report) -> str:
    if not report.rotated:
        return "none"
    return f"the channels of {len(report.rotated)} tensors, up to {max(report.rotated.values())} at a time"


def _equalization(report: Report) -> str:
    if not report.equalized:
        return "none"
    most = max(report.equalized.values())
    return f"the channels of {len(report.equalized)} activations, by up to {most:.3g}×"


def _cost(report: Report) -> str:
    spent, expected = sum(report.seconds.values()), report.estimate.seconds
    late = ", with the processor to itself" if spent > _LATE * expected else ""
    return f"{spent:.1f} s (expected: {expected:.0f} s{late}), peak {size_text(report.peak_memory_bytes)}"


def _optimization(report: Report) -> str:
    trace = report.optimization
    if trace is None:
        return "none: layer-wise reconstruction alone" if report.config["start"] == "closed-form" else "none"
    return trace.reason + (f"; {trace.flipped:.1%} of the weights flipped" if trace.best_step else "")


def _weakest(report: Report) -> Sheet:
    v = report.verification
    return Sheet(
        f"Layers with the lowest SQNR, on {min(v.samples, LAYER_SAMPLES)} of these samples",
        ("layer", "operator", "bits", "own (dB)", "SQNR (dB)"),
        tuple(
            (
                x.node,
                x.op_type,
                x.bits,
                decibels(x.own_db),
                decibels(x.sqnr_db),
            )
            for x in sorted(report.layers, key=lambda x: x.sqnr_db)[:_WEAKEST]
        ),
        names=(0,),
    )


def _float_sheet(report: Report) -> Sheet:
    """Return the reasons, and for each how many nodes of which operators."""
    counts = Counter(k.reason for k in report.kept_float)
    operators = {reason: Counter[str]() for reason in counts}
    for kept in report.kept_float:
        operators[kept.reason][kept.op_type] += 1
    return Sheet(
        "Kept in floating point",
        ("nodes", "why", "operators"),
        tuple(
            (
                str(n),
                reason,
                ", ".join(f"{op} {k}" if n > k else op for op, k in operators[reason].most_common()),
            )
            for reason, n in counts.most_common()
        ),
        most=_REASONS,
    )
