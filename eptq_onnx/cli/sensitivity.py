"""The command ``sensitivity``."""

from __future__ import annotations

from contextlib import nullcontext
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from eptq_onnx import api
from eptq_onnx.cli.app import LOOK, app, logged, one_sentence
from eptq_onnx.cli.manner import Manner, with_manner
from eptq_onnx.cli.options import SHORT_FORMS, options_of, with_options
from eptq_onnx.config import Config, Reading
from eptq_onnx.data.readers import Data
from eptq_onnx.report.console import console, display, line
from eptq_onnx.report.sheet import Sheet, for_console, of_all
from eptq_onnx.sensitivities import Group, Part, Sensitivity
from eptq_onnx.start import silent

_SHOWN, _GROUPS = 12, 6
"""Parts and groups that are shown."""


@app.command(rich_help_panel=LOOK, short_help="Rank layers by what they do to the outputs.")
@with_options(Reading, Config)
@with_manner("json", "quiet", "verbose")
def sensitivity(
    *,
    model: Annotated[Path, typer.Argument(help="The float ONNX model.", show_default=False)],
    data: Annotated[str, typer.Option(metavar="DATA", help=f"Calibration samples: {SHORT_FORMS}.")],
    manner: Manner,
    **options: Any,
) -> None:
    """Rank the layers and activations of MODEL by what they do to the outputs, with what spares each.

    Takes the options of quantize. Each part is quantized alone, weights rounded to nearest; all operators
    with an integer kernel count. Nothing is written.
    """
    messages = console(stderr=True)
    with one_sentence(messages):
        chosen, samples = Config(**options_of(Config, options)), Data(data, **options_of(Reading, options))
        shown_in = nullcontext(silent) if manner.quiet or manner.json else display(messages, "")
        with logged(messages, manner.verbose), shown_in as progress:
            found = api.sensitivity(model, samples, chosen, progress=progress)
        if manner.json:
            print(found.to_json())
        elif manner.quiet:
            console().print(line(_in_words(found)), soft_wrap=True)
        else:
            _show(found, console(), manner)


def _in_words(found: Sensitivity) -> str:
    if not found.parts:
        return "nothing is quantized"
    loudest = found.parts[0]
    return f"{loudest.what} of {loudest.name}: {loudest.share:.0%} of the noise of its kind; {loudest.option}"


def _show(found: Sensitivity, out: Console, manner: Manner) -> None:
    parts = found.parts if manner.verbose else found.parts[:_SHOWN]
    groups = found.groups if manner.verbose else found.groups[:_GROUPS]
    out.print(
        line(
            f"noise of the outputs: {found.total:.3g} of their variance ({_db(found.sqnr_db)}); weights "
            f"alone {found.weights:.3g}, activations alone {found.activations:.3g}; each part on "
            f"{of_all(found.samples, found.given)} (ranges: on all), in the time of {found.float_passes:.1f} "
            "runs of all samples through the float model"
        ),
        soft_wrap=True,
    )
    more = len(found.parts) - len(parts)
    out.print(for_console(_of_parts(parts)))
    if more:
        out.print(line(f"and {more} quieter ones (--verbose)"), soft_wrap=True)
    if groups:
        out.print(for_console(_of_groups(groups)))
    for note in found.notes:
        out.print(line(f"note: {note}", "yellow"), soft_wrap=True)


def _of_parts(parts: tuple[Part, ...]) -> Sheet:
    rows = tuple(
        (f"{p.share:.1%}", f"{p.what}, {p.bits} bits", p.operator, _db(p.left_db), p.option) for p in parts
    )
    return Sheet(
        "Each part quantized alone, loudest first",
        ("share of its kind", "part", "operator", "left", "spared by"),
        rows,
        names=(4,),
    )


def _of_groups(groups: tuple[Group, ...]) -> Sheet:
    rows = tuple(
        (str(g.parts), f"{g.noise:.3g}", f"{g.of_members:.3g}", _db(g.left_db), g.option) for g in groups
    )
    return Sheet(
        "Groups; in red those that are louder than their parts add up to",
        ("parts", "noise", "of its parts", "left in float", "spared by"),
        rows,
        names=(4,),
        alarming=frozenset(k for k, g in enumerate(groups) if g.hidden),
    )


def _db(value: float | None) -> str:
    return "-" if value is None else f"{value:.1f} dB"
