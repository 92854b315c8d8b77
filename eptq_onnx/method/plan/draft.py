"""The working state of the planner, and what it reads of a node."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np
from onnx import NodeProto

from eptq_onnx.graph.integer_products import dynamic_objection
from eptq_onnx.graph.view import GraphView
from eptq_onnx.ops import Bounds, OpSpec, Role, spec_of
from eptq_onnx.records import DYNAMIC_BITS
from eptq_onnx.targets import Operator, Target

NO_BOUNDS: Bounds = (-np.inf, np.inf)
_NO_ROW = Operator(runs="float")
"""What a target says about an operator that it does not name."""


@dataclass
class Draft:
    """What is known of the graph while the plan is made."""

    view: GraphView
    target: Target
    quantized: dict[str, OpSpec] = field(default_factory=dict)
    """Row of each node that runs on integers, by node name."""
    absorbed: dict[str, str] = field(default_factory=dict)
    """Tensor in front of an absorbed clipping operator to the tensor behind it."""
    reasons: dict[str, str] = field(default_factory=dict)
    """Why nodes stay float, by node name."""
    sensitive: Mapping[str, str] = field(default_factory=dict)
    """Tensors that must stay float, each with the reason."""
    excluded: Mapping[str, str] = field(default_factory=dict)
    """Nodes that the user excludes, each with the reason."""
    bits: Mapping[str, tuple[int, int]] = field(default_factory=dict)
    """Weight and activation bits of nodes for which the user overrides the defaults."""
    whole: Mapping[str, str] = field(default_factory=dict)
    """Nodes of patterns that the target keeps whole, each with the pattern's name."""
    unread: dict[str, str] = field(default_factory=dict)
    """Sum to the branch that it reads in float."""
    stored: set[str] = field(default_factory=set)
    """Nodes that stay float and whose weights are quantized."""
    dynamic: set[str] = field(default_factory=set)
    """Layers that run on integers and whose inputs are quantized in every run."""
    asked: Callable[[str], bool] = lambda node: False
    """Whether a layer of a name is to be dynamic where it can be."""
    only_dynamic: bool = False
    """True if no activation has a fixed range."""
    activation_bits: int = 8
    """Activation bits of nodes that no rule names."""

    def final(self, tensor: str) -> str:
        """Return the tensor behind absorbed clipping operators, which is quantized in place of ``tensor``."""
        while tensor in self.absorbed:
            tensor = self.absorbed[tensor]
        return tensor

    def bits_read(self, node: NodeProto) -> int:
        """Return the bits that the options give the activations that a node reads."""
        return self.bits[node.name][1] if node.name in self.bits else self.activation_bits

    def row(self, node: NodeProto) -> Operator:
        """Return what the target says about a node's operator."""
        return self.target.operators.get(node.op_type, _NO_ROW)

    def inputs(self, node: NodeProto) -> list[str]:
        """Return the activations that the node reads as integers if it runs on integers."""
        return [i for i in spec_of(node).data_inputs(node) if i != self.unread.get(node.name)]

    def is_read(self, tensor: str) -> bool:
        """Return True if a node that runs on integers reads `final` of the tensor as integers."""
        final = self.final(tensor)
        return any(n.name in self.quantized and final in self.inputs(n) for n in self.view.consumers[final])

    def is_dynamic(self, node: NodeProto) -> bool:
        """Return True if a layer that nothing objects to is to quantize its input in every run."""
        asked = self.row(node).dynamic and self.is_weighted(node) and self.asked(node.name)
        return asked and self.bits_read(node) == DYNAMIC_BITS and dynamic_objection(node, self.view) is None

    def is_weighted(self, node: NodeProto) -> bool:
        """Return True for a layer with a constant weight."""
        spec = spec_of(node)
        return (
            spec.role is Role.LAYER
            and spec.weight is not None
            and len(node.input) > spec.weight
            and self.view.is_constant(node.input[spec.weight])
        )

    @cached_property
    def behind_layers(self) -> set[str]:
        """Return the tensors that are computed from the output of a layer."""
        return self.view.downstream(o for n in self.view.nodes if self.is_weighted(n) for o in n.output)


def bounds_of(draft: Draft, tensor: str) -> Bounds:
    """Return the limits that the producer of a tensor guarantees, infinite where there are none."""
    producer = draft.view.producer.get(tensor)
    if producer is None:
        return NO_BOUNDS
    row = spec_of(producer)
    return row.bounds(producer, draft.view) if row.bounds else NO_BOUNDS


def weight_of(node: NodeProto) -> str:
    """Return the name of a layer's weight."""
    return str(node.input[spec_of(node).weight or 0])
