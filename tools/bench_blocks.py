"""Weights in blocks: ours beside onnxruntime's own quantizers of weights, on any network.

    python tools/bench_blocks.py minilm.onnx --data calibration.npz --held held.npz
    python tools/bench_blocks.py smollm2.onnx --data feeds:calibration --held feeds:held --sizes 4,4,128

Data is what the command ``quantize`` takes: arrays, or a function that yields feeds. A row a method: the
noise of the outputs on samples that none has seen (for decoders, which have an output ``logits``, the
perplexity of the next token), the size of the file, and the CPU time of making it. onnxruntime's methods are
its default (nearest rounding between the extremes), HQQ (which needs PyTorch) and GPTQ, all with the package
onnx-ir; they leave lookup tables float.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated

import numpy as np
import peers
import typer
from numpy.typing import NDArray
from rich.console import Console
from rich.table import Table

import eptq_onnx
from eptq_onnx import Config, data
from eptq_onnx.data.readers import Data
from eptq_onnx.graph import io
from eptq_onnx.numerics.quant_math import sqnr_db
from eptq_onnx.numerics.types import Feeds
from eptq_onnx.runtime import Session

METHODS = ("ours without data", "ours", "default", "hqq", "gptq")


def main(
    model: Annotated[Path, typer.Argument(help="The float network.")],
    calibration: Annotated[str, typer.Option("--data", help="Samples to calibrate with.")],
    held: Annotated[str, typer.Option(help="Samples to judge on.")],
    sizes: Annotated[
        str,
        typer.Option(help="Bits of weights, bits of tables and of first and last layers, terms of a block."),
    ] = "4,4,32",
    methods: Annotated[str, typer.Option(help="Some of the methods, with commas.")] = ",".join(METHODS),
) -> None:
    """Print the table."""
    whole = io.load(model)
    perplexity = any(o.name == "logits" for o in whole.graph.output)
    score = _perplexity if perplexity else _ratio
    bits, edge, block = map(int, sizes.split(","))
    judged = list(_feeds(data.read(held, whole)))
    exact = [Session(whole).run(feeds) for feeds in judged]
    what = "perplexity" if perplexity else "SQNR (dB)"
    table = Table("method", what, "MB", "CPU seconds")
    table.add_row("float", f"{score(exact, exact, judged):.2f}", f"{model.stat().st_size / 1e6:.1f}", "")
    for method in methods.split(","):
        with tempfile.TemporaryDirectory() as folder:
            path, began = Path(folder) / "made.onnx", time.process_time()
            try:
                _made(method, model, calibration, path, (bits, edge, block))
            except Exception as e:
                # Whatever stops a method is its own answer.
                table.add_row(method, f"stops: {type(e).__name__}: {' '.join(str(e).split())[:80]}", "", "")
                continue
            seconds = time.process_time() - began
            session = Session(io.load(path, quantized=True))
            found = score(exact, [session.run(feeds) for feeds in judged], judged)
            table.add_row(method, f"{found:.2f}", f"{path.stat().st_size / 1e6:.1f}", f"{seconds:.1f}")
        Console(stderr=True).print(f"done: {method}", highlight=False)
    Console(width=120).print(table)


def _made(method: str, model: Path, calibration: str, path: Path, sizes: tuple[int, int, int]) -> None:
    """Write the file of a method; ``sizes``: bits, bits at the edges, terms of a block."""
    bits, edge, block = sizes
    if method.startswith("ours"):
        config = Config(bits=f"w{bits}a32", edge_bits=edge, block=block, preset="fast", measure_speed=False)
        given = None if method == "ours without data" else Data(calibration)
        eptq_onnx.quantize(model, given, config).save(path)
        return
    samples = data.read(calibration, io.load(model))
    peers.weights_in_blocks(method, model, samples, (bits, block), path)


def _feeds(samples: data.Samples) -> Iterator[Feeds]:
    for part in samples.batches(range(samples.count), samples.fixed_batch or 1):
        yield samples.take(part)


def _ratio(exact: list[Feeds], found: list[Feeds], judged: list[Feeds]) -> float:
    """Signal over noise of all float outputs, each in units of its own power."""
    names = [n for n, v in exact[0].items() if v.dtype.kind == "f"]
    shares = []
    for name in names:
        power = sum(float(np.square(a[name], dtype=np.float64).sum()) for a in exact)
        pairs = zip(exact, found, strict=True)
        noise = sum(float(np.square(a[name] - b[name], dtype=np.float64).sum()) for a, b in pairs)
        shares.append(noise / max(power, 1e-30))
    return sqnr_db(1.0, float(np.mean(shares)))


def _perplexity(exact: list[Feeds], found: list[Feeds], judged: list[Feeds]) -> float:
    """Perplexity of each next token."""
    losses: list[NDArray[np.float64]] = []
    for feeds, outputs in zip(judged, found, strict=True):
        logits = outputs["logits"].astype(np.float64)[:, :-1]
        logits -= logits.max(axis=-1, keepdims=True)
        wanted = feeds["input_ids"][:, 1:, None]
        own = np.take_along_axis(logits, wanted, -1)[..., 0]
        losses.append((np.log(np.exp(logits).sum(axis=-1)) - own).reshape(-1))
    return float(np.exp(np.concatenate(losses).mean()))


if __name__ == "__main__":
    typer.run(main)
