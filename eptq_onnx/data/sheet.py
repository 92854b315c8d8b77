"""A contact sheet: what the network sees of the pictures that it is calibrated on."""

from __future__ import annotations

import io
import math

import numpy as np
from onnx import ModelProto

from eptq_onnx.config.recipes import ImageRecipe
from eptq_onnx.data.inputs import inputs_of
from eptq_onnx.data.origin import Origin
from eptq_onnx.data.pictures import Sight, pillow
from eptq_onnx.data.samples import Samples, spread

_SHOWN, _COLUMNS = 48, 8
"""Most pictures, and how many stand side by side."""
_SIDE, _GAP, _PAPER = 128, 4, 255
"""Pixels of the longer side of a picture and between two, and the grey around them."""


def contact_sheet(samples: Samples, origin: Origin, model: ModelProto) -> bytes:
    """Return a PNG of samples spread over all, as the recipe's inverse shows them; empty for other samples.

    Parameters
    ----------
    samples : Samples
    origin : Origin
    model : ModelProto
    """
    if "image" not in origin.recipe:
        return b""
    recipe = ImageRecipe.model_validate(origin.recipe["image"])
    [info] = [i for i in inputs_of(model) if i.name in samples.names][:1]
    sight = Sight(info, recipe, (), ())
    shown = [_pixels(sight, samples, int(k)) for k in spread(samples.count, _SHOWN)]
    height, width = shown[0].shape[:2]
    scale = _SIDE / max(height, width)
    cell = (max(1, round(width * scale)), max(1, round(height * scale)))
    columns = min(_COLUMNS, len(shown))
    rows = math.ceil(len(shown) / columns)
    with pillow() as image:
        kernel = image.Resampling.NEAREST if scale > 1 else image.Resampling.BILINEAR
        size = (columns * (cell[0] + _GAP) + _GAP, rows * (cell[1] + _GAP) + _GAP)
        sheet = image.new("RGB", size, (_PAPER,) * 3)
        for k, pixels in enumerate(shown):
            row, column = divmod(k, columns)
            place = (_GAP + column * (cell[0] + _GAP), _GAP + row * (cell[1] + _GAP))
            sheet.paste(image.fromarray(pixels).resize(cell, kernel), place)
        buffer = io.BytesIO()
        sheet.save(buffer, "PNG", optimize=True)
    return buffer.getvalue()


def _pixels(sight: Sight, samples: Samples, k: int) -> np.ndarray[tuple[int, ...], np.dtype[np.uint8]]:
    """Return the pixels of a sample, the first one of a run that takes several."""
    value = samples.take([k])[sight.input.name]
    axes = 2 if sight.recipe.layout is not None and sight.recipe.layout.value == "nhw" else 3
    return sight.shown(value[0] if value.ndim > axes else value)
