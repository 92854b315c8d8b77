"""Which nodes of a model the nodes of onnxruntime's optimized graph stand for, and what they compute in.

onnxruntime says neither. Types follow from the operators' schemas. The nodes of the model are found by the
tensors: a fused node computes all that lies between its inputs and its output. Some rewrites rename these
(blocked layouts, transposes that moved); then the names of nodes tell, which contain the old names, or the
only operator of this kind that reads the same input.
"""

from __future__ import annotations

import re
from collections import defaultdict
from dataclasses import dataclass

import onnx
from onnx import GraphProto, NodeProto, TensorProto

from eptq_onnx.proto.bodies import all_nodes, node_reads
from eptq_onnx.runtimes.base import CONVERSIONS, Kernel

QUANTIZERS = frozenset({"QuantizeLinear", "DequantizeLinear"})
_LAYOUTS = frozenset({"ReorderInput", "ReorderOutput"})
_CARRIERS = QUANTIZERS | _LAYOUTS | {"Transpose", "Identity", "Cast"}
"""Operators behind which a renamed tensor is still the same."""

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
"""Float operators that onnxruntime's own operators implement; QLinearX, FusedX, NhwcX and QX implement X."""

FIRST = {"Where": 1, "QLinearWhere": 1, "QLinearConcat": 1}
"""Place of the first input that holds data, where that is not 0."""
_FLOAT_RESULT = {"MatMulIntegerToFloat": 3, "DequantizeLinear": 1}
"""Integer operators with a float result, and which input has its type."""
_INTEGER_INSIDE = {"DynamicQuantizeMatMul": "uint8"}
"""Operators that quantize their float input themselves, and the type that they compute in."""
_ADDED = re.compile(r"(_token_\d+|_nchwc|_nhwc|_bn|/duplicated|_out\d+|/\w+Fusion/?)+$")
"""What onnxruntime adds to names of nodes and tensors."""


def stands_for(kind: str) -> str:
    """Return the float operator that a kernel of onnxruntime implements."""
    return _KERNELS.get(kind) or _PREFIX.sub("", kind)


def kernels(model: GraphProto, optimized: GraphProto) -> tuple[Kernel, ...]:
    """Return what onnxruntime makes of a model.

    Parameters
    ----------
    model, optimized : GraphProto
        The graph as given, and as onnxruntime has optimized it.
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
    """What a node of the optimized graph stands for.

    Parameters
    ----------
    nodes : tuple of str
        Names of the model's nodes that it computes.
    border : str
        The float tensor of the model that it converts.
    moved : bool
        True for a Transpose that the model does not have, between two memory layouts.
    """

    nodes: tuple[str, ...] = ()
    border: str = ""
    moved: bool = False


def _around(graph: GraphProto) -> dict[int, tuple[str, ...]]:
    """Return for each quantizer, by its number among all nodes, the operators whose result it quantizes, or
    that read what it dequantizes."""
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
    """Element types of the tensors of an optimized graph, with numpy's names."""

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
    """Return numpy's name of a type that onnxruntime or ONNX calls by a name; empty if it is unknown."""
    return {"undefined": "", "float": "float32", "double": "float64"}.get(name, name)


class Origins:
    """The model's own graph, in which the nodes of an optimized graph are looked up."""

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
        """Return what each node stands for, in the order of `all_nodes`."""
        placed = _Placed(self, optimized)
        top = {id(node) for node in optimized.node}
        return [
            placed.origin(node)
            if id(node) in top
            else Origin((node.name,) if node.name in self._inner else ())
            for node in all_nodes(optimized)
        ]

    def named(self, name: str) -> tuple[tuple[str, ...], str]:
        """Return the node that a node of the runtime is called after, none if there is no such; for a
        quantizer, the float tensor that it converts."""
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
        """Return the tensor of the model that a node of the optimized graph computes, None if it is unknown.

        Parameters
        ----------
        node : NodeProto
        data : str or None
            The tensor of the model that its first input holds.
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
        """Return the tensor behind the sum and the activation that a convolution computes, too.

        Its name is from before they were fused.
        """
        if len(node.input) > 3 and node.input[3] and "Conv" in node.op_type and "Q" not in node.op_type:
            tensor = self._only_reader(tensor, "Add") or tensor
        activation = next((a.s.decode() for a in node.attribute if a.name == "activation"), "")
        return (self._only_reader(tensor, activation) if activation else None) or tensor

    def _only_reader(self, tensor: str, kind: str) -> str | None:
        readers = self._readers[tensor]
        return str(readers[0].output[0]) if [n.op_type for n in readers] == [kind] else None

    def _next(self, tensor: str, kind: str) -> list[NodeProto]:
        """Return the readers of a tensor of one kind, also behind operators that carry it."""
        near, waiting = [], [tensor]
        while waiting:
            for node in self._readers[waiting.pop()]:
                if node.op_type == kind:
                    near.append(node)
                elif node.op_type in _CARRIERS:
                    waiting.extend(node.output)
        return near

    def between(self, anchor: str, stops: set[str], whole: bool) -> tuple[str, ...]:
        """Return the names of the nodes that compute a tensor from others; unless ``whole``, only the
        last one."""
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
        """Return the float tensor in front of a tensor's quantizers."""
        while (maker := self._maker.get(tensor)) is not None and maker.op_type in QUANTIZERS:
            if maker.input[0] not in self._varying:
                break
            tensor = str(maker.input[0])
        return tensor


class _Placed:
    """An optimized graph, whose tensors have their places in the model."""

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
        """Return what a node stands for."""
        first = node.output[0]
        anchor = self._anchors.get(first)
        made = self._model.made(anchor) if anchor is not None else None
        if node.op_type == "Transpose" and (made is None or made.op_type != "Transpose"):
            return Origin(border=self._border(node), moved=True)
        if stands_for(node.op_type) in CONVERSIONS:
            return Origin(border=self._border(node))
        if anchor is None:
            # A part of what its reader computes.
            readers = self._readers[first]
            known = len(readers) == 1 and readers[0].output[0] in self._anchors
            return self.origin(readers[0]) if known else Origin()
        stops, whole = self._start(node)
        return Origin(self._model.between(anchor, (stops | self._ends) - {anchor}, whole))

    def _start(self, node: NodeProto) -> tuple[set[str], bool]:
        """Return the tensors of the model that a node reads, and whether these are all."""
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
