"""Compare two files in a runtime: latency, operator times, load time, memory and size."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np

from eptq_onnx.errors import CapabilityError
from eptq_onnx.graph.external import files_of
from eptq_onnx.outcome import Pace, Speed
from eptq_onnx.runtimes.base import LoadCost, Verifier, clock_name
from eptq_onnx.runtimes.feeds import Inputs
from eptq_onnx.runtimes.speed import Effort, by_operator, latency

_LOADS = 5
"""Number of times each file is loaded."""
_PAIRS = 400
"""Maximum number of pairs of measurements."""


@dataclass(frozen=True)
class FileCost:
    """Size of a file, and the time and memory to load it.

    Parameters
    ----------
    path : str
    bytes : int
        Size, including external data.
    load_seconds : float
        Median time to load it in a fresh process.
    load_range : tuple of two floats
        Minimum and maximum of these times.
    load_memory : int
        Median peak growth of resident memory during loading, in bytes.
    """

    path: str
    bytes: int
    load_seconds: float
    load_range: tuple[float, float]
    load_memory: int


@dataclass(frozen=True)
class Bench:
    """Measurements of two files of one model, taken in turn in a runtime.

    Parameters
    ----------
    runtime, version : str
    threads : int
        0 for one per core.
    clock : str
        What the seconds measure: ``CPU time`` with one thread, else ``time`` (wall-clock).
    shapes : dict of str to str
        Shape of each input.
    notes : tuple of str
        Defaults that were chosen for the user, such as synthetic inputs.
    speed : Speed
        Latency of one run, and the time of each kind of operator.
    float_file, quantized_file : FileCost
    """

    runtime: str
    version: str
    threads: int
    clock: str
    shapes: dict[str, str]
    notes: tuple[str, ...]
    speed: Speed
    float_file: FileCost
    quantized_file: FileCost

    @property
    def slower(self) -> bool:
        """Return True if the quantized model is slower: the whole interval of the ratio lies above 1.05."""
        return self.speed.pace is Pace.SLOWER

    def to_json(self) -> str:
        """Return all measurements as JSON, with the verdict under the key ``slower``."""
        return json.dumps({**asdict(self), "slower": self.slower}, indent=2)


def effort_of(seconds: float) -> Effort:
    """Return an effort that uses all of the seconds, even if the result is clear earlier."""
    return Effort(
        longest_run=seconds,
        seconds=seconds,
        pairs=_PAIRS,
        decided=False,
        advice=": allow more with --seconds.",
    )


def loading(verifier: Verifier, pair: tuple[Path, Path], threads: int) -> tuple[FileCost, FileCost]:
    """Load both files in turn, each time in a fresh process.

    Raises
    ------
    ModelError
        If the runtime rejects a file.
    """
    costs: tuple[list[LoadCost], list[LoadCost]] = ([], [])
    for turn in range(_LOADS):
        # The order alternates, as it does for timed runs.
        for k in (0, 1) if turn % 2 == 0 else (1, 0):
            costs[k].append(verifier.load_cost(pair[k], threads))
    return _file(pair[0], costs[0]), _file(pair[1], costs[1])


def _file(path: Path, costs: list[LoadCost]) -> FileCost:
    seconds = [cost.seconds for cost in costs]
    files = {file.resolve() for file in (path, *(file for _, file in files_of(path)))}
    return FileCost(
        path=str(path),
        bytes=sum(file.stat().st_size for file in files),
        load_seconds=float(np.median(seconds)),
        load_range=(min(seconds), max(seconds)),
        load_memory=int(np.median([cost.peak_bytes for cost in costs])),
    )


def bench(
    verifier: Verifier,
    pair: tuple[Path, Path],
    inputs: Inputs,
    threads: int,
    effort: Effort,
) -> Bench:
    """Measure two files.

    Parameters
    ----------
    verifier : Verifier
    pair : tuple of two paths
        The float model and the quantized one.
    inputs : Inputs
    threads : int
        0 for one per core.
    effort : Effort

    Raises
    ------
    CapabilityError
        If the runtime cannot run models here.
    ModelError
        If the runtime rejects a model, or one run takes longer than the effort allows.
    """
    if not verifier.measures:
        raise CapabilityError(f"{verifier.name} cannot time models here: choose another runtime.")
    speed = latency(verifier, pair, inputs.feeds, threads, effort)
    speed = by_operator(verifier, pair, inputs.feeds, speed, threads)
    files = loading(verifier, pair, threads)
    return Bench(
        runtime=verifier.name,
        version=verifier.version,
        threads=threads,
        clock=clock_name(threads),
        shapes=inputs.shapes,
        notes=inputs.notes,
        speed=replace(speed, samples=inputs.samples),
        float_file=files[0],
        quantized_file=files[1],
    )
