from __future__ import annotations

import logging
import os
import subprocess
import sys
from typing import Any

import onnx
import pytest
from graphs import images, small_convnet

import eptq_onnx
from eptq_onnx import Config, ConfigError, EptqError, errors, targets


def test_public_names_are_pinned():
    assert sorted(eptq_onnx.__all__) == [
        "Accuracy", "ActivationRange", "Attention", "Bench", "Budget", "BudgetUnit", "CapabilityError", "Compared", "Config",
        "ConfigError", "Data", "DataError", "EptqError", "Finding", "FloatType", "Gate", "GradientError", "Inspection",
        "InstallError", "Lint", "ModelError", "Objective", "Optimizer", "OutputError", "Placed", "Preset", "Progress", "Report",
        "Result", "RoundingVariable", "Runnable", "Sample", "Sensitivity", "Severity", "Start", "Trail", "Verified", "WeightRange", "WeightStorage",
        "__version__", "bench", "compare", "inspect", "lint", "quantize", "samples", "sensitivity", "verify",
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
    results = [
        eptq_onnx.quantize(m, images(8), config).model
        for m in (tmp_path / "m.onnx", model.SerializeToString(), model)
    ]
    assert len({r.SerializeToString(deterministic=True) for r in results}) == 1
    assert model.SerializeToString(deterministic=True) == before


def test_save_is_atomic(tmp_path, monkeypatch):
    result = eptq_onnx.quantize(small_convnet(), images(8), Config(preset="fast"))
    result.save(tmp_path / "a.onnx")
    kept = (tmp_path / "a.onnx").read_bytes()

    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.replace", full)
    with pytest.raises(eptq_onnx.OutputError, match="No space left"):
        result.save(tmp_path / "a.onnx")
    assert (tmp_path / "a.onnx").read_bytes() == kept
    assert [p.name for p in tmp_path.iterdir()] == ["a.onnx"]


def test_config_is_frozen_and_strict():
    with pytest.raises(ConfigError, match="option colour is unknown"):
        Config(colour=3)  # type: ignore[call-arg]
    with pytest.raises(ConfigError, match="option weight_bits=1 is wrong: give a whole number from 2 to 8"):
        Config(weight_bits=1)
    assert not Config(preset="fast").optimizes
    assert not Config(preset="fast").needs_gradients
    assert Config(preset="fast", steps=5).needs_gradients


def test_steps_replace_the_preset():
    assert Config().optimizes
    assert not Config(steps=0).optimizes


def signs(model):
    return {p.key: p.value for p in model.metadata_props}


def test_the_written_model_says_what_made_it():
    model = small_convnet()
    model.metadata_props.add(key="author", value="me")
    model.metadata_props.add(key="eptq_onnx.version", value="0")
    made = eptq_onnx.quantize(model, images(8), Config(preset="fast")).model
    assert (made.producer_name, made.producer_version) == ("eptq-onnx", eptq_onnx.__version__)
    assert signs(made) | {"eptq_onnx.options": ""} == {
        "author": "me", "eptq_onnx.version": eptq_onnx.__version__, "eptq_onnx.target": "ort-x64", "eptq_onnx.options": "",
    }  # fmt: skip


def test_options_that_change_nothing_written_do_not_count():
    target = targets.load("ort-x64")
    plain = Config().digest(target)
    assert len(plain) == 16
    assert Config(measure_speed=False, custom_ops=["a.so"]).digest(target) == plain
    others = [
        Config(seed=1),
        Config(weight_bits=4),
        Config(budget="weights=4"),
        Config(batch_axes={"x": 0}),
        Config(rotate=False),
    ]
    assert (
        len({plain, *(c.digest(target) for c in others), Config().digest(targets.load("ort-x64-vnni"))}) == 7
    )


def test_the_hash_of_options_is_the_same_in_every_process():
    code = "from eptq_onnx import Config, targets; print(Config().digest(targets.load('ort-x64')))"
    environments = [{**os.environ, "PYTHONHASHSEED": seed} for seed in ("1", "2", "3")]
    found = {
        subprocess.run([sys.executable, "-c", code], env=e, capture_output=True, check=True).stdout
        for e in environments
    }
    assert len(found) == 1


def test_every_pass_is_logged(caplog):
    with caplog.at_level(logging.INFO, "eptq_onnx"):
        result = eptq_onnx.quantize(small_convnet(), images(8), Config(preset="fast"))
    names = [record.getMessage().partition(":")[0] for record in caplog.records if record.name == "eptq_onnx"]
    assert names == [name for name in result.report.seconds if name in names]
    assert {"calibrate", "reconstruct", "write", "verify"} <= set(names)
