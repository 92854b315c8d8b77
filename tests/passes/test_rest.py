from __future__ import annotations

from typing import Any

import numpy as np
import onnx
import pytest
from graphs import images, normal, parse, silent

from eptq_onnx import Config, ConfigError, quantize
from eptq_onnx.graph.infer import infer_shapes

FAST: dict[str, Any] = {"start": "nearest", "steps": 0, "measure_speed": False, "rotate": False}
NETWORK = """g (TYPE[N,3,8,8] image) => (TYPE[N,4] y) {
    a = Conv (image, w)  b = Sin (a)  c = Relu (b)  d = Conv (c, v)  p = GlobalAveragePool (d)  y = Flatten (p)
}"""


def network(kind="float", dtype=np.float32):
    weights = {"w": normal(8, 3, 3, 3).astype(dtype), "v": normal(4, 8, 3, 3, seed=1).astype(dtype)}
    return parse(NETWORK.replace("TYPE", kind), weights)


def types(model):
    found = infer_shapes(model)
    kinds = {v.name: v.type.tensor_type.elem_type for v in (*found.graph.value_info, *found.graph.output)}
    return kinds | {t.name: t.data_type for t in found.graph.initializer}


@pytest.mark.parametrize("target", ["tensorrt", "openvino", "ort-web"])
def test_what_stays_float_is_narrow(target):
    config = Config(target=target, rest="float16", **FAST)
    result = quantize(network(), images(16), config, progress=silent)
    model, kinds = result.model, types(result.model)
    assert (kinds["y"], kinds["b"]) == (onnx.TensorProto.FLOAT, onnx.TensorProto.FLOAT16)
    assert {kinds[n.input[1]] for n in model.graph.node if "Linear" in n.op_type} == {onnx.TensorProto.FLOAT}
    assert any("nodes compute in float16" in note for note in result.report.notes)
    assert result.report.verification.outputs["y"] > 20


def test_float16_models_come_back_as_float16():
    data, config = images(16).astype(np.float16), Config(target="openvino", **FAST)
    result = quantize(network("float16", np.float16), data, config, progress=silent)
    kinds = types(result.model)
    assert {kinds["y"], kinds["b"]} == {onnx.TensorProto.FLOAT16}
    assert {i.type.tensor_type.elem_type for i in result.model.graph.input} == {onnx.TensorProto.FLOAT16}
    assert not [note for note in result.report.notes if "stored in float32" in note]


def test_bfloat16_is_compared_although_onnxruntime_lacks_it():
    config = Config(target="tensorrt", rest="bfloat16", **FAST)
    result = quantize(network(), images(16), config, progress=silent)
    assert onnx.TensorProto.BFLOAT16 in types(result.model).values()
    assert result.report.verification.outputs["y"] > 20
    assert any("bfloat16 was emulated" in note for note in result.report.notes)


def test_targets_without_it_refuse():
    with pytest.raises(
        ConfigError, match=r"rest=float16 is not for target ort-x64, which computes .* float32 "
    ):
        quantize(network(), images(16), Config(target="ort-x64", rest="float16", **FAST))
