"""Gradient engines, one file each, found by themselves; the only importers of gradient libraries."""

from __future__ import annotations

from functools import cache

from eptq_onnx.discovery import classes
from eptq_onnx.engines.base import Engine
from eptq_onnx.errors import ConfigError

AUTO = "auto"
"""Stands for the best engine that can run here."""


@cache
def registered() -> dict[str, type[Engine]]:
    """All engines by name, the best first, whether they can run here or not."""
    found = classes(__name__, Engine)  # type: ignore[type-abstract]
    return {
        engine.name: engine for engine in sorted(found, key=lambda engine: (-engine.preference, engine.name))
    }


def choose(name: str) -> type[Engine]:
    """The engine of a name, or the best that can run here.

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
    """An engine, ready to differentiate.

    Raises
    ------
    ConfigError
        If there is no such engine.
    InstallError
        If what it needs is missing or damaged.
    """
    return choose(name)()
