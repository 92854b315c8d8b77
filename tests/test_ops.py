from __future__ import annotations

import numpy as np
import onnx
import pytest
from gradcheck import check_gradients
from graphs import parse
from op_sample import Sample, f, ints
from op_samples import SAMPLES

from eptq_onnx import ops
from eptq_onnx.graph import edit
from eptq_onnx.graph.lower import lower
from eptq_onnx.graph.view import STOP, GraphView
from eptq_onnx.ops import Gradient
from eptq_onnx.probes import newest_readable
from eptq_onnx.runtime import Session

_NEWEST = max(21, newest_readable()[0])
ALL = [
    pytest.param(
        s,
        id=str(s),
        marks=pytest.mark.skipif(
            s.opset > _NEWEST, reason="the installed onnxruntime does not read its opset"
        ),
    )
    for rows in SAMPLES.values()
    for s in rows
]


def test_every_row_has_samples_and_every_sample_a_row():
    assert set(SAMPLES) == set(ops.TABLE)
    for key, samples in SAMPLES.items():
        assert samples
        assert all((s.domain, s.op_type) == key for s in samples)


@pytest.mark.parametrize("sample", ALL)
def test_gradient_agrees_with_finite_differences(sample: Sample, each_engine):
    if not sample.checked:
        pytest.skip("its gradient is straight-through")
    check_gradients(each_engine, sample.model(), sample.feeds, sample.checked)


@pytest.mark.parametrize(
    "sample",
    [
        p
        for p in ALL
        if any(isinstance(s, Sample) and (s.domain, s.op_type) in ops.LOWERINGS for s in p.values)
    ],
)
def test_lowering_keeps_the_values(sample: Sample):
    model = sample.model()
    lowered, refused = lower(
        edit.specialize(model, {n: v.shape for n, v in sample.feeds.items()}), ops.LOWERINGS
    )
    assert not refused
    if ops.TABLE[sample.domain, sample.op_type].gradient is Gradient.LOWERED:
        assert all(n.op_type != sample.op_type or n.doc_string == STOP for n in lowered.graph.node)
    expected, got = Session(model).run(sample.feeds), Session(lowered).run(sample.feeds)
    for name, value in expected.items():
        largest = float(np.abs(value.astype(np.float64)).max(initial=1))
        np.testing.assert_allclose(got[name], value, rtol=1e-5, atol=1e-5 * largest)


@pytest.mark.parametrize(
    ("op_type", "inputs"),
    [
        ("Acos", (f(-1, 0, 1),)),
        ("Asin", (f(-1, 0, 1),)),
        ("Acosh", (f(1, 2, 3),)),
        ("Pow", (f(0, 1, 4, 0), f(0.5, 0.5, 0.5, 0))),
    ],
)
def test_values_are_numbers_where_the_slope_is_none(op_type, inputs):
    sample = Sample(op_type, inputs)
    lowered, refused = lower(
        edit.specialize(sample.model(), {n: v.shape for n, v in sample.feeds.items()}), ops.LOWERINGS
    )
    assert not refused
    expected, got = Session(sample.model()).run(sample.feeds)["y0"], Session(lowered).run(sample.feeds)["y0"]
    np.testing.assert_allclose(got, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    "sample",
    [
        Sample("CumSum", (ints(1, 2, 3), np.array(0))),
        Sample("Mod", (ints(5, 7), ints(3, 4)), varying=(0, 1)),
        Sample("Pow", (ints(2, 3), ints(2, 2)), varying=(0, 1)),
        Sample("Trilu", (np.ones((3, 3), np.bool_),)),
        Sample("Max", (ints(5, 7), ints(6, 6)), varying=(0, 1)),
        Sample("ReduceMax", (np.arange(6, dtype=np.int32).reshape(2, 3),), {"axes": [1]}),
        Sample(
            "Resize",
            (np.arange(4, dtype=np.int32).reshape(1, 1, 2, 2), None, f(1, 1, 2, 2)),
            {"mode": "nearest"},
        ),
        Sample("OneHot", (ints(0, 2), np.array(3), ints(0, 1))),
    ],
    ids=str,
)
def test_arithmetic_on_integers_is_left_alone(sample):
    model = edit.specialize(sample.model(), {n: v.shape for n, v in sample.feeds.items()})
    lowered, refused = lower(model, ops.LOWERINGS)
    assert not refused
    assert [n.op_type for n in lowered.graph.node] == [sample.op_type]
    assert not lowered.graph.node[0].doc_string


def test_the_check_can_fail(engine, monkeypatch):
    """A wrong rule is found: HardSwish lowered to something else."""

    def wrong(node, view, b):
        b.add("Tanh", [node.input[0]], node.output[0])

    monkeypatch.setitem(ops.LOWERINGS, ("", "HardSwish"), wrong)
    sample = SAMPLES["", "HardSwish"][0]
    with pytest.raises(AssertionError, match="finite difference"):
        check_gradients(engine, sample.model(), sample.feeds, sample.checked)


def _parts(text: str, constants=None) -> list[str]:
    model = parse(text, constants)
    for k, node in enumerate(model.graph.node):
        node.name = f"n{k}"
    return ops.output_parts(GraphView(onnx.shape_inference.infer_shapes(model)))


def test_functions_of_single_elements_are_found_whole():
    def found(body: str) -> tuple[list[str], str]:
        constants = {"k": np.ones((1, 3, 1, 1), np.float32), "one": np.ones(1, np.float32)}
        view = GraphView(parse(f"g (float[N,3,4,4] x) => (float[N,3,4,4] y) {{ {body} }}", constants))
        nodes, end = ops.pointwise(view, "x", lambda shape: np.prod(shape) == 1)
        return [n.op_type for n in nodes], end

    assert found("s = Sigmoid (x)  y = Mul (x, s)") == (["Sigmoid", "Mul"], "y")
    assert found("a = Add (x, one)  b = Relu (a)  y = Conv <kernel_shape = [1,1]> (b, w)") == (
        ["Add", "Relu"],
        "b",
    )
    assert found("a = Relu (x)  y = Mul (a, k)") == (["Relu"], "a")
    assert found("a = Relu (x)  b = Neg (x)  y = Concat <axis = 1> (a, b)") == ([], "x")
    assert found("y = Softmax <axis = 1> (x)") == ([], "x")


def test_output_parts_lie_before_operators_without_gradient():
    assert _parts(
        "g (float[N,4] x) => (int64[N,1] best, float[N,4] rounded)"
        " { y = Sigmoid (x)  best = ArgMax <axis = 1> (y)  z = Tanh (x)  rounded = Round (z) }"
    ) == ["y", "z"]


def test_output_parts_are_what_a_detector_joins():
    assert _parts(
        "g (float[N,4,6] x) => (float[N,12,6] y)"
        " { boxes = Relu (x)  scores = Sigmoid (x)  c = Concat <axis = 1> (boxes, scores)  t = Transpose <perm = [0,2,1]> (c)"
        " r = Reshape (t, shape)  u = Identity (r)  v = Concat <axis = 1> (u, scores)  y = Identity (v) }",
        {"shape": np.array([0, 8, 6])},
    ) == ["scores", "boxes"]
