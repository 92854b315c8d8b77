"""Conversion of models that only onnxruntime accepts to a form that onnx's checker and passes accept, too.

In this form, nodes are in topological order, in graphs, subgraphs and functions. Operator sets are imported
once, under one name each. Outputs have types, and no declared shape contradicts the inferred one. Names in
subgraphs differ from those of enclosing graphs.
"""

from __future__ import annotations

import heapq
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import onnx
from onnx import GraphProto, ModelProto, NodeProto, ValueInfoProto, helper

from eptq_onnx import runtime
from eptq_onnx.errors import ModelError
from eptq_onnx.proto.bodies import all_graphs, all_names, defined, node_reads, subgraphs
from eptq_onnx.proto.weights import light

FIRST_IR_WITH_CONSTANTS = 4
"""First IR version in which initializers need not be inputs."""
_ALIAS = "ai.onnx"
"""Alternative name of the default domain."""
_RESERVED_PREFIXES = ("eptq/", "teacher/")
"""Prefixes of the names of tensors in training graphs."""
_GRADIENT_SUFFIX = "_grad"
"""Suffix that onnxruntime's gradient builder appends to the name of a tensor."""


def make_canonical(model: ModelProto) -> None:
    """Convert a model to an equivalent one that onnx's checker and passes accept, in place."""
    model.ir_version = max(model.ir_version, FIRST_IR_WITH_CONSTANTS)
    for graph in all_graphs(model.graph):
        graph.name = graph.name or "graph"
    _import_operator_sets(model)
    _sort(model.graph)
    for function in model.functions:
        _sort(function)
    _keep_last_initializers(model.graph)
    separate_names(model)
    _declare(model)


def separate_names(model: ModelProto) -> None:
    """Rename tensors, in place, whose names collide with those of enclosing graphs or of training graphs.

    Inputs and outputs of the model keep their names.
    """
    taken = all_names(model.graph)
    interface = {i.name for i in (*model.graph.input, *model.graph.output)}
    own = [name for name in defined(model.graph) if name not in interface]
    names = _fresh([name for name in own if _is_reserved(name, taken)], taken)
    if names:
        rename(model.graph, names)
    _separate(model.graph, set(), taken)


def _is_reserved(name: str, taken: set[str]) -> bool:
    return name.startswith(_RESERVED_PREFIXES) or (
        name.endswith(_GRADIENT_SUFFIX) and name.removesuffix(_GRADIENT_SUFFIX) in taken
    )


def _separate(graph: GraphProto, around: set[str], taken: set[str]) -> None:
    names = _fresh([name for name in defined(graph) if name in around or _is_reserved(name, taken)], taken)
    if names:
        rename(graph, names)
    visible = around | set(defined(graph))
    for node in graph.node:
        for inner in subgraphs(node):
            _separate(inner, visible, taken)


def _fresh(names: Iterable[str], taken: set[str]) -> dict[str, str]:
    """Return an unused name for each of ``names``, and reserve them."""
    found: dict[str, str] = {}
    for name in dict.fromkeys(names):
        stem, k = f"inner/{name}" if name.startswith(_RESERVED_PREFIXES) else name, 1
        while f"{stem}_{k}" in taken:
            k += 1
        found[name] = f"{stem}_{k}"
        taken.add(found[name])
    return found


def rename(graph: GraphProto, names: Mapping[str, str]) -> None:
    """Rename tensors of a graph, in place, also where its subgraphs read them."""
    for item in (*graph.input, *graph.output, *graph.value_info, *graph.initializer):
        item.name = names.get(item.name, item.name)
    for sparse in graph.sparse_initializer:
        sparse.values.name = names.get(sparse.values.name, sparse.values.name)
    for node in graph.node:
        node.input[:] = [names.get(i, i) for i in node.input]
        node.output[:] = [names.get(o, o) for o in node.output]
        for inner in subgraphs(node):
            own = set(defined(inner))
            rename(inner, {old: new for old, new in names.items() if old not in own})


# ---- operator sets -----------------------------------------------------------------------------------------
def _import_operator_sets(model: ModelProto) -> None:
    """Import every operator set once, the default one as "", and add those that onnxruntime adds itself."""
    used: set[str] = set()
    _domains(model.graph.node, used)
    for function in model.functions:
        _domains(function.node, used)
        _import_once(function.opset_import)
    _import_once(model.opset_import)
    own = {f.domain for f in model.functions}
    missing = sorted(used - own - {o.domain for o in model.opset_import})
    if not missing:
        return
    try:
        versions = runtime.imported_opsets(model)
    except ModelError:
        # The check of the model reports which one is missing.
        return
    model.opset_import.extend(
        helper.make_opsetid(domain, versions[domain]) for domain in missing if domain in versions
    )


def _import_once(imports: Any) -> None:
    versions = {"" if o.domain == _ALIAS else o.domain: o.version for o in imports}
    if len(versions) != len(imports) or any(o.domain == _ALIAS for o in imports):
        del imports[:]
        imports.extend(helper.make_opsetid(domain, version) for domain, version in versions.items())


def _domains(nodes: Iterable[NodeProto], found: set[str]) -> None:
    """Collect the domains of nodes and of their subgraphs, and write the default domain as "", in place."""
    for node in nodes:
        if node.domain == _ALIAS:
            node.domain = ""
        found.add(node.domain)
        for inner in subgraphs(node):
            _domains(inner.node, found)


# ---- order -------------------------------------------------------------------------------------------------
def _sort(graph: Any) -> None:
    """Sort the nodes of a graph and its subgraphs topologically, in place.

    The order changes as little as necessary; a graph with a cycle keeps its order.
    """
    for node in graph.node:
        for inner in subgraphs(node):
            _sort(inner)
    reads = [set(node_reads(node)) for node in graph.node]
    made = {o: k for k, node in enumerate(graph.node) for o in node.output if o}
    before = [{made[name] for name in names if name in made} for names in reads]
    if all(k > max(earlier, default=-1) for k, earlier in enumerate(before)):
        return
    order = _order(before)
    if len(order) == len(before):
        nodes = [graph.node[k] for k in order]
        copies = [NodeProto.FromString(node.SerializeToString()) for node in nodes]
        del graph.node[:]
        graph.node.extend(copies)


def _order(before: Sequence[set[int]]) -> list[int]:
    """Return indices in topological order, the smallest first; indices on cycles are left out.

    ``before`` has the predecessors of each index.
    """
    behind: dict[int, list[int]] = {}
    waiting = [len(earlier) for earlier in before]
    for k, earlier in enumerate(before):
        for place in earlier:
            behind.setdefault(place, []).append(k)
    ready = [k for k, count in enumerate(waiting) if count == 0]
    order = []
    while ready:
        k = heapq.heappop(ready)
        order.append(k)
        for later in behind.get(k, ()):
            waiting[later] -= 1
            if waiting[later] == 0:
                heapq.heappush(ready, later)
    return order


def _keep_last_initializers(graph: GraphProto) -> None:
    """Remove all but the last of initializers of one name, in place; onnxruntime uses the last."""
    names = [t.name for t in graph.initializer]
    if len(set(names)) == len(names):
        return
    places = {name: k for k, name in enumerate(names)}
    for k in reversed(range(len(names))):
        if places[names[k]] != k:
            del graph.initializer[k]


# ---- declared types ----------------------------------------------------------------------------------------
def _declare(model: ModelProto) -> None:
    """Add types to outputs without one, and remove declarations that contradict inference, in place."""
    made = {o for node in model.graph.node for o in node.output if o}
    declared = [v for v in (*model.graph.value_info, *model.graph.output) if v.name in made]
    if not declared:
        # All outputs are inputs or initializers.
        _declare_outputs(model, {})
        return
    bare, _ = light(model)
    kept = [v for v in bare.graph.value_info if v.name not in made]
    del bare.graph.value_info[:]
    bare.graph.value_info.extend(kept)
    for info in bare.graph.output:
        if info.type.HasField("tensor_type"):
            info.type.tensor_type.ClearField("shape")
    try:
        inferred = onnx.shape_inference.infer_shapes(bare, data_prop=True).graph
    except Exception:
        # Bare C++ exceptions of several kinds; the check of the model reports what is wrong.
        return
    known = {v.name: v for v in (*inferred.value_info, *inferred.output)}
    wrong = {v.name for v in declared if v.name in known and _contradicts(v, known[v.name])}
    kept = [v for v in model.graph.value_info if v.name not in wrong]
    if len(kept) < len(model.graph.value_info):
        copies = [ValueInfoProto.FromString(v.SerializeToString()) for v in kept]
        del model.graph.value_info[:]
        model.graph.value_info.extend(copies)
    for info in model.graph.output:
        if info.name in wrong:
            info.type.CopyFrom(known[info.name].type)
    _declare_outputs(model, known)


def _declare_outputs(model: ModelProto, known: Mapping[str, ValueInfoProto]) -> None:
    constants = {
        t.name: helper.make_tensor_value_info(t.name, t.data_type, list(t.dims))
        for t in model.graph.initializer
    }
    told = {**constants, **{i.name: i for i in model.graph.input}, **known}
    untyped = [o for o in model.graph.output if o.type.WhichOneof("value") is None]
    for info in untyped:
        if info.name in told and told[info.name].type.WhichOneof("value") is not None:
            info.type.CopyFrom(told[info.name].type)
    left = [o.name for o in untyped if o.type.WhichOneof("value") is None]
    if not left:
        return
    try:
        types = runtime.tensor_types(model, left)
    except ModelError:
        # The check of the model reports what is wrong.
        return
    for info in untyped:
        if info.name in types:
            info.type.CopyFrom(types[info.name])


def _contradicts(declared: ValueInfoProto, inferred: ValueInfoProto) -> bool:
    """Return True if no tensor can have both types."""
    if not (declared.type.HasField("tensor_type") and inferred.type.HasField("tensor_type")):
        return False
    one, other = declared.type.tensor_type, inferred.type.tensor_type
    if not (one.HasField("shape") and other.HasField("shape")):
        return False
    sizes = [
        [d.dim_value if d.HasField("dim_value") else None for d in tensor.shape.dim]
        for tensor in (one, other)
    ]
    return len(sizes[0]) != len(sizes[1]) or any(
        a != b and None not in (a, b) for a, b in zip(*sizes, strict=True)
    )
