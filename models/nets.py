"""The small networks, described once and emitted twice.

For training, BatchNormalization is made of primitive operators with batch statistics, which the gradient
engine differentiates; for the shipped file it is the ONNX operator with running statistics, as exporters
write it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import ModelProto, TensorProto, helper, numpy_helper
from shapes import SIZE

OPSET = 17
EPSILON = 1e-5
Array = NDArray[np.float32]


@dataclass(frozen=True)
class Window:
    """Size and stride of a convolution, its groups, and whether it is transposed."""

    k: int = 3
    stride: int = 1
    group: int = 1
    transpose: bool = False


WINDOW = Window()
POINT = Window(k=1)


class Net:
    """Emits the nodes of one network.

    Parameters
    ----------
    parameters : dict of str to ndarray
        Filled with initial values where a name is missing.
    training : bool
        Batch statistics instead of running ones; they become outputs ``<layer>_mean`` and ``<layer>_var``.
    """

    def __init__(self, parameters: dict[str, Array], training: bool, seed: int = 0) -> None:
        self.parameters, self.training = parameters, training
        self.nodes: list[onnx.NodeProto] = []
        self.statistics: list[str] = []
        self.constants: dict[str, TensorProto] = {}
        self._rng = np.random.default_rng(seed)

    def op(self, op_type: str, inputs: list[str], output: str, **attributes: Any) -> str:
        """One node."""
        self.nodes.append(
            helper.make_node(op_type, inputs, [output], name=f"{output}/{op_type}", **attributes)
        )
        return output

    def constant(self, value: NDArray[np.generic], name: str) -> str:
        """An initializer that is not learned."""
        self.constants[name] = numpy_helper.from_array(value, name)
        return name

    def parameter(self, name: str, initial: Callable[[], NDArray[np.floating]]) -> str:
        """A learned initializer."""
        if name not in self.parameters:
            self.parameters[name] = initial().astype(np.float32)
        return name

    def conv(
        self,
        x: str,
        name: str,
        channels: tuple[int, int],
        window: Window = WINDOW,
        *,
        bias: bool = False,
    ) -> str:
        """Convolution, or ConvTranspose by the stride, from so many channels to so many."""
        (c_in, c_out), k, stride, group, transpose = (
            channels,
            window.k,
            window.stride,
            window.group,
            window.transpose,
        )
        fan = c_in // group * k * k
        shape = (c_in, c_out // group, k, k) if transpose else (c_out, c_in // group, k, k)
        inputs = [x, self.parameter(f"{name}.weight", lambda: self._rng.normal(0, np.sqrt(2 / fan), shape))]
        if bias:
            inputs.append(self.parameter(f"{name}.bias", lambda: np.zeros(c_out)))
        pad = (k - stride) // 2 if transpose else k // 2
        op_type = "ConvTranspose" if transpose else "Conv"
        return self.op(
            op_type,
            inputs,
            f"{name}_out",
            kernel_shape=[k, k],
            pads=[pad] * 4,
            strides=[stride] * 2,
            group=group,
        )

    def norm(self, x: str, name: str, channels: int) -> str:
        """BatchNormalization."""
        scale = self.parameter(f"{name}.scale", lambda: np.ones(channels))
        bias = self.parameter(f"{name}.bias", lambda: np.zeros(channels))
        if not self.training:
            mean = self.constant(self.parameters[f"{name}_mean"], f"{name}.mean")
            var = self.constant(self.parameters[f"{name}_var"], f"{name}.var")
            return self.op("BatchNormalization", [x, scale, bias, mean, var], f"{name}_out", epsilon=EPSILON)
        mean = self.op("ReduceMean", [x], f"{name}_mean", axes=[0, 2, 3], keepdims=1)
        centred = self.op("Sub", [x, mean], f"{name}_centred")
        var = self.op(
            "ReduceMean",
            [self.op("Mul", [centred, centred], f"{name}_square")],
            f"{name}_var",
            axes=[0, 2, 3],
            keepdims=1,
        )
        self.statistics += [f"{name}_mean", f"{name}_var"]
        epsilon = self.constant(np.array(EPSILON, np.float32), "epsilon")
        deviation = self.op("Sqrt", [self.op("Add", [var, epsilon], f"{name}_shifted")], f"{name}_deviation")
        shape = self.constant(np.array([1, -1, 1, 1], np.int64), "channel_shape")
        unit = self.op("Div", [centred, deviation], f"{name}_unit")
        scaled = self.op(
            "Mul", [unit, self.op("Reshape", [scale, shape], f"{name}_scale4")], f"{name}_scaled"
        )
        return self.op("Add", [scaled, self.op("Reshape", [bias, shape], f"{name}_bias4")], f"{name}_out")

    def block(self, x: str, name: str, c_in: int, c_out: int, act: str = "Relu", **window: Any) -> str:
        """Convolution, BatchNormalization, activation function."""
        y = self.norm(self.conv(x, f"{name}.conv", (c_in, c_out), Window(**window)), f"{name}.bn", c_out)
        return self.activation(y, name, act)

    def activation(self, y: str, name: str, act: str) -> str:
        """An activation function by its ONNX name, or Relu6, Silu or none."""
        if act == "":
            return y
        if act == "Relu6":
            low, high = (
                self.constant(np.array(0, np.float32), "zero"),
                self.constant(np.array(6, np.float32), "six"),
            )
            return self.op("Clip", [y, low, high], f"{name}_act")
        if act == "Silu":
            return self.op("Mul", [y, self.op("Sigmoid", [y], f"{name}_gate")], f"{name}_act")
        if act == "PRelu":
            slope = self.constant(np.full((1, 1, 1), 0.2, np.float32), "slope")
            return self.op("PRelu", [y, slope], f"{name}_act")
        return self.op(act, [y], f"{name}_act")

    def linear(self, x: str, name: str, c_in: int, c_out: int, output: str) -> str:
        """Gemm."""
        weight = self.parameter(
            f"{name}.weight", lambda: self._rng.normal(0, np.sqrt(1 / c_in), (c_out, c_in))
        )
        bias = self.parameter(f"{name}.bias", lambda: np.zeros(c_out))
        return self.op("Gemm", [x, weight, bias], output, transB=1)

    def model(
        self, name: str, shape: list[str | int | None], outputs: dict[str, list[str | int | None]]
    ) -> ModelProto:
        """The network as a model with the input ``image``."""
        used = {i for n in self.nodes for i in n.input}
        weights = [numpy_helper.from_array(v, n) for n, v in self.parameters.items() if n in used]
        graph = helper.make_graph(
            self.nodes,
            name,
            [helper.make_tensor_value_info("image", TensorProto.FLOAT, shape)],
            [helper.make_tensor_value_info(n, TensorProto.FLOAT, s) for n, s in outputs.items()],
            [*weights, *self.constants.values()],
        )
        model = helper.make_model(
            graph, opset_imports=[helper.make_opsetid("", OPSET)], ir_version=8, producer_name="eptq-onnx"
        )
        return onnx.shape_inference.infer_shapes(model)


def digits_resnet(net: Net) -> ModelProto:
    """Residual classifier of 8 x 8 digits."""
    y = net.block("image", "stem", 1, 16)
    for k, (c_in, c_out, stride) in enumerate([(16, 16, 1), (16, 32, 2), (32, 32, 1)]):
        main = net.block(y, f"block{k}.a", c_in, c_out, stride=stride)
        main = net.block(main, f"block{k}.b", c_out, c_out, act="")
        skip = y if c_in == c_out else net.block(y, f"block{k}.skip", c_in, c_out, act="", k=1, stride=stride)
        y = net.op("Relu", [net.op("Add", [main, skip], f"block{k}_sum")], f"block{k}_out")
    return _classifier(net, y, 32, "digits_resnet")


def digits_mobile(net: Net) -> ModelProto:
    """Depthwise separable classifier of 8 x 8 digits, with Relu6 and linear bottlenecks."""
    y = net.block("image", "stem", 1, 16, act="Relu6")
    for k, (c_in, c_out, stride) in enumerate([(16, 16, 1), (16, 24, 2), (24, 24, 1), (24, 24, 1)]):
        wide = 3 * c_in
        main = net.block(y, f"block{k}.expand", c_in, wide, act="Relu6", k=1)
        main = net.block(main, f"block{k}.depthwise", wide, wide, act="Relu6", stride=stride, group=wide)
        main = net.block(main, f"block{k}.project", wide, c_out, act="", k=1)
        y = net.op("Add", [y, main], f"block{k}_out") if c_in == c_out and stride == 1 else main
    return _classifier(net, net.block(y, "head", 24, 64, act="Relu6", k=1), 64, "digits_mobile")


def _classifier(net: Net, y: str, channels: int, name: str) -> ModelProto:
    pooled = net.op("Flatten", [net.op("GlobalAveragePool", [y], "pooled")], "features")
    net.linear(pooled, "classifier", channels, 10, "logits")
    return net.model(name, ["N", 1, 8, 8], {"logits": ["N", 10]})


def demo(net: Net) -> ModelProto:
    """Depthwise separable classifier of single shapes, of a few kilobytes."""
    y = net.block("image", "stem", 3, 12, act="Relu6", stride=2)
    for k, (c_in, c_out, stride) in enumerate([(12, 24, 2), (24, 24, 1), (24, 32, 2), (32, 32, 1)]):
        main = net.block(y, f"block{k}.depthwise", c_in, c_in, act="Relu6", stride=stride, group=c_in)
        main = net.block(main, f"block{k}.point", c_in, c_out, act="", k=1)
        y = net.op("Add", [y, main], f"block{k}_out") if c_in == c_out else main
    y = net.block(y, "head", 32, 48, act="Relu6", k=1)
    pooled = net.op("Flatten", [net.op("GlobalAveragePool", [y], "pooled")], "features")
    net.linear(pooled, "classifier", 48, 5, "scores")
    return net.model("demo", ["N", 3, 32, 32], {"scores": ["N", 5]})


def shapes_detector(net: Net) -> ModelProto:
    """Anchor-free detector on strides 8 and 4: per cell objectness, classes and distances to the box
    sides."""
    y = net.block("image", "stem", 3, 16, act="Silu", stride=2)
    fine = net.block(y, "down4", 16, 24, act="Silu", stride=2)
    fine = net.block(fine, "mix4", 24, 24, act="Silu")
    coarse = net.block(fine, "down8", 24, 32, act="Silu", stride=2)
    coarse = net.block(coarse, "mix8", 32, 32, act="Silu")
    pooled = net.op("MaxPool", [coarse], "context", kernel_shape=[3, 3], pads=[1, 1, 1, 1], strides=[1, 1])
    coarse = net.block(
        net.op("Concat", [coarse, pooled], "coarse_all", axis=1), "fuse8", 64, 32, act="Silu", k=1
    )
    scales = net.constant(np.array([1, 1, 2, 2], np.float32), "twice")
    up = net.op(
        "Resize",
        [coarse, "", scales],
        "upsampled",
        mode="nearest",
        nearest_mode="floor",
        coordinate_transformation_mode="asymmetric",
    )
    fine = net.block(net.op("Concat", [fine, up], "fine_all", axis=1), "fuse4", 56, 32, act="Silu")
    outputs: dict[str, list[str | int | None]] = {}
    for name, features, cells in (("fine", fine, SIZE // 4), ("coarse", coarse, SIZE // 8)):
        head = net.block(features, f"{name}.head", 32, 32, act="Silu")
        scores = net.conv(head, f"{name}.scores", (32, 4), POINT, bias=True)
        sides = net.op("Relu", [net.conv(head, f"{name}.sides", (32, 4), POINT, bias=True)], f"{name}_sides")
        if not net.training:
            scores = net.op("Sigmoid", [scores], f"{name}_probabilities")
        net.op("Concat", [scores, sides], name, axis=1)
        outputs[name] = ["N", 8, cells, cells]
    return net.model("shapes_detector", ["N", 3, SIZE, SIZE], outputs)


def shapes_segmenter(net: Net) -> ModelProto:
    """Encoder and decoder with ConvTranspose, HardSwish and PRelu."""
    full = net.block("image", "stem", 3, 12, act="HardSwish")
    half = net.block(full, "down2", 12, 24, act="HardSwish", stride=2)
    half = net.block(half, "mix2", 24, 24, act="HardSwish")
    y = net.block(half, "down4", 24, 32, act="PRelu", stride=2)
    for k in range(2):
        y = net.op("Add", [y, net.block(y, f"mix4.{k}", 32, 32, act="PRelu")], f"context{k}")
    y = net.block(y, "up2", 32, 24, act="PRelu", k=4, stride=2, transpose=True)
    y = net.block(net.op("Concat", [y, half], "half_all", axis=1), "fuse2", 48, 24)
    y = net.block(y, "up1", 24, 12, act="LeakyRelu", k=4, stride=2, transpose=True)
    y = net.block(net.op("Concat", [y, full], "full_all", axis=1), "fuse1", 24, 16)
    y = net.conv(y, "classes", (16, 4), POINT, bias=True)
    net.op("Identity", [y], "logits")
    return net.model("shapes_segmenter", ["N", 3, SIZE, SIZE], {"logits": ["N", 4, SIZE, SIZE]})


NETS: dict[str, Callable[[Net], ModelProto]] = {
    "demo": demo,
    "digits_resnet": digits_resnet,
    "digits_mobile": digits_mobile,
    "shapes_detector": shapes_detector,
    "shapes_segmenter": shapes_segmenter,
}
