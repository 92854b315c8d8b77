from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from graphs import normal, parse

from eptq_onnx.graph.view import GraphView
from eptq_onnx.ops.regions import REGIONS, regions

C: dict[str, Any] = {
    "half": np.float32(0.5),
    "one": np.float32(1),
    "three": np.float32(3),
    "six": np.float32(6),
    "zero": np.float32(0),
    "root": np.float32(1.4142135),
    "k": np.float32(0.044715),
    "eps": np.float32(1e-5),
    "b": normal(4),
    "g": normal(4),
}
"""Constants of the graphs below."""
FOUND = {
    "silu": ("silu", "s = Sigmoid (x)  y = Mul (x, s)", "sy"),
    "silu, other order": ("silu", "s = Sigmoid (x)  y = Mul (s, x)", "sy"),
    "quick gelu": ("silu", "k1 = Mul (x, three)  s = Sigmoid (k1)  y = Mul (x, s)", "k1 s y"),
    "hard sigmoid": ("hard swish", "s = HardSigmoid (x)  y = Mul (x, s)", "sy"),
    "hard swish in parts": (
        "hard swish",
        "a = Add (x, three)  c = Clip (a, zero, six)  d = Div (c, six)  y = Mul (x, d)",
        "acdy",
    ),
    "mish": ("mish", "p = Softplus (x)  t = Tanh (p)  y = Mul (x, t)", "pty"),
    "gelu, factor last": (
        "gelu",
        "d = Div (x, root)  e = Erf (d)  a = Add (e, one)  m = Mul (x, a)  y = Mul (m, half)",
        "deamy",
    ),
    "gelu, factor first": (
        "gelu",
        "h = Mul (x, half)  d = Div (x, root)  e = Erf (d)  a = Add (e, one)  y = Mul (h, a)",
        "hdeay",
    ),
    "gelu, factor inside": (
        "gelu",
        "d = Div (x, root)  e = Erf (d)  a = Add (e, one)  h = Mul (a, half)  y = Mul (x, h)",
        "deahy",
    ),
    "gelu with bias": (
        "gelu",
        "w = Add (x, b)  d = Div (w, root)  e = Erf (d)  a = Add (e, one)  m = Mul (w, a)  y = Mul (m, half)",
        "wdeamy",
    ),
    "tanh gelu": (
        "gelu",
        "p = Pow (x, three)  q = Mul (p, k)  r = Add (x, q)  s = Mul (r, half)  t = Tanh (s)"
        "  a = Add (t, one)  m = Mul (x, a)  y = Mul (m, half)",
        "pqrstamy",
    ),
    "layer normalization": (
        "layer normalization",
        "m = ReduceMean <axes = [-1]> (x)  d = Sub (x, m)  p = Pow (d, three)  v = ReduceMean <axes = [-1]> (p)"
        "  e = Add (v, eps)  r = Sqrt (e)  n = Div (d, r)  s = Mul (n, g)  y = Add (s, b)",
        "mdpvernsy",
    ),
    "attention": (
        "attention scores",
        "t = Transpose <perm = [1, 0]> (x)  q = MatMul (x, t)  d = Div (q, root)  a = Add (d, b)"
        "  y = Softmax <axis = -1> (a)",
        "da",
    ),
}


def found(body: str, *names: str, outputs: str = "float[4,4] y") -> dict[str, set[str]]:
    model = parse(f"g (float[4,4] x) => ({outputs}) {{ {body} }}", C)
    for node in model.graph.node:
        node.name = node.output[0]
    result: dict[str, set[str]] = {}
    for node, name in regions(GraphView(model), frozenset(names or REGIONS)).items():
        result.setdefault(name, set()).add(node)
    return result


@pytest.mark.parametrize(("name", "body", "nodes"), FOUND.values(), ids=FOUND)
def test_a_pattern_is_found_whole(name, body, nodes):
    expected = set(nodes.split() if " " in nodes else nodes)
    assert found(body) == {name: expected}
    assert found(body, name) == {name: expected}
    assert not found(body, *(REGIONS.keys() - {name}))


@pytest.mark.parametrize(
    "body",
    [
        "y = Mul (x, x)",
        "s = Sigmoid (x)  y = Add (x, s)",
        "s = Sigmoid (x)  r = Relu (s)  u = Tanh (x)  v = Mul (r, u)  y = Add (s, v)",
        "t = Transpose <perm = [1, 0]> (x)  s = Sigmoid (t)  y = Mul (x, s)",
        "r = Sqrt (x)  y = Div (x, r)",
        "a = Add (x, b)  y = Softmax <axis = -1> (a)",
    ],
)
def test_what_only_resembles_a_pattern_is_none(body):
    assert not found(body)


def test_a_gate_whose_inside_is_read_elsewhere_is_none():
    assert not found("s = Sigmoid (x)  y = Mul (x, s)  z = Neg (s)", outputs="float[4,4] y, float[4,4] z")
    assert not found("s = Sigmoid (x)  y = Mul (x, s)", outputs="float[4,4] y, float[4,4] s")
