"""Reductions, and sums, means and extremes of several inputs."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from onnx import NodeProto

from eptq_onnx.graph.edit import Builder
from eptq_onnx.graph.lower.base import (
    TINY,
    Lowering,
    NotLowerable,
    constant_input,
    ints,
    rank_of,
    reshape,
    shape_of,
    stay,
    total,
    transpose,
)
from eptq_onnx.graph.view import STOP, GraphView, int_attribute, ints_attribute

Function = Callable[[Builder, str], str]
_CUMULATED_AT_ONCE = 256


def sum_variadic(node: NodeProto, view: GraphView, b: Builder) -> None:
    """y = a + b + ... as binary sums."""
    total(b, node.input, node.output[0])


def mean_variadic(node: NodeProto, view: GraphView, b: Builder) -> None:
    """y = (a + b + ...) / n."""
    b.add("Mul", [total(b, node.input), 1.0 / len(node.input)], node.output[0])


def extreme_variadic(node: NodeProto, view: GraphView, b: Builder) -> None:
    """Max, Min of several inputs → for each pair, a where it is the larger (smaller) one, else b."""
    compare = "Greater" if node.op_type == "Max" else "Less"
    result = node.input[0]
    for k, other in enumerate(node.input[1:], 2):
        result = b.add(
            "Where",
            [b.add(compare, [result, other]), result, other],
            node.output[0] if k == len(node.input) else None,
        )
    if len(node.input) == 1:
        b.add("Identity", [result], node.output[0])


def reduced_axes(node: NodeProto, view: GraphView) -> list[int] | None:
    """Return the non-negative axes of a reduction (attribute or input); None if the operator does nothing."""
    rank = rank_of(view, node.input[0])
    axes = ints_attribute(node, "axes")
    told = constant_input(node, view, 1, "axes")
    if told is not None:
        axes = told.tolist()
    if not axes:
        return None if int_attribute(node, "noop_with_empty_axes", 0) else list(range(rank))
    return sorted(int(a) % rank for a in axes)


def by_sum(before: Function | None = None, after: Function | None = None) -> Lowering:
    """Return the lowering of a reduction y = after(sum(before(x)))."""

    def rule(node: NodeProto, view: GraphView, b: Builder) -> None:
        axes = reduced_axes(node, view)
        if axes is None:
            raise NotLowerable("runtimes disagree about what it does without axes")
        x = before(b, node.input[0]) if before else node.input[0]
        keep = bool(int_attribute(node, "keepdims", 1))
        if axes:
            x = b.reduce("ReduceSum", x, axes, None if after else node.output[0], keepdims=keep)
        if after:
            x = after(b, x)
        if after or not axes:
            b.add("Identity", [x], node.output[0])

    return rule


def square(b: Builder, x: str) -> str:
    """y = x * x."""
    return b.add("Mul", [x, x])


def root(b: Builder, x: str) -> str:
    """y = sqrt(x), with a finite slope at 0."""
    return b.add("Sqrt", [b.add("Clip", [x, TINY])])


reduce_l1 = by_sum(before=lambda b, x: b.add("Abs", [x]))
reduce_l2 = by_sum(before=square, after=root)
reduce_log_sum = by_sum(after=lambda b, x: b.add("Log", [x]))
reduce_sum_square = by_sum(before=square)


def unless_nothing(node: NodeProto, view: GraphView, b: Builder) -> None:
    """ReduceSum, ReduceMean → Identity if they have no axes to reduce, else unchanged."""
    if rank_of(view, node.input[0]) and reduced_axes(node, view) is not None:
        b.nodes.append(node)
    else:
        b.add("Identity", [node.input[0]], node.output[0])


def reduce_log_sum_exp(node: NodeProto, view: GraphView, b: Builder) -> None:
    """y = m + log(sum(exp(x - m))), where the maximum m is a constant to gradients."""
    axes = reduced_axes(node, view)
    if not axes:
        b.add("Identity", [node.input[0]], node.output[0])
        return
    top = b.reduce("ReduceMax", node.input[0], axes, keepdims=True)
    b.nodes[-1].doc_string = STOP
    powers = b.add("Exp", [b.add("Sub", [node.input[0], top])])
    y = b.add("Add", [top, b.add("Log", [b.reduce("ReduceSum", powers, axes, keepdims=True)])])
    _without_axes(node, axes, y, view, b)


def _without_axes(node: NodeProto, axes: list[int], y: str, view: GraphView, b: Builder) -> None:
    """Write the result, without the reduced axes unless they are kept."""
    if int_attribute(node, "keepdims", 1):
        b.add("Identity", [y], node.output[0])
    else:
        b.add("Squeeze", [y, ints(axes)], node.output[0])


def reduce_extreme(node: NodeProto, view: GraphView, b: Builder) -> None:
    """ReduceMax, ReduceMin → Gather at ArgMax, ArgMin, which find the first of equal elements."""
    axes = reduced_axes(node, view)
    if not axes:
        b.add("Identity", [node.input[0]], node.output[0])
        return
    rows, sizes = _rows(node, view, b, axes)
    finder = "ArgMax" if node.op_type == "ReduceMax" else "ArgMin"
    axis = len(sizes) - 1
    picked = b.add("GatherElements", [rows, b.add(finder, [rows], axis=axis, keepdims=1)], axis=axis)
    _from_rows(node, view, b, axes, picked)


def _rows(node: NodeProto, view: GraphView, b: Builder, axes: list[int]) -> tuple[str, list[int]]:
    """Merge the reduced axes of the input into one, the last; return the result and its shape."""
    shape = shape_of(view, node.input[0])
    kept = [a for a in range(len(shape)) if a not in axes]
    sizes = [*(shape[a] for a in kept), int(np.prod([shape[a] for a in axes]))]
    return reshape(b, transpose(b, node.input[0], kept + axes), sizes), sizes


def _from_rows(node: NodeProto, view: GraphView, b: Builder, axes: list[int], y: str) -> None:
    """Write the result, one element per row, in the output shape of the node."""
    shape = shape_of(view, node.input[0])
    keep = bool(int_attribute(node, "keepdims", 1))
    reshape(
        b, y, [1 if a in axes else s for a, s in enumerate(shape) if keep or a not in axes], node.output[0]
    )


def reduce_prod(node: NodeProto, view: GraphView, b: Builder) -> None:
    """ReduceProd → products of the halves of each row until one element is left, correct for zeros, too."""
    axes = reduced_axes(node, view)
    if not axes:
        b.add("Identity", [node.input[0]], node.output[0])
        return
    x, sizes = _rows(node, view, b, axes)
    count, axis = sizes[-1], len(sizes) - 1
    while count > 1:
        half = count // 2
        parts = [
            b.add("Slice", [x, ints([s]), ints([e]), ints([axis])])
            for s, e in ((0, half), (half, 2 * half), (2 * half, count))
        ]
        x = b.add("Mul", parts[:2])
        if count % 2:
            x = b.add("Concat", [x, parts[2]], axis=axis)
        count -= half
    _from_rows(node, view, b, axes, x)


def global_pool(node: NodeProto, view: GraphView, b: Builder) -> None:
    """GlobalMaxPool, GlobalLpPool → reductions over the spatial axes."""
    axes = list(range(2, rank_of(view, node.input[0])))
    if node.op_type == "GlobalMaxPool":
        b.reduce("ReduceMax", node.input[0], axes, node.output[0], keepdims=True)
        return
    p = int_attribute(node, "p", 2)
    norm(b, b.reduce("ReduceSum", powers(b, node.input[0], p), axes, keepdims=True), p, node.output[0])


def powers(b: Builder, x: str, p: int) -> str:
    """y = |x|^p."""
    if p == 2:
        return square(b, x)
    return b.add("Abs", [x]) if p == 1 else b.add("Pow", [b.add("Abs", [x]), float(p)])


def norm(b: Builder, total_power: str, p: int, output: str | None = None) -> str:
    """y = x^(1/p), with a finite slope at 0."""
    if p == 1:
        return b.add("Identity", [total_power], output)
    safe = b.add("Clip", [total_power, TINY])
    return b.add("Sqrt", [safe], output) if p == 2 else b.add("Pow", [safe, 1.0 / p], output)


def cumulative_sum(node: NodeProto, view: GraphView, b: Builder) -> None:
    """CumSum → a product with a triangular matrix of ones along the axis.

    A long axis is split into parts: products within each part, and another of the sums of the parts.
    """
    shape = shape_of(view, node.input[0])
    axis = constant_input(node, view, 1, "axis")
    place = int(np.asarray(axis).reshape(-1)[0]) % len(shape)
    size, rank = shape[place], len(shape)

    def triangle(count: int, exclusive: int) -> np.ndarray:
        matrix = np.triu(np.ones((count, count), np.float32), exclusive)
        return matrix.T if int_attribute(node, "reverse", 0) else matrix

    exclusive = int_attribute(node, "exclusive", 0)
    if size <= _CUMULATED_AT_ONCE:
        along(b, node.input[0], place, rank, triangle(size, exclusive), node.output[0])
        return
    part = _CUMULATED_AT_ONCE
    count = -(-size // part)
    order = [a for a in range(rank) if a != place] + [place]
    rest = [shape[a] for a in order[:-1]]
    rows = b.add(
        "Pad", [transpose(b, node.input[0], order), ints([0] * (2 * rank - 1) + [count * part - size])]
    )
    parts = reshape(b, rows, [*rest, count, part])
    inside = b.add("MatMul", [parts, triangle(part, exclusive)])
    before = b.add("MatMul", [b.reduce("ReduceSum", parts, [rank]), triangle(count, 1)])
    sums = reshape(b, b.add("Add", [inside, reshape(b, before, [*rest, count, 1])]), [*rest, count * part])
    wanted = b.add("Slice", [sums, ints([0]), ints([size]), ints([rank - 1])])
    transpose(b, wanted, np.argsort(order).tolist(), node.output[0])


def along(b: Builder, x: str, axis: int, rank: int, matrix: np.ndarray, output: str | None = None) -> str:
    """Multiply x by a constant matrix of shape (size, new size) along one axis."""
    matrix = np.ascontiguousarray(matrix, np.float32)
    if axis == rank - 1:
        return b.add("MatMul", [x, matrix], output)
    if axis == rank - 2:
        return b.add("MatMul", [np.ascontiguousarray(matrix.T), x], output)
    order = [a for a in range(rank) if a != axis] + [axis]
    product = b.add("MatMul", [transpose(b, x, order), matrix])
    return transpose(b, product, np.argsort(order).tolist(), output)


def top_k(node: NodeProto, view: GraphView, b: Builder) -> None:
    """TopK → TopK for the indices, and GatherElements for the values."""
    if not node.output[0]:
        stay(node, b)
        return
    copy = NodeProto()
    copy.CopyFrom(node)
    places = node.output[1] or b.unique(f"{node.output[0]}/places")
    copy.output[:] = [b.unique(f"{node.output[0]}/sorted"), places]
    stay(copy, b)
    b.add("GatherElements", [node.input[0], places], node.output[0], axis=int_attribute(node, "axis", -1))
