"""What each part of the work costs, in float forward passes over the same samples, measured in one run.

    python tools/bench_speed.py --shipped digits_mobile
    python tools/bench_speed.py --model m.onnx --data calib.npz --batch-size 16

Prints the time of one float forward pass of a batch in onnxruntime, and as multiples of it: one step of the network-wise
optimization (gradient graph, updates and all), and the Hessian scores of all layers, per probe. The closed-form start
and the calibration are given in passes over the samples that they look at. Single machine, single run: compare ratios,
not seconds.
"""

from __future__ import annotations

import resource
import time
from collections.abc import Callable
from pathlib import Path
from typing import Annotated

import numpy as np
import typer
from rich.console import Console
from rich.table import Table

from eptq_onnx import Config, data, targets
from eptq_onnx.engines.ort_training import OrtTrainingEngine
from eptq_onnx.graph import io
from eptq_onnx.runtime import Session
from eptq_onnx.steps.calibrate import calibrate
from eptq_onnx.steps.closed_form import closed_form
from eptq_onnx.steps.normalize import normalize
from eptq_onnx.steps.optimize import optimize, split
from eptq_onnx.steps.plan import plan as make_plan
from eptq_onnx.steps.ranges import weight_ranges
from eptq_onnx.steps.score import score
from eptq_onnx.steps.soften import soften
from eptq_onnx.steps.write import write

MODELS = Path(__file__).resolve().parent.parent / "models"


def seconds(work: Callable[[], object], times: int = 1) -> float:
    """Least time of several runs."""
    taken = []
    for _ in range(times):
        began = time.perf_counter()
        work()
        taken.append(time.perf_counter() - began)
    return min(taken)


def main(
    shipped: Annotated[str, typer.Option(help="A model in models/.")] = "",
    model: Annotated[Path | None, typer.Option(help="Another model.")] = None,
    source: Annotated[Path | None, typer.Option("--data", help="Its calibration data.")] = None,
    weight_bits: Annotated[int, typer.Option(help="Weight bits.")] = 4,
    activation_bits: Annotated[int, typer.Option(help="Activation bits.")] = 8,
    batch_size: Annotated[int, typer.Option(help="Samples a step.")] = 16,
    samples_used: Annotated[int, typer.Option("--samples", help="Samples to score and to walk over.")] = 64,
    steps: Annotated[int, typer.Option(help="Steps to time.")] = 20,
) -> None:
    """Print the table."""
    if shipped:
        model, source = MODELS / f"{shipped}.onnx", MODELS / f"{shipped.split('_')[0]}_calib.npz"
    elif model is None or source is None:
        raise typer.BadParameter("give --shipped, or --model and --data")
    config = Config(
        weight_bits=weight_bits, activation_bits=activation_bits, batch_size=batch_size, steps=steps, patience=0, probes=1
    )  # fmt: skip
    target, engine = targets.load(config.target), OrtTrainingEngine()
    float_model = normalize(io.load(model), target.min_opset)
    samples = data.read(source, float_model)
    size = samples.micro_batch(batch_size)
    session = Session(float_model)
    runs = -(-batch_size // size)
    feeds = samples.take(np.arange(size) % samples.count)
    session.run(feeds)
    forward = seconds(lambda: session.run(feeds), 7) * runs
    chosen = np.arange(min(samples_used, samples.count))
    passes = forward * len(chosen) / batch_size
    plan = make_plan(float_model, target, config)

    def quiet(*_: object) -> None:
        return None

    began = time.perf_counter()
    calibration = calibrate(float_model, plan, samples, config, quiet)
    calibrating = (time.perf_counter() - began) / (forward * samples.count / batch_size)
    began = time.perf_counter()
    scores = score(float_model, plan, samples, chosen, calibration, engine, config, quiet)
    scoring = (time.perf_counter() - began) / passes
    start = weight_ranges(float_model, plan, calibration, scores, config)
    seen, _ = split(len(chosen), config.holdout, config.seed)
    began = time.perf_counter()
    nearest, _ = write(float_model, plan, start)
    start, _ = closed_form(float_model, nearest, plan, start, samples, chosen[seen], scores, config, quiet)
    walking = (time.perf_counter() - began) / passes
    graph = soften(float_model, plan, start, samples, config, engine)
    ticks: list[float] = []
    optimize(plan, start, graph, samples, chosen, calibration, scores, config, lambda *_: ticks.append(time.perf_counter()))
    # Checks on held-out samples fall between some of the ticks; the median knows nothing of them.
    step = float(np.median(np.diff(ticks))) / forward

    table = Table("part", "float forward passes", title=f"{model.name}, W{weight_bits}A{activation_bits}", title_justify="left")
    table.add_row("one forward pass of a batch", f"{forward:.3f} s for {batch_size} samples, {size} at a time")
    table.add_row("calibration, all samples", f"{calibrating:.1f}")
    table.add_row("Hessian scores, one probe", f"{scoring:.1f}")
    table.add_row("closed-form start", f"{walking:.1f}")
    table.add_row("one optimization step", f"{step:.1f}")
    table.add_row("peak memory", f"{resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20:.1f} GB")
    Console(width=140).print(table)


if __name__ == "__main__":
    typer.run(main)
