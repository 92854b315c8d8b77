"""Weights in blocks as onnxruntime's MatMulNBits or as DequantizeLinear, and tables with packed rows.

See `eptq_onnx.graph.blocks` for what these are made from.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray
from onnx import ModelProto, NodeProto, TensorProto, helper

from eptq_onnx.graph import blocks, edit
from eptq_onnx.graph.blocks import Found
from eptq_onnx.graph.view import GraphView, attribute, int_attribute
from eptq_onnx.proto import store

MICROSOFT = "com.microsoft"
MATMUL_NBITS = "MatMulNBits"
_TYPES = {
    (2, True): "int2", (2, False): "uint2", (4, True): "int4", (4, False): "uint4", (8, True): "int8",
    (8, False): "uint8",
}  # fmt: skip
"""(width, signed) to the ONNX type."""


@dataclass
class _Change:
    """What becomes of a model: other nodes in place of some, other constants."""

    model: ModelProto
    view: GraphView
    b: edit.Builder
    instead: dict[str, list[NodeProto]] = field(default_factory=dict)
    """Node to those that stand in its place."""
    dropped: set[str] = field(default_factory=set)
    """Constants that are replaced by others of the same name."""

    @classmethod
    def of(cls, model: ModelProto) -> _Change:
        return cls(model, GraphView(model), edit.Builder(model))

    def put(self, node: NodeProto) -> None:
        """Put the nodes that were added since the last call in the place of one."""
        self.instead[node.name] = self.b.nodes
        self.b.nodes = []

    def keep(self, value: NDArray[np.generic], name: str, kind: str | None = None) -> None:
        """Replace a constant."""
        self.dropped.add(name)
        self.b.keep(value, name, kind)

    def done(self) -> ModelProto:
        """Return the changed model."""
        if not self.instead:
            return self.model
        nodes = [n for old in self.model.graph.node for n in self.instead.get(old.name, [old])]
        result = edit.with_nodes(self.model, nodes, self.b.initializers, drop=self.dropped)
        edit.prune(result)
        return result


def matmul_nbits(model: ModelProto, widths: Collection[int], accuracy_level: int) -> ModelProto:
    """Turn matrix products with weights in blocks into onnxruntime's operator MatMulNBits.

    ``MatMul(x, W)``  →  ``MatMulNBits(x, bytes, scales[, zero points])``; ``Gemm``  →  the same, and an Add
    of its bias. Lookups in the same constants read the packed rows.

    Parameters
    ----------
    model : ModelProto
        It is not changed.
    widths : collection of int
        Those that the runtime has; weights of others stay as they are.
    accuracy_level : int
        See `eptq_onnx.targets.rows.BlockRules`.
    """
    change = _Change.of(model)
    view = change.view
    by_constant: dict[str, list[Found]] = defaultdict(list)
    for one in blocks.found(view):
        by_constant[one.blocks.integers].append(one)
    for name, every in by_constant.items():
        own = every[0].blocks
        bits, shape = blocks.width_of(view, own), view.constant_shape(name)
        readers = _products(view, every)
        lookups = [one for one in every if one.rows is not None]
        ranks = [view.shape(one.rows) for one in lookups if one.rows is not None]
        if readers is None or None in ranks or bits not in widths or len(shape) != 2:
            continue
        size = blocks.size_of(view, own)
        content = _bytes(_padded(view.constant(name), size), bits)
        change.keep(content.reshape(shape[0], -1, size * bits // 8), name)
        flat = -1 if not lookups else None
        scale = view.constant(own.scale)
        change.keep(scale.reshape(-1) if flat else scale, own.scale)
        if own.zero is not None:
            points = _bytes(view.constant(own.zero), bits)
            change.keep(points.reshape(-1) if flat else points, own.zero)
        of_weight: dict[str, Any] = {"K": shape[1], "N": shape[0], "bits": bits, "block_size": size}
        constants = [name, own.scale, *([own.zero] if own.zero is not None else [])]
        for node in readers:
            x, bias = node.input[0], node.input[2] if len(node.input) > 2 else ""
            made = change.b.unique(f"{node.output[0]}_product") if bias else node.output[0]
            change.b.add(
                MATMUL_NBITS,
                [x, *constants],
                made,
                domain=MICROSOFT,
                accuracy_level=accuracy_level,
                **of_weight,
            )
            if bias:
                change.b.add("Add", [made, bias], node.output[0])
            change.b.nodes[-1].name = node.name
            change.put(node)
        for one in lookups:
            _looked_up(change, one, bits, content.shape[1] * 8 // bits)
    result = change.done()
    if result is not model:
        edit.import_domain(result, MICROSOFT)
    return result


def dequantized(model: ModelProto, widths: Collection[int]) -> ModelProto:
    """Turn weights in blocks into DequantizeLinear with blocks, as onnxruntime fuses them into MatMulNBits.

    ``Mul(Sub(Cast(X: int8), …), …)``  →  ``DequantizeLinear(X: int4, scale, zero point, block_size)``, with
    the terms in front of the outputs. A Gemm that reads the weight transposed reads it plain.

    Parameters
    ----------
    model : ModelProto
        Its opset must have the types; it is not changed.
    widths : collection of int
        Widths of the types that the runtime supports, 2, 4 or 8.
    """
    change = _Change.of(model)
    view = change.view
    for one in blocks.found(view):
        bits = next((w for w in sorted(widths) if blocks.width_of(view, one.blocks) <= w), None)
        turned = [n for n in view.consumers[one.output] if n.op_type == "Transpose"]
        gemms = [n for n in view.consumers[one.output] if n.op_type == "Gemm"]
        if (
            one.rows is not None
            or bits is None
            or len(turned) + len(gemms) != len(view.consumers[one.output])
        ):
            continue
        if not turned and not gemms:
            continue
        _dequantize(change, one, bits, [*turned, *gemms])
    return change.done()


def _dequantize(change: _Change, one: Found, bits: int, readers: list[NodeProto]) -> None:
    """Add a DequantizeLinear of the transposed weight, for the nodes that transpose it or read it so."""
    view, own = change.view, one.blocks
    signed = own.zero is None
    shift = 0 if signed else 2 ** (bits - 1)
    kind = _TYPES[bits, signed]

    def stored(name: str) -> str:
        values = np.swapaxes(view.constant(name).astype(np.int16) + shift, -1, -2)
        new = change.b.unique(f"{name}_{kind}")
        tensor = _tensor(new, values, bits, kind)
        change.b.initializers.append(store.stored(tensor, store.folder_of(change.model)))
        return new

    scale = change.b.unique(f"{own.scale}_blocks")
    change.b.keep(np.ascontiguousarray(np.swapaxes(view.constant(own.scale), -1, -2)), scale)
    inputs = [stored(own.integers), scale, *([stored(own.zero)] if own.zero is not None else [])]
    rank = len(view.constant_shape(own.integers))
    name = next((n.output[0] for n in readers if n.op_type == "Transpose"), None)
    size = blocks.size_of(view, own)
    made = change.b.add("DequantizeLinear", inputs, name, axis=rank - 2, block_size=size)
    for node in readers:
        if node.op_type == "Gemm":
            copy = edit.renamed(node, {one.output: made})
            kept = [a for a in copy.attribute if a.name != "transB"]
            del copy.attribute[:]
            copy.attribute.extend(kept)
            change.b.nodes.append(copy)
        elif node.output[0] != made:
            change.b.nodes.append(helper.make_node("Identity", [made], [node.output[0]], name=node.name))
        change.put(node)


def as_floats(model: ModelProto) -> ModelProto:
    """Return a copy in which each MatMulNBits is a MatMul with a float weight; the model itself without any.

    MatMulNBits(x, W) → MatMul(x, (W - z) s), with W of shape (N, blocks, bytes) unpacked and turned.
    """
    change = _Change.of(model)
    for node in change.view.nodes:
        inputs = [*node.input, "", "", "", "", ""][:6]
        plain = not inputs[4] and all(change.view.is_constant(i) for i in inputs[1:4] if i)
        if node.op_type != MATMUL_NBITS or not plain:
            continue
        columns, terms = int_attribute(node, "N", 0), int_attribute(node, "K", 0)
        bits, size = int_attribute(node, "bits", 4), int_attribute(node, "block_size", 32)
        scale = change.view.constant(inputs[2]).astype(np.float32).reshape(columns, -1, 1)
        count = scale.shape[1]
        values = _unpacked(change.view.constant(inputs[1]).reshape(columns, -1), bits)
        zero: NDArray[Any] = np.full((columns, count, 1), 2 ** (bits - 1), np.float32)
        if inputs[3]:
            given = change.view.constant(inputs[3])
            packed = given.dtype == np.uint8
            rows = _unpacked(given.reshape(columns, -1), bits) if packed else given.reshape(columns, -1)
            zero = rows[:, :count, None].astype(np.float32)
        floats = (values[:, : count * size].reshape(columns, count, size) - zero) * scale
        weight = np.ascontiguousarray(floats.reshape(columns, -1)[:, :terms].T, np.float32)
        name = change.b.unique(f"{inputs[1]}/float")
        change.b.keep(weight, name)
        result = change.b.unique(f"{node.output[0]}/product") if inputs[5] else node.output[0]
        change.b.nodes.append(helper.make_node("MatMul", [inputs[0], name], [result], name=node.name))
        if inputs[5]:
            change.b.add("Add", [result, inputs[5]], node.output[0])
        change.put(node)
    return change.done()


def _unpacked(values: NDArray[np.generic], bits: int) -> NDArray[np.float32]:
    """Return the values in bytes along the last axis, the lowest bits first."""
    each = (values[..., None].astype(np.uint8) >> np.arange(0, 8, bits, dtype=np.uint8)) & (2**bits - 1)
    return np.asarray(each.reshape(*values.shape[:-1], -1), np.float32)


def products(model: ModelProto) -> int:
    """Return how many products are MatMulNBits, or what onnxruntime makes MatMulNBits of."""
    blocked = {n.output[0] for n in model.graph.node if int_attribute(n, "block_size", 0)}
    return sum(
        n.op_type == MATMUL_NBITS or (n.op_type in ("Gemm", "MatMul") and n.input[1] in blocked)
        for n in model.graph.node
    )


def packed_tables(model: ModelProto) -> ModelProto:
    """Pack the rows of tables in blocks of at most 4 bits; what is looked up is unpacked by a table of bytes.

    ``Gather(X: int8, rows)``  →  ``Gather(values of a byte, Cast(Gather(bytes, rows)))``. Tables that layers
    read, too, and those whose indices have an unknown rank, stay as they are.
    """
    change = _Change.of(model)
    view = change.view
    by_constant: dict[str, list[Found]] = defaultdict(list)
    for one in blocks.found(view):
        by_constant[one.blocks.integers].append(one)
    for name, every in by_constant.items():
        bits = next((w for w in (2, 4) if blocks.width_of(view, every[0].blocks) <= w), None)
        known = all(one.rows is not None and view.shape(one.rows) is not None for one in every)
        if bits is None or not known or len(view.constant_shape(name)) != 2:
            continue
        content = _bytes(view.constant(name), bits)
        change.keep(content, name)
        for one in every:
            _looked_up(change, one, bits, content.shape[1] * 8 // bits, zeros=False)
    return change.done()


def _looked_up(change: _Change, one: Found, bits: int, columns: int, *, zeros: bool = True) -> None:
    """Put the nodes that look packed rows up in the place of those that make floats of rows.

    Parameters
    ----------
    change : _Change
    one : Found
        With rows.
    bits : int
    columns : int
        Values of a packed row, padding included.
    zeros : bool
        True if zero points are packed, too.
    """
    view, own = change.view, one.blocks
    terms, count = view.constant_shape(own.integers)[1], view.constant_shape(own.scale)[1]
    _unpack(change, one.cast, own.integers, one.rows or "", (bits, columns, terms))
    if zeros and own.zero is not None and one.zero_cast is not None:
        per = 8 // bits
        _unpack(change, one.zero_cast, own.zero, one.rows or "", (bits, -(-count // per) * per, count))


def _unpack(change: _Change, cast: NodeProto, name: str, rows: str, sizes: tuple[int, int, int]) -> None:
    """Replace a Cast of rows by nodes that unpack them; ``sizes``: bits, values in a packed row, terms."""
    bits, columns, terms = sizes
    b, rank = change.b, len(change.view.shape(rows) or ())
    fields = (np.arange(256)[:, None] >> (bits * np.arange(8 // bits))) & (2**bits - 1)
    table = b.constant((fields - 2 ** (bits - 1)).astype(np.float32), "fields")
    index = b.add("Cast", [b.add("Gather", [name, rows], axis=0)], to=TensorProto.INT32)
    values = b.add("Gather", [table, index], axis=0)
    flat = b.add("Reshape", [values, np.array([0] * rank + [columns], np.int64)])
    if columns != terms:
        ends = [np.array([n], np.int64) for n in (0, terms, -1)]
        flat = b.add("Slice", [flat, *ends])
    b.nodes[-1].output[0] = cast.output[0]
    change.put(cast)


def _products(view: GraphView, every: list[Found]) -> list[NodeProto] | None:
    """Return the products that read a weight; None if anything else reads it, or they do more."""
    found = []
    for one in every:
        for node in view.consumers[one.output] if one.rows is None else ():
            if node.op_type == "Gemm" and int_attribute(node, "transB", 0):
                found.append(node)
            elif node.op_type == "Transpose" and node.output[0] not in view.outputs:
                readers = view.consumers[node.output[0]]
                if not all(_reads_plain(n, node.output[0]) for n in readers):
                    return None
                found += readers
            else:
                return None
    return found if found and all(map(_is_product, found)) else None


def _reads_plain(node: NodeProto, weight: str) -> bool:
    """Return True for a product whose weight has the shape (terms, outputs)."""
    plain = node.op_type == "Gemm" and not int_attribute(node, "transB", 0)
    return (plain or node.op_type == "MatMul") and list(node.input).index(weight) == 1


def _is_product(node: NodeProto) -> bool:
    """Return True for a product without factors."""
    factors = [float(attribute(node, name, 1.0)) for name in ("alpha", "beta")]  # type: ignore[arg-type]
    return factors == [1.0, 1.0] and not int_attribute(node, "transA", 0)


def _padded(values: NDArray[np.int8], size: int) -> NDArray[np.int8]:
    """Return rows with zeros up to a whole number of blocks."""
    return np.pad(values, [(0, 0), (0, -values.shape[1] % size)])


def _bytes(values: NDArray[np.int8], bits: int) -> NDArray[np.uint8]:
    """Return rows of centred integers as bytes, the first in the low bits; short bytes have zeros above."""
    codes = (values.astype(np.int16) + 2 ** (bits - 1)).astype(np.uint8)
    per = 8 // bits
    codes = np.pad(codes, [(0, 0), (0, -codes.shape[1] % per)])
    parts = codes.reshape(len(codes), -1, per)
    result = np.zeros(parts.shape[:2], np.uint8)
    for k in range(per):
        result |= parts[:, :, k] << np.uint8(bits * k)
    return result


def _tensor(name: str, values: NDArray[np.int16], bits: int, kind: str) -> TensorProto:
    """Return an initializer, with values below 8 bits packed, the first in the low bits."""
    fields = (values.reshape(1, -1) & (2**bits - 1)).astype(np.uint8)
    shifted = fields.astype(np.int16) - 2 ** (bits - 1)
    content = fields if bits == 8 else _bytes(shifted.astype(np.int8), bits)
    return TensorProto(
        name=name,
        data_type=TensorProto.DataType.Value(kind.upper()),
        dims=values.shape,
        raw_data=content.tobytes(),
    )
