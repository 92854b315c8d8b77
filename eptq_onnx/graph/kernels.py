"""Replacement of nodes of a training graph by forms that onnxruntime computes faster.

onnxruntime computes on blocks of channels (NCHWc) only where weights are constant, and takes ten times as
long for a depthwise Conv whose weight is not. In a training graph these are the layers, their gradients, and
the gradients of their weights (a depthwise Conv of x with dy). The blocked operators accept computed weights,
too: in memory, a blocked depthwise weight is the same as a blocked image of one sample. Nodes between
convolutions can be computed in either layout; `eptq_onnx.graph.layouts` chooses one for each, so that the
fewest elements have to be reordered.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from onnx import ModelProto, NodeProto, helper

from eptq_onnx.graph import edit
from eptq_onnx.graph.infer import infer_shapes
from eptq_onnx.graph.layouts import Form, least_reordered
from eptq_onnx.graph.lower.reductions import reduced_axes
from eptq_onnx.graph.view import GraphView, int_attribute
from eptq_onnx.probes import channel_block
from eptq_onnx.proto.bodies import node_reads, subgraphs
from eptq_onnx.runtime import LAYOUT_DOMAIN

_ELEMENTWISE = frozenset((
    "Add", "And", "Cast", "Clip", "DequantizeLinear", "Equal", "FakeQuant", "FakeQuantGrad", "Greater",
    "HardSigmoid", "HardSwish", "Identity", "LeakyRelu", "Less", "Max", "Min", "Mul", "Neg", "Not",
    "QuantizeLinear", "Relu", "Sigmoid", "Sub", "Sum", "Tanh", "Where",
))  # fmt: skip
"""Operators, of any domain, on scalars and tensors of one shape; finite on the zeros that pad blocks."""
_REORDERED_TOGETHER = 4
"""Number of channels that onnxruntime reorders at a time."""
_POOLS = frozenset(("MaxPool", "AveragePool", "GlobalMaxPool", "GlobalAveragePool"))
_POOL_ATTRIBUTES = frozenset(
    ("auto_pad", "ceil_mode", "count_include_pad", "kernel_shape", "pads", "strides")
)


def faster(model: ModelProto) -> ModelProto:
    """Return an equivalent copy that runs faster on this machine's onnxruntime.

    Parameters
    ----------
    model : ModelProto
        With fixed input shapes; otherwise nothing changes.
    """
    view = GraphView(infer_shapes(model))
    forms = _Forms(view, edit.Builder(model, "faster/"))
    found = [forms.of(node) for node in view.nodes]
    for node, form, chosen in zip(view.nodes, found, least_reordered(view, found), strict=True):
        if form is not None and chosen:
            form.write()
        else:
            forms.keep(node)
    for name in view.outputs:
        forms.plain(name)
    result = edit.with_nodes(model, forms.builder.nodes, forms.builder.initializers)
    if any(node.domain == LAYOUT_DOMAIN for node in result.graph.node):
        edit.import_domain(result, LAYOUT_DOMAIN)
    edit.prune(result)
    return result


def fits_blocks(weight: Sequence[int | None], group: int) -> bool:
    """Return True if a weight is that of a depthwise Conv of images, with whole blocks of channels."""
    block = channel_block()
    return len(weight) == 4 and tuple(weight[:2]) == (group, 1) and block > 0 and group % block == 0


class _Forms:
    """Finds and adds the faster forms; each tensor is reordered at most once in each direction."""

    def __init__(self, view: GraphView, builder: edit.Builder) -> None:
        self.builder, self._view = builder, view
        self._images: dict[str, str] = {}
        self._weights: dict[str, str] = {}
        self._waiting: set[str] = set()
        """Tensors that so far exist in blocked layout only."""
        self._postponed: dict[str, NodeProto] = {}
        """Nodes that are added only if a reader needs their output in plain layout."""

    def of(self, node: NodeProto) -> Form | None:
        """Return the blocked form of a node, or None if it has none."""
        if not channel_block() or subgraphs(node):
            return None
        for form in (
            self._convolution,
            self._elementwise,
            self._scaled,
            self._summed,
            self._pooled,
            self._joined,
            self._merging,
        ):
            found = form(node)
            if found is not None:
                return found
        return None

    def keep(self, node: NodeProto) -> None:
        """Add a node in plain layout."""
        for name in node_reads(node):
            self.plain(name)
        if self._sums_images(node, "ReduceSumSquare", [2, 3]):
            x = node.input[0]
            samples, channels, *image = self._shape(x)
            count = samples * channels
            sides = [self._reshaped(x, [1, count, *image]), self._reshaped(x, [count, 1, *image])]
            # A Conv of every channel with itself takes a quarter of the time.
            self._reshape_sum(node, self.builder.add("Conv", sides, group=count, kernel_shape=image))
        else:
            self.builder.nodes.append(node)

    def plain(self, name: str) -> str:
        """Ensure that a tensor exists in plain layout, and return its name."""
        if name in self._waiting:
            self._waiting.remove(name)
            self.builder.add(
                "ReorderOutput",
                [self._images[name]],
                name,
                domain=LAYOUT_DOMAIN,
                channels=self._shape(name)[1],
            )
        if name in self._postponed:
            self.keep(self._postponed.pop(name))
        return name

    def _convolution(self, node: NodeProto) -> Form | None:
        """Return the form of a depthwise Conv, or of a Conv without groups and with a constant weight.

        onnxruntime would compute the latter on blocks anyway.
        """
        if node.op_type != "Conv" or node.domain:
            return None
        image, weight = (self._view.static_shape(name) for name in node.input[:2])
        if image is None or weight is None or len(weight) != 4:
            return None
        x, w, bias, group = node.input[0], node.input[1], node.input[2:], int_attribute(node, "group", 1)
        attributes = {a.name: helper.get_attribute_value(a) for a in node.attribute}
        constant = self._view.is_constant(w)

        def write(image: str, weight: str, bias: Sequence[str]) -> None:
            for name in bias:
                self.plain(name)
            self._made(
                node, self.builder.add("Conv", [image, weight, *bias], domain=LAYOUT_DOMAIN, **attributes)
            )

        if fits_blocks(weight, group):
            return Form(
                lambda: write(self._image(x), self._weight(w), bias),
                (x,) if constant else (x, w),
                (node.output[0],),
                True,
            )
        if (
            group > 1
            or not all(map(self._view.is_constant, (w, *bias)))
            or not self._is_image(node.output[0])
        ):
            return None
        filled = [self._filled_bias(name) for name in bias]
        if weight[1] < channel_block():
            # Fewer channels than a block are read in plain layout.
            return Form(
                lambda: write(self.plain(x), self._dense_weight(w), filled), (), (node.output[0],), True
            )
        if not self._is_image(x):
            return None
        return Form(
            lambda: write(self._image(x), self._dense_weight(w), filled), (x,), (node.output[0],), True
        )

    def _elementwise(self, node: NodeProto) -> Form | None:
        if node.op_type not in _ELEMENTWISE or not self._is_image(node.output[0]):
            return None
        shape = self._shape(node.output[0])
        if any(self._view.static_shape(o) != shape for o in node.output):
            return None
        images = tuple(dict.fromkeys(i for i in node.input if self._view.static_shape(i) == shape))
        others = [i for i in node.input if i and i not in images]
        if not images or any(not self._is_number(i) for i in others):
            return None

        def write() -> None:
            for name in others:
                self.plain(name)
            names = {name: self._image(name) for name in images}
            copy = edit.renamed(node, names)
            copy.output[:] = [self.builder.unique(f"faster/{name}") for name in node.output]
            self.builder.nodes.append(copy)
            self._made(node, *copy.output)

        return Form(write, images, tuple(node.output))

    def _scaled(self, node: NodeProto) -> Form | None:
        """Return the form of a product of an image and one factor per channel and sample."""
        if node.op_type != "Mul" or not self._is_whole(node.output[0]):
            return None
        shape = self._shape(node.output[0])
        images = [i for i in node.input if self._view.static_shape(i) == shape]
        factors = [i for i in node.input if self._view.static_shape(i) == (*shape[:2], 1, 1)]
        if len(images) != 1 or len(factors) != 1:
            return None
        count = shape[0] * shape[1]

        def write() -> None:
            self.plain(factors[0])
            image = self._reshaped(self._image(images[0]), [1, count, *shape[2:]])
            # For a single pixel, both layouts are the same.
            factor = self._reshaped(factors[0], [count, 1, 1, 1])
            made = self.builder.add("Conv", [image, factor], domain=LAYOUT_DOMAIN, group=count)
            self._made(node, self._reshaped(made, shape))

        return Form(write, (images[0],), (node.output[0],))

    def _summed(self, node: NodeProto) -> Form | None:
        """Return the form of a sum of squares over positions, or of a sum over samples and positions."""
        x = node.input[0] if node.input else ""
        if self._sums_images(node, "ReduceSumSquare", [2, 3]) and self._is_whole(x):
            return Form(lambda: self._sum_squares(node), (x,), ())
        if self._sums_images(node, "ReduceSum", [0, 2, 3]) and self._is_whole(x):
            return Form(lambda: self._sum(node), (x,), ())
        return None

    def _sum_squares(self, node: NodeProto) -> None:
        """Add a sum of squares over positions as the blocked Conv of every channel with itself."""
        samples, channels, *image = self._shape(node.input[0])
        count, x = samples * channels, self._image(node.input[0])
        sides = [self._reshaped(x, [1, count, *image]), self._reshaped(x, [count, 1, *image])]
        self._reshape_sum(
            node, self.builder.add("Conv", sides, domain=LAYOUT_DOMAIN, group=count, kernel_shape=image)
        )

    def _sum(self, node: NodeProto) -> None:
        """Add a sum over samples and positions, computed from the mean of each sample."""
        samples, channels, *image = self._shape(node.input[0])
        means = self.builder.add("GlobalAveragePool", [self._image(node.input[0])], domain=LAYOUT_DOMAIN)
        rows = self._reshaped(means, [samples, channels, 1, 1])
        total = self.builder.reduce(
            "ReduceSum", rows, [0, 2, 3], keepdims=bool(int_attribute(node, "keepdims", 1))
        )
        self.builder.add("Mul", [total, float(math.prod(image))], node.output[0])

    def _pooled(self, node: NodeProto) -> Form | None:
        if node.op_type not in _POOLS or node.domain or len(node.output) > 1:
            return None
        attributes = {a.name: helper.get_attribute_value(a) for a in node.attribute}
        if (
            not _POOL_ATTRIBUTES.issuperset(attributes)
            or not self._is_image(node.input[0])
            or not self._is_image(node.output[0])
        ):
            return None

        def write() -> None:
            self._made(
                node,
                self.builder.add(
                    node.op_type, [self._image(node.input[0])], domain=LAYOUT_DOMAIN, **attributes
                ),
            )

        return Form(write, (node.input[0],), (node.output[0],))

    def _joined(self, node: NodeProto) -> Form | None:
        """Return the form of a concatenation of images along channels."""
        if (
            node.op_type != "Concat"
            or int_attribute(node, "axis", 0) not in (1, -3)
            or not all(map(self._is_whole, node.input))
        ):
            return None
        return Form(
            lambda: self._made(
                node, self.builder.add("Concat", [self._image(i) for i in node.input], axis=1)
            ),
            tuple(node.input),
            (node.output[0],),
        )

    def _merging(self, node: NodeProto) -> Form | None:
        """Return the form of a Reshape that merges samples and channels, for a depthwise Conv of x with dy.

        The result serves as its image or as its weight.
        """
        name = node.output[0] if node.output else ""
        if node.op_type != "Reshape" or self._merged(name) is None:
            return None
        return Form(lambda: self._postponed.update({name: node}), (node.input[0],), (name,))

    def _image(self, name: str) -> str:
        """Return a tensor in blocked layout."""
        if name not in self._images:
            source = self._merged(name)
            self._images[name] = (
                self._reshaped(self._image(source), self._shape(name)) if source else self._reordered(name)
            )
        return self._images[name]

    def _weight(self, name: str) -> str:
        """Return a depthwise weight in blocked layout: that of an image of one sample or merged samples."""
        if name not in self._weights:
            shape = self._shape(name)
            source = self._merged(name)
            image = (
                self._image(source)
                if source
                else self._reordered(self._reshaped(name, [1, shape[0], *shape[2:]]))
            )
            self._weights[name] = self._reshaped(image, shape)
        return self._weights[name]

    def _dense_weight(self, name: str) -> str:
        """Return a constant weight without groups in blocks of output channels.

        Input channels are in blocks, too, unless they are fewer than a block.
        """
        weight, block = self._view.constant(name), channel_block()
        outputs, inputs, *kernel = weight.shape
        whole = inputs if inputs < block else inputs + -inputs % block
        filled = np.zeros((outputs + -outputs % block, whole, *kernel), np.float32)
        filled[:outputs, :inputs] = weight
        if inputs < block:
            parted = filled.reshape(-1, block, inputs, *kernel).transpose(0, 2, 3, 4, 1)
        else:
            parted = filled.reshape(-1, block, whole // block, block, *kernel).transpose(0, 2, 4, 5, 3, 1)
        return self.builder.constant(parted.reshape(filled.shape), "weight")

    def _filled_bias(self, name: str) -> str:
        bias = self._view.constant(name)
        return self.builder.constant(np.pad(bias, (0, -len(bias) % channel_block())), "bias")

    def _made(self, node: NodeProto, *blocked: str) -> None:
        for name, made in zip(node.output, blocked, strict=True):
            self._images[name] = made
            self._waiting.add(name)

    def _sums_images(self, node: NodeProto, op_type: str, axes: list[int]) -> bool:
        shape = self._view.static_shape(node.input[0]) if node.op_type == op_type else None
        return shape is not None and len(shape) == 4 and reduced_axes(node, self._view) == axes

    def _reshape_sum(self, node: NodeProto, found: str) -> None:
        """Write sums per channel and sample in the output shape of the node."""
        kept = int_attribute(node, "keepdims", 1)
        self.builder.add(
            "Reshape",
            [found, np.array([*self._shape(node.input[0])[:2], *[1, 1] * kept], np.int64)],
            node.output[0],
        )

    def _merged(self, name: str) -> str | None:
        """Return the image of which a tensor is a Reshape that merges samples and channels, or None.

        In blocked layout, such a Reshape changes the shape only.
        """
        node = self._view.producer.get(name)
        if node is None or node.op_type != "Reshape":
            return None
        shape, before = self._view.static_shape(name), self._view.static_shape(node.input[0])
        if (
            shape is None
            or before is None
            or len(before) != 4
            or before[2:] != shape[2:]
            or before[1] % channel_block()
        ):
            return None
        return node.input[0] if before[0] * before[1] in (shape[0], shape[1]) and 1 in shape[:2] else None

    def _is_image(self, name: str) -> bool:
        """Return True for images that onnxruntime can reorder; zeros pad the last block."""
        shape = self._view.static_shape(name)
        return shape is not None and len(shape) == 4 and shape[1] > 0 and shape[1] % _REORDERED_TOGETHER == 0

    def _is_whole(self, name: str) -> bool:
        """Return True for images with whole blocks of channels."""
        return self._is_image(name) and self._shape(name)[1] % channel_block() == 0

    def _is_number(self, name: str) -> bool:
        shape = self._view.static_shape(name)
        return shape is not None and math.prod(shape) == 1

    def _reordered(self, name: str) -> str:
        return self.builder.add("ReorderInput", [name], domain=LAYOUT_DOMAIN)

    def _reshaped(self, name: str, shape: Sequence[int]) -> str:
        return self.builder.add("Reshape", [name, np.array(shape, np.int64)])

    def _shape(self, name: str) -> tuple[int, ...]:
        """Return the shape of a tensor whose shape is known."""
        shape = self._view.static_shape(name)
        assert shape is not None
        return shape
