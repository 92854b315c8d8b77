"""What CONTRIBUTING.md says about additions holds: each is made in a copy of the package, works there, and
costs the files it says.

The blocks of a section are applied as they stand. The copy then runs the tests among them, and what stands
here as a probe.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import MODELS

ROOT = MODELS.parent
TEXT = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")

HEAD = """
import os
import numpy as np
import eptq_onnx
from eptq_onnx import Config, engines, quantize
from graphs import images, normal, parse, silent, small_convnet

assert eptq_onnx.__file__.startswith(os.getcwd())

def columns(middle):
    text = "g (float[N,8] x) => (float[N,4] y) { h = MatMul (x, w1)  c = " + middle + "  y = MatMul (c, w2) }"
    model = parse(text, {"w1": normal(8, 8), "places": np.array([2, 0, 5, 1, 4, 7, 6, 3]), "w2": normal(8, 4, seed=2)})
    model.opset_import.add(domain="ai.onnx.ml", version=1)
    return model
"""
PROBES = {
    "an operator that needs a gradient": """
def test_gradients_pass_it():
    model = columns("ai.onnx.ml.Scaler <offset = [0.5], scale = [2.0]> (h)")
    report = quantize(model, normal(32, 8, seed=3), Config(steps=2, weight_bits=4), progress=silent).report
    assert report.optimization is not None
    assert not [note for note in report.notes if "gradient" in note or "Hessian" in note]
""",
    "an operator that runs on integers": """
def test_it_is_quantized():
    model = columns("ai.onnx.ml.ArrayFeatureExtractor (h, places)")
    result = quantize(model, normal(32, 8, seed=3), Config(preset="fast"), progress=silent)
    [node] = [n for n in result.model.graph.node if n.op_type == "ArrayFeatureExtractor"]
    makers = {o: n.op_type for n in result.model.graph.node for o in n.output}
    readers = [n.op_type for n in result.model.graph.node if node.output[0] in n.input]
    assert makers[node.input[0]] == "DequantizeLinear"
    assert readers == ["QuantizeLinear"]
    assert not result.report.kept_float
""",
    "a target": """
from eptq_onnx.cli.options import help_of
from pages import shipped_targets
from obeyed import obeyed

def test_it_is_offered_and_obeyed():
    assert "npu (An accelerator: " in help_of("target", Config.model_fields["target"])
    assert "| `npu` | An accelerator: " in shipped_targets()
    result = quantize(small_convnet(), images(32), Config(steps=4, weight_bits=4, target="npu"), progress=silent)
    assert obeyed(result.model, eptq_onnx.targets.load("npu"))["weight"] == 4
    assert result.report.target == "npu"

def test_its_number_format_is_obeyed_at_full_width():
    result = quantize(small_convnet(), images(32), Config(preset="fast", target="npu"), progress=silent)
    assert obeyed(result.model, eptq_onnx.targets.load("npu"))["weight"] == 4
    assert {layer.weight_range for layer in result.report.layers} == {(-100, 100), (-127, 127)}  # depthwise
""",
    "a number format of a target: 8-bit floats": """
import pytest
from onnx import TensorProto
from obeyed import obeyed
from pages import shipped_targets

@pytest.mark.parametrize("rounding", ["soft", "straight-through"])
def test_its_numbers_are_learned_and_written(rounding):
    config = Config(steps=6, target="wide-floats", rounding=rounding)
    result = quantize(small_convnet(), images(32), config, progress=silent)
    assert obeyed(result.model, eptq_onnx.targets.load("wide-floats"))["weight"] == 4
    stored = {t.data_type for t in result.model.graph.initializer} - {TensorProto.FLOAT, TensorProto.INT64}
    assert stored == {TensorProto.FLOAT8E5M2}
    assert any("steps of float8e5m2 grow with the values" in note for note in result.report.notes)
    [output] = result.report.verification.outputs.values()
    assert output > 10
    assert not eptq_onnx.lint(result.model, "wide-floats").findings
    assert "| `wide-floats` | An accelerator: 8-bit floats" in shipped_targets()
""",
    "a command": """
from typer.testing import CliRunner
from eptq_onnx.cli import app

def test_it_stands_in_the_help():
    assert "Print the names of the inputs of MODEL." in CliRunner().invoke(app, ["--help"]).stdout
""",
    "a reader of calibration data": """
import onnx
from typer.testing import CliRunner
from eptq_onnx.cli import app
from pages import forms

def test_it_stands_in_the_help_and_is_read(tmp_path):
    words = " ".join(CliRunner().invoke(app, ["quantize", "--help"]).stdout.split())
    assert "; a .csv file with one sample a row, for a model with one input; " in words
    assert "- a .csv file with one sample a row, for a model with one input" in forms().splitlines()
    np.savetxt(tmp_path / "x.csv", normal(16, 8), delimiter=",")
    report = quantize(columns("Relu (h)"), tmp_path / "x.csv", Config(preset="fast"), progress=silent).report
    assert report.samples == 16
""",
    "a pass": """
from pages import passes

def test_it_runs_in_its_place():
    seconds = list(quantize(small_convnet(), images(8), Config(preset="fast"), progress=silent).report.seconds)
    assert seconds[seconds.index("ranges") + 1] == "tally"
    assert "**Tally.** Count the layers whose weights are quantized." in passes()
""",
    "a gradient engine": """
from pages import tables
from eptq_onnx.engines.slim import SlimEngine

def test_it_is_chosen_by_its_name():
    report = quantize(small_convnet(), images(8), Config(steps=2, engine="slim"), progress=silent).report
    assert report.engine == "slim"
    assert not isinstance(engines.make(), SlimEngine)
    assert "slim (as standard, in smaller graphs; needs onnxslim)" in tables()
""",
    "a runtime that checks files": """
from pages import verifiers
from eptq_onnx import runtimes

def test_it_is_found_and_stands_in_the_table():
    assert runtimes.make("unfused").name == "unfused"
    assert "| `unfused` | onnxruntime on the CPU without integer kernels | no |" in verifiers()
""",
}
SECTIONS = {
    "an operator that needs a gradient": "How to add an operator that needs a gradient",
    "an operator that runs on integers": "How to add an operator that runs on integers",
    "a target": "How to add a target",
    "a number format of a target: 8-bit floats": "How to add a target with another number format",
    "a command": "How to add a command",
    "a reader of calibration data": "How to add a data reader",
    "a pass": "How to add a pass",
    "a gradient engine": "How to add a gradient engine",
    "a runtime that checks files": "How to add a runtime that checks files",
}
FURTHER = {
    "an operator that needs a gradient": ["tests/test_ops.py", "-k", "probe or Scaler or every_row"],
    "an operator that runs on integers": [
        "tests/test_ops.py",
        "tests/test_targets.py",
        "-k",
        "probe or ArrayFeature or every_row or (shipped and not page)",
    ],
    "a target": ["tests/test_targets.py", "-k", "not page and not described"],
    "a number format of a target: 8-bit floats": [
        "tests/test_targets.py",
        "-k",
        "probe or (shipped and not page)",
    ],
    "a gradient engine": ["tests/engines/test_engines.py::test_an_input_that_a_node_reads_twice[slim]"],
    "a runtime that checks files": [
        f"tests/runtimes/test_verifiers.py::{test}[unfused]"
        for test in (
            "test_a_runtime_is_there_or_says_what_to_install",
            "test_outputs_agree_with_onnxruntime",
            "test_external_data_is_read",
            "test_a_model_that_is_refused_is_an_error",
        )
    ],
}
"""Tests that are there already and find the addition by themselves."""
STAND_INS = {"a gradient engine": ("onnxslim.py", "def slim(model):\n    return model\n")}
"""Libraries that an addition needs and nobody has installed."""


def blocks(section: str) -> list[tuple[str, str, str]]:
    """Path, language and text of each block that stands under the name of a file."""
    _, _, rest = TEXT.partition(f"\n## {section}\n")
    return re.findall(
        r"^`([\w./-]+)`[^`\n]*:\n\n```(\w+)\n(.*?)^```$", rest.partition("\n## ")[0], re.MULTILINE | re.DOTALL
    )


def applied(folder: Path, path: str, language: str, text: str) -> None:
    """Make a new file, or the change that a diff shows around lines that are there once."""
    file = folder / path
    if language != "diff":
        assert not file.exists(), f"{path} is no new file"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text, encoding="utf-8")
        return
    lines = text.splitlines(keepends=True)
    before = "".join(line[1:] for line in lines if line[0] in " -")
    after = "".join(line[1:] for line in lines if line[0] in " +")
    whole = file.read_text(encoding="utf-8")
    assert f"\n{whole}".count(f"\n{before}") == 1, f"{path} does not hold these lines once: {before}"
    file.write_text(f"\n{whole}".replace(f"\n{before}", f"\n{after}")[1:], encoding="utf-8")


@pytest.fixture
def copy(tmp_path: Path) -> Path:
    """A copy of what an addition touches, compiled files with it."""
    for name in ("eptq_onnx", "tests"):
        shutil.copytree(ROOT / name, tmp_path / name)
    shutil.copy2(ROOT / "pyproject.toml", tmp_path)
    shutil.copy2(ROOT / "tools" / "pages.py", tmp_path)
    return tmp_path


def ran(folder: Path, *command: str) -> str:
    """What a Python module says when it runs in a folder; an error if it fails."""
    env = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")} | {
        "PYTHONPATH": str(folder)
    }
    found = subprocess.run(
        [sys.executable, "-m", *command],
        cwd=folder,
        env=env,
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
    )
    assert found.returncode == 0, found.stdout + found.stderr
    return found.stdout


@pytest.mark.once
@pytest.mark.parametrize("addition", SECTIONS)
def test_an_addition_works_as_it_is_described(copy, addition):
    changed = blocks(SECTIONS[addition])
    for block in changed:
        applied(copy, *block)
    if addition in STAND_INS:
        name, text = STAND_INS[addition]
        (copy / name).write_text(text, encoding="utf-8")
    files = sorted({path for path, _, _ in changed})
    code = [path for path in files if path.endswith(".py")]
    ran(copy, "ruff", "check", "--no-cache", *code)
    ran(copy, "ruff", "format", "--no-cache", "--check", *code)
    probe = copy / "tests" / "test_probe.py"
    probe.write_text(HEAD + PROBES[addition], encoding="utf-8")
    tests = [path for path in files if Path(path).name.startswith("test_")]
    told = ran(
        copy,
        "pytest",
        "-p",
        "no:cacheprovider",
        "-p",
        "no:xdist",
        str(probe),
        *tests,
        *FURTHER.get(addition, []),
    )
    assert "skipped" not in told
    [row] = re.findall(rf"^\| {addition} \| (\d+) \|", TEXT, re.MULTILINE)
    assert int(row) == len(files), files


def test_every_section_is_walked_through():
    described = re.findall(r"^## (How to add .*)$", TEXT, re.MULTILINE)
    assert set(SECTIONS.values()) == set(described)


def test_a_block_that_fits_nowhere_is_noticed(copy):
    with pytest.raises(AssertionError, match="does not hold these lines once"):
        applied(copy, "pyproject.toml", "diff", " nowhere = 1\n+more = 2\n")
    with pytest.raises(AssertionError, match="is no new file"):
        applied(copy, "pyproject.toml", "toml", "")
