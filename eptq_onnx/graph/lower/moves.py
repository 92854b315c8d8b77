"""Operators that move or select values."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray
from onnx import NodeProto

from eptq_onnx.graph.edit import Builder
from eptq_onnx.graph.lower.base import (
    NotLowerable,
    constant_input,
    given,
    ints,
    rank_of,
    reshape,
    shape_of,
    stay,
    stopped,
    transpose,
)
from eptq_onnx.graph.view import GraphView, attribute, int_attribute, ints_attribute


def split(node: NodeProto, view: GraphView, b: Builder) -> None:
    """Split → one Slice per output, as the gradient of Split is wrong if an output is not used."""
    axis = int_attribute(node, "axis", 0)
    start = 0
    for name in node.output:
        end = start + shape_of(view, name)[axis]
        if name:
            b.add("Slice", [node.input[0], ints([start]), ints([end]), ints([axis])], name)
        start = end


def slices(node: NodeProto, view: GraphView, b: Builder) -> None:
    """Slice with a negative step, which the gradient kernel does not support → one Gather per axis."""
    steps = constant_input(node, view, 4, "steps") if view.is_constant(given(node, 4)) else None
    if steps is None or min(steps) > 0:
        b.nodes.append(node)
        return
    shape, x = shape_of(view, node.input[0]), node.input[0]
    starts, ends = constant_input(node, view, 1, "starts"), constant_input(node, view, 2, "ends")
    told = constant_input(node, view, 3, "axes")
    axes = range(len(steps)) if told is None else told
    if starts is None or ends is None:
        raise NotLowerable("it has no limits")
    for start, end, step, axis in zip(starts, ends, steps, axes, strict=True):
        places = np.arange(shape[axis])[slice(int(start), int(end), int(step))]
        x = b.add("Gather", [x, places], axis=int(axis))
    b.add("Identity", [x], node.output[0])


def depth_to_space(node: NodeProto, view: GraphView, b: Builder) -> None:
    """DepthToSpace (both modes) → Reshape, Transpose, Reshape."""
    n, c, h, w = shape_of(view, node.input[0])
    k = int_attribute(node, "blocksize", 1)
    if attribute(node, "mode", "DCR") == "DCR":
        apart, order = [n, k, k, c // k**2, h, w], [0, 3, 4, 1, 5, 2]
    else:
        apart, order = [n, c // k**2, k, k, h, w], [0, 1, 4, 2, 5, 3]
    reshape(
        b, transpose(b, reshape(b, node.input[0], apart), order), [n, c // k**2, h * k, w * k], node.output[0]
    )


def space_to_depth(node: NodeProto, view: GraphView, b: Builder) -> None:
    """SpaceToDepth → Reshape, Transpose, Reshape."""
    n, c, h, w = shape_of(view, node.input[0])
    k = int_attribute(node, "blocksize", 1)
    apart = reshape(b, node.input[0], [n, c, h // k, k, w // k, k])
    reshape(b, transpose(b, apart, [0, 3, 5, 1, 2, 4]), [n, c * k**2, h // k, w // k], node.output[0])


def pad(node: NodeProto, view: GraphView, b: Builder) -> None:
    """Pad → Slice where amounts are negative, then a constant Pad, or one Gather per axis for other modes."""
    rank = rank_of(view, node.input[0])
    told = constant_input(node, view, 1, "amounts")
    amounts = ints_attribute(node, "pads") if told is None else [int(v) for v in told]
    axes = constant_input(node, view, 3, "axes")
    chosen = list(range(rank)) if axes is None else [int(a) % rank for a in axes]
    before, after = [0] * rank, [0] * rank
    for k, axis in enumerate(chosen):
        before[axis], after[axis] = amounts[k], amounts[len(chosen) + k]
    mode = str(attribute(node, "mode", "constant"))
    if mode == "constant" and axes is None and min((*before, *after), default=0) >= 0:
        b.nodes.append(node)
        return
    x, shape = node.input[0], shape_of(view, node.input[0])
    cut = [a for a in range(rank) if min(before[a], after[a]) < 0]
    if mode == "constant":
        # The gradient kernel does not support the input ``axes`` either.
        starts, ends = [max(0, -before[a]) for a in cut], [shape[a] - max(0, -after[a]) for a in cut]
        x = b.add("Slice", [x, ints(starts), ints(ends), ints(cut)]) if cut else x
        grown = ints([max(0, v) for v in (*before, *after)])
        b.add("Pad", [x, grown, *([node.input[2]] if given(node, 2) else [])], node.output[0])
        return
    for axis in range(rank):
        if before[axis] or after[axis]:
            x = b.add("Gather", [x, _padded_places(mode, shape[axis], before[axis], after[axis])], axis=axis)
    b.add("Identity", [x], node.output[0])


def _padded_places(mode: str, size: int, before: int, after: int) -> NDArray[np.int64]:
    """Return the index of the element at each position of a padded axis; numpy has the same mode names."""
    places = np.arange(max(0, -before), size - max(0, -after))
    grown = np.pad(places, (max(0, before), max(0, after)), mode=mode)  # type: ignore[call-overload]
    return np.asarray(grown, np.int64)


def compress(node: NodeProto, view: GraphView, b: Builder) -> None:
    """Compress → Gather at the positions where the condition holds."""
    if view.is_constant(node.input[1]):
        places = b.constant(np.flatnonzero(view.constant(node.input[1])), "places")
    else:
        places = reshape(b, b.add("NonZero", [node.input[1]]), [-1])
    axis = attribute(node, "axis")
    x = reshape(b, node.input[0], [-1]) if axis is None else node.input[0]
    b.add("Gather", [x, places], node.output[0], axis=0 if axis is None else int_attribute(node, "axis", 0))


def reverse_sequence(node: NodeProto, view: GraphView, b: Builder) -> None:
    """y[n, t] = x[n, t'] as a Gather, with t' = length - 1 - t for t < length, else t' = t."""
    batch, time = int_attribute(node, "batch_axis", 1), int_attribute(node, "time_axis", 0)
    shape = shape_of(view, node.input[0])
    order = [batch, time, *(a for a in range(len(shape)) if a not in (batch, time))]
    count, steps = shape[batch], shape[time]
    lengths, t = reshape(b, node.input[1], [count, 1]), np.arange(steps)[None]
    turned = b.add("Where", [b.add("Less", [t, lengths]), b.add("Sub", [lengths, t + 1]), t])
    places = reshape(b, b.add("Add", [turned, steps * np.arange(count)[:, None]]), [-1])
    rows = reshape(b, transpose(b, node.input[0], order), [count * steps, *(shape[a] for a in order[2:])])
    x = reshape(b, b.add("Gather", [rows, places], axis=0), [shape[a] for a in order])
    transpose(b, x, np.argsort(order).tolist(), node.output[0])


def one_hot(node: NodeProto, view: GraphView, b: Builder) -> None:
    """y = off + h (on - off), with h of zeros and ones; gradients flow to the values off and on."""
    if view.is_constant(node.input[2]):
        stay(node, b)
        return
    hot = stopped(
        b,
        "OneHot",
        [node.input[0], node.input[1], np.array([0, 1], np.float32)],
        axis=int_attribute(node, "axis", -1),
    )
    off, on = (b.add("Gather", [node.input[2], np.array(k)], axis=0) for k in (0, 1))
    b.add("Add", [off, b.add("Mul", [hot, b.add("Sub", [on, off])])], node.output[0])


def trilu(node: NodeProto, view: GraphView, b: Builder) -> None:
    """Trilu → Where with a mask that is zero outside the triangle."""
    shape = shape_of(view, node.input[0])
    diagonal = constant_input(node, view, 1, "diagonal")
    k = 0 if diagonal is None else int(diagonal.reshape(-1)[0])
    triangle = np.triu if int_attribute(node, "upper", 1) else np.tril
    b.add("Where", [triangle(np.ones(shape[-2:], np.bool_), k), node.input[0], 0.0], node.output[0])


def scatter(node: NodeProto, view: GraphView, b: Builder) -> None:
    """Scatter with ``reduction = add`` → see `_scatter_sum`; unchanged without a reduction."""
    reduction = attribute(node, "reduction", "none")
    if reduction == "none":
        b.nodes.append(node)
    elif reduction == "add":
        _scatter_sum(node, view, b)
    else:
        raise NotLowerable(f"its reduction is {reduction}")


def _scatter_sum(node: NodeProto, view: GraphView, b: Builder) -> None:
    """y = scatter(x, updates) with the gradient of x + scatter(0, updates) without a reduction.

    The gradient of an update is dy at its position, whether other updates are added there or not.
    """
    x, places, updates = node.input
    axis: dict[str, Any] = {"axis": int_attribute(node, "axis", 0)} if node.op_type != "ScatterND" else {}
    exact = stopped(b, node.op_type, [x, places, updates], reduction="add", **axis)
    zeros = np.zeros(shape_of(view, x), np.float32)
    single = b.add("Add", [x, b.add(node.op_type, [zeros, places, updates], **axis)])
    b.add("Add", [exact, b.add("Sub", [single, stopped(b, "Identity", [single])])], node.output[0])


def centre_crop_pad(node: NodeProto, view: GraphView, b: Builder) -> None:
    """CenterCropPad → Slice the middle of the axes that shrink, Pad both ends of those that grow."""
    before, after = shape_of(view, node.input[0]), shape_of(view, node.output[0])
    cut = [a for a in range(len(before)) if after[a] < before[a]]
    starts = [(before[a] - after[a]) // 2 for a in cut]
    ends = [s + after[a] for s, a in zip(starts, cut, strict=True)]
    x = b.add("Slice", [node.input[0], ints(starts), ints(ends), ints(cut)])
    grown = [max(0, y - x) for x, y in zip(before, after, strict=True)]
    b.add("Pad", [x, ints([g // 2 for g in grown] + [g - g // 2 for g in grown])], node.output[0])


def unique(node: NodeProto, view: GraphView, b: Builder) -> None:
    """Unique → Gather of the values at their first occurrences."""
    axis = attribute(node, "axis")
    copy = NodeProto()
    copy.CopyFrom(node)
    names = [*node.output, "", "", ""]
    copy.output[:] = [
        b.unique(f"{node.output[0]}/sorted"),
        names[1] or b.unique(f"{node.output[0]}/places"),
        names[2],
        names[3],
    ]
    stay(copy, b)
    x = reshape(b, node.input[0], [-1]) if axis is None else node.input[0]
    b.add(
        "Gather",
        [x, copy.output[1]],
        node.output[0],
        axis=0 if axis is None else int_attribute(node, "axis", 0),
    )
