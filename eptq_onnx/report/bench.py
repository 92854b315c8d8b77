"""The console report of a comparison of two files."""

from __future__ import annotations

from rich.console import Console

from eptq_onnx.report.console import line
from eptq_onnx.report.plain import size_text
from eptq_onnx.report.sheet import Sheet, for_console
from eptq_onnx.report.speed import in_words, operator_sheet, time_text
from eptq_onnx.runtimes.bench import Bench, FileCost


def print_bench(found: Bench, console: Console) -> None:
    """Print a measurement: the verdict, both files side by side, operators, notes."""
    style = "bold red" if found.slower else "bold"
    console.print(line(in_words(found.speed), style), soft_wrap=True)
    threads = {0: "one thread per core", 1: "1 thread"}.get(found.threads, f"{found.threads} threads")
    shapes = ", ".join(f"{name} {shape}" for name, shape in found.shapes.items())
    console.print(
        line(f"{found.runtime} {found.version}, {threads}, {found.clock}, inputs: {shapes}"), soft_wrap=True
    )
    console.print(for_console(_files(found)))
    if found.speed.operators:
        console.print(for_console(operator_sheet(found.speed, found.runtime)))
    for note in found.notes:
        console.print(line(f"note: {note}"), soft_wrap=True)


def _files(found: Bench) -> Sheet:
    both, speed = (found.float_file, found.quantized_file), found.speed
    rows = (
        ("latency", time_text(speed.float_seconds), time_text(speed.quantized_seconds)),
        ("load", *(_load(file) for file in both)),
        ("memory at load", *(size_text(file.load_memory) for file in both)),
        ("size", *(size_text(file.bytes) for file in both)),
    )
    return Sheet("Both files", ("", "float", "quantized"), rows)


def _load(file: FileCost) -> str:
    return f"{time_text(file.load_seconds)} ({' to '.join(time_text(s) for s in file.load_range)})"
