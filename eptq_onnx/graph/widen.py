"""Conversion of half and double precision models to float32, with unchanged inputs and outputs."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray
from onnx import (
    AttributeProto,
    GraphProto,
    ModelProto,
    NodeProto,
    TensorProto,
    TypeProto,
    ValueInfoProto,
    helper,
)

from eptq_onnx.graph import edit
from eptq_onnx.graph.infer import infer_shapes
from eptq_onnx.proto import store
from eptq_onnx.proto.bodies import all_graphs, subgraphs

_WIDENED: dict[int, str] = {
    TensorProto.FLOAT16: "float16",
    TensorProto.BFLOAT16: "bfloat16",
    TensorProto.DOUBLE: "double",
}
_WIDENED_DOMAINS = ("", "com.microsoft")
"""Domains in which every operator that supports another float type supports float32, too."""
_TYPE_ATTRIBUTES = ("to", "dtype", "stash_type", "output_dtype")


def other_float_types(model: ModelProto) -> tuple[str, ...]:
    """Return the names of the float types other than float32 that a model computes in."""
    found: set[int] = set()
    for graph in all_graphs(model.graph):
        _visit(graph, found)
    return tuple(sorted(_WIDENED[t] for t in found))


def widen(model: ModelProto) -> ModelProto:
    """Return a copy that computes in float32 instead of float16, bfloat16 and double.

    Inputs and outputs keep their types and get a Cast. So do nodes whose operators may not support float32:
    those of other domains, and those that read or produce sequences, maps and optionals. A model that
    computes in float32 alone is returned as it is.
    """
    if not other_float_types(model):
        return model
    result = infer_shapes(model)
    graph = result.graph
    builder = edit.Builder(result, "float32/")
    constants = {t.name for t in graph.initializer}
    inputs = {
        i.name: builder.unique(f"{i.name}/float32")
        for i in graph.input
        if _is_other(i) and i.name not in constants
    }
    outputs = {
        o.name: builder.unique(f"{o.name}/float32")
        for o in graph.output
        if _is_other(o) and o.name not in inputs
    }
    for name, inside in inputs.items():
        builder.add("Cast", [name], inside, to=TensorProto.FLOAT)
    interface = [
        (i, i.type.tensor_type.elem_type)
        for i in (*graph.input, *graph.output)
        if _is_other(i) and i.name not in constants
    ]
    _widen_graph(graph, store.folder_of(model), {}, builder)
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
    return [
        *graph.initializer,
        *(a.t for n in graph.node for a in n.attribute if a.type == AttributeProto.TENSOR),
    ]


def _visit(graph: GraphProto, found: set[int]) -> None:
    """Collect the types of tensors, of declared values, and of the results of Cast and similar operators."""
    types = [t.data_type for t in _tensors(graph)]
    types += [i.type.tensor_type.elem_type for i in (*graph.input, *graph.output, *graph.value_info)]
    for node in graph.node:
        types += [a.i for a in node.attribute if a.name in _TYPE_ATTRIBUTES]
    found.update(t for t in types if t in _WIDENED)


def _as_float32(value: NDArray[Any]) -> NDArray[np.float32]:
    """Convert to float32 so that finite values stay finite: some masks contain the lowest double."""
    limits = np.finfo(np.float32)
    return np.where(np.isfinite(value), np.clip(value, limits.min, limits.max), value).astype(np.float32)


def _widen_graph(
    graph: GraphProto, folder: str | None, outer: Mapping[str, int | TypeProto], builder: edit.Builder
) -> None:
    """Widen a graph and its subgraphs, in place; ``outer`` has the types of tensors of enclosing graphs."""
    kinds = {**outer, **_kinds(graph)}
    stays = [not subgraphs(node) and _stays(node, kinds) for node in graph.node]
    own = [
        a.t
        for node, kept in zip(graph.node, stays, strict=True)
        if not kept
        for a in node.attribute
        if a.type == AttributeProto.TENSOR
    ]
    for tensor in (*graph.initializer, *own):
        if tensor.data_type in _WIDENED:
            tensor.CopyFrom(store.constant(_as_float32(store.array(tensor)), tensor.name, folder))
    for info in (*graph.input, *graph.output, *graph.value_info):
        if _is_other(info):
            info.type.tensor_type.elem_type = TensorProto.FLOAT
    nodes: list[NodeProto] = []
    for node, kept in zip(graph.node, stays, strict=True):
        if kept:
            nodes.extend(_between_casts(node, kinds, builder))
            continue
        nodes.append(node)
        for item in node.attribute:
            if item.name in _TYPE_ATTRIBUTES and item.i in _WIDENED:
                item.CopyFrom(helper.make_attribute(item.name, TensorProto.FLOAT))
        for inner in subgraphs(node):
            _widen_graph(inner, folder, kinds, builder)
    if any(stays):
        copies = [NodeProto.FromString(node.SerializeToString()) for node in nodes]
        del graph.node[:]
        graph.node.extend(copies)


def _kinds(graph: GraphProto) -> dict[str, int | TypeProto]:
    """Return the known element types of tensors, and the types of other values, of a graph."""
    infos = (*graph.value_info, *graph.input, *graph.output)
    kinds: dict[str, int | TypeProto] = {
        v.name: v.type.tensor_type.elem_type if v.type.HasField("tensor_type") else v.type
        for v in infos
        if v.type.WhichOneof("value")
    }
    return kinds | {t.name: t.data_type for t in graph.initializer}


def _stays(node: NodeProto, kinds: Mapping[str, int | TypeProto]) -> bool:
    return node.domain not in _WIDENED_DOMAINS or any(
        isinstance(kinds.get(name), TypeProto) for name in (*node.input, *node.output)
    )


def _between_casts(
    node: NodeProto, kinds: Mapping[str, int | TypeProto], builder: edit.Builder
) -> list[NodeProto]:
    """Return a node unchanged, with a Cast for each input and output of another float type than float32."""
    before, after = [], []
    for k, name in enumerate(node.input):
        kind = kinds.get(name)
        if isinstance(kind, int) and kind in _WIDENED:
            node.input[k] = builder.unique(f"{name}/{_WIDENED[kind]}")
            before.append(_cast(name, node.input[k], kind, builder))
    for k, name in enumerate(node.output):
        kind = kinds.get(name)
        if isinstance(kind, int) and kind in _WIDENED:
            node.output[k] = builder.unique(f"{name}/{_WIDENED[kind]}")
            after.append(_cast(node.output[k], name, TensorProto.FLOAT, builder))
    return [*before, node, *after]


def _cast(source: str, result: str, to: int, builder: edit.Builder) -> NodeProto:
    return helper.make_node("Cast", [source], [result], name=builder.unique(f"{result}/Cast"), to=to)
