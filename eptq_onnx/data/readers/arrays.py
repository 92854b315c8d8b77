"""Reader of arrays in memory."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from eptq_onnx.data.inputs import Input
from eptq_onnx.data.origin import Origin
from eptq_onnx.data.readers.base import Opened, Reader, Request
from eptq_onnx.data.tensors import as_array, is_tensor
from eptq_onnx.errors import DataError

_LABEL = "the calibration data"


class ArrayReader(Reader):
    """Reads an array, or a mapping from input names to arrays or lists of arrays."""

    form = (
        "a mapping from input names to arrays or tensors with samples along the first axis, or to lists of "
        "samples of any sizes; for a model with one input, such an array"
    )
    on_command_line = False
    order = 10

    def takes(self, source: Any) -> bool:
        """Return True for arrays, tensors and mappings."""
        return is_tensor(source) or isinstance(source, Mapping)

    def open(self, source: Any, request: Request) -> Opened:
        """Return the source's own arrays."""
        inputs = {i.name: i for i in request.inputs}
        if not isinstance(source, Mapping):
            only = request.inputs[0] if len(inputs) == 1 else None
            return Opened(as_array(source, _LABEL, only), Origin(_LABEL))
        splits = [name for name, value in source.items() if hasattr(value, "column_names")]
        if splits:
            raise DataError(f"{_LABEL} has several splits: give one of them, such as data[{splits[0]!r}].")
        content = {name: _values(value, str(name), inputs.get(name)) for name, value in source.items()}
        return Opened(content, Origin(_LABEL))

    def files(self, source: Any) -> list[tuple[str, Path]]:
        """Return the files that memory-mapped arrays come from."""
        arrays = source.values() if isinstance(source, Mapping) else [source]
        mapped = [
            array.filename for array in arrays if isinstance(array, np.memmap) and array.filename is not None
        ]
        return [("the calibration data", Path(os.path.abspath(name))) for name in mapped]


def _values(value: Any, name: str, info: Input | None) -> Any:
    """Return an array, or a list of samples of any sizes."""
    label = f"{_LABEL}: {name!r}"
    if isinstance(value, (list, tuple)) and any(map(is_tensor, value)):
        return [as_array(v, f"{label}, sample {k},", info) for k, v in enumerate(value)]
    return as_array(value, label, info)
