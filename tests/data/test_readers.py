"""Each form of data has one reader; the first reader that takes a source reads it."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from eptq_onnx.data import readers

ARRAY = np.zeros((2, 3), np.float32)


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    np.savez("x.npz", x=ARRAY)
    np.save("x.npy", ARRAY)
    Path("feeds").mkdir()
    for k in (1, 0):
        np.savez(f"feeds/{k}.npz", x=ARRAY)
    Path("a:b").write_bytes(b"")
    return tmp_path


@pytest.mark.parametrize(
    ("source", "name"),
    [
        (ARRAY, "ArrayReader"),
        ({"x": ARRAY}, "ArrayReader"),
        ([{"x": ARRAY}], "FeedReader"),
        (iter([{"x": ARRAY}]), "FeedReader"),
        ("feeds", "FolderReader"),
        ("some.module:function", "FunctionReader"),
        ("x.npz", "ArchiveReader"),
        (Path("x.npy"), "ArchiveReader"),
        ("a:b", "ArchiveReader"),
        ("no-name:function", "ArchiveReader"),
        ("missing.npz", "ArchiveReader"),
    ],
)
def test_a_source_is_read_by_the_first_reader_that_takes_it(source, name):
    assert next(type(reader).__name__ for reader in readers.registered() if reader.takes(source)) == name


def test_readers_are_asked_in_a_stated_order_and_those_of_python_first():
    found = readers.registered()
    assert [reader.order for reader in found] == sorted({reader.order for reader in found})
    assert [reader.on_command_line for reader in found] == sorted(reader.on_command_line for reader in found)


def test_what_is_read_is_named(folder):
    mapped = np.load("x.npy", mmap_mode="r")
    for source, expected in [
        (ARRAY, []),
        ([{"x": ARRAY}], []),
        (mapped, ["x.npy"]),
        ({"x": mapped, "y": ARRAY}, ["x.npy"]),
        ("x.npz", ["x.npz"]),
        ("feeds", ["feeds/0.npz", "feeds/1.npz"]),
        ("some.module:function", ["some/module.py"]),
    ]:
        assert [path for _, path in readers.files_of(source)] == [folder / name for name in expected]
    assert readers.files_of("m:f")[0][0] == "the calibration script"
    assert readers.files_of("x.npz")[0][0] == "the calibration data"
