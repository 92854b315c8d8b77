"""Drawn shapes: images with a class map and boxes, for the small detector and segmenter."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

SIZE = 48
CLASSES = ("disc", "square", "triangle")
MAX_BOXES = 4


@dataclass(frozen=True)
class Shapes:
    """A set of drawn images.

    Parameters
    ----------
    images : ndarray of uint8, shape (n, 3, SIZE, SIZE)
    classes : ndarray of uint8, shape (n, SIZE, SIZE)
        0 is background, k + 1 is class k.
    boxes : ndarray of float32, shape (n, MAX_BOXES, 5)
        class, left, top, right, bottom in pixels; class -1 where there is no box.
    """

    images: NDArray[np.uint8]
    classes: NDArray[np.uint8]
    boxes: NDArray[np.float32]


def draw(count: int, seed: int) -> Shapes:
    """Draw ``count`` images of one to four shapes on a shaded background."""
    rng = np.random.default_rng(seed)
    images = np.zeros((count, 3, SIZE, SIZE), np.uint8)
    classes = np.zeros((count, SIZE, SIZE), np.uint8)
    boxes = np.full((count, MAX_BOXES, 5), -1, np.float32)
    for k in range(count):
        images[k], classes[k], boxes[k] = _image(rng)
    return Shapes(images, classes, boxes)


def as_input(images: NDArray[np.uint8]) -> NDArray[np.float32]:
    """What the networks take: 0 to 1, float32."""
    return (images / np.float32(255)).astype(np.float32)


def _image(rng: np.random.Generator) -> tuple[NDArray[np.uint8], NDArray[np.uint8], NDArray[np.float32]]:
    y, x = np.mgrid[:SIZE, :SIZE].astype(np.float32)
    slope = rng.uniform(-1, 1, (3, 2, 1, 1))
    image = rng.uniform(40, 215, (3, 1, 1)) + slope[:, 0] * (x - SIZE / 2) + slope[:, 1] * (y - SIZE / 2)
    classes = np.zeros((SIZE, SIZE), np.uint8)
    boxes = np.full((MAX_BOXES, 5), -1, np.float32)
    for k in range(int(rng.integers(1, MAX_BOXES + 1))):
        radius = float(rng.uniform(4, 11))
        cx, cy = rng.uniform(radius, SIZE - radius, 2)
        kind = int(rng.integers(len(CLASSES)))
        mask = _mask(kind, x, y, float(cx), float(cy), radius)
        if (mask & (classes > 0)).sum() > 0.1 * mask.sum():
            continue
        colour = rng.uniform(0, 255, (3, 1, 1))
        if np.abs(colour - image.mean(axis=(1, 2), keepdims=True)).max() < 50:
            continue
        image = np.where(mask, colour, image)
        classes[mask] = kind + 1
        rows, columns = np.where(mask)
        boxes[k] = (kind, columns.min(), rows.min(), columns.max() + 1, rows.max() + 1)
    noisy = image + rng.normal(0, 4, image.shape)
    return np.clip(noisy // 4 * 4, 0, 255).astype(np.uint8), classes, boxes


def _mask(
    kind: int, x: NDArray[np.float32], y: NDArray[np.float32], cx: float, cy: float, radius: float
) -> NDArray[np.bool_]:
    if kind == 0:
        return np.asarray((x - cx) ** 2 + (y - cy) ** 2 <= radius**2)
    if kind == 1:
        return np.asarray((np.abs(x - cx) <= radius * 0.85) & (np.abs(y - cy) <= radius * 0.85))
    return np.asarray((y - cy <= radius * 0.8) & (np.abs(x - cx) <= (y - cy + radius) * 0.6))
