"""Weights of large models in files, each of its own, instead of in the messages.

Every copy of a message copies what it holds, and a run makes many. A *stored* initializer holds the place of
its value only, as ONNX's external data does, but with an absolute path: the file is ours, in a folder that
one run has to itself and that onnxruntime maps into memory. Weights that steps make of a stored model go to
the same folder.
"""

from __future__ import annotations

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

LARGE = 2**28
"""Bytes of weights from which on a model is stored."""
_HEAVY = 2**16
"""Bytes above which a weight of a stored model is."""
_CHUNK = 2**24
"""Bytes that are read of a file at a time, where all are not needed at once."""
_WHOLE_BYTES = {
    TensorProto.FLOAT, TensorProto.FLOAT16, TensorProto.DOUBLE, TensorProto.BOOL, TensorProto.INT8, TensorProto.UINT8,
    TensorProto.INT16, TensorProto.UINT16, TensorProto.INT32, TensorProto.UINT32, TensorProto.INT64, TensorProto.UINT64,
}  # fmt: skip
"""Types whose values numpy reads as they are."""


def is_stored(tensor: TensorProto) -> bool:
    """True if a file holds the value."""
    return bool(tensor.data_location == TensorProto.EXTERNAL)


def path_of(tensor: TensorProto) -> str:
    """The file of a stored initializer."""
    return str(next(e.value for e in tensor.external_data if e.key == "location"))


def value_bytes(tensor: TensorProto) -> int:
    """Bytes that the value of an initializer takes, by its type and shape."""
    if tensor.data_type in _WHOLE_BYTES:
        return int(helper.tensor_dtype_to_np_dtype(tensor.data_type).itemsize * math.prod(tensor.dims))
    return held_bytes(tensor)


def held_bytes(tensor: TensorProto) -> int:
    """Bytes that are there, of an initializer that is stored or has raw data."""
    return os.path.getsize(path_of(tensor)) if is_stored(tensor) else len(tensor.raw_data)


def model_bytes(model: ModelProto) -> int:
    """Size of a model, with the weights that it stores."""
    return int(model.ByteSize()) + sum(value_bytes(t) for t in initializers(model.graph) if is_stored(t))


def array(tensor: TensorProto) -> NDArray[Any]:
    """The value of an initializer."""
    if not is_stored(tensor):
        return numpy_helper.to_array(tensor)
    if tensor.data_type in _WHOLE_BYTES:
        return np.fromfile(path_of(tensor), helper.tensor_dtype_to_np_dtype(tensor.data_type)).reshape(
            tuple(tensor.dims)
        )
    return numpy_helper.to_array(loaded(tensor))


def parts(tensor: TensorProto) -> Iterator[tuple[slice, NDArray[Any]]]:
    """The value of an initializer, some rows at a time: where they are along the first axis, and the rows."""
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
    """False if the value has NaN or Inf somewhere."""
    return all(bool(np.isfinite(values).all()) for _, values in parts(tensor))


@dataclass(frozen=True)
class Place:
    """Where a file has the value of a tensor: from a byte on, so many of them."""

    path: Path
    offset: int
    length: int

    def parts(self) -> Iterator[bytes]:
        """The bytes, some at a time.

        Raises
        ------
        OSError
            If the file cannot be read, or became too short.
        """
        with open(self.path, "rb") as file:
            file.seek(self.offset)
            left = self.length
            while left:
                part = file.read(min(left, _CHUNK))
                if not part:
                    raise OSError(f"{self.path} became shorter")
                yield part
                left -= len(part)


def copied(tensor: TensorProto, place: Place, folder: str) -> TensorProto:
    """A stored copy of an initializer that is in a file beside the model, without reading it into memory at
    once.

    Raises
    ------
    OSError
        If it cannot be read.
    OutputError
        If the folder has no room for it.
    """
    with _new_file(folder) as target:
        for part in place.parts():
            target.write(part)
    return reference(tensor.name, tensor.data_type, tensor.dims, {"location": target.name})


@contextmanager
def _new_file(folder: str) -> Iterator[Any]:
    """A file to write a weight to."""
    try:
        with tempfile.NamedTemporaryFile(dir=folder, suffix=".weight", delete=False) as file:
            yield file
    except OSError as e:
        raise OutputError(
            f"weights cannot be put into the temporary folder {folder}: {e.strerror or e}; let TMPDIR name one with room."
        ) from e


def loaded(tensor: TensorProto) -> TensorProto:
    """A copy of an initializer that holds its value; itself if it does."""
    if not is_stored(tensor):
        return tensor
    with open(path_of(tensor), "rb") as file:
        return TensorProto(
            name=tensor.name, data_type=tensor.data_type, dims=tensor.dims, raw_data=file.read()
        )


def folder_of(model: ModelProto) -> str | None:
    """The folder of a model's stored weights; None if it has none."""
    return next((os.path.dirname(path_of(t)) for t in initializers(model.graph) if is_stored(t)), None)


def constant(value: NDArray[Any], name: str, folder: str | None) -> TensorProto:
    """An initializer, stored in the folder if there is one and it is heavy."""
    if folder is None or value.nbytes <= _HEAVY:
        return numpy_helper.from_array(value, name)
    return _written(folder, name, helper.np_dtype_to_tensor_dtype(value.dtype), value.shape, value)


def stored(tensor: TensorProto, folder: str | None) -> TensorProto:
    """A stored copy of an initializer; itself if it is light or stored, or there is no folder."""
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
    """An initializer whose value is elsewhere: location, offset and length, as `TensorProto.external_data`
    has them."""
    tensor = TensorProto(name=name, data_type=data_type, dims=dims, data_location=TensorProto.EXTERNAL)
    for key, value in place.items():
        tensor.external_data.add(key=key, value=str(value))
    return tensor


def with_file_names(model: ModelProto) -> ModelProto:
    """A copy whose stored weights are found from inside their folder, as ONNX wants it."""
    result = ModelProto()
    result.CopyFrom(model)
    for tensor in initializers(result.graph):
        if is_stored(tensor):
            tensor.external_data[0].value = os.path.basename(path_of(tensor))
    return result


def load_all(model: ModelProto) -> ModelProto:
    """A copy that holds its weights; itself if it does."""
    if folder_of(model) is None:
        return model
    result = ModelProto()
    result.CopyFrom(model)
    for tensor in initializers(result.graph):
        if is_stored(tensor):
            tensor.CopyFrom(loaded(tensor))
    return result
