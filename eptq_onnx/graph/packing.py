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
from onnx import ModelProto, NodeProto, TensorProto

from eptq_onnx.graph import blocks, edit
from eptq_onnx.graph.unfolding import PREFIX, Chunk, Content, Packing, unfold, worthwhile
from eptq_onnx.graph.view import GraphView, int_attribute, opset_of
from eptq_onnx.numerics import bitpacking
from eptq_onnx.numerics.bitpacking import LAYOUTS, Bytes

_OLDEST_OPSET = 13


def packed(model: ModelProto) -> ModelProto:
    """Return a copy in which weights of 2 to 6 bits are packed into the bytes that their bits need.

    Weights are the int8 constants of two or more axes that the main graph turns into floats; see
    `weights_of`. The range of their integers gives the bits that they need; each channel has its own offset.
    The unpacked integers are the same, under the same name. A weight stays as it is if the nodes that unpack
    it take more bytes than packing saves.

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
    """Return the int8 constants that are turned into floats, each with the axis of its scales or None.

    A DequantizeLinear or a MatMulInteger reads those of layers on integers; the others go through Casts and
    Mul. Those in blocks, and their zero points, lie in rows.
    """
    given = {i.name for i in view.model.graph.input}
    whole = [one.blocks for one in blocks.found(view) if one.rows is None]
    found: dict[str, int | None] = {n: 0 for own in whole for n in (own.integers, own.zero) if n is not None}
    places = {"DequantizeLinear": 0, "Cast": 0, "MatMulInteger": 1}
    for node in view.nodes:
        name = node.input[places[node.op_type]] if node.op_type in places and not node.domain else ""
        if name in found or name in given or view.elem_type(name) != TensorProto.INT8:
            continue
        if not view.is_constant(name) or 0 in view.constant_shape(name):
            continue
        rank = len(view.constant_shape(name))
        if node.op_type == "MatMulInteger":
            found[name] = rank - 1
            continue
        if node.op_type == "Cast":
            scales = scales_of(node, view)
            if scales is not None:
                shape = view.constant_shape(scales)
                found[name] = next((k for k, size in enumerate(shape, rank - len(shape)) if size > 1), None)
            continue
        scale = view.shape(node.input[1])
        per_channel = scale is not None and len(scale) == 1 and scale != (1,)
        found[name] = int_attribute(node, "axis", 1) % rank if per_channel and rank else None
    return found


def scales_of(cast: NodeProto, view: GraphView) -> str | None:
    """Return the constant scales by which the only reader of a Cast multiplies its result, or None.

    There may be other Casts between. The scales have one axis with more than one scale, at most, and no more
    axes than the integers.
    """
    tensor = cast.output[0]
    while len(readers := view.consumers[tensor]) == 1 and readers[0].op_type == "Cast":
        tensor = readers[0].output[0]
    if len(readers) != 1 or readers[0].op_type != "Mul" or tensor in view.outputs:
        return None
    other = [i for i in readers[0].input if i != tensor]
    integers = view.shape(cast.input[0])
    if len(other) != 1 or not view.is_constant(other[0]) or not view.is_float(other[0]) or integers is None:
        return None
    shape = view.constant_shape(other[0])
    sizes = integers[len(integers) - len(shape) :]
    fits = len(shape) <= len(integers) and all(a in (1, b) for a, b in zip(shape, sizes, strict=True))
    return other[0] if fits and sum(size > 1 for size in shape) <= 1 else None


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
