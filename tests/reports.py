"""Reports that no run made."""

from __future__ import annotations

from typing import Any

import numpy as np

from eptq_onnx import Config
from eptq_onnx.data.origin import Origin
from eptq_onnx.diagnosis import Exhibits, Histogram, NodePlace, OutputNoise, Picture, SampleNoise
from eptq_onnx.estimates import Estimate
from eptq_onnx.numerics.statistics import OutputStatistics
from eptq_onnx.outcome import OperatorTime, OptimizationTrace, Pace, Speed, Verification
from eptq_onnx.placement import FrontPoint
from eptq_onnx.records import KeptFloat
from eptq_onnx.report import LayerReport, Report

SAFE = OutputStatistics(32, 45.0, 44.0, 40.0, 38.0, decisions=32, divergence=0.001)
POOR = OutputStatistics(
    32, 12.0, 11.0, 9.0, 4.0, decisions=32, disagreement=0.1, expected_disagreement=0.12, divergence=0.2
)
TRACE = OptimizationTrace(
    "it was better", 20, tuple(np.linspace(1, 0.4, 20)), ((0, 1.0), (10, 0.8), (20, 0.7)), 20, 0.02, 3.0, 4.0
)
FRONT = (
    FrontPoint(0.03, 0.004, 9, 40_000, 4.0),
    FrontPoint(0.01, 0.005, 7, 60_000, 6.0, chosen=True),
    FrontPoint(0.001, 0.009, 2, 90_000, 8.0),
)
SPEED = Speed(
    Pace.SLOWER, 0.001, 0.0012, 1.2, 1.1, 1.3, 9, 1,
    (OperatorTime("Conv", 0.0008, 0.0009), OperatorTime("Softmax", 0.0002, 0.0003)),
)  # fmt: skip


def layer(name: str = "conv0", bits: int = 8, **fields: Any) -> LayerReport:
    reach = 2 ** (bits - 1) - 1
    known = {
        "node": name, "op_type": "Conv", "weight_type": "int8", "weight_bits": bits, "weight_range": (-reach, reach),
        "weight_zero_points": False, "activation_bits": 8, "edge": False, "attention": 0.5, "sqnr_db": 20.0,
        "own_db": 25.0, "nearest_db": 15.0,
    }  # fmt: skip
    return LayerReport(**{**known, **fields})


def noise(weights: float = 0.05, activations: float = 0.01, **fields: Any) -> OutputNoise:
    return OutputNoise(8, weights + activations, weights, activations, **fields)


def exhibits(names: tuple[str, ...] = ("conv0", "conv1", "softmax")) -> Exhibits:
    *layers, last = names
    return Exhibits(
        network=(
            *(NodePlace(name, "Conv", "integers", "W8A8") for name in layers),
            NodePlace("clip", "Clip", "merged", "the quantizer behind it clips as it does"),
            NodePlace(last, "Softmax", "float", "no integer kernel"),
        ),
        attention=np.linspace(0.1, 1, len(layers) * 6, dtype=np.float32).reshape(len(layers), 6),
        histograms=(
            Histogram(layers[0], "input", 0.0, 6.0, (900, 40, 5, 0), 0.0, 5.0, 0.01),
            Histogram(layers[0], "weights", -9.0, 8.0, (3, 40, 50, 2), -8.0, 7.0, 0.02),
        ),
        pictures=(Picture("a.jpg", SampleNoise(7, "y", 4.0), np.full((16, 12, 3), 200, np.uint8)),),
    )


def report(**fields: Any) -> Report:
    """A report that holds something of everything."""
    statistics = fields.pop("statistics", {"y": SAFE})
    checked: dict[str, Any] = {
        "samples": 32, "outputs": {name: s.sqnr_db for name, s in statistics.items()}, "layers": {},
        "planned": {"Conv": 2}, "kernels": {"Conv": 1}, "float_bytes": 4000, "quantized_bytes": 1200,
        "statistics": statistics, "worst": (SampleNoise(7, "y", 4.0),),
    }  # fmt: skip
    checked |= fields.pop("verification", {})
    config = {**Config(objective="integers").model_dump(mode="json"), **fields.pop("config", {})}
    known: dict[str, Any] = {
        "version": "1", "model": "net.onnx", "target": "ort-x64-vnni", "engine": "standard", "config": config,
        "opset": 17, "data": Origin("photos", {"image": "size=224"}), "samples": 320, "unused_samples": 0,
        "batching": {}, "layers": (layer("conv0"), layer("conv1")),
        "kept_float": (KeptFloat("softmax", "Softmax", "no integer kernel"),), "notes": ("a note",),
        "rotated": {}, "equalized": {}, "placement": None, "front": FRONT, "optimization": TRACE,
        "verification": Verification(**checked), "speed": SPEED, "estimate": Estimate(5.0, 20, {"optimize": 4.0}),
        "seconds": {"calibrate": 1.0, "optimize": 3.0}, "peak_memory_bytes": 10**8,
        "sizes": {"weights": 900, "biases": 0, "graph": 300}, "noise": None, "exhibits": exhibits(),
    }  # fmt: skip
    return Report(**{**known, **fields})
