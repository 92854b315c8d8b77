"""Models drawn from the operator table: rows as their samples show them, with dense layers between them."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import numpy as np
import onnx
from onnx import ModelProto, NodeProto, TensorProto, helper, numpy_helper
from op_sample import Sample
from op_samples import SAMPLES

from eptq_onnx.ops import TABLE, spec_of
from eptq_onnx.runtime import Session

INPUTS = {"a": 12, "b": 7}
"""Inputs of the drawn models and their widths; the batch is 1, for rows have no batch axis in common."""
NOT_DRAWN = {
    "QuantizeLinear",
    "DequantizeLinear",
    "DynamicQuantizeLinear",
    "FakeQuant",
    "GroupNormalization",
    "RMSNormalization",
    "Swish",
}
"""Rows of the quantized model itself, and those that are valid from opset 21 on only."""
NOT_FLOAT = {
    op for (domain, op), samples in SAMPLES.items() for s in samples if s.differentiable == () or not s.inputs
}
"""Rows that draw random numbers or give places: see test_choices.py."""
OPSETS = (20, 18, 17, 9)
"""Not 21: onnxruntime 1.19 has no QLinearMatMul of that opset."""


def drawable() -> dict[str, list[Sample]]:
    """Samples of every row that a float model may have."""
    return {f"{domain}::{op}": SAMPLES[domain, op] for domain, op in TABLE if op not in NOT_DRAWN | NOT_FLOAT}


def fits(sample: Sample, opset: int) -> bool:
    """True if the operator of that opset is the one of the sample."""
    if sample.domain:
        return opset >= 13
    try:
        versions = {onnx.defs.get_schema(sample.op_type, o, "").since_version for o in (opset, sample.opset)}
    except onnx.defs.SchemaError:
        return sample.op_type.startswith("Simplified") and opset >= 13
    return len(versions) == 1


class Drawing:
    """A growing graph; every tensor in ``tensors`` has the shape (1, width).

    Parameters
    ----------
    seed : int
        Of the weights, and of who reads whom.
    opset : int
    """

    def __init__(self, seed: int, opset: int) -> None:
        self.rng = np.random.default_rng(seed)
        self.opset = opset
        self.nodes: list[NodeProto] = []
        self.constants: list[TensorProto] = []
        self.tensors: list[tuple[str, int]] = list(INPUTS.items())
        self.used: set[str] = set()

    def constant(self, value: np.ndarray | np.generic) -> str:
        name = f"c{len(self.constants)}"
        self.constants.append(numpy_helper.from_array(np.asarray(value), name))
        return name

    def node(
        self, op_type: str, inputs: Iterable[str], *, domain: str = "", outputs: int = 1, **attributes: Any
    ) -> str:
        names = [f"t{len(self.nodes)}_{k}" for k in range(outputs)]
        self.nodes.append(helper.make_node(op_type, list(inputs), names, domain=domain, **attributes))
        return names[0]

    def dense(self, x: str, width: int, units: int) -> str:
        """A layer with a constant weight."""
        weight = self.constant(self.rng.normal(0, 1.5 / np.sqrt(width), (width, units)).astype(np.float32))
        bias = self.constant(self.rng.normal(0, 0.2, units).astype(np.float32))
        return self.node("Add", [self.node("MatMul", [x, weight]), bias])

    def like(self, value: np.ndarray) -> str:
        """A function of earlier tensors in the range and the shape of a sample's input."""
        name, width = self.tensors[self.rng.integers(max(0, len(self.tensors) - 4), len(self.tensors))]
        self.used.add(name)
        low, high = float(value.min()), float(value.max())
        share = self.node("Sigmoid", [self.dense(name, width, value.size)])
        moved = self.node(
            "Add",
            [
                self.node("Mul", [share, self.constant(np.float32(high - low))]),
                self.constant(np.float32(low)),
            ],
        )
        return self.node("Reshape", [moved, self.constant(np.array(value.shape, np.int64))])

    def row(self, sample: Sample) -> None:
        """One node as the sample has it: activations come from earlier tensors, everything else is
        constant."""
        (node,) = sample.model().graph.node
        data = spec_of(node).data
        inputs = []
        for k, value in enumerate(sample.inputs):
            varies = (
                value is not None
                and value.dtype == np.float32
                and k in sample.varying
                and (data is None or k in data)
            )
            inputs.append("" if value is None else self.like(value) if varies else self.constant(value))
        y = self.node(
            sample.op_type, inputs, domain=sample.domain, outputs=sample.outputs, **sample.attributes
        )
        values = Session(sample.model()).run(sample.feeds)["y0"]
        if sample.op_type == "Unique":
            # How many values there are depends on the sample.
            y, values = self.node("ReduceMean", [y], keepdims=1), values.mean(keepdims=True)
        flat = self.node("Reshape", [y, self.constant(np.array([1, values.size]))])
        scaled = self.node(
            "Mul", [flat, self.constant(np.float32(1 / max(1.0, float(np.abs(values).max()))))]
        )
        self.tensors.append((scaled, values.size))

    def attention(self) -> None:
        """A transformer block: attention, a residual sum, normalization and a feed-forward layer."""
        x = self.like(np.linspace(-1, 1, 3 * 8).astype(np.float32).reshape(1, 3, 8))
        weights = [self.constant(self.rng.normal(0, 0.5, (8, 8)).astype(np.float32)) for _ in range(5)]
        q, k, v = (self.node("MatMul", [x, w]) for w in weights[:3])
        scores = self.node("MatMul", [q, self.node("Transpose", [k], perm=[0, 2, 1])])
        mixed = self.node(
            "MatMul",
            [self.node("Softmax", [self.node("Mul", [scores, self.constant(np.float32(0.35))])], axis=-1), v],
        )
        x = self.node("Add", [x, self.node("MatMul", [mixed, weights[3]])])
        if self.opset >= 17:
            x = self.node(
                "LayerNormalization",
                [x, self.constant(np.ones(8, np.float32)), self.constant(np.zeros(8, np.float32))],
            )
        x = self.node("Add", [x, self.node("Tanh", [self.node("MatMul", [x, weights[4]])])])
        self.tensors.append((self.node("Reshape", [x, self.constant(np.array([1, 24]))]), 24))

    def model(self) -> ModelProto:
        """What nobody reads is joined into the outputs."""
        ends = [t for t in self.tensors if t[0] not in self.used and t[0] not in INPUTS]
        outputs = {self.dense(name, width, 3): 3 for name, width in ends[:-1]} | dict(ends[-1:])
        graph = helper.make_graph(
            self.nodes,
            "drawn",
            [
                helper.make_tensor_value_info(name, TensorProto.FLOAT, [1, width])
                for name, width in INPUTS.items()
            ],
            [
                helper.make_tensor_value_info(name, TensorProto.FLOAT, [1, width])
                for name, width in outputs.items()
            ],
            self.constants,
        )
        opsets = [helper.make_opsetid("", self.opset), helper.make_opsetid("com.microsoft", 1)]
        return helper.make_model(graph, opset_imports=opsets, ir_version=8)


def deck(seed: int, size: int) -> list[tuple[int, list[Sample]]]:
    """Every row once, shuffled, in groups of at most ``size`` that share an opset."""
    rng = np.random.default_rng(seed)
    hands: dict[int, list[Sample]] = {}
    for samples in drawable().values():
        options = [(o, sample) for sample in samples for o in OPSETS[:1] + OPSETS if fits(sample, o)]
        opset, sample = options[rng.integers(len(options))]
        hands.setdefault(opset, []).append(sample)
    groups = []
    for opset, hand in hands.items():
        order = [hand[k] for k in rng.permutation(len(hand))]
        groups += [(opset, order[k : k + size]) for k in range(0, len(order), size)]
    return groups


def drawn(seed: int, opset: int, samples: list[Sample]) -> ModelProto:
    """A model with these rows, and a transformer block among them."""
    drawing = Drawing(seed, opset)
    place = drawing.rng.integers(len(samples))
    for k, sample in enumerate(samples):
        if k == place:
            drawing.attention()
        drawing.row(sample)
    return drawing.model()
