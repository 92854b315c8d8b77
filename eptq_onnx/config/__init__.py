"""The options."""

from eptq_onnx.config.accuracy import Accuracy
from eptq_onnx.config.budget import Budget
from eptq_onnx.config.choices import (
    ActivationRange,
    Activations,
    Attention,
    BudgetUnit,
    FloatType,
    Objective,
    Optimizer,
    Preset,
    RoundingVariable,
    Start,
    WeightRange,
    WeightStorage,
)
from eptq_onnx.config.config import Config
from eptq_onnx.config.gate import Gate
from eptq_onnx.config.option import Option, option_of
from eptq_onnx.config.presets import PRESET_PASSES
from eptq_onnx.config.reading import Reading
from eptq_onnx.config.widths import FLOAT_BITS
from eptq_onnx.config.without_samples import WITHOUT_SAMPLES, without_samples
from eptq_onnx.config.wrong import describe

__all__ = [
    "FLOAT_BITS",
    "PRESET_PASSES",
    "WITHOUT_SAMPLES",
    "Accuracy",
    "ActivationRange",
    "Activations",
    "Attention",
    "Budget",
    "BudgetUnit",
    "Config",
    "FloatType",
    "Gate",
    "Objective",
    "Optimizer",
    "Option",
    "Preset",
    "Reading",
    "RoundingVariable",
    "Start",
    "WeightRange",
    "WeightStorage",
    "describe",
    "option_of",
    "without_samples",
]
