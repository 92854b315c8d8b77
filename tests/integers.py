"""Models that dequantize drawn integer weights."""

from __future__ import annotations

import numpy as np
from onnx import TensorProto, helper, numpy_helper


def quantized(weights, opset=13):
    """A model that dequantizes weights: name to integers and the axis of their scales."""
    nodes, constants, outputs = [], [], []
    for name, (values, axis) in weights.items():
        count = 1 if axis is None else values.shape[axis]
        scale = np.ones(count, np.float32) if axis is not None else np.array(1, np.float32)
        constants += [numpy_helper.from_array(values, name), numpy_helper.from_array(scale, f"{name}_scale")]
        attributes = {} if axis is None else {"axis": axis}
        nodes.append(
            helper.make_node(
                "DequantizeLinear", [name, f"{name}_scale"], [f"{name}_float"], name=name, **attributes
            )
        )
        outputs.append(helper.make_tensor_value_info(f"{name}_float", TensorProto.FLOAT, values.shape))
    graph = helper.make_graph(nodes, "weights", [], outputs, constants)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=8)


def drawn(rng, bits, shape, axis, spread):
    """Integers of a width whose channels lie anywhere in int8, or all about 0."""
    values = rng.integers(0, 2**bits, shape)
    along = [1] * len(shape)
    if spread and axis is not None:
        along[axis] = shape[axis]
    least = rng.integers(-128, 129 - 2**bits, along) if spread else -(2 ** (bits - 1))
    return (values + least).astype(np.int8)


SHAPES = [
    ((40, 30), 0),
    ((30, 40), 1),
    ((40, 30), -1),
    ((24, 5, 3, 3), 0),
    ((6, 40, 3, 2), 1),
    ((200, 1, 3, 3), 0),
    ((900,), None),
    ((40, 31), None),
]
