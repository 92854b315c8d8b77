"""What each part of the work costs, in float forward passes over the same samples, measured in one run.

    python tools/bench_speed.py --shipped digits_mobile
    python tools/bench_speed.py --model m.onnx --data calib.npz --batch-size 16 --engine standard

Prints the time of one float forward pass of a batch in onnxruntime, and as multiples of it: one step of the
network-wise optimization (gradient graph, updates and all), and the Hessian scores of all layers. The
closed-form start and the calibration are given in passes over the samples that they look at. ``--torch`` adds
the same training step written in PyTorch (pip install torch==2.13.0; convolutional classifiers only). Single
machine, single run: compare ratios, not seconds. A second table has the CPU time of every pass, and its floor
(`floors.py`).
"""

from __future__ import annotations

import time
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer
from floors import Meter
from rich.console import Console
from rich.table import Table

import eptq_onnx
from eptq_onnx import Config, data
from eptq_onnx.cli.options import with_options
from eptq_onnx.graph import io
from eptq_onnx.runtime import Session

MODELS = Path(__file__).resolve().parent.parent / "models"


def forward_seconds(model: Path, source: Path, batch_size: int) -> float:
    """Median time of float forward passes of ``batch_size`` samples, as many at a time as the model takes."""
    float_model = io.load(model)
    samples = data.read(source, float_model)
    size = samples.micro_batch(batch_size)
    session, feeds = Session(float_model, threads=0), samples.take(np.arange(size))
    session.run(feeds)
    taken = []
    for _ in range(15):
        began = time.perf_counter()
        session.run(feeds)
        taken.append(time.perf_counter() - began)
    return float(np.median(taken)) * -(-batch_size // size)


def pass_seconds(model: Path, source: Path) -> float:
    """CPU seconds of a float forward pass of one sample, with one thread."""
    float_model = io.load(model)
    samples = data.read(source, float_model)
    size = samples.micro_batch()
    session, feeds = Session(float_model), samples.take(np.arange(size))
    session.run(feeds)
    taken = []
    for _ in range(9):
        began = time.process_time()
        session.run(feeds)
        taken.append(time.process_time() - began)
    return float(np.median(taken)) / size


OPTIONS: dict[str, Any] = {"weight_bits": 4, "score_samples": 64, "probes": 1, "steps": 40, "patience": 0}
"""Options where others are not given: ten checks on held-out samples fall between the steps."""


@with_options(Config)
def main(
    *,
    shipped: Annotated[str, typer.Option(help="A model in models/.")] = "",
    model: Annotated[Path | None, typer.Option(help="Another model.")] = None,
    source: Annotated[Path | None, typer.Option("--data", help="Its calibration data.")] = None,
    torch: Annotated[bool, typer.Option(help="Time the step in PyTorch, too.")] = False,
    **options: Any,
) -> None:
    """Print the table."""
    if shipped:
        model, source = MODELS / f"{shipped}.onnx", MODELS / f"{shipped.split('_')[0]}_calib.npz"
    elif model is None or source is None:
        raise typer.BadParameter("give --shipped, or --model and --data")
    config = Config(**{**OPTIONS, **options})
    forward = forward_seconds(model, source, config.batch_size)
    ticks: list[float] = []

    def note(step: str, done: int, total: int, detail: object = "") -> None:
        if step == "optimize":
            ticks.append(time.perf_counter())

    with Meter(pass_seconds(model, source)) as meter:
        report = eptq_onnx.quantize(model, source, config, progress=note).report
    scored = forward * min(config.score_samples, report.samples) / config.batch_size
    title = f"{model.name}, W{config.weight_bits}A{config.activation_bits}, engine {report.engine}"
    table = Table("part", "float forward passes", title=title, title_justify="left")
    table.add_row("one forward pass of a batch", f"{forward:.3f} s for {config.batch_size} samples")
    table.add_row(
        "calibration, all samples",
        f"{report.seconds['calibrate'] / (forward * report.samples / config.batch_size):.1f}",
    )
    table.add_row(
        f"Hessian scores, {config.probes} probe{'s' if config.probes > 1 else ''}",
        f"{report.seconds['score'] / scored:.1f}",
    )
    table.add_row("layer-wise reconstruction", f"{report.seconds['reconstruct'] / scored:.1f}")
    # Checks on held-out samples fall between some of the ticks; the median knows nothing of them.
    table.add_row("one optimization step", f"{np.median(np.diff(ticks)) / forward:.1f}")
    if torch:
        import torch_step

        float_model = io.load(model)
        batch = next(iter(data.read(source, float_model).take(np.arange(config.batch_size)).values()))
        for layout in (True, False):
            taken = (
                torch_step.seconds(float_model, batch, report.estimate.steps, channels_last=layout) / forward
            )
            table.add_row(
                f"the same step in PyTorch, {'channels last' if layout else 'contiguous'}", f"{taken:.1f}"
            )
    table.add_row(
        "time taken, over what was told before",
        f"{sum(report.seconds.values()) / report.estimate.seconds:.2f}",
    )
    table.add_row("peak memory", f"{report.peak_memory_bytes / 2**30:.1f} GB")
    Console(width=140).print(table)
    passes = Table("pass", "CPU s", "floor", "ratio", title="CPU time and its floor", title_justify="left")
    for name, measured in meter.passes.items():
        floor = (
            []
            if measured.floor is None
            else [f"{measured.floor:.2f}", f"{measured.seconds / measured.floor:.1f}"]
        )
        passes.add_row(name, f"{measured.seconds:.2f}", *floor)
    Console(width=140).print(passes)


if __name__ == "__main__":
    typer.run(main)
