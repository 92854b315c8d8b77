"""The metadata that say what made a file."""

from __future__ import annotations

from onnx import ModelProto

from eptq_onnx._version import __version__
from eptq_onnx.config import Config
from eptq_onnx.targets import Target

_PREFIX = "eptq_onnx."
"""Prefix of metadata keys."""


def sign(model: ModelProto, config: Config, target: Target) -> None:
    """Record version, target and options in the metadata, in place."""
    model.producer_version = __version__
    kept = [(p.key, p.value) for p in model.metadata_props if not p.key.startswith(_PREFIX)]
    made = {"version": __version__, "target": target.name, "options": config.digest(target)}
    del model.metadata_props[:]
    for key, value in [*kept, *((_PREFIX + key, value) for key, value in made.items())]:
        model.metadata_props.add(key=key, value=value)
