"""What all commands have in common: help by stage, the version, completion, manners of printing."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
from typer.testing import CliRunner

import eptq_onnx
from eptq_onnx.cli import app
from eptq_onnx.cli.app import CHECK, LOOK, QUANTIZE, START

NAMES = [c.name or c.callback.__name__ for c in app.registered_commands if c.callback]


def invoke(*arguments: str):
    return CliRunner().invoke(app, list(arguments), env={"COLUMNS": "120"})


def test_help_lists_every_command_under_the_stage_of_a_files_life():
    text = invoke("--help").output
    stages = [text.index(f"{stage}:") for stage in (START, LOOK, QUANTIZE, CHECK)]
    assert stages == sorted(stages)
    assert "Other commands" not in text
    for name in NAMES:
        assert text.index(f"  {name} ") > stages[0]
    assert stages[2] < text.index("  quantize ") < stages[3] < text.index("  verify ")


def test_the_version_is_that_of_the_package():
    assert invoke("--version").stdout.strip() == eptq_onnx.__version__


@pytest.mark.parametrize("name", NAMES)
def test_every_command_prints_json_and_can_be_quiet(name):
    text = invoke(name, "--help").output
    assert "--json" in text
    assert "--quiet" in text


def test_a_shell_completes_commands():
    words = {"COMP_WORDS": "eptq-onnx ver", "COMP_CWORD": "1", "_EPTQ_ONNX_COMPLETE": "complete_bash"}
    found = subprocess.run(
        [sys.executable, "-m", "eptq_onnx"],
        env={**os.environ, **words},
        capture_output=True,
        text=True,
        check=True,
    )
    assert found.stdout.split() == ["verify"], found.stderr
    assert "--install-completion" in invoke("--help").output
