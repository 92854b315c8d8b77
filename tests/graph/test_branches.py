"""Tests of branches that all samples take: hoisted, quantized and sunk; the other branch is unchanged."""

from __future__ import annotations

from collections import Counter

import numpy as np
import onnx
import pytest
from graphs import images, normal, parse

import eptq_onnx
from eptq_onnx import Config
from eptq_onnx.data.layouts import Column
from eptq_onnx.data.samples import Samples
from eptq_onnx.graph import branches
from eptq_onnx.method.normalize import normalize
from eptq_onnx.proto.bodies import all_nodes
from eptq_onnx.runtime import Session

RATES = """
g (float[N,3,H,W] x, int64 rate) => (float[N,4,a,b] y, float[N,c,d,e] z) {
    h0 = Conv (x, w0)
    h = Relu (h0)
    high = Constant <value = int64 {16000}> ()
    low = Constant <value = int64 {8000}> ()
    is_high = Equal (rate, high)
    y, z = If (is_high) <
        then_branch = t () => (float[N,4,a,b] y1, float[N,c,d,e] z1) {
            c = Conv (h, w1)
            n = BatchNormalization (c, scale, shift, shift, scale)
            is_low = Equal (rate, low)
            y1 = If (is_low) <
                then_branch = tt () => (float[N,4,a,b] y2) { d = Neg (n)  y2 = Relu (d) },
                else_branch = te () => (float[N,4,a,b] y3) { d = Conv (n, w2)  y3 = Relu (d) }
            >
            z1 = Identity (n)
        },
        else_branch = e () => (float[N,4,a,b] y4, float[N,c,d,e] z4) {
            c = Conv (x, w3)
            k = Constant <value_ints = [0,4,2,2]> ()
            y4 = Reshape (c, k)
            z4 = Conv (h, w3b)
        }
    >
}
"""


def rates() -> onnx.ModelProto:
    """Return a model whose branches accept one image size each: for 8 x 8, the Reshape of the other fails."""
    return parse(
        RATES,
        {
            "w0": normal(4, 3, 1, 1), "w1": normal(4, 4, 3, 3, seed=1), "w2": normal(4, 4, 3, 3, seed=2),
            "w3": normal(4, 3, 3, 3, seed=3), "w3b": normal(4, 4, 3, 3, seed=4),
            "scale": np.linspace(0.5, 2, 4, dtype=np.float32), "shift": normal(4, seed=5),
        },
    )  # fmt: skip


def samples(rate: int = 16000) -> Samples:
    return Samples({"x": Column(images(16), 0), "rate": Column(np.array(rate), shared=True)}, None)


def counts(graph: onnx.GraphProto) -> Counter[str]:
    return Counter(n.op_type for n in graph.node)


def test_hoisting_and_sinking_keep_the_outputs():
    model = rates()
    hoisted = normalize(model, 13, samples())
    assert counts(hoisted.graph)["Conv"] == 3, "the taken branch and the one inside it are in the main graph"
    assert "BatchNormalization" not in counts(hoisted.graph)
    settled = [n for n in hoisted.graph.node if branches.settled_branch(n)]
    assert [branches.other_branch(n) for n in settled] == ["then_branch", "else_branch"]
    assert "If" not in counts(branches.flattened(hoisted).graph)
    sunk = branches.sink(hoisted)
    assert counts(sunk.graph) == {"Conv": 1, "Relu": 1, "Equal": 1, "If": 1}
    assert not any(n.metadata_props for n in all_nodes(sunk.graph))
    for result in (hoisted, branches.flattened(hoisted), sunk):
        feeds = {"x": images(3), "rate": np.array(16000)}
        session = Session(result)
        got = session.run({n: v for n, v in feeds.items() if n in session.inputs})
        for name, value in Session(model).run(feeds).items():
            np.testing.assert_allclose(got[name], value, rtol=1e-4, atol=1e-5)
    low = {"x": images(3, size=4), "rate": np.array(8000)}
    for name, value in Session(model).run(low).items():
        np.testing.assert_allclose(Session(sunk).run(low)[name], value, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("options", [{"preset": "fast"}, {"steps": 2}])
def test_the_branch_that_samples_take_is_quantized_and_the_other_is_not(options):
    model = rates()
    result = eptq_onnx.quantize(model, {"x": images(16), "rate": np.array(16000)}, Config(**options))
    assert counts(result.model.graph)["If"] == 1
    assert len(result.report.layers) == 3
    assert result.report.verification.kernels["Conv"] >= 2, (
        "one layer's output leaves the graph, and stays float"
    )
    assert result.report.verification.outputs["y"] > 20
    assert [k.reason for k in result.report.kept_float if k.op_type == "If"][-1] == (
        "no sample takes its else_branch: its contents stay float (2 Conv)"
    )
    low = {"x": images(3, size=4), "rate": np.array(8000)}
    expected, got = Session(model).run(low), Session(result.model).run(low)
    np.testing.assert_allclose(got["y"], expected["y"], rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(got["z"], expected["z"], atol=0.1)  # it reads a layer of the main graph


@pytest.mark.parametrize(
    "body",
    [
        "() => (float[4,4] b) { b = MatMul (w, w) }",
        "() => (float[4,4] b) { b = Constant <value_floats = [1.0,2.0,3.0,4.0]> () }",
        "() => (float[4,4] b) <float[4] k = {1,2,3,4}> { b = Identity (k) }",
        "() => (float[4,4] b) <float[4] b = {1,2,3,4}> { }",
        "() => (float[4,4] b) { b = If (q) <then_branch = tt () => (float[4,4] d) { d = Neg (w) }, "
        "else_branch = te () => (float[4,4] d) { d = MatMul (w, w) }> }",
        "() => (float[4,4] b) { m = MatMul (w, w) b = If (q) <then_branch = tt () => (float[4,4] d) "
        "{ d = Neg (m) }, else_branch = te () => (float[4,4] d) { d = Identity (m) }> }",
    ],
)
@pytest.mark.parametrize("reader", ["MatMul (z, v)", "Add (h, z)"])
def test_a_branch_may_return_a_constant(body, reader):
    text = f"""g (float[N,4] x, bool p, bool q) => (float[a,4] y) {{
        h = MatMul (x, v)
        z = If (p) <then_branch = t () => (float[N,4] a) {{ a = Relu (h) }}, else_branch = e {body}>
        r = {reader}
        y = MatMul (r, w)
    }}"""
    model = parse(text, {"w": normal(4, 4), "v": normal(4, 4, seed=1)})
    feeds = {"x": normal(4, 4, seed=2), "p": np.array(False), "q": np.array(False)}
    expected = Session(model).run(feeds)["y"]
    data = Samples(
        {
            "x": Column(normal(8, 4, seed=3), 0),
            "p": Column(feeds["p"], shared=True),
            "q": Column(feeds["q"], shared=True),
        },
        None,
    )
    hoisted = normalize(model, 13, data)
    for result in (hoisted, branches.flattened(hoisted), branches.sink(hoisted)):
        session = Session(result)
        got = session.run({n: v for n, v in feeds.items() if n in session.inputs})["y"]
        np.testing.assert_allclose(got, expected, rtol=1e-4, atol=1e-5)
    other = {**feeds, "p": np.array(True)}
    np.testing.assert_allclose(
        Session(branches.sink(hoisted)).run(other)["y"], Session(model).run(other)["y"], rtol=1e-4, atol=1e-5
    )


def test_branches_that_depend_on_the_sample_are_left_alone():
    model = parse(
        "g (float[N,3,8,8] x) => (float[N,4,8,8] y) { h = Conv (x, w) s = ReduceMax <keepdims = 0> (h)"
        " most = Constant <value = float {2.0}> () c = Greater (s, most) y = If (c) <"
        " then_branch = t () => (float[N,4,8,8] a) { a = Conv (h, v) },"
        " else_branch = e () => (float[N,4,8,8] b) { b = Neg (h) } > }",
        {"w": normal(4, 3, 1, 1), "v": normal(4, 4, 1, 1, seed=1)},
    )
    x = images(16) * np.repeat([0.7, 2], 8).astype(np.float32)[:, None, None, None]
    assert counts(normalize(model, 13, Samples({"x": Column(x, 0)}, None)).graph)["If"] == 1
    result = eptq_onnx.quantize(model, {"x": x}, Config(preset="fast"))
    assert ("If", "samples take different branches: their contents stay float (1 Conv)") in [
        (k.op_type, k.reason) for k in result.report.kept_float
    ]
    for sign in (x[:4], x[-4:]):
        expected, got = Session(model).run({"x": sign})["y"], Session(result.model).run({"x": sign})["y"]
        np.testing.assert_allclose(got, expected, atol=0.15 * np.abs(expected).max())


def test_layers_in_the_body_of_a_loop_are_reported():
    model = parse(
        "g (float[N,4] x) => (float[N,4] y) {"
        " h = MatMul (x, w) n = Constant <value = int64 {3}> () t = Constant <value = bool {1}> ()"
        " y = Loop (n, t, h) < body = b (int64 i, bool go, float[N,4] s) => (bool more, float[N,4] r)"
        " { m = MatMul (s, v) r = Tanh (m)"
        " more = Identity (go) } > }",
        {"w": normal(4, 4), "v": normal(4, 4, seed=1)},
    )
    result = eptq_onnx.quantize(model, {"x": normal(16, 4)}, Config(preset="fast"))
    assert [k.reason for k in result.report.kept_float] == ["its body stays float (1 MatMul)"]
    expected, got = (
        Session(model).run({"x": normal(4, 4, seed=3)})["y"],
        Session(result.model).run({"x": normal(4, 4, seed=3)})["y"],
    )
    np.testing.assert_allclose(got, expected, atol=0.15)


def test_an_if_inside_a_settled_one_is_decided_separately():
    """Nodes have no names: those of the branch must not get the name of the outer node."""
    graph = """g (float[N,4] x, bool c) => (float[N,M] y) {
        h = MatMul (x, w)
        s = ReduceSum <keepdims = 0> (h)
        d = Greater (s, zero)
        y = If (c) <
            then_branch = t () => (float[N,M] y1) {
                y1 = If (d) <
                    then_branch = tt () => (float[N,M] y2) { y2 = MatMul (h, w1) },
                    else_branch = te () => (float[N,M] y3) { y3 = MatMul (h, w2) }
                >
            },
            else_branch = e () => (float[N,M] y4) { y4 = Abs (h) }
        >
    }"""
    constants = {
        "w": normal(4, 4),
        "w1": normal(4, 4, seed=1),
        "w2": normal(4, 4, seed=2),
        "zero": np.array(0, np.float32),
    }
    x = normal(16, 4, seed=3)
    x = x[np.argsort((x @ constants["w"]).sum(axis=1))]
    seen = Samples({"x": Column(x, 0), "c": Column(np.array(True), shared=True)}, None)
    model = parse(graph, constants)
    flat = branches.flattened(normalize(model, 13, seen))
    assert [n.op_type for n in flat.graph.node].count("If") == 1
    for part in (x[:4], x[-4:]):
        feeds = {"x": part, "c": np.array(True)}
        session = Session(flat)
        (got,) = session.run({n: feeds[n] for n in session.inputs}).values()
        np.testing.assert_allclose(got, Session(model).run(feeds)["y"], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    "moves",
    [
        "m = Transpose <perm = [0, 2, 1]> (h)",
        "a = Reshape (h, shape)  m = Slice (a, one, two, one)",
        "a = Unsqueeze (h, one)  b = Squeeze (a, one)  m = Transpose <perm = [2, 0, 1]> (b)",
    ],
)
def test_subgraphs_may_read_tensors_that_are_moved_behind_a_quantizer(moves):
    """onnxruntime ends the process when it moves a quantizer to a reader inside a subgraph."""
    model = parse(
        "g (float[N,4,6] x, bool c) => (float[N,4,5] y, float z)"
        f" {{ h = MatMul (x, w)  k = MatMul (h, v)  {moves}"
        "  z = If (c) <then_branch = t () => (float p) { q = Relu (m)  p = ReduceMean <keepdims = 0> (q) },"
        " else_branch = e () => (float r) { s = Neg (m)  r = ReduceMean <keepdims = 0> (s) }>"
        "  y = Relu (k) }",
        {
            "w": normal(6, 6),
            "v": normal(6, 5),
            "shape": np.array([0, 6, 4]),
            "one": np.array([1]),
            "two": np.array([2]),
        },
    )
    feeds = [{"x": normal(2, 4, 6, seed=k), "c": np.array(bool(k % 2))} for k in range(36)]
    result = eptq_onnx.quantize(model, feeds, Config(preset="fast"))
    exact, got = (Session(m).run(feeds[0]) for m in (model, result.model))
    np.testing.assert_allclose(got["z"], exact["z"], atol=0.05)
