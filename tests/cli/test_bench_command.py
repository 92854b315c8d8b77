"""The command ``bench``: exit codes, and what it prints. Which file is slower is made up."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import pytest
from graphs import images, small_convnet
from typer.testing import CliRunner

from eptq_onnx import api
from eptq_onnx.cli import app
from eptq_onnx.outcome import OperatorTime, Pace, Speed
from eptq_onnx.runtimes import bench
from eptq_onnx.runtimes.bench import Bench, FileCost

SLOWER = Bench(
    "onnxruntime", "1.32.0", 1, "CPU time", {"image": "1×3×8×8"}, ("inputs are made up",),
    Speed(Pace.SLOWER, 0.002, 0.004, 2.0, 1.9, 2.1, 10, 1,
          (OperatorTime("Softmax", 0.001, 0.0035), OperatorTime("Conv", 0.001, 0.0005))),
    FileCost("f.onnx", 4_000_000, 0.05, (0.04, 0.06), 9_000_000),
    FileCost("q.onnx", 1_200, 0.04, (0.03, 0.05), 3_000_000),
)  # fmt: skip
PACES = {
    Pace.SLOWER: SLOWER.speed,
    Pace.SAME: replace(SLOWER.speed, pace=Pace.SAME, ratio=1.0, low=0.99, high=1.02),
    Pace.FASTER: replace(SLOWER.speed, pace=Pace.FASTER, ratio=0.5, low=0.45, high=0.55),
}


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    onnx.save(small_convnet(), "f.onnx")
    onnx.save(small_convnet(), "q.onnx")
    np.savez("data.npz", image=images(2))
    return tmp_path


def invoke(*arguments: str):
    return CliRunner().invoke(app, ["bench", *arguments])


@pytest.mark.parametrize(("pace", "code"), [(Pace.FASTER, 0), (Pace.SAME, 0), (Pace.SLOWER, 1)])
def test_the_exit_code_tells_if_it_is_slower(folder, monkeypatch, pace, code):
    monkeypatch.setattr(api, "bench", lambda *_, **__: replace(SLOWER, speed=PACES[pace]))
    result = invoke("f.onnx", "q.onnx", "--json")
    assert result.exit_code == code, result.output
    assert json.loads(result.stdout)["slower"] == bool(code)


def test_what_was_measured_is_printed_with_the_largest_increase_first(folder, monkeypatch):
    monkeypatch.setattr(api, "bench", lambda *_, **__: SLOWER)
    lines = invoke("f.onnx", "q.onnx").stdout.splitlines()
    assert lines[0].startswith("2.00× slower than the float model: 2 ms → 4 ms")
    assert lines[1] == "onnxruntime 1.32.0, 1 thread, CPU time, inputs: image 1×3×8×8"
    text = "\n".join(lines)
    for part in ("50 ms (40 ms to 60 ms)", "9 MB", "1.2 kB", "note: inputs are made up"):
        assert part in text
    assert text.index("Softmax") < text.index("Conv")


def test_two_real_files_are_measured(folder, monkeypatch):
    monkeypatch.setattr(bench, "_LOADS", 1)
    result = invoke("f.onnx", "q.onnx", "--data", "data.npz", "--seconds", "0.2", "--json")
    assert result.exit_code in (0, 1), result.output
    found = json.loads(result.stdout)
    assert found["shapes"] == {"image": "×".join(map(str, images(1).shape))}
    assert found["speed"]["pairs"] >= 10
    assert found["float_file"]["bytes"] == Path("f.onnx").stat().st_size


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (["missing.onnx", "q.onnx"], "missing.onnx does not exist"),
        (["f.onnx", "q.onnx", "--data", "missing.npz"], "missing.npz"),
        (["f.onnx", "q.onnx", "--runtime", "tvm"], "runtime 'tvm' is unknown: choose one of"),
        (["f.onnx", "q.onnx", "--custom-ops", "missing.so"], "missing.so does not exist"),
    ],
)
def test_what_is_wrong_is_one_sentence_and_exit_code_2(folder, arguments, text):
    result = invoke(*arguments)
    assert result.exit_code == 2
    assert text in result.stderr
    assert len(result.stderr.strip().splitlines()) == 1


def test_options_on_reading_data_need_data(folder):
    result = invoke("f.onnx", "q.onnx", "--samples", "3")
    assert result.exit_code == 2
    assert "options on reading data (samples) go with --data: give it." in result.stderr
