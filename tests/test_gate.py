"""What `verify` finds out, and what makes it fail, by the function and by the command."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import pytest
from graphs import images, silent, small_convnet
from onnx import numpy_helper
from typer.testing import CliRunner

import eptq_onnx
from eptq_onnx import CapabilityError, Config, ConfigError, DataError, Gate, ModelError, gate, targets
from eptq_onnx.cli import app
from eptq_onnx.outcome import Pace, Speed
from eptq_onnx.runtimes import tensorrt_rtx

pytestmark = pytest.mark.once
HEAD = 'name = "mine"\ntitle = "Mine"\nextends = "ort-x64"\n'
SPEED = Speed(Pace.SLOWER, 0.002, 0.004, 2.0, 1.9, 2.1, 10, 1)


@pytest.fixture(scope="module")
def quantized() -> onnx.ModelProto:
    config = Config(preset="fast", target="ort-x64")
    return eptq_onnx.quantize(small_convnet(), {"image": images()}, config, progress=silent).model


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, quantized: onnx.ModelProto) -> Path:
    monkeypatch.chdir(tmp_path)
    onnx.save(small_convnet(), "f.onnx")
    onnx.save(quantized, "q.onnx")
    np.savez("data.npz", image=images(8, seed=9))
    return tmp_path


def verify(target: str = "ort-x64", name: str = "q.onnx", **required):
    return eptq_onnx.verify("f.onnx", name, "data.npz", target, Gate(**{"seconds": 0, **required}))


def test_a_good_file_passes_and_all_is_known(folder):
    found = verify(min_sqnr=15, seconds=0.1)
    assert found.passed
    assert found.lint.findings == ()
    assert found.samples == 8
    assert found.computed_by.startswith("onnxruntime ")
    [(name, statistics)] = found.outputs.items()
    assert name == "logits"
    assert statistics.samples == 8
    assert statistics.sqnr_db > 15
    assert found.kernels["Conv"] == {"uint8": 3}
    assert found.speed is not None
    assert found.unavailable == ()


def test_outputs_are_those_of_the_samples(folder):
    exact, rounded = (
        eptq_onnx.runtimes.make().run(onnx.load(f"{n}.onnx"), {"image": images(8, seed=9)}) for n in "fq"
    )
    noise = np.square(exact["logits"] - rounded["logits"]).sum()
    expected = 10 * np.log10(np.square(exact["logits"]).sum() / noise)
    assert verify().outputs["logits"].sqnr_db == pytest.approx(expected, abs=0.01)
    assert verify(samples=3).samples == 3


def test_too_much_noise_fails(folder):
    found = verify(min_sqnr=90)
    assert not found.passed
    assert found.failures == (
        f"the output logits has {found.outputs['logits'].sqnr_db:.2f} dB, less than 90 dB",
    )


@pytest.mark.parametrize(("strict", "change", "failure"), [
    (False, None, ()),
    (False, "error", ("the rules of ort-x64 find 1 error: zero-point",)),
    (False, "warning", ()),
    (True, "warning", ("the rules of ort-x64 find 1 warning: weight-range",)),
])  # fmt: skip
def test_broken_rules_fail(folder, strict, change, failure):
    model = onnx.load("q.onnx")
    reads = {o: n for n in model.graph.node for o in n.output}
    conv = next(n for n in model.graph.node if n.op_type == "Conv")
    place = {"error": 2, "warning": 0, None: 0}[change]
    tensor = next(t for t in model.graph.initializer if t.name == reads[conv.input[1]].input[place])
    own, value = f"{tensor.name}_own", numpy_helper.to_array(tensor)
    if change == "error":
        value = value + np.int8(1)
    if change == "warning":
        value = np.where(value == value.max(), np.int8(127), value)
    model.graph.initializer.append(numpy_helper.from_array(value, own))
    reads[conv.input[1]].input[place] = own
    onnx.save(model, "changed.onnx")
    assert verify(name="changed.onnx", strict=strict).failures == failure


@pytest.mark.parametrize(("most", "passed"), [(None, True), (1.95, True), (1.85, False), (3, True)])
def test_a_slow_file_fails_if_the_whole_interval_is_beyond_the_limit(folder, monkeypatch, most, passed):
    monkeypatch.setattr(gate, "latency", lambda *_: SPEED)
    found = verify(seconds=0.1, max_slowdown=most)
    assert found.speed == SPEED
    assert found.passed == passed
    if not passed:
        assert found.failures == ("one run takes 2.00 times as long as the float model's, more than 1.85",)


def test_a_score_is_that_of_the_users_function(folder):
    seen = []

    def score(model):
        [outputs] = [model({"image": images(4, seed=1)})["logits"]]
        seen.append(outputs)
        return len(seen) / 2

    found = verify(evaluate=score, min_score=0.6)
    assert (found.score, found.float_score) == (0.5, 1.0)
    assert found.failures == ("the score is 0.5, less than 0.6",)
    exact = eptq_onnx.runtimes.make().run(small_convnet(), {"image": images(4, seed=1)})["logits"]
    np.testing.assert_allclose(seen[1], exact, rtol=1e-4, atol=1e-5)
    assert not np.allclose(seen[0], exact, rtol=1e-4, atol=1e-5)
    assert verify(evaluate=lambda model: 0.7, min_score=0.6).passed


def test_nan_is_no_score(folder):
    scores = iter([float("nan"), 0.5])
    found = verify(evaluate=lambda model: next(scores))
    assert not found.passed
    assert found.failures == ("the score is nan, where the float model's is 0.5",)
    with pytest.raises(eptq_onnx.ConfigError, match="returns nan, and a score is a finite number"):
        verify(evaluate=lambda model: float("nan"))


@pytest.mark.parametrize(
    ("evaluate", "sentence"),
    [
        (lambda model: "good", "evaluate gives no score: <lambda> returns 'good', and a score"),
        (lambda model: model({"picture": images(1)}), "input"),
        (
            lambda model: 1 / 0,
            r"evaluate gives no score: <lambda> fails with ZeroDivisionError: division by zero \(",
        ),
    ],
)
def test_what_gives_no_score_is_told(folder, evaluate, sentence):
    with pytest.raises(eptq_onnx.EptqError, match=sentence):
        verify(evaluate=evaluate)


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"min_score": 1}, "min_score needs something that scores"),
        ({"max_slowdown": 0}, "option max_slowdown=0 is wrong"),
        ({"max_slowdown": 2, "seconds": 0}, "max_slowdown needs a measurement"),
        ({"colour": 2}, "option colour is unknown"),
    ],
)
def test_gates_that_make_no_sense_are_told(options, sentence):
    with pytest.raises(ConfigError, match=sentence):
        Gate(**options)


# ---- runtimes that are there, or not -----------------------------------------------------------------------
def test_a_target_without_a_runtime_is_not_counted_in_the_name_of_another(folder, tmp_path):
    (tmp_path / "mine.toml").write_text(HEAD + 'verifier = "none"\n')
    found = verify("mine.toml", seconds=0.1)
    assert found.passed
    assert found.kernels == {}
    assert found.speed is None
    assert found.unavailable == ("kernels and speed: the target mine names no runtime",)
    assert found.computed_by.endswith("with the operators as ONNX defines them and no integer kernels")
    with pytest.raises(CapabilityError, match="max_slowdown cannot be checked"):
        verify("mine.toml", max_slowdown=2, seconds=0.1)


def test_a_runtime_that_is_missing_is_said(folder, tmp_path, monkeypatch):
    reason = "tensorrt-rtx is not installed: install it."
    monkeypatch.setattr(tensorrt_rtx.TensorRtRtx, "available", classmethod(lambda cls: reason))
    found = verify("tensorrt")
    assert found.unavailable == (f"what the runtime of tensorrt does: {reason[:-1]}",)
    assert not found.passed  # its biases are integers
    assert found.kernels == {}


def test_a_runtime_that_only_builds_counts_kernels_and_runs_nothing(folder, monkeypatch):
    monkeypatch.setattr(tensorrt_rtx.TensorRtRtx, "available", classmethod(lambda cls: None))
    kernel = eptq_onnx.runtimes.base.Kernel("n", "conv", "Conv", "int8")
    monkeypatch.setattr(tensorrt_rtx.TensorRtRtx, "kernels", lambda *_: (kernel,))
    found = verify("tensorrt")
    assert found.kernels == {"Conv": {"int8": 1}}
    assert any("outputs in the runtime of tensorrt" in why for why in found.unavailable)
    assert "as ONNX defines them" in found.computed_by


def test_a_file_that_the_runtime_rejects_fails(folder, monkeypatch):
    monkeypatch.setattr(tensorrt_rtx.TensorRtRtx, "available", classmethod(lambda cls: None))

    def refuse(*_):
        raise ModelError("TensorRT-RTX's parser refuses the model: no.")

    monkeypatch.setattr(tensorrt_rtx.TensorRtRtx, "kernels", refuse)
    assert "TensorRT-RTX's parser refuses the model: no" in verify("tensorrt").failures


@pytest.mark.parametrize("target", [n for n in targets.names() if targets.load(n).verifier == "reference"])
def test_the_reference_evaluator_runs_files_of_targets_without_a_runtime(folder, target):
    rules = targets.load(target)
    model = small_convnet(batch=1) if rules.shapes == "static" else small_convnet()
    onnx.save(model, "f.onnx")
    config = Config(preset="fast", target=target)
    eptq_onnx.quantize(model, {"image": images()}, config, progress=silent).save("own.onnx")
    found = verify(target, "own.onnx", min_sqnr=8)
    assert found.passed, found.failures
    assert found.computed_by == f"reference {onnx.__version__}"
    assert any(
        why.startswith("kernels: onnx's reference evaluator has no kernels") for why in found.unavailable
    )


# ---- files and data that do not fit ------------------------------------------------------------------------
def test_files_of_two_models_are_told(folder):
    other = onnx.load("q.onnx")
    for node in other.graph.node:
        node.output[:] = ["scores" if o == "logits" else o for o in node.output]
    other.graph.output[0].name = "scores"
    onnx.save(other, "other.onnx")
    with pytest.raises(ModelError, match=r"other.onnx has no output logits: give two files of one model"):
        verify(name="other.onnx")


def test_too_few_samples_are_told(folder):
    onnx.save(small_convnet(batch=16), "f.onnx")
    with pytest.raises(eptq_onnx.EptqError, match="16"):
        verify()


def test_random_models_are_refused(folder):
    model = small_convnet()
    logits = next(n for n in model.graph.node if "logits" in n.output)
    logits.output[0] = "plain"
    model.graph.node.append(onnx.helper.make_node("RandomNormalLike", ["plain"], ["noise"]))
    model.graph.node.append(onnx.helper.make_node("Add", ["plain", "noise"], ["logits"]))
    onnx.save(model, "f.onnx")
    with pytest.raises(ModelError, match="draws random numbers"):
        verify()


# ---- the command -------------------------------------------------------------------------------------------
def invoke(*arguments: str):
    own = ("f.onnx", "q.onnx", "--data", "data.npz", "--target", "ort-x64", "--seconds", "0")
    return CliRunner().invoke(app, ["verify", *own, *arguments], env={"COLUMNS": "200"})


@pytest.mark.parametrize(
    ("arguments", "code", "shown"),
    [
        ((), 0, "passed"),
        (("--min-sqnr", "10"), 0, "passed"),
        (("--min-sqnr", "90"), 1, "failed: the output logits has"),
        (("--evaluate", "own_score:high", "--min-score", "0.5"), 0, "score: 0.75, float model: 0.75"),
        (
            ("--evaluate", "own_score:high", "--min-score", "0.8"),
            1,
            "failed: the score is 0.75, less than 0.8",
        ),
    ],
)
def test_the_exit_code_is_that_of_the_gate(folder, arguments, code, shown):
    Path("own_score.py").write_text("def high(model):\n    return 0.75\n")
    result = invoke(*arguments)
    assert result.exit_code == code, result.output
    assert shown in result.stdout
    assert "q.onnx for ort-x64: 0 errors and 0 warnings" in result.stdout


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (("--evaluate", "nowhere:high"), "the function nowhere:high: there is no module nowhere"),
        (("--min-score", "0.5"), "min_score needs something that scores"),
        (("--target", "tpu"), "target 'tpu' is unknown"),
        (("--data", "missing.npz"), "missing.npz"),
        (("--target", "portable", "--max-slowdown", "2", "--seconds", "1"), "max_slowdown cannot be checked"),
    ],
)
def test_what_cannot_be_checked_is_one_sentence_and_code_2(folder, arguments, sentence):
    if "portable" in arguments:
        config = Config(preset="fast", target="portable")
        eptq_onnx.quantize(small_convnet(), {"image": images()}, config, progress=silent).save("q.onnx")
    result = invoke(*arguments)
    assert result.exit_code == 2, result.output
    assert sentence in " ".join(result.stderr.split())


def test_json_holds_everything(folder):
    result = invoke("--json", "--min-sqnr", "90")
    assert result.exit_code == 1
    content = json.loads(result.stdout)
    assert content["passed"] is False
    assert content["outputs"]["logits"]["samples"] == 8
    assert content["lint"]["target"] == "ort-x64"
    assert len(content["failures"]) == 1


def test_infinite_ratios_are_null_in_json(folder):
    found = verify()
    same = replace(found.outputs["logits"], sqnr_db=float("inf"))
    content = json.loads(replace(found, outputs={"logits": same}).to_json())
    assert content["outputs"]["logits"]["sqnr_db"] is None
    assert content["passed"] is True


def test_the_function_is_found_only_in_modules(folder):
    Path("other_score.py").write_text("def high(model):\n    return 0.75\n")
    with pytest.raises(DataError, match="has no function missing"):
        verify(evaluate="other_score:missing")
