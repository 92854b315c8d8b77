"""The command ``targets``."""

from __future__ import annotations

import json

from eptq_onnx import targets as shipped
from eptq_onnx.cli.app import LOOK, app, one_sentence
from eptq_onnx.cli.manner import Manner, with_manner
from eptq_onnx.report.console import console, line
from eptq_onnx.report.sheet import Sheet, for_console
from eptq_onnx.targets import machine


@app.command(rich_help_panel=LOOK, short_help="List the runtimes that models can be quantized for.")
@with_manner("json", "quiet")
def targets(*, manner: Manner) -> None:
    """List the runtimes that models can be quantized for."""
    with one_sentence(console(stderr=True)):
        chosen, why = machine.fitting()
        found = {name: shipped.load(name) for name in shipped.names()}
        if manner.json:
            rows = {name: {"title": t.title, "checked_by": t.verifier} for name, t in found.items()}
            print(json.dumps({"auto": chosen, "why": why, "targets": rows}, indent=2))
            return
        out = console()
        if manner.quiet:
            out.print(line(" ".join(found)), soft_wrap=True)
            return
        listed = tuple((name, target.title, target.verifier) for name, target in found.items())
        columns = ("target", "what it is for", "checked by")
        out.print(for_console(Sheet("Targets", columns, listed, names=(0,))))
        out.print(line(f"auto: {chosen}, because {why}"), soft_wrap=True)
        out.print(line("A file of your own goes by its path: --target mine.toml"), soft_wrap=True)
