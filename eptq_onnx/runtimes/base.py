"""The interface of verifiers: how a runtime executes a model, and how long each part takes."""

from __future__ import annotations

import os
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import ClassVar, TypeAlias

import numpy as np
from onnx import GraphProto, ModelProto, ValueInfoProto, helper

from eptq_onnx import scratch
from eptq_onnx.errors import DataError, InstallError, ModelError
from eptq_onnx.graph.io import read_file
from eptq_onnx.graph.view import QUANTIZERS
from eptq_onnx.numerics.formats import FLOATS
from eptq_onnx.numerics.types import Feeds
from eptq_onnx.runtime import source

Model: TypeAlias = ModelProto | str | os.PathLike[str]
"""A model in memory, or the path of a file."""

Timed: TypeAlias = Callable[[], float]
"""Runs a model once and returns the seconds it took."""

QUANTIZED = frozenset({"uint8", "int8", "uint4", "int4", "uint2", "int2", *FLOATS})
"""Precisions of kernels whose inputs are quantized."""

CONVERSIONS = frozenset({*QUANTIZERS, "layout"})
"""Operators that only convert a tensor, between integers and floats or between memory layouts."""

PROFILED = 12, 0.3
"""Minimum number of runs in a profile, and their minimum total seconds; each node's fastest run counts."""

_FINE = 1e-4
"""Coarsest resolution, in seconds, of a clock that times single runs."""


@dataclass(frozen=True)
class Kernel:
    """One node of a runtime's optimized graph.

    Parameters
    ----------
    node : str
        Unique name in the runtime.
    kernel : str
        What the runtime executes, such as ``QLinearConv``.
    operator : str
        The ONNX operator that the kernel implements, such as ``Conv``, or one of `CONVERSIONS`; the
        runtime's own term if several operators are fused.
    precision : str
        Type of the computation, such as ``float32``, ``bfloat16`` or ``uint8``; empty if the runtime does not
        report it.
    stands_for : tuple of str
        Names of the model's nodes that it computes, except QuantizeLinear and DequantizeLinear; empty if the
        runtime does not report them.
    border : str
        For a conversion, the model's float tensor that it converts; empty if unknown.
    around : tuple of str or None
        For a QuantizeLinear, the operators that produce its input; for a DequantizeLinear, the operators that
        read its output; None if unknown.
    """

    node: str
    kernel: str
    operator: str
    precision: str
    stands_for: tuple[str, ...] = ()
    border: str = ""
    around: tuple[str, ...] | None = None

    @property
    def quantized(self) -> bool:
        """Return True for a kernel that computes with quantized inputs: integers or 8-bit floats."""
        return self.operator not in CONVERSIONS and self.precision in QUANTIZED


@dataclass(frozen=True)
class NodeTime:
    """Time of one node in one run of the model, in seconds; a node inside a loop may run several times."""

    kernel: Kernel
    seconds: float


@dataclass(frozen=True)
class Port:
    """An input of a model. Axes of unknown size are names or None."""

    name: str
    dtype: np.dtype[np.generic]
    shape: tuple[int | str | None, ...]


@dataclass(frozen=True)
class LoadCost:
    """Cost of loading a model in a fresh process: seconds, and peak growth of resident memory in bytes."""

    seconds: float
    peak_bytes: int


class Loaded(ABC):
    """A model that a runtime has loaded.

    Parameters
    ----------
    model : ModelProto or path
    """

    def __init__(self, model: Model) -> None:
        self._model = model

    @cached_property
    def ports(self) -> tuple[Port, ...]:
        """Return the inputs that have to be fed."""
        return ports_of(graph_of(self._model))

    @abstractmethod
    def run(self, feeds: Feeds) -> Feeds:
        """Return all outputs by name. Feeds without a matching input are ignored.

        Raises
        ------
        ModelError
            If the runtime cannot run the model.
        """

    @abstractmethod
    def bind(self, feeds: Feeds) -> Timed:
        """Return a function that runs the model on these feeds and returns the seconds it took.

        It measures CPU time if the model is loaded for one thread, and wall-clock time otherwise, because
        threads that wait for each other use CPU time too.
        """

    def fed(self, feeds: Feeds) -> Feeds:
        """Return the feeds that match inputs of the model.

        Raises
        ------
        DataError
            If an input has no feed.
        """
        missing = [port.name for port in self.ports if port.name not in feeds]
        if missing:
            raise DataError(
                f"the model's input {missing[0]} has no values: they are given for {', '.join(feeds)}."
            )
        return {port.name: np.asarray(feeds[port.name]) for port in self.ports}


class Verifier(ABC):
    """A runtime that loads models and reports how it executes them.

    The constructor raises `InstallError` if the runtime is not available. A method that the runtime does not
    support raises `CapabilityError`; another runtime never takes its place.

    Attributes
    ----------
    name : str
        Name in options and reports.
    about : str
        Short description for help and documentation: what it is and what it needs.
    measures : bool
        True if it can run and time models.
    """

    name: ClassVar[str]
    about: ClassVar[str]
    measures: ClassVar[bool] = True

    def __init__(self) -> None:
        if (reason := self.available()) is not None:
            raise InstallError(reason)

    @classmethod
    @abstractmethod
    def available(cls) -> str | None:
        """Return None if the runtime is available, else a sentence that says how to install it."""

    @property
    @abstractmethod
    def version(self) -> str:
        """Return the version of the runtime."""

    @abstractmethod
    def load(self, model: Model, threads: int = 1) -> AbstractContextManager[Loaded]:
        """Load a model in a context manager.

        Parameters
        ----------
        model : ModelProto or path
        threads : int
            Threads of one operator; 0 for one per core.

        Raises
        ------
        ModelError
            If the runtime rejects the model.
        CapabilityError
            If the runtime cannot run models here.
        """

    @abstractmethod
    def load_cost(self, path: Path, threads: int = 1) -> LoadCost:
        """Return the cost of loading a model file in a fresh process.

        Raises
        ------
        ModelError
            If the runtime rejects the model.
        CapabilityError
            If the runtime cannot run models here.
        """

    def run(self, model: Model, feeds: Feeds) -> Feeds:
        """Load a model and run it once; see `load` and `Loaded.run`."""
        with self.load(model) as loaded:
            return loaded.run(feeds)

    @abstractmethod
    def kernels(self, model: Model, feeds: Feeds | None = None) -> tuple[Kernel, ...]:
        """Return the nodes that the runtime executes, each with its precision.

        Parameters
        ----------
        model : ModelProto or path
        feeds : dict of str to ndarray, optional
            Inputs for a runtime that has to run the model or to know its input sizes; by default those of
            `eptq_onnx.runtimes.feeds.default_feeds`.

        Raises
        ------
        ModelError
            If the runtime rejects the model.
        """

    @abstractmethod
    def profile(self, model: Model, feeds: Feeds, threads: int = 1) -> tuple[NodeTime, ...]:
        """Return the time of each node in one run, from repeated runs; see `fastest`.

        Parameters
        ----------
        model : ModelProto or path
        feeds : dict of str to ndarray
        threads : int
            Threads of one operator; 0 for one per core.

        Raises
        ------
        ModelError
            If the runtime rejects the model.
        CapabilityError
            If the runtime cannot time nodes here.
        """


def repeated(run: Callable[[], object]) -> int:
    """Run a model as often as a profile needs, and return the number of runs."""
    count, began = 0, time.perf_counter()
    while count < PROFILED[0] or time.perf_counter() - began < PROFILED[1]:
        run()
        count += 1
    return count


def fastest(times: Sequence[float], runs: int) -> float:
    """Return the time of a node in its fastest run.

    Profilers measure wall-clock time, so slower runs include interruptions by other processes. On a busy
    machine these hit nearly every run that takes more than a few milliseconds.

    Parameters
    ----------
    times : sequence of float
        In chronological order; a node inside a loop has several times per run.
    runs : int
        Number of runs. If it does not divide the number of times, the median time counts instead.
    """
    if len(times) % runs:
        return float(np.median(times)) * len(times) / runs
    return float(np.reshape(times, (runs, -1)).sum(axis=1).min())


def graph_of(model: Model) -> GraphProto:
    """Return the graph of a model; that of a file comes without external data.

    Raises
    ------
    ModelError
        If the file does not exist or is not an ONNX model.
    """
    return model.graph if isinstance(model, ModelProto) else read_file(Path(model)).graph


def ports_of(graph: GraphProto) -> tuple[Port, ...]:
    """Return the inputs of a graph that are not initializers.

    Raises
    ------
    ModelError
        If one is not a tensor.
    """
    weights = {t.name for t in graph.initializer}
    return tuple(_port(value) for value in graph.input if value.name not in weights)


def _port(value: ValueInfoProto) -> Port:
    tensor = value.type.tensor_type
    if not tensor.elem_type:
        raise ModelError(f"the input {value.name} is not a tensor, and only tensors are supported.")
    sizes = [d.dim_value if d.HasField("dim_value") else d.dim_param or None for d in tensor.shape.dim]
    return Port(value.name, helper.tensor_dtype_to_np_dtype(tensor.elem_type), tuple(sizes))


def clock_of(threads: int) -> Callable[[], float]:
    """Return the clock for a number of threads: CPU time for one, else wall-clock time; see `Loaded.bind`."""
    fine = time.get_clock_info("process_time").resolution <= _FINE
    return time.process_time if threads == 1 and fine else time.perf_counter


def clock_name(threads: int) -> str:
    """Return the name of what `clock_of` measures."""
    return "CPU time" if clock_of(threads) is time.process_time else "time"


def timed(run: Callable[[], object], clock: Callable[[], float]) -> Timed:
    """Return a function that calls another and returns the seconds it took."""

    def once() -> float:
        began = clock()
        run()
        return clock() - began

    return once


@contextmanager
def on_disk(model: Model) -> Iterator[Path]:
    """Provide the path of a model; a model in memory is written to a temporary folder."""
    if not isinstance(model, ModelProto):
        yield Path(model)
        return
    with scratch.folder() as folder, source(model) as given:
        if isinstance(given, str):
            yield Path(given)
        else:
            path = Path(folder) / "model.onnx"
            path.write_bytes(given)
            yield path
