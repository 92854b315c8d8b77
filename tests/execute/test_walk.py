from __future__ import annotations

import numpy as np
import pytest
from graphs import images, parse, small_convnet
from onnx import numpy_helper

from eptq_onnx.execute.walk import Walk, live_bytes, peak_bytes
from eptq_onnx.graph import edit
from eptq_onnx.graph.view import GraphView
from eptq_onnx.method.normalize import normalize
from eptq_onnx.runtime import Session


def test_a_walk_computes_the_same_tensors_as_a_run():
    model = normalize(small_convnet(), 13)
    batches = [{"image": images(4, seed=k)} for k in range(2)]
    names = [n.input[0] for n in model.graph.node if n.op_type in ("Conv", "Gemm")]
    walk = Walk(model, batches)
    session = Session(edit.exposing(model, [n for n in names if n != "image"]))
    for name in names:
        for k, value in enumerate(walk.reach(name)):
            expected = {**batches[k], **session.run(batches[k])}[name]
            np.testing.assert_allclose(value, expected, rtol=1e-5, atol=1e-6)


def test_a_constant_set_on_the_way_is_used_downstream():
    graph = "g (float[N,2] x) => (float[N,2] y) { a = Relu (x)  b = Mul (a, w)  y = Add (b, a) }"
    model = normalize(parse(graph, {"w": np.array([1, 1], np.float32)}), 13)
    x = np.array([[1, -2]], np.float32)
    walk = Walk(model, [{"x": x}])
    np.testing.assert_array_equal(walk.reach("a")[0], [[1, 0]])
    walk.set_constant("w", np.array([3, 3], np.float32))
    np.testing.assert_array_equal(walk.reach("y")[0], [[4, 0]])


def test_peak_counts_the_tensors_alive_at_once():
    model = parse(
        "g (float[1,4] x) => (float[1,4] y) { a = Relu (x) \n b = Exp (a) \n c = Exp (b) \n y = Add (c, a) }"
    )
    shaped = edit.specialize(model, {"x": (1, 4)})
    # While Exp computes c, the tensors a, b and c are alive.
    assert peak_bytes(shaped) == 3 * 16


@pytest.mark.parametrize("place", range(4))
def test_batches_that_join_on_the_way_have_the_same_values(place: int):
    model = normalize(small_convnet(), 13)
    batches = [{"image": images(4, seed=k)} for k in range(5)]
    layers = [n for n in model.graph.node if n.op_type in ("Conv", "Gemm")]
    first = layers[0].input[1]
    halved = np.asarray(0.5 * numpy_helper.to_array(GraphView(model).initializers[first]), np.float32)
    whole, growing = Walk(model, batches), Walk(model, batches[:1], grows=True)
    for k, layer in enumerate(layers):
        for walk in (whole, growing):
            walk.reach(layer.input[0])
        if k == 0:
            whole.set_constant(first, halved)
            growing.set_constant(first, halved)
        if k == min(place, len(layers) - 1):
            growing.join(batches[1:])
        if k == place + 1:
            growing.leave(2)
    last = model.graph.output[0].name
    expected, got = whole.reach(last), growing.reach(last)
    assert len(got) == (2 if place + 1 < len(layers) else 5)
    for value, other in zip(expected, got, strict=False):
        np.testing.assert_allclose(other, value, rtol=1e-4, atol=1e-5)


def test_a_walk_holds_what_is_read_later():
    model = parse(
        "g (float[1,4] x) => (float[1,4] y) { a = Relu (x) \n b = Exp (a) \n c = Exp (b) \n y = Add (c, a) }"
    )
    for node in model.graph.node:
        node.name = node.output[0]
    shaped = edit.specialize(model, {"x": (1, 4)})
    # Behind b, that are a and b; on the way to it, x alone; y needs a and b before, itself after.
    assert list(live_bytes(shaped, ["b", "y"])) == [2 * 16, 2 * 16]
