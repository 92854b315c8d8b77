"""Estimate the label-free Hessian bound by Hutchinson probes (paper sections 3.1 and 3.2).

With v Rademacher on the outputs, E[(J^T v)^2] = diag(J^T J). One backward pass of <v, f(x)> gives J^T v for
every layer and every weight. Probes are independent per sample: in the squared gradient of a batch the cross
terms vanish in expectation, so that it estimates the sum over the samples.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from onnx import ModelProto, TensorProto, helper

from eptq_onnx import ops
from eptq_onnx.config import Config
from eptq_onnx.data.samples import Samples, Selection
from eptq_onnx.engines.base import UNREACHED, Engine, GradientModel, GradientSession
from eptq_onnx.errors import GradientError
from eptq_onnx.execute import finite
from eptq_onnx.execute.blocks import Block, advance, bytes_of, cut
from eptq_onnx.graph import edit
from eptq_onnx.graph.fold import fold_constants, fold_sizes
from eptq_onnx.graph.kernels import faster
from eptq_onnx.graph.lower import lower
from eptq_onnx.graph.shapes import empty_tensor, specialize
from eptq_onnx.graph.view import GraphView, int_attribute
from eptq_onnx.numerics import quant_math
from eptq_onnx.numerics.types import Array, Feeds
from eptq_onnx.parallel import ordered_map
from eptq_onnx.records import Calibration, Network, Plan, Scores
from eptq_onnx.runtime import Session

FLOAT_PASSES = 6.0
"""What a probe costs, in float passes over the samples."""
_LOSS, _ATTENTION = "eptq/probe_loss", "eptq/attention"
_MOST_JOINT_CHANNELS = 2048
_POSITIONS_MEMORY = 2**29
"""Bytes that the scores of positions may take, where no less is allowed."""


def score(
    network: Network,
    selection: Selection,
    weights: Collection[str],
    engine: Engine,
    config: Config,
    progress: Callable[[int, int], None],
) -> Scores:
    """Scores of all layers, samples and channels, and of the elements of some weights.

    Parameters
    ----------
    network : Network
        Its calibration gives the spread that each part of the outputs is divided by; its scores are not
        looked at.
    selection : Selection
        The samples to score.
    weights : collection of str
        The weights whose elements are scored. They cost as much again as everything else: their gradients,
        and the fast kernels that convolutions have for constant weights.
    engine : Engine
    config : Config
        ``probes`` and ``seed``.
    progress : callable
        Called with batches done and batches in all.

    Raises
    ------
    GradientError
        If no output of the model can be differentiated.
    """
    model, plan, samples, indices = network.model, network.plan, selection.samples, selection.indices
    size = samples.micro_batch(len(indices))
    shaped = fold_sizes(specialize(model, samples.two_batches(size)))
    empty = empty_tensor(shaped)
    if empty is not None:
        raise GradientError(f"{empty} has no elements on any of the samples that gradients are taken on.")
    points = ops.output_parts(GraphView(model))
    safe = finite.differentiable(
        shaped,
        [*points, *(x.output for x in plan.layers)],
        list(_fed(samples, indices, size)),
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
    axes = _scored_tensors(view, plan)
    blocks = [Block(private)] if config.block_bytes is None else cut(private, private, config.block_bytes)
    placed = _scored_positions(view, plan, axes, size, len(indices), config.block_bytes or _POSITIONS_MEMORY)
    wanted = _Wanted(view, plan, probes, axes, placed, weights, size)
    stages, unreached = _stages(blocks, wanted, engine)
    shapes = {name: _static_shape(view, point) for point, name in probes.items()}
    unit = _units(probes, shapes, network.calibration)
    rng = np.random.default_rng(config.seed)
    floats = Session(_giving(shaped, points)) if safe is not None else None

    def batches(turns: range) -> Iterator[_Batch]:
        for turn in turns:
            places = np.arange(turn * size, (turn + 1) * size)
            real = places < len(indices)
            draws = [
                {n: _rademacher(rng, shapes[n], real) * unit[n] for n in shapes} for _ in range(config.probes)
            ]
            feeds = samples.take(indices[places % len(indices)])
            if floats is not None:
                # What is no number in the float network counts nothing.
                values = floats.run(floats.taken(feeds))
                draws = [
                    {name: draw[name] * np.isfinite(values[point]) for point, name in probes.items()}
                    for draw in draws
                ]
            yield _Batch(turn, feeds, draws)

    sums = _Sums(len(indices), size)
    rounds = -(-len(indices) // size)
    together = _rounds_together(blocks, view, config)
    done, total = 0, rounds * config.probes * len(stages)
    for first in range(0, rounds, together):
        chunk: Iterable[_Batch] = batches(range(first, min(first + together, rounds)))
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
    # Where no sample has a gradient that is a number, nothing is known.
    lost = {tensor for tensor in sums.spoiled if not sums.channels[tensor].any()}
    unreached |= dict.fromkeys(lost, "its gradients are no finite numbers")
    return Scores(
        channels={
            n: (power / config.probes).astype(np.float32)
            for n, power in sums.channels.items()
            if n not in lost
        },
        weights={n: (h / count).astype(np.float32) for n, h in sums.weights.items()},
        outputs={n: h / count for n, h in sums.outputs.items()},
        output_size=sum(int(np.prod(s)) for s in shapes.values()) // size,
        positions={
            n: power / np.float32(power.mean(dtype=np.float64))
            for n, power in sums.positions.items()
            if power.any()
        },
        samples=indices,
        unreached={layer.node: unreached[layer.output] for layer in plan.layers if layer.output in unreached},
    )


def _units(
    probes: Mapping[str, str], shapes: Mapping[str, tuple[int, ...]], calibration: Calibration
) -> dict[str, np.float32]:
    """What the signs of each part of the outputs are multiplied by.

    A part is seen in units of its spread, and all parts count alike in sum, whatever their sizes: few boxes
    as much as many classes, a coarse map as much as a fine one. Over all elements the mean square of spreads
    times units is 1.
    """
    sizes = {name: float(np.prod(shape)) for name, shape in shapes.items()}
    mean = sum(sizes.values()) / len(sizes)
    spread = {
        name: float(np.sqrt(calibration.variance.get(point, 0.0))) or 1.0 for point, name in probes.items()
    }
    # A factor that all have in common changes nothing, and squares of gradients must stay within float32.
    common = float(quant_math.unit(np.array(list(spread.values()))))
    return {name: np.float32(np.sqrt(mean / sizes[name]) / (spread[name] / common)) for name in sizes}


def _fed(samples: Samples, indices: NDArray[np.int64], size: int) -> list[Feeds]:
    """All samples, in batches of this size; the last begins anew."""
    turns = range(-(-len(indices) // size))
    return [samples.take(indices[np.arange(turn * size, (turn + 1) * size) % len(indices)]) for turn in turns]


def _giving(model: ModelProto, names: Sequence[str]) -> ModelProto:
    """A copy whose outputs are these tensors."""
    result = edit.with_nodes(model, model.graph.node)
    edit.set_outputs(result, names)
    edit.prune(result)
    return result


@dataclass(frozen=True)
class _Batch:
    """One batch: its place, its inputs and what blocks made of them, and for each probe the signs and
    gradients so far."""

    turn: int
    feeds: Feeds
    probes: list[Feeds]


@dataclass(frozen=True)
class _Stage:
    """The backward pass of a block: from the gradients of what later blocks read to those of what it reads.

    Parameters
    ----------
    model : ModelProto
        Gives `_ATTENTION` and the other outputs named below.
    channels : dict of str to int
        Scored tensors and their channels, in the order of the columns of `_ATTENTION`.
    positions, weights, products, passed : dict of str to str
        Tensors whose positions are scored, scored weights, jointly scored tensors, and tensors of earlier
        blocks: to the outputs with their positions' scores, gradients or products.
    fixed : Feeds
        The scored weights, which are inputs.
    """

    model: ModelProto
    channels: dict[str, int]
    positions: dict[str, str]
    weights: dict[str, str]
    products: dict[str, str]
    passed: dict[str, str]
    fixed: Feeds

    def run(self, batches: Iterable[_Batch]) -> Iterator[tuple[int, Feeds]]:
        """Number of each batch and outputs, once a probe; hands the gradients on to the batch."""
        session = GradientSession(self.model)

        def run(work: tuple[_Batch, Feeds]) -> tuple[_Batch, Feeds, Feeds]:
            batch, probe = work
            known = {**batch.feeds, **self.fixed, **probe}
            return batch, probe, session.run({n: known[n] for n in session.inputs})

        for done, probe, values in ordered_map(
            run, ((batch, probe) for batch in batches for probe in batch.probes)
        ):
            for tensor, gradient in self.passed.items():
                name = _upstream(tensor)
                probe[name] = probe[name] + values[gradient] if name in probe else values[gradient]
            yield done.turn, values


class _Sums:
    """What all batches add up to."""

    def __init__(self, count: int, size: int) -> None:
        self._count, self._size = count, size
        self.channels: dict[str, NDArray[np.float64]] = {}
        self.positions: dict[str, Array] = {}
        self.weights: dict[str, NDArray[np.float64]] = {}
        self.outputs: dict[str, NDArray[np.float64]] = {}
        self.spoiled: set[str] = set()
        """Tensors that have gradients that are no numbers."""

    def add(self, stage: _Stage, turn: int, values: Feeds) -> None:
        """The outputs of one probe of a batch. Gradients that are no numbers count nothing."""
        column = 0
        for tensor, width in stage.channels.items():
            if not np.isfinite(values[_ATTENTION][:, column : column + width]).all():
                self.spoiled.add(tensor)
            column += width
        values = {
            name: value if np.isfinite(value).all() else np.where(np.isfinite(value), value, 0)
            for name, value in values.items()
        }
        column = 0
        for tensor, width in stage.channels.items():
            power = self.channels.setdefault(tensor, np.zeros((self._count, width)))
            rows = power[turn * self._size :][: self._size]
            rows += values[_ATTENTION][: len(rows), column : column + width]
            column += width
        for tensor, name in stage.positions.items():
            places = self.positions.setdefault(
                tensor, np.zeros((self._count, values[name].shape[1]), np.float32)
            )
            own = places[turn * self._size :][: self._size]
            own += values[name][: len(own)]
        for name, gradient in stage.weights.items():
            self.weights[name] = self.weights.get(name, 0.0) + np.square(values[gradient]).astype(np.float64)
        for name, product in stage.products.items():
            self.outputs[name] = self.outputs.get(name, 0.0) + values[product].astype(np.float64)


def _upstream(tensor: str) -> str:
    """Input that takes the gradient of what a later block reads."""
    return f"eptq/upstream/{tensor}"


def _rounds_together(blocks: Sequence[Block], view: GraphView, config: Config) -> int:
    """Batches that are taken through all blocks before the next are begun: what blocks read of each other is
    kept."""
    if config.block_bytes is None or len(blocks) == 1:
        return sys.maxsize
    kept = sum(bytes_of(view, name) for block in blocks for name in block.makes)
    return max(1, 4 * config.block_bytes // max(1, kept * (1 + config.probes)))


@dataclass(frozen=True)
class _Wanted:
    """What is to be scored.

    Parameters
    ----------
    view : GraphView
        The lowered network.
    plan : Plan
    probes : mapping of str to str
        Parts of the outputs, and the inputs with their signs.
    axes : mapping of str to int
        Scored tensors and their channel axes.
    placed, weights : collection of str
        Tensors whose positions are scored, and scored weights.
    size : int
        Samples of a batch.
    """

    view: GraphView
    plan: Plan
    probes: Mapping[str, str]
    axes: Mapping[str, int]
    placed: Collection[str]
    weights: Collection[str]
    size: int


def _stages(blocks: Sequence[Block], wanted: _Wanted, engine: Engine) -> tuple[list[_Stage], dict[str, str]]:
    """The backward passes of the blocks that gradients reach, the last block first; and why tensors have no
    gradient."""
    view, probes, axes, weights = wanted.view, wanted.probes, wanted.axes, wanted.weights
    stages: list[_Stage] = []
    unreached: dict[str, str] = {}
    live: set[str] = set()
    for block in reversed(blocks):
        made = {o for n in block.model.graph.node for o in n.output}
        read = {t.name for t in block.model.graph.initializer}
        private = edit.with_nodes(block.model, block.model.graph.node)
        # An output that later blocks read has both.
        entering = [(p, name) for p, name in probes.items() if p in made] + [
            (t, _upstream(t)) for t in block.makes if t in live
        ]
        scored = {tensor: axis for tensor, axis in axes.items() if tensor in made}
        if not entering:
            unreached |= dict.fromkeys(scored, UNREACHED)
            continue
        _add_loss(private, entering, view)
        backward = [t for t in block.reads if view.is_float(t)]
        gradient = engine.differentiate(
            private, _LOSS, [*(w for w in weights if w in read), *scored, *backward]
        )
        unreached |= {t: why for t, why in gradient.unreached.items() if t in scored}
        reached = {tensor: axis for tensor, axis in scored.items() if tensor in gradient.gradients}
        own = {w: gradient.gradients[w] for w in weights if w in gradient.gradients}
        passed = {t: gradient.gradients[t] for t in backward if t in gradient.gradients}
        live.update(passed)
        others = [*own.values(), *passed.values()]
        summary, channels, positions, products = _summarize(gradient, reached, wanted, others)
        fixed = {name: view.constant(name) for name in own}
        stages.append(
            _Stage(
                summary, dict(zip(reached, channels, strict=True)), positions, own, products, passed, fixed
            )
        )
    return stages, unreached


def _static_shape(view: GraphView, name: str) -> tuple[int, ...]:
    shape = view.static_shape(name)
    if shape is None:
        raise GradientError(
            f"the shape of {name} is not known even for fixed inputs; run with --preset fast, which needs no gradients."
        )
    return shape


def _add_loss(model: ModelProto, entering: Iterable[tuple[str, str]], view: GraphView) -> None:
    """Append the sum of every tensor times the input that it is named with: its probe, or its gradient from
    later blocks."""
    builder, terms = edit.Builder(model, "eptq/"), []
    for tensor, name in entering:
        model.graph.input.append(
            helper.make_tensor_value_info(name, TensorProto.FLOAT, _static_shape(view, tensor))
        )
        terms.append(builder.reduce("ReduceSum", builder.add("Mul", [tensor, name]), None))
    total = terms[0]
    for term in terms[1:]:
        total = builder.add("Add", [total, term])
    builder.add("Identity", [total], _LOSS)
    model.graph.node.extend(builder.nodes)
    model.graph.initializer.extend(builder.initializers)
    edit.add_output(model, _LOSS, TensorProto.FLOAT)


def _scored_tensors(view: GraphView, plan: Plan) -> dict[str, int]:
    """Layer outputs and quantized activations that are computed in the graph, with their channel axes."""
    axes = {layer.output: layer.output_axis for layer in plan.layers}
    for quantizer in plan.activations:
        if (
            quantizer.name in view.producer
            and quantizer.name not in axes
            and quantizer.channel_axis is not None
        ):
            axes[quantizer.name] = quantizer.channel_axis
    ranks = {tensor: len(_static_shape(view, tensor)) for tensor in axes}
    return {tensor: axis % ranks[tensor] for tensor, axis in axes.items() if ranks[tensor]}


def _jointly_scored(view: GraphView, plan: Plan, reached: Iterable[str]) -> list[str]:
    """Outputs of the layers whose groups have several each; of very many channels the products would not
    pay."""
    # What was put in place of a layer has its output, and no groups.
    groups = {
        layer.output: int_attribute(view.producer[layer.output], "group", 1)
        for layer in plan.layers
        if layer.output in reached
    }
    return [
        layer.output for layer in plan.layers
        if layer.output in groups and groups[layer.output] < _static_shape(view, layer.output)[layer.output_axis] <= _MOST_JOINT_CHANNELS
    ]  # fmt: skip


def _scored_positions(
    view: GraphView, plan: Plan, axes: Mapping[str, int], size: int, count: int, limit: int
) -> set[str]:
    """The layer outputs whose positions are told apart: those with few positions first, as many as fit into
    the memory."""
    shapes = {x.output: _static_shape(view, x.output) for x in plan.layers if x.output in axes}
    positions = {
        t: int(np.prod(s)) // (size * s[axes[t]])
        for t, s in shapes.items()
        if s[0] == size and axes[t] and s[axes[t]]
    }
    taken: NDArray[np.int64] = np.cumsum(sorted(4 * count * n for n in positions.values()))
    order = sorted(positions, key=lambda t: positions[t])
    return {t for t, used in zip(order, taken, strict=True) if used <= limit}


def _summarize(
    differentiated: GradientModel, axes: dict[str, int], wanted: _Wanted, others: list[str]
) -> tuple[ModelProto, list[int], dict[str, str], dict[str, str]]:
    """Reduce every J^T v to its channels' mean squares, one row a sample, and multiply those of some tensors.

    Returns the model, the numbers of channels, and the outputs with the sums of squares at the positions of
    some tensors and with the products (J^T v)(J^T v)^T; the model gives ``others`` as well.
    """
    model, gradients, shapes, size, placed = (
        differentiated.model,
        differentiated.gradients,
        wanted.view,
        wanted.size,
        wanted.placed,
    )
    joint = _jointly_scored(shapes, wanted.plan, axes)
    builder, parts, channels = edit.Builder(model, "eptq/"), [], []
    products = {
        tensor: _product(builder, gradients[tensor], axes[tensor], _static_shape(shapes, tensor))
        for tensor in joint
    }
    positions_of: dict[str, str] = {}
    for tensor, axis in axes.items():
        shape = _static_shape(shapes, tensor)
        if tensor in placed:
            power = builder.reduce("ReduceSumSquare", gradients[tensor], [axis], keepdims=False)
            positions_of[tensor] = builder.add(
                "Reshape", [power, builder.constant(np.array([size, -1], np.int64), "places")]
            )
        per_sample = shape[0] == size and axis != 0
        positions = [i for i in range(len(shape)) if i != axis and not (per_sample and i == 0)]
        gradient = gradients[tensor]
        power = (
            builder.reduce("ReduceSumSquare", gradient, positions, keepdims=False)
            if positions
            else builder.add("Mul", [gradient, gradient])
        )
        mean = builder.add(
            "Mul",
            [power, builder.constant(1.0 / max(float(np.prod([shape[i] for i in positions])), 1.0), "mean")],
        )
        channels.append(shape[axis])
        # Where samples are mixed, all get the same row.
        parts.append(
            builder.add("Expand", [mean, builder.constant(np.array([size, shape[axis]], np.int64), "rows")])
        )
    columns = [builder.add("Concat", parts, _ATTENTION, axis=1)] if parts else []
    result = edit.with_nodes(model, [*model.graph.node, *builder.nodes], builder.initializers)
    edit.set_outputs(result, [*columns, *positions_of.values(), *others, *products.values()])
    return faster(fold_constants(result)), channels, positions_of, products


def _product(b: edit.Builder, gradient: str, axis: int, shape: tuple[int, ...]) -> str:
    """g gᵀ, with one row of g a channel; of shape (n_channels, n_channels)."""
    turned = b.add("Transpose", [gradient], perm=[axis, *(i for i in range(len(shape)) if i != axis)])
    rows = b.add("Reshape", [turned, b.constant(np.array([shape[axis], -1], np.int64), "rows")])
    return b.add("Gemm", [rows, rows], transB=1)


def _rademacher(rng: np.random.Generator, shape: tuple[int, ...], real: NDArray[np.bool_]) -> Array:
    """Random signs; rows of samples that only fill up the batch are 0."""
    signs = rng.integers(0, 2, shape, dtype=np.int8).astype(np.float32) * 2 - 1
    if shape and shape[0] == len(real):
        signs[~real] = 0
    return signs
