"""Quantize a model on a device and on the CPU, and print how far the results agree and the ratio of times.

``python tools/gpu_check.py MODEL DATA --device cuda`` needs an onnxruntime with a provider for the device;
with ``--device cpu`` it is its own rehearsal. Both runs are W4A8 with the standard engine.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from onnx import ModelProto

import eptq_onnx
from eptq_onnx import Config, quantize
from eptq_onnx.proto.store import array
from eptq_onnx.start import silent


def run(arguments: argparse.Namespace, device: str, path: Path) -> tuple[ModelProto, dict[str, Any]]:
    """Quantize on a device; return the model and what it took."""
    config = Config(
        bits="w4a8", engine="standard", device=device, objective="integers", measure_speed=False,
        preset=arguments.preset, steps=arguments.steps,
    )  # fmt: skip
    began = time.perf_counter()
    data = eptq_onnx.Data(arguments.data, image=arguments.image)
    result = quantize(arguments.model, data, config, progress=silent)
    seconds = time.perf_counter() - began
    result.save(path)
    report = result.report
    told = {
        "device": device,
        "seconds": round(seconds, 1),
        "passes": {name: round(value, 1) for name, value in report.seconds.items()},
        "worst output (dB)": round(min(report.verification.outputs.values()), 2),
        "notes": [note for note in report.notes if device in note or "the CPU" in note],
    }
    return result.model, told


def agreement(one: ModelProto, other: ModelProto) -> float:
    """Return the share of the elements of all constants that are the same in both models."""
    known = {i.name: i for i in other.graph.initializer}
    same = count = 0
    for own in one.graph.initializer:
        if own.name in known and list(own.dims) == list(known[own.name].dims):
            same += int((array(own) == array(known[own.name])).sum())
        count += max(1, array(own).size)
    return same / max(count, 1)


def main() -> None:
    """Run on both, and print a JSON document."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", type=Path)
    parser.add_argument("data")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--image", help="recipe of the samples, if they are pictures")
    parser.add_argument("--preset", default="balanced")
    parser.add_argument("--steps", type=int)
    arguments = parser.parse_args()
    with TemporaryDirectory() as folder:
        first, second = Path(folder) / "device.onnx", Path(folder) / "cpu.onnx"
        one, there = run(arguments, arguments.device, first)
        other, here = run(arguments, "cpu", second)
        compared = eptq_onnx.compare(second, first, eptq_onnx.Data(arguments.data, image=arguments.image))
    found = {
        "there": there,
        "here": here,
        "time, device by CPU": round(there["seconds"] / here["seconds"], 3),
        "equal elements of constants": round(agreement(one, other), 5),
        "device against CPU (dB)": {
            name: round(o.statistics.sqnr_db, 2) if math.isfinite(o.statistics.sqnr_db) else "equal"
            for name, o in compared.outputs.items()
        },
    }
    print(json.dumps(found, indent=2))


if __name__ == "__main__":
    main()
