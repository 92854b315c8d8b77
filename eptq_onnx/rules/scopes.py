"""One flat graph of a model and all bodies in it: rules see the nodes of a body with what surrounds them."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

import onnx
from onnx import AttributeProto, GraphProto, ModelProto, NodeProto

from eptq_onnx.graph.canonical import rename
from eptq_onnx.graph.infer import inferred
from eptq_onnx.proto.bodies import defined, subgraphs

BODY_DOMAIN = "eptq_onnx.body"
"""Domain of a node whose bodies are laid open: it reads their outputs, and nothing runs it."""


@dataclass(frozen=True)
class Place:
    """Where a node of a flat graph comes from.

    Parameters
    ----------
    node : str
        Its name in the model, or that of its first output if it has none.
    where : str
        The body, such as ``then_branch of if_3``, or the function; empty for the main graph.
    """

    node: str
    where: str


@dataclass
class Flat:
    """A model without bodies.

    Parameters
    ----------
    model : ModelProto
        Every node has a name of its own.
    places : dict of str to Place
        Name of each node to where it comes from.
    """

    model: ModelProto
    places: dict[str, Place] = field(default_factory=dict)


def flat(model: ModelProto) -> Flat:
    """Lay the bodies of If, Loop and Scan, and of functions, open into the main graph.

    ``y = If (c) <then: u, else: v>``  →  the nodes of both branches, and ``y = If (c, u, v)``

    The result describes which node reads which tensor; it cannot be run.

    Parameters
    ----------
    model : ModelProto
        It is not changed.
    """
    whole = inferred(_inlined(model))
    made = ModelProto()
    made.CopyFrom(whole)
    del made.graph.node[:]
    found = Flat(made)
    _lay_open(whole.graph, "", found, set(defined(whole.graph)))
    return found


def _inlined(model: ModelProto) -> ModelProto:
    """Return the model with its functions in place of their calls; a node's doc string names its function."""
    if not model.functions:
        return model
    marked = ModelProto()
    marked.CopyFrom(model)
    for function in marked.functions:
        for node in function.node:
            node.doc_string = f"{_MARK}{node.name or node.output[0]}\0function {function.name}"
    return onnx.inliner.inline_local_functions(marked)


_MARK = "eptq_onnx: "


def _lay_open(graph: GraphProto, where: str, found: Flat, taken: set[str]) -> None:
    """Add the nodes of a graph, bodies before the node that has them."""
    out = found.model.graph
    for node in graph.node:
        place = _place(node, where)
        copy = NodeProto()
        copy.CopyFrom(node)
        copy.doc_string = ""
        read: list[str] = []
        for name, body in _bodies(node):
            read += _laid_body(body, f"{name} of {place.node}{' in ' if where else ''}{where}", found, taken)
        if read or subgraphs(node):
            copy = NodeProto(op_type=node.op_type, domain=BODY_DOMAIN, input=[*node.input, *read])
            copy.output.extend(node.output)
        copy.name = place.node
        while copy.name in found.places:
            copy.name += "_"
        found.places[copy.name] = place
        out.node.append(copy)


def _laid_body(body: GraphProto, where: str, found: Flat, taken: set[str]) -> list[str]:
    """Add what a body defines under names of its own; return its outputs."""
    inner = GraphProto()
    inner.CopyFrom(body)
    for node in inner.node:
        node.name = _place(node, "").node
    # Sibling branches may define the same names.
    names: dict[str, str] = {}
    for name in defined(inner):
        fresh = name
        while fresh in taken:
            fresh += "_"
        taken.add(fresh)
        names[name] = fresh
    rename(inner, names)
    out = found.model.graph
    out.input.extend(inner.input)
    out.initializer.extend(inner.initializer)
    out.sparse_initializer.extend(inner.sparse_initializer)
    known = {v.name for v in (*out.value_info, *out.input, *out.output)}
    out.value_info.extend(v for v in (*inner.value_info, *inner.output) if v.name not in known)
    _lay_open(inner, where, found, taken)
    return [o.name for o in inner.output]


def _bodies(node: NodeProto) -> Iterator[tuple[str, GraphProto]]:
    for attribute in node.attribute:
        if attribute.type == AttributeProto.GRAPH:
            yield attribute.name, attribute.g
        for k, graph in enumerate(attribute.graphs):
            yield f"{attribute.name}[{k}]", graph


def _place(node: NodeProto, where: str) -> Place:
    if node.doc_string.startswith(_MARK):
        name, _, function = node.doc_string.removeprefix(_MARK).partition("\0")
        return Place(name, f"{function}{' in ' if where else ''}{where}")
    return Place(node.name or next((o for o in node.output if o), node.op_type), where)
