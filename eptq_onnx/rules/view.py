"""Read-only view of a Q/DQ file: its quantized tensors, their scales and zero points, and their readers."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray
from onnx import ModelProto, NodeProto, TensorProto

from eptq_onnx.graph import edit
from eptq_onnx.graph.replay import RANDOM
from eptq_onnx.graph.view import GraphView, int_attribute
from eptq_onnx.proto.bodies import node_reads
from eptq_onnx.rules.scopes import BODY_DOMAIN
from eptq_onnx.runtime import Session

QUANTIZE, DEQUANTIZE = "QuantizeLinear", "DequantizeLinear"


@dataclass(frozen=True)
class Quantized:
    """A QuantizeLinear or DequantizeLinear node with its scale and zero point.

    Parameters
    ----------
    node : NodeProto
    integers : str
        The integer tensor.
    elem_type : int
        Type of the integers (TensorProto.DataType).
    scale, zero_point : ndarray or None
        None for a scale computed at run time, or a zero point that is absent or computed at run time.
    axis : int or None
        Axis with one scale per index or block; None for one scale per tensor.
    constant : bool
        True if the integers are a constant: a weight, bias or operand.
    """

    node: NodeProto
    integers: str
    elem_type: int
    scale: NDArray[Any] | None
    zero_point: NDArray[Any] | None
    axis: int | None
    constant: bool

    @property
    def type_name(self) -> str:
        """Return the name of the integers' type, such as int8."""
        return str(TensorProto.DataType.Name(self.elem_type)).lower()

    @property
    def block(self) -> int:
        """Return the size of its blocks; 0 if it has none."""
        return int_attribute(self.node, "block_size", 0)

    @property
    def zeros(self) -> NDArray[np.int64]:
        """Return the zero points, 0 where there are none."""
        return np.zeros((), np.int64) if self.zero_point is None else self.zero_point.astype(np.int64)

    @property
    def is_shifted(self) -> bool:
        """Return True if any zero point is not 0."""
        return bool(np.any(self.zeros))

    def same_numbers(self, other: Quantized) -> bool:
        """Return True if scale and zero point equal those of another tensor."""
        if self.scale is None or other.scale is None:
            return False
        return np.array_equal(self.scale, other.scale) and np.array_equal(self.zeros, other.zeros)


class QdqView:
    """Index of the quantizers of a flat model; see `eptq_onnx.rules.scopes.flat`."""

    def __init__(self, model: ModelProto) -> None:
        self.graph = GraphView(model)
        view = self.graph
        self._fixed = set(view.initializers)
        for node in view.nodes:
            if (
                node.op_type != DEQUANTIZE
                and node.domain != BODY_DOMAIN
                and node.op_type not in RANDOM
                and self._fixed.issuperset(i for i in node_reads(node) if i)
            ):
                self._fixed.update(o for o in node.output if o)
        pairs = [n for n in view.nodes if n.op_type in (QUANTIZE, DEQUANTIZE)]
        self._values = self._constants(i for n in pairs for i in n.input)
        self.quantizers = [self._read(n) for n in pairs if n.op_type == QUANTIZE]
        self.dequantizers = [self._read(n) for n in pairs if n.op_type == DEQUANTIZE]
        self._dequantized = {q.node.output[0]: q for q in self.dequantizers}
        self._making = {q.integers: q for q in self.quantizers}
        self._quantized: dict[str, list[Quantized]] = defaultdict(list)
        for q in self.quantizers:
            self._quantized[q.node.input[0]].append(q)
        self.nodes = [
            n
            for n in view.nodes
            if n.op_type not in (QUANTIZE, DEQUANTIZE) and not all(o in self._fixed for o in n.output if o)
        ]
        """Nodes that depend on the inputs, without quantizers."""

    def read(self, tensor: str) -> Quantized | None:
        """Return the DequantizeLinear that produces a tensor, or None."""
        return self._dequantized.get(tensor)

    def written(self, tensor: str) -> list[Quantized]:
        """Return the QuantizeLinear nodes that read a tensor."""
        return self._quantized.get(tensor, [])

    def between(self, read: Quantized) -> tuple[list[NodeProto], Quantized | None]:
        """Return the nodes between a DequantizeLinear and its QuantizeLinear, and the latter or None."""
        nodes: list[NodeProto] = []
        tensor = read.integers
        while (node := self.graph.producer.get(tensor)) is not None and node.op_type != QUANTIZE:
            if not node.input or len(nodes) == len(self.graph.nodes):
                return nodes, None
            nodes.append(node)
            tensor = node.input[0]
        return nodes, None if node is None else self._making[tensor]

    @cached_property
    def pairs(self) -> list[tuple[Quantized, Quantized]]:
        """The QuantizeLinear and the DequantizeLinear of each activation."""
        return [
            (source, q)
            for q in self.dequantizers
            if not q.constant and (source := self.between(q)[1]) is not None
        ]

    def maker(self, tensor: str) -> NodeProto | None:
        """Return the node that makes a tensor, in front of all quantizers."""
        while (read := self.read(tensor)) is not None and not read.constant:
            source = self.between(read)[1]
            if source is None:
                break
            tensor = source.node.input[0]
        return self.graph.producer.get(tensor)

    def readers(self, tensor: str) -> list[NodeProto]:
        """Return the nodes that read a tensor."""
        return self.graph.consumers.get(tensor, [])

    def value(self, tensor: str) -> NDArray[Any] | None:
        """Return the value of a quantizer's constant input, or None if it is computed at run time."""
        return self._values.get(tensor)

    def is_constant(self, tensor: str) -> bool:
        """Return True if a tensor, or the integers it is dequantized from, do not depend on the inputs."""
        read = self.read(tensor)
        return tensor in self._fixed or (read is not None and read.constant)

    @cached_property
    def stripped(self) -> GraphView:
        """Return the float network without quantizers; its constants have shapes but no values."""
        names = {q.node.output[0]: source.node.input[0] for source, q in self.pairs}
        names = {name: _last(name, names) for name in names}
        nodes = [edit.renamed(n, names) for n in self.nodes]
        model = ModelProto()
        model.opset_import.extend(self.graph.model.opset_import)
        graph = model.graph
        graph.node.extend(nodes)
        for field in ("input", "output", "value_info"):
            getattr(graph, field).extend(getattr(self.graph.model.graph, field))
        constants = {i for n in nodes for i in n.input if i and self.is_constant(i)}
        for name in sorted(constants):
            shape = self.graph.static_shape(name)
            if shape is not None:
                graph.initializer.append(TensorProto(name=name, data_type=TensorProto.FLOAT, dims=shape))
        return GraphView(model)

    @cached_property
    def stripped_nodes(self) -> dict[str, NodeProto]:
        """Return the nodes of `stripped` by name."""
        return {n.name: n for n in self.stripped.nodes}

    def _read(self, node: NodeProto) -> Quantized:
        integers = node.input[0] if node.op_type == DEQUANTIZE else node.output[0]
        zero = node.input[2] if len(node.input) > 2 else ""
        scale = self._values.get(node.input[1])
        known = self.graph.elem_type(zero) if zero else TensorProto.UNDEFINED
        fallback = self.graph.elem_type(integers) if node.op_type == DEQUANTIZE else TensorProto.UINT8
        axis = int_attribute(node, "axis", 1) if scale is not None and scale.size > 1 else None
        shape = self.graph.shape(node.input[0])
        if axis is not None and shape is not None:
            axis %= max(len(shape), 1)
        return Quantized(
            node,
            integers,
            known or fallback,
            scale,
            self._values.get(zero),
            axis,
            integers in self._fixed,
        )

    def _constants(self, wanted: Iterable[str]) -> dict[str, NDArray[Any]]:
        """Return the values of constants, after computing those that nodes derive from other constants."""
        names = {name for name in wanted if name in self._fixed}
        values = {name: self.graph.constant(name) for name in names if self.graph.is_constant(name)}
        made = sorted(names - values.keys())
        if made:
            inside = self.graph.upstream(made)
            part = ModelProto()
            part.CopyFrom(self.graph.model)
            del part.graph.node[:], part.graph.input[:], part.graph.output[:]
            part.graph.node.extend(n for n in self.graph.nodes if any(o in inside for o in n.output))
            unread = [t.name for t in part.graph.initializer if t.name not in inside]
            kept = [t for t in part.graph.initializer if t.name not in unread]
            del part.graph.initializer[:]
            part.graph.initializer.extend(kept)
            part.graph.output.extend(edit.described(name, self.graph.elem_type(name)) for name in made)
            values.update(Session(part).run({}))
        return values


def _last(name: str, names: Mapping[str, str]) -> str:
    while name in names:
        name = names[name]
    return name
