"""Whether a written file obeys every line of its target."""

from __future__ import annotations

import numpy as np
import onnx
from onnx import ModelProto, NodeProto, numpy_helper

from eptq_onnx.graph import edit
from eptq_onnx.graph.view import GraphView, int_attribute
from eptq_onnx.numerics.scales import ScaleRule
from eptq_onnx.runtime import Session
from eptq_onnx.targets import Target

WEIGHT, BIAS = 1, 2
"""Places among the inputs of Conv, Gemm, MatMul."""


def constants(model: ModelProto) -> dict[str, np.ndarray]:
    """The initializers, and the weights that nodes unfold from them."""
    values = {t.name: numpy_helper.to_array(t) for t in model.graph.initializer}
    made = {o for n in model.graph.node for o in n.output if n.op_type not in ("QuantizeLinear", "Clip")}
    unfolded = [
        n.input[0] for n in model.graph.node if n.op_type == "DequantizeLinear" and n.input[0] in made
    ]
    if unfolded:
        part = edit.with_nodes(model, model.graph.node)
        del part.graph.output[:], part.graph.input[:]
        part.graph.output.extend(edit.described(name, onnx.TensorProto.INT8) for name in unfolded)
        edit.prune(part)
        values.update(Session(part).run({}, unfolded))
    return values


def is_power_of_two(scale: np.ndarray) -> bool:
    return bool(np.isfinite(scale).all() and (scale > 0).all() and (np.frexp(scale)[0] == 0.5).all())


class Obeyed:
    """Checks node by node; ``counts`` says how many of each kind there were."""

    def __init__(self, model: ModelProto, target: Target, *, activation_bits: int = 8) -> None:
        self.model, self.target = model, target
        self.view = GraphView(model)
        self.values = constants(model)
        container = target.activation.container
        self.activation = np.dtype(container.replace("8", "16") if activation_bits > 8 else container)
        self.counts = {"activation": 0, "constant": 0, "weight": 0, "bias": 0, "float bias": 0}
        for node in model.graph.node:
            if node.op_type == "QuantizeLinear":
                self._activation(node)
                self.counts["activation"] += 1
            elif node.op_type == "DequantizeLinear" and node.input[0] not in self.values:
                self._activation(node)
            elif node.op_type == "DequantizeLinear":
                self._constant(node)
            elif node.op_type in ("Conv", "Gemm"):
                self._bias(node)

    def _activation(self, node: NodeProto) -> None:
        scale, zero = (self.values[name] for name in node.input[1:])
        rules = self.target.activation
        assert scale.shape == zero.shape == ()
        assert zero.dtype == self.activation
        assert not rules.symmetric or zero == 0
        assert rules.scale is ScaleRule.ANY or is_power_of_two(scale)

    def _constant(self, node: NodeProto) -> None:
        stored, scale, zero = (self.values[name] for name in node.input)
        readers = self.view.consumers[node.output[0]]
        places = {
            list(reader.input).index(node.output[0])
            for reader in readers
            if reader.op_type in self.target.ops.layers
        }
        if stored.dtype == np.int32:
            assert places == {BIAS}
            assert not zero.any()
            self._product(scale, readers[0])
            self.counts["bias"] += 1
        elif places:
            assert places == {WEIGHT}
            self._weight(stored, scale, zero, readers[0])
            self.counts["weight"] += 1
        else:
            self._activation(node)
            assert stored.dtype == self.activation
            self.counts["constant"] += 1

    def _weight(self, stored: np.ndarray, scale: np.ndarray, zero: np.ndarray, layer: NodeProto) -> None:
        rules = self.target.weight
        assert stored.dtype == np.int8
        assert not zero.any()
        assert scale.size == (zero.size if rules.per_channel else 1)
        assert scale.ndim == rules.per_channel
        if rules.per_channel:
            axis = 0 if layer.op_type == "Conv" or int_attribute(layer, "transB", 0) else 1
            assert scale.size == stored.shape[axis]
        depthwise = layer.op_type == "Conv" and stored.shape[:2] == (int_attribute(layer, "group", 1), 1)
        low, high = (rules.depthwise_range_8_bits if depthwise else None) or rules.range_8_bits
        assert low <= stored.min() <= stored.max() <= high
        assert rules.scale is ScaleRule.ANY or is_power_of_two(scale)

    def _product(self, scale: np.ndarray, layer: NodeProto) -> None:
        own, weight = (self.values[self.view.producer[name].input[1]] for name in layer.input[:BIAS])
        np.testing.assert_array_equal(scale, np.float32(own) * weight)
        if ScaleRule.ANY not in (self.target.weight.scale, self.target.activation.scale):
            assert is_power_of_two(scale)

    def _bias(self, node: NodeProto) -> None:
        producer = self.view.producer.get(node.input[WEIGHT])
        if producer is None or producer.op_type != "DequantizeLinear" or len(node.input) <= BIAS:
            return
        bias = node.input[BIAS]
        if self.target.bias.integer:
            assert self.view.producer[bias].op_type == "DequantizeLinear"
        else:
            assert self.values[bias].dtype == np.float32
            self.counts["float bias"] += 1


def obeyed(model: ModelProto, target: Target, *, activation_bits: int = 8) -> dict[str, int]:
    """Assert that a written model obeys its target; how many tensors of each kind it has."""
    onnx.checker.check_model(model, full_check=True)
    return Obeyed(model, target, activation_bits=activation_bits).counts
