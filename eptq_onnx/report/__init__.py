"""The result of a run: a frozen record, printed as a console table or written as JSON."""

from __future__ import annotations

import dataclasses
import json
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from rich.console import Console, Group
from rich.table import Table
from rich.text import Text

from eptq_onnx.data.origin import Origin
from eptq_onnx.estimates import Estimate
from eptq_onnx.placement import FrontPoint, Placement
from eptq_onnx.records import KeptFloat, OptimizationTrace, Speed, Verification
from eptq_onnx.report import placement as by_time
from eptq_onnx.report.console import console as standard_output
from eptq_onnx.report.console import line
from eptq_onnx.report.front import front_table
from eptq_onnx.report.plain import plain, size_text
from eptq_onnx.report.speed import in_words, operator_table, warning
from eptq_onnx.report.verdict import MADE_UP, Assurance, Verdict, judge

_NAME = 200
"""Characters of a node's name shown in a table."""


@dataclass(frozen=True)
class LayerReport:
    """One quantized layer."""

    node: str
    op_type: str
    weight_type: str
    """ONNX type of the stored weight, unless it is packed."""
    weight_bits: int
    weight_range: tuple[int, int]
    weight_zero_points: bool
    """True if every channel has a zero point, which is folded into the stored integers."""
    activation_bits: int
    edge: bool
    attention: float | None
    """Mean sample-layer attention weight, relative to the largest layer's."""
    sqnr_db: float


@dataclass(frozen=True)
class Report:
    """Everything a user may want to know about a run.

    Parameters
    ----------
    version : str
    model, target, engine : str
        Names; the engine is empty if no gradient was needed.
    config : dict
        All options, defaults included, and those on reading data that were given.
    opset : int
        Default-domain opset of the written model.
    data : Origin
        Where the samples come from, and what was done to them.
    samples, unused_samples : int
    batching : dict of str to str
        How the axes of each input's array were interpreted.
    layers : tuple of LayerReport
    kept_float : tuple of KeptFloat
        Nodes that stay float, each with the reason.
    notes : tuple of str
        What could not be done as requested, each with the reason.
    rotated : dict of str to int
        Tensors whose channels were mixed, and how many were mixed together.
    equalized : dict of str to float
        Quantized tensors whose channels were scaled to fit a common range, and the largest factor, up or
        down.
    placement : Placement or None
        What was chosen by time; None if nothing was.
    front : tuple of FrontPoint
        The least noise at several times of one run and sizes of the file; empty if neither noise nor widths
        were chosen.
    optimization : OptimizationTrace or None
    verification : Verification
    speed : Speed or None
        None if it was not measured; unless it was not requested, a note says why.
    estimate : Estimate
        What the run was expected to take, as shown before it started.
    seconds : dict of str to float
        Time of each step.
    peak_memory_bytes : int
    sizes : dict of str to int
        Bytes of each part of the written model; see `eptq_onnx.graph.sizes`.
    """

    version: str
    model: str
    target: str
    engine: str
    config: Mapping[str, Any]
    opset: int
    data: Origin
    samples: int
    unused_samples: int
    batching: Mapping[str, str]
    layers: tuple[LayerReport, ...]
    kept_float: tuple[KeptFloat, ...]
    notes: tuple[str, ...]
    rotated: Mapping[str, int]
    equalized: Mapping[str, float]
    placement: Placement | None
    front: tuple[FrontPoint, ...]
    optimization: OptimizationTrace | None
    verification: Verification
    speed: Speed | None
    estimate: Estimate
    seconds: Mapping[str, float]
    peak_memory_bytes: int
    sizes: Mapping[str, int]

    @property
    def verdict(self) -> Verdict:
        """Return what to expect of the written model."""
        return judge(self.verification, self.data)

    def to_json(self) -> str:
        """Return the whole report as JSON, with the verdict first; infinite ratios are null."""
        return (
            json.dumps(
                plain({"verdict": dataclasses.asdict(self.verdict), **dataclasses.asdict(self)}), indent=2
            )
            + "\n"
        )

    def render(self) -> Group:
        """Return the summary for a console."""
        v, verdict = self.verification, self.verdict
        head = Table.grid(padding=(0, 2))
        head.add_row(Text("verdict", style="bold"), Text(str(verdict), style=_STYLES[verdict.assurance]))
        for label, text in (
            ("size", _smaller(v.float_bytes, v.quantized_bytes)),
            ("parts", ", ".join(f"{part} {size_text(count)}" for part, count in self.sizes.items() if count)),
            ("speed", in_words(self.speed)),
            ("model", f"{self.model} → {self.target}, opset {self.opset}"),
            ("data", f"{self.samples} samples of {self.data}"),
            ("bits", self._bits()),
            ("rotation", self._rotation()),
            ("equalization", self._equalization()),
            *([("by time", by_time.in_words(self.placement))] if self.placement is not None else []),
            ("optimization", self._optimization()),
            ("time, memory", self._cost()),
        ):
            cell = line(text)
            cell.overflow = "fold"  # a recipe is one long word, and is to be copied
            head.add_row(Text(label, style="bold"), cell)
        kernels = Table(
            "operator",
            "planned",
            "integer kernels",
            title=line(f"Integer kernels in {self.target}"),
            title_justify="left",
        )
        for op, planned in v.planned.items():
            found = v.kernels.get(op, 0)
            kernels.add_row(
                line(op), str(planned), Text(str(found), style="" if found >= planned else "bold red")
            )
        warnings = [MADE_UP if self.data.made_up else "", warning(self.speed)]
        parts: list[Any] = [line(text, "bold red") for text in filter(None, warnings)]
        parts += [head, *([kernels] if v.planned else []), self._fidelity(), self._weakest()]
        if self.speed is not None and self.speed.operators:
            parts.append(operator_table(self.speed))
        if self.placement is not None:
            parts += by_time.tables(self.placement)
        if self.front:
            parts.append(front_table(self.front))
        if self.kept_float:
            parts.append(self._float_table())
        parts.extend(line(f"note: {note}", "yellow") for note in self.notes)
        return Group(*parts)

    def print(self, console: Console | None = None) -> None:
        """Print the summary."""
        (console or standard_output()).print(self.render())

    def _fidelity(self) -> Table:
        v = self.verification
        count = (
            f"{v.samples} held-out samples"
            if v.held_out
            else f"{v.samples} samples that calibration has seen"
        )
        columns = (
            "output",
            "SQNR (dB)",
            "about the mean (dB)",
            "worst sample (dB)",
            "largest channel changes",
        )
        table = Table(*columns, title=f"Float against quantized, {count}", title_justify="left")
        for name, value in v.outputs.items():
            s = v.statistics.get(name)
            more = [] if s is None else [f"{s.centred_sqnr_db:.2f}", f"{s.sample_sqnr_db:.2f}"]
            if s is not None and s.decisions:
                more.append(f"{s.disagreement:.1%} of {s.decisions} ({s.expected_disagreement:.1%} expected)")
            table.add_row(line(name, most=_NAME), f"{value:.2f}", *more)
        return table

    def _bits(self) -> str:
        counts = Counter((f"W{x.weight_bits}A{x.activation_bits}", _weights(x)) for x in self.layers)
        return ", ".join(f"{n} layers {name} (weights {kind})" for (name, kind), n in counts.items())

    def _rotation(self) -> str:
        if not self.rotated:
            return "none"
        return f"the channels of {len(self.rotated)} tensors, up to {max(self.rotated.values())} at a time"

    def _equalization(self) -> str:
        if not self.equalized:
            return "none"
        return (
            f"the channels of {len(self.equalized)} activations, by up to {max(self.equalized.values()):.3g}×"
        )

    def _cost(self) -> str:
        spent, expected = sum(self.seconds.values()), self.estimate.seconds
        return f"{spent:.1f} s (expected: {expected:.0f} s), peak {size_text(self.peak_memory_bytes)}"

    def _optimization(self) -> str:
        trace = self.optimization
        if trace is None:
            return f"none ({self.config['start']} rounding)"
        return trace.reason + (f"; {trace.flipped:.1%} of the weights flipped" if trace.best_step else "")

    def _weakest(self) -> Table:
        table = Table(
            "layer",
            "operator",
            "bits",
            "SQNR (dB)",
            title="Layers with the lowest SQNR",
            title_justify="left",
        )
        for x in sorted(self.layers, key=lambda x: x.sqnr_db)[:5]:
            table.add_row(
                line(x.node, most=_NAME),
                line(x.op_type),
                f"W{x.weight_bits}A{x.activation_bits}",
                f"{x.sqnr_db:.2f}",
            )
        return table

    def _float_table(self) -> Table:
        table = Table("operator", "nodes", "why", title="Kept in floating point", title_justify="left")
        counts = Counter((k.op_type, k.reason) for k in self.kept_float)
        for (op, reason), n in counts.most_common():
            table.add_row(line(op), str(n), line(reason))
        return table


def _weights(layer: LayerReport) -> str:
    """Return what the weights of a layer are."""
    if layer.weight_type.startswith("float"):
        return f"are {layer.weight_type}"
    low, high = layer.weight_range
    return f"in [{low}, {high}]{' less zero points' if layer.weight_zero_points else ''}"


_STYLES = {Assurance.SAFE: "green", Assurance.CHECK: "yellow", Assurance.LOSS: "bold red"}


def _smaller(before: int, after: int) -> str:
    ratio = before / max(after, 1)
    return (
        f"{size_text(before)} → {size_text(after)} ({ratio:.2f}× smaller)"
        if ratio >= 1
        else f"{size_text(before)} → {size_text(after)}: not smaller"
    )
