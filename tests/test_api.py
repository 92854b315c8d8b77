from __future__ import annotations

import onnx
import pytest
from graphs import images, small_convnet

import eptq_onnx
from eptq_onnx import Config, ConfigError, EptqError, errors


def test_public_names_are_pinned():
    assert sorted(eptq_onnx.__all__) == [
        "Config", "ConfigError", "DataError", "EptqError", "GradientError", "InstallError", "ModelError", "OutputError",
        "Report", "Result", "__version__", "quantize",
    ]  # fmt: skip
    assert all(hasattr(eptq_onnx, name) for name in eptq_onnx.__all__)


def test_every_error_has_the_one_base():
    raised = [e for e in vars(errors).values() if isinstance(e, type) and issubclass(e, Exception)]
    assert len(raised) > 5
    assert all(issubclass(e, EptqError) for e in raised)


def test_path_bytes_and_proto_give_the_same(tmp_path):
    model = small_convnet()
    onnx.save(model, tmp_path / "m.onnx")
    before = model.SerializeToString(deterministic=True)
    config = Config(preset="fast")
    results = [eptq_onnx.quantize(m, images(8), config).model for m in (tmp_path / "m.onnx", model.SerializeToString(), model)]
    assert len({r.SerializeToString(deterministic=True) for r in results}) == 1
    assert model.SerializeToString(deterministic=True) == before


def test_save_is_atomic(tmp_path, monkeypatch):
    result = eptq_onnx.quantize(small_convnet(), images(8), Config(preset="fast"))
    result.save(tmp_path / "a.onnx")
    kept = (tmp_path / "a.onnx").read_bytes()

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.replace", full)
    with pytest.raises(eptq_onnx.OutputError, match="No space left"):
        result.save(tmp_path / "a.onnx")
    assert (tmp_path / "a.onnx").read_bytes() == kept
    assert [p.name for p in tmp_path.iterdir()] == ["a.onnx"]


def test_config_is_frozen_and_strict():
    with pytest.raises(ConfigError, match="option colour is unknown"):
        Config(colour=3)
    with pytest.raises(ConfigError, match="option weight_bits=1 is wrong: input should be"):
        Config(weight_bits=1)
    assert not Config(preset="fast").optimizes
    assert not Config(preset="fast").needs_gradients
    assert Config(preset="fast", steps=5).needs_gradients


def test_small_models_get_more_steps():
    config = Config()
    assert [config.step_count(n) for n in (1e6, 8e7, 1.6e8, 4e8, 1e12)] == [1000, 1000, 500, 200, 200]
    assert Config(preset="best").step_count(0) == 5000
    assert Config(steps=7).step_count(0) == Config(steps=7).step_count(1e12) == 7
    assert Config(preset="fast").step_count(0) == 0
