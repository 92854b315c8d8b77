"""How fast the quantized model runs beside the float model. Pure data."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum


@dataclass(frozen=True)
class OperatorTime:
    """Time of one kind of operator in one run of the float and of the quantized model, in seconds."""

    operator: str
    float_seconds: float
    quantized_seconds: float


class Pace(str, Enum):
    """The quantized model's run time compared with the float model's, as far as noise allows."""

    FASTER = "faster"
    SAME = "about as fast"
    SLOWER = "slower"


@dataclass(frozen=True)
class Speed:
    """Run times of the float and of the written model in onnxruntime on this machine, measured in turn.

    Parameters
    ----------
    pace : Pace
    float_seconds, quantized_seconds : float
        Median time of one run.
    ratio : float
        Median over pairs of the quantized model's time divided by the float model's; above 1 it is slower.
    low, high : float
        Confidence interval of that median, at 99.8 %.
    pairs : int
        Measurements of each model.
    samples : int
        Samples per run.
    operators : tuple of OperatorTime
        If the model is not faster, the time of each kind of operator, largest increase over the float model
        first.
    """

    pace: Pace
    float_seconds: float
    quantized_seconds: float
    ratio: float
    low: float
    high: float
    pairs: int
    samples: int
    operators: tuple[OperatorTime, ...] = ()
