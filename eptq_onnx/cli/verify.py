"""The command ``verify``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from eptq_onnx import api
from eptq_onnx.cli.app import CHECK, app, one_sentence
from eptq_onnx.cli.lint import show_findings
from eptq_onnx.cli.manner import Manner, with_manner
from eptq_onnx.cli.options import SHORT_FORMS, TARGET, Pair, TargetName, options_of, with_options
from eptq_onnx.config import Gate, Reading
from eptq_onnx.data.readers import Data
from eptq_onnx.gate import Verified
from eptq_onnx.report.console import console, line
from eptq_onnx.report.outputs import statistics_sheet
from eptq_onnx.report.sheet import for_console, of_all
from eptq_onnx.report.speed import in_words


@app.command(rich_help_panel=CHECK, short_help="Check a file: rules, outputs, kernels, speed, your score.")
@with_options(Reading, Gate)
@with_manner("json", "quiet", "verbose")
def verify(
    *,
    models: Pair,
    data: Annotated[
        str,
        typer.Option(
            metavar="DATA",
            help=f"Samples to compare outputs on, best those that calibration has not seen: {SHORT_FORMS}.",
        ),
    ],
    target: TargetName = TARGET,
    manner: Manner,
    **options: Any,
) -> None:
    """Check QUANTIZED: the rules of a target, outputs, kernels and latency in the target's runtime.

    The exit code is 1 if a rule is broken (an error, not a warning) or an option such as --min-sqnr is not
    met, and 2 if something cannot be checked.
    """
    with one_sentence(console(stderr=True)):
        samples = Data(data, **options_of(Reading, options))
        found = api.verify(*models, samples, target, Gate(**options_of(Gate, options)))
        if manner.json:
            print(found.to_json())
        else:
            _show(found, models[1], console(), manner)
    if not found.passed:
        raise typer.Exit(1)


def _show(found: Verified, model: Path, out: Console, manner: Manner) -> None:
    if manner.quiet:
        outcome = "passed" if found.passed else f"not passed: {'; '.join(found.failures)}"
        out.print(line(f"{model}: {outcome}"), soft_wrap=True)
        return
    show_findings(found.lint, model, out, manner)
    title = f"Outputs on {of_all(found.samples, found.given, '--samples')}, by {found.computed_by}"
    out.print(for_console(statistics_sheet(title, found.outputs)))
    for operator, counts in found.kernels.items():
        kinds = ", ".join(f"{count} in {precision}" for precision, count in counts.items())
        out.print(line(f"kernels of {operator}: {kinds}"), soft_wrap=True)
    if found.speed is not None:
        out.print(line(in_words(found.speed)), soft_wrap=True)
    if found.score is not None:
        out.print(line(f"score: {found.score:.4g}, float model: {found.float_score:.4g}"), soft_wrap=True)
    for sentence in found.notes:
        out.print(line(f"note: {sentence}", "yellow"), soft_wrap=True)
    for sentence in found.unavailable:
        out.print(line(f"not checked: {sentence}", "yellow"), soft_wrap=True)
    for sentence in found.failures:
        out.print(line(f"failed: {sentence}", "bold red"), soft_wrap=True)
    out.print(line("passed" if found.passed else "not passed", "bold"), soft_wrap=True)
