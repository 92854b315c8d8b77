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
_LEAST, _KEPT = 8, 256
"""Pixels of the shorter side from which on numbers may be a picture, and most of the longer that are kept."""


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


def seen(
    samples: Samples, origin: Origin, model: ModelProto, k: int
) -> np.ndarray[tuple[int, ...], np.dtype[np.uint8]] | None:
    """Return a sample as red, green and blue pixels of shape (height, width, 3); None if it is no picture.

    Where no recipe says how pixels became numbers, the smallest number is black and the largest white.

    Parameters
    ----------
    samples : Samples
    origin : Origin
    model : ModelProto
    k : int
        Index of the sample.
    """
    if "image" in origin.recipe:
        recipe = ImageRecipe.model_validate(origin.recipe["image"])
        [info] = [i for i in inputs_of(model) if i.name in samples.names][:1]
        pixels = _pixels(Sight(info, recipe, (), ()), samples, k)
    else:
        found = _image_like(samples, k)
        if found is None:
            return None
        low, high = float(found.min()), float(found.max())
        scaled = (found - low) * (255 / (high - low) if high > low else 0.0)
        pixels = np.broadcast_to(scaled.round().astype(np.uint8), (*found.shape[:2], 3))
    step = max(1, max(pixels.shape[:2]) // _KEPT)
    return np.ascontiguousarray(pixels[::step, ::step])


def _image_like(samples: Samples, k: int) -> np.ndarray[tuple[int, ...], np.dtype[np.float64]] | None:
    """Return the only input that has the shape of a picture, channels last, or None."""
    values = [v for name, v in samples.take([k]).items() if samples.has_samples(name) and v.ndim in (3, 4)]
    if len(values) != 1:
        return None
    value = values[0][0] if values[0].ndim == 4 else values[0]
    for axis in (0, 2):
        sides = [n for place, n in enumerate(value.shape) if place != axis]
        if value.shape[axis] in (1, 3) and min(sides) >= _LEAST:
            moved = np.moveaxis(value, axis, -1).astype(np.float64)
            return moved if np.isfinite(moved).all() else None
    return None


def _pixels(sight: Sight, samples: Samples, k: int) -> np.ndarray[tuple[int, ...], np.dtype[np.uint8]]:
    """Return the pixels of a sample, the first one of a run that takes several."""
    value = samples.take([k])[sight.input.name]
    axes = 2 if sight.recipe.layout is not None and sight.recipe.layout.value == "nhw" else 3
    return sight.shown(value[0] if value.ndim > axes else value)
