"""Editing of graphs: unique names, new nodes and constants, promotion of constants to inputs."""

from __future__ import annotations

import hashlib
from collections import defaultdict
from collections.abc import Collection, Iterable, Mapping, MutableSequence, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray
from onnx import ModelProto, NodeProto, TensorProto, TypeProto, ValueInfoProto, helper

from eptq_onnx.graph.infer import infer_shapes
from eptq_onnx.graph.view import opset_of
from eptq_onnx.proto import store
from eptq_onnx.proto.bodies import all_names, node_reads, subgraphs
from eptq_onnx.proto.weights import without_weights


class Builder:
    """Collects new nodes and constants under names that a model does not use yet.

    Parameters
    ----------
    model : ModelProto
        Defines the names in use and the opset; it is not changed.
    prefix : str
        Prefix of every new name.
    """

    def __init__(self, model: ModelProto, prefix: str = "") -> None:
        self.opset = opset_of(model)
        self.nodes: list[NodeProto] = []
        self.initializers: list[TensorProto] = []
        self._prefix = prefix
        self._folder = store.folder_of(model)
        self._taken = all_names(model.graph)
        self._next: defaultdict[str, int] = defaultdict(lambda: 1)
        """The next number to try for each stem."""
        self._constants: dict[tuple[str, tuple[int, ...], bytes], str] = {}
        """Type, shape and digest of a value to its name."""

    def unique(self, stem: str) -> str:
        """Return an unused name, and reserve it."""
        name, k = stem, self._next[stem]
        while name in self._taken:
            name, k = f"{stem}_{k}", k + 1
        self._next[stem] = k
        self._taken.add(name)
        return name

    def constant(
        self, value: NDArray[np.generic] | float | int, stem: str = "constant", type_name: str | None = None
    ) -> str:
        """Add an initializer, shared by equal values; Python floats become float32, ints int64.

        Parameters
        ----------
        value : ndarray or number
        stem : str
        type_name : str, optional
            As in `keep`.
        """
        array = np.asarray(value, np.float32 if isinstance(value, float) else None)
        array = np.ascontiguousarray(array).reshape(array.shape)
        # Values of the type that numpy says share a constant, whoever asks for them.
        kind = array.dtype.str if type_name in (None, array.dtype.name) else str(type_name)
        key = (kind, array.shape, hashlib.sha256(array.tobytes()).digest())
        if key not in self._constants:
            name = self.unique(self._prefix + stem)
            self.keep(array, name, type_name)
            self._constants[key] = name
        return self._constants[key]

    def keep(self, value: NDArray[Any], name: str, type_name: str | None = None) -> None:
        """Add an initializer of a given name; a large one is stored if the model's weights are.

        Parameters
        ----------
        value : ndarray
        name : str
        type_name : str, optional
            The ONNX type whose bit patterns the value holds, such as float8e4m3fn; by default numpy's own.
        """
        tensor = store.constant(value, name, self._folder)
        if type_name is not None:
            tensor.data_type = TensorProto.DataType.Value(type_name.upper())
        self.initializers.append(tensor)

    def add(
        self,
        op_type: str,
        inputs: Sequence[str | float | NDArray[Any]],
        output: str | None = None,
        *,
        domain: str = "",
        outputs: Sequence[str] = (),
        **attributes: Any,
    ) -> str:
        """Add a node and return its first output, whose name is generated unless given.

        Inputs that are values become constants.
        """
        names = list(outputs) or [output or self.unique(f"{self._prefix}{op_type}_out")]
        self._taken.update(names)
        reads = [i if isinstance(i, str) else self.constant(i) for i in inputs]
        node = helper.make_node(
            op_type, reads, names, name=self.unique(f"{names[0]}/{op_type}"), domain=domain, **attributes
        )
        self.nodes.append(node)
        return names[0]

    def reduce(
        self,
        op_type: str,
        x: str,
        axes: Sequence[int] | None,
        output: str | None = None,
        *,
        keepdims: bool = False,
    ) -> str:
        """Add a reduction, with axes as attribute or input, as the opset requires; None for all axes."""
        as_input = self.opset >= (13 if op_type == "ReduceSum" else 18)
        if axes is None:
            return self.add(op_type, [x], output, keepdims=int(keepdims))
        if as_input:
            return self.add(
                op_type, [x, self.constant(np.array(axes, np.int64), "axes")], output, keepdims=int(keepdims)
            )
        return self.add(op_type, [x], output, axes=list(axes), keepdims=int(keepdims))


def renamed(node: NodeProto, names: Mapping[str, str]) -> NodeProto:
    """Return a copy of a node that reads and writes tensors under other names, in its subgraphs, too."""
    copy = NodeProto()
    copy.CopyFrom(node)
    copy.input[:] = [names.get(i, i) for i in copy.input]
    copy.output[:] = [names.get(o, o) for o in copy.output]
    for graph in subgraphs(copy):
        nodes = [renamed(n, names) for n in graph.node]
        del graph.node[:]
        graph.node.extend(nodes)
        for output in graph.output:
            output.name = names.get(output.name, output.name)
    return copy


def renamed_tensor(tensor: TensorProto, name: str) -> TensorProto:
    """Return a copy of an initializer under another name."""
    copy = TensorProto()
    copy.CopyFrom(tensor)
    copy.name = name
    return copy


def with_nodes(
    model: ModelProto,
    nodes: Iterable[NodeProto],
    initializers: Iterable[TensorProto] = (),
    *,
    drop: Iterable[str] = (),
) -> ModelProto:
    """Return a copy of a model with other nodes, with initializers added, and others dropped by name."""
    result, gone, replacement = without_weights(model), set(drop), list(nodes)
    del result.graph.node[:]
    result.graph.node.extend(replacement)
    result.graph.initializer.extend(t for t in model.graph.initializer if t.name not in gone)
    result.graph.initializer.extend(initializers)
    if gone:
        inputs = [i for i in result.graph.input if i.name not in gone]
        del result.graph.input[:]
        result.graph.input.extend(inputs)
    return result


def with_constants(model: ModelProto, values: Mapping[str, NDArray[Any]]) -> ModelProto:
    """Return a copy of a model with new values of some initializers, stored if the model's weights are."""
    folder = store.folder_of(model)
    constants = [store.constant(value, name, folder) for name, value in values.items()]
    return with_nodes(model, model.graph.node, constants, drop=values)


def promote_to_inputs(model: ModelProto, names: Iterable[str]) -> None:
    """Turn initializers into graph inputs without a default value, in place."""
    wanted = set(names)
    present = {i.name for i in model.graph.input}
    for tensor in model.graph.initializer:
        if tensor.name in wanted - present:
            model.graph.input.append(
                helper.make_tensor_value_info(tensor.name, tensor.data_type, list(tensor.dims))
            )
    _keep(model.graph.initializer, {t.name for t in model.graph.initializer} - wanted)


def add_output(model: ModelProto, name: str, elem_type: int = TensorProto.UNDEFINED) -> None:
    """Expose a tensor as a graph output, in place.

    If the model does not declare its type, the output has ``elem_type`` and unknown shape; UNDEFINED leaves
    the type to be inferred by readers.
    """
    if all(o.name != name for o in model.graph.output):
        known = [v for v in (*model.graph.value_info, *model.graph.input) if v.name == name]
        model.graph.output.append(known[0] if known else described(name, elem_type))
        for info in known:
            if info in model.graph.value_info:
                model.graph.value_info.remove(info)


def set_outputs(model: ModelProto, names: Sequence[str], elem_type: int = TensorProto.FLOAT) -> None:
    """Make ``names`` the graph outputs, in place, with ``elem_type`` where the model declares no type.

    The types and shapes of former outputs are kept: onnxruntime's pool gradients crash without the shape of
    their output.
    """
    known = {v.name for v in (*model.graph.value_info, *model.graph.input)}
    model.graph.value_info.extend(o for o in model.graph.output if o.name not in known)
    del model.graph.output[:]
    for name in names:
        add_output(model, name, elem_type)


def described(name: str, kind: int | TypeProto) -> ValueInfoProto:
    """Return the description of a tensor of an element type, or of a value of another type.

    `TensorProto.UNDEFINED` leaves the type open, which is allowed for outputs.
    """
    if isinstance(kind, TypeProto):
        return ValueInfoProto(name=name, type=kind)
    return helper.make_tensor_value_info(name, kind, None) if kind else ValueInfoProto(name=name)


def exposing(model: ModelProto, names: Iterable[str]) -> ModelProto:
    """Return a copy that has ``names`` as additional outputs."""
    result = with_nodes(model, model.graph.node)
    for name in dict.fromkeys(names):
        add_output(result, name)
    return result


def giving(model: ModelProto, names: Sequence[str]) -> ModelProto:
    """Return a copy whose outputs are those of these tensors that are computed, and only what they need."""
    result = with_nodes(model, model.graph.node)
    made = {o for n in model.graph.node for o in n.output}
    set_outputs(result, [name for name in names if name in made])
    prune(result)
    return result


def import_domain(model: ModelProto, domain: str, version: int = 1) -> None:
    """Import an operator set unless the model does, in place."""
    if not opset_of(model, domain):
        model.opset_import.append(helper.make_opsetid(domain, version))


def specialize(model: ModelProto, shapes: Mapping[str, Sequence[int]]) -> ModelProto:
    """Return a copy whose inputs have fixed shapes and whose other shapes are inferred from them."""
    result = ModelProto()
    result.CopyFrom(model)
    del result.graph.value_info[:]
    for info in result.graph.input:
        if info.name in shapes:
            info.CopyFrom(
                helper.make_tensor_value_info(
                    info.name, info.type.tensor_type.elem_type, list(shapes[info.name])
                )
            )
    for info in result.graph.output:
        if info.type.HasField("tensor_type"):
            info.type.tensor_type.ClearField("shape")
    return infer_shapes(result)


def prune(model: ModelProto) -> None:
    """Remove nodes and initializers that no output needs, in place."""
    needed = {o.name for o in model.graph.output}
    nodes = []
    for node in reversed(model.graph.node):
        if any(o in needed for o in node.output):
            nodes.append(node)
            needed.update(node_reads(node))
    del model.graph.node[:]
    model.graph.node.extend(reversed(nodes))
    _keep(model.graph.initializer, needed)
    _keep(model.graph.value_info, needed)


def _keep(named: MutableSequence[Any], names: Collection[str]) -> None:
    """Remove all messages but those of some names, in place, without a copy of the others."""
    for place in reversed(range(len(named))):
        if named[place].name not in names:
            del named[place]
