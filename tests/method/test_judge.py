from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from graphs import normal, parse

from eptq_onnx import Config, targets
from eptq_onnx.graph.view import GraphView
from eptq_onnx.method.judge import Limit, better_than_nearest, still_better
from eptq_onnx.method.normalize import normalize
from eptq_onnx.method.plan import plan
from eptq_onnx.method.ranges import biases
from eptq_onnx.numerics.formats import IntFormat, PerTensor
from eptq_onnx.numerics.grid import Grid
from eptq_onnx.records import Rounding

COUNT = 8


@pytest.fixture(scope="module")
def chain():
    """Return a plan of eight products, nearest rounding (zeros) and another rounding (ones)."""
    body = "  ".join(f"h{k + 1} = MatMul (h{k}, w{k})" for k in range(COUNT))
    weights = {f"w{k}": normal(4, 4, seed=k) for k in range(COUNT)}
    model = normalize(parse(f"g (float[N,4] h0) => (float[N,4] h{COUNT}) {{ {body} }}", weights), 13)
    made = plan(model, targets.load("ort-x64"), Config())

    def rounding(value: int) -> Rounding:
        integers = {x.weight: np.full((4, 4), value, np.int8) for x in made.layers}
        grids = {
            x.weight: Grid(IntFormat.full(8, signed=True), PerTensor(), np.array(1 + value, np.float32))
            for x in made.layers
        }
        return Rounding(integers, grids, {}, biases(GraphView(model), made), weights)

    return made, rounding(0), rounding(1)


def limit(runs: int, parts: int) -> Limit:
    return Limit(np.ones((runs, parts)), np.ones(parts, bool), np.zeros(parts, bool))


def always(noise: np.ndarray) -> Callable[[Rounding], np.ndarray]:
    return lambda _: noise


def kept_layers(chain, rounding: Rounding) -> int:
    made, _, _ = chain
    return sum(int(rounding.integers[x.weight].all()) for x in made.layers)


@pytest.mark.parametrize(
    ("noise", "kept"),
    [
        ({8: [0.5, 0.5]}, 8),
        ({8: [1.01, 1.01]}, 8),
        ({8: [0.2, 1.1], 6: [0.9, 1.1], 4: [0.8, 0.8], 2: [0.7, 0.95], 1: [1, 1]}, 4),
        ({8: [2, 2], 6: [0.95, 0.95], 4: [0.97, 0.97], 2: [1.2, 0.1], 1: [3, 3]}, 0),
    ],
    ids=["better", "as good", "half of the layers", "no clear gain"],
)
def test_what_was_rounded_is_kept_as_far_as_it_serves(chain, noise, kept):
    made, nearest, rounded = chain
    rounding, note = better_than_nearest(
        lambda r: np.array([noise[kept_layers(chain, r)]] * 3, float),
        limit(3, 2),
        made,
        nearest,
        rounded,
        targets=False,
    )
    assert kept_layers(chain, rounding) == kept
    assert (note is None) == (kept == COUNT)
    first = [bool(rounding.integers[x.weight].all()) for x in made.layers]
    assert first == [k < kept for k in range(COUNT)]
    for x in made.layers:
        assert float(rounding.weights[x.weight].scale) == 1 + rounding.integers[x.weight][0, 0]
    if 0 < kept < COUNT:
        assert f"from layer {made.layers[kept].node} on" in (note or "")


def test_where_no_output_can_be_compared_nothing_is_run(chain):
    made, nearest, rounded = chain
    never: Any = pytest.fail
    assert better_than_nearest(never, limit(0, 0), made, nearest, rounded, targets=False) == (rounded, None)
    assert still_better(never, limit(0, 0), nearest, rounded)


@pytest.mark.parametrize(
    ("start", "candidate", "better"),
    [(0.9, 0.8, True), (0.8, 0.9, False), (1.5, 1.2, False), (0.9, 0.91, True)],
)
def test_the_optimization_may_lose_neither_to_its_start_nor_to_nearest_rounding(
    chain, start, candidate, better
):
    _, nearest, rounded = chain
    noise = {id(nearest): np.array([[start]]), id(rounded): np.array([[candidate]])}
    assert still_better(lambda r: noise[id(r)], limit(1, 1), nearest, rounded) == better


@pytest.mark.parametrize(
    ("spread", "runs", "kept"), [(0.0, 16, COUNT), (0.5, 400, COUNT), (0.5, 16, 0), (2.0, 40, 0)]
)
def test_what_may_be_better_by_chance_alone_does_not_replace_nearest_rounding(chain, spread, runs, kept):
    made, nearest, rounded = chain
    # Some runs are better, some worse; slightly better on average.
    ours = np.ones((runs, 1)) - 0.05 + spread * np.resize([-1.0, 1.0], (runs, 1))
    rounding, _ = better_than_nearest(lambda r: ours, limit(runs, 1), made, nearest, rounded, targets=False)
    assert kept_layers(chain, rounding) == kept


def test_what_choices_are_made_from_counts_by_its_mean(chain):
    made, nearest, rounded = chain
    ours = np.stack([np.full(8, 0.5), 0.9 + np.resize([-0.8, 0.8], 8)], axis=1)
    for outputs, kept in ([True, True], 0), ([True, False], COUNT):
        rounding, _ = better_than_nearest(
            always(ours),
            Limit(np.ones((8, 2)), np.array(outputs), np.zeros(2, bool)),
            made,
            nearest,
            rounded,
            targets=False,
        )
        assert kept_layers(chain, rounding) == kept


def test_a_part_that_is_uncertain_counts_by_its_mean_where_all_together_are_clearly_quieter(chain):
    made, nearest, rounded = chain
    uncertain = 0.9 + np.resize([-0.8, 0.8], 16)
    for others, kept in (0.2, COUNT), (0.9, 0):
        ours = np.stack([*[np.full(16, others)] * 8, uncertain], axis=1)
        rounding, _ = better_than_nearest(always(ours), limit(16, 9), made, nearest, rounded, targets=False)
        assert kept_layers(chain, rounding) == kept


@pytest.mark.parametrize(
    ("quiet", "spread", "joined", "kept"),
    [(0.1, 1.0, True, COUNT), (0.1, 0.1, True, 0), (1.0, 1.0, True, 0), (0.1, 1.0, False, 0)],
    ids=["by chance, in a quiet part", "for certain", "in a part as loud as others", "in a whole output"],
)
def test_a_part_may_be_noisier_only_by_chance_and_where_others_of_its_output_are_louder(
    chain, quiet, spread, joined, kept
):
    made, nearest, rounded = chain
    theirs = np.ones((16, 9))
    theirs[:, -1] = quiet
    ours = 0.2 * theirs
    ours[:, -1] = quiet * (1.2 + spread * np.resize([-1.0, 1.0], 16))
    found = Limit(theirs, np.ones(9, bool), np.full(9, joined))
    rounding, _ = better_than_nearest(always(ours), found, made, nearest, rounded, targets=False)
    assert kept_layers(chain, rounding) == kept
