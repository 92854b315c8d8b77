"""Find patterns of several operators that runtimes fuse.

A target names the patterns that its runtime fuses (``patterns.keep``). Their nodes stay float, because
quantizers inside a pattern would prevent the fusion.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping

from onnx import NodeProto

from eptq_onnx.graph.view import GraphView
from eptq_onnx.ops.table import spec_of

_MOST = 12
"""Maximum number of nodes in a gated activation; the GELU with tanh has 8."""
_GATES: Mapping[str, frozenset[str]] = {
    "silu": frozenset({"Sigmoid"}),
    "hard swish": frozenset({"HardSigmoid", "Clip", "Relu"}),
    "mish": frozenset({"Softplus", "Tanh"}),
    "gelu": frozenset({"Erf", "Tanh"}),
}
"""Pattern x · f(x) to the operators that identify f."""
_PLAIN = {"Mul", "Div", "Add", "Sub", "Pow", "Neg"}
"""Arithmetic operators that may also occur in f."""
_SCALES_AND_MASKS = ("Add", "Sub", "Mul", "Div", "Where")


def regions(view: GraphView, names: frozenset[str]) -> dict[str, str]:
    """Return the nodes of all patterns with these names, each with the name of its pattern."""
    found: dict[str, str] = {}
    for name in sorted(names):
        for nodes in REGIONS[name](view):
            found.update(dict.fromkeys((n.name for n in nodes), name))
    return found


def _gate(name: str) -> Callable[[GraphView], Iterator[list[NodeProto]]]:
    """Return the search for products of x and a function f of x.

    The pattern is ``Mul (x, f (x))``, where f may include constant factors and offsets. A GELU also includes
    the constant factor after it and the bias before it.
    """

    def search(view: GraphView) -> Iterator[list[NodeProto]]:
        places = {n.name: k for k, n in enumerate(view.nodes)}
        for node in view.nodes:
            nodes = _closed(view, node, places) if node.op_type == "Mul" else []
            functions = {n.op_type for n in nodes} - _PLAIN
            if functions and _name_of(functions) == name:
                yield _with_scale_and_bias(view, nodes) if name == "gelu" else nodes

    return search


def _name_of(functions: set[str]) -> str | None:
    """Return the first pattern that these functions identify."""
    if functions == {"Tanh"}:
        return "gelu"
    return next((name for name, known in _GATES.items() if functions <= known), None)


def _closed(view: GraphView, end: NodeProto, places: Mapping[str, int]) -> list[NodeProto]:
    """Return the elementwise nodes that compute ``end`` from a single tensor, without readers outside.

    The list is empty if there is no such set of nodes.
    """
    nodes, inside = [end], {end.name}
    frontier = {i for i in end.input if not view.is_constant(i)}
    while len(frontier) > 1:
        made = [view.producer[t] for t in frontier if t in view.producer]
        node = max(made, key=lambda n: places[n.name], default=None)
        if node is None or len(nodes) == _MOST or node.output[0] in view.outputs:
            return []
        if any(n.name not in inside for o in node.output for n in view.consumers[o]):
            return []
        if not (spec_of(node).elementwise or node.op_type == "Pow"):
            return []
        frontier.discard(node.output[0])
        frontier |= {i for i in node.input if i and not view.is_constant(i)}
        nodes.insert(0, node)
        inside.add(node.name)
    return nodes if len(nodes) > 1 else []


def _with_scale_and_bias(view: GraphView, nodes: list[NodeProto]) -> list[NodeProto]:
    """Add the constant factor after a GELU and the bias before it."""
    inside = {n.name for n in nodes}
    made = {o for n in nodes for o in n.output}
    [x] = {i for n in nodes for i in n.input if not view.is_constant(i)} - made
    bias, readers = view.producer.get(x), view.consumers[nodes[-1].output[0]]
    if (
        bias is not None
        and bias.op_type == "Add"
        and any(map(view.is_constant, bias.input))
        and x not in view.outputs
        and all(n.name in inside for n in view.consumers[x])
    ):
        nodes = [bias, *nodes]
    scales = (
        len(readers) == 1
        and readers[0].op_type in ("Mul", "Div")
        and any(map(view.is_constant, readers[0].input))
    )
    return [*nodes, readers[0]] if scales and nodes[-1].output[0] not in view.outputs else nodes


def _layer_normalizations(view: GraphView) -> Iterator[list[NodeProto]]:
    """Find ``(x - mean (x)) / sqrt (mean ((x - mean (x))²) + ε) · γ + β``."""
    for root in view.nodes:
        if root.op_type != "Sqrt":
            continue
        nodes = [root]
        for wanted in (("Add",), ("ReduceMean",), ("Pow", "Mul"), ("Sub",), ("ReduceMean",)):
            place = 1 if nodes[0].op_type == "Sub" else 0
            source = next((i for i in nodes[0].input[place:] if not view.is_constant(i)), "")
            before = view.producer.get(source)
            if before is None or before.op_type not in wanted:
                break
            nodes.insert(0, before)
        else:
            tensor = root.output[0]
            for wanted in (("Div",), ("Mul",), ("Add",)):
                readers = view.consumers[tensor]
                if len(readers) != 1 or readers[0].op_type not in wanted:
                    break
                nodes.append(readers[0])
                tensor = readers[0].output[0]
            if nodes[-1] is not root:
                yield nodes


def _attention_scores(view: GraphView) -> Iterator[list[NodeProto]]:
    """Find the nodes that scale and mask a matrix product before a Softmax."""
    for softmax in view.nodes:
        if softmax.op_type != "Softmax":
            continue
        nodes: list[NodeProto] = []
        node = view.producer.get(softmax.input[0])
        while node is not None and node.op_type in _SCALES_AND_MASKS and len(nodes) < _MOST:
            nodes.insert(0, node)
            makers = (view.producer[i] for i in node.input if i in view.producer)
            node = next((n for n in makers if n.op_type in {"MatMul", *_SCALES_AND_MASKS}), None)
        if node is not None and node.op_type == "MatMul" and nodes:
            yield nodes


REGIONS: Mapping[str, Callable[[GraphView], Iterator[list[NodeProto]]]] = {
    **{name: _gate(name) for name in _GATES},
    "layer normalization": _layer_normalizations,
    "attention scores": _attention_scores,
}
"""Name of a pattern to its search, which yields the nodes of each occurrence."""
