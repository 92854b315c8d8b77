"""Read .npy and .npz files that may be damaged or hostile.

Declared sizes are checked before anything is allocated.
"""

from __future__ import annotations

import math
import os
import struct
import zipfile
from pathlib import Path
from typing import IO, Any

import numpy as np
import psutil
from numpy.typing import NDArray

from eptq_onnx.errors import DataError, one_line

_MEMBERS = 10_000
"""Most arrays in an archive, which holds one per input of the model."""
_DIRECTORY = 2**24
"""Most bytes of an archive's directory, which zipfile reads at once."""
_RANK = 32
"""Most axes of an array that every version of numpy supports."""
_VALUES = 2**48
"""Most values of an array, not counting empty axes."""
_KINDS = "biufcSU"
"""Kinds of element types that a model can take."""
_METHODS = (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED)
"""Compression methods that numpy writes; zipfile's other ones do not limit what they unpack at once."""
_HINT = "save the arrays with numpy.savez"


def read(path: Path) -> NDArray[Any] | dict[str, NDArray[Any]]:
    """Read an array from a .npy file, or all arrays of a .npz file by name.

    The content decides which of the two it is.

    Raises
    ------
    DataError
        If the file cannot be read, is damaged, encrypted or pickled, or does not fit into memory.
    """
    try:
        with open(path, "rb") as file:
            magic = file.read(6)
            file.seek(0)
            if magic[:4] in (b"PK\3\4", b"PK\5\6"):
                return _archive(file, path)
            if magic == np.lib.format.MAGIC_PREFIX:
                return _alone(file, path)
    except DataError:
        raise
    except Exception as e:
        # For damaged files, numpy and zipfile raise a dozen exception types: zlib.error, struct.error,
        # NotImplementedError, ...
        raise DataError(f"data file {path} is not a readable .npz file: {_message(e)}.") from e
    pickled = " (it may hold pickled Python objects, which are never loaded)" if magic[:1] == b"\x80" else ""
    raise DataError(f"data file {path} is not a readable .npz or .npy file{pickled}: {_HINT}.")


def read_file(path: Path) -> NDArray[Any] | dict[str, NDArray[Any]]:
    """Read a file like `read`, with an error of its own if it is missing.

    Raises
    ------
    DataError
        If there is no such file, or it cannot be read.
    """
    if not path.is_file():
        raise DataError(f"data file or folder {path} does not exist.")
    return read(path)


def _alone(file: IO[bytes], path: Path) -> NDArray[Any]:
    label = f"data file {path}"
    size = os.fstat(file.fileno()).st_size
    declared = _declared_bytes(file, label)
    if declared > size - file.tell():
        raise DataError(
            f"{label} is truncated: it declares {declared} bytes of values, and holds {size - file.tell()}."
        )
    _check_memory(declared, label)
    file.seek(0)
    return _array(file)


def _archive(file: IO[bytes], path: Path) -> dict[str, NDArray[Any]]:
    label = f"data file {path}"
    if _directory_bytes(file) > _DIRECTORY:
        raise DataError(f"{label} has too many members: it may hold one array for each input of the model.")
    with zipfile.ZipFile(file) as archive:
        members = _members(archive, label)
        total = sum(
            _member_bytes(archive, info, f"{label}: the member {_shown(info.filename)}")
            for info in members.values()
        )
        _check_memory(total, label)
        return {
            name: _member(archive, info, f"{label}: the member {_shown(info.filename)}")
            for name, info in members.items()
        }


def _members(archive: zipfile.ZipFile, label: str) -> dict[str, zipfile.ZipInfo]:
    """Return the archive's entries by array name."""
    found: dict[str, zipfile.ZipInfo] = {}
    infos = [info for info in archive.infolist() if not info.is_dir()]
    if not infos:
        raise DataError(f"{label} holds no arrays: {_HINT}.")
    if len(infos) > _MEMBERS:
        raise DataError(
            f"{label} has {len(infos)} members: it may hold one array for each input of the model."
        )
    for info in infos:
        name = info.filename.removesuffix(".npy")
        if name in found:
            raise DataError(f"{label} has two members for the array {_shown(name)}: {_HINT}.")
        found[name] = info
    return found


def _member_bytes(archive: zipfile.ZipFile, info: zipfile.ZipInfo, label: str) -> int:
    """Return the bytes of values that a member declares, which must match the archive's directory."""
    if info.flag_bits & 1:
        raise DataError(f"{label} is encrypted: {_HINT}.")
    if info.compress_type not in _METHODS:
        raise DataError(f"{label} is compressed by a method that numpy does not write: {_HINT}.")
    try:
        with archive.open(info) as stream:
            begin = stream.read(6)
        if begin != np.lib.format.MAGIC_PREFIX:
            raise DataError(f"{label} is not a .npy array: {_HINT}.")
        with archive.open(info) as stream:
            declared = _declared_bytes(stream, label)
            held = info.file_size - stream.tell()
    except DataError:
        raise
    except Exception as e:
        raise DataError(f"{label} is damaged: {_message(e)}.") from e
    if declared != held:
        raise DataError(
            f"{label} declares {declared} bytes of values, but the archive says that it holds {held}."
        )
    return declared


def _member(archive: zipfile.ZipFile, info: zipfile.ZipInfo, label: str) -> NDArray[Any]:
    try:
        with archive.open(info) as stream:
            value = _array(stream)
            # Reading to the end verifies the checksum.
            stream.read(1)
            return value
    except Exception as e:
        raise DataError(f"{label} is damaged: {_message(e)}.") from e


def _array(file: IO[bytes]) -> NDArray[Any]:
    value: NDArray[Any] = np.lib.format.read_array(file, allow_pickle=False)
    return value


def _declared_bytes(file: IO[bytes], label: str) -> int:
    """Return the bytes of values declared by the header of a .npy, leaving the file behind the header."""
    try:
        version = np.lib.format.read_magic(file)
        readers = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}
        if version not in readers:
            number = ".".join(map(str, version))
            raise DataError(
                f"{label} is of version {number} of the .npy format, which no plain array needs: {_HINT}."
            )
        shape, _, dtype = readers[version](file)
    except DataError:
        raise
    except Exception as e:
        # The header is a Python literal, whose parser raises other errors.
        raise DataError(f"{label} has a damaged .npy header: {_message(e)}.") from e
    if dtype.hasobject:
        raise DataError(
            f"{label} holds pickled Python objects, which are never loaded: save an array of numbers."
        )
    if dtype.kind not in _KINDS or not dtype.itemsize:
        kind = _shown(str(dtype))
        raise DataError(f"{label} has values of type {kind}, which no model takes: save an array of numbers.")
    if any(size < 0 for size in shape) or len(shape) > _RANK or math.prod(filter(None, shape)) > _VALUES:
        raise DataError(f"{label} has the shape {_shown(str(shape))}, which is not a valid array shape.")
    return math.prod(shape) * dtype.itemsize


def _directory_bytes(file: IO[bytes]) -> int:
    """Return the size of a zip archive's directory as declared by its last record; 0 without one."""
    size = file.seek(0, os.SEEK_END)
    file.seek(max(0, size - 2**16 - 100))
    end = file.read()
    file.seek(0)
    place = end.rfind(b"PK\5\6")
    if place < 0 or len(end) < place + 22:
        return 0
    declared: int = struct.unpack_from("<L", end, place + 12)[0]
    # In large archives, a second record of 56 bytes and its locator of 20 bytes precede the first.
    wide = place - 76
    if wide >= 0 and end[wide : wide + 4] == b"PK\6\6" and end[place - 20 : place - 16] == b"PK\6\7":
        declared = struct.unpack_from("<Q", end, wide + 40)[0]
    return declared


def _check_memory(needed: int, label: str) -> None:
    free = psutil.virtual_memory().available
    if needed > free:
        raise DataError(
            f"{label} unpacks to {needed} bytes, and {free} bytes of memory are free: "
            "give fewer samples, or a folder of .npz files."
        )


def _message(error: Exception) -> str:
    return one_line(error, 200).rstrip(".") or type(error).__name__


def _shown(text: str) -> str:
    """Return text from a file as one short line."""
    return text.encode("unicode_escape").decode()[:100]
