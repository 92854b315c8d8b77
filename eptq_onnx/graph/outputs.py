"""Conversion of model outputs (float tensors, and sequences and maps of them) to comparable numbers."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray
from onnx import ModelProto, TensorProto, TypeProto

from eptq_onnx.graph import edit
from eptq_onnx.graph.view import GraphView

_FLOATS = (TensorProto.FLOAT, TensorProto.DOUBLE, TensorProto.FLOAT16, TensorProto.BFLOAT16)


def comparable(view: GraphView) -> tuple[str, ...]:
    """Return the names of the outputs that hold floating-point numbers, each once, in order."""
    return tuple(name for name in dict.fromkeys(view.outputs) if _is_float(view.kind(name)))


def _is_float(kind: int | TypeProto) -> bool:
    if not isinstance(kind, TypeProto):
        return kind in _FLOATS
    if kind.HasField("sequence_type"):
        return _is_float(kind.sequence_type.elem_type)
    if kind.HasField("optional_type"):
        return _is_float(kind.optional_type.elem_type)
    if kind.HasField("map_type"):
        return _is_float(kind.map_type.value_type)
    return kind.tensor_type.elem_type in _FLOATS


def readable(model: ModelProto) -> tuple[ModelProto, dict[str, str]]:
    """Return a model whose outputs can be converted to numpy, and the output to read for each one.

    onnxruntime cannot return bfloat16 to numpy: such an output gets a float32 copy of the same values. A
    model without bfloat16 outputs is returned as it is.

    Parameters
    ----------
    model : ModelProto
        With the types of its outputs.

    Returns
    -------
    ModelProto
    dict of str to str
        Name of each `comparable` output to the output to read.
    """
    view = GraphView(model)
    names = {name: name for name in comparable(view)}
    packed = [name for name in names if view.kind(name) == TensorProto.BFLOAT16]
    if not packed:
        return model, names
    builder = edit.Builder(model)
    for name in packed:
        names[name] = builder.add("Cast", [name], builder.unique(f"{name}/float32"), to=TensorProto.FLOAT)
    result = edit.with_nodes(model, [*model.graph.node, *builder.nodes], builder.initializers)
    for name in packed:
        edit.add_output(result, names[name], TensorProto.FLOAT)
    return result, names


def numbers(value: Any) -> NDArray[np.float64]:
    """Return the value of an output as float64.

    A tensor keeps its shape; the values of sequences, maps and optionals are concatenated to a vector.

    Raises
    ------
    TypeError
        If it holds anything but floating-point numbers.
    """
    if isinstance(value, np.ndarray):
        return _as_float64(value)
    return np.concatenate([np.zeros(0), *(part.reshape(-1) for part in _parts(value))])


def _parts(value: Any) -> Iterator[NDArray[np.float64]]:
    if value is None:
        return
    if isinstance(value, Mapping):
        value = list(value.values())
    if isinstance(value, (list, tuple)):
        for item in value:
            yield from _parts(item)
    else:
        yield _as_float64(np.asarray(value))


def _as_float64(array: NDArray[Any]) -> NDArray[np.float64]:
    if array.dtype.kind != "f" and array.dtype.name != "bfloat16":
        raise TypeError(f"an array of {array.dtype} holds no floating-point numbers")
    return array.astype(np.float64)
