"""The command ``bench``."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from eptq_onnx import api, runtimes
from eptq_onnx.cli.app import CHECK, app, one_sentence
from eptq_onnx.cli.manner import Manner, with_manner
from eptq_onnx.cli.options import SHORT_FORMS, Pair, with_options
from eptq_onnx.config import Reading
from eptq_onnx.data.readers import Data
from eptq_onnx.errors import ConfigError
from eptq_onnx.report.bench import print_bench
from eptq_onnx.report.console import console, line
from eptq_onnx.report.speed import in_words


def _names() -> str:
    found = runtimes.registered().items()
    return "; ".join(f"{name} ({verifier.about})" for name, verifier in found if verifier.measures)


@app.command(rich_help_panel=CHECK, short_help="Measure speed, memory and size of two files.")
@with_options(Reading)
@with_manner("json", "quiet")
def bench(
    *,
    models: Pair,
    data: Annotated[
        str | None,
        typer.Option(
            metavar="DATA",
            help=f"What to run: the first of these samples, {SHORT_FORMS}; by default, made-up inputs.",
        ),
    ] = None,
    runtime: Annotated[str, typer.Option(help=f"Where to run: {_names()}.")] = runtimes.DEFAULT,
    threads: Annotated[int, typer.Option(min=0, help="Threads of one operator; 0 for one per core.")] = 1,
    seconds: Annotated[
        float, typer.Option(min=0.1, help="Seconds in which both files run in turn to compare their speed.")
    ] = 10.0,
    custom_ops: Annotated[
        list[Path] | None, typer.Option(help="Shared libraries of custom operators, for onnxruntime.")
    ] = None,
    manner: Manner,
    **options: Any,
) -> None:
    """Compare FLOAT and QUANTIZED: latency, time per operator, load time, memory, size.

    The exit code is 1 if QUANTIZED is slower: its time is surely more than 1.05 of FLOAT's.
    """
    messages = console(stderr=True)
    with one_sentence(messages):
        if data is None and options:
            raise ConfigError(f"options on reading data ({', '.join(options)}) go with --data: give it.")
        samples = None if data is None else Data(data, **options)
        found = api.bench(
            *models,
            samples,
            runtime=runtime,
            threads=threads,
            seconds=seconds,
            custom_ops=custom_ops or (),
        )
        if manner.json:
            print(found.to_json())
        elif manner.quiet:
            console().print(line(in_words(found.speed)), soft_wrap=True)
        else:
            print_bench(found, console())
    if found.slower:
        sys.exit(1)
