"""Map the nodes of onnxruntime's optimized graph to the model's nodes, and find their precision.

onnxruntime reports neither. Types follow from the operators' schemas. The model's nodes are found by tensor
names: a fused node computes everything between its inputs and its output. Some rewrites rename tensors
(blocked layouts, transposes that moved). Then a node is found by its own name, which contains the old one,
or as the only operator of its kind that reads the same input.
"""

from __future__ import annotations

import re
from collections import defaultdict
from dataclasses import dataclass

import onnx
from onnx import GraphProto, NodeProto, TensorProto

from eptq_onnx.graph.view import QUANTIZERS
from eptq_onnx.proto.bodies import all_nodes, node_reads
from eptq_onnx.runtimes.base import CONVERSIONS, Kernel

_LAYOUTS = frozenset({"ReorderInput", "ReorderOutput"})
_CARRIERS = _LAYOUTS | {*QUANTIZERS} | {"Transpose", "Identity", "Cast"}
"""Operators that only convert or permute a tensor, so that their output is the same tensor renamed."""

_PREFIX = re.compile(r"^(QLinear|Fused|Nhwc|Q(?=[A-Z]))")
_KERNELS = {
    "ConvInteger": "Conv",
    "ConvIntegerToFloat": "Conv",
    "NhwcFusedConv": "Conv",
    "MatMulInteger": "MatMul",
    "MatMulIntegerToFloat": "MatMul",
    "DynamicQuantizeMatMul": "MatMul",
    "MatMulNBits": "MatMul",
    "ReorderInput": "layout",
    "ReorderOutput": "layout",
}
"""onnxruntime's own operators to the float operators that they implement.

QLinearX, FusedX, NhwcX and QX implement X.
"""

FIRST = {"Where": 1, "QLinearWhere": 1, "QLinearConcat": 1}
"""Index of the first input that holds data, if it is not 0."""
_FLOAT_RESULT = {"MatMulIntegerToFloat": 3, "DequantizeLinear": 1}
"""Integer operators with a float result, to the index of the input that has the type of the result."""
_INTEGER_INSIDE = {"DynamicQuantizeMatMul": "uint8"}
"""Operators that quantize their float input themselves, to the type of their computation."""
_ADDED = re.compile(r"(_token_\d+|_nchwc|_nhwc|_bn|/duplicated|_out\d+|/\w+Fusion/?)+$")
"""Suffixes that onnxruntime adds to names of nodes and tensors."""


def stands_for(kind: str) -> str:
    """Return the float operator that a kernel of onnxruntime implements."""
    return _KERNELS.get(kind) or _PREFIX.sub("", kind)


def kernels(model: GraphProto, optimized: GraphProto) -> tuple[Kernel, ...]:
    """Return the kernels that onnxruntime runs for a model.

    Parameters
    ----------
    model, optimized : GraphProto
        The original graph, and the graph that onnxruntime optimized.
    """
    types, origins, around = _Types(optimized), Origins(model).of(optimized), _around(optimized)
    found = []
    for k, node in enumerate(all_nodes(optimized)):
        own = origins[k]
        operator = "layout" if own.moved else stands_for(node.op_type)
        found.append(
            Kernel(
                node.name, node.op_type, operator, types.of(node), own.nodes, own.border, around=around.get(k)
            )
        )
    return tuple(found)


@dataclass(frozen=True)
class Origin:
    """What a node of the optimized graph computes, in terms of the model.

    Parameters
    ----------
    nodes : tuple of str
        Names of the model's nodes that it computes.
    border : str
        The float tensor of the model that it converts.
    moved : bool
        True for a Transpose that onnxruntime added to change the memory layout.
    """

    nodes: tuple[str, ...] = ()
    border: str = ""
    moved: bool = False


def _around(graph: GraphProto) -> dict[int, tuple[str, ...]]:
    """Return for each quantizer, by its index among all nodes, the operators around it.

    These are the producers of a QuantizeLinear's input, or the readers of a DequantizeLinear's output.
    """
    nodes = list(all_nodes(graph))
    makers = {o: n for n in nodes for o in n.output}
    readers: dict[str, list[NodeProto]] = defaultdict(list)
    for node in nodes:
        for name in node.input:
            readers[name].append(node)
    found = {}
    for k, node in enumerate(nodes):
        if node.op_type in QUANTIZERS:
            inner = (
                readers[node.output[0]]
                if node.op_type == "DequantizeLinear"
                else [makers[i] for i in node.input[:1] if i in makers]
            )
            found[k] = tuple(sorted({stands_for(n.op_type) for n in inner if n.op_type not in QUANTIZERS}))
    return found


class _Types:
    """Element types of the tensors of an optimized graph, by numpy's names."""

    def __init__(self, graph: GraphProto) -> None:
        self._known: dict[str, str] = {}
        self._add(graph)

    def of(self, node: NodeProto) -> str:
        """Return the type that a node computes in; empty if it is unknown."""
        return _INTEGER_INSIDE.get(node.op_type) or self._data(node)

    def _add(self, graph: GraphProto) -> None:
        for value in (*graph.input, *graph.value_info):
            self._known[value.name] = _type_name(value.type.tensor_type.elem_type)
        for tensor in graph.initializer:
            self._known[tensor.name] = _type_name(tensor.data_type)
        for node in graph.node:
            for inner in (a.g for a in node.attribute if a.type == onnx.AttributeProto.GRAPH):
                self._add(inner)
            for k, name in enumerate(node.output):
                if name and not self._known.get(name):
                    self._known[name] = self._result(node, k)

    def _data(self, node: NodeProto) -> str:
        place = FIRST.get(node.op_type, 0)
        return self._known.get(node.input[place], "") if place < len(node.input) else ""

    def _input(self, node: NodeProto, place: int) -> str:
        return self._known.get(node.input[place], "") if place < len(node.input) else ""

    def _result(self, node: NodeProto, place: int) -> str:
        for attribute in node.attribute:
            if attribute.name in ("to", "dtype", "output_dtype") and attribute.i:
                return _type_name(attribute.i)
            if attribute.name == "value" and attribute.type == onnx.AttributeProto.TENSOR:
                return _type_name(attribute.t.data_type)
        if node.op_type in _FLOAT_RESULT:
            return self._input(node, _FLOAT_RESULT[node.op_type])
        if node.op_type == "QGemm":
            return self._input(node, 8) or self._input(node, 1)
        if node.op_type == "QuantizeLinear":
            return self._input(node, 2) or "uint8"
        return self._by_schema(node, place) or self._data(node)

    def _by_schema(self, node: NodeProto, place: int) -> str:
        if node.domain not in ("", "ai.onnx") or not onnx.defs.has(node.op_type):
            return ""
        schema = onnx.defs.get_schema(node.op_type)
        if not schema.outputs:
            return ""
        kind = schema.outputs[min(place, len(schema.outputs) - 1)].type_str
        if kind.startswith("tensor("):
            return _type_name(TensorProto.DataType.Value(kind[7:-1].upper()))
        same = [k for k, given in enumerate(schema.inputs) if given.type_str == kind]
        return self._input(node, same[0]) if same else ""


def _type_name(elem_type: int) -> str:
    return type_name(str(TensorProto.DataType.Name(elem_type)).lower())


def type_name(name: str) -> str:
    """Return numpy's name of a type, given its name in onnxruntime or ONNX; empty if it is unknown."""
    return {"undefined": "", "float": "float32", "double": "float64"}.get(name, name)


class Origins:
    """The original graph, in which the nodes of an optimized graph are looked up."""

    def __init__(self, graph: GraphProto) -> None:
        nodes = list(graph.node)
        self._maker = {name: node for node in nodes for name in node.output if name}
        self._named = {node.name: node for node in nodes if node.name}
        self._inner = {node.name for node in all_nodes(graph) if node.name}
        self._readers: dict[str, list[NodeProto]] = defaultdict(list)
        given = {i.name for i in graph.input} - {t.name for t in graph.initializer}
        self._varying = set(given)
        for node in nodes:
            reads = node_reads(node)
            for name in reads:
                self._readers[name].append(node)
            if any(name in self._varying for name in reads):
                self._varying.update(node.output)

    def of(self, optimized: GraphProto) -> list[Origin]:
        """Return the origin of each node, in the order of `all_nodes`."""
        placed = _Placed(self, optimized)
        top = {id(node) for node in optimized.node}
        return [
            placed.origin(node)
            if id(node) in top
            else Origin((node.name,) if node.name in self._inner else ())
            for node in all_nodes(optimized)
        ]

    def named(self, name: str) -> tuple[tuple[str, ...], str]:
        """Return the model's node that a runtime node is named after, and the tensor that it converts.

        The tuple is empty if there is no such node or if it is a quantizer. The tensor is the float tensor of
        a quantizer, and empty otherwise.
        """
        plain = _ADDED.sub("", name)
        node = self._named.get(name) or self._named.get(plain) or self._maker.get(plain)
        if node is None:
            return (name,) if name in self._inner else (), ""
        if node.op_type in QUANTIZERS:
            return (), self.dequantized(str(node.output[0]))
        return (node.name,) if node.name else (), ""

    def made(self, tensor: str) -> NodeProto | None:
        """Return the node that computes a tensor; None for inputs and weights."""
        return self._maker.get(tensor)

    def anchor(self, node: NodeProto, data: str | None) -> str | None:
        """Return the model's tensor that a node of the optimized graph computes; None if unknown.

        Parameters
        ----------
        node : NodeProto
        data : str or None
            The model's tensor that its first data input holds.
        """
        for output in node.output:
            if output in self._maker:
                return str(output)
        for name in (node.name, *node.output):
            plain = _ADDED.sub("", name)
            if plain in self._named and self._named[plain].output:
                return self._ahead(str(self._named[plain].output[0]), node)
            if plain in self._maker:
                return self._ahead(plain, node)
        if node.op_type in _CARRIERS or data is None:
            return None
        near = self._next(data, stands_for(node.op_type))
        return str(near[0].output[0]) if len(near) == 1 else None

    def _ahead(self, tensor: str, node: NodeProto) -> str:
        """Return the output of a convolution including the sum and the activation fused into it.

        The node still has the name that the convolution had before the fusion.
        """
        if len(node.input) > 3 and node.input[3] and "Conv" in node.op_type and "Q" not in node.op_type:
            tensor = self._only_reader(tensor, "Add") or tensor
        activation = next((a.s.decode() for a in node.attribute if a.name == "activation"), "")
        return (self._only_reader(tensor, activation) if activation else None) or tensor

    def _only_reader(self, tensor: str, kind: str) -> str | None:
        readers = self._readers[tensor]
        return str(readers[0].output[0]) if [n.op_type for n in readers] == [kind] else None

    def _next(self, tensor: str, kind: str) -> list[NodeProto]:
        """Return the readers of a tensor with one operator, also through operators that only pass it on."""
        near, waiting = [], [tensor]
        while waiting:
            for node in self._readers[waiting.pop()]:
                if node.op_type == kind:
                    near.append(node)
                elif node.op_type in _CARRIERS:
                    waiting.extend(node.output)
        return near

    def between(self, anchor: str, stops: set[str], whole: bool) -> tuple[str, ...]:
        """Return the names of the nodes that compute ``anchor`` from the tensors in ``stops``.

        Unless ``whole``, only the last of them is returned.
        """
        names: list[str] = []
        waiting, seen = [anchor], set()
        while waiting:
            maker = self._maker.get(waiting.pop())
            if maker is None or id(maker) in seen:
                continue
            seen.add(id(maker))
            if maker.op_type not in QUANTIZERS and maker.name:
                names.append(maker.name)
                if not whole:
                    break
            waiting.extend(n for n in node_reads(maker) if n in self._varying and n not in stops)
        return tuple(names[::-1])

    def dequantized(self, tensor: str) -> str:
        """Return the float tensor before a tensor's quantizers."""
        while (maker := self._maker.get(tensor)) is not None and maker.op_type in QUANTIZERS:
            if maker.input[0] not in self._varying:
                break
            tensor = str(maker.input[0])
        return tensor


class _Placed:
    """An optimized graph whose tensors are mapped to those of the model."""

    def __init__(self, model: Origins, graph: GraphProto) -> None:
        self._model = model
        self._place = {i.name: i.name for i in graph.input}
        """Tensor of the optimized graph to the tensor of the model whose values it holds."""
        self._anchors: dict[str, str] = {}
        self._maker = {name: node for node in graph.node for name in node.output if name}
        self._readers: dict[str, list[NodeProto]] = defaultdict(list)
        for node in graph.node:
            self._add(node)
        self._constant = {*(t.name for t in graph.initializer), ""}
        self._ends = set(self._place.values())

    def _add(self, node: NodeProto) -> None:
        for name in node.input:
            self._readers[name].append(node)
        data = FIRST.get(node.op_type, 0)
        given = self._place.get(node.input[data]) if data < len(node.input) else None
        anchor = self._model.anchor(node, given)
        if anchor is not None:
            self._anchors[node.output[0]] = anchor
        elif node.op_type in _CARRIERS:
            anchor = given
        for k, output in enumerate(node.output):
            if self._model.made(output) is not None:
                self._place[output] = output
            elif anchor is not None and k == 0:
                self._place[output] = anchor

    def origin(self, node: NodeProto) -> Origin:
        """Return the origin of a node."""
        first = node.output[0]
        anchor = self._anchors.get(first)
        made = self._model.made(anchor) if anchor is not None else None
        if node.op_type == "Transpose" and (made is None or made.op_type != "Transpose"):
            return Origin(border=self._border(node), moved=True)
        if stands_for(node.op_type) in CONVERSIONS:
            return Origin(border=self._border(node))
        if anchor is None:
            # The node is part of the operator that its reader computes.
            readers = self._readers[first]
            known = len(readers) == 1 and readers[0].output[0] in self._anchors
            return self.origin(readers[0]) if known else Origin()
        stops, whole = self._start(node)
        return Origin(self._model.between(anchor, (stops | self._ends) - {anchor}, whole))

    def _start(self, node: NodeProto) -> tuple[set[str], bool]:
        """Return the model's tensors that a node reads, and whether all of its inputs are known."""
        stops, whole = set(), True
        for name in node.input:
            if name in self._place:
                stops.add(self._place[name])
            elif name not in self._constant:
                maker = self._maker.get(name)
                inner, known = self._start(maker) if maker is not None else (set(), False)
                stops, whole = stops | inner, whole and known
        return stops, whole

    def _border(self, node: NodeProto) -> str:
        """Return the float tensor that a node converts; empty if it is unknown."""
        sides = [node.output[0], node.input[0]]
        places = [
            self._place[side]
            for side in (sides if node.op_type == "DequantizeLinear" else sides[::-1])
            if side in self._place
        ]
        return self._model.dequantized(places[0]) if places else ""
