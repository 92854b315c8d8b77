"""Pack weights of 2 to 6 bits into bytes, with nodes that unpack them when a session is created.

All inputs of the added nodes are constants, so a runtime folds them before it looks for integer kernels:

    X, Y, ... (int8)  →  X, Y, ... = Split(Transpose(Reshape(Gather(table, index))))
                         index = Cast(bytes) [+ bits beyond the byte] [+ first table row of the offset]

A row of the table holds the weights that one index encodes, plus an offset: integers with a folded zero point
can lie anywhere in int8. All weights of the same width share the table. The nodes are standard operators of
opset 13, on types for which onnxruntime (1.18 to 1.32, web too) and OpenVINO (2026.4) have kernels: neither
can add int8, and BitShift gives wrong values in OpenVINO. Folding a table takes less memory than dividing
every weight in int32, because an index encodes several weights. Weights of one shape are unpacked together,
because onnxruntime copies every input of a node that it folds.
"""

from __future__ import annotations

from collections import defaultdict

import numpy as np
from numpy.typing import NDArray
from onnx import ModelProto, TensorProto

from eptq_onnx.graph import edit
from eptq_onnx.graph.unfolding import PREFIX, Chunk, Content, Packing, unfold, worthwhile
from eptq_onnx.graph.view import GraphView, int_attribute, opset_of
from eptq_onnx.numerics import bitpacking
from eptq_onnx.numerics.bitpacking import LAYOUTS, Bytes

_OLDEST_OPSET = 13


def packed(model: ModelProto) -> ModelProto:
    """Return a copy in which weights of 2 to 6 bits are packed into the bytes that their bits need.

    Weights are the int8 constants of two or more axes that a DequantizeLinear of the main graph reads. The
    range of their integers gives the bits that they need; each channel has its own offset. The unpacked
    integers are the same, under the same name. A weight stays as it is if the nodes that unpack it take more
    bytes than packing saves.

    Parameters
    ----------
    model : ModelProto
        It is not changed. It is returned as it is below opset 13, or if nothing is packed.
    """
    view = GraphView(model)
    by_width: dict[int, list[Packing]] = defaultdict(list)
    offsets: dict[str, NDArray[np.int16]] = {}
    for name, axis in weights_of(view).items() if opset_of(model) >= _OLDEST_OPSET else ():
        found = as_packing(name, view.constant(name), axis)
        if found is not None:
            by_width[found[0].bits].append(found[0])
            offsets[name] = found[1]
    builder, replaced = edit.Builder(model, PREFIX), set[str]()
    for bits in sorted(by_width):
        every = np.unique(np.concatenate([offsets[w.name] for w in by_width[bits]]))
        chunks = worthwhile(by_width[bits], len(every) > 1)
        if chunks:
            unfold(builder, chunks, _content(view, chunks, offsets))
            replaced |= {w.name for chunk in chunks for w in chunk}
    if not replaced:
        return model
    return edit.with_nodes(model, [*builder.nodes, *model.graph.node], builder.initializers, drop=replaced)


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


def rows_of(values: NDArray[np.int8], axis: int | None) -> NDArray[np.int8]:
    """Return a weight as a matrix with one row per scale."""
    if axis is None:
        return values.reshape(1, -1)
    return np.moveaxis(values, axis, 0).reshape(values.shape[axis], -1)


def as_packing(
    name: str, values: NDArray[np.int8], axis: int | None
) -> tuple[Packing, NDArray[np.int16]] | None:
    """Return how a weight can be packed, and the offset of each row; None if it needs too many bits.

    All rows have the same offset where that is enough.
    """
    if values.ndim < 2:
        return None
    rows = rows_of(values, axis or 0)
    (bits, common), (least, own) = bitpacking.offsets(rows.reshape(1, -1)), bitpacking.offsets(rows)
    packing = Packing(name, values.shape, least, axis or 0)
    if least not in LAYOUTS:
        return None
    return packing, np.repeat(common, len(rows)) if bits == least else own


def _content(view: GraphView, chunks: list[Chunk], offsets: dict[str, NDArray[np.int16]]) -> Content:
    """Return the values of weights, which are read one chunk at a time."""

    def planes(chunk: Chunk) -> tuple[Bytes, Bytes | None]:
        parts = [rows_of(view.constant(w.name), w.axis) - offsets[w.name][:, None] for w in chunk]
        return chunk[0].layout.pack(np.concatenate(parts))

    of_rows = np.concatenate([offsets[w.name] for chunk in chunks for w in chunk])
    distinct, places = np.unique(of_rows, return_inverse=True)
    return Content(distinct.astype(np.int8), places.astype(np.uint8), planes)
