"""What onnxruntime crashes on is found out in another process."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from graphs import normal, parse
from onnx import ModelProto, helper

import eptq_onnx
from eptq_onnx import Config, ModelError
from eptq_onnx.crashes import survives

FAST = Config(preset="fast", measure_speed=False)


def padded(op: str, pads: list[int], channels: int) -> ModelProto:
    """A layer behind an operator with these pads."""
    shape = (4, channels, 3, 3) if op == "Conv" else (channels, 4, 3, 3)
    own = "(x, w)" if op.startswith("Conv") else "(x)"
    made = 4 if op.startswith("Conv") else channels
    return parse(
        f"g (float[N,{channels},8,8] x) => (float[N,3,h,w2] y) "
        f"{{ c = {op} <pads = {pads}, kernel_shape = [3,3]> {own} y = Conv (c, v) }}",
        {"w": normal(*shape), "v": normal(3, made, 1, 1)},
    )


def refusal(model: ModelProto, data: dict[str, Any]) -> str:
    try:
        eptq_onnx.quantize(model, data, FAST)
    except ModelError as e:
        return str(e)
    return ""


@pytest.mark.parametrize("op", ["Conv", "ConvTranspose", "MaxPool", "AveragePool"])
@pytest.mark.parametrize("seed", range(3))
def test_negative_pads_are_quantized_or_refused_and_never_crash(op, seed):
    """The blocked kernels of onnxruntime 1.19 crash on some negative pads and not on others."""
    rng = np.random.default_rng(seed)
    pads = [int(p) for p in rng.integers(-2, 2, 4)]
    pads[int(rng.integers(4))] = -int(rng.integers(1, 3))
    channels = int(rng.choice([2, 16]))
    model, data = padded(op, pads, channels), {"x": normal(8, channels, 8, 8)}
    crashes = not survives(model, {"x": data["x"][:1]})
    said = refusal(model, data)
    # Newer versions of onnxruntime refuse all negative pads.
    assert "pads are negative" in said if crashes else not said or "onnxruntime refuses the model" in said


@pytest.mark.parametrize("name", ["x", "file", "a/b", "self"])
def test_inputs_of_any_name_are_run(name):
    body: dict[str, Any] = {"op_type": "Neg", "inputs": [name], "outputs": ["y"]}
    graph = helper.make_graph(
        [helper.make_node(**body)],
        "g",
        [helper.make_tensor_value_info(name, 1, [2])],
        [helper.make_tensor_value_info("y", 1, [2])],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 13)], ir_version=8)
    assert survives(model, {name: np.zeros(2, np.float32)})
    assert survives(model, {name: np.zeros(3, np.float32)}), "an error is no crash"


def test_strings_are_run():
    graph = helper.make_graph(
        [helper.make_node("Identity", ["x"], ["y"])],
        "g",
        [helper.make_tensor_value_info("x", 8, [2])],
        [helper.make_tensor_value_info("y", 8, [2])],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 13)], ir_version=8)
    assert survives(model, {"x": np.array(["a", "bc"], object)})
