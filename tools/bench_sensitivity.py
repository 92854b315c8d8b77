"""How far the ranking of `eptq-onnx sensitivity` agrees with files in which one layer alone is quantized.

    python tools/bench_sensitivity.py --shipped digits_mobile --bits 4,8
    python tools/bench_sensitivity.py --model m.onnx --data calib.npz --seen held.npz --bits 4,8 --layers 24
    python tools/bench_sensitivity.py --model m.onnx --data calib.npz --seen held.npz --one-calibration

Of the layers, spread evenly over the ranking, each gets a file of its own (`quantize` with all other nodes
excluded), which runs on samples that nothing has seen. With ``--one-calibration`` these files have the ranges
of the ranking, which saves a calibration a layer. Prints Spearman's correlation of the noise that the
ranking foretells (the layer's weights and the activations that it reads) with the noise of these files, and
exits with 1 if it is below 0.8.
"""

from __future__ import annotations

import re
import resource
import tempfile
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer
from bench_accuracy import MODELS
from onnx import ModelProto
from rich.console import Console
from rich.table import Table
from scipy.stats import spearmanr

import eptq_onnx
from eptq_onnx import Config, Data, Sensitivity
from eptq_onnx.config import Objective, Preset
from eptq_onnx.graph.io import read_file, save
from eptq_onnx.graph.view import GraphView
from eptq_onnx.method.diagnose import part_of, readers
from eptq_onnx.method.qdq import write
from eptq_onnx.passes.base import State
from eptq_onnx.ranking import MOST_PASSES, Ranking
from eptq_onnx.runtimes import make
from eptq_onnx.runtimes.base import ports_of
from eptq_onnx.start import silent, start

LEAST = 0.8
"""Correlation below which the ranking is no good."""
FOLDER = Path("build/sensitivity")
"""Where the files are left."""


def main(  # noqa: PLR0913 - each is an option of the command
    bits: Annotated[str, typer.Option(help="Bits of weights and activations, as 4,8.")] = "4,8",
    shipped: Annotated[str, typer.Option(help="A model in models/.")] = "",
    model: Annotated[Path | None, typer.Option(help="Another model.")] = None,
    data: Annotated[Path | None, typer.Option(help="Its calibration data.")] = None,
    seen: Annotated[Path | None, typer.Option(help="Samples to compare outputs on.")] = None,
    layers: Annotated[int, typer.Option(help="Layers that get a file of their own.")] = 24,
    samples: Annotated[int, typer.Option(help="Samples that they run on.")] = 64,
    calibration: Annotated[int, typer.Option(help="Samples of the calibration data; 0 for all.")] = 0,
    one_calibration: Annotated[bool, typer.Option(help="Give all files the ranges of the ranking.")] = False,
) -> None:
    """Print the table."""
    if shipped:
        model = MODELS / f"{shipped}.onnx"
        data = MODELS / f"{shipped.partition('_')[0]}_calib.npz"
        seen = MODELS / f"{shipped.partition('_')[0]}_eval.npz"
    if model is None or data is None or seen is None:
        raise typer.BadParameter("give --shipped, or --model, --data and --seen")
    with np.load(seen) as arrays:
        ports = ports_of(read_file(model).graph)
        names = [p.name if p.name in arrays else arrays.files[k] for k, p in enumerate(ports)]
        given = {p.name: arrays[n].astype(p.dtype) for p, n in zip(ports, names, strict=True)}
    weight, activation = (int(v) for v in bits.split(","))
    config = Config(weight_bits=weight, activation_bits=activation)
    source = Data(str(data), samples=calibration or None)
    before = _seconds()
    state, found = (
        _ranked(model, source, config)
        if one_calibration
        else (None, eptq_onnx.sensitivity(model, source, config))
    )
    spent = _seconds() - before
    foretold = _by_layer(found)
    chosen = [list(foretold)[k] for k in np.unique(np.linspace(0, len(foretold) - 1, layers).astype(int))]
    table = Table("layer", "foretold", "alone", title=f"{model.name} W{weight}A{activation}")
    exact, noises = _outputs(model, given, samples), []
    for node in chosen:
        # A layer that is alone is first and last: its bits are those that it has among the others.
        own = next(p.bits for p in found.parts if p.what == "weights" and node in p.nodes)
        path = (
            _quantized(model, source, Config(bits=[f"{node}=w{own}a{activation}"]))
            if state is None
            else _written(state, node)
        )
        noises.append(_noise(exact, _outputs(path, given, samples)))
        table.add_row(node, f"{foretold[node]:.3g}", f"{noises[-1]:.3g}")
    out = Console(width=140)
    out.print(table)
    rank = float(spearmanr([foretold[n] for n in chosen], noises).statistic)
    out.print(
        f"Spearman {rank:.3f} over {len(chosen)} of {len(foretold)} layers; "
        f"{found.float_passes:.1f} float passes, {found.samples} samples a part, {len(found.parts)} parts, "
        f"{spent:.0f} CPU seconds",
        highlight=False,
    )
    raise typer.Exit(int(rank < LEAST))


def _by_layer(found: Sensitivity) -> dict[str, float]:
    """Return the noise that the ranking foretells for each layer, loudest first."""
    noises = {node: p.noise for p in found.parts if p.what == "weights" for node in p.nodes}
    for part in found.parts:
        if part.what == "activation":
            for node in noises.keys() & set(part.nodes):
                noises[node] += part.noise
    return dict(sorted(noises.items(), key=lambda item: -item[1]))


def _seconds() -> float:
    """Return the CPU time of this process."""
    used = resource.getrusage(resource.RUSAGE_SELF)
    return used.ru_utime + used.ru_stime


def _ranked(model: Path, data: Data, config: Config) -> tuple[State, Sensitivity]:
    """Return what `eptq_onnx.sensitivity` does, and the ranges that it has found."""
    fixed = {"preset": Preset.FAST, "steps": 0, "objective": Objective.INTEGERS, "timings": None}
    with tempfile.TemporaryDirectory() as folder:
        begun = start(model, data, config.model_copy(update=fixed), folder, silent)
        runner, ctx = begun.runner.part(last="ranges"), begun.ctx
        state = runner.run(begun.state, ctx)
        return state, Ranking(state, ctx).ranked(MOST_PASSES * ctx.samples.count)


def _written(state: State, node: str) -> Path:
    """Write a file in which one layer alone is quantized, on the ranges that are known."""
    plan = state.plan
    read = [name for name, nodes in readers(plan, GraphView(state.model)).items() if node in nodes]
    alone = part_of(plan, [x for x in plan.layers if x.node == node], read)
    return _saved(write(state.model, alone, state.nearest)[0])


def _quantized(model: Path, data: Data, config: Config) -> Path:
    """Write a file in which one layer alone is quantized."""
    node = config.bits[0].rpartition("=")[0]
    others = rf"re:(?!{re.escape(node)}$).*"
    options: dict[str, Any] = {
        "preset": "fast", "start": "nearest", "steps": 0, "objective": "integers", "measure_speed": False,
        "max_noise": 0, "bits": config.bits, "exclude": [others],
    }  # fmt: skip
    return _saved(eptq_onnx.quantize(model, data, Config(**options)).model)


def _saved(model: ModelProto) -> Path:
    FOLDER.mkdir(parents=True, exist_ok=True)
    save(model, FOLDER / "alone.onnx")
    return FOLDER / "alone.onnx"


def _outputs(path: Path, seen: dict[str, Any], samples: int) -> list[np.ndarray[Any, Any]]:
    """Return all values of each output of a file."""
    found: dict[str, list[np.ndarray[Any, Any]]] = {}
    with make().load(path) as model:
        for k in range(min(samples, len(next(iter(seen.values()))))):
            for name, value in model.run({n: v[k : k + 1] for n, v in seen.items()}).items():
                found.setdefault(name, []).append(value.reshape(-1))
    return [np.concatenate(values) for _, values in sorted(found.items())]


def _noise(exact: list[np.ndarray[Any, Any]], got: list[np.ndarray[Any, Any]]) -> float:
    """Return the noise of the outputs as a share of their variance, each output in units of its own."""
    return float(np.mean([np.square(v - w).mean() / v.var() for v, w in zip(exact, got, strict=True)]))


if __name__ == "__main__":
    typer.run(main)
