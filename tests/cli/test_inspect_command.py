"""``inspect``: what it finds out without data, by the function and by the command."""

from __future__ import annotations

import json
import shlex
from pathlib import Path

import numpy as np
import onnx
import pytest
from conftest import MODELS
from graphs import images, normal, parse, small_convnet
from typer.testing import CliRunner

import eptq_onnx
from eptq_onnx import Config
from eptq_onnx.cli import app


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    onnx.save(small_convnet(), "model.onnx")
    return tmp_path


def invoke(*arguments: str):
    return CliRunner().invoke(app, ["inspect", *arguments], env={"COLUMNS": "200"})


def test_the_document_says_what_the_model_takes_and_what_becomes_of_it(folder):
    result = invoke("model.onnx", "--json")
    assert result.exit_code == 0, result.output
    found = json.loads(result.stdout)
    assert found["inputs"] == [{"name": "image", "type": "float32", "shape": "(N, 3, 8, 8)"}]
    assert found["outputs"] == [{"name": "logits", "type": "float32", "shape": "(N, 5)"}]
    assert found["nodes"]["Conv"] == 3
    assert {o["operator"]: o["integer"] for o in found["operators"]}["Conv"] == 3
    weights = 8 * 27 + 8 * 9 + 64
    assert found["multiply_adds"] == weights * 64 + 40
    assert found["samples"] == 250
    # Next to 8-bit weights, nothing is optimized.
    assert found["estimate"]["steps"] == 0
    assert json.loads(invoke("model.onnx", "--json", "--weight-bits", "4").stdout)["estimate"]["steps"] > 0
    assert found["memory_bytes"] > 2**20
    assert set(found["sizes"]) == {"W8A8", "W4A8"}


def test_the_command_to_run_next_runs(folder):
    np.savez("samples.npz", image=images(8))
    command = invoke(
        "model.onnx", "--quiet", "--preset", "fast", "--exclude", "op:Gemm", "--target", "ort-x64"
    ).stdout
    words = shlex.split(command)
    assert words[:4] == ["eptq-onnx", "quantize", "model.onnx", "--data"]
    assert words[-6:] == ["--exclude", "op:Gemm", "--preset", "fast", "--target", "ort-x64"]
    words[words.index("photos")] = "samples.npz"
    result = CliRunner().invoke(app, words[1:])
    assert result.exit_code == 0, result.output
    assert Path("model.w8a8.onnx").exists()


def test_nodes_that_stay_float_are_named_with_the_reason(folder):
    onnx.save(
        parse(
            "g (float[N,4] x) => (float[N,4] y) { a = MatMul (x, w)  b = Erf (a)  y = MatMul (b, w) }",
            {"w": normal(4, 4)},
        ),
        "model.onnx",
    )
    text = invoke("model.onnx", "--target", "portable").stdout
    assert "why it stays float" in text
    assert "Erf" in text


def test_nodes_that_compute_shapes_are_no_riddle(folder):
    text = (
        "g (float[N,4] x) => (float[N,4] y) { a = MatMul (x, w)  s = Shape (x)  r = Reshape (a, s)"
        "  y = MatMul (r, w) }"
    )
    onnx.save(parse(text, {"w": normal(4, 4)}), "model.onnx")
    assert ", 1 compute no floats (shapes, indices)" in " ".join(invoke("model.onnx").stdout.split())


@pytest.mark.parametrize("length", [5, 22, 90])
def test_long_names_are_whole_at_any_width(folder, length):
    name = "n" * (length - 4) + "/end"
    model = parse(
        "g (float[N,4] x) => (float[N,4] y) { a = MatMul (x, w)  b = Erf (a)  y = MatMul (b, w) }",
        {"w": normal(4, 4)},
    )
    model.graph.node[1].name = name
    onnx.save(model, "model.onnx")
    for columns in ("60", "80", "200"):
        for option in ((), ("--verbose",)):
            arguments = ["inspect", "model.onnx", *option]
            text = CliRunner().invoke(app, arguments, env={"COLUMNS": columns}).stdout
            assert any(name in line for line in text.splitlines())


EXAMPLES = {
    "photos": ("float[N,3,32,32] x", "float32", ["--data", "photos", "--image"]),
    "a metadata-free nhwc": ("float[N,32,32,3] x", "float32", ["--data", "photos", "--image"]),
    "sounds": ("float[N,16000] x", "float32", ["--data", "recordings", "--audio"]),
    "tabular": ("float[N,12] x", "float32", ["--data", "samples.npz"]),
    "features": ("float[N,80,100] x", "float32", ["--data", "samples.npz"]),
}


@pytest.mark.parametrize("name", EXAMPLES)
def test_data_is_what_the_inputs_look_like(folder, name):
    declared, _, arguments = EXAMPLES[name]
    sizes = [int(n) for n in declared.split("[")[1].split("]")[0].split(",")[1:]]
    model = parse(
        f"g ({declared}) => (float[N,2] y) {{ f = Flatten (x)  y = Gemm (f, w) }}",
        {"w": normal(int(np.prod(sizes)), 2)},
    )
    onnx.save(model, "model.onnx")
    found = eptq_onnx.inspect("model.onnx")
    assert list(found.data.arguments[: len(arguments)]) == arguments


def test_text_is_for_models_whose_inputs_a_tokenizer_fills(folder):
    model = parse(
        "g (int64[N,S] input_ids, int64[N,S] attention_mask) => (float[N,4] y)"
        "{ e = Gather (table, input_ids)  m = Cast <to = 1> (attention_mask)  u = Unsqueeze (m, two)"
        "  k = Mul (e, u)  p = ReduceMean <axes = [1], keepdims = 0> (k)  y = MatMul (p, w) }",
        {"table": normal(50, 8), "w": normal(8, 4), "two": np.array([2])},
    )
    onnx.save(model, "model.onnx")
    found = eptq_onnx.inspect("model.onnx", tokenizer="own.json")
    assert found.data.arguments == ("--data", "texts.txt", "--tokenizer", "own.json")
    assert found.estimate is not None


def test_a_model_that_made_up_samples_do_not_suit_is_planned_all_the_same(folder):
    text = (
        "g (float[N,4] x, string[N] t) => (float[N,4] y, string[N] u) { y = MatMul (x, w)  u = Identity (t) }"
    )
    onnx.save(parse(text, {"w": normal(4, 4)}), "model.onnx")
    found = eptq_onnx.inspect("model.onnx")
    assert found.estimate is None
    assert "does not run on made-up samples" in found.unavailable[0]
    assert {o.operator: o.integer for o in found.operators} == {"MatMul": 1, "Identity": 0}


@pytest.mark.parametrize("bits", [8, 4])
def test_the_expected_size_is_about_that_of_the_file(tmp_path, bits):
    model = MODELS / "digits_resnet.onnx"
    config = Config(preset="fast", weight_bits=bits, objective="integers", measure_speed=False)
    foreseen = eptq_onnx.inspect(model, config).sizes[f"W{bits}A8"]
    data = np.load(MODELS / "digits_calib.npz")["image"][:16]
    eptq_onnx.quantize(model, data, config).save(tmp_path / "out.onnx")
    assert foreseen == pytest.approx((tmp_path / "out.onnx").stat().st_size, rel=0.15)


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (["missing.onnx"], "missing.onnx does not exist"),
        (["model.onnx", "--target", "toaster"], "target 'toaster' is unknown"),
        (["model.onnx", "--weight-bits", "9"], "option weight_bits=9 is wrong"),
    ],
)
def test_what_is_wrong_is_one_sentence_and_exit_code_2(folder, arguments, text):
    result = invoke(*arguments)
    assert result.exit_code == 2
    assert text in result.stderr
    assert len(result.stderr.strip().splitlines()) == 1
