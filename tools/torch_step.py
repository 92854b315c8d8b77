"""The training step of `eptq_onnx` written in PyTorch, to compare its speed; for convolutional classifiers.

A float teacher and a quantized student with straight-through rounding of all weights and fake-quantized
activations, a weighted squared error behind every layer, Adam on weights, scale factors and biases: what one
step of ``tools/bench_speed.py`` does. Operators: Conv, Gemm, Clip, Relu, Add, GlobalAveragePool, Flatten,
Reshape.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import numpy as np
from onnx import ModelProto, NodeProto

from eptq_onnx import targets
from eptq_onnx.config import Config
from eptq_onnx.graph.view import GraphView, attribute, int_attribute, ints_attribute
from eptq_onnx.method.normalize import normalize
from eptq_onnx.method.plan import plan as make_plan
from eptq_onnx.numerics.types import Array


def seconds(model: ModelProto, x: Array, steps: int, channels_last: bool) -> float:
    """Median time of a step on the batch ``x``.

    Raises
    ------
    ImportError
        If PyTorch is not installed.
    NotImplementedError
        If the model has another operator.
    """
    import torch

    target = targets.load("ort-x64")
    network = _Network(normalize(model, target.min_opset), target, channels_last)
    optimizer = torch.optim.Adam(network.parameters, lr=1e-4)
    batch = torch.from_numpy(x)
    if channels_last and batch.dim() == 4:
        batch = batch.to(memory_format=torch.channels_last)
    taken = []
    for _ in range(steps):
        began = time.perf_counter()
        with torch.no_grad():
            expected = network.layers(batch, student=False)
        got = network.layers(batch, student=True)
        loss = sum((a - b).square().flatten(1).sum(1).mean() for a, b in zip(expected, got, strict=True))
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
        taken.append(time.perf_counter() - began)
    return float(np.median(taken[1:]))


class _Network:
    """A graph that runs node by node."""

    def __init__(self, model: ModelProto, target: targets.Target, channels_last: bool) -> None:
        import torch

        self._view = GraphView(model)
        plan = make_plan(model, target, Config(weight_bits=4))
        self._layers = {x.node: x.output for x in plan.layers}
        self._quantized = {name for q in plan.activations for name in q.tensors}
        self._constants = {
            name: torch.from_numpy(np.array(self._view.constant(name))) for name in self._view.initializers
        }
        self._scales: dict[str, Any] = {}
        for layer in plan.layers:
            weight = self._constants[layer.weight]
            if channels_last and weight.dim() == 4:
                weight = weight.to(memory_format=torch.channels_last)
            rest = [1] * (weight.dim() - 1)
            self._scales[layer.weight] = (
                (weight.flatten(1).abs().amax(1) / 7).clamp_min(1e-8).reshape(-1, *rest).requires_grad_()
            )
            self._constants[layer.weight] = weight.requires_grad_()
            if layer.has_bias:
                self._constants[layer.bias or ""].requires_grad_()
        self.parameters = [t for t in (*self._constants.values(), *self._scales.values()) if t.requires_grad]

    def layers(self, x: Any, *, student: bool) -> list[Any]:
        """Outputs of all layers."""
        import torch

        values = {**self._constants, self._view.inputs[0]: x}
        kept = []
        for node in self._view.nodes:
            inputs = [values[i] for i in node.input if i]
            if student and node.name in self._layers:
                scale = self._scales[node.input[1]]
                steps = inputs[1] / scale
                inputs[1] = (steps + (steps.round().clamp(-8, 7) - steps).detach()) * scale
            if node.op_type not in _OPERATORS:
                raise NotImplementedError(f"{node.op_type} has no counterpart in this script")
            result = _OPERATORS[node.op_type](node, inputs)
            if node.name in self._layers:
                kept.append(result)
            if student and node.output[0] in self._quantized:
                result = torch.fake_quantize_per_tensor_affine(result, 0.03, 128, 0, 255)
            values[node.output[0]] = result
        return kept


def _conv(node: NodeProto, inputs: list[Any]) -> Any:
    import torch

    pads = ints_attribute(node, "pads") or [0, 0, 0, 0]
    x = inputs[0]
    half = len(pads) // 2
    if pads[:half] != pads[half:]:
        x = torch.nn.functional.pad(x, [v for k in reversed(range(half)) for v in (pads[k], pads[k + half])])
        pads = [0] * len(pads)
    bias = inputs[2] if len(inputs) > 2 else None
    strides, dilations = (
        ints_attribute(node, "strides") or [1] * half,
        ints_attribute(node, "dilations") or [1] * half,
    )
    return torch.nn.functional.conv2d(
        x, inputs[1], bias, strides, pads[:half], dilations, int_attribute(node, "group", 1)
    )


def _gemm(node: NodeProto, inputs: list[Any]) -> Any:
    weight = inputs[1].T if int_attribute(node, "transB", 0) else inputs[1]
    return inputs[0] @ weight + inputs[2] * float(attribute(node, "beta", 1.0))  # type: ignore[arg-type]


_OPERATORS: dict[str, Callable[[NodeProto, list[Any]], Any]] = {
    "Conv": _conv,
    "Gemm": _gemm,
    "Clip": lambda node, i: i[0].clamp(float(i[1]), float(i[2])),
    "Relu": lambda node, i: i[0].relu(),
    "Add": lambda node, i: i[0] + i[1],
    "GlobalAveragePool": lambda node, i: i[0].mean((2, 3), keepdim=True),
    "Flatten": lambda node, i: i[0].flatten(int_attribute(node, "axis", 1)),
    "Reshape": lambda node, i: i[0].reshape([int(v) for v in i[1]]),
    # What exporters make of x.view(x.shape[0], -1).
    "Shape": lambda node, i: list(i[0].shape),
    "Slice": lambda node, i: i[0][int(i[1]) : int(i[2])],
    "Gather": lambda node, i: i[0][int(i[1])],
    "Unsqueeze": lambda node, i: [int(i[0])],
    "Concat": lambda node, i: [int(v) for part in i for v in part],
}
