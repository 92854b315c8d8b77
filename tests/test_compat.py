"""onnxruntime's signatures: each argument acts, or an error says why not."""

from __future__ import annotations

import inspect
from typing import Any

import numpy as np
import onnx
import pytest
from graphs import images, small_convnet
from onnx import numpy_helper

from eptq_onnx import CapabilityError, Config, ConfigError, compat

pytestmark = pytest.mark.once
quantization: Any = pytest.importorskip("onnxruntime.quantization")


class Reader(quantization.CalibrationDataReader):  # type: ignore[misc]
    """What a script that calibrates for onnxruntime has."""

    def __init__(self) -> None:
        self._feeds = iter([{"image": images(1, seed=k)} for k in range(12)])

    def get_next(self):
        return next(self._feeds, None)


def static(tmp_path, **arguments) -> onnx.ModelProto:
    options = {"preset": "fast", "objective": "integers", "measure_speed": False}
    compat.quantize_static(small_convnet(), tmp_path / "q.onnx", Reader(), **{**options, **arguments})
    return onnx.load(tmp_path / "q.onnx")


def weights(model) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    constants = {t.name: numpy_helper.to_array(t) for t in model.graph.initializer}
    reads = {o: n for n in model.graph.node for o in n.output}
    found: dict[str, tuple[np.ndarray, np.ndarray]] = {}
    for node in model.graph.node:
        maker = reads.get(node.input[1]) if node.op_type in ("Conv", "Gemm") else None
        if maker is not None and maker.op_type == "DequantizeLinear" and maker.input[0] in constants:
            found[node.op_type + str(len(found))] = constants[maker.input[0]], constants[maker.input[1]]
    return found


def zero_points(model) -> list[np.ndarray]:
    constants = {t.name: numpy_helper.to_array(t) for t in model.graph.initializer}
    return [constants[n.input[2]] for n in model.graph.node if n.op_type == "QuantizeLinear"]


def test_the_signatures_are_those_of_onnxruntime():
    for name in ("quantize_static", "quantize_dynamic"):
        ours, theirs = (inspect.signature(getattr(m, name)).parameters for m in (compat, quantization))
        assert [n for n in theirs if n not in ours] == []
        own = [n for n in ours if n in theirs]
        assert own == list(theirs)
        for key, parameter in theirs.items():
            default = ours[key].default
            if parameter.default is not inspect.Parameter.empty:
                assert str(getattr(parameter.default, "name", parameter.default)) == str(default), key


def test_a_script_of_onnxruntime_runs(tmp_path):
    model = static(tmp_path, quant_format=quantization.QuantFormat.QDQ, per_channel=True)
    assert [scale.size for _, scale in weights(model).values()] == [8, 8, 8, 5]
    assert {z.dtype for z in zero_points(model)} == {np.dtype(np.int8)}


def test_scales_of_weights_are_per_tensor_by_default_as_there(tmp_path):
    assert {scale.size for _, scale in weights(static(tmp_path)).values()} == {1}


def test_seven_bits_are_seven_bits(tmp_path):
    for values, _ in weights(static(tmp_path, reduce_range=True)).values():
        assert -64 <= values.min() <= values.max() <= 63


@pytest.mark.parametrize(
    ("kind", "dtype"), [("QUInt8", np.uint8), ("QInt8", np.int8), ("QUInt16", np.uint16)]
)
def test_activations_have_the_type(tmp_path, kind, dtype):
    model = static(tmp_path, activation_type=getattr(quantization.QuantType, kind))
    assert {z.dtype for z in zero_points(model)} == {np.dtype(dtype)}


def test_symmetric_activations_have_the_zero_point_0(tmp_path):
    model = static(tmp_path, extra_options={"ActivationSymmetric": True})
    assert {int(z) for z in zero_points(model)} == {0}


def test_weights_have_four_bits(tmp_path):
    model = static(tmp_path, weight_type=quantization.QuantType.QInt4, storage="int8", per_channel=True)
    for values, _ in weights(model).values():
        assert all(len(np.unique(channel)) <= 16 for channel in values)


def test_operators_and_nodes_are_chosen(tmp_path):
    assert len(weights(static(tmp_path, op_types_to_quantize=["Conv", "Add"]))) == 3
    named = small_convnet()
    for k, node in enumerate(named.graph.node):
        node.name = f"n{k}"
    first = next(n.name for n in named.graph.node if n.op_type == "Conv")
    options: dict[str, Any] = {"preset": "fast", "measure_speed": False, "objective": "integers"}
    cases: list[tuple[dict[str, Any], int]] = [
        ({"nodes_to_quantize": [first]}, 1),
        ({"nodes_to_exclude": [first]}, 3),
    ]
    for arguments, count in cases:
        compat.quantize_static(named, tmp_path / "n.onnx", Reader(), **arguments, **options)
        assert len(weights(onnx.load(tmp_path / "n.onnx"))) == count


@pytest.mark.parametrize(("arguments", "message"), [
    ({"quant_format": quantization.QuantFormat.QOperator}, "quant_format=QOperator is not possible here: files are QDQ"),
    ({"calibrate_method": quantization.CalibrationMethod.Entropy}, "choose one of MinMax, Percentile"),
    ({"weight_type": quantization.QuantType.QUInt8}, "choose one of QInt8, QInt4"),
    ({"activation_type": "QInt4"}, "choose one of QInt8"),
    ({"use_external_data_format": True}, "large weights go beside the file"),
    ({"calibration_cache_path": "x"}, "the option workdir"),
    ({"calibration_providers": ["CUDAExecutionProvider"]}, "calibration runs on the CPU"),
    ({"extra_options": {"WeightSymmetric": False}}, "zero point 0"),
    ({"extra_options": {"TensorQuantOverrides": {"x": []}}}, "the option encodings"),
    ({"extra_options": {"Unheard": 1}}, "nothing of the kind"),
    ({"activation_type": "QUInt8", "extra_options": {"ActivationSymmetric": True}}, "QInt8 or QInt16"),
    ({"nodes_to_exclude": ["nowhere"]}, "there is no node 'nowhere'"),
])  # fmt: skip
def test_what_does_not_act_is_refused(tmp_path, arguments, message):
    with pytest.raises(ConfigError, match=message):
        static(tmp_path, **arguments)


def test_calibration_data_must_be_given(tmp_path):
    with pytest.raises(ConfigError, match="give calibration data"):
        compat.quantize_static(small_convnet(), tmp_path / "q.onnx")


def test_dynamic_quantization_is_refused_with_what_to_do_instead(tmp_path):
    with pytest.raises(CapabilityError, match="bits='w8a32'"):
        compat.quantize_dynamic(small_convnet(), tmp_path / "q.onnx")


def test_what_onnxruntime_recommends_is_the_target_itself(tmp_path):
    report = compat.quantize_static(
        small_convnet(), tmp_path / "q.onnx", Reader(), per_channel=True, activation_type="QUInt8",
        preset="fast", measure_speed=False,
    )  # fmt: skip
    assert report.config["target"] == Config().target
