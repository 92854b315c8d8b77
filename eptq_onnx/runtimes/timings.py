"""Read and write timings files: one that the user names, or one in the user's cache folder."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

from platformdirs import user_cache_path
from pydantic import TypeAdapter, ValidationError

from eptq_onnx.errors import ConfigError
from eptq_onnx.files import write_atomically
from eptq_onnx.placement import Timings

_FORMAT = 2
_FILE: TypeAdapter[Timings] = TypeAdapter(Timings)


def cached(network: str, runtime: str, machine: str, threads: int) -> Path:
    """Return the path of the timings file in the user's cache folder for these conditions."""
    key = json.dumps([_FORMAT, network, runtime, machine, threads])
    return user_cache_path("eptq-onnx") / "timings" / f"{hashlib.sha256(key.encode()).hexdigest()[:24]}.json"


def read(path: Path, network: str, threads: int) -> Timings | None:
    """Return the timings in a file; None if the file does not exist.

    Parameters
    ----------
    path : Path
    network : str
        Digest of the network that the timings must belong to.
    threads : int
        Number of threads that they must be measured with.

    Raises
    ------
    ConfigError
        If the file cannot be read, is damaged, or belongs to another network or number of threads.
    """
    if not path.exists():
        return None
    again = "remove it to measure again"
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(content, dict) or content.pop("format", None) != _FORMAT:
            raise ValueError("its format is unknown")
        found = _FILE.validate_python(content)
    except OSError as e:
        raise ConfigError(f"timings file {path} cannot be read: {e.strerror or e}.") from e
    except ValidationError as e:
        first = e.errors()[0]
        place = ".".join(map(str, first["loc"]))
        raise ConfigError(f"timings file {path} is damaged: {place}: {first['msg']}; {again}.") from e
    except ValueError as e:
        raise ConfigError(f"{path} is not a timings file: {e}; name another file, or {again}.") from e
    if found.network != network:
        raise ConfigError(
            f"timings file {path} was measured for another model, other options or other samples: {again}."
        )
    if found.placement.threads != threads:
        raise ConfigError(
            f"timings file {path} was measured with runtime_threads={found.placement.threads}: use the same "
            f"number, or {again}."
        )
    return found


def write(path: Path, timings: Timings) -> None:
    """Write timings atomically.

    Raises
    ------
    OutputError
        If the file cannot be written.
    """
    content = {"format": _FORMAT, **_FILE.dump_python(timings, mode="json")}
    write_atomically(path, (json.dumps(content, indent=1) + "\n").encode())
