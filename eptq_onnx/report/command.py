"""The command that a report is of."""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from typing import Any

from pydantic import BaseModel

from eptq_onnx.config import Accuracy, Config, Reading
from eptq_onnx.config.option import written_as
from eptq_onnx.data.origin import Origin


def command_of(model: str, data: Origin, config: Mapping[str, Any]) -> str:
    """Return the command that makes the same file again.

    Recipes are whole, with what was guessed: then it does not depend on the guess.

    Parameters
    ----------
    model : str
    data : Origin
        Where the samples come from.
    config : mapping of str to object
        All options with their values, as JSON; see `eptq_onnx.report.Report`.
    """
    words = ["eptq-onnx", "quantize", model or "model.onnx"]
    words += ["--data", data.label] if data.needed else []
    for name, recipe in data.recipe.items():
        words += [f"--{name}", recipe]
    given = {name: value for name, value in config.items() if name not in data.recipe}
    for options in (Reading, Config, Accuracy):
        words += _changed(options, given)
    return shlex.join(words)


def _changed(options: type[BaseModel], config: Mapping[str, Any]) -> list[str]:
    """Return the arguments for options that are not as by default."""
    default = options().model_dump(mode="json")
    found: list[str] = []
    for name, field in options.model_fields.items():
        if name not in config or config[name] == default[name]:
            continue
        value = config[name]
        if name == "budget":
            value = [b if isinstance(b, str) else f"{b['unit']}={b['amount']:g}" for b in value]
        if name == "encodings":
            value = value["file"] or "encodings.json"
        found += written_as(name, field, value)
    return found
