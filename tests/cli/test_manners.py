"""Every command prints one JSON document, one line, or everything, as it is told; the shell completes each."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnx
import pytest
import typer.main
from graphs import images, small_convnet
from typer.testing import CliRunner

from eptq_onnx import Config, demo, quantize
from eptq_onnx.cli import app
from eptq_onnx.runtimes import bench
from eptq_onnx.start import silent

PAIR = ["f.onnx", "q.onnx"]
SAMPLES = ["--data", "data.npz"]
COMMANDS: dict[str, list[str]] = {
    "inspect": ["f.onnx"],
    "quantize": ["f.onnx", *SAMPLES, "-o", "out.onnx", "--preset", "fast"],
    "batch": ["jobs.toml"],
    "compare": [*PAIR, *SAMPLES],
    "verify": [*PAIR, *SAMPLES],
    "sensitivity": ["f.onnx", *SAMPLES],
    "lint": ["q.onnx"],
    "bench": [*PAIR, *SAMPLES, "--seconds", "0.2"],
    "targets": [],
    "doctor": [],
    "demo": ["folder"],
}
"""Commands with what each needs."""
REGISTERED = typer.main.get_command(app).commands  # type: ignore[attr-defined]
VERBOSE = [n for n in COMMANDS if any("--verbose" in p.opts for p in REGISTERED[n].params)]


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("manners")
    onnx.save(small_convnet(), folder / "f.onnx")
    np.savez(folder / "data.npz", image=images(12))
    config = Config(preset="fast", measure_speed=False)
    quantize(folder / "f.onnx", folder / "data.npz", config, progress=silent).save(folder / "q.onnx")
    return folder


@pytest.fixture
def folder(files: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "jobs.toml").write_text(
        'data = "data.npz"\npreset = "fast"\n[sweep]\nbits = ["w8a8", "w4a8"]\n[[jobs]]\nmodel = "f.onnx"\n'
    )
    for name in ("f.onnx", "q.onnx", "data.npz"):
        (tmp_path / name).symlink_to(files / name)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(bench, "_LOADS", 1)
    monkeypatch.setattr(demo, "PHOTOS", 16)
    monkeypatch.setattr(demo, "TEST", 16)
    return tmp_path


def invoke(name: str, *manner: str):
    result = CliRunner().invoke(app, [name, *COMMANDS[name], *manner], env={"COLUMNS": "100"})
    # Which file is slower, and whether a small network is, depends on the machine.
    assert result.exit_code in ((0, 1) if name in ("bench", "verify") else (0,)), result.output
    return result


def test_all_commands_are_listed_here():
    assert set(COMMANDS) == set(REGISTERED)


@pytest.mark.parametrize("name", COMMANDS)
def test_json_is_one_document_and_nothing_else(folder, name):
    assert isinstance(json.loads(invoke(name, "--json").stdout), (dict, list))


@pytest.mark.parametrize("name", COMMANDS)
def test_quiet_is_the_result_without_progress(folder, name):
    result = invoke(name, "--quiet")
    assert result.stderr == ""
    lines = result.stdout.splitlines()
    assert len(lines) == (1 if name != "targets" else len(lines))
    assert all(lines)


@pytest.mark.parametrize("name", VERBOSE)
def test_verbose_says_no_less_than_by_default(folder, name):
    default, verbose = invoke(name), invoke(name, "--verbose")
    assert len(verbose.output.splitlines()) >= len(default.output.splitlines())


@pytest.mark.once
@pytest.mark.parametrize("name", COMMANDS)
def test_a_shell_completes_each_command_and_its_options(name):
    assert name in completed(f"eptq-onnx {name[:-1]}", 1)
    assert "--json" in completed(f"eptq-onnx {name} --js", 2)


def completed(words: str, place: int) -> list[str]:
    variables = {"COMP_WORDS": words, "COMP_CWORD": str(place), "_EPTQ_ONNX_COMPLETE": "complete_bash"}
    found = subprocess.run(
        [sys.executable, "-m", "eptq_onnx"],
        env={**os.environ, **variables},
        capture_output=True,
        text=True,
        check=True,
    )
    return found.stdout.split()
