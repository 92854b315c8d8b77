"""The command ``doctor``."""

from __future__ import annotations

import typer

from eptq_onnx.cli.app import START, app, one_sentence
from eptq_onnx.cli.manner import Manner, with_manner
from eptq_onnx.installation import Installation, installation
from eptq_onnx.report.console import console, line
from eptq_onnx.report.plain import size_text
from eptq_onnx.report.sheet import Labelled

_ALTERNATIVES = ("standard", "training")
"""Extras of which one is enough."""


@app.command(rich_help_panel=START, short_help="Say what is installed, what is used, and what is missing.")
@with_manner("json", "quiet")
def doctor(*, manner: Manner) -> None:
    """Say what is installed, what of it is used, and what to install; try whether it works.

    The exit code is 1 if this installation cannot quantize.
    """
    with one_sentence(console(stderr=True)):
        found = installation()
        if manner.json:
            print(found.to_json())
        else:
            _show(found, quiet=manner.quiet)
    if found.problems:
        raise typer.Exit(1)


def _show(found: Installation, *, quiet: bool) -> None:
    out = console()
    if not quiet:
        out.print(Labelled(tuple((name, text, "") for name, text in _rows(found).items())))
    for problem in found.problems:
        out.print(line(f"cannot quantize: {problem}", "bold red"), soft_wrap=True)
    if not found.problems:
        out.print(line("works: a small model was quantized", "green"), soft_wrap=True)


def _rows(found: Installation) -> dict[str, str]:
    """Return labels and texts."""
    features = ", ".join(f"{name} {'yes' if there else 'no'}" for name, there in found.features.items())
    runtime = ", ".join(f"{name} {version}" for name, version in found.onnxruntime.items())
    rows = {
        "eptq-onnx": found.version,
        "Python": f"{found.python}, {found.system}",
        "onnxruntime": runtime or "not installed",
        "processor": f"{found.processor}{f' ({features})' if features else ''}",
        "cores": f"{found.usable_cores} of {found.cores} may be used; a run takes {found.workers} threads",
        "memory": f"{size_text(found.memory_bytes)}, {size_text(found.free_memory_bytes)} free",
        "gradients": f"engine {found.engine}" if found.engine else "none",
        "target auto": f"{found.target}, because {found.why_target}",
    }
    for name, missing in found.runtimes.items():
        rows[f"runtime {name}"] = missing or "can be used"
    for extra in found.extras:
        packages = ", ".join(f"{name} {version}" for name, version in extra.packages.items() if version)
        if not extra.installed and extra.name in _ALTERNATIVES and found.onnxruntime:
            packages = "not needed: onnxruntime is there"
        elif not extra.installed:
            packages = f'not installed: pip install "eptq-onnx[{extra.name}]"'
        rows[f"extra {extra.name}"] = packages
    if not found.extras:
        rows["extras"] = "unknown: the package runs from its source"
    return rows
