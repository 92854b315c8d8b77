"""The one set of options, for the command line and for Python alike."""

from __future__ import annotations

from collections.abc import Mapping
from enum import Enum
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ByteSize, ConfigDict, Field, ValidationError, field_validator, model_validator

from eptq_onnx.errors import ConfigError


class Preset(str, Enum):
    """How much time to spend."""

    FAST = "fast"
    BALANCED = "balanced"
    BEST = "best"


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


class Budget(BaseModel):
    """Limit for mixed precision, written as ``weights=3.5``.

    Parameters
    ----------
    unit : BudgetUnit
        ``weights``: mean bits of a weight; ``bytes`` of all weights; ``bitops``: multiplications of one sample, each
        times the bits of both factors.
    amount : float
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    unit: BudgetUnit
    amount: float = Field(gt=0)

    @model_validator(mode="before")
    @classmethod
    def _parse(cls, value: Any) -> Any:
        if not isinstance(value, str):
            return value
        unit, _, amount = value.partition("=")
        if unit not in {u.value for u in BudgetUnit} or not amount:
            raise ValueError("write weights=BITS, bytes=COUNT or bitops=COUNT")
        return {"unit": unit, "amount": amount}

    def __str__(self) -> str:
        return f"{self.unit.value}={self.amount:g}"


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


class EngineChoice(str, Enum):
    """Where gradients come from."""

    AUTO = "auto"
    TRAINING = "training"
    STANDARD = "standard"


PRESET_STEPS = {Preset.FAST: (0, 0), Preset.BALANCED: (200, 1000), Preset.BEST: (1000, 5000)}
"""Fewest and most steps of the network-wise optimization."""
_CHEAP = 8e7
"""Multiplications a sample of a model that gets most steps; one of five times as many gets fewest."""


class Config(BaseModel):
    """Options of `eptq_onnx.quantize`.

    Parameters
    ----------
    weight_bits : int
        Bit width, 2 to 8.
    activation_bits : int
        Bit width, 2 to 8, or 16, which takes opset 21.
    edge_bits : int
        Bit width of the first and last layers, those that have no layer before or behind them: their weights, and, where
        `activation_bits` are fewer, the model's inputs and the last layers' inputs and outputs.
    budget : Budget or str, optional
        Mixed precision: every weight gets the width, of 2 to 8 bits, with which the error of the outputs is least within
        this limit; `weight_bits` and, for weights, `edge_bits` then mean nothing. As ``weights=4`` (mean bits), ``bytes=2e6``
        or ``bitops=1e10``.
    target : str
        Name of a shipped target, or path of a target file (TOML).
    preset : Preset
        ``fast`` uses no gradients: the closed-form start alone; ``balanced`` and ``best`` set `steps` to 200 and 1000, and
        to up to five times as many for models of less than 400 million multiplications a sample.
    steps : int, optional
        Steps of the network-wise optimization; overrides the preset.
    engine : EngineChoice
        Where gradients come from: ``training`` (onnxruntime's training build), ``standard`` (rules of our own, any
        onnxruntime), or, with ``auto``, the training build where it is installed.
    seed : int
        Seed of all randomness. The same input, config and seed give the same bytes.
    activation_range, percentile
        How activation ranges are chosen; the percentile (of each tail) is for ``percentile``.
    weight_range : WeightRange, optional
        By default ``hmse``, or ``mse`` with the preset ``fast``. The closed-form start chooses ranges of its own
        for the weights that it solves.
    damping : float
        Share of the mean that is added to the Hessian scores before HMSE.
    probes : int
        Hutchinson probes per sample.
    score_samples : int
        At most so many samples are scored and optimized on; the closed-form start always takes up to 1,024, as they are cheap.
    batch_size : int
        Samples a step.
    holdout : float
        Share of the samples that is kept out of the optimization, to choose among its results.
    start : Start
        ``closed-form``: input-error correction, compensated rounding and bias correction, layer by layer; ``nearest``:
        each weight to the nearest integer.
    correction_damping : float, optional
        How reluctantly the closed-form start bends weights to make up for errors upstream, in units of the mean variance
        of the layer's inputs. By default each layer's is found by cross-validation between two halves of the samples.
    rounding_damping : float
        The same for the compensation of rounding errors.
    descent_passes : int
        Passes of coordinate descent over the integers of each layer.
    patience : int
        The optimization ends early when so many checks in a row (ten a run) found nothing better on the held-out samples, and
        after two or more checks when the start will be kept: the error, or that of the outputs, was lower than the start's in
        no check and does not fall. 0: never. Its result must beat the start by more than chance (Wilcoxon's signed-rank test,
        5 %). Not for ``soft``.
    rotate : bool
        Mix channels where nothing but linear operators lies between layers, so that weights fill their ranges; see
        `eptq_onnx.method.rotate`.
    equalize : bool
        Scale the channels of activations so that they fill the range that they share, where the layers around them can
        take up the factors; see `eptq_onnx.method.equalize`.
    max_noise : float
        Largest noise-to-signal power ratio at the outputs that the quantization of all activations together may cause, as
        measured on the float network with their quantizers; the noisiest stay float until the rest keep within it or none
        stands out any more. 0: none do.
    rounding : RoundingVariable
        ``soft``: the paper's annealed soft rounding, for thousands of steps; ``straight-through``: a continuous copy
        of the weight that is rounded in every step, which does the same in hundreds.
    optimizer : Optimizer
    rounding_lr, bias_lr, scale_lr, activation_scale_lr : float
        Learning rates of the rounding variables (default 0.05 for ``soft``; for ``straight-through`` 0.002 integer
        steps from the closed-form start, 0.005 from nearest rounding), of the biases (in units of the layer output's
        RMS), of the weight scale factors and of the logarithms of the activation scales below 8 bits; all fall to 0 as
        a cosine. That of ``straight-through`` is also halved whenever a check finds nothing better on the held-out samples.
    rounding_strength : float
        Lambda, the weight of the penalty on undecided weights (``soft`` only).
    warmup : float
        Share of the steps before that penalty sets in.
    attention : Attention
        What the loss weighs: ``layer`` is the paper's sample-layer attention (largest channel), ``channel`` tells the
        channels of a layer apart, ``none`` counts all the same.
    output_share : float
        Share of the network's outputs in the loss at its start, each of their parts in units of its spread; the rest is
        that of the layers. 0: the paper's loss; 1: the outputs alone.
    gradual_activations : bool
        Gradual activation quantization: of use with thousands of steps, a loss with hundreds.
    augment : bool
        Every step sees its samples varied: images mirrored and shifted, float inputs mixed with each other. Without it a few
        hundred samples are learned by heart.
    batch_axes : mapping of str to int or None
        Batch axes of model inputs, None for those without one, where the shapes of the model and of the samples do not tell.
    custom_ops : sequence of paths
        Shared libraries with operators for onnxruntime; nodes of these operators stay float.
    max_memory : int or str, optional
        Bytes that the process may take, also as ``"4GB"``; by default, for models of more than 256 MB, nine tenths of the
        machine's memory. A model whose tensors do not fit is calibrated and scored block by block; its optimization over
        the whole network is left out, with a note, where it does not fit. What the runtime maps of weight files does not
        count: the system takes it back when it needs to.
    measure_speed : bool
        Run the float and the quantized model in turn for a second or two at the end, to tell in the report which is faster and,
        if that is the float model, which operators cost the time. It changes nothing in the result.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    weight_bits: int = Field(8, ge=2, le=8)
    activation_bits: int = Field(8, ge=2, le=16)
    edge_bits: int = Field(8, ge=2, le=8)
    budget: Budget | None = None
    target: str = "ort-x64"
    preset: Preset = Preset.BALANCED
    steps: int | None = Field(None, ge=0)
    engine: EngineChoice = EngineChoice.AUTO
    seed: int = Field(0, ge=0)
    activation_range: ActivationRange = ActivationRange.MSE
    percentile: float = Field(99.99, gt=50, le=100)
    weight_range: WeightRange | None = None
    damping: float = Field(0.1, ge=0)
    probes: int = Field(2, ge=1)
    score_samples: int = Field(1024, ge=1)
    batch_size: int = Field(16, ge=1)
    holdout: float = Field(0.1, gt=0, lt=0.9)
    start: Start = Start.CLOSED_FORM
    correction_damping: float | None = Field(None, ge=0)
    rounding_damping: float = Field(0.1, gt=0)
    descent_passes: int = Field(3, ge=0)
    patience: int = Field(8, ge=0)
    rotate: bool = True
    equalize: bool = True
    max_noise: float = Field(0.05, ge=0)
    rounding: RoundingVariable = RoundingVariable.STRAIGHT_THROUGH
    optimizer: Optimizer = Optimizer.ADAM
    rounding_lr: float | None = Field(None, ge=0)
    bias_lr: float = Field(3e-4, ge=0)
    scale_lr: float = Field(3e-4, ge=0)
    activation_scale_lr: float = Field(1e-3, ge=0)
    rounding_strength: float = Field(1.0, ge=0)
    warmup: float = Field(0.2, ge=0, lt=1)
    attention: Attention = Attention.CHANNEL
    output_share: float = Field(0.5, ge=0, le=1)
    gradual_activations: bool = False
    augment: bool = True
    batch_axes: dict[str, int | None] = Field(default_factory=dict)
    custom_ops: tuple[Path, ...] = ()
    max_memory: ByteSize | None = Field(None, gt=0)
    measure_speed: bool = True

    @field_validator("batch_axes", mode="before")
    @classmethod
    def _named(cls, given: object) -> object:
        """Also as NAME=AXIS or NAME=none, one after the other."""
        if given is None:
            return {}
        if isinstance(given, Mapping):
            return given
        axes: dict[str, int | None] = {}
        for item in [given] if isinstance(given, str) else list(given):  # type: ignore[call-overload]
            name, equals, axis = str(item).rpartition("=")
            if not equals or not name or not (axis == "none" or axis.isdecimal()):
                raise ValueError(f"give NAME=AXIS, an axis counted from 0, or NAME=none, not {item}")
            axes[name] = None if axis == "none" else int(axis)
        return axes

    @field_validator("activation_bits")
    @classmethod
    def _stored(cls, bits: int) -> int:
        if 8 < bits < 16:
            raise ValueError("give 2 to 8, or 16")
        return bits

    @classmethod
    def of(cls, **options: Any) -> Config:
        """Validate options.

        Raises
        ------
        ConfigError
            Naming the first wrong option.
        """
        try:
            return cls(**options)
        except ValidationError as e:
            raise ConfigError(describe(e, "option")) from e

    @property
    def block_bytes(self) -> int | None:
        """What the tensors of one batch may take: several are in work, beside what is kept of all of them."""
        return None if self.max_memory is None else self.max_memory // 16

    @property
    def optimizes(self) -> bool:
        """True if there is to be a network-wise optimization."""
        return self.step_count(0) > 0

    def step_count(self, multiplications: float) -> int:
        """Steps of the network-wise optimization of a model with so many multiplications a sample."""
        if self.steps is not None:
            return self.steps
        fewest, most = PRESET_STEPS[self.preset]
        return round(min(most, max(fewest, most * _CHEAP / max(multiplications, 1))))

    @property
    def rounding_rate(self) -> float:
        """Learning rate of the rounding variables."""
        if self.rounding_lr is not None:
            return self.rounding_lr
        if self.rounding is RoundingVariable.SOFT:
            return 5e-2
        return 2e-3 if self.start is Start.CLOSED_FORM else 5e-3

    @property
    def weight_range_method(self) -> WeightRange:
        """The chosen or default weight range."""
        if self.weight_range is not None:
            return self.weight_range
        return WeightRange.MSE if self.preset is Preset.FAST else WeightRange.HMSE

    @property
    def wants_scores(self) -> bool:
        """True if ranges or the loss weigh anything by the Hessian bound."""
        return self.weight_range_method is WeightRange.HMSE or (self.optimizes and self.attention is not Attention.NONE)

    @property
    def needs_gradients(self) -> bool:
        """True if any step of this run uses the gradient engine."""
        return self.optimizes or self.weight_range_method is WeightRange.HMSE


def describe(error: ValidationError, what: str) -> str:
    """The first problem of a pydantic error as one sentence."""
    first = error.errors()[0]
    name = ".".join(str(part) for part in first["loc"])
    if first["type"] == "extra_forbidden":
        return f"{what} {name} is unknown."
    message = first["msg"].removeprefix("Value error, ")
    return f"{what} {name}={first['input']!r} is wrong: {message[0].lower()}{message[1:]}."
