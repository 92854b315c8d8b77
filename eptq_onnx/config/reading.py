"""Options on how calibration data is read."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from pydantic import Field
from typing_extensions import TypedDict, Unpack

from eptq_onnx.config.option import Option, OptionModel
from eptq_onnx.config.recipes import AudioRecipe, ImageRecipe


class ReadingOptions(TypedDict, total=False):
    """The options of `Reading` as users write them; a test holds the two against each other."""

    samples: int | None
    image: ImageRecipe | str | None
    audio: AudioRecipe | str | None
    tokenizer: str | Path | None


class Reading(OptionModel):
    """How calibration data is read; options of every command that takes ``--data``.

    Raises
    ------
    ConfigError
        If an option is invalid; the message names it.
    """

    samples: Annotated[int | None, Option("data", metavar="N", default="all")] = Field(None, ge=1)
    """Number of samples to use, spread evenly over the data."""
    image: Annotated[
        ImageRecipe | None, Option("data", metavar="RECIPE", text=True, default="guessed from the model")
    ] = None
    """How pictures become inputs: a name (imagenet, clip, tf, caffe, unit, raw, yolo-letterbox, yolox), and
    behind it what differs, as KEY=VALUE with commas between, such as imagenet,size=224 or tf,resize=none.
    Keys: size, resize, fit, fill, mean, std, units, layout, color, resample. What is left out is guessed and
    shown."""
    audio: Annotated[
        AudioRecipe | None,
        Option("data", metavar="RECIPE", text=True, default="from the model and the files"),
    ] = None
    """How sounds become inputs, such as rate=16000,seconds=1,channels=mono. The rate is that of training."""
    tokenizer: Annotated[Path | None, Option("data", metavar="FILE", default="none")] = None
    """The tokenizer.json of a model that reads text, or the vocab.txt of one like BERT."""

    def __init__(self, **options: Unpack[ReadingOptions]) -> None:
        super().__init__(**options)

    def given(self) -> dict[str, object]:
        """Return the options that were given, as JSON."""
        return self.model_dump(mode="json", exclude_none=True)
