"""Samples as pictures inside a page."""

from __future__ import annotations

import base64
import io
from importlib import import_module

import numpy as np
from numpy.typing import NDArray

_SIDE = 128
"""Pixels of the longer side."""


def data_uri(pixels: NDArray[np.uint8]) -> str:
    """Return pixels of shape (height, width, 3) as a small PNG in a URI."""
    image = import_module("PIL.Image")  # matplotlib needs it, too
    scale = _SIDE / max(pixels.shape[:2])
    size = tuple(max(1, round(n * scale)) for n in (pixels.shape[1], pixels.shape[0]))
    kernel = image.Resampling.NEAREST if scale > 1 else image.Resampling.BOX
    buffer = io.BytesIO()
    image.fromarray(pixels).resize(size, kernel).save(buffer, "PNG", optimize=True)
    return f"data:image/png;base64,{base64.b64encode(buffer.getvalue()).decode('ascii')}"
