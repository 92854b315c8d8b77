"""The command as a process: signals, streams, errors and exit codes; and what its help shows."""

from __future__ import annotations

import logging
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Annotated, Any

import typer
from rich.console import Console
from typer.core import TyperGroup

from eptq_onnx._version import __version__
from eptq_onnx.errors import EptqError
from eptq_onnx.interrupts import command
from eptq_onnx.report.console import line, tolerant_streams

START, LOOK, QUANTIZE, CHECK = "Get started", "Before", "Quantize", "After"
"""Stages of a file's life, under which help lists commands."""
_OTHER = "Other commands"


class _Stages(TyperGroup):
    """Lists commands by stage, each stage in the order in which its commands are used."""

    def format_commands(self, ctx: Any, formatter: Any) -> None:
        commands = {name: found for name in self.list_commands(ctx) if (found := self.get_command(ctx, name))}
        most = max(map(len, commands))
        stages = {name: getattr(found, "rich_help_panel", None) for name, found in commands.items()}
        for stage in (START, LOOK, QUANTIZE, CHECK, _OTHER):
            rows = [
                (name.ljust(most), found.get_short_help_str(limit=formatter.width - most - 6))
                for name, found in commands.items()
                if (stages[name] if isinstance(stages[name], str) else _OTHER) == stage
            ]
            if rows:
                with formatter.section(stage):
                    formatter.write_dl(rows)


class _App(typer.Typer):
    """Sees to signals and streams before any command does."""

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        tolerant_streams()
        with command():
            return super().__call__(*args, **kwargs)


app = _App(cls=_Stages, no_args_is_help=True, pretty_exceptions_enable=False, rich_markup_mode=None)


def _print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(__version__)
        raise typer.Exit


@app.callback()
def main(
    *,
    version: Annotated[
        bool, typer.Option("--version", help="Print the version.", callback=_print_version, is_eager=True)
    ] = False,
) -> None:
    """Post-training quantization of ONNX models: Hessian-guided, network-wise optimized rounding (EPTQ)."""


@contextmanager
def one_sentence(messages: Console) -> Iterator[None]:
    """Turn an expected error into one sentence and exit code 2."""
    try:
        yield
    except EptqError as e:
        messages.print(line(f"error: {e}", "bold red"), soft_wrap=True)
        sys.exit(2)


@contextmanager
def logged(messages: Console, wanted: bool) -> Iterator[None]:
    """Print what passes log, if that is wanted."""
    logger, handler = logging.getLogger("eptq_onnx"), _Lines(messages)
    level = logger.level
    if wanted:
        logger.addHandler(handler)
        logger.setLevel(logging.INFO)
    try:
        yield
    finally:
        logger.removeHandler(handler)
        logger.setLevel(level)


class _Lines(logging.Handler):
    """Prints each record as a line."""

    def __init__(self, messages: Console) -> None:
        super().__init__()
        self._messages = messages

    def emit(self, record: logging.LogRecord) -> None:
        self._messages.print(line(record.getMessage(), "dim"), soft_wrap=True)
