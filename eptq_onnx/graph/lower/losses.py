"""Losses that some training exporters leave in a model."""

from __future__ import annotations

import numpy as np
from onnx import NodeProto, TensorProto

from eptq_onnx.graph.edit import Builder
from eptq_onnx.graph.lower.base import given, reshape, shape_of
from eptq_onnx.graph.view import GraphView, attribute, int_attribute


def negative_log_likelihood(node: NodeProto, view: GraphView, b: Builder) -> None:
    """y = -w[t] x[t] at the targets t, 0 for ignored targets; then the sum or the weighted mean."""
    _likelihood(node, view, b, node.input[0])


def softmax_cross_entropy(node: NodeProto, view: GraphView, b: Builder) -> None:
    """y = `negative_log_likelihood` of LogSoftmax along axis 1."""
    logs = b.add(
        "LogSoftmax",
        [node.input[0]],
        node.output[1] if len(node.output) > 1 and node.output[1] else None,
        axis=1,
    )
    _likelihood(node, view, b, logs)


def _likelihood(node: NodeProto, view: GraphView, b: Builder, logs: str) -> None:
    shape = shape_of(view, node.input[0])
    positions = [shape[0], *shape[2:]]
    ignored = attribute(node, "ignore_index")
    targets = b.add("Cast", [reshape(b, node.input[1], [shape[0], 1, *shape[2:]])], to=TensorProto.INT64)
    weight = b.constant(np.ones(positions, np.float32), "ones")
    if ignored is not None:
        mine = b.add("Equal", [targets, np.array(int_attribute(node, "ignore_index", 0))])
        targets = b.add("Where", [mine, np.array(0), targets])
        weight = reshape(b, b.add("Cast", [b.add("Not", [mine])], to=TensorProto.FLOAT), positions)
    if given(node, 2):
        weight = b.add(
            "Mul", [weight, reshape(b, b.add("Gather", [node.input[2], targets], axis=0), positions)]
        )
    picked = reshape(b, b.add("GatherElements", [logs, targets], axis=1), positions)
    reduction = attribute(node, "reduction", "mean")
    loss = b.add("Mul", [b.add("Neg", [picked]), weight], node.output[0] if reduction == "none" else None)
    if reduction == "none":
        return
    summed = b.reduce("ReduceSum", loss, None, node.output[0] if reduction == "sum" else None)
    if reduction == "mean":
        b.add("Div", [summed, b.reduce("ReduceSum", weight, None)], node.output[0])
