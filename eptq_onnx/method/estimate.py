"""Measure how fast this machine runs this model, to estimate the run time in advance."""

from __future__ import annotations

import itertools
import math
import time

import numpy as np
from onnx import ModelProto

from eptq_onnx.config import Config
from eptq_onnx.data.samples import Samples
from eptq_onnx.execute.blocks import blocks_of, observe
from eptq_onnx.graph.shapes import specialize
from eptq_onnx.graph.view import GraphView
from eptq_onnx.parallel import worker_count
from eptq_onnx.records import Plan

A_PIECE = 0.01
"""Seconds to build a part of a network and a session for it; 0.008 to 0.015 measured."""
_SIZE = 768
"""Side of the timed matrix product, which takes some milliseconds."""


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


def seconds_a_pass(model: ModelProto, plan: Plan, samples: Samples, config: Config) -> float:
    """Return the float network's time per sample, in seconds, with batches in parallel on all cores."""
    size = samples.micro_batch()
    blocks = blocks_of(model, samples.two_batches(size), config.block_bytes)
    count = 2 * worker_count() + 1
    parts = itertools.islice(itertools.cycle(samples.parts(np.arange(samples.count), size)), count)
    last = plan.layers[-1].output if plan.layers else model.graph.output[0].name
    # The first result arrives once the session exists and all cores are busy, so timing starts there.
    ticks = [time.perf_counter() for _ in observe(blocks, map(samples.take, parts), [last])]
    return (ticks[-1] - ticks[0]) / (count - 1) / size


def seconds_an_operation() -> float:
    """Return the time of one multiplication in a large matrix product, in seconds."""
    factor = np.ones((_SIZE, _SIZE), np.float32)
    taken = []
    for _ in range(3):
        began = time.perf_counter()
        np.matmul(factor, factor)
        taken.append(time.perf_counter() - began)
    return min(taken) / _SIZE**3
