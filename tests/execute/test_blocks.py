from __future__ import annotations

import numpy as np
import pytest
from graphs import images, parse, small_convnet

from eptq_onnx.execute.blocks import blocks_of, cut, observe, tensor_bytes
from eptq_onnx.graph import edit
from eptq_onnx.graph.view import GraphView
from eptq_onnx.method.normalize import normalize
from eptq_onnx.runtime import Session


def batches(count=3):
    return [{"image": images(2, seed=k)} for k in range(count)]


@pytest.mark.parametrize("most", [1, 6_000, 20_000])
def test_execution_in_blocks_gives_the_same_tensors(most):
    model = normalize(small_convnet(), 13)
    blocks = blocks_of(model, batches(2), most)
    assert len(blocks) > 1
    nodes = [n.name for b in blocks for n in b.model.graph.node]
    assert nodes == [n.name for n in model.graph.node]
    wanted = [o for n in model.graph.node for o in n.output]
    session = Session(edit.exposing(model, wanted))
    seen = set()
    for k, values in observe(blocks, batches(), ["image", *wanted]):
        expected = {**batches()[k], **session.run(batches()[k], wanted)}
        for name, value in values.items():
            np.testing.assert_allclose(value, expected[name], rtol=1e-5, atol=1e-6)
            seen.add((k, name))
    assert seen == {(k, name) for k in range(3) for name in ["image", *wanted]}


def test_a_model_that_fits_is_one_block():
    model = normalize(small_convnet(), 13)
    for most in (None, 10**9):
        (block,) = blocks_of(model, batches(2), most)
        assert block.model is model


def test_one_block_draws_batches_as_it_goes():
    drawn = []

    def source():
        for k in range(100):
            drawn.append(k)
            yield {"image": images(2, seed=k)}

    model = normalize(small_convnet(), 13)
    next(observe(blocks_of(model, batches(2), None), source(), [model.graph.node[0].output[0]]))
    assert len(drawn) < 20


def test_tensor_bytes_counts_all_computed_tensors():
    model = edit.specialize(
        parse("g (float[N,4] x) => (float[N,4] y) { a = Relu (x) \n y = Exp (a) }"), {"x": (2, 4)}
    )
    assert tensor_bytes(model) == 2 * 2 * 4 * 4


def test_values_of_unknown_type_do_not_cross_blocks():
    model = parse(
        "g (float[1,4] x) => (float[1,4] y) "
        "{ s = SequenceConstruct (x, x) \n a = SequenceAt (s, zero) \n y = Relu (a) }",
        {"zero": np.array(0)},
    )
    shaped = edit.specialize(model, {"x": (1, 4)})
    blocks = cut(shaped, shaped, 1)
    assert all(GraphView(shaped).elem_type(name) for b in blocks for name in b.reads)
    assert len(blocks) == 2
