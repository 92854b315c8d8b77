"""Nodes of a training graph in forms that onnxruntime computes faster.

onnxruntime keeps the channels of images in blocks (NCHWc) where weights are constant, and takes ten times as long for a
depthwise Conv whose weight is not: in a training graph these are the layers, their gradients, and the gradients of their
weights (a depthwise Conv of x with dy). Its blocked operators take computed weights, too; the memory of a blocked depthwise
weight is that of a blocked image of one sample.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from onnx import ModelProto, NodeProto, helper

from eptq_onnx.graph import edit
from eptq_onnx.graph.infer import infer_shapes
from eptq_onnx.graph.lower.reductions import reduced_axes
from eptq_onnx.graph.view import GraphView, int_attribute
from eptq_onnx.runtime import LAYOUT_DOMAIN, channel_block


def faster(model: ModelProto) -> ModelProto:
    """A copy that computes the same on this machine's onnxruntime, and takes less time.

    Parameters
    ----------
    model : ModelProto
        With fixed input shapes, else nothing changes.
    """
    forms = _Forms(GraphView(infer_shapes(model)), edit.Builder(model, "faster/"))
    for node in model.graph.node:
        if forms.is_blocked(node):
            forms.convolve(node)
        elif forms.is_sum_over_images(node):
            forms.sum_squares(node)
        else:
            forms.builder.nodes.append(node)
    result = edit.with_nodes(model, forms.builder.nodes, forms.builder.initializers)
    if any(node.domain == LAYOUT_DOMAIN for node in result.graph.node):
        edit.import_domain(result, LAYOUT_DOMAIN)
    edit.prune(result)
    return result


def fits_blocks(weight: Sequence[int | None], group: int) -> bool:
    """True for the shape of a depthwise weight of images, in whole blocks of channels."""
    block = channel_block()
    return len(weight) == 4 and tuple(weight[:2]) == (group, 1) and block > 0 and group % block == 0


class _Forms:
    """Adds the faster forms; each tensor is put in blocks once."""

    def __init__(self, view: GraphView, builder: edit.Builder) -> None:
        self.builder, self._view = builder, view
        self._images: dict[str, str] = {}
        self._weights: dict[str, str] = {}

    def is_blocked(self, node: NodeProto) -> bool:
        """True for a depthwise Conv of images whose weight is computed, in whole blocks of channels."""
        if node.op_type != "Conv" or node.domain or self._view.is_constant(node.input[1]):
            return False
        image, weight = (self._view.static_shape(name) for name in node.input[:2])
        return image is not None and weight is not None and fits_blocks(weight, int_attribute(node, "group", 1))

    def convolve(self, node: NodeProto) -> None:
        """Add the blocked form of a Conv."""
        inputs = [self._image(node.input[0]), self._weight(node.input[1]), *node.input[2:]]
        attributes = {a.name: helper.get_attribute_value(a) for a in node.attribute}
        made = self.builder.add("Conv", inputs, domain=LAYOUT_DOMAIN, **attributes)
        self._images[node.output[0]] = made
        self.builder.add("ReorderOutput", [made], node.output[0], domain=LAYOUT_DOMAIN, channels=self._shape(node.input[1])[0])

    def is_sum_over_images(self, node: NodeProto) -> bool:
        """True for a sum of squares over the positions of each channel of each sample."""
        shape = self._view.static_shape(node.input[0]) if node.op_type == "ReduceSumSquare" else None
        return shape is not None and len(shape) == 4 and reduced_axes(node, self._view) == [2, 3]

    def sum_squares(self, node: NodeProto) -> None:
        """Add it as the Conv of every channel with itself, which takes a quarter of the time."""
        x, (samples, channels, *image) = node.input[0], self._shape(node.input[0])
        count = samples * channels
        sides = [self._reshaped(x, [1, count, *image]), self._reshaped(x, [count, 1, *image])]
        found = self.builder.add("Conv", sides, group=count, kernel_shape=image)
        kept = int_attribute(node, "keepdims", 1)
        self.builder.add("Reshape", [found, np.array([samples, channels, *[1, 1] * kept], np.int64)], node.output[0])

    def _image(self, name: str) -> str:
        """The tensor in blocks."""
        if name not in self._images:
            source = self._merged(name)
            self._images[name] = self._reshaped(self._image(source), self._shape(name)) if source else self._reordered(name)
        return self._images[name]

    def _weight(self, name: str) -> str:
        """A depthwise weight in blocks: as an image of one sample, or of as many as have been put side by side in it."""
        if name not in self._weights:
            shape = self._shape(name)
            source = self._merged(name)
            image = self._image(source) if source else self._reordered(self._reshaped(name, [1, shape[0], *shape[2:]]))
            self._weights[name] = self._reshaped(image, shape)
        return self._weights[name]

    def _merged(self, name: str) -> str | None:
        """The images whose channels were put side by side to make this tensor: in blocks, that changes their shape only."""
        node = self._view.producer.get(name)
        if node is None or node.op_type != "Reshape":
            return None
        shape, before = self._shape(name), self._view.static_shape(node.input[0])
        if before is None or len(before) != 4 or before[2:] != shape[2:] or before[1] % channel_block():
            return None
        return node.input[0] if before[0] * before[1] == shape[0] * shape[1] else None

    def _reordered(self, name: str) -> str:
        return self.builder.add("ReorderInput", [name], domain=LAYOUT_DOMAIN)

    def _reshaped(self, name: str, shape: Sequence[int]) -> str:
        return self.builder.add("Reshape", [name, np.array(shape, np.int64)])

    def _shape(self, name: str) -> tuple[int, ...]:
        """Of a tensor whose shape is known."""
        shape = self._view.static_shape(name)
        assert shape is not None
        return shape
