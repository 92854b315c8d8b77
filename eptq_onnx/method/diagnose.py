"""Find out where a quantized network loses accuracy: layers that add noise, causes of noise at the outputs.

Three walks go through the network side by side: the float network, the quantized one, which gets the float
values at the output of every layer, and the network with all weights rounded to nearest. The noise of the
outputs is measured, not predicted, as in `eptq_onnx.method.float_fallback`: versions of the network run with
some parts in floating point.
"""

from __future__ import annotations

import heapq
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray
from onnx import ModelProto

from eptq_onnx.diagnosis import Histogram
from eptq_onnx.execute.walk import Walk
from eptq_onnx.graph.view import GraphView
from eptq_onnx.numerics.grid import Grid
from eptq_onnx.numerics.halving import halves
from eptq_onnx.numerics.quant_math import stride
from eptq_onnx.numerics.sums import NoiseSum
from eptq_onnx.numerics.types import Feeds
from eptq_onnx.records import Layer, Plan, Rounding

SAMPLES = 8
"""Samples that are run."""
WALKS = 3
"""Walks through the network."""
_WORST = 4
"""Layers of which histograms are kept."""
_BINS, _VALUES = 64, 2**16
"""Bins of a histogram, and the most values of a tensor that are counted."""
_RUNS = 16
"""Most runs to find the loudest members of a group."""
_ENOUGH, _FEW, _PART = 0.5, 4, 0.25
"""Share of the noise that members must cause to be named; how many, and what share of all, they may be."""


@dataclass(frozen=True)
class Versions:
    """Versions of a network that are walked side by side.

    Parameters
    ----------
    exact, quantized, nearest : ModelProto
        The float network, the quantized one, and one with all weights rounded to nearest; with known element
        types.
    stands_for, nearest_stands_for : mapping of str to str
        Quantized tensor to the tensor of either that holds its dequantized values.
    """

    exact: ModelProto
    quantized: ModelProto
    nearest: ModelProto
    stands_for: Mapping[str, str]
    nearest_stands_for: Mapping[str, str]


@dataclass(frozen=True)
class LayerNoise:
    """What the walks found; see `eptq_onnx.diagnosis.Diagnosis`."""

    own: Mapping[str, float]
    nearest: Mapping[str, float]
    histograms: tuple[Histogram, ...]


def layer_noise(
    versions: Versions,
    plan: Plan,
    rounding: Rounding,
    feeds: Sequence[Feeds],
    progress: Callable[[int, int], None],
    *,
    integers: bool,
) -> LayerNoise:
    """Compare every layer of three versions of a network.

    Parameters
    ----------
    versions : Versions
    plan : Plan
    rounding : Rounding
        Gives the ranges in the histograms.
    feeds : sequence of Feeds
        Inputs, run by run.
    progress : callable
        Called with the number of layers done and the total.
    integers : bool
        False to compute in float between quantizers, as the ONNX operators are defined.
    """
    exact, quantized, rounded = (
        Walk(model, feeds, integers=integers)
        for model in (versions.exact, versions.quantized, versions.nearest)
    )
    view = GraphView(versions.exact)
    own: dict[str, float] = {}
    nearest: dict[str, float] = {}
    worst: list[tuple[float, int, tuple[Histogram, ...]]] = []
    for k, layer in enumerate(plan.layers):
        # A layer whose weight alone is quantized has no range to show, a dynamic one has many.
        grid = None if not layer.static else rounding.grids[plan.quantizer_of[layer.input].name]
        inputs = _sampled(exact.reach(layer.input))
        stands = versions.stands_for.get(layer.result, layer.result)
        reference = exact.reach(layer.result)
        own[layer.node] = _ratio(reference, quantized.reach(stands))
        quantized.put({layer.result: reference, stands: reference})
        nearest[layer.node] = _ratio(
            reference, rounded.reach(versions.nearest_stands_for.get(layer.result, layer.result))
        )
        # A heap of the worst: histograms of hundreds of layers would be thrown away.
        entry = (-own[layer.node], -k)
        if len(worst) < _WORST or entry > worst[0][:2]:
            weight = np.asarray(view.constant(layer.weight), np.float32)
            item = (*entry, _histograms(layer, inputs, grid, weight, rounding.weights[layer.weight]))
            (heapq.heappush if len(worst) < _WORST else heapq.heapreplace)(worst, item)
        progress(k + 1, len(plan.layers))
    return LayerNoise(own, nearest, tuple(h for *_, both in sorted(worst, reverse=True) for h in both))


def _ratio(reference: Sequence[NDArray[Any]], got: Sequence[NDArray[Any]]) -> float:
    """Return the SQNR over all runs in dB."""
    total = NoiseSum()
    for expected, other in zip(reference, got, strict=True):
        total.add(expected, other)
    return total.sqnr_db


def _sampled(values: Sequence[NDArray[Any]]) -> NDArray[np.float32]:
    """Return finite values of all runs, evenly spread if there are many."""
    most = max(1, _VALUES // len(values))
    parts = []
    for value in values:
        flat = value.reshape(-1)
        parts.append(flat[:: stride(flat.size, most)])
    joined = np.concatenate(parts).astype(np.float32)
    return joined[np.isfinite(joined)]


def _histograms(
    layer: Layer,
    inputs: NDArray[np.float32],
    grid: Grid | None,
    weight: NDArray[np.float32],
    weight_grid: Grid,
) -> tuple[Histogram, ...]:
    scale, zero = weight_grid.spread(weight.shape)
    steps = (weight / scale + zero).reshape(-1)
    steps = steps[:: stride(steps.size, _VALUES)]
    form = weight_grid.format
    of_weights = _histogram(layer.node, "weights", steps, (float(form.qmin), float(form.qmax)), 1.0)
    if grid is None:
        return (of_weights,)
    ends = np.array([grid.format.qmin, grid.format.qmax], np.float32)
    low, high = (float(v) for v in (ends - np.float32(grid.zero_point)) * np.float32(grid.scale))
    return _histogram(layer.node, "input", inputs, (low, high), float(grid.scale)), of_weights


def _histogram(
    layer: str, what: str, values: NDArray[np.floating[Any]], covered: tuple[float, float], step: float
) -> Histogram:
    values = values[np.isfinite(values)].astype(np.float64)
    low = min(covered[0], float(values.min(initial=covered[0])))
    high = max(covered[1], float(values.max(initial=covered[1])))
    counts, _ = np.histogram(values, _BINS, (low, high))
    # Half a step beyond the ends is rounded, not clipped.
    outside = (values < covered[0] - step / 2) | (values > covered[1] + step / 2)
    share = float(outside.mean()) if values.size else 0.0
    return Histogram(layer, what, low, high, tuple(int(c) for c in counts), *covered, share)


def part_of(plan: Plan, layers: Collection[Layer], activations: Collection[str]) -> Plan:
    """Return a plan that quantizes some weights and some activations alone; biases stay float.

    Parameters
    ----------
    plan : Plan
    layers : collection of Layer
        Those whose weights are quantized.
    activations : collection of str
        Names of their quantizers.
    """
    wanted = set(activations)
    return replace(
        plan,
        layers=tuple(layers),
        activations=tuple(q for q in plan.activations if q.name in wanted),
        dynamic=tuple(q for q in plan.dynamic if q.name in wanted),
        operands=(),
        tables=(),
        held=(),
        integer_nodes={x.node: x.op_type for x in layers},
        absorbed={},
        bias=None,
    )


def only_weights(plan: Plan, nodes: Collection[str] | None = None) -> Plan:
    """Return a plan that quantizes constants alone: all, or the weights of some nodes."""
    found = part_of(plan, [x for x in plan.layers if nodes is None or x.node in nodes], ())
    if nodes is not None:
        return found
    return replace(
        found,
        operands=plan.operands,
        tables=plan.tables,
        held=plan.held,
        integer_nodes=plan.integer_nodes,
    )


def readers(plan: Plan, view: GraphView) -> dict[str, tuple[str, ...]]:
    """Return the integer nodes that read each quantized activation, of those that any reads."""
    found: dict[str, tuple[str, ...]] = {}
    for q in plan.activations:
        nodes = dict.fromkeys(
            n.name for t in q.tensors for n in view.consumers[t] if n.name in plan.integer_nodes
        )
        if nodes:
            found[q.name] = tuple(nodes)
    for own in plan.dynamic:
        found[own.name] = (*found.get(own.name, ()), *own.nodes)
    return found


def loudest(names: Sequence[str], total: float, noise: Callable[[Sequence[str]], float]) -> dict[str, float]:
    """Return the few members of a group that cause most of its noise, loudest first; empty if many do.

    The part that causes most noise is halved until enough single members are known. Noise is additive to a
    good approximation, so a member's share is its own noise beside the sum over all parts, and where one half
    causes the lesser part of a group's noise, the other is not measured.

    Parameters
    ----------
    names : sequence of str
        Neighbours stand side by side.
    total : float
        Noise of all.
    noise : callable
        Returns the noise that some of them cause alone.

    Returns
    -------
    dict of str to float
        Share of the noise.
    """
    most = min(_FEW, int(_PART * len(names)))
    parts = [(total, 0, len(names))]
    found: dict[str, float] = {}
    runs = 0

    def measured(begin: int, end: int) -> float:
        nonlocal runs
        runs += 1
        return noise(names[begin:end])

    while parts and len(found) < most:
        # Even if each of the loudest parts were a single member, these would have to be enough.
        loudest_parts = sum(heapq.nlargest(most - len(found), (part for part, _, _ in parts)))
        if sum(found.values()) + loudest_parts < _ENOUGH * total:
            break
        loud = max(parts)
        parts.remove(loud)
        own, begin, end = loud
        if end - begin == 1:
            found[names[begin]] = own
        elif runs + 2 <= _RUNS:
            parts += halves(loud, measured)
        else:
            parts.append(loud)
            break
        known = sum(found.values())
        everything = known + sum(part for part, _, _ in parts)
        if known >= _ENOUGH * everything > 0:
            return {name: own / everything for name, own in found.items()}
    return {}
