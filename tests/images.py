"""Convolutional networks drawn by Hypothesis: layers, activations, pools and branches on images."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
from hypothesis import strategies as st
from onnx import TensorProto, helper, numpy_helper

CHANNELS, SIZE = 4, 6
UNARY = [
    "Relu", "Sigmoid", "Tanh", "LeakyRelu", "HardSwish", "HardSigmoid", "Elu", "Softplus", "Abs", "Neg", "Identity",
    "Clip6", "PRelu", "Softmax",
]  # fmt: skip
POOLS = ["MaxPool", "AveragePool", "Pad", "Resize", "Transpose", "Slice"]
LAYERS = ["Conv3", "Conv1", "Depthwise", "ConvTranspose", "ConvNoBias", "Norm"]
BINARY = ["Add", "Mul", "Concat", "Sub"]


class Draw:
    """Builds a graph on tensors of shape (N, CHANNELS, SIZE, SIZE)."""

    def __init__(self, seed: int) -> None:
        self.rng = np.random.default_rng(seed)
        self.nodes: list[onnx.NodeProto] = []
        self.constants: list[TensorProto] = []
        self.tensors = ["image"]

    def constant(self, value: np.ndarray | np.generic) -> str:
        name = f"c{len(self.constants)}"
        self.constants.append(numpy_helper.from_array(np.asarray(value), name))
        return name

    def node(self, op_type: str, inputs: list[str], **attributes: Any) -> str:
        name = f"t{len(self.nodes)}"
        self.nodes.append(helper.make_node(op_type, inputs, [name], **attributes))
        return name

    def weight(self, *shape: int) -> str:
        fan = int(np.prod(shape[1:]))
        return self.constant((self.rng.normal(size=shape) / np.sqrt(fan)).astype(np.float32))

    def layer(self, kind: str, x: str) -> str:
        c = CHANNELS
        bias = self.constant(self.rng.normal(0, 0.1, c).astype(np.float32))
        if kind == "Norm":
            ones = self.constant(np.abs(self.rng.normal(1, 0.1, c)).astype(np.float32))
            return self.node("BatchNormalization", [x, ones, bias, bias, ones])
        if kind == "Depthwise":
            return self.node("Conv", [x, self.weight(c, 1, 3, 3), bias], group=c, pads=[1] * 4)
        if kind == "ConvTranspose":
            return self.node("ConvTranspose", [x, self.weight(c, c, 3, 3), bias], pads=[1] * 4)
        k = 1 if kind == "Conv1" else 3
        inputs = [x, self.weight(c, c, k, k)] + ([] if kind == "ConvNoBias" else [bias])
        return self.node("Conv", inputs, pads=[k // 2] * 4)

    def unary(self, kind: str, x: str) -> str:
        if kind == "Clip6":
            return self.node("Clip", [x, self.constant(np.float32(0)), self.constant(np.float32(6))])
        if kind == "PRelu":
            return self.node("PRelu", [x, self.constant(np.full((CHANNELS, 1, 1), 0.2, np.float32))])
        return self.node(kind, [x], **({"axis": 1} if kind == "Softmax" else {}))

    def move(self, kind: str, x: str) -> str:
        if kind in ("MaxPool", "AveragePool"):
            return self.node(kind, [x], kernel_shape=[3, 3], pads=[1] * 4)
        if kind == "Pad":
            wide = self.node("Pad", [x, self.constant(np.array([0, 0, 1, 1, 0, 0, 1, 1]))])
            return self.node("MaxPool", [wide], kernel_shape=[3, 3])
        if kind == "Resize":
            scales = self.constant(np.array([1, 1, 2, 2], np.float32))
            return self.node(
                "MaxPool",
                [self.node("Resize", [x, "", scales], mode="nearest")],
                kernel_shape=[2, 2],
                strides=[2, 2],
            )
        if kind == "Slice":
            arguments = [self.constant(np.array([v])) for v in (0, 2, 1)]
            half = self.node("Slice", [x, *arguments])
            return self.node("Concat", [half, half], axis=1)
        return self.node("Transpose", [x], perm=[0, 1, 3, 2])

    def binary(self, kind: str, a: str, b: str) -> str:
        if kind == "Concat":
            joined = self.node("Concat", [a, b], axis=1)
            return self.node("Conv", [joined, self.weight(CHANNELS, 2 * CHANNELS, 1, 1)])
        return self.node(kind, [a, b])

    def model(self, outputs: list[str]) -> onnx.ModelProto:
        shape: list[str | int | None] = ["N", CHANNELS, SIZE, SIZE]
        graph = helper.make_graph(
            self.nodes,
            "drawn",
            [helper.make_tensor_value_info("image", TensorProto.FLOAT, shape)],
            [
                helper.make_tensor_value_info(o, TensorProto.FLOAT, ["N", CHANNELS, SIZE, SIZE])
                for o in outputs
            ],
            self.constants,
        )
        return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)


@st.composite
def drawn_images(draw: st.DrawFn) -> onnx.ModelProto:
    build = Draw(draw(st.integers(0, 1000)))
    for _ in range(draw(st.integers(1, 7))):
        x = draw(st.sampled_from(build.tensors[-3:]))
        kind = draw(st.sampled_from(LAYERS + UNARY + POOLS + BINARY))
        if kind in LAYERS:
            y = build.layer(kind, x)
        elif kind in UNARY:
            y = build.unary(kind, x)
        elif kind in POOLS:
            y = build.move(kind, x)
        else:
            y = build.binary(kind, x, draw(st.sampled_from(build.tensors)))
        build.tensors.append(y)
    last = build.layer("Conv1", build.tensors[-1])
    outputs = [last]
    if draw(st.booleans()) and build.tensors[-1] != "image":
        outputs.append(build.tensors[-1])
    return build.model(outputs)
