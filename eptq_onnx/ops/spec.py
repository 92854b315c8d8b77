"""What a row of the operator table says."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
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

    LAYER = "has a constant weight; the bulk of the arithmetic"
    ARITHMETIC = "computes new values; runs on integers if the target has a kernel"
    EQUAL_SCALE = "moves or selects values; input and output share one scale"
    CLIPPING = "cuts values off; absorbed by the quantizer behind it"
    FLOAT = "stays in floating point"


class Gradient(Enum):
    """Where an operator's gradient comes from."""

    ENGINE = "the gradient engine has a rule"
    LOWERED = "the node is rewritten into operators with a rule"
    ZERO = "constant almost everywhere: its gradient is 0, and not that of the identity; engines stop there"
    NONE = "no gradient: what lies before it is optimized on its own outputs only"


def _welcome(node: NodeProto, view: GraphView) -> str | None:
    """No objection."""
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
        Channel axis of what the operator makes, and of the activations that it reads; None where it says
        nothing.
    axis : callable or None
        How a channel axis goes through the node (`eptq_onnx.graph.channel_axes`); None where it ends there.
        Through functions of single elements it always goes.
    linear : callable or None
        (node, view) to the layer as a matrix product; None where it is none.
    table : callable or None
        Node to position of the input whose rows (axis 0) it looks up; None where it does not.
    lowering : Lowering or None
    gradient : Gradient
    rearranges : bool
        True if the output holds every element of the inputs, in another order or shape.
    elementwise : bool
        True if every output element depends on the input elements at its place only.
    bounds : callable or None
        (node, view) to the limits of the output; None where there is none.
    channels : callable or None
        What factors on the channels of its tensors do to the node (`eptq_onnx.graph.channels`); None where
        nobody can tell.
    mixes : bool
        True if that holds for any invertible matrix over the channels, too: it does the same to all, and is
        linear.
    recorded : replay.Recorded or None
        What of it is recorded from the float network and replayed, if it draws random numbers or chooses by
        value.
    objection : callable
        (node, view) to a reason why this node, unlike its siblings, must stay float; or None.
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
        """Names of the inputs that carry activations."""
        positions = range(len(node.input)) if self.data is None else self.data
        return [node.input[i] for i in positions if i < len(node.input) and node.input[i]]
