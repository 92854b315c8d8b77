from __future__ import annotations

import tempfile

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from eptq_onnx import DataError
from eptq_onnx.data.shelf import Shelf

SHAPES = st.lists(st.sampled_from([(), (3,), (0,), (2, 3), (1, 0, 2)]), min_size=1, max_size=6)


@settings(deadline=None, max_examples=40)
@given(SHAPES, st.sampled_from(["f4", "i8", "?", "U3"]), st.booleans())
def test_what_comes_in_comes_out(shapes, dtype, filed):
    shelf = Shelf(filed=filed)
    arrays = [(np.arange(np.prod(s)) + 10 * k).reshape(s).astype(dtype) for k, s in enumerate(shapes)]
    for array in arrays:
        shelf.add(array)
    assert len(shelf) == len(arrays)
    values = shelf.values()
    assert isinstance(values, np.ndarray) == (filed and dtype != "U3" and len(set(shapes)) == 1)
    for found in (values, shelf.entries()):
        assert len(found) == len(arrays)
        for a, b in zip(found, arrays, strict=True):
            np.testing.assert_array_equal(a, b)
            assert a.dtype == b.dtype


def test_numbers_are_in_a_file_that_nobody_has_to_remove(tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    shelf = Shelf()
    for k in range(3):
        shelf.add(np.full((2, 2), k, np.float32).T)
    values = shelf.values()
    base = values
    while isinstance(base, np.ndarray) and not isinstance(base, np.memmap):
        base = base.base  # type: ignore[assignment]
    assert isinstance(base, np.memmap)
    assert not list(tmp_path.iterdir())
    del shelf
    np.testing.assert_array_equal(np.asarray(values)[:, 0, 0], [0, 1, 2])


def test_a_disk_without_room_is_told(tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "missing"))
    with pytest.raises(DataError, match=r"cannot be kept in a temporary file .*TMPDIR"):
        Shelf().add(np.zeros(3))
