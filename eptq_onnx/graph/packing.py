"""Pack weights of 2 to 6 bits into bytes, with nodes that unpack them when a session is created.

All inputs of the added nodes are constants, so a runtime folds them before it looks for integer kernels:

    X (int8)  →  X = Transpose(Reshape(Gather(table, index)))
                 index = Cast(X_packed) [+ bits beyond the byte] [+ first table row of the channel's offset]

A row of the table holds the weights that one index encodes, plus an offset: integers with a folded zero point
can lie anywhere in int8. All weights of the same width share the table. The nodes are standard operators of
opset 13, on types for which onnxruntime (1.18 to 1.32, web too) and OpenVINO (2026.4) have kernels: neither
can add int8, and BitShift gives wrong values in OpenVINO. Folding a table takes less memory than dividing
every weight in int32, because an index encodes several weights.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray
from onnx import ModelProto, TensorProto

from eptq_onnx.graph import edit
from eptq_onnx.graph.view import GraphView, int_attribute, opset_of
from eptq_onnx.numerics import bitpacking
from eptq_onnx.numerics.bitpacking import LAYOUTS, Layout

_PREFIX = "unfold/"
"""Prefix of new names, kept short because names take bytes too."""
_MESSAGE = 16
"""Bytes that a node or initializer adds to a graph beyond its own size with the shortest names."""
_OLDEST_OPSET = 13
_MOST_OFFSETS = 256
"""Maximum number of distinct int8 offsets."""


@dataclass(frozen=True)
class Packing:
    """How one weight is packed.

    Parameters
    ----------
    name : str
    shape : tuple of int
    layout : Layout
    axis : int or None
        Axis with one offset per index; None for a single offset.
    """

    name: str
    shape: tuple[int, ...]
    layout: Layout
    axis: int | None

    @property
    def rows(self) -> int:
        """Return the number of offsets."""
        return 1 if self.axis is None else self.shape[self.axis]

    @property
    def columns(self) -> int:
        """Return the number of values with one offset."""
        return math.prod(self.shape) // self.rows

    @property
    def payload(self) -> int:
        """Return the bytes of the packed values and the offsets."""
        return self.rows * (self.layout.row_bytes(self.columns) + 1)


def packed(model: ModelProto) -> ModelProto:
    """Return a copy in which weights of 2 to 6 bits are packed into the bytes that their bits need.

    Weights are the int8 constants that a DequantizeLinear of the main graph reads. The range of their
    integers gives the bits that they need; each channel has its own offset if that takes fewer bytes. The
    unpacked integers are the same, under the same name. A weight stays as it is if the nodes that unpack it
    take more bytes than packing saves.

    Parameters
    ----------
    model : ModelProto
        It is not changed. It is returned as it is below opset 13, or if nothing is packed.
    """
    view = GraphView(model)
    by_width: dict[int, list[Packing]] = defaultdict(list)
    for name, axis in weights_of(view).items() if opset_of(model) >= _OLDEST_OPSET else ():
        chosen = _chosen(name, view.constant(name), axis)
        if chosen is not None:
            by_width[chosen.layout.bits].append(chosen)
    builder, replaced = edit.Builder(model, _PREFIX), set[str]()
    for bits, weights in sorted(by_width.items()):
        saved = sum(math.prod(w.shape) - packed_bytes(w) for w in weights)
        if saved > shared_bytes(bits):
            _Width(builder, LAYOUTS[bits], weights).write(view)
            replaced |= {w.name for w in weights}
    if not replaced:
        return model
    return edit.with_nodes(model, [*builder.nodes, *model.graph.node], builder.initializers, drop=replaced)


def packed_bytes(weight: Packing) -> int:
    """Return an upper bound on the bytes of a packed weight: its values, its offsets and its nodes."""
    scratch = edit.Builder(ModelProto(), _PREFIX)
    planes = ("", "above" if weight.layout.above else None)
    place = scratch.add("Slice", ["places", _sizes(0), _sizes(weight.rows), _sizes(0)])
    _unfold(scratch, weight, planes, place, ("table", "above"))
    # Both the initializer of a plane and the node that reads it hold its name.
    names = 2 * (1 + bool(weight.layout.above)) * (len(f"{weight.name}_packed".encode()) + _MESSAGE)
    return weight.payload + names + _size(scratch)


def shared_bytes(bits: int) -> int:
    """Return an upper bound on the bytes that all weights of a width share."""
    scratch = edit.Builder(ModelProto(), _PREFIX)
    _tables(scratch, LAYOUTS[bits], np.arange(-_MOST_OFFSETS // 2, _MOST_OFFSETS // 2, dtype=np.int8))
    _starts(scratch, LAYOUTS[bits], np.zeros(0, np.uint8))
    return _size(scratch)


def _size(scratch: edit.Builder) -> int:
    """Return the bytes of a builder's nodes and initializers."""
    messages = [n.ByteSize() for n in scratch.nodes] + [t.ByteSize() for t in scratch.initializers]
    return int(sum(messages)) + _MESSAGE * len(messages)


def weights_of(view: GraphView) -> dict[str, int | None]:
    """Return the int8 constants that a DequantizeLinear reads, each with the axis of its scales or None."""
    given = {i.name for i in view.model.graph.input}
    found: dict[str, int | None] = {}
    for node in view.nodes:
        name = node.input[0] if node.op_type == "DequantizeLinear" and not node.domain else ""
        if name in found or name in given or view.elem_type(name) != TensorProto.INT8:
            continue
        if not view.is_constant(name) or 0 in view.constant_shape(name):
            continue
        scale, rank = view.shape(node.input[1]), len(view.constant_shape(name))
        per_channel = scale is not None and len(scale) == 1 and scale != (1,)
        found[name] = int_attribute(node, "axis", 1) % rank if per_channel and rank else None
    return found


def _chosen(name: str, values: NDArray[np.int8], axis: int | None) -> Packing | None:
    """Return the packing that takes the fewest bytes; None if int8 takes no more."""
    best, least = None, values.size
    for along in dict.fromkeys((None, axis)):
        bits = bitpacking.offsets(rows_of(values, along))[0]
        if bits in LAYOUTS:
            weight = Packing(name, values.shape, LAYOUTS[bits], along)
            size = packed_bytes(weight)
            if size < least:
                best, least = weight, size
    return best


def rows_of(values: NDArray[np.int8], axis: int | None) -> NDArray[np.int8]:
    """Return a weight as a matrix with one row per offset."""
    if axis is None:
        return values.reshape(1, -1)
    return np.moveaxis(values, axis, 0).reshape(values.shape[axis], -1)


class _Width:
    """Packs all weights of one width.

    Parameters
    ----------
    builder : Builder
    layout : Layout
    weights : sequence of Packing
    """

    def __init__(self, builder: edit.Builder, layout: Layout, weights: Sequence[Packing]) -> None:
        self._b, self._layout, self._weights = builder, layout, weights

    def write(self, view: GraphView) -> None:
        """Add initializers and nodes, with one weight in memory at a time."""
        planes, offsets = [], []
        for weight in self._weights:
            rows = rows_of(view.constant(weight.name), weight.axis)
            offsets.append(bitpacking.offsets(rows)[1])
            fields = rows.astype(np.int16) - offsets[-1][:, None]
            low, above = self._layout.pack(fields)
            planes.append((self._kept(low, weight), None if above is None else self._kept(above, weight)))
        distinct, places = np.unique(np.concatenate(offsets), return_inverse=True)
        tables = _tables(self._b, self._layout, distinct.astype(np.int8))
        ends = np.cumsum([0, *map(len, offsets)])
        shared = self._places(places, ends) if len(distinct) > 1 else [None] * len(self._weights)
        for weight, names, place in zip(self._weights, planes, shared, strict=True):
            _unfold(self._b, weight, names, place, tables)

    def _kept(self, plane: bitpacking.Bytes, weight: Packing) -> str:
        name = self._b.unique(f"{weight.name}_packed")
        self._b.keep(plane, name)
        return name

    def _places(self, places: NDArray[np.intp], ends: NDArray[np.int64]) -> list[str]:
        """Return for each weight a column with the first table row of each of its offsets."""
        b = self._b
        first = _starts(b, self._layout, places.astype(np.uint8))
        # OpenVINO does not fold Split.
        return [b.add("Slice", [first, _sizes(i), _sizes(j), _sizes(0)]) for i, j in pairwise(ends.tolist())]


def _unfold(
    b: edit.Builder,
    weight: Packing,
    planes: tuple[str, str | None],
    place: str | None,
    tables: tuple[str, str | None],
) -> None:
    """Add the nodes that unpack one weight.

    Parameters
    ----------
    b : Builder
    weight : Packing
    planes : tuple of (str, str or None)
        Names of the plane with the low bytes of the indices and of the plane with the bits above them.
    place : str or None
        Name of the first table row of each offset; None if the table has only one offset.
    tables : tuple of (str, str or None)
        See `_tables`.
    """
    layout, (low, above) = weight.layout, planes
    index = _as_int32(b, low)
    if above is not None and tables[1] is not None:
        parts = b.add("Gather", [tables[1], _as_int32(b, above)])
        index = b.add("Add", [index, b.add("Reshape", [parts, _sizes(weight.rows, -1)])])
    if place is not None:
        index = b.add("Add", [index, place])
    values = b.add("Gather", [tables[0], index])
    if layout.indices(weight.columns) * layout.group != weight.columns:
        padded = b.add("Reshape", [values, _sizes(weight.rows, -1)])
        values = b.add("Slice", [padded, _sizes(0), _sizes(weight.columns), _sizes(1)])
    if weight.axis:
        before, after = (
            math.prod(part) for part in (weight.shape[: weight.axis], weight.shape[weight.axis + 1 :])
        )
        moved = b.add("Reshape", [values, _sizes(weight.rows, before, after)])
        # OpenVINO would fuse a Transpose at the end into a MatMul, which would then run in float.
        values = b.add("Transpose", [moved], perm=[1, 0, 2])
    b.add("Reshape", [values, _sizes(*weight.shape)], weight.name)


def _tables(b: edit.Builder, layout: Layout, offsets: NDArray[np.int8]) -> tuple[str, str | None]:
    """Add the tables that all weights of a width share.

    Returns
    -------
    str
        int8 table of shape (offsets * layout.rows, layout.group): the values of each index, offset by offset.
    str or None
        int32 table of shape (256, layout.indices_at_once): the numbers that a byte of the second plane adds
        to its indices. None if there is no second plane.
    """
    fields = _fields(b, layout.rows, layout.bits, layout.group)
    shifts = _as_int32(b, b.constant(offsets.reshape(-1, 1, 1), "offset"))
    values = b.add("Cast", [b.add("Add", [fields, shifts])], to=TensorProto.INT8)
    table = b.add("Reshape", [values, _sizes(-1, layout.group)])
    if not layout.above:
        return table, None
    parts = _fields(b, 256, layout.above, layout.indices_at_once)
    return table, b.add("Mul", [parts, np.array(256, np.int32)])


def _starts(b: edit.Builder, layout: Layout, places: NDArray[np.uint8]) -> str:
    """Add a column with the first table row of the offsets with the given positions among all offsets."""
    # OpenVINO does not fold a product with a uint8 constant, which could be a weight and its scale.
    limits = [np.array(n, np.int32) for n in (0, _MOST_OFFSETS * layout.rows, layout.rows)]
    column = b.constant(places.reshape(-1, 1), "offsets")
    return b.add("Gather", [b.add("Range", limits), _as_int32(b, column)])


def _fields(b: edit.Builder, count: int, bits: int, group: int) -> str:
    """Add a table that splits each number below ``count`` into its bit fields, lowest bits first."""
    limits = [np.array(n, np.int32) for n in (0, count, 1)]
    numbers = b.add("Reshape", [b.add("Range", limits), _sizes(-1, 1)])
    shifted = b.add("Div", [numbers, np.array([2 ** (bits * k) for k in range(group)], np.int32)])
    return b.add("Mod", [shifted, np.array(2**bits, np.int32)])


def _as_int32(b: edit.Builder, name: str) -> str:
    return b.add("Cast", [name], to=TensorProto.INT32)


def _sizes(*values: int) -> NDArray[np.int64]:
    return np.array(values, np.int64)
