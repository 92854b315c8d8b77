"""Where a picture lies in what a model sees: what a recipe scales, shifts and cuts off."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from eptq_onnx.config.recipes import Fit, ImageRecipe

SIZE = 224
"""Size where neither the model nor the recipe states one."""


@dataclass(frozen=True)
class Placed:
    """Where a picture lies in a model's input.

    A point (x, y) of the picture is at ``scale * (x, y) + offset`` in the input, both in pixels counted from
    the left and the top.

    Parameters
    ----------
    size : tuple of two ints
        Width and height of the picture, held upright (EXIF).
    scale : tuple of two floats
        Pixels of the input for one of the picture, along x and y.
    offset : tuple of two floats
        Where its corner is: the bars of a letterbox; negative where a crop cuts it off.
    """

    size: tuple[int, int]
    scale: tuple[float, float]
    offset: tuple[float, float]

    def to_picture(self, points: ArrayLike) -> NDArray[np.float64]:
        """Return points of the input, such as the corners of boxes, as points of the picture.

        Parameters
        ----------
        points : ndarray of shape (..., 2 n)
            x and y in turn: (left, top, right, bottom), or key points.
        """
        pairs = _pairs(points)
        return np.asarray((pairs - self.offset) / self.scale).reshape(np.shape(points))

    def to_input(self, points: ArrayLike) -> NDArray[np.float64]:
        """Return points of the picture, such as those of labels, as points of the input."""
        return np.asarray(_pairs(points) * self.scale + self.offset).reshape(np.shape(points))


def _pairs(points: ArrayLike) -> NDArray[np.float64]:
    values = np.asarray(points, np.float64)
    return values.reshape(*values.shape[:-1], values.shape[-1] // 2, 2)


@dataclass(frozen=True)
class Cut:
    """What is done to a picture to fill the model's size.

    Parameters
    ----------
    inner : tuple of two ints
        Width and height to which `box` is scaled.
    box : tuple of four floats
        Left, top, right and bottom of the part that is used, in pixels of the picture.
    corner : tuple of two ints
        Where that part is pasted.
    """

    inner: tuple[int, int]
    box: tuple[float, float, float, float]
    corner: tuple[int, int]

    def placed(self, size: tuple[int, int]) -> Placed:
        """Return where a picture of this size lies."""
        left, top, right, bottom = self.box
        scale = (self.inner[0] / (right - left), self.inner[1] / (bottom - top))
        offset = (self.corner[0] - scale[0] * left, self.corner[1] - scale[1] * top)
        return Placed(size, scale, offset)


def cut(own: tuple[int, int], recipe: ImageRecipe) -> Cut:
    """Return how a picture fills the size of a recipe.

    What is cut off is never computed: a picture of 1×60,000 pixels would become one of 256×15,360,000.

    Parameters
    ----------
    own : tuple of two ints
        Width and height of the picture.
    recipe : ImageRecipe
        With size and fit.
    """
    height, width = recipe.size or (SIZE, SIZE)
    size, all_of_it = (width, height), (0.0, 0.0, float(own[0]), float(own[1]))
    if recipe.fit is Fit.STRETCH:
        return Cut(size, all_of_it, (0, 0))
    if recipe.fit is Fit.CROP:
        return Cut(size, _middle(own, size, recipe.resize or min(size)), (0, 0))
    scale = min(width / own[0], height / own[1])
    rounded = round if recipe.fit is Fit.LETTERBOX else int  # as Ultralytics does, and as YOLOX does
    inner_width, inner_height = (
        max(1, min(rounded(side * scale), most)) for side, most in zip(own, size, strict=True)
    )
    middle = ((width - inner_width) // 2, (height - inner_height) // 2)
    return Cut((inner_width, inner_height), all_of_it, middle if recipe.fit is Fit.LETTERBOX else (0, 0))


def _middle(own: tuple[int, int], size: tuple[int, int], short: Any) -> tuple[float, float, float, float]:
    """Return the middle of a picture whose short side is scaled first."""
    scale = 1.0 if short == "none" else short / min(own)
    scale = max(scale, size[0] / own[0], size[1] / own[1])
    whole = [max(int(side * scale), need) for side, need in zip(own, size, strict=True)]
    starts = [round((side - need) / 2) for side, need in zip(whole, size, strict=True)]
    steps = [side / scaled for side, scaled in zip(own, whole, strict=True)]
    left, top = (start * step for start, step in zip(starts, steps, strict=True))
    right, bottom = min(left + size[0] * steps[0], own[0]), min(top + size[1] * steps[1], own[1])
    return (left, top, right, bottom)
