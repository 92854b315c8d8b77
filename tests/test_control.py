"""A score of the user's own is kept."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from graphs import images, normal, parse, silent, small_convnet
from typer.testing import CliRunner

import eptq_onnx
from eptq_onnx import Config, ConfigError, engines
from eptq_onnx.cli import app
from eptq_onnx.runtime import Session
from eptq_onnx.scoring import float_model

pytestmark = pytest.mark.once
LOW: dict[str, Any] = {"weight_bits": 2, "edge_bits": 2, "target": "ort-x64", "preset": "fast"}
HELD = images(16, seed=7)
REFERENCE = Session(small_convnet()).run({"image": HELD})["logits"]


def closeness(model) -> float:
    """A share of the outputs' variance that is not noise."""
    [name] = [a.name for a in model.get_inputs()]
    [got] = model.run([a.name for a in model.get_outputs()], {name: HELD})
    return float(1 - np.square(got - REFERENCE).mean() / REFERENCE.var())


def quantized(**accuracy):
    options = {**LOW, **accuracy.pop("options", {})}
    return eptq_onnx.quantize(
        small_convnet(), {"image": images(48)}, Config(**options), progress=silent, **accuracy
    )


def of_file(result) -> float:
    return closeness(float_model(result.model))


def test_parts_are_spared_until_the_score_is_kept():
    asked = quantized(evaluate=closeness)
    trail = asked.report.trail
    assert trail.reached
    assert trail.evaluations == 2
    assert trail.written.what == "as asked for"
    kept = quantized(evaluate=closeness, max_drop=trail.written.drop / 20)
    trail = kept.report.trail
    assert trail.reached
    assert trail.written.drop <= trail.most
    assert 2 < trail.evaluations <= 12
    assert trail.written.spared > 0
    # The score is that of the written file.
    assert of_file(kept) == pytest.approx(trail.written.score, abs=1e-4)
    assert of_file(kept) > of_file(asked)
    # Not all is spared: that is dearer.
    assert (
        trail.written.bytes
        < max(
            a.bytes
            for a in quantized(
                options={"weight_bits": 8, "edge_bits": 8}, evaluate=closeness
            ).report.trail.attempts
        )
        * 1.5
    )
    facts = kept.report.to_markdown()
    assert "Files that were scored" in facts
    assert "as asked for" in facts


def test_the_options_of_the_path_make_a_file_as_good():
    kept = quantized(evaluate=closeness, max_drop="0.2%", options={"rotate": False, "equalize": False})
    written = kept.report.trail.written
    assert written.bits
    again = quantized(
        options={"bits": written.bits, "exclude": written.exclude, "rotate": False, "equalize": False}
    )
    assert of_file(again) == pytest.approx(written.score, abs=1e-3)


def test_a_limit_that_is_met_at_once_changes_nothing():
    plain, kept = quantized(), quantized(evaluate=closeness, max_drop=10)
    assert kept.model.SerializeToString() == plain.model.SerializeToString()


def test_lower_is_better():
    kept = quantized(evaluate=lambda m: 1 - closeness(m), higher_is_better=False, max_drop=0.01)
    assert kept.report.trail.reached
    assert kept.report.trail.written.score <= 0.01 + kept.report.trail.float_score


def test_what_is_not_reached_is_told_and_the_best_is_written():
    best = []

    def never(model):
        best.append(closeness(model))
        return 1.0 if len(best) == 1 else best[-1] / 2

    found = quantized(evaluate=never, max_drop=0.01, max_evaluations=5)
    trail = found.report.trail
    assert not trail.reached
    assert 3 <= trail.evaluations == len(best) <= 5
    assert trail.written.drop == min(a.drop for a in trail.attempts)
    assert of_file(found) == pytest.approx(max(best[1:]), abs=1e-4)
    assert "misses its limit" in found.report.to_markdown()


@pytest.mark.parametrize(("score", "message"), [
    (lambda model: 1 / 0, "evaluate gives no score: <lambda> fails with ZeroDivisionError"),
    (lambda model: float("nan"), "<lambda> returns nan, and a score is a finite number"),
    (lambda model: "good", "<lambda> returns 'good', and a score is"),
    ("test_control_nowhere:score", "there is no module test_control_nowhere"),
])  # fmt: skip
def test_a_function_without_a_score_is_told(score, message):
    with pytest.raises(eptq_onnx.EptqError, match=message):
        quantized(evaluate=score)


@pytest.mark.parametrize(("options", "message"), [
    ({"max_drop": 0.1}, "max_drop needs something that scores"),
    ({"evaluate": closeness, "max_drop": "x%"}, "write an amount such as 0.005, or a share such as 1%"),
    ({"evaluate": closeness, "max_drop": -1}, "max_drop"),
    ({"evaluate": closeness, "max_evaluations": 2}, "max_evaluations"),
    ({"evaluate": "score"}, "write it as module:function"),
    ({"evaluate": closeness, "max_drop": 0.1, "options": {"budget": "weights=4"}}, "leave one of them out"),
    (
        {"evaluate": closeness, "max_drop": 0.1, "options": {"budget": "activations=6", "target": "ort-x64"}},
        "leave one of them out",
    ),
])  # fmt: skip
def test_wrong_options_are_told(options, message):
    with pytest.raises(ConfigError, match=message):
        quantized(**options)


def test_the_optimization_runs_for_the_file_that_is_written():
    options = {"preset": "balanced", "steps": 3, "weight_bits": 3, "edge_bits": 3, "activation_bits": 4}
    kept = quantized(evaluate=closeness, max_drop=0.01, options=options)
    trail = kept.report.trail
    assert kept.report.optimization is not None
    assert of_file(kept) == pytest.approx(trail.written.score, abs=1e-4)
    assert [a.what for a in trail.attempts].count("optimized") <= 1


def test_a_workdir_takes_candidates_up_again(tmp_path):
    seen = []

    def stops(model):
        seen.append(closeness(model))
        if len(seen) == 3:
            raise KeyboardInterrupt
        return seen[-1]

    options = {"workdir": tmp_path / "w"}
    with pytest.raises(KeyboardInterrupt):
        quantized(evaluate=stops, max_drop=0.001, options=options)
    found = quantized(evaluate=closeness, max_drop=0.001, options=options)
    whole = quantized(evaluate=closeness, max_drop=0.001)
    assert found.model.SerializeToString() == whole.model.SerializeToString()
    assert any("taken from the workdir" in n for n in found.report.notes)


@pytest.fixture
def files(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    onnx.save(small_convnet(), "m.onnx")
    np.savez("data.npz", image=images(48))
    np.save("held.npy", HELD)
    np.save("reference.npy", REFERENCE)
    (tmp_path / "closeness_metric.py").write_text(
        "import numpy as np\n"
        "def score(model):\n"
        "    got = model({'image': np.load('held.npy')})['logits']\n"
        "    reference = np.load('reference.npy')\n"
        "    return 1 - np.square(got - reference).mean() / reference.var()\n"
    )
    return ["quantize", "m.onnx", "--data", "data.npz", "--bits", "w2a8", "--edge-bits", "2", "--preset", "fast",
            "--target", "ort-x64", "--evaluate", "closeness_metric:score", "-o", "q.onnx", "--json"]  # fmt: skip


def test_the_command_keeps_the_score_and_its_report_leads_there_again(files):
    result = CliRunner().invoke(app, [*files, "--max-drop", "2%", "--report", "r.json"])
    assert result.exit_code == 0, result.stderr
    found = json.loads(result.stdout)
    assert found["trail"]["reached"]
    assert found["config"]["evaluate"] == "closeness_metric:score"
    first = Path("q.onnx").read_bytes()
    again = ["quantize", "m.onnx", "--data", "data.npz", "--config", "r.json", "-o", "again.onnx", "--json"]
    assert CliRunner().invoke(app, again).exit_code == 0
    assert Path("again.onnx").read_bytes() == first


def test_the_exit_code_is_1_where_the_limit_is_missed(files):
    missed = [*files, "--lower-is-better", "--max-drop", "0", "--max-evaluations", "4"]
    # Of a closeness, lower is worse: whatever is quantized keeps this.
    assert CliRunner().invoke(app, missed).exit_code == 0
    missed = [*files, "--max-drop", "0", "--max-evaluations", "4"]
    result = CliRunner().invoke(app, missed)
    assert result.exit_code == 1
    assert not json.loads(result.stdout)["trail"]["reached"]
    onnx.checker.check_model("q.onnx")


def test_the_engine_is_not_needed_to_search_where_nothing_is_optimized(monkeypatch):
    monkeypatch.setattr(engines, "choose", lambda name: None)
    assert quantized(evaluate=closeness, max_drop=0.01).report.trail.reached


TEXT = """
g (float[N,5,16] x) => (float[N,5,16] y) {
    h = MatMul (x, w1)  b = Add (h, b1)  r = Relu (b)  f = MatMul (r, w2)  y = Add (f, x)
}
"""


def test_inputs_with_ranges_of_each_run_are_spared():
    # One channel is always loud: it changes no output, and 8 bits do not hold the others beside it. The weights
    # behind it are on the grid.
    w2 = np.where(normal(32, 16, seed=2) > 0, 0.25, -0.25).astype(np.float32)
    w2[0] = 0.25
    offset = np.zeros(32, np.float32)
    offset[0] = 300
    model = parse(TEXT, {"w1": normal(16, 32, seed=1, scale=0.3), "w2": w2, "b1": offset})
    held = normal(16, 5, 16, seed=7, scale=1.0)
    exact = Session(model).run({"x": held})["y"]

    def score(given) -> float:
        got = np.concatenate([given.run(["y"], {"x": held[k : k + 1]})[0] for k in range(len(held))])
        return float(1 - np.square(got - exact).mean() / exact.var())

    data = {"x": normal(64, 5, 16, seed=8, scale=1.0)}
    config = Config(activations="dynamic", preset="fast", max_noise=0)
    kept = eptq_onnx.quantize(model, data, config, progress=silent, evaluate=score, max_drop=0.001)
    trail = kept.report.trail
    assert trail is not None
    assert not trail.attempts[0].passed
    assert trail.reached
    assert trail.evaluations <= 4
    assert trail.written.bits == ("MatMul_3=w8a32",)
    assert [layer.activation_bits for layer in kept.report.layers] == [8, 32]
