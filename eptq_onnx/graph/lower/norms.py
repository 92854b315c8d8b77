"""Normalizations: subtract the mean, divide by the standard deviation, scale and shift."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from onnx import NodeProto

from eptq_onnx.graph.edit import Builder
from eptq_onnx.graph.lower.base import NotLowerable, given, number, rank_of, reshape, shape_of, total, unused
from eptq_onnx.graph.lower.reductions import norm, powers, root, square
from eptq_onnx.graph.view import GraphView, int_attribute, ints_attribute


def batch_normalization(node: NodeProto, view: GraphView, b: Builder) -> None:
    """y = x * a + c with a = scale / sqrt(var + eps), c = bias - mean * a (inference mode)."""
    if int_attribute(node, "training_mode", 0) or len([o for o in node.output if o]) > 1:
        raise NotLowerable("it is in training mode")
    shape = [1, -1] + [1] * (rank_of(view, node.input[0]) - 2)
    epsilon = number(node, "epsilon", 1e-5)
    factor: str | np.ndarray
    offset: str | np.ndarray
    if all(view.is_constant(i) for i in node.input[1:5]):
        scale, bias, mean, var = (view.constant(i).astype(np.float64) for i in node.input[1:5])
        a = scale / np.sqrt(var + epsilon)
        factor = a.reshape(shape).astype(np.float32)
        offset = (bias - mean * a).reshape(shape).astype(np.float32)
    else:
        names = [reshape(b, i, shape) for i in node.input[1:5]]
        factor = b.add("Div", [names[0], b.add("Sqrt", [b.add("Add", [names[3], epsilon])])])
        offset = b.add("Sub", [names[1], b.add("Mul", [names[2], factor])])
    b.add("Add", [b.add("Mul", [node.input[0], factor]), offset], node.output[0])


def _centred(b: Builder, x: str, axes: Sequence[int]) -> tuple[str, str]:
    """Return x minus its mean over ``axes``, and the mean."""
    mean = b.reduce("ReduceMean", x, axes, keepdims=True)
    return b.add("Sub", [x, mean]), mean


def _inverse_deviation(
    b: Builder, centred: str, axes: Sequence[int], epsilon: float, output: str | None = None
) -> str:
    variance = b.reduce("ReduceMean", square(b, centred), axes, keepdims=True)
    return b.add("Reciprocal", [b.add("Sqrt", [b.add("Add", [variance, epsilon])])], output)


def _affine(b: Builder, x: str, scale: str, bias: str, output: str | None = None) -> str:
    scaled = b.add("Mul", [x, scale], None if bias else output)
    return b.add("Add", [scaled, bias], output) if bias else scaled


def layer_normalization(node: NodeProto, view: GraphView, b: Builder) -> None:
    """y = (x - m) / sqrt(mean((x - m)^2) + eps) * scale + bias, with m = mean(x) over the last axes."""
    rank = rank_of(view, node.input[0])
    axes = list(range(int_attribute(node, "axis", -1) % rank, rank))
    outputs = [*node.output, "", ""]
    _layer_norm(b, node.input[0], axes, number(node, "epsilon", 1e-5), node.input[1], given(node, 2), outputs)


def _layer_norm(
    b: Builder, x: str, axes: Sequence[int], epsilon: float, scale: str, bias: str, outputs: Sequence[str]
) -> None:
    """Write the outputs: result, mean and inverse standard deviation; the latter two may be empty."""
    centred, mean = _centred(b, x, axes)
    inverse = _inverse_deviation(b, centred, axes, epsilon, outputs[2] or None)
    if outputs[1]:
        b.add("Identity", [mean], outputs[1])
    _affine(b, b.add("Mul", [centred, inverse]), scale, bias, outputs[0])


def rms_normalization(node: NodeProto, view: GraphView, b: Builder) -> None:
    """y = x / sqrt(mean(x^2) + eps) * scale (RMSNormalization, SimplifiedLayerNormalization)."""
    unused(node)
    rank = rank_of(view, node.input[0])
    axes = list(range(int_attribute(node, "axis", -1) % rank, rank))
    inverse = _inverse_deviation(b, node.input[0], axes, number(node, "epsilon", 1e-5))
    _affine(b, b.add("Mul", [node.input[0], inverse]), node.input[1], "", node.output[0])


def skip_layer_normalization(node: NodeProto, view: GraphView, b: Builder) -> None:
    """y = layer normalization of x + skip + bias; the fourth output is that sum.

    Source: onnxruntime, ContribOperators.md: SkipLayerNormalization (x, skip, gamma, beta, bias) and
    SkipSimplifiedLayerNormalization (x, skip, gamma), over the last axis.
    """
    simplified = node.op_type.startswith("SkipSimplified")
    bias = given(node, 3 if simplified else 4)
    if simplified and bias:
        raise NotLowerable("onnxruntime's kernels disagree on its bias")
    outputs = [*node.output, "", "", ""]
    if outputs[1] or outputs[2]:
        raise NotLowerable("its mean or deviation is used")
    x = total(b, [node.input[0], node.input[1], *([bias] if bias else [])], outputs[3] or None)
    epsilon = number(node, "epsilon", 1e-12)
    if simplified:
        _affine(b, b.add("Mul", [x, _inverse_deviation(b, x, [-1], epsilon)]), node.input[2], "", outputs[0])
    else:
        _layer_norm(b, x, [-1], epsilon, node.input[2], given(node, 3), [outputs[0], "", ""])


def instance_normalization(node: NodeProto, view: GraphView, b: Builder) -> None:
    """y = (x - m) / sqrt(var + eps) * scale + bias over the spatial axes, with scale and bias per channel."""
    rank = rank_of(view, node.input[0])
    axes, shape = list(range(2, rank)), [1, -1] + [1] * (rank - 2)
    centred, _ = _centred(b, node.input[0], axes)
    normal = b.add("Mul", [centred, _inverse_deviation(b, centred, axes, number(node, "epsilon", 1e-5))])
    _affine(b, normal, reshape(b, node.input[1], shape), reshape(b, node.input[2], shape), node.output[0])


def group_normalization(node: NodeProto, view: GraphView, b: Builder) -> None:
    """y = (x - m) / sqrt(var + eps) * scale + bias over groups of channels.

    Scale and bias are per channel (opset 21) or per group (opset 18).
    """
    shape = shape_of(view, node.input[0])
    groups = int_attribute(node, "num_groups", 1)
    x = reshape(b, node.input[0], [shape[0], groups, -1])
    centred, _ = _centred(b, x, [2])
    normal = b.add("Mul", [centred, _inverse_deviation(b, centred, [2], number(node, "epsilon", 1e-5))])
    scale, bias = node.input[1:3]
    if b.opset < 21:
        normal = _affine(b, normal, reshape(b, scale, [1, groups, 1]), reshape(b, bias, [1, groups, 1]))
        reshape(b, normal, shape, node.output[0])
        return
    wide = [1, -1] + [1] * (len(shape) - 2)
    _affine(b, reshape(b, normal, shape), reshape(b, scale, wide), reshape(b, bias, wide), node.output[0])


def mean_variance_normalization(node: NodeProto, view: GraphView, b: Builder) -> None:
    """y = (x - m) / (sqrt(mean(x^2) - m^2) + 1e-9)."""
    axes = ints_attribute(node, "axes") or [0, 2, 3]
    centred, _ = _centred(b, node.input[0], axes)
    deviation = root(b, b.reduce("ReduceMean", square(b, centred), axes, keepdims=True))
    b.add("Div", [centred, b.add("Add", [deviation, 1e-9])], node.output[0])


def lp_normalization(node: NodeProto, view: GraphView, b: Builder) -> None:
    """y = x / ||x||_p along one axis."""
    p = int_attribute(node, "p", 2)
    size = b.reduce(
        "ReduceSum", powers(b, node.input[0], p), [int_attribute(node, "axis", -1)], keepdims=True
    )
    b.add("Div", [node.input[0], norm(b, size, p)], node.output[0])


def local_response_normalization(node: NodeProto, view: GraphView, b: Builder) -> None:
    """y = x / (bias + alpha mean(x^2))^beta, the mean over ``size`` neighbouring, zero-padded channels."""
    shape = shape_of(view, node.input[0])
    size = int_attribute(node, "size", 1)
    rows = reshape(b, square(b, node.input[0]), [shape[0], 1, shape[1], -1])
    # The window is a column of an image whose rows are the channels.
    pads = [(size - 1) // 2, 0, size // 2, 0]
    mean = b.add("AveragePool", [rows], kernel_shape=[size, 1], pads=pads, count_include_pad=1)
    around = b.add(
        "Add",
        [b.add("Mul", [reshape(b, mean, shape), number(node, "alpha", 1e-4)]), number(node, "bias", 1.0)],
    )
    b.add("Div", [node.input[0], b.add("Pow", [around, number(node, "beta", 0.75)])], node.output[0])
