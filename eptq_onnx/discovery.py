"""Find what the modules of a package define, so that a new file needs no entry elsewhere."""

from __future__ import annotations

import inspect
import pkgutil
from importlib import import_module
from types import ModuleType
from typing import TypeVar

T = TypeVar("T")


def modules(package: str) -> list[ModuleType]:
    """Import all modules of a package, sorted by name."""
    places = import_module(package).__path__
    return [
        import_module(f"{package}.{name}")
        for name in sorted(found.name for found in pkgutil.iter_modules(places))
    ]


def classes(package: str, base: type[T]) -> list[type[T]]:
    """Return the concrete subclasses of ``base`` that a package defines, module by module."""
    members = [(module, value) for module in modules(package) for value in vars(module).values()]
    return [
        value
        for module, value in members
        if isinstance(value, type)
        and issubclass(value, base)
        and value.__module__ == module.__name__
        and not inspect.isabstract(value)
    ]
