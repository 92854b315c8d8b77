"""The examples run, each in a process of its own, where their packages are installed."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
EXAMPLES = {
    "torch_export.py": ("torch", "onnxscript"),
    "detector_head.py": ("torch",),
    "olive_pass.py": ("torch", "olive"),
    "optimum_export.py": ("torch", "transformers", "optimum"),
    "keras_export.py": ("tensorflow", "tf2onnx"),
}
"""Example to the packages that it needs."""
ARGUMENTS = {"olive_pass.py": ("models/digits_mobile.onnx", "models/digits_calib.npz")}
SAID = {
    "torch_export.py": ("net_torchscript.onnx: 4 layers", "net_dynamo.onnx: 4 layers"),
    "detector_head.py": ("boxes differ by 0.0", "in float: "),
    "olive_pass.py": ("model.onnx: ",),
    "optimum_export.py": ("12 layers, cosine ",),
    "keras_export.py": ("4 layers, ",),
}


def test_each_example_is_run():
    assert {path.name for path in (ROOT / "examples").glob("*.py")} == EXAMPLES.keys() == SAID.keys()


@pytest.mark.slow
@pytest.mark.parametrize("name", EXAMPLES)
def test_an_example_runs(name, tmp_path):
    missing = [package for package in EXAMPLES[name] if importlib.util.find_spec(package) is None]
    if missing:
        pytest.skip(f"{name} needs {', '.join(missing)}")
    paths = [str(ROOT), str(ROOT / "examples"), os.environ.get("PYTHONPATH", "")]
    done = subprocess.run(
        [sys.executable, f"examples/{name}", *ARGUMENTS.get(name, ()), str(tmp_path)],
        cwd=ROOT, env={**os.environ, "PYTHONPATH": os.pathsep.join(p for p in paths if p)},
        capture_output=True, text=True, timeout=1800, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    for said in SAID[name]:
        assert said in done.stdout
