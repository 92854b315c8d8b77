"""The table of docs/targets.md, made from the target files whenever the documentation is built.

``mkdocs.yml`` names this file as a hook; it needs no MkDocs itself.
"""

from __future__ import annotations

from typing import Any

from eptq_onnx import targets
from eptq_onnx.numerics.scales import ScaleRule
from eptq_onnx.targets import Target

PLACE = "<!-- the table of all shipped targets -->"
"""Stands in the page where the table goes."""


def on_page_markdown(markdown: str, **_: Any) -> str:
    """The hook: put the table into the page that asks for it."""
    return markdown.replace(PLACE, table()) if PLACE in markdown else markdown


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
