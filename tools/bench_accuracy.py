"""Methods side by side, each scored by running its file on evaluation data.

    python tools/bench_accuracy.py --shipped digits_mobile 8,8 4,8 4,4
    python tools/bench_accuracy.py --model m.onnx --data calib.npz --score "score.py {model}" --key top1 4,8

``--score`` is a command that prints one JSON object for the file put in place of ``{model}``; ``--key`` names the
figure in it. A row is a pair of weight and activation bits (first and last layers: 8), a column a method:

    static       onnxruntime's quantize_static, per channel, 7-bit weights; the better of its min-max and percentile
                 calibration (8 bits only)
    minmax       nearest rounding, weight scales that clip nothing
    mse          nearest rounding, MSE weight ranges
    hmse         nearest rounding, Hessian-weighted MSE weight ranges
    network      hmse, then the network-wise optimization alone
    fast         the closed-form start without gradients (``--preset fast``)
    closed-form  the start that knows the Hessian scores (``--steps 0``)
    default      closed-form, then the network-wise optimization

``--methods`` picks some of them. Below each row stand the seconds that each method took.
"""

from __future__ import annotations

import json
import logging
import shlex
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import redirect_stdout
from pathlib import Path
from typing import Annotated

import numpy as np
import onnx
import typer
from onnxruntime.quantization import CalibrationDataReader, CalibrationMethod, QuantFormat, QuantType, quantize_static
from onnxruntime.quantization.shape_inference import quant_pre_process
from rich.console import Console
from rich.table import Table

import eptq_onnx
from eptq_onnx import Config

MODELS = Path(__file__).resolve().parent.parent / "models"
OURS: dict[str, dict[str, object]] = {
    "minmax": {"start": "nearest", "steps": 0, "weight_range": "minmax"},
    "mse": {"start": "nearest", "steps": 0, "weight_range": "mse"},
    "hmse": {"start": "nearest", "steps": 0},
    "network": {"start": "nearest"},
    "fast": {"preset": "fast"},
    "closed-form": {"steps": 0},
    "default": {},
}
METHODS = ("static", *OURS)


class Reader(CalibrationDataReader):  # type: ignore[misc]
    """Feeds the samples of a .npz to onnxruntime's quantizer, in the batches that the model takes."""

    def __init__(self, model: Path, data: Path) -> None:
        with np.load(data) as archive:
            self._arrays = {name: archive[name] for name in archive.files}
        dim = onnx.load(model, load_external_data=False).graph.input[0].type.tensor_type.shape.dim[0]
        self._batch, self._next = dim.dim_value or 8, 0

    def get_next(self) -> dict[str, np.ndarray] | None:
        """The next batch, or None."""
        part = slice(self._next, self._next + self._batch)
        self._next = part.stop
        if part.stop > len(next(iter(self._arrays.values()))):
            return None
        return {name: array[part] for name, array in self._arrays.items()}


def quantize(method: str, model: Path, data: Path, bits: tuple[int, int], folder: Path) -> list[Path]:
    """Files that a method makes; none if it cannot do these bits."""
    if method != "static":
        result = eptq_onnx.quantize(model, data, Config.of(weight_bits=bits[0], activation_bits=bits[1], **OURS[method]))
        result.save(folder / "ours.onnx")
        return [folder / "ours.onnx"]
    if bits != (8, 8):
        return []
    quant_pre_process(model, folder / "prepared.onnx", skip_symbolic_shape=True)
    files = []
    for calibration in (CalibrationMethod.MinMax, CalibrationMethod.Percentile):
        files.append(folder / f"{calibration.name}.onnx")
        quantize_static(
            folder / "prepared.onnx",
            files[-1],
            Reader(model, data),
            quant_format=QuantFormat.QDQ,
            per_channel=True,
            reduce_range=True,
            weight_type=QuantType.QInt8,
            activation_type=QuantType.QUInt8,
            calibrate_method=calibration,
        )
    return files


def by_command(template: str, key: str) -> Callable[[Path], float]:
    """Scorer that runs a command and reads a figure from the JSON that it prints."""

    def score(path: Path) -> float:
        command = [part.replace("{model}", str(path)) for part in shlex.split(template)]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        return float(json.loads(done.stdout)[key])

    return score


def by_shipped_model(name: str) -> Callable[[Path], float]:
    """Scorer of a model that the project ships."""
    sys.path.insert(0, str(MODELS))
    import score

    return lambda path: score.evaluate(name, path)


def main(
    bits: Annotated[list[str], typer.Argument(help="Pairs of weight and activation bits, as 4,8.")],
    shipped: Annotated[str, typer.Option(help="A model in models/.")] = "",
    model: Annotated[Path | None, typer.Option(help="Another model.")] = None,
    data: Annotated[Path | None, typer.Option(help="Its calibration data.")] = None,
    score: Annotated[str, typer.Option(help="The command that scores a file.")] = "",
    key: Annotated[str, typer.Option(help="The figure in the JSON that it prints.")] = "top1",
    methods: Annotated[str, typer.Option(help="Columns, separated by commas.")] = ",".join(METHODS),
) -> None:
    """Print the table."""
    chosen = methods.split(",")
    unknown = [m for m in chosen if m not in METHODS]
    if unknown:
        raise typer.BadParameter(f"no method {unknown[0]}; there are {', '.join(METHODS)}")
    if shipped:
        evaluate = by_shipped_model(shipped)
        model, data = MODELS / f"{shipped}.onnx", MODELS / f"{shipped.split('_')[0]}_calib.npz"
    elif model is None or data is None or not score:
        raise typer.BadParameter("give --shipped, or --model, --data and --score")
    else:
        evaluate = by_command(score, key)
    logging.disable(logging.WARNING)
    table = Table("bits", "float", *chosen, title=str(model.name), title_justify="left")
    reference = evaluate(model)
    for pair in bits:
        weight, activation = (int(v) for v in pair.split(","))
        scores, seconds = [], []
        for method in chosen:
            with tempfile.TemporaryDirectory() as folder:
                began = time.perf_counter()
                with redirect_stdout(sys.stderr):
                    # onnxruntime's calibration prints what it does.
                    files = quantize(method, model, data, (weight, activation), Path(folder))
                seconds.append(f"{time.perf_counter() - began:.0f}" if files else "")
                scores.append(f"{max(evaluate(f) for f in files):.4f}" if files else "-")
        table.add_row(f"W{weight}A{activation}", f"{reference:.4f}", *scores)
        table.add_row("", "seconds", *seconds)
    Console(width=140).print(table)


if __name__ == "__main__":
    typer.run(main)
