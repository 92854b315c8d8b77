"""What an installation without onnxruntime, or with a damaged one, is told."""

from __future__ import annotations

import builtins
import sys
from types import ModuleType
from typing import Any

import numpy as np
import onnx
import pytest
from graphs import images, normal, parse, small_convnet

import eptq_onnx
from eptq_onnx import parallel, runtime
from eptq_onnx.errors import InstallError, ModelError
from eptq_onnx.proto import store
from eptq_onnx.proto.weights import stored
from eptq_onnx.runtime import ExactSession, Session


@pytest.fixture
def without_onnxruntime(monkeypatch):
    """Importing onnxruntime fails, as if it were not installed."""
    real = builtins.__import__

    def fake(name, *arguments, **options):
        if name.split(".")[0] == "onnxruntime":
            raise ModuleNotFoundError(f"No module named {name!r}")
        return real(name, *arguments, **options)

    for name in [n for n in sys.modules if n.split(".")[0] == "onnxruntime"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setattr(builtins, "__import__", fake)


def test_nothing_installed(without_onnxruntime, monkeypatch):
    monkeypatch.setattr(runtime, "installed_distributions", dict)
    with pytest.raises(
        InstallError,
        match=r'not installed: .*pip install "eptq-onnx\[standard\]", or "eptq-onnx\[training\]"',
    ):
        eptq_onnx.quantize(small_convnet(), images(4))


def test_two_builds_overwrote_each_other(without_onnxruntime, monkeypatch):
    found = {"onnxruntime": "1.27.0", "onnxruntime-training-cpu": "1.19.2"}
    monkeypatch.setattr(runtime, "installed_distributions", lambda: found)
    with pytest.raises(
        InstallError, match=r"overwrote each other: uninstall them all .*onnxruntime onnxruntime-training-cpu"
    ):
        runtime.load()


def _without_builder(monkeypatch) -> None:
    from onnxruntime.capi import _pybind_state

    bare: Any = ModuleType("onnxruntime.capi._pybind_state")
    bare.InferenceSession = _pybind_state.InferenceSession
    monkeypatch.setattr("onnxruntime.capi._pybind_state", bare)


def test_no_gradient_builder(monkeypatch):
    _without_builder(monkeypatch)
    monkeypatch.setattr(runtime, "installed_distributions", lambda: {"onnxruntime": "1.27.0"})
    with pytest.raises(
        InstallError,
        match="has no gradient builder, which the engine 'training' needs: choose the engine 'standard'",
    ):
        eptq_onnx.quantize(small_convnet(), images(4), eptq_onnx.Config(engine="training"))


def test_without_a_gradient_builder_the_standard_engine_is_chosen(monkeypatch):
    _without_builder(monkeypatch)
    monkeypatch.setattr(runtime, "installed_distributions", lambda: {"onnxruntime": "1.27.0"})
    monkeypatch.setattr(runtime.load(), "__version__", "1.27.0")
    result = eptq_onnx.quantize(small_convnet(), images(8), eptq_onnx.Config(steps=2))
    assert result.report.engine == "standard"
    assert result.report.optimization is not None
    assert result.report.optimization.steps == 2


def test_no_gradient_builder_because_it_was_overwritten(monkeypatch):
    _without_builder(monkeypatch)
    import onnxruntime

    found = {"onnxruntime": onnxruntime.__version__, "onnxruntime-training-cpu": "1.19.2"}
    monkeypatch.setattr(runtime, "installed_distributions", lambda: found)
    with pytest.raises(InstallError, match="overwrote each other"):
        runtime.load_gradient_builder()


def test_fast_needs_no_gradient_builder(monkeypatch):
    _without_builder(monkeypatch)
    result = eptq_onnx.quantize(small_convnet(), images(8), eptq_onnx.Config(preset="fast"))
    assert result.report.engine == ""


def test_a_model_that_onnxruntime_refuses():
    model = small_convnet()
    model.graph.node[0].input[1] = "nobody"
    with pytest.raises(ModelError, match="onnxruntime refuses the model") as e:
        runtime.Session(model)
    assert "\n" not in str(e.value)
    assert isinstance(model, onnx.ModelProto)


@pytest.mark.parametrize("clipping", ["r = Relu (x)", "r = Clip (x, low)"])
def test_clipping_before_8_bit_floats_is_not_dropped(clipping):
    """onnxruntime drops it by default."""
    text = f"g (float[8] x) => (float[8] y) {{ {clipping}  q = QuantizeLinear (r, s, z)  y = DequantizeLinear (q, s, z) }}"
    constants = {"s": np.array(0.01, np.float32)} | (
        {"low": np.array(0, np.float32)} if "low" in clipping else {}
    )
    model = parse(text, constants, opset=19)
    zero = onnx.TensorProto(name="z", data_type=onnx.TensorProto.FLOAT8E4M3FN, raw_data=b"\0")
    model.graph.initializer.append(zero)
    x = np.linspace(-2, 2, 8, dtype=np.float32)
    plain, ours = Session(model, optimize=False).run({"x": x})["y"], Session(model).run({"x": x})["y"]
    np.testing.assert_array_equal(ours, plain)
    assert (ours >= 0).all()


@pytest.mark.parametrize(
    "layer", ["Conv (a, w)", "ConvTranspose (a, w)", "Gemm <transB = 1> (b, v)"], ids=lambda x: x.split()[0]
)
@pytest.mark.parametrize("small", [1e-3, 1e-2])
def test_float_weights_between_quantizers_stay_as_they_are(layer, small):
    model = parse(
        f"""
        g (float[2,4,3,3] x) => (float[] y)
        {{
            q = QuantizeLinear (x, s, z)  a = DequantizeLinear (q, s, z)  b = Flatten (a)
            o = {layer}
            p = QuantizeLinear (o, t, z)  y = DequantizeLinear (p, t, z)
        }}
        """,
        {
            # One scale for all channels would lose the small ones.
            "w": normal(4, 4, 1, 1) * np.array([1, small, small, 1], np.float32).reshape(4, 1, 1, 1),
            "v": normal(4, 36) * np.array([[1], [small], [small], [1]], np.float32),
            "s": np.array(0.05, np.float32),
            "t": np.array(small / 8, np.float32),
            "z": np.array(0, np.int8),
        },
    )
    feeds = {"x": normal(2, 4, 3, 3)}
    exact = runtime.Session(model, optimize=False).run(feeds)["y"]
    found = runtime.ExactSession(model).run(feeds)["y"]
    assert np.abs(found - exact).max() < 1.01 * small / 8
    assert np.mean(found != exact) < 0.02


def test_a_clip_of_an_input_in_front_of_a_quantizer_is_computed():
    model = parse(
        "g (float[N,4] x) => (float[N,4] y)"
        "{ c = Clip (x, low, high) q = QuantizeLinear (c, s, z) y = DequantizeLinear (q, s, z) }",
        {"low": np.float32(-1), "high": np.float32(1), "s": np.float32(1 / 127), "z": np.int8(0)},
    )
    values = np.array([[-3, -0.5, 0.5, 2]], np.float32)
    np.testing.assert_allclose(ExactSession(model).run({"x": values})["y"], values.clip(-1, 1), atol=0.004)


@pytest.mark.parametrize("large", [False, True])
def test_other_machines_get_the_weights_unless_there_are_too_many(tmp_path, monkeypatch, large):
    monkeypatch.setattr(store, "_HEAVY", 256)
    monkeypatch.setattr(parallel, "are_distant", lambda: True)
    if large:
        monkeypatch.setattr(store, "LARGE", 1000)
    session = Session(stored(small_convnet(), str(tmp_path)))
    _, (recipe, _) = session.__reduce__()
    sent = onnx.load_model_from_string(recipe.model.tobytes())
    assert (store.folder_of(sent) is not None) is large
