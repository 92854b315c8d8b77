"""onnxruntime's signatures: each argument acts, or an error says why not."""

from __future__ import annotations

import inspect
from typing import Any

import numpy as np
import onnx
import pytest
from graphs import images, normal, parse, small_convnet
from onnx import numpy_helper

from eptq_onnx import Config, ConfigError, ModelError, compat
from eptq_onnx.runtime import Session

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
        assert -64 <= values.min() <= values.max() <= 64


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
    ({"extra_options": {"ForceQuantizeNoInputCheck": True}}, "follow what they read"),
    ({"extra_options": {"BlockSize": 32}}, "the option block"),
    ({"extra_options": {"CalibMovingAverage": True}}, "ranges are those of all samples"),
    ({"activation_type": "QUInt8", "extra_options": {"ActivationSymmetric": True}}, "QInt8 or QInt16"),
    ({"nodes_to_exclude": ["nowhere"]}, "there is no node 'nowhere'"),
])  # fmt: skip
def test_what_does_not_act_is_refused(tmp_path, arguments, message):
    with pytest.raises(ConfigError, match=message):
        static(tmp_path, **arguments)


def test_defaults_of_extra_options_may_be_given(tmp_path):
    # As onnxruntime 1.32 documents them.
    defaults = {
        "extra.Sigmoid.nnapi": False, "ActivationSymmetric": False, "WeightSymmetric": True,
        "EnableSubgraph": False, "ForceQuantizeNoInputCheck": False, "MatMulConstBOnly": False,
        "AddQDQPairToWeight": False, "OpTypesToExcludeOutputQuantization": [], "DedicatedQDQPair": False,
        "QDQOpTypePerChannelSupportToAxis": {}, "CalibTensorRangeSymmetric": False,
        "CalibStridedMinMax": None, "CalibMovingAverage": False, "CalibMovingAverageConstant": 0.01,
        "CalibMaxIntermediateOutputs": None, "SmoothQuant": False, "SmoothQuantAlpha": 0.5,
        "SmoothQuantFolding": True, "UseQDQContribOps": False, "MinimumRealRange": None,
        "TensorQuantOverrides": {}, "QDQKeepRemovableActivations": False, "BlockSize": 0,
        "QDQDisableWeightAdjustForInt32Bias": False, "QuantizeBias": True,
    }  # fmt: skip
    given, left_out = static(tmp_path, extra_options=defaults), static(tmp_path)
    assert given.SerializeToString() == left_out.SerializeToString()


@pytest.mark.parametrize("integer", [True, False])
def test_biases_are_integers_or_float(tmp_path, integer):
    model = static(tmp_path, extra_options={"QuantizeBias": integer})
    constants = {t.name: t.data_type for t in model.graph.initializer}
    types = {constants[n.input[0]] for n in model.graph.node if n.input and n.input[0] in constants}
    assert (onnx.TensorProto.INT32 in types) == integer
    assert weights(model)


def test_calibration_data_must_be_given(tmp_path):
    with pytest.raises(ConfigError, match="give calibration data"):
        compat.quantize_static(small_convnet(), tmp_path / "q.onnx")


def test_nodes_that_become_part_of_others_may_be_named(tmp_path):
    named = small_convnet()
    for k, node in enumerate(named.graph.node):
        node.name = f"n{k}"
    norm = next(n.name for n in named.graph.node if n.op_type == "BatchNormalization")
    compat.quantize_static(
        named, tmp_path / "n.onnx", Reader(), nodes_to_exclude=[norm], preset="fast", measure_speed=False,
        objective="integers",
    )  # fmt: skip
    assert len(weights(onnx.load(tmp_path / "n.onnx"))) == 4


def test_what_onnxruntime_recommends_is_the_target_itself(tmp_path):
    report = compat.quantize_static(
        small_convnet(), tmp_path / "q.onnx", Reader(), per_channel=True, activation_type="QUInt8",
        preset="fast", measure_speed=False,
    )  # fmt: skip
    assert report.config["target"] == Config().target


# ---- ranges of each run ------------------------------------------------------------------------------------
NETS: dict[str, tuple[str, dict[str, tuple[int, ...]]]] = {
    "products": ("""
        g (float[N,6,64] x) => (float[N,6,64] y) {
            h = MatMul (x, w1)  hb = Add (h, b1)  r = Relu (hb)  f = MatMul (r, w2)  s = Add (f, x)
            y = LayerNormalization <axis = -1> (s, gain)
        }""", {"w1": (64, 96), "b1": (96,), "w2": (96, 64), "gain": (64,)}),
    "gemm": ("""
        g (float[N,64] x) => (float[N,40] y) {
            h = Gemm (x, w1, b1)  r = Tanh (h)  y = Gemm <transB = 1> (r, w2, b2)
        }""", {"w1": (64, 96), "b1": (96,), "w2": (40, 96), "b2": (40,)}),
    "table": ("""
        g (int64[N,6] ids) => (float[N,6,32] y) {
            e = Gather (words, ids)  h = MatMul (e, w1)  r = Relu (h)  y = MatMul (r, w2)
        }""", {"words": (400, 64), "w1": (64, 96), "w2": (96, 32)}),
    "images": ("""
        g (float[N,3,8,8] x) => (float[N,40] y) {
            c = Conv <pads = [1, 1, 1, 1]> (x, k, b)  r = Relu (c)  f = Flatten (r)  y = MatMul (f, w)
        }""", {"k": (16, 3, 3, 3), "b": (16,), "w": (1024, 40)}),
}  # fmt: skip
"""Text of a network, and the shapes of its constants."""


def net(kind: str, seed: int = 0) -> onnx.ModelProto:
    text, shapes = NETS[kind]
    model = parse(text, {n: normal(*s, seed=seed + k, scale=0.2) for k, (n, s) in enumerate(shapes.items())})
    for k, node in enumerate(model.graph.node):
        node.name = f"n{k}"
    model.ir_version = 8
    return model


def inputs(kind: str, count: int = 24) -> dict[str, np.ndarray[Any, Any]]:
    if kind == "table":
        return {"ids": np.random.default_rng(1).integers(0, 400, (count, 6))}
    shape = {"products": (6, 64), "gemm": (64,), "images": (3, 8, 8)}[kind]
    return {"x": normal(count, *shape, seed=90)}


def signal_to_noise(model: onnx.ModelProto, exact: onnx.ModelProto, kind: str) -> float:
    """Ratio in dB of the outputs, sample by sample: a range is that of one of them."""
    data = inputs(kind)
    sessions = Session(model), Session(exact)
    rows = [{n: v[k : k + 1] for n, v in data.items()} for k in range(len(next(iter(data.values()))))]
    found, wanted = (np.concatenate([s.run(row)["y"] for row in rows]) for s in sessions)
    return float(10 * np.log10(np.var(wanted) / np.mean(np.square(found - wanted))))


def both(kind: str, tmp_path, seed: int = 0, **arguments: Any) -> tuple[onnx.ModelProto, onnx.ModelProto]:
    """The file of this package, and that of onnxruntime."""
    model = net(kind, seed)
    compat.quantize_dynamic(model, tmp_path / "ours.onnx", **arguments)
    quantization.quantize_dynamic(model, tmp_path / "theirs.onnx", **arguments)
    return onnx.load(tmp_path / "ours.onnx"), onnx.load(tmp_path / "theirs.onnx")


def count_of(model: onnx.ModelProto, op_type: str) -> int:
    return sum(n.op_type == op_type for n in model.graph.node)


@pytest.mark.parametrize("kind", ["products", "gemm", "table"])
@pytest.mark.parametrize("per_channel", [False, True])
def test_dynamic_files_are_no_worse_and_no_larger(kind, per_channel, tmp_path):
    gain = []
    for seed in range(6):
        # With 7 bits, products are the same on processors whose 8-bit ones saturate.
        ours, theirs = both(kind, tmp_path, seed, per_channel=per_channel, reduce_range=True)
        one, other = (signal_to_noise(model, net(kind, seed), kind) for model in (ours, theirs))
        gain.append(one - other)
        # Tables have a scale for each row, and a node more.
        assert ours.ByteSize() - (2000 if kind == "table" else 0) < theirs.ByteSize()
        assert count_of(ours, "MatMulInteger") == count_of(theirs, "MatMulInteger") == 2
    # The error of the weights is a tenth less; in one network, where values round is chance.
    assert np.mean(gain) > 0


def test_weights_of_convolutions_are_integers_without_an_operator_that_nothing_runs(tmp_path):
    compat.quantize_dynamic(net("images"), tmp_path / "q.onnx")
    model = onnx.load(tmp_path / "q.onnx")
    assert [v.shape for v in integers_of(model)] == [(16, 3, 3, 3), (1024, 40)]
    assert count_of(model, "Conv") == count_of(model, "MatMulInteger") == 1
    assert signal_to_noise(model, net("images"), "images") > 25


def integers_of(model: onnx.ModelProto) -> list[np.ndarray[Any, Any]]:
    return [
        numpy_helper.to_array(t)
        for t in model.graph.initializer
        if t.data_type == onnx.TensorProto.INT8 and len(t.dims) > 1
    ]


def test_dynamic_arguments_act(tmp_path):
    def made(kind: str = "products", **arguments: Any) -> onnx.ModelProto:
        compat.quantize_dynamic(net(kind), tmp_path / "q.onnx", **arguments)
        return onnx.load(tmp_path / "q.onnx")

    scales = [n.input[1] for n in made(per_channel=True).graph.node if n.op_type == "Mul"]
    assert {t.dims[-1] for t in made(per_channel=True).graph.initializer if t.name in scales} == {96, 64}
    assert all(-64 <= v.min() <= v.max() <= 64 for v in integers_of(made(reduce_range=True)))
    assert made(weight_type="QInt4").ByteSize() < 0.8 * made().ByteSize()
    for arguments, products, tables in (
        ({"op_types_to_quantize": ["MatMul"]}, 2, 0),
        ({"op_types_to_quantize": ["MatMul", "Gather"]}, 2, 1),
        ({"nodes_to_exclude": ["n1"]}, 1, 1),
        ({"nodes_to_quantize": ["n1"]}, 1, 0),
    ):
        model = made("table", **arguments)
        assert count_of(model, "MatMulInteger") == products
        assert sum(v.shape == (400, 64) for v in integers_of(model)) == tables
    assert count_of(made("gemm", op_types_to_quantize=["MatMul"]), "MatMulInteger") == 2
    assert count_of(made("gemm", nodes_to_exclude=["n0"]), "MatMulInteger") == 1


def test_names_of_a_matmul_and_its_bias_may_be_given(tmp_path):
    for name in ("n0", "n1"):
        compat.quantize_dynamic(net("products"), tmp_path / "q.onnx", nodes_to_exclude=[name])
        assert count_of(onnx.load(tmp_path / "q.onnx"), "MatMulInteger") == (1 if name == "n0" else 2)


@pytest.mark.parametrize(("arguments", "message"), [
    ({"weight_type": quantization.QuantType.QUInt8}, "weight_type=QUInt8 is not possible here: choose one of QInt8"),
    ({"use_external_data_format": True}, "large weights go beside the file"),
    ({"extra_options": {"MatMulConstBOnly": False}}, "products of two activations stay float"),
    ({"extra_options": {"EnableSubgraph": True}}, "the bodies of Loop and Scan stay float"),
    ({"extra_options": {"ActivationSymmetric": True}}, "chooses a zero point"),
    ({"extra_options": {"CalibPercentile": 99}}, "nothing of the kind"),
    ({"nodes_to_exclude": ["nowhere"]}, "there is no node 'nowhere'"),
    ({"activation_bits": 4}, "quantizes activations to 8 bits, not 4"),
])  # fmt: skip
def test_what_does_not_act_in_a_dynamic_file_is_refused(tmp_path, arguments, message):
    with pytest.raises(ConfigError, match=message):
        compat.quantize_dynamic(net("products"), tmp_path / "q.onnx", **arguments)


def test_values_of_extra_options_that_change_nothing_are_taken(tmp_path):
    extra = {"MatMulConstBOnly": True, "WeightSymmetric": True, "ActivationSymmetric": False}
    report = compat.quantize_dynamic(net("products"), tmp_path / "q.onnx", extra_options=extra)
    assert {layer.activation_bits for layer in report.layers} == {8}


def test_a_network_without_products_is_told_what_to_do(tmp_path):
    with pytest.raises(ModelError, match="activations=static"):
        compat.quantize_dynamic(
            parse("g (float[N,3,8,8] x) => (float y) { y = Conv (x, k) }", {"k": normal(16, 3, 3, 3)}),
            tmp_path / "q.onnx",
        )


def test_what_is_not_chosen_keeps_float_weights(tmp_path):
    for kinds, count in ((["Conv"], 1), (["Conv", "MatMul"], 2)):
        compat.quantize_static(
            net("images"), tmp_path / "q.onnx", inputs("images", 24), op_types_to_quantize=kinds, preset="fast",
            measure_speed=False, objective="integers",
        )  # fmt: skip
        assert len(integers_of(onnx.load(tmp_path / "q.onnx"))) == count
