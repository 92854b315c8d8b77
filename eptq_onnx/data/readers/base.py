"""Interface of the readers of calibration data."""

from __future__ import annotations

import os
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, TypeAlias

import numpy as np
from numpy.typing import NDArray
from onnx import ModelProto
from typing_extensions import Unpack

from eptq_onnx.config.reading import Reading, ReadingOptions
from eptq_onnx.data.inputs import Input
from eptq_onnx.data.origin import Origin
from eptq_onnx.data.placing import Placed
from eptq_onnx.data.samples import spread

Arrays: TypeAlias = Mapping[str, NDArray[np.generic] | Sequence[NDArray[np.generic]]]
Feed: TypeAlias = Mapping[str, NDArray[np.generic]]
Content: TypeAlias = NDArray[np.generic] | Arrays | Sequence[Feed]
"""What every reader returns: one array, arrays by input, or feeds."""


class Data:
    """Calibration data with options on how to read it.

    Parameters
    ----------
    source : Source
        See `eptq_onnx.quantize`.
    **options
        Fields of `eptq_onnx.config.Reading`: ``samples``, ``image``, ``audio``, ``tokenizer``.

    Raises
    ------
    ConfigError
        If an option is invalid.
    """

    def __init__(self, source: Source, **options: Unpack[ReadingOptions]) -> None:
        self.source, self.reading = source, Reading(**options)

    def limited(self, samples: int) -> Data:
        """Return the same data with a number of samples to use."""
        found = Data(self.source)
        found.reading = self.reading.model_copy(update={"samples": samples})
        return found


class Nothing:
    """What is read where there are no samples."""


Source: TypeAlias = (
    str | os.PathLike[str] | Arrays | NDArray[np.generic] | Iterable[Feed] | Iterable[Any] | Data | Nothing
)


@dataclass(frozen=True)
class Request:
    """What is read for.

    Parameters
    ----------
    model : ModelProto
    inputs : tuple of Input
        What the model takes.
    reading : Reading
        What the user asked for.
    """

    model: ModelProto
    inputs: tuple[Input, ...]
    reading: Reading

    def chosen(self, count: int) -> list[int]:
        """Return which of ``count`` samples to read: all, or those of ``--samples``, evenly spread."""
        return [int(k) for k in spread(count, self.reading.samples or count)] if count else []


@dataclass(frozen=True)
class Opened:
    """What a reader found.

    Parameters
    ----------
    content : array, mapping of str to arrays, or sequence of feeds
    origin : Origin
        Where it comes from, and what was done to it.
    limit : int or None
        Most samples to use of it.
    names : tuple of str
        Names of the samples, if each is a file.
    placed : tuple of Placed
        Where pictures lie in the samples, if they are some.
    """

    content: Content
    origin: Origin
    limit: int | None = None
    names: tuple[str, ...] = ()
    placed: tuple[Placed, ...] = ()


@dataclass(frozen=True)
class Wanted:
    """Samples that a model takes, as far as its inputs tell.

    Parameters
    ----------
    about : str
        What they are, such as ``pictures``.
    arguments : tuple of str
        How a command is given them. Names of files are examples.
    guessed : tuple of str
        What of the arguments was guessed, and from what.
    notes : tuple of str
        Guesses that nothing confirms.
    """

    about: str
    arguments: tuple[str, ...]
    guessed: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()


class Reader(ABC):
    """One form of calibration data.

    Attributes
    ----------
    form : str
        The form in one line, for help and the documentation.
    on_command_line : bool
        False for forms that only Python can pass.
    order : int
        Readers are asked in this order; the first that takes a source reads it.
    """

    form: ClassVar[str]
    on_command_line: ClassVar[bool] = True
    order: ClassVar[int] = 50

    @abstractmethod
    def takes(self, source: Any) -> bool:
        """Return True if the source has this form, even if the file behind it is missing or damaged."""

    @abstractmethod
    def open(self, source: Any, request: Request) -> Opened:
        """Return the data, and where it comes from.

        Raises
        ------
        DataError
            If it cannot be read.
        """

    def wanted(self, request: Request) -> Wanted | None:
        """Return what samples of this form a model takes; None if its inputs do not look like it."""
        return None

    def files(self, source: Any) -> list[tuple[str, Path]]:
        """Return the files it reads, each with a label, so that no output overwrites them.

        By default, that is the file named by the source.
        """
        return [("the calibration data", Path(os.path.abspath(source)))]


def is_path(source: Any) -> bool:
    """Return True for strings and paths."""
    return isinstance(source, (str, os.PathLike))
