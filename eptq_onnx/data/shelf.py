"""Arrays that come one by one, kept outside the process's own memory."""

from __future__ import annotations

import math
import tempfile
import weakref
from dataclasses import dataclass
from typing import IO, Any

import numpy as np
from numpy.typing import NDArray

from eptq_onnx.errors import DataError


@dataclass(frozen=True)
class _Place:
    """Where an array lies in the file."""

    start: int
    shape: tuple[int, ...]
    dtype: np.dtype[Any]

    def of(self, whole: NDArray[Any]) -> NDArray[Any]:
        end = self.start + math.prod(self.shape) * self.dtype.itemsize
        return whole[self.start : end].view(self.dtype).reshape(self.shape)


class Shelf:
    """The values of one input, sample by sample.

    Numbers go to a temporary file without a name, which vanishes with the last array that refers to it, and
    whose pages the system takes back when memory is short. Text stays in memory.

    Parameters
    ----------
    filed : bool
        False for arrays that are in memory anyway, which are kept as they are.
    """

    def __init__(self, *, filed: bool = True) -> None:
        self._filed = filed
        self._file: IO[bytes] | None = None
        self._entries: list[NDArray[Any] | _Place] = []
        self._end = 0

    def __len__(self) -> int:
        return len(self._entries)

    def add(self, value: NDArray[Any]) -> None:
        """Append a sample.

        Raises
        ------
        DataError
            If the temporary file cannot be written.
        """
        if not self._filed or value.dtype.kind in "OSU":
            self._entries.append(value)
            return
        try:
            if self._file is None:
                self._file = tempfile.TemporaryFile(prefix="eptq-onnx-")  # noqa: SIM115 (closed with the shelf)
                weakref.finalize(self, self._file.close)
            self._file.write(np.ascontiguousarray(value).tobytes())
        except OSError as e:
            raise DataError(
                f"the samples cannot be kept in a temporary file ({e.strerror or e}): "
                "set TMPDIR to a folder with enough room, or give fewer with --samples."
            ) from e
        self._entries.append(_Place(self._end, value.shape, value.dtype))
        self._end += value.nbytes

    def entries(self) -> list[NDArray[Any]]:
        """Return the samples, those in the file mapped."""
        whole = self._mapped()
        return [e.of(whole) if isinstance(e, _Place) else e for e in self._entries]

    def values(self) -> NDArray[Any] | list[NDArray[Any]]:
        """Return the samples as one mapped array if they are in the file and alike, else as a list."""
        kinds = {(e.shape, e.dtype) if isinstance(e, _Place) else None for e in self._entries}
        kind = kinds.pop() if len(kinds) == 1 else None
        if kind is None:
            return self.entries()
        shape, dtype = kind
        return self._mapped().view(dtype).reshape(len(self._entries), *shape)

    def _mapped(self) -> NDArray[Any]:
        if self._file is None or not self._end:
            return np.zeros(0, np.uint8)
        self._file.flush()
        return np.asarray(np.memmap(self._file, np.uint8, "r"))
