"""Compare two models on samples: their outputs, the layers where they part, and the worst samples."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from onnx import ModelProto, inliner

from eptq_onnx.data import Candidates, Samples, load, spread
from eptq_onnx.data.placing import Placed
from eptq_onnx.data.readers import Source
from eptq_onnx.errors import DataError, EptqError, ModelError
from eptq_onnx.execute.parting import TensorNoise, first_below, parting
from eptq_onnx.graph import io
from eptq_onnx.graph.infer import infer_shapes
from eptq_onnx.graph.meaning import meanings
from eptq_onnx.graph.narrow import emulated
from eptq_onnx.graph.outputs import numbers, readable
from eptq_onnx.graph.replay import RANDOM
from eptq_onnx.method.normalize import name_nodes
from eptq_onnx.numerics.quant_math import sqnr_db
from eptq_onnx.numerics.statistics import Comparison, Meaning, OutputStatistics
from eptq_onnx.numerics.types import Feeds
from eptq_onnx.parallel import ordered_map
from eptq_onnx.proto.bodies import all_nodes
from eptq_onnx.report.plain import plain
from eptq_onnx.runtime import Session
from eptq_onnx.runtimes import make
from eptq_onnx.runtimes.base import Port, ports_of

SAMPLES = 128
"""Samples on which outputs are compared, at most."""
LEAST_DB = 20.0
"""Ratio below which two tensors have parted."""
_WALKED = 16
"""Samples on which layers are compared, at most."""
_WORST = 5
"""Samples that are named."""


@dataclass(frozen=True)
class OutputDifference:
    """How an output of the second model differs from the first model's.

    Parameters
    ----------
    statistics : OutputStatistics
    cosine : float
        Cosine of the angle between all values of both.
    largest_difference : float
        Largest absolute difference of two values.
    """

    statistics: OutputStatistics
    cosine: float
    largest_difference: float

    @property
    def agreement(self) -> float | None:
        """Return the share of positions at which the same channel is largest; None if it is not scores."""
        return 1 - self.statistics.disagreement if self.statistics.decisions else None


@dataclass(frozen=True)
class SampleDifference:
    """A sample on which the models differ much.

    Parameters
    ----------
    name : str
        Its file; of a text its number and how it begins; else its number in the data, counted from 0.
    output : str
        The output that differs most.
    sqnr_db : float
    """

    name: str
    output: str
    sqnr_db: float


@dataclass(frozen=True)
class Compared:
    """Two models side by side. The first is the reference.

    Parameters
    ----------
    first, second : str
    computed_by : str
    samples : int
        Samples on which outputs were compared.
    given : int
        Samples of the data.
    outputs : dict of str to OutputDifference
    layers : tuple of TensorNoise
        The tensors that both models compute under one name, in order.
    layer_samples : int
        Samples on which they were compared.
    least_db : float
        Ratio below which tensors have parted.
    worst : tuple of SampleDifference
        The samples on which the models differ most, worst first.
    notes : tuple of str
    """

    first: str
    second: str
    computed_by: str
    samples: int
    given: int
    outputs: Mapping[str, OutputDifference]
    layers: tuple[TensorNoise, ...]
    layer_samples: int
    least_db: float
    worst: tuple[SampleDifference, ...]
    notes: tuple[str, ...] = ()

    @property
    def parting(self) -> TensorNoise | None:
        """Return the first tensor that keeps less than ``least_db``; None if all keep more."""
        return first_below(self.layers, self.least_db)

    def to_json(self) -> str:
        """Return everything as JSON; infinite ratios are null."""
        found = asdict(self)
        for name, output in self.outputs.items():
            found["outputs"][name]["agreement"] = output.agreement
        found["parting"] = asdict(self.parting) if self.parting is not None else None
        return json.dumps(plain(found), indent=2)


@dataclass(frozen=True)
class Sample:
    """What a model takes in one run, and what it is called.

    Parameters
    ----------
    name : str
        Its file; of a text its number and how it begins; else its number in the data, counted from 0.
    feeds : dict of str to ndarray
        Input to value, with the axes that the model takes.
    placed : Placed or None
        Where a picture lies in the input, from which points and boxes go back to the picture; None for what
        is no picture of a folder.
    """

    name: str
    feeds: Feeds
    placed: Placed | None = None


@dataclass
class _Difference:
    """Collects one output of both models."""

    statistics: Comparison
    squares: NDArray[np.float64] = field(default_factory=lambda: np.zeros(3))
    largest: float = 0.0
    ratios: list[float] = field(default_factory=list)

    def add(self, reference: NDArray[np.float64], other: NDArray[np.float64]) -> None:
        self.statistics.add(reference, other)
        finite = np.isfinite(reference)
        power = float(np.square(reference[finite]).sum())
        if reference.shape != other.shape or not np.isfinite(other[finite]).all():
            self.ratios.append(sqnr_db(power, power))
            return
        a, b = reference[finite], other[finite]
        self.ratios.append(sqnr_db(power, float(np.square(a - b).sum())))
        self.squares += (float(a @ b), power, float(b @ b))
        self.largest = max(self.largest, float(np.abs(a - b).max(initial=0.0)))

    def result(self) -> OutputDifference:
        product, first, second = self.squares
        length = float(np.sqrt(first * second))
        cosine = float(product) / length if length else 1.0
        return OutputDifference(self.statistics.result(), cosine, self.largest)


def compare(
    pair: tuple[Path, Path], data: Source, folder: str, samples: int = SAMPLES, least_db: float = LEAST_DB
) -> Compared:
    """Compare two models; see `eptq_onnx.compare`.

    Parameters
    ----------
    pair : tuple of two paths
    data : Source
    folder : str
        Temporary folder for the weights of large models.
    samples : int
        Most samples to compare outputs on.
    least_db : float
        Ratio below which two tensors have parted.

    Raises
    ------
    EptqError
        If a file or the data cannot be used.
    """
    first, second = (_opened(path, folder) for path in pair)
    found = load(data, first)
    chosen = _that_runs(found, first)
    size = chosen.fixed_batch or 1
    parts = list(chosen.batches(spread(chosen.count, samples), size))
    ports = ports_of(second.graph)
    _check_inputs(pair, ports_of(first.graph), ports)
    differences, worst = _outputs(pair, (first, second), chosen, parts)
    walked = [chosen.take(part) for part in parts[: max(1, _WALKED // size)]]
    layers, left_out = parting(
        infer_shapes(first), infer_shapes(second), (walked, [_cast(feeds, ports) for feeds in walked])
    )
    notes = [*found.origin.told]
    if left_out:
        notes.append(
            f"{len(left_out)} tensors hold other values by design, for what follows from them agrees "
            f"(mixed channels): {', '.join(left_out[:5])}{', ...' if len(left_out) > 5 else ''}"
        )
    if not layers:
        notes.append("no tensor between inputs and outputs has one name in both, so no layers are compared")
    ort = make()
    return Compared(
        first=str(pair[0]),
        second=str(pair[1]),
        computed_by=f"{ort.name} {ort.version}, with the operators as ONNX defines them",
        samples=sum(map(len, parts)),
        given=chosen.count,
        outputs={name: difference.result() for name, difference in differences.items()},
        layers=layers,
        layer_samples=min(sum(map(len, parts)), size * len(walked)),
        least_db=least_db,
        worst=tuple(
            SampleDifference(found.name_of(int(chosen.numbers(parts[k])[0])), output, round(ratio, 3))
            for ratio, output, k in worst
        ),
        notes=tuple(notes),
    )


def samples_of(model: ModelProto, data: Source) -> Iterator[Sample]:
    """Yield samples as a model takes them; see `eptq_onnx.samples`."""
    found = load(data, model)
    chosen = found.samples[0]
    if (chosen.fixed_batch or 1) != 1:
        raise DataError(
            f"the model takes {chosen.fixed_batch} samples a run, which have no single name: read them with "
            "numpy or your framework."
        )
    for k in range(chosen.count):
        number = int(chosen.numbers([k])[0])
        yield Sample(found.name_of(number), chosen.take([k]), found.placed_of(number))


def _opened(path: Path, folder: str) -> ModelProto:
    """Read a model for walking: functions inlined, nodes named."""
    model = io.load(path, folder, quantized=True)
    drawing = next((n for n in all_nodes(model.graph) if n.op_type in RANDOM), None)
    if drawing is not None:
        raise ModelError(
            f"{path} draws random numbers (node {drawing.name or drawing.output[0]}), so its outputs cannot "
            "be compared with another file's."
        )
    model = inliner.inline_local_functions(model) if model.functions else model
    model = emulated(model)
    name_nodes(model)
    return model


def _that_runs(found: Candidates, model: ModelProto) -> Samples:
    """Return the first interpretation of the data with which the model runs."""
    if len(found.samples) == 1:
        return found.samples[0]
    session = Session(model, integers=False)
    first: EptqError | None = None
    for samples in found.samples:
        part = next(samples.parts(range(samples.count), samples.fixed_batch or 1), None)
        try:
            if part is not None:
                session.run(session.taken(samples.take(part)))
                return samples
        except ModelError as e:
            first = first or e
    raise first or DataError("the data has fewer samples than one run needs: give more.")


def _check_inputs(pair: tuple[Path, Path], ports: Sequence[Port], others: Sequence[Port]) -> None:
    names, second = ([p.name for p in group] for group in (ports, others))
    if set(names) != set(second):
        raise ModelError(
            f"{pair[1]} has the inputs {', '.join(second) or 'none'}, {pair[0]} has "
            f"{', '.join(names) or 'none'}: give two models with the same inputs."
        )


def _cast(feeds: Feeds, ports: Sequence[Port]) -> Feeds:
    """Return feeds in the types of another model's inputs."""
    return {p.name: np.asarray(feeds[p.name]).astype(p.dtype) for p in ports}


def _outputs(
    pair: tuple[Path, Path],
    models: tuple[ModelProto, ModelProto],
    samples: Samples,
    parts: Sequence[NDArray[np.int64]],
) -> tuple[dict[str, _Difference], list[tuple[float, str, int]]]:
    """Compare the outputs, and return the worst runs: ratio, output, place in ``parts``."""
    runs = [_runs(model, samples, parts) for model in models]
    found: dict[str, _Difference] = {}
    for reference, other in zip(*runs, strict=True):
        if not found:
            missing = [name for name in reference if name not in other]
            if len(missing) == len(reference):
                raise ModelError(
                    f"{pair[1]} has no floating-point output of {pair[0]} ({', '.join(missing) or 'none'}): "
                    "give two versions of one model."
                )
            known = meanings(infer_shapes(models[0]))
            found = {
                name: _Difference(Comparison(known.get(name, Meaning.SCORES)))
                for name in reference
                if name in other
            }
        for name, difference in found.items():
            difference.add(reference[name], other[name])
    ranked = [min((d.ratios[k], name, k) for name, d in found.items()) for k in range(len(parts)) if found]
    return found, [row for row in sorted(ranked) if np.isfinite(row[0])][:_WORST]


def _runs(
    model: ModelProto, samples: Samples, parts: Sequence[NDArray[np.int64]]
) -> Iterator[Mapping[str, NDArray[np.float64]]]:
    """Yield the floating-point outputs of each run."""
    ports = ports_of(model.graph)
    shown, names = readable(infer_shapes(model))
    session = Session(shown, integers=False)

    def run(part: NDArray[np.int64]) -> dict[str, NDArray[Any]]:
        values = session.run(_cast(samples.take(part), ports))
        return {name: numbers(values[source]) for name, source in names.items()}

    return ordered_map(run, parts)
