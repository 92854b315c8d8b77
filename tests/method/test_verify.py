from __future__ import annotations

import numpy as np
import onnx
import pytest
from graphs import images, normal, parse, silent, small_convnet

import eptq_onnx
from eptq_onnx import Config, OutputError, data, targets
from eptq_onnx.data.splits import share_out
from eptq_onnx.graph.replay import Replay
from eptq_onnx.method.normalize import normalize
from eptq_onnx.method.plan import plan
from eptq_onnx.method.verify import Versions, count_kernels, verify
from eptq_onnx.runtime import Session
from eptq_onnx.runtimes.base import Kernel


def test_the_report_measures_what_a_user_would():
    """The output SQNR over the held-out samples agrees with one recomputed by hand."""
    x = images(40)
    shares = share_out(data.read(x, small_convnet()), Config())
    result = eptq_onnx.quantize(small_convnet(), x, Config(preset="fast"))
    held = x[shares.unseen]
    expected, got = (Session(m).run({"image": held})["logits"] for m in (small_convnet(), result.model))
    by_hand = 10 * np.log10(np.square(expected).sum() / np.square(expected - got).sum())
    v = result.report.verification
    assert v.samples == len(held) == 8
    assert v.held_out
    assert v.outputs["logits"] == pytest.approx(by_hand, abs=0.05)
    assert set(v.layers) == {x.node for x in result.report.layers}
    assert v.layers[result.report.layers[-1].node] == pytest.approx(by_hand, abs=0.05)
    assert v.quantized_bytes == result.model.ByteSize()


def test_kernels_are_counted_by_the_operator_that_they_stand_for():
    kinds = ["QLinearConv", "QLinearConv", "MatMulIntegerToFloat", "Conv"]
    found = [Kernel(f"n{k}", kind, "", "") for k, kind in enumerate(kinds)]
    assert count_kernels(found, targets.load("ort-x64")) == {"Conv": 2, "MatMul": 1}


def test_an_invalid_model_is_not_passed_on():
    model = normalize(small_convnet(), 13)
    target = targets.load("ort-x64")
    p = plan(model, target, Config())
    broken = onnx.ModelProto()
    broken.CopyFrom(model)
    broken.graph.node[0].op_type = "Nonsense"
    samples = data.read(images(4), model)
    shares = share_out(samples, Config())
    with pytest.raises(OutputError, match="not valid ONNX"):
        verify(Versions(model, broken, broken, {}, 0), p, target, samples, shares, Replay(), silent)


def test_outputs_whose_size_depends_on_values_are_compared():
    model = parse(
        "g (float[N,4] x) => (float[K] y) {"
        " h = MatMul (x, w)  zero = Constant <value_float = 0.0> ()  c = Greater (h, zero)"
        " last = Constant <value_ints = [-1]> ()  d = Reshape (c, last)  y = Compress (h, d) }",
        {"w": normal(4, 6)},
    )
    result = eptq_onnx.quantize(
        model, {"x": normal(64, 4)}, Config(preset="fast", activation_bits=3, edge_bits=3)
    )
    assert 0 <= result.report.verification.outputs["y"] < 20


def test_overflow_of_this_machine_says_nothing_about_another_runtime(tmp_path):
    """Without VNNI, onnxruntime's kernels overflow with weights of the whole range."""
    model = parse(
        "g (float[N,64] x) => (float[N,8] y) { a = MatMul (x, w)  y = MatMul (a, v) }",
        {"w": np.full((64, 64), 0.1, np.float32), "v": normal(64, 8)},
    )
    (tmp_path / "mine.toml").write_text(
        'name = "mine"\ntitle = "Mine"\nextends = "ort-x64-vnni"\nverifier = "none"\n'
    )
    samples = np.abs(normal(64, 64, scale=3)) + 3
    config = Config(preset="fast", target=str(tmp_path / "mine.toml"))
    report = eptq_onnx.quantize(model, {"x": samples}, config).report
    assert report.verification.outputs["y"] > 30
    assert min(report.verification.layers.values()) > 30
    assert report.verification.kernels == {}
