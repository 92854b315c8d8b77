"""Names of nodes: one for each node of a model, and those that runtimes give to what they compute."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass

import onnx
from onnx import GraphProto, ModelProto

from eptq_onnx.proto.bodies import all_names, all_nodes
from eptq_onnx.runtimes.base import Model, graph_of

_QUANTIZERS = frozenset({"QuantizeLinear", "DequantizeLinear"})
_ADDED = re.compile(r"(/WithoutBiases|_\d+)$")
"""What OpenVINO adds to names."""


@dataclass(frozen=True)
class Found:
    """What some names stand for.

    Parameters
    ----------
    nodes : tuple of str
        Names of nodes other than quantizers.
    quantizers : tuple of str
        Operators of the quantizers among them.
    border : str
        The tensor that the last of these quantizes or makes; empty if there is none.
    """

    nodes: tuple[str, ...]
    quantizers: tuple[str, ...]
    border: str


class Named:
    """The nodes of a graph, by their names and those of their outputs.

    Parameters
    ----------
    graph : GraphProto
    """

    def __init__(self, graph: GraphProto) -> None:
        nodes = list(all_nodes(graph))
        self._inputs = {i.name for i in graph.input}
        self._nodes = {**{o: n for n in nodes for o in n.output if o}, **{n.name: n for n in nodes if n.name}}

    def nodes(self, names: Iterable[str]) -> Found:
        """Return what names stand for; unknown ones are ignored."""
        found, quantizers, border = {}, [], ""
        for name in names:
            plain = _ADDED.sub("", name)
            node = self._nodes.get(name) or self._nodes.get(plain) or self._nodes.get(_ADDED.sub("", plain))
            if node is None:
                continue
            if node.op_type in _QUANTIZERS:
                quantizers.append(node.op_type)
                border = node.input[0] if node.op_type == "QuantizeLinear" else node.output[0]
            elif node.op_type != "Constant":
                found[node.name or node.output[0]] = True
        return Found(tuple(found), tuple(quantizers), border)

    def ahead(self, name: str) -> str:
        """Return the tensor that a conversion is called after: OpenVINO puts it in front of what it does."""
        while name:
            name = name.rpartition("_")[0]
            plain = _ADDED.sub("", name)
            if name in self._inputs:
                return name
            node = self._nodes.get(name) or self._nodes.get(plain)
            if node is not None:
                return str(node.output[0])
        return ""

    def operators(self, names: Iterable[str]) -> list[str]:
        """Return the operators of nodes that `nodes` has found."""
        return [self._nodes[name].op_type for name in names]


def with_node_names(model: Model) -> Model:
    """Return a model in which each node has a name of its own: the same one if it is so already.

    Profiles call nodes by name.
    """
    nodes = list(all_nodes(graph_of(model)))
    names = [node.name for node in nodes]
    if len(set(names)) == len(names) and all(names):
        return model
    result = ModelProto()
    result.CopyFrom(model if isinstance(model, ModelProto) else onnx.load(model))
    taken = all_names(result.graph)
    seen: set[str] = set()
    for k, node in enumerate(all_nodes(result.graph)):
        if not node.name or node.name in seen:
            name = next((o for o in node.output if o), node.op_type)
            # The first output is what people call a node by; a number only where that is no name of its own.
            node.name = name if name not in seen | set(names) else f"{name}_{k}"
            while node.name in seen or (node.name != name and node.name in taken):
                node.name += "_"
        seen.add(node.name)
    return result
