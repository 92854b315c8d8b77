"""The suffix of the file says which form a report takes; what is missing is said before any work."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import onnx
import pytest
from graphs import images, small_convnet
from reports import report
from typer.testing import CliRunner

from eptq_onnx import InstallError, OutputError
from eptq_onnx.cli import app
from eptq_onnx.report import files


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    onnx.save(small_convnet(), "model.onnx")
    np.savez("data.npz", image=images(12))
    return tmp_path


def invoke(*arguments: str):
    return CliRunner().invoke(
        app, ["quantize", "model.onnx", "--data", "data.npz", "-o", "out.onnx", *arguments]
    )


@pytest.mark.parametrize(
    ("name", "begin"),
    [("r.html", "<!DOCTYPE html>"), ("r.HTML", "<!DOCTYPE html>"), ("r.md", "# net"), ("r.json", "{")],
)
def test_the_suffix_says_which(tmp_path, name, begin):
    report().save(tmp_path / name)
    assert (tmp_path / name).read_text(encoding="utf-8").startswith(begin)


@pytest.mark.parametrize("name", ["report", "report.pdf", "report.html.gz", ".html"])
def test_another_suffix_is_refused_in_one_sentence_before_any_work(folder, name):
    result = invoke("--report", name)
    assert result.exit_code == 2
    assert result.stderr == (
        f"error: the report {name} cannot be written: give a name that ends in .html, .md or .json.\n"
    )
    assert not Path("out.onnx").exists()
    with pytest.raises(OutputError):
        report().save(name)


@pytest.mark.parametrize("missing", [("jinja2",), ("jinja2", "matplotlib")])
def test_a_missing_extra_is_told_before_any_work(folder, monkeypatch, missing):
    monkeypatch.setattr(files, "find_spec", lambda name: None if name in missing else object())
    result = invoke("--report", "r.html")
    assert result.exit_code == 2
    assert result.stderr.count("\n") == 1
    wanted = f'a page needs {" and ".join(missing)}. Install them with pip install "eptq-onnx[report]"'
    assert f"r.html is not written: {wanted}" in result.stderr
    assert not list(folder.glob("[or]*"))
    with pytest.raises(InstallError):
        report().to_html()
    assert report().to_markdown()
    assert invoke("--report", "r.md", "--preset", "fast", "--quiet").exit_code == 0


@pytest.mark.parametrize("bits", ["w8a8", "w4a32"])
def test_the_command_writes_a_page(folder, bits):
    result = invoke("--report", "r.html", "--preset", "fast", "--bits", bits)
    assert result.exit_code == 0, result.output
    assert "eptq-onnx quantize model.onnx --data data.npz" in Path("r.html").read_text(encoding="utf-8")


def test_json_leaves_out_what_only_a_page_shows_and_holds_the_advice():
    found = json.loads(report().to_json())
    assert list(found)[:2] == ["verdict", "advice"]
    assert "exhibits" not in found
    assert found["layers"][0]["own_db"] == 25.0
    assert found["verification"]["worst"] == [{"sample": 7, "output": "y", "sqnr_db": 4.0, "name": ""}]
