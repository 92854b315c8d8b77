"""Options from files: TOML with a table for each section, or the report of a former run."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from eptq_onnx.config.accuracy import Accuracy
from eptq_onnx.config.config import Config
from eptq_onnx.config.option import option_of
from eptq_onnx.config.reading import Reading
from eptq_onnx.config.wrong import nearest, sentence
from eptq_onnx.errors import ConfigError, one_line

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

SECTIONS = {
    name: option_of(field).section
    for options in (Config, Reading, Accuracy)
    for name, field in options.model_fields.items()
}
"""The table of each option."""


def read_options(path: Path) -> dict[str, Any]:
    """Options of a file, by name.

    Parameters
    ----------
    path : path
        ``.json`` is the report of a run; anything else is TOML, options in the tables of their sections or
        outside any.

    Raises
    ------
    ConfigError
        If it cannot be read, or holds what is no option.
    """
    try:
        text = path.read_text(encoding="utf-8")
        given = json.loads(text)["config"] if path.suffix == ".json" else tomllib.loads(text)
        if not isinstance(given, dict):
            raise ValueError("its options are no table")
    except OSError as e:
        raise ConfigError(f"the configuration {path} cannot be read: {e.strerror or e}.") from e
    except KeyError as e:
        raise ConfigError(f"the configuration {path} is no report of a run: it holds no {e}.") from e
    except (ValueError, TypeError, RecursionError) as e:
        raise ConfigError(f"the configuration {path} cannot be read: {one_line(e)}.") from e
    options: dict[str, Any] = {}
    for name, value in given.items():
        table = value if name in SECTIONS.values() and isinstance(value, dict) else {name: value}
        for option, entry in table.items():
            if option not in SECTIONS or (table is value and SECTIONS[option] != name):
                where = f" in the table {name}" if table is value else ""
                own = f": it belongs into the table {SECTIONS[option]}" if option in SECTIONS else ""
                meant = own or nearest(option, SECTIONS)
                raise ConfigError(
                    sentence(f"the configuration {path}: option {option}{where} is unknown{meant}")
                )
            if option in options:
                raise ConfigError(f"the configuration {path}: option {option} is given twice.")
            options[option] = entry
    return options
