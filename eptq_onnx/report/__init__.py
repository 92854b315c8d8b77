"""The result of a run: a frozen record, printed as a console table or written as JSON."""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rich.console import Console, Group

from eptq_onnx.data.origin import Origin
from eptq_onnx.diagnosis import Exhibits, OutputNoise
from eptq_onnx.estimates import Estimate
from eptq_onnx.outcome import OptimizationTrace, Speed, Verification
from eptq_onnx.placement import FrontPoint, Placement
from eptq_onnx.records import KeptFloat
from eptq_onnx.report import files
from eptq_onnx.report.advice import Advice, advise
from eptq_onnx.report.console import console as standard_output
from eptq_onnx.report.console import line
from eptq_onnx.report.facts import facts, sheets, warnings_of
from eptq_onnx.report.plain import plain
from eptq_onnx.report.sheet import Labelled, for_console
from eptq_onnx.report.verdict import Assurance, Verdict, judge
from eptq_onnx.trail import Trail


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
    """Of the quantized output, with all errors from upstream; NaN without samples."""
    own_db: float | None = None
    """The same if all layers in front have their float outputs."""
    nearest_db: float | None = None
    """As ``sqnr_db``, if all weights are rounded to nearest."""

    @property
    def bits(self) -> str:
        """Bits of weights and input, such as ``W4A8``."""
        return f"W{self.weight_bits}A{self.activation_bits}"


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
    noise : OutputNoise or None
        Causes of the noise of the outputs, if accuracy fell.
    trail : Trail or None
        What was scored on the way, if a function that scores was given.
    exhibits : Exhibits
        What only a page shows.
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
    noise: OutputNoise | None = None
    trail: Trail | None = None
    exhibits: Exhibits = field(default_factory=Exhibits)

    @property
    def verdict(self) -> Verdict:
        """Return what to expect of the written model."""
        return judge(self.verification, self.data)

    @property
    def advice(self) -> tuple[Advice, ...]:
        """Return what to try if accuracy fell, and what it is expected to bring."""
        return advise(self)

    def to_json(self) -> str:
        """Return the report as JSON, with the verdict first; infinite ratios are null.

        What only a page shows is left out.
        """
        found = dataclasses.asdict(dataclasses.replace(self, exhibits=Exhibits()))
        del found["exhibits"]
        if self.trail is not None:
            found["trail"] |= {"reached": self.trail.reached, "score": self.trail.written.score}
        advice = [dataclasses.asdict(a) for a in self.advice]
        first = {"verdict": dataclasses.asdict(self.verdict), "advice": advice}
        return json.dumps(plain({**first, **found}), indent=2) + "\n"

    def to_markdown(self) -> str:
        """Return the report as Markdown."""
        return files.markdown(self)

    def to_html(self) -> str:
        """Return the report as one page that needs nothing else.

        Raises
        ------
        InstallError
            If the extra ``report`` is not installed.
        """
        return files.page(self)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the report; the suffix of the file (.html, .md, .json) says how.

        Raises
        ------
        OutputError
            If the suffix is another one, or the file cannot be written.
        InstallError
            If a page is asked for and the extra ``report`` is not installed.
        """
        files.save(self, Path(path))

    def render(self, *, everything: bool = False) -> Group:
        """Return the summary for a console; long tables are cut, unless it is to hold everything."""
        verdict = ("verdict", str(self.verdict), _STYLES[self.verdict.assurance])
        return Group(
            *(line(text, "bold red") for text in warnings_of(self)),
            Labelled((verdict, *((label, text, "") for label, text in facts(self)))),
            *(for_console(sheet, everything=everything) for sheet in sheets(self)),
            *(line(f"note: {note}", "yellow") for note in self.notes),
        )

    def print(self, console: Console | None = None, *, everything: bool = False) -> None:
        """Print the summary; long tables are cut, unless it is to hold everything."""
        (console or standard_output()).print(self.render(everything=everything), crop=False)


_STYLES = {Assurance.SAFE: "green", Assurance.CHECK: "yellow", Assurance.LOSS: "bold red"}
