"""Types of values: by the names that onnxruntime gives them, and those of constants."""

from __future__ import annotations

from collections.abc import Sequence

from onnx import ModelProto, TensorProto, TypeProto, helper

from eptq_onnx.proto.bodies import initializers


def value_type(name: str, shape: Sequence[int | str | None] | None = None) -> TypeProto:
    """Return the type that onnxruntime calls by a name such as ``seq(map(string,tensor(float)))``.

    Parameters
    ----------
    name : str
    shape : sequence of int, str or None, optional
        Shape of a tensor; without it the type has no shape.
    """
    outer, _, rest = name.partition("(")
    inner = rest.removesuffix(")")
    if outer == "seq":
        return helper.make_sequence_type_proto(value_type(inner))
    if outer == "optional":
        return helper.make_optional_type_proto(value_type(inner))
    if outer == "map":
        key, _, value = inner.partition(",")
        return helper.make_map_type_proto(_element(key), value_type(value.strip()))
    return helper.make_tensor_type_proto(_element(inner), shape)


def _element(name: str) -> int:
    return int(dict(TensorProto.DataType.items()).get(name.upper(), TensorProto.UNDEFINED))


def has_8_bit_floats(model: ModelProto) -> bool:
    """Return True if a constant of a model, such as a zero point, is an 8-bit float."""
    return any(TensorProto.DataType.Name(t.data_type).startswith("FLOAT8") for t in initializers(model.graph))
