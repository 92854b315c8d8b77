"""The records of what was measured: the optimization, the written file and its speed. Pure data."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import Enum

from eptq_onnx.diagnosis import SampleNoise
from eptq_onnx.numerics.statistics import OutputStatistics


@dataclass(frozen=True)
class OperatorTime:
    """Time of one kind of operator in one run of the float and of the quantized model, in seconds."""

    operator: str
    float_seconds: float
    quantized_seconds: float


LAYER_SAMPLES = 32
"""Samples on which layers are compared, at most."""


class Pace(str, Enum):
    """The quantized model's run time compared with the float model's, as far as noise allows."""

    FASTER = "faster"
    SAME = "level"
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


@dataclass(frozen=True)
class Verification:
    """Comparison of the float model with the written model, both run in onnxruntime.

    Parameters
    ----------
    samples : int
        Samples compared.
    outputs : dict of str to float
        SQNR in dB per float output.
    layers : dict of str to float
        SQNR in dB of each layer's quantized output, including all errors from upstream.
    planned : dict of str to int
        Operator to the number of nodes that should run on integers.
    kernels : dict of str to int
        Operator to the number of integer kernels found in the runtime's optimized graph.
    float_bytes, quantized_bytes : int
    notes : tuple of str
        Unusual circumstances of the comparison.
    statistics : dict of str to OutputStatistics
        Per float output.
    held_out : bool
        False if a step of the quantization has seen these samples.
    worst : tuple of SampleNoise
        The samples on which the models differ most, worst first.
    """

    samples: int
    outputs: Mapping[str, float]
    layers: Mapping[str, float]
    planned: Mapping[str, int]
    kernels: Mapping[str, int]
    float_bytes: int
    quantized_bytes: int
    notes: tuple[str, ...] = ()
    statistics: Mapping[str, OutputStatistics] = field(default_factory=dict)
    held_out: bool = True
    worst: tuple[SampleNoise, ...] = ()


@dataclass(frozen=True)
class OptimizationTrace:
    """Course and result of the network-wise optimization; by default, one that did not start.

    Parameters
    ----------
    reason : str
        Why that candidate was kept, or why there was no optimization, as a sentence without a full stop.
    steps : int
    losses : tuple of float
        Training loss of each step.
    checkpoints : tuple of (int, float)
        Step and held-out objective of each hard-rounded candidate; step 0 is the start.
    best_step : int
        Step of the candidate that was kept.
    flipped : float
        Share of the weights whose integers differ from the start.
    seconds : float
    passes : float
        What it cost, in float passes: runs of all scored samples through the float network.
    """

    reason: str
    steps: int = 0
    losses: tuple[float, ...] = ()
    checkpoints: tuple[tuple[int, float], ...] = ()
    best_step: int = 0
    flipped: float = 0.0
    seconds: float = 0.0
    passes: float = 0.0
