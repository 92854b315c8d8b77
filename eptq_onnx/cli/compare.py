"""The command ``compare``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from eptq_onnx import api
from eptq_onnx.cli.app import CHECK, app, one_sentence
from eptq_onnx.cli.manner import Manner, with_manner
from eptq_onnx.cli.options import SHORT_FORMS, options_of, with_options
from eptq_onnx.comparison import LEAST_DB, SAMPLES, Compared
from eptq_onnx.config import Reading
from eptq_onnx.data.readers import Data
from eptq_onnx.execute.parting import most_alone
from eptq_onnx.report.console import console, line
from eptq_onnx.report.sheet import Sheet, for_console, of_all

_SHOWN = 8
"""Layers that are shown."""


@app.command(rich_help_panel=CHECK, short_help="Find where two models part, and on which samples.")
@with_options(Reading)
@with_manner("json", "quiet", "verbose")
def compare(
    *,
    models: Annotated[
        tuple[Path, Path],
        typer.Argument(
            metavar="FIRST SECOND",
            help="Two models with the same inputs: a float one and a quantized one, or any others. The first "
            "is the reference.",
        ),
    ],
    data: Annotated[
        str,
        typer.Option(
            metavar="DATA",
            help=f"Samples to compare on, best those that calibration has not seen: {SHORT_FORMS}.",
        ),
    ],
    most: Annotated[
        int, typer.Option(min=1, help="Most samples to compare outputs on, spread evenly over the data.")
    ] = SAMPLES,
    below: Annotated[
        float, typer.Option(help="SQNR in dB below which a tensor counts as the place where they part.")
    ] = LEAST_DB,
    manner: Manner,
    **options: Any,
) -> None:
    """Compare two models on samples: outputs, the first layer where they part, the worst samples."""
    with one_sentence(console(stderr=True)):
        samples = Data(data, **options_of(Reading, options))
        found = api.compare(*models, samples, most=most, below=below)
        if manner.json:
            print(found.to_json())
        elif manner.quiet:
            console().print(line(_in_words(found)), soft_wrap=True)
        else:
            _show(found, console(), len(found.layers) if manner.verbose else _SHOWN)


def _in_words(found: Compared) -> str:
    """Return the outputs in one line."""
    parts = []
    for name, output in found.outputs.items():
        agreement = "" if output.agreement is None else f", {output.agreement:.2%} of decisions agree"
        parts.append(f"{name} {output.statistics.sqnr_db:.2f} dB{agreement}")
    return "; ".join(parts)


def _show(found: Compared, out: Console, shown: int) -> None:
    columns = ("output", "SQNR (dB)", "cosine", "largest difference", "same top-1")
    rows = tuple(
        (
            name,
            f"{output.statistics.sqnr_db:.2f}",
            f"{output.cosine:.6f}",
            f"{output.largest_difference:.4g}",
            "-" if output.agreement is None else f"{output.agreement:.2%}",
        )
        for name, output in found.outputs.items()
    )
    title = f"Outputs on {of_all(found.samples, found.given, '--most')}, by {found.computed_by}"
    out.print(for_console(Sheet(title, columns, rows, names=(0,))))
    if found.layers:
        _show_layers(found, out, shown)
    if found.worst:
        worst = tuple((s.name, f"{s.sqnr_db:.2f}", s.output) for s in found.worst)
        head = ("sample", "SQNR (dB)", "output")
        out.print(for_console(Sheet("Samples that differ most", head, worst, names=(0, 2))))
    for note in found.notes:
        out.print(line(f"note: {note}", "yellow"), soft_wrap=True)


def _show_layers(found: Compared, out: Console, shown: int) -> None:
    place = found.parting
    if place is None:
        text = f"none of the {len(found.layers)} tensors that both compute falls below {found.least_db:g} dB"
    else:
        text = (
            f"they part at {place.tensor} ({place.operator} {place.node}): {place.accumulated_db:.2f} dB, "
            f"{place.own_db:.2f} dB with exact inputs"
        )
    out.print(line(text, "bold"), soft_wrap=True)
    chosen = {*most_alone(found.layers, shown), *([place] if place is not None else [])}
    rows = tuple(
        (
            noise.tensor,
            f"{noise.operator}{' (channels in other scales)' * noise.scaled}",
            f"{noise.own_db:.2f}",
            f"{noise.accumulated_db:.2f}",
        )
        for noise in found.layers
        if noise in chosen
    )
    title = f"Most noise of their own, on {found.layer_samples} samples, in order"
    columns = ("tensor", "operator", "own noise (dB)", "accumulated (dB)")
    out.print(for_console(Sheet(title, columns, rows, names=(0,))))
