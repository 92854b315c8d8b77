"""A function that scores, or that cannot: each fault is one sentence that says what to mend, and where."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import onnx
import pytest
from graphs import images, small_convnet
from typer.testing import CliRunner

from eptq_onnx import ConfigError, DataError
from eptq_onnx.cli import app
from eptq_onnx.scoring import evaluate_of, float_model, score_of

METRICS = """
import math
LIMIT = 3
def good(run): return 0.5
def fails(run):
    return {}["accuracy"]
def nothing(run): pass
def text(run): return "0.9"
def nan(run): return math.nan
def several(run): return [0.1, 0.2]
"""


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    name = f"scores_{tmp_path.name}".replace("-", "_")
    (tmp_path / f"{name}.py").write_text(METRICS)
    (tmp_path / f"{name}_broken.py").write_text("x = 1 / 0\n")
    (tmp_path / f"{name}_syntax.py").write_text("def f(:\n")
    (tmp_path / f"{name}_needs.py").write_text("import surely_not_there\n")
    onnx.save(small_convnet(), "f.onnx")
    np.savez("data.npz", image=images(4))
    return tmp_path


FAULTS = {
    "nomodule:fn": "there is no module nomodule, neither as nomodule.py in ",
    "METRICS:accuracy": "has no function accuracy: it has good, fails, nothing, text, nan, several.",
    "METRICS:LIMIT": "has no function LIMIT: it has good,",
    "METRICS_broken:f": "fails: ZeroDivisionError: division by zero (METRICS_broken.py, line 1).",
    "METRICS_syntax:f": "fails: SyntaxError: ",
    "METRICS_needs:f": "needs surely_not_there, which is not installed.",
    "METRICS:fails": "gives no score: fails fails with KeyError: 'accuracy' (METRICS.py, line 6).",
    "METRICS:nothing": "gives no score: nothing returns nothing (None), and a score is a finite number.",
    "METRICS:text": "gives no score: text returns '0.9', and a score is a finite number.",
    "METRICS:nan": "gives no score: nan returns nan, and a score is a finite number.",
    "METRICS:several": "gives no score: several returns [0.1, 0.2], and a score is a finite number.",
}


@pytest.mark.parametrize("name", FAULTS)
def test_a_fault_is_one_sentence_and_exit_code_2(folder, name):
    module = next(path.stem for path in folder.glob("scores_*.py") if path.stem.count("_") == min(
        p.stem.count("_") for p in folder.glob("scores_*.py")
    ))  # fmt: skip
    arguments = ["verify", "f.onnx", "f.onnx", "--data", "data.npz", "--seconds", "0"]
    result = CliRunner().invoke(app, [*arguments, "--evaluate", name.replace("METRICS", module)])
    assert result.exit_code == 2, result.output
    [text] = result.stderr.strip().splitlines()
    assert FAULTS[name].replace("METRICS", module) in text


@pytest.mark.parametrize("value", [0, 0.5, -2, True, np.float32(0.25), np.array([0.75]), np.array(3)])
def test_numbers_of_any_kind_are_scores(value):
    assert score_of(lambda run: value, float_model(small_convnet())) == pytest.approx(
        float(np.ravel(value)[0])
    )


@pytest.mark.parametrize("value", [math.inf, "x", b"1", [], {}, np.zeros(2), object(), 1j])
def test_nothing_else_is_one(value):
    with pytest.raises(ConfigError, match=r"returns .*, and a score is a finite number\.$"):
        score_of(lambda run: value, float_model(small_convnet()))


def test_what_is_missing_is_said_before_anything_runs(folder):
    with pytest.raises(DataError, match="there is no module nomodule"):
        evaluate_of("nomodule:fn")
    result = CliRunner().invoke(
        app, ["quantize", "f.onnx", "--data", "data.npz", "--evaluate", "nomodule:fn", "--max-drop", "1%"]
    )
    assert result.exit_code == 2
    assert result.stderr.startswith("error: the function nomodule:fn: there is no module nomodule")
