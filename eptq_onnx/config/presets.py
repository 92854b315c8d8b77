"""What presets stand for."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from eptq_onnx.config.choices import (
    ActivationRange,
    Attention,
    Objective,
    Optimizer,
    Preset,
    RoundingVariable,
    Start,
    WeightRange,
)

PRESET_PASSES = {Preset.FAST: (0, 0), Preset.BALANCED: (30, 90), Preset.PAPER: (30, 90)}
"""Most float passes that network-wise optimization may cost without a number of steps: with fine and with
coarse steps.

Coarse are those of weights below 4 bits, and of activations whose scales are learned, below 8.
"""
PAPER: Mapping[str, Any] = {
    "steps": 80_000,
    "start": Start.NEAREST,
    "rounding": RoundingVariable.SOFT,
    "optimizer": Optimizer.RADAM,
    "attention": Attention.LAYER,
    "output_share": 0.0,
    "gradual_activations": True,
    "augment": False,
    "weight_range": WeightRange.HMSE,
    "activation_range": ActivationRange.MSE,
    "rotate": False,
    "equalize": False,
    "max_noise": 0.0,
    "objective": Objective.INTEGERS,
}
"""EPTQ as published: options of the preset ``paper``, unless others are given."""


def filled(given: Mapping[str, Any]) -> dict[str, Any]:
    """Return options with what their preset stands for where nothing else is given."""
    if str(getattr(given.get("preset"), "value", given.get("preset"))) != Preset.PAPER.value:
        return dict(given)
    return {**PAPER, **{name: value for name, value in given.items() if value is not None}}
