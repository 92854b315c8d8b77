"""Measure how fast this machine runs this model, to estimate the run time in advance."""

from __future__ import annotations

import itertools
import math
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from onnx import ModelProto

from eptq_onnx.config import Config
from eptq_onnx.data.samples import Samples
from eptq_onnx.execute.blocks import blocks_of, observe
from eptq_onnx.graph import edit
from eptq_onnx.graph.shapes import specialize
from eptq_onnx.graph.view import GraphView
from eptq_onnx.numerics.types import Feeds
from eptq_onnx.parallel import ordered_map, worker_count
from eptq_onnx.records import Plan
from eptq_onnx.runtime import Session

A_PIECE = 0.01
"""Seconds to build a part of a network and a session for it; 0.008 to 0.015 measured."""
_SIZE = 768
"""Side of the timed matrix product, which takes some milliseconds."""
_VALUES, _BINS = 2**18, 8192
"""Values of the timed histogram, and its bins."""
_WALK = 2.0
"""Cost of a walk in float passes, where it is not measured."""


def multiplications(model: ModelProto, plan: Plan, samples: Samples) -> dict[str, float]:
    """Return the multiplications of each layer for one sample, by node.

    Layers whose output shape is unknown count as 0.

    Parameters
    ----------
    model : ModelProto
        The normalized float model.
    plan : Plan
    samples : Samples
    """
    size = samples.micro_batch()
    view = GraphView(specialize(model, samples.two_batches(size)))
    found = dict.fromkeys((layer.node for layer in plan.layers), 0.0)
    for layer in plan.layers:
        shape = view.static_shape(layer.output)
        if shape and all(shape):
            found[layer.node] = (
                math.prod(view.constant_shape(layer.weight))
                * math.prod(shape)
                / shape[layer.output_axis]
                / size
            )
    return found


@dataclass(frozen=True)
class Rates:
    """What units of work take on this machine, in seconds.

    Parameters
    ----------
    a_pass : float
        The float network, for one sample, with batches in parallel on all cores.
    a_walk : float
        The same without fusions and with the inputs of all layers as outputs, as where it runs in parts.
    a_build : float
        To make a session for the whole network.
    an_operation : float
        A multiplication in a large matrix product, on one core.
    a_value : float
        A value that numpy picks, gathers or counts, on one core.
    """

    a_pass: float
    a_walk: float
    a_build: float
    an_operation: float
    a_value: float


def measured(model: ModelProto, plan: Plan, samples: Samples, config: Config) -> Rates:
    """Measure this machine with the float model, a matrix product, and a histogram."""
    a_pass, a_build = seconds_a_pass(model, plan, samples, config)
    inputs = [x.input for x in plan.layers if x.input in GraphView(model).producer]
    a_walk = _WALK * a_pass
    if config.block_bytes is None and inputs:
        outputs = list(dict.fromkeys(inputs))
        session = Session(edit.exposing(model, outputs), optimize=False)

        def run(feeds: Feeds) -> int:
            return len(session.run(session.taken(feeds), outputs))

        size = samples.micro_batch()
        ticks = [time.perf_counter() for _ in ordered_map(run, _batches(samples, size))]
        a_walk = max(a_pass, _pace(ticks, size))
    return Rates(a_pass, a_walk, a_build, seconds_an_operation(), seconds_a_value())


def seconds_a_pass(model: ModelProto, plan: Plan, samples: Samples, config: Config) -> tuple[float, float]:
    """Return the time of the float network for a sample, and that to make a session for it, in seconds."""
    size = samples.micro_batch()
    blocks = blocks_of(model, samples.two_batches(size), config.block_bytes)
    last = plan.layers[-1].output if plan.layers else model.graph.output[0].name
    began = time.perf_counter()
    ticks = [time.perf_counter() for _ in observe(blocks, _batches(samples, size), [last])]
    pace = _pace(ticks, size)
    return pace, max(0.0, ticks[0] - began - pace * size * worker_count())


def _batches(samples: Samples, size: int) -> Iterator[Feeds]:
    """Yield enough batches to keep all cores busy for a while."""
    parts = itertools.cycle(samples.parts(np.arange(samples.count), size))
    return map(samples.take, itertools.islice(parts, 2 * worker_count() + 1))


def _pace(ticks: Sequence[float], size: int) -> float:
    """Return the time of a sample: the first result arrives once a session exists and all cores are busy."""
    return (ticks[-1] - ticks[0]) / (len(ticks) - 1) / size


def seconds_an_operation() -> float:
    """Return the time of one multiplication in a large matrix product, in seconds."""
    factor = np.ones((_SIZE, _SIZE), np.float32)
    return _least(lambda: np.matmul(factor, factor)) / _SIZE**3


def seconds_a_value() -> float:
    """Return the time to pick one of many values and to count it in a histogram, in seconds."""
    values = np.linspace(0, 1, _VALUES, dtype=np.float32)
    places = np.arange(0, 4 * _VALUES, 4) % _VALUES

    def count() -> object:
        return np.bincount((values[places] * np.float32(_BINS - 1)).astype(np.intp), minlength=_BINS)

    return _least(count) / _VALUES


def _least(work: Callable[[], object]) -> float:
    taken = []
    for _ in range(3):
        began = time.perf_counter()
        work()
        taken.append(time.perf_counter() - began)
    return min(taken)


def values_per_sample(
    model: ModelProto, tensors: Iterable[str], samples: Samples, most: int | None = None
) -> float:
    """Return how many values some tensors have for a sample, of each at most ``most``; 0 if unknown."""
    size = samples.micro_batch()
    view = GraphView(specialize(model, samples.two_batches(size)))
    sizes = (math.prod(view.static_shape(name) or (0,)) / size for name in tensors)
    return sum(own if most is None else min(own, most) for own in sizes)
