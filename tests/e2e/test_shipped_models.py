"""The main job on the models that the project ships, scored on data that calibration has not seen."""

from __future__ import annotations

import sys
from typing import Any

import onnx
import pytest
from conftest import MODELS

import eptq_onnx
from eptq_onnx import Config
from eptq_onnx.graph import io

sys.path.insert(0, str(MODELS))
import score

NAMES = sorted(score.MODELS)


def quantize(name: str, **options):
    data = MODELS / f"{score.MODELS[name].data}_calib.npz"
    return eptq_onnx.quantize(MODELS / f"{name}.onnx", data, Config(**options))


def test_every_shipped_model_is_scored():
    assert sorted(p.stem for p in MODELS.glob("*.onnx")) == NAMES
    assert sum(p.stat().st_size for p in MODELS.iterdir() if p.is_file()) < 5e6


@pytest.mark.parametrize("name", NAMES)
def test_eight_bits_lose_almost_nothing(name, tmp_path):
    result = quantize(name, steps=30, score_samples=96, batch_size=8)
    result.save(tmp_path / "q.onnx")
    floating, integer = (
        score.evaluate(name, MODELS / f"{name}.onnx"),
        score.evaluate(name, tmp_path / "q.onnx"),
    )
    assert floating > 0.9
    assert integer > floating - 0.01
    verification = result.report.verification
    assert verification.kernels == verification.planned
    assert verification.planned["Conv"] >= 6
    assert not result.report.notes


@pytest.mark.parametrize("name", ["digits_resnet", "digits_mobile"])
def test_optimized_rounding_beats_nearest_at_low_bits(name, tmp_path):
    """Same ranges, first and last layers 8 bits; only the rounding differs."""
    low = {"weight_bits": 2, "activation_bits": 4}
    methods: dict[str, dict[str, Any]] = {
        "nearest": {"start": "nearest", "steps": 0},
        "network-wise": {"start": "nearest", "steps": 150},
        "default": {"steps": 150},
    }
    scores = {}
    for method, options in methods.items():
        result = quantize(name, **options, **low)
        result.save(tmp_path / "q.onnx")
        scores[method] = score.evaluate(name, tmp_path / "q.onnx")
        assert result.report.verification.kernels == result.report.verification.planned
    assert scores["network-wise"] > scores["nearest"]
    assert scores["default"] > scores["nearest"]
    assert scores["default"] > 0.9


def test_the_same_command_twice_gives_the_same_bytes():
    options = {"steps": 6, "weight_bits": 4, "activation_bits": 4, "score_samples": 64}
    first, second = quantize("digits_mobile", **options), quantize("digits_mobile", **options)
    assert first.model.SerializeToString(deterministic=True) == second.model.SerializeToString(
        deterministic=True
    )
    other = quantize("digits_mobile", seed=1, **options)
    assert other.model.SerializeToString(deterministic=True) != first.model.SerializeToString(
        deterministic=True
    )


def test_files_above_the_protobuf_limit_get_external_data(tmp_path, monkeypatch):
    """The limit is lowered: the files are the same but for their size."""
    result = quantize("digits_resnet", preset="fast")
    monkeypatch.setattr(io, "PROTOBUF_LIMIT", 10_000)
    result.save(tmp_path / "q.onnx")
    assert (tmp_path / "q.onnx.data").exists()
    assert onnx.load(tmp_path / "q.onnx").graph.node == result.model.graph.node
    assert score.evaluate("digits_resnet", tmp_path / "q.onnx") > 0.95
    assert sorted(p.name for p in tmp_path.iterdir()) == ["q.onnx", "q.onnx.data"]


def test_sixteen_bit_activations_are_closer_to_float_than_eight():
    eight, sixteen = (quantize("digits_resnet", preset="fast", activation_bits=bits) for bits in (8, 16))
    types = {t.data_type for t in sixteen.model.graph.initializer}
    assert onnx.TensorProto.UINT16 in types
    assert sixteen.report.opset == 21
    assert sixteen.report.verification.outputs["logits"] > eight.report.verification.outputs["logits"] + 2
