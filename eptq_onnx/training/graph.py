"""Build the training graph (paper sections 3.4 and 4).

One graph holds the float model (teacher, constant weights) and the quantized model (student, with weights,
biases and activation scales as inputs), and compares the outputs of every layer and of the networks. Soft
rounding is elementwise in the weights and independent of the batch, so it stays in numpy, outside the graph.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
from onnx import ModelProto, NodeProto, TensorProto, ValueInfoProto, helper, numpy_helper

from eptq_onnx import ops
from eptq_onnx.config import Config
from eptq_onnx.data.samples import Selection, filled_batches
from eptq_onnx.engines.base import (
    ACTIVATION_SCALES,
    ATTENTION,
    ERRORS,
    FLOAT_SHARE,
    LOSS,
    TEACHER,
    Engine,
    TrainingGraph,
)
from eptq_onnx.errors import GradientError
from eptq_onnx.execute import finite
from eptq_onnx.execute.micro import micro_batch
from eptq_onnx.graph import edit, qdq_nodes
from eptq_onnx.graph.fold import fold_sizes
from eptq_onnx.graph.kernels import faster
from eptq_onnx.graph.lower import lower
from eptq_onnx.graph.shapes import empty_tensor, specialize
from eptq_onnx.graph.view import GraphView, last_layers
from eptq_onnx.ops import LSQ_DOMAIN
from eptq_onnx.proto import store
from eptq_onnx.proto.bodies import node_reads
from eptq_onnx.records import Network, Plan, Rounding
from eptq_onnx.training.worth import is_learned

_LEAST_SPREAD = 1e-30
"""Smallest variance of an output part that float32 can divide and multiply by."""


def training_graph(
    network: Network, start: Rounding, selection: Selection, config: Config, engine: Engine
) -> TrainingGraph:
    """Build the training graph.

    Parameters
    ----------
    network : Network
        Output parts without a variance in its calibration are not compared.
    start : Rounding
        Provides zero points and the constants' ranges.
    selection : Selection
        The samples that the optimization runs.
    config : Config
        The graph takes ``batch_size`` samples at a time, or fewer if the model prescribes it; disabled
        options cost nothing.
    engine : Engine

    Raises
    ------
    GradientError
        If the graph cannot be differentiated.
    """
    model, plan = network.model, network.plan
    samples = selection.samples
    size = micro_batch(model, samples, config.batch_size)
    kept = {*plan.weight_specs, *(q.name for q in plan.constants)}
    private = fold_sizes(specialize(model, samples.two_batches(size)), kept)
    empty = empty_tensor(private)
    if empty is not None:
        raise GradientError(f"{empty} has no elements in any of the samples used for gradients.")
    outputs = [layer.output for layer in plan.layers]
    points = ops.output_parts(GraphView(model), config.outputs)
    safe = finite.differentiable(
        private,
        [*points, *outputs],
        partial(filled_batches, samples, selection.indices, size),
        config.block_bytes,
        ops.is_elementwise,
    )
    lowered, refused = lower(private if safe is None else safe, ops.LOWERINGS)
    view = GraphView(lowered)
    spreads = network.calibration.variance
    parts = [
        p
        for p in points
        if _LEAST_SPREAD < spreads.get(p, 0.0) < 1 / _LEAST_SPREAD and view.static_shape(p) is not None
    ]
    last = last_layers(view, plan.layers)
    # A scale is learned if x has a gradient too (onnxruntime-training's builder needs both) and a layer reads
    # it.
    moving = view.downstream(outputs, ops.without_gradient(view))
    needed = view.upstream([*outputs, *parts])
    read = {name for node in view.nodes if any(o in needed for o in node.output) for name in node_reads(node)}
    low = [q.name for q in plan.activations if is_learned(q, config)]
    learned = tuple(name for name in low if name in moving & read)
    student = _Student(lowered, plan, start, learned)
    train, compared = _compose(
        private, student, parts, size, masked=safe is not None, gradual=config.gradual_activations
    )
    evaluate, _ = lower(
        _compose(private, student, parts, size, masked=safe is not None, gradual=False)[0], ops.QUANTIZERS
    )
    parameters = [*plan.weight_specs, *(x.bias for x in plan.layers if x.bias is not None)]
    edit.promote_to_inputs(evaluate, parameters)
    edit.set_outputs(
        evaluate, [LOSS, ERRORS, *(side + layer.output for layer in last for side in (TEACHER, ""))]
    )
    gradient = engine.differentiate(train, LOSS, [*parameters, *([ACTIVATION_SCALES] if learned else [])])
    # Weights that no gradient reaches are fed as well, so that the whole student is quantized.
    edit.promote_to_inputs(gradient.model, parameters)
    edit.set_outputs(gradient.model, [LOSS, ERRORS, *gradient.gradients.values()])
    # Unused gradients (of scales that are not learned) would cost a fifth of the step.
    edit.prune(gradient.model)
    return TrainingGraph(
        train=faster(gradient.model),
        evaluate=faster(evaluate),
        gradients=gradient.gradients,
        quantizers=learned,
        channels=tuple(x.channels for x in compared[: len(outputs)]),
        positions=np.array([x.positions for x in compared[: len(outputs)]], np.float32),
        outputs={name: x.positions for name, x in zip(parts, compared[len(outputs) :], strict=True)},
        last=tuple(layer in last for layer in plan.layers),
        micro_batch=size,
        input_axes={
            name: axis
            for name, axis in ops.channel_axes_of(GraphView(private)).items()
            if name in view.inputs
        },
        unreached={n: why for n, why in gradient.unreached.items() if n in plan.weight_specs},
        notes=tuple(f"{node}: {why}" for node, why in refused.items()),
    )


@dataclass(frozen=True)
class _Compared:
    """A tensor compared between both networks: its number of columns, and the elements summed in each."""

    channels: int
    positions: float


@dataclass(frozen=True)
class _Student:
    """Ingredients of the quantized network.

    Parameters
    ----------
    lowered : ModelProto
        The float network, lowered to operators that have gradients.
    plan : Plan
    start : Rounding
    learned : tuple of str
        Activation quantizers whose scales are learned.
    """

    lowered: ModelProto
    plan: Plan
    start: Rounding
    learned: tuple[str, ...]


def _compose(
    model: ModelProto, made_of: _Student, parts: Sequence[str], size: int, *, masked: bool, gradual: bool
) -> tuple[ModelProto, list[_Compared]]:
    """Return both networks and their losses in one model, for ``size`` samples."""
    lowered, plan, start, learned = made_of.lowered, made_of.plan, made_of.start, made_of.learned
    view, b = GraphView(lowered), edit.Builder(lowered, "eptq/")
    student, infos, stands_for = _student(view, b, made_of, gradual)
    # The teacher needs no gradient, so it keeps the original operators, which run faster.
    teacher, teacher_constants = _teacher(
        GraphView(model), [*(layer.output for layer in plan.layers), *parts]
    )
    layers = [(x.output, x.output, x.output_axis) for x in plan.layers]
    compared = _losses(view, b, [*layers, *((p, stands_for.get(p, p), None) for p in parts)], size, masked)
    losses = b.nodes[len(student) :]
    constants = [
        *b.initializers,
        *teacher_constants,
        *_zero_biases(plan, start),
        *_constant_operands(view, plan, start),
    ]
    replaced = {q.name for q in plan.constants}
    result = edit.with_nodes(lowered, [*teacher, *student, *losses], constants, drop=replaced)
    if learned:
        result.graph.input.append(
            helper.make_tensor_value_info(ACTIVATION_SCALES, TensorProto.FLOAT, [len(learned)])
        )
    columns = sum(x.channels for x in compared)
    if gradual:
        result.graph.input.append(helper.make_tensor_value_info(FLOAT_SHARE, TensorProto.FLOAT, [1]))
    result.graph.input.append(helper.make_tensor_value_info(ATTENTION, TensorProto.FLOAT, [size, columns]))
    result.graph.value_info.extend(infos)
    edit.set_outputs(result, [LOSS, ERRORS])
    edit.import_domain(result, LSQ_DOMAIN)
    edit.prune(result)
    return result, compared


def _student(
    view: GraphView, b: edit.Builder, made_of: _Student, gradual: bool
) -> tuple[list[NodeProto], list[ValueInfoProto], dict[str, str]]:
    """Add the model's nodes to the builder, with quantizers on the tensors of the plan.

    Returns the nodes, the types of the new tensors, and the replacement of each quantized tensor.
    """
    plan, start, learned = made_of.plan, made_of.start, made_of.learned
    quantizers = {tensor: q for q in plan.activations for tensor in q.sources}
    with_new_bias = {x.node: x.bias for x in plan.layers if x.bias is not None and not x.has_bias}
    dynamic = {node: q.name for q in plan.dynamic for node in q.nodes}
    renamed: dict[str, str] = {}
    ranged: dict[str, str] = {}
    infos: list[ValueInfoProto] = []
    scales = {name: f"eptq/scale_{k}" for k, name in enumerate(learned)}
    for k, name in enumerate(scales.values()):
        b.add(
            "Slice",
            [ACTIVATION_SCALES, *(b.constant(np.array([v], np.int64), "place") for v in (k, k + 1))],
            name,
        )
    if gradual:
        b.add("Sub", [b.constant(np.ones(1, np.float32), "one"), FLOAT_SHARE], "eptq/integer_share")

    def fake_quantize(tensor: str) -> None:
        quantizer = quantizers[tensor]
        form, grid = quantizer.spec.format, start.grids[quantizer.name]
        exact, source = b.unique(f"{tensor}/quantized"), tensor
        if tensor in plan.rewritten:
            source = qdq_nodes.add_widened(b, tensor, grid, tensor)
        if quantizer.name in scales or form.narrower_than_container:
            scale = scales.get(quantizer.name)
            if scale is None:
                # Not b.constant, which shares equal constants: engines may give each scale a gradient.
                scale = b.unique("eptq/fixed_scale")
                b.keep(grid.scale.reshape(1), scale)
            zero = b.constant(np.array([grid.zero_point], np.float32), "zero_point")
            b.add(
                "FakeQuant",
                [source, scale, zero],
                outputs=[exact, b.unique(f"{tensor}/mask")],
                domain=LSQ_DOMAIN,
                quant_min=form.qmin,
                quant_max=form.qmax,
            )
        else:
            # Six times as fast. With such a wide range next to nothing is clipped, so the gradient passes
            # unmasked.
            qdq_nodes.add_pair(b, source, qdq_nodes.scale_names(b, tensor, grid), tensor, exact)
        if gradual:
            # p x + (1 - p) q(x): gradual activation quantization.
            exact = b.add(
                "Add", [b.add("Mul", [tensor, FLOAT_SHARE]), b.add("Mul", [exact, "eptq/integer_share"])]
            )
        renamed[tensor] = exact
        # The engine needs the shape, which cannot be inferred behind a quantizer.
        infos.append(helper.make_tensor_value_info(exact, TensorProto.FLOAT, view.shape(tensor)))

    def quantized_in_every_run(tensor: str) -> str:
        """Return what stands for the input of dynamic layers."""
        if tensor not in ranged:
            made = [b.unique(f"{tensor}/{what}") for what in ("integers", "scale", "zero")]
            b.add("DynamicQuantizeLinear", [renamed.get(tensor, tensor)], outputs=made)
            ranged[tensor] = b.add("DequantizeLinear", made, b.unique(f"{tensor}/dynamic"))
            infos.append(helper.make_tensor_value_info(ranged[tensor], TensorProto.FLOAT, view.shape(tensor)))
        return ranged[tensor]

    for name in view.inputs:
        if name in quantizers:
            fake_quantize(name)
    for node in view.nodes:
        own = {dynamic[node.name]: quantized_in_every_run(dynamic[node.name])} if node.name in dynamic else {}
        copy = edit.renamed(node, {**renamed, **own})
        if node.name in with_new_bias:
            del copy.input[2:]
            copy.input.append(with_new_bias[node.name] or "")
        b.nodes.append(copy)
        for name in node.output:
            if name in quantizers:
                fake_quantize(name)
    return list(b.nodes), infos, renamed


def _teacher(view: GraphView, outputs: list[str]) -> tuple[list[NodeProto], list[TensorProto]]:
    """Copy the nodes that compute ``outputs`` under other names, with constants of their own."""
    needed = view.upstream(outputs)
    nodes, constants = [], []
    used: set[str] = set()
    names = {n: TEACHER + n for n in (*view.producer, *view.initializers)}
    for node in view.nodes:
        if not any(o in needed for o in node.output):
            continue
        copy = edit.renamed(node, names)
        copy.name = TEACHER + node.name
        used.update(node_reads(node))
        nodes.append(copy)
    for tensor in view.model.graph.initializer:
        if tensor.name in used:
            constants.append(edit.renamed_tensor(tensor, names[tensor.name]))
    return nodes, constants


def _losses(
    view: GraphView, b: edit.Builder, tensors: Iterable[tuple[str, str, int | None]], size: int, masked: bool
) -> list[_Compared]:
    """Add the squared errors of every sample, and their weighted sum.

    Each tensor comes with its replacement in the student and, if its errors are summed per channel, its
    channel axis. If ``masked``, positions that are not finite in the teacher are left out.
    """
    columns, compared = [], []
    for name, ours, axis in tensors:
        shape = view.static_shape(name)
        if shape is None:
            raise GradientError(f"the shape of {name} is not known even for fixed inputs.")
        channel = None if axis is None else axis % len(shape)
        per_sample = len(shape) > 0 and shape[0] == size and channel != 0
        axes = [i for i in range(len(shape)) if i != channel and not (per_sample and i == 0)]
        difference = b.add("Sub", [ours, TEACHER + name])
        if masked:
            difference = finite.kept(b, difference, TEACHER + name)
        error = (
            b.reduce("ReduceSumSquare", difference, axes, keepdims=True)
            if axes
            else b.add("Mul", [difference, difference])
        )
        channels = 1 if channel is None else shape[channel]
        error = b.add(
            "Reshape", [error, b.constant(np.array([size if per_sample else 1, channels], np.int64), "rows")]
        )
        if not per_sample:
            # If the tensor mixes samples, each sample gets an equal share of the error.
            all_rows = b.constant(np.array([size, channels], np.int64), "rows")
            error = b.add("Expand", [b.add("Mul", [error, b.constant(1.0 / size, "share")]), all_rows])
        columns.append(error)
        compared.append(
            _Compared(
                channels, max(float(np.prod([shape[i] for i in axes])), 1.0) / (1 if per_sample else size)
            )
        )
    b.add("Concat", columns, ERRORS, axis=1)
    b.reduce("ReduceSum", b.add("Mul", [ERRORS, ATTENTION]), None, LOSS)
    return compared


def _zero_biases(plan: Plan, start: Rounding) -> list[TensorProto]:
    """Return initializers for the biases that the float model lacks."""
    return [
        numpy_helper.from_array(start.biases[x.bias], x.bias)
        for x in plan.layers
        if x.bias is not None and not x.has_bias
    ]


def _constant_operands(view: GraphView, plan: Plan, start: Rounding) -> list[TensorProto]:
    """Return the constant operands of integer operators, and tables, as the written model will hold them."""
    folder = store.folder_of(view.model)
    return [
        store.constant(start.grids[q.name].round(view.constant(q.name)), q.name, folder)
        for q in plan.constants
    ]
