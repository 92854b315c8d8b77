from __future__ import annotations

import numpy as np
import onnx
import pytest
from graphs import normal, parse

from eptq_onnx.graph.fold import fold_constants
from eptq_onnx.runtime import Session


@pytest.mark.parametrize(
    "limits", ["start = 1", "end = 2", "start = -3, end = -1", "start = 3, end = 1", "start = 0"]
)
@pytest.mark.parametrize("batch", ["2", "N"])
def test_the_shape_of_some_axes(limits, batch):
    model = parse(f"g (float[{batch},3,4] x) => (int64[K] y) {{ y = Shape <{limits}> (x) }}")
    folded = fold_constants(model)
    x = np.zeros((2, 3, 4), np.float32)
    np.testing.assert_array_equal(Session(folded).run({"x": x})["y"], Session(model).run({"x": x})["y"])
    onnx.checker.check_model(folded)


@pytest.mark.parametrize("columns", [5, 50])
def test_a_weight_is_folded_behind_a_folded_shape_whatever_its_size(columns):
    graph = (
        f"g (float[1,4,{columns}] x) => (float[1,4,3] y) {{ all = Shape (x)  last = Slice (all, two, three)"
        " sizes = Concat <axis = 0> (last, count)  w = Reshape (stored, sizes)  y = MatMul (x, w) }"
    )
    constants = {
        "two": np.array([2]),
        "three": np.array([3]),
        "count": np.array([3]),
        "stored": normal(3, columns * 1),
    }
    folded = fold_constants(parse(graph, constants))
    assert [n.op_type for n in folded.graph.node] == ["MatMul"]
    assert "w" in {t.name for t in folded.graph.initializer}


def test_constants_in_bodies_stay_single_precision():
    graph = """g (float[N,3] x, bool c) => (float[N,3] y) {
        h = Relu (x)
        y = If (c) <
            then_branch = t () => (float[N,3] a) { two = Constant <value_float = 2.0> ()  a = Mul (h, two) },
            else_branch = e () => (float[N,3] b) { b = Neg (h) }
        >
    }"""
    model = parse(graph)
    feeds = {"x": normal(2, 3), "c": np.array(True)}
    np.testing.assert_array_equal(
        Session(fold_constants(model)).run(feeds)["y"], Session(model).run(feeds)["y"]
    )
