"""Readers of calibration data: one file per form, each discovered automatically."""

from __future__ import annotations

import os
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

from onnx import ModelProto

from eptq_onnx.config.reading import Reading
from eptq_onnx.data.inputs import inputs_of
from eptq_onnx.data.readers.base import (
    Arrays,
    Content,
    Data,
    Feed,
    Nothing,
    Opened,
    Reader,
    Request,
    Source,
    Wanted,
)
from eptq_onnx.discovery import classes

__all__ = [
    "Arrays", "Content", "Data", "Feed", "Nothing", "Opened", "Reader", "Request", "Source", "Wanted",
    "files_of", "forms", "is_nothing", "open_source", "registered", "wanted",
]  # fmt: skip


@cache
def registered() -> tuple[Reader, ...]:
    """Return one reader for each form, in the order in which they are asked."""
    return tuple(sorted((found() for found in classes(__name__, Reader)), key=lambda reader: reader.order))  # type: ignore[type-abstract]


def is_nothing(source: Source) -> bool:
    """Return True if there are no samples."""
    return isinstance(source.source if isinstance(source, Data) else source, Nothing)


def open_source(source: Source, request: Request) -> Opened:
    """Return the data of a source.

    Parameters
    ----------
    source : Source
        What any reader in this package takes, or `Data` around it; `forms` lists them.
    request : Request
        The model that it is read for, and options on reading.

    Raises
    ------
    DataError
        If it cannot be read.
    """
    if isinstance(source, Data):
        return open_source(source.source, replace(request, reading=source.reading))
    found = _reader(source).open(source, request)
    return found if found.limit is not None else replace(found, limit=request.reading.samples)


def wanted(model: ModelProto, reading: Reading) -> Wanted | None:
    """Return what samples a model takes, as the first reader says whose form its inputs look like.

    Parameters
    ----------
    model : ModelProto
    reading : Reading
        What the user said already.

    Returns
    -------
    Wanted or None
        None for a model without inputs.
    """
    request = Request(model, inputs_of(model), reading)
    return next(filter(None, (reader.wanted(request) for reader in registered() if request.inputs)), None)


def files_of(source: Any) -> list[tuple[str, Path]]:
    """Return the files that calibration data is read from, each with a label; empty if they are unknown."""
    if not isinstance(source, Data):
        return _reader(source).files(source)
    tokenizer = source.reading.tokenizer
    own = [] if tokenizer is None else [("the tokenizer", Path(os.path.abspath(tokenizer)))]
    return [*files_of(source.source), *own]


def forms(*, on_command_line: bool) -> list[str]:
    """Return one line on each form: those available on the command line, or those only in Python."""
    return [reader.form for reader in reversed(registered()) if reader.on_command_line is on_command_line]


def _reader(source: Any) -> Reader:
    """Return the first reader that takes the source; the readers of items and files take everything else."""
    return next(reader for reader in registered() if reader.takes(source))
