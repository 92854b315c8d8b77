"""What a form of calibration data is."""

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
"""What all forms come to: one array, arrays by input, or feeds."""


class Reader(ABC):
    """One form of calibration data.

    Attributes
    ----------
    form : str
        The form in one line, for help and the documentation.
    on_command_line : bool
        False for what only Python can hand over.
    order : int
        Readers are asked in this order, and the first that takes a source reads it.
    """

    form: ClassVar[str]
    on_command_line: ClassVar[bool] = True
    order: ClassVar[int] = 50

    @abstractmethod
    def takes(self, source: Any) -> bool:
        """True if the source has this form; the file behind it may be missing or damaged."""

    @abstractmethod
    def open(self, source: Any) -> tuple[Data, str]:
        """The data, and what to call it in messages.

        Raises
        ------
        DataError
            If it cannot be read.
        """

    def files(self, source: Any) -> list[tuple[str, Path]]:
        """The files that it reads, each with what it is, so that no output overwrites them: by default the
        one that the source names."""
        return [("the calibration data", Path(os.path.abspath(source)))]


def is_path(source: Any) -> bool:
    """True for text and paths."""
    return isinstance(source, (str, os.PathLike))
