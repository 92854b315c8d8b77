"""Reader that calls a function which returns the data."""

from __future__ import annotations

import importlib
import os
import sys
import traceback
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from eptq_onnx.data.readers import open_source
from eptq_onnx.data.readers.base import Opened, Reader, Request, is_path
from eptq_onnx.errors import DataError, one_line


class FunctionReader(Reader):
    """Reads what a function without arguments returns, named as ``module:function``."""

    form = "module:function, a function without arguments that returns any of these or yields feeds"
    order = 30

    def takes(self, source: Any) -> bool:
        """Return True for two names joined by a colon, unless a file has that name."""
        if not is_path(source):
            return False
        module, colon, name = str(source).partition(":")
        names = [*module.split("."), name]
        return bool(colon) and all(part.isidentifier() for part in names) and not Path(source).exists()

    def open(self, source: Any, request: Request) -> Opened:
        """Call the function and read what it returns."""
        found = open_source(function_named(str(source), "data function")(), request)
        return replace(found, origin=replace(found.origin, label=f"what {source} gives"))

    def files(self, source: Any) -> list[tuple[str, Path]]:
        """Return the module's file, assuming that it lies in the working folder."""
        module = str(source).partition(":")[0]
        return [("the calibration script", Path(os.path.abspath(module.replace(".", os.sep) + ".py")))]


def function_named(label: str, what: str) -> Callable[..., Any]:
    """Import a function named as ``module:function``, from the working folder, too.

    Parameters
    ----------
    label : str
    what : str
        What the function is for, in errors.

    Raises
    ------
    DataError
        If it cannot be imported, or is no function.
    """
    module, _, name = label.partition(":")
    here = os.getcwd()
    if here not in sys.path:
        sys.path.insert(0, here)  # Python adds a script's own folder, but not a command's working folder
    try:
        found = importlib.import_module(module)
    except ModuleNotFoundError as e:
        if e.name is None or not f"{module}.".startswith(f"{e.name}."):
            raise DataError(
                f"{what} {label}: the module {module} needs {e.name}, which is not installed."
            ) from e
        file = module.replace(".", os.sep)
        raise DataError(
            f"{what} {label}: there is no module {module}, neither as {file}.py in {here} nor installed."
        ) from e
    except (Exception, SystemExit) as e:
        # Whatever the module does when it is imported.
        raise DataError(f"{what} {label}: the module {module} fails: {failure(e)}.") from e
    function = getattr(found, name, None)
    if not callable(function):
        known = [n for n, v in vars(found).items() if callable(v) and getattr(v, "__module__", "") == module]
        listed = f": it has {', '.join(known)}" if known else ""
        raise DataError(f"{what} {label}: the module {module} has no function {name}{listed}.")
    return function  # type: ignore[no-any-return]


def failure(error: BaseException) -> str:
    """Return an error in somebody else's code in a line: its type, its message, and where it was raised."""
    told = f"{type(error).__name__}: {one_line(error)}".rstrip(": .")
    places = traceback.extract_tb(error.__traceback__)
    if isinstance(error, SyntaxError) or not places:
        return told
    return f"{told} ({Path(places[-1].filename).name}, line {places[-1].lineno})"
