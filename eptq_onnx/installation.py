"""What is installed here, what of it is used, and what is missing."""

from __future__ import annotations

import json
import os
import platform
import re
from collections import defaultdict
from dataclasses import asdict, dataclass, field
from importlib import metadata
from pathlib import Path

import psutil

from eptq_onnx import demo, engines, runtimes
from eptq_onnx._version import __version__
from eptq_onnx.api import quantize
from eptq_onnx.config import Config
from eptq_onnx.errors import EptqError
from eptq_onnx.parallel import available_cores, worker_count
from eptq_onnx.report.plain import plain
from eptq_onnx.runtime import installed_distributions, load
from eptq_onnx.targets import machine

_FOR_DEVELOPERS = ("docs", "test")
_REQUIREMENT = re.compile(r"^\s*([\w.-]+).*;.*\bextra\s*==\s*['\"]([\w-]+)['\"]")
_TRIED = 8
"""Samples of the run that shows whether it works."""
_FEATURES = {
    "AVX2": r"\bavx2\b",
    "AVX-512": r"\bavx512f\b",
    "VNNI": r"\bavx(512)?_?vnni\b",
    "AMX": r"\bamx_int8\b",
    "ARM dot product": r"\basimddp\b",
    "ARM i8mm": r"\bi8mm\b",
}
"""Instructions that integer kernels use, as Linux names them."""


@dataclass(frozen=True)
class Extra:
    """An extra of the package.

    Parameters
    ----------
    name : str
    packages : dict of str to str
        Distribution to its version; empty if it is not installed.
    """

    name: str
    packages: dict[str, str]

    @property
    def installed(self) -> bool:
        """Return True if all its packages are."""
        return all(self.packages.values())


@dataclass(frozen=True)
class Installation:
    """This installation.

    Parameters
    ----------
    version, python, system : str
    onnxruntime : dict of str to str
        Distribution to version of what provides onnxruntime.
    processor : str
    features : dict of str to bool
        Instructions that integer kernels use; empty if this system does not list them.
    cores, usable_cores, workers : int
        Cores of the machine, those that this process may use, and threads of a run.
    memory_bytes, free_memory_bytes : int
    engine : str
        What gradients come from by default.
    target, why_target : str
        What the target ``auto`` stands for here, and why.
    runtimes : dict of str to str
        Each runtime that checks files: empty if it can be used, else what is missing.
    extras : tuple of Extra
        Empty if the package is not installed but run from its source.
    problems : tuple of str
        Why this installation cannot quantize.
    """

    version: str
    python: str
    system: str
    onnxruntime: dict[str, str]
    processor: str
    features: dict[str, bool]
    cores: int
    usable_cores: int
    workers: int
    memory_bytes: int
    free_memory_bytes: int
    engine: str
    target: str
    why_target: str
    runtimes: dict[str, str]
    extras: tuple[Extra, ...]
    problems: tuple[str, ...] = field(default=())

    def to_json(self) -> str:
        """Return everything as JSON."""
        found = asdict(self)
        for extra, own in zip(found["extras"], self.extras, strict=True):
            extra["installed"] = own.installed
        return json.dumps(plain(found), indent=2)


def installation() -> Installation:
    """Look at this installation, and try it."""
    memory = psutil.virtual_memory()
    target, why = machine.fitting()
    return Installation(
        version=__version__,
        python=f"{platform.python_implementation()} {platform.python_version()}",
        system=f"{platform.system()} {platform.release()}, {platform.machine()}",
        onnxruntime=installed_distributions(),
        processor=_processor(),
        features=_features(),
        cores=os.cpu_count() or 1,
        usable_cores=available_cores(),
        workers=worker_count(),
        memory_bytes=_limited(memory.total),
        free_memory_bytes=memory.available,
        engine=_engine(),
        target=target,
        why_target=why,
        runtimes={name: found.available() or "" for name, found in runtimes.registered().items()},
        extras=_extras(),
        problems=_problems(),
    )


def _processor() -> str:
    """Return the name of the processor, as far as the system tells."""
    named = re.search(r"^model name\s*:\s*(.+)$", machine.cpuinfo(), re.MULTILINE)
    return named[1].strip() if named else platform.processor() or platform.machine()


def _features() -> dict[str, bool]:
    """Return which instructions of integer kernels the processor has; empty if Linux does not list them."""
    listed = machine.cpuinfo()
    arm = platform.machine().lower() in ("aarch64", "arm64")
    return {
        name: re.search(pattern, listed, re.IGNORECASE) is not None
        for name, pattern in _FEATURES.items()
        if listed and name.startswith("ARM") == arm
    }


def _limited(total: int) -> int:
    """Return the memory of the machine, or of this process's container if that is less."""
    for file in ("memory.max", "memory/memory.limit_in_bytes"):
        try:
            return min(total, int((Path("/sys/fs/cgroup") / file).read_text(encoding="ascii")))
        except (OSError, ValueError):
            continue
    return total


def _engine() -> str:
    try:
        return engines.choose(engines.AUTO).name
    except EptqError:
        return ""


def _extras() -> tuple[Extra, ...]:
    """Return the extras of the package with the versions of what they install."""
    try:
        required = metadata.requires("eptq-onnx") or []
    except metadata.PackageNotFoundError:
        return ()
    packages: dict[str, dict[str, str]] = defaultdict(dict)
    for requirement in required:
        found = _REQUIREMENT.match(requirement)
        if found is not None and found[2] not in _FOR_DEVELOPERS:
            packages[found[2]][found[1]] = _version(found[1])
    return tuple(Extra(name, own) for name, own in packages.items())


def _version(distribution: str) -> str:
    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return ""


def _problems() -> tuple[str, ...]:
    """Return why this installation cannot quantize; empty if it can, which is tried."""
    config = Config(steps=1, objective="integers", measure_speed=False)
    try:
        load()
        quantize(demo.MODEL, {"image": demo.draw(_TRIED, seed=0).as_input()}, config)
    except EptqError as e:
        return (str(e),)
    return ()
