"""Weights of the loss: sample-layer attention (paper section 3.2) and weights of the output parts."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from eptq_onnx.config import Attention, Config
from eptq_onnx.engines.base import TrainingGraph
from eptq_onnx.numerics import quant_math
from eptq_onnx.numerics.types import Array
from eptq_onnx.records import Calibration, Plan, Scores


def layer_attention(plan: Plan, scores: Scores | None, count: int) -> Array:
    """Return the sample-layer attention w[l, n] (paper section 3.2) divided by its largest layer mean.

    The shape is (n_layers, n_samples). Layers that no gradient reaches get the average layer's attention;
    without scores all weights are equal.
    """
    if scores is None or not any(layer.output in scores.channels for layer in plan.layers):
        return np.ones((len(plan.layers), count), np.float32)
    rows: dict[str, Array] = {
        x.output: scores.channels[x.output].max(axis=1) for x in plan.layers if x.output in scores.channels
    }
    mean: Array = np.mean(list(rows.values()), axis=0)
    table = np.stack([rows.get(layer.output, mean) for layer in plan.layers])
    table = table / quant_math.unit(table)
    largest = float(table.mean(axis=1).max())
    return (table / np.float32(largest)).astype(np.float32) if largest > 0 else np.ones_like(table)


def channel_attention(
    plan: Plan, scores: Scores | None, channels: Sequence[int], count: int, config: Config
) -> Array:
    """Return the weight of every sample and channel in the loss; shape (n_samples, sum of channels)."""
    layers = layer_attention(plan, None if config.attention is Attention.NONE else scores, count)
    columns = []
    for layer, row, n in zip(plan.layers, layers, channels, strict=True):
        share = np.ones((count, n), np.float32)
        if scores is not None and config.attention is Attention.CHANNEL and layer.output in scores.channels:
            table = scores.channels[layer.output]
            peak = table.max(axis=1, keepdims=True)
            share = np.where(peak > 0, table / np.maximum(peak, 1e-30), 1).astype(np.float32)
        columns.append(row[:, None] * share)
    return np.concatenate(columns, axis=1)


def part_weights(graph: TrainingGraph, calibration: Calibration) -> Array:
    """Return the weight of each part of the outputs, the inverse of its variance; shape (n_parts,)."""
    return np.array([1 / calibration.variance[name] for name in graph.outputs], np.float32)
