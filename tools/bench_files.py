"""Any ONNX files through the command line: what becomes integer, what stays float and why, and how true the
outputs are.

    python tools/bench_files.py FOLDER_OR_FILE ... --data FOLDER --options '--activations dynamic'

Samples of ``name.onnx`` are read from ``FOLDER/name.npz`` (one array per model input, samples along the first
axis); a file without them gets random ones of the shapes that its inputs tell, with ``--size`` for open
dimensions. A third of the samples is kept from calibration, and the outputs are compared on those. Beside it
stands onnxruntime's static quantizer at the best of its settings (min-max, percentile, entropy; uint8 or int8
activations; 7 and 8 bits), calibrated with the same samples and judged on the same others; on the graph that
ours works on where it stops, or finds nothing to do, in the file as it is. Then its dynamic quantizer at the
best of its settings. All are run sample by sample; behind each figure stand the size of the file and the time
of a run, as a share of the float model's, measured in turn.
"""

from __future__ import annotations

import json
import shlex
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import onnx
import peers
import typer
from numpy.typing import NDArray
from rich.console import Console
from rich.table import Table

from eptq_onnx import bench, data
from eptq_onnx.data.inputs import expected
from eptq_onnx.errors import EptqError
from eptq_onnx.graph import io
from eptq_onnx.graph.branches import flattened
from eptq_onnx.method.normalize import normalize
from eptq_onnx.numerics.quant_math import sqnr_db
from eptq_onnx.runtime import Session

Arrays = Mapping[str, NDArray[Any]]
_SECONDS = 3.0
"""Seconds to compare the time of two files."""


@dataclass(frozen=True)
class Outcome:
    """What became of one file."""

    seconds: float
    layers: str
    floats: str
    sqnr: str
    peer: str
    dynamic: str


def main(
    files: Annotated[list[Path], typer.Argument(help="ONNX files, and folders that are searched for them.")],
    folder: Annotated[
        Path | None, typer.Option("--data", help="Folder with a .npz of samples for each file.")
    ] = None,
    preset: Annotated[str, typer.Option(help="Preset of ours.")] = "balanced",
    more: Annotated[str, typer.Option("--options", help="More options of ours, as in '--bits w4a8'.")] = "",
    count: Annotated[int, typer.Option("--samples", help="Random samples, where no data is given.")] = 12,
    size: Annotated[int, typer.Option(help="Open dimensions of random samples.")] = 64,
    peer: Annotated[bool, typer.Option(help="Run onnxruntime's quantizers too.")] = True,
) -> None:
    """Print the table."""
    table = Table(
        "file",
        "samples",
        "seconds",
        "layers on integers",
        "stays float",
        "SQNR (dB)",
        "quantize_static (dB)",
        "quantize_dynamic (dB)",
        show_lines=True,
    )
    found = [f for path in files for f in (sorted(path.rglob("*.onnx")) if path.is_dir() else [path])]
    for file in found:
        given = folder / f"{file.stem}.npz" if folder else None
        with tempfile.TemporaryDirectory() as temporary:
            kind = "given" if given is not None and given.is_file() else "random"
            try:
                arrays = (
                    dict(np.load(given))
                    if given is not None and kind == "given"
                    else random_samples(file, count, size)
                )
                options = ["--preset", preset, *shlex.split(more)]
                outcome = run(file, arrays, options, peer, Path(temporary))
            except EptqError as e:
                table.add_row(file.name, kind, "", "told", str(e), "", "", "")
            else:
                table.add_row(
                    file.name,
                    kind,
                    f"{outcome.seconds:.0f}",
                    outcome.layers,
                    outcome.floats,
                    outcome.sqnr,
                    outcome.peer,
                    outcome.dynamic,
                )
        Console(stderr=True).print(f"done: {file}", highlight=False)
    Console(width=180).print(table)


def run(file: Path, arrays: Arrays, options: Sequence[str], with_peer: bool, folder: Path) -> Outcome:
    """Quantize one file by the command line, run the result, and let the peer do the same."""
    model = io.load(file)
    everything = data.read(arrays, model)
    batch = everything.fixed_batch or 1
    held = max(batch, everything.count // 3 // batch * batch)
    calibration = {n: a[:-held] if everything.has_samples(n) else a for n, a in arrays.items()}
    evaluation = data.read(
        {n: a[-held:] if everything.has_samples(n) else a for n, a in arrays.items()}, model
    )
    np.savez(folder / "calibration.npz", **calibration)  # type: ignore[arg-type]
    ours, report = folder / "ours.onnx", folder / "report.json"
    command = [
        "quantize",
        str(file),
        "--data",
        str(folder / "calibration.npz"),
        "-o",
        str(ours),
        "--report",
        str(report),
    ]
    began = time.perf_counter()
    done = subprocess.run(
        [sys.executable, "-m", "eptq_onnx", *command, *options],
        capture_output=True,
        text=True,
        check=False,
    )
    seconds = time.perf_counter() - began
    reference = outputs(Session(model), evaluation)
    if done.returncode:
        crashed = done.returncode != 2 or "Traceback" in done.stderr
        reason = (
            done.stderr.strip().splitlines()[-1] if done.stderr.strip() else f"exit code {done.returncode}"
        )
        layers, floats, sqnr = ("CRASHED" if crashed else "told"), reason, ""
    else:
        written = json.loads(report.read_text(encoding="utf-8"))
        layers, floats = counted(written["layers"]), reasons(written["kept_float"])
        sqnr = f"{fidelity(reference, outputs(Session(ours), evaluation))}{costs(file, ours, evaluation)}"
    static = dynamic = ""
    if with_peer:
        static = peer_fidelity(file, data.read(calibration, model), evaluation, reference, folder)
        dynamic = best_dynamic(file, evaluation, reference, folder)
    return Outcome(seconds, layers, floats, sqnr, static, dynamic)


def costs(file: Path, made: Path, evaluation: data.Samples) -> str:
    """Size of a file, and the time of a run beside the float model's."""
    first = evaluation.take(np.arange(evaluation.fixed_batch or 1))
    speed = bench(file, made, [first], seconds=_SECONDS).speed
    return f", {made.stat().st_size / 1e6:.2f} MB, {speed.ratio:.2f} of the time"


def best_dynamic(file: Path, evaluation: data.Samples, reference: list[Arrays], folder: Path) -> str:
    """Figure and name of the best setting of onnxruntime's dynamic quantizer."""
    found: list[tuple[float, str, str, Path]] = []
    stops = ""
    try:
        for setting, path in peers.quantize_dynamic(file, folder):
            try:
                got = outputs(Session(path), evaluation)
            except EptqError as e:
                # Its 8-bit convolutions need unsigned weights.
                stops = str(e)
                continue
            found.append((mean_ratio(ratio(reference, got)), fidelity(reference, got), setting, path))
    except Exception as e:
        # Whatever stops the peer is its own answer.
        stops = f"{type(e).__name__}: {e}"
    if not found:
        return f"stops: {' '.join(stops.split())[:120]}"
    _, figure, setting, path = max(found, key=lambda f: f[0])
    return f"{figure}{costs(file, path, evaluation)}, {setting}"


def counted(layers: list[dict[str, Any]]) -> str:
    """Layers by operator."""
    return ", ".join(f"{n} {op}" for op, n in sorted(Counter(x["op_type"] for x in layers).items()))


def reasons(kept: list[dict[str, Any]], most: int = 4) -> str:
    """The most frequent reasons to stay float."""
    counts = Counter((k["op_type"], k["reason"]) for k in kept)
    lines = [f"{n} {op}: {why}" for (op, why), n in counts.most_common(most)]
    left = sum(counts.values()) - sum(n for _, n in counts.most_common(most))
    return "\n".join([*lines, *([f"{left} more"] if left else [])])


def outputs(session: Session, samples: data.Samples) -> list[Arrays]:
    """Float outputs, sample by sample: ranges that are found in every run are those of one."""
    parts = samples.batches(range(samples.count), samples.fixed_batch or 1)
    return [{n: v for n, v in session.run(samples.take(p)).items() if v.dtype.kind == "f"} for p in parts]


def ratio(reference: list[Arrays], got: list[Arrays]) -> dict[str, float]:
    """SQNR of every output, in dB."""
    result = {}
    for name in reference[0]:
        power = noise = 0.0
        for a, b in zip(reference, got, strict=True):
            value = a[name].astype(np.float64)
            power += float((value**2).sum())
            # Another size is a loss of all.
            noise += float(((value - b[name]) ** 2 if b[name].shape == value.shape else value**2).sum())
        result[name] = sqnr_db(power, noise)
    return result


def mean_ratio(ratios: Mapping[str, float]) -> float:
    """One figure for all outputs: each counts in units of its own power."""
    return (
        sqnr_db(1.0, float(np.mean([10 ** (-r / 10) for r in ratios.values()]))) if ratios else float("nan")
    )


def fidelity(reference: list[Arrays], got: list[Arrays]) -> str:
    """The figure for all outputs, and each where there are several."""
    ratios = ratio(reference, got)
    each = f" ({', '.join(f'{r:.1f}' for r in ratios.values())})" if len(ratios) > 1 else ""
    return f"{mean_ratio(ratios):.2f}{each}"


def peer_fidelity(
    file: Path, calibration: data.Samples, evaluation: data.Samples, reference: list[Arrays], folder: Path
) -> str:
    """The best of onnxruntime's settings, on the file as it is, or else on the graph that ours works on."""
    told = []
    for prepared in (False, True):
        model = file
        try:
            if prepared:
                model = folder / "flat.onnx"
                onnx.save(flattened(normalize(io.load(file), 13, calibration)), model)
            found = best_setting(model, calibration, evaluation, reference, folder)
        except Exception as e:
            # Whatever stops the peer is its own answer.
            found = f"stops: {type(e).__name__}: {' '.join(str(e).split())[:120]}"
        told.append(f"on our normalized graph: {found}" if prepared else found)
        if found[0] in "-0123456789":
            break
    return "\n".join(told)


def best_setting(
    file: Path, calibration: data.Samples, evaluation: data.Samples, reference: list[Arrays], folder: Path
) -> str:
    """Figure and name of the setting with the best figure."""
    found: list[tuple[float, str, peers.Setting, Path]] = []
    for setting, path in peers.quantize_static(file, calibration, peers.ALL, folder):
        if not any(n.op_type == "QuantizeLinear" for n in onnx.load(path).graph.node):
            return "nothing quantized"
        got = outputs(Session(path), evaluation)
        found.append((mean_ratio(ratio(reference, got)), fidelity(reference, got), setting, path))
    _, figure, setting, path = max(found, key=lambda f: f[0])
    return f"{figure}{costs(file, path, evaluation)}, {setting}"


def random_samples(file: Path, count: int, size: int) -> dict[str, NDArray[Any]]:
    """Normal floats, small whole numbers and true flags, of the shapes that the model's inputs tell."""
    rng = np.random.default_rng(0)
    arrays = {}
    for name, (shape, dtype) in expected(io.load(file), count, size).items():
        arrays[name] = (
            rng.normal(size=shape).astype(dtype)
            if dtype.kind == "f"
            else rng.integers(0, 2, shape).astype(dtype)
        )
    return arrays


if __name__ == "__main__":
    typer.run(main)
