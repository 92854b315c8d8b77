"""Constant folding and clean-up with onnx-graphsurgeon."""

from __future__ import annotations

import logging

import numpy as np
import onnx
import onnx_graphsurgeon as gs
from onnx import ModelProto, NodeProto, TensorProto, helper, numpy_helper

from eptq_onnx.errors import ModelError
from eptq_onnx.graph import edit
from eptq_onnx.graph.infer import infer_shapes


def fold_constants(model: ModelProto) -> ModelProto:
    """Fold constants and static shapes, resolve conditions that are constant, drop what no output needs, sort.

    Constant nodes become initializers. Tensor names and what the graph does not hold (metadata, IR version)
    survive.

    Raises
    ------
    ModelError
        If the graph has a cycle.
    """
    logging.getLogger("onnx_graphsurgeon").setLevel(logging.ERROR)
    gs.logger.G_LOGGER.severity = gs.logger.G_LOGGER.CRITICAL
    while True:
        model = _folded_once(_with_whole_shapes(_constants_to_initializers(model)))
        resolved = _with_known_branches(model)
        if resolved is None:
            return model
        model = resolved


def fold_sizes(model: ModelProto) -> ModelProto:
    """A copy of a model with fixed input shapes in which what is computed from shapes is constant; itself if nothing is."""
    if not any(node.op_type in ("Shape", "Size") for node in model.graph.node):
        return model
    return infer_shapes(fold_constants(model))


def _folded_once(model: ModelProto) -> ModelProto:
    inferred = onnx.shape_inference.infer_shapes(model, data_prop=True)
    graph = gs.import_onnx(inferred)
    try:
        # Its own flattening of conditionals loses outputs of nested ones.
        graph.fold_constants(error_ok=True, flatten_subgraphs=False).cleanup(remove_unused_graph_inputs=False).toposort()
        folded = gs.export_onnx(graph, do_type_check=False)
    except Exception as e:
        # onnx-graphsurgeon reports every problem as its own or a bare exception.
        raise ModelError(f"the graph cannot be sorted or folded: {' '.join(str(e).split())[:300]}") from e
    result = ModelProto()
    result.CopyFrom(model)
    result.graph.CopyFrom(folded.graph)
    result.graph.doc_string = model.graph.doc_string
    return result


def _with_known_branches(model: ModelProto) -> ModelProto | None:
    """A copy in which every If with a constant condition is the branch that it takes; None if there is none."""
    constants = {t.name: t for t in model.graph.initializer}
    builder, found = edit.Builder(model, "if/"), False
    for node in model.graph.node:
        if node.op_type != "If" or node.input[0] not in constants:
            builder.nodes.append(node)
            continue
        found = True
        taken = bool(numpy_helper.to_array(constants[node.input[0]]).reshape(-1)[0])
        branch = next(a.g for a in node.attribute if a.name == ("then_branch" if taken else "else_branch"))
        own = [t.name for t in branch.initializer] + [o for n in branch.node for o in n.output if o]
        names = {name: builder.unique(f"{node.name or node.output[0]}/{name}") for name in own}
        builder.initializers.extend(edit.renamed_tensor(t, names[t.name]) for t in branch.initializer)
        builder.nodes.extend(edit.renamed(n, names) for n in branch.node)
        for outer, inner in zip(node.output, branch.output, strict=True):
            if outer:
                builder.add("Identity", [names.get(inner.name, inner.name)], outer)
    return edit.with_nodes(model, builder.nodes, builder.initializers) if found else None


def _constants_to_initializers(model: ModelProto) -> ModelProto:
    """A copy without Constant nodes in its main graph (onnx-graphsurgeon reads value_float as double)."""
    result = ModelProto()
    result.CopyFrom(model)
    kept = []
    for node in result.graph.node:
        value = _constant_value(node)
        if value is None:
            kept.append(node)
        else:
            result.graph.initializer.append(value)
    return edit.with_nodes(result, kept)


def _with_whole_shapes(model: ModelProto) -> ModelProto:
    """A copy in which a Shape of some axes is a Slice of all: onnx-graphsurgeon folds it as if it were whole."""
    builder = edit.Builder(model)
    for node in model.graph.node:
        limits = {a.name: a.i for a in node.attribute if node.op_type == "Shape"}
        if not limits:
            builder.nodes.append(node)
            continue
        start, end = limits.get("start", 0), limits.get("end", np.iinfo(np.int64).max)
        whole = builder.add("Shape", [node.input[0]])
        builder.add("Slice", [whole, np.array([start]), np.array([end])], node.output[0])
    return edit.with_nodes(model, builder.nodes, builder.initializers)


def _constant_value(node: NodeProto) -> TensorProto | None:
    if node.op_type != "Constant" or len(node.attribute) != 1:
        return None
    item = node.attribute[0]
    if item.name == "value":
        return edit.renamed_tensor(item.t, node.output[0])
    dtype = {"value_float": np.float32, "value_floats": np.float32, "value_int": np.int64, "value_ints": np.int64}.get(item.name)
    return None if dtype is None else numpy_helper.from_array(np.array(helper.get_attribute_value(item), dtype), node.output[0])
