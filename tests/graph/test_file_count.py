from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from integers import SHAPES, drawn, quantized

from eptq_onnx.config import WeightStorage
from eptq_onnx.graph import edit
from eptq_onnx.graph.file_count import FileCount, Storing
from eptq_onnx.graph.message_sizes import Tally, file_bytes
from eptq_onnx.graph.native import native
from eptq_onnx.graph.storing import stored
from eptq_onnx.proto import store

WIDTHS = (2, 3, 4, 5, 6, 8)


def counted(model, weights, storage, spread, types=()):
    zero_points = {name: dict.fromkeys(WIDTHS, spread[name]) for name in weights}
    return FileCount(model, {name: name for name in weights}, Storing(storage, types, zero_points))


@settings(max_examples=60, deadline=None)
@given(
    st.lists(
        st.tuples(st.sampled_from(WIDTHS), st.sampled_from(SHAPES), st.booleans()), min_size=1, max_size=6
    ),
    st.integers(0, 2**32 - 1),
)
def test_the_count_is_the_size_of_the_packed_file(chosen, seed):
    rng = np.random.default_rng(seed)
    shapes = [((3 * shape[0], *shape[1:]), axis) for _, (shape, axis), _ in chosen]
    weights, spread = {}, {}
    for k, ((bits, _, wide), (shape, axis)) in enumerate(zip(chosen, shapes, strict=True)):
        spread[f"w{k}"] = wide and bits < 8 and axis is not None
        weights[f"w{k}"] = drawn(rng, bits, shape, axis, spread[f"w{k}"]), axis
    model = quantized(weights)
    widths = {f"w{k}": bits for k, (bits, _, _) in enumerate(chosen)}
    count = counted(model, weights, WeightStorage.PACKED, spread)
    assert count.bytes(widths) == file_bytes(stored(model, WeightStorage.PACKED, ())[0])
    sizes = count.sizes(widths)
    assert sizes.total(widths) == count.bytes(widths)


def test_the_count_is_the_size_of_the_native_file():
    rng = np.random.default_rng(0)
    weights = {f"w{k}": (drawn(rng, bits, (30, 40 + k), 0, False), 0) for k, bits in enumerate((2, 3, 4, 6))}
    model = quantized(weights, 25)
    count = counted(model, weights, WeightStorage.NATIVE, dict.fromkeys(weights, False), (2, 4))
    made, _ = native(model, (2, 4))
    assert count.bytes(dict(zip(weights, (2, 3, 4, 6), strict=True))) == file_bytes(made)


def test_values_in_files_count_as_if_they_were_inside(tmp_path):
    values = drawn(np.random.default_rng(0), 4, (400, 800), 0, spread=True)
    model = quantized({"w": (values, 0)})
    apart = edit.with_nodes(model, model.graph.node, [store.constant(values, "w", str(tmp_path))], drop=["w"])
    assert store.folder_of(apart)
    assert file_bytes(apart) == store.load_all(apart).ByteSize() == model.ByteSize()


@pytest.mark.parametrize("count", [1, 127, 128, 20_000, 3_000_000])
def test_a_tally_counts_what_a_builder_adds(count):
    model = quantized({"w": (np.zeros((2, 2), np.int8), 0)})
    builder, tally = edit.Builder(model), Tally()
    for b in (builder, tally):
        b.keep(np.zeros((count, 1), np.uint8), "a_name")
        b.add("Add", ["x", np.arange(3)], "y")
    result = edit.with_nodes(model, [*model.graph.node, *builder.nodes], builder.initializers)
    assert abs(result.graph.ByteSize() - model.graph.ByteSize() - tally.bytes) == 0
