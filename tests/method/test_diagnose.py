"""The few members of a group that cause most of its noise; histograms; parts of a plan."""

from __future__ import annotations

import numpy as np
import pytest
from graphs import small_convnet

from eptq_onnx import Config, targets
from eptq_onnx.graph.view import GraphView
from eptq_onnx.method import diagnose
from eptq_onnx.method.diagnose import loudest, only_weights, readers
from eptq_onnx.method.normalize import normalize
from eptq_onnx.method.plan import plan


def search(noises: dict[str, float]) -> tuple[dict[str, float], int]:
    runs = []

    def noise(some):
        runs.append(some)
        return sum(noises[name] for name in some)

    return loudest(list(noises), sum(noises.values()), noise), len(runs)


def test_one_loud_member_is_found_by_halving():
    noises = {f"n{k}": 0.01 for k in range(64)} | {"n37": 2.0}
    found, runs = search(noises)
    assert found == pytest.approx({"n37": 2.0 / 2.63})
    assert runs == 9, "one for each halving where the second half is louder, else two"


def test_several_are_told_loudest_first_and_no_more_than_needed():
    noises = {f"n{k}": 0.01 for k in range(16)} | {"n3": 1.0, "n4": 0.8, "n11": 0.7}
    found, _ = search(noises)
    assert list(found) == ["n3", "n4"]
    assert sum(found.values()) == pytest.approx(1.8 / 2.63)


def test_evenly_spread_noise_has_no_loud_members_and_the_search_ends():
    found, runs = search({f"n{k}": 1.0 for k in range(100)})
    assert found == {}
    assert runs <= 16
    assert search({"a": 1.0, "b": 1.0}) == ({}, 0), "a member of two is no small part"
    assert loudest([], 0.0, lambda some: 0.0) == {}
    assert loudest(list("abcdefgh"), 0.0, lambda some: 0.0) == {}


def test_plans_of_weights_alone():
    model = normalize(small_convnet(), 13)
    whole = plan(model, targets.load("ort-x64"), Config())
    alone = only_weights(whole)
    assert alone.layers == whole.layers
    assert not alone.activations
    assert not alone.absorbed
    assert alone.bias is None
    [first, *_] = whole.layers
    assert only_weights(whole, [first.node]).layers == (first,)
    read = readers(whole, GraphView(model))
    assert read[whole.quantizer_of[first.input].name] == (first.node,)
    assert any(len(nodes) > 1 for nodes in read.values()), "the residual connection has two readers"


def test_histograms_count_what_lies_outside_the_range():
    values = np.array([-1.0, 0.0, 0.5, 1.0, 3.0, np.nan, 0.5, 0.5], np.float32)
    found = diagnose._histogram("n", "input", values, (0.0, 2.0), 0.01)
    assert (found.low, found.high) == (-1.0, 3.0)
    assert sum(found.counts) == 7
    assert found.outside == pytest.approx(2 / 7)
    weights = diagnose._histogram("n", "weights", np.array([-8.4, 7.6, 0.0, 0.0]), (-8.0, 7.0), 1.0)
    assert weights.outside == 0.25, "less than half a step is rounded, not clipped"
    near = diagnose._histogram("n", "input", np.array([-0.04, 1.04, 1.06], np.float32), (0.0, 1.0), 0.1)
    assert near.outside == pytest.approx(1 / 3)
    empty = diagnose._histogram("n", "input", np.zeros(0, np.float32), (0.0, 1.0), 0.01)
    assert (sum(empty.counts), empty.outside) == (0, 0.0)
