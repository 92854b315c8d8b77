"""Formats, granularities and storage against onnx's reference evaluator and exact rational arithmetic."""

from __future__ import annotations

from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from hypothesis import given
from hypothesis import strategies as st
from onnx import TensorProto, helper, numpy_helper
from onnx.reference import ReferenceEvaluator

import eptq_onnx
from eptq_onnx.numerics.formats import (
    E4M3,
    E5M2,
    FloatFormat,
    IntFormat,
    PerAxis,
    PerBlock,
    PerTensor,
    Storage,
)
from eptq_onnx.numerics.grid import Grid, Levels, nearest_float

INTEGERS = [IntFormat.full(bits, signed=signed) for bits in range(2, 17) for signed in (True, False)]
SMALL_FLOATS = [E4M3, E5M2, FloatFormat(2, 1), FloatFormat(3, 2), FloatFormat(5, 10)]
GRANULARITIES = [PerTensor(), PerAxis(1), PerAxis(0), PerBlock(1, 2), PerBlock(1, 4), PerBlock(0, 3)]
SHAPE = (4, 6, 3)


def name(value: object) -> str:
    return str(value).replace(" ", "")


def values(form, seed: int = 0) -> np.ndarray:
    rng = np.random.default_rng(seed)
    x = rng.normal(0, form.largest / 3, SHAPE).astype(np.float32)
    x.reshape(-1)[:6] = [0, -0.0, form.largest, 1e30, -1e30, form.largest / 2]
    return x


def grid(form, granularity, seed: int = 0) -> Grid:
    rng = np.random.default_rng(seed + 1)
    shape = granularity.scale_shape(SHAPE)
    scale = np.exp2(rng.integers(-3, 2, shape)).astype(np.float32) * np.float32(1.1)
    zero = rng.integers(form.qmin, form.qmax + 1, shape) if isinstance(form, IntFormat) else 0
    return Grid(form, granularity, np.asarray(scale, np.float32), zero)


def in_fractions(x: float, g: Grid, place: tuple[int, ...]) -> Fraction:
    """Return the value of the format, in exact arithmetic on the result of the float32 division."""
    scale = np.broadcast_to(g.granularity.spread(g.scale, SHAPE), SHAPE)[place]
    zero = np.broadcast_to(g.granularity.spread(np.asarray(g.zero_point), SHAPE), SHAPE)[place]
    steps = Fraction(float(np.float32(x) / np.float32(scale)))
    if isinstance(g.format, IntFormat):
        return Fraction(min(max(round(steps) + int(zero), g.format.qmin), g.format.qmax))
    codes = np.arange(2**g.format.bits, dtype=np.uint16)
    numbers = g.format.values(codes)
    known = [(Fraction(float(v)), int(c)) for v, c in zip(numbers, codes, strict=True) if np.isfinite(v)]
    # Ties go to the pattern with an even last bit.
    return min(known, key=lambda k: (abs(k[0] - steps), k[1] & 1))[0]


@pytest.mark.parametrize("granularity", GRANULARITIES, ids=name)
@pytest.mark.parametrize("form", [*INTEGERS[::3], *SMALL_FLOATS[:4]], ids=name)
def test_values_are_rounded_as_exact_arithmetic_says(form, granularity):
    g, x = grid(form, granularity), values(form)
    got = g.quantize(x)
    for place in list(np.ndindex(SHAPE))[::5]:
        assert Fraction(float(got[place])) == in_fractions(float(x[place]), g, place), (x[place], place)


TYPES: dict[str, tuple[int, IntFormat | FloatFormat]] = {
    "int4": (TensorProto.INT4, IntFormat.full(4, signed=True)),
    "uint4": (TensorProto.UINT4, IntFormat.full(4, signed=False)),
    "int8": (TensorProto.INT8, IntFormat.full(8, signed=True)),
    "uint8": (TensorProto.UINT8, IntFormat.full(8, signed=False)),
    "int16": (TensorProto.INT16, IntFormat.full(16, signed=True)),
    "uint16": (TensorProto.UINT16, IntFormat.full(16, signed=False)),
    "e4m3": (TensorProto.FLOAT8E4M3FN, E4M3),
    "e5m2": (TensorProto.FLOAT8E5M2, E5M2),
}


def reference(kind: int, g: Grid, x: np.ndarray) -> np.ndarray:
    """Run QuantizeLinear and DequantizeLinear in onnx's reference evaluator."""
    attributes: dict[str, Any] = {}
    if isinstance(g.granularity, PerAxis):
        attributes = {"axis": g.granularity.axis}
    if isinstance(g.granularity, PerBlock):
        attributes = {"axis": g.granularity.axis, "block_size": g.granularity.size}
    zero = np.broadcast_to(np.asarray(g.zero_point), g.scale.shape)
    constants = [
        numpy_helper.from_array(g.scale, "s"),
        helper.make_tensor("z", kind, g.scale.shape, zero.reshape(-1).tolist()),
    ]
    nodes = [
        helper.make_node("QuantizeLinear", ["x", "s", "z"], ["q"], **attributes),
        helper.make_node("DequantizeLinear", ["q", "s", "z"], ["y"], **attributes),
    ]
    ends = [helper.make_tensor_value_info(n, TensorProto.FLOAT, x.shape) for n in ("x", "y")]
    model = helper.make_model(
        helper.make_graph(nodes, "g", ends[:1], ends[1:], constants),
        opset_imports=[helper.make_opsetid("", 21)],
    )
    (y,) = ReferenceEvaluator(model).run(None, {"x": x})
    return np.asarray(y)


@pytest.mark.skipif(
    int(onnx.__version__.split(".")[1]) < 17,
    reason="onnx before 1.17 has no blocks in its reference evaluator",
)
@pytest.mark.parametrize(
    "granularity",
    [g for g in GRANULARITIES if not isinstance(g, PerBlock) or SHAPE[g.axis] % g.size == 0],
    ids=name,
)
@pytest.mark.parametrize("label", TYPES)
def test_onnx_computes_the_same(label, granularity):
    kind, form = TYPES[label]
    # The evaluator casts values far beyond the range to garbage.
    g, x = grid(form, granularity), np.clip(values(form), -4 * form.largest, 4 * form.largest)
    np.testing.assert_array_equal(g.round(x), reference(kind, g, x))


@pytest.mark.parametrize("storage", list(Storage))
@pytest.mark.parametrize("form", [*INTEGERS, *SMALL_FLOATS], ids=name)
def test_what_is_encoded_comes_back(form, storage):
    g = grid(form, PerTensor())
    stored = g.quantize(values(form))
    content = g.encode(stored, storage)
    np.testing.assert_array_equal(g.decode(content, SHAPE, storage), stored)
    if storage is Storage.PACKED:
        assert len(content) == -(-stored.size * form.bits // 8)


@pytest.mark.parametrize("label", TYPES)
def test_native_storage_is_that_of_onnx(label):
    kind, form = TYPES[label]
    g = grid(form, PerTensor())
    stored = g.quantize(values(form))
    tensor = helper.make_tensor("t", kind, SHAPE, stored.reshape(-1).tolist())
    ours = onnx.TensorProto(data_type=kind, dims=SHAPE, raw_data=g.encode(stored, Storage.NATIVE))
    np.testing.assert_array_equal(
        numpy_helper.to_array(ours).astype(np.float32), numpy_helper.to_array(tensor).astype(np.float32)
    )


@pytest.mark.parametrize("form", SMALL_FLOATS, ids=name)
def test_every_bit_pattern_is_a_number_and_back(form):
    codes = np.arange(2**form.bits, dtype=np.uint16)
    numbers = form.values(codes)
    finite = np.isfinite(numbers)
    np.testing.assert_array_equal(form.codes(numbers[finite]), codes[finite])
    np.testing.assert_array_equal(nearest_float(numbers[finite].astype(np.float64), form), numbers[finite])
    assert numbers[finite].max() == form.largest


@pytest.mark.parametrize("form", [*SMALL_FLOATS, IntFormat(4, True, -7, 7)], ids=name)
def test_positions_count_the_values_and_lie_evenly_between_them(form):
    codes = np.arange(2**form.bits, dtype=np.uint16)
    numbers = np.unique(form.values(codes))
    numbers = numbers[np.isfinite(numbers) & (numbers >= form.qmin) & (numbers <= form.qmax)]
    places = form.position(numbers)
    np.testing.assert_array_equal(places, np.arange(len(numbers)) - np.searchsorted(numbers, 0))
    np.testing.assert_array_equal(form.at(places), numbers)
    middles = (numbers[1:] + numbers[:-1]) / 2
    np.testing.assert_array_equal(form.position(middles), (places[1:] + places[:-1]) / 2)
    np.testing.assert_array_equal(form.at(form.position(middles)), middles)
    np.testing.assert_array_equal(
        np.broadcast_to(form.gap(form.position(middles)), middles.shape), np.diff(numbers)
    )
    assert form.at(places[-1:] + 3) == form.qmax
    assert not form.is_inside(places[-1:] + 1).any()
    assert form.is_inside(places).all()
    x = np.random.default_rng(0).normal(0, form.largest / 3, 500).astype(np.float32)
    rounded = Levels(form, np.zeros(())).nearest(x)
    np.testing.assert_array_equal(form.at(np.rint(form.position(x))), rounded)


@given(st.integers(2, 16), st.booleans(), st.data())
def test_a_narrower_range_is_kept(bits, signed, data):
    whole = IntFormat.full(bits, signed=signed)
    low = data.draw(st.integers(whole.qmin, whole.qmax - 1))
    form = IntFormat(bits, signed, low, data.draw(st.integers(low + 1, whole.qmax)))
    x = np.array(data.draw(st.lists(st.floats(-1e6, 1e6, width=32), min_size=1, max_size=5)), np.float32)
    q = Grid(form, PerTensor(), np.array(0.7, np.float32), form.qmin).quantize(x)
    assert form.qmin <= q.min() <= q.max() <= form.qmax


@pytest.mark.parametrize(("bits", "low", "high"), [(1, 0, 1), (17, 0, 1), (4, -9, 3), (4, 3, 3), (8, 0, 128)])
def test_a_range_that_does_not_fit_the_width_is_refused(bits, low, high):
    with pytest.raises(ValueError, match="do not hold"):
        IntFormat(bits, True, low, high)


def test_nothing_rounds_but_the_grid():
    """`np.rint` stands in numerics/grid.py alone, apart from a weight sum that is whole by construction."""
    folder = Path(eptq_onnx.__file__).parent
    rounding = {
        str(p.relative_to(folder)) for p in folder.rglob("*.py") if "np.rint" in p.read_text(encoding="utf-8")
    }
    assert rounding == {"numerics/grid.py", "graph/lower/sampling.py"}


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("signed", [False, True])
def test_the_grid_of_16_bits_has_all_values_of_one_of_fewer(bits, signed):
    form = IntFormat.full(bits, signed=signed)
    integers = np.arange(form.qmin, form.qmax + 1)
    for zero in (form.qmin, form.qmax, form.qmax // 3):
        for scale in np.random.default_rng(bits).uniform(1e-7, 3, 20).astype(np.float32):
            grid = Grid(form, PerTensor(), scale, zero)
            values, wide = grid.dequantize(integers), grid.widened()
            assert wide.format == IntFormat.full(16, signed=signed)
            np.testing.assert_array_equal(wide.round(values), values)
            np.testing.assert_array_equal(
                wide.in_container(values), (integers - zero) * 256 + wide.zero_point
            )
