"""Sizes of a node that a target may limit."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping

from onnx import NodeProto

from eptq_onnx.graph.view import GraphView, Shape, attribute, int_attribute, ints_attribute
from eptq_onnx.ops.table import spec_of
from eptq_onnx.targets import Operator


def objection(node: NodeProto, view: GraphView, row: Operator) -> str | None:
    """Return which size limit of a target a node violates, or None; unknown sizes violate none."""
    for limits, word, sign in ((row.least, "at least", 1), (row.most, "at most", -1)):
        for name, limit in limits.items():
            size = SIZES[name](node, view)
            if size is not None and sign * size < sign * limit:
                return f"its {_NAMES.get(name, name)} is {size}, but the target takes {word} {limit}"
    return None


def _weight(node: NodeProto, view: GraphView) -> tuple[int, ...] | None:
    """Return the shape of a constant weight."""
    place = spec_of(node).weight
    known = place is not None and len(node.input) > place and view.is_constant(node.input[place])
    return view.constant_shape(node.input[place or 0]) if known else None


def _is_matrix_product(node: NodeProto) -> bool:
    return node.op_type in ("Gemm", "MatMul")


def _dimension(shape: Shape | None, place: int) -> int | None:
    return shape[place] if shape is not None and -len(shape) <= place < len(shape) else None


def _input_channels(node: NodeProto, view: GraphView) -> int | None:
    """Source: ONNX operators Conv (weight M x C/group x k), ConvTranspose (C x M/group x k)."""
    shape = _weight(node, view)
    if shape is None or _is_matrix_product(node):
        return None
    return shape[0] if spec_of(node).grouped_axis else shape[1] * int_attribute(node, "group", 1)


def _output_channels(node: NodeProto, view: GraphView) -> int | None:
    shape, spec = _weight(node, view), spec_of(node)
    if shape is None or _is_matrix_product(node):
        return None
    return shape[spec.weight_axis(node)] * (int_attribute(node, "group", 1) if spec.grouped_axis else 1)


def _kernel(node: NodeProto, view: GraphView) -> int | None:
    shape = _weight(node, view)
    return None if shape is None or _is_matrix_product(node) or len(shape) < 3 else min(shape[2:])


def _rows(node: NodeProto, view: GraphView) -> int | None:
    if not _is_matrix_product(node):
        return None
    return _dimension(view.shape(node.input[0]), -1 if int_attribute(node, "transA", 0) else -2)


def _depth(node: NodeProto, view: GraphView) -> int | None:
    if not _is_matrix_product(node):
        return None
    return _dimension(view.shape(node.input[1]), -1 if int_attribute(node, "transB", 0) else -2)


def _columns(node: NodeProto, view: GraphView) -> int | None:
    if not _is_matrix_product(node):
        return None
    return _dimension(view.shape(node.input[1]), -2 if int_attribute(node, "transB", 0) else -1)


def _rank(node: NodeProto, view: GraphView) -> int | None:
    shape = view.shape(node.input[0])
    return None if shape is None else len(shape)


def _group_divisor(node: NodeProto, view: GraphView) -> int | None:
    """Return the largest power of two that divides the channels of each group; None for depthwise layers."""
    channels = _input_channels(node, view), _output_channels(node, view)
    groups = int_attribute(node, "group", 1)
    if groups == 1 or None in channels or channels == (groups, groups):
        return None
    common = math.gcd(*(c // groups for c in channels if c is not None))
    return common & -common


def _counted_pads(node: NodeProto, view: GraphView) -> int | None:
    """Return how many positions around its input an AveragePool counts; with ``auto_pad``, 1 if it may."""
    if node.op_type != "AveragePool":
        return None
    if not int_attribute(node, "count_include_pad", 0):
        return 0
    mode = str(attribute(node, "auto_pad", "NOTSET"))
    if mode.startswith("SAME"):
        return int(max(ints_attribute(node, "kernel_shape")) > 1)
    return sum(ints_attribute(node, "pads")) if mode == "NOTSET" else 0


SIZES: Mapping[str, Callable[[NodeProto, GraphView], int | None]] = {
    "input_channels": _input_channels,
    "output_channels": _output_channels,
    "groups": lambda node, view: int_attribute(node, "group", 1),
    "kernel": _kernel,
    "M": _rows,
    "K": _depth,
    "N": _columns,
    "rank": _rank,
    "group_divisor": _group_divisor,
    "counted_pads": _counted_pads,
}
"""Name of a size (`eptq_onnx.targets.Size`) to the function that returns it, or None if it is unknown.

A matrix product has ``M`` rows, ``N`` columns and the inner dimension ``K``; ``kernel`` is the shortest side
of a convolution's kernel; ``rank`` is that of the first input. ``group_divisor`` is the largest power of two
that divides the channels of each group of a layer that is not depthwise; ``counted_pads`` is how many
positions around the input an AveragePool counts.
"""
_NAMES = {
    "input_channels": "number of input channels",
    "output_channels": "number of output channels",
    "groups": "number of groups",
    "kernel": "kernel's shortest side",
    "group_divisor": "power of two that divides the channels of each group",
    "counted_pads": "number of pads that count in the mean",
}
