"""What `eptq_onnx.verify` asks of a quantized file, and how much it runs."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field, field_validator, model_validator
from typing_extensions import Self

from eptq_onnx.config.accuracy import module_and_function
from eptq_onnx.config.option import Option, OptionModel


class Gate(OptionModel):
    """Options of `eptq_onnx.verify`; all are keywords, documented field by field.

    Raises
    ------
    ConfigError
        If an option is invalid; the message names it.
    """

    min_sqnr: Annotated[float | None, Option("gate", default="none")] = None
    """Signal-to-noise ratio that every output must have, in dB."""
    max_slowdown: Annotated[float | None, Option("gate", default="none")] = Field(None, gt=0)
    """Most times as long as the float model one run may take. The file fails if the whole interval of the
    measured ratio lies above it."""
    evaluate: Annotated[
        Callable[..., float] | str | None,
        Option("gate", metavar="MODULE:FUNCTION", text=True, default="none"),
    ] = None
    """Function that scores a model on data of yours. Its argument is the model; see the same option of
    quantize."""
    min_score: Annotated[float | None, Option("gate", default="none")] = None
    """Score that the quantized model must reach."""
    strict: Annotated[bool, Option("gate")] = False
    """Fail for warnings of the target's rules, too."""
    samples: Annotated[int, Option("effort")] = Field(128, ge=1)
    """Most samples to compare outputs on, spread evenly over the data."""
    threads: Annotated[int, Option("effort")] = Field(1, ge=0)
    """Threads of one operator when the latency is measured; 0 for one per core."""
    seconds: Annotated[float, Option("effort")] = Field(3.0, ge=0)
    """Seconds to spend on the latency of both files; 0 leaves it out."""
    custom_ops: Annotated[tuple[Path, ...], Option("effort", default="none")] = ()
    """Shared library with custom operators for onnxruntime. May be repeated."""

    @field_validator("evaluate")
    @classmethod
    def _named(cls, value: Any) -> Any:
        return module_and_function(value)

    @field_validator("custom_ops", mode="before")
    @classmethod
    def _one_or_several(cls, given: object) -> object:
        return (given,) if isinstance(given, (str, Path)) else given

    @model_validator(mode="after")
    def _complete(self) -> Self:
        if self.min_score is not None and self.evaluate is None:
            raise ValueError("min_score needs something that scores: give evaluate, too")
        if self.max_slowdown is not None and not self.seconds:
            raise ValueError("max_slowdown needs a measurement: leave seconds=0 out")
        return self
