"""Runtimes that a model can be quantized for: one TOML file each, read into a frozen `Target`.

A file can extend another file and then holds only the differences; see `load`.
"""

from __future__ import annotations

import sys
from importlib import resources
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from eptq_onnx.config import describe
from eptq_onnx.errors import ConfigError
from eptq_onnx.targets import machine
from eptq_onnx.targets.rows import (
    ActivationRules,
    BiasRules,
    Operator,
    PatternRules,
    RestRules,
    Runs,
    Shift,
    Size,
    WeightRules,
)
from eptq_onnx.targets.target import ONNXRUNTIME, OPSETS, Target

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

AUTO = "auto"
"""Name that selects the shipped target for onnxruntime on this machine."""


def names() -> list[str]:
    """Return the names of the shipped targets."""
    return sorted(
        p.name.removesuffix(".toml") for p in resources.files(__name__).iterdir() if p.name.endswith(".toml")
    )


def load(name: str) -> Target:
    """Read a shipped target by name, or a target file by path; ``"auto"`` selects one for this machine.

    The field ``extends`` names a base: a shipped target, or a path relative to the file's own folder. Fields
    that the file lacks come from the base, except name and title. Tables are merged field by field, lists are
    replaced, and an empty table removes that of the base.

    Raises
    ------
    ConfigError
        If there is no such target, if targets extend each other in a cycle, or if a file is invalid.
    """
    if name == AUTO:
        name = machine.fitting()[0]
    path = Path(name)
    if name.endswith(".toml"):
        if not path.is_file():
            raise ConfigError(f"target file {name} does not exist.")
    elif name in names():
        path = _shipped(name)
    else:
        raise ConfigError(
            f"target {name!r} is unknown: choose one of {', '.join([AUTO, *names()])}, or give a .toml file."
        )
    content = _content(path, name, ())
    try:
        return Target.model_validate(content)
    except ValidationError as e:
        raise ConfigError(f"target file {name}: {describe(e, 'field', Target)}") from e


def fit_of(name: str, target: Target) -> str | None:
    """Return how a target fits this machine: which one ``"auto"`` selects and why, or what a processor lacks
    that the target needs; None if there is nothing to say."""
    if name == AUTO:
        chosen, why = machine.fitting()
        return f"target {chosen}: {why}"
    if target.processor == "any" or not machine.saturates():
        return None
    other = f"; for machines like this one, use --target {target.elsewhere}" if target.elsewhere else ""
    return (
        f"target {target.name} is for processors with VNNI, which this machine lacks: its 8-bit products "
        f"saturate here, so that figures measured here can be worse than on the target{other}"
    )


def _shipped(name: str) -> Path:
    return Path(str(resources.files(__name__))) / f"{name}.toml"


def _content(path: Path, shown: str, above: tuple[Path, ...]) -> dict[str, Any]:
    """Return the fields and tables of a file, merged with those of its base.

    ``above`` are the files that extend it; ``shown`` is its name in error messages.
    """
    above = (*above, path.resolve())
    try:
        own = tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as e:
        raise ConfigError(f"target file {shown} cannot be read: {e.strerror or e}.") from e
    except ValueError as e:
        raise ConfigError(f"target file {shown} is not valid TOML: {e}.") from e
    base = own.pop("extends", None)
    if base is None:
        return own
    if not isinstance(base, str) or not (base.endswith(".toml") or base in names()):
        raise ConfigError(
            f"target file {shown} extends {base!r}, which is unknown: choose one of {', '.join(names())}, "
            "or give a .toml file."
        )
    file = path.parent / base if base.endswith(".toml") else _shipped(base)
    if not file.is_file():
        raise ConfigError(f"target file {shown} extends {base}, which does not exist.")
    if file.resolve() in above:
        raise ConfigError(f"target file {shown} extends {base}, which extends it in turn.")
    inherited = _content(file, base, above)
    return _merged(
        {field: value for field, value in inherited.items() if field not in ("name", "title")}, own
    )


def _merged(base: dict[str, Any], own: dict[str, Any]) -> dict[str, Any]:
    """Return the fields of both; tables are merged, and other fields of ``own`` take precedence."""
    merged = {**base, **own}
    for field in base.keys() & own.keys():
        if isinstance(base[field], dict) and isinstance(own[field], dict) and own[field]:
            merged[field] = _merged(base[field], own[field])
    return merged


__all__ = [
    "AUTO",
    "ONNXRUNTIME",
    "OPSETS",
    "ActivationRules",
    "BiasRules",
    "Operator",
    "PatternRules",
    "RestRules",
    "Runs",
    "Shift",
    "Size",
    "Target",
    "WeightRules",
    "fit_of",
    "load",
    "names",
]
