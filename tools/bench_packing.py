"""What packed weights cost: load time, memory at load and latency, against the same file in int8.

    python tools/bench_packing.py QUANTIZED.onnx ...

Each file is quantized with ``--storage int8``; it is packed here. Both run in turn, in one thread of the
installed onnxruntime, and ratios are medians over pairs of CPU times. The optimized graphs must be the same,
and so must the outputs on random inputs, where open dimensions are 1. Memory is what a fresh process takes at
most to load the file.
"""

from __future__ import annotations

import tempfile
import time
from collections import Counter
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import onnx
import typer
from rich.console import Console
from rich.table import Table

from eptq_onnx import runtimes
from eptq_onnx.graph.packing import packed
from eptq_onnx.runtime import Session
from eptq_onnx.runtimes.loading import load_cost


def main(
    files: Annotated[list[Path], typer.Argument(help="Quantized ONNX files with weights in int8.")],
    repeats: Annotated[int, typer.Option(help="Pairs of measurements.")] = 21,
) -> None:
    """Print the table."""
    table = Table("file", "size", "load", "memory at load", "latency", "optimized graph", "outputs")
    for file in files:
        with tempfile.TemporaryDirectory() as folder:
            table.add_row(file.name, *compare(file, Path(folder), repeats))
    Console(width=180).print(table)


def compare(file: Path, folder: Path, repeats: int) -> list[str]:
    """Return the cells of one file: packed against int8."""
    other = folder / "packed.onnx"
    onnx.save(packed(onnx.load(file)), other)
    pair = (file, other)
    sessions = [Session(path, save_optimized=folder / f"{k}.onnx") for k, path in enumerate(pair)]
    graphs = [Counter(n.op_type for n in onnx.load(folder / f"{k}.onnx").graph.node) for k in range(2)]
    feeds = random_feeds(onnx.load(file))
    outputs = [session.run(feeds) for session in sessions]
    same = all(np.array_equal(outputs[0][name], outputs[1][name]) for name in outputs[0])
    peaks = [np.median([load_cost(runtimes.DEFAULT, path, 1).peak_bytes for _ in range(5)]) for path in pair]
    sizes = [path.stat().st_size for path in pair]
    return [
        f"{sizes[0]} → {sizes[1]} ({sizes[1] / sizes[0]:.3f}×)",
        in_turn([partial(Session, path) for path in pair], repeats),
        f"{peaks[0] / 1e6:.1f} → {peaks[1] / 1e6:.1f} MB ({peaks[1] / peaks[0]:.2f}×)",
        in_turn([partial(session.run, feeds) for session in sessions], 3 * repeats),
        "the same" if graphs[0] == graphs[1] else f"differs: {graphs[1] - graphs[0]} {graphs[0] - graphs[1]}",
        "the same" if same else "differ",
    ]


def in_turn(works: Sequence[Callable[[], Any]], repeats: int) -> str:
    """Return the median CPU times of two works that alternate, and the median of their ratios."""
    times = np.empty((repeats, 2))
    for row in range(repeats):
        for k in (0, 1) if row % 2 else (1, 0):
            began = time.process_time()
            works[k]()
            times[row, k] = time.process_time() - began
    first, second = 1e3 * np.median(times, axis=0)
    return f"{first:.2f} → {second:.2f} ms ({np.median(times[:, 1] / times[:, 0]):.2f}×)"


def random_feeds(model: onnx.ModelProto) -> dict[str, Any]:
    """Return normal floats, and ones of other types, in the shapes of a model's inputs."""
    rng, feeds = np.random.default_rng(0), {}
    for info in model.graph.input:
        tensor = info.type.tensor_type
        shape = [d.dim_value or 1 for d in tensor.shape.dim]
        dtype = onnx.helper.tensor_dtype_to_np_dtype(tensor.elem_type)
        feeds[info.name] = (rng.normal(size=shape) if dtype.kind == "f" else np.ones(shape)).astype(dtype)
    return feeds


if __name__ == "__main__":
    typer.run(main)
