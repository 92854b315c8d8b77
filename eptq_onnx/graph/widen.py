"""Half and double precision models as float32 models with the same interface."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray
from onnx import AttributeProto, GraphProto, ModelProto, TensorProto, ValueInfoProto, helper

from eptq_onnx.graph import edit, store
from eptq_onnx.graph.bodies import subgraphs

_WIDENED: dict[int, str] = {TensorProto.FLOAT16: "float16", TensorProto.BFLOAT16: "bfloat16", TensorProto.DOUBLE: "double"}
_TYPE_ATTRIBUTES = ("to", "dtype", "stash_type", "output_dtype")


def other_float_types(model: ModelProto) -> tuple[str, ...]:
    """Names of the float types other than float32 that the model computes in."""
    found: set[int] = set()
    _visit(model.graph, found)
    return tuple(sorted(_WIDENED[t] for t in found))


def widen(model: ModelProto) -> ModelProto:
    """A copy that computes in float32 where the model computes in float16, bfloat16 or double; the model itself if nowhere.

    Inputs and outputs keep their types: a Cast stands behind the one and in front of the other.
    """
    if not other_float_types(model):
        return model
    result = ModelProto()
    result.CopyFrom(model)
    graph = result.graph
    builder = edit.Builder(result, "float32/")
    constants = {t.name for t in graph.initializer}
    inputs = {i.name: builder.unique(f"{i.name}/float32") for i in graph.input if _is_other(i) and i.name not in constants}
    outputs = {o.name: builder.unique(f"{o.name}/float32") for o in graph.output if _is_other(o) and o.name not in inputs}
    for name, inside in inputs.items():
        builder.add("Cast", [name], inside, to=TensorProto.FLOAT)
    interface = [(i, i.type.tensor_type.elem_type) for i in (*graph.input, *graph.output) if i.name not in constants]
    _widen_graph(graph, store.folder_of(model))
    for info, elem_type in interface:
        info.type.tensor_type.elem_type = elem_type
    builder.nodes.extend(edit.renamed(node, {**inputs, **outputs}) for node in graph.node)
    for info in graph.output:
        if info.name in outputs:
            builder.add("Cast", [outputs[info.name]], info.name, to=info.type.tensor_type.elem_type)
    for tensor in graph.initializer:
        tensor.name = outputs.get(tensor.name, tensor.name)
    del graph.value_info[:]
    return edit.with_nodes(result, builder.nodes)


def _is_other(info: ValueInfoProto) -> bool:
    return info.type.tensor_type.elem_type in _WIDENED


def _tensors(graph: GraphProto) -> list[TensorProto]:
    return [*graph.initializer, *(a.t for n in graph.node for a in n.attribute if a.type == AttributeProto.TENSOR)]


def _visit(graph: GraphProto, found: set[int]) -> None:
    """Collect the types of tensors, of what is declared, and of what Cast makes."""
    types = [t.data_type for t in _tensors(graph)]
    types += [i.type.tensor_type.elem_type for i in (*graph.input, *graph.output, *graph.value_info)]
    for node in graph.node:
        types += [a.i for a in node.attribute if a.name in _TYPE_ATTRIBUTES]
        for inner in subgraphs(node):
            _visit(inner, found)
    found.update(t for t in types if t in _WIDENED)


def _as_float32(value: NDArray[Any]) -> NDArray[np.float32]:
    """Finite values stay finite: masks are filled with the lowest double."""
    limits = np.finfo(np.float32)
    return np.where(np.isfinite(value), np.clip(value, limits.min, limits.max), value).astype(np.float32)


def _widen_graph(graph: GraphProto, folder: str | None) -> None:
    for tensor in _tensors(graph):
        if tensor.data_type in _WIDENED:
            tensor.CopyFrom(store.constant(_as_float32(store.array(tensor)), tensor.name, folder))
    for info in (*graph.input, *graph.output, *graph.value_info):
        if _is_other(info):
            info.type.tensor_type.elem_type = TensorProto.FLOAT
    for node in graph.node:
        for item in node.attribute:
            if item.name in _TYPE_ATTRIBUTES and item.i in _WIDENED:
                item.CopyFrom(helper.make_attribute(item.name, TensorProto.FLOAT))
        for inner in subgraphs(node):
            _widen_graph(inner, folder)
