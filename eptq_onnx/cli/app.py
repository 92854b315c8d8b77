"""The command as a process: signals, streams, errors and exit codes."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import typer
from rich.console import Console

from eptq_onnx.errors import EptqError
from eptq_onnx.interrupts import command
from eptq_onnx.report.console import line, tolerant_streams


class _App(typer.Typer):
    """Sees to signals and streams before any command does."""

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        tolerant_streams()
        with command():
            return super().__call__(*args, **kwargs)


app = _App(add_completion=False, no_args_is_help=True, pretty_exceptions_enable=False, rich_markup_mode=None)


@app.callback()
def main() -> None:
    """Post-training quantization of ONNX models: Hessian-guided, network-wise optimized rounding (EPTQ)."""


@contextmanager
def one_sentence(messages: Console) -> Iterator[None]:
    """Turn an expected error into one sentence and exit code 2."""
    try:
        yield
    except EptqError as e:
        messages.print(line(f"error: {e}", "bold red"), soft_wrap=True)
        sys.exit(2)
