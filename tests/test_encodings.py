"""Encodings in and out."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import onnx
import pytest
from graphs import images, normal, parse, silent, small_convnet
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from onnx import numpy_helper
from typer.testing import CliRunner

import eptq_onnx
from eptq_onnx import Config, ConfigError
from eptq_onnx.cli import app

OPTIONS: dict[str, Any] = {"preset": "fast", "target": "ort-x64", "measure_speed": False}


def quantized(**options):
    return eptq_onnx.quantize(
        small_convnet(), {"image": images(24)}, Config(**{**OPTIONS, **options}), progress=silent
    )


def document(*items: dict[str, Any], **more: Any) -> dict[str, Any]:
    return {"version": "1.0.0", "activation_encodings": list(items), "param_encodings": [], **more}


def encoding(name: str, scale: float, offset: int, **more: Any) -> dict[str, Any]:
    return {"name": name, "enc_type": "PER_TENSOR", "dtype": "INT", "bw": 8, "is_sym": False,
            "scale": [scale], "offset": [offset], **more}  # fmt: skip


def scales(model: onnx.ModelProto) -> dict[str, tuple[float, int]]:
    """Scale and zero point of each quantized tensor."""
    constants = {t.name: numpy_helper.to_array(t) for t in model.graph.initializer}
    return {
        n.input[0].removesuffix("_float"): (float(constants[n.input[1]]), int(constants[n.input[2]]))
        for n in model.graph.node
        if n.op_type == "QuantizeLinear"
    }


@settings(max_examples=6, phases=[Phase.explicit, Phase.reuse, Phase.generate])
@given(st.floats(0.01, 0.2), st.integers(-255, 0))
def test_a_range_that_is_given_is_that_of_the_file(scale, offset):
    # A range that spoils the outputs would leave the tensor float.
    given_range = document(encoding("image", scale, offset))
    found, zero = scales(quantized(encodings=given_range, max_noise=0).model)["image"]
    assert found == pytest.approx(scale, rel=1e-5)
    assert zero == -offset


def test_limits_of_an_absorbed_function_count_more():
    given_range = document(encoding("a2", 0.05, -128))
    scale, zero = scales(quantized(encodings=given_range).model)["a2"]
    assert zero == 0
    assert scale == pytest.approx(0.05 * 127 / 255, rel=1e-5)


def test_what_is_written_is_read_again():
    first = quantized(rotate=False, equalize=False)
    second = quantized(
        encodings=dict(first.encodings), start="nearest", activation_range="minmax", max_noise=0
    )
    ours, theirs = scales(second.model), scales(first.model)
    assert {n: z for n, (_, z) in ours.items()} == {n: z for n, (_, z) in theirs.items()}
    assert {n: s for n, (s, _) in ours.items()} == pytest.approx(
        {n: s for n, (s, _) in theirs.items()}, rel=1e-5
    )
    assert any("4 weights are not taken" in n for n in second.report.notes)
    by_name = {e["name"]: e for e in first.encodings["param_encodings"]}
    assert by_name["w1_bn"]["enc_type"] == "PER_CHANNEL"
    assert len(by_name["w1_bn"]["scale"]) == len(by_name["w1_bn"]["offset"]) == 8
    json.dumps(first.encodings, allow_nan=False)


@pytest.mark.parametrize("bits", [(8, 8), (4, 8), (3, 4)])
def test_values_of_the_file_are_those_of_the_encodings(bits):
    first = quantized(weight_bits=bits[0], edge_bits=bits[0], activation_bits=bits[1], storage="int8")
    constants = {t.name: numpy_helper.to_array(t) for t in first.model.graph.initializer}
    for item in first.encodings["param_encodings"]:
        stored = constants[f"{item['name']}_quantized"].astype(np.int64)
        assert item["bw"] in (bits[0], 7)
        # What is stored has the zero point folded in: u + offset.
        shape = (-1, *(1,) * (stored.ndim - 1))
        values = stored - np.reshape(item["offset"], shape)
        assert values.min() >= 0
        assert values.max() < 2 ** item["bw"]


def test_tensors_that_are_not_quantized_are_told():
    found = quantized(encodings=document(encoding("nowhere", 0.1, -128)))
    assert any(
        "1 of 1 tensors in the encodings are not quantized here: nowhere" in n for n in found.report.notes
    )


@pytest.mark.parametrize(("given_", "message"), [
    ("missing.json", "the file cannot be read"),
    ({"version": "0.6.1", "activation_encodings": {}}, "schema 1.0"),
    ([1], "encodings"),
    (document({"name": "x"}), "an encoding needs name, bw, one scale and one offset"),
    (document(encoding("x", 0.1, 3)), "no range of integers that holds zero"),
    (document(encoding("x", 0.1, 0, dtype="OTHER")), "no range of integers"),
    (document({**encoding("x", 0.1, 0), "scale": [0.1, 0.2]}), "one scale"),
])  # fmt: skip
def test_what_is_no_encoding_is_told(given_, message):
    with pytest.raises(ConfigError, match=message):
        Config(encodings=given_)


def test_the_command_writes_and_reads_them(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    onnx.save(small_convnet(), "m.onnx")
    np.savez("data.npz", image=images(24))
    command = ["quantize", "m.onnx", "--data", "data.npz", "--preset", "fast", "--target", "ort-x64", "--json",
               "--no-rotate", "--no-equalize", "-o", "q.onnx"]  # fmt: skip
    result = CliRunner().invoke(app, [*command, "--export-encodings", "e.json"])
    assert result.exit_code == 0, result.stderr
    again = CliRunner().invoke(app, [*command, "--encodings", "e.json", "--report", "r.json"])
    assert again.exit_code == 0, again.stderr
    assert json.loads(again.stdout)["config"]["encodings"]["file"] == "e.json"
    first = onnx.load("q.onnx").SerializeToString()
    # A report holds the ranges: the file is not needed again.
    (tmp_path / "e.json").unlink()
    reported = ["quantize", "m.onnx", "--data", "data.npz", "--config", "r.json", "-o", "q.onnx", "--json"]
    assert CliRunner().invoke(app, reported).exit_code == 0
    assert onnx.load("q.onnx").SerializeToString() == first


def test_what_aimet_writes_is_read():
    # aimet-onnx 2.42 writes offsets as floats, a fraction of them apart, and float16 without a scale.
    found = Config(encodings=document(
        encoding("a", 0.5, 0) | {"offset": [-128.0], "is_sym": True},
        encoding("b", 0.5, 0) | {"offset": [-10.0], "zero_point_shift": [0.5]},
        {"name": "c", "dtype": "FLOAT", "bw": 16, "enc_type": "PER_TENSOR"},
        producer={"package": "aimet-onnx", "version": "2.42.0"}, quantizer_args={"activation_bitwidth": 8},
    )).encodings  # fmt: skip
    assert found is not None
    assert found.ranges == {"a": (-64.0, 63.5), "b": (-4.75, 122.75)}


@pytest.mark.parametrize("turned", [False, True])
def test_blocks_are_listed_output_by_output(turned):
    weight = np.arange(1, 65 * 24 + 1, dtype=np.float32)[: 64 * 24].reshape(64, 24)
    text = "y = Gemm <transB = 1> (x, w)" if turned else "y = MatMul (x, w)"
    model = parse(f"g (float[N,64] x) => (float[N,24] y) {{ {text} }}", {"w": weight.T if turned else weight})
    config = Config(
        bits="w4a32",
        block=16,
        start="nearest",
        target="ort-x64",
        storage="packed",
        edge_bits=4,
        preset="fast",
    )
    found = eptq_onnx.quantize(model, {"x": normal(16, 64)}, config, progress=silent)
    [item] = found.encodings["param_encodings"]
    assert (item["enc_type"], item["block_size"], len(item["scale"])) == ("PER_BLOCK", 16, 24 * 4)
    # All values grow along the terms: so do the scales of the blocks of each output.
    scale = np.reshape(item["scale"], (24, 4))
    assert (np.diff(scale, axis=1) > 0).all()
    assert (np.abs(np.diff(scale, axis=0)) < 0.2 * scale[:-1]).all()
