"""Consistency checks of a model file, before anything is allocated or passed to other libraries.

Other libraries trust what a file declares: onnxruntime overflows the stack on a function that calls itself,
and in many versions takes hours for subgraphs nested 25 deep. A model that onnxruntime loads and runs is
never rejected here; what onnxruntime ignores is removed by `eptq_onnx.graph.repair`.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from graphlib import CycleError, TopologicalSorter
from typing import Any

import psutil
from onnx import (
    AttributeProto,
    FunctionProto,
    GraphProto,
    ModelProto,
    NodeProto,
    SparseTensorProto,
    TensorProto,
    TypeProto,
)

from eptq_onnx.errors import ModelError
from eptq_onnx.proto.bodies import all_nodes, node_reads, subgraphs
from eptq_onnx.runtime import deepest_nesting

_CALLS = 100
"""Limit on the depth of nested function calls; onnx has the same limit."""
_INLINED = 2**17
"""Limit on the number of nodes after inlining of all functions; onnxruntime's inlining is quadratic."""
_BYTES = 2**62
"""Limit on the size of a tensor in bytes."""
_OPSETS = range(1, 1000)
"""Plausible versions of the ONNX operator set; onnxruntime itself reports those that it does not support."""
_NOT_BY_NAME = {"FLOAT": 32, "DOUBLE": 64, "BOOL": 8}
"""Bits of the element types whose names do not contain the number."""


def _bits(kind: str) -> int:
    digits = re.search(r"\d+", kind)
    return int(digits.group()) if digits else _NOT_BY_NAME.get(kind, 0)


_BITS: dict[int, int] = {
    number: _bits(kind) for kind, number in TensorProto.DataType.items() if kind != "UNDEFINED"
}
"""Bits per value of each element type; 0 for strings."""
_FIELDS: dict[int, tuple[str, int]] = {
    TensorProto.FLOAT: ("float_data", 1), TensorProto.COMPLEX64: ("float_data", 2),
    TensorProto.DOUBLE: ("double_data", 1), TensorProto.COMPLEX128: ("double_data", 2),
    TensorProto.INT64: ("int64_data", 1), TensorProto.UINT32: ("uint64_data", 1),
    TensorProto.UINT64: ("uint64_data", 1), TensorProto.STRING: ("string_data", 1),
}  # fmt: skip
"""Field of non-raw values by element type, and entries per value; all other types use ``int32_data``."""


def check(model: ModelProto, name: str) -> set[str]:
    """Check nesting, functions, names, types and sizes of a model, in time linear in its size.

    External data files are not read.

    Parameters
    ----------
    model : ModelProto
        It is not changed.
    name : str
        Name of the model in messages.

    Returns
    -------
    set of str
        Damaged initializers of the graph that nothing reads.

    Raises
    ------
    ModelError
        If a check fails.
    """
    _check_nesting(model, name)
    _check_functions(model, name)
    _check_opsets(model, name)
    _check_graph(model.graph, (), name)
    for function in model.functions:
        _check_order(function, name)
    for graph in _graphs(model):
        if isinstance(graph, GraphProto):
            for info in (*graph.input, *graph.output):
                _check_type(info.name, info.type, name)
    read = read_names(model.graph)
    unread = set()
    for tensor in model.graph.initializer:
        _check_element_type(tensor, f"initializer {tensor.name}", name)
        if tensor.name not in read and fault(tensor):
            unread.add(tensor.name)
    for label, tensor in labelled_tensors(model):
        problem = fault(tensor)
        if problem and not (label == f"initializer {tensor.name}" and tensor.name in unread):
            raise ModelError(f"{name} is not valid ONNX: the {label} {problem}.")
    for sparse in sparse_tensors(model):
        _check_sparse(sparse, name)
    return unread


def read_names(graph: GraphProto) -> set[str]:
    """Return the tensors that nodes of a graph or its subgraphs read, and the outputs of the graph."""
    return {i for node in graph.node for i in node_reads(node)} | {o.name for o in graph.output}


# ---- nesting -----------------------------------------------------------------------------------------------
def _check_nesting(model: ModelProto, name: str) -> None:
    most = deepest_nesting()
    stack: list[tuple[Any, int]] = [(model.graph, 0), *((f, 0) for f in model.functions)]
    while stack:
        graph, depth = stack.pop()
        for node in graph.node:
            bodies = subgraphs(node)
            if bodies and depth == most:
                raise ModelError(
                    f"{name} has bodies nested more than {most} deep (at {_called(node)}): the installed "
                    "onnxruntime would take minutes or hours to load it, if it does at all."
                )
            stack.extend((body, depth + 1) for body in bodies)


def _check_functions(model: ModelProto, name: str) -> None:
    """Check that functions are not recursive, and that depth and size after inlining are limited."""
    if not model.functions:
        return
    functions = {(f.domain, f.name): f for f in model.functions}
    calls = {
        key: [called for n in all_nodes(f) if (called := (n.domain, n.op_type)) in functions]
        for key, f in functions.items()
    }
    try:
        order = list(TopologicalSorter(calls).static_order())
    except CycleError as e:
        around = ", ".join(str(key[1]) for key in e.args[1])
        raise ModelError(
            f"{name} is not valid ONNX: the functions {around} call each other without end."
        ) from e
    sizes: dict[tuple[str, str], int] = {}
    depths: dict[tuple[str, str], int] = {}
    for key in order:
        sizes[key] = sum(1 for _ in all_nodes(functions[key])) + sum(sizes[called] for called in calls[key])
        depths[key] = 1 + max((depths[called] for called in calls[key]), default=0)
        if depths[key] > _CALLS:
            raise ModelError(f"{name} has more than {_CALLS} nested function calls, starting at {key[1]}.")
    total = sum(sizes.get((n.domain, n.op_type), 1) for n in all_nodes(model.graph))
    if total > max(_INLINED, 2 * sum(1 for _ in all_nodes(model.graph))):
        raise ModelError(
            f"{name} has {total} nodes once its functions are inlined: onnxruntime cannot load it."
        )


# ---- names -------------------------------------------------------------------------------------------------
def _check_graph(graph: GraphProto, around: tuple[set[str], ...], name: str) -> None:
    """Check that every tensor is defined once, and is visible where it is read."""
    inputs = [i.name for i in graph.input if i.name]
    twice = next((i for i in inputs if inputs.count(i) > 1), None) if len(set(inputs)) < len(inputs) else None
    if twice is not None:
        raise ModelError(f"{name} is not valid ONNX: the graph {graph.name} has two inputs named {twice}.")
    own = {*inputs, *(t.name for t in graph.initializer), *(s.values.name for s in graph.sparse_initializer)}
    for node in graph.node:
        for output in filter(None, node.output):
            if output in own:
                raise ModelError(
                    f"{name} is not valid ONNX: {_called(node)} defines the tensor {output}, "
                    "which exists already."
                )
            own.add(output)
    visible = (own, *around)
    for node in graph.node:
        for read in filter(None, node.input):
            if not any(read in names for names in visible):
                raise ModelError(
                    f"{name} is not valid ONNX: {_called(node)} reads the tensor {read}, "
                    "which nothing defines."
                )
        for body in subgraphs(node):
            _check_graph(body, visible, name)
    for info in graph.output:
        if info.name and not any(info.name in names for names in visible):
            raise ModelError(
                f"{name} is not valid ONNX: the output {info.name} of the graph {graph.name} is not defined."
            )
    _check_order(graph, name)


def _check_order(graph: GraphProto | FunctionProto, name: str) -> None:
    made = {o: k for k, node in enumerate(graph.node) for o in node.output if o}
    before = {k: [made[i] for i in node_reads(node) if i in made] for k, node in enumerate(graph.node)}
    try:
        TopologicalSorter(before).prepare()
    except CycleError as e:
        around = ", ".join(_called(graph.node[k]) for k in e.args[1][:6])
        raise ModelError(
            f"{name} is not valid ONNX: nodes read each other's results in a cycle ({around})."
        ) from e


def _called(node: NodeProto) -> str:
    return f"the node {node.name or next(iter(node.output), '')} ({node.op_type})"


# ---- types and sizes ---------------------------------------------------------------------------------------
def _check_opsets(model: ModelProto, name: str) -> None:
    odd = next(
        (o for o in model.opset_import if o.domain in ("", "ai.onnx") and o.version not in _OPSETS), None
    )
    if odd is not None:
        raise ModelError(
            f"{name} is not valid ONNX: it imports version {odd.version} of the operator set of ONNX, "
            "which does not exist."
        )


def _check_type(label: str, kind: TypeProto, name: str) -> None:
    stack = [kind]
    while stack:
        kind = stack.pop()
        which = kind.WhichOneof("value")
        if which in ("tensor_type", "sparse_tensor_type") and getattr(kind, which).elem_type not in _BITS:
            number = getattr(kind, which).elem_type
            raise ModelError(
                f"{name} is not valid ONNX: the input or output {label} has the element type {number}, "
                "which does not exist."
            )
        if which in ("sequence_type", "optional_type"):
            stack.append(getattr(kind, which).elem_type)
        elif which == "map_type":
            stack.append(kind.map_type.value_type)


def is_type(number: int) -> bool:
    """Return True if ONNX has an element type of this number."""
    return number in _BITS


def _check_element_type(tensor: TensorProto, label: str, name: str) -> None:
    if tensor.data_type not in _BITS:
        raise ModelError(
            f"{name} is not valid ONNX: the {label} has the element type {tensor.data_type}, "
            "which does not exist."
        )


def value_bytes(tensor: TensorProto) -> int:
    """Return the size of a tensor's values in a file or as raw data in bytes, from its type and shape."""
    return -(-_BITS[tensor.data_type] * int(math.prod(tensor.dims)) // 8)


def data_field(tensor: TensorProto) -> str:
    """Return the field that holds non-raw values of the tensor's type."""
    return _FIELDS.get(tensor.data_type, ("int32_data", 1))[0]


def fault(tensor: TensorProto) -> str:
    """Return what is wrong with the type, shape or size of a tensor, or an empty string.

    External data files are not read.
    """
    if tensor.data_type not in _BITS:
        return f"has the element type {tensor.data_type}, which does not exist"
    if any(size < 0 for size in tensor.dims):
        return f"has the negative shape {list(tensor.dims)[:8]}"
    if math.prod(d for d in tensor.dims if d) > _BYTES // 16:
        return f"has the shape {list(tensor.dims)[:8]}, which no memory holds"
    if tensor.data_location == TensorProto.EXTERNAL:
        return "has strings in external data" if tensor.data_type == TensorProto.STRING else ""
    if tensor.HasField("raw_data") and tensor.data_type != TensorProto.STRING:
        expected, found, unit = value_bytes(tensor), len(tensor.raw_data), "bytes"
    else:
        field, entries = _FIELDS.get(tensor.data_type, ("int32_data", 1))
        count = entries * math.prod(tensor.dims)
        packed = 0 < _BITS[tensor.data_type] < 8
        expected, found, unit = (
            value_bytes(tensor) if packed else count,
            len(getattr(tensor, field)),
            "values",
        )
    return "" if found == expected else f"has {found} {unit} instead of {expected}"


def _check_sparse(sparse: SparseTensorProto, name: str) -> None:
    label = f"{name} is not valid ONNX: the sparse tensor {sparse.values.name}"
    if any(size < 0 for size in sparse.dims):
        raise ModelError(f"{label} has the negative shape {list(sparse.dims)[:8]}.")
    if sparse.indices.data_type != TensorProto.INT64:
        raise ModelError(f"{label} has indices that are not 64-bit integers.")
    needed, free = (
        _BITS[sparse.values.data_type] * math.prod(sparse.dims) // 8,
        psutil.virtual_memory().available,
    )
    if needed > free:
        raise ModelError(
            f"{label} takes {needed} bytes when it is made dense, and {free} bytes of memory are free."
        )


# ---- all tensors -------------------------------------------------------------------------------------------
def labelled_tensors(model: ModelProto) -> Iterator[tuple[str, TensorProto]]:
    """Yield every tensor of a model with a description for messages.

    This includes tensors in subgraphs, functions, attributes and sparse tensors.
    """
    for graph in _graphs(model):
        if isinstance(graph, GraphProto):
            yield from ((f"initializer {t.name}", t) for t in graph.initializer)
            for sparse in graph.sparse_initializer:
                yield from (
                    (f"sparse initializer {sparse.values.name}", t) for t in (sparse.values, sparse.indices)
                )
        for node in graph.node:
            for attribute in node.attribute:
                yield from (
                    (f"attribute {attribute.name} of {_called(node)}", t) for t in _tensors(attribute)
                )


def sparse_tensors(model: ModelProto) -> Iterator[SparseTensorProto]:
    """Yield every sparse tensor of a model."""
    for graph in _graphs(model):
        if isinstance(graph, GraphProto):
            yield from graph.sparse_initializer
        for node in graph.node:
            for attribute in node.attribute:
                yield from _sparse(attribute)


def _graphs(model: ModelProto) -> Iterator[GraphProto | FunctionProto]:
    stack: list[GraphProto | FunctionProto] = [*reversed(model.functions), model.graph]
    while stack:
        graph = stack.pop()
        yield graph
        for node in graph.node:
            stack.extend(subgraphs(node))


def _tensors(attribute: AttributeProto) -> Iterator[TensorProto]:
    if attribute.HasField("t"):
        yield attribute.t
    yield from attribute.tensors
    for sparse in _sparse(attribute):
        yield from (sparse.values, sparse.indices)


def _sparse(attribute: AttributeProto) -> Iterator[SparseTensorProto]:
    if attribute.HasField("sparse_tensor"):
        yield attribute.sparse_tensor
    yield from attribute.sparse_tensors
