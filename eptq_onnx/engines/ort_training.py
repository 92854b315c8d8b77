"""The gradient engine of onnxruntime-training: its GradientGraphBuilder, without torch.

After the build, gradient operators without a CPU kernel (ConvTranspose), and those that are slower than
ordinary operators, are replaced. Gradients stop at operators without one.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from functools import cache
from typing import Any

import onnx
from onnx import ModelProto, NodeProto, TensorProto, helper

from eptq_onnx import ops, runtime
from eptq_onnx.engines.base import Engine, GradientModel, reachable
from eptq_onnx.engines.rules import leaky_relu_slope
from eptq_onnx.engines.tape import Tape
from eptq_onnx.engines.windows import Window, input_gradient_by_conv, weight_gradient
from eptq_onnx.errors import GradientError, one_line
from eptq_onnx.graph import edit
from eptq_onnx.graph.canonical import rename
from eptq_onnx.graph.infer import infer_shapes
from eptq_onnx.graph.kernels import fits_blocks
from eptq_onnx.graph.view import GraphView, attribute
from eptq_onnx.ops import LSQ_DOMAIN
from eptq_onnx.proto.bodies import defined, node_reads, subgraphs
from eptq_onnx.proto.weights import light, with_weights

_ATEN = "org.pytorch.aten"
_STOP, _ROUND_TRIP, _DYNAMIC = "eptq_stop_gradient", "eptq_round_trip", "eptq_dynamic_round_trip"
_TRIPS = {"QuantizeLinear": _ROUND_TRIP, "DynamicQuantizeLinear": _DYNAMIC}
"""Quantizer to what it and its DequantizeLinear become for the builder."""


class OrtTrainingEngine(Engine):
    """Engine based on onnxruntime's GradientGraphBuilder.

    Raises
    ------
    InstallError
        If the installed onnxruntime has no gradient builder.
    """

    name = "training"
    about = "onnxruntime's training build, the faster one"
    preference = 10

    def __init__(self) -> None:
        self._c = runtime.load_gradient_builder()
        _register()
        self._options = runtime.session_options()

    @classmethod
    def available(cls) -> bool:
        """Return True if the installed onnxruntime is a training build."""
        return runtime.is_training_build()

    def differentiate(self, model: ModelProto, loss: str, wrt: Sequence[str]) -> GradientModel:
        """See `Engine.differentiate`."""
        blocked = ops.without_gradient(GraphView(model))
        if any(n.name in blocked and subgraphs(n) for n in model.graph.node):
            model = infer_shapes(model)
        reached, unreached = reachable(GraphView(model), loss, wrt, blocked)
        if not reached:
            return GradientModel(model, {}, unreached)
        # The builder copies its input several times, and does not need the values of weights.
        private, heavy = light(_prepared(model, blocked))
        edit.promote_to_inputs(private, reached)
        edit.set_outputs(private, list(dict.fromkeys([loss, *(o.name for o in model.graph.output)])))
        private.ir_version = min(private.ir_version, 10)
        edit.import_domain(private, "com.microsoft")
        try:
            builder = self._c.GradientGraphBuilder(
                private.SerializeToString(), {loss}, set(reached), loss, self._options
            )
            builder.build()
            built = onnx.load_model_from_string(builder.get_model())
        except Exception as e:
            # The builder's pybind exceptions have no common base but Exception.
            raise GradientError(
                f"onnxruntime-training cannot differentiate the model: {one_line(e, 400)}"
            ) from e
        _replace_kernels(with_weights(built, [t for t in heavy if t.name not in reached]))
        return GradientModel(built, {name: f"{name}_grad" for name in reached}, unreached)


def _attribute(c: Any, name: str, value: object, dtype: str) -> Any:
    definition = c.GradientNodeAttributeDefinition()
    definition.name, definition.value_json, definition.dtype, definition.is_tensor = (
        name,
        json.dumps(value),
        dtype,
        True,
    )
    return definition


def _node(
    c: Any,
    op_type: str,
    inputs: list[str],
    outputs: list[str],
    domain: str = "",
    value: list[int] | None = None,
) -> Any:
    definition = c.GradientNodeDefinition()
    definition.op_type, definition.domain, definition.inputs, definition.outputs = (
        op_type,
        domain,
        inputs,
        outputs,
    )
    definition.attributes = [] if value is None else [_attribute(c, "value", value, "int")]
    return definition


@cache
def _register() -> None:
    """Register our gradient definitions; onnxruntime keeps them for the lifetime of the process."""
    c = runtime.load_gradient_builder()
    # dL/ds = (<dy, y> - <dx, x>) / s with dx = dy * mask is the LSQ rule; dot products read each tensor once.
    c.register_gradient_definition(
        f"{LSQ_DOMAIN}::FakeQuant",
        [
            _node(c, "FakeQuantGrad", ["GO(0)", "O(1)"], ["dx"], LSQ_DOMAIN),
            _node(c, "Identity", ["dx"], ["GI(0)"]),
            _node(c, "Constant", [], ["row"], value=[1, -1]),
            _node(c, "Constant", [], ["column"], value=[-1, 1]),
            _node(c, "Constant", [], ["one"], value=[1]),
            _node(c, "Reshape", ["GO(0)", "row"], ["dy_row"]),
            _node(c, "Reshape", ["O(0)", "column"], ["y_column"]),
            _node(c, "MatMul", ["dy_row", "y_column"], ["dy_y"]),
            _node(c, "Reshape", ["dx", "row"], ["dx_row"]),
            _node(c, "Reshape", ["I(0)", "column"], ["x_column"]),
            _node(c, "MatMul", ["dx_row", "x_column"], ["dx_x"]),
            _node(c, "Sub", ["dy_y", "dx_x"], ["difference"]),
            _node(c, "Reshape", ["difference", "one"], ["difference_1"]),
            _node(c, "Div", ["difference_1", "I(1)"], ["GI(1)"]),
        ],
    )
    # ReduceSumSquare with keepdims, as in our losses (those of a model are lowered): dx = 2 dy x.
    c.register_gradient_definition(
        "::ReduceSumSquare",
        [_node(c, "Add", ["GO(0)", "GO(0)"], ["twice"]), _node(c, "Mul", ["twice", "I(0)"], ["GI(0)"])],
    )
    # dx = dy where y = x. onnxruntime's own ReluGrad takes four times as long, and its five nodes for Clip
    # take twice as long.
    for name in ("Relu", "Clip"):
        c.register_gradient_definition(
            f"::{name}",
            [
                _node(c, "Equal", ["I(0)", "O(0)"], ["kept"]),
                _node(c, "FakeQuantGrad", ["GO(0)", "kept"], ["GI(0)"], LSQ_DOMAIN),
            ],
        )
    for operator in (_STOP, _ROUND_TRIP, _DYNAMIC):
        c.register_gradient_definition(
            f"{_ATEN}::ATen::{operator}::", [_node(c, "Identity", ["GO(0)"], ["GI(0)"])]
        )
    c.register_custom_stop_gradient_edges(f"{_ATEN}::ATen::{_STOP}::", {0})


def _prepared(model: ModelProto, blocked: frozenset[str]) -> ModelProto:
    """Return a copy in which no gradient enters ``blocked`` nodes, and no node reads a tensor twice.

    The builder would give the gradient of a graph input one name for each time that a node reads it. A
    QuantizeLinear with its DequantizeLinear becomes one ATen node of x, scale and zero point, a
    DynamicQuantizeLinear with its DequantizeLinear one of x.
    """
    view, builder, infos = GraphView(model), edit.Builder(model, "engine/"), []

    def described(name: str, like: str) -> None:
        # Shape inference cannot tell the output type of ATen.
        infos.append(helper.make_tensor_value_info(name, TensorProto.FLOAT, view.shape(like)))

    def stopped(name: str) -> str:
        if view.is_constant(name) or not view.is_float(name):
            return name
        # A stop node must not read a differentiated graph input directly: hence the Identity.
        result = builder.add("ATen", [builder.add("Identity", [name])], domain=_ATEN, operator=_STOP)
        described(result, name)
        return result

    for node in view.nodes:
        if node.op_type in _TRIPS:
            continue
        if node.op_type == "DequantizeLinear" and node.input[0] in view.producer:
            quantize = view.producer[node.input[0]]
            trip = _TRIPS[quantize.op_type]
            builder.add("ATen", list(quantize.input), node.output[0], domain=_ATEN, operator=trip)
            described(node.output[0], quantize.input[0])
            continue
        copy = NodeProto()
        copy.CopyFrom(node)
        if node.name in blocked:
            _stop_gradients(copy, stopped)
        for k, name in enumerate(copy.input):
            if name and name in copy.input[:k]:
                copy.input[k] = builder.add("Identity", [name])
        builder.nodes.append(copy)
        for k, name in enumerate(copy.output):
            if node.name in blocked and subgraphs(node) and name and view.is_float(name):
                # The builder must not visit nodes that read tensors other than their inputs.
                copy.output[k] = builder.unique(f"{name}_made")
                described(copy.output[k], name)
                builder.add("ATen", [copy.output[k]], name, domain=_ATEN, operator=_STOP)
    result = edit.with_nodes(model, builder.nodes, builder.initializers)
    known = {v.name for v in result.graph.value_info}
    result.graph.value_info.extend(v for v in infos if v.name not in known)
    edit.import_domain(result, _ATEN)
    return result


def _stop_gradients(node: NodeProto, stopped: Callable[[str], str]) -> None:
    """Put a stop node in front of everything that a node reads, in place.

    The builder crashes if a subgraph reads a tensor that a gradient passes through.
    """
    names = {name: stopped(name) for name in dict.fromkeys(node_reads(node))}
    for graph in subgraphs(node):
        rename(graph, {name: new for name, new in names.items() if name not in defined(graph)})
    node.input[:] = [names.get(name, name) for name in node.input]


def _replace_kernels(model: ModelProto) -> None:
    """Replace nodes without a CPU kernel, or with a slow one, by ordinary ones, in place."""
    builder = edit.Builder(model, "gradient/")
    tape = Tape(GraphView(model), builder)
    for node in model.graph.node:
        if attribute(node, "operator") == _DYNAMIC:
            made = [builder.unique(f"{node.output[0]}/{what}") for what in ("integers", "scale", "zero")]
            builder.add("DynamicQuantizeLinear", list(node.input), outputs=made)
            builder.add("DequantizeLinear", made, node.output[0])
        elif attribute(node, "operator") == _ROUND_TRIP:
            constants = node.input[1:]
            builder.add(
                "DequantizeLinear",
                [builder.add("QuantizeLinear", list(node.input)), *constants],
                node.output[0],
            )
        elif node.domain == _ATEN:
            builder.nodes.append(
                helper.make_node("Identity", list(node.input), list(node.output), name=node.name)
            )
        elif node.op_type in _GRADIENTS:
            _GRADIENTS[node.op_type](node, tape)
        else:
            builder.nodes.append(node)
    del model.graph.node[:]
    model.graph.node.extend(builder.nodes)
    model.graph.initializer.extend(builder.initializers)


def _leaky_relu_gradient(node: NodeProto, t: Tape) -> None:
    """Replace LeakyReluGrad, whose kernel takes twice as long."""
    dy, y = node.input
    alpha = float(attribute(node, "alpha", 0.01))  # type: ignore[arg-type]
    if alpha < 0:
        t.builder.nodes.append(node)
    else:
        t.builder.add("Identity", [leaky_relu_slope(t, dy, y, alpha)], node.output[0])


def _conv_gradient(node: NodeProto, t: Tape) -> None:
    """Compute dx by a Conv where possible, and dW and db of a depthwise Conv by ordinary nodes.

    ConvGrad works column by column, which takes longer; it keeps the outputs that are left.
    """
    dy, x, weight = node.input[:3]
    shape, x_shape, y_shape = (t.view.static_shape(name) for name in (weight, x, dy))
    made: dict[int, str | None] = {}
    if shape is not None:
        window = Window.of(node, shape[2:])
        if node.output[0]:
            sizes = (None if s is None else s[2:] for s in (x_shape, y_shape))
            made[0] = input_gradient_by_conv(t, window, dy, weight, shape, *sizes)
        if x_shape is not None and y_shape is not None and fits_blocks(shape, window.group):
            made[1] = weight_gradient(t, window, x, dy, x_shape, y_shape, shape) if node.output[1] else None
            made[2] = t.sum(dy, [0, 2, 3]) if node.output[2:] and node.output[2] else None
    rest = NodeProto()
    rest.CopyFrom(node)
    for k, name in made.items():
        if name is not None:
            t.builder.add("Identity", [name], node.output[k])
            rest.output[k] = ""
    if any(rest.output):
        t.builder.nodes.append(rest)


def _conv_transpose_gradient(node: NodeProto, t: Tape) -> None:
    """Replace ConvTransposeGrad: dx = Conv(dy, W), and dW is the weight gradient of that Conv.

    In the latter, dy is the input and x the output gradient. ConvTranspose weights have shape
    (C_in, C_out / group, *kernel), exactly that of a Conv weight from dy to x.
    """
    b = t.builder
    dy, x, weight = node.input[:3]
    keep = {"strides", "pads", "dilations", "group", "kernel_shape", "auto_pad"}
    attributes = {a.name: helper.get_attribute_value(a) for a in node.attribute if a.name in keep}
    outputs = list(node.output) + [""] * (3 - len(node.output))
    if outputs[0]:
        b.add("Conv", [dy, weight], outputs[0], **attributes)
    if outputs[1]:
        b.add("ConvGrad", [x, dy, weight], outputs=["", outputs[1]], domain="com.microsoft", **attributes)
    if outputs[2]:
        b.reduce("ReduceSum", dy, [0, *range(2, len(t.shape(weight)))], outputs[2])


_GRADIENTS: dict[str, Callable[[NodeProto, Tape], None]] = {
    "ConvGrad": _conv_gradient,
    "ConvTransposeGrad": _conv_transpose_gradient,
    "LeakyReluGrad": _leaky_relu_gradient,
}
"""Gradient operators to replacements by ordinary nodes."""
