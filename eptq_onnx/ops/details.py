"""Output bounds, objections and matrix forms of individual rows of the operator table."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
from onnx import NodeProto

from eptq_onnx.graph.view import GraphView, attribute, int_attribute, ints_attribute
from eptq_onnx.numerics.linear import ConvForm, MatrixForm
from eptq_onnx.ops.spec import Bounds


def unit(node: NodeProto, view: GraphView) -> Bounds:
    """Return the bounds of an output between 0 and 1."""
    return 0.0, 1.0


def positive(node: NodeProto, view: GraphView) -> Bounds:
    """Return the bounds of a non-negative output."""
    return 0.0, float(np.inf)


def clip_bounds(node: NodeProto, view: GraphView) -> Bounds:
    """Return the bounds of a Clip: attributes before opset 11, inputs from then on; infinite if absent."""
    limits = []
    for position, name, default in ((1, "min", -np.inf), (2, "max", np.inf)):
        if len(node.input) > position and node.input[position]:
            if not view.is_constant(node.input[position]):
                return float(-np.inf), float(np.inf)
            limits.append(float(view.constant(node.input[position]).reshape(-1)[0]))
        else:
            limits.append(float(attribute(node, name, default)))  # type: ignore[arg-type]
    return limits[0], limits[1]


def clip_objection(node: NodeProto, view: GraphView) -> str | None:
    """Return a reason for a Clip to stay float, or None."""
    if any(i and not view.is_constant(i) for i in node.input[1:]):
        return "its limits are computed at run time"
    return None


def conv_objection(node: NodeProto, view: GraphView) -> str | None:
    """Return a reason for a Conv to stay float, or None."""
    # onnxruntime runs a Conv without spatial axes in floating point.
    weight = node.input[1]
    return (
        "it has no spatial axes"
        if view.is_constant(weight) and len(view.constant_shape(weight)) == 2
        else None
    )


def gemm_objection(node: NodeProto, view: GraphView) -> str | None:
    """Return a reason for a Gemm to stay float, or None."""
    if int_attribute(node, "transA", 0):
        return "transA is set"
    if float(attribute(node, "beta", 1.0)) != 1.0:  # type: ignore[arg-type]
        return "beta is not 1"
    return None


def matmul_objection(node: NodeProto, view: GraphView) -> str | None:
    """Return a reason for a MatMul to stay float, or None."""
    if view.is_constant(node.input[0]):
        return "its left operand is the constant"
    return None


def resize_objection(node: NodeProto, view: GraphView) -> str | None:
    """Return a reason for a Resize to stay float, or None."""
    if attribute(node, "mode", "nearest") != "nearest":
        return f"{attribute(node, 'mode')} interpolation makes values between the integers"
    return None


def maxpool_objection(node: NodeProto, view: GraphView) -> str | None:
    """Return a reason for a MaxPool to stay float, or None."""
    return "its indices are used" if len(node.output) > 1 and node.output[1] else None


def averagepool_objection(node: NodeProto, view: GraphView) -> str | None:
    """Return a reason for an AveragePool to stay float, or None."""
    return "integer kernels do not support dilations" if attribute(node, "dilations") is not None else None


def pad_objection(node: NodeProto, view: GraphView) -> str | None:
    """Return a reason for a Pad to stay float, or None."""
    if len(node.input) > 2 and node.input[2] and not view.is_constant(node.input[2]):
        return "its fill value is computed at run time"
    return None


def conv_form(node: NodeProto, view: GraphView) -> ConvForm:
    """Return a Conv as a matrix product."""
    shape = view.constant_shape(node.input[1])
    rank = len(shape) - 2
    return ConvForm(
        kernel=shape[2:],
        strides=tuple(ints_attribute(node, "strides")) or (1,) * rank,
        dilations=tuple(ints_attribute(node, "dilations")) or (1,) * rank,
        pads=tuple(ints_attribute(node, "pads")) or None,
        auto_pad=str(attribute(node, "auto_pad", "NOTSET")),
        group=int_attribute(node, "group", 1),
    )


def conv_transpose_form(node: NodeProto, view: GraphView) -> ConvForm | None:
    """Return a ConvTranspose as a matrix product, or None if its padding is implicit."""
    if (
        attribute(node, "auto_pad", "NOTSET") not in ("NOTSET", "VALID")
        or attribute(node, "output_shape") is not None
    ):
        return None
    return replace(
        conv_form(node, view), transposed=True, output_padding=tuple(ints_attribute(node, "output_padding"))
    )


def gemm_form(node: NodeProto, view: GraphView) -> MatrixForm:
    """Return a Gemm as a matrix product."""
    return MatrixForm(bool(int_attribute(node, "transB", 0)), float(attribute(node, "alpha", 1.0)))  # type: ignore[arg-type]


def matmul_form(node: NodeProto, view: GraphView) -> MatrixForm | None:
    """Return a MatMul as a matrix product, or None if its weight is a batch of matrices."""
    return MatrixForm() if len(view.constant_shape(node.input[1])) == 2 else None


def rows_looked_up(node: NodeProto) -> int | None:
    """Return the position of the input whose rows a Gather looks up; None along other axes than 0."""
    return 0 if int_attribute(node, "axis", 0) == 0 else None
