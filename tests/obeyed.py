"""Whether a written file obeys every line of its target."""

from __future__ import annotations

import numpy as np
import onnx
from onnx import ModelProto, NodeProto, TensorProto, helper, numpy_helper

from eptq_onnx.graph import edit
from eptq_onnx.graph.view import GraphView, int_attribute
from eptq_onnx.numerics.scales import ScaleRule
from eptq_onnx.ops import sizes
from eptq_onnx.ops.regions import regions
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


def _type_name(values: np.ndarray) -> str:
    """The ONNX type of values."""
    return TensorProto.DataType.Name(helper.np_dtype_to_tensor_dtype(values.dtype)).lower()


def is_power_of_two(scale: np.ndarray) -> bool:
    return bool(np.isfinite(scale).all() and (scale > 0).all() and (np.frexp(scale)[0] == 0.5).all())


class Obeyed:
    """Checks node by node; ``counts`` says how many of each kind there were."""

    def __init__(self, model: ModelProto, target: Target, *, activation_bits: int = 8) -> None:
        self.model, self.target = model, target
        self.view = GraphView(model)
        self.values = constants(model)
        self.activation = target.activation.type_name(activation_bits)
        self.counts = {"activation": 0, "constant": 0, "weight": 0, "bias": 0, "float bias": 0}
        self.counts |= {"shared": 0, "residual": 0}
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
            self._operator(node)
        if target.outputs == "float":
            assert not any(self._is_made_by(o, "DequantizeLinear") for o in self.view.outputs)
        kept = regions(self.view, target.patterns.keep)
        self.counts["whole"] = len(kept)

    def _is_made_by(self, tensor: str, *op_types: str) -> bool:
        return tensor in self.view.producer and self.view.producer[tensor].op_type in op_types

    def _scale(self, tensor: str) -> bytes | None:
        """The scale and zero point of the pair that a tensor comes from or goes to."""
        pairs = [self.view.producer[tensor]] if tensor in self.view.producer else []
        pairs += self.view.consumers[tensor]
        return next(
            (
                b"".join(self.values[i].tobytes() for i in n.input[1:])
                for n in pairs
                if n.op_type in ("QuantizeLinear", "DequantizeLinear")
            ),
            None,
        )

    def _operator(self, node: NodeProto) -> None:
        """Check a node against the target's row for its operator."""
        row = self.target.operators.get(node.op_type)
        if row is None:
            return
        read = [self._is_made_by(i, "DequantizeLinear") for i in node.input]
        layer = row.runs == "layer"
        weighted = layer and read[1] and self.view.producer[node.input[1]].input[0] in self.values
        if weighted and not row.except_first:
            # The sizes are those of the integers.
            inner = onnx.NodeProto()
            inner.CopyFrom(node)
            inner.input[1] = self.view.producer[node.input[1]].input[0]
            assert sizes.objection(inner, self.view, row) is None
        if layer and not row.computed and not weighted:
            assert not all(read)
        behind = self.view.consumers[node.output[0]]
        if row.output == "float" and row.runs in ("layer", "arithmetic"):
            ends = [n for n in behind if n.op_type == "QuantizeLinear"]
            readers = [
                r
                for q in ends
                for d in self.view.consumers[q.output[0]]
                for x in ([d] if d.op_type == "DequantizeLinear" else self.view.consumers[d.output[0]])
                for r in self.view.consumers[x.output[0]]
            ]
            assert not ends or any(r.op_type in self.target.operators for r in readers)
        if row.shared_scale and all(read) and any(n.op_type == "QuantizeLinear" for n in behind):
            assert len({self._scale(t) for t in (*node.input, node.output[0])}) == 1
            self.counts["shared"] += 1
        if row.inputs == "residual" and any(read):
            # A layer adds the other branch: its own result is not quantized unless others read it, too.
            alone = [i for i, is_read in zip(node.input, read, strict=True) if not is_read]
            assert not alone or self._is_made_by(alone[0], *self.target.that_run("layer"))
            for name in node.input:
                q = self._source(name)
                assert q is None or not (
                    self._is_made_by(q.input[0], *self.target.that_run("layer"))
                    and self.view.consumers[name] == [node]
                    and not alone
                )
            self.counts["residual"] += 1

    def _source(self, tensor: str) -> NodeProto | None:
        """The QuantizeLinear whose values a tensor has, or None."""
        node = self.view.producer.get(tensor)
        while node is not None and node.op_type in ("DequantizeLinear", "Clip"):
            node = self.view.producer.get(node.input[0])
        return node if node is not None and node.op_type == "QuantizeLinear" else None

    def _activation(self, node: NodeProto) -> None:
        scale, zero = (self.values[name] for name in node.input[1:])
        rules = self.target.activation
        assert scale.shape == zero.shape == ()
        assert _type_name(zero) == self.activation
        assert not rules.symmetric or zero == 0
        assert rules.scale is ScaleRule.ANY or is_power_of_two(scale)

    def _constant(self, node: NodeProto) -> None:
        stored, scale = (self.values[name] for name in node.input[:2])
        zero = self.values[node.input[2]] if len(node.input) > 2 else np.zeros(scale.shape, stored.dtype)
        readers = self.view.consumers[node.output[0]]
        places = {
            list(reader.input).index(node.output[0])
            for reader in readers
            if reader.op_type in self.target.that_run("layer")
        }
        if places == {BIAS}:
            assert stored.dtype == np.dtype(self.target.bias.container)
            assert not zero.any()
            assert (len(node.input) > 2) == self.target.bias.zero_point
            if self.target.bias.container == "int32":
                self._product(scale, readers[0])
            else:
                assert self.target.weight.scale is ScaleRule.ANY or is_power_of_two(scale)
            self.counts["bias"] += 1
        elif places:
            assert places == {WEIGHT}
            self._weight(stored, scale, zero, readers[0])
            self.counts["weight"] += 1
        else:
            self._activation(node)
            assert _type_name(stored) == self.activation
            self.counts["constant"] += 1

    def _weight(self, stored: np.ndarray, scale: np.ndarray, zero: np.ndarray, layer: NodeProto) -> None:
        rules = self.target.of(layer.op_type).weight
        assert _type_name(stored) == rules.container
        assert not zero.astype(np.float32).any()
        assert scale.size == (zero.size if rules.per_channel else 1)
        assert scale.ndim == rules.per_channel
        if rules.per_channel:
            axis = 0 if layer.op_type == "Conv" or int_attribute(layer, "transB", 0) else 1
            assert scale.size == stored.shape[axis]
        depthwise = layer.op_type == "Conv" and stored.shape[:2] == (int_attribute(layer, "group", 1), 1)
        low, high = (rules.depthwise_range_8_bits if depthwise else None) or rules.range_8_bits
        assert rules.container != "int8" or low <= stored.min() <= stored.max() <= high
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
