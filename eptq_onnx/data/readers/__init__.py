"""Readers of calibration data: one file per form, each discovered automatically."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

from eptq_onnx.data.readers.base import Arrays, Data, Feed, Reader, Source
from eptq_onnx.discovery import classes

__all__ = ["Arrays", "Data", "Feed", "Reader", "Source", "files_of", "forms", "open_source", "registered"]


@cache
def registered() -> tuple[Reader, ...]:
    """Return one reader for each form, in the order in which they are asked."""
    return tuple(sorted((found() for found in classes(__name__, Reader)), key=lambda reader: reader.order))  # type: ignore[type-abstract]


def open_source(source: Source) -> tuple[Data, str]:
    """Return the data of a source, and its name for messages.

    Parameters
    ----------
    source : Source
        One of

        - a mapping from input name to an array with samples along the first axis, or to a list of samples of
          any sizes;
        - for a model with one input, such an array;
        - an iterable of feeds: mappings from input name to what the model takes in one run, batch axis
          included;
        - the path of a .npz (a mapping), of a .npy (an array), or of a folder of .npz files, each of them a
          feed;
        - ``"module:function"``, a function without arguments that returns any of these;
        - what any other reader in this package takes.

    Raises
    ------
    DataError
        If it cannot be read.
    """
    return _reader(source).open(source)


def files_of(source: Any) -> list[tuple[str, Path]]:
    """Return the files that calibration data is read from, each with a label; empty if they are unknown."""
    return _reader(source).files(source)


def forms(*, on_command_line: bool) -> list[str]:
    """Return one line on each form: those available on the command line, or those only in Python."""
    return [reader.form for reader in reversed(registered()) if reader.on_command_line is on_command_line]


def _reader(source: Any) -> Reader:
    """Return the first reader that takes the source; the readers of feeds and files take everything else."""
    return next(reader for reader in registered() if reader.takes(source))
