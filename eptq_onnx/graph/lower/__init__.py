"""Lowering of operators without a gradient to operators that have one.

A lowering gets a node, a view of its (private, shape-specialized) model and a builder. It adds nodes that
compute the same output tensors, or raises `NotLowerable` with the reason. Values agree with the original up
to float rounding, as the tests check. There is one file per family of operators; `eptq_onnx.ops` maps
operators to lowerings.

Nodes that a rule emits are lowered in turn, so a rule may use any operator of the table. Results that
gradients treat as constants (the index of a maximum, for example) come from nodes marked with `view.STOP`;
see `base.stopped`.
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
    """Return False for arithmetic on indices, masks and sizes, which has no gradient.

    Lowerings use float operators, which would not accept it.
    """
    return any(
        view.elem_type(name) in (TensorProto.FLOAT, TensorProto.UNDEFINED)
        for name in [*node.input[:1], *node.output]
    )


def lower(model: ModelProto, rules: Mapping[tuple[str, str], Lowering]) -> tuple[ModelProto, dict[str, str]]:
    """Apply all applicable rules repeatedly, until nothing changes.

    Parameters
    ----------
    model : ModelProto
        With fixed input shapes and inferred intermediate shapes.
    rules : mapping of (domain, op_type) to Lowering
        A rule that need not change a node appends the node itself.

    Returns
    -------
    ModelProto
        A rewritten copy with the same tensor names. Nodes that could not be lowered are marked with
        `view.STOP`.
    dict of str to str
        Name of every node that could not be lowered, with the reason.
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
        # Rules that did not apply may do so once the shapes downstream of rewritten nodes are known.
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
