from __future__ import annotations

from pathlib import Path

import pytest

from eptq_onnx.engines.ort_training import OrtTrainingEngine

MODELS = Path(__file__).resolve().parent.parent / "models"


@pytest.fixture(scope="session")
def engine() -> OrtTrainingEngine:
    return OrtTrainingEngine()


@pytest.fixture(scope="session")
def models_folder() -> Path:
    return MODELS
