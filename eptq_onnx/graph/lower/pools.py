"""Windows over images: padding, pooling and its inverses."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray
from onnx import NodeProto, helper

from eptq_onnx.graph.edit import Builder
from eptq_onnx.graph.lower.base import NotLowerable, constant_input, ints, rank_of, reshape, shape_of, stay
from eptq_onnx.graph.lower.reductions import norm, powers
from eptq_onnx.graph.view import GraphView, attribute, int_attribute, ints_attribute


def explicit_padding(node: NodeProto, view: GraphView, b: Builder) -> None:
    """auto_pad, ceil_mode → explicit pads; the gradients of onnxruntime-training ignore the former."""
    if attribute(node, "auto_pad", "NOTSET") not in ("SAME_UPPER", "SAME_LOWER") and not int_attribute(
        node, "ceil_mode", 0
    ):
        b.nodes.append(node)
        return
    copy = NodeProto()
    copy.CopyFrom(node)
    for item in list(copy.attribute):
        if item.name in ("auto_pad", "pads", "ceil_mode"):
            copy.attribute.remove(item)
    copy.attribute.append(helper.make_attribute("pads", window(node, view)[1]))
    b.nodes.append(copy)


def window(node: NodeProto, view: GraphView) -> tuple[list[int], list[int], dict[str, Any]]:
    """Return kernel, effective pads (resolved from auto_pad and ceil_mode), and strides and dilations."""
    before, after = shape_of(view, node.input[0])[2:], shape_of(view, node.output[0])[2:]
    kernel = ints_attribute(node, "kernel_shape") or list(shape_of(view, node.input[1]))[2:]
    strides = ints_attribute(node, "strides") or [1] * len(kernel)
    dilations = ints_attribute(node, "dilations") or [1] * len(kernel)
    # Total overhang of the windows; if it is negative, the last elements are not read.
    reach = [
        (y - 1) * s + (k - 1) * d + 1 - x
        for x, y, k, s, d in zip(before, after, kernel, strides, dilations, strict=True)
    ]
    mode = attribute(node, "auto_pad", "NOTSET")
    if mode in ("SAME_UPPER", "SAME_LOWER"):
        totals = [max(0, r) for r in reach]
        small, large = [t // 2 for t in totals], [t - t // 2 for t in totals]
        pads = small + large if mode == "SAME_UPPER" else large + small
    else:
        told = ints_attribute(node, "pads") or [0] * (2 * len(kernel))
        first = told[: len(kernel)]
        pads = first + [max(0, r - p) for r, p in zip(reach, first, strict=True)]
    return kernel, pads, {"strides": strides, "dilations": dilations}


def explicit_transposed_padding(node: NodeProto, view: GraphView, b: Builder) -> None:
    """auto_pad, output_shape of ConvTranspose → explicit pads and output_padding."""
    mode = attribute(node, "auto_pad", "NOTSET")
    if mode not in ("SAME_UPPER", "SAME_LOWER") and attribute(node, "output_shape") is None:
        b.nodes.append(node)
        return
    before, after = shape_of(view, node.input[0])[2:], shape_of(view, node.output[0])[2:]
    kernel = ints_attribute(node, "kernel_shape") or list(shape_of(view, node.input[1]))[2:]
    strides = ints_attribute(node, "strides") or [1] * len(kernel)
    dilations = ints_attribute(node, "dilations") or [1] * len(kernel)
    extra = ints_attribute(node, "output_padding") or [0] * len(kernel)
    spread = [
        (x - 1) * s + (k - 1) * d + 1 for x, s, k, d in zip(before, strides, kernel, dilations, strict=True)
    ]
    totals = [max(0, r + e - y) for r, e, y in zip(spread, extra, after, strict=True)]
    small, large = [t // 2 for t in totals], [t - t // 2 for t in totals]
    first, last = (small, large) if mode == "SAME_UPPER" else (large, small)
    grown = [y - r + t for y, r, t in zip(after, spread, totals, strict=True)]
    keep = {"strides", "dilations", "group", "kernel_shape"}
    own = {a.name: helper.get_attribute_value(a) for a in node.attribute if a.name in keep}
    b.add("ConvTranspose", list(node.input), node.output[0], pads=first + last, output_padding=grown, **own)


def max_pool(node: NodeProto, view: GraphView, b: Builder) -> None:
    """MaxPool with column-major indices → one MaxPool for the values and one for the indices.

    The gradient kernel assumes row-major indices. Other MaxPools get explicit padding.
    """
    if not int_attribute(node, "storage_order", 0):
        explicit_padding(node, view, b)
        return
    if any(node.output[1:]):
        copy = NodeProto()
        copy.CopyFrom(node)
        copy.output[0] = b.unique(f"{node.output[0]}/values")
        stay(copy, b)
    own = {a.name: helper.get_attribute_value(a) for a in node.attribute if a.name != "storage_order"}
    b.add("MaxPool", [node.input[0]], node.output[0], **own)


def average_pool(node: NodeProto, view: GraphView, b: Builder) -> None:
    """AveragePool → window sums times 1 / counts, if it has dilations, ceil_mode or three spatial axes.

    The gradient kernel does not support these. Other AveragePools get explicit padding.
    """
    plain = not int_attribute(node, "ceil_mode", 0) and set(ints_attribute(node, "dilations")) <= {1}
    if plain and rank_of(view, node.input[0]) < 5:
        explicit_padding(node, view, b)
        return
    kernel, pads, steps = window(node, view)
    sums = _window_sums(
        b, node.input[0], shape_of(view, node.input[0]), shape_of(view, node.output[0]), kernel, pads, steps
    )
    b.add("Mul", [sums, _shares(node, view, kernel, steps)], node.output[0])


def window_counts(
    size: int, count: int, kernel: int, stride: int, dilation: int, pad: int, counted: tuple[int, int]
) -> NDArray[np.int64]:
    """Return the number of elements of each window along one axis, as AveragePool counts them.

    Parameters
    ----------
    size, count : int
        Length of the input and number of windows.
    kernel, stride, dilation, pad : int
        Geometry of the windows; the first begins ``pad`` elements before the input.
    counted : tuple of int
        Padding before and after the input that is counted, too.
    """
    places = (np.arange(count) * stride - pad)[:, None] + np.arange(kernel) * dilation
    return np.asarray(((places >= -counted[0]) & (places < size + counted[1])).sum(axis=1))


def _shares(node: NodeProto, view: GraphView, kernel: list[int], steps: dict[str, Any]) -> np.ndarray:
    """Return 1 / elements of each window; padding counts if ``count_include_pad`` is set."""
    sizes, after = shape_of(view, node.input[0])[2:], shape_of(view, node.output[0])[2:]
    pads = window(node, view)[1]
    told = ints_attribute(node, "pads") or [0] * (2 * len(kernel))
    counts = np.ones((1, 1), np.float32).reshape((1, 1) + (1,) * len(kernel))
    for axis, (size, count) in enumerate(zip(sizes, after, strict=True)):
        counted = (
            (told[axis], told[axis + len(kernel)]) if int_attribute(node, "count_include_pad", 0) else (0, 0)
        )
        places = (kernel[axis], steps["strides"][axis], steps["dilations"][axis], pads[axis])
        inside = window_counts(size, count, *places, counted).astype(np.float32)
        counts = counts * inside.reshape((1, 1) + (1,) * axis + (-1,) + (1,) * (len(kernel) - axis - 1))
    return (1 / np.maximum(counts, 1)).astype(np.float32)


def _window_sums(
    b: Builder,
    x: str,
    before: tuple[int, ...],
    after: tuple[int, ...],
    kernel: list[int],
    pads: list[int],
    steps: dict[str, Any],
) -> str:
    """Add the sums of all windows: a convolution with ones, channel by channel."""
    channels = reshape(b, x, [before[0] * before[1], 1, *before[2:]])
    sums = b.add(
        "Conv", [channels, np.ones((1, 1, *kernel), np.float32)], kernel_shape=kernel, pads=pads, **steps
    )
    return reshape(b, sums, after)


def lp_pool(node: NodeProto, view: GraphView, b: Builder) -> None:
    """y = (sum |x|^p)^(1/p) over each window."""
    p = int_attribute(node, "p", 2)
    kernel, pads, steps = window(node, view)
    before, after = shape_of(view, node.input[0]), shape_of(view, node.output[0])
    norm(
        b, _window_sums(b, powers(b, node.input[0], p), before, after, kernel, pads, steps), p, node.output[0]
    )


def max_unpool(node: NodeProto, view: GraphView, b: Builder) -> None:
    """MaxUnpool → Scatter to the indices into the flattened output, whose size follows from the kernel."""
    shape = shape_of(view, node.input[0])
    kernel = ints_attribute(node, "kernel_shape")
    strides = ints_attribute(node, "strides") or [1] * len(kernel)
    pads = ints_attribute(node, "pads") or [0] * (2 * len(kernel))
    sizes = [
        (x - 1) * s + k - pads[a] - pads[a + len(kernel)]
        for a, (x, s, k) in enumerate(zip(shape[2:], strides, kernel, strict=True))
    ]
    wide = [*shape[:2], *sizes]
    places, values = reshape(b, node.input[1], [-1]), reshape(b, node.input[0], [-1])
    image = reshape(
        b, b.add("ScatterElements", [np.zeros(int(np.prod(wide)), np.float32), places, values], axis=0), wide
    )
    told = constant_input(node, view, 2, "output sizes")
    after = wide if told is None else [int(v) for v in told]
    b.add(
        "Pad",
        [image, ints([0] * len(wide) + [a - w for a, w in zip(after, wide, strict=True)])],
        node.output[0],
    )


def col2im(node: NodeProto, view: GraphView, b: Builder) -> None:
    """Col2Im → a ConvTranspose per channel, whose weight puts each row of a block into its position."""
    image, block = (
        constant_input(node, view, k, what) for k, what in ((1, "image sizes"), (2, "block sizes"))
    )
    if image is None or block is None:
        raise NotLowerable("its sizes are missing")
    kernel, sizes = [int(v) for v in block], [int(v) for v in image]
    count = len(kernel)
    strides = ints_attribute(node, "strides") or [1] * count
    dilations = ints_attribute(node, "dilations") or [1] * count
    pads = ints_attribute(node, "pads") or [0] * (2 * count)
    spread = [d * (k - 1) + 1 for d, k in zip(dilations, kernel, strict=True)]
    padded = [s + pads[a] + pads[a + count] for a, s in enumerate(sizes)]
    blocks = [(p - r) // s + 1 for p, r, s in zip(padded, spread, strides, strict=True)]
    rest = [p - r - (n - 1) * s for p, r, n, s in zip(padded, spread, blocks, strides, strict=True)]
    n, rows, _ = shape_of(view, node.input[0])
    area = int(np.prod(kernel))
    x = reshape(b, node.input[0], [n * rows // area, area, *blocks])
    weight = np.eye(area, dtype=np.float32).reshape(area, 1, *kernel)
    # Rows at the end that no block covers still belong to the image.
    y = b.add(
        "ConvTranspose",
        [x, weight],
        strides=strides,
        dilations=dilations,
        pads=pads,
        output_padding=rest,
        kernel_shape=kernel,
    )
    reshape(b, y, [n, rows // area, *sizes], node.output[0])
