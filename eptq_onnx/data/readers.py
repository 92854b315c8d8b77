"""Where calibration data comes from: arrays, feeds, files, or a function that gives them."""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from eptq_onnx.data import archives
from eptq_onnx.errors import DataError

Arrays = Mapping[str, NDArray[np.generic] | Sequence[NDArray[np.generic]]]
Feed = Mapping[str, NDArray[np.generic]]
Source = str | os.PathLike[str] | Arrays | NDArray[np.generic] | Iterable[Feed]


def opened(source: Source) -> tuple[NDArray[np.generic] | Arrays | Sequence[Feed], str]:
    """The data behind a source, and what to call it in messages.

    Parameters
    ----------
    source : Source
        One of

        - a mapping from input name to an array with samples along the first axis, or to a list of samples of any sizes;
        - for a model with one input, such an array;
        - an iterable of feeds: mappings from input name to what the model takes in one run, batch axis included;
        - the path of a .npz (a mapping), of a .npy (an array), or of a folder of .npz files, each of them a feed;
        - ``"module:function"``, a function without arguments that gives any of these.

    Raises
    ------
    DataError
        If it cannot be read.
    """
    if isinstance(source, np.ndarray):
        return source, "the calibration data"
    if isinstance(source, Mapping):
        return source, "the calibration data"
    if not isinstance(source, (str, os.PathLike)):
        return _feeds(source, "the calibration data"), "the calibration data"
    path = Path(source)
    if path.is_dir():
        return _folder(path), str(path)
    module, colon, name = str(source).partition(":")
    if not path.exists() and colon and name.isidentifier() and all(part.isidentifier() for part in module.split(".")):
        given, _ = opened(_function(module, name, str(source))())
        return given, f"what {source} gives"
    return _file(path), str(path)


def files_of(source: Any) -> list[tuple[str, Path]]:
    """The files that calibration data is read from, each with what it is; none of what cannot be read."""
    if isinstance(source, Mapping):
        return [file for value in source.values() for file in files_of(value)]
    if isinstance(source, np.memmap) and source.filename is not None:
        return [("the calibration data", Path(os.path.abspath(source.filename)))]
    if not isinstance(source, (str, os.PathLike)):
        return []
    path = Path(os.path.abspath(source))
    if path.is_dir():
        return [("the calibration data", file) for file in sorted(path.glob("*.npz"))]
    if not path.exists() and ":" in str(source):
        module = Path(os.path.abspath(str(source).partition(":")[0].replace(".", os.sep) + ".py"))
        return [("the calibration script", module)]
    return [("the calibration data", path)]


def _feeds(source: Iterable[Any], label: str) -> list[Feed]:
    feeds = list(source)
    odd = [k for k, feed in enumerate(feeds) if not isinstance(feed, Mapping)]
    if odd:
        raise DataError(f"{label}: item {odd[0]} is a {type(feeds[odd[0]]).__name__}, not a mapping from input name to array.")
    if not feeds:
        raise DataError(f"{label} has no samples.")
    return feeds


def _folder(path: Path) -> list[Feed]:
    files = sorted(path.glob("*.npz"))
    if not files:
        raise DataError(f"data folder {path} has no .npz file.")
    feeds = [(file, _file(file)) for file in files]
    odd = next((file for file, feed in feeds if not isinstance(feed, dict)), None)
    if odd is not None:
        raise DataError(f"data file {odd} holds one array without a name: in a folder each file is a feed, saved with numpy.savez.")
    return [feed for _, feed in feeds if isinstance(feed, dict)]


def _function(module: str, name: str, label: str) -> Callable[[], Any]:
    here = os.getcwd()
    if here not in sys.path:
        sys.path.insert(0, here)  # a script's own folder is there, a command's is not
    try:
        function = getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError) as e:
        raise DataError(f"data function {label} cannot be imported: {e}.") from e
    if not callable(function):
        raise DataError(f"{label} is no function.")
    return function  # type: ignore[no-any-return]


def _file(path: Path) -> NDArray[np.generic] | dict[str, NDArray[np.generic]]:
    if not path.is_file():
        raise DataError(f"data file {path} does not exist.")
    return archives.read(path)
