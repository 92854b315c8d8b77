from __future__ import annotations

from collections import Counter

import numpy as np
import onnx
import pytest
from graphs import parse
from hypothesis import given, settings
from hypothesis import strategies as st
from integers import SHAPES, drawn, quantized
from onnx import TensorProto, helper, numpy_helper

from eptq_onnx.graph import edit
from eptq_onnx.graph.packing import packed
from eptq_onnx.proto import store
from eptq_onnx.runtime import Session


def types(model):
    return {t.name: t.data_type for t in model.graph.initializer}


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.tuples(st.integers(2, 6), st.sampled_from(SHAPES), st.booleans()), min_size=1, max_size=4),
    st.sampled_from([13, 17, 18, 21]),
    st.integers(0, 2**32 - 1),
)
def test_unfolded_integers_are_the_same(chosen, opset, seed):
    rng = np.random.default_rng(seed)
    weights = {
        f"w{k}": (drawn(rng, bits, (3 * shape[0], *shape[1:]), axis, spread), axis)
        for k, (bits, (shape, axis), spread) in enumerate(chosen)
    }
    model = quantized(weights, opset)
    before = model.SerializeToString()
    result = packed(model)
    assert model.SerializeToString() == before
    assert result.ByteSize() <= model.ByteSize()
    onnx.checker.check_model(result, full_check=True)
    found = Session(result).run({}, [o.name for o in model.graph.output])
    for name, (values, _) in weights.items():
        np.testing.assert_array_equal(found[f"{name}_float"], values.astype(np.float32))


@pytest.mark.parametrize("bits", [2, 3, 4, 5, 6])
@pytest.mark.parametrize("axis", [0, 1])
def test_the_file_has_the_bytes_of_its_bits(bits, axis):
    values = drawn(np.random.default_rng(0), bits, (240, 960), axis, spread=True)
    model = quantized({"w": (values, axis)})
    result = packed(model)
    assert result.ByteSize() < values.size * bits / 8 + 5 * 960 + 4000
    constants = {t.name: numpy_helper.to_array(t) for t in result.graph.initializer}
    held = sum(v.nbytes for name, v in constants.items() if name.startswith("unfold/bytes"))
    assert held == values.size * bits // 8
    assert TensorProto.INT8 not in {kind for name, kind in types(result).items() if name == "w"}


def test_weights_of_one_shape_are_unpacked_together():
    rng = np.random.default_rng(0)
    weights = {f"w{k}": (drawn(rng, 4, (64 + 16 * k, 16, 3, 3), 0, spread=True), 0) for k in range(4)}
    nodes = Counter(n.op_type for n in packed(quantized(weights)).graph.node)
    # One lookup is that of the channels' places in the table.
    assert nodes["Gather"] == 2
    assert nodes["Split"] == 1


def test_the_size_does_not_depend_on_how_many_offsets_differ():
    values = drawn(np.random.default_rng(0), 4, (64, 160), 0, spread=False)
    sizes = set()
    for count in (2, 7, 64):
        shifts = np.arange(64)[:, None] % count - 8
        sizes.add(packed(quantized({"w": ((values + shifts).astype(np.int8), 0)})).ByteSize())
    assert len(sizes) == 1


@pytest.mark.parametrize(
    "values",
    [
        drawn(np.random.default_rng(0), 7, (200, 200), 0, spread=False),
        drawn(np.random.default_rng(0), 4, (4, 5), 0, spread=True),
        np.zeros((0, 5), np.int8),
        drawn(np.random.default_rng(0), 4, (200, 200), 0, spread=False).astype(np.uint8),
    ],
    ids=["7 bits", "small", "empty", "uint8"],
)
def test_what_saves_nothing_stays_as_it_is(values):
    model = quantized({"w": (values, 0)})
    assert packed(model) is model


def test_a_constant_that_nothing_dequantizes_stays_as_it_is():
    """A stored table is looked up as int8."""
    table = drawn(np.random.default_rng(0), 4, (200, 200), 0, spread=False)
    model = parse("g (int64[n] i) => (int8[n, 200] y) {y = Gather(table, i)}")
    model.graph.initializer.append(numpy_helper.from_array(table, "table"))
    assert packed(model) is model


def test_a_constant_that_callers_may_replace_stays_as_it_is():
    values = drawn(np.random.default_rng(0), 4, (200, 200), 0, spread=False)
    model = quantized({"w": (values, 0)})
    model.graph.input.append(helper.make_tensor_value_info("w", TensorProto.INT8, values.shape))
    assert packed(model) is model


def test_weights_in_files_are_packed_into_files(tmp_path):
    values = drawn(np.random.default_rng(0), 4, (400, 800), 0, spread=True)
    model = quantized({"w": (values, 0)})
    folder = str(tmp_path)
    stored = edit.with_nodes(model, model.graph.node, [store.constant(values, "w", folder)], drop=["w"])
    result = packed(stored)
    assert store.folder_of(result) == folder
    assert store.model_bytes(result) < 0.52 * store.model_bytes(stored)
    found = Session(store.load_all(result)).run({}, ["w_float"])["w_float"]
    np.testing.assert_array_equal(found, values.astype(np.float32))
