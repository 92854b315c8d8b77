"""The command ``version``."""

from __future__ import annotations

from eptq_onnx._version import __version__
from eptq_onnx.cli.app import app, one_sentence
from eptq_onnx.report.console import console, line


@app.command()
def version() -> None:
    """Print the version."""
    with one_sentence(console(stderr=True)):
        console().print(line(__version__))
