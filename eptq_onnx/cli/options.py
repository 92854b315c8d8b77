"""Options of commands, made from the fields of `Config` and `Reading`.

Name, type, help and default stand there alone.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from enum import Enum
from pathlib import Path
from types import NoneType, UnionType
from typing import Annotated, Any, TypeVar, Union, get_args, get_origin

import typer
from pydantic import BaseModel
from pydantic.fields import FieldInfo

from eptq_onnx import devices, engines, targets, workers
from eptq_onnx.config import Config, option_of
from eptq_onnx.config.option import flags_of

Pair = Annotated[
    tuple[Path, Path],
    typer.Argument(
        metavar="FLOAT QUANTIZED", help="The float ONNX model, and the same model quantized by any tool."
    ),
]
"""The files that a command compares."""
TargetName = Annotated[
    str, typer.Option(help=f"Target to check for: {', '.join(targets.names())}, or the path of a file.")
]
"""The target whose rules a command checks."""
SHORT_FORMS = (
    "a folder of pictures or sounds, a .txt or .jsonl file of texts, a .npz or .npy file of arrays, and all "
    "else that quantize takes"
)
"""The forms of samples in short; the help of ``quantize`` lists all."""
TARGET = Config().target
"""Its default."""

F = TypeVar("F", bound=Callable[..., None])

_NAMED: dict[str, Callable[[], dict[str, str]]] = {
    "device": lambda: devices.ABOUT,
    "workers": lambda: {name: backend.about for name, backend in workers.registered().items()},
    "engine": lambda: {name: engine.about for name, engine in engines.registered().items()},
    "target": lambda: {
        targets.AUTO: "onnxruntime on this machine",
        **{name: targets.load(name).title for name in targets.names()},
    },
}
"""Options whose values are names of what lower layers find by themselves: each name, and what it is."""


def with_options(*models: type[BaseModel]) -> Callable[[F], F]:
    """Give a command, in place of its ``**options``, one option for each field of some models, such as
    `Config` and `Reading`; those that are not given are not passed on."""
    fields = {name: field for model in models for name, field in model.model_fields.items()}

    def decorate(command: F) -> F:
        own = [
            p
            for p in inspect.signature(command, eval_str=True).parameters.values()
            if p.kind is not p.VAR_KEYWORD
        ]
        added = [
            _parameter(name, field)
            for name, field in sorted(fields.items(), key=lambda item: option_of(item[1]).advanced)
        ]

        def called(**given: Any) -> None:
            command(
                **{name: value for name, value in given.items() if value is not None or name not in fields}
            )

        called.__doc__, called.__name__ = command.__doc__, command.__name__
        called.__signature__ = inspect.Signature([*own, *added])  # type: ignore[attr-defined]
        called.__annotations__ = {p.name: p.annotation for p in (*own, *added)}
        return called  # type: ignore[return-value]

    return decorate


def options_of(model: type[BaseModel], given: Mapping[str, Any]) -> dict[str, Any]:
    """Return those of the given options that are fields of a model."""
    return {name: value for name, value in given.items() if name in model.model_fields}


def default_of(field: FieldInfo) -> str:
    """Its default as help shows it."""
    return option_of(field).default or _shown(field.get_default(call_default_factory=True))


def help_of(name: str, field: FieldInfo) -> str:
    """Its docstring as one line, and the names that it takes, each with what it is."""
    text = " ".join((field.description or "").split())
    names = [f"{value} ({about})" for value, about in _NAMED[name]().items()] if name in _NAMED else []
    return f"{text} Names: {'; '.join(names)}." if names else text


def _parameter(name: str, field: FieldInfo) -> inspect.Parameter:
    text = f"{help_of(name, field)} [default: {default_of(field)}]"
    kind = _kind(field.annotation)
    info = typer.Option(
        "/".join(flags_of(name, field)),
        help=text,
        metavar=_metavar(field),
        show_default=False,
        autocompletion=_completed(field),
    )
    return inspect.Parameter(
        name, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=Annotated[kind | None, info]
    )


def _shown(default: object) -> str:
    if isinstance(default, bool):
        return "on" if default else "off"
    return str(default.value if isinstance(default, Enum) else default)


def _kind(annotation: Any) -> Any:
    """Return what the command line reads for a field: texts, whose meaning the field itself says."""
    found = _plain(annotation)
    if found is bool:
        return bool
    return list[str] if get_origin(found) in (tuple, dict) else str


def _plain(annotation: Any) -> Any:
    """Return the first of several types that a field takes."""
    if get_origin(annotation) in (Union, UnionType):
        return next(a for a in get_args(annotation) if a is not NoneType)
    return annotation


def _metavar(field: FieldInfo) -> str | None:
    """Return what stands for a value in help."""
    option, found = option_of(field), _plain(field.annotation)
    if option.metavar or found is bool:
        return option.metavar or None
    if get_origin(found) is tuple:
        found = get_args(found)[0]
    if isinstance(found, type) and issubclass(found, Enum):
        return f"[{'|'.join(str(item.value) for item in found)}]"
    return {int: "INTEGER", float: "FLOAT", Path: "PATH"}.get(found, "TEXT")


def _completed(field: FieldInfo) -> Callable[[str], list[str]] | None:
    """Return what completes a value in a shell; None for what is no choice."""
    found = _plain(field.annotation)
    if not (isinstance(found, type) and issubclass(found, Enum)):
        return None
    words = [str(item.value) for item in found]
    return lambda incomplete: [word for word in words if word.startswith(incomplete)]
