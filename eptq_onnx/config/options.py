"""The types of options as users write them: words beside enumerations, text beside sizes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from typing_extensions import TypedDict

from eptq_onnx.config.budget import Budget
from eptq_onnx.config.choices import (
    ActivationRange,
    Activations,
    Attention,
    FloatType,
    Objective,
    Optimizer,
    Preset,
    RoundingVariable,
    Start,
    WeightRange,
    WeightStorage,
)
from eptq_onnx.config.encodings import Encodings


class Options(TypedDict, total=False):
    """The options of `Config` as users write them; a test holds the two against each other."""

    weight_bits: int
    activation_bits: int
    edge_bits: int
    bits: Sequence[str] | str
    activations: Activations | Literal["static", "dynamic", "auto"]
    exclude: Sequence[str] | str
    block: int | None
    budget: Sequence[Budget | str] | Budget | str | None
    outputs: Sequence[str] | str
    target: str
    storage: WeightStorage | Literal["packed", "native", "int8", "matmulnbits"] | None
    rest: FloatType | Literal["float32", "float16", "bfloat16"] | None
    objective: Objective | Literal["time", "integers", "noise", "bytes"]
    runtime_threads: int
    timings: str | Path | None
    preset: Preset | Literal["fast", "balanced", "paper"]
    steps: int | None
    engine: str
    seed: int
    batch_size: int
    score_samples: int
    activation_range: ActivationRange | Literal["minmax", "percentile", "mse"]
    encodings: Encodings | Mapping[str, Any] | str | Path | None
    requantize: bool
    percentile: float
    weight_range: WeightRange | Literal["minmax", "mse", "hmse"] | None
    damping: float
    probes: int
    rotate: bool
    equalize: bool
    max_noise: float | None
    start: Start | Literal["nearest", "closed-form"]
    correction_damping: float | None
    rounding_damping: float
    descent_passes: int
    attention: Attention | Literal["none", "layer", "channel"]
    output_share: float
    rounding: RoundingVariable | Literal["soft", "straight-through"]
    optimizer: Optimizer | Literal["radam", "adam"]
    holdout: float
    patience: int
    rounding_lr: float | None
    bias_lr: float
    scale_lr: float
    activation_scale_lr: float
    rounding_strength: float
    warmup: float
    gradual_activations: bool
    augment: bool | None
    max_memory: int | str | None
    threads: int | None
    workers: str
    device: str
    workdir: str | Path | None
    batch_axes: Mapping[str, int | None] | Sequence[str]
    custom_ops: Sequence[str | Path]
    measure_speed: bool
