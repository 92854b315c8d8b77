"""Gradients of operators that move values: Reshape, Slice, Gather and similar."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial, reduce

import numpy as np
from onnx import NodeProto

from eptq_onnx.engines.tape import Tape, refusal
from eptq_onnx.graph.view import attribute, int_attribute, ints_attribute


def reshape(t: Tape, node: NodeProto, k: int, dy: str) -> str:
    """dx = dy in the shape of x."""
    return t.add("Reshape", dy, t.size(node.input[0]))


def transpose(t: Tape, node: NodeProto, k: int, dy: str) -> str:
    """dx = dy transposed by the inverse permutation."""
    order = ints_attribute(node, "perm") or list(range(len(t.dims(node.input[0]))))[::-1]
    return t.add("Transpose", dy, perm=[int(i) for i in np.argsort(order)])


def concat(t: Tape, node: NodeProto, k: int, dy: str) -> str:
    """dx = the slice of dy that belongs to the input."""
    shapes = [t.shape(name) for name in node.input[: k + 1]]
    axis = int_attribute(node, "axis", 0) % len(shapes[0])
    start = sum(s[axis] for s in shapes[:k])
    return t.add("Slice", dy, t.ints([start]), t.ints([start + shapes[k][axis]]), t.ints([axis]))


def slices(t: Tape, node: NodeProto, k: int, dy: str) -> str:
    """dx = dy at the sliced positions, 0 elsewhere."""
    shape = t.shape(node.input[0])
    starts, ends, axes, steps = (t.constant(node, i) for i in range(1, 5))
    if starts is None or ends is None:
        raise refusal(node, "its starts and ends are attributes")
    axes = np.arange(len(starts)) if axes is None else axes
    steps = np.ones(len(starts), np.int64) if steps is None else steps
    for start, end, axis, step in zip(
        starts.tolist(), ends.tolist(), axes.tolist(), steps.tolist(), strict=True
    ):
        size = shape[axis]
        dy = _put_back(t, dy, axis % len(shape), range(size)[start:end:step], size, len(shape))
    return dy


def gather(t: Tape, node: NodeProto, k: int, dy: str) -> str:
    """dx = the sum of dy over equal indices at the gathered positions, 0 elsewhere."""
    x, indices = node.input
    rank = len(t.dims(x))
    axis = int_attribute(node, "axis", 0) % rank
    shape = t.view.static_shape(x)
    if shape is not None and t.view.is_constant(indices):
        places = (t.view.constant(indices).reshape(-1) % shape[axis]).tolist()
        return _put_back(
            t,
            t.reshape(dy, [*shape[:axis], len(places), *shape[axis + 1 :]]),
            axis,
            places,
            shape[axis],
            rank,
        )
    if len(t.dims(indices)) != 1:
        shape = t.shape(x)
        dy = t.reshape(dy, [*shape[:axis], -1, *shape[axis + 1 :]])
    column = t.reshape(indices, [-1 if i == axis else 1 for i in range(rank)])
    counts = t.view.static_shape(indices)
    count = None if counts is None else int(np.prod(counts))
    return _added_up(t, node, t.size(x), t.add("Expand", column, t.add("Shape", dy)), dy, axis, count)


def gather_elements(t: Tape, node: NodeProto, k: int, dy: str) -> str:
    """dx = the sum of dy over equal indices at the gathered positions, 0 elsewhere."""
    axis = int_attribute(node, "axis", 0) % len(t.dims(node.input[0]))
    return _added_up(t, node, t.size(node.input[0]), node.input[1], dy, axis, t.dims(node.output[0])[axis])


def _added_up(
    t: Tape, node: NodeProto, size: str, indices: str, dy: str, axis: int, count: int | None
) -> str:
    """Add a ScatterElements into zeros that sums over equal indices.

    Before opset 16 the operator cannot sum, so each of the ``count`` indices gets a node of its own.
    """
    nothing = t.add("ConstantOfShape", size)
    if t.builder.opset >= 16:
        return t.add("ScatterElements", nothing, indices, dy, axis=axis, reduction="add")
    if count is None:
        raise refusal(node, "the number of its indices is unknown, so its gradient needs opset 16")
    parts = []
    for i in range(count):
        one = (
            t.add("Slice", v, t.ints([i]), t.ints([i + 1]), t.ints([axis])) if count > 1 else v
            for v in (indices, dy)
        )
        parts.append(t.add("ScatterElements", nothing, *one, axis=axis))
    return reduce(partial(t.add, "Add"), parts) if parts else nothing


def gather_nd(t: Tape, node: NodeProto, k: int, dy: str) -> str:
    """dx as in `gather_elements`, with all indexed axes flattened into one."""
    x, indices = node.input
    shape, counts, shared = t.shape(x), t.shape(indices), int_attribute(node, "batch_dims", 0)
    if shared:
        places = np.moveaxis(np.indices(counts[:-1], np.int64)[:shared], 0, -1)
        indices = t.add("Concat", t.builder.constant(places, "places"), indices, axis=-1)
    indexed = shape[: shared + counts[-1]]
    strides = [int(np.prod(indexed[i + 1 :])) for i in range(len(indexed))]
    place = t.add("Mul", t.add("Mod", indices, t.ints(indexed)), t.ints(strides))
    count, rest = int(np.prod(counts[:-1])), int(np.prod(shape[len(indexed) :]))
    index = t.add("Expand", t.reshape(t.sum(place, [-1]), [count, 1]), t.ints([count, rest]))
    size = t.ints([int(np.prod(indexed)), rest])
    return t.reshape(_added_up(t, node, size, index, t.reshape(dy, [count, rest]), 0, count), shape)


def overwritten(t: Tape, node: NodeProto, k: int, dy: str) -> str:
    """d(data) of a Scatter = dy, with 0 at the overwritten positions."""
    if attribute(node, "reduction", "none") != "none":
        raise refusal(node, f"its reduction is {attribute(node, 'reduction')}")
    zeros = t.add("ConstantOfShape", t.size(node.input[2]))
    return t.add(node.op_type, dy, node.input[1], zeros, **_axis(node))


def written_elements(t: Tape, node: NodeProto, k: int, dy: str) -> str:
    """d(updates) of ScatterElements = dy at the written positions."""
    return t.add("GatherElements", dy, node.input[1], **_axis(node))


def written_slices(t: Tape, node: NodeProto, k: int, dy: str) -> str:
    """d(updates) of ScatterND = dy at the written positions."""
    return t.add("GatherND", dy, node.input[1])


def _axis(node: NodeProto) -> dict[str, int]:
    return {a.name: a.i for a in node.attribute if a.name == "axis"}


def _put_back(t: Tape, dy: str, axis: int, places: Sequence[int], size: int, rank: int) -> str:
    """Put slices back at ``places`` of an axis, zeros elsewhere; slices of equal places are summed.

    The axis of length ``len(places)`` becomes one of length ``size``.
    """
    count, first = len(places), min(places, default=0)
    if list(places) == list(range(first, first + count)):
        return _padded(t, dy, axis, first, size - first - count, rank)
    with_zeros = _padded(t, dy, axis, 0, 1, rank)
    readers: list[list[int]] = [[] for _ in range(size)]
    for k, place in enumerate(places):
        readers[place].append(k)
    turns = range(max(map(len, readers)))
    indices = [t.ints([r[turn] if turn < len(r) else count for r in readers]) for turn in turns]
    return reduce(partial(t.add, "Add"), [t.add("Gather", with_zeros, index, axis=axis) for index in indices])


def _padded(t: Tape, x: str, axis: int, before: int, behind: int, rank: int) -> str:
    """Pad x with zeros along an axis."""
    pads = [0] * 2 * rank
    pads[axis], pads[rank + axis] = before, behind
    return t.add("Pad", x, t.ints(pads)) if any(pads) else x


def tile(t: Tape, node: NodeProto, k: int, dy: str) -> str:
    """dx = dy summed over all copies."""
    shape, repeats = t.shape(node.input[0]), t.constant(node, 1)
    if repeats is None:
        raise refusal(node, "it has no repeats")
    apart = [n for pair in zip(repeats.tolist(), shape, strict=True) for n in pair]
    return t.sum(t.reshape(dy, apart), range(0, 2 * len(shape), 2))


def pad(t: Tape, node: NodeProto, k: int, dy: str) -> str:
    """dx = dy with the padding cropped: padded by the negative amounts."""
    if attribute(node, "mode", "constant") != "constant":
        raise refusal(node, f"its mode is {attribute(node, 'mode')}")
    pads = t.constant(node, 1)
    if pads is None:
        raise refusal(node, "its pads are attributes")
    return t.add("Pad", dy, t.ints((-pads).tolist()), *(["", node.input[3]] if len(node.input) > 3 else []))


def trilu(t: Tape, node: NodeProto, k: int, dy: str) -> str:
    """dx = the same triangle of dy."""
    return t.add("Trilu", dy, *node.input[1:], upper=int_attribute(node, "upper", 1))
