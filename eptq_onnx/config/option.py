"""What an option is beside its type, default and limits."""

from __future__ import annotations

from dataclasses import dataclass

from pydantic.fields import FieldInfo


@dataclass(frozen=True)
class Option:
    """Metadata of a field of `Config` or `Gate`; its help is the field's docstring.

    Parameters
    ----------
    section : str
        Table of a configuration file that holds it.
    flag : str
        Name on the command line, if it is not that of the field with dashes.
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
    metavar: str = ""
    text: bool = False
    default: str = ""
    advanced: bool = False
    in_result: bool = True


def option_of(field: FieldInfo) -> Option:
    """What a field is as an option."""
    return next(m for m in field.metadata if isinstance(m, Option))
