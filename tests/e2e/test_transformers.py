"""What exporters and onnxruntime's optimizer write for transformers, through the whole road, with each
engine."""

from __future__ import annotations

import numpy as np
import pytest
from graphs import normal, parse

from eptq_onnx import Config, quantize

EMBEDDED = """
    word = Gather (words, ids)
    place = Gather (table, places)
    x = Add (word, place)
    h = MatMul (x, w1)
    a = Relu (h)
    y = MatMul (a, w2)
}
"""
POSITIONS = (
    """
g (int64[N,6] ids) => (float[N,6,4] y) {
    pad = Equal (ids, one)
    real = Not (pad)
    mask = Cast <to = 7> (real)
    sums = CumSum (mask, axis)
    counted = Mul (sums, mask)
    places = Add (counted, one)
"""
    + EMBEDDED
)
OWN = {
    "Gelu": "c = com.microsoft.Gelu (h)",
    "BiasGelu": "c = com.microsoft.BiasGelu (h, bias)",
    "FastGelu": "c = com.microsoft.FastGelu (h)",
    "SkipLayerNormalization": "c = com.microsoft.SkipLayerNormalization (h, h, bias, bias)",
    "SimplifiedLayerNormalization": "c = SimplifiedLayerNormalization <axis = -1> (h, bias)",
}


def options(engine: str) -> Config:
    return Config(weight_bits=4, steps=3, engine=engine)


def test_positions_that_count_what_is_not_padded(each_engine):
    constants = {
        "one": np.array(1),
        "axis": np.array(1),
        "words": normal(20, 8),
        "table": normal(9, 8, seed=1),
    }
    model = parse(POSITIONS, {**constants, "w1": normal(8, 16, seed=2), "w2": normal(16, 4, seed=3)})
    ids = np.random.default_rng(0).integers(0, 20, (32, 6))
    result = quantize(model, {"ids": ids}, options(each_engine.name))
    assert result.report.optimization is not None
    assert not [note for note in result.report.notes if "no gradient" in note or "no Hessian" in note]


@pytest.mark.parametrize("operator", OWN)
def test_operators_of_onnxruntime_do_not_stop_the_optimization(each_engine, operator):
    text = f"g (float[N,5,8] x) => (float[N,5,4] y) {{ h = MatMul (x, w1)  {OWN[operator]}  y = MatMul (c, w2) }}"
    model = parse(text, {"w1": normal(8, 16), "bias": normal(16, seed=1), "w2": normal(16, 4, seed=2)})
    result = quantize(model, {"x": normal(32, 5, 8, seed=3)}, options(each_engine.name))
    assert result.report.optimization is not None, result.report.notes
    assert all(np.isfinite(result.report.optimization.losses))


LEARNED_PLACES = (
    """
g (int64[N,T] ids) => (float[N,T,4] y) {
    all = Shape (ids)
    count = Slice (all, one, two)
    places = Slice (counted, zero, count, one)
"""
    + EMBEDDED
)


def test_a_table_that_is_read_at_constant_places_once_sizes_are_known(each_engine):
    constants = {
        "zero": np.array([0]),
        "one": np.array([1]),
        "two": np.array([2]),
        "counted": np.arange(512)[None],
    }
    # As many values as it takes to store a table as integers.
    tables = {
        "words": normal(20, 32),
        "table": normal(512, 32, seed=1),
        "w1": normal(32, 8, seed=2),
        "w2": normal(8, 4, seed=3),
    }
    model = parse(LEARNED_PLACES, constants | tables)
    ids = np.random.default_rng(0).integers(0, 20, (24, 6))
    report = quantize(model, {"ids": ids}, options(each_engine.name)).report
    assert report.optimization is not None
    assert report.verification.outputs["y"] > 10
