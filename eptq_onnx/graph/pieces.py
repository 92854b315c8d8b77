"""Some nodes of a model, as a model of their own."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from onnx import ModelProto, NodeProto, helper

from eptq_onnx.graph.bodies import node_reads
from eptq_onnx.graph.view import GraphView


def piece(view: GraphView, nodes: Sequence[NodeProto], inputs: Mapping[str, int], outputs: Mapping[str, int]) -> ModelProto:
    """A model that computes some tensors from others.

    Parameters
    ----------
    view : GraphView
    nodes : sequence of NodeProto
        In order.
    inputs, outputs : dict of str to int
        Tensor to ONNX element type; of any shape.
    """
    constants = dict.fromkeys(i for n in nodes for i in node_reads(n) if i in view.initializers and i not in inputs)
    graph = helper.make_graph(
        nodes,
        "piece",
        [helper.make_tensor_value_info(name, kind, None) for name, kind in inputs.items()],
        [helper.make_tensor_value_info(name, kind, None) for name, kind in outputs.items()],
        [view.initializers[i] for i in constants],
    )
    return helper.make_model(graph, opset_imports=view.model.opset_import, ir_version=view.model.ir_version)
