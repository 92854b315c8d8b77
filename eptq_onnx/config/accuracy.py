"""Options on the score that a quantized model must keep."""

from __future__ import annotations

from collections.abc import Callable
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator
from typing_extensions import Self, TypedDict, Unpack

from eptq_onnx.config.option import Option, OptionModel


class Drop(BaseModel):
    """How much worse a score may be, written as ``0.005`` or ``1%``.

    Parameters
    ----------
    amount : float
    relative : bool
        True for a share of the float model's score.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    amount: float = Field(ge=0, allow_inf_nan=False)
    relative: bool = False

    @model_validator(mode="before")
    @classmethod
    def _parse(cls, value: Any) -> Any:
        if isinstance(value, (int, float)) and not isinstance(value, bool):
            return {"amount": value}
        if not isinstance(value, str):
            return value
        number = value.strip().removesuffix("%")
        try:
            amount = float(number)
        except ValueError:
            raise ValueError("write an amount such as 0.005, or a share such as 1%") from None
        relative = value.strip().endswith("%")
        return {"amount": amount / 100 if relative else amount, "relative": relative}

    def __str__(self) -> str:
        return f"{100 * self.amount:g}%" if self.relative else f"{self.amount:.15g}"

    def of(self, score: float) -> float:
        """Return it in the unit of a score."""
        return self.amount * abs(score) if self.relative else self.amount


def module_and_function(value: Any) -> Any:
    """Return a function, or the name of one; raise ValueError for a text that is no such name."""
    if isinstance(value, str):
        module, _, name = value.partition(":")
        if not all(part.isidentifier() for part in [*module.split("."), name]):
            raise ValueError("write it as module:function, such as metric:accuracy for accuracy in metric.py")
    return value


class AccuracyOptions(TypedDict, total=False):
    """The options of `Accuracy` as users write them; a test holds the two against each other."""

    evaluate: Callable[..., float] | str | None
    max_drop: float | str | None
    higher_is_better: bool
    max_evaluations: int


class Accuracy(OptionModel):
    """The score that a quantized model must keep; further keywords of `eptq_onnx.quantize`.

    Raises
    ------
    ConfigError
        If an option is invalid; the message names it.
    """

    evaluate: Annotated[
        Callable[..., float] | str | None,
        Option("accuracy", metavar="MODULE:FUNCTION", text=True, default="none"),
    ] = None
    """Function that scores a model on data of yours. Its argument has the methods run(names, feeds),
    get_inputs() and get_outputs() of an onnxruntime session; called with a dict of inputs, it returns a dict
    of outputs."""
    max_drop: Annotated[
        Drop | None, Option("accuracy", metavar="AMOUNT|PERCENT", text=True, default="none")
    ] = None
    """Most that the score may be worse than the float model's: 0.005, or 1% of that score. Where the file as
    asked for misses it, parts that do much to the outputs get more bits or stay float, until it is met."""
    higher_is_better: Annotated[bool, Option("accuracy", off="--lower-is-better")] = True
    """Whether a higher score is a better one."""
    max_evaluations: Annotated[int, Option("accuracy", metavar="N")] = Field(12, ge=3)
    """Most times that the function is called, the float model included."""

    def __init__(self, **options: Unpack[AccuracyOptions]) -> None:
        super().__init__(**options)

    @field_validator("evaluate")
    @classmethod
    def _named(cls, value: Any) -> Any:
        return module_and_function(value)

    @model_validator(mode="after")
    def _complete(self) -> Self:
        if self.max_drop is not None and self.evaluate is None:
            raise ValueError("max_drop needs something that scores: give evaluate, too")
        return self

    def given(self) -> dict[str, object]:
        """Return the options that were given, as JSON; a function by its name."""
        if self.evaluate is None:
            return {}
        name = self.evaluate
        if not isinstance(name, str):
            name = f"{getattr(name, '__module__', '')}:{getattr(name, '__qualname__', type(name).__name__)}"
        found: dict[str, object] = {"evaluate": name}
        if self.max_drop is not None:
            found |= {"max_drop": str(self.max_drop), "max_evaluations": self.max_evaluations}
        return {**found, "higher_is_better": self.higher_is_better}
