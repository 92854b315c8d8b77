"""Rewrites of operators that have no gradient into operators that have one.

A lowering gets a node, a view of its (private, shape-specialised) model and a builder; it adds nodes that make
the same output tensors, or raises `NotLowerable` with the reason. Values agree with the original to float
rounding; the tests compare them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import numpy as np
import onnx
from onnx import ModelProto, NodeProto, TensorProto, helper

from eptq_onnx import runtime
from eptq_onnx.graph.edit import Builder, with_nodes
from eptq_onnx.graph.view import GraphView, attribute, int_attribute, ints_attribute
from eptq_onnx.types import Array

Lowering = Callable[[NodeProto, GraphView, Builder], None]


class NotLowerable(Exception):
    """This node cannot be rewritten; the message says why."""


def lower(model: ModelProto, rules: Mapping[tuple[str, str], Lowering]) -> tuple[ModelProto, dict[str, str]]:
    """Apply every rule that fits.

    Parameters
    ----------
    model : ModelProto
        With fixed input shapes and inferred intermediate shapes.
    rules : mapping of (domain, op_type) to Lowering

    Returns
    -------
    ModelProto
        A rewritten copy; tensor names survive.
    dict of str to str
        Node name and reason of every node whose rule did not fit.
    """
    view, builder, refused = GraphView(model), Builder(model, "lowered/"), {}
    for node in view.nodes:
        rule = rules.get((node.domain if node.domain != "ai.onnx" else "", node.op_type))
        if rule is None:
            builder.nodes.append(node)
            continue
        before = len(builder.nodes)
        try:
            rule(node, view, builder)
        except NotLowerable as reason:
            del builder.nodes[before:]
            builder.nodes.append(node)
            refused[node.name] = str(reason)
    lowered = with_nodes(model, builder.nodes, builder.initializers)
    return onnx.shape_inference.infer_shapes(lowered, data_prop=True), refused


def _rank(view: GraphView, name: str) -> int:
    shape = view.shape(name)
    if shape is None:
        raise NotLowerable(f"the rank of {name} is unknown")
    return len(shape)


def explicit_padding(node: NodeProto, view: GraphView, b: Builder) -> None:
    """auto_pad as pads: onnxruntime-training's ConvGrad ignores auto_pad (ONNX Conv: SAME_UPPER, SAME_LOWER)."""
    mode = attribute(node, "auto_pad", "NOTSET")
    if mode not in ("SAME_UPPER", "SAME_LOWER"):
        b.nodes.append(node)
        return
    before, after = view.static_shape(node.input[0]), view.static_shape(node.output[0])
    kernel = ints_attribute(node, "kernel_shape") or list(view.static_shape(node.input[1]) or ())[2:]
    if before is None or after is None or not kernel:
        raise NotLowerable(f"{node.op_type} has auto_pad and the shape of {node.input[0]} is not static")
    strides = ints_attribute(node, "strides") or [1] * len(kernel)
    dilations = ints_attribute(node, "dilations") or [1] * len(kernel)
    totals = [
        max(0, (y - 1) * s + (k - 1) * d + 1 - x) for x, y, k, s, d in zip(before[2:], after[2:], kernel, strides, dilations, strict=True)
    ]
    small, large = [t // 2 for t in totals], [t - t // 2 for t in totals]
    copy = NodeProto()
    copy.CopyFrom(node)
    for item in list(copy.attribute):
        if item.name in ("auto_pad", "pads"):
            copy.attribute.remove(item)
    copy.attribute.append(helper.make_attribute("pads", small + large if mode == "SAME_UPPER" else large + small))
    b.nodes.append(copy)


def split(node: NodeProto, view: GraphView, b: Builder) -> None:
    """One Slice per output: the gradient of Split is wrong where an output is not used."""
    axis = int_attribute(node, "axis", 0)
    sizes = [view.static_shape(o) for o in node.output]
    if any(s is None for s in sizes):
        raise NotLowerable("the sizes of its outputs are not static")
    start = 0
    for name, shape in zip(node.output, sizes, strict=True):
        end = start + (shape or ())[axis]
        if name:
            bounds = [b.constant(np.array([v], np.int64), "slice") for v in (start, end, axis)]
            b.add("Slice", [node.input[0], *bounds], name)
        start = end


def batch_normalization(node: NodeProto, view: GraphView, b: Builder) -> None:
    """y = x * a + c with a = scale / sqrt(var + eps), c = bias - mean * a (inference mode)."""
    if int_attribute(node, "training_mode", 0) or len([o for o in node.output if o]) > 1:
        raise NotLowerable("BatchNormalization is in training mode")
    if not all(view.is_constant(i) for i in node.input[1:5]):
        raise NotLowerable("BatchNormalization has statistics that are computed at run time")
    scale, bias, mean, var = (view.constant(i).astype(np.float64) for i in node.input[1:5])
    a = scale / np.sqrt(var + float(attribute(node, "epsilon", 1e-5)))  # type: ignore[arg-type]
    shape = [1, -1] + [1] * (_rank(view, node.input[0]) - 2)
    factor = b.constant(a.reshape(shape).astype(np.float32), "bn_scale")
    offset = b.constant((bias - mean * a).reshape(shape).astype(np.float32), "bn_bias")
    b.add("Add", [b.add("Mul", [node.input[0], factor]), offset], node.output[0])


def layer_normalization(node: NodeProto, view: GraphView, b: Builder) -> None:
    """y = (x - m) / sqrt(mean((x - m)^2) + eps) * scale + bias, with m = mean(x) over the last axes."""
    if any(node.output[1:]):
        raise NotLowerable("its mean or deviation is used")
    x = node.input[0]
    rank = _rank(view, x)
    axes = list(range(int_attribute(node, "axis", -1) % rank, rank))
    centred = b.add("Sub", [x, b.reduce("ReduceMean", x, axes, keepdims=True)])
    variance = b.reduce("ReduceMean", b.add("Mul", [centred, centred]), axes, keepdims=True)
    epsilon = b.constant(float(attribute(node, "epsilon", 1e-5)), "epsilon")  # type: ignore[arg-type]
    scaled = b.add("Mul", [b.add("Div", [centred, b.add("Sqrt", [b.add("Add", [variance, epsilon])])]), node.input[1]])
    bias = node.input[2] if len(node.input) > 2 and node.input[2] else b.constant(0.0, "zero")
    b.add("Add", [scaled, bias], node.output[0])


def prelu(node: NodeProto, view: GraphView, b: Builder) -> None:
    """y = x * (1 + (slope - 1) * [x < 0]); the slope is a constant to the gradient. Where would take three times as long."""
    x, slope = node.input
    negative = b.add("Cast", [b.add("Less", [x, b.constant(0.0, "zero")])], to=TensorProto.FLOAT)
    one = b.constant(1.0, "one")
    b.add("Mul", [x, b.add("Add", [b.add("Mul", [negative, b.add("Sub", [slope, one])]), one])], node.output[0])


def hard_sigmoid(node: NodeProto, view: GraphView, b: Builder) -> None:
    """y = clip(alpha * x + beta, 0, 1)."""
    alpha, beta = float(attribute(node, "alpha", 0.2)), float(attribute(node, "beta", 0.5))  # type: ignore[arg-type]
    _hard_sigmoid(b, node.input[0], alpha, beta, node.output[0])


def hard_swish(node: NodeProto, view: GraphView, b: Builder) -> None:
    """y = x * clip(x / 6 + 1/2, 0, 1)."""
    b.add("Mul", [node.input[0], _hard_sigmoid(b, node.input[0], 1 / 6, 0.5)], node.output[0])


def _hard_sigmoid(b: Builder, x: str, alpha: float, beta: float, output: str | None = None) -> str:
    line = b.add("Add", [b.add("Mul", [x, b.constant(alpha, "alpha")]), b.constant(beta, "beta")])
    return b.add("Clip", [line, b.constant(0.0, "zero"), b.constant(1.0, "one")], output)


def elu(node: NodeProto, view: GraphView, b: Builder) -> None:
    """y = relu(x) + alpha * (exp(min(x, 0)) - 1)."""
    alpha = float(attribute(node, "alpha", 1.0))  # type: ignore[arg-type]
    low = b.add("Exp", [_negative_part(b, node.input[0])])
    tail = b.add("Mul", [b.add("Sub", [low, b.constant(1.0, "one")]), b.constant(alpha, "alpha")])
    b.add("Add", [b.add("Relu", [node.input[0]]), tail], node.output[0])


def _negative_part(b: Builder, x: str) -> str:
    return b.add("Neg", [b.add("Relu", [b.add("Neg", [x])])])


def softplus(node: NodeProto, view: GraphView, b: Builder) -> None:
    """y = relu(x) + log(1 + exp(-|x|))."""
    _softplus(b, node.input[0], node.output[0])


def _softplus(b: Builder, x: str, output: str | None = None) -> str:
    tail = b.add("Log", [b.add("Add", [b.add("Exp", [b.add("Neg", [b.add("Abs", [x])])]), b.constant(1.0, "one")])])
    return b.add("Add", [b.add("Relu", [x]), tail], output)


def mish(node: NodeProto, view: GraphView, b: Builder) -> None:
    """y = x * tanh(softplus(x))."""
    b.add("Mul", [node.input[0], b.add("Tanh", [_softplus(b, node.input[0])])], node.output[0])


def sum_variadic(node: NodeProto, view: GraphView, b: Builder) -> None:
    """y = a + b + ..., pairwise."""
    _sum(b, list(node.input), node.output[0])


def mean_variadic(node: NodeProto, view: GraphView, b: Builder) -> None:
    """y = (a + b + ...) / n."""
    b.add("Mul", [_sum(b, list(node.input), None), b.constant(1.0 / len(node.input), "share")], node.output[0])


def _sum(b: Builder, names: list[str], output: str | None) -> str:
    if len(names) == 1:
        return b.add("Identity", names, output)
    total = names[0]
    for name in names[1:-1]:
        total = b.add("Add", [total, name])
    return b.add("Add", [total, names[-1]], output)


def reduce_sum_square(node: NodeProto, view: GraphView, b: Builder) -> None:
    """y = reduce_sum(x * x)."""
    square = b.add("Mul", [node.input[0], node.input[0]])
    axes = attribute(node, "axes")
    if len(node.input) > 1 and node.input[1]:
        if not view.is_constant(node.input[1]):
            raise NotLowerable("ReduceSumSquare has axes that are computed at run time")
        axes = view.constant(node.input[1]).tolist()
    if not axes and int_attribute(node, "noop_with_empty_axes", 0):
        b.add("Identity", [square], node.output[0])
        return
    chosen = [int(a) for a in axes] if axes else None  # type: ignore[attr-defined]
    b.reduce("ReduceSum", square, chosen, node.output[0], keepdims=bool(int_attribute(node, "keepdims", 1)))


def depth_to_space(node: NodeProto, view: GraphView, b: Builder) -> None:
    """Reshape, Transpose, Reshape (ONNX DepthToSpace, both modes)."""
    n, c, h, w = _four(view, node.input[0])
    k = int_attribute(node, "blocksize", 1)
    if attribute(node, "mode", "DCR") == "DCR":
        split, order = [n, k, k, c // k**2, h, w], [0, 3, 4, 1, 5, 2]
    else:
        split, order = [n, c // k**2, k, k, h, w], [0, 1, 4, 2, 5, 3]
    _shuffle(b, node, split, order, [n, c // k**2, h * k, w * k])


def space_to_depth(node: NodeProto, view: GraphView, b: Builder) -> None:
    """Reshape, Transpose, Reshape (ONNX SpaceToDepth)."""
    n, c, h, w = _four(view, node.input[0])
    k = int_attribute(node, "blocksize", 1)
    _shuffle(b, node, [n, c, h // k, k, w // k, k], [0, 3, 5, 1, 2, 4], [n, c * k**2, h // k, w // k])


def _four(view: GraphView, name: str) -> tuple[int, int, int, int]:
    shape = view.static_shape(name)
    if shape is None or len(shape) != 4:
        raise NotLowerable(f"the shape of {name} is not static")
    return shape[0], shape[1], shape[2], shape[3]


def _shuffle(b: Builder, node: NodeProto, split: list[int], order: list[int], final: list[int]) -> None:
    apart = b.add("Reshape", [node.input[0], b.constant(np.array(split, np.int64), "shape")])
    turned = b.add("Transpose", [apart], perm=order)
    b.add("Reshape", [turned, b.constant(np.array(final, np.int64), "shape")], node.output[0])


def resize(node: NodeProto, view: GraphView, b: Builder) -> None:
    """One MatMul per resized axis with the interpolation matrix that Resize itself gives for an identity.

    Every interpolation mode but cropping is separable and linear, so Resize along one axis is a constant matrix.
    Only the last two axes are handled: others must keep their size.
    """
    x, y = node.input[0], node.output[0]
    before, after = view.static_shape(x), view.static_shape(y)
    if before is None or after is None:
        raise NotLowerable(f"the sizes of {x} and {y} are not static")
    if attribute(node, "coordinate_transformation_mode", "") == "tf_crop_and_resize":
        raise NotLowerable("Resize crops")
    if len(before) < 3 or before[:-2] != after[:-2]:
        raise NotLowerable("Resize changes another axis than the last two")
    scales = _resize_scales(node, view)
    names, current = [], x
    for axis in (len(before) - 1, len(before) - 2):
        matrix = _interpolation(node, view, before[axis], after[axis], None if scales is None else scales[axis])
        if matrix.shape[0] == matrix.shape[1] and np.array_equal(matrix, np.eye(len(matrix))):
            continue
        names.append((axis, matrix))
    if not names:
        b.add("Identity", [x], y)
        return
    for k, (axis, matrix) in enumerate(names):
        output = y if k == len(names) - 1 else None
        if axis == len(before) - 1:
            current = b.add("MatMul", [current, b.constant(matrix, "resize")], output)
        else:
            current = b.add("MatMul", [b.constant(np.ascontiguousarray(matrix.T), "resize"), current], output)


def _resize_scales(node: NodeProto, view: GraphView) -> Array | None:
    """The scales that Resize or Upsample is told, or None if it is told sizes."""
    position = 1 if node.op_type == "Upsample" or len(node.input) == 2 else 2
    if len(node.input) > position and node.input[position]:
        if not view.is_constant(node.input[position]):
            raise NotLowerable("Resize has scales that are computed at run time")
        values = view.constant(node.input[position]).astype(np.float32)
        if values.size:
            axes = attribute(node, "axes")
            if axes:
                raise NotLowerable("Resize has an axes attribute")
            return values
    return None


def _interpolation(node: NodeProto, view: GraphView, size: int, new_size: int, scale: float | None) -> Array:
    """Matrix of shape (size, new_size): the operator applied to each unit vector."""
    single = NodeProto()
    single.CopyFrom(node)
    for item in list(single.attribute):
        if item.name in ("axes", "keep_aspect_ratio_policy"):
            single.attribute.remove(item)
    del single.input[:]
    if scale is None:
        single.input.extend(["x", "", "", "s"])
        told = helper.make_tensor("s", TensorProto.INT64, [4], [size, 1, new_size, 1])
    else:
        single.input.extend(["x", "", "s"])
        told = helper.make_tensor("s", TensorProto.FLOAT, [4], [1.0, 1.0, float(scale), 1.0])
    single.output[:] = ["y"]
    graph = helper.make_graph(
        [single],
        "interpolation",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, [size, 1, size, 1])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, None)],
        [told],
    )
    model = helper.make_model(graph, opset_imports=view.model.opset_import, ir_version=8)
    eye = np.eye(size, dtype=np.float32).reshape(size, 1, size, 1)
    matrix: Array = runtime.Session(model).run({"x": eye})["y"].reshape(size, -1).astype(np.float32)
    if matrix.shape[1] != new_size:
        raise NotLowerable(f"Resize gives {matrix.shape[1]} values where {new_size} are expected")
    return matrix
