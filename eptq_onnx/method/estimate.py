"""Measure how fast this machine runs this model, so that the run time can be estimated before the run."""

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

_SIZE = 768
"""Of a matrix product that is timed: some milliseconds."""


def multiplications(model: ModelProto, plan: Plan, samples: Samples) -> dict[str, float]:
    """Multiplications of each layer, by node, for one sample; layers of unknown output shape count none.

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
    """Time of the float network for one sample, where batches run side by side on all cores."""
    size = samples.micro_batch()
    blocks = blocks_of(model, samples.two_batches(size), config.block_bytes)
    count = 2 * worker_count() + 1
    parts = itertools.islice(itertools.cycle(samples.parts(np.arange(samples.count), size)), count)
    # The first result comes when the session is made and the cores are busy.
    ticks = [time.perf_counter() for _ in observe(blocks, map(samples.take, parts), [plan.layers[-1].output])]
    return (ticks[-1] - ticks[0]) / (count - 1) / size


def seconds_an_operation() -> float:
    """Time of a multiplication in a large matrix product, on all cores."""
    factor = np.ones((_SIZE, _SIZE), np.float32)
    taken = []
    for _ in range(3):
        began = time.perf_counter()
        np.matmul(factor, factor)
        taken.append(time.perf_counter() - began)
    return min(taken) / _SIZE**3
