"""Constant folding and clean-up with onnx-graphsurgeon."""

from __future__ import annotations

import logging
from collections.abc import Collection, Iterable

import numpy as np
import onnx_graphsurgeon as gs
from onnx import GraphProto, ModelProto, NodeProto, TensorProto, helper, numpy_helper
from onnx.reference import ReferenceEvaluator

from eptq_onnx.errors import ModelError, one_line
from eptq_onnx.graph import branches, edit
from eptq_onnx.graph.infer import infer_shapes
from eptq_onnx.graph.replay import RANDOM
from eptq_onnx.graph.view import GraphView
from eptq_onnx.proto import store
from eptq_onnx.proto.bodies import all_graphs, all_nodes, node_reads, subgraphs
from eptq_onnx.proto.weights import light, stored, with_weights, without_weights


def fold_constants(model: ModelProto) -> ModelProto:
    """Fold constants and static shapes, resolve constant conditions, remove unused parts, and sort.

    Constant nodes become initializers. Tensor names, metadata and IR version are kept.

    Raises
    ------
    ModelError
        If the graph has a cycle.
    """
    logging.getLogger("onnx_graphsurgeon").setLevel(logging.ERROR)
    gs.logger.G_LOGGER.severity = gs.logger.G_LOGGER.CRITICAL
    folded, apart = light(model, _take_part(model))
    while True:
        folded = _without_identities(
            _folded_once(dequantized(_with_whole_shapes(_constants_to_initializers(folded))))
        )
        view = GraphView(folded)
        if any(_is_dequantized(n, view) for n in view.nodes):
            continue  # its integers have become constant only now
        needed = _take_part(folded, [t.name for t in apart])
        late = [t for t in apart if t.name in needed]
        if late:
            # Their consumers have become foldable only now.
            folded = with_weights(folded, [store.loaded(t) for t in late])
            apart = [t for t in apart if t.name not in needed]
            continue
        resolved = branches.with_known_branches(folded)
        if resolved is None:
            whole = with_weights(folded, apart)
            folder = store.folder_of(whole)
            return whole if folder is None else stored(whole, folder)
        folded = resolved


def _take_part(model: ModelProto, others: Iterable[str] = ()) -> set[str]:
    """Return the constants read by nodes that may be folded; folding does not need the values of any others.

    ``others`` are names of further constants, apart from the initializers of the model.
    """
    known = {*others, *(t.name for t in model.graph.initializer)}
    found: set[str] = set()
    for node in model.graph.node:
        reads = node_reads(node)
        if known.issuperset(reads) or subgraphs(node):
            known.update(node.output)
            found.update(reads)
    return found | {o.name for o in model.graph.output}


def fold_sizes(model: ModelProto, kept: Collection[str] = ()) -> ModelProto:
    """Return a copy in which everything computed from shapes is constant; the model itself if nothing is.

    Parameters
    ----------
    model : ModelProto
        With fixed input shapes.
    kept : collection of str
        Initializers that are not folded into their consumers: a table of position embeddings, for example,
        which is read at constant indices once the number of positions is known.
    """
    if not any(node.op_type in ("Shape", "Size") for node in model.graph.node):
        return model
    private = edit.with_nodes(model, model.graph.node)
    edit.promote_to_inputs(private, kept)
    folded = fold_constants(private)
    own = [t for t in model.graph.initializer if t.name in kept]
    return infer_shapes(edit.with_nodes(folded, folded.graph.node, own, drop=kept))


def _folded_once(model: ModelProto) -> ModelProto:
    inferred = infer_shapes(model)
    graph = gs.import_onnx(_untyped(inferred))
    try:
        # onnx-graphsurgeon's own flattening of conditionals loses outputs of nested ones.
        graph.fold_constants(error_ok=True, flatten_subgraphs=False, should_exclude_node=_draws).cleanup(
            remove_unused_graph_inputs=False
        ).toposort()
        folded = gs.export_onnx(graph, do_type_check=False)
    except Exception as e:
        # onnx-graphsurgeon reports every problem as its own or a bare exception.
        raise ModelError(f"the graph cannot be sorted or folded: {one_line(e)}") from e
    result = without_weights(model)
    result.graph.CopyFrom(folded.graph)
    result.graph.doc_string = model.graph.doc_string
    result.graph.metadata_props.extend(model.graph.metadata_props)
    _restore_types(result.graph, inferred.graph)
    return result


def _draws(node: gs.Node) -> bool:
    """Return True for nodes that draw random numbers: they are not constants, even if their inputs are."""
    return node.op in RANDOM or node.op == "Dropout"


def _untyped(model: ModelProto) -> ModelProto:
    """Return a copy in which values other than tensors have no type."""
    result = ModelProto()
    result.CopyFrom(model)
    for graph in all_graphs(result.graph):
        for info in (*graph.input, *graph.output, *graph.value_info):
            if not info.type.HasField("tensor_type"):
                info.ClearField("type")
    return result


def _restore_types(graph: GraphProto, origin: GraphProto) -> None:
    """Restore the types of values other than tensors, in place; onnx-graphsurgeon supports tensors only."""
    for field in ("input", "output", "value_info"):
        types = {v.name: v.type for v in getattr(origin, field) if not v.type.HasField("tensor_type")}
        for info in getattr(graph, field):
            if info.name in types:
                info.type.CopyFrom(types[info.name])
    nodes = {_first(node): node for node in origin.node}
    for node in graph.node:
        for inner, before in zip(subgraphs(node), subgraphs(nodes.get(_first(node), node)), strict=True):
            _restore_types(inner, before)


def _first(node: NodeProto) -> str:
    """Return the first named output of a node."""
    return next((o for o in node.output if o), "")


def _constants_to_initializers(model: ModelProto) -> ModelProto:
    """Return a copy without Constant nodes in the main graph, and with tensors in those of subgraphs.

    The latter is needed as onnx-graphsurgeon reads value_float as double.
    """
    kept, values = [], []
    for node in model.graph.node:
        value = _constant_value(node)
        if value is None:
            kept.append(node)
        else:
            values.append(value)
    result = edit.with_nodes(model, kept, values)
    for node in all_nodes(result.graph):
        value = _constant_value(node)
        if value is not None:
            del node.attribute[:]
            node.attribute.append(helper.make_attribute("value", value))
    return result


def dequantized(model: ModelProto) -> ModelProto:
    """Return a copy in which constants behind DequantizeLinear are float; onnx-graphsurgeon keeps these."""
    view, kept, values = GraphView(model), [], []
    for node in view.nodes:
        if not _is_dequantized(node, view):
            kept.append(node)
            continue
        evaluator = ReferenceEvaluator(node, opsets={o.domain: o.version for o in model.opset_import})
        (value,) = evaluator.run(None, {i: view.constant(i) for i in node.input if i})
        values.append(numpy_helper.from_array(np.asarray(value), node.output[0]))
    return edit.with_nodes(model, kept, values) if values else model


def _is_dequantized(node: NodeProto, view: GraphView) -> bool:
    """Return True for a DequantizeLinear of constants."""
    return node.op_type == "DequantizeLinear" and all(view.is_constant(i) for i in node.input if i)


def _without_identities(model: ModelProto) -> ModelProto:
    """Return a copy without Identity nodes, except those that produce outputs."""
    outputs, names, kept = {o.name for o in model.graph.output}, dict[str, str](), []
    for node in model.graph.node:
        if node.op_type == "Identity" and node.output[0] not in outputs:
            names[node.output[0]] = names.get(node.input[0], node.input[0])
        else:
            kept.append(edit.renamed(node, names) if names else node)
    return edit.with_nodes(model, kept) if names else model


def _with_whole_shapes(model: ModelProto) -> ModelProto:
    """Return a copy in which a Shape of some axes is a Slice of the whole shape.

    onnx-graphsurgeon ignores the attributes ``start`` and ``end`` when it folds.
    """
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
    dtype = {
        "value_float": np.float32,
        "value_floats": np.float32,
        "value_int": np.int64,
        "value_ints": np.int64,
    }.get(item.name)
    return (
        None
        if dtype is None
        else numpy_helper.from_array(np.array(helper.get_attribute_value(item), dtype), node.output[0])
    )
