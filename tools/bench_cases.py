"""Small models after bug reports, quantized without options, against the figures that they must reach.

``python tools/bench_cases.py FOLDER [NAME...]``: FOLDER has scripts ``NAME.py``, which write a model,
calibration data and evaluation data, and a README.md whose table says what each case must reach. Prints the
signal-to-noise ratio of the worst output (or of the named one) on the evaluation data, run by run; exit code
1 if one is short.
"""

from __future__ import annotations

import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import numpy as np
import typer
from numpy.typing import NDArray
from rich.console import Console
from rich.table import Table

import eptq_onnx
from eptq_onnx import Config, EptqError
from eptq_onnx.config import Preset
from eptq_onnx.numerics.types import Feeds
from eptq_onnx.runtime import Session

_PRESETS = ("fast", "balanced")


@dataclass(frozen=True)
class Goal:
    """What a case must reach.

    Parameters
    ----------
    least : float
        In dB.
    output : str
        The output that counts; empty for the worst.
    centred : bool
        True if the signal is the spread about the mean over samples.
    """

    least: float
    output: str
    centred: bool


def goals(readme: str) -> dict[str, Goal]:
    """The rows of the table: case, figures of old, least."""
    found = {}
    for row in readme.splitlines():
        cells = [c.strip() for c in row.strip().strip("|").split("|")]
        number = re.match(r"\d+(\.\d+)?", cells[2]) if row.startswith("|") and len(cells) >= 3 else None
        if number is not None:
            output = re.search(r"output `(\w+)`", cells[0])
            name = re.match(r"\w+", cells[0])
            if name is not None:
                found[name[0]] = Goal(
                    float(number[0]), output[1] if output else "", "about the mean" in cells[2]
                )
    return found


def runs(folder: Path, names: tuple[str, ...]) -> Iterator[Feeds]:
    """The evaluation data: a folder of feeds, or arrays with samples along the first axis, one a run."""
    if (folder / "eval").is_dir():
        yield from (dict(np.load(file)) for file in sorted((folder / "eval").glob("*.npz")))
        return
    arrays = dict(np.load(folder / "eval.npz"))
    count = max(len(v) for v in arrays.values() if v.ndim)
    for k in range(count):
        yield {n: v[k : k + 1] if v.ndim and len(v) == count else v for n, v in arrays.items() if n in names}


def ratio(original: Path, quantized: Path, folder: Path, goal: Goal) -> float:
    """Signal-to-noise ratio in dB of the worst output that counts."""
    exact, other = Session(original), Session(quantized)
    pairs: dict[str, list[tuple[NDArray[np.float64], NDArray[np.float64]]]] = {}
    for feeds in runs(folder, exact.inputs):
        ours, theirs = exact.run(feeds), other.run(feeds)
        for name, value in ours.items():
            if (
                isinstance(value, np.ndarray)
                and value.dtype.kind == "f"
                and value.size
                and goal.output in ("", name)
            ):
                pairs.setdefault(name, []).append(
                    (value.astype(np.float64), np.asarray(theirs[name], np.float64))
                )
    worst = np.inf
    for parts in pairs.values():
        mean = np.mean([x for x, _ in parts], axis=0) if goal.centred else 0.0
        signal = sum(float(np.square(x - mean).sum()) for x, _ in parts)
        noise = sum(float(np.square(x - y).sum()) for x, y in parts)
        worst = min(worst, 10 * np.log10(signal / noise) if noise else 200.0)
    return float(worst)


def main(
    folder: Annotated[Path, typer.Argument(exists=True, file_okay=False)],
    names: Annotated[list[str] | None, typer.Argument()] = None,
) -> None:
    """See the module."""
    wanted = goals((folder / "README.md").read_text())
    table, short = Table("case", "data", "preset", "dB", "least", "verdict or error"), 0
    for name in names or wanted:
        with tempfile.TemporaryDirectory() as work:
            here = Path(work)
            subprocess.run(
                [sys.executable, str(folder / f"{name}.py"), work], check=True, stdout=subprocess.DEVNULL
            )
            for data in (d for d in ("data.npz", "data", "feeds") if (here / d).exists()):
                for preset in _PRESETS:
                    figure, said = -np.inf, ""
                    try:
                        result = eptq_onnx.quantize(
                            here / "model.onnx",
                            here / data,
                            Config(preset=Preset(preset), measure_speed=False),
                        )
                        result.save(here / "q.onnx")
                        figure, said = (
                            ratio(here / "model.onnx", here / "q.onnx", here, wanted[name]),
                            str(result.report.verdict),
                        )
                    except EptqError as e:
                        said = str(e)
                    reached = figure >= wanted[name].least
                    short += not reached
                    mark = "" if reached else " SHORT"
                    table.add_row(
                        name, data, preset, f"{figure:.1f}{mark}", f"{wanted[name].least:g}", said[:100]
                    )
                    print(
                        f"{name} {data} {preset}: {figure:.1f} dB, at least {wanted[name].least:g}{mark}",
                        flush=True,
                    )
    Console().print(table)
    raise typer.Exit(int(short > 0))


if __name__ == "__main__":
    typer.run(main)
