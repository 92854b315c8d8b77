"""The schema of the operator table: what a row states about an operator."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from enum import Enum

from onnx import NodeProto

from eptq_onnx.graph import channel_axes, channels, replay
from eptq_onnx.graph.lower import (
    Lowering,
)
from eptq_onnx.graph.view import GraphView
from eptq_onnx.numerics.linear import LinearForm

Bounds = tuple[float, float]


class Role(Enum):
    """What an operator does to quantized values."""

    LAYER = "has a constant weight; does the bulk of the arithmetic"
    ARITHMETIC = "computes new values; runs on integers if the target has a kernel"
    EQUAL_SCALE = "moves or selects values; input and output share one scale"
    CLIPPING = "clips values; absorbed by the quantizer that follows"
    FLOAT = "stays in floating point"


class Gradient(Enum):
    """Where an operator's gradient comes from."""

    ENGINE = "the gradient engine has a rule"
    LOWERED = "the node is rewritten into operators with a rule"
    ZERO = "constant almost everywhere: its gradient is 0, not that of the identity; engines stop there"
    NONE = "no gradient: layers upstream are optimized on their own outputs only"


def _welcome(node: NodeProto, view: GraphView) -> str | None:
    """Return no objection."""
    return None


@dataclass(frozen=True)
class OpSpec:
    """A row of the operator table.

    Parameters
    ----------
    role : Role
    data : tuple of int or None
        Positions of the inputs that carry activations; None for all inputs.
    weight, bias : int or None
        Positions of a layer's constant inputs.
    weight_axis : callable
        Node to output-channel axis of the weight.
    grouped_axis : bool
        True if ``weight_axis`` holds the output channels of one group only (ConvTranspose).
    output_axis : int or None
        Channel axis of the output and of the activations that the operator reads; None if it does not define
        one.
    axis : callable or None
        How a channel axis propagates through the node (`eptq_onnx.graph.channel_axes`); None if it ends
        there. Through elementwise functions it always propagates.
    linear : callable or None
        (node, view) to the layer as a matrix product; None if it is not one.
    table : callable or None
        Node to position of the input whose rows (axis 0) it looks up; None if it does not look up rows.
    held : mapping of int to int
        Positions of constant inputs that a float operator reads as weights, each with its channel axis.
    lowering : Lowering or None
    gradient : Gradient
    rearranges : bool
        True if the output holds every element of the inputs, in another order or shape.
    elementwise : bool
        True if every output element depends only on the input elements at the same position.
    bounds : callable or None
        (node, view) to the bounds of the output; None if it is unbounded.
    channels : callable or None
        How factors on channels propagate through the node (`eptq_onnx.graph.channels`); None if unknown.
    mixes : bool
        True if an invertible matrix over the channels propagates like the factors: the operator is linear and
        treats all channels alike.
    recorded : replay.Recorded or None
        What is recorded from the float network and replayed, if the operator draws random numbers or chooses
        by value.
    objection : callable
        (node, view) to the reason why this particular node must stay float, or None.
    """

    role: Role = Role.FLOAT
    data: tuple[int, ...] | None = (0,)
    weight: int | None = None
    bias: int | None = None
    weight_axis: Callable[[NodeProto], int] = lambda node: 0
    grouped_axis: bool = False
    output_axis: int | None = None
    axis: channel_axes.Rule | None = None
    linear: Callable[[NodeProto, GraphView], LinearForm | None] | None = None
    table: Callable[[NodeProto], int | None] | None = None
    held: Mapping[int, int] = field(default_factory=dict)
    lowering: Lowering | None = None
    gradient: Gradient = Gradient.ENGINE
    rearranges: bool = False
    elementwise: bool = False
    bounds: Callable[[NodeProto, GraphView], Bounds] | None = None
    channels: channels.Rule | None = None
    mixes: bool = False
    recorded: replay.Recorded | None = None
    objection: Callable[[NodeProto, GraphView], str | None] = _welcome

    def data_inputs(self, node: NodeProto) -> list[str]:
        """Return the names of the inputs that carry activations."""
        positions = range(len(node.input)) if self.data is None else self.data
        return [node.input[i] for i in positions if i < len(node.input) and node.input[i]]
