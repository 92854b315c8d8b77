"""Finds what stands in the files of a package, so that a new file needs no line elsewhere."""

from __future__ import annotations

import inspect
import pkgutil
from importlib import import_module
from types import ModuleType
from typing import TypeVar

T = TypeVar("T")


def modules(package: str) -> list[ModuleType]:
    """Import all modules of a package, and return them in the order of their names."""
    places = import_module(package).__path__
    return [
        import_module(f"{package}.{name}")
        for name in sorted(found.name for found in pkgutil.iter_modules(places))
    ]


def classes(package: str, base: type[T]) -> list[type[T]]:
    """The classes that the modules of a package derive from ``base``, without abstract ones, module by
    module."""
    members = [(module, value) for module in modules(package) for value in vars(module).values()]
    return [
        value
        for module, value in members
        if isinstance(value, type)
        and issubclass(value, base)
        and value.__module__ == module.__name__
        and not inspect.isabstract(value)
    ]
