"""Models with operators of custom libraries."""

from __future__ import annotations

import numpy as np
import pytest
from graphs import normal, parse
from typer.testing import CliRunner

from eptq_onnx import Config, quantize, runtime
from eptq_onnx.cli import app
from eptq_onnx.errors import ConfigError, ModelError
from eptq_onnx.parallel import ordered_map

X = normal(32, 6, seed=2, scale=1.0)


def two_layers(operator="Relu", domain=""):
    model = parse(
        "g (float[N,6] x) => (float[N,3] y) { h = Gemm (x, w)  r = Relu (h)  y = Gemm (r, v) }",
        {"w": normal(6, 8), "v": normal(8, 3, seed=1)},
    )
    model.graph.node[1].op_type, model.graph.node[1].domain = operator, domain
    if domain:
        model.opset_import.add(domain=domain, version=1)
    return model


@pytest.fixture
def registered(monkeypatch):
    """The libraries that the sessions register, session by session, instead of their being loaded."""
    options, made = runtime.load().SessionOptions, list[list[str]]()

    class Options:
        def __init__(self):
            object.__setattr__(self, "own", options())
            made.append([])

        def __getattr__(self, name):
            return getattr(self.own, name)

        def __setattr__(self, name, value):
            setattr(self.own, name, value)

        def register_custom_ops_library(self, path):
            made[-1].append(path)

    monkeypatch.setattr(runtime, "_session_options", Options)
    return made


def test_every_session_of_a_run_has_all_libraries(registered, tmp_path):
    paths = [tmp_path / "one.so", tmp_path / "two.so"]
    for path in paths:
        path.touch()
    with runtime.custom_operators(paths):
        list(ordered_map(lambda _: runtime.session_options(), range(4)))
    runtime.session_options()
    # First they are tried, last there are none any more.
    assert registered == [*[[str(p) for p in paths]] * 5, []]


def test_a_run_leaves_no_libraries_behind(registered, tmp_path):
    path = tmp_path / "one.so"
    path.touch()
    with pytest.raises(ZeroDivisionError), runtime.custom_operators([path]):
        raise ZeroDivisionError
    runtime.session_options()
    assert registered[-1] == []


def test_a_library_that_does_not_exist(tmp_path):
    with pytest.raises(ConfigError, match=r"the library of custom operators .*none\.so does not exist"):
        quantize(two_layers(), X, Config(preset="fast", custom_ops=(tmp_path / "none.so",)))


def test_a_library_that_cannot_be_loaded(tmp_path):
    (tmp_path / "text.so").write_text("no library")
    with pytest.raises(ConfigError, match=r"the library of custom operators .*text\.so cannot be loaded: "):
        quantize(two_layers(), X, Config(preset="fast", custom_ops=(tmp_path / "text.so",)))


def test_the_command_line_takes_libraries(tmp_path):
    (tmp_path / "model.onnx").write_bytes(two_layers().SerializeToString())
    np.savez(tmp_path / "data.npz", x=X)
    arguments = [
        str(tmp_path / "model.onnx"),
        "--data",
        str(tmp_path / "data.npz"),
        "-o",
        str(tmp_path / "q.onnx"),
    ]
    done = CliRunner().invoke(
        app, ["quantize", *arguments, "--preset", "fast", "--custom-ops", str(tmp_path / "none.so")]
    )
    assert done.exit_code == 2
    assert not (tmp_path / "q.onnx").exists()


def test_a_model_whose_library_is_not_given_says_what_to_do():
    with pytest.raises(ModelError, match=r"Unheard.* is not a registered function/op; .* with --custom-ops"):
        quantize(two_layers("Unheard", "own.domain"), X, Config(preset="fast"))


@pytest.mark.parametrize(("preset", "steps"), [("fast", 0), ("balanced", 20)])
def test_a_custom_operator_stays_float(preset, steps):
    extensions = pytest.importorskip(
        "onnxruntime_extensions", reason="no library of custom operators here", exc_type=ImportError
    )
    model = two_layers("NegPos", "ai.onnx.contrib")
    model.graph.node[1].output[:] = ["negative", "r"]
    model.graph.node[1].name = "own"
    library = extensions.get_library_path()
    result = quantize(model, X, Config(preset=preset, steps=steps, custom_ops=(library,)))
    assert [(n.node, n.reason) for n in result.report.kept_float] == [
        ("own", "NegPos is a custom operator, of the domain ai.onnx.contrib")
    ]
    assert len(result.report.layers) == 2
    assert result.report.verification.outputs["y"] > 25
