"""Models with their large weights in a file beside them."""

from __future__ import annotations

from pathlib import Path

from onnx import ModelProto, TensorProto

from eptq_onnx.graph.weights import light

_ALIGNMENT = 4096
"""Of each tensor in the file, so that runtimes can map it into memory."""


def write_external(model: ModelProto, path: Path, data_name: str) -> None:
    """Write a model file, and its large initializers to ``data_name`` beside it, without a second copy of them in memory.

    Parameters
    ----------
    model : ModelProto
        Without external data; it is not changed.
    path : path
    data_name : str

    Raises
    ------
    OSError
        If a file cannot be written.
    """
    result, heavy = light(model)
    names = {t.name for t in heavy}
    listed = [i for i in result.graph.input if i.name not in names]
    del result.graph.input[:]
    result.graph.input.extend(listed)
    with open(path.parent / data_name, "wb") as file:
        for tensor in heavy:
            file.write(b"\0" * (-file.tell() % _ALIGNMENT))
            result.graph.initializer.append(_reference(tensor, data_name, file.tell()))
            file.write(tensor.raw_data)
    path.write_bytes(result.SerializeToString(deterministic=True))


def _reference(tensor: TensorProto, location: str, offset: int) -> TensorProto:
    reference = TensorProto(name=tensor.name, data_type=tensor.data_type, dims=tensor.dims, data_location=TensorProto.EXTERNAL)
    for key, value in (("location", location), ("offset", str(offset)), ("length", str(len(tensor.raw_data)))):
        reference.external_data.add(key=key, value=value)
    return reference
