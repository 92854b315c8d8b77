from __future__ import annotations

import pytest
from graphs import normal, parse

from eptq_onnx.errors import ConfigError
from eptq_onnx.graph.patterns import matching
from eptq_onnx.graph.view import GraphView


@pytest.fixture(scope="module")
def view() -> GraphView:
    text = (
        "g (float[N,4] x) => (float[N,4] y) { a = MatMul (x, w)  b = Relu (a)  c = MatMul (b, w)"
        "  d = Sigmoid (b)  e = Mul (c, d)  y = MatMul (e, w) }"
    )
    model = parse(text, {"w": normal(4, 4)})
    for node in model.graph.node:
        node.name = f"net/{node.output[0]}"
    return GraphView(model)


@pytest.mark.parametrize(
    ("pattern", "names"),
    [
        ("net/a", "a"),
        ("op:MatMul", "acy"),
        ("op:Sigmoid", "d"),
        ("re:net/[ab]", "ab"),
        ("re:.*[ce]", "ce"),
        ("from:net/b..to:net/e", "bcde"),
        ("from:net/c..to:net/y", "cey"),
        ("from:net/a..to:net/a", "a"),
    ],
)
def test_patterns_select_nodes(view, pattern, names):
    assert matching(view, pattern) == {f"net/{n}" for n in names}


@pytest.mark.parametrize(
    ("pattern", "message"),
    [
        ("net/A", "there is no node 'net/A'.*similar names: net/"),
        ("op:Conv", "matches no node; operators are MatMul, Mul, Relu, Sigmoid"),
        ("re:a", "matches no node"),
        ("re:[", "is not a regular expression"),
        ("from:net/y..to:net/a", "no path leads"),
        ("from:net/c..to:net/d", "no path leads"),
        ("from:net/a..to:nowhere", "there is no node 'nowhere'"),
        ("", "there is no node ''"),
    ],
)
def test_a_pattern_that_matches_nothing_is_refused(view, pattern, message):
    with pytest.raises(ConfigError, match=message):
        matching(view, pattern)
