"""The working state of the planner, and what it reads of a node."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np
from onnx import NodeProto

from eptq_onnx.graph.view import GraphView
from eptq_onnx.ops import Bounds, OpSpec, spec_of
from eptq_onnx.targets import Target

NO_BOUNDS: Bounds = (-np.inf, np.inf)


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

    def final(self, tensor: str) -> str:
        """Return the tensor behind absorbed clipping operators, which is quantized in place of ``tensor``."""
        while tensor in self.absorbed:
            tensor = self.absorbed[tensor]
        return tensor

    def readers(self, tensor: str) -> list[NodeProto]:
        """Return the nodes that read `final` of the tensor."""
        return self.view.consumers[self.final(tensor)]


def bounds_of(draft: Draft, tensor: str) -> Bounds:
    """Return the limits that the producer of a tensor guarantees, infinite where there are none."""
    producer = draft.view.producer.get(tensor)
    if producer is None:
        return NO_BOUNDS
    row = spec_of(producer)
    return row.bounds(producer, draft.view) if row.bounds else NO_BOUNDS


def reads(node: NodeProto, tensor: str) -> bool:
    """Return True if the tensor is one of the node's activations (not a shape, for instance)."""
    return tensor in spec_of(node).data_inputs(node)


def weight_of(node: NodeProto) -> str:
    """Return the name of a layer's weight."""
    return str(node.input[spec_of(node).weight or 0])
