"""The one set of options, for the command line, configuration files and Python alike."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

from pydantic import BaseModel, ByteSize, ConfigDict, Field, ValidationError, field_validator, model_validator
from typing_extensions import Self, Unpack

from eptq_onnx.config.budget import Budget
from eptq_onnx.config.choices import (
    ActivationRange,
    Attention,
    Optimizer,
    Preset,
    RoundingVariable,
    Start,
    WeightRange,
)
from eptq_onnx.config.option import Option, option_of
from eptq_onnx.config.options import Options
from eptq_onnx.errors import ConfigError

PRESET_STEPS = {Preset.FAST: (0, 0), Preset.BALANCED: (200, 1000), Preset.BEST: (1000, 5000)}
"""Fewest and most steps of the network-wise optimization."""
_CHEAP = 8e7
"""Multiplications a sample of a model that gets most steps; one of five times as many gets fewest."""


class Config(BaseModel):
    """Options of `eptq_onnx.quantize`, all of them keywords; the docstring of each says what it does.

    Raises
    ------
    ConfigError
        Names the first wrong option.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    weight_bits: Annotated[int, Option("widths")] = Field(8, ge=2, le=8)
    """Bits of the weights, 2 to 8."""
    activation_bits: Annotated[int, Option("widths")] = Field(8, ge=2, le=16)
    """Bits of the activations, 2 to 8, or 16, which takes opset 21."""
    edge_bits: Annotated[int, Option("widths")] = Field(8, ge=2, le=8)
    """Bits of the first and last layers, those that have no layer before or behind them: of their weights,
    and, where the other activations have fewer, of the model's inputs and the last layers' inputs and
    outputs."""
    bits: Annotated[tuple[str, ...], Option("widths", metavar="[PATTERN=]wWaA", default="none")] = ()
    """w4a8 sets the bits of all weights and activations; PATTERN=w8a16 those of the weights of some nodes and
    of the activations that these read. PATTERN is a node's name, re:REGEX, op:TYPE or from:NAME..to:NAME; of
    several that match, the last counts. Give it once for each."""
    exclude: Annotated[tuple[str, ...], Option("widths", metavar="PATTERN", default="none")] = ()
    """Nodes that stay float, by a pattern as for the bits; give it once for each."""
    budget: Annotated[Budget | None, Option("widths", metavar="UNIT=AMOUNT", text=True, default="none")] = (
        None
    )
    """Mixed precision: every weight gets the width, of 2 to 8 bits, with which the error of the outputs is
    least within weights=4 (mean bits), bytes=2e6 or bitops=1e10; instead of the bits of weights."""
    target: Annotated[str, Option("runtime")] = "ort-x64"
    """Runtime: the name of a shipped target, or the path of a target file (.toml)."""
    preset: Annotated[Preset, Option("optimization")] = Preset.BALANCED
    """fast: no gradients, layer-wise reconstruction alone; balanced: 200 steps of the network-wise
    optimization, best: 1000; models of less than 400 million multiplications a sample get up to 5 times as
    many."""
    steps: Annotated[int | None, Option("optimization", default="by the preset")] = Field(None, ge=0)
    """Steps of the network-wise optimization."""
    engine: Annotated[str, Option("optimization", metavar="NAME")] = "auto"
    """Where gradients come from: auto (the best engine that is installed), or one by its name."""
    seed: Annotated[int, Option("optimization")] = Field(0, ge=0)
    """Seed of all randomness. The same input, options and seed give the same bytes."""
    batch_size: Annotated[int, Option("optimization")] = Field(16, ge=1)
    """Samples a step."""
    score_samples: Annotated[int, Option("optimization")] = Field(1024, ge=1)
    """Largest number of samples that are scored and optimized on; layer-wise reconstruction always takes up
    to 1,024, as they are cheap."""
    activation_range: Annotated[ActivationRange, Option("calibration")] = ActivationRange.MSE
    """How activation ranges are chosen."""
    percentile: Annotated[float, Option("calibration", advanced=True)] = Field(99.99, gt=50, le=100)
    """Percentile of each tail, for the activation range percentile."""
    weight_range: Annotated[
        WeightRange | None, Option("weights", default="hmse; mse with the preset fast")
    ] = None
    """How weight ranges are chosen. Layer-wise reconstruction chooses ranges of its own for the weights that
    it solves."""
    damping: Annotated[float, Option("weights", advanced=True)] = Field(0.1, ge=0)
    """Share of the mean that is added to the Hessian scores before HMSE."""
    probes: Annotated[int, Option("calibration", advanced=True)] = Field(2, ge=1)
    """Hutchinson probes a sample."""
    rotate: Annotated[bool, Option("calibration")] = True
    """Mix channels where nothing but linear operators lies between layers, so that weights fill their
    ranges."""
    equalize: Annotated[bool, Option("calibration")] = True
    """Scale the channels of activations to fit the range that they share, where layers around can take it
    up."""
    max_noise: Annotated[float, Option("calibration")] = Field(0.05, ge=0)
    """Largest noise-to-signal power ratio at the outputs that the quantization of all activations together
    may cause: the noisiest stay float until the others keep within it, or none stands out any more (0: none
    do)."""
    start: Annotated[Start, Option("weights", advanced=True)] = Start.CLOSED_FORM
    """Where the network-wise optimization starts: closed-form (layer-wise reconstruction: input-error
    correction, compensated rounding and bias correction) or nearest (each weight to the nearest integer)."""
    correction_damping: Annotated[
        float | None, Option("weights", advanced=True, default="found by cross-validation")
    ] = Field(None, ge=0)
    """How reluctantly layer-wise reconstruction bends weights to make up for errors upstream, in units of the
    mean variance of the layer's inputs."""
    rounding_damping: Annotated[float, Option("weights", advanced=True)] = Field(0.1, gt=0)
    """The same for the compensation of rounding errors."""
    descent_passes: Annotated[int, Option("weights", advanced=True)] = Field(3, ge=0)
    """Passes of coordinate descent over the integers of each layer."""
    attention: Annotated[Attention, Option("optimization")] = Attention.CHANNEL
    """What the loss weighs by the Hessian bound: layer is the paper's sample-layer attention (largest
    channel), channel tells the channels of a layer apart, none counts all the same."""
    output_share: Annotated[float, Option("optimization")] = Field(0.5, ge=0, le=1)
    """Share of the network's outputs in the loss at its start, each of their parts in units of its spread;
    the rest is that of the layers (0: the paper's loss)."""
    rounding: Annotated[RoundingVariable, Option("optimization")] = RoundingVariable.STRAIGHT_THROUGH
    """What is learned for each weight element: soft is the paper's annealed soft rounding, for thousands of
    steps; straight-through a continuous copy of the weight that is rounded in every step, which does the same
    in hundreds."""
    optimizer: Annotated[Optimizer, Option("optimization")] = Optimizer.ADAM
    """Optimizer of the rounding."""
    holdout: Annotated[float, Option("optimization", advanced=True)] = Field(0.1, gt=0, lt=0.9)
    """Share of the samples that is kept out of the optimization, to choose among its results."""
    patience: Annotated[int, Option("optimization", advanced=True)] = Field(8, ge=0)
    """The optimization ends early when so many checks in a row (ten a run) found nothing better on the
    held-out samples, and after two or more checks when the start will be kept: the error, or that of the
    outputs, was lower than the start's in no check and does not fall (0: never). Its result must beat the
    start by more than chance (Wilcoxon's signed-rank test, 5 %). Not for soft rounding."""
    rounding_lr: Annotated[
        float | None, Option("optimization", advanced=True, default="by rounding and start")
    ] = Field(None, ge=0)
    """Learning rate of the rounding variables: by default 0.05 for soft; for straight-through 0.002 integer
    steps from layer-wise reconstruction, 0.005 from nearest rounding. All learning rates fall to 0 as a
    cosine; that of straight-through is also halved whenever a check finds nothing better."""
    bias_lr: Annotated[float, Option("optimization", advanced=True)] = Field(3e-4, ge=0)
    """Learning rate of the biases, in units of the layer output's RMS."""
    scale_lr: Annotated[float, Option("optimization", advanced=True)] = Field(3e-4, ge=0)
    """Learning rate of the weight scale factors."""
    activation_scale_lr: Annotated[float, Option("optimization", advanced=True)] = Field(1e-3, ge=0)
    """Learning rate of the logarithms of the activation scales below 8 bits."""
    rounding_strength: Annotated[float, Option("optimization", advanced=True)] = Field(1.0, ge=0)
    """Lambda, the weight of the penalty on undecided weights (soft rounding only)."""
    warmup: Annotated[float, Option("optimization", advanced=True)] = Field(0.2, ge=0, lt=1)
    """Share of the steps before that penalty sets in."""
    gradual_activations: Annotated[bool, Option("optimization", advanced=True)] = False
    """Gradual activation quantization: of use with thousands of steps, a loss with hundreds."""
    augment: Annotated[bool, Option("optimization", advanced=True)] = True
    """Vary the samples of every step: images mirrored and shifted, float inputs mixed with each other.
    Without it a few hundred samples are learned by heart."""
    max_memory: Annotated[
        ByteSize | None,
        Option("limits", metavar="SIZE", text=True, default="nine tenths of RAM for models above 256 MB"),
    ] = Field(None, gt=0)
    """Memory limit, such as 4GB. A model whose tensors do not fit is calibrated and scored block by block;
    what does not fit even so is left out, with a note. What the runtime maps of weight files does not count:
    the system takes it back when it needs to."""
    workdir: Annotated[Path | None, Option("limits", default="none", in_result=False)] = None
    """Folder in which the run keeps what it has done. The same command again takes from there what is still
    true, so that a run that was interrupted or killed goes on where it was."""
    batch_axes: Annotated[
        dict[str, int | None],
        Option(
            "model",
            flag="--batch-axis",
            metavar="NAME=AXIS|none",
            text=True,
            default="found from shapes and samples",
        ),
    ] = Field(default_factory=dict)
    """Batch axis of a model input, counted from 0, or none for an input without one; give it once for each
    input."""
    custom_ops: Annotated[tuple[Path, ...], Option("model", default="none", in_result=False)] = ()
    """Shared library with custom operators for onnxruntime, whose nodes stay float; give it once for each
    library."""
    measure_speed: Annotated[bool, Option("limits", in_result=False)] = True
    """Measure at the end, for a second or two, whether the quantized model runs faster than the float model
    on this machine; it changes nothing in the result."""

    def __init__(self, **options: Unpack[Options]) -> None:
        try:
            super().__init__(**options)
        except ValidationError as e:
            raise ConfigError(describe(e, "option")) from e

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

    @model_validator(mode="before")
    @classmethod
    def _bits_of_all(cls, given: Any) -> Any:
        """Bits without a pattern are the options weight_bits and activation_bits by another name."""
        if not isinstance(given, Mapping) or "bits" not in given:
            return given
        rules = [given["bits"]] if isinstance(given["bits"], str) else list(given["bits"])
        options = {name: value for name, value in given.items() if name != "bits"}
        for rule in rules:
            if "=" not in str(rule):
                for name, width in zip(("weight_bits", "activation_bits"), widths(rule), strict=True):
                    if options.setdefault(name, width) != width:
                        raise ValueError(f"bits {rule} and {name} {options[name]} contradict each other")
        return {**options, "bits": [rule for rule in rules if "=" in str(rule)]}

    @field_validator("bits")
    @classmethod
    def _readable(cls, rules: tuple[str, ...]) -> tuple[str, ...]:
        for rule in rules:
            widths(rule.rpartition("=")[2])
        return rules

    @field_validator("bits", "exclude", mode="before")
    @classmethod
    def _one_or_several(cls, given: object) -> object:
        return (given,) if isinstance(given, str) else given

    @model_validator(mode="after")
    def _one_way(self) -> Self:
        if self.budget is not None and self.bits:
            raise ValueError("a budget chooses the bits of all weights: leave bits with patterns out")
        return self

    @field_validator("activation_bits")
    @classmethod
    def _stored(cls, bits: int) -> int:
        if 8 < bits < 16:
            raise ValueError("give 2 to 8, or 16")
        return bits

    def digest(self, target: BaseModel) -> str:
        """Hash of the options that change the result, in 16 hexadecimal digits; a target counts by what it
        says, not by its name."""
        counted = {name for name, field in type(self).model_fields.items() if option_of(field).in_result}
        values = self.model_dump(mode="json", include=counted - {"target"})
        # Sets come in another order in every process.
        text = json.dumps(
            [values, target.model_dump()],
            sort_keys=True,
            default=lambda v: sorted(v) if isinstance(v, frozenset) else str(v),
        )
        return hashlib.sha256(text.encode()).hexdigest()[:16]

    @property
    def node_bits(self) -> list[tuple[str, int, int]]:
        """Pattern, weight bits and activation bits of the rules for some nodes."""
        return [(rule.rpartition("=")[0], *widths(rule.rpartition("=")[2])) for rule in self.bits]

    @property
    def most_activation_bits(self) -> int:
        """The widest activations that there may be."""
        return max([self.activation_bits, *(bits for _, _, bits in self.node_bits)])

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
        return self.weight_range_method is WeightRange.HMSE or (
            self.optimizes and self.attention is not Attention.NONE
        )

    @property
    def needs_gradients(self) -> bool:
        """True if any step of this run uses the gradient engine."""
        return self.optimizes or self.weight_range_method is WeightRange.HMSE


def widths(text: str) -> tuple[int, int]:
    """Weight and activation bits of such as w4a8."""
    found = re.fullmatch(r"w(\d+)a(\d+)", str(text))
    if found is None or not 2 <= int(found[1]) <= 8 or int(found[2]) not in (2, 3, 4, 5, 6, 7, 8, 16):
        raise ValueError(
            f"write bits as w4a8, of 2 to 8 for weights and 2 to 8 or 16 for activations, not {text}"
        )
    return int(found[1]), int(found[2])


def describe(error: ValidationError, what: str) -> str:
    """The first problem of a pydantic error as one sentence."""
    first = error.errors()[0]
    name = ".".join(str(part) for part in first["loc"])
    if first["type"] == "extra_forbidden":
        return f"{what} {name} is unknown."
    if first["type"] == "missing":
        return f"{what} {name} is missing."
    message = first["msg"].removeprefix("Value error, ")
    return f"{what} {name}={first['input']!r} is wrong: {message[0].lower()}{message[1:]}."
