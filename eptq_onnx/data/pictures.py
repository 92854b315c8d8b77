"""Pictures as samples: decoding with Pillow, and the recipe that a model's input asks for."""

from __future__ import annotations

import re
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from onnx import ModelProto, numpy_helper

from eptq_onnx.config.recipes import IMAGE_RECIPES, Color, Fit, ImageRecipe, Layout, Resample, Units
from eptq_onnx.data.inputs import Input
from eptq_onnx.data.layouts import Symbol
from eptq_onnx.data.placing import SIZE, Placed, cut
from eptq_onnx.errors import DataError, InstallError, one_line

_MOST_PIXELS = 178_956_970
"""Pixels of the largest picture that is decoded: half a gigabyte of colours, Pillow's own limit."""
_YOLO_SIZE = 640
"""Size of a letterbox where neither the model nor the recipe states one."""
_SHORT_SIDE, _THUMBNAIL = 256 / 224, 64
"""Short side relative to what is cut out of it, and the size up to which nothing is cut off."""
_FILL = 114
_DEPTH_16, _DEPTH_8 = 65535, 255
_RANGES = {
    "NominalRange_0_255": "raw",
    "NominalRange_16_235": "raw",
    "Normalized_0_1": "unit",
    "Normalized_1_1": "tf",
}
"""Recipes of the pixel ranges that ONNX models may state in their metadata (onnx/docs/MetadataProps.md)."""
_FORMATS = {"Gray8": Color.GRAY, "Rgb8": Color.RGB, "Bgr8": Color.BGR}
"""Channels of the pixel formats there."""


@dataclass(frozen=True)
class Sight:
    """How a model sees pictures: a recipe without gaps, for one input.

    Parameters
    ----------
    input : Input
    recipe : ImageRecipe
        With size, fit, mean, std, units, layout, color and resample; mean and std are in pixels.
    guessed : tuple of str
        What of the recipe the user did not say, and where it was taken from.
    notes : tuple of str
        Guesses that nothing confirms.
    """

    input: Input
    recipe: ImageRecipe
    guessed: tuple[str, ...]
    notes: tuple[str, ...]

    def __call__(self, picture: Any) -> NDArray[Any]:
        """Return a picture of Pillow as a sample, without a batch axis."""
        return self.fitted(picture)[0]

    def fitted(self, picture: Any) -> tuple[NDArray[Any], Placed]:
        """Return a picture of Pillow as a sample, and where it lies in that."""
        recipe = self.recipe
        fitted, placed = _fitted(_plain(picture, recipe.color is Color.GRAY), recipe)
        pixels = np.asarray(fitted)
        pixels = pixels[..., None] if pixels.ndim == 2 else pixels
        if recipe.color is Color.BGR:
            pixels = pixels[..., ::-1]
        mean, std, _ = recipe.in_pixels() or ((0.0,), (1.0,), Units.PIXELS)
        kind = self.input.dtype or np.dtype(np.float32)
        if kind.kind == "f":
            pixels = ((pixels - np.array(mean, np.float32)) / np.array(std, np.float32)).astype(kind)
        else:
            pixels = pixels.astype(kind)
        if recipe.layout is Layout.NHW:
            return np.ascontiguousarray(pixels[..., 0]), placed
        turned = np.moveaxis(pixels, -1, 0) if recipe.layout is Layout.NCHW else pixels
        return np.ascontiguousarray(turned), placed

    def shown(self, sample: NDArray[Any]) -> NDArray[np.uint8]:
        """Return a sample as red, green and blue pixels of shape (height, width, 3)."""
        recipe = self.recipe
        pixels = sample[..., None] if recipe.layout is Layout.NHW else sample
        pixels = np.moveaxis(pixels, 0, -1) if recipe.layout is Layout.NCHW else pixels
        mean, std, _ = recipe.in_pixels() or ((0.0,), (1.0,), Units.PIXELS)
        if sample.dtype.kind == "f":
            pixels = np.asarray(pixels, np.float32) * np.array(std, np.float32) + np.array(mean, np.float32)
        pixels = pixels[..., ::-1] if recipe.color is Color.BGR else pixels
        return np.broadcast_to(pixels, (*pixels.shape[:2], 3)).round().clip(0, 255).astype(np.uint8)


@contextmanager
def pillow() -> Iterator[Any]:
    """Open the library, ready for threads; its warnings about odd files are not ours to pass on.

    Raises
    ------
    InstallError
        If it is not installed.
    """
    try:
        image = import_module("PIL.Image")
    except ImportError as e:
        raise InstallError("pictures need Pillow: pip install 'eptq-onnx[images]'.") from e
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        image.init()
        yield image


def decoded(path: Path, sight: Sight) -> tuple[NDArray[Any], Placed] | str:
    """Return a file as a sample, and where it lies in that, or why it cannot be read; inside `pillow`."""
    image = import_module("PIL.Image")
    try:
        with image.open(path) as picture:
            return sight.fitted(picture)
    except image.DecompressionBombError:
        return f"it declares more than {_MOST_PIXELS} pixels, which may be a decompression bomb"
    except Exception as e:
        # For damaged files, decoders raise OSError, SyntaxError, ValueError, struct.error, zlib.error, ...
        message = one_line(e, 120).replace(str(path), path.name).rstrip(".")
        return message or type(e).__name__


def sight_of(model: ModelProto, inputs: tuple[Input, ...], given: ImageRecipe | None) -> Sight:
    """Return how a model sees pictures.

    Parameters
    ----------
    model : ModelProto
    inputs : tuple of Input
    given : ImageRecipe or None
        What the user said.

    Raises
    ------
    DataError
        If the model does not take pictures, or not such.
    """
    target = _target(inputs)
    facts = {p.key: p.value for p in model.metadata_props}
    wanted = given or ImageRecipe()
    guessed: list[str] = []
    notes: list[str] = []
    layout = wanted.layout or _layout(target)
    sides, channels = _sides(target, layout)
    color = wanted.color or _color(facts, channels)
    if channels not in (None, 1 if color is Color.GRAY else 3):
        raise DataError(
            f"pictures have {1 if color is Color.GRAY else 3} channels as color={color.value}, layout="
            f"{layout.value}, but the model takes {target}: say another color or layout with --image."
        )
    values, why = _values(model, target, facts)
    if not values:
        values = _usual(wanted, layout, color)
        notes += [_UNKNOWN.format(values)] if wanted.mean is None else []
    named = ImageRecipe.model_validate(IMAGE_RECIPES[values])
    fit = wanted.fit or (Fit.CROP if wanted.resize is not None else named.fit) or Fit.CROP
    size, where = _size(target, wanted, sides, facts, fit)
    if isinstance(wanted.resize, int) and wanted.resize < min(size):
        raise DataError(f"resize={wanted.resize} is smaller than what is cut out of it, {size[0]}×{size[1]}.")
    numbers = (wanted if wanted.mean is not None else named).in_pixels()
    mean, std, units = numbers or ((0.0,), (1.0,), Units.PIXELS)
    if wanted.mean is None:
        guessed.append(f"mean and std ({why or 'those of most such models'})")
        turned = (color is Color.BGR) != (named.color is Color.BGR)
        mean, std = (mean[::-1], std[::-1]) if turned else (mean, std)
    elif wanted.units is None:
        limit = "at most 2" if units is Units.FRACTIONS else "above 2"
        guessed.append(f"units ({units.value}, because the largest of mean and std is {limit})")
    guessed += [f"size ({where})"] if where else []
    guessed += [f"{key} (the model's input)" for key in ("layout", "color") if vars(wanted)[key] is None]
    guessed += [f"fit ({why or 'the usual one'})"] if wanted.fit is None and wanted.resize is None else []
    if color is Color.GRAY:
        mean, std = (float(np.mean(mean)),), (float(np.mean(std)),)
    if target.dtype is not None and target.dtype.kind != "f" and (mean, std) != ((0.0,), (1.0,)):
        notes.append(f"the input {target.name!r} takes {target.dtype}: pixels stay as they are")
        mean, std = (0.0,), (1.0,)
    recipe = ImageRecipe(
        size=size,
        resize=(wanted.resize or _short_side(min(size))) if fit is Fit.CROP else None,
        fit=fit,
        fill=(_FILL if wanted.fill is None else wanted.fill) if fit in _BOXED else None,
        mean=tuple(round(v, 6) for v in mean),
        std=tuple(round(v, 6) for v in std),
        units=Units.PIXELS,
        layout=layout,
        color=color,
        resample=wanted.resample or named.resample or Resample.BILINEAR,
    )
    return Sight(target, recipe, tuple(guessed), tuple(notes))


_UNKNOWN = (
    "nothing in the model says how pixels are scaled, so the recipe {!r} was taken. If the model was trained "
    "with another one, ranges and figures are wrong: give it with --image (by name: "
    f"{', '.join(IMAGE_RECIPES)})"
)
_BOXED = (Fit.LETTERBOX, Fit.LETTERBOX_CORNER)


def _target(inputs: tuple[Input, ...]) -> Input:
    """Return the input that takes pictures."""
    fitting = [i for i in inputs if i.dims is not None and len(i.dims) in (3, 4) and i.dtype is not None]
    if len(inputs) > 1 or not fitting:
        raise DataError(
            f"pictures fill one input with 3 or 4 axes, but the model takes {'; '.join(map(str, inputs))}: "
            "give arrays, as a .npz file or module:function."
        )
    return fitting[0]


def _layout(target: Input) -> Layout:
    dims = target.dims or ()
    sizes = dims[-3:]
    if sizes[0] in (1, 3):
        return Layout.NCHW
    if sizes[-1] in (1, 3):
        return Layout.NHWC
    if len(dims) == 3 and not isinstance(dims[0], int):
        return Layout.NHW
    return Layout.NCHW


def _sides(target: Input, layout: Layout) -> tuple[tuple[Symbol, Symbol], Symbol]:
    """Return height and width of the input, and the number of its channels; None where they are open."""
    dims = (target.dims or ())[-3:]
    numbers = [d if isinstance(d, int) else None for d in dims]
    if layout is Layout.NHW:
        return (numbers[1], numbers[2]), 1
    height, width, channels = [*numbers[1:], numbers[0]] if layout is Layout.NCHW else numbers
    return (height, width), channels


def _color(facts: Mapping[str, str], channels: Symbol) -> Color:
    if channels == 1:
        return Color.GRAY
    return _FORMATS.get(facts.get("Image.BitmapPixelFormat", ""), Color.RGB)


def _size(
    target: Input,
    wanted: ImageRecipe,
    sides: tuple[Symbol, Symbol],
    facts: Mapping[str, str],
    fit: Fit,
) -> tuple[tuple[int, int], str]:
    """Return height and width, and where they were taken from unless the user said them."""
    if wanted.size is not None:
        if any(side not in (None, size) for side, size in zip(sides, wanted.size, strict=True)):
            raise DataError(
                f"size={'x'.join(map(str, wanted.size))} does not fit the input {target}: leave size out."
            )
        return wanted.size, ""
    stated = re.findall(r"\d+", facts.get("imgsz", ""))
    usual = _YOLO_SIZE if fit in _BOXED else SIZE
    others = [int(s) for s in stated * 2][:2] if 0 < len(stated) <= 2 else [usual, usual]
    height, width = (
        side if isinstance(side, int) else other for side, other in zip(sides, others, strict=True)
    )
    if None not in sides:
        return (height, width), "the model's input"
    return (
        height,
        width,
    ), "the model's metadata" if stated else "the usual one, because the model leaves it open"


def _usual(wanted: ImageRecipe, layout: Layout, color: Color) -> str:
    """Return the recipe that most models like this one were trained with."""
    if color is Color.GRAY or wanted.fit in _BOXED:
        return "unit"
    return "tf" if layout is Layout.NHWC else "imagenet"


def _short_side(size: int) -> int:
    """Return the usual short side before a crop: sets of small pictures are made to be used whole."""
    return size if size <= _THUMBNAIL else round(size * _SHORT_SIDE)


def _values(model: ModelProto, target: Input, facts: Mapping[str, str]) -> tuple[str, str]:
    """Return the recipe whose values a model takes, and what tells so; both empty if nothing does."""
    if target.dtype is not None and target.dtype.kind != "f":
        return "raw", f"the input takes {target.dtype}"
    if facts.get("Image.NominalPixelRange") in _RANGES:
        return _RANGES[facts["Image.NominalPixelRange"]], "the model's metadata"
    if facts.get("author") == "Ultralytics" or {"stride", "imgsz", "names"} <= facts.keys():
        return "unit" if facts.get("task") == "classify" else "yolo-letterbox", "the model's metadata"
    inside = _normalization(model, target.name)
    return inside, "the model scales its input itself" if inside else ""


def _normalization(model: ModelProto, name: str) -> str:
    """Return the recipe of values that a model's first nodes scale; empty if they scale none."""
    constants = {t.name: t for t in model.graph.initializer}
    for node in model.graph.node:
        if node.op_type == "Constant" and node.attribute and node.attribute[0].name == "value":
            constants[node.output[0]] = node.attribute[0].t
    for node in model.graph.node:
        if name not in node.input:
            continue
        if node.op_type in ("Cast", "Transpose", "Identity"):
            name = node.output[0]
            continue
        others = [constants[other] for other in node.input if other in constants]
        if node.op_type not in ("Sub", "Add", "Mul", "Div") or len(others) != 1:
            return ""
        largest = float(np.abs(np.asarray(numpy_helper.to_array(others[0]), np.float64)).max(initial=0.0))
        if node.op_type == "Mul":
            return "raw" if largest < 0.1 else "unit" if largest > 1.5 else ""
        return "raw" if largest > 2 else "unit" if largest else ""
    return ""


def _plain(picture: Any, gray: bool) -> Any:
    """Return the first frame of a picture, upright, as 8-bit red, green and blue or as 8-bit grey."""
    width, height = picture.size
    if width * height > _MOST_PIXELS:
        raise ValueError(f"it declares {width}×{height} pixels, more than the {_MOST_PIXELS} that are read")
    upright = picture
    with suppress(Exception):  # a damaged tag says nothing about the pixels
        upright = import_module("PIL.ImageOps").exif_transpose(picture)
    if upright.mode.startswith(("I", "F")):
        upright = import_module("PIL.Image").fromarray(_eight_bits(np.asarray(upright)))
    # Transparency is dropped, as training pipelines and OpenCV do.
    return upright.convert("L" if gray else "RGB")


def _eight_bits(values: NDArray[Any]) -> NDArray[np.uint8]:
    """Return grey values in 8 bits: integers of 16 bits or more, and floats of any range."""
    largest = float(np.nan_to_num(values).max(initial=0))
    if values.dtype.kind == "f":
        white = 1.0 if largest <= 1 else max(_DEPTH_8, largest)
    else:
        white = max(_DEPTH_16, largest)
    scaled = np.nan_to_num(np.asarray(values, np.float64)) * (_DEPTH_8 / white)
    return scaled.round().clip(0, _DEPTH_8).astype(np.uint8)


def _fitted(picture: Any, recipe: ImageRecipe) -> tuple[Any, Placed]:
    """Return a picture of the recipe's size, and where it lies in that."""
    image = import_module("PIL.Image")
    kernel = image.Resampling[(recipe.resample or Resample.BILINEAR).name]
    found = cut(picture.size, recipe)
    scaled = picture.resize(found.inner, kernel, box=found.box)
    if recipe.fit in _BOXED:
        fill = _FILL if recipe.fill is None else recipe.fill
        height, width = recipe.size or (SIZE, SIZE)
        canvas = image.new(picture.mode, (width, height), fill if picture.mode == "L" else (fill,) * 3)
        canvas.paste(scaled, found.corner)
        scaled = canvas
    return scaled, found.placed(picture.size)
