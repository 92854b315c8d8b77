"""Step 4: label-free Hessian bound by Hutchinson probes (paper section 3.1 and 3.2).

With v Rademacher on the outputs, E[(J^T v)^2] = diag(J^T J). One backward pass of <v, f(x)> gives J^T v for every
layer and every weight. Probes are independent per sample: in the squared gradient of a batch the cross terms
vanish in expectation, so that it estimates the sum over the samples.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator

import numpy as np
from numpy.typing import NDArray
from onnx import ModelProto, TensorProto, helper

from eptq_onnx import ops
from eptq_onnx.config import Config
from eptq_onnx.data import Samples
from eptq_onnx.engines.base import Engine
from eptq_onnx.errors import GradientError
from eptq_onnx.graph import edit
from eptq_onnx.graph.fold import fold_sizes
from eptq_onnx.graph.lower import lower
from eptq_onnx.graph.shapes import specialize
from eptq_onnx.graph.view import GraphView, int_attribute
from eptq_onnx.parallel import ordered_map
from eptq_onnx.runtime import Session
from eptq_onnx.types import Array, Calibration, Feeds, Plan, Scores

_LOSS, _ATTENTION = "eptq/probe_loss", "eptq/attention"
_MOST_JOINT_CHANNELS = 2048


def score(
    model: ModelProto,
    plan: Plan,
    samples: Samples,
    indices: NDArray[np.int64],
    calibration: Calibration,
    weights: Collection[str],
    engine: Engine,
    config: Config,
    progress: Callable[[int, int], None],
) -> Scores:
    """Scores of all layers, samples and channels, and of the elements of some weights.

    Parameters
    ----------
    model : ModelProto
        The normalized float model; it is not changed.
    plan : Plan
    samples : Samples
    indices : ndarray of shape (n_samples,)
        The samples to score.
    calibration : Calibration
        Gives the spread that each part of the outputs is divided by.
    weights : collection of str
        The weights whose elements are scored. They cost as much again as everything else: their gradients, and the fast
        kernels that convolutions have for constant weights.
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
    size = samples.micro_batch(len(indices))
    private, _ = lower(fold_sizes(specialize(model, samples.two_batches(size))), ops.LOWERINGS)
    points = ops.output_parts(GraphView(model))
    if not points:
        raise GradientError("no output of the model depends on its layers through operators that have a gradient.")
    probes = _add_loss(private, points)
    axes = _scored_tensors(GraphView(private), plan)
    gradient = engine.differentiate(private, _LOSS, [*weights, *axes])
    reached = {tensor: axis for tensor, axis in axes.items() if tensor in gradient.gradients}
    joint = _jointly_scored(GraphView(private), plan, reached)
    summary, channels, products = _summarize(gradient.model, reached, gradient.gradients, GraphView(private), size, joint)
    session = Session(summary)
    fixed = {name: GraphView(private).constant(name) for name in weights if name in session.inputs}
    spread = {name: float(np.sqrt(calibration.variance.get(point, 0.0))) or 1.0 for point, name in probes.items()}
    shapes = {name: _shape(private, point) for point, name in probes.items()}

    squared = {name: np.zeros(fixed[name].shape, np.float64) for name in fixed}
    outputs: dict[str, NDArray[np.float64]] = {}
    power = np.zeros((len(indices), sum(channels)), np.float64)
    rng = np.random.default_rng(config.seed)
    rounds = -(-len(indices) // size)
    wanted = [_ATTENTION, *(gradient.gradients[n] for n in fixed), *products.values()]

    def probe(k: int) -> Iterator[Feeds]:
        places = np.arange(k * size, (k + 1) * size)
        feeds = {n: v for n, v in samples.take(indices[places % len(indices)]).items() if n in session.inputs}
        for _ in range(config.probes):
            draw = {n: _rademacher(rng, shapes[n], places < len(indices)) / np.float32(spread[n]) for n in probes.values()}
            yield {**feeds, **fixed, **draw}

    runs = ordered_map(lambda feeds: session.run(feeds, wanted), (feeds for k in range(rounds) for feeds in probe(k)))
    for turn, values in enumerate(runs):
        rows = power[turn // config.probes * size :][:size]
        rows += values[_ATTENTION][: len(rows)]
        for name in fixed:
            squared[name] += np.square(values[gradient.gradients[name]])
        for name, product in products.items():
            outputs[name] = outputs.get(name, 0.0) + values[product].astype(np.float64)
        progress(turn + 1, rounds * config.probes)
    count = config.probes * len(indices)
    columns = np.split((power / config.probes).astype(np.float32), np.cumsum(channels)[:-1], axis=1)
    return Scores(
        channels=dict(zip(reached, columns, strict=True)),
        weights={n: (h / count).astype(np.float32) for n, h in squared.items()},
        outputs={n: h / count for n, h in outputs.items()},
        output_size=sum(int(np.prod(s)) for s in shapes.values()) // size,
        unreached={layer.node: gradient.unreached[layer.output] for layer in plan.layers if layer.output in gradient.unreached},
    )


def _shape(model: ModelProto, name: str) -> tuple[int, ...]:
    return _static_shape(GraphView(model), name)


def _static_shape(view: GraphView, name: str) -> tuple[int, ...]:
    shape = view.static_shape(name)
    if shape is None:
        raise GradientError(f"the shape of {name} is not known even for fixed inputs; run with --preset fast, which needs no gradients.")
    return shape


def _add_loss(model: ModelProto, points: list[str]) -> dict[str, str]:
    """Append ``sum <v, output>``; returns probe point to the input that feeds v."""
    builder, names, terms = edit.Builder(model, "eptq/"), {}, []
    for k, point in enumerate(points):
        names[point] = f"eptq/probe_{k}"
        model.graph.input.append(helper.make_tensor_value_info(names[point], TensorProto.FLOAT, _shape(model, point)))
        terms.append(builder.reduce("ReduceSum", builder.add("Mul", [point, names[point]]), None))
    total = terms[0]
    for term in terms[1:]:
        total = builder.add("Add", [total, term])
    builder.add("Identity", [total], _LOSS)
    model.graph.node.extend(builder.nodes)
    model.graph.initializer.extend(builder.initializers)
    edit.add_output(model, _LOSS)
    return names


def _scored_tensors(view: GraphView, plan: Plan) -> dict[str, int]:
    """Layer outputs and quantized activations that are computed in the graph, with their channel axes."""
    axes = {layer.output: layer.output_axis for layer in plan.layers}
    for quantizer in plan.activations:
        if quantizer.name in view.producer and quantizer.name not in axes:
            axes[quantizer.name] = quantizer.channel_axis
    ranks = {tensor: len(_static_shape(view, tensor)) for tensor in axes}
    return {tensor: axis % ranks[tensor] for tensor, axis in axes.items() if ranks[tensor]}


def _jointly_scored(view: GraphView, plan: Plan, reached: Iterable[str]) -> list[str]:
    """Outputs of the layers without groups; of very many channels the products would not pay."""
    nodes = {n.name: n for n in view.nodes}
    return [
        layer.output for layer in plan.layers
        if layer.output in reached
        and int_attribute(nodes[layer.node], "group", 1) == 1
        and _static_shape(view, layer.output)[layer.output_axis] <= _MOST_JOINT_CHANNELS
    ]  # fmt: skip


def _summarize(
    model: ModelProto, axes: dict[str, int], gradients: dict[str, str], shapes: GraphView, size: int, joint: list[str]
) -> tuple[ModelProto, list[int], dict[str, str]]:
    """Reduce every J^T v to its channels' mean squares, one row a sample, and multiply those of ``joint`` tensors.

    Returns the model, the numbers of channels, and the outputs with the products (J^T v)(J^T v)^T.
    """
    builder, parts, channels = edit.Builder(model, "eptq/"), [], []
    products = {tensor: _product(builder, gradients[tensor], axes[tensor], _static_shape(shapes, tensor)) for tensor in joint}
    for tensor, axis in axes.items():
        shape = _static_shape(shapes, tensor)
        per_sample = shape[0] == size and axis != 0
        positions = [i for i in range(len(shape)) if i != axis and not (per_sample and i == 0)]
        gradient = gradients[tensor]
        power = (
            builder.reduce("ReduceSumSquare", gradient, positions, keepdims=False)
            if positions
            else builder.add("Mul", [gradient, gradient])
        )
        mean = builder.add("Mul", [power, builder.constant(1.0 / float(np.prod([shape[i] for i in positions])), "mean")])
        channels.append(shape[axis])
        # Where samples are mixed, all get the same row.
        parts.append(builder.add("Expand", [mean, builder.constant(np.array([size, shape[axis]], np.int64), "rows")]))
    builder.add("Concat", parts, _ATTENTION, axis=1)
    result = edit.with_nodes(model, [*model.graph.node, *builder.nodes], builder.initializers)
    weights = [g for tensor, g in gradients.items() if tensor not in axes]
    edit.set_outputs(result, [_ATTENTION, *weights, *products.values()])
    return result, channels, products


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
