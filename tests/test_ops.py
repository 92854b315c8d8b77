from __future__ import annotations

import numpy as np
import onnx
import pytest
from gradcheck import check_gradients
from graphs import parse
from op_samples import SAMPLES, Sample

from eptq_onnx import ops
from eptq_onnx.graph import edit
from eptq_onnx.graph.lower import lower
from eptq_onnx.graph.view import STOP, GraphView
from eptq_onnx.ops import Gradient
from eptq_onnx.runtime import Session

ALL = [pytest.param(s, id=str(s)) for rows in SAMPLES.values() for s in rows]


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


@pytest.mark.parametrize("sample", [p for p in ALL if (p.values[0].domain, p.values[0].op_type) in ops.LOWERINGS])
def test_lowering_keeps_the_values(sample: Sample):
    model = sample.model()
    lowered, refused = lower(edit.specialize(model, {n: v.shape for n, v in sample.feeds.items()}), ops.LOWERINGS)
    assert not refused
    if ops.TABLE[sample.domain, sample.op_type].gradient is Gradient.LOWERED:
        assert all(n.op_type != sample.op_type or n.doc_string == STOP for n in lowered.graph.node)
    expected, got = Session(model).run(sample.feeds), Session(lowered).run(sample.feeds)
    for name, value in expected.items():
        np.testing.assert_allclose(got[name], value, rtol=1e-5, atol=1e-5)


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
