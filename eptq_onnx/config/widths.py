"""Bit widths, and how options write them."""

from __future__ import annotations

import re

FLOAT_BITS = 32
"""The width of activations that stay float."""
ACTIVATION_WIDTHS = (*range(2, 9), 16, FLOAT_BITS)


def widths(text: str) -> tuple[int, int]:
    """Parse wWaA, such as w4a8, into weight and activation bits."""
    found = re.fullmatch(r"w(\d+)a(\d+)", str(text))
    if found is None or not 2 <= int(found[1]) <= 8 or int(found[2]) not in ACTIVATION_WIDTHS:
        raise ValueError(
            f"write bits as w4a8, of 2 to 8 for weights and 2 to 8, 16 or 32 for activations, not {text}"
        )
    return int(found[1]), int(found[2])
