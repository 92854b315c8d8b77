"""Add quantizers, and what makes floats of stored integers, to a graph."""

from __future__ import annotations

import numpy as np
from onnx import NodeProto, TensorProto, helper

from eptq_onnx.graph import blocks
from eptq_onnx.graph.blocks import Blocks
from eptq_onnx.graph.edit import Builder
from eptq_onnx.numerics.formats import IntFormat, PerAxis, PerBlock
from eptq_onnx.numerics.grid import Grid
from eptq_onnx.numerics.types import Array, Values


def scale_names(b: Builder, stem: str, grid: Grid) -> tuple[str, str]:
    """Add the scale and the zero point of a grid; return their names."""
    form = grid.format
    zero = form.raw(np.full(np.shape(grid.scale), grid.zero_point, form.container))
    return b.constant(np.asarray(grid.scale, np.float32), f"{stem}_scale"), b.constant(
        zero, f"{stem}_zero_point", form.type_name
    )


def add_pair(
    b: Builder,
    source: str,
    scale: tuple[str, str],
    stem: str,
    result: str | None = None,
    limits: IntFormat | None = None,
) -> str:
    """Add a pair of nodes; return the tensor with the dequantized values.

    Parameters
    ----------
    b : Builder
    source : str
        The tensor to quantize.
    scale : tuple of str
        See `scale_names`.
    stem : str
        What names of new tensors begin with.
    result : str, optional
        Name of the dequantized values.
    limits : IntFormat, optional
        Integers that are clipped to, where their type holds more.
    """
    q = b.add("QuantizeLinear", [source, *scale], b.unique(f"{stem}_quantized"))
    if limits is not None:
        ends = [b.constant(np.array(v, limits.container), "limit") for v in (limits.qmin, limits.qmax)]
        q = b.add("Clip", [q, *ends], b.unique(f"{stem}_clipped"))
    return b.add("DequantizeLinear", [q, *scale], result or b.unique(f"{stem}_dequantized"))


def add_widened(b: Builder, source: str, grid: Grid, stem: str) -> str:
    """Add a pair of 16 bits on which all values of a grid lie; return the tensor behind it."""
    return add_pair(b, source, scale_names(b, f"{stem}_wide", grid.widened()), f"{stem}_wide")


def add_floats(b: Builder, stored: tuple[str, int], tensor: str, grid: Grid, name: str) -> None:
    """Add the nodes that turn a constant's integers into floats; their zero points are 0.

    Without the step over int32, OpenVINO takes them for a compressed weight, and quantizes the activations
    that a MatMul multiplies by it.

    Parameters
    ----------
    b : Builder
    stored : tuple of str and int
        The integers, and their rank.
    tensor : str
        The constant.
    grid : Grid
    name : str
        Name of the floats.
    """
    integers, rank = stored
    shape = [1] * rank if np.ndim(grid.scale) else []
    if isinstance(grid.granularity, PerAxis):
        shape[grid.granularity.axis] = -1
    scale = b.constant(np.asarray(grid.scale, np.float32).reshape(shape), f"{tensor}_scale")
    wide = b.add("Cast", [integers], to=TensorProto.INT32)
    b.add("Mul", [b.add("Cast", [wide], to=TensorProto.FLOAT), scale], name)


def add_blocks(b: Builder, tensor: str, values: Values, grid: Grid) -> Blocks:
    """Add the constants of a weight or table in blocks."""
    assert isinstance(grid.granularity, PerBlock)
    assert isinstance(grid.format, IntFormat)
    axis, size = grid.granularity.axis, grid.granularity.size
    middle = 0 if grid.format.signed else 2 ** (grid.format.bits - 1)
    zero = np.broadcast_to(np.asarray(grid.zero_point, np.int16), grid.scale.shape)
    rows = [np.moveaxis(v, axis, -1) for v in (values, zero)]
    integers, points = ((v.astype(np.int16) - middle).astype(np.int8) for v in rows)
    scale: Array = np.ascontiguousarray(np.moveaxis(grid.scale, axis, -1))
    return blocks.added(b, tensor, (integers, scale, points), size)


def as_limits(b: Builder, clip: NodeProto) -> list[NodeProto]:
    """Return Max and Min in place of a Clip; the last one has its name and its output.

    onnxruntime drops a Clip in front of a quantizer; 1.19 fails if the Clip reads an input of the network.
    """
    ends = zip(("Max", "Min"), clip.input[1:], strict=False)
    limits = [(op, limit) for op, limit in ends if limit]
    nodes, source = list[NodeProto](), clip.input[0]
    for k, (op, limit) in enumerate(limits):
        last = k == len(limits) - 1
        result = clip.output[0] if last else b.unique(f"{clip.output[0]}_{op}")
        nodes.append(
            helper.make_node(op, [source, limit], [result], name=clip.name if last else f"{result}/{op}")
        )
        source = result
    return nodes or [clip]
