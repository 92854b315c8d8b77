"""The network as a strip: its nodes in the order of execution, coloured by how they are computed."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from markupsafe import Markup, escape

from eptq_onnx.diagnosis import NodePlace
from eptq_onnx.report.console import shown

_ACROSS, _WIDTH, _HEIGHT, _GAP = 100, 8, 24, 6
"""Nodes in a row, and pixels of a node and between rows."""
_NAME = 300
"""Characters of a name in a tooltip."""


def strip(network: Sequence[NodePlace]) -> Markup:
    """Return the strip as an SVG element; each node says its name, and why it stays float, if it does."""
    counts = Counter(node.runs for node in network)
    rows = -(-len(network) // _ACROSS)
    width = _WIDTH * min(_ACROSS, max(1, len(network)))
    height = max(1, rows * (_HEIGHT + _GAP) - _GAP)
    marks = []
    for k, node in enumerate(network):
        row, column = divmod(k, _ACROSS)
        why = f": {node.why}" if node.why else ""
        tip = escape(shown(f"{k + 1}. {node.node} ({node.op_type}), {node.runs}{why}", _NAME))
        marks.append(
            f'<rect class="{escape(node.runs)}" x="{column * _WIDTH}" y="{row * (_HEIGHT + _GAP)}" '
            f'width="{_WIDTH - 1}" height="{_HEIGHT}"><title>{tip}</title></rect>'
        )
    text = (
        f"{len(network)} nodes in the order of execution: {counts['integers']} on integers, "
        f"{counts['merged']} merged into a quantizer, {counts['other']} without floating-point values, "
        f"{counts['float']} in floating point, which the list below names."
    )
    return Markup(
        f'<svg class="strip" viewBox="0 0 {width} {height}" style="max-width: {width}px" role="img" '
        f'aria-labelledby="strip-t strip-d"><title id="strip-t">The network</title>'
        f'<desc id="strip-d">{text}</desc>{"".join(marks)}</svg>'
    )
