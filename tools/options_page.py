"""The tables of docs/options.md, made from the fields of `Config` and the command's own parameters whenever the documentation is built.

``mkdocs.yml`` names this file as a hook; it needs no MkDocs itself.
"""

from __future__ import annotations

from enum import Enum
from typing import Any, get_args

import typer.main
from pydantic.fields import FieldInfo

from eptq_onnx.cli import app
from eptq_onnx.cli.options import default_of, flags_of, help_of
from eptq_onnx.config import Config, option_of

PLACE = "<!-- the tables of all options -->"
"""Stands in the page where the tables go."""


def on_page_markdown(markdown: str, **_: Any) -> str:
    """The hook: put the tables into the page that asks for them."""
    return markdown.replace(PLACE, tables()) if PLACE in markdown else markdown


def tables() -> str:
    """One table for the command's own parameters, and one for each section of the options."""
    sections: dict[str, list[tuple[str, FieldInfo]]] = {}
    for name, field in Config.model_fields.items():
        sections.setdefault(option_of(field).section, []).append((name, field))
    parts = ["## Files", *_table(_files())]
    for section, fields in sections.items():
        parts += ["", f"## {section.capitalize()}", "", f"Table `[{section}]` of a configuration file.", ""]
        parts += _table([(_flag(name, field), default_of(field), _help(name, field)) for name, field in fields])
    return "\n".join(parts)


def _table(rows: list[tuple[str, str, str]]) -> list[str]:
    return ["", "| option | default | |", "| --- | --- | --- |", *(f"| {' | '.join(row)} |" for row in rows)]


def _files() -> list[tuple[str, str, str]]:
    """What the command takes beside the options."""
    command = typer.main.get_command(app).commands["quantize"]  # type: ignore[attr-defined]
    own = [p for p in command.params if p.name not in Config.model_fields]
    names = [", ".join(f"`{o}`" for o in p.opts) if p.param_type_name == "option" else f"`{p.name.upper()}`" for p in own]
    return [(name, "required" if p.required else "none", p.help or "") for name, p in zip(names, own, strict=True)]


def _flag(name: str, field: FieldInfo) -> str:
    metavar = option_of(field).metavar
    first, *others = flags_of(name, field)
    return ", ".join(f"`{flag}`" for flag in [f"{first} {metavar}".strip(), *others])


def _help(name: str, field: FieldInfo) -> str:
    """What help says, the words that it takes, and its name in Python where the flag does not tell."""
    text = help_of(name, field)
    types = get_args(field.annotation) or (field.annotation,)
    words = [f"`{word.value}`" for kind in types if isinstance(kind, type) and issubclass(kind, Enum) for word in kind]
    if words:
        text += f" One of {', '.join(words)}."
    if option_of(field).flag:
        text += f" In Python and in files: `{name}`."
    return text
