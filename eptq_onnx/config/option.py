"""What an option is beside its type, default and limits."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from enum import Enum
from typing import Any

from pydantic import BaseModel, ConfigDict, ValidationError
from pydantic.fields import FieldInfo

from eptq_onnx.config.wrong import describe
from eptq_onnx.errors import ConfigError


@dataclass(frozen=True)
class Option:
    """Metadata of a field of `Config`, `Accuracy` or `Gate`; its help is the field's docstring.

    Parameters
    ----------
    section : str
        Table of a configuration file that holds it.
    flag : str
        Name on the command line, if it is not that of the field with dashes.
    off : str
        For a switch, the name that turns it off, if it is not the flag's with ``no-``.
    metavar : str
        What stands for the value in help, if the type does not tell.
    text : bool
        True if it is written as text on the command line, in a form that the field reads.
    default : str
        What help calls the default, if the value does not tell.
    advanced : bool
        True for what few users need.
    in_result : bool
        False if the written model does not depend on it.
    """

    section: str
    flag: str = ""
    off: str = ""
    metavar: str = ""
    text: bool = False
    default: str = ""
    advanced: bool = False
    in_result: bool = True


def option_of(field: FieldInfo) -> Option:
    """What a field is as an option."""
    return next(m for m in field.metadata if isinstance(m, Option))


def flags_of(name: str, field: FieldInfo) -> list[str]:
    """Return its name on the command line, and for a switch the one that turns it off, too."""
    flag = option_of(field).flag or "--" + name.replace("_", "-")
    off = option_of(field).off or f"--no-{flag[2:]}"
    return [flag, off] if field.annotation in (bool, bool | None) else [flag]


def written_as(name: str, field: FieldInfo, value: object) -> list[str]:
    """Return the arguments that give an option this value on the command line; none for None."""
    flag, *off = flags_of(name, field)
    if value is None:
        return []
    if isinstance(value, bool):
        return [flag if value else off[0]]
    if isinstance(value, Mapping):
        items: list[object] = [f"{key}={'none' if v is None else v}" for key, v in value.items()]
    else:
        items = list(value) if isinstance(value, (tuple, list)) else [value]
    texts = [str(item.value if isinstance(item, Enum) else item) for item in items]
    return [part for text in texts for part in (flag, text)]


class OptionModel(BaseModel):
    """Options as a record; each field is documented by a string behind it.

    Raises
    ------
    ConfigError
        If an option is invalid; the message names it.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True, allow_inf_nan=False)

    def __init__(self, **options: Any) -> None:
        try:
            super().__init__(**options)
        except ValidationError as e:
            raise ConfigError(describe(e, "option", type(self))) from e
