"""Where activations of 8 and of 16 bits meet, an operator computes with one width, and readers see the values of the
plan."""

from __future__ import annotations

import numpy as np
import onnx
import pytest
from graphs import images, normal, parse, silent, small_convnet
from hypothesis import given, settings
from hypothesis import strategies as st

from eptq_onnx import Config, data, lint, quantize, targets
from eptq_onnx.graph import edit
from eptq_onnx.method.calibrate import calibrate
from eptq_onnx.method.normalize import normalize
from eptq_onnx.method.plan import plan
from eptq_onnx.method.qdq import write
from eptq_onnx.method.ranges import weight_ranges
from eptq_onnx.runtime import Session

QNN = targets.load("qnn")
FAST = {"preset": "fast", "measure_speed": False}


def functions() -> onnx.ModelProto:
    """A constant that several operators read, functions whose range is prescribed, and joined results."""
    return parse(
        """g (float[1,3,8,8] image) => (float[1,4,8,8] y, float[1,4,8,8] z) {
            c = Conv <kernel_shape = [1,1]> (image, w)
            a = Mul (c, k)
            e = Sigmoid (a)
            m = Mul (a, e)
            t = Tanh (m)
            y = Add (t, k)
            h = Conv <kernel_shape = [1,1]> (m, v)
            i = Add (h, k)
            z = Concat <axis = 1> (h, i)
        }""",
        {
            "w": normal(4, 3, 1, 1, seed=1),
            "k": np.array([0.75], np.float32),
            "v": normal(2, 4, 1, 1, seed=2),
        },
    )


MODELS = {"convnet": small_convnet(batch=1), "functions": functions()}


@pytest.mark.parametrize("name", MODELS)
@settings(deadline=None, max_examples=25)
@given(draw=st.data())
def test_operators_have_one_width_and_readers_see_the_values_of_the_plan(name, draw):
    model = normalize(MODELS[name], 21)
    widths = st.sampled_from((None, 4, 8, 16))
    rules = [f"{n.name}=w8a{b}" for n in model.graph.node if (b := draw.draw(widths, label=n.name))]
    # A target of one's own: QNN takes no Clip between quantizers.
    target = QNN.model_copy(update={"activation": QNN.activation.model_copy(update={"narrow": True})})
    config = Config(bits=rules)
    found = plan(model, target, config)
    samples = data.read({"image": images(8)}, model)
    calibration = calibrate(model, found, samples, config, silent)
    rounding = weight_ranges(model, found, calibration, None, config, ())
    written, read_as = write(model, found, rounding)
    own = {q.spec.bits > 8 for q in (*found.activations, *found.operands)}
    assert bool(found.wide) <= (own == {True, False})
    few = any(q.spec.bits < 8 for q in found.quantizers)
    assert {f.rule for f in lint(written, "qnn").findings} <= ({"between", "output-range"} if few else set())
    copies = {
        n.output[0]: n.output[0].removesuffix("_read_wide_dequantized")
        for n in written.graph.node
        if n.output[0].endswith("_read_wide_dequantized")
    }
    exposed = [*read_as.values(), *copies]
    session = Session(edit.exposing(written, exposed), optimize=False)
    values = session.run({"image": images(1)}, exposed)
    for copy, tensor in copies.items():
        np.testing.assert_array_equal(values[copy], values[read_as[tensor]])
    for quantizer in found.activations:
        for tensor in quantizer.tensors:
            got = values[read_as[tensor]]
            np.testing.assert_array_equal(rounding.grids[quantizer.name].round(got), got)


@pytest.mark.parametrize(
    "bits",
    [["op:Conv=w8a16"], ["op:Add=w8a16"], ["op:Gemm=w4a16"], ["op:Conv=w8a8", "op:GlobalAveragePool=w8a16"]],
    ids=str,
)
@pytest.mark.parametrize("options", [{}, {"preset": "balanced", "steps": 3}], ids=str)
def test_files_of_both_widths_obey_the_target(bits, options):
    config = Config(**{**FAST, **options, "target": "qnn", "bits": bits})
    found = quantize(small_convnet(batch=1), {"image": images()}, config, progress=silent)
    assert lint(found.model, "qnn").findings == ()
    assert found.report.verification.outputs["logits"] > 30


def test_a_runtime_without_such_kernels_computes_in_float_and_needs_no_conversions():
    model = normalize(small_convnet(), 21)
    config = Config(bits=["op:Add=w8a16"])
    mixed = plan(model, targets.load("ort-x64-vnni"), config)
    assert {q.spec.bits for q in mixed.activations} == {8, 16}
    assert not mixed.wide
    assert plan(model, QNN, config).wide
