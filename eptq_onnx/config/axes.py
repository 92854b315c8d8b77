"""Batch axes, as options write them."""

from __future__ import annotations

from typing import Any


def axes_of(given: Any) -> dict[str, int | None]:
    """Parse one or several NAME=AXIS or NAME=none; None gives none.

    Raises
    ------
    ValueError
        If one is written otherwise.
    """
    axes: dict[str, int | None] = {}
    if given is not None and not isinstance(given, (str, list, tuple)):
        raise ValueError("give NAME=AXIS, an axis counted from 0, or NAME=none")
    for item in [given] if isinstance(given, str) else list(given or ()):
        name, equals, axis = str(item).rpartition("=")
        if not equals or not name or not (axis == "none" or axis.isdecimal()):
            raise ValueError(f"give NAME=AXIS, an axis counted from 0, or NAME=none, not {item}")
        axes[name] = None if axis == "none" else int(axis)
    return axes
