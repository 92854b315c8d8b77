from __future__ import annotations

from functools import partial
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from graphs import images, normal, parse, silent

import eptq_onnx
from eptq_onnx import Config, data, targets
from eptq_onnx.data.samples import Selection
from eptq_onnx.method.calibrate import calibrate
from eptq_onnx.method.float_fallback import _spoilers, sensitive_activations
from eptq_onnx.method.normalize import normalize
from eptq_onnx.method.plan import plan
from eptq_onnx.numerics import quant_math
from eptq_onnx.passes.base import State
from eptq_onnx.passes.plans import with_activations
from eptq_onnx.records import Network
from eptq_onnx.runtime import Session

DEPTH = 12

AS_IT_IS: Any = SimpleNamespace(executed=lambda written, read_as: written)
"""Part of a context that returns what the samples run of a model: here, all of it."""


def unbalanced():
    """Return a chain with one channel a thousand times larger than the others, which nothing reads."""
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
def case():
    model = normalize(unbalanced(), 13)
    p = plan(model, targets.load("ort-x64"), Config())
    samples = data.read(images(16), model)
    return model, p, samples, calibrate(model, p, samples, Config(), silent)


def found(case, **options):
    model, p, samples, calibration = case

    quantized = partial(with_activations, State(model, model, p, calibration), AS_IT_IS)

    return sensitive_activations(
        Network(model, p, calibration),
        quantized,
        Selection(samples, np.arange(16)),
        Config(**options),
        silent,
    ).loud


def test_the_unbalanced_tensor_is_found(case):
    ratio = found(case, max_noise=0.1)
    assert max(ratio, key=lambda t: ratio[t]) == "a5"
    assert len(ratio) <= 2
    assert min(ratio.values()) > 0.1
    assert not found(case, max_noise=0)


def test_the_ratio_is_the_error_of_the_outputs_in_units_of_their_spread(case):
    model, p, samples, calibration = case
    alone, read_as = with_activations(State(model, model, p, calibration), AS_IT_IS, ["a5"])
    feeds, output = samples.take(range(16)), f"r{DEPTH - 1}"
    exact, got = (
        Session(m).run(feeds)[name] for m, name in ((model, output), (alone, read_as.get(output, output)))
    )
    assert found(case, max_noise=0.1)["a5"] == pytest.approx(
        np.square(exact - got).mean() / exact.var(), rel=1e-3
    )


def test_some_layer_is_quantized_whatever_the_noise():
    weight, x = normal(4, 3, 1, 1), normal(16, 3, 4, 4)
    weight[:, 0], x[:, 0] = 0, 2000 * x[:, 0]
    model = parse("g (float[N,3,4,4] x) => (float[N,4,4,4] y) { y = Conv (x, w) }", {"w": weight})
    result = eptq_onnx.quantize(model, {"x": x}, Config(preset="fast", equalize=False))
    assert len(result.report.layers) == 1
    assert result.report.verification.outputs["y"] < 3


class Noise:
    """Noise of groups as the sum of their members; counts its runs."""

    def __init__(self, ratio):
        self.ratio, self.runs = ratio, 0

    def __call__(self, names):
        self.runs += 1
        return sum(self.ratio[n] for n in names)


LOUD = {"q40": 0.5, "q41": 0.2, "q90": 0.04}
RATIO = {f"q{k}": LOUD.get(f"q{k}", 1e-4) for k in range(128)}


def test_quiet_quantizers_take_one_run():
    noise = Noise(RATIO)
    assert _spoilers(list(RATIO), noise, 1.0).loud == {}
    assert noise.runs == 1


@pytest.mark.parametrize(
    ("most", "names"),
    [(0.3, ["q40"]), (0.1, ["q40", "q41"]), (0.02, ["q40", "q41", "q90"]), (1e-6, ["q40", "q41", "q90"])],
)
def test_the_noisiest_go_until_the_rest_keep_within_the_limit_or_none_stands_out(most, names):
    noise = Noise(RATIO)
    assert _spoilers(list(RATIO), noise, most).loud == {n: RATIO[n] for n in names}
    assert noise.runs < 64


def test_noise_all_over_names_nobody():
    even = {f"q{k}": 0.01 + 0.001 * (k % 7) for k in range(100)}
    assert _spoilers(list(even), Noise(even), 0.1).loud == {}


def test_no_more_are_named_than_it_takes_where_noise_does_not_add_up():
    # Together only the noisiest shows: alone all three stand out, and without the first the others are quiet
    # enough.
    def noise(names):
        return max(
            [*({"q3": 0.6, "q17": 0.09, "q25": 0.08}.get(n, 0.0001) for n in names), 0.0]
        ) + 0.0001 * len(names)

    names = [f"q{k}" for k in range(32)]
    assert list(_spoilers(names, noise, 0.1).loud) == ["q3"]


def test_an_overflow_counts_as_the_loudest():
    def noise(names):
        return 1e30 if {"q5", "q50"} & set(names) else 0.0001 * len(names)

    assert set(_spoilers([f"q{k}" for k in range(64)], noise, 0.1).loud) == {"q5", "q50"}


def test_it_stays_float_with_the_reason_and_the_outputs_are_saved(case):
    model = case[0]
    # Equalization would scale the large channel down.
    options: dict[str, Any] = {"preset": "fast", "start": "nearest", "equalize": False}
    results = {
        m: eptq_onnx.quantize(unbalanced(), images(16), Config(max_noise=m, **options)) for m in (0.0, 0.1)
    }
    reasons = {k.node: k.reason for k in results[0.1].report.kept_float}
    assert any("alone would cause noise" in r for r in reasons.values())
    assert len(results[0.1].report.layers) >= DEPTH - 3
    fresh = {"x": images(8, seed=5)}
    expected = Session(model).run(fresh)
    ratio = {}
    for m, result in results.items():
        got = Session(result.model).run(fresh)
        ratio[m] = quant_math.sqnr_db(
            *(
                float(np.square(v).sum())
                for v in (
                    next(iter(expected.values())),
                    next(iter(expected.values())) - next(iter(got.values())),
                )
            )
        )
    assert ratio[0.1] > ratio[0.0] + 6


def test_a_workdir_keeps_what_stays_float(tmp_path):
    options: dict[str, Any] = {
        "preset": "fast",
        "start": "nearest",
        "equalize": False,
        "measure_speed": False,
    }
    config = Config(max_noise=0.1, target="ort-x64", workdir=tmp_path / "w", **options)
    first, again = (eptq_onnx.quantize(unbalanced(), images(16), config) for _ in range(2))
    assert any("alone would cause noise" in k.reason for k in first.report.kept_float)
    assert any("float fallback" in note for note in again.report.notes), "taken from the workdir"
    assert first.model.SerializeToString() == again.model.SerializeToString()


def test_a_prescribed_batch_larger_than_what_is_run_is_run_once():
    model = unbalanced()
    for value in (model.graph.input[0], model.graph.output[0]):
        value.type.tensor_type.shape.dim[0].dim_value = 24
    result = eptq_onnx.quantize(
        model, images(24), Config(preset="fast", start="nearest", equalize=False, max_noise=0.1)
    )
    assert any("alone would cause noise" in k.reason for k in result.report.kept_float)
