"""Estimate the label-free Hessian bound by Hutchinson probes (paper sections 3.1 and 3.2).

With v Rademacher on the outputs, E[(J^T v)^2] = diag(J^T J). One backward pass of <v, f(x)> gives J^T v for
every layer and every weight. Probes are independent per sample: in the squared gradient of a batch the cross
terms vanish in expectation, so it estimates the sum over the samples.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from functools import partial

import numpy as np
from numpy.typing import NDArray

from eptq_onnx import ops
from eptq_onnx.config import Config
from eptq_onnx.data.samples import Selection, filled_batches
from eptq_onnx.engines.base import Engine
from eptq_onnx.errors import GradientError
from eptq_onnx.execute import finite
from eptq_onnx.execute.blocks import Block, advance, bytes_of, cut
from eptq_onnx.execute.micro import micro_batch
from eptq_onnx.graph import edit
from eptq_onnx.graph.fold import fold_sizes
from eptq_onnx.graph.lower import lower
from eptq_onnx.graph.shapes import empty_tensor, specialize
from eptq_onnx.graph.view import GraphView
from eptq_onnx.method.score.backward import (
    CHANNEL_SCORES,
    Batch,
    Stage,
    Wanted,
    scored_positions,
    scored_tensors,
    stages_of,
    static_shape,
)
from eptq_onnx.numerics import quant_math
from eptq_onnx.numerics.types import Array, Feeds
from eptq_onnx.records import Calibration, Network, Scores
from eptq_onnx.runtime import Session

FLOAT_PASSES = 6.0
"""Cost of a probe, in float passes over the samples."""
_POSITIONS_MEMORY = 2**28
"""Memory limit of the scores of positions if no lower limit is set, in bytes."""
_MOST_SHARE = 6e4
"""Largest score of a position, relative to the mean: about the largest number of float16."""


def score(
    network: Network,
    selection: Selection,
    weights: Collection[str],
    engine: Engine,
    config: Config,
    progress: Callable[[int, int], None],
) -> Scores:
    """Return the scores of all layers, samples and channels, and of the elements of some weights.

    Parameters
    ----------
    network : Network
        Its calibration gives the variance that normalizes each part of the outputs; its own scores are not
        used.
    selection : Selection
        The samples to score.
    weights : collection of str
        The weights whose elements are scored. They double the cost: their gradients are needed, and
        convolutions lose the fast kernels for constant weights.
    engine : Engine
    config : Config
        ``probes`` and ``seed``.
    progress : callable
        Called with the number of batches done and the total.

    Raises
    ------
    GradientError
        If no output of the model can be differentiated.
    """
    model, plan, samples, indices = network.model, network.plan, selection.samples, selection.indices
    size = micro_batch(model, samples, len(indices))
    shaped = fold_sizes(specialize(model, samples.two_batches(size)))
    empty = empty_tensor(shaped)
    if empty is not None:
        raise GradientError(f"{empty} has no elements in any of the samples used for gradients.")
    points = ops.output_parts(GraphView(model), config.outputs)
    safe = finite.differentiable(
        shaped,
        [*points, *(x.output for x in plan.layers)],
        partial(filled_batches, samples, indices, size),
        config.block_bytes,
        ops.is_elementwise,
    )
    private, _ = lower(shaped if safe is None else safe, ops.LOWERINGS)
    view = GraphView(private)
    probes = {point: f"eptq/probe_{k}" for k, point in enumerate(points)}
    if not probes:
        raise GradientError(
            "no output of the model depends on its layers through operators that have a gradient."
        )
    axes = scored_tensors(view, plan)
    blocks = [Block(private)] if config.block_bytes is None else cut(private, private, config.block_bytes)
    placed = scored_positions(view, plan, axes, size, len(indices), config.block_bytes or _POSITIONS_MEMORY)
    # Only weights of few bits are rounded for what errors of several channels do together.
    joint = {
        x.output for x in plan.layers if config.chooses_widths or x.weight_spec.bits <= quant_math.FEW_BITS
    }
    wanted = Wanted(view, plan, probes, axes, placed, weights, joint, size)
    stages, unreached = stages_of(blocks, wanted, engine)
    shapes = {name: static_shape(view, point) for point, name in probes.items()}
    unit = _units(probes, shapes, network.calibration)
    rng = np.random.default_rng(config.seed)
    floats = Session(edit.giving(shaped, points)) if safe is not None else None

    def batches(turns: range) -> Iterator[Batch]:
        for turn in turns:
            places = np.arange(turn * size, (turn + 1) * size)
            real = places < len(indices)
            draws = [
                {n: _rademacher(rng, shapes[n], real) * unit[n] for n in shapes} for _ in range(config.probes)
            ]
            feeds = samples.take(indices[places % len(indices)])
            if floats is not None:
                # Elements that are not finite in the float network count nothing.
                values = floats.run(floats.taken(feeds))
                draws = [
                    {name: draw[name] * np.isfinite(values[point]) for point, name in probes.items()}
                    for draw in draws
                ]
            yield Batch(turn, feeds, draws)

    sums = _Sums(len(indices), size)
    rounds = -(-len(indices) // size)
    at_once = _rounds_together(blocks, view, config)
    done, total = 0, rounds * config.probes * len(stages)
    for first in range(0, rounds, at_once):
        chunk: Iterable[Batch] = batches(range(first, min(first + at_once, rounds)))
        if len(blocks) > 1:
            chunk = list(chunk)
            for block in blocks[:-1]:
                advance(block, [batch.feeds for batch in chunk])
        for stage in stages:
            for turn, values in stage.run(chunk):
                sums.add(stage, turn, values)
                done += 1
                progress(done, total)
    count = config.probes * len(indices)
    # If no sample has a finite gradient, nothing is known.
    lost = {tensor for tensor in sums.spoiled if not sums.channels[tensor].any()}
    unreached |= dict.fromkeys(lost, "its gradients are not finite")
    return Scores(
        channels={
            n: (power / config.probes).astype(np.float32)
            for n, power in sums.channels.items()
            if n not in lost
        },
        weights={n: (h / count).astype(np.float32) for n, h in sums.weights.items()},
        outputs={n: h / count for n, h in sums.outputs.items()},
        output_size=sum(int(np.prod(s)) for s in shapes.values()) // size,
        positions=dict(_relative(sums.positions)),
        samples=indices,
        unreached={layer.node: unreached[layer.output] for layer in plan.layers if layer.output in unreached},
    )


def _relative(positions: dict[str, Array]) -> Iterator[tuple[str, NDArray[np.float16]]]:
    """Yield the scores of positions relative to their mean, in half the bytes, and drop the others."""
    for name in list(positions):
        power = positions.pop(name)
        if power.any():
            share = np.minimum(power / np.float32(power.mean(dtype=np.float64)), _MOST_SHARE)
            yield name, share.astype(np.float16)


def _units(
    probes: Mapping[str, str], shapes: Mapping[str, tuple[int, ...]], calibration: Calibration
) -> dict[str, np.float32]:
    """Return the factor of the random signs of each part of the outputs.

    Each part is measured in units of its standard deviation, and all parts have the same total weight
    whatever their size: few boxes count as much as many classes, a coarse map as much as a fine one. Over all
    elements the mean square of standard deviation times factor is 1.
    """
    sizes = {name: float(np.prod(shape)) for name, shape in shapes.items()}
    mean = sum(sizes.values()) / len(sizes)
    spread = {
        name: float(np.sqrt(calibration.variance.get(point, 0.0))) or 1.0 for point, name in probes.items()
    }
    # A common factor changes nothing, but squares of gradients must stay within float32.
    common = float(quant_math.unit(np.array(list(spread.values()))))
    return {name: np.float32(np.sqrt(mean / sizes[name]) / (spread[name] / common)) for name in sizes}


class _Sums:
    """Sums over all batches."""

    def __init__(self, count: int, size: int) -> None:
        self._count, self._size = count, size
        self.channels: dict[str, NDArray[np.float64]] = {}
        self.positions: dict[str, Array] = {}
        self.weights: dict[str, NDArray[np.float64]] = {}
        self.outputs: dict[str, NDArray[np.float64]] = {}
        self.spoiled: set[str] = set()
        """Tensors with gradients that are not finite."""

    def add(self, stage: Stage, turn: int, values: Feeds) -> None:
        """Add the outputs of one probe of a batch; gradients that are not finite count nothing."""
        column = 0
        for tensor, width in stage.channels.items():
            if not quant_math.all_finite(values[CHANNEL_SCORES][:, column : column + width]):
                self.spoiled.add(tensor)
            column += width
        values = {
            name: value if quant_math.all_finite(value) else np.where(np.isfinite(value), value, 0)
            for name, value in values.items()
        }
        column = 0
        for tensor, width in stage.channels.items():
            power = self.channels.setdefault(tensor, np.zeros((self._count, width)))
            rows = power[turn * self._size :][: self._size]
            rows += values[CHANNEL_SCORES][: len(rows), column : column + width]
            column += width
        for tensor, name in stage.positions.items():
            places = self.positions.setdefault(
                tensor, np.zeros((self._count, values[name].shape[1]), np.float32)
            )
            own = places[turn * self._size :][: self._size]
            own += values[name][: len(own)]
        for name, gradient in stage.weights.items():
            _add(self.weights, name, np.square(values[gradient]))
        for name, product in stage.products.items():
            _add(self.outputs, name, values[product])


def _add(sums: dict[str, NDArray[np.float64]], name: str, value: Array) -> None:
    """Add to a sum in place."""
    if name in sums:
        sums[name] += value
    else:
        sums[name] = value.astype(np.float64)


def _rounds_together(blocks: Sequence[Block], view: GraphView, config: Config) -> int:
    """Return how many batches pass through all blocks before the next ones start.

    Tensors that cross blocks are kept in memory, which limits the number.
    """
    if config.block_bytes is None or len(blocks) == 1:
        return sys.maxsize
    kept = sum(bytes_of(view, name) for block in blocks for name in block.makes)
    return max(1, 4 * config.block_bytes // max(1, kept * (1 + config.probes)))


def _rademacher(rng: np.random.Generator, shape: tuple[int, ...], real: NDArray[np.bool_]) -> Array:
    """Return random signs; rows of samples that only fill up the batch are 0."""
    signs = rng.integers(0, 2, shape, dtype=np.int8).astype(np.float32) * 2 - 1
    if shape and shape[0] == len(real):
        signs[~real] = 0
    return signs
