"""The ranking as a command."""

from __future__ import annotations

import json

import numpy as np
import onnx
import pytest
from graphs import images, small_convnet
from typer.testing import CliRunner

from eptq_onnx.cli import app


@pytest.fixture
def files(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    onnx.save(small_convnet(), "m.onnx")
    np.savez("data.npz", image=images(32))
    return ["sensitivity", "m.onnx", "--data", "data.npz", "--bits", "w4a8", "--target", "ort-x64"]


def test_the_table_names_parts_groups_and_what_spares_them(files):
    result = CliRunner().invoke(app, files, terminal_width=200, env={"COLUMNS": "200"})
    assert result.exit_code == 0
    assert "spared by" in result.stdout
    assert "=w8a8" in result.stdout
    assert "op:Conv" in result.stdout


def test_json_is_all_there_is_on_standard_output(files):
    found = json.loads(CliRunner().invoke(app, [*files, "--json"]).stdout)
    assert found["float_passes"] <= 60
    noises = [p["noise"] for p in found["parts"]]
    assert noises == sorted(noises, reverse=True)
    assert {"option", "hidden", "left_db"} <= set(found["groups"][0])


def test_the_loudest_part_is_told_in_one_line(files):
    out = CliRunner().invoke(app, [*files, "--quiet"]).stdout
    assert out.count("\n") == 1
    assert "of the noise of its kind; --" in out


def test_a_wrong_option_is_told(files):
    result = CliRunner().invoke(app, [*files, "--budget", "weights=3"])
    assert result.exit_code == 2
    assert "leave the budget out" in result.stderr
