"""What commands print at 60, 80 and 120 columns, for a network with names as long as exporters give them."""

from __future__ import annotations

import json
import re
import shlex
from pathlib import Path

import numpy as np
import onnx
import pytest
from graphs import images, small_convnet
from typer.testing import CliRunner

from eptq_onnx import Config, api, quantize
from eptq_onnx.cli import app
from eptq_onnx.cli import quantize as command
from eptq_onnx.runtimes import bench
from eptq_onnx.start import silent

pytestmark = pytest.mark.once

PREFIX = "/model/backbone/stages.3/blocks.11/attention/projection/"
PAIR = ["f.onnx", "q.onnx"]
SAMPLES = ["--data", "data.npz"]
COMMANDS = {
    "inspect": ["f.onnx"],
    "quantize": ["f.onnx", *SAMPLES, "-o", "out.onnx", "--preset", "fast", "--bits", "w3a4"],
    "compare": [*PAIR, *SAMPLES],
    "verify": [*PAIR, *SAMPLES, "--seconds", "0.1"],
    "sensitivity": ["f.onnx", *SAMPLES, "--bits", "w4a4"],
    "lint": ["q.onnx", "--target", "qnn"],
    "bench": [*PAIR, *SAMPLES, "--seconds", "0.2"],
    "targets": [],
    "doctor": [],
}


def long_names() -> onnx.ModelProto:
    """A network in which all nodes, tensors and outputs have long names."""
    model = small_convnet()
    kept = {"image"}

    def renamed(name: str) -> str:
        return name if not name or name in kept else f"{PREFIX}{name}"

    for k, node in enumerate(model.graph.node):
        node.name = f"{PREFIX}{node.op_type}_{k}"
        node.input[:] = [renamed(name) for name in node.input]
        node.output[:] = [renamed(name) for name in node.output]
    for item in (*model.graph.initializer, *model.graph.output, *model.graph.value_info):
        item.name = renamed(item.name)
    return model


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("widths")
    onnx.save(long_names(), folder / "f.onnx")
    np.savez(folder / "data.npz", image=images(40))
    config = Config(bits="w4a4", preset="fast", measure_speed=False)
    quantize(folder / "f.onnx", folder / "data.npz", config, progress=silent).save(folder / "q.onnx")
    return folder


@pytest.fixture(scope="module")
def runs() -> dict:
    """What was computed once is printed three times."""
    return {}


@pytest.fixture
def folder(files: Path, runs: dict, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(files)
    monkeypatch.setattr(bench, "_LOADS", 1)
    for module, name in (
        (api, "inspect"), (api, "compare"), (api, "verify"), (api, "sensitivity"), (api, "bench"), (command, "run")
    ):  # fmt: skip
        function = getattr(module, name)

        def once(*args, _name=name, _function=function, **options):
            if _name not in runs:
                runs[_name] = _function(*args, **options)
            return runs[_name]

        monkeypatch.setattr(module, name, once)
    return files


def names() -> set[str]:
    """Of nodes and tensors of both files."""
    nodes = [n for path in PAIR for n in onnx.load(path).graph.node]
    return {n.name for n in nodes} | {name for n in nodes for name in (*n.output, *n.input)}


@pytest.mark.parametrize("width", [60, 80, 120])
@pytest.mark.parametrize("name", COMMANDS)
def test_no_name_is_cut_and_no_table_is_too_wide(folder, name, width):
    result = CliRunner().invoke(app, [name, *COMMANDS[name]], env={"COLUMNS": str(width)})
    assert result.exit_code in (0, 1), result.output
    shown = result.stdout.splitlines()
    assert not any("…" in text for text in shown)
    assert all(len(text.rstrip()) <= width for text in shown if text[:1] and text[0] in "┏┃┡│└")
    known = names()
    for text in shown:
        for part in re.findall(rf"{re.escape(PREFIX[:20])}[\w/.]*", text):
            assert part in known, text


@pytest.mark.parametrize("width", [60, 80, 120])
def test_options_that_spare_parts_can_be_copied(folder, runs, width):
    result = CliRunner().invoke(app, ["sensitivity", *COMMANDS["sensitivity"]], env={"COLUMNS": str(width)})
    shown = [cell.strip() for text in result.stdout.splitlines() for cell in re.split("[│┃]", text)]
    options = [part.option for part in runs["sensitivity"].parts[:12]]
    assert max(map(len, options)) > 60
    for option in options:
        assert option in shown, option
        assert shlex.split(option)


def test_the_json_of_a_command_is_not_wrapped(folder):
    result = CliRunner().invoke(app, ["compare", *COMMANDS["compare"], "--json"], env={"COLUMNS": "60"})
    assert json.loads(result.stdout)["samples"] == 40
