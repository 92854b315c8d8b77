"""Nodes that unpack packed weights of one width.

Weights that differ only in the number of their channels are unpacked together and cut apart at the end, so
that a runtime has few nodes to fold. See `eptq_onnx.graph.packing`.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from onnx import TensorProto

from eptq_onnx.graph import edit
from eptq_onnx.graph.message_sizes import Tally, tensor_bytes
from eptq_onnx.numerics.bitpacking import LAYOUTS, Bytes, Layout

PREFIX = "unfold/"
"""Prefix of new names, kept short because names take bytes too."""
_TOGETHER = 2**20
"""Values above which no more weights join, as an index of each pair is in memory."""
_CUT = 12
"""Bytes of an output of the node that cuts weights apart, without the weight's name."""


@dataclass(frozen=True)
class Packing:
    """One weight to pack.

    Parameters
    ----------
    name : str
    shape : tuple of int
        At least two sizes.
    bits : int
    axis : int
        Axis whose indices may have different offsets.
    """

    name: str
    shape: tuple[int, ...]
    bits: int
    axis: int

    @property
    def layout(self) -> Layout:
        """Return how its values are arranged in bytes."""
        return LAYOUTS[self.bits]

    @property
    def rows(self) -> int:
        """Return the number of offsets."""
        return self.shape[self.axis]

    @property
    def columns(self) -> int:
        """Return the number of values with one offset."""
        return math.prod(self.around[0]) * math.prod(self.around[1])

    @property
    def around(self) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Return the sizes of the axes before and behind the axis of the offsets."""
        return self.shape[: self.axis], self.shape[self.axis + 1 :]

    @property
    def as_int8(self) -> int:
        """Return the bytes that the weight takes in int8."""
        bare = TensorProto(name=self.name, data_type=TensorProto.INT8, dims=self.shape)
        return tensor_bytes(bare, math.prod(self.shape))


Chunk = Sequence[Packing]
"""Weights that are unpacked together: their shapes differ only in the size of the axis of the offsets."""


@dataclass(frozen=True)
class Content:
    """The values of all weights of one width.

    Parameters
    ----------
    offsets : ndarray of int8, shape (n_offsets,)
        Distinct offsets.
    places : ndarray of uint8, shape (n_rows,)
        Which offset each channel has, weight after weight.
    planes : callable
        Returns the bytes of a chunk: both planes of `Layout.pack`, with one row per channel.
    """

    offsets: NDArray[np.int8]
    places: NDArray[np.uint8]
    planes: Callable[[Chunk], tuple[Bytes, Bytes | None]]


def own_bytes(weight: Packing, with_offset: bool) -> int:
    """Return about the bytes of a weight that is unpacked together with others: its values and its cut."""
    payload = weight.rows * (weight.layout.row_bytes(weight.columns) + with_offset)
    return payload + _CUT + len(weight.name.encode())


def worthwhile(weights: Iterable[Packing], with_offsets: bool) -> list[Chunk]:
    """Return the weights of one width that take fewer bytes packed, in the chunks that are unpacked together.

    Parameters
    ----------
    weights : iterable of Packing
        All of one width.
    with_offsets : bool
        True if offsets differ.
    """
    groups: defaultdict[tuple[object, ...], list[list[Packing]]] = defaultdict(lambda: [[]])
    for weight in weights:
        if own_bytes(weight, with_offsets) < weight.as_int8:
            group = groups[weight.axis, weight.around]
            if sum(w.rows for w in group[-1]) * weight.columns >= _TOGETHER:
                group.append([])
            group[-1].append(weight)
    every: list[Chunk] = [chunk for group in groups.values() for chunk in group]
    chunks = [c for c in every if _chunk_bytes(c, with_offsets) < _as_int8([c])]
    tally = Tally(PREFIX)
    if chunks:
        unfold(tally, chunks, _blank(chunks, with_offsets))
    return chunks if tally.bytes < _as_int8(chunks) else []


def bytes_saved(weights: Sequence[Packing], with_offsets: Mapping[int, bool]) -> int:
    """Return the bytes that packing saves.

    Parameters
    ----------
    weights : sequence of Packing
        Of several widths, in the order in which they are packed.
    with_offsets : mapping of int to bool
        Width to whether the offsets of its weights differ.
    """
    tally, saved = Tally(PREFIX), 0
    for bits, differ in sorted(with_offsets.items()):
        chunks = worthwhile([w for w in weights if w.bits == bits], differ)
        if chunks:
            unfold(tally, chunks, _blank(chunks, differ))
            saved += _as_int8(chunks)
    return saved - tally.bytes


def unfold(b: edit.Builder, chunks: Sequence[Chunk], content: Content) -> None:
    """Add the bytes of all weights of one width, and the nodes that unpack them."""
    layout = chunks[0][0].layout
    counts = [sum(w.rows for w in chunk) for chunk in chunks]
    tables = _tables(b, layout, content.offsets, sum(counts))
    starts: Sequence[str | None] = [None] * len(chunks)
    if len(content.offsets) > 1:
        column = _starts(b, layout, content.places)
        starts = [column]
        if len(chunks) > 1:
            parts = [b.unique(f"{PREFIX}v") for _ in chunks]
            b.add("Split", [column, _sizes(*counts)], outputs=parts, axis=0)
            starts = parts
    for chunk, start in zip(chunks, starts, strict=True):
        low, above = content.planes(chunk)
        names = _kept(b, low, "bytes"), None if above is None else _kept(b, above, "bytes")
        _unfold_chunk(b, chunk, names, start, tables)


def _unfold_chunk(
    b: edit.Builder,
    chunk: Chunk,
    planes: tuple[str, str | None],
    start: str | None,
    tables: tuple[str, str | None],
) -> None:
    """Add the nodes that unpack the weights of a chunk.

    Parameters
    ----------
    b : Builder
    chunk : Chunk
    planes : tuple of (str, str or None)
        Names of the plane with the low bytes of the indices and of the plane with the bits above them.
    start : str or None
        Name of the first table row of each channel; None if the table has only one offset.
    tables : tuple of (str, str or None)
        See `_tables`.
    """
    one, (low, above) = chunk[0], planes
    layout, columns, (before, after) = one.layout, one.columns, one.around
    rows = sum(w.rows for w in chunk)
    index = _as_int32(b, low)
    if above is not None and tables[1] is not None:
        parts = _add(b, "Gather", [tables[1], _as_int32(b, above)])
        index = _add(b, "Add", [index, _add(b, "Reshape", [parts, _sizes(rows, -1)])])
    if start is not None:
        index = _add(b, "Add", [index, start])
    values = _add(b, "Gather", [tables[0], index])
    if layout.indices(columns) * layout.group != columns:
        padded = _add(b, "Reshape", [values, _sizes(rows, -1)])
        values = _add(b, "Slice", [padded, _sizes(0), _sizes(columns), _sizes(1)])
    if math.prod(before) > 1:
        moved = _add(b, "Reshape", [values, _sizes(rows, math.prod(before), math.prod(after))])
        # OpenVINO would fuse a Transpose at the end into a MatMul, which would then run in float.
        values = _add(b, "Transpose", [moved], perm=[1, 0, 2])
    whole = _sizes(*before, rows, *after)
    if len(chunk) == 1:
        b.add("Reshape", [values, whole], one.name)
        return
    joined = _add(b, "Reshape", [values, whole])
    names = [weight.name for weight in chunk]
    b.add("Split", [joined, _sizes(*(w.rows for w in chunk))], outputs=names, axis=one.axis)


def _tables(b: edit.Builder, layout: Layout, offsets: NDArray[np.int8], rows: int) -> tuple[str, str | None]:
    """Add the tables that all weights of a width share.

    Returns
    -------
    str
        int8 table of shape (n_offsets * layout.rows, layout.group): the values of each index, offset by
        offset.
    str or None
        int32 table of shape (256, layout.indices_at_once): the numbers that a byte of the second plane adds
        to its indices. None if there is no second plane.
    """
    fields = _fields(b, layout.rows, layout.bits, layout.group)
    # The file has room for all offsets that there could be, so that its size does not depend on values.
    room = min(rows, 2**8 - 2**layout.bits + 1) if len(offsets) > 1 else 1
    held = np.zeros((room, 1, 1), np.int8)
    held[: len(offsets), 0, 0] = offsets
    shifts = _as_int32(b, _kept(b, held, "offsets"))
    if room > 1:
        end = _kept(b, _sizes(len(offsets)), "count")
        shifts = _add(b, "Slice", [shifts, _sizes(0), end, _sizes(0)])
    values = _add(b, "Cast", [_add(b, "Add", [fields, shifts])], to=TensorProto.INT8)
    table = _add(b, "Reshape", [values, _sizes(-1, layout.group)])
    if not layout.above:
        return table, None
    parts = _fields(b, 256, layout.above, layout.indices_at_once)
    return table, _add(b, "Mul", [parts, np.array(256, np.int32)])


def _starts(b: edit.Builder, layout: Layout, places: NDArray[np.uint8]) -> str:
    """Add a column with the first table row of the offsets with the given positions among all offsets."""
    # OpenVINO does not fold a product with a uint8 constant, which could be a weight and its scale.
    limits = [np.array(n, np.int32) for n in (0, 256 * layout.rows, layout.rows)]
    column = _kept(b, places.reshape(-1, 1), "places")
    return _add(b, "Gather", [_add(b, "Range", limits), _as_int32(b, column)])


def _fields(b: edit.Builder, count: int, bits: int, group: int) -> str:
    """Add a table that splits each number below ``count`` into its bit fields, lowest bits first."""
    limits = [np.array(n, np.int32) for n in (0, count, 1)]
    numbers = _add(b, "Reshape", [_add(b, "Range", limits), _sizes(-1, 1)])
    shifted = _add(b, "Div", [numbers, np.array([2 ** (bits * k) for k in range(group)], np.int32)])
    return _add(b, "Mod", [shifted, np.array(2**bits, np.int32)])


def _chunk_bytes(chunk: Chunk, with_offsets: bool) -> int:
    """Return the bytes of a chunk and its nodes, without the tables that all chunks share."""
    tally = Tally(PREFIX)
    low, above = _blank([chunk], with_offsets).planes(chunk)
    names = _kept(tally, low, "bytes"), None if above is None else _kept(tally, above, "bytes")
    start = None
    if with_offsets:
        start = tally.unique(f"{PREFIX}v")
    _unfold_chunk(tally, chunk, names, start, ("table", "above"))
    return tally.bytes + with_offsets * sum(w.rows for w in chunk)


def _blank(chunks: Sequence[Chunk], with_offsets: bool) -> Content:
    """Return a content that takes as many bytes as the true one."""
    rows = sum(w.rows for chunk in chunks for w in chunk)

    def planes(chunk: Chunk) -> tuple[Bytes, Bytes | None]:
        layout, count = chunk[0].layout, sum(w.rows for w in chunk)
        indices = layout.indices(chunk[0].columns)
        low = np.broadcast_to(np.uint8(0), (count, indices))
        if not layout.above:
            return low, None
        return low, np.broadcast_to(np.uint8(0), (count, indices // layout.indices_at_once))

    return Content(np.zeros(1 + with_offsets, np.int8), np.zeros(rows, np.uint8), planes)


def _as_int8(chunks: Iterable[Chunk]) -> int:
    return sum(w.as_int8 for chunk in chunks for w in chunk)


def _add(
    b: edit.Builder, op_type: str, inputs: Sequence[str | NDArray[np.generic]], **attributes: Any
) -> str:
    """Add a node with short names."""
    return b.add(op_type, inputs, b.unique(f"{PREFIX}v"), **attributes)


def _kept(b: edit.Builder, value: NDArray[np.generic], stem: str) -> str:
    name = b.unique(f"{PREFIX}{stem}")
    b.keep(value, name)
    return name


def _as_int32(b: edit.Builder, name: str) -> str:
    return _add(b, "Cast", [name], to=TensorProto.INT32)


def _sizes(*values: int) -> NDArray[np.int64]:
    return np.array(values, np.int64)
