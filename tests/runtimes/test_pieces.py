"""Times of small models, with given profiles where a number counts."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from graphs import normal, parse

from eptq_onnx.errors import ModelError
from eptq_onnx.graph.view import GraphView
from eptq_onnx.method.place.pieces import between_convolutions
from eptq_onnx.placement import Representation
from eptq_onnx.runtimes import pieces
from eptq_onnx.runtimes.pieces import Pace, Stopwatch, drawn, undisturbed, ways_of

ONCE = Pace(threads=1, seconds=0.0)


def test_interrupted_runs_do_not_count():
    """Two of six runs were not interrupted."""
    spent = {"a": [1.0, 9.0, 1.1, 1.0, 1.0, 1.0], "b": [2.0, 2.0, 2.1, 8.0, 7.0, 9.0]}
    found = undisturbed(spent, [0.0, 8.0, 0.0, 6.0, 5.0, 7.0])
    assert found == pytest.approx({"a": 1.05, "b": 2.05})


def test_what_every_run_lost_was_lost_in_the_longest_kernel():
    spent = {"a": [1.0] * 6, "b": [9.0, 8.0, 9.0, 12.0, 10.0, 9.0]}
    found = undisturbed(spent, [4.0, 3.0, 4.0, 7.0, 5.0, 4.0])
    assert found == pytest.approx({"a": 1.0, "b": 5.0})
    assert undisturbed({}, []) == {}


def test_drawn_values_have_the_types_and_shapes_of_the_inputs():
    model = parse(
        """
        g (float[2,3] x, uint8[4] q, int8[4] s, bool[5] c, int64[2] k) => (float[2,3] y) { y = Relu (x) }
        """
    )
    found = drawn(model)
    assert {name: (v.dtype.name, v.shape) for name, v in found.items()} == {
        "x": ("float32", (2, 3)),
        "q": ("uint8", (4,)),
        "s": ("int8", (4,)),
        "c": ("bool", (5,)),
        "k": ("int64", (2,)),
    }


def test_a_convolution_is_timed_without_the_changes_of_layout_around_it(monkeypatch):
    """Whatever layouts the installed onnxruntime has: their nodes are not in the time of the kernel."""
    model = parse(
        "g (float[1,16,8,8] x) => (float[1,16,8,8] y) { y = Conv (x, w) }", {"w": normal(16, 16, 1, 1)}
    )
    seen: dict[str, Any] = {}

    def told(*args, **kwargs):
        _, graph = seen["real"](*args, **kwargs)
        seen["graph"] = graph
        return {n.name: 100.0 if "Reorder" in n.op_type else 1.0 for n in graph.node}, graph

    seen["real"] = pieces.kernel_times
    monkeypatch.setattr(pieces, "kernel_times", told)
    [way] = ways_of(model, lambda *_: None, ONCE)
    assert way.seconds == 1.0
    blocked = any("Reorder" in n.op_type for n in seen["graph"].node)
    assert (way.reads is Representation.FLOAT_BLOCKED) == blocked


def test_what_takes_any_layout_has_a_way_for_each():
    model = parse("g (float[1,16,8,8] x) => (float[1,16,8,8] y) { a = Relu (x)  y = Sigmoid (a) }")
    for node in model.graph.node:
        node.name = node.op_type
    ways = ways_of(model, between_convolutions, ONCE)
    assert (ways[0].reads, ways[0].makes) == (Representation.FLOAT, Representation.FLOAT)
    assert len({(w.reads, w.makes) for w in ways}) == len(ways)
    assert all(w.seconds >= 0 for w in ways)


def test_a_piece_with_a_transpose_of_its_own_keeps_its_time():
    model = parse("g (float[1,4,8,8] x) => (float[1,8,8,4] y) { y = Transpose <perm = [0,2,3,1]> (x) }")
    [way] = ways_of(model, between_convolutions, ONCE)
    assert way.seconds > 0
    assert way.reads is Representation.FLOAT


def test_integers_are_told_apart_from_float():
    model = parse(
        """
        g (uint8[1,4,8,8] x) => (uint8[1,4,8,8] y) {
            a = DequantizeLinear (x, s, z)  b = Sigmoid (a)  y = QuantizeLinear (b, s, z)
        }
        """,
        {"s": np.array(0.1, np.float32), "z": np.array(0, np.uint8)},
    )
    ways = ways_of(model, between_convolutions, ONCE)
    assert all(w.reads.is_integer and w.makes.is_integer for w in ways)


def test_a_piece_that_onnxruntime_refuses_is_told():
    with pytest.raises(ModelError, match="onnxruntime refuses"):
        ways_of(parse("g (float[2] x) => (float[2] y) { y = Nonsense (x) }"), between_convolutions, ONCE)


def test_whole_models_are_compared_with_the_clock_of_their_threads():
    model = parse("g (float[4,4] x) => (float[4,4] y) { y = MatMul (x, w) }", {"w": normal(4, 4)})
    for threads in (1, 2):
        speed = Stopwatch(threads).compare(model, model, {"x": np.ones((4, 4), np.float32)}, 0.1)
        assert speed.low <= speed.ratio <= speed.high
    assert Stopwatch(1).runtime.startswith("onnxruntime ")
    assert Stopwatch(1).machine == Stopwatch(2).machine
    assert GraphView(model).outputs == ("y",)
