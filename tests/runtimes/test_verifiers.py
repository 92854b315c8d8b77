"""What every runtime that is found obeys; those that are not installed say what to install."""

from __future__ import annotations

import inspect
import shutil

import numpy as np
import onnx
import pytest
from graphs import images, normal, parse, silent, small_convnet

import eptq_onnx
from eptq_onnx import CapabilityError, Config, ConfigError, DataError, InstallError, ModelError, runtimes
from eptq_onnx.runtimes import onnxruntime, openvino, tensorrt_rtx, web
from eptq_onnx.runtimes.base import CONVERSIONS, Verifier, clock_of, graph_of, ports_of
from eptq_onnx.runtimes.feeds import default_feeds

FEEDS = {"image": images(1)}


@pytest.fixture(params=runtimes.registered())
def each_runtime(request) -> Verifier:
    found = runtimes.choose(request.param)
    if (reason := found.available()) is not None:
        pytest.skip(reason)
    return found()


def able(act):
    """What a runtime answers; one that cannot says so."""
    try:
        return act()
    except CapabilityError as e:
        pytest.skip(str(e))


@pytest.fixture
def measuring(each_runtime) -> Verifier:
    if not each_runtime.measures:
        pytest.skip(f"{each_runtime.name} runs no models here")
    return each_runtime


@pytest.fixture(scope="module")
def symmetric():
    """A quantized model that every runtime takes: zero points of 0, float biases."""
    weight = {"w": np.clip(normal(8, 4, 3, 3) * 40, -127, 127).astype(np.int8), "b": normal(8, seed=1)}
    return parse(
        "g (float[1,4,16,16] x, int8[8,4,3,3] w, float[8] b) => (float[1,8,14,14] y) {"
        " s = Constant <value: tensor = float {0.03}> ()  z = Constant <value: tensor = int8 {0}> ()"
        " xq = QuantizeLinear (x, s, z)  xd = DequantizeLinear (xq, s, z)  wd = DequantizeLinear (w, s, z)"
        " c = Conv (xd, wd, b)  y = Relu (c) }",
        weight,
    )


def test_runtimes_are_found_by_themselves():
    found = runtimes.registered()
    assert {"onnxruntime", "openvino", "openvino-f32", "tensorrt-rtx", "web", "node", "reference"} == set(
        found
    )
    assert all(name == verifier.name and verifier.about for name, verifier in found.items())
    assert runtimes.make().name == "onnxruntime"
    with pytest.raises(ConfigError, match=r"choose one of .*onnxruntime, openvino"):
        runtimes.choose("tvm")


@pytest.mark.parametrize("name", runtimes.registered())
def test_a_runtime_is_there_or_says_what_to_install(name):
    found = runtimes.choose(name)
    reason = found.available()
    if reason is None:
        assert found().version
    else:
        assert "install" in reason
        with pytest.raises(InstallError) as raised:
            found()
        assert str(raised.value) == reason


@pytest.mark.parametrize(
    ("verifier", "what", "remedy"),
    [
        (openvino.OpenVino, "openvino is not installed", r"pip install \"eptq-onnx\[openvino\]\""),
        (tensorrt_rtx.TensorRtRtx, "tensorrt-rtx is not installed", r"pip install \"eptq-onnx\[tensorrt\]\""),
        (
            web.Web,
            "onnxruntime-web is not installed",
            "npm install --ignore-scripts --prefix .* onnxruntime-web ",
        ),
        (
            web.Native,
            "onnxruntime-node is not installed",
            "npm install --ignore-scripts --prefix .* onnxruntime-node ",
        ),
    ],
)
def test_what_is_missing_is_told(monkeypatch, tmp_path, verifier, what, remedy):
    def missing(name: str) -> None:
        raise ModuleNotFoundError(name)

    monkeypatch.setattr(openvino, "find_spec", lambda _: None)
    monkeypatch.setattr(tensorrt_rtx, "import_module", missing)
    monkeypatch.setattr(shutil, "which", lambda _: "/bin/node")
    monkeypatch.setenv(web.FOLDER, str(tmp_path / "some where"))
    with pytest.raises(InstallError, match=f"{what}: {remedy}"):
        verifier()


def test_without_node_that_is_what_is_missing(monkeypatch):
    monkeypatch.setattr(shutil, "which", lambda _: None)
    with pytest.raises(InstallError, match="node is not installed"):
        web.Web()


def test_a_damaged_library_is_told_apart_from_a_missing_one(monkeypatch):
    def damaged(name: str) -> None:
        raise OSError("libnvrtx.so: cannot open shared object file")

    monkeypatch.setattr(tensorrt_rtx, "import_module", damaged)
    assert "cannot be imported (libnvrtx.so" in (tensorrt_rtx.TensorRtRtx.available() or "")


def test_outputs_agree_with_onnxruntime(each_runtime):
    expected = runtimes.make().run(small_convnet(), FEEDS)
    got = able(lambda: each_runtime.run(small_convnet(), {**FEEDS, "unused": images(1)}))
    assert set(got) == set(expected)
    for name, value in expected.items():
        # The default precision may be bfloat16.
        np.testing.assert_allclose(got[name], value, atol=0.05 * np.abs(value).max())


def test_a_model_on_disk_is_the_same(measuring, tmp_path):
    onnx.save(small_convnet(), tmp_path / "model.onnx")
    one, other = (measuring.run(model, FEEDS) for model in (small_convnet(), tmp_path / "model.onnx"))
    np.testing.assert_array_equal(one["logits"], other["logits"])


def test_external_data_is_read(each_runtime, tmp_path):
    weights = {"w": normal(64, 64)}
    model = parse("g (float[2,64] x, float[64,64] w) => (float[2,64] y) { y = MatMul (x, w) }", weights)
    path = tmp_path / "model.onnx"
    onnx.save(model, path, save_as_external_data=True, location="model.weights", size_threshold=0)
    x = normal(2, 64, seed=1)
    found = able(lambda: each_runtime.run(path, {"x": x}))["y"]
    np.testing.assert_allclose(found, x @ weights["w"], atol=0.2)


def test_every_node_has_a_precision_and_stands_for_something(each_runtime):
    found = able(lambda: each_runtime.kernels(small_convnet()))
    assert len({k.node for k in found}) == len(found)
    floats = [k for k in found if k.operator in ("Conv", "Gemm", "MatMul")]
    assert len(floats) >= 3
    for kernel in floats:
        assert kernel.precision in ("float32", "bfloat16", "float16"), kernel
        assert kernel.stands_for, kernel
        assert not kernel.quantized


def test_integer_kernels_are_told_from_float_ones(each_runtime, symmetric):
    [conv] = [k for k in able(lambda: each_runtime.kernels(symmetric)) if k.operator == "Conv"]
    # onnxruntime has no kernel for a float bias; the others compute on integers.
    assert conv.quantized == (not isinstance(each_runtime, (onnxruntime.OnnxRuntime, web.Web))), conv
    assert conv.stands_for


def test_integer_kernels_of_the_default_target_run(measuring):
    config = Config(preset="fast", measure_speed=False)
    quantized = eptq_onnx.quantize(small_convnet(), images(8), config, progress=silent).model
    convolutions = [k for k in measuring.kernels(quantized) if k.operator == "Conv"]
    assert len(convolutions) == 3
    assert all(k.quantized for k in convolutions)


def test_nodes_are_timed(measuring):
    times = measuring.profile(small_convnet(), FEEDS)
    assert len({t.kernel.node for t in times}) == len(times)
    assert sum(t.seconds for t in times) > 0
    assert {"Conv"} <= {t.kernel.operator for t in times}
    known = {name for t in times for name in t.kernel.stands_for}
    assert {"c2", "c3"} <= known, "nodes without a name are called by their output"
    assert any(t.kernel.operator not in CONVERSIONS and t.seconds > 0 for t in times)


def test_a_run_is_timed_and_loading_has_a_cost(measuring, tmp_path):
    path = tmp_path / "model.onnx"
    onnx.save(small_convnet(), path)
    with measuring.load(path) as loaded:
        assert [p.name for p in loaded.ports] == ["image"]
        run = loaded.bind(FEEDS)
        assert all(run() >= 0 for _ in range(3))
        with pytest.raises(DataError, match="the model's input image has no values"):
            loaded.run({"picture": images(1)})
    cost = measuring.load_cost(path)
    assert cost.seconds > 0
    assert cost.peak_bytes > 0


def test_a_model_that_is_refused_is_an_error(each_runtime):
    model = small_convnet()
    model.graph.node[0].op_type = "Nonsense"

    def asked() -> None:
        try:
            each_runtime.kernels(model)
        except CapabilityError:
            each_runtime.run(model, FEEDS)

    with pytest.raises(ModelError, match="refuse"):
        asked()


def test_what_cannot_be_run_is_said(monkeypatch, tmp_path):
    """No other runtime answers in the name of one that cannot run."""
    monkeypatch.setattr(tensorrt_rtx.TensorRtRtx, "available", staticmethod(lambda: None))
    verifier = tensorrt_rtx.TensorRtRtx()
    for act in (
        lambda: verifier.run(small_convnet(), FEEDS),
        lambda: verifier.profile(small_convnet(), FEEDS),
        lambda: verifier.load_cost(tmp_path / "model.onnx"),
    ):
        with pytest.raises(CapabilityError, match=r"TensorRT-RTX .* on a GPU only"):
            act()


def test_one_thread_is_timed_by_its_cpu_time():
    assert clock_of(1) is not clock_of(2)
    assert clock_of(0) is clock_of(2)


def test_every_public_method_is_documented():
    for name, method in inspect.getmembers(Verifier, inspect.isfunction):
        assert name.startswith("_") or inspect.getdoc(method)


def test_values_are_made_up_for_open_sizes_and_types():
    ports = ports_of(
        parse(
            "g (float[n,3,h,w] image, int64[n,length] ids, int64[n,length] mask, bool[] flag, float[2,5] x)"
            " => (float[2,5] y) { y = Relu (x) }"
        ).graph
    )
    found = default_feeds(ports)
    shapes = {name: value.shape for name, value in found.items()}
    assert shapes == {"image": (1, 3, 224, 224), "ids": (1, 128), "mask": (1, 128), "flag": (), "x": (2, 5)}
    assert found["ids"].dtype == np.int64
    assert (found["mask"] == 1).all()
    assert found["image"].std() > 0.5
    with pytest.raises(DataError, match=r"no values can be made up for the input t: .* --data"):
        default_feeds(ports_of(parse("g (string[2] t) => (string[2] y) { y = Identity (t) }").graph))


def test_a_missing_file_is_told(tmp_path):
    with pytest.raises(ModelError, match="does not exist"):
        graph_of(tmp_path / "missing.onnx")
