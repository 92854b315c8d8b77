"""Build the small models that are timed: regions in float and on integers, and conversions of tensors."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from onnx import (
    ModelProto,
    NodeProto,
    TensorProto,
    TypeProto,
    ValueInfoProto,
    helper,
    numpy_helper,
)

from eptq_onnx.execute.pieces import piece
from eptq_onnx.graph.view import GraphView
from eptq_onnx.probes import channel_block
from eptq_onnx.proto import store
from eptq_onnx.proto.bodies import node_reads, subgraphs
from eptq_onnx.runtime import LAYOUT_DOMAIN

_KINDS = (TensorProto.FLOAT, TensorProto.INT8, TensorProto.UINT8)
_SHOWN = 64
"""Largest integer constant, in values, whose content is part of a piece's key: shapes and axes."""
_SCALE = np.float32(1 / 64)


@dataclass(frozen=True)
class Piece:
    """A small model to be timed.

    Parameters
    ----------
    key : str
        Digest that does not depend on names and weights: pieces with the same key take the same time.
    model : ModelProto
        With fixed shapes.
    """

    key: str
    model: ModelProto


def float_piece(view: GraphView, names: Sequence[str]) -> Piece | None:
    """Return nodes of the float network as a piece; None if they cannot be cut out.

    That is the case if a shape is not fixed, or if a node has a body (If, Loop, Scan).

    Parameters
    ----------
    view : GraphView
        The network with fixed shapes.
    names : sequence of str
        Names of the nodes.
    """
    wanted = set(names)
    return _piece(view, [n for n in view.nodes if n.name in wanted])


def integer_piece(view: GraphView, names: Sequence[str]) -> Piece | None:
    """Return nodes of the written network and the quantizers around them as a piece; see `float_piece`.

    The piece goes from integers to integers. Absorbed nodes are missing, because the written network does not
    have them.
    """
    own = [n for n in view.nodes if n.name in set(names)]
    wanted = {n.name for n in own}
    for node in own:
        makers = [view.producer[i] for i in node_reads(node) if i in view.producer]
        wanted.update(m.name for m in makers if m.op_type == "DequantizeLinear")
        for reader in (r for o in node.output for r in view.consumers[o]):
            if reader.op_type == "QuantizeLinear":
                wanted.add(reader.name)
                wanted.update(
                    r.name
                    for r in view.consumers[reader.output[0]]
                    if r.op_type == "Clip" and not view.is_float(r.input[0])
                )
    return _piece(view, [n for n in view.nodes if n.name in wanted])


def _piece(view: GraphView, nodes: Sequence[NodeProto]) -> Piece | None:
    made = {o for n in nodes for o in n.output if o}
    names = {n.name for n in nodes}
    if any(subgraphs(n) for n in nodes):
        return None
    reads = dict.fromkeys(
        i for n in nodes for i in node_reads(n) if i and i not in made and not view.is_constant(i)
    )
    makes = [
        o
        for n in nodes
        for o in n.output
        if o
        and (
            o in view.outputs or not view.consumers[o] or any(r.name not in names for r in view.consumers[o])
        )
    ]
    types = {name: _type(view, name) for name in (*reads, *makes)}
    known = {name: kind for name, kind in types.items() if kind is not None}
    if len(known) < len(types) or not makes:
        return None
    model = piece(view, nodes, {n: known[n] for n in reads}, {n: known[n] for n in makes})
    return Piece(_key(model), model)


def _type(view: GraphView, name: str) -> TypeProto | None:
    shape, kind = view.static_shape(name), view.elem_type(name)
    if shape is None or not kind or 0 in shape:
        return None
    return helper.make_tensor_type_proto(kind, shape)


def _key(model: ModelProto) -> str:
    """Return a digest of opsets, operators, attributes, types, shapes and small integer constants."""
    graph, numbers = model.graph, dict[str, int]()

    def number(name: str) -> int:
        return numbers.setdefault(name, len(numbers)) if name else -1

    def info(value: ValueInfoProto) -> list[object]:
        return [number(value.name), _elem(value), _dims(value)]

    tree: list[object] = [info(v) for v in graph.input]
    for tensor in graph.initializer:
        small = tensor.data_type == TensorProto.INT64 and np.prod(tensor.dims) <= _SHOWN
        values = store.array(tensor).tolist() if small else []
        tree.append([number(tensor.name), tensor.data_type, list(tensor.dims), values])
    for node in graph.node:
        attributes = sorted(a.SerializeToString(deterministic=True).hex() for a in node.attribute)
        tree.append([node.domain, node.op_type, [number(i) for i in node.input],
                     [number(o) for o in node.output], attributes])  # fmt: skip
    tree.append([info(v) for v in graph.output])
    opsets = sorted([o.domain, o.version] for o in model.opset_import)
    return hashlib.sha256(json.dumps([opsets, tree]).encode()).hexdigest()[:24]


def between_convolutions(model: ModelProto, integers: bool) -> ModelProto | None:
    """Return a piece between convolutions, float or on integers; None unless all its ends have four axes.

    The runtime's optimized graph then shows whether the piece runs in the layout of the convolutions.
    """
    build = _Surrounding(model, integers)
    return build.model() if build.fits else None


class _Surrounding:
    def __init__(self, model: ModelProto, integers: bool) -> None:
        self._model, self._integers = model, integers
        self._ends = [v for v in (*model.graph.input, *model.graph.output) if _elem(v) in _KINDS]
        self.fits = all(len(_dims(v)) == 4 for v in self._ends) and (
            integers or all(_elem(v) == TensorProto.FLOAT for v in self._ends)
        )
        container = {_elem(v) for v in self._ends} - {TensorProto.FLOAT}
        self._container = container.pop() if container else TensorProto.UINT8
        self._nodes: list[NodeProto] = []
        self._constants: dict[str, TensorProto] = {}

    def model(self) -> ModelProto:
        ends = {v.name for v in self._ends}
        graph = self._model.graph
        inputs: list[ValueInfoProto] = []
        outputs: list[ValueInfoProto] = []
        for value in graph.input:
            if value.name in ends:
                inputs.append(self._before(value.name, _elem(value), _dims(value)))
            else:
                inputs.append(value)
        before, self._nodes = self._nodes, []
        for value in graph.output:
            if value.name in ends:
                outputs.append(self._behind(value.name, _elem(value), _dims(value)))
            else:
                outputs.append(value)
        behind, self._nodes = self._nodes, []
        whole = helper.make_graph(
            [*before, *graph.node, *behind], "between", inputs, outputs,
            [*graph.initializer, *self._constants.values()],
        )  # fmt: skip
        return helper.make_model(
            whole, opset_imports=self._model.opset_import, ir_version=self._model.ir_version
        )

    def _before(self, name: str, elem: int, dims: list[int]) -> ValueInfoProto:
        source = f"{name}/given"
        if not self._integers:
            self._convolution(source, name, dims)
            return helper.make_tensor_value_info(source, elem, dims)
        if elem != TensorProto.FLOAT:
            self._quantized_convolution(source, name, dims)
        else:
            self._quantized_convolution(source, f"{name}/integers", dims)
            self._add("DequantizeLinear", [f"{name}/integers", *self._grid()], name)
        return helper.make_tensor_value_info(source, self._container, dims)

    def _behind(self, name: str, elem: int, dims: list[int]) -> ValueInfoProto:
        end = f"{name}/taken"
        if not self._integers:
            self._convolution(name, end, dims)
            return helper.make_tensor_value_info(end, elem, dims)
        if elem == TensorProto.FLOAT:
            self._add("QuantizeLinear", [name, *self._grid()], f"{name}/integers")
            name = f"{name}/integers"
        self._quantized_convolution(name, end, dims)
        return helper.make_tensor_value_info(end, self._container, dims)

    def _convolution(self, source: str, end: str, dims: list[int]) -> None:
        channels = dims[1]
        weight = self._constant(f"between/weight{channels}", np.zeros((channels, channels, 1, 1), np.float32))
        self._add("Conv", [source, weight], end)

    def _quantized_convolution(self, source: str, end: str, dims: list[int]) -> None:
        channels = dims[1]
        stored = self._constant(f"between/integers{channels}", np.zeros((channels, channels, 1, 1), np.int8))
        scale = self._constant("between/scale", np.array(_SCALE))
        zero = self._constant("between/zero_weight", np.array(0, np.int8))
        self._add("DequantizeLinear", [stored, scale, zero], f"{end}/weight")
        self._add("DequantizeLinear", [source, *self._grid()], f"{end}/float_in")
        self._add("Conv", [f"{end}/float_in", f"{end}/weight"], f"{end}/float")
        self._add("QuantizeLinear", [f"{end}/float", *self._grid()], end)

    def _grid(self) -> list[str]:
        zero = np.array(0, helper.tensor_dtype_to_np_dtype(self._container))
        return [self._constant("between/scale", np.array(_SCALE)), self._constant("between/zero", zero)]

    def _constant(self, name: str, value: NDArray[Any]) -> str:
        self._constants.setdefault(name, numpy_helper.from_array(value, name))
        return name

    def _add(self, op_type: str, inputs: Sequence[str], output: str) -> None:
        self._nodes.append(helper.make_node(op_type, list(inputs), [output], name=f"{output}/{op_type}"))


def _elem(value: ValueInfoProto) -> int:
    return int(value.type.tensor_type.elem_type)


def _dims(value: ValueInfoProto) -> list[int]:
    return [int(d.dim_value) for d in value.type.tensor_type.shape.dim]


def conversions_piece(shape: tuple[int, ...], container: int, opset: int) -> Piece:
    """Return a piece with one node per conversion of a tensor, each named after its conversion.

    Parameters
    ----------
    shape : tuple of int
        Shape of the tensor; only tensors with four axes have layout changes.
    container : int
        ONNX type of the integers.
    opset : int
    """
    zero = np.array(0, helper.tensor_dtype_to_np_dtype(container))
    constants = [numpy_helper.from_array(np.array(_SCALE), "scale"), numpy_helper.from_array(zero, "zero")]
    nodes, inputs, outputs = [], [], []

    def add(name: str, op_type: str, source: tuple[int, Sequence[int]], end: tuple[int, Sequence[int]],
            **attributes: Any) -> None:  # fmt: skip
        grid = ["scale", "zero"] if "uantize" in op_type else []
        domain = str(attributes.pop("domain", ""))
        nodes.append(
            helper.make_node(
                op_type, [f"{name}/in", *grid], [f"{name}/out"], name=name, domain=domain, **attributes
            )
        )
        inputs.append(helper.make_tensor_value_info(f"{name}/in", *source))
        outputs.append(helper.make_tensor_value_info(f"{name}/out", *end))

    float_, last = TensorProto.FLOAT, shape
    add("quantize", "QuantizeLinear", (float_, shape), (container, shape))
    add("dequantize", "DequantizeLinear", (container, shape), (float_, shape))
    opsets = [helper.make_opsetid("", opset)]
    if len(shape) == 4:
        n, c, h, w = shape
        last = (n, h, w, c)
        for name, kind in (("float", float_), ("integers", container)):
            add(f"{name} to last", "Transpose", (kind, shape), (kind, last), perm=[0, 2, 3, 1])
            add(f"{name} from last", "Transpose", (kind, last), (kind, shape), perm=[0, 3, 1, 2])
        block = channel_block()
        if block:
            opsets.append(helper.make_opsetid(LAYOUT_DOMAIN, 1))
            blocked = (n, -(-c // block) * block, h, w)
            if c % 4 == 0:
                add(
                    "float to blocked",
                    "ReorderInput",
                    (float_, shape),
                    (float_, blocked),
                    domain=LAYOUT_DOMAIN,
                )
            add("float from blocked", "ReorderOutput", (float_, blocked), (float_, shape), channels=c,
                domain=LAYOUT_DOMAIN)  # fmt: skip
    graph = helper.make_graph(nodes, "conversions", inputs, outputs, constants)
    model = helper.make_model(graph, opset_imports=opsets, ir_version=8)
    return Piece(f"{helper.tensor_dtype_to_string(container)} {'x'.join(map(str, shape))}", model)
