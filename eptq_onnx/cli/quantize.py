"""The command ``quantize``."""

from __future__ import annotations

import json
import shlex
from collections.abc import Mapping
from contextlib import nullcontext
from pathlib import Path
from typing import Annotated, Any

import typer

from eptq_onnx import targets
from eptq_onnx.api import Result, input_files
from eptq_onnx.api import quantize as run
from eptq_onnx.cli.app import QUANTIZE, app, logged, one_sentence
from eptq_onnx.cli.manner import Manner, with_manner
from eptq_onnx.cli.options import options_of, with_options
from eptq_onnx.config import Accuracy, Config, Reading
from eptq_onnx.config.files import read_options
from eptq_onnx.config.option import Option, OptionModel, written_as
from eptq_onnx.data import readers
from eptq_onnx.data.readers import Data, Nothing
from eptq_onnx.errors import OutputError
from eptq_onnx.files import check_apart, check_writable, model_outputs, write_atomically
from eptq_onnx.graph.io import read_file
from eptq_onnx.interrupts import tell_outcome
from eptq_onnx.method.qdq import PRODUCER
from eptq_onnx.numerics.formats import FLOATS
from eptq_onnx.report import files
from eptq_onnx.report.console import console, display, line, shown
from eptq_onnx.report.outputs import metric_named
from eptq_onnx.start import silent


class Beside(OptionModel):
    """Files that are written beside the model."""

    report: Annotated[Path | None, Option("files", default="none")] = None
    """Where to write the report, as the suffix says: .html is one page with tables and plots (needs the extra
    report), .md is Markdown, .json holds all figures."""
    contact_sheet: Annotated[Path | None, Option("files", default="none")] = None
    """Where to write a PNG of what the network sees, if DATA holds pictures."""
    export_encodings: Annotated[Path | None, Option("files", default="none")] = None
    """Where to write the scales of activations and weights as encodings (AIMET's schema 1.0)."""


@app.command(rich_help_panel=QUANTIZE, short_help="Quantize a model with samples, and report what it costs.")
@with_options(Beside, Reading, Config, Accuracy)
@with_manner("json", "quiet", "verbose")
def quantize(
    *,
    model: Annotated[Path, typer.Argument(help="The float ONNX model.", show_default=False)],
    data: Annotated[
        str | None,
        typer.Option(
            "--data",
            metavar="DATA",
            help=f"Calibration samples: {'; '.join(readers.forms(on_command_line=True))}. Not needed with "
            "--activations dynamic and with --bits w8a32.",
            show_default=False,
        ),
    ] = None,
    output: Annotated[
        Path | None,
        typer.Option(
            "--output",
            "-o",
            help="Where to write the QDQ model; by default NAME.w8a8.onnx beside the model, with its bits.",
        ),
    ] = None,
    config: Annotated[
        Path | None,
        typer.Option(
            help="File with options: .toml, or the report of a run (.json); the command line comes first."
        ),
    ] = None,
    manner: Manner,
    **options: Any,
) -> None:
    """Quantize MODEL with the samples in DATA, and write a QDQ model for the target runtime.

    The exit code is 1 if the file misses --max-drop: it is written all the same, as good as was found.
    """
    messages = console(stderr=True)
    with one_sentence(messages):
        given = {**(read_options(config) if config is not None else {}), **options}
        chosen, samples = (
            Config(**options_of(Config, given)),
            Data(Nothing() if data is None else data, **options_of(Reading, given)),
        )
        accuracy = options_of(Accuracy, given)
        output = own_output(model, chosen) if output is None else output
        files_beside = Beside(**options_of(Beside, options))
        asked = {
            "the report": files_beside.report,
            "the contact sheet": files_beside.contact_sheet,
            "the encodings": files_beside.export_encodings,
        }
        beside = {name: path for name, path in asked.items() if path is not None}
        outputs = {**model_outputs(output), **beside}
        for path in (output, *beside.values()):
            check_writable(path)
        inputs = input_files(model, samples, chosen)
        check_apart(outputs, [*inputs, ("the configuration", config)] if config is not None else inputs)
        if files_beside.report is not None:
            files.check(files_beside.report)
        if chosen.workdir is not None:
            tell_outcome(f"nothing was written; the same command goes on from {shown(chosen.workdir)}")
        shown_in = nullcontext(silent) if manner.quiet else display(messages, chosen.preset.value)
        with logged(messages, manner.verbose), shown_in as progress:
            result = run(model, samples, chosen, progress=progress, **accuracy)
        result.save(output)
        tell_outcome(f"wrote {shown(output)}")
        failures = [_failure(name, path, result, output) for name, path in beside.items()]
        summary = console()
        if manner.json:
            print(result.report.to_json())
        elif manner.quiet:
            summary.print(line(f"{output}: {result.report.verdict}"), soft_wrap=True)
        else:
            result.report.print(summary, everything=manner.verbose)
            written = [
                output,
                *(p for p, failure in zip(beside.values(), failures, strict=True) if not failure),
            ]
            summary.print(line(f"wrote {', '.join(map(str, written))}"), soft_wrap=True)
            for text in _next(result, (model, output), samples, given):
                summary.print(line(text), soft_wrap=text.startswith("  "))  # a command is to be copied
        for failure in filter(None, failures):
            raise failure
    if result.report.trail is not None and not result.report.trail.reached:
        raise typer.Exit(1)


def own_output(model: Path, config: Config) -> Path:
    """Return where a model is written to if nobody says where: beside the float model, with its bits.

    Raises
    ------
    OutputError
        If a file of that name exists that was not written by this package.
    """
    target = targets.load(config.target)
    bits = f"w{config.weight_bits}a{config.activation_bits}"
    mixed = config.chooses_widths or config.activation_budget is not None
    kind = "fp8" if target.weight.container in FLOATS else "mixed" if mixed else bits
    path = model.with_name(f"{model.stem}.{kind}.onnx")
    if path.is_file() and read_file(path).producer_name != PRODUCER:
        raise OutputError(f"{path} exists, and was not written by {PRODUCER}: give another name with -o.")
    return path


def _next(result: Result, pair: tuple[Path, Path], data: Data, given: Mapping[str, Any]) -> tuple[str, ...]:
    """Return the commands to go on with, on the same samples."""
    metric = str(given.get("evaluate") or metric_named(result.report.verification.statistics.values()))
    # Weights alone need no samples; to verify them does.
    source = "samples.npz" if isinstance(data.source, Nothing) else str(data.source)
    words = ["eptq-onnx", "verify", *map(str, pair), "--data", source]
    for name, field in Reading.model_fields.items():
        # As it was written; a file of options may hold a recipe key by key.
        value = given.get(name)
        words += written_as(name, field, getattr(data.reading, name) if isinstance(value, Mapping) else value)
    return (
        f"next, where {metric} stands for a function of yours that scores a model, and better with --data "
        "that calibration has not seen:",
        f"  {shlex.join([*words, '--evaluate', metric])}",
        "without it, verify compares the outputs alone; with the same options: compare (where the models "
        "part) and bench (speed)",
    )


def _failure(name: str, path: Path, result: Result, output: Path) -> OutputError | None:
    """Write a file beside the model; return what went wrong, to be told behind the summary, which may be all
    that is left of it."""
    sheet = name == "the contact sheet"
    if name == "the encodings":
        content = (json.dumps(result.encodings, indent=2) + "\n").encode()
    else:
        content = result.contact_sheet if sheet else files.content(result.report, path)
    if not content:
        return OutputError(f"{output} was written, but not {name}: no recipe made the samples of pictures.")
    try:
        write_atomically(path, content)
    except OutputError as e:
        return OutputError(f"{output} was written, but not {name}: {e}")
    return None
