"""Read-only view of a graph: producers and consumers of tensors, constants, types and shapes."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from functools import cached_property
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import ModelProto, NodeProto, TensorProto, TypeProto

from eptq_onnx.proto import store
from eptq_onnx.proto.bodies import node_reads
from eptq_onnx.records import Layer

Shape = tuple[int | None, ...]
QUANTIZERS = ("QuantizeLinear", "DequantizeLinear")


def attribute(node: NodeProto, name: str, default: object = None) -> object:
    """Return the value of a node's attribute, or ``default``; strings are returned as str."""
    for item in node.attribute:
        if item.name == name:
            value = onnx.helper.get_attribute_value(item)
            return value.decode("utf-8", "replace") if isinstance(value, bytes) else value
    return default


def int_attribute(node: NodeProto, name: str, default: int) -> int:
    """Return an integer attribute of a node."""
    value = attribute(node, name, default)
    return int(value)  # type: ignore[call-overload,no-any-return]


def ints_attribute(node: NodeProto, name: str) -> list[int]:
    """Return an integer-list attribute of a node, empty if absent."""
    value = attribute(node, name, ())
    return [int(v) for v in value]  # type: ignore[attr-defined]


def opset_of(model: ModelProto, domain: str = "") -> int:
    """Return the version of an operator set that the model imports, 0 if it imports none."""
    names = ("", "ai.onnx") if domain == "" else (domain,)
    return max((int(o.version) for o in model.opset_import if o.domain in names), default=0)


STOP = "eptq: a constant to gradients"
"""``doc_string`` that marks a node of a private copy so that no gradient passes, whatever its operator."""


class GraphView:
    """Index of a model's main graph. The model must not be edited while the view is in use."""

    def __init__(self, model: ModelProto) -> None:
        self.model = model
        self.nodes: list[NodeProto] = list(model.graph.node)
        self.producer: dict[str, NodeProto] = {o: n for n in self.nodes for o in n.output if o}
        self.consumers: dict[str, list[NodeProto]] = defaultdict(list)
        for node in self.nodes:
            for name in dict.fromkeys(node_reads(node)):
                self.consumers[name].append(node)
        self.initializers: dict[str, TensorProto] = {t.name: t for t in model.graph.initializer}
        self.outputs: tuple[str, ...] = tuple(o.name for o in model.graph.output)
        self.inputs: tuple[str, ...] = tuple(
            i.name for i in model.graph.input if i.name not in self.initializers
        )
        self._arrays: dict[str, NDArray[Any]] = {}
        self._finite: dict[str, bool] = {}

    @cached_property
    def _types(self) -> dict[str, tuple[int, Shape | None]]:
        table: dict[str, tuple[int, Shape | None]] = {}
        for info in (*self.model.graph.value_info, *self.model.graph.input, *self.model.graph.output):
            tensor = info.type.tensor_type
            shape = None
            if tensor.HasField("shape"):
                shape = tuple(int(d.dim_value) if d.HasField("dim_value") else None for d in tensor.shape.dim)
            table[info.name] = (int(tensor.elem_type), shape)
        for name, tensor_proto in self.initializers.items():
            table[name] = (int(tensor_proto.data_type), tuple(int(d) for d in tensor_proto.dims))
        return table

    def is_constant(self, name: str) -> bool:
        """Return True if a tensor is an initializer, whose value no caller can replace."""
        return name in self.initializers

    def constant(self, name: str) -> NDArray[Any]:
        """Return the value of an initializer; a stored one is read from its file each time."""
        tensor = self.initializers[name]
        if store.is_stored(tensor):
            return store.array(tensor)
        if name not in self._arrays:
            self._arrays[name] = store.array(tensor)
        return self._arrays[name]

    def constant_parts(self, name: str) -> Iterator[tuple[slice, NDArray[Any]]]:
        """Yield the value of an initializer in chunks; see `store.parts`."""
        return store.parts(self.initializers[name])

    def constant_shape(self, name: str) -> tuple[int, ...]:
        """Return the shape of an initializer."""
        return tuple(int(d) for d in self.initializers[name].dims)

    def is_finite(self, name: str) -> bool:
        """Return False if an initializer contains NaN or infinity."""
        if name not in self._finite:
            self._finite[name] = store.is_finite(self.initializers[name])
        return self._finite[name]

    def elem_type(self, name: str) -> int:
        """Return the element type (TensorProto.DataType) of a tensor, or UNDEFINED if unknown."""
        return self._types.get(name, (TensorProto.UNDEFINED, None))[0]

    def kind(self, name: str) -> int | TypeProto:
        """Return the `elem_type` of a tensor, or the whole type of a sequence, map or optional."""
        return self._others.get(name) or self.elem_type(name)

    @cached_property
    def _others(self) -> dict[str, TypeProto]:
        infos = (*self.model.graph.value_info, *self.model.graph.input, *self.model.graph.output)
        return {v.name: v.type for v in infos if v.type.WhichOneof("value") not in (None, "tensor_type")}

    def is_float(self, name: str) -> bool:
        """Return True for a float32 tensor."""
        return self.elem_type(name) == TensorProto.FLOAT

    def shape(self, name: str) -> Shape | None:
        """Return the inferred shape with None for unknown dimensions, or None if the rank is unknown."""
        return self._types.get(name, (0, None))[1]

    def static_shape(self, name: str) -> tuple[int, ...] | None:
        """Return the shape if every dimension is known, else None."""
        shape = self.shape(name)
        if shape is None or any(d is None for d in shape):
            return None
        return tuple(int(d) for d in shape if d is not None)

    @cached_property
    def varying(self) -> set[str]:
        """Tensors that depend on the values of the inputs, not only on their shapes."""
        return self.downstream(
            self.inputs, frozenset(n.name for n in self.nodes if n.op_type in ("Shape", "Size"))
        )

    def downstream(self, sources: Iterable[str], blocked: frozenset[str] = frozenset()) -> set[str]:
        """Return ``sources`` and all tensors computed from them, not through nodes named in ``blocked``."""
        reached = set(sources)
        for node in self.nodes:
            if node.name not in blocked and any(i in reached for i in node_reads(node)):
                reached.update(o for o in node.output if o)
        return reached

    def upstream(self, targets: Iterable[str], blocked: frozenset[str] = frozenset()) -> set[str]:
        """Return ``targets`` and all tensors they are computed from, not through ``blocked`` nodes."""
        needed = set(targets)
        for node in reversed(self.nodes):
            if node.name not in blocked and any(o in needed for o in node.output):
                needed.update(node_reads(node))
        return needed


def last_layers(view: GraphView, layers: Sequence[Layer]) -> list[Layer]:
    """Return the layers without another layer downstream."""
    before = view.upstream(layer.input for layer in layers)
    return [layer for layer in layers if layer.output not in before]


class Constants(Mapping[str, NDArray[Any]]):
    """Constants of a model by name, as float32, read on demand.

    Parameters
    ----------
    view : GraphView
    names : collection of str
    """

    def __init__(self, view: GraphView, names: Collection[str]) -> None:
        self._view, self._names = view, tuple(names)

    def __getitem__(self, name: str) -> NDArray[Any]:
        if name not in self._names:
            raise KeyError(name)
        return np.asarray(self._view.constant(name), np.float32)

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)
