"""What README shows works as it stands there."""

from __future__ import annotations

import re
import shlex
import shutil
from pathlib import Path

import pytest
from conftest import MODELS
from typer.testing import CliRunner

from eptq_onnx import targets
from eptq_onnx.cli import app
from eptq_onnx.config import PRESET_STEPS, Config, Preset

ROOT = MODELS.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
COMMANDS = re.findall(r"^eptq-onnx (quantize .*)$", README, re.MULTILINE)
SNIPPETS = re.findall(r"```python\n(.*?)```", README, re.DOTALL)


@pytest.fixture
def workplace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "models").mkdir()
    for path in MODELS.glob("digits_*"):
        shutil.copy(path, tmp_path / "models")
    (tmp_path / "build").mkdir()
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize("command", COMMANDS)
def test_commands(workplace, command):
    result = CliRunner().invoke(app, shlex.split(command))
    assert result.exit_code == 0, result.output
    assert list(Path("build").glob("*.onnx"))


@pytest.mark.parametrize("snippet", SNIPPETS)
def test_python(workplace, snippet):
    exec(compile(snippet, "README.md", "exec"), {})
    assert list(Path("build").glob("*.onnx"))


def test_there_is_something_to_check():
    assert len(COMMANDS) >= 2
    assert SNIPPETS


def test_options_defaults_and_targets_are_those_of_the_code():
    for name in targets.names():
        assert f"| `{name}` |" in README
    for preset, text in ((Preset.BALANCED, "`balanced`: {} steps (small models: up to {})"), (Preset.BEST, "`best`: {} steps (up to {})")):
        assert text.format(*PRESET_STEPS[preset]) in README
    help_text = CliRunner().invoke(app, ["quantize", "--help"], env={"COLUMNS": "200"}).output
    for option in re.findall(r"`(--[a-z-]+)`", README.split("## Targets")[0].split("| option |")[1]):
        assert option in help_text
    config = Config()
    assert (config.attention.value, config.rounding.value, config.optimizer.value) == ("channel", "straight-through", "adam")


def test_make_targets_exist():
    makefile = (ROOT / "Makefile").read_text()
    for target in re.findall(r"^make (\w+)", README, re.MULTILINE):
        assert re.search(rf"^{target}:", makefile, re.MULTILINE)
