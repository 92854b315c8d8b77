"""Files of one model in several runtimes: accuracy, integer share, latency, size and load time.

    python tools/bench_runtimes.py FLOAT.onnx FILE.onnx ... --data HELD_OUT.npz --runtime openvino --threads 1

Prints one row for each runtime and file: the SQNR of the outputs as that runtime computes them, against the
float model in onnxruntime; how many of the Conv, ConvTranspose, Gemm and MatMul nodes with weights run on
integers there; the latency of the float model over that of the file, above 1 if the file is faster, with its
interval; size and load time, over those of the float model. ``--score module:function`` adds what a function
returns for ``run(inputs) -> outputs``, as for ``verify --evaluate``. The SQNR of later files says whether the
first file is better, worse or level: level if the interval of the paired difference (bootstrap over samples)
contains 0.

A runtime that only builds (tensorrt-rtx) leaves out what needs runs.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import onnx
import typer
from numpy.typing import NDArray
from rich.console import Console
from rich.table import Table

import eptq_onnx
from eptq_onnx import data, runtimes
from eptq_onnx.data.readers.function import function_named
from eptq_onnx.errors import EptqError, one_line
from eptq_onnx.graph import io
from eptq_onnx.graph.view import GraphView
from eptq_onnx.numerics.quant_math import sqnr_db
from eptq_onnx.runtime import Session
from eptq_onnx.runtimes.base import Verifier

LAYERS = frozenset(("Conv", "ConvTranspose", "Gemm", "MatMul"))
_DRAWS = 2000
"""Bootstrap samples."""


def main(
    reference: Annotated[Path, typer.Argument(metavar="FLOAT", help="The float model.")],
    files: Annotated[
        list[Path], typer.Argument(help="Quantized files; the others are compared with the first.")
    ],
    source: Annotated[Path, typer.Option("--data", help="Samples that calibration has not seen, as .npz.")],
    runtime: Annotated[list[str], typer.Option(help="Name of a runtime.")] = ["onnxruntime"],  # noqa: B006
    threads: Annotated[int, typer.Option(help="Threads of the runtime.")] = 1,
    seconds: Annotated[
        float, typer.Option(help="Seconds for the latency of each pair; 0 leaves it out.")
    ] = 5.0,
    score: Annotated[str | None, typer.Option(help="module:function that scores a model.")] = None,
) -> None:
    """Print the table."""
    model = io.load(reference)
    samples = data.read(dict(np.load(source)), model)
    parts = list(samples.batches(range(samples.count), samples.fixed_batch or 1))
    batches = [samples.take(part) for part in parts]
    session = Session(reference)
    exact = [session.run(feeds) for feeds in batches]
    table = Table(
        "runtime", "file", "score", "SQNR (dB)", "integer layers", "float / file time", "size", "load"
    )
    for name in runtime:
        verifier = runtimes.make(name)
        first: NDArray[np.float64] | None = None
        for file in files:
            own = Cells(verifier, (reference, file), threads)
            noise = own.noise(batches, exact)
            table.add_row(
                f"{name} {verifier.version}",
                file.name,
                own.score(score) if score else "",
                f"{decibel(noise.mean(0)):.2f}{compared(first, noise)}" if len(noise) else own.reason,
                own.integers(batches[0]),
                *own.costs(source, seconds),
            )
            first = noise if first is None else first
            Console(stderr=True).print(f"done: {name} {file}", highlight=False)
    Console(width=200).print(table)


class Cells:
    """The cells of one file in one runtime.

    Parameters
    ----------
    verifier : Verifier
    pair : tuple of two paths
        The float model, and the file.
    threads : int
    """

    def __init__(self, verifier: Verifier, pair: tuple[Path, Path], threads: int) -> None:
        self._verifier, self._pair, self._threads = verifier, pair, threads
        self.reason = ""
        """Why outputs are not known."""

    def noise(
        self, batches: Sequence[Mapping[str, NDArray[Any]]], exact: Sequence[Mapping[str, NDArray[Any]]]
    ) -> NDArray[np.float64]:
        """Return power and noise of each batch, of shape (n_batches, 2); empty if nothing can be run."""
        try:
            with self._verifier.load(self._pair[1], self._threads) as loaded:
                got = [loaded.run(dict(feeds)) for feeds in batches]
        except EptqError as e:
            self.reason = one_line(e)
            return np.zeros((0, 2))
        rows = []
        for truth, values in zip(exact, got, strict=True):
            # Each output counts in units of its own power.
            pairs = [(v.astype(np.float64), values[n]) for n, v in truth.items() if v.dtype.kind == "f"]
            rows.append(
                (1.0, np.mean([np.square(a - b).sum() / max(np.square(a).sum(), 1e-30) for a, b in pairs]))
            )
        return np.array(rows)

    def score(self, name: str) -> str:
        """Return what a function of the user returns."""
        try:
            with self._verifier.load(self._pair[1], self._threads) as loaded:
                evaluate: Callable[..., float] = function_named(name, "option score")
                return f"{evaluate(lambda feeds: loaded.run(dict(feeds))):.4f}"
        except EptqError as e:
            return one_line(e)

    def integers(self, feeds: Mapping[str, NDArray[Any]]) -> str:
        """Return how many layers the runtime computes on integers, of how many in the float model."""
        total = sum(1 for _ in layers(onnx.load(self._pair[0], load_external_data=False)))
        try:
            kernels = self._verifier.kernels(self._pair[1], dict(feeds))
        except EptqError as e:
            return one_line(e)
        own = [k for k in kernels if k.operator in LAYERS and "int8" in k.precision]
        return f"{len(own)}/{total}"

    def costs(self, source: Path, seconds: float) -> tuple[str, str, str]:
        """Return the cells of latency, size and load time."""
        size = f"{self._pair[1].stat().st_size / self._pair[0].stat().st_size:.3f}×"
        if not seconds or not self._verifier.measures:
            return "", size, ""
        found = eptq_onnx.bench(
            *self._pair, source, runtime=self._verifier.name, threads=self._threads, seconds=seconds
        )
        s, (a, b) = found.speed, (found.float_file, found.quantized_file)
        ratio = f"{1 / s.ratio:.2f} ({1 / s.high:.2f} to {1 / s.low:.2f})"
        return ratio, size, f"{b.load_seconds / max(a.load_seconds, 1e-9):.2f}×"


def layers(model: onnx.ModelProto) -> Iterator[onnx.NodeProto]:
    """Yield the nodes of a model that have a constant weight."""
    view = GraphView(model)
    for node in view.nodes:
        if node.op_type in LAYERS and any(view.is_constant(i) for i in node.input[:2]):
            yield node


def decibel(mean: NDArray[np.float64]) -> float:
    """Return the SQNR of mean power and noise."""
    return sqnr_db(float(mean[0]), float(mean[1]))


def compared(first: NDArray[np.float64] | None, own: NDArray[np.float64]) -> str:
    """Return whether the first file is better, level or worse than this one, in words."""
    if first is None or len(first) != len(own):
        return ""
    drawn = np.random.default_rng(0).integers(0, len(own), (_DRAWS, len(own)))
    difference = own[:, 1][drawn].mean(1) - first[:, 1][drawn].mean(1)
    low, high = np.quantile(difference, (0.025, 0.975))
    return " (first better)" if low > 0 else " (first worse)" if high < 0 else " (level)"


if __name__ == "__main__":
    typer.run(main)
