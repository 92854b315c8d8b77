"""Reader of arrays in memory."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from eptq_onnx.data.readers.base import Data, Reader


class ArrayReader(Reader):
    """Reads an array, or a mapping from input names to arrays or lists of arrays."""

    form = (
        "a mapping from input names to arrays with samples along the first axis, "
        "or to lists of samples of any sizes"
    )
    on_command_line = False
    order = 10

    def takes(self, source: Any) -> bool:
        """Return True for arrays and mappings."""
        return isinstance(source, (np.ndarray, Mapping))

    def open(self, source: Any) -> tuple[Data, str]:
        """Return the source itself."""
        return source, "the calibration data"

    def files(self, source: Any) -> list[tuple[str, Path]]:
        """Return the files that memory-mapped arrays come from."""
        arrays = source.values() if isinstance(source, Mapping) else [source]
        mapped = [
            array.filename for array in arrays if isinstance(array, np.memmap) and array.filename is not None
        ]
        return [("the calibration data", Path(os.path.abspath(name))) for name in mapped]
