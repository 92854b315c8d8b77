from __future__ import annotations

import numpy as np
import pytest
from graphs import images, normal, parse, silent

import eptq_onnx
from eptq_onnx import Config, data, quant_math, targets
from eptq_onnx.runtime import Session
from eptq_onnx.steps.calibrate import calibrate
from eptq_onnx.steps.guard import _spoilers, sensitive_activations
from eptq_onnx.steps.normalize import normalize
from eptq_onnx.steps.plan import plan
from eptq_onnx.steps.score import score

DEPTH = 12


def unbalanced():
    """A chain in which one tensor has a channel a thousand times louder than the others, that nobody listens to."""
    body, x = [], "x"
    constants = {}
    for k in range(DEPTH):
        body.append(f"a{k} = Conv ({x}, w{k})  r{k} = LeakyRelu (a{k})")
        constants[f"w{k}"] = normal(4, 3 if k == 0 else 4, 1, 1, seed=k, scale=0.8)
        x = f"r{k}"
    constants["w5"][0] *= 2000
    constants["w6"][:, 0] = 0
    return parse(f"g (float[N,3,8,8] x) => (float[N,4,8,8] r{DEPTH - 1}) {{ {'  '.join(body)} }}", constants)


@pytest.fixture(scope="module")
def case(engine):
    model = normalize(unbalanced(), 13)
    config = Config(batch_size=8, probes=4)
    p = plan(model, targets.load("ort-x64"), config)
    samples = data.read(images(16), model)
    calibration = calibrate(model, p, samples, config, silent)
    scores = score(model, p, samples, np.arange(16), calibration, set(), engine, config, silent)
    return model, p, samples, calibration, scores


def test_the_unbalanced_tensor_is_found(case):
    model, p, samples, calibration, scores = case
    found = sensitive_activations(model, p, samples, np.arange(16), calibration, scores, Config(max_noise=0.1))
    assert max(found, key=lambda t: found[t]) == "a5"
    assert len(found) <= 2
    assert min(found.values()) > 0.1
    assert not sensitive_activations(model, p, samples, np.arange(16), calibration, scores, Config(max_noise=0))


def test_the_noisiest_go_until_the_rest_keep_within_the_limit_or_none_stands_out():
    ratio = {"a": 0.5, "b": 0.2, "c": 0.04, **{f"quiet{k}": 0.001 for k in range(9)}}
    assert _spoilers(ratio, 1.0) == []
    assert _spoilers(ratio, 0.3) == ["a"]
    assert _spoilers(ratio, 0.1) == ["a", "b"]
    assert _spoilers(ratio, 1e-6) == ["a", "b", "c"]


def test_it_stays_float_with_the_reason_and_the_outputs_are_saved(case):
    model = case[0]
    # Equalization would quiet the loud channel.
    options = {"steps": 0, "start": "nearest", "equalize": False}
    results = {m: eptq_onnx.quantize(unbalanced(), images(16), Config.of(max_noise=m, **options)) for m in (0.0, 0.1)}
    reasons = {k.node: k.reason for k in results[0.1].report.kept_float}
    assert any("alone would cause noise" in r for r in reasons.values())
    assert len(results[0.1].report.layers) >= DEPTH - 3
    fresh = {"x": images(8, seed=5)}
    expected = Session(model).run(fresh)
    ratio = {}
    for m, result in results.items():
        got = Session(result.model).run(fresh)
        ratio[m] = quant_math.sqnr_db(
            *(float(np.square(v).sum()) for v in (next(iter(expected.values())), next(iter(expected.values())) - next(iter(got.values()))))
        )
    assert ratio[0.1] > ratio[0.0] + 6
