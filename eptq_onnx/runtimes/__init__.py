"""Runtimes that check a written model, discovered automatically: each is one file."""

from __future__ import annotations

from functools import cache

from eptq_onnx.discovery import classes
from eptq_onnx.errors import ConfigError
from eptq_onnx.runtimes.base import Verifier

DEFAULT = "onnxruntime"
"""Name of the default runtime."""


@cache
def registered() -> dict[str, type[Verifier]]:
    """Return all verifiers by name, whether or not their runtimes are installed."""
    found = classes(__name__, Verifier)  # type: ignore[type-abstract]
    return {verifier.name: verifier for verifier in sorted(found, key=lambda verifier: verifier.name)}


def choose(name: str) -> type[Verifier]:
    """Return the verifier with a name.

    Raises
    ------
    ConfigError
        If no verifier has that name.
    """
    if name not in registered():
        raise ConfigError(f"runtime {name!r} is unknown: choose one of {', '.join(registered())}.")
    return registered()[name]


def make(name: str = DEFAULT) -> Verifier:
    """Create a verifier.

    Raises
    ------
    ConfigError
        If no verifier has that name.
    InstallError
        If the runtime is missing or damaged.
    """
    return choose(name)()
