"""Models with their large weights in a file beside them."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import suppress
from itertools import chain
from pathlib import Path

import onnx
from google.protobuf.message import DecodeError
from onnx import ModelProto, TensorProto

from eptq_onnx.graph import store
from eptq_onnx.graph.bodies import all_nodes, initializers
from eptq_onnx.graph.weights import light, with_weights

_ALIGNMENT = 4096
"""Of each tensor in the file, so that runtimes can map it into memory."""


def write_external(model: ModelProto, path: Path, data: Path, data_name: str) -> None:
    """Write a model file, and its large initializers to another, without a second copy of them in memory.

    Parameters
    ----------
    model : ModelProto
        It is not changed.
    path, data : path
    data_name : str
        How the model file names the data file.

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
    """The files that a model is read from, each with what it is; as far as that can be told of a model that may be damaged.

    Returns
    -------
    list of (str, path)
        Absolute paths; none for a model that is given as bytes or as a message.
    """
    if isinstance(model, (bytes, ModelProto)):
        return []
    path = Path(os.path.abspath(model))
    names: dict[str, None] = {}
    with suppress(OSError, ValueError, DecodeError):
        names = dict.fromkeys(filter(None, map(_location, _tensors(onnx.load_model_from_string(path.read_bytes())))))
    return [("the float model", path), *(("the external data of the float model", path.parent / name) for name in names)]


def _location(tensor: TensorProto) -> str:
    return next((e.value for e in tensor.external_data if e.key == "location"), "") if store.is_stored(tensor) else ""


def _tensors(model: ModelProto) -> Iterator[TensorProto]:
    """Every tensor of a model that may be in another file."""
    yield from initializers(model.graph)
    for sparse in model.graph.sparse_initializer:
        yield from (sparse.values, sparse.indices)
    for node in chain(all_nodes(model.graph), *(all_nodes(f) for f in model.functions)):
        for attribute in node.attribute:
            yield from (attribute.t, *attribute.tensors)
