"""Score models with a function of the user's own, in the runtime that a target names."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray
from onnx import ModelProto, TensorProto, ValueInfoProto

from eptq_onnx import runtimes
from eptq_onnx.data.readers.function import failure, function_named
from eptq_onnx.errors import CapabilityError, ConfigError, DataError, EptqError
from eptq_onnx.graph import io
from eptq_onnx.numerics.types import Feeds
from eptq_onnx.runtime import Session
from eptq_onnx.runtimes.base import Verifier, graph_of


@dataclass(frozen=True)
class Argument:
    """An input or an output, with the attributes that onnxruntime gives it.

    Parameters
    ----------
    name : str
    type : str
        Such as ``tensor(float)``.
    shape : list
        Sizes; names or None for those that are not fixed.
    """

    name: str
    type: str
    shape: list[int | str | None]


class Runnable:
    """A model as a function that scores it sees it.

    It has the methods `run`, `get_inputs` and `get_outputs` of ``onnxruntime.InferenceSession``, whatever
    runtime computes it. Called with a dict of inputs, it returns a dict of outputs.

    Parameters
    ----------
    run : callable
        Dict of inputs to dict of outputs.
    inputs, outputs : list of Argument
    """

    def __init__(
        self, run: Callable[[Feeds], Feeds], inputs: list[Argument], outputs: list[Argument]
    ) -> None:
        self._run, self._inputs, self._outputs = run, inputs, outputs

    def __call__(self, feeds: Mapping[str, NDArray[Any]]) -> Feeds:
        """Return all outputs by name; feeds without an input are ignored."""
        known = {a.name for a in self._inputs}
        return self._run({name: np.asarray(value) for name, value in feeds.items() if name in known})

    def run(
        self, output_names: Sequence[str] | None, input_feed: Mapping[str, NDArray[Any]], _: object = None
    ) -> list[NDArray[Any]]:
        """Return outputs in the order of their names; None for all. Run options are ignored.

        Raises
        ------
        DataError
            If the model has no such input or output.
        """
        inputs, outputs = ([a.name for a in group] for group in (self._inputs, self._outputs))
        wanted = list(output_names) if output_names else outputs
        for names, known, what in ((input_feed, inputs, "input"), (wanted, outputs, "output")):
            for name in names:
                if name not in known:
                    raise DataError(f"the model has no {what} {name}, but {', '.join(known)}.")
        found = self(input_feed)
        return [found[name] for name in wanted]

    def get_inputs(self) -> list[Argument]:
        """Return the inputs that have to be fed."""
        return list(self._inputs)

    def get_outputs(self) -> list[Argument]:
        """Return the outputs."""
        return list(self._outputs)


Evaluate: TypeAlias = Callable[[Runnable], float]
"""Scores a model on data of the user's own."""


def evaluate_of(given: Evaluate | str) -> Evaluate:
    """Return the function that scores, imported if it is named as ``module:function``.

    Raises
    ------
    DataError
        If it cannot be imported, or is no function.
    """
    return function_named(given, "the function") if isinstance(given, str) else given


def score_of(evaluate: Evaluate, model: Runnable, *, finite: bool = True) -> float:
    """Return the score of a model.

    Parameters
    ----------
    evaluate : callable
    model : Runnable
    finite : bool
        False for a model that may be so bad that its score is NaN or infinite.

    Raises
    ------
    ConfigError
        If the function fails, or returns no finite number.
    """
    name = getattr(evaluate, "__qualname__", type(evaluate).__name__)
    try:
        found: Any = evaluate(model)
    except EptqError:
        raise
    except Exception as e:
        # The function is the user's own, and may raise whatever it likes.
        raise ConfigError(f"evaluate gives no score: {name} fails with {failure(e)}.") from e
    try:
        score = None if isinstance(found, (str, bytes)) else float(np.asarray(found).item())
    except (TypeError, ValueError):
        score = None
    if score is None or (finite and not math.isfinite(score)):
        shown = "nothing (None)" if found is None else f"{found!r:.80}"
        raise ConfigError(f"evaluate gives no score: {name} returns {shown}, and a score is a finite number.")
    return score


def float_model(model: ModelProto | Path, threads: int = 1) -> Runnable:
    """Return what runs a float model, in onnxruntime."""
    session = Session(model if isinstance(model, ModelProto) else str(model), threads=threads)
    return _runnable(lambda feeds: session.run(session.taken(feeds)), model)


@contextmanager
def quantized_model(
    file: Path, runtime: Verifier | None, threads: int = 1
) -> Iterator[tuple[Runnable, str, str]]:
    """Provide what runs a quantized file: a runtime, or else the operators' definitions.

    Parameters
    ----------
    file : path
    runtime : Verifier or None
    threads : int
        Threads of one operator; 0 for one per core.

    Yields
    ------
    Runnable
    str
        What runs it.
    str
        Why it is not the runtime; empty if it is, or if there is none.
    """
    why = ""
    if runtime is not None:
        try:
            context = runtime.load(file, threads)
        except CapabilityError as e:
            why = str(e).rstrip(".")
        else:
            with context as loaded:
                yield _runnable(loaded.run, file), f"{runtime.name} {runtime.version}", ""
            return
    session = Session(io.load(file, quantized=True), integers=False, threads=threads)
    ort = runtimes.make()
    yield (
        _runnable(lambda feeds: session.run(session.taken(feeds)), file),
        f"{ort.name} {ort.version}, with the operators as ONNX defines them and no integer kernels",
        why,
    )


def _runnable(run: Callable[[Feeds], Feeds], model: ModelProto | Path) -> Runnable:
    graph = graph_of(model)
    weights = {t.name for t in graph.initializer}
    inputs = _arguments(v for v in graph.input if v.name not in weights)
    return Runnable(run, inputs, _arguments(graph.output))


_NAMES: dict[int, str] = {TensorProto.FLOAT: "float", TensorProto.DOUBLE: "double"}
"""What onnxruntime calls types by other names than ONNX."""


def _arguments(values: Iterable[ValueInfoProto]) -> list[Argument]:
    found = []
    for value in values:
        tensor = value.type.tensor_type
        kind = _NAMES.get(tensor.elem_type, TensorProto.DataType.Name(tensor.elem_type).lower())
        sizes = [d.dim_value if d.HasField("dim_value") else d.dim_param or None for d in tensor.shape.dim]
        found.append(Argument(value.name, f"tensor({kind})", sizes))
    return found
