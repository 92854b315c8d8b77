"""Tests of lowerings given as formulas in the operator table."""

from __future__ import annotations

import numpy as np
import onnx
import pytest
from graphs import normal, parse

from eptq_onnx.graph.lower import lower
from eptq_onnx.graph.lower.formula import formula
from eptq_onnx.runtime import Session

LEAKY = formula(
    "Leaky <alpha: float = 0.5> (x) => (y) "
    "{ a = Constant <value_float: float = @alpha> ()  s = Mul (x, a)  y = Max (x, s) }"
)


def lowered(node: str, rule=LEAKY) -> tuple[onnx.ModelProto, dict[str, str]]:
    model = parse(f"g (float[2,3] x) => (float[2,3] y) {{ {node} }}")
    model.graph.node[0].name = "node"
    return lower(model, {("", model.graph.node[0].op_type): rule})


@pytest.mark.parametrize(("attributes", "alpha"), [("", 0.5), ("<alpha = 0.25>", 0.25)])
def test_attributes_are_the_nodes_own_or_the_defaults(attributes, alpha):
    model, refused = lowered(f"y = Leaky {attributes} (x)")
    assert not refused
    assert [n.op_type for n in model.graph.node] == ["Mul", "Max"]
    x = normal(2, 3)
    np.testing.assert_array_equal(Session(model).run({"x": x})["y"], np.maximum(x, np.float32(alpha) * x))


def test_lists_and_whole_numbers_are_constants():
    scaled = formula(
        "Scaled <scale> (x) => (y) "
        "{ s = Constant <value_floats: floats = @scale> ()  a = Constant <value_ints = [1]> ()"
        "  m = Mul (x, s)  n = Unsqueeze (m, a)  y = Squeeze (n, a) }"
    )
    model, refused = lowered("y = Scaled <scale = [1.0, 2.0, 3.0]> (x)", scaled)
    assert not refused
    x = normal(2, 3)
    np.testing.assert_array_equal(Session(model).run({"x": x})["y"], x * np.array([1, 2, 3], np.float32))


@pytest.mark.parametrize(
    ("node", "text", "reason"),
    [
        (
            "y = F (x)",
            "F <scale> (x) => (y) { s = Constant <value_float: float = @scale> ()  y = Mul (x, s) }",
            "attribute scale is absent",
        ),
        (
            "y = F <norm = 2> (x)",
            "F (x) => (y) { y = Abs (x) }",
            "does not know the attribute norm",
        ),
        ("y = F (x)", "F (x, z) => (y) { y = Add (x, z) }", "input z is absent"),
        ("t, y = F (x)", "F (x) => (y) { y = Abs (x) }", "output y is used"),
    ],
)
def test_nodes_that_the_formula_does_not_cover_are_refused(node, text, reason):
    _, refused = lowered(node, formula(text))
    assert reason in refused["node"]


def test_a_formula_that_cannot_be_parsed_is_an_error():
    with pytest.raises(ValueError, match="Half"):
        formula("Half (x) => (y) {")
