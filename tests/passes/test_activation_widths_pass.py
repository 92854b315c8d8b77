"""Activations of two widths, chosen by a budget: the files, the report, and what is refused."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
import pytest
from graphs import images, known, silent, small_convnet
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from images import CHANNELS, SIZE, drawn_images
from onnx import ModelProto, numpy_helper
from onnx.reference import ReferenceEvaluator

from eptq_onnx import Config, ConfigError, Result, inspect, lint, quantize
from eptq_onnx.runtime import Session

FAST: dict[str, Any] = {"preset": "fast", "measure_speed": False}


@pytest.fixture(scope="module")
def digits(models_folder) -> tuple[ModelProto, dict[str, np.ndarray]]:
    """The network for one image at a time, as QNN needs it."""
    model = onnx.load(models_folder / "digits_mobile.onnx")
    for value in (*model.graph.input, *model.graph.output):
        value.type.tensor_type.shape.dim[0].dim_value = 1
    with np.load(models_folder / "digits_calib.npz") as file:
        return model, {name: file[name][:64] for name in file.files}


def quantized(digits: tuple[ModelProto, dict[str, np.ndarray]], config: Config) -> Result:
    model, samples = digits
    return quantize(model, samples, config, progress=silent)


def mean_of(found: Result) -> float:
    """The mean bits of an activation that were chosen."""
    [mean] = [known(p.activation_bits) for p in found.report.front if p.chosen]
    return mean


def pairs(model: ModelProto) -> dict[str, int]:
    """The types of pairs, and how many have each."""
    zeros = {t.name: numpy_helper.to_array(t).dtype.name for t in model.graph.initializer}
    types = [zeros[n.input[2]] for n in model.graph.node if n.op_type == "QuantizeLinear"]
    return {kind: types.count(kind) for kind in types}


def test_some_activations_of_16_bits_are_better_than_none(digits):
    results = {}
    cases: dict[str, dict[str, Any]] = {
        "8": {},
        "10": {"budget": "activations=10"},
        "12": {"budget": "activations=12"},
        "16": {"activation_bits": 16},
    }
    for name, options in cases.items():
        found = quantized(digits, Config(**FAST, target="qnn", **options))
        assert lint(found.model, "qnn").findings == ()
        results[name] = found
    sqnr = {name: r.report.verification.outputs["logits"] for name, r in results.items()}
    assert sqnr["8"] + 3 < sqnr["10"] < sqnr["12"] < sqnr["16"]
    for mean in (10, 12):
        found = results[f"{mean}"]
        assert mean - 1 < mean_of(found) <= mean
        assert {x.activation_bits for x in found.report.layers} == {8, 16}
        assert any(f"{mean_of(found):.2f} bits on average" in n for n in found.report.notes)
        assert set(pairs(found.model)) == {"uint8", "uint16"}
        assert {x.weight_bits for x in found.report.layers} == {8}


def test_the_file_gives_the_same_in_both_runtimes_and_every_time(digits):
    model, samples = digits
    config = Config(**FAST, target="qnn", budget=["activations=10", "weights=5"])
    first, second = (quantize(model, samples, config, progress=silent).model for _ in range(2))
    assert first.SerializeToString(deterministic=True) == second.SerializeToString(deterministic=True)
    feeds = {name: values[:1] for name, values in samples.items()}
    ours = Session(first, optimize=False).run(feeds)["logits"]
    [theirs] = map(np.asarray, ReferenceEvaluator(first).run(None, feeds))
    np.testing.assert_allclose(ours, theirs, rtol=1e-4, atol=float(np.abs(theirs).max()) / 100)


def test_weights_and_activations_share_a_limit_of_noise(digits):
    """Eight bits everywhere cause more than that."""
    options: dict[str, Any] = {**FAST, "target": "qnn", "objective": "bytes", "max_noise": 1.5e-4}
    with pytest.raises(ConfigError, match=r"max_noise=0\.00015"):
        quantized(digits, Config(**options))
    found = quantized(digits, Config(**options, budget="activations=13"))
    assert {x.activation_bits for x in found.report.layers} == {8, 16}
    [noise] = found.report.verification.outputs.values()
    assert noise > 35


def test_four_bits_where_they_are_asked_for(digits):
    found = quantized(digits, Config(**FAST, target="ort-x64-vnni", budget="activations=6"))
    narrow = quantized(digits, Config(**FAST, target="ort-x64-vnni", activation_bits=4))
    assert {x.activation_bits for x in found.report.layers} == {4, 8}
    ours, theirs = (r.report.verification.outputs["logits"] for r in (found, narrow))
    assert ours > theirs + 3
    assert 5 < mean_of(found) <= 6


@pytest.mark.parametrize(
    ("target", "mean", "sentence"),
    [
        ("ort-x64-vnni", 10, r"needs activations of 16 bits.*activation\.wide is false\): give less than 8"),
        ("tensorrt", 10, r"needs activations of 16 bits.*choose another target"),
        ("tensorrt", 6, r"needs activations of 4 bits.*activation\.narrow is false\): leave it out"),
        ("qnn", 6, r"needs activations of 4 bits.*give 8 or more"),
        ("qnn", 7.5, r"needs activations of 4 bits.*give 8 or more"),
        ("tensorrt-fp8", 8, "whose activations are all float8e4m3fn"),
    ],
)
def test_what_a_target_does_not_compute_is_refused_in_a_sentence(target, mean, sentence):
    with pytest.raises(ConfigError, match=sentence):
        quantize(small_convnet(1), {"image": images()}, Config(target=target, budget=f"activations={mean}"))


@pytest.mark.parametrize(
    "options",
    [{"bits": "op:Conv=w8a16"}, {"activation_bits": 32}, {"activations": "dynamic"}],
    ids=str,
)
def test_options_that_contradict_a_budget_are_refused(options):
    with pytest.raises(ConfigError, match="a budget of activations"):
        Config(budget="activations=10", **options)


def test_a_mean_below_the_fewest_bits_is_refused():
    config = Config(**FAST, target="ort-x64-vnni", budget="activations=3")
    with pytest.raises(ConfigError, match=r"activations=3 cannot be met.*take activations=4"):
        quantize(small_convnet(), {"image": images()}, config, progress=silent)


def test_inspect_takes_the_budget():
    found = inspect(small_convnet(1), Config(target="qnn", budget="activations=10"))
    assert "--budget activations=10" in found.command


@settings(max_examples=8, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(drawn_images(), st.sampled_from(["activations=9", "activations=12"]))
def test_drawn_networks_have_activations_of_two_widths(model, budget):
    samples = np.random.default_rng(0).normal(size=(24, CHANNELS, SIZE, SIZE)).astype(np.float32)
    config = Config(**FAST, target="qnn", budget=budget)
    found = quantize(model, samples, config, progress=silent)
    # Sizes are open here.
    assert {f.rule for f in lint(found.model, "qnn").findings} <= {"static"}
    assert 8 <= mean_of(found) <= float(budget.partition("=")[2]) + 1e-6
    plain = quantize(model, samples, Config(**FAST, target="qnn"), progress=silent)
    noise = [
        np.mean([10 ** (-db / 10) for db in r.report.verification.outputs.values()]) for r in (found, plain)
    ]
    assert noise[0] <= 1.5 * noise[1]


def test_a_workdir_takes_the_widths_up_again(tmp_path):
    config = Config(**FAST, target="qnn", budget="activations=11", workdir=tmp_path)
    first, second = (
        quantize(small_convnet(1), {"image": images()}, config, progress=silent) for _ in range(2)
    )
    assert any("from the workdir" in note and "allocate" in note for note in second.report.notes)
    assert first.model.SerializeToString(deterministic=True) == second.model.SerializeToString(
        deterministic=True
    )
    assert first.report.front == second.report.front
