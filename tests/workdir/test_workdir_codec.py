"""Values come back from a workdir as they were: type, layout in memory and all."""

from __future__ import annotations

from dataclasses import fields
from types import MappingProxyType

import numpy as np
import pytest
from graphs import small_convnet
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from onnx import numpy_helper

from eptq_onnx.config import Preset
from eptq_onnx.errors import OutputError
from eptq_onnx.numerics.biases import BiasSpec
from eptq_onnx.numerics.formats import E4M3, IntFormat, PerAxis, PerBlock, PerTensor
from eptq_onnx.numerics.grid import Grid
from eptq_onnx.numerics.spec import QuantSpec
from eptq_onnx.proto import store
from eptq_onnx.records import KeptFloat, Plan
from eptq_onnx.workdir import HashOnly, Workdir, decode, encode
from eptq_onnx.workdir.codec import objects_of

DTYPES = st.sampled_from(["float32", "float64", "int8", "uint8", "int64", "bool", "float16"])


@st.composite
def arrays(draw):
    """Arrays of any type and shape, turned, cut and reversed."""
    shape = draw(hnp.array_shapes(min_dims=0, max_dims=4, min_side=0, max_side=5))
    array = np.frombuffer(np.random.default_rng(draw(st.integers(0, 99))).bytes(8 * 625), np.int64)[
        : int(np.prod(shape))
    ]
    array = (
        (array % 128).astype(draw(DTYPES)).reshape(shape).transpose(draw(st.permutations(range(len(shape)))))
    )
    return array[::2] if array.ndim and draw(st.booleans()) else array


SCALARS = st.none() | st.booleans() | st.integers(-(2**130), 2**130) | st.floats() | st.text() | st.binary()
NUMBERS = (
    st.builds(np.float32, st.floats(width=32))
    | st.builds(np.float64, st.floats())
    | st.builds(np.int64, st.integers(-99, 99))
)
KEYS = st.text() | st.integers() | st.tuples(st.text(), st.integers())
FORMATS = st.sampled_from([IntFormat.full(4, signed=True), E4M3])
GRANULARITIES = st.sampled_from([PerTensor(), PerAxis(1), PerBlock(0, 32)])
VALUES = st.recursive(
    SCALARS | NUMBERS | arrays() | st.frozensets(st.text()) | st.sampled_from(Preset),
    lambda inner: (
        st.lists(inner, max_size=4)
        | st.dictionaries(KEYS, inner, max_size=4)
        | st.tuples(inner, inner)
        | st.builds(Grid, FORMATS, GRANULARITIES, arrays(), st.integers(0, 255))
    ),
    max_leaves=12,
)


def same(a, b) -> bool:
    if type(a) is not type(b):
        return False
    if isinstance(a, (np.ndarray, np.generic)):
        # The bytes, NaN included, and where sums go along.
        orders = [
            np.argsort([-abs(s) for s, n in zip(x.strides, x.shape, strict=True) if n > 1], kind="stable")
            for x in (a, b)
        ]
        return (
            a.dtype == b.dtype
            and a.shape == b.shape
            and a.tobytes() == b.tobytes()
            and np.array_equal(orders[0], orders[1])
        )
    if isinstance(a, float):
        return np.float64(a).tobytes() == np.float64(b).tobytes() or bool(np.isnan(a) and np.isnan(b))
    if isinstance(a, dict):
        return list(a) == list(b) and all(same(a[k], b[k]) for k in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(same, a, b))
    if isinstance(a, Grid):
        return all(same(getattr(a, f.name), getattr(b, f.name)) for f in fields(a))
    return a == b


@pytest.fixture(scope="module")
def workdir(tmp_path_factory):
    with Workdir(tmp_path_factory.mktemp("values") / "w") as found:
        yield found


@settings(max_examples=80, deadline=None)
@given(value=VALUES)
def test_values_come_back_as_they_were(workdir, value):
    digest = encode(value, workdir)
    assert digest == encode(value, HashOnly())
    assert same(decode(digest, workdir), value)


@pytest.mark.parametrize("axes", [(0, 1, 2), (2, 1, 0), (1, 2, 0)])
def test_heavy_arrays_are_kept_once_and_read_when_looked_at(workdir, axes):
    array = np.random.default_rng(0).normal(size=(30, 40, 50)).astype(np.float32).transpose(axes)
    digest = encode({"one": array, "other": array}, workdir)
    assert len(objects_of(digest, workdir)) == 2
    found = decode(digest, workdir)["other"]
    assert same(found, array)
    found[:] = 0
    assert same(decode(digest, workdir)["one"], array)


def test_arrays_of_strings_and_mappings_of_any_kind_are_kept(workdir):
    found = decode(encode(MappingProxyType({"a": np.array(["x", "größer"], object)}), workdir), workdir)
    assert found["a"].tolist() == ["x", "größer"]


def test_a_set_has_one_digest_whatever_its_order():
    names = [f"n{k}" for k in range(50)]
    assert encode(frozenset(names), HashOnly()) == encode(frozenset(reversed(names)), HashOnly())


def test_a_record_comes_back(workdir):
    spec = QuantSpec(IntFormat.full(4, signed=True), PerAxis(0), (-1, 1))
    plan = Plan(
        (), (), (), (), {"n": "Conv"}, {}, (KeptFloat("k", "Exp", "no kernel"),), BiasSpec(), frozenset({"e"})
    )
    assert decode(encode((spec, plan), workdir), workdir) == (spec, plan)


@pytest.mark.parametrize("stored", [False, True])
def test_models_come_back_with_weights_inside_or_in_files(workdir, tmp_path, stored):
    model = small_convnet()
    heavy = np.random.default_rng(0).normal(size=(100, 400)).astype(np.float32)
    model.graph.initializer.append(
        store.constant(heavy, "heavy", str(tmp_path)) if stored else numpy_helper.from_array(heavy, "heavy")
    )
    digest = encode(model, workdir)
    (tmp_path / "new").mkdir()
    found = decode(digest, workdir, str(tmp_path / "new"))
    assert store.is_stored(found.graph.initializer[-1]) is stored
    assert store.load_all(found).SerializeToString(deterministic=True) == store.load_all(
        model
    ).SerializeToString(deterministic=True)
    if stored:
        assert store.folder_of(found) == str(tmp_path / "new")
        with pytest.raises(ValueError, match="needs a folder"):
            decode(digest, workdir)


@pytest.mark.parametrize("value", [object(), {"a": len}, np.zeros(2, [("x", "f4")]), 1j])
def test_other_types_are_refused(workdir, value):
    with pytest.raises(TypeError, match="cannot be kept"):
        encode(value, workdir)


@pytest.mark.parametrize(
    "name", ["os:system", "eptq_onnx.workdir.codec:_value", "eptq_onnx.errors:EptqError"]
)
def test_nothing_but_the_packages_records_is_made(workdir, name):
    digest = workdir.put(b'{"@": "record", "class": "' + name.encode() + b'", "fields": {}}')
    with pytest.raises(OutputError, match="damaged"):
        decode(digest, workdir)
