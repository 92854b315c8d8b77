"""Digests of what is made of the models in ``models/``: a restructuring must not change them.

    python tools/written_bytes.py > before.txt     # on the code before
    python tools/written_bytes.py | diff before.txt -

Each model is quantized at W8A8 and W4A8, with ``--preset fast`` and the default. The digest is that of the
written model without ``producer_version`` and metadata, which tell the versions apart.
"""

from __future__ import annotations

import hashlib
import itertools
from pathlib import Path

from onnx import ModelProto

import eptq_onnx
from eptq_onnx import Config
from eptq_onnx.config import Preset

TARGET = "ort-x64"
"""Named, so that all machines write the same bytes."""
MODELS = Path(__file__).resolve().parent.parent / "models"


def digest(model: ModelProto) -> str:
    """SHA-256 of a model's bytes, without what tells who made it."""
    copy = ModelProto()
    copy.CopyFrom(model)
    copy.ClearField("producer_version")
    copy.ClearField("metadata_props")
    return hashlib.sha256(copy.SerializeToString(deterministic=True)).hexdigest()


def main() -> None:
    """Print one line a model, width and preset."""
    for model, bits, preset in itertools.product(sorted(MODELS.glob("*.onnx")), (8, 4), ("fast", "balanced")):
        samples = MODELS / f"{model.stem.partition('_')[0]}_calib.npz"
        config = Config(target=TARGET, weight_bits=bits, preset=Preset(preset), measure_speed=False)
        result = eptq_onnx.quantize(model, samples, config)
        print(f"{digest(result.model)}  {model.stem} W{bits}A8 {preset}", flush=True)


if __name__ == "__main__":
    main()
