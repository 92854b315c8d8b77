"""Options of a run without samples."""

from __future__ import annotations

from eptq_onnx.config.choices import Activations, Start, WeightRange
from eptq_onnx.config.config import Config
from eptq_onnx.errors import ConfigError

WITHOUT_SAMPLES = (
    "without samples, weights are rounded to nearest and nothing is measured; with samples (--data), layers "
    "are reconstructed one by one and optimized together, outputs are compared with those of the float "
    "model, and --activations auto finds out whether fixed ranges would be as quiet"
)
"""What is said of such a run."""


def without_samples(config: Config) -> Config:
    """Return the options that a run without samples follows: it rounds weights to nearest.

    Raises
    ------
    ConfigError
        If an option needs samples.
    """
    if config.activations is not Activations.DYNAMIC and not config.weights_only:
        raise ConfigError(
            "fixed ranges of activations need samples: give some with --data, or choose "
            "--activations dynamic or --bits w8a32, which need none."
        )
    for name, asked in (
        ("steps", bool(config.steps)),
        ("weight_range=hmse", config.weight_range is WeightRange.HMSE),
        ("budget" if config.width_budgets else "objective=bytes", config.chooses_widths),
        ("budget time", config.seconds is not None),
        ("budget activations", config.activation_budget is not None),
    ):
        if asked:
            raise ConfigError(f"option {name} needs samples: give some with --data, or leave the option out.")
    return config.model_copy(
        update={
            "start": Start.NEAREST,
            "steps": 0,
            "weight_range": config.weight_range or WeightRange.MSE,
            "equalize": False,
            "max_noise": 0.0,
        }
    )
