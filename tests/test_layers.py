"""The contract of who may import whom, which `make lint` checks, notices an arrow that points up."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
WRONG = {
    "numerics/linear.py": "from eptq_onnx import runtime",
    "graph/view.py": "from eptq_onnx.method import plan",
    "method/ranges.py": "from eptq_onnx.method import calibrate",
    "report/speed.py": "from eptq_onnx import pipeline",
}


def contracts(folder: Path) -> subprocess.CompletedProcess[str]:
    code = "from importlinter.cli import lint_imports_command; lint_imports_command()"
    command = [sys.executable, "-c", code, "--no-cache"]
    return subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False, timeout=120)


@pytest.mark.parametrize("file", WRONG)
def test_an_import_that_points_up_or_sideways_breaks_the_contract(tmp_path, file):
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    shutil.copytree(ROOT / "eptq_onnx", tmp_path / "eptq_onnx", ignore=shutil.ignore_patterns("__pycache__"))
    wrong = tmp_path / "eptq_onnx" / file
    wrong.write_text(wrong.read_text(encoding="utf-8") + f"\n{WRONG[file]}\n", encoding="utf-8")
    found = contracts(tmp_path)
    assert found.returncode == 1
    assert "BROKEN" in found.stdout


def test_no_file_is_too_long_to_read():
    files = [*(ROOT / "eptq_onnx").rglob("*.py"), *(ROOT / "tools").glob("*.py")]
    assert {str(f): n for f in files if (n := len(f.read_text(encoding="utf-8").splitlines())) > 450} == {}
