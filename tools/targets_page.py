"""The tables of docs/targets.md, made from the code whenever the documentation is built.

``mkdocs.yml`` names this file as a hook; it needs no MkDocs itself.
"""

from __future__ import annotations

from typing import Any

from eptq_onnx import targets
from eptq_onnx.numerics.scales import ScaleRule
from eptq_onnx.ops import operators_by_list
from eptq_onnx.targets import Target

PLACE = "<!-- the table of all shipped targets -->"
"""Marks where the table of targets goes."""
PLACE_OF_OPERATORS = "<!-- the table of operators by list -->"
"""Marks where the table of operators goes."""


def on_page_markdown(markdown: str, **_: Any) -> str:
    """Put the tables into the page that asks for them; a hook of MkDocs."""
    return markdown.replace(PLACE, table()).replace(PLACE_OF_OPERATORS, operators())


def operators() -> str:
    """Return a table with one row for each list of ``[ops]``."""
    rows = [(f"`{name}`", ", ".join(sorted(known))) for name, known in operators_by_list().items()]
    return "\n".join(f"| {' | '.join(row)} |" for row in (("list", "operators"), ("---", "---"), *rows))


def table() -> str:
    """One row a shipped target."""
    rows = [_row(targets.load(name)) for name in targets.names()]
    head = ["name", "runtime", "weights at 8 bits", "activations at 8 bits", "bias"]
    return "\n".join(f"| {' | '.join(row)} |" for row in (head, ["---"] * len(head), *rows))


def _row(target: Target) -> list[str]:
    weight, activation = target.weight, target.activation
    weights = [
        _range(weight.range_8_bits) + _rule(weight.scale),
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
        "int32" if target.bias.integer else "float",
    ]


def _range(ends: tuple[int, int]) -> str:
    return " to ".join(str(end).replace("-", "−") for end in ends)


def _rule(rule: ScaleRule) -> str:
    return "" if rule is ScaleRule.ANY else f", scales that are a {rule.value}"
