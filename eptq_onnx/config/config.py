"""Options, shared by the command line, configuration files and Python."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

from pydantic import BaseModel, ByteSize, Field, field_validator, model_validator
from typing_extensions import Self, Unpack

from eptq_onnx.config.axes import axes_of
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
from eptq_onnx.config.conflicts import conflicts
from eptq_onnx.config.encodings import Encodings
from eptq_onnx.config.option import Option, OptionModel, option_of
from eptq_onnx.config.options import Options
from eptq_onnx.config.presets import PRESET_PASSES, filled
from eptq_onnx.config.widths import ACTIVATION_WIDTHS, FLOAT_BITS, widths

_ACTIVATION_NOISE = 0.01
"""Default limit of the noise of activations."""
_TOTAL_NOISE = 0.05
"""Default limit of the noise of weights and activations together, for the smallest file."""


class Config(OptionModel):
    """Options of `eptq_onnx.quantize`; all are keywords, documented field by field.

    Raises
    ------
    ConfigError
        If an option is invalid; the message names it.
    """

    weight_bits: Annotated[int, Option("widths")] = Field(8, ge=2, le=8)
    """Bits of weights, 2 to 8."""
    activation_bits: Annotated[int, Option("widths")] = 8
    """Bits of activations: 2 to 8; or 16, which requires opset 21; or 32, which leaves them float, so that
    only weights are quantized."""
    edge_bits: Annotated[int, Option("widths")] = Field(8, ge=2, le=8)
    """Weight bits of the first and last layers. Where other activations have fewer bits, the model's inputs
    and the inputs and outputs of the last layers use these, too."""
    bits: Annotated[tuple[str, ...], Option("widths", metavar="[PATTERN=]wWaA", default="none")] = ()
    """Bits as wWaA: w4a8 sets the bits of all weights and activations. PATTERN=w8a16 sets those of matching
    nodes: of their weights and of the activations they read. a32 leaves activations float. A pattern is a
    node name, re:REGEX, op:TYPE or from:NAME..to:NAME; the last match counts. May be repeated."""
    activations: Annotated[Activations, Option("widths")] = Activations.AUTO
    """Ranges of activations. static: fixed, from the samples. dynamic: those of each run, for the inputs of
    matrix products with constant weights; all other operators compute in float, and no samples are needed.
    auto: static, but dynamic for the products of a network that loses much less so, measured on samples, if
    the target has kernels for it."""
    exclude: Annotated[tuple[str, ...], Option("widths", metavar="PATTERN", default="none")] = ()
    """Keep the nodes that match a pattern (see bits) in floating point. tensor:NAME keeps a tensor float: the
    nodes that make and read it compute in float, on weights stored at their bits. May be repeated."""
    block: Annotated[int | None, Option("widths", metavar="SIZE", default="per channel")] = Field(None, ge=2)
    """One scale and one zero point for each SIZE terms of a matrix product's weight, and for each SIZE
    columns of a lookup table. Only with activations of 32 bits, as in bits w4a32. Convolutions keep one scale
    per channel."""
    budget: Annotated[
        tuple[Budget, ...], Option("widths", metavar="UNIT=AMOUNT", text=True, default="none")
    ] = ()
    """Limits: weights=4 (mean bits), bytes=2e6 and bitops=1e10 choose 2 to 8 bits for each weight so that the
    output error is smallest, and replace weight_bits. activations=10 (mean bits) chooses 8 or 16 bits for
    each activation, if the target computes with both, and below 8 it chooses 4 or 8; it replaces
    activation_bits. time=SECONDS is the longest time of one run, for objective=noise and objective=bytes. May
    be repeated, once for each unit."""
    outputs: Annotated[tuple[str, ...], Option("model", metavar="NAME[,NAME]", default="all")] = ()
    """Outputs of the model that count, separated by commas: for noise, scores, the optimization and the
    comparison in the report. Auxiliary heads need not count."""
    target: Annotated[str, Option("runtime")] = "auto"
    """Target runtime: auto (onnxruntime on this machine), the name of a shipped target, or the path of a
    target file (.toml)."""
    storage: Annotated[
        WeightStorage | None, Option("runtime", default="packed; int8 if the target unpacks no weights")
    ] = None
    """How weights of 2 to 6 bits are stored. packed: in as many bytes as their bits need, with nodes that
    unpack them to int8 when the model is loaded. native: in ONNX's own types, if the target supports them.
    int8: one byte each. matmulnbits: in onnxruntime's own operator MatMulNBits, for weights in blocks; the
    default for those, if the target has it."""
    rest: Annotated[
        FloatType | None,
        Option("runtime", default="the model's own, if the target supports it; else float32"),
    ] = None
    """Type in which everything that stays float is computed and stored: float32, float16 or bfloat16."""
    objective: Annotated[Objective, Option("runtime")] = Objective.TIME
    """Which operators run on integers. time: those with which the model runs fastest on this machine,
    measured in the installed onnxruntime if the target is for it; models that run for less than a millisecond
    are left as they are. integers: all that the target has integer kernels for. noise: those that add the
    least noise to the outputs within the budgets. bytes: those that make the smallest file within the budgets
    and max_noise; each weight gets 2 to 8 bits. Without budget time=SECONDS, noise and bytes take all
    operators that the target has integer kernels for. All budgets and max_noise may be combined."""
    runtime_threads: Annotated[int, Option("runtime", metavar="N")] = Field(1, ge=1)
    """Number of threads with which the time of the model is measured."""
    timings: Annotated[
        Path | None, Option("runtime", default="in the user's cache folder", in_result=False)
    ] = None
    """File with the measurements of time. If it exists, nothing is measured, so the same command
    gives the same bytes on every machine. Otherwise it is written."""
    preset: Annotated[Preset, Option("optimization")] = Preset.BALANCED
    """fast: layer-wise reconstruction only, without gradients. balanced: network-wise optimization, too, for
    about the time of 30 runs of all samples through the float model, or of 90 with weights below 4 bits or
    activations below 8. It starts only where the rounding of weights causes enough of the noise, and ends
    when it gains little: see patience. paper: EPTQ as published, with 80,000 steps; options that are given
    replace its own."""
    steps: Annotated[int | None, Option("optimization", default="by the preset")] = Field(None, ge=0)
    """Number of network-wise optimization steps, whatever the preset and however much they may gain."""
    engine: Annotated[str, Option("optimization", metavar="NAME")] = "auto"
    """Gradient engine: auto (the best one installed), or a name."""
    seed: Annotated[int, Option("optimization")] = Field(0, ge=0)
    """Random seed. The same input, options and seed give the same bytes."""
    batch_size: Annotated[int, Option("optimization")] = Field(16, ge=1)
    """Samples per optimization step."""
    score_samples: Annotated[int, Option("optimization")] = Field(1024, ge=1)
    """Maximum number of samples used for scores and network-wise optimization. Layer-wise reconstruction is
    cheaper and always uses up to 1,024."""
    activation_range: Annotated[ActivationRange, Option("calibration")] = ActivationRange.MSE
    """Method for choosing activation ranges."""
    encodings: Annotated[
        Encodings | None, Option("calibration", metavar="FILE", text=True, default="none")
    ] = None
    """Ranges and scales that are given: a JSON file of encodings in AIMET's schema 1.0. Activations that it
    names keep their ranges, weights their scales where the target has such, unless other options ask for
    fewer bits. Channels are neither mixed nor scaled, and activations have the widths of other options."""
    requantize: Annotated[bool, Option("calibration")] = False
    """Choose all ranges and scales anew for a model that is quantized already. By default it keeps its own,
    and the integers of weights of which it has no others."""
    percentile: Annotated[float, Option("calibration", advanced=True)] = Field(99.99, gt=50, le=100)
    """Percentile of each tail, for activation_range=percentile."""
    weight_range: Annotated[
        WeightRange | None, Option("weights", default="hmse; mse with the preset fast")
    ] = None
    """Method for choosing weight ranges. Layer-wise reconstruction chooses its own ranges for the weights it
    solves."""
    damping: Annotated[float, Option("weights", advanced=True)] = Field(0.1, ge=0)
    """Damping of the Hessian scores for HMSE: the fraction of their mean that is added to them."""
    probes: Annotated[int, Option("calibration", advanced=True)] = Field(2, ge=1)
    """Hutchinson probes per sample."""
    rotate: Annotated[bool, Option("calibration")] = True
    """Mix channels between layers that only linear operators separate, so that weights make better use of
    their ranges."""
    equalize: Annotated[bool, Option("calibration")] = True
    """Scale the channels of activations to fit their shared range, where neighbouring layers can absorb the
    scaling."""
    max_noise: Annotated[
        float | None,
        Option("calibration", default=f"{_ACTIVATION_NOISE:g}; with objective=bytes {_TOTAL_NOISE:g}"),
    ] = Field(None, ge=0)
    """Maximum noise-to-signal power ratio at the outputs. The activations that cause most of it stay in
    floating point until the others are within this limit, or until none stands out; with objective=time,
    further operators do where the model gets at most a tenth slower by that. Where a budget or
    objective=bytes chooses the widths of weights, weights and activations together keep within a limit that
    is given. 0 disables the check."""
    start: Annotated[Start, Option("weights", advanced=True)] = Start.CLOSED_FORM
    """Starting point of network-wise optimization: closed-form (layer-wise reconstruction with input-error
    correction, compensated rounding and bias correction) or nearest (nearest rounding)."""
    correction_damping: Annotated[
        float | None, Option("weights", advanced=True, default="found by cross-validation")
    ] = Field(None, ge=0)
    """Damping of input-error correction in layer-wise reconstruction, in units of the mean variance of the
    layer's inputs. Larger values change weights less."""
    rounding_damping: Annotated[float, Option("weights", advanced=True)] = Field(0.1, gt=0)
    """Damping of rounding-error compensation, in the same units."""
    descent_passes: Annotated[int, Option("weights", advanced=True)] = Field(3, ge=0)
    """Passes of coordinate descent over the integers of each layer."""
    attention: Annotated[Attention, Option("optimization")] = Attention.CHANNEL
    """How the Hessian bound weights the loss: per layer and sample (layer, the maximum over channels, as in
    the paper), per channel and sample (channel), or not at all (none)."""
    output_share: Annotated[float, Option("optimization")] = Field(0.5, ge=0, le=1)
    """Share of the network outputs in the initial loss, each output in units of its spread; the layers make
    up the rest. 0 gives the paper's loss."""
    rounding: Annotated[RoundingVariable, Option("optimization")] = RoundingVariable.STRAIGHT_THROUGH
    """What is learned per weight element. soft: the paper's annealed soft rounding, which needs thousands of
    steps. straight-through: a continuous copy of the weight that is rounded in every step, which needs
    hundreds."""
    optimizer: Annotated[Optimizer, Option("optimization")] = Optimizer.ADAM
    """Optimizer of the rounding variables."""
    holdout: Annotated[float, Option("optimization", advanced=True)] = Field(0.1, gt=0, lt=0.9)
    """Share of the samples held out of optimization to select among its candidates."""
    patience: Annotated[int, Option("optimization", advanced=True)] = Field(10, ge=0)
    """Stop when the error on held-out samples fell by less than 1 % in this many float passes: runs of all
    samples through the float model, counted, not timed. The run also stops after two or more checks once it
    is clear that the start will be kept: no check lowered the total error, or the output error, and it is not
    falling. 0 never stops early. The result must beat the start by more than chance (Wilcoxon signed-rank
    test, 5 %). Ignored by soft rounding."""
    rounding_lr: Annotated[
        float | None, Option("optimization", advanced=True, default="by rounding and start")
    ] = Field(None, ge=0)
    """Learning rate of the rounding variables. Default: 0.05 for soft; for straight-through 0.002 integer
    steps after layer-wise reconstruction, 0.005 after nearest rounding. All learning rates follow a cosine to
    0; that of straight-through is also halved at each check without improvement."""
    bias_lr: Annotated[float, Option("optimization", advanced=True)] = Field(3e-4, ge=0)
    """Learning rate of biases, in units of the layer output's RMS."""
    scale_lr: Annotated[float, Option("optimization", advanced=True)] = Field(3e-4, ge=0)
    """Learning rate of the weight scale factors."""
    activation_scale_lr: Annotated[float, Option("optimization", advanced=True)] = Field(1e-3, ge=0)
    """Learning rate of the logarithm of activation scales below 8 bits."""
    rounding_strength: Annotated[float, Option("optimization", advanced=True)] = Field(1.0, ge=0)
    """Lambda, the weight of the penalty on undecided weights (soft rounding only)."""
    warmup: Annotated[float, Option("optimization", advanced=True)] = Field(0.2, ge=0, lt=1)
    """Share of the steps before that penalty is switched on."""
    gradual_activations: Annotated[bool, Option("optimization", advanced=True)] = False
    """Phase in activation quantization gradually. This helps with thousands of steps and hurts with
    hundreds."""
    augment: Annotated[bool | None, Option("optimization", advanced=True, default="by the length")] = None
    """Augment the samples of each step: mirror and shift images, mix float inputs. Default: where each sample
    is seen more than 20 times, because long runs overfit a few hundred samples. Short ones gain more from the
    samples as they are."""
    max_memory: Annotated[
        ByteSize | None,
        Option("limits", metavar="SIZE", text=True, default="nine tenths of RAM for models above 256 MB"),
    ] = Field(None, gt=0)
    """Memory limit, such as 4GB. A model whose tensors do not fit is calibrated and scored block by block; a
    pass that still does not fit is skipped, with a note. Memory-mapped weight files do not count, because the
    system can reclaim that memory."""
    threads: Annotated[
        int | None, Option("limits", metavar="N", default="one per core, at most 8", in_result=False)
    ] = Field(None, ge=1)
    """Number of threads that compute. The default respects the process's affinity and its container's CPU
    quota. Does not change the result."""
    workers: Annotated[str, Option("limits", metavar="NAME", in_result=False)] = "threads"
    """Where batches are processed. Does not change the result."""
    device: Annotated[str, Option("limits", metavar="NAME")] = "cpu"
    """Where float networks, scores and gradients are computed. The written file is checked on the CPU."""
    workdir: Annotated[Path | None, Option("limits", default="none", in_result=False)] = None
    """Folder that keeps the results of passes. The same command, run again after an interruption, resumes
    from there."""
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
    """Batch axis of a model input, counted from 0, or none if it has no batch axis. May be repeated."""
    custom_ops: Annotated[tuple[Path, ...], Option("model", default="none", in_result=False)] = ()
    """Shared library with custom operators for onnxruntime; their nodes stay in floating point. May be
    repeated."""
    measure_speed: Annotated[bool, Option("limits", in_result=False)] = True
    """Compare the speed of the quantized and the float model on this machine at the end, for a second or two.
    Does not change the result."""

    def __init__(self, **options: Unpack[Options]) -> None:
        super().__init__(**options)

    @field_validator("batch_axes", mode="before")
    @classmethod
    def _named(cls, given: object) -> object:
        return given if isinstance(given, Mapping) else axes_of(given)

    @model_validator(mode="before")
    @classmethod
    def _bits_of_all(cls, given: Any) -> Any:
        """Fill in the preset, and turn bits without a pattern into weight_bits and activation_bits."""
        if not isinstance(given, Mapping):
            return given
        given = filled(given)
        if "bits" not in given:
            return given
        if not isinstance(given["bits"], (str, list, tuple)):
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

    @field_validator("outputs", mode="before")
    @classmethod
    def _separated(cls, given: object) -> object:
        items = (given,) if isinstance(given, str) else given
        if not isinstance(items, (list, tuple)):
            return items
        return tuple(name for item in items for name in str(item).split(",") if name)

    @field_validator("bits", "exclude", "budget", "custom_ops", mode="before")
    @classmethod
    def _one_or_several(cls, given: object) -> object:
        return (given,) if isinstance(given, (str, Budget, Path)) else () if given is None else given

    @model_validator(mode="after")
    def _one_way(self) -> Self:
        for there, what in conflicts(self):
            if there:
                raise ValueError(what)
        return self

    @field_validator("activation_bits")
    @classmethod
    def _stored(cls, bits: int) -> int:
        if bits not in ACTIVATION_WIDTHS:
            raise ValueError("give a whole number from 2 to 8, or 16, or 32")
        return bits

    def digest(self, target: BaseModel) -> str:
        """Hash of the options that change the result; a target counts by what it says, not by its name."""
        counted = {name for name, field in type(self).model_fields.items() if option_of(field).in_result}
        # What is as by default is left out, so that a new field changes no hash.
        counted -= {"device"} if self.device == "cpu" else set()
        counted -= set() if self.chooses_by_time else {"runtime_threads"}
        values = self.model_dump(mode="json", include=counted - {"target"})
        # Sets come in another order in every process.
        told = [values, target.model_dump(exclude_defaults=True)]
        text = json.dumps(
            told, sort_keys=True, default=lambda v: sorted(v) if isinstance(v, frozenset) else str(v)
        )
        return hashlib.sha256(text.encode()).hexdigest()[:16]

    @property
    def changes_channels(self) -> bool:
        """True if channels of activations may be mixed or scaled: ranges that are given would not fit."""
        return self.encodings is None

    @property
    def chooses_by_time(self) -> bool:
        """True if measured times decide what runs on integers."""
        return self.objective is Objective.TIME or self.seconds is not None

    @property
    def seconds(self) -> float | None:
        """The budget of time, in seconds of one run."""
        return next((b.amount for b in self.budget if b.unit is BudgetUnit.TIME), None)

    @property
    def width_budgets(self) -> tuple[Budget, ...]:
        """The budgets that limit the widths of weights."""
        others = (BudgetUnit.TIME, BudgetUnit.ACTIVATIONS)
        return tuple(b for b in self.budget if b.unit not in others)

    @property
    def activation_budget(self) -> float | None:
        """The mean bits of an activation's value that are allowed, if each activation gets its own width."""
        return next((b.amount for b in self.budget if b.unit is BudgetUnit.ACTIVATIONS), None)

    @property
    def chooses_widths(self) -> bool:
        """True if each weight gets a width of its own."""
        return bool(self.width_budgets) or self.objective is Objective.BYTES

    @property
    def activation_noise(self) -> float:
        """Limit of the noise that quantized activations cause; 0 if there is none."""
        return _ACTIVATION_NOISE if self.max_noise is None else self.max_noise

    @property
    def total_noise(self) -> float | None:
        """Limit of the noise of weights and activations together, if there is one."""
        if not self.chooses_widths or self.max_noise == 0:
            return None
        default = _TOTAL_NOISE if self.objective is Objective.BYTES else None
        return default if self.max_noise is None else self.max_noise

    @property
    def node_bits(self) -> list[tuple[str, int, int]]:
        """Pattern, weight bits and activation bits of each rule for some nodes."""
        return [(rule.rpartition("=")[0], *widths(rule.rpartition("=")[2])) for rule in self.bits]

    @property
    def most_activation_bits(self) -> int:
        """Largest number of activation bits that any option asks for, of those that are quantized."""
        every = {self.activation_bits, *(bits for _, _, bits in self.node_bits)}
        return max(every - {FLOAT_BITS}, default=8)

    @property
    def weights_only(self) -> bool:
        """True if all activations stay float."""
        return {self.activation_bits, *(bits for _, _, bits in self.node_bits)} == {FLOAT_BITS}

    @property
    def block_bytes(self) -> int | None:
        """Memory limit for the tensors of one batch, in bytes; several batches run at once."""
        return None if self.max_memory is None else self.max_memory // 16

    @property
    def optimizes(self) -> bool:
        """True if network-wise optimization is on."""
        if self.block is not None:
            return False
        return (max(PRESET_PASSES[self.preset]) if self.steps is None else self.steps) > 0

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
        """True if weight ranges or the loss use the Hessian bound."""
        return self.weight_range_method is WeightRange.HMSE or (
            self.optimizes and self.attention is not Attention.NONE
        )

    @property
    def needs_gradients(self) -> bool:
        """True if any pass uses the gradient engine."""
        return self.optimizes or self.weight_range_method is WeightRange.HMSE
