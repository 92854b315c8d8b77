"""Methods side by side, each scored by running its file on evaluation data.

    python tools/bench_accuracy.py --shipped digits_mobile 8,8 4,8 4,4
    python tools/bench_accuracy.py --model m.onnx --data calib.npz --score "score.py {model}" --key top1 4,8

``--score`` is a command that prints one JSON object for the file put in place of ``{model}``; ``--key`` names
the figure in it, or several, separated by commas: the first decides. A row is a pair of weight and activation
bits (first and last layers: 8), a column a method:

    static       onnxruntime's quantize_static, per channel, 7-bit weights; the better of its min-max and
    percentile
                 calibration (8 bits only)
    nncf         NNCF's ONNX quantization (pip install nncf), its default and its slower, more accurate bias
    correction;
                 the better of the two (8 bits only)
    aimet        AIMET's AdaRound (pip install torch==2.13.0 aimet-onnx), 10,000 iterations a layer;
    ``aimet=2000``: so many minmax       nearest rounding, weight scales that clip nothing; like the next two
    on channels as they are mse          nearest rounding, MSE weight ranges hmse         nearest rounding,
    Hessian-weighted MSE weight ranges network      hmse, then the network-wise optimization alone fast
    the closed-form start without gradients (``--preset fast``) closed-form  the start that knows the Hessian
    scores (``--steps 0``) default      closed-form, then the network-wise optimization

and, as an ablation of what the paper proposes (the ``network`` ones from nearest rounding, channels as they
are):

    network-no-attention, network-layer   the loss weighs all layers and samples the same, or by the paper's
    sample-layer
                                          attention (the default tells channels apart, too)
    network-mse                           without Hessian-weighted ranges
    network-gradual                       with gradual activation quantization
    default-no-attention                  the default, with a loss that weighs all layers and samples the same
    default-layers, default-outputs       the default, with a loss of the layers alone, or of the outputs
    alone closed-form-no-rotation, closed-form-no-equalization   closed-form on channels that are not mixed,
    or not scaled

``--methods`` picks some of them. Below each row stand the seconds and the peak memory of each method, which
runs in a process of its own.
"""

from __future__ import annotations

import json
import logging
import multiprocessing
import shlex
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Collection
from concurrent.futures import ProcessPoolExecutor
from contextlib import redirect_stdout
from pathlib import Path
from typing import Annotated, Any

import peers
import rivals
import typer
from bench_files import mean_ratio, ratio
from rich.console import Console
from rich.table import Table

import eptq_onnx
from eptq_onnx import Config
from eptq_onnx.data.reading import read
from eptq_onnx.graph import io
from eptq_onnx.memory import peak_memory

MODELS = Path(__file__).resolve().parent.parent / "models"
NEAREST: dict[str, Any] = {"start": "nearest", "rotate": False, "equalize": False}
OURS: dict[str, dict[str, Any]] = {
    "minmax": {**NEAREST, "steps": 0, "weight_range": "minmax"},
    "mse": {**NEAREST, "steps": 0, "weight_range": "mse"},
    "hmse": {**NEAREST, "steps": 0},
    "network": NEAREST,
    "fast": {"preset": "fast"},
    "closed-form": {"steps": 0},
    "default": {},
}
ABLATION: dict[str, dict[str, Any]] = {
    "network-no-attention": {**NEAREST, "attention": "none"},
    "network-layer": {**NEAREST, "attention": "layer"},
    "network-mse": {**NEAREST, "weight_range": "mse"},
    "network-gradual": {**NEAREST, "gradual_activations": True},
    "default-no-attention": {"attention": "none"},
    "default-layers": {"output_share": 0.0},
    "default-outputs": {"output_share": 1.0},
    "closed-form-no-rotation": {"steps": 0, "rotate": False},
    "closed-form-no-equalization": {"steps": 0, "equalize": False},
}
METHODS = ("static", *OURS)
RIVALS = ("static", "nncf", "aimet")
Figures = tuple[float, ...]


def quantize(method: str, model: Path, data: Path, bits: tuple[int, int], folder: Path) -> list[Path]:
    """Files that a method makes; none if it cannot do these bits."""
    method, _, iterations = method.partition("=")
    if method not in RIVALS:
        options = (OURS | ABLATION)[method]
        result = eptq_onnx.quantize(
            model, data, Config(weight_bits=bits[0], activation_bits=bits[1], **options)
        )
        result.save(folder / "ours.onnx")
        return [folder / "ours.onnx"]
    samples = read(data, io.load(model))
    if method == "aimet":
        return rivals.aimet(model, samples, bits, int(iterations or 10_000), folder)
    if bits != (8, 8):
        return []
    if method == "static":
        return [path for _, path in peers.quantize_static(model, samples, peers.USUAL, folder)]
    return rivals.nncf(model, samples, folder)


def measured(
    method: str, model: Path, data: Path, bits: tuple[int, int], folder: Path
) -> tuple[list[Path], float, int]:
    """The files of `quantize`, the seconds that it took, and the peak memory of the process in bytes."""
    logging.disable(logging.WARNING)
    began = time.perf_counter()
    with redirect_stdout(sys.stderr):
        # Peers print what they do.
        files = quantize(method, model, data, bits, folder)
    return files, time.perf_counter() - began, peak_memory()


def by_command(template: str, keys: list[str]) -> Callable[[Path], Figures]:
    """Scorer that runs a command and reads figures from the JSON that it prints."""

    def score(path: Path) -> Figures:
        command = [part.replace("{model}", str(path)) for part in shlex.split(template)]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        found = json.loads(done.stdout)
        return tuple(float(found[key]) for key in keys if key in found)

    return score


def by_shipped_model(name: str) -> Callable[[Path], Figures]:
    """Scorer of a model that the project ships: its metric, and the SQNR of its outputs in dB."""
    sys.path.insert(0, str(MODELS))
    import score

    reference = score.outputs_of(name, MODELS / f"{name}.onnx")

    def evaluate(path: Path) -> Figures:
        outputs = score.outputs_of(name, path)
        return score.rate(name, outputs), mean_ratio(ratio([reference], [outputs]))

    return evaluate


def _shown(figures: Figures) -> str:
    return " / ".join(f"{v:.4f}" if abs(v) <= 1 else f"{v:.1f}" for v in figures)


def chosen_of(methods: str, known: Collection[str]) -> list[str]:
    """Methods separated by commas."""
    chosen = methods.split(",")
    unknown = [m for m in chosen if m.partition("=")[0] not in known]
    if unknown:
        raise typer.BadParameter(f"no method {unknown[0]}; there are {', '.join(known)}")
    return chosen


def subject(
    shipped: str, model: Path | None, data: Path | None, score: str, keys: str
) -> tuple[Path, Path, Callable[[Path], Figures]]:
    """A model, its calibration data, and what scores a file."""
    if shipped:
        return (
            MODELS / f"{shipped}.onnx",
            MODELS / f"{shipped.split('_', maxsplit=1)[0]}_calib.npz",
            by_shipped_model(shipped),
        )
    if model is None or data is None or not score:
        raise typer.BadParameter("give --shipped, or --model, --data and --score")
    return model, data, by_command(score, keys.split(","))


def main(
    bits: Annotated[list[str], typer.Argument(help="Pairs of weight and activation bits, as 4,8.")],
    shipped: Annotated[str, typer.Option(help="A model in models/.")] = "",
    model: Annotated[Path | None, typer.Option(help="Another model.")] = None,
    data: Annotated[Path | None, typer.Option(help="Its calibration data.")] = None,
    score: Annotated[str, typer.Option(help="The command that scores a file.")] = "",
    key: Annotated[
        str, typer.Option(help="The figures in the JSON that it prints, separated by commas.")
    ] = "top1",
    methods: Annotated[str, typer.Option(help="Columns, separated by commas.")] = ",".join(METHODS),
) -> None:
    """Print the table."""
    chosen = chosen_of(methods, (*RIVALS, *OURS, *ABLATION))
    model, data, evaluate = subject(shipped, model, data, score, key)
    table = Table("bits", "float", *chosen, title=str(model.name), title_justify="left")
    # The first figure only: the SQNR of a file to itself says nothing.
    reference = evaluate(model)[:1]
    for pair in bits:
        weight, activation = (int(v) for v in pair.split(","))
        scores, costs = [], []
        for method in chosen:
            # A process each: peaks of memory add up otherwise, and rivals leave things behind.
            workers = ProcessPoolExecutor(1, multiprocessing.get_context("forkserver"))
            with tempfile.TemporaryDirectory() as folder, workers as process:
                work = process.submit(measured, method, model, data, (weight, activation), Path(folder))
                files, seconds, memory = work.result()
                costs.append(f"{seconds:.0f} s, {memory / 1e9:.1f} GB" if files else "")
                scores.append(_shown(max(evaluate(f) for f in files)) if files else "-")
                Console(stderr=True).print(
                    f"W{weight}A{activation} {method}: {scores[-1]} {costs[-1]}", highlight=False
                )
        table.add_row(f"W{weight}A{activation}", _shown(reference), *scores)
        table.add_row("", "", *costs)
    Console(width=max(140, 16 * (len(chosen) + 2))).print(table)


if __name__ == "__main__":
    typer.run(main)
