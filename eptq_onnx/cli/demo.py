"""The command ``demo``."""

from __future__ import annotations

import json
import shlex
from contextlib import nullcontext
from pathlib import Path
from typing import Annotated

import numpy as np
import typer

from eptq_onnx import demo as shipped
from eptq_onnx.api import quantize
from eptq_onnx.cli.app import START, app, one_sentence
from eptq_onnx.cli.manner import Manner, with_manner
from eptq_onnx.config import Config, Preset
from eptq_onnx.errors import InstallError
from eptq_onnx.report import Report
from eptq_onnx.report.console import console, display, line
from eptq_onnx.runtime import Session
from eptq_onnx.start import silent


@app.command(rich_help_panel=START, short_help="Try it: quantize a small classifier that is included.")
@with_manner("json", "quiet")
def demo(
    *,
    folder: Annotated[Path, typer.Argument(help="Where to write the files.")] = Path("eptq-onnx-demo"),
    manner: Manner,
) -> None:
    """Quantize a small classifier that comes with the package, and leave all files in FOLDER to play with.

    Writes a model, pictures, labelled pictures and a metric, then the quantized model and its report, as a
    page if the extra report is installed.
    """
    messages = console(stderr=True)
    with one_sentence(messages):
        shipped.write(folder)
        model, quantized = folder / "model.onnx", folder / "model.w8a8.onnx"
        photos = shipped.draw(shipped.PHOTOS, seed=1).as_input()
        silence = nullcontext(silent) if manner.quiet or manner.json else display(messages, Preset.FAST.value)
        with silence as progress:
            result = quantize(model, {"image": photos}, Config(preset=Preset.FAST), progress=progress)
        result.save(quantized)
        report, no_page = _save(result.report, folder)
        before, after = _accuracy(model), _accuracy(quantized)
        if manner.json:
            files = {"folder": str(folder), "quantized": str(quantized), "report": str(report)}
            scores = {"float_accuracy": before, "accuracy": after}
            notes = {"verdict": str(result.report.verdict), "notes": [no_page] if no_page else []}
            print(json.dumps({**files, **scores, **notes}, indent=2))
            return
        out = console()
        right = f"{after:.1%} of {shipped.TEST} labelled pictures are right; the float model: {before:.1%}"
        if manner.quiet:
            out.print(line(right), soft_wrap=True)
            return
        result.report.print(out)
        out.print(line(right, "bold"), soft_wrap=True)
        if no_page:
            out.print(line(f"note: {no_page}", "yellow"), soft_wrap=True)
        wrote = f"wrote {quantized} and {report}; the pictures are in {folder / 'photos'}"
        for text in (wrote, f"next: cd {shlex.quote(str(folder))}, and", *(f"  {c}" for c in _NEXT)):
            out.print(line(text), soft_wrap=True)


_NEXT = (
    "eptq-onnx inspect model.onnx",
    "eptq-onnx quantize model.onnx --data photos --image imagenet --weight-bits 4",
    "eptq-onnx verify model.onnx model.w4a8.onnx --data test --image imagenet --evaluate metric:accuracy",
    "eptq-onnx compare model.onnx model.w4a8.onnx --data test --image imagenet",
)
"""Commands to go on with."""


def _save(report: Report, folder: Path) -> tuple[Path, str]:
    """Write the report as a page and as JSON; return the page, or the JSON and why there is no page."""
    figures, page = folder / "report.json", folder / "report.html"
    report.save(figures)
    try:
        report.save(page)
    except InstallError as e:
        return figures, str(e)
    return page, ""


def _accuracy(model: Path) -> float:
    """Return the share of the labelled pictures that a model gets right."""
    test = shipped.draw(shipped.TEST, seed=2)
    scores = Session(str(model)).run({"image": test.as_input()})["scores"]
    return float((np.argmax(scores, axis=1) == test.labels).mean())
