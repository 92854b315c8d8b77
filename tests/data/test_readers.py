"""Each form of data has one reader; the first reader that takes a source reads it."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest
from graphs import parse

from eptq_onnx import Data, DataError, data
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
    for name in ("photos/1/a.jpg", "sounds/a.wav", "empty/x.pdf", "mixed/a.npy"):
        Path(name).parent.mkdir(parents=True)
        Path(name).write_bytes(b"")
    for name in ("mixed/b.JPG", "mixed/c.png"):
        Path(name).write_bytes(b"")
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
        ("photos", "PictureReader"),
        ("mixed", "PictureReader"),
        ("missing.png", "PictureReader"),
        ("sounds", "SoundReader"),
        ("empty", "FolderReader"),
        ("missing.txt", "TextReader"),
        ("texts.jsonl", "TextReader"),
        ("random", "RandomReader"),
        (Path("random"), "ArchiveReader"),
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
        ("mixed", ["mixed/b.JPG", "mixed/c.png"]),
        ("random", []),
        (Data("photos", tokenizer="t.json"), ["photos/1/a.jpg", "t.json"]),
        ("some.module:function", ["some/module.py"]),
    ]:
        assert [path for _, path in readers.files_of(source)] == [folder / name for name in expected]
    assert readers.files_of("m:f")[0][0] == "the calibration script"
    assert readers.files_of("x.npz")[0][0] == "the calibration data"


def test_a_folder_of_arrays_without_names_serves_a_model_with_one_input(folder):
    model = parse("g (float[N,3] x) => (float[N,3] y) { y = Identity (x) }")
    Path("arrays").mkdir()
    for k in range(5):
        np.save(f"arrays/{k}.npy", np.full((1, 3), k, np.float32))
    samples = data.read(Data("arrays", samples=2), model)
    assert [samples.take([k])["x"][0, 0] for k in range(samples.count)] == [0, 4]


def test_a_folder_that_cannot_be_read_is_told(folder, monkeypatch):
    scan = os.scandir

    def refuse(path: str) -> object:
        if str(path).endswith("1"):
            raise PermissionError(13, "Permission denied", path)
        return scan(path)

    monkeypatch.setattr(os, "scandir", refuse)
    with pytest.raises(DataError, match="photos/1 cannot be read: Permission denied"):
        readers.files_of("photos")
