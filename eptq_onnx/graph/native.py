"""Store weights of up to 4 bits in ONNX's own types, for runtimes that support them."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray
from onnx import ModelProto, TensorProto

from eptq_onnx.graph import edit
from eptq_onnx.graph.packing import rows_of, weights_of
from eptq_onnx.graph.view import GraphView
from eptq_onnx.numerics.bitpacking import LAYOUTS
from eptq_onnx.proto import store

_TYPES = {
    (4, True): TensorProto.INT4,
    (4, False): TensorProto.UINT4,
    (2, True): TensorProto.INT2,
    (2, False): TensorProto.UINT2,
}
"""(width, signed) to the ONNX type."""


def native(model: ModelProto, widths: Sequence[int]) -> tuple[ModelProto, list[str]]:
    """Store weights in ONNX types of the given widths.

    ``DequantizeLinear(X: int8, scale, 0)``  →  ``DequantizeLinear(X: int4, scale, 0: int4)``, or uint4 with a
    zero point per channel if the integers need one.

    Parameters
    ----------
    model : ModelProto
        Its opset must have the types; it is not changed.
    widths : sequence of int
        Widths of the types that the runtime supports, 2 or 4.

    Returns
    -------
    ModelProto
    list of str
        Weights of at most 6 bits that stay int8, because no type holds their integers and zero points, or
        because float layers read them.
    """
    view, builder = GraphView(model), edit.Builder(model)
    zeros: dict[str, str] = {}
    replaced: list[TensorProto] = []
    left: list[str] = []
    for name, axis in weights_of(view).items():
        rows = rows_of(view.constant(name), axis).astype(np.int16)
        found = next((f for w in sorted(widths) if (f := _fitting(rows, w)) is not None), None)
        # Not all versions of onnxruntime can cast types below 8 bits.
        if found is None or any(
            n.op_type != "DequantizeLinear" or list(n.input).index(name) for n in view.consumers[name]
        ):
            if int((rows.max(axis=1) - rows.min(axis=1)).max()).bit_length() <= max(LAYOUTS):
                # Weights of 7 bits are 8-bit weights that avoid saturation.
                left.append(name)
            continue
        width, zero = found
        signed = zero is None
        points = np.zeros(len(rows), np.int16) if zero is None else zero
        along = [1] * len(view.constant_shape(name))
        if axis is not None:
            along[axis] = len(points)
        values = view.constant(name).astype(np.int16) + points.reshape(along)
        replaced.append(_tensor(name, values, width, signed))
        for node in view.consumers[name]:
            shape = view.constant_shape(node.input[1])
            zeros[node.name] = builder.unique(f"{name}_zero_point")
            points_there = np.broadcast_to(points.reshape(-1 if shape else ()), shape)
            replaced.append(_tensor(zeros[node.name], points_there, width, signed))
    nodes = []
    for node in model.graph.node:
        copy = edit.renamed(node, {})
        if node.name in zeros:
            copy.input[:] = [*node.input[:2], zeros[node.name]]
        nodes.append(copy)
    folder = store.folder_of(model)
    result = edit.with_nodes(
        model, nodes, [store.stored(t, folder) for t in replaced], drop=[t.name for t in replaced]
    )
    edit.prune(result)
    return result, left


def _fitting(rows: NDArray[np.int16], width: int) -> tuple[int, NDArray[np.int16] | None] | None:
    """Return the width and the zero points (None for the signed type); None if the integers do not fit."""
    half, whole = 2 ** (width - 1), 2**width
    least, most = rows.min(axis=1), rows.max(axis=1)
    if least.min() >= -half and most.max() < half:
        return width, None
    # Zero points of an unsigned type are not negative, so the range of the values must include 0.
    low = np.maximum(most - np.int16(whole - 1), np.int16(1 - whole))
    high = np.minimum(least, 0)
    return (width, -high) if bool((low <= high).all()) else None


def _tensor(name: str, values: NDArray[np.int16], width: int, signed: bool) -> TensorProto:
    """Return an initializer of a type below 8 bits, the first value in the low bits of a byte."""
    fields = (values & (2**width - 1)).astype(np.uint8).reshape(1, -1)
    content, _ = LAYOUTS[width].pack(fields)
    length = -(-math.prod(values.shape) * width // 8)
    return TensorProto(
        name=name,
        data_type=_TYPES[width, signed],
        dims=values.shape,
        raw_data=content.reshape(-1)[:length].tobytes(),
    )
