"""The command ``bench``."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from eptq_onnx import api, runtimes
from eptq_onnx.cli.app import app, one_sentence
from eptq_onnx.cli.options import Pair, with_options
from eptq_onnx.config import Reading
from eptq_onnx.data import readers
from eptq_onnx.data.readers import Data
from eptq_onnx.errors import ConfigError
from eptq_onnx.files import check_apart, check_writable, write_atomically
from eptq_onnx.report.bench import print_bench
from eptq_onnx.report.console import console, line


def _names() -> str:
    found = runtimes.registered().items()
    return "; ".join(f"{name} ({verifier.about})" for name, verifier in found if verifier.measures)


@app.command()
@with_options(Reading)
def bench(
    *,
    models: Pair,
    data: Annotated[
        str | None,
        typer.Option(
            help=f"Samples, the first of which is run; by default, inputs are made up. Forms: "
            f"{'; '.join(readers.forms(on_command_line=True))}."
        ),
    ] = None,
    runtime: Annotated[str, typer.Option(help=f"Where to run: {_names()}.")] = runtimes.DEFAULT,
    threads: Annotated[int, typer.Option(min=0, help="Threads of one operator; 0 for one per core.")] = 1,
    seconds: Annotated[
        float, typer.Option(min=0.1, help="Seconds to spend on the latency of both files.")
    ] = 10.0,
    custom_ops: Annotated[
        list[Path] | None, typer.Option(help="Shared libraries of custom operators, for onnxruntime.")
    ] = None,
    json: Annotated[Path | None, typer.Option(help="Where to write the measurement as JSON.")] = None,
    **options: Any,
) -> None:
    """Compare FLOAT and QUANTIZED: latency, time per operator, load time, memory, size.

    The exit code is 1 if QUANTIZED is slower: the whole interval of the median ratio lies above 1.05.
    """
    messages = console(stderr=True)
    with one_sentence(messages):
        if data is None and options:
            raise ConfigError(f"options on reading data ({', '.join(options)}) go with --data: give it.")
        samples = None if data is None else Data(data, **options)
        if json is not None:
            check_writable(json)
            check_apart({"the measurement": json}, api.bench_files(*models, samples))
        found = api.bench(
            *models,
            samples,
            runtime=runtime,
            threads=threads,
            seconds=seconds,
            custom_ops=custom_ops or (),
        )
        if json is not None:
            write_atomically(json, found.to_json().encode())
        print_bench(found, console())
        if json is not None:
            console().print(line(f"wrote {json}"), soft_wrap=True)
    if found.slower:
        sys.exit(1)
