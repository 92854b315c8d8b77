"""Tensors with a scale and a zero point for each block of terms: how they are written and found.

A weight is written as rows, one for each output, with its blocks along the last axis. Nodes make floats of
it, which runtimes fold when they load the model, and turn the rows into the layout that its layers read:

    W = [Transpose](Mul(Sub(Cast(integers), zeros), scales))
        scales = Gather(scale, places, axis=-1)
        zeros = Gather(Cast(zero point), places, axis=-1)

with ``places`` the block of each term. Integers and zero points are int8, and centred: a 4-bit weight has -8
to 7. A lookup in a table in blocks is the same with a Gather of rows in front of each constant.

`eptq_onnx.graph.storing` turns these into what a runtime reads best.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from onnx import NodeProto, TensorProto

from eptq_onnx.graph import edit
from eptq_onnx.graph.view import GraphView, int_attribute


@dataclass(frozen=True)
class Blocks:
    """The constants of a tensor in blocks.

    Parameters
    ----------
    integers : str
        int8, of shape (..., n_rows, n_terms).
    scale : str
        float32, of shape (..., n_rows, n_blocks).
    zero : str or None
        int8, of the scale's shape; None if all zero points are 0.
    places : str
        int32, of shape (n_terms,).
    """

    integers: str
    scale: str
    zero: str | None
    places: str


@dataclass(frozen=True)
class Found:
    """A tensor in blocks that a model reads, or rows of one.

    Parameters
    ----------
    blocks : Blocks
    output : str
        The tensor that holds the floats.
    cast : NodeProto
        The node that makes floats of the integers.
    rows : str or None
        The tensor that says which rows; None for all.
    zero_cast : NodeProto or None
        The node that makes floats of the zero points.
    """

    blocks: Blocks
    output: str
    cast: NodeProto
    rows: str | None
    zero_cast: NodeProto | None


def added(
    b: edit.Builder,
    stem: str,
    values: tuple[NDArray[np.int8], NDArray[np.float32], NDArray[np.int8]],
    size: int,
) -> Blocks:
    """Add the constants of a tensor in blocks of ``size`` terms.

    Parameters
    ----------
    b : Builder
    stem : str
        What their names begin with.
    values : tuple of ndarray
        Integers, scales and zero points, laid out as `Blocks` says.
    size : int
    """
    integers, scale, zero = values
    names = [b.unique(f"{stem}_{end}") for end in ("quantized", "scale")]
    b.keep(integers, names[0])
    b.keep(scale, names[1])
    points = None
    if zero.any():
        points = b.unique(f"{stem}_zero_point")
        b.keep(zero, points)
    places = b.constant((np.arange(integers.shape[-1]) // size).astype(np.int32), "blocks")
    return Blocks(names[0], names[1], points, places)


def as_floats(b: edit.Builder, blocks: Blocks, output: str | None = None, rows: str | None = None) -> str:
    """Add the nodes that make floats of a tensor in blocks, or of some of its rows; return the result.

    Without the step over int32, OpenVINO takes a constant for a compressed weight, and quantizes activations.
    """

    def chosen(name: str) -> str:
        return name if rows is None else b.add("Gather", [name, rows], axis=0)

    def cast(name: str) -> str:
        own = chosen(name)
        wide = own if rows is not None else b.add("Cast", [own], to=TensorProto.INT32)
        return b.add("Cast", [wide], to=TensorProto.FLOAT)

    values = cast(blocks.integers)
    if blocks.zero is not None:
        zeros = b.add("Gather", [cast(blocks.zero), blocks.places], axis=-1)
        values = b.add("Sub", [values, zeros])
    scales = b.add("Gather", [chosen(blocks.scale), blocks.places], axis=-1)
    return b.add("Mul", [values, scales], output)


def found(view: GraphView) -> list[Found]:
    """Return all tensors in blocks that a model reads, whole or by rows."""
    return [one for node in view.nodes if node.op_type == "Mul" and (one := _read(view, node)) is not None]


def scales(view: GraphView) -> list[str]:
    """Return the scales of all tensors in blocks, whatever holds their integers."""
    spread = [view.producer.get(n.input[1]) for n in view.nodes if n.op_type == "Mul"]
    own = [_constant(view, n.input[0])[0] for n in spread if n is not None and _is_spread(view, n)]
    return [name for name in own if name is not None and view.is_float(name)]


def _is_spread(view: GraphView, node: NodeProto) -> bool:
    """Return True for a Gather that gives every term the number of its block."""
    return _is_gather(node, -1) and view.elem_type(node.input[1]) == TensorProto.INT32


def _read(view: GraphView, mul: NodeProto) -> Found | None:
    """Return the tensor in blocks whose floats a Mul makes, or None."""
    spread = view.producer.get(mul.input[1])
    if spread is None or not _is_spread(view, spread) or not view.is_constant(spread.input[1]):
        return None
    places = spread.input[1]
    scale, rows = _constant(view, spread.input[0])
    node = view.producer.get(mul.input[0])
    zero, zero_cast = None, None
    if node is not None and node.op_type == "Sub":
        points = view.producer.get(node.input[1])
        if points is None or not _is_gather(points, -1) or points.input[1] != places:
            return None
        zero, zero_cast, own = _cast(view, view.producer.get(points.input[0]))
        if zero is None or own != rows:
            return None
        node = view.producer.get(node.input[0])
    integers, cast, own = _cast(view, node)
    if scale is None or integers is None or cast is None or own != rows:
        return None
    if view.elem_type(integers) != TensorProto.INT8 or view.constant_shape(places) != (
        view.constant_shape(integers)[-1],
    ):
        return None
    return Found(Blocks(integers, scale, zero, places), mul.output[0], cast, rows, zero_cast)


def _is_gather(node: NodeProto, axis: int) -> bool:
    return node.op_type == "Gather" and int_attribute(node, "axis", 0) == axis


def _constant(view: GraphView, tensor: str) -> tuple[str | None, str | None]:
    """Return the constant that a tensor is, or that its rows come from, and which rows."""
    node = view.producer.get(tensor)
    if node is not None and _is_gather(node, 0) and view.is_constant(node.input[0]):
        return node.input[0], node.input[1]
    return (tensor if view.is_constant(tensor) else None), None


def _cast(view: GraphView, node: NodeProto | None) -> tuple[str | None, NodeProto | None, str | None]:
    """Return the constant that one or two Casts turn into floats, the last of them, and which rows."""
    last, first = node, node
    if node is not None and node.op_type == "Cast":
        before = view.producer.get(node.input[0])
        first = before if before is not None and before.op_type == "Cast" else node
    if first is None or first.op_type != "Cast":
        return None, None, None
    name, rows = _constant(view, first.input[0])
    return name, last, rows


def size_of(view: GraphView, blocks: Blocks) -> int:
    """Return the terms of a block; of a single one, the next power of two that holds all, at least 16."""
    places = view.constant(blocks.places)
    if places[-1]:
        return int(np.argmax(places == 1))
    return max(16, 1 << (len(places) - 1).bit_length())


def width_of(view: GraphView, blocks: Blocks) -> int:
    """Return the bits that hold the integers and the zero points, 2 to 8."""
    names = [blocks.integers, *([blocks.zero] if blocks.zero is not None else [])]
    reach = max(max(int(v.max(initial=0)), -1 - int(v.min(initial=0))) for v in map(view.constant, names))
    return max(2, 1 + reach.bit_length())
