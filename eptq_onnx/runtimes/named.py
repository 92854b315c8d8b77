"""Node names: give every node of a model one, and look up the nodes that runtimes name."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass

import onnx
from onnx import GraphProto, ModelProto

from eptq_onnx.graph.view import QUANTIZERS
from eptq_onnx.proto.bodies import all_names, all_nodes
from eptq_onnx.runtimes.base import Model, graph_of

_ADDED = re.compile(r"(/WithoutBiases|_\d+)$")
"""Suffixes that OpenVINO adds to names."""


@dataclass(frozen=True)
class Found:
    """Nodes found by their names.

    Parameters
    ----------
    nodes : tuple of str
        Names of nodes other than quantizers.
    quantizers : tuple of str
        Operators of the quantizers found.
    border : str
        Float tensor that the last quantizer found reads or writes; empty if there is none.
    """

    nodes: tuple[str, ...]
    quantizers: tuple[str, ...]
    border: str


class Named:
    """Index of a graph's nodes by their own names and the names of their outputs.

    Parameters
    ----------
    graph : GraphProto
    """

    def __init__(self, graph: GraphProto) -> None:
        nodes = list(all_nodes(graph))
        self._inputs = {i.name for i in graph.input}
        self._nodes = {**{o: n for n in nodes for o in n.output if o}, **{n.name: n for n in nodes if n.name}}

    def nodes(self, names: Iterable[str]) -> Found:
        """Return the nodes with these names; unknown names are ignored."""
        found, quantizers, border = {}, [], ""
        for name in names:
            plain = _ADDED.sub("", name)
            node = self._nodes.get(name) or self._nodes.get(plain) or self._nodes.get(_ADDED.sub("", plain))
            if node is None:
                continue
            if node.op_type in QUANTIZERS:
                quantizers.append(node.op_type)
                border = node.input[0] if node.op_type == "QuantizeLinear" else node.output[0]
            elif node.op_type != "Constant":
                found[node.name or node.output[0]] = True
        return Found(tuple(found), tuple(quantizers), border)

    def ahead(self, name: str) -> str:
        """Return the tensor that an OpenVINO conversion is named after, by stripping its suffixes."""
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
        """Return the operators of nodes that `nodes` found."""
        return [self._nodes[name].op_type for name in names]


def with_node_names(model: Model) -> Model:
    """Return a model whose node names are unique and not empty: the same object if they already are.

    Profiles identify nodes by name.
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
            # People know an unnamed node by its first output; a number is added only to make it unique.
            node.name = name if name not in seen | set(names) else f"{name}_{k}"
            while node.name in seen or (node.name != name and node.name in taken):
                node.name += "_"
        seen.add(node.name)
    return result
