"""A small classifier and pictures for it: everything that a first try needs, without a download.

The classifier was trained by `models/train.py` on such pictures. `model.onnx` lies beside this file.
"""

from __future__ import annotations

import struct
import zlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from eptq_onnx.errors import OutputError

MODEL = Path(__file__).with_name("model.onnx")
CLASSES = ("cross", "disc", "ring", "square", "triangle")
HEIGHT, WIDTH = 32, 40
"""Size of a picture. The classifier sees the middle, as wide as it is high."""
PHOTOS, TEST = 250, 250
"""Number of pictures to calibrate on, and of labelled ones."""
METRIC = '''\
"""Score a model on the labelled pictures in the folder test: the share whose folder names the class."""

import eptq_onnx

CLASSES = ["cross", "disc", "ring", "square", "triangle"]


def accuracy(run):
    samples = eptq_onnx.samples("model.onnx", eptq_onnx.Data("test", image="imagenet"))
    right = [CLASSES[run(s.feeds)["scores"].argmax()] == s.name.split("/")[0] for s in samples]
    return sum(right) / len(right)
'''
"""Content of metric.py."""
_MEAN, _STD = (
    np.array(v, np.float32)[:, None, None] * 255 for v in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
)
"""Statistics of ImageNet, with which the classifier was trained."""


@dataclass(frozen=True)
class Pictures:
    """Drawn pictures.

    Parameters
    ----------
    images : ndarray of uint8, shape (n, HEIGHT, WIDTH, 3)
    labels : ndarray of int64, shape (n,)
        Places in `CLASSES`.
    """

    images: NDArray[np.uint8]
    labels: NDArray[np.int64]

    def as_input(self) -> NDArray[np.float32]:
        """Return what the classifier takes, of shape (n, 3, HEIGHT, HEIGHT)."""
        margin = (WIDTH - HEIGHT) // 2
        middle = self.images[:, :, margin : margin + HEIGHT].transpose(0, 3, 1, 2)
        return np.ascontiguousarray((middle - _MEAN) / _STD, np.float32)


def draw(count: int, seed: int) -> Pictures:
    """Draw pictures, each of one shape on a shaded background, with noise."""
    rng = np.random.default_rng(seed)
    labels = rng.integers(len(CLASSES), size=count)
    return Pictures(np.stack([_picture(CLASSES[k], rng) for k in labels]), labels)


def write(folder: Path) -> None:
    """Write the model, the folders photos and test, and metric.py.

    Raises
    ------
    OutputError
        If something cannot be written.
    """
    photos, test = draw(PHOTOS, seed=1), draw(TEST, seed=2)
    files = {"model.onnx": MODEL.read_bytes(), "metric.py": METRIC.encode()}
    files |= {f"photos/{k:03}.png": png(image) for k, image in enumerate(photos.images)}
    for k, (image, label) in enumerate(zip(test.images, test.labels, strict=True)):
        files[f"test/{CLASSES[label]}/{k:03}.png"] = png(image)
    try:
        for name, content in files.items():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / name).write_bytes(content)
    except OSError as e:
        raise OutputError(f"the folder {folder} cannot be written: {e.strerror or e}.") from e


def png(pixels: NDArray[np.uint8]) -> bytes:
    """Return a picture of shape (height, width, 3) as a PNG; see https://www.w3.org/TR/png-3/."""
    height, width, _ = pixels.shape
    rows = np.concatenate([np.zeros((height, 1), np.uint8), pixels.reshape(height, -1)], axis=1)
    chunks = {
        b"IHDR": struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0),
        b"IDAT": zlib.compress(rows.tobytes()),
        b"IEND": b"",
    }
    parts = [
        struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
        for kind, data in chunks.items()
    ]
    return b"\x89PNG\r\n\x1a\n" + b"".join(parts)


def _picture(kind: str, rng: np.random.Generator) -> NDArray[np.uint8]:
    y, x = np.mgrid[:HEIGHT, :WIDTH].astype(np.float32)
    ground = rng.uniform(60, 195, 3)
    colour = ground + rng.choice([-1, 1], 3) * rng.uniform(35, 80, 3)
    slope = rng.uniform(-1.5, 1.5, (2, 3))
    shade = slope[0] * (x[..., None] - WIDTH / 2) + slope[1] * (y[..., None] - HEIGHT / 2)
    radius = rng.uniform(7, 12)
    centre = rng.uniform(radius + 1, HEIGHT - radius - 1, 2)
    turn = rng.uniform(-0.4, 0.4)
    dx, dy = x - centre[0] - (WIDTH - HEIGHT) / 2, y - centre[1]
    u, v = np.cos(turn) * dx - np.sin(turn) * dy, np.sin(turn) * dx + np.cos(turn) * dy
    inside = _inside(kind, u / radius, v / radius)[..., None]
    image = np.where(inside, colour, ground) + shade + rng.normal(0, 8, (HEIGHT, WIDTH, 3))
    return np.asarray(image.round().clip(0, 255), np.uint8)


def _inside(kind: str, u: NDArray[np.float32], v: NDArray[np.float32]) -> NDArray[np.bool_]:
    """Return which points lie in a shape of radius 1."""
    far = np.hypot(u, v)
    wide = np.maximum(np.abs(u), np.abs(v))
    inside = {
        "cross": (wide <= 0.95) & (np.minimum(np.abs(u), np.abs(v)) <= 0.3),
        "disc": far <= 1,
        "ring": (far <= 1) & (far >= 0.55),
        "square": wide <= 0.85,
        "triangle": (v <= 0.8) & (np.abs(u) <= (v + 1) * 0.6),
    }
    return np.asarray(inside[kind])
