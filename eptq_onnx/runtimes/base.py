"""The interface of verifiers: what a runtime makes of a model, and how long each part takes."""

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
from eptq_onnx.numerics.types import Feeds
from eptq_onnx.runtime import source

Model: TypeAlias = ModelProto | str | os.PathLike[str]
"""A model in memory, or the path of a file."""

Timed: TypeAlias = Callable[[], float]
"""Runs a model once, and returns the seconds that this took."""

INTEGERS = frozenset({"uint8", "int8", "uint4", "int4", "uint2", "int2"})
"""Precisions of integer kernels: their inputs are quantized."""

CONVERSIONS = frozenset({"QuantizeLinear", "DequantizeLinear", "layout"})
"""Operators of a runtime that only convert a tensor: between integers and floats, or between memory
layouts."""

PROFILED = 12, 0.3
"""Fewest runs of a profile, and fewest seconds of them; the fastest run of each node counts."""

_FINE = 1e-4
"""Resolution in seconds that a clock needs to time single runs."""


@dataclass(frozen=True)
class Kernel:
    """One node of the graph that a runtime makes of a model.

    Parameters
    ----------
    node : str
        Its name in the runtime, unique.
    kernel : str
        What the runtime executes, ``QLinearConv`` for instance.
    operator : str
        The ONNX operator that this implements, ``Conv`` for instance, or one of `CONVERSIONS`; the
        runtime's own word where several operators are fused.
    precision : str
        Type that it computes in: ``float32``, ``bfloat16``, ``uint8``, ...; empty if the runtime does not
        say.
    stands_for : tuple of str
        Names of the model's nodes that it computes, without QuantizeLinear and DequantizeLinear; empty if the
        runtime does not say.
    border : str
        For a conversion, the float tensor of the model that is converted; empty if unknown.
    around : tuple of str or None
        For a QuantizeLinear, the operators that make what it quantizes, for a DequantizeLinear those that
        read the result; None if unknown.
    """

    node: str
    kernel: str
    operator: str
    precision: str
    stands_for: tuple[str, ...] = ()
    border: str = ""
    around: tuple[str, ...] | None = None

    @property
    def integer(self) -> bool:
        """Return True if it computes on integers."""
        return self.operator not in CONVERSIONS and self.precision in INTEGERS


@dataclass(frozen=True)
class NodeTime:
    """Time of one node in one run of the model, in seconds; a node inside a loop may run several times."""

    kernel: Kernel
    seconds: float


@dataclass(frozen=True)
class Port:
    """An input of a model: axes of unknown size are names or None."""

    name: str
    dtype: np.dtype[np.generic]
    shape: tuple[int | str | None, ...]


@dataclass(frozen=True)
class LoadCost:
    """What it costs to load a model in a fresh process: seconds, and the growth of the resident memory to its
    peak in bytes."""

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
        """Return all outputs by name; feeds that the model has no input for are ignored.

        Raises
        ------
        ModelError
            If the runtime cannot run the model.
        """

    @abstractmethod
    def bind(self, feeds: Feeds) -> Timed:
        """Return a function that runs the model on these feeds and returns the seconds that this took.

        They are seconds of CPU time if the model is loaded for one thread, else of the clock on the wall:
        threads that wait for each other use CPU time, too.
        """

    def fed(self, feeds: Feeds) -> Feeds:
        """Return the feeds that the model has inputs for.

        Raises
        ------
        DataError
            If one is missing.
        """
        missing = [port.name for port in self.ports if port.name not in feeds]
        if missing:
            raise DataError(
                f"the model's input {missing[0]} is not fed: there are values for {', '.join(feeds)}."
            )
        return {port.name: np.asarray(feeds[port.name]) for port in self.ports}


class Verifier(ABC):
    """A runtime that loads models and says what it makes of them; the constructor raises `InstallError`.

    What a runtime cannot do, here or at all, raises `CapabilityError`: no other runtime answers in its name.

    Attributes
    ----------
    name : str
        Name in options and reports.
    about : str
        A few words for help and documentation: what it is, and what it needs.
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
        """Return None, or in one sentence what is missing and how to install it."""

    @property
    @abstractmethod
    def version(self) -> str:
        """Return the version of the runtime."""

    @abstractmethod
    def load(self, model: Model, threads: int = 1) -> AbstractContextManager[Loaded]:
        """Load a model, as a context in which it can be run.

        Parameters
        ----------
        model : ModelProto or path
        threads : int
            Threads of one operator; 0 for one per core.

        Raises
        ------
        ModelError
            If the runtime refuses the model.
        CapabilityError
            If the runtime cannot run models here.
        """

    @abstractmethod
    def load_cost(self, path: Path, threads: int = 1) -> LoadCost:
        """Load a model file in a fresh process.

        Raises
        ------
        ModelError
            If the runtime refuses the model.
        CapabilityError
            If the runtime cannot run models here.
        """

    def run(self, model: Model, feeds: Feeds) -> Feeds:
        """Load a model and run it once; see `load` and `Loaded.run`."""
        with self.load(model) as loaded:
            return loaded.run(feeds)

    @abstractmethod
    def kernels(self, model: Model, feeds: Feeds | None = None) -> tuple[Kernel, ...]:
        """Return the nodes that the runtime executes, each with the precision that it computes in.

        Parameters
        ----------
        model : ModelProto or path
        feeds : dict of str to ndarray, optional
            Values for a runtime that has to run the model, or to know the sizes of its inputs; by default
            those of
            `eptq_onnx.runtimes.feeds.default_feeds`.

        Raises
        ------
        ModelError
            If the runtime refuses the model.
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
            If the runtime refuses the model.
        CapabilityError
            If the runtime cannot time nodes here.
        """


def fastest(times: Sequence[float], runs: int) -> float:
    """Return the time of a node in the run in which it took least.

    Profilers read the clock on the wall, and other processes have interrupted the slower runs: on a busy
    machine nearly all that take longer than a few milliseconds.

    Parameters
    ----------
    times : sequence of float
        In order of time; a node inside a loop has several in each run.
    runs : int
    """
    if len(times) % runs:
        return float(np.median(times)) * len(times) / runs
    return float(np.reshape(times, (runs, -1)).sum(axis=1).min())


def graph_of(model: Model) -> GraphProto:
    """Return the graph of a model, of a file without the weights in other files.

    Raises
    ------
    ModelError
        If the file does not exist or is no ONNX model.
    """
    return model.graph if isinstance(model, ModelProto) else read_file(Path(model)).graph


def ports_of(graph: GraphProto) -> tuple[Port, ...]:
    """Return the inputs of a graph that are no initializers.

    Raises
    ------
    ModelError
        If one is no tensor.
    """
    weights = {t.name for t in graph.initializer}
    return tuple(_port(value) for value in graph.input if value.name not in weights)


def _port(value: ValueInfoProto) -> Port:
    tensor = value.type.tensor_type
    if not tensor.elem_type:
        raise ModelError(f"the input {value.name} is no tensor, and only tensors can be fed.")
    sizes = [d.dim_value if d.HasField("dim_value") else d.dim_param or None for d in tensor.shape.dim]
    return Port(value.name, helper.tensor_dtype_to_np_dtype(tensor.elem_type), tuple(sizes))


def clock_of(threads: int) -> Callable[[], float]:
    """Return the clock for a number of threads: CPU time for one, else the wall's; see `Loaded.bind`."""
    fine = time.get_clock_info("process_time").resolution <= _FINE
    return time.process_time if threads == 1 and fine else time.perf_counter


def clock_name(threads: int) -> str:
    """Return what `clock_of` measures, in words."""
    return "CPU time" if clock_of(threads) is time.process_time else "time"


def timed(run: Callable[[], object], clock: Callable[[], float]) -> Timed:
    """Return a function that runs another and returns the seconds that this took."""

    def once() -> float:
        began = clock()
        run()
        return clock() - began

    return once


@contextmanager
def on_disk(model: Model) -> Iterator[Path]:
    """Provide the path of a model, in a temporary folder if it is in memory."""
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
