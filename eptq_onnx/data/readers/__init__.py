"""Where calibration data comes from: one file a form, each found by itself."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

from eptq_onnx.data.readers.base import Arrays, Data, Feed, Reader, Source
from eptq_onnx.discovery import classes

__all__ = ["Arrays", "Data", "Feed", "Reader", "Source", "files_of", "forms", "opened", "registered"]


@cache
def registered() -> tuple[Reader, ...]:
    """One reader for each form, in the order in which they are asked."""
    return tuple(sorted((found() for found in classes(__name__, Reader)), key=lambda reader: reader.order))  # type: ignore[type-abstract]


def opened(source: Source) -> tuple[Data, str]:
    """The data behind a source, and what to call it in messages.

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
        - ``"module:function"``, a function without arguments that gives any of these;
        - what a further reader in this package takes.

    Raises
    ------
    DataError
        If it cannot be read.
    """
    return _reader(source).open(source)


def files_of(source: Any) -> list[tuple[str, Path]]:
    """The files that calibration data is read from, each with what it is; none of what cannot be read."""
    return _reader(source).files(source)


def forms(*, on_command_line: bool) -> list[str]:
    """What each reader takes, in one line: of those that a command can name, or of those that only Python
    has."""
    return [reader.form for reader in reversed(registered()) if reader.on_command_line is on_command_line]


def _reader(source: Any) -> Reader:
    """The first that takes the source; feeds and files leave nothing over."""
    return next(reader for reader in registered() if reader.takes(source))
