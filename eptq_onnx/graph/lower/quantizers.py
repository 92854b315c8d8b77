"""Quantizers of the training graph, lowered to the nodes that the quantized model has."""

from __future__ import annotations

import numpy as np
from onnx import NodeProto

from eptq_onnx.graph.edit import Builder
from eptq_onnx.graph.lower.base import NotLowerable
from eptq_onnx.graph.view import GraphView, int_attribute


def fake_quant(node: NodeProto, view: GraphView, b: Builder) -> None:
    """y = DequantizeLinear(Clip(QuantizeLinear(x))), per tensor; only training builds have FakeQuant."""
    x, scale, zero = node.input
    if not view.is_constant(zero):
        raise NotLowerable("its zero point is computed at run time")
    limits = [int_attribute(node, f"quant_{end}", 0) for end in ("min", "max")]
    container = np.uint8 if limits[0] >= 0 else np.int8
    point = b.constant(view.constant(zero).reshape(()).astype(container), "zero")
    step = b.add("Reshape", [scale, b.constant(np.zeros(0, np.int64), "scalar")])
    integers = b.add("QuantizeLinear", [x, step, point])
    kept = b.add("Clip", [integers, *(b.constant(np.array(v, container), "limit") for v in limits)])
    b.add("DequantizeLinear", [kept, step, point], node.output[0])
