"""What the operator table says of nodes and graphs."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from onnx import ModelProto, NodeProto

from eptq_onnx.graph import channel_axes, channels, replay
from eptq_onnx.graph.branches import flattened
from eptq_onnx.graph.infer import infer_shapes
from eptq_onnx.graph.view import STOP, GraphView, int_attribute
from eptq_onnx.ops.spec import Gradient
from eptq_onnx.ops.table import spec_of

_BRANCHES = replay.Recorded(False, inputs=(0,), applies=replay.decides)


def recorded(node: NodeProto) -> replay.Recorded | None:
    """What is recorded of a node's operator; of If, which has bodies and no row, its condition."""
    return _BRANCHES if node.op_type == "If" and not node.domain else spec_of(node).recorded


def executed(model: ModelProto, found: replay.Replay, read_as: Mapping[str, str] | None = None) -> ModelProto:
    """What samples run of a model: without settled Ifs, and with what was recorded as inputs.

    Parameters
    ----------
    model : ModelProto
    found : Replay
    read_as : mapping of str to str, optional
        What stands for a tensor of the recorded model in this one.
    """
    flat = flattened(model)
    result = found(flat, recorded, read_as)
    return result if result is flat else infer_shapes(result)


def is_elementwise(node: NodeProto) -> bool:
    """True if every output element depends on the input elements at its place only."""
    return spec_of(node).elementwise or node.op_type in ("Pow", "Mod")


def channels_of(view: GraphView, *, linear: bool = False) -> channels.Channels:
    """The channels of a graph that may be scaled; or, by the rules of linear operators alone, those that may
    be mixed."""
    axes = channel_axes_of(view)
    return channels.Channels(
        view, lambda node: spec.channels if (spec := spec_of(node)).mixes or not linear else None, axes
    )


def channel_axes_of(view: GraphView) -> dict[str, int]:
    """The channel axis of every computed tensor and input that has axes: the one place where it is
    decided."""

    def said_of(node: NodeProto) -> channel_axes.Said:
        spec = spec_of(node)
        # Which operand of a product of two computed matrices has channels nobody can tell.
        both = (
            spec.weight is not None
            and spec.weight in (spec.data or ())
            and not view.is_constant(node.input[spec.weight])
        )
        reads = None if both else spec.output_axis
        data = [i for k, i in enumerate(node.input) if i and (spec.data is None or k in spec.data)]
        return channel_axes.Said(
            data, spec.output_axis, reads, spec.axis or (channel_axes.keeps if spec.elementwise else None)
        )

    return channel_axes.channel_axes(view, said_of)


def output_channels(node: NodeProto, view: GraphView) -> int:
    """Number of output channels of a layer with a constant weight.

    Source: ONNX operators Conv (weight M x C/group x k), ConvTranspose (C x M/group x k), Gemm, MatMul.
    """
    spec = spec_of(node)
    shape = view.constant_shape(node.input[spec.weight or 0])
    return int(shape[spec.weight_axis(node)]) * (int_attribute(node, "group", 1) if spec.grouped_axis else 1)


def without_gradient(view: GraphView) -> frozenset[str]:
    """Names of the nodes that gradients cannot pass."""
    return frozenset(
        n.name
        for n in view.nodes
        if spec_of(n).gradient in (Gradient.NONE, Gradient.ZERO) or n.doc_string == STOP
    )


def pointwise(
    view: GraphView, tensor: str, fits: Callable[[tuple[int, ...]], bool]
) -> tuple[list[NodeProto], str]:
    """What computes a function of each element of a tensor alone.

    Parameters
    ----------
    view : GraphView
    tensor : str
    fits : callable
        Of the shape of a constant: True if it may take part.

    Returns
    -------
    list of NodeProto
        In order.
    str
        The one tensor through which ``tensor`` acts. Where there are several it is ``tensor`` itself, without
        nodes.
    """
    inside, nodes = {tensor}, list[NodeProto]()
    for node in view.nodes:
        reads = [i for i in node.input if i]
        constants_fit = all(fits(view.constant_shape(i)) for i in reads if view.is_constant(i))
        known = all(i in inside or view.is_constant(i) for i in reads)
        if known and constants_fit and inside.intersection(reads) and spec_of(node).elementwise:
            inside.add(node.output[0])
            nodes.append(node)
    exits = [
        t for t in inside if t in view.outputs or any(n.output[0] not in inside for n in view.consumers[t])
    ]
    return (nodes, exits[0]) if len(exits) == 1 else ([], tensor)


def output_parts(view: GraphView) -> list[str]:
    """The float tensors that the outputs are put together from.

    An output is looked into through operators that only rearrange its elements (a detector that joins boxes
    and scores has a part of each kind, and each has a spread of its own), and through operators that no
    gradient passes.
    """
    blocked = without_gradient(view)
    parts: dict[str, None] = {}
    queue, seen = list(view.outputs), set[str]()
    while queue:
        name = queue.pop(0)
        node = view.producer.get(name)
        if name in seen or node is None:
            continue
        seen.add(name)
        row = spec_of(node)
        if view.is_float(name) and row.rearranges:
            queue.extend(row.data_inputs(node))
        elif view.is_float(name) and node.name not in blocked:
            parts[name] = None
        else:
            queue.extend(i for i in node.input if i and not view.is_constant(i))
    return list(parts)
