"""Rounding and range methods side by side, each scored by running its file on evaluation data.

    python tools/compare_methods.py --shipped digits_mobile --bits 4,8 4,4 3,4
    python tools/compare_methods.py --model m.onnx --data calib.npz --score "score.py {model}" --key top1 --bits 4,8

``--score`` is a command that prints one JSON object for the file put in place of ``{model}``; ``--key`` names the
figure in it. A row is a pair of weight and activation bits (first and last layers: 8), a column a method:

    minmax      nearest rounding, weight scales that clip nothing
    mse         nearest rounding, MSE weight ranges
    hmse        nearest rounding, Hessian-weighted MSE weight ranges
    optimized   hmse, then the network-wise optimization
"""

from __future__ import annotations

import json
import shlex
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

import eptq_onnx
from eptq_onnx import Config

MODELS = Path(__file__).resolve().parent.parent / "models"
METHODS: dict[str, dict[str, object]] = {
    "minmax": {"steps": 0, "weight_range": "minmax"},
    "mse": {"steps": 0, "weight_range": "mse"},
    "hmse": {"steps": 0, "weight_range": "hmse"},
    "optimized": {"weight_range": "hmse"},
}


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
    steps: Annotated[int | None, typer.Option(help="Steps of the optimization (default: the preset's).")] = None,
) -> None:
    """Print the table."""
    if shipped:
        evaluate = by_shipped_model(shipped)
        model, data = MODELS / f"{shipped}.onnx", MODELS / f"{shipped.split('_')[0]}_calib.npz"
    elif model is None or data is None or not score:
        raise typer.BadParameter("give --shipped, or --model, --data and --score")
    else:
        evaluate = by_command(score, key)
    console = Console()
    table = Table("bits", "float", *METHODS, "minutes", title=str(model.name), title_justify="left")
    reference = evaluate(model)
    for pair in bits:
        weight, activation = (int(v) for v in pair.split(","))
        cells, began = [], 0.0
        for options in METHODS.values():
            extra = {"steps": steps} if steps is not None and "steps" not in options else {}
            began = time.perf_counter()
            result = eptq_onnx.quantize(model, data, Config.of(weight_bits=weight, activation_bits=activation, **options, **extra))
            took = time.perf_counter() - began
            with tempfile.TemporaryDirectory() as folder:
                result.save(Path(folder) / "q.onnx")
                cells.append(f"{evaluate(Path(folder) / 'q.onnx'):.4f}")
        table.add_row(f"W{weight}A{activation}", f"{reference:.4f}", *cells, f"{took / 60:.1f}")
    console.print(table)


if __name__ == "__main__":
    typer.run(main)
