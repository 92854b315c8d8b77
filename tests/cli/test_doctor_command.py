"""The command ``doctor``."""

from __future__ import annotations

import json

import pytest
from typer.testing import CliRunner

from eptq_onnx import InstallError, engines, installation, runtime, targets
from eptq_onnx.cli import app
from eptq_onnx.targets import machine


def invoke(*arguments: str):
    return CliRunner().invoke(app, ["doctor", *arguments], env={"COLUMNS": "200"})


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(installation, "_problems", lambda: ())


def test_this_installation_works_and_the_document_says_what_is_used():
    result = invoke("--json")
    assert result.exit_code == 0, result.output
    found = json.loads(result.stdout)
    assert found["problems"] == []
    assert found["engine"] == engines.choose(engines.AUTO).name
    assert found["target"] == targets.load(targets.AUTO).name
    assert found["onnxruntime"] == runtime.installed_distributions()
    assert found["workers"] >= 1
    assert found["runtimes"]["onnxruntime"] == ""


def test_extras_are_those_of_the_package_with_what_installs_the_missing_ones(quick, monkeypatch):
    required = [
        "numpy>=1",
        "pillow>=10.1; extra == 'images'",
        'nothing-like-it>=1; extra == "audio"',
        "x; extra == 'test'",
    ]
    monkeypatch.setattr("importlib.metadata.requires", lambda name: required)
    text = invoke().stdout
    assert "extra images" in text
    assert 'not installed: pip install "eptq-onnx[audio]"' in text
    assert "extra test" not in text


def test_instructions_are_those_that_linux_lists(quick, monkeypatch):
    monkeypatch.setattr(machine, "cpuinfo", lambda: "model name : Chip 7\nflags : fpu avx2 avx512f\n")
    monkeypatch.setattr("platform.machine", lambda: "x86_64")
    found = json.loads(invoke("--json").stdout)
    assert found["processor"] == "Chip 7"
    assert found["features"] == {"AVX2": True, "AVX-512": True, "VNNI": False, "AMX": False}


def test_an_installation_that_cannot_quantize_fails_with_the_reason(monkeypatch):
    def missing() -> None:
        raise InstallError("onnxruntime is not installed: install it.")

    monkeypatch.setattr(installation, "load", missing)
    result = invoke("--quiet")
    assert result.exit_code == 1
    assert result.stdout.strip() == "cannot quantize: onnxruntime is not installed: install it."
