"""The command ``inspect``."""

from __future__ import annotations

from collections import defaultdict
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from eptq_onnx import api
from eptq_onnx.cli.app import LOOK, app, one_sentence
from eptq_onnx.cli.manner import Manner, with_manner
from eptq_onnx.cli.options import options_of, with_options
from eptq_onnx.config import Config, Reading
from eptq_onnx.inspection import Inspection
from eptq_onnx.report.console import console, line
from eptq_onnx.report.plain import size_text
from eptq_onnx.report.sheet import Labelled, Sheet, for_console

_NAMED = 3
"""Nodes of one reason that are named."""


@app.command(rich_help_panel=LOOK, short_help="Look at a model without data; names the next command.")
@with_options(Reading, Config)
@with_manner("json", "quiet", "verbose")
def inspect(
    *,
    model: Annotated[Path, typer.Argument(help="The float ONNX model.", show_default=False)],
    manner: Manner,
    **options: Any,
) -> None:
    """Look at MODEL without data: inputs, operators, what would run on integers, cost, the next command.

    Takes the options of quantize, for which it answers.
    """
    with one_sentence(console(stderr=True)):
        found = api.inspect(model, Config(**options_of(Config, options)), **options_of(Reading, options))
        if manner.json:
            print(found.to_json())
        elif manner.quiet:
            console().print(line(found.command), soft_wrap=True)
        else:
            _show(found, console(), manner.verbose)


def _show(found: Inspection, out: Console, verbose: bool) -> None:
    out.print(Labelled(tuple((label, text, "") for label, text in _facts(found))))
    rows = tuple((o.operator, str(o.nodes), str(o.integer) if o.integer else "-") for o in found.operators)
    columns = ("operator", "nodes", "can run on integers")
    out.print(for_console(Sheet("Operators, constants folded", columns, rows, names=(0,))))
    if found.kept_float:
        out.print(for_console(_float_sheet(found, verbose)))
    for sentence in found.unavailable:
        out.print(line(f"not found out: {sentence}", "yellow"), soft_wrap=True)
    for note in found.data.notes:
        out.print(line(f"note: {note}", "yellow"), soft_wrap=True)
    out.print(line("next:", "bold"), soft_wrap=True)
    out.print(line(f"  {found.command}"), soft_wrap=True)


def _facts(found: Inspection) -> list[tuple[str, str]]:
    """Return the lines at the top, each with its label."""
    guessed = f"; guessed: {'; '.join(found.data.guessed)}" if found.data.guessed else ""
    integer, nodes = sum(o.integer for o in found.operators), sum(o.nodes for o in found.operators)
    others = nodes - integer - len(found.kept_float)
    shapes = f", {others} compute no floats (shapes, indices)" if others > 0 else ""
    why = f", because {found.why_target}" if found.why_target else ""
    rows = [
        (
            "model",
            f"{found.model}: opset {found.opset}, {found.parameters:,} parameters, "
            f"{size_text(found.file_bytes)}",
        ),
        *(("input", f"{p.name} {p.type} {p.shape}") for p in found.inputs),
        *(("output", f"{p.name} {p.type} {p.shape}") for p in found.outputs),
        ("data", f"{found.data.about}{guessed}"),
        ("target", f"{found.target}{why}"),
        (
            "integers",
            f"{integer} of {nodes} nodes can run on integers{shapes}; the run decides by measured time",
        ),
        ("size", ", ".join(f"{name} about {size_text(size)}" for name, size in found.sizes.items())),
    ]
    if found.multiply_adds is not None:
        rows.append(("multiply-adds", f"{found.multiply_adds / 1e6:,.4g} million a sample, in these layers"))
    if found.estimate is not None:
        memory = size_text(found.memory_bytes or 0)
        rows.append(("a run", f"with {found.samples} samples {found.estimate}; about {memory} of memory"))
    return rows


def _float_sheet(found: Inspection, verbose: bool) -> Sheet:
    reasons: dict[tuple[str, str], list[str]] = defaultdict(list)
    for kept in found.kept_float:
        reasons[kept.op_type, kept.reason].append(kept.node)
    rows = []
    for (operator, reason), nodes in sorted(reasons.items(), key=lambda item: -len(item[1])):
        names = nodes if verbose else nodes[:_NAMED]
        more = f" and {len(nodes) - len(names)} more (--verbose)" if len(nodes) > len(names) else ""
        rows.append((operator, str(len(nodes)), reason, f"{', '.join(names)}{more}"))
    columns = ("operator", "nodes", "why it stays float", "which")
    return Sheet("Kept in floating point", columns, tuple(rows), names=(0,))
