"""Tensors that choices by value depend on stay float where that saves the outputs and costs little."""

from __future__ import annotations

import numpy as np
import pytest
from graphs import normal, parse, silent

import eptq_onnx
from eptq_onnx import Config, data
from eptq_onnx.execute.pairing import Pairing
from eptq_onnx.graph.branches import flattened
from eptq_onnx.method import choices as settle
from eptq_onnx.method.arrange import record
from eptq_onnx.method.normalize import normalize
from eptq_onnx.numerics.statistics import Comparison
from eptq_onnx.ops import executed

FAST = Config(preset="fast", measure_speed=False)
WIDTH, PLACES = 12, 32

CHOICES = {
    "TopK": """best = ReduceMax <axes = [2], keepdims = 0> (s)  v, i = TopK <axis = 1> (best, four)
        u = Unsqueeze (i, two)  t = Tile (u, rep)  q = GatherElements <axis = 1> (h, t)""",
    "ArgMax": "i = ArgMax <axis = 2, keepdims = 0> (s)  q = Gather (table, i)",
    "Hardmax": "r = Hardmax (s)  g = MatMul (r, table)  q = Mul (g, h)",
}


def chooser(kind: str, seed: int, *, behind: bool = True):
    """Dense layers score positions; the chosen ones pass through further layers, or not."""
    head = "d = MatMul (q, w3)  e = Relu (d)  y = MatMul (e, w4)" if behind else "y = Tanh (q)"
    text = f"""g (float[N,{PLACES},{WIDTH}] x) => (float[] y) {{
        a = MatMul (x, w0)  b = Relu (a)  h = MatMul (b, w1)  s = MatMul (h, w2)
        {CHOICES[kind]}  {head} }}"""
    sizes = [(WIDTH, 24), (24, WIDTH), (WIDTH, 6), (WIDTH, 24), (24, 4)]
    constants = {
        f"w{k}": normal(*size, seed=5 * seed + k, scale=size[0] ** -0.5) for k, size in enumerate(sizes)
    }
    constants |= {
        "four": np.array([4]),
        "two": np.array([2]),
        "rep": np.array([1, 1, WIDTH]),
        "table": normal(6, WIDTH, seed=seed, scale=2.0),
    }
    return parse(text, constants)


def ratios(model, quantized, feeds):
    """SQNR in dB about the mean, with the network's own choices and with those of the float network."""
    plain = normalize(model, 13)
    samples, found, _ = record(flattened(plain), data.read(feeds, model), seed=7)
    pairing = Pairing(plain, samples, [np.array([k]) for k in range(samples.count)], found)
    reference = list(pairing.outputs(executed(plain, found.draws)))
    both = []
    for replay in (found.draws, found):
        compared = Comparison()
        for pairs in pairing.pairs(reference, pairing.outputs(executed(quantized, replay))):
            compared.add(*pairs["y"])
        both.append(compared.result().centred_sqnr_db)
    return both


def samples_of(count: int, seed: int) -> dict[str, np.ndarray]:
    return {"x": normal(count, PLACES, WIDTH, seed=seed, scale=1.0)}


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("kind", CHOICES)
def test_own_choices_are_hardly_worse_than_those_of_the_float_network(kind, seed):
    model = chooser(kind, seed)
    result = eptq_onnx.quantize(model, samples_of(128, 100 + seed), FAST, progress=silent)
    own, followed = ratios(model, result.model, samples_of(128, 200 + seed))
    assert own > min(26, followed - 5)
    assert any("in front of choices by value stay float" in note for note in result.report.notes)
    assert any("would choose other rows" in k.reason for k in result.report.kept_float)
    assert result.report.layers, "what comes behind the choice is quantized"


@pytest.mark.parametrize("kind", CHOICES)
def test_where_the_path_is_most_of_a_large_network_a_note_says_what_choices_cost(kind, monkeypatch):
    monkeypatch.setattr(settle, "_FEW_MULTIPLICATIONS", 0)
    monkeypatch.setattr(settle, "_SHARE", 0.05)
    result = eptq_onnx.quantize(chooser(kind, 0), samples_of(128, 100), FAST, progress=silent)
    assert len(result.report.layers) >= 5
    assert any(
        "dB noisier than with those of the float model: the tensors that they depend on are most" in n
        for n in result.report.notes
    )


@pytest.mark.parametrize("kind", ["TopK", "ArgMax"])
def test_choices_that_nothing_is_computed_from_are_left_as_they_are(kind):
    result = eptq_onnx.quantize(chooser(kind, 0, behind=False), samples_of(64, 100), FAST, progress=silent)
    assert len(result.report.layers) == 3
    assert not any("choose other rows" in n for n in result.report.notes)


def test_choices_of_large_distance_are_left_as_they_are():
    model, given = chooser("ArgMax", 0), samples_of(64, 100)
    # Six clusters, each at its own position in the table.
    centres = normal(6, WIDTH, seed=9, scale=3.0)
    given["x"] = centres[np.random.default_rng(0).integers(6, size=(64, PLACES))] + 0.01 * given["x"]
    result = eptq_onnx.quantize(model, given, FAST, progress=silent)
    assert len(result.report.layers) == 5
    assert not any("choose other rows" in n for n in result.report.notes)
