"""The command line: arguments to Config, progress bars, exit codes."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

import eptq_onnx
from eptq_onnx.api import Result, input_files
from eptq_onnx.api import quantize as run
from eptq_onnx.config import ActivationRange, Attention, Config, EngineChoice, Optimizer, Preset, RoundingVariable, WeightRange
from eptq_onnx.errors import EptqError, OutputError
from eptq_onnx.files import check_apart, check_writable, model_outputs, write_atomically
from eptq_onnx.interrupts import command, tell_outcome
from eptq_onnx.report.console import console, display, line, shown, tolerant_streams

_DEFAULTS = Config()


class _App(typer.Typer):
    """The command as a process: signals, streams, and what is left behind."""

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        tolerant_streams()
        with command():
            return super().__call__(*args, **kwargs)


app = _App(add_completion=False, no_args_is_help=True, pretty_exceptions_enable=False, rich_markup_mode=None)


@app.callback()
def main() -> None:
    """Post-training quantization of ONNX models: Hessian-guided, network-wise optimized rounding (EPTQ)."""


@app.command()
def quantize(
    model: Annotated[Path, typer.Argument(help="The float ONNX model.", show_default=False)],
    data: Annotated[
        str,
        typer.Option(
            "--data",
            help="Calibration samples: a .npz with one array per model input, samples along the first axis; a folder of .npz, "
            "each what the model takes in one run; or module:function, which gives either.",
        ),
    ],
    output: Annotated[Path, typer.Option("--output", "-o", help="Where to write the QDQ model.")],
    weight_bits: Annotated[int, typer.Option(help="Bits of the weights, 2 to 8.")] = _DEFAULTS.weight_bits,
    activation_bits: Annotated[int, typer.Option(help="Bits of the activations, 2 to 8, or 16.")] = _DEFAULTS.activation_bits,
    edge_bits: Annotated[int, typer.Option(help="Bits of the first and last layers.")] = _DEFAULTS.edge_bits,
    budget: Annotated[
        str | None, typer.Option(help="Mixed precision: weights=4 (mean bits), bytes=2e6 or bitops=1e10; instead of --weight-bits.")
    ] = None,
    target: Annotated[str, typer.Option(help="Runtime: ort-x64, ort-x64-vnni, or the path of a target .toml file.")] = _DEFAULTS.target,
    preset: Annotated[
        Preset, typer.Option(help="fast: no gradients; balanced: 200 steps, best: 1000; small models up to 5 times as many.")
    ] = _DEFAULTS.preset,
    steps: Annotated[int | None, typer.Option(help="Steps of the network-wise optimization (default: by the preset).")] = None,
    engine: Annotated[
        EngineChoice, typer.Option(help="Where gradients come from: onnxruntime's training build, or standard nodes on any onnxruntime.")
    ] = _DEFAULTS.engine,
    seed: Annotated[int, typer.Option(help="Seed of all randomness.")] = _DEFAULTS.seed,
    batch_size: Annotated[int, typer.Option(help="Samples a step.")] = _DEFAULTS.batch_size,
    score_samples: Annotated[int, typer.Option(help="At most so many samples are scored and optimized on.")] = _DEFAULTS.score_samples,
    activation_range: Annotated[ActivationRange, typer.Option(help="How activation ranges are chosen.")] = _DEFAULTS.activation_range,
    weight_range: Annotated[
        WeightRange | None, typer.Option(help="How weight ranges are chosen (default: hmse; mse with --preset fast).")
    ] = None,
    rotate: Annotated[
        bool, typer.Option(help="Mix channels where nothing but linear operators lies between layers, so that weights fill their ranges.")
    ] = _DEFAULTS.rotate,
    equalize: Annotated[
        bool, typer.Option(help="Scale the channels of activations to fit the range that they share, where layers around can take it up.")
    ] = _DEFAULTS.equalize,
    max_noise: Annotated[
        float,
        typer.Option(help="The noisiest activations stay float until the others together cause no more noise at the outputs (0: none)."),
    ] = _DEFAULTS.max_noise,
    attention: Annotated[Attention, typer.Option(help="What the loss weighs by the Hessian bound.")] = _DEFAULTS.attention,
    output_share: Annotated[
        float, typer.Option(help="Share of the network's outputs in the loss; the rest is that of the layers (0: the paper's loss).")
    ] = _DEFAULTS.output_share,
    rounding: Annotated[RoundingVariable, typer.Option(help="What is learned for each weight element.")] = _DEFAULTS.rounding,
    optimizer: Annotated[Optimizer, typer.Option(help="Optimizer of the rounding.")] = _DEFAULTS.optimizer,
    max_memory: Annotated[
        str | None,
        typer.Option(
            help="Memory to get along with, such as 4GB: block by block where all does not fit (large models: nine tenths of all)."
        ),
    ] = None,
    batch_axes: Annotated[
        list[str] | None,
        typer.Option(
            "--batch-axis",
            metavar="NAME=AXIS|none",
            help="Batch axis of a model input, counted from 0, or none; by default shapes and samples decide, and the report says how.",
        ),
    ] = None,
    measure_speed: Annotated[
        bool, typer.Option(help="Measure at the end whether the quantized model runs faster than the float model on this machine.")
    ] = _DEFAULTS.measure_speed,
    custom_ops: Annotated[
        list[Path] | None, typer.Option(help="Shared library with custom operators for onnxruntime; give it once for each library.")
    ] = None,
    report: Annotated[Path | None, typer.Option(help="Where to write the report as JSON.")] = None,
) -> None:
    """Quantize MODEL with the samples in DATA, and write a QDQ model for the target runtime."""
    options: dict[str, Any] = {k: v for k, v in locals().items() if k not in ("model", "data", "output", "report")}
    options["custom_ops"] = custom_ops or ()
    messages = console(stderr=True)
    with _told(messages):
        config = Config.of(**options)
        outputs = model_outputs(output) if report is None else {**model_outputs(output), "the report": report}
        for path in filter(None, (output, report)):
            check_writable(path)
        check_apart(outputs, input_files(model, data, config))
        with display(messages, config.preset.value) as progress:
            result = run(model, data, config, progress=progress)
        result.save(output)
        tell_outcome(f"wrote {shown(output)}")
        failure = _write_report(result, output, report)
        summary = console()
        result.report.print(summary)
        summary.print(line(f"wrote {output}"), soft_wrap=True)
        if failure is not None:
            raise failure


def _write_report(result: Result, output: Path, report: Path | None) -> OutputError | None:
    """Write the report; what went wrong is told after the summary, which may be all that is left of it."""
    try:
        if report is not None:
            write_atomically(report, result.report.to_json().encode())
    except OutputError as e:
        return OutputError(f"{output} was written, but not the report: {e}")
    return None


@app.command()
def version() -> None:
    """Print the version."""
    with _told(console(stderr=True)):
        console().print(line(eptq_onnx.__version__))


@contextmanager
def _told(messages: Console) -> Iterator[None]:
    """Turn an expected error into one sentence and exit code 2."""
    try:
        yield
    except EptqError as e:
        messages.print(line(f"error: {e}", "bold red"), soft_wrap=True)
        sys.exit(2)
