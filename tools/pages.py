"""What the documentation takes from the code whenever it is built.

The tables of docs/options.md come from the fields of `Reading`, `Config` and `Accuracy` and the command's own
parameters, those of docs/targets.md from the target files, the operator table and the rules of ``lint``, the
forms of data in docs/data.md from the readers, the list of passes in
docs/how-it-works.md from `PIPELINE`, and the runtimes in docs/runtimes.md from what is found.

``mkdocs.yml`` names this file as a hook; it needs no MkDocs itself. ``python tools/pages.py`` puts the same
into the sources, where readers of the repository see it; a test compares both.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Container, Iterable, Sequence
from enum import Enum
from pathlib import Path
from typing import Any, get_args

import typer.main
from pydantic.fields import FieldInfo

import eptq_onnx
from eptq_onnx import runtimes, targets
from eptq_onnx.cli import app
from eptq_onnx.cli.options import default_of, help_of
from eptq_onnx.config import Accuracy, Config, Reading, option_of
from eptq_onnx.config.option import flags_of
from eptq_onnx.config.presets import PAPER
from eptq_onnx.data import readers
from eptq_onnx.numerics.formats import FLOATS
from eptq_onnx.numerics.scales import ScaleRule
from eptq_onnx.ops import operators_by_field
from eptq_onnx.ops.regions import REGIONS
from eptq_onnx.passes.base import Pass
from eptq_onnx.pipeline import PIPELINE
from eptq_onnx.rules import RULES
from eptq_onnx.targets import Target

_OPTIONS = ("option", "default", "")
"""Head of the tables of options."""


def on_page_markdown(markdown: str, **_: Any) -> str:
    """The hook: put what is made from the code into the pages that ask for it."""
    return _with(markdown, lambda place, made: made.strip("\n") if "\n" in made else made)


def names() -> str:
    """One row for each public name of the package: its first sentence."""
    rows = []
    for name in eptq_onnx.__all__:
        if not name.startswith("_"):
            text = inspect.getdoc(getattr(eptq_onnx, name)) or ""
            rows.append((f"`{name}`", " ".join(text.split("\n\n")[0].split())))
    return "\n".join(_table(("name", "what it is"), rows))


def tables() -> str:
    """One table for the command's own parameters, and one for each section of the options."""
    sections: dict[str, list[tuple[str, FieldInfo]]] = {}
    fields_of = {**Reading.model_fields, **Config.model_fields, **Accuracy.model_fields}
    for name, field in fields_of.items():
        sections.setdefault(option_of(field).section, []).append((name, field))
    parts = ["## Files", "", *_table(_OPTIONS, _parameters("quantize", fields_of))]
    for section, fields in sections.items():
        parts += [
            "",
            f"## {section.capitalize()}",
            "",
            f"Table `[{section}]` of a configuration file.",
            "",
            "",
        ]
        rows = [(_flag(name, field), default_of(field), _help(name, field)) for name, field in fields]
        parts += _table(_OPTIONS, rows)
    return "\n".join(parts)


def forms() -> str:
    """One item for each form of data that a command can name."""
    return "\n".join(f"- {form}" for form in readers.forms(on_command_line=True))


def forms_of_python() -> str:
    """One item for each form of data that only Python has."""
    return "\n".join(f"- {form}" for form in readers.forms(on_command_line=False))


def shipped_targets() -> str:
    """Return a table with one row for each shipped target."""
    head = ("name", "runtime", "weights at 8 bits", "activations at 8 bits", "bias")
    return "\n".join(_table(head, [_row(targets.load(name)) for name in targets.names()]))


def operators() -> str:
    """Return a table with one row for each field of an operator that not every operator may have."""
    rows = [
        (f"`{field}`", ", ".join(sorted(known)))
        for field, known in operators_by_field().items()
        if field != 'runs = "float"'
    ]
    return "\n".join(_table(("field", "operators"), rows))


def patterns() -> str:
    """Return the names of all patterns."""
    return ", ".join(f'`"{name}"`' for name in REGIONS)


def rules() -> str:
    """Return a table with one row for each rule of ``lint``."""
    rows = [(f"`{rule.name}`", rule.severity.value, rule.about) for rule in RULES]
    return "\n".join(_table(("rule", "severity", "what must hold"), rows))


def paper() -> str:
    """Return a table with one row for each option that the preset of the paper sets."""
    ours, rows = Config(), []
    for name, value in PAPER.items():
        field = Config.model_fields[name]
        default = default_of(field) if getattr(ours, name) is None else _word(getattr(ours, name))
        rows.append((f"`{flags_of(name, field)[0]}`", _word(value), default))
    return "\n".join(_table(("option", "paper", "default"), rows))


def _word(value: object) -> str:
    if isinstance(value, bool):
        return "on" if value else "off"
    return f"{value:,g}" if isinstance(value, (int, float)) else str(getattr(value, "value", value))


def bench() -> str:
    """Return a table with one row for each parameter of the command ``bench``."""
    return "\n".join(_table(_OPTIONS, _parameters("bench")))


def verify() -> str:
    """Return a table with one row for each parameter of the command ``verify``."""
    return "\n".join(_table(_OPTIONS, _parameters("verify")))


def verifiers() -> str:
    """Return a table with one row for each runtime that checks files."""
    rows = [
        (f"`{name}`", found.about, "yes" if found.measures else "no")
        for name, found in runtimes.registered().items()
    ]
    return "\n".join(_table(("name", "runtime", "measured by `bench`"), rows))


def passes() -> str:
    """One numbered item for each pass: its name, and the first line of its class."""
    return "\n".join(
        f"{k}. **{step.name.capitalize()}.** {_first_line(step)}" for k, step in enumerate(PIPELINE, 1)
    )


def _first_line(step: Pass) -> str:
    return (inspect.getdoc(type(step)) or "").partition("\n")[0]


def _table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    """Return the lines of a table."""
    return [f"| {' | '.join(row)} |" for row in (head, ["---"] * len(head), *rows)]


def _parameters(name: str, others: Container[str] = ()) -> list[tuple[str, str, str]]:
    """What a command takes beside other parameters."""
    command = typer.main.get_command(app).commands[name]  # type: ignore[attr-defined]
    own = [p for p in command.params if p.name not in others]
    names = [
        ", ".join(f"`{o}`" for o in p.opts)
        if p.param_type_name == "option"
        else f"`{p.metavar or p.name.upper()}`"
        for p in own
    ]
    return [(name, _default(p), p.help or "") for name, p in zip(names, own, strict=True)]


def _default(parameter: Any) -> str:
    if parameter.required:
        return "required"
    if parameter.default is False:
        return "off"
    return "none" if parameter.default is None else str(parameter.default)


def _flag(name: str, field: FieldInfo) -> str:
    metavar = option_of(field).metavar
    first, *others = flags_of(name, field)
    return ", ".join(f"`{flag}`" for flag in [f"{first} {metavar}".strip(), *others])


def _help(name: str, field: FieldInfo) -> str:
    """What help says, the words that it takes, and its name in Python where the flag does not tell."""
    text = help_of(name, field)
    types = get_args(field.annotation) or (field.annotation,)
    words = [
        f"`{word.value}`"
        for kind in types
        if isinstance(kind, type) and issubclass(kind, Enum)
        for word in kind
    ]
    if words:
        text += f" One of {', '.join(words)}."
    if option_of(field).flag:
        text += f" In Python and in files: `{name}`."
    return text


def _row(target: Target) -> list[str]:
    weight, activation = target.weight, target.activation
    is_float = weight.container in FLOATS
    weights = [
        (weight.container if is_float else _range(weight.range_8_bits)) + _rule(weight.scale),
        "one scale a channel" if weight.per_channel else "one scale",
    ]
    if weight.depthwise_range_8_bits is not None:
        weights.insert(1, f"depthwise convolutions {_range(weight.depthwise_range_8_bits)}")
    activations = (
        f"{activation.container}{', symmetric' if activation.symmetric else ''}{_rule(activation.scale)}"
    )
    return [
        f"`{target.name}`",
        target.title,
        "; ".join(weights),
        activations,
        target.bias.container if target.bias.integer else "float",
    ]


def _range(ends: tuple[int, int]) -> str:
    return " to ".join(str(end).replace("-", "−") for end in ends)


def _rule(rule: ScaleRule) -> str:
    return "" if rule is ScaleRule.ANY else f", scales that are a {rule.value}"


PLACES = {
    "<!-- the public names -->": names,
    "<!-- the tables of all options -->": tables,
    "<!-- the forms of data -->": forms,
    "<!-- the forms of data in Python -->": forms_of_python,
    "<!-- the list of passes -->": passes,
    "<!-- the preset of the paper -->": paper,
    "<!-- the parameters of bench -->": bench,
    "<!-- the parameters of verify -->": verify,
    "<!-- the table of runtimes -->": verifiers,
    "<!-- the table of all shipped targets -->": shipped_targets,
    "<!-- the table of operators by field -->": operators,
    "<!-- the names of all patterns -->": patterns,
    "<!-- the table of all rules -->": rules,
}
"""What stands in pages, and what follows it there, up to `END`."""
END = "<!-- the code says this; python tools/pages.py writes it -->"


def written(markdown: str) -> str:
    """Return a page as it is kept, for readers of the sources: what the code says stands between marks."""
    return _with(markdown, lambda place, made: f"{place}{made}{END}")


def _with(markdown: str, put: Callable[[str, str], str]) -> str:
    """Return a page with other texts for what stands between a place and `END`."""
    for place, make in PLACES.items():
        begin, mark, rest = markdown.partition(place)
        if mark:
            inline = not rest.startswith("\n")
            old, found, behind = rest.partition(END)
            # A place without the mark that ends it is new, or stands in a text of its own.
            behind = behind if found and "<!--" not in old else rest
            made = make() if inline else f"\n\n{make()}\n\n"
            markdown = f"{begin}{put(place, made)}{behind}"
    return markdown


def main() -> None:
    """Write all pages anew."""
    for path in sorted((Path(__file__).parent.parent / "docs").glob("*.md")):
        old = path.read_text(encoding="utf-8")
        new = written(old)
        if new != old:
            path.write_text(new, encoding="utf-8")
            print(f"wrote {path}")


if __name__ == "__main__":
    main()
