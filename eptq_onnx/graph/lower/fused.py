"""Layers that onnxruntime's optimizer has fused with the operators after them.

Source: onnxruntime, ContribOperators.md and contrib_defs.cc: FusedConv, FusedGemm, FusedMatMul.
"""

from __future__ import annotations

from typing import Any

from onnx import NodeProto, helper

from eptq_onnx.graph.edit import Builder
from eptq_onnx.graph.lower.base import NotLowerable, given, number, shape_of, transpose
from eptq_onnx.graph.view import GraphView, attribute, int_attribute

_PARAMETERS = {"LeakyRelu": ("alpha",), "HardSigmoid": ("alpha", "beta"), "Elu": ("alpha",)}


def fused_matmul(node: NodeProto, view: GraphView, b: Builder) -> None:
    """y = alpha op(a) op(b).

    transBatchA and transBatchB first move the first batch axis behind the other batch axes.
    """
    operands = []
    for k, side in enumerate("AB"):
        rank = len(shape_of(view, node.input[k]))
        order = list(range(rank))
        if int_attribute(node, f"transBatch{side}", 0) and rank > 2:
            order = [*order[1:-1], order[0], order[-1]]
        if int_attribute(node, f"trans{side}", 0) and rank > 1:
            order = [*order[:-2], order[-1], order[-2]]
        operands.append(transpose(b, node.input[k], order))
    alpha = number(node, "alpha", 1.0)
    product = b.add("MatMul", operands, node.output[0] if alpha == 1 else None)
    if alpha != 1:
        b.add("Mul", [product, alpha], node.output[0])


def fused_conv(node: NodeProto, view: GraphView, b: Builder) -> None:
    """y = f(conv(x) + z)."""
    own = {
        a.name: helper.get_attribute_value(a) for a in node.attribute if not a.name.startswith("activation")
    }
    y = b.add("Conv", [i for i in node.input[:3] if i], **own)
    if given(node, 3):
        y = b.add("Add", [y, node.input[3]])
    values = [float(v) for v in attribute(node, "activation_params", ())]  # type: ignore[attr-defined]
    _activated(node, b, y, values)


def fused_gemm(node: NodeProto, view: GraphView, b: Builder) -> None:
    """y = f(gemm(x))."""
    own = {
        a.name: helper.get_attribute_value(a) for a in node.attribute if not a.name.startswith("activation")
    }
    y = b.add("Gemm", [i for i in node.input if i], **own)
    names = ("activation_alpha", "activation_beta")
    _activated(node, b, y, [number(node, name, 0.0) for name in names if attribute(node, name) is not None])


def _activated(node: NodeProto, b: Builder, y: str, values: list[float]) -> None:
    function = str(attribute(node, "activation", ""))
    if not function:
        b.add("Identity", [y], node.output[0])
    elif function == "Clip" and len(values) == 2:
        b.add("Clip", [y, *values], node.output[0])
    elif function in ("Relu", "Sigmoid", "Tanh", *_PARAMETERS):
        parameters: dict[str, Any] = dict(zip(_PARAMETERS.get(function, ()), values, strict=False))
        b.add(function, [y], node.output[0], **parameters)
    else:
        raise NotLowerable(f"its activation function {function} is unknown")
