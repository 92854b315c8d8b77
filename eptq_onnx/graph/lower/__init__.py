"""Rewrites of operators that have no gradient into operators that have one.

A lowering gets a node, a view of its (private, shape-specialised) model and a builder; it adds nodes that
make the same output tensors, or raises `NotLowerable` with the reason. Values agree with the original to
float rounding; the tests compare them. The rules stand in one file a family; `eptq_onnx.ops` says which
operator has which.

What a rule emits is lowered in turn, so that it may use any operator of the table. Results that are to be
constants to gradients (the place of a maximum, say) come from nodes that are marked with `view.STOP`
(`base.stopped`).
"""

from __future__ import annotations

from collections.abc import Mapping

import onnx
from onnx import ModelProto, NodeProto, TensorProto

from eptq_onnx.graph.edit import Builder, with_nodes
from eptq_onnx.graph.lower.base import Lowering, NotLowerable, stay
from eptq_onnx.graph.view import STOP, GraphView

__all__ = ["Lowering", "NotLowerable", "lower"]


def _computes_floats(node: NodeProto, view: GraphView) -> bool:
    """False for arithmetic on positions, masks and sizes: it has no gradient, and float operators would not
    take it."""
    return any(
        view.elem_type(name) in (TensorProto.FLOAT, TensorProto.UNDEFINED)
        for name in [*node.input[:1], *node.output]
    )


def lower(model: ModelProto, rules: Mapping[tuple[str, str], Lowering]) -> tuple[ModelProto, dict[str, str]]:
    """Apply every rule that fits, again and again until none does.

    Parameters
    ----------
    model : ModelProto
        With fixed input shapes and inferred intermediate shapes.
    rules : mapping of (domain, op_type) to Lowering
        A rule that has nothing to do appends the node itself.

    Returns
    -------
    ModelProto
        A rewritten copy; tensor names survive. Nodes whose rule did not fit are marked with `view.STOP`.
    dict of str to str
        Node name and reason of every node whose rule did not fit.
    """
    while True:
        view, builder, refused = GraphView(model), Builder(model, "lowered/"), dict[str, str]()
        changed = False
        for node in view.nodes:
            rule = rules.get((node.domain if node.domain != "ai.onnx" else "", node.op_type))
            if rule is None or node.doc_string == STOP or not _computes_floats(node, view):
                builder.nodes.append(node)
                continue
            before = len(builder.nodes)
            try:
                rule(node, view, builder)
            except NotLowerable as reason:
                del builder.nodes[before:]
                builder.nodes.append(node)
                refused[node.name] = str(reason)
            changed |= builder.nodes[-1] is not node
        if not changed:
            break
        # Shapes behind what was rewritten may be news to the rules that did not fit.
        model = onnx.shape_inference.infer_shapes(
            with_nodes(model, builder.nodes, builder.initializers), data_prop=True
        )
    stopping = Builder(model)
    for node in view.nodes:
        if node.name in refused:
            stay(node, stopping)
        else:
            stopping.nodes.append(node)
    return with_nodes(model, stopping.nodes), refused
