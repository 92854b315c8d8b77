"""Hoisting of If branches into the main graph: permanent for constant conditions, else for the run only.

A *settled* If is one whose condition is the same for every sample. The nodes of the branch that it takes are
hoisted into the main graph, where they are quantized like any others, and sunk back at the end. In between,
the If stays, with a branch that only passes the hoisted tensors on, so that the other branch keeps its
meaning. Settled Ifs, and nodes that were in the main graph before, are marked in their metadata until the
nodes sink.
"""

from __future__ import annotations

from collections.abc import Mapping

from onnx import GraphProto, ModelProto, NodeProto, TensorProto, helper

from eptq_onnx.graph import edit
from eptq_onnx.graph.infer import infer_shapes
from eptq_onnx.graph.view import GraphView
from eptq_onnx.proto import store
from eptq_onnx.proto.bodies import node_reads, subgraphs

_TAKEN, _STAYS = "eptq_onnx.taken", "eptq_onnx.stays"
_MOVES = {
    "MaxPool", "Reshape", "Slice", "Squeeze", "Transpose", "Unsqueeze", "Flatten", "Expand", "Gather",
    "Identity",
}  # fmt: skip
"""Operators across which onnxruntime may move a quantizer, and some more."""
_BRANCHES = {True: "then_branch", False: "else_branch"}


def settled_branch(node: NodeProto) -> str | None:
    """Return the name of the branch that a settled If takes, None for any other node."""
    return next((p.value for p in node.metadata_props if p.key == _TAKEN), None)


def other_branch(node: NodeProto) -> str:
    """Return the name of the branch that a settled If does not take."""
    return _BRANCHES[settled_branch(node) == _BRANCHES[False]]


def branch(node: NodeProto, name: str) -> GraphProto:
    """Return a branch of an If."""
    graph: GraphProto = next(a.g for a in node.attribute if a.name == name)
    return graph


def with_known_branches(model: ModelProto) -> ModelProto | None:
    """Return a copy in which Ifs with a constant condition are replaced by their branch; None if none is."""
    constants = {t.name: t for t in model.graph.initializer}
    builder, found = edit.Builder(model, "if/"), False
    for node in model.graph.node:
        if node.op_type != "If" or node.input[0] not in constants:
            builder.nodes.append(node)
            continue
        found = True
        taken = branch(node, _BRANCHES[bool(store.array(constants[node.input[0]]).reshape(-1)[0])])
        made = _hoisted(builder, node, taken)
        for outer, inner in zip(node.output, taken.output, strict=True):
            if outer:
                builder.add("Identity", [made.get(inner.name, inner.name)], outer)
    return edit.with_nodes(model, builder.nodes, builder.initializers) if found else None


def conditions(model: ModelProto) -> dict[str, str]:
    """Return name to condition of the Ifs in the main graph."""
    return {n.name: n.input[0] for n in model.graph.node if n.op_type == "If"}


def hoist(model: ModelProto, decided: Mapping[str, bool]) -> ModelProto:
    """Return a copy in which the nodes of the branches that some Ifs take are hoisted in front of them.

    Parameters
    ----------
    model : ModelProto
    decided : mapping of str to bool
        Name of an If to its condition.
    """
    builder = edit.Builder(model)
    for node in model.graph.node:
        if node.name not in decided:
            builder.nodes.append(node)
            continue
        name = _BRANCHES[decided[node.name]]
        made = _hoisted(builder, node, branch(node, name))
        copy = NodeProto()
        copy.CopyFrom(node)
        taken = branch(copy, name)
        inside = edit.Builder(model)
        for output in taken.output:
            output.name = inside.add(
                "Identity",
                [made.get(output.name, output.name)],
                builder.unique(f"{node.name}/{output.name}/out"),
            )
        del taken.node[:], taken.initializer[:], taken.value_info[:]
        taken.node.extend(inside.nodes)
        builder.nodes.append(copy)
    return edit.with_nodes(model, builder.nodes, builder.initializers)


def with_constants_outside(model: ModelProto, decided: Mapping[str, bool]) -> ModelProto:
    """Return a copy in which the constants of the branches that some Ifs take are in the main graph.

    Folding moves a hoisted constant that only its branch passes on back into the branch, and in newer
    versions of onnx-graphsurgeon makes it the output itself.
    """
    result = edit.with_nodes(model, model.graph.node)
    known = {t.name for t in result.graph.initializer}
    builder = edit.Builder(result)
    for node in result.graph.node:
        if node.name not in decided:
            continue
        taken = branch(node, _BRANCHES[decided[node.name]])
        outputs = {o.name for o in taken.output}
        for constant in taken.initializer:
            name = constant.name
            if name in outputs:
                name = builder.unique(f"{name}/value")
                taken.node.append(helper.make_node("Identity", [name], [constant.name], f"{name}/Identity"))
            if name not in known:
                known.add(name)
                builder.initializers.append(edit.renamed_tensor(constant, name))
        del taken.initializer[:]
    result.graph.initializer.extend(builder.initializers)
    return result


def _hoisted(builder: edit.Builder, node: NodeProto, taken: GraphProto) -> dict[str, str]:
    """Add the nodes and constants of a branch to the builder, and return the new names of its tensors."""
    own = [t.name for t in taken.initializer] + [o for n in taken.node for o in n.output if o]
    names = {name: builder.unique(f"{node.name or node.output[0]}/{name}") for name in own}
    builder.initializers.extend(edit.renamed_tensor(t, names[t.name]) for t in taken.initializer)
    for inner in taken.node:
        builder.nodes.append(edit.renamed(inner, names))
        # Hoisted nodes get new names, as the outer node keeps its own.
        builder.nodes[-1].name = builder.unique(
            f"{node.name or node.output[0]}/{inner.name or inner.op_type}"
        )
    return names


def mark(model: ModelProto, decided: Mapping[str, bool], stays: set[str]) -> None:
    """Mark the settled Ifs and the nodes that do not sink, in place."""
    for node in model.graph.node:
        if node.name in stays:
            node.metadata_props.add(key=_STAYS, value="")
        if node.name in decided:
            node.metadata_props.add(key=_TAKEN, value=_BRANCHES[decided[node.name]])


def flattened(model: ModelProto) -> ModelProto:
    """Return a copy in which settled Ifs are replaced by the branch that they take; itself if it has none."""
    if not any(settled_branch(n) for n in model.graph.node):
        return model
    builder = edit.Builder(model)
    for node in model.graph.node:
        taken = settled_branch(node)
        if taken is None:
            builder.nodes.append(node)
            continue
        graph = branch(node, taken)
        made = {n.output[0]: n.input[0] for n in graph.node}
        for outer, inner in zip(node.output, graph.output, strict=True):
            if outer:
                builder.add("Identity", [made[inner.name]], outer)
    result = edit.with_nodes(model, builder.nodes, builder.initializers)
    _forget_shapes(result)
    return infer_shapes(result)


def sink(model: ModelProto) -> ModelProto:
    """Return a copy in which nodes that only serve the taken branch of a settled If are inside it again.

    The copy has no marks.
    """
    settled = [n.name for n in model.graph.node if settled_branch(n)]
    if not settled:
        return model
    result = edit.with_nodes(model, model.graph.node)
    # A hoisted If comes before the If that it was hoisted from.
    for name in settled:
        _sink_into(result, name)
    for node in result.graph.node:
        _unmark(node)
    _forget_shapes(result)
    return shielded(result)


def shielded(model: ModelProto) -> ModelProto:
    """Return a copy in which no subgraph reads a dequantized tensor directly or through moves.

    ``DequantizeLinear → Reshape → x, read inside If``    becomes    ``... → x → Clip → y, read inside If``:
    onnxruntime (1.19 to 1.32) ends the process when it moves the quantizer to the reader. A Clip without
    limits is a copy that it does not remove. A model without such tensors is returned as it is.
    """
    producer = {o: n for n in model.graph.node for o in n.output}
    builder, found = edit.Builder(model), False

    def is_moved(name: str) -> bool:
        node = producer.get(name)
        while node is not None and node.op_type in _MOVES:
            node = producer.get(node.input[0])
        return node is not None and node.op_type == "DequantizeLinear"

    for node in model.graph.node:
        if not subgraphs(node) or settled_branch(node):
            builder.nodes.append(node)
            continue
        given = set(node.input)
        inside = dict.fromkeys(i for i in node_reads(node) if i not in given and is_moved(i))
        copies = {name: builder.add("Clip", [name], builder.unique(f"{name}/inside")) for name in inside}
        found = found or bool(copies)
        builder.nodes.append(edit.renamed(node, copies) if copies else node)
    return edit.with_nodes(model, builder.nodes, builder.initializers) if found else model


def _sink_into(model: ModelProto, name: str) -> None:
    view = GraphView(model)
    owner = next(n for n in view.nodes if n.name == name)
    taken = branch(owner, settled_branch(owner) or "")
    wanted = {i for n in taken.node for i in node_reads(n)}
    elsewhere = set(owner.input) | set(view.outputs) | _read_inside(branch(owner, other_branch(owner)))
    inside: list[NodeProto] = []
    outside: list[NodeProto] = []
    for node in reversed(view.nodes):
        stays = any(p.key == _STAYS for p in node.metadata_props) or node.name == name
        if not stays and wanted.intersection(node.output) and not elsewhere.intersection(node.output):
            inside.insert(0, node)
            wanted.update(node_reads(node))
        else:
            outside.insert(0, node)
            if node.name != name:
                elsewhere.update(node_reads(node))
    inside = _with_own_dequantizers(edit.Builder(model), inside, {o: n for n in outside for o in n.output})
    wanted = {i for n in inside for i in node_reads(n)}
    own = [t for t in model.graph.initializer if t.name in wanted and t.name not in elsewhere]
    _fill(taken, inside, own)
    kept = {t.name for t in own}
    others = [t for t in model.graph.initializer if t.name not in kept]
    del model.graph.node[:], model.graph.initializer[:]
    model.graph.node.extend(outside)
    model.graph.initializer.extend(others)


def _with_own_dequantizers(
    builder: edit.Builder, inside: list[NodeProto], outside: Mapping[str, NodeProto]
) -> list[NodeProto]:
    """Return the nodes with a copy of every outer DequantizeLinear that they read.

    Runtimes fuse nodes within one graph only.
    """
    read = dict.fromkeys(i for n in inside for i in node_reads(n))
    names = {}
    for name in read:
        source = outside.get(name)
        if source is not None and source.op_type == "DequantizeLinear":
            names[name] = builder.unique(f"{name}/inside")
            builder.nodes.append(edit.renamed(source, {name: names[name]}))
            builder.nodes[-1].name = builder.unique(f"{source.name}/inside")
    return [*builder.nodes, *(edit.renamed(n, names) for n in inside)]


def _read_inside(graph: GraphProto) -> set[str]:
    return {i for n in graph.node for i in node_reads(n)} | {o.name for o in graph.output}


def _fill(graph: GraphProto, nodes: list[NodeProto], constants: list[TensorProto]) -> None:
    for node in nodes:
        _unmark(node)
    last = list(graph.node)
    del graph.node[:]
    graph.node.extend([*nodes, *last])
    graph.initializer.extend(constants)


def _unmark(node: NodeProto) -> None:
    kept = [p for p in node.metadata_props if p.key not in (_TAKEN, _STAYS)]
    del node.metadata_props[:]
    node.metadata_props.extend(kept)


def _forget_shapes(model: ModelProto) -> None:
    """Remove inferred shapes, in place; they belong to another form of the graph."""
    del model.graph.value_info[:]
