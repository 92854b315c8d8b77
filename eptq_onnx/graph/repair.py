"""Removal of parts of a model that onnxruntime ignores and other libraries fail on."""

from __future__ import annotations

from collections.abc import Iterable
from functools import cache
from typing import Any

from onnx import FunctionProto, GraphProto, ModelProto, TensorProto, TypeProto, ValueInfoProto
from onnx.onnx_pb import DESCRIPTOR

from eptq_onnx.errors import ModelError
from eptq_onnx.graph.check import data_field, is_type, labelled_tensors
from eptq_onnx.proto.bodies import all_graphs, all_nodes

_DATA = ("raw_data", "float_data", "int32_data", "string_data", "int64_data", "double_data", "uint64_data")
_VERSIONS = range(1, 2**31)


def repair(model: ModelProto, name: str) -> None:
    """Remove, in place, parts of a model that onnxruntime ignores.

    These are second values of tensors, unused functions, impossible sizes, types that do not exist, and bytes
    in names that are not valid UTF-8.

    Raises
    ------
    ModelError
        If the name of an input or output is not valid UTF-8; no runtime accepts that.
    """
    for info in (*model.graph.input, *model.graph.output):
        if not isinstance(info.name, str):
            raise ModelError(
                f"{name} has an input or output whose name {info.name!r} is not valid UTF-8: rename it."
            )
    _decode(model)
    _drop_functions(model)
    for _, tensor in labelled_tensors(model):
        _keep_one_value(tensor)
    for graph in all_graphs(model.graph):
        _repair_declared(graph)
    used = {n.domain for graph in (model.graph, *model.functions) for n in all_nodes(graph)}
    imports = [o for o in model.opset_import if o.version in _VERSIONS or o.domain in used]
    if len(imports) < len(model.opset_import):
        kept = [(o.domain, o.version) for o in imports]
        del model.opset_import[:]
        for domain, version in kept:
            model.opset_import.add(domain=domain, version=version)


def _drop_functions(model: ModelProto) -> None:
    """Remove functions that no node calls, directly or indirectly; onnxruntime ignores them."""
    functions = {(f.domain, f.name): f for f in model.functions}
    called: set[tuple[str, str]] = set()
    calling: list[GraphProto | FunctionProto] = [model.graph]
    while calling:
        found = {(n.domain, n.op_type) for n in all_nodes(calling.pop())} & functions.keys()
        calling += [functions[key] for key in found - called]
        called |= found
    for k in reversed(range(len(model.functions))):
        if (model.functions[k].domain, model.functions[k].name) not in called:
            del model.functions[k]


def _keep_one_value(tensor: TensorProto) -> None:
    if tensor.HasField("segment"):
        tensor.ClearField("segment")
    raw = tensor.data_location == TensorProto.EXTERNAL or (
        tensor.HasField("raw_data") and tensor.data_type != TensorProto.STRING
    )
    kept = "raw_data" if raw else data_field(tensor)
    for field in _DATA:
        if field != kept and (tensor.HasField(field) if field == "raw_data" else len(getattr(tensor, field))):
            tensor.ClearField(field)


def _repair_declared(graph: GraphProto) -> None:
    known = [v for v in graph.value_info if not _is_odd(v)]
    if len(known) < len(graph.value_info):
        copies = [ValueInfoProto.FromString(v.SerializeToString()) for v in known]
        del graph.value_info[:]
        graph.value_info.extend(copies)
    for info in (*graph.input, *graph.output):
        _open_below(info.type, 0)
    for info in graph.value_info:
        # Inference finds the size 0 of computed tensors where it is real; onnxruntime does not trust it.
        _open_below(info.type, 1)


def _is_odd(info: ValueInfoProto) -> bool:
    return info.type.HasField("tensor_type") and not is_type(info.type.tensor_type.elem_type)


def _open_below(kind: TypeProto, least: int) -> None:
    """Turn axes of a smaller size into axes of unknown size, in place."""
    if kind.HasField("tensor_type"):
        for axis in kind.tensor_type.shape.dim if kind.tensor_type.HasField("shape") else ():
            if axis.HasField("dim_value") and axis.dim_value < least:
                axis.ClearField("dim_value")
    elif kind.HasField("sequence_type"):
        _open_below(kind.sequence_type.elem_type, least)
    elif kind.HasField("optional_type"):
        _open_below(kind.optional_type.elem_type, least)


# ---- names -------------------------------------------------------------------------------------------------
def _decode(model: ModelProto) -> None:
    """Escape the invalid bytes of strings that are not UTF-8, which protobuf returns as bytes, in place."""
    stack: list[Any] = [model]
    while stack:
        message = stack.pop()
        texts, many_texts, messages, many_messages = _fields(message.DESCRIPTOR.full_name)
        for field in texts:
            value = getattr(message, field)
            if isinstance(value, bytes):
                setattr(message, field, _text(value))
        for field in many_texts:
            values = getattr(message, field)
            if any(isinstance(value, bytes) for value in values):
                fixed = [_text(value) for value in values]
                del values[:]
                values.extend(fixed)
        stack.extend(getattr(message, field) for field in messages if message.HasField(field))
        for field in many_messages:
            stack.extend(getattr(message, field))


def _text(value: str | bytes) -> str:
    return value if isinstance(value, str) else value.decode("utf-8", "backslashreplace")


@cache
def _fields(full_name: str) -> tuple[list[str], list[str], list[str], list[str]]:
    """Return the fields of a message type that hold one string, several, one message, several."""
    found: tuple[list[str], ...] = ([], [], [], [])
    descriptor = DESCRIPTOR.pool.FindMessageTypeByName(full_name)
    for field in _ordered(descriptor.fields):
        many = bool(
            field.is_repeated if hasattr(field, "is_repeated") else field.label == field.LABEL_REPEATED
        )
        if field.type == field.TYPE_STRING:
            found[many].append(field.name)
        elif field.message_type is not None:
            found[2 + many].append(field.name)
    return found[0], found[1], found[2], found[3]


def _ordered(fields: Iterable[Any]) -> list[Any]:
    return sorted(fields, key=lambda field: field.number)
