"""The command ``demo``, and the files that it leaves."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from typer.testing import CliRunner

import eptq_onnx
from eptq_onnx import demo
from eptq_onnx.cli import app
from eptq_onnx.report import files
from eptq_onnx.runtime import Session


def invoke(*arguments: str):
    return CliRunner().invoke(app, ["demo", *arguments])


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("demo") / "files"
    result = invoke(str(folder), "--json")
    assert result.exit_code == 0, result.output
    (folder / "found.json").write_text(result.stdout)
    return folder


def test_the_quantized_model_is_about_as_good_as_the_float_model(folder):
    found = json.loads((folder / "found.json").read_text())
    assert found["float_accuracy"] > 0.9
    assert found["accuracy"] > found["float_accuracy"] - 0.03
    assert Path(found["quantized"]).stat().st_size < demo.MODEL.stat().st_size


def test_pictures_are_read_as_they_were_drawn(folder):
    drawn = demo.draw(demo.PHOTOS, seed=1)
    with Image.open(folder / "photos" / "007.png") as picture:
        np.testing.assert_array_equal(np.asarray(picture), drawn.images[7])
    read = list(eptq_onnx.samples(demo.MODEL, eptq_onnx.Data(folder / "photos", image="imagenet", samples=4)))
    assert [s.name for s in read] == ["000.png", "083.png", "166.png", "249.png"]
    np.testing.assert_allclose(read[1].feeds["image"][0], drawn.as_input()[83], atol=1e-5)


def test_the_metric_gives_the_accuracy_that_the_command_printed(folder, monkeypatch):
    monkeypatch.chdir(folder)
    namespace: dict = {}
    exec((folder / "metric.py").read_text(), namespace)
    session = Session("model.onnx")
    found = json.loads((folder / "found.json").read_text())
    assert namespace["accuracy"](session.run) == pytest.approx(found["float_accuracy"])
    assert namespace["CLASSES"] == list(demo.CLASSES)


def test_the_report_is_a_page_beside_the_model(folder):
    found = json.loads((folder / "found.json").read_text())
    assert found["report"] == str(folder / "report.html")
    assert (folder / "report.html").read_text(encoding="utf-8").startswith("<!DOCTYPE html>")
    assert json.loads((folder / "report.json").read_text())["verdict"]


def test_without_the_extra_the_report_is_json_and_the_reason_is_told(tmp_path, monkeypatch):
    monkeypatch.setattr(files, "find_spec", lambda name: None)
    monkeypatch.setattr(demo, "PHOTOS", 40)
    result = invoke(str(tmp_path))
    assert result.exit_code == 0, result.output
    assert "note: " in result.stdout
    assert "report.html is not written: a page needs jinja2 and matplotlib" in result.stdout
    assert 'pip install "eptq-onnx[report]"' in result.stdout
    assert f"wrote {tmp_path / 'model.w8a8.onnx'} and {tmp_path / 'report.json'}" in result.stdout
    assert not (tmp_path / "report.html").exists()
    assert (tmp_path / "report.json").exists()


def test_a_folder_that_cannot_be_made_is_told(tmp_path):
    (tmp_path / "file").write_text("")
    result = invoke(str(tmp_path / "file" / "below"))
    assert result.exit_code == 2
    assert "cannot be written" in result.stderr
