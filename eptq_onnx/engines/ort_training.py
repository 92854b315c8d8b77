"""The gradient engine of onnxruntime-training: its GradientGraphBuilder, without torch.

What it lacks on CPU is replaced after the build (ConvTranspose), and gradients stop at operators without one.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from functools import cache
from typing import Any

import onnx
from onnx import ModelProto, NodeProto, TensorProto, helper

from eptq_onnx import ops, runtime
from eptq_onnx.engines.base import GradientModel
from eptq_onnx.errors import GradientError
from eptq_onnx.graph import edit
from eptq_onnx.graph.view import GraphView
from eptq_onnx.ops import LSQ_DOMAIN

_ATEN = "org.pytorch.aten"
_STOP = "eptq_stop_gradient"


class OrtTrainingEngine:
    """Engine on onnxruntime's GradientGraphBuilder.

    Raises
    ------
    InstallError
        If the installed onnxruntime has no gradient builder.
    """

    name = "onnxruntime-training"

    def __init__(self) -> None:
        self._c = runtime.load_gradient_builder()
        _register()
        self._options = runtime.load().SessionOptions()
        self._options.log_severity_level = 4

    def differentiate(self, model: ModelProto, loss: str, wrt: Sequence[str]) -> GradientModel:
        """See `Engine.differentiate`."""
        blocked = ops.without_gradient(GraphView(model))
        private = _prepared(model, blocked)
        view = GraphView(private)
        stops = frozenset(n.name for n in view.nodes if n.domain == _ATEN)
        relevant = view.upstream([loss], stops)
        reached = [name for name in wrt if name in relevant]
        unreached = {name: "no output depends on it through operators that have a gradient" for name in wrt if name not in relevant}
        if not reached:
            return GradientModel(private, {}, unreached)
        edit.promote_to_inputs(private, [n for n in reached if view.is_constant(n)])
        edit.set_outputs(private, list(dict.fromkeys([loss, *(o.name for o in model.graph.output)])))
        private.ir_version = min(private.ir_version, 10)
        edit.import_domain(private, "com.microsoft")
        try:
            builder = self._c.GradientGraphBuilder(private.SerializeToString(), {loss}, set(reached), loss, self._options)
            builder.build()
            built = onnx.load_model_from_string(builder.get_model())
        except Exception as e:
            # The builder raises pybind exceptions that share only Exception.
            raise GradientError(f"onnxruntime-training cannot differentiate the model: {' '.join(str(e).split())[:400]}") from e
        _replace_missing_kernels(built)
        return GradientModel(built, {name: f"{name}_grad" for name in reached}, unreached)


def _attribute(c: Any, name: str, value: object, dtype: str) -> Any:
    definition = c.GradientNodeAttributeDefinition()
    definition.name, definition.value_json, definition.dtype, definition.is_tensor = name, json.dumps(value), dtype, True
    return definition


def _node(c: Any, op_type: str, inputs: list[str], outputs: list[str], domain: str = "", value: list[int] | None = None) -> Any:
    definition = c.GradientNodeDefinition()
    definition.op_type, definition.domain, definition.inputs, definition.outputs = op_type, domain, inputs, outputs
    definition.attributes = [] if value is None else [_attribute(c, "value", value, "int")]
    return definition


@cache
def _register() -> None:
    """Register our gradient definitions; onnxruntime keeps them for the life of the process."""
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
    # ReduceSumSquare with kept dimensions, as our losses use it (a model's own is lowered): dx = 2 dy x.
    c.register_gradient_definition(
        "::ReduceSumSquare",
        [_node(c, "Add", ["GO(0)", "GO(0)"], ["twice"]), _node(c, "Mul", ["twice", "I(0)"], ["GI(0)"])],
    )
    c.register_gradient_definition(f"{_ATEN}::ATen::{_STOP}::", [_node(c, "Identity", ["GO(0)"], ["GI(0)"])])
    c.register_custom_stop_gradient_edges(f"{_ATEN}::ATen::{_STOP}::", {0})


def _prepared(model: ModelProto, blocked: frozenset[str]) -> ModelProto:
    """A copy in which no gradient enters ``blocked`` nodes, and no node reads a tensor twice.

    The builder gives the gradient of a graph input one name for each time that a node reads it.
    """
    view, builder, stops = GraphView(model), edit.Builder(model, "engine/"), []
    for node in view.nodes:
        copy = NodeProto()
        copy.CopyFrom(node)
        for k, name in enumerate(copy.input):
            if name and node.name in blocked and not view.is_constant(name) and view.is_float(name):
                # A stop must not read a differentiated graph input directly: hence the Identity.
                passed = builder.add("Identity", [name])
                copy.input[k] = builder.add("ATen", [passed], domain=_ATEN, operator=_STOP)
                # Nobody infers the type behind ATen.
                stops.append(helper.make_tensor_value_info(copy.input[k], TensorProto.FLOAT, view.shape(name)))
            elif name and name in copy.input[:k]:
                copy.input[k] = builder.add("Identity", [name])
        builder.nodes.append(copy)
    result = edit.with_nodes(model, builder.nodes, builder.initializers)
    result.graph.value_info.extend(stops)
    edit.import_domain(result, _ATEN)
    return result


def _replace_missing_kernels(model: ModelProto) -> None:
    """Swap nodes without a CPU kernel for ordinary ones, in place."""
    builder = edit.Builder(model, "gradient/")
    for node in model.graph.node:
        if node.op_type == "ConvTransposeGrad":
            _conv_transpose_gradient(node, builder)
        elif node.domain == _ATEN:
            builder.nodes.append(helper.make_node("Identity", list(node.input), list(node.output), name=node.name))
        else:
            builder.nodes.append(node)
    del model.graph.node[:]
    model.graph.node.extend(builder.nodes)
    model.graph.initializer.extend(builder.initializers)


def _conv_transpose_gradient(node: NodeProto, b: edit.Builder) -> None:
    """dx = conv(dy, W); dW = gradient of that Conv's weight with dy as its input and x as its output gradient.

    ConvTranspose weights have shape (C_in, C_out / group, *kernel): exactly a Conv weight from dy to x.
    """
    dy, x, weight = node.input[:3]
    keep = {"strides", "pads", "dilations", "group", "kernel_shape", "auto_pad"}
    attributes = {a.name: helper.get_attribute_value(a) for a in node.attribute if a.name in keep}
    outputs = list(node.output) + [""] * (3 - len(node.output))
    if outputs[0]:
        b.add("Conv", [dy, weight], outputs[0], **attributes)
    if outputs[1]:
        b.add("ConvGrad", [x, dy, weight], outputs=["", outputs[1]], domain="com.microsoft", **attributes)
    if outputs[2]:
        rank = 2 + len(attributes.get("kernel_shape", (0, 0)))
        b.reduce("ReduceSum", dy, [0, *range(2, rank)], outputs[2])
