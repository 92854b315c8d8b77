from __future__ import annotations

import pytest
from graphs import images, silent, small_convnet

import eptq_onnx
from eptq_onnx import Config, targets
from eptq_onnx.targets import machine

FLAGS = "flags\t\t: fpu sse4_2 avx2 {}\n"


@pytest.mark.parametrize("flag", ["avx512_vnni", "avx_vnni", "avx512f avx512_vnni amx_int8"])
def test_vnni_is_found_among_the_features_that_linux_lists(this_machine, monkeypatch, tmp_path, flag):
    monkeypatch.setattr("sys.platform", "linux")
    monkeypatch.setattr(machine, "_CPUINFO", tmp_path / "cpuinfo")
    assert machine.has_vnni() is None
    (tmp_path / "cpuinfo").write_text(FLAGS.format(flag))
    assert machine.has_vnni() is True
    (tmp_path / "cpuinfo").write_text(FLAGS.format("avx512f"))
    assert machine.has_vnni() is False


@pytest.mark.parametrize(("told", "expected"), [("BMI2 AVX512VNNI", True), ("BMI2 AVX2", False), ("", None)])
def test_vnni_is_found_among_the_features_that_macos_lists(this_machine, monkeypatch, told, expected):
    class Answer:
        stdout = told

    monkeypatch.setattr("sys.platform", "darwin")
    monkeypatch.setattr("subprocess.run", lambda *args, **kwargs: Answer)
    assert machine.has_vnni() is expected


def test_windows_does_not_tell(this_machine, monkeypatch):
    monkeypatch.setattr("sys.platform", "win32")
    assert machine.has_vnni() is None


@pytest.mark.parametrize(
    ("processor", "vnni", "name", "why"),
    [
        ("x86_64", True, "ort-x64-vnni", "this machine has VNNI"),
        ("AMD64", False, "ort-x64", "this machine has no VNNI"),
        ("AMD64", None, "ort-x64", "this system does not report"),
        ("aarch64", None, "ort-arm64", "this machine is ARM64"),
        ("ARM64", None, "ort-arm64", "this machine is ARM64"),
        ("riscv64", None, "ort-x64", "riscv64 is neither x86-64 nor ARM64"),
        ("", None, "ort-x64", "this processor is neither"),
    ],
)
def test_the_default_target_fits_the_machine(this_machine, monkeypatch, processor, vnni, name, why):
    monkeypatch.setattr("platform.machine", lambda: processor)
    monkeypatch.setattr(machine, "has_vnni", lambda: vnni)
    assert machine.fitting()[0] == name
    assert machine.fitting()[1].startswith(why)
    assert targets.load("auto") == targets.load(name)
    report = eptq_onnx.quantize(small_convnet(), images(8), Config(preset="fast"), progress=silent).report
    assert report.target == name
    assert any(note.startswith(f"target {name}: {why}") for note in report.notes)


def test_a_target_that_is_named_needs_no_reason(this_machine):
    config = Config(preset="fast", target="ort-x64")
    report = eptq_onnx.quantize(small_convnet(), images(8), config, progress=silent).report
    assert report.target == "ort-x64"
    assert not any(note.startswith("target ") for note in report.notes)


@pytest.mark.parametrize("name", targets.names())
@pytest.mark.parametrize(
    ("processor", "vnni"), [("AMD64", True), ("AMD64", False), ("AMD64", None), ("aarch64", False)]
)
def test_a_target_for_vnni_is_noted_where_products_saturate(this_machine, monkeypatch, name, processor, vnni):
    monkeypatch.setattr("platform.machine", lambda: processor)
    monkeypatch.setattr(machine, "has_vnni", lambda: vnni)
    target = targets.load(name)
    note = targets.fit_of(name, target)
    if name not in ("openvino", "ort-x64-vnni") or (processor, vnni) != ("AMD64", False):
        assert note is None
        return
    assert note is not None
    assert "saturate here" in note
    other = targets.load(note.rpartition(" ")[2])
    assert (other.verifier, other.processor) == (target.verifier, "any")
    assert targets.fit_of(other.name, other) is None


def test_a_report_says_that_products_saturate_here(this_machine, monkeypatch):
    monkeypatch.setattr(machine, "saturates", lambda: True)
    config = Config(preset="fast", target="ort-x64-vnni")
    report = eptq_onnx.quantize(small_convnet(), images(8), config, progress=silent).report
    assert any(note.endswith("use --target ort-x64") for note in report.notes)


def test_this_machine_has_a_target(this_machine):
    assert machine.fitting()[0] in targets.names()
