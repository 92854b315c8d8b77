"""What the report foretells of each file, beside what the file loses when it is scored.

    python tools/bench_verdict.py --shipped digits_mobile 8,8 4,8 4,4 2,8
    python tools/bench_verdict.py --model m.onnx --data calib.npz --score "score.py {model}" --key top1 8,8
    4,8

A row is a pair of weight and activation bits and a method of ``tools/bench_accuracy.py`` (``--methods``). A
verdict is wrong that says safe of a file that loses more than a point of the score; the exit code then is 1.
A file that loses less than a half of that and is not called safe is marked as overly careful.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from bench_accuracy import ABLATION, OURS, chosen_of, subject
from rich.console import Console
from rich.table import Table
from rich.text import Text

import eptq_onnx
from eptq_onnx import Config
from eptq_onnx.files import write_atomically
from eptq_onnx.report.verdict import Assurance

METHODS = "mse,fast"


TOLERANCE = 0.01
"""Loss of the score above which a file is not safe."""
FOLDER = Path("build/verdicts")
"""Where the files are left."""


def main(
    bits: Annotated[list[str], typer.Argument(help="Pairs of weight and activation bits, as 4,8.")],
    shipped: Annotated[str, typer.Option(help="A model in models/.")] = "",
    model: Annotated[Path | None, typer.Option(help="Another model.")] = None,
    data: Annotated[Path | None, typer.Option(help="Its calibration data.")] = None,
    score: Annotated[str, typer.Option(help="The command that scores a file.")] = "",
    key: Annotated[str, typer.Option(help="The figure in the JSON that it prints.")] = "top1",
    methods: Annotated[str, typer.Option(help="Separated by commas.")] = METHODS,
) -> None:
    """Print the table."""
    known = OURS | ABLATION
    chosen = chosen_of(methods, known)
    model, data, evaluate = subject(shipped, model, data, score, key)
    FOLDER.mkdir(parents=True, exist_ok=True)
    reference = evaluate(model)[0]
    table = Table(
        "bits",
        "method",
        "score",
        "loss",
        "verdict",
        "",
        "why",
        title=f"{model.name}, float: {reference:.4f}",
        title_justify="left",
    )
    wrong = 0
    for pair in bits:
        weight, activation = (int(v) for v in pair.split(","))
        for method in chosen:
            options = {
                **known[method],
                "weight_bits": weight,
                "activation_bits": activation,
                "measure_speed": False,
            }
            result = eptq_onnx.quantize(model, data, Config(**options))
            path = FOLDER / f"{model.stem}-w{weight}a{activation}-{method}.onnx"
            result.save(path)
            write_atomically(path.with_suffix(".json"), result.report.to_json().encode())
            verdict, found = result.report.verdict, evaluate(path)[0]
            mark = _mark(verdict.assurance, reference - found, TOLERANCE)
            wrong += mark == "WRONG"
            row = (
                f"{found:.4f}",
                f"{reference - found:+.4f}",
                verdict.assurance.value,
                mark,
                Text("; ".join(verdict.reasons)),
            )
            table.add_row(f"W{weight}A{activation}", method, *row)
            Console(stderr=True).print(
                f"W{weight}A{activation} {method}: {row[0]} {verdict.assurance.value} {mark}", highlight=False
            )
    Console(width=180).print(table)
    raise typer.Exit(int(wrong > 0))


def _mark(assurance: Assurance, loss: float, tolerance: float) -> str:
    if assurance is Assurance.SAFE:
        return "WRONG" if loss > tolerance else ""
    return "careful" if loss < tolerance / 2 else ""


if __name__ == "__main__":
    typer.run(main)
