"""What is wrong with options, in one sentence: the option, its value, what it takes, what may be meant."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import suppress
from difflib import get_close_matches
from enum import Enum
from typing import Any, get_args

import annotated_types
from pydantic import BaseModel, ValidationError
from pydantic.fields import FieldInfo

_TAGS = frozenset({"callable", "str", "int", "float", "bool", "tuple", "list", "dict", "none"})
"""Names that pydantic gives to the members of a union."""
_WHOLE, _NUMBER = "a whole number", "a number"
_KINDS = {
    "int": _WHOLE,
    "float": _NUMBER,
    "decimal": _NUMBER,
    "finite": "a finite number",
    "bool": "true or false",
    "path": "the path of a file",
    "string": "text",
    "tuple": "text, or a list of texts",
    "list": "a list",
    "dict": "text, or a table",
    "model": "text, or a table",
    "byte": "a size such as 4GB or 500MB",
    "callable": "a function",
}
"""What is wanted, by the first word of the type of pydantic's error."""
_BOUNDS = ("greater_than", "less_than")


def describe(error: ValidationError, what: str, model: type[BaseModel]) -> str:
    """Describe the first problem of a pydantic error in one sentence.

    Parameters
    ----------
    error : ValidationError
    what : str
        What the fields are called, such as ``option``.
    model : type of BaseModel
        The record that was to be made.
    """
    # Whatever a value holds, the sentence is one line.
    return "".join(c if c.isprintable() else repr(c)[1:-1] for c in _described(error, what, model))


def _described(error: ValidationError, what: str, model: type[BaseModel]) -> str:
    errors = error.errors()
    first = errors[0]
    parts = _name(first["loc"])
    name, kind = ".".join(parts), first["type"]
    if kind == "extra_forbidden":
        return sentence(f"{what} {name} is unknown{_meant(parts, model)}")
    if kind == "missing":
        return f"{what} {name} is missing."
    if not name:
        # Options that do not go together: the message names them.
        return f"{_own(first)}."
    field = _field(parts, model)
    alike = [e for e in errors if _name(e["loc"]) == parts]
    if kind in ("value_error", "assertion_error"):
        wanted = _own(first)
        wanted = f"{wanted[:1].lower()}{wanted[1:]}"
    else:
        wanted = f"give {' or '.join(dict.fromkeys(_wanted(e, field) for e in alike))}"
        wanted += _nearest(first["input"], [c for e in alike for c in _choices(e)])
    return f"{what} {name}={_shown(first['input'])} is wrong: {wanted}."


def _shown(value: object) -> str:
    """Return a value as it was written; a number that came as text needs no quotes."""
    if isinstance(value, str):
        with suppress(ValueError):
            float(value)
            return value
    return f"{value!r:.200}"


def sentence(text: str) -> str:
    """Return a text with a mark at its end."""
    return text if text.endswith(("?", ".")) else f"{text}."


def nearest(name: str, known: Iterable[str]) -> str:
    """Return a question such as ``: did you mean seed?``, or an empty text."""
    found = get_close_matches(name, list(known), n=1, cutoff=0.6)
    return f": did you mean {found[0]}?" if found else ""


def _name(loc: tuple[int | str, ...]) -> list[str]:
    """Return the names on the way to a value.

    An option may be given several times; which of them is wrong, the value says. What a union's member is
    called, such as constrained-int, is no name of an option.
    """
    return [p for p in loc if isinstance(p, str) and p.isidentifier() and p not in _TAGS]


def _own(error: Mapping[str, Any]) -> str:
    """Return the message of a validator of ours."""
    return str(error["msg"]).removeprefix("Value error, ").removeprefix("Assertion failed, ").rstrip(".")


def _meant(parts: list[str], model: type[BaseModel]) -> str:
    """Return what an unknown option may have been meant for, and for a key of one all keys."""
    owner = _owner(parts[:-1], model)
    if owner is None:
        return ""
    known = list(owner.model_fields)
    question = nearest(parts[-1], known)
    if len(parts) == 1:
        return question
    listed = f"{parts[-2]} takes {', '.join(known)}"
    return f"{question} {listed}" if question else f": {listed}"


def _owner(parts: list[str], model: type[BaseModel]) -> type[BaseModel] | None:
    """Return the record that a way leads to; None if it is no record."""
    found: type[BaseModel] | None = model
    for part in parts:
        if found is None:
            return None
        field = found.model_fields.get(part)
        if field is not None:
            found = next(_records(field.annotation), None)
    return found


def _records(annotation: Any) -> Iterator[type[BaseModel]]:
    """Yield the records in a type."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        yield annotation
    for part in get_args(annotation):
        yield from _records(part)


def _field(parts: list[str], model: type[BaseModel]) -> FieldInfo | None:
    owner = _owner(parts[:-1], model)
    return None if owner is None else owner.model_fields.get(parts[-1])


def _wanted(error: Mapping[str, Any], field: FieldInfo | None) -> str:
    """Return what a value should be."""
    kind = str(error["type"])
    choices = _choices(error)
    if choices:
        return f"{', '.join(choices[:-1])} or {choices[-1]}" if choices[1:] else choices[0]
    if kind.startswith(_BOUNDS):
        kinds = str(None if field is None else field.annotation)
        whole = isinstance(next(iter(error["ctx"].values())), int) and "float" not in kinds
        return f"{_WHOLE if whole else _NUMBER}{_limits(error, field)}"
    found = _KINDS.get(kind.split("_", maxsplit=1)[0])
    if found is None:
        message = str(error["msg"])
        return f"{message[:1].lower()}{message[1:]}"
    return f"{found}{_limits(error, field)}" if found in (_WHOLE, _NUMBER) else found


def _limits(error: Mapping[str, Any], field: FieldInfo | None) -> str:
    """Return the limits of a number, such as `` from 2 to 8``."""
    bounds: dict[str, Any] = {}
    for item in field.metadata if field is not None else ():
        for kind, key in (
            (annotated_types.Ge, "ge"),
            (annotated_types.Gt, "gt"),
            (annotated_types.Le, "le"),
            (annotated_types.Lt, "lt"),
        ):
            if isinstance(item, kind):
                bounds[key] = getattr(item, key)
    if not bounds and str(error["type"]).startswith(_BOUNDS):
        bounds = dict(error["ctx"])
    if {"ge", "le"} <= bounds.keys():
        return f" from {bounds['ge']:.10g} to {bounds['le']:.10g}"
    words = {"ge": "at least", "gt": "above", "le": "at most", "lt": "below"}
    told = [f"{words[k]} {v:.10g}" for k, v in bounds.items() if k in words]
    of = " of" if told and told[0].startswith("at") else ""
    return f"{of} {' and '.join(told)}" if told else ""


def _choices(error: Mapping[str, Any]) -> list[str]:
    """Return the words of which one is wanted."""
    if error["type"] not in ("enum", "literal_error"):
        return []
    return [
        word.strip().strip("'")
        for part in error["ctx"]["expected"].split(" or ")
        for word in part.split(", ")
    ]


def _nearest(value: object, choices: list[str]) -> str:
    text = str(value.value if isinstance(value, Enum) else value)
    found = get_close_matches(text, choices, n=1, cutoff=0.6)
    return f" (did you mean {found[0]}?)" if found else ""
