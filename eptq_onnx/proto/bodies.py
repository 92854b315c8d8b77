"""Traversal of nodes and their subgraphs: the branches of If, the bodies of Loop and Scan."""

from __future__ import annotations

from collections.abc import Iterator

from onnx import AttributeProto, FunctionProto, GraphProto, NodeProto, TensorProto


def node_reads(node: NodeProto) -> list[str]:
    """Return the tensors that a node reads, including those that its subgraphs read from the outer scope."""
    names = [i for i in node.input if i]
    for graph in subgraphs(node):
        local = (
            {i.name for i in graph.input}
            | {t.name for t in graph.initializer}
            | {s.values.name for s in graph.sparse_initializer}
        )
        for inner in graph.node:
            names.extend(i for i in node_reads(inner) if i not in local)
            local.update(inner.output)
        names.extend(o.name for o in graph.output if o.name not in local)
    return names


def defined(graph: GraphProto) -> list[str]:
    """Return the tensors that a graph itself defines: inputs, initializers and node outputs, no subgraphs."""
    given = [
        *(i.name for i in graph.input),
        *(t.name for t in graph.initializer),
        *(s.values.name for s in graph.sparse_initializer),
    ]
    return [*given, *(o for node in graph.node for o in node.output if o)]


def all_names(graph: GraphProto) -> set[str]:
    """Return every tensor and node name of a graph and its subgraphs."""
    names = {i.name for i in (*graph.input, *graph.output, *graph.value_info)} | set(defined(graph))
    for node in graph.node:
        names.update((node.name, *node.input, *node.output))
        for inner in subgraphs(node):
            names |= all_names(inner)
    return names


def all_graphs(graph: GraphProto) -> Iterator[GraphProto]:
    """Yield a graph and all its subgraphs, in unspecified order."""
    waiting = [graph]
    while waiting:
        found = waiting.pop()
        yield found
        for node in found.node:
            waiting.extend(subgraphs(node))


def all_nodes(graph: GraphProto | FunctionProto) -> Iterator[NodeProto]:
    """Yield the nodes of a graph or function and of its subgraphs."""
    for node in graph.node:
        yield node
        for inner in subgraphs(node):
            yield from all_nodes(inner)


def subgraphs(node: NodeProto) -> list[GraphProto]:
    """Return the subgraphs of an If, Loop or Scan node."""
    return [g for a in node.attribute for g in ([a.g] if a.type == AttributeProto.GRAPH else a.graphs)]


def initializers(graph: GraphProto) -> Iterator[TensorProto]:
    """Yield the initializers of a graph and its subgraphs."""
    yield from graph.initializer
    for node in graph.node:
        for inner in subgraphs(node):
            yield from initializers(inner)
