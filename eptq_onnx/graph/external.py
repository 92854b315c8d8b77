"""Reading and writing of models with external data: large weights in files beside the model."""

from __future__ import annotations

import os
import re
import shutil
import stat
from contextlib import suppress
from pathlib import Path, PurePosixPath, PureWindowsPath

import onnx
import psutil
from google.protobuf.message import DecodeError
from onnx import ModelProto, TensorProto

from eptq_onnx.graph.check import labelled_tensors, value_bytes
from eptq_onnx.proto import store
from eptq_onnx.proto.weights import light, with_weights, without_weights

_ALIGNMENT = 4096
"""Alignment of tensors in the file in bytes, so that runtimes can map them into memory."""
_SHOWN = 200
"""Maximum number of characters of a file name in a message."""


def write_external(model: ModelProto, path: Path, data: Path, data_name: str) -> None:
    """Write a model file and a data file with the large initializers, without copying these in memory.

    Parameters
    ----------
    model : ModelProto
        It is not changed.
    path, data : path
        The model file and the data file.
    data_name : str
        Name of the data file in the model file.

    Raises
    ------
    OSError
        If a file cannot be written.
    """
    result, heavy = light(model)
    places = []
    with open(data, "wb") as file:
        for tensor in heavy:
            file.write(b"\0" * (-file.tell() % _ALIGNMENT))
            values = store.loaded(tensor).raw_data
            place = {"location": data_name, "offset": file.tell(), "length": len(values)}
            places.append(store.reference(tensor.name, tensor.data_type, tensor.dims, place))
            file.write(values)
    path.write_bytes(with_weights(result, places).SerializeToString(deterministic=True))


def files_of(model: str | os.PathLike[str] | bytes | ModelProto) -> list[tuple[str, Path]]:
    """Return the files that a model is read from, as far as they can be found in a possibly damaged model.

    Returns
    -------
    list of (str, path)
        Description and absolute path; empty for a model given as bytes or as a message.
    """
    if isinstance(model, (bytes, ModelProto)):
        return []
    path = Path(os.path.abspath(model))
    names: dict[str, None] = {}
    with suppress(OSError, ValueError, DecodeError):
        names = dict.fromkeys(
            filter(
                None,
                (_location(t) for _, t in labelled_tensors(onnx.load_model_from_string(path.read_bytes()))),
            )
        )
    return [
        ("the float model", path),
        *(("the external data of the float model", path.parent / name) for name in names),
    ]


def _location(tensor: TensorProto) -> str:
    return _entry(tensor, "location") if store.is_stored(tensor) else ""


def _entry(tensor: TensorProto, key: str) -> str:
    """Return the last entry of a key in a tensor's external data, or an empty string."""
    found = next((e.value for e in reversed(tensor.external_data) if e.key == key), "")
    return found if isinstance(found, str) and "\0" not in found else ""


def _number(tensor: TensorProto, key: str) -> int:
    text = _entry(tensor, key) or "0"
    if not re.fullmatch(r"\s*\+?[0-9]{1,19}", text):
        raise ValueError(f"the {key} of {tensor.name} is {text[:40]!r}, not a number of bytes")
    return int(text)


def place_of(tensor: TensorProto, model: Path) -> store.Place:
    """Return the location of a tensor's external data, checked without reading the data.

    Parameters
    ----------
    tensor : TensorProto
        With a valid type and shape.
    model : path
        The model file.

    Raises
    ------
    OutsideError
        If the file is not below the folder of the model, by its name or after links are resolved.
    ValueError
        If the file does not exist, or offset and length do not match the type and shape, or the file.
    """
    location = _entry(tensor, "location")
    shown = location if len(location) <= _SHOWN else f"{location[:_SHOWN]}..."
    if not location:
        raise ValueError(f"{tensor.name} does not say in which file it is")
    if (
        PurePosixPath(location).is_absolute()
        or PureWindowsPath(location).drive
        or PureWindowsPath(location).root
    ):
        raise OutsideError(
            f"{shown}, where {tensor.name} is, is not below the model's folder: "
            "external data has a relative path"
        )
    beside = Path(os.path.abspath(model)).parent
    # The name is checked first, so that files outside are not even accessed. Links may lead to the folder of
    # the real model file: caches keep links to a model and its data in another folder.
    inside = Path(os.path.normpath(beside / location)).is_relative_to(beside)
    source = Path(os.path.realpath(beside / location))
    if not inside or not any(
        source.is_relative_to(folder)
        for folder in {Path(os.path.realpath(beside)), Path(os.path.realpath(model)).parent}
    ):
        raise OutsideError(
            f"{shown}, where {tensor.name} is, is not below the model's folder: put it beside the model"
        )
    try:
        status = source.stat()
    except OSError as e:
        raise ValueError(f"{shown}, where {tensor.name} is: {e.strerror}") from e
    if not stat.S_ISREG(status.st_mode):
        raise ValueError(f"{shown}, where {tensor.name} is, is not a file")
    expected, offset, length = value_bytes(tensor), _number(tensor, "offset"), _number(tensor, "length")
    if length not in (0, expected):
        raise ValueError(f"{tensor.name} has {length} bytes instead of {expected}, by its type and shape")
    if offset + expected > status.st_size:
        raise ValueError(
            f"{shown} ends before the value of {tensor.name} does: "
            f"it has {status.st_size} bytes of {offset + expected}"
        )
    return store.Place(source, offset, expected)


class OutsideError(ValueError):
    """Raised for external data outside the model's folder."""


def with_values(model: ModelProto, path: Path, folder: str | None) -> ModelProto:
    """Return a copy of a model with its external data in memory, or with large weights stored in a folder.

    Parameters
    ----------
    model : ModelProto
        Checked; it is not changed.
    path : path
        The model file.
    folder : str, optional
        Folder for large initializers.

    Raises
    ------
    ValueError, OSError
        See `place_of`; raised before anything is read. Also if there is not enough room.
    """
    apart = [tensor for _, tensor in labelled_tensors(model) if store.is_stored(tensor)]
    needed = sum(place_of(tensor, path).length for tensor in apart)
    room = psutil.virtual_memory().available if folder is None else shutil.disk_usage(folder).free
    if needed > room:
        raise ValueError(
            f"it takes {needed} bytes, and {room} are free "
            f"{'in memory' if folder is None else 'in the temporary folder'}"
        )
    result = without_weights(model)
    for _, tensor in labelled_tensors(result):
        if store.is_stored(tensor):
            _hold(tensor, path)
    for tensor in model.graph.initializer:
        if not store.is_stored(tensor):
            result.graph.initializer.append(store.stored(tensor, folder))
        elif folder is not None:
            result.graph.initializer.append(store.copied(tensor, place_of(tensor, path), folder))
        else:
            result.graph.initializer.append(tensor)
            _hold(result.graph.initializer[-1], path)
    return result


def _hold(tensor: TensorProto, path: Path) -> None:
    tensor.raw_data = b"".join(place_of(tensor, path).parts())
    tensor.data_location = TensorProto.DEFAULT
    del tensor.external_data[:]
