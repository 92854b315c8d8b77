"""Backward passes of the blocks of a network, with their gradients reduced to scores."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from onnx import ModelProto, TensorProto, helper

from eptq_onnx.engines.base import UNREACHED, Engine, GradientModel, GradientSession
from eptq_onnx.errors import GradientError
from eptq_onnx.execute.blocks import Block
from eptq_onnx.graph import edit
from eptq_onnx.graph.fold import fold_constants
from eptq_onnx.graph.kernels import faster
from eptq_onnx.graph.view import GraphView, int_attribute
from eptq_onnx.numerics.types import Feeds
from eptq_onnx.parallel import paired_map
from eptq_onnx.records import Plan

_LOSS = "eptq/probe_loss"
CHANNEL_SCORES = "eptq/attention"
"""Output with the scores of all channels side by side."""
_MOST_JOINT_CHANNELS = 2048
"""Channels above which joint scores are not worth their cost."""


@dataclass(frozen=True)
class Batch:
    """One batch: its number, its feeds including block outputs, and the signs and gradients of each probe."""

    turn: int
    feeds: Feeds
    probes: list[Feeds]


@dataclass(frozen=True)
class Stage:
    """Backward pass of a block: from the gradients of its outputs to those of its inputs.

    Parameters
    ----------
    model : ModelProto
        Gives `CHANNEL_SCORES` and the other outputs named below.
    channels : dict of str to int
        Scored tensors and their numbers of channels, in the order of the columns of `CHANNEL_SCORES`.
    positions, weights, products, passed : dict of str to str
        Tensors whose positions are scored, scored weights, jointly scored tensors, and tensors of earlier
        blocks; each maps to the output with its position scores, gradient or product.
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

    def run(self, batches: Iterable[Batch]) -> Iterator[tuple[int, Feeds]]:
        """Yield the number of each batch and the outputs, once per probe; pass gradients on to the batch."""
        session = GradientSession(self.model)
        fixed = session.taken(self.fixed)

        def run(feeds: Feeds) -> Feeds:
            return session.run({**feeds, **fixed})

        def read(work: tuple[Batch, Feeds]) -> Feeds:
            batch, probe = work
            return session.taken({**batch.feeds, **probe})

        work = ((batch, probe) for batch in batches for probe in batch.probes)
        for (done, probe), values in paired_map(run, work, read):
            for tensor, gradient in self.passed.items():
                name = _upstream(tensor)
                probe[name] = probe[name] + values[gradient] if name in probe else values[gradient]
            yield done.turn, values


@dataclass(frozen=True)
class Wanted:
    """What is to be scored.

    Parameters
    ----------
    view : GraphView
        The lowered network.
    plan : Plan
    probes : mapping of str to str
        Parts of the outputs to the inputs that carry their signs.
    axes : mapping of str to int
        Scored tensors and their channel axes.
    placed, weights, together : collection of str
        Tensors whose positions are scored, scored weights, and layer outputs whose channels may be scored
        jointly.
    size : int
        Samples per batch.
    """

    view: GraphView
    plan: Plan
    probes: Mapping[str, str]
    axes: Mapping[str, int]
    placed: Collection[str]
    weights: Collection[str]
    together: Collection[str]
    size: int


def stages_of(blocks: Sequence[Block], wanted: Wanted, engine: Engine) -> tuple[list[Stage], dict[str, str]]:
    """Return the backward passes of the blocks that gradients reach, and why tensors have no gradient.

    The last block comes first.
    """
    view, probes, axes, weights = wanted.view, wanted.probes, wanted.axes, wanted.weights
    stages: list[Stage] = []
    unreached: dict[str, str] = {}
    live: set[str] = set()
    for block in reversed(blocks):
        made = {o for n in block.model.graph.node for o in n.output}
        read = {t.name for t in block.model.graph.initializer}
        private = edit.with_nodes(block.model, block.model.graph.node)
        # A tensor may be both an output of the network and an input of later blocks.
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
            Stage(summary, dict(zip(reached, channels, strict=True)), positions, own, products, passed, fixed)
        )
    return stages, unreached


def static_shape(view: GraphView, name: str) -> tuple[int, ...]:
    """Return the shape of a tensor.

    Raises
    ------
    GradientError
        If it is not known even for fixed inputs.
    """
    shape = view.static_shape(name)
    if shape is None:
        raise GradientError(
            f"the shape of {name} is not known even for fixed inputs; "
            "run with --preset fast, which needs no gradients."
        )
    return shape


def _add_loss(model: ModelProto, entering: Iterable[tuple[str, str]], view: GraphView) -> None:
    """Append the loss: the sum of every tensor times the input named with it.

    That input is the tensor's probe, or its gradient from later blocks.
    """
    builder, terms = edit.Builder(model, "eptq/"), []
    for tensor, name in entering:
        model.graph.input.append(
            helper.make_tensor_value_info(name, TensorProto.FLOAT, static_shape(view, tensor))
        )
        terms.append(builder.reduce("ReduceSum", builder.add("Mul", [tensor, name]), None))
    total = terms[0]
    for term in terms[1:]:
        total = builder.add("Add", [total, term])
    builder.add("Identity", [total], _LOSS)
    model.graph.node.extend(builder.nodes)
    model.graph.initializer.extend(builder.initializers)
    edit.add_output(model, _LOSS, TensorProto.FLOAT)


def scored_tensors(view: GraphView, plan: Plan) -> dict[str, int]:
    """Return the layer outputs and quantized activations computed in the graph, with their channel axes."""
    axes = {layer.output: layer.output_axis for layer in plan.layers}
    for quantizer in plan.activations:
        if (
            quantizer.name in view.producer
            and quantizer.name not in axes
            and quantizer.channel_axis is not None
        ):
            axes[quantizer.name] = quantizer.channel_axis
    ranks = {tensor: len(static_shape(view, tensor)) for tensor in axes}
    return {tensor: axis % ranks[tensor] for tensor, axis in axes.items() if ranks[tensor]}


def _jointly_scored(view: GraphView, plan: Plan, reached: Collection[str]) -> list[str]:
    """Return the outputs of layers whose groups have several channels each, but not very many."""
    # A node that replaced a layer has the layer's output and no groups.
    groups = {
        layer.output: int_attribute(view.producer[layer.output], "group", 1)
        for layer in plan.layers
        if layer.output in reached
    }
    channels = {
        layer.output: static_shape(view, layer.output)[layer.output_axis]
        for layer in plan.layers
        if layer.output in groups
    }
    return [name for name, count in channels.items() if groups[name] < count <= _MOST_JOINT_CHANNELS]


def scored_positions(
    view: GraphView, plan: Plan, axes: Mapping[str, int], size: int, count: int, limit: int
) -> set[str]:
    """Return the layer outputs whose positions are scored separately.

    Those with the fewest positions come first, as many as fit in memory.
    """
    shapes = {x.output: static_shape(view, x.output) for x in plan.layers if x.output in axes}
    positions = {
        t: int(np.prod(s)) // (size * s[axes[t]])
        for t, s in shapes.items()
        if s[0] == size and axes[t] and s[axes[t]]
    }
    taken: NDArray[np.int64] = np.cumsum(sorted(4 * count * n for n in positions.values()))
    order = sorted(positions, key=lambda t: positions[t])
    return {t for t, used in zip(order, taken, strict=True) if used <= limit}


def _summarize(
    differentiated: GradientModel, axes: dict[str, int], wanted: Wanted, others: list[str]
) -> tuple[ModelProto, list[int], dict[str, str], dict[str, str]]:
    """Reduce every J^T v to the mean squares of its channels, one row per sample, and add joint products.

    Returns the model, the numbers of channels, and the outputs with the sums of squares at the positions of
    some tensors and with the products (J^T v)(J^T v)^T; the model also outputs ``others``.
    """
    model, gradients, shapes, size, placed = (
        differentiated.model,
        differentiated.gradients,
        wanted.view,
        wanted.size,
        wanted.placed,
    )
    joint = _jointly_scored(shapes, wanted.plan, axes.keys() & wanted.together)
    builder, parts, channels = edit.Builder(model, "eptq/"), [], []
    products = {
        tensor: _product(builder, gradients[tensor], axes[tensor], static_shape(shapes, tensor))
        for tensor in joint
    }
    positions_of: dict[str, str] = {}
    for tensor, axis in axes.items():
        shape = static_shape(shapes, tensor)
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
        # If the tensor mixes samples, all of them get the same row.
        parts.append(
            builder.add("Expand", [mean, builder.constant(np.array([size, shape[axis]], np.int64), "rows")])
        )
    columns = [builder.add("Concat", parts, CHANNEL_SCORES, axis=1)] if parts else []
    result = edit.with_nodes(model, [*model.graph.node, *builder.nodes], builder.initializers)
    edit.set_outputs(result, [*columns, *positions_of.values(), *others, *products.values()])
    return faster(fold_constants(result)), channels, positions_of, products


def _product(b: edit.Builder, gradient: str, axis: int, shape: tuple[int, ...]) -> str:
    """Add g gᵀ, of shape (n_channels, n_channels), with one row of g per channel."""
    turned = b.add("Transpose", [gradient], perm=[axis, *(i for i in range(len(shape)) if i != axis)])
    rows = b.add("Reshape", [turned, b.constant(np.array([shape[axis], -1], np.int64), "rows")])
    return b.add("Gemm", [rows, rows], transB=1)


def _upstream(tensor: str) -> str:
    """Return the input that takes the gradient of a tensor read by later blocks."""
    return f"eptq/upstream/{tensor}"
