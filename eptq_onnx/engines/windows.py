"""Gradients of convolutions and pools as standard nodes.

Each of them is again a convolution (plain or transposed), a matrix product, or a scatter.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial, reduce
from itertools import product
from typing import Any

import numpy as np
from onnx import NodeProto

from eptq_onnx.engines.tape import Tape, refusal
from eptq_onnx.graph.kernels import fits_blocks
from eptq_onnx.graph.lower.pools import window_counts
from eptq_onnx.graph.view import attribute, int_attribute, ints_attribute

Shape = Sequence[int]


@dataclass(frozen=True)
class Window:
    """Geometry of a convolution or pool, one entry per axis; ``pads`` has all begins, then all ends."""

    kernel: tuple[int, ...]
    strides: tuple[int, ...]
    dilations: tuple[int, ...]
    pads: tuple[int, ...]
    group: int

    @classmethod
    def of(cls, node: NodeProto, kernel: Shape) -> Window:
        """Read the attributes of a node.

        Raises
        ------
        GradientError
            If its padding is not explicit (lowering makes it explicit where shapes are known).
        """
        if (
            attribute(node, "auto_pad", "NOTSET") not in ("NOTSET", "VALID")
            or attribute(node, "output_shape") is not None
        ):
            raise refusal(node, "its padding is not explicit")
        rank = len(kernel)
        return cls(
            kernel=tuple(kernel),
            strides=tuple(ints_attribute(node, "strides")) or (1,) * rank,
            dilations=tuple(ints_attribute(node, "dilations")) or (1,) * rank,
            pads=tuple(ints_attribute(node, "pads")) or (0,) * 2 * rank,
            group=int_attribute(node, "group", 1),
        )

    @property
    def reach(self) -> tuple[int, ...]:
        """Distance between the first and the last element of a window, along each axis."""
        return tuple(d * (k - 1) for d, k in zip(self.dilations, self.kernel, strict=True))

    def attributes(self) -> dict[str, Any]:
        """Return the attributes of a Conv node with this geometry."""
        shared = {
            "strides": self.strides,
            "dilations": self.dilations,
            "pads": self.pads,
            "kernel_shape": self.kernel,
        }
        return {"group": self.group, **{name: list(value) for name, value in shared.items()}}

    def transposed(self, wide: Shape, narrow: Shape) -> dict[str, Any]:
        """Return the attributes of the ConvTranspose that inverts the shapes of a Conv.

        The Conv reads the spatial size ``wide`` and produces ``narrow``.
        """
        rank = len(self.kernel)
        pads, extra = list(self.pads), [0] * rank
        for i in range(rank):
            made = (narrow[i] - 1) * self.strides[i] + self.reach[i] + 1 - pads[i] - pads[rank + i]
            # The last window may end before the input does, or (with ceil_mode) beyond it.
            extra[i] = max(0, wide[i] - made)
            pads[rank + i] += max(0, made - wide[i])
        return {**self.attributes(), "pads": pads, "output_padding": extra}


# ---- convolution -------------------------------------------------------------------------------------------
def input_gradient_by_conv(
    t: Tape, w: Window, dy: str, weight: str, shape: Shape, wide: Shape | None, narrow: Shape | None
) -> str | None:
    """Add dx of a Conv: a Conv of dy with the weight flipped and its channel axes swapped, group by group.

    Returns None if that would need negative padding, or has strides with which it is not faster.

    Parameters
    ----------
    wide, narrow : sequence of int, optional
        Spatial sizes of x and y.
    """
    outputs, inputs, rank = shape[0], shape[1], len(w.kernel)
    if set(w.strides) != {1} and wide is not None and narrow is not None and fits_blocks(shape, w.group):
        w, dy = _stretched(t, w, dy, wide, narrow)
    pads = [r - p for r, p in zip([*w.reach, *w.reach], w.pads, strict=True)]
    if set(w.strides) != {1} or min(pads) < 0:
        return None
    flipped = weight
    if outputs != w.group or inputs != 1:
        apart = t.reshape(weight, [w.group, outputs // w.group, inputs, *w.kernel])
        exchanged = t.add("Transpose", apart, perm=[0, 2, 1, *range(3, rank + 3)])
        flipped = t.reshape(exchanged, [w.group * inputs, outputs // w.group, *w.kernel])
    if max(w.kernel) > 1:
        ends = [[-1] * rank, [-(2**31)] * rank, list(range(2, rank + 2)), [-1] * rank]
        flipped = t.add("Slice", flipped, *map(t.ints, ends))
    return t.add(
        "Conv",
        dy,
        flipped,
        pads=pads,
        dilations=list(w.dilations),
        group=w.group,
        kernel_shape=list(w.kernel),
    )


def _stretched(t: Tape, w: Window, dy: str, wide: Shape, narrow: Shape) -> tuple[Window, str]:
    """Insert zeros between the elements of dy, and return it with the matching window of stride 1."""
    ones = t.builder.constant(np.ones((w.group, *[1] * (len(w.kernel) + 1)), np.float32), "ones")
    extra = [s - 1 for s in w.strides]
    apart = t.add("ConvTranspose", dy, ones, group=w.group, strides=list(w.strides), output_padding=extra)
    begins = w.pads[: len(w.kernel)]
    ends = (r - p + n * s - m for r, p, n, s, m in zip(w.reach, begins, narrow, w.strides, wide, strict=True))
    return replace(w, strides=(1,) * len(w.kernel), pads=(*begins, *ends)), apart


def weight_gradient(t: Tape, w: Window, x: str, dy: str, x_shape: Shape, y_shape: Shape, shape: Shape) -> str:
    """Add dW of y = Conv(x, W): every element correlates a channel of x with a channel of dy.

    A depthwise Conv needs one Conv of x with dy, in which each channel of each sample is a group, and strides
    and dilations are swapped. Other convolutions take one matrix product per kernel position, up to ten times
    as fast as such a Conv.
    """
    n, group, rank = x_shape[0], w.group, len(w.kernel)
    if shape[1] == 1:
        image, kernel = (
            t.reshape(x, [1, n * group, *x_shape[2:]]),
            t.reshape(dy, [n * shape[0], 1, *y_shape[2:]]),
        )
        exchanged = {
            "strides": list(w.dilations),
            "dilations": list(w.strides),
            "pads": list(w.pads),
            "group": n * group,
        }
        found = t.add("Conv", image, kernel, kernel_shape=list(y_shape[2:]), **exchanged)
        # Input elements beyond the last strided window produce extra elements.
        cut = t.add("Slice", found, t.ints([0] * rank), t.ints(w.kernel), t.ints(range(2, rank + 2)))
        return t.sum(t.reshape(cut, [n, *shape]), [0])
    places = int(np.prod(y_shape[2:]))
    rows = t.reshape(dy, [n, group, shape[0] // group, places])
    products = []
    for tap in _taps(t, w, x, y_shape):
        columns = t.add("Transpose", t.reshape(tap, [n, group, shape[1], places]), perm=[0, 1, 3, 2])
        products.append(t.reshape(t.sum(t.add("MatMul", rows, columns), [0]), [shape[0], shape[1], 1]))
    return t.reshape(t.add("Concat", *products, axis=2) if len(products) > 1 else products[0], shape)


def _taps(t: Tape, w: Window, x: str, y_shape: Shape) -> list[str]:
    """Return for each kernel element its operand in x, with the spatial shape of y and the channels of x."""
    rank = len(w.kernel)
    padded = t.add("Pad", x, t.ints([0, 0, *w.pads[:rank], 0, 0, *w.pads[rank:]])) if any(w.pads) else x
    if set(w.kernel) == set(w.strides) == {1}:
        return [padded]
    axes, steps = t.ints(range(2, rank + 2)), t.ints(w.strides)
    taps = []
    for place in np.ndindex(*w.kernel):
        starts = [k * d for k, d in zip(place, w.dilations, strict=True)]
        ends = [a + (size - 1) * s + 1 for a, size, s in zip(starts, y_shape[2:], w.strides, strict=True)]
        taps.append(t.add("Slice", padded, t.ints(starts), t.ints(ends), axes, steps))
    return taps


def convolution_input(t: Tape, node: NodeProto, k: int, dy: str) -> str:
    """dx = the transposed convolution of dy."""
    x, weight = node.input[:2]
    shape = t.shape(weight)
    w = Window.of(node, shape[2:])
    wide, narrow = t.shape(x)[2:], t.shape(node.output[0])[2:]
    turned = input_gradient_by_conv(t, w, dy, weight, shape, wide, narrow)
    return turned or t.add("ConvTranspose", dy, weight, **w.transposed(wide, narrow))


def convolution_weight(t: Tape, node: NodeProto, k: int, dy: str) -> str:
    """dW of a Conv; see `weight_gradient`."""
    x, weight = node.input[:2]
    shape = t.shape(weight)
    return weight_gradient(t, Window.of(node, shape[2:]), x, dy, t.shape(x), t.shape(node.output[0]), shape)


def channel_sum(t: Tape, node: NodeProto, k: int, dy: str) -> str:
    """db = dy summed over samples and positions."""
    return t.sum(dy, [0, *range(2, len(t.dims(node.output[0])))])


def transposed_input(t: Tape, node: NodeProto, k: int, dy: str) -> str:
    """dx = Conv(dy, W): a ConvTranspose weight (C_in, C_out / group, ...) is a Conv weight from dy to x."""
    return t.add("Conv", dy, node.input[1], **_mirrored(t, node).attributes())


def transposed_weight(t: Tape, node: NodeProto, k: int, dy: str) -> str:
    """dW = the weight gradient of the Conv from dy to x, with input dy and output gradient x."""
    x, weight = node.input[:2]
    return weight_gradient(t, _mirrored(t, node), dy, x, t.shape(node.output[0]), t.shape(x), t.shape(weight))


def _mirrored(t: Tape, node: NodeProto) -> Window:
    """Return the window of the Conv from the output of a ConvTranspose to its input."""
    w = Window.of(node, t.shape(node.input[1])[2:])
    if any(
        extra >= stride
        for extra, stride in zip(ints_attribute(node, "output_padding"), w.strides, strict=False)
    ):
        raise refusal(node, "its output_padding is not smaller than its strides")
    return w


# ---- pools -------------------------------------------------------------------------------------------------
def average_pool(t: Tape, node: NodeProto, k: int, dy: str) -> str:
    """dx = dy shared evenly among each window: a transposed convolution with ones, channel by channel."""
    wide, narrow = t.shape(node.input[0]), t.shape(node.output[0])
    w = Window.of(node, ints_attribute(node, "kernel_shape"))
    share = np.ones((), np.float32)
    for i, (size, count) in enumerate(zip(wide[2:], narrow[2:], strict=True)):
        counted = (
            (w.pads[i], w.pads[len(w.kernel) + i]) if int_attribute(node, "count_include_pad", 0) else (0, 0)
        )
        inside = window_counts(size, count, w.kernel[i], w.strides[i], w.dilations[i], w.pads[i], counted)
        share = np.multiply.outer(share, 1 / np.maximum(inside, 1)).astype(np.float32)
    shares = t.add("Mul", dy, t.builder.constant(share, "share"))
    lone = t.reshape(shares, [wide[0] * wide[1], 1, *narrow[2:]])
    ones = t.builder.constant(np.ones((1, 1, *w.kernel), np.float32), "ones")
    return t.reshape(t.add("ConvTranspose", lone, ones, **w.transposed(wide[2:], narrow[2:])), wide)


def global_average_pool(t: Tape, node: NodeProto, k: int, dy: str) -> str:
    """dx = dy shared evenly among all positions."""
    shape = t.shape(node.input[0])
    return t.add("Expand", t.add("Mul", dy, 1.0 / float(np.prod(shape[2:]))), t.ints(shape))


def max_pool(t: Tape, node: NodeProto, k: int, dy: str) -> str:
    """dx = dy at the position of each maximum; the node is made to output its indices.

    Before opset 16 no operator sums over equal indices, so windows are scattered in sets that do not overlap.
    """
    wide, narrow = t.shape(node.input[0]), t.shape(node.output[0])
    w = Window.of(node, ints_attribute(node, "kernel_shape"))
    if int_attribute(node, "storage_order", 0):
        raise refusal(node, "its indices are in column-major order")
    if len(node.output) < 2 or not node.output[1]:
        node.output[1:] = [t.builder.unique(f"{node.output[0]}/indices")]
    nothing = t.add("ConstantOfShape", t.ints([int(np.prod(wide))]))
    if t.builder.opset >= 16:
        flat = t.add(
            "ScatterElements", nothing, *(t.reshape(x, [-1]) for x in (node.output[1], dy)), reduction="add"
        )
        return t.reshape(flat, wide)
    apart = [-(-(r + 1) // s) for r, s in zip(w.reach, w.strides, strict=True)]
    rank = len(apart)
    parts = []
    for starts in product(*(range(min(m, size)) for m, size in zip(apart, narrow[2:], strict=True))):
        where = [t.ints(v) for v in (starts, narrow[2:], range(2, rank + 2), apart)]
        chosen = (t.reshape(t.add("Slice", x, *where), [-1]) for x in (node.output[1], dy))
        parts.append(t.add("ScatterElements", nothing, *chosen))
    return t.reshape(reduce(partial(t.add, "Add"), parts), wide)
