"""Storage of the weights of large models in files, one per weight, instead of in the protobuf messages.

A run copies messages many times, and every copy includes the weights. A *stored* initializer only refers to
its value, like ONNX external data, but by absolute path: the file is in a folder that a single run owns, and
onnxruntime maps it into memory. Weights that the steps derive from a stored model go to the same folder.
"""

from __future__ import annotations

import itertools
import math
import os
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from onnx import ModelProto, TensorProto, helper, numpy_helper

from eptq_onnx.errors import OutputError
from eptq_onnx.proto.bodies import initializers

APART = 2**24
"""Size in bytes from which a model's weights are stored in files, so that copies of its graph are cheap."""
LARGE = 2**28
"""Size in bytes from which memory is saved at the expense of time."""
_HEAVY = 2**16
"""Size in bytes above which a weight of a stored model gets a file of its own."""
_CHUNK = 2**24
"""Bytes to read at a time from a file that is streamed."""
_WHOLE_BYTES = {
    TensorProto.FLOAT, TensorProto.FLOAT16, TensorProto.DOUBLE, TensorProto.BOOL,
    TensorProto.INT8, TensorProto.UINT8, TensorProto.INT16, TensorProto.UINT16,
    TensorProto.INT32, TensorProto.UINT32, TensorProto.INT64, TensorProto.UINT64,
}  # fmt: skip
"""Element types that numpy reads directly from raw bytes."""


def is_stored(tensor: TensorProto) -> bool:
    """Return True if the value of an initializer is in a file."""
    return bool(tensor.data_location == TensorProto.EXTERNAL)


def path_of(tensor: TensorProto) -> str:
    """Return the file of a stored initializer."""
    return str(next(e.value for e in tensor.external_data if e.key == "location"))


def value_bytes(tensor: TensorProto) -> int:
    """Return the size of an initializer's value in bytes, from its type and shape."""
    if tensor.data_type in _WHOLE_BYTES:
        return int(helper.tensor_dtype_to_np_dtype(tensor.data_type).itemsize * math.prod(tensor.dims))
    return held_bytes(tensor)


def held_bytes(tensor: TensorProto) -> int:
    """Return the bytes actually present of an initializer that is stored or has raw data."""
    return os.path.getsize(path_of(tensor)) if is_stored(tensor) else len(tensor.raw_data)


def model_bytes(model: ModelProto) -> int:
    """Return the size of a model in bytes, including its stored weights."""
    return int(model.ByteSize()) + sum(value_bytes(t) for t in initializers(model.graph) if is_stored(t))


def array(tensor: TensorProto) -> NDArray[Any]:
    """Return the value of an initializer."""
    if not is_stored(tensor):
        return numpy_helper.to_array(tensor)
    if tensor.data_type in _WHOLE_BYTES:
        return np.fromfile(path_of(tensor), helper.tensor_dtype_to_np_dtype(tensor.data_type)).reshape(
            tuple(tensor.dims)
        )
    return numpy_helper.to_array(loaded(tensor))


def parts(tensor: TensorProto) -> Iterator[tuple[slice, NDArray[Any]]]:
    """Yield the value of an initializer in chunks: a slice of the first axis, and the rows in it."""
    if not is_stored(tensor) or tensor.data_type not in _WHOLE_BYTES:
        value = array(tensor)
        yield slice(None), value
        return
    dtype = np.dtype(helper.tensor_dtype_to_np_dtype(tensor.data_type))
    shape = tuple(tensor.dims)
    row = math.prod(shape[1:])
    step = max(1, _CHUNK // (row * dtype.itemsize))
    for begin in range(0, shape[0], step):
        count = min(step, shape[0] - begin)
        values = np.fromfile(path_of(tensor), dtype, count * row, offset=begin * row * dtype.itemsize)
        yield slice(begin, begin + count), values.reshape(count, *shape[1:])


def is_finite(tensor: TensorProto) -> bool:
    """Return False if the value contains NaN or infinity."""
    return all(bool(np.isfinite(values).all()) for _, values in parts(tensor))


@dataclass(frozen=True)
class Place:
    """Location of a tensor's value in a file: ``length`` bytes from ``offset`` on."""

    path: Path
    offset: int
    length: int

    def parts(self) -> Iterator[bytes]:
        """Yield the bytes in chunks.

        Raises
        ------
        OSError
            If the file cannot be read or has become too short.
        """
        with open(self.path, "rb") as file:
            file.seek(self.offset)
            left = self.length
            while left:
                part = file.read(min(left, _CHUNK))
                if not part:
                    raise OSError(f"{self.path} has become shorter")
                yield part
                left -= len(part)


def copied(tensor: TensorProto, place: Place, folder: str) -> TensorProto:
    """Copy an initializer from a file beside the model into a stored one.

    The value is streamed, never held in memory as a whole.

    Raises
    ------
    OSError
        If the file cannot be read.
    OutputError
        If the folder has no room for the value.
    """
    with _new_file(folder) as target:
        for part in place.parts():
            target.write(part)
    return reference(tensor.name, tensor.data_type, tensor.dims, {"location": target.name})


@contextmanager
def _new_file(folder: str) -> Iterator[Any]:
    """Open a new file for a weight."""
    try:
        with tempfile.NamedTemporaryFile(dir=folder, suffix=".weight", delete=False) as file:
            yield file
    except OSError as e:
        raise OutputError(
            f"weights cannot be written to the temporary folder {folder}: {e.strerror or e}; "
            "set TMPDIR to a folder with enough room."
        ) from e


def loaded(tensor: TensorProto) -> TensorProto:
    """Return an initializer that holds its value: the given one, or a loaded copy if it is stored."""
    if not is_stored(tensor):
        return tensor
    with open(path_of(tensor), "rb") as file:
        return TensorProto(
            name=tensor.name, data_type=tensor.data_type, dims=tensor.dims, raw_data=file.read()
        )


def folder_of(model: ModelProto) -> str | None:
    """Return the folder of a model's stored weights, or None if none are stored."""
    return next((os.path.dirname(path_of(t)) for t in initializers(model.graph) if is_stored(t)), None)


def is_large(model: ModelProto) -> bool:
    """Return True if so much is stored of a model that memory must be saved."""
    sizes = (value_bytes(t) for t in initializers(model.graph) if is_stored(t))
    return any(total >= LARGE for total in itertools.accumulate(sizes))


def constant(value: NDArray[Any], name: str, folder: str | None) -> TensorProto:
    """Return an initializer with a value, stored if a folder is given and the value is large."""
    if folder is None or value.nbytes <= _HEAVY:
        return numpy_helper.from_array(value, name)
    return _written(folder, name, helper.np_dtype_to_tensor_dtype(value.dtype), value.shape, value)


def stored(tensor: TensorProto, folder: str | None) -> TensorProto:
    """Return a stored copy of an initializer; itself if small, already stored, or without a folder."""
    if folder is None or is_stored(tensor) or value_bytes(tensor) <= _HEAVY:
        return tensor
    data = (
        np.frombuffer(tensor.raw_data, np.uint8)
        if tensor.HasField("raw_data")
        else numpy_helper.to_array(tensor)
    )
    return _written(folder, tensor.name, tensor.data_type, tensor.dims, data)


def _written(folder: str, name: str, data_type: int, dims: Iterable[int], data: NDArray[Any]) -> TensorProto:
    with _new_file(folder) as file:
        data.tofile(file)
    return reference(name, data_type, dims, {"location": file.name})


def reference(name: str, data_type: int, dims: Iterable[int], place: Mapping[str, object]) -> TensorProto:
    """Return an initializer with external data.

    ``place`` has the entries of `TensorProto.external_data`: location, offset and length.
    """
    tensor = TensorProto(name=name, data_type=data_type, dims=dims, data_location=TensorProto.EXTERNAL)
    for key, value in place.items():
        tensor.external_data.add(key=key, value=str(value))
    return tensor


def with_file_names(model: ModelProto) -> ModelProto:
    """Return a copy that refers to its stored weights by bare file name, as ONNX requires."""
    result = ModelProto()
    result.CopyFrom(model)
    for tensor in initializers(result.graph):
        if is_stored(tensor):
            tensor.external_data[0].value = os.path.basename(path_of(tensor))
    return result


def load_all(model: ModelProto) -> ModelProto:
    """Return a model that holds all its weights: the given one, or a loaded copy if some are stored."""
    if folder_of(model) is None:
        return model
    result = ModelProto()
    result.CopyFrom(model)
    for tensor in initializers(result.graph):
        if is_stored(tensor):
            tensor.CopyFrom(loaded(tensor))
    return result
