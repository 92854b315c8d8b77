"""Networks of rank 3, 4 and 5 with every kind of join, through all steps that ask where the channels are."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from joins import JOINS, WIDTHS, inputs, joined
from onnx import ModelProto

import eptq_onnx
from eptq_onnx import Config
from eptq_onnx.runtime import Session

pytestmark = pytest.mark.once


def sqnr(model: ModelProto, result: ModelProto, x: np.ndarray) -> float:
    exact, got = (Session(m).run({"x": x})["y"].astype(np.float64) for m in (model, result))
    return float(10 * np.log10(np.square(exact).sum() / np.square(exact - got).sum()))


def quantized(rank: int, joins: list[str], seed: int, **options: Any) -> float:
    model = joined(seed, rank, joins)
    config = Config(steps=4, batch_size=8, score_samples=16, probes=1, **options)
    return sqnr(model, eptq_onnx.quantize(model, inputs(rank, 24), config).model, inputs(rank, 32, 1))


@pytest.mark.parametrize(
    ("rank", "joins"),
    [
        (3, ["Add", "Split", "Concat on time", "squeeze and excite"]),
        (3, ["Mul of the input", "channels last", "Concat", "GRU"]),
        (4, ["Max", "gate of a Gemm", "shuffled"]),
        (5, ["Where", "Sub", "one row"]),
    ],
)
def test_scores_and_the_loop_run_on_every_rank(rank, joins):
    assert quantized(rank, joins, seed=1) > 15


@pytest.mark.slow
@pytest.mark.parametrize("rank", WIDTHS)
def test_every_join_keeps_its_signal_and_gains_over_nearest_rounding(rank):
    gains = []
    for join in JOINS:
        found = quantized(rank, [join, join], seed=7)
        assert found > 15, join
        gains.append(
            found - quantized(rank, [join, join], seed=7, start="nearest", rotate=False, equalize=False)
        )
    assert np.mean(gains) > 0
