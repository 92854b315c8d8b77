"""Every way to get it wrong: one sentence, exit code 2, nothing written."""

from __future__ import annotations

import json
import shlex
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from graphs import images, normal, parse, small_convnet
from PIL import Image
from typer.testing import CliRunner

from eptq_onnx.cli import app

FAST = ["--preset", "fast"]


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    onnx.save(small_convnet(), "model.onnx")
    np.savez("data.npz", image=images(12))
    return tmp_path


def invoke(*arguments: str):
    return CliRunner().invoke(app, ["quantize", *arguments])


def good(*extra: str):
    return invoke("model.onnx", "--data", "data.npz", "-o", "out.onnx", *extra)


def test_quantize_writes_the_model_and_the_report(folder):
    before = Path("model.onnx").read_bytes()
    result = good("--steps", "3", "--weight-bits", "4", "--report", "report.json")
    assert result.exit_code == 0, result.output
    assert Path("model.onnx").read_bytes() == before
    onnx.checker.check_model(onnx.load("out.onnx"), full_check=True)
    report = json.loads(Path("report.json").read_text())
    assert report["config"]["weight_bits"] == 4
    assert 2 <= report["optimization"]["steps"] <= 3  # it may end early
    assert report["verification"]["kernels"] == {"Add": 1, "Conv": 3, "Gemm": 1, "GlobalAveragePool": 1}
    assert report["verification"]["outputs"]["logits"] > 5
    for text in ("wrote out.onnx, report.json", "Integer kernels", "SQNR"):
        assert text in result.stdout


@pytest.mark.parametrize("extra", [[], ["--samples", "10"]])
def test_the_commands_to_go_on_with_take_the_same_samples(folder, extra):
    result = good(*FAST, *extra)
    [command] = [text.strip() for text in result.stdout.splitlines() if "--evaluate" in text]
    words = shlex.split(command)
    assert words == [
        *["eptq-onnx", "verify", "model.onnx", "out.onnx", "--data", "data.npz", *extra],
        *["--evaluate", "metric:score"],  # one class is always the largest
    ]
    checked = CliRunner().invoke(app, words[1:-2])
    assert checked.exit_code in (0, 1), checked.output
    assert "Outputs on" in checked.stdout


def test_without_an_output_the_file_lies_beside_the_model_with_its_bits(folder):
    (folder / "models").mkdir()
    Path("model.onnx").rename("models/net.v2.onnx")
    result = invoke("models/net.v2.onnx", "--data", "data.npz", *FAST, "--bits", "w4a8", "--quiet")
    assert result.exit_code == 0, result.output
    assert result.stderr == ""
    assert result.stdout.startswith("models/net.v2.w4a8.onnx: ")
    assert result.stdout.count("\n") == 1
    assert Path("models/net.v2.w4a8.onnx").exists()
    again = invoke("models/net.v2.onnx", "--data", "data.npz", *FAST, "--bits", "w4a8", "--json")
    assert again.exit_code == 0, "its own earlier output is replaced"
    assert json.loads(again.stdout)["config"]["weight_bits"] == 4


def test_without_an_output_no_file_of_another_tool_is_overwritten(folder):
    Path("model.w8a8.onnx").write_bytes(Path("model.onnx").read_bytes())
    result = invoke("model.onnx", "--data", "data.npz", *FAST)
    assert result.exit_code == 2
    assert "model.w8a8.onnx exists, and was not written by eptq-onnx" in result.stderr
    assert Path("model.w8a8.onnx").read_bytes() == Path("model.onnx").read_bytes()


def test_verbose_prints_what_the_passes_log(folder):
    result = good("--verbose", *FAST)
    assert result.exit_code == 0, result.output
    assert "reconstruct: " in result.stderr


def test_what_a_file_of_options_says_of_samples_is_in_the_commands_to_go_on_with(folder):
    for k in range(12):
        Image.new("RGB", (8, 8), (20 * k, 9, 200 - 9 * k)).save(f"{k}.png")
    Path("run.toml").write_text('preset = "fast"\n[data.image]\nfit = "stretch"\nmean = 0\nstd = 255\n')
    result = invoke("model.onnx", "--data", ".", "--config", "run.toml")
    assert result.exit_code == 0, result.output
    [command] = [text.strip() for text in result.stdout.splitlines() if "--evaluate" in text]
    assert "--image fit=stretch,mean=0,std=255 --evaluate" in command


def _spoil(**arrays: Any) -> None:
    np.savez("data.npz", **arrays)


def _weights_with(value: float) -> None:
    model = small_convnet()
    w = onnx.numpy_helper.to_array(model.graph.initializer[0]).copy()
    w[0, 0, 0, 0] = value
    model.graph.initializer[0].CopyFrom(onnx.numpy_helper.from_array(w, model.graph.initializer[0].name))
    onnx.save(model, "model.onnx")


def _nothing() -> None:
    onnx.save(parse("g (float[N,3,8,8] image) => (float[N,3,8,8] y) { y = Relu (image) }"), "model.onnx")


def _quantized() -> None:
    text = "g (uint8[4,8] x) => (uint8[4,4] y) { y = QLinearMatMul (x, s, z, w, s, z, s, z) }"
    constants: dict[str, Any] = {"s": np.float32(0.1), "z": np.uint8(0), "w": np.ones((8, 4), np.uint8)}
    onnx.save(parse(text, constants), "model.onnx")


def _truncated() -> None:
    data = Path("model.onnx").read_bytes()
    Path("model.onnx").write_bytes(data[: len(data) // 2])


CASES = {
    "no model": (lambda: Path("model.onnx").unlink(), [], "model file model.onnx does not exist"),
    "not onnx": (lambda: Path("model.onnx").write_text("not a model at all"), [], "is not an ONNX model"),
    "empty": (lambda: Path("model.onnx").write_bytes(b""), [], "is not an ONNX model"),
    "truncated": (_truncated, [], "model.onnx is not"),
    "no data": (lambda: Path("data.npz").unlink(), [], "data file or folder data.npz does not exist"),
    "other names": (lambda: _spoil(x=images(4), z=images(4)), [], "no array for the model input 'image'"),
    "no recipe": (lambda: None, ["--image", "imagnet"], "'imagnet' is no recipe: give one of imagenet, "),
    "no samples": (lambda: None, ["--samples", "0"], "option samples=0 is wrong"),
    "sheet over data": (
        lambda: None,
        ["--contact-sheet", "data.npz"],
        "would overwrite the calibration data",
    ),
    "wrong shape": (lambda: _spoil(image=normal(4, 3, 7, 8)), [], "has shape (4, 3, 7, 8)"),
    "wrong dtype": (lambda: _spoil(image=images(4).astype(np.float16)), [], "has type float16"),
    "nan data": (
        lambda: _spoil(image=np.full((4, 3, 8, 8), np.nan, np.float32)),
        [],
        "NaN or Inf in sample 0",
    ),
    "nothing to quantize": (_nothing, [], "nothing to quantize"),
    "quantized already": (_quantized, [], "is quantized in a form that is not read"),
    "unknown target": (
        lambda: None,
        ["--target", "toaster"],
        "target 'toaster' is unknown: choose one of auto, openvino, openvino-x64",
    ),
    "unknown engine": (
        lambda: None,
        ["--engine", "steam"],
        "engine 'steam' is unknown: choose one of auto, training, standard",
    ),
    "no target file": (lambda: None, ["--target", "mine.toml"], "target file mine.toml does not exist"),
    "bad target file": (
        lambda: Path("mine.toml").write_text("name = 3"),
        ["--target", "mine.toml"],
        "target file mine.toml: field",
    ),
    "no toml": (lambda: Path("mine.toml").write_text("name ="), ["--target", "mine.toml"], "not valid TOML"),
    "too many bits": (lambda: None, ["--weight-bits", "9"], "option weight_bits=9 is wrong"),
    "negative steps": (lambda: None, ["--steps", "-1"], "option steps=-1 is wrong"),
    "no folder": (lambda: None, ["--report", "nowhere/r.json"], "the folder nowhere does not exist"),
    "a folder": (lambda: Path("here").mkdir(), ["--report", "here"], "here is a folder"),
}


@pytest.mark.parametrize("name", CASES)
def test_bad_input(folder, name):
    prepare, arguments, message = CASES[name]
    prepare()
    result = good(*FAST, *arguments)
    assert result.exit_code == 2, result.output
    assert message in result.stderr
    assert "Traceback" not in result.output
    assert result.stderr.count("\n") == 1
    assert not Path("out.onnx").exists()
    assert not list(folder.glob(".*"))


def test_a_weight_that_is_no_number_is_told_by_the_output_that_it_spoils(folder):
    _weights_with(np.nan)
    result = good(*FAST)
    assert result.exit_code == 2
    assert "output 'logits' has NaN" in result.stderr
    assert not Path("out.onnx").exists()


def test_unknown_option_and_unwritable_output(folder):
    result = good("--colour", "red")
    assert result.exit_code == 2
    assert "No such option" in result.stderr
    result = invoke("model.onnx", "--data", "data.npz", "-o", "nowhere/out.onnx")
    assert result.exit_code == 2
    assert "the folder nowhere does not exist" in result.stderr


def test_an_existing_output_survives_a_failure(folder):
    Path("out.onnx").write_text("precious")
    _spoil(x=images(4), z=images(4))
    assert good().exit_code == 2
    assert Path("out.onnx").read_text() == "precious"


def test_weights_alone_need_no_data(tmp_path):
    path, output = tmp_path / "model.onnx", tmp_path / "model.w4a32.onnx"
    onnx.save(
        parse("g (float[N,64] x) => (float[N,96] y) { y = MatMul (x, w) }", {"w": normal(64, 96)}), path
    )
    arguments = ["quantize", str(path), "--bits", "w4a32", "--edge-bits", "4", "--block", "32"]
    done = CliRunner().invoke(app, arguments)
    assert done.exit_code == 0, done.output
    assert output.stat().st_size < path.stat().st_size / 3
    assert "MatMulNBits" in done.stdout
    told = done.stdout + done.stderr
    assert "samples.npz" in told
    assert " object at " not in told, "the command to go on with can be copied"
    refused = CliRunner().invoke(app, ["quantize", str(path), "-o", str(tmp_path / "x.onnx")])
    assert refused.exit_code == 2
    assert "need samples: give some with --data" in refused.stderr
