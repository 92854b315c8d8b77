"""Roles of nodes in a Q/DQ file: layers with weights and biases, and operators that run on integers."""

from __future__ import annotations

from collections.abc import Iterator

from onnx import NodeProto

from eptq_onnx.ops import spec_of
from eptq_onnx.rules.view import QdqView, Quantized
from eptq_onnx.targets import Operator, Target


def activation_of(tensor: str, view: QdqView, target: Target) -> Quantized | None:
    """Return the quantizer of a tensor, looking through operators that only move its values."""
    while (read := view.read(tensor)) is None:
        mover = view.graph.producer.get(tensor)
        row = None if mover is None else target.operators.get(mover.op_type)
        if mover is None or row is None or not row.carries:
            return None
        tensor = mover.input[0]
    return read


def rows_of(view: QdqView, target: Target) -> Iterator[tuple[NodeProto, Operator]]:
    """Yield the nodes that the target has a row for, with that row."""
    for node in view.nodes:
        row = target.operators.get(node.op_type)
        if row is not None:
            yield node, row


def weights_of(view: QdqView, target: Target) -> Iterator[tuple[NodeProto, Quantized, int]]:
    """Yield the layers with a quantized constant weight, the weight, and its output-channel axis."""
    for node, row in rows_of(view, target):
        spec = spec_of(node)
        if row.runs != "layer" or spec.weight is None or len(node.input) <= spec.weight:
            continue
        read = view.read(node.input[spec.weight])
        shape = view.graph.shape(node.input[spec.weight])
        if read is not None and read.constant and shape is not None and len(shape) >= 2:
            yield node, read, spec.weight_axis(node) % len(shape)


def biases_of(view: QdqView) -> set[str]:
    """Return the names of the DequantizeLinear nodes that produce biases of layers."""
    return {b.node.name for n in view.nodes if (b := bias_of(n, view)) is not None}


def bias_of(node: NodeProto, view: QdqView) -> Quantized | None:
    """Return a layer's quantized constant bias, or None."""
    place = spec_of(node).bias
    read = view.read(node.input[place]) if place is not None and len(node.input) > place else None
    return read if read is not None and read.constant else None


def activations_of(node: NodeProto, view: QdqView) -> list[str]:
    """Return the inputs of a node that carry activations."""
    return [i for i in spec_of(node).data_inputs(node) if not view.is_constant(i)]


def runs_on_integers(node: NodeProto, view: QdqView, target: Target) -> bool:
    """Return True if the target has an integer kernel for a node and the node reads quantized inputs."""
    row, plain = target.operators.get(node.op_type), view.stripped_nodes.get(node.name)
    return (
        row is not None
        and row.runs in ("layer", "arithmetic", "equal scale")
        and any(activation_of(i, view, target) is not None for i in activations_of(node, view))
        and (plain is None or spec_of(node).objection(plain, view.stripped) is None)
    )
