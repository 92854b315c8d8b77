"""Options have one home: the fields of `Config`, their types, limits, sections and help."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import get_type_hints

import pytest
from graphs import images, silent, small_convnet
from typer.testing import CliRunner

import eptq_onnx
from eptq_onnx import Config, targets
from eptq_onnx.cli import app
from eptq_onnx.config import Accuracy, Objective, Option
from eptq_onnx.config.accuracy import AccuracyOptions
from eptq_onnx.config.files import SECTIONS, read_options
from eptq_onnx.config.options import Options
from eptq_onnx.errors import ConfigError


def test_every_option_has_a_type_for_users_a_section_and_help():
    assert list(get_type_hints(Options)) == list(Config.model_fields)
    assert list(get_type_hints(AccuracyOptions)) == list(Accuracy.model_fields)
    for name, field in {**Config.model_fields, **Accuracy.model_fields}.items():
        assert len([m for m in field.metadata if isinstance(m, Option)]) == 1, name
        assert field.description, name
    assert not set(SECTIONS.values()) & set(SECTIONS), "a table and an option of one name"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"weight_bits": 9}, "option weight_bits=9 is wrong"),
        ({"preset": "slow"}, "option preset='slow' is wrong"),
        ({"steps": -1}, "option steps=-1 is wrong"),
        ({"color": 3}, "option color is unknown"),
        ({"budget": "weights"}, "option budget='weights' is wrong"),
        ({"bits": "w9a8"}, "write bits as w4a8"),
        ({"bits": ["op:Conv=4"]}, "write bits as w4a8"),
        ({"bits": "w4a8", "weight_bits": 8}, "contradict each other"),
        ({"bits": ["op:Conv=w4a8"], "budget": "weights=4"}, "leave bits with patterns out"),
        ({"bits": ["op:Conv=w4a8"], "objective": "bytes"}, "objective=bytes chooses the bits of all weights"),
        ({"budget": ["weights=4", "weights=3"]}, "a budget is given twice for one unit"),
        ({"budget": ["weights=4", "bytes"]}, "option budget='bytes' is wrong"),
        ({"objective": "bytes", "max_noise": 0}, "objective=bytes needs a limit of noise"),
    ],
)
def test_a_wrong_option_is_named(options, message):
    with pytest.raises(ConfigError, match=message):
        Config(**options)


def test_bits_of_all_are_the_options_by_another_name():
    assert Config(bits="w4a16") == Config(weight_bits=4, activation_bits=16)
    assert Config(bits=["w4a8", "op:Conv=w8a8"]) == Config(weight_bits=4, bits=["op:Conv=w8a8"])
    assert Config(bits="w4a8", weight_bits=4).weight_bits == 4


def test_a_file_holds_options_in_their_sections_or_outside(tmp_path):
    file = tmp_path / "run.toml"
    file.write_text('seed = 3\n[widths]\nweight_bits = 4\nbudget = "weights=4"\n[model.batch_axes]\nx = 0\n')
    options = read_options(file)
    assert options == {"seed": 3, "weight_bits": 4, "budget": "weights=4", "batch_axes": {"x": 0}}
    assert [str(b) for b in Config(**options).budget] == ["weights=4"]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("weight_bits = ", "cannot be read"),
        ("colour = 3", "option colour is unknown"),
        ("[widths]\nseed = 1", "option seed in the table widths is unknown"),
        ("weight_bits = 4\n[widths]\nweight_bits = 8", "option weight_bits is given twice"),
    ],
)
def test_a_file_that_is_wrong_is_refused_in_a_sentence(tmp_path, text, message):
    file = tmp_path / "run.toml"
    file.write_text(text)
    with pytest.raises(ConfigError, match=message):
        read_options(file)


@pytest.mark.parametrize("text", ["{}", "[]", '{"config": 3}', "nonsense", "[" * 100_000])
def test_what_is_no_report_is_refused_in_a_sentence(tmp_path, text):
    file = tmp_path / "report.json"
    file.write_text(text)
    with pytest.raises(ConfigError, match="the configuration"):
        read_options(file)


def test_a_missing_file_is_refused(tmp_path):
    with pytest.raises(ConfigError, match="cannot be read"):
        read_options(tmp_path / "none.toml")


@pytest.mark.parametrize(
    "options",
    [
        {"preset": "fast", "weight_bits": 4, "rotate": False, "batch_axes": {"image": 0}},
        {"preset": "fast", "bits": ["w6a8", "op:Gemm=w4a16"], "exclude": ["op:Relu"]},
        {"steps": 2, "budget": "weights=5", "max_memory": "2GB", "attention": "layer", "max_noise": 0.1},
    ],
)
def test_the_options_of_a_report_give_the_same_bytes(tmp_path, options):
    first = eptq_onnx.quantize(
        small_convnet(), images(12), Config(**options, measure_speed=False), progress=silent
    )
    (tmp_path / "report.json").write_text(first.report.to_json())
    assert set(json.loads(first.report.to_json())["config"]) == set(Config.model_fields)
    again = Config(**read_options(tmp_path / "report.json"))
    assert again == Config(**options, measure_speed=False)
    second = eptq_onnx.quantize(small_convnet(), images(12), again, progress=silent)
    assert second.model.SerializeToString() == first.model.SerializeToString()


def test_the_command_line_comes_before_the_file(tmp_path, monkeypatch):
    seen = []

    def record(model, data, config, **others):
        seen.append(config)
        raise ConfigError("enough.")

    monkeypatch.setattr("eptq_onnx.cli.quantize.run", record)
    (tmp_path / "m.onnx").write_bytes(small_convnet().SerializeToString())
    (tmp_path / "run.toml").write_text("seed = 3\nweight_bits = 4\nrotate = false\n")
    common = [str(tmp_path / "m.onnx"), "--data", str(tmp_path / "x.npz"), "-o", str(tmp_path / "o.onnx")]
    given = [
        "--config",
        str(tmp_path / "run.toml"),
        "--weight-bits",
        "5",
        "--no-equalize",
        "--no-augment",
        "--batch-axis",
        "image=none",
    ]
    assert CliRunner().invoke(app, ["quantize", *common, *given]).exit_code == 2
    assert seen == [
        Config(seed=3, weight_bits=5, rotate=False, equalize=False, augment=False, batch_axes={"image": None})
    ]


def test_the_configuration_is_not_overwritten(tmp_path):
    (tmp_path / "m.onnx").write_bytes(small_convnet().SerializeToString())
    (tmp_path / "run.toml").write_text("seed = 3\n")
    arguments = ["quantize", str(tmp_path / "m.onnx"), "--data", "x.npz", "-o", str(tmp_path / "o.onnx")]
    arguments += ["--config", str(tmp_path / "run.toml"), "--report", str(tmp_path / "run.toml")]
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 2
    assert (tmp_path / "run.toml").read_text() == "seed = 3\n"


USER = """
from eptq_onnx import Config, quantize

config = Config(weight_bits=4, preset="fast", budget="weights=4", batch_axes={"x": None}, custom_ops=["lib.so"], max_memory="4GB")
quantize("m.onnx", "x.npz", config).save("q.onnx")
"""


@pytest.mark.once
@pytest.mark.parametrize(
    ("wrong", "right"),
    [("", ""), ('preset="fast"', 'preset="slow"'), ("weight_bits=4", 'weight_bits="many"')],
)
def test_options_have_types_under_strict_mypy_without_a_plugin(tmp_path, wrong, right):
    (tmp_path / "user.py").write_text(USER.replace(wrong, right) if wrong else USER)
    command = [
        sys.executable,
        "-m",
        "mypy",
        "--strict",
        "--config-file",
        "",
        "--cache-dir",
        str(tmp_path / "cache"),
        "user.py",
    ]
    environment = {"MYPYPATH": str(Path(eptq_onnx.__file__).parents[1]), "PATH": ""}
    found = subprocess.run(
        command, cwd=tmp_path, capture_output=True, text=True, check=False, timeout=300, env=environment
    )
    mine = [text for text in found.stdout.splitlines() if text.startswith("user.py")]
    assert bool(mine) == bool(wrong), found.stdout + found.stderr


def test_how_time_is_measured_counts_only_where_it_decides():
    target, seen = targets.load("ort-x64"), set()
    for objective in Objective:
        budget = "time=0.01" if objective is Objective.NOISE else None
        hashes = {
            Config(objective=objective, budget=budget, runtime_threads=n).digest(target) for n in (1, 4)
        }
        assert len(hashes) == (2 if objective in (Objective.TIME, Objective.NOISE) else 1)
        seen |= hashes
    assert len(seen) == 6


def test_the_paper_is_a_preset_whose_options_may_be_replaced():
    config = Config(preset="paper")
    assert (config.steps, config.rounding.value, config.optimizer.value) == (80_000, "soft", "radam")
    assert (config.start.value, config.attention.value, config.output_share) == ("nearest", "layer", 0)
    assert config.gradual_activations
    assert not config.rotate
    assert config.optimizes
    shorter = Config(preset="paper", steps=500, rotate=True, weight_range=None)
    assert (shorter.steps, shorter.rotate, shorter.rounding.value) == (500, True, "soft")
    assert shorter.weight_range_method.value == "hmse"
    # A report holds all options.
    assert Config(**json.loads(shorter.model_dump_json())) == shorter


def test_the_preset_of_the_paper_quantizes():
    config = Config(preset="paper", steps=6, weight_bits=4, target="ort-x64")
    found = eptq_onnx.quantize(small_convnet(), {"image": images(24)}, config, progress=silent)
    assert found.report.optimization is not None
    assert found.report.optimization.steps == 6
    assert found.report.rotated == {}
