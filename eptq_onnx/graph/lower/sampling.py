"""Interpolation: Resize and Upsample, GridSample, AffineGrid, RoiAlign."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import product

import numpy as np
from numpy.typing import NDArray
from onnx import NodeProto, TensorProto, ValueInfoProto, helper, numpy_helper

from eptq_onnx import runtime
from eptq_onnx.graph.edit import Builder
from eptq_onnx.graph.lower.base import (
    NotLowerable,
    constant_input,
    ints,
    number,
    reshape,
    shape_of,
    stopped,
    total,
    transpose,
)
from eptq_onnx.graph.lower.reductions import along
from eptq_onnx.graph.view import GraphView, attribute, int_attribute, ints_attribute
from eptq_onnx.numerics.types import Array


def resize(node: NodeProto, view: GraphView, b: Builder) -> None:
    """Resize → one MatMul per resized axis, by the matrix that the operator yields for an identity.

    Every interpolation mode is separable and linear, so Resize along one axis is a constant matrix. With
    tf_crop_and_resize, a constant is added outside the image.
    """
    before, after = shape_of(view, node.input[0]), shape_of(view, node.output[0])
    rank = len(before)
    scales = _axis_scales(node, view, rank)
    roi = (
        constant_input(node, view, 1, "regions") if node.op_type == "Resize" and len(node.input) > 2 else None
    )
    axes = [a % rank for a in ints_attribute(node, "axes")] or list(range(rank))
    crops = attribute(node, "coordinate_transformation_mode", "") == "tf_crop_and_resize"
    x, inside = node.input[0], np.ones(after, np.float32)
    for axis in reversed(range(rank)):
        region = None
        if crops and roi is not None and axis in axes:
            k = axes.index(axis)
            region = float(roi[k]), float(roi[k + len(axes)])
        if before[axis] == after[axis] and not crops and (scales is None or scales[axis] == 1):
            continue
        if attribute(node, "keep_aspect_ratio_policy", "stretch") != "stretch":
            matrix = _interpolation_in_place(node, view, before, axes, axis)
        else:
            scale = None if scales is None else float(scales[axis])
            matrix = _interpolation(node, view, before[axis], after[axis], scale, region)
        if matrix.shape[0] == matrix.shape[1] and np.array_equal(matrix, np.eye(len(matrix))):
            continue
        x = along(b, x, axis, rank, matrix)
        inside = inside * np.rint(matrix.sum(axis=0)).reshape([-1 if a == axis else 1 for a in range(rank)])
    outside = (1 - inside) * number(node, "extrapolation_value", 0.0)
    if crops and outside.any():
        x = b.add("Add", [x, outside.astype(np.float32)])
    b.add("Identity", [x], node.output[0])


def _axis_scales(node: NodeProto, view: GraphView, rank: int) -> NDArray[np.float32] | None:
    """Return one scale per axis, or None if the node has sizes instead."""
    told = ints_attribute(node, "scales") if node.op_type == "Upsample" else []
    values: NDArray[np.generic] | None = np.array(attribute(node, "scales"), np.float32) if told else None
    if values is None:
        values = constant_input(
            node, view, 1 if node.op_type == "Upsample" or len(node.input) == 2 else 2, "scales"
        )
    if values is None or not values.size:
        return None
    result = np.ones(rank, np.float32)
    result[ints_attribute(node, "axes") or list(range(rank))] = values
    return result


def _interpolation(
    node: NodeProto,
    view: GraphView,
    size: int,
    new_size: int,
    scale: float | None,
    region: tuple[float, float] | None,
) -> Array:
    """Return the matrix, of shape (size, new_size), of the operator along one axis, with 0 outside the image.

    Its rows are the operator applied to unit vectors.
    """
    single = NodeProto()
    single.CopyFrom(node)
    for item in list(single.attribute):
        if item.name in ("axes", "keep_aspect_ratio_policy", "extrapolation_value", "scales"):
            single.attribute.remove(item)
    told = []
    if region is not None:
        told.append(
            helper.make_tensor(
                "r", TensorProto.FLOAT, [8], [0.0, 0.0, region[0], 0.0, 1.0, 1.0, region[1], 1.0]
            )
        )
    roi = "r" if told else ""
    if scale is None:
        names = ["x", roi, "", "s"]
        told.append(helper.make_tensor("s", TensorProto.INT64, [4], [1, 1, new_size, size]))
    else:
        names = ["x", roi, "s"] if len(node.input) > 2 else ["x", "s"]
        told.append(helper.make_tensor("s", TensorProto.FLOAT, [4], [1.0, 1.0, scale, 1.0]))
    if node.op_type == "Upsample" and len(node.input) == 1:
        names, told = ["x"], []
        single.attribute.append(helper.make_attribute("scales", [1.0, 1.0, float(scale or 1), 1.0]))
    single.input[:], single.output[:] = names, ["y"]
    eye = np.eye(size, dtype=np.float32).reshape(1, 1, size, size)
    # Column k of the image is the k-th unit vector: the result is (new size, size).
    matrix = _run(single, view, eye, told).reshape(-1, size).T
    if matrix.shape[1] != new_size:
        raise NotLowerable(f"it gives {matrix.shape[1]} values where {new_size} are expected")
    return np.ascontiguousarray(matrix, np.float32)


def _run(node: NodeProto, view: GraphView, x: Array, constants: list[TensorProto]) -> Array:
    info = helper.make_tensor_value_info("x", TensorProto.FLOAT, x.shape)
    graph = helper.make_graph([node], "interpolation", [info], [ValueInfoProto(name="y")], constants)
    model = helper.make_model(graph, opset_imports=view.model.opset_import, ir_version=8)
    y: Array = runtime.Session(model).run({"x": np.ascontiguousarray(x)})["y"]
    return y


def _interpolation_in_place(
    node: NodeProto, view: GraphView, before: tuple[int, ...], axes: list[int], axis: int
) -> Array:
    """Return the matrix of `_interpolation` if all axes share one scale (keep_aspect_ratio_policy).

    The scale depends on the sizes of all axes, so the unit vectors have the full shape.
    """
    size = before[axis]
    single = NodeProto()
    single.CopyFrom(node)
    for item in list(single.attribute):
        if item.name == "axes":
            single.attribute.remove(item)
    single.attribute.append(helper.make_attribute("axes", list(range(2, 2 + len(axes)))))
    single.input[:], single.output[:] = ["x", "", "", "s"], ["y"]
    told = numpy_helper.from_array(ints(view.constant(node.input[3]).tolist()), "s")
    vectors = np.eye(size, dtype=np.float32).reshape([size, 1] + [size if a == axis else 1 for a in axes])
    matrix = _run(single, view, np.broadcast_to(vectors, [size, 1, *(before[a] for a in axes)]), [told])
    picked = [slice(None) if a == axis else 0 for a in axes]
    return np.ascontiguousarray(matrix[(slice(None), 0, *picked)], np.float32)


def affine_grid(node: NodeProto, view: GraphView, b: Builder) -> None:
    """y = [grid, 1] theta^T, over the points of the unit grid (ONNX AffineGrid)."""
    size = constant_input(node, view, 1, "sizes")
    if size is None:
        raise NotLowerable("its sizes are missing")
    spatial = [int(s) for s in size[2:]]
    if int_attribute(node, "align_corners", 0):
        ticks = [np.linspace(-1, 1, s) for s in spatial]
    else:
        ticks = [(2 * np.arange(s) + 1) / s - 1 for s in spatial]
    places = np.meshgrid(*ticks, indexing="ij")
    points = np.stack([*reversed(places), np.ones(spatial)], axis=-1).reshape(1, -1, len(spatial) + 1)
    grid = b.add("MatMul", [points.astype(np.float32), transpose(b, node.input[0], [0, 2, 1])])
    reshape(b, grid, [int(size[0]), *spatial, len(spatial)], node.output[0])


def grid_sample(node: NodeProto, view: GraphView, b: Builder) -> None:
    """y = weighted sum of the neighbours of every point, whose positions are constants to gradients.

    Source: ONNX GridSample: coordinates -1 and 1 are the centres of the outer pixels (``align_corners``) or
    their outer edges; the last coordinate counts along the first spatial axis.
    """
    shape, grid_shape = shape_of(view, node.input[0]), shape_of(view, node.input[1])
    n, channels, spatial = shape[0], shape[1], shape[2:]
    count = int(np.prod(grid_shape[1:-1]))
    grid = reshape(b, node.input[1], [n, 1, count, len(spatial)])
    align, padding = (
        bool(int_attribute(node, "align_corners", 0)),
        str(attribute(node, "padding_mode", "zeros")),
    )
    taps = []
    for axis, size in enumerate(spatial):
        place = len(spatial) - 1 - axis
        x = reshape(b, b.add("Slice", [grid, ints([place]), ints([place + 1]), ints([3])]), [n, 1, count])
        scale, offset = ((size - 1) / 2, (size - 1) / 2) if align else (size / 2, (size - 1) / 2)
        x = b.add("Add", [b.add("Mul", [x, scale]), offset])
        taps.append(_taps(node, b, x, size, padding, align))
    image = reshape(b, node.input[0], [n, channels, -1])
    reshape(
        b,
        _gathered(b, image, spatial, taps, (n, channels, count)),
        [n, channels, *grid_shape[1:-1]],
        node.output[0],
    )


Tap = tuple[str, str]
"""Position (integers as floats, inside the image) and weight of a neighbour along one axis."""


def _taps(node: NodeProto, b: Builder, x: str, size: int, padding: str, align: bool) -> list[Tap]:
    mode = str(attribute(node, "mode", "linear")).removeprefix("bi")
    low, high = (0.0, size - 1.0) if align else (-0.5, size - 0.5)
    if mode != "cubic" and padding != "zeros":
        # Points are moved into the image; in cubic mode, only their neighbours are.
        x = b.add("Clip", [x if padding == "border" else _reflected(b, x, low, high), 0.0, size - 1.0])
    if mode == "nearest":
        return [_tap(b, stopped(b, "Round", [x]), None, size, padding, low, high)]
    first = stopped(b, "Floor", [x])
    t = b.add("Sub", [x, first])
    weights = (
        [(0.0, b.add("Sub", [1.0, t])), (1.0, t)]
        if mode == "linear"
        else [(float(k - 1), _cubic(b, t, k - 1)) for k in range(4)]
    )
    return [
        _tap(b, b.add("Add", [first, offset]), weight, size, padding, low, high) for offset, weight in weights
    ]


def _tap(b: Builder, place: str, weight: str | None, size: int, padding: str, low: float, high: float) -> Tap:
    """Return a neighbour; outside the image it gets weight 0, or is replaced by one inside."""
    if padding == "reflection":
        place = _reflected(b, place, low, high)
    inside = b.add("Clip", [place, 0.0, size - 1.0])
    weight = weight or b.add("Add", [b.add("Mul", [place, 0.0]), 1.0])
    if padding == "zeros":
        here = b.add("Cast", [b.add("Equal", [place, inside])], to=TensorProto.FLOAT)
        weight = b.add("Mul", [weight, here])
    return inside, weight


def _reflected(b: Builder, x: str, low: float, high: float) -> str:
    """Fold x into [low, high]: low + span - |mod(x - low, 2 span) - span|."""
    span = high - low
    if span <= 0:
        return b.add("Add", [b.add("Mul", [x, 0.0]), low])
    shifted = b.add("Sub", [x, low])
    turns = stopped(b, "Floor", [b.add("Div", [shifted, 2 * span])])
    rest = b.add("Sub", [shifted, b.add("Mul", [turns, 2 * span])])
    return b.add("Sub", [low + span, b.add("Abs", [b.add("Sub", [rest, span])])])


def _cubic(b: Builder, t: str, offset: int) -> str:
    """Add Keys' kernel with a = -0.75 at |t - offset| (Keys 1981, as in ONNX's reference)."""
    a = -0.75
    d = b.add("Abs", [b.add("Sub", [t, float(offset)])])
    near = [a + 2, -(a + 3), 0.0, 1.0]
    far = [a, -5 * a, 8 * a, -4 * a]
    x = d
    coefficients = near if offset in (0, 1) else far
    result = b.add("Add", [b.add("Mul", [x, coefficients[0]]), coefficients[1]])
    for c in coefficients[2:]:
        result = b.add("Add", [b.add("Mul", [result, x]), c])
    return result


def _gathered(
    b: Builder, image: str, spatial: Sequence[int], taps: list[list[Tap]], shape: tuple[int, int, int]
) -> str:
    """Sum over all combinations of neighbours along the axes.

    ``image`` has shape (n, channels, pixels), positions and weights have (n, 1, points).
    """
    terms = []
    for combination in product(*taps):
        flat, weight = combination[0]
        for size, (place, factor) in zip(spatial[1:], combination[1:], strict=True):
            flat = b.add("Add", [b.add("Mul", [flat, float(size)]), place])
            weight = b.add("Mul", [weight, factor])
        places = b.add("Expand", [b.add("Cast", [flat], to=TensorProto.INT64), ints(shape)])
        terms.append(b.add("Mul", [b.add("GatherElements", [image, places], axis=2), weight]))
    return total(b, terms)


def roi_align(node: NodeProto, view: GraphView, b: Builder) -> None:
    """y = mean or maximum of a fixed number of bilinear samples in each cell of a region (ONNX RoiAlign)."""
    ratio = int_attribute(node, "sampling_ratio", 0)
    if ratio == 0:
        raise NotLowerable("its number of samples depends on the regions (sampling_ratio 0)")
    n, channels, *spatial = shape_of(view, node.input[0])
    rois = shape_of(view, node.input[1])[0]
    cells = [int_attribute(node, "output_height", 1), int_attribute(node, "output_width", 1)]
    half = (
        attribute(
            node, "coordinate_transformation_mode", "half_pixel" if b.opset >= 16 else "output_half_pixel"
        )
        == "half_pixel"
    )
    corners = b.add("Mul", [node.input[1], number(node, "spatial_scale", 1.0)])
    if half:
        corners = b.add("Sub", [corners, 0.5])
    taps = []
    for axis, size in enumerate(spatial):
        first, last = (
            b.add("Slice", [corners, ints([k]), ints([k + 1]), ints([1])]) for k in (1 - axis, 3 - axis)
        )
        extent = b.add("Sub", [last, first])
        if not half:
            extent = b.add("Max", [extent, 1.0])
        steps = (np.arange(cells[axis] * ratio) + 0.5).astype(np.float32) / np.float32(cells[axis] * ratio)
        x = b.add("Add", [first, b.add("Mul", [extent, steps[None]])])
        taps.append(_roi_taps(b, x, size, axis, (rois, cells[0] * ratio, cells[1] * ratio)))
    batch = b.add("Gather", [reshape(b, node.input[0], [n, channels, -1]), node.input[2]], axis=0)
    points = cells[0] * cells[1] * ratio**2
    apart = [rois, channels, cells[0], ratio, cells[1], ratio]
    if attribute(node, "mode", "avg") == "avg":
        y = reshape(b, _gathered(b, batch, spatial, taps, (rois, channels, points)), apart)
        b.reduce("ReduceMean", y, [3, 5], node.output[0])
        return
    parts = [_gathered(b, batch, spatial, [[u], [v]], (rois, channels, points)) for u, v in product(*taps)]
    joined = b.add("Concat", [b.add("Unsqueeze", [reshape(b, p, apart), ints([6])]) for p in parts], axis=6)
    b.reduce("ReduceMax", joined, [3, 5, 6], node.output[0])


def _roi_taps(b: Builder, x: str, size: int, axis: int, shape: tuple[int, int, int]) -> list[Tap]:
    """Return both neighbours of points x, of shape (regions, points along the axis).

    Points more than one pixel outside the image get weight 0.
    """
    rois, rows, columns = shape
    clipped = b.add("Clip", [x, 0.0, size - 1.0])
    near = b.add(
        "Cast",
        [b.add("And", [b.add("GreaterOrEqual", [x, -1.0]), b.add("LessOrEqual", [x, float(size)])])],
        to=TensorProto.FLOAT,
    )
    first = stopped(b, "Floor", [clipped])
    t = b.add("Sub", [clipped, first])
    second = b.add("Clip", [b.add("Add", [first, 1.0]), 0.0, size - 1.0])
    wide = [rois, rows, 1] if axis == 0 else [rois, 1, columns]

    def spread(v: str) -> str:
        return reshape(b, b.add("Expand", [reshape(b, v, wide), ints(shape)]), [rois, 1, rows * columns])

    return [
        (spread(first), spread(b.add("Mul", [near, b.add("Sub", [1.0, t])]))),
        (spread(second), spread(b.add("Mul", [near, t]))),
    ]
