"""How pictures and sounds become samples: recipes, written as ``NAME,KEY=VALUE,...``."""

from __future__ import annotations

from collections.abc import Mapping
from enum import Enum
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator
from typing_extensions import Self

_LARGEST = 16384
"""Longest side of a picture that a model takes."""
_FRACTIONS_UP_TO = 2.0
"""Means and standard deviations up to this are those of values from 0 to 1; larger ones, of 0 to 255."""
WORDS: dict[str, dict[str, tuple[float, ...]]] = {
    "mean": {"imagenet": (0.485, 0.456, 0.406), "clip": (0.48145466, 0.4578275, 0.40821073)},
    "std": {"imagenet": (0.229, 0.224, 0.225), "clip": (0.26862954, 0.26130258, 0.27577711)},
}
"""Statistics of well-known training sets: red, green, blue, of values from 0 to 1."""
IMAGE_RECIPES: dict[str, str] = {
    "imagenet": "fit=crop,mean=imagenet,std=imagenet,units=fractions",
    "clip": "fit=crop,mean=clip,std=clip,units=fractions,resample=bicubic",
    "tf": "fit=crop,mean=127.5,std=127.5,units=pixels",
    "caffe": "fit=crop,mean=103.939,116.779,123.68,std=1,units=pixels,color=bgr",
    "unit": "fit=crop,mean=0,std=255,units=pixels",
    "raw": "fit=crop,mean=0,std=1,units=pixels",
    "yolo-letterbox": "fit=letterbox,fill=114,mean=0,std=255,units=pixels",
    "yolox": "fit=letterbox-corner,fill=114,mean=0,std=1,units=pixels,color=bgr",
}
"""What the named recipes stand for. Sizes and layouts come from the model."""


class Fit(str, Enum):
    """How a picture of any shape fills the model's size."""

    CROP = "crop"
    STRETCH = "stretch"
    LETTERBOX = "letterbox"
    LETTERBOX_CORNER = "letterbox-corner"


class Layout(str, Enum):
    """Order of the axes of an input: batch, channels, height, width."""

    NCHW = "nchw"
    NHWC = "nhwc"
    NHW = "nhw"


class Color(str, Enum):
    """Channels of a picture, in order."""

    RGB = "rgb"
    BGR = "bgr"
    GRAY = "gray"


class Resample(str, Enum):
    """How pixels are interpolated."""

    NEAREST = "nearest"
    BOX = "box"
    BILINEAR = "bilinear"
    BICUBIC = "bicubic"
    LANCZOS = "lanczos"


class Units(str, Enum):
    """What mean and standard deviation are given in."""

    PIXELS = "pixels"
    FRACTIONS = "fractions"


class Channels(str, Enum):
    """Channels of a sound."""

    MONO = "mono"
    STEREO = "stereo"


class _Recipe(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    def __str__(self) -> str:
        given = self.model_dump(exclude_none=True)
        return ",".join(f"{key}={_written(value)}" for key, value in given.items())


class ImageRecipe(_Recipe):
    """What is done to a picture; what is None is taken from the model, or guessed.

    Parameters
    ----------
    size : tuple of two ints
        Height and width of the model's input.
    resize : int or "none"
        Pixels of the short side before a crop; ``none``: a picture is only scaled if the crop is larger.
    fit : Fit
        ``crop``: scale the short side to ``resize`` and cut out the middle. ``stretch``: scale to ``size``.
        ``letterbox``: scale into ``size`` and fill both sides; ``letterbox-corner``: fill right and below.
    fill : int
        Grey of what a letterbox fills.
    mean, std : tuple of float
        Subtracted from the channels, and divided by, in the order of ``color``; one number is for all.
    units : Units
        By default, they are in pixels of 0 to 255 if any is above 2, and else in fractions of 255.
    layout : Layout
    color : Color
    resample : Resample
    """

    size: tuple[Annotated[int, Field(ge=1, le=_LARGEST)], Annotated[int, Field(ge=1, le=_LARGEST)]] | None = (
        None
    )
    resize: Annotated[int, Field(ge=1, le=2 * _LARGEST)] | Literal["none"] | None = None
    fit: Fit | None = None
    fill: int | None = Field(None, ge=0, le=255)
    mean: tuple[float, ...] | None = None
    std: tuple[Annotated[float, Field(gt=0)], ...] | None = None
    units: Units | None = None
    layout: Layout | None = None
    color: Color | None = None
    resample: Resample | None = None

    @model_validator(mode="before")
    @classmethod
    def _parse(cls, value: Any) -> Any:
        if not isinstance(value, str):
            return value
        given = parsed(value, IMAGE_RECIPES)
        if "crop" in given:
            words = {"center": "crop", "none": "stretch"}
            if given["crop"] not in words or "crop" in given.get("fit", ""):
                raise ValueError("crop is center or none, and stands for fit=crop and fit=stretch")
            given["fit"] = words[given.pop("crop")]
        turned = given.get("color") == Color.BGR.value
        for key, words_of_key in WORDS.items():
            numbers = words_of_key.get(given.get(key, ""))
            if numbers is not None:
                given[key] = numbers[::-1] if turned else numbers
        return given

    @field_validator("size", mode="before")
    @classmethod
    def _height_and_width(cls, value: object) -> object:
        if isinstance(value, int):
            return (value, value)
        if not isinstance(value, str):
            return value
        sides = value.replace("×", "x").split("x")
        if not 1 <= len(sides) <= 2 or not all(side.strip().isdecimal() for side in sides):
            raise ValueError("give a side such as 224, or height and width such as 320x224")
        return sides * 2 if len(sides) == 1 else sides

    @field_validator("mean", "std", mode="before")
    @classmethod
    def _numbers(cls, value: object) -> object:
        if isinstance(value, str):
            return value.split(",")
        return (value,) if isinstance(value, (int, float)) else value

    @field_validator("mean", "std")
    @classmethod
    def _one_or_three(cls, value: tuple[float, ...] | None) -> tuple[float, ...] | None:
        if value is not None and len(value) not in (1, 3):
            raise ValueError("give one number, or one for each of three channels")
        return value

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if (self.mean is None) != (self.std is None):
            raise ValueError("mean and std go together: give both")
        if self.resize is not None and self.fit not in (None, Fit.CROP):
            raise ValueError(
                f"resize is the short side before a crop: leave it out with fit={_written(self.fit)}"
            )
        if isinstance(self.resize, int) and self.size is not None and self.resize < min(self.size):
            raise ValueError(f"resize={self.resize} is smaller than size={_written(self.size)}")
        return self

    def in_pixels(self) -> tuple[tuple[float, ...], tuple[float, ...], Units] | None:
        """Return mean and standard deviation in pixels of 0 to 255, and the units they were given in."""
        if self.mean is None or self.std is None:
            return None
        small = max(*self.mean, *self.std) <= _FRACTIONS_UP_TO
        units = self.units or (Units.FRACTIONS if small else Units.PIXELS)
        factor = 255.0 if units is Units.FRACTIONS else 1.0
        return tuple(factor * v for v in self.mean), tuple(factor * v for v in self.std), units


class AudioRecipe(_Recipe):
    """What is done to a sound; what is None is taken from the model or the files.

    Parameters
    ----------
    rate : int
        Samples per second.
    seconds : float
        Length; longer sounds keep their middle, shorter ones get zeros at the end.
    channels : Channels
    """

    rate: int | None = Field(None, ge=100, le=1_000_000)
    seconds: float | None = Field(None, gt=0, le=3600)
    channels: Channels | None = None

    @model_validator(mode="before")
    @classmethod
    def _parse(cls, value: Any) -> Any:
        return parsed(value, {}) if isinstance(value, str) else value


def parsed(text: str, named: Mapping[str, str]) -> dict[str, Any]:
    """Split ``NAME,KEY=VALUE,...``; a piece without an equals sign continues the value before it.

    Raises
    ------
    ValueError
        If a piece is neither, or a key is given twice.
    """
    given: dict[str, Any] = {}
    base: dict[str, Any] = {}
    key = ""
    for place, piece in enumerate(text.split(",")):
        name, equals, value = (part.strip() for part in piece.partition("="))
        if equals:
            if name in given:
                raise ValueError(f"{name} is given twice")
            given[name], key = value, name
        elif key:
            given[key] += f",{name}"
        elif place == 0 and name in named:
            base = parsed(named[name], {})
        else:
            names = f"one of {', '.join(named)}, and then " if named else ""
            raise ValueError(f"{name or text!r} is no recipe: give {names}KEY=VALUE, with commas between")
    if {"mean", "std", "units"} & given.keys():
        # Units belong to the numbers that they were given with.
        base.pop("units", None)
    return {**base, **given}


def _written(value: object) -> str:
    """Return a value as it is written in a recipe."""
    if isinstance(value, Enum):
        return str(value.value)
    if isinstance(value, tuple) and all(isinstance(v, int) for v in value):
        return f"{value[0]}" if len(set(value)) == 1 else "x".join(map(str, value))
    if isinstance(value, tuple):
        numbers = value[:1] if len(set(value)) == 1 else value
        return ",".join(f"{v:.10g}" for v in numbers)
    return f"{value:.10g}" if isinstance(value, float) else str(value)
