"""Options that are one of several words."""

from __future__ import annotations

from enum import Enum


class Preset(str, Enum):
    """How much time to spend."""

    FAST = "fast"
    BALANCED = "balanced"
    PAPER = "paper"


class ActivationRange(str, Enum):
    """How an activation range is chosen from the calibration statistics."""

    MINMAX = "minmax"
    PERCENTILE = "percentile"
    MSE = "mse"


class WeightRange(str, Enum):
    """How a weight range is chosen."""

    MINMAX = "minmax"
    MSE = "mse"
    HMSE = "hmse"


class BudgetUnit(str, Enum):
    """What a budget counts."""

    WEIGHTS = "weights"
    BYTES = "bytes"
    BITOPS = "bitops"
    ACTIVATIONS = "activations"
    TIME = "time"


class WeightStorage(str, Enum):
    """How weights below 8 bits lie in the written file."""

    PACKED = "packed"
    NATIVE = "native"
    INT8 = "int8"
    MATMULNBITS = "matmulnbits"


class FloatType(str, Enum):
    """Type of what stays float."""

    FLOAT32 = "float32"
    FLOAT16 = "float16"
    BFLOAT16 = "bfloat16"


class Activations(str, Enum):
    """When the ranges of layers' inputs are known."""

    STATIC = "static"
    DYNAMIC = "dynamic"
    AUTO = "auto"


class Start(str, Enum):
    """Where the network-wise optimization starts."""

    NEAREST = "nearest"
    CLOSED_FORM = "closed-form"


class Optimizer(str, Enum):
    """Optimizer of the rounding variables; the other parameters always use Adam."""

    RADAM = "radam"
    ADAM = "adam"


class RoundingVariable(str, Enum):
    """What is learned for each weight element."""

    SOFT = "soft"
    STRAIGHT_THROUGH = "straight-through"


class Attention(str, Enum):
    """What the distillation loss weighs by the Hessian bound."""

    NONE = "none"
    LAYER = "layer"
    CHANNEL = "channel"


class Objective(str, Enum):
    """What decides which operators run on integers, and on how many bits."""

    TIME = "time"
    INTEGERS = "integers"
    NOISE = "noise"
    BYTES = "bytes"
