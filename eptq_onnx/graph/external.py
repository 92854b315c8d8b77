"""Models with their large weights in a file beside them."""

from __future__ import annotations

from pathlib import Path

from onnx import ModelProto

from eptq_onnx.graph import store
from eptq_onnx.graph.weights import light, with_weights

_ALIGNMENT = 4096
"""Of each tensor in the file, so that runtimes can map it into memory."""


def write_external(model: ModelProto, path: Path, data_name: str) -> None:
    """Write a model file, and its large initializers to ``data_name`` beside it, without a second copy of them in memory.

    Parameters
    ----------
    model : ModelProto
        It is not changed.
    path : path
    data_name : str

    Raises
    ------
    OSError
        If a file cannot be written.
    """
    result, heavy = light(model)
    places = []
    with open(path.parent / data_name, "wb") as file:
        for tensor in heavy:
            file.write(b"\0" * (-file.tell() % _ALIGNMENT))
            data = store.loaded(tensor).raw_data
            place = {"location": data_name, "offset": file.tell(), "length": len(data)}
            places.append(store.reference(tensor.name, tensor.data_type, tensor.dims, place))
            file.write(data)
    path.write_bytes(with_weights(result, places).SerializeToString(deterministic=True))
