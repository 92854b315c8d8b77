"""``compare``: outputs, the layer where two models part, and the worst samples."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import onnx
import pytest
from graphs import images, normal, parse, silent, small_convnet
from onnx import numpy_helper
from typer.testing import CliRunner

import eptq_onnx
from eptq_onnx import Config
from eptq_onnx.cli import app

pytestmark = pytest.mark.once


@pytest.fixture(scope="module")
def quantized() -> onnx.ModelProto:
    config = Config(preset="fast", target="ort-x64", measure_speed=False)
    return eptq_onnx.quantize(small_convnet(), {"image": images()}, config, progress=silent).model


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, quantized: onnx.ModelProto) -> Path:
    monkeypatch.chdir(tmp_path)
    onnx.save(small_convnet(), "f.onnx")
    onnx.save(quantized, "q.onnx")
    np.savez("data.npz", image=images(8, seed=9))
    return tmp_path


def invoke(*arguments: str):
    return CliRunner().invoke(app, ["compare", *arguments], env={"COLUMNS": "200"})


def changed(name: str, factor: float) -> onnx.ModelProto:
    """The float model with one weight changed."""
    model = small_convnet()
    tensor = next(t for t in model.graph.initializer if t.name == name)
    tensor.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(tensor) * np.float32(factor), name))
    return model


def test_a_model_does_not_differ_from_itself(folder):
    found = eptq_onnx.compare("f.onnx", "f.onnx", "data.npz")
    assert found.parting is None
    assert found.worst == ()
    output = found.outputs["logits"]
    assert output.cosine == pytest.approx(1)
    assert output.largest_difference == 0
    assert output.agreement in (None, 1)


def test_the_quantized_model_is_compared_layer_by_layer(folder):
    result = invoke("f.onnx", "q.onnx", "--data", "data.npz", "--json")
    assert result.exit_code == 0, result.output
    found = json.loads(result.stdout)
    assert found["samples"] == 8
    output = found["outputs"]["logits"]
    assert output["statistics"]["sqnr_db"] > 10
    assert 0.9 < output["cosine"] <= 1
    assert [n["tensor"] for n in found["layers"]][-1] == "logits"
    assert all(n["own_db"] > 15 for n in found["layers"])
    assert len(found["worst"]) == 5
    ratios = [sample["sqnr_db"] for sample in found["worst"]]
    assert ratios == sorted(ratios)


def test_the_layer_that_was_spoiled_is_where_they_part_and_has_all_the_noise_of_its_own(folder):
    onnx.save(changed("w3", 1.5), "q.onnx")
    found = eptq_onnx.compare("f.onnx", "q.onnx", "data.npz")
    place = found.parting
    assert place is not None
    assert (place.tensor, place.operator) == ("c3", "Conv")
    assert place.own_db == pytest.approx(place.accumulated_db)
    behind = {n.tensor: n for n in found.layers}["s"]
    assert behind.own_db > 100
    assert behind.accumulated_db < 40


def test_channels_in_other_scales_are_no_difference(folder):
    model = parse(
        "g (float[N,4] x) => (float[N,2] y) { a = MatMul (x, w1)  b = Relu (a)  y = MatMul (b, w2) }",
        {"w1": normal(4, 6, seed=1), "w2": normal(6, 2, seed=2)},
    )
    factors = np.geomspace(0.1, 10, 6).astype(np.float32)
    other = parse(
        "g (float[N,4] x) => (float[N,2] y) { a = MatMul (x, w1)  b = Relu (a)  y = MatMul (b, w2) }",
        {"w1": normal(4, 6, seed=1) * factors, "w2": normal(6, 2, seed=2) / factors[:, None]},
    )
    onnx.save(model, "f.onnx")
    onnx.save(other, "q.onnx")
    found = eptq_onnx.compare("f.onnx", "q.onnx", {"x": normal(8, 4, seed=3)})
    assert found.parting is None
    assert [n.scaled for n in found.layers] == [True, True, False]
    assert min(n.own_db for n in found.layers) > 100


def test_mixed_channels_are_left_out_and_named(folder):
    turn = np.linalg.qr(np.random.default_rng(5).normal(size=(6, 6)))[0].astype(np.float32)
    text = "g (float[N,4] x) => (float[N,2] y) { a = MatMul (x, w1)  y = MatMul (a, w2) }"
    w1, w2 = normal(4, 6, seed=1), normal(6, 2, seed=2)
    onnx.save(parse(text, {"w1": w1, "w2": w2}), "f.onnx")
    onnx.save(parse(text, {"w1": w1 @ turn, "w2": turn.T @ w2}), "q.onnx")
    found = eptq_onnx.compare("f.onnx", "q.onnx", {"x": normal(8, 4, seed=3)})
    assert [n.tensor for n in found.layers] == ["y"]
    assert found.parting is None
    assert any("mixed channels" in note and note.endswith(": a") for note in found.notes)


def test_the_worst_samples_are_named_by_their_files(folder):
    from PIL import Image

    (folder / "photos").mkdir()
    for k in range(4):
        Image.fromarray(np.full((8, 8, 3), 40 + 60 * (k == 2) + k, np.uint8)).save(
            folder / "photos" / f"{k}.png"
        )
    onnx.save(changed("w1", 1.1), "q.onnx")
    found = eptq_onnx.compare("f.onnx", "q.onnx", eptq_onnx.Data("photos", image="unit"))
    assert {s.name for s in found.worst} == {f"{k}.png" for k in range(4)}


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (["missing.onnx", "q.onnx", "--data", "data.npz"], "missing.onnx does not exist"),
        (["f.onnx", "q.onnx", "--data", "missing.npz"], "missing.npz does not exist"),
        (["f.onnx", "other.onnx", "--data", "data.npz"], "give two models with the same inputs"),
        (["f.onnx", "renamed.onnx", "--data", "data.npz"], "give two versions of one model"),
        (["drawing.onnx", "drawing.onnx", "--data", "data.npz"], "draws random numbers"),
    ],
)
def test_what_is_wrong_is_one_sentence_and_exit_code_2(folder, arguments, text):
    onnx.save(parse("g (float[N,4] x) => (float[N,4] y) { y = Relu (x) }"), "other.onnx")
    onnx.save(parse("g (float[N,3,8,8] image) => (float[N,3,8,8] y) { y = Relu (image) }"), "renamed.onnx")
    onnx.save(
        parse(
            "g (float[N,3,8,8] image) => (float[N,3,8,8] y) { r = RandomUniformLike (image)  y = Add (image, r) }"
        ),
        "drawing.onnx",
    )
    result = invoke(*arguments)
    assert result.exit_code == 2
    assert text in result.stderr
    assert len(result.stderr.strip().splitlines()) == 1


def test_the_tables_name_the_place_and_one_line_is_enough_for_the_quiet(folder):
    onnx.save(changed("w3", 1.5), "q.onnx")
    text = invoke("f.onnx", "q.onnx", "--data", "data.npz").stdout
    assert "they part at c3 (Conv" in text
    assert "Samples that differ most" in text
    assert invoke("f.onnx", "q.onnx", "--data", "data.npz", "--quiet").stdout.count("\n") == 1
