"""Gradient engines, one file each, discovered automatically; only they import gradient libraries."""

from __future__ import annotations

from functools import cache

from eptq_onnx.discovery import classes
from eptq_onnx.engines.base import Engine
from eptq_onnx.errors import ConfigError

AUTO = "auto"
"""Name that stands for the best engine available."""


@cache
def registered() -> dict[str, type[Engine]]:
    """Return all engines by name, available or not, in order of preference."""
    found = classes(__name__, Engine)  # type: ignore[type-abstract]
    return {
        engine.name: engine for engine in sorted(found, key=lambda engine: (-engine.preference, engine.name))
    }


def choose(name: str) -> type[Engine]:
    """Return the engine of a name, or for `AUTO` the best one available.

    Raises
    ------
    ConfigError
        If there is no such engine.
    """
    known = registered()
    if name == AUTO:
        return next(engine for engine in known.values() if engine.available())
    if name not in known:
        raise ConfigError(f"engine {name!r} is unknown: choose one of {', '.join([AUTO, *known])}.")
    return known[name]


def make(name: str = AUTO) -> Engine:
    """Create an engine.

    Raises
    ------
    ConfigError
        If there is no such engine.
    InstallError
        If software that the engine needs is missing or damaged.
    """
    return choose(name)()
