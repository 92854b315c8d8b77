"""Interface of the readers of calibration data."""

from __future__ import annotations

import os
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, TypeAlias

import numpy as np
from numpy.typing import NDArray

Arrays: TypeAlias = Mapping[str, NDArray[np.generic] | Sequence[NDArray[np.generic]]]
Feed: TypeAlias = Mapping[str, NDArray[np.generic]]
Source: TypeAlias = str | os.PathLike[str] | Arrays | NDArray[np.generic] | Iterable[Feed]
Data: TypeAlias = NDArray[np.generic] | Arrays | Sequence[Feed]
"""What every reader returns: one array, arrays by input, or feeds."""


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
    def open(self, source: Any) -> tuple[Data, str]:
        """Return the data, and its name for messages.

        Raises
        ------
        DataError
            If it cannot be read.
        """

    def files(self, source: Any) -> list[tuple[str, Path]]:
        """Return the files it reads, each with a label, so that no output overwrites them.

        By default, that is the file named by the source.
        """
        return [("the calibration data", Path(os.path.abspath(source)))]


def is_path(source: Any) -> bool:
    """Return True for strings and paths."""
    return isinstance(source, (str, os.PathLike))
