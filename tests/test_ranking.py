"""Parts of a network ranked by what they do to the outputs."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest
from graphs import images, normal, parse, silent, small_convnet
from hypothesis import given, settings
from hypothesis import strategies as st

import eptq_onnx
from eptq_onnx import Config, ConfigError, ModelError, ranking
from eptq_onnx.numerics.halving import alone

OPTIONS: dict[str, Any] = {
    "target": "ort-x64",
    "rotate": False,
    "equalize": False,
    "activations": "static",
}


def ranked(model, data=None, **options):
    config = Config(**{**OPTIONS, **options})
    return eptq_onnx.sensitivity(model, data or {"image": images(32)}, config, progress=silent)


def chain(factor: float):
    """Three products in a row; the rows of the middle one differ in size by a factor."""
    rows = np.where(np.arange(16) % 2, 1.0, factor).astype(np.float32)[:, None]
    text = "g (float[N,16] x) => (float[N,4] y) { a = MatMul (x, w1) b = Relu (a) c = MatMul (b, w2) y = MatMul (c, w3) }"
    return parse(text, {
        "w1": normal(16, 16, seed=1),
        "w2": normal(16, 16, seed=2) * rows,
        "w3": normal(16, 4, seed=3),
    })  # fmt: skip


def test_the_layer_with_fewest_bits_comes_first_and_its_option_spares_it():
    data = {"x": normal(64, 16, seed=9, scale=1.0)}
    model = chain(1)
    nodes = [p.nodes[0] for p in ranked(model, data).parts if p.what == "weights"]
    for node in nodes:
        found = ranked(model, data, bits=[f"{node}=w2a8"])
        loudest = found.parts[0]
        assert (loudest.name, loudest.what, loudest.bits) == (node, "weights", 2)
        assert loudest.option == f"--bits {node}=w8a8"
        spared = ranked(model, data, bits=[f"{node}=w8a8"])
        assert spared.total < found.total / 10
        assert loudest.left_db == pytest.approx(spared.sqnr_db, abs=1.5)


def test_an_activation_with_few_bits_is_spared_by_its_reader():
    data = {"x": normal(64, 16, seed=9, scale=1.0)}
    found = ranked(chain(1), data, activation_bits=3, edge_bits=3)
    loudest = next(p for p in found.parts if p.what == "activation")
    rule = loudest.option.removeprefix("--bits ").strip("'")
    assert rule.endswith("a8")
    spared = ranked(chain(1), data, activation_bits=3, edge_bits=3, bits=[rule])
    assert next(p for p in spared.parts if p.name == loudest.name).bits == 8
    assert spared.total < found.total


def test_a_tensor_stays_float_by_its_pattern():
    found = ranked(small_convnet())
    part = next(p for p in found.parts if p.what == "activation" and p.option.startswith("--exclude"))
    pattern = part.option.removeprefix("--exclude ").strip("'")
    assert pattern == f"tensor:{part.name}"
    spared = ranked(small_convnet(), exclude=[pattern])
    assert part.name not in {p.name for p in spared.parts}


def test_targets_with_16_bits_spare_activations_by_these():
    found = ranked(small_convnet("1"), target="qnn")
    assert {p.option.rpartition("=")[2] for p in found.parts if p.what == "activation"} == {"w8a16"}


def test_a_tensor_that_does_not_exist_is_told():
    with pytest.raises(ConfigError, match=r"there is no tensor 'a7' .*similar names: .*a1"):
        ranked(small_convnet(), exclude=["tensor:a7"])


def test_groups_are_told_as_louder_than_their_parts():
    # Two branches with the same weights: their errors add up as amplitudes, not as powers.
    w = normal(16, 4, seed=3)
    model = parse(
        "g (float[N,16] x) => (float[N,4] y)"
        "{ h = Gemm (x, w0) z = Relu (h) a = MatMul (z, w1) b = MatMul (z, w2) y = Add (a, b) }",
        {"w0": np.eye(16, dtype=np.float32), "w1": w, "w2": w.copy()},
    )
    found = ranked(model, {"x": normal(64, 16, seed=9, scale=1.0)}, weight_bits=3, edge_bits=3)
    group = next(g for g in found.groups if g.pattern == "op:MatMul")
    own = [p.noise for p in found.parts if p.what == "weights" and p.operator == "MatMul"]
    assert found.weights == pytest.approx(4 * own[0], rel=0.1)
    assert group.hidden
    assert group.option == "--bits op:MatMul=w8a8"
    assert [g["hidden"] for g in json.loads(found.to_json())["groups"]] == [g.hidden for g in found.groups]


def test_the_passes_are_within_their_limit(monkeypatch):
    whole = ranked(small_convnet())
    assert whole.float_passes <= 60
    assert not [n for n in whole.notes if "too few" in n]
    monkeypatch.setattr(ranking, "MOST_PASSES", 3)
    some = ranked(small_convnet())
    assert some.float_passes < whole.float_passes
    assert {p.name for p in some.parts} == {p.name for p in whole.parts}
    assert [n for n in some.notes if "too few to measure" in n]


@settings(max_examples=50)
@given(st.lists(st.floats(0, 1), min_size=1, max_size=40), st.integers(1, 60))
def test_the_loudest_is_found_within_the_runs(noises, runs):
    noises = [n**4 for n in noises]
    calls = []

    def noise(pieces):
        calls.append(pieces)
        return sum(pieces)

    found = alone(noises, noise, runs)
    assert len(calls) <= max(runs, 1)
    assert sum(found) == pytest.approx(sum(noises))
    if runs >= len(noises):
        assert found == noises


def test_outputs_that_do_not_vary_are_told():
    model = parse(
        "g (float[N,16] x) => (float[N,4] y) { z = Relu (x) y = MatMul (z, w) }", {"w": normal(16, 4)}
    )
    with pytest.raises(ModelError, match="varies"):
        ranked(model, {"x": -np.ones((40, 16), np.float32)})


@pytest.mark.parametrize("budget", ["weights=4", "activations=6"])
def test_a_budget_is_refused(budget):
    with pytest.raises(ConfigError, match="leave the budget out"):
        ranked(small_convnet(), budget=budget)


# ---- ranges of each run ------------------------------------------------------------------------------------
BLOCK = """
g (float[N,5,16] x) => (float[N,5,16] y) {
    q = MatMul (x, wq)
    k = MatMul (x, wk)
    t = Transpose <perm = [0, 2, 1]> (k)
    s = MatMul (q, t)
    a = Softmax <axis = -1> (s)
    c = MatMul (a, x)
    f = MatMul (c, w1)
    g = Relu (f)
    h = MatMul (g, w2)
    y = Add (h, x)
}
"""


def block(loud: float = 1.0):
    """A layer of a transformer; the input of its last product has channels that are louder by a factor."""
    factors = np.where(np.arange(32) % 8, 1.0, loud).astype(np.float32)
    constants = {n: normal(16, 16, seed=k, scale=0.3) for k, n in enumerate(("wq", "wk"))}
    constants["w1"] = normal(16, 32, seed=5, scale=0.3) * factors
    constants["w2"] = normal(32, 16, seed=6, scale=0.3) / factors[:, None]
    return parse(BLOCK, constants)


TOKENS = {"x": normal(48, 5, 16, seed=9, scale=1.0)}


def test_inputs_with_ranges_of_each_run_are_ranked_and_their_option_spares_them():
    found = ranked(block(100), TOKENS, activations="dynamic", max_noise=0)
    inputs = {p.name: p for p in found.parts if p.what == "activation"}
    assert {p.nodes for p in inputs.values()} == {("MatMul_0", "MatMul_1"), ("MatMul_6",), ("MatMul_8",)}
    assert {p.bits for p in inputs.values()} == {8}
    loudest = max(inputs.values(), key=lambda p: p.noise)
    assert (loudest.nodes, loudest.option) == (("MatMul_8",), "--bits MatMul_8=w8a32")
    spared = ranked(block(100), TOKENS, activations="dynamic", max_noise=0, bits=["MatMul_8=w8a32"])
    assert loudest.name not in {p.name for p in spared.parts if p.what == "activation"}
    assert len([p for p in spared.parts if p.what == "weights"]) == 4
    assert loudest.left_db == pytest.approx(spared.sqnr_db, abs=2)


def test_an_input_that_layers_share_is_spared_for_all_of_them():
    found = ranked(block(), TOKENS, activations="dynamic")
    part = next(p for p in found.parts if p.nodes == ("MatMul_0", "MatMul_1") and p.what == "activation")
    assert part.option == "--bits MatMul_0=w8a32 --bits MatMul_1=w8a32"


def test_weights_of_dynamic_layers_get_bits_without_a_change_of_their_inputs():
    found = ranked(block(), TOKENS, activations="dynamic", bits=["MatMul_6=w2a8"])
    assert (found.parts[0].name, found.parts[0].option) == ("MatMul_6", "--bits MatMul_6=w8a8")
