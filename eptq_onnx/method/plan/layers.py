"""Plan the layers: their tensors, weight specs and biases."""

from __future__ import annotations

from functools import partial

from onnx import ModelProto, NodeProto

from eptq_onnx.config import Config
from eptq_onnx.graph.view import GraphView, int_attribute
from eptq_onnx.method.plan.draft import Draft, weight_of
from eptq_onnx.method.plan.given import with_given_scales
from eptq_onnx.method.plan.storing import PRODUCTS
from eptq_onnx.numerics.spec import QuantSpec
from eptq_onnx.ops import output_channels, spec_of
from eptq_onnx.proto.bodies import all_names
from eptq_onnx.records import Layer
from eptq_onnx.targets import Target, WeightRules


def layers_of(draft: Draft, config: Config, model: ModelProto) -> tuple[Layer, ...]:
    """Return the layers whose weights are quantized, in topological order."""
    view, taken = draft.view, all_names(model.graph)
    nodes = _layer_nodes(draft)
    # A path that bypasses all other layers does not make a layer the first: residual streams bypass every
    # layer.
    behind = view.downstream(o for n in nodes for o in n.output)
    before = view.upstream(n.input[0] for n in nodes)
    layers: list[Layer] = []
    axes: dict[str, int] = {}
    rules: dict[str, WeightRules] = {}
    edges = {weight_of(n) for n in nodes if n.input[0] not in behind or n.output[0] not in before}
    dense = {weight_of(n) for n in nodes if not _is_depthwise(n, view)}
    # A weight shared by several layers gets the largest bit width that any of them asks for.
    wanted: dict[str, int] = {}
    for node in nodes:
        if node.name in draft.bits:
            wanted[weight_of(node)] = max(wanted.get(weight_of(node), 0), draft.bits[node.name][0])
    for node in nodes:
        spec, weight = spec_of(node), weight_of(node)
        rank = len(view.constant_shape(weight))
        axis = spec.weight_axis(node) % rank
        if axes.setdefault(weight, axis) != axis:
            why = "that has other output channels"
            _leave(node, f"its weight {weight} is shared with a layer {why}", draft)
            continue
        target = draft.target.of(node.op_type)
        if rules.setdefault(weight, target.weight) != target.weight:
            why = "whose weights follow other rules"
            _leave(node, f"its weight {weight} is shared with a layer {why}", draft)
            continue
        bias: str | None = None
        has_bias = spec.bias is not None and len(node.input) > spec.bias and bool(node.input[spec.bias])
        if spec.bias is not None and bias_objection(node, view) is None:
            bias = node.input[spec.bias] if has_bias else f"{node.name}_bias"
            while not has_bias and bias in taken:
                bias += "_"
            taken.add(bias)
        edge, depthwise = weight in edges, weight not in dense
        bits = wanted.get(weight, config.edge_bits if edge else config.weight_bits)
        spec_of_bits = partial(target.weight_spec, depthwise=depthwise)
        planned = _weight_spec(node, target, (bits, axis, depthwise), rank, config.block)
        layers.append(
            Layer(
                node=node.name,
                op_type=node.op_type,
                weight=weight,
                input=node.input[0],
                output=node.output[0],
                result=draft.final(node.output[0]),
                bias=bias,
                has_bias=has_bias,
                weight_spec=with_given_scales(planned, weight, view, config, spec_of_bits),
                output_axis=-1 if spec.output_axis is None else spec.output_axis,
                edge=edge,
                depthwise=depthwise,
                stored=node.name in draft.stored,
                dynamic=node.name in draft.dynamic,
            )
        )
    return tuple(layers)


def _weight_spec(
    node: NodeProto, target: Target, wanted: tuple[int, int, bool], rank: int, block: int | None
) -> QuantSpec:
    """Return the spec of a weight; ``wanted``: its bits, the axis of its outputs, whether it is depthwise."""
    bits, axis, depthwise = wanted
    if block is not None and node.op_type in PRODUCTS:
        # Of the last two axes, the terms have the one that the outputs do not have.
        return target.block_spec(bits, rank - 1 if axis == rank - 2 else rank - 2, block)
    # Integer kernels for stacked matrices take a single scale.
    stacked = node.op_type == "MatMul" and rank > 2
    return target.weight_spec(bits, None if stacked else axis, depthwise)


def bias_objection(node: NodeProto, view: GraphView) -> str | None:
    """Return why the bias of a layer cannot be quantized or corrected, or None."""
    place = spec_of(node).bias
    bias = node.input[place] if place is not None and len(node.input) > place else ""
    if bias and not view.is_constant(bias):
        return "its bias is computed at run time"
    if bias and view.constant_shape(bias) != (output_channels(node, view),):
        return "its bias does not have one value per output channel"
    return None


def _leave(node: NodeProto, reason: str, draft: Draft) -> None:
    """Leave the weight of a layer float."""
    draft.reasons[node.name] = reason
    draft.quantized.pop(node.name, None)
    draft.stored.discard(node.name)
    draft.dynamic.discard(node.name)


def _layer_nodes(draft: Draft) -> list[NodeProto]:
    return [
        n
        for n in draft.view.nodes
        if n.name in draft.stored
        or n.name in draft.dynamic
        or (n.name in draft.quantized and draft.is_weighted(n))
    ]


def _is_depthwise(node: NodeProto, view: GraphView) -> bool:
    """Return True for a convolution with one input and one output channel per group."""
    return node.op_type == "Conv" and view.constant_shape(weight_of(node))[:2] == (
        int_attribute(node, "group", 1),
        1,
    )
