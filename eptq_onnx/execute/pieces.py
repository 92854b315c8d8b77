"""Extraction of some nodes of a model as a model of their own."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import numpy as np
from onnx import ModelProto, NodeProto, TensorProto, TypeProto, helper

from eptq_onnx.graph.edit import described
from eptq_onnx.graph.view import GraphView
from eptq_onnx.numerics.types import Array
from eptq_onnx.proto.bodies import node_reads
from eptq_onnx.runtime import Session


def piece(
    view: GraphView,
    nodes: Sequence[NodeProto],
    inputs: Mapping[str, int | TypeProto],
    outputs: Mapping[str, int | TypeProto],
) -> ModelProto:
    """Return a model that computes some tensors of a graph from others.

    Parameters
    ----------
    view : GraphView
    nodes : sequence of NodeProto
        In topological order.
    inputs, outputs : mapping of str to int or TypeProto
        Name of a tensor to its ONNX element type (any shape), or of any other value to its type. The type of
        an output may be left undefined if it is unknown.
    """
    constants = dict.fromkeys(
        i for n in nodes for i in node_reads(n) if i in view.initializers and i not in inputs
    )
    graph = helper.make_graph(
        nodes,
        "piece",
        [described(name, kind) for name, kind in inputs.items()],
        [described(name, kind) for name, kind in outputs.items()],
        [view.initializers[i] for i in constants],
    )
    return helper.make_model(graph, opset_imports=view.model.opset_import, ir_version=view.model.ir_version)


def function_of(
    view: GraphView, nodes: Sequence[NodeProto], tensor: str, end: str
) -> Callable[[Array], Array]:
    """Return the function that some nodes compute from one float tensor to another, for any shape.

    Its argument is the value of ``tensor``, its result that of ``end``.
    """
    session = Session(piece(view, nodes, {tensor: TensorProto.FLOAT}, {end: TensorProto.FLOAT}))

    def function(values: Array) -> Array:
        return np.asarray(session.run({tensor: values})[end], np.float32)

    return function
