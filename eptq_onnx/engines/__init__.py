"""Gradient engines; the only importers of gradient libraries."""

from __future__ import annotations

from eptq_onnx import runtime
from eptq_onnx.config import EngineChoice
from eptq_onnx.engines.base import Engine
from eptq_onnx.engines.ort_training import OrtTrainingEngine
from eptq_onnx.engines.standard import StandardEngine


def make(choice: EngineChoice = EngineChoice.AUTO) -> Engine:
    """An engine; by itself that of the training build where it is installed, which is the faster one.

    Raises
    ------
    InstallError
        If what it needs is missing or damaged.
    """
    training = runtime.is_training_build() if choice is EngineChoice.AUTO else choice is EngineChoice.TRAINING
    return OrtTrainingEngine() if training else StandardEngine()
