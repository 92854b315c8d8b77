from __future__ import annotations

import io
import struct
import zipfile
import zlib
from typing import Any

import numpy as np
import psutil
import pytest
from graphs import images, parse

from eptq_onnx import DataError
from eptq_onnx import data as calibration
from eptq_onnx.data import archives

TWO = parse("g (float[N,3] x, float[N,3] y) => (float[N,3] z) { z = Add (x, y) }")


def opened(path):
    return calibration.load(path, TWO)


def saved(value: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, value)
    return buffer.getvalue()


def with_header(descr: str, shape: str, data: bytes = b"", version: int = 1) -> bytes:
    text = f"{{'descr': {descr}, 'fortran_order': False, 'shape': {shape}, }}".ljust(117).encode() + b"\n"
    return (
        b"\x93NUMPY"
        + bytes([version, 0])
        + struct.pack("<H" if version == 1 else "<I", len(text))
        + text
        + data
    )


def zipped(path, members, method=zipfile.ZIP_DEFLATED):
    with zipfile.ZipFile(path, "w", method) as archive:
        for name, data in members:
            archive.writestr(name, data)
    return path


def patched(path, edits):
    """Return a file's content with bytes replaced at an offset behind a marker."""
    data = bytearray(path.read_bytes())
    for marker, offset, new in edits:
        place = data.rindex(marker) + offset
        data[place : place + len(new)] = new
    path.write_bytes(data)
    return path


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
@pytest.mark.parametrize("dtype", ["f4", "f8", "f2", "i8", "u1", "?", "S3", "U5", ">f4"])
def test_what_numpy_writes_is_read(tmp_path, save, dtype):
    values = {
        "a": (images(2) * 3).astype(dtype),
        "b/c": np.asfortranarray(images(1)[0].astype(dtype)),
        "n": np.zeros((0, 3), dtype),
    }
    save(tmp_path / "d.npz", **values)
    got = archives.read(tmp_path / "d.npz")
    assert list(got) == list(values)
    for name, value in values.items():
        np.testing.assert_array_equal(got[name], value)
        assert got[name].dtype == value.dtype


def test_an_array_alone_and_one_of_no_axes_are_read(tmp_path):
    for value in (images(3), np.float32(4.0)):
        np.save(tmp_path / "d.npy", value)
        np.testing.assert_array_equal(archives.read(tmp_path / "d.npy"), value)


HEADERS = {
    "values that are not there": ("'<f4'", "(1000000,)"),
    "more than any memory": ("'<f4'", "(4611686018427387904, 4)"),
    "more than 64 bits": ("'<f4'", "(99999999999999999999999999,)"),
    "negative": ("'<f4'", "(-4,)"),
    "two negative": ("'<f4'", "(-2, -2)"),
    "empty but huge": ("'<f4'", "(0, 99999999999999999999)"),
    "many axes": ("'<f4'", str((1,) * 33)),
    "no shape": ("'<f4'", "None"),
    "shape of text": ("'<f4'", "('a',)"),
    "objects": ("'|O'", "(2,)"),
    "no such type": ("'<q99'", "(2,)"),
    "no bytes": ("'|S0'", "(99999999999,)"),
    "huge text": ("'|S2147483647'", "(99999,)"),
    "records": ("[('a', '<f4'), ('b', '|O')]", "(2,)"),
    "records of numbers": ("[('a', '<f4')]", "(2,)"),
    "void": ("'|V8'", "(1,)"),
    "dates": ("'<M8[s]'", "(1,)"),
    "no literal": ("__import__('os')", "(2,)"),
    "nested": ("(" * 90 + ")" * 90, "(2,)"),
    "unhashable": ("{[]: 1}", "(2,)"),
}


@pytest.mark.parametrize("kind", HEADERS)
@pytest.mark.parametrize("container", ["npy", "npz", "version 2"])
def test_an_absurd_header_is_refused_before_anything_is_allocated(tmp_path, monkeypatch, kind, container):
    monkeypatch.setattr(archives, "_array", lambda _: pytest.fail("values were read"))
    data = with_header(*HEADERS[kind], bytes(8), version=2 if container == "version 2" else 1)
    if container == "npz":
        path = zipped(tmp_path / "d.npz", [("good.npy", saved(images(1))), ("bad.npy", data)])
    else:
        path = tmp_path / "d.npy"
        path.write_bytes(data)
    with pytest.raises(DataError) as e:
        opened(path)
    assert str(path) in str(e.value)
    assert ("bad.npy" in str(e.value)) == (container == "npz")
    assert "\n" not in str(e.value)


def test_pickled_arrays_are_never_loaded(tmp_path):
    value = np.array([{"a": 1}, None], dtype=object)
    np.savez(tmp_path / "d.npz", x=images(2), o=value)
    with pytest.raises(DataError, match=r"d\.npz: the member o\.npy holds pickled Python objects"):
        opened(tmp_path / "d.npz")
    np.save(tmp_path / "d.npy", value)
    with pytest.raises(DataError, match=r"d\.npy holds pickled Python objects"):
        opened(tmp_path / "d.npy")
    value.dump(tmp_path / "p.npz")
    with pytest.raises(DataError, match=r"p\.npz is not a readable .* pickled Python objects"):
        opened(tmp_path / "p.npz")


@pytest.mark.parametrize("share", [1, 3])
def test_what_unpacks_to_more_than_the_free_memory_is_refused(tmp_path, monkeypatch, share):
    """One member is too large, or several are together; 4 MB of zeros compress to 4 kB."""
    path = tmp_path / "d.npz"
    members: dict[str, Any] = {f"a{k}": np.zeros(3_000_000 // share, np.float32) for k in range(share)}
    np.savez_compressed(path, **members)
    assert path.stat().st_size < 50_000
    monkeypatch.setattr(psutil, "virtual_memory", lambda: type("Memory", (), {"available": 10**7}))
    monkeypatch.setattr(archives, "_array", lambda _: pytest.fail("values were read"))
    with pytest.raises(
        DataError, match=r"d\.npz unpacks to 12000000 bytes, and 10000000 bytes of memory are free"
    ):
        opened(path)


CENTRAL = b"PK\1\2"


def damaged(tmp_path, kind):
    data = saved(images(40))
    if kind == "bad checksum":
        return patched(
            zipped(tmp_path / "d.npz", [("x.npy", data)], zipfile.ZIP_STORED),
            [(data[:200], 5000, b"\1\2\3\4")],
        )
    if kind == "bad data":
        return patched(zipped(tmp_path / "d.npz", [("x.npy", data)]), [(CENTRAL, -4000, bytes(100))])
    path = zipped(tmp_path / "d.npz", [("x.npy", data)])
    size = len(data)
    if kind == "encrypted":
        return patched(path, [(CENTRAL, 8, b"\1\0")])
    if kind == "declared small":
        return patched(path, [(CENTRAL, 24, struct.pack("<L", size // 2))])
    if kind == "declared large":
        return patched(path, [(CENTRAL, 24, struct.pack("<L", 2**31))])
    if kind == "unknown method":
        return patched(path, [(CENTRAL, 10, b"\x63\0")])
    if kind == "version":
        return patched(path, [(CENTRAL, 6, b"\xff\0")])
    if kind == "header elsewhere":
        return patched(path, [(CENTRAL, 42, struct.pack("<L", 10**6))])
    if kind == "bad name":
        return patched(path, [(CENTRAL, 46, b"\xff\xfe"), (CENTRAL, 8, b"\0\x08")])
    if kind == "directory elsewhere":
        return patched(path, [(b"PK\5\6", 16, struct.pack("<L", 2**31))])
    if kind == "huge directory":
        return patched(path, [(b"PK\5\6", 12, struct.pack("<L", 2**31))])
    if kind == "two members of one name":
        return patched(zipped(path, [("x.npy", data), ("y.npy", data)]), [(b"y.npy", 0, b"x.npy")])
    if kind == "no array":
        return zipped(path, [("x.npy", b"GIF89a and more")])
    if kind == "short":
        return zipped(path, [("x.npy", data[:-100])])
    if kind == "long":
        return zipped(path, [("x.npy", data + bytes(100))])
    if kind == "nothing":
        return zipped(path, [("x.npy", b"")])
    if kind == "no members":
        return zipped(path, [])
    if kind == "many members":
        return zipped(path, [(f"a{k}", b"") for k in range(10_001)], zipfile.ZIP_STORED)
    return zipped(path, [("x.npy", data)], zipfile.ZIP_LZMA if kind == "lzma" else zipfile.ZIP_BZIP2)


KINDS = [
    "bad checksum", "bad data", "encrypted", "declared small", "declared large", "unknown method", "version",
    "header elsewhere", "bad name", "directory elsewhere", "huge directory", "two members of one name",
    "no array", "short", "long", "nothing", "no members", "many members", "lzma", "bzip2",
]  # fmt: skip


@pytest.mark.filterwarnings("ignore:Duplicate name")
@pytest.mark.parametrize("kind", KINDS)
def test_a_damaged_archive_is_told_in_one_sentence(tmp_path, kind):
    path = damaged(tmp_path, kind)
    with pytest.raises(DataError, match=r"d\.npz") as e:
        opened(path)
    assert str(path) in str(e.value)
    assert "\n" not in str(e.value)
    assert str(e.value).endswith(".")


@pytest.mark.parametrize("seed", range(60))
def test_drawn_damage_is_an_error_or_changes_nothing(tmp_path, seed):
    """Flipped, missing or inserted bytes never cause another exception or silently change values."""
    rng = np.random.default_rng(seed)
    values: dict[str, Any] = {"x": images(2), "y": np.arange(5)}
    (np.savez if seed % 2 else np.savez_compressed)(tmp_path / "d.npz", **values)
    data = (tmp_path / "d.npz").read_bytes()
    for k in range(20):
        place = int(rng.integers(len(data)))
        new = rng.bytes(int(rng.integers(0, 5)))
        path = tmp_path / f"{k}.npz"
        path.write_bytes(data[:place] + new + data[place + int(rng.integers(0, 5)) :] if k else data[:place])
        try:
            got = archives.read(path)
        except DataError:
            continue
        for name, value in got.items() if isinstance(got, dict) else ():
            if name in values and value.dtype == values[name].dtype and value.shape == values[name].shape:
                assert zlib.crc32(value.tobytes()) == zlib.crc32(values[name].tobytes())


def test_a_file_in_a_folder_of_feeds_that_is_no_feed_is_told(tmp_path):
    np.savez(tmp_path / "a.npz", x=images(1))
    (tmp_path / "b.npz").write_bytes(saved(images(1)))
    with pytest.raises(DataError, match=r"b\.npz holds one array without a name"):
        opened(tmp_path)
