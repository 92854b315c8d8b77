from __future__ import annotations

import numpy as np
import pytest
from graphs import normal, parse

from eptq_onnx.errors import GradientError
from eptq_onnx.graph import edit
from eptq_onnx.runtime import Session


def scalar(body: str, inputs: str = "float[4,3] x"):
    """A model whose output ``loss`` is the sum of the tensor y."""
    model = parse(f"g ({inputs}) => (float loss) {{ {body}  loss = ReduceSum <keepdims = 0> (y) }}", {"w": normal(3, 2)})
    for k, node in enumerate(model.graph.node):
        node.name = f"n{k}"
    return edit.specialize(model, {"x": (4, 3)})


def test_gradients_of_initializers_inputs_and_intermediates(engine):
    result = engine.differentiate(scalar("h = MatMul (x, w)  y = Sigmoid (h)"), "loss", ["w", "x", "h"])
    assert set(result.gradients) == {"w", "x", "h"}
    edit.set_outputs(result.model, list(result.gradients.values()))
    x, w = normal(4, 3, seed=1), normal(3, 2)
    values = Session(result.model).run({"x": x, "w": w})
    s = 1 / (1 + np.exp(-(x @ w)))
    np.testing.assert_allclose(values[result.gradients["h"]], s * (1 - s), rtol=1e-4)
    np.testing.assert_allclose(values[result.gradients["w"]], x.T @ (s * (1 - s)), rtol=1e-4, atol=1e-6)


def test_what_no_gradient_reaches_is_said(engine):
    result = engine.differentiate(scalar("h = MatMul (x, w)  r = Round (h)  y = Add (r, r)"), "loss", ["w"])
    assert result.gradients == {}
    assert "operators that have a gradient" in result.unreached["w"]


def test_a_blocked_branch_does_not_stop_the_other(engine):
    result = engine.differentiate(scalar("h = MatMul (x, w)  r = Ceil (h)  y = Add (r, h)"), "loss", ["w"])
    edit.set_outputs(result.model, list(result.gradients.values()))
    x = normal(4, 3, seed=1)
    values = Session(result.model).run({"x": x, "w": normal(3, 2)})
    np.testing.assert_allclose(values[result.gradients["w"]], x.sum(axis=0)[:, None].repeat(2, axis=1), rtol=1e-5)


def test_an_input_that_a_node_reads_twice(engine):
    result = engine.differentiate(scalar("y = Mul (x, x)"), "loss", ["x"])
    x = normal(4, 3, seed=1)
    np.testing.assert_allclose(Session(result.model).run({"x": x})[result.gradients["x"]], 2 * x, rtol=1e-6)


def test_a_graph_that_cannot_be_differentiated_is_told_in_one_sentence(engine):
    model = scalar("h = MatMul (x, w)  y = Relu (h)")
    model.graph.node[0].op_type = "Nonsense"
    model.graph.node[0].name = ""
    with pytest.raises(GradientError, match="cannot differentiate") as e:
        engine.differentiate(model, "loss", ["h"])
    assert "\n" not in str(e.value)
