"""Layer-wise reconstruction: correct and round one layer at a time, without iterating over the network.

In topological order, each weight is first corrected for the errors upstream and then rounded with error
compensation, and the bias absorbs the mean of the remaining error; see `eptq_onnx.numerics.compensation`.
Float and quantized network are walked once, side by side: the inputs of a layer follow from those of the
layers before it. Positions (pixels, tokens, samples) are weighted by their Hessian scores, since errors that
do not reach the network's outputs cost nothing. For each output of a layer they are also weighted by the
slope of the activation function behind it: where a Relu is flat, errors do not pass.
"""

from __future__ import annotations

import math
import sys
from collections import ChainMap
from collections.abc import Callable, Mapping
from dataclasses import replace

from onnx import ModelProto, NodeProto

from eptq_onnx.config import Config
from eptq_onnx.data.samples import Selection
from eptq_onnx.execute.walkers import Walkers, batches_on_the_way
from eptq_onnx.graph import edit
from eptq_onnx.graph.infer import infer_shapes
from eptq_onnx.graph.view import GraphView
from eptq_onnx.method.reconstruct.layers import (
    BiasGrid,
    Solution,
    Solver,
    activation_of,
    read_together,
    wanted_rows,
)
from eptq_onnx.numerics.linear import row_shape
from eptq_onnx.numerics.quant_math import FEW_BITS
from eptq_onnx.numerics.reconstruction import RATIOS, REFITS
from eptq_onnx.numerics.scales import ScaleRule
from eptq_onnx.numerics.types import Array
from eptq_onnx.ops import linear_form, spec_of
from eptq_onnx.records import Network, Plan, Rounding

WALKS = 2.5
"""Cost of walking both networks, in walks of the float network; the other one has quantizers, too."""
_FEWEST, _MOST = 32, 96
"""Fewest and most samples to walk with where all weights have many bits."""
_SYSTEMS = 10
"""Linear systems solved per layer: feedback, target, and about 4 dampings on each half of the rows."""
_HALF, _A_VISIT = 0.5, 2.0
"""Time of an operation relative to one in a large matrix product: in products of a matrix with itself, and
where elements are rounded one by one.
"""
_RANGES = 60
"""Values that are looked at to choose the range of a weight, per element."""


def reconstruct(
    network: Network,
    quantized: ModelProto,
    start: Rounding,
    selection: Selection,
    config: Config,
    progress: Callable[[int, int], None],
) -> tuple[Rounding, dict[str, str]]:
    """Correct and round every layer on the inputs that it receives in the quantized network.

    Parameters
    ----------
    network : Network
        In its scores, ``positions`` weights the inputs, and ``outputs`` says which errors of a layer add up
        in the network's outputs.
    quantized : ModelProto
        The QDQ model of ``start``, which provides the quantizers of the activations.
    start : Rounding
        Initial rounding; layers that are not reconstructed keep it.
    selection : Selection
        The samples to use; fewer where their tensors take too much memory.
    config : Config
    progress : callable
        Called with the number of layers done and the total.

    Returns
    -------
    Rounding
    dict of str to str
        Layers that keep their rounding, each with the reason.

    Notes
    -----
    Input-error correction and sequential rounding follow OBQ (Frantar and Alistarh 2022) and GPTQ (Frantar et
    al. 2023).
    """
    model, plan, scores = network.model, network.plan, network.scores
    samples, indices = selection.samples, selection.indices
    size = samples.micro_batch()
    batches = list(samples.batches(indices, size))
    student, names = _with_open_layers(quantized, plan)
    inputs = {n.name: n.input[0] for n in student.graph.node}
    shapes, tensors = samples.two_batches(size), [layer.input for layer in plan.layers]
    counts = batches_on_the_way(model, shapes, tensors, len(batches), 2, config.max_memory)
    walkers = Walkers((model, student), batches, samples.take, counts)
    view = GraphView(model)
    nodes = {n.name: n for n in view.nodes}
    integers, grids, biases = dict(start.integers), dict(start.weights), dict(start.biases)
    targets: dict[str, Array] = {}
    skipped = unsolved(model, plan)
    solver = Solver(view, nodes, plan, start, config, scores)
    together = read_together(solver, inputs, skipped)
    solved: dict[str, Solution] = {}
    for k, layer in enumerate(plan.layers):
        reached = walkers.reach(k, layer.input, inputs[layer.node])
        if layer.node not in solved and solver.form(layer) is not None:
            members = together.get(layer.node, (layer,))
            solved |= solver.solve(members, reached, k, rounds=layer.node not in skipped)
            if layer.node not in solved:
                skipped.update({m.node: "no sample gives it finite inputs" for m in members} | skipped)
        # These are the largest arrays: nothing holds them while the next ones are made.
        del reached
        solution = solved.pop(layer.node, None)
        if solution is not None and solution.rounded is not None:
            integers[layer.weight], grids[layer.weight], target = solution.rounded
            if config.optimizes:
                targets[layer.weight] = target
        rounded = grids[layer.weight].dequantize(integers[layer.weight])
        walkers.set_constant(names[layer.node][0], rounded)
        if layer.bias is not None:
            shift = 0 if solution is None else solution.mean_error(rounded)
            bias = biases[layer.bias] = biases[layer.bias] + shift
            stored = BiasGrid.of(layer, plan, start).round(bias, grids[layer.weight].scale)
            walkers.set_constant(names[layer.node][1], stored)
        progress(k + 1, len(plan.layers))
    corrected: Mapping[str, Array] = ChainMap(targets, start.targets)  # type: ignore[arg-type]  # it is only read
    return replace(start, integers=integers, weights=grids, biases=biases, targets=corrected), skipped


def enough_samples(model: ModelProto, plan: Plan, multiplications: Mapping[str, float]) -> int:
    """Return how many samples are worth walking with: as many as all layers' rows can be drawn from.

    Few bits need all samples: there, the error that remains depends on each of them.

    Parameters
    ----------
    model : ModelProto
        The normalized float model.
    plan : Plan
    multiplications : mapping of str to float
        Multiplications of each layer for one sample, by node; 0 where they are unknown.
    """
    view = GraphView(model)
    nodes = {n.name: n for n in view.nodes}
    enough = _FEWEST
    for layer in plan.layers:
        if layer.weight_spec.bits <= FEW_BITS:
            return sys.maxsize
        form, shape = linear_form(nodes[layer.node], view), view.constant_shape(layer.weight)
        if form is not None:
            rows = wanted_rows(row_shape(form, shape)[2], layer.weight_spec.bits)
            positions = multiplications.get(layer.node, 0.0) / math.prod(shape)
            enough = max(enough, math.ceil(rows / max(positions, 1.0)))
    return min(enough, _MOST)


def work(
    model: ModelProto, plan: Plan, config: Config, multiplications: Mapping[str, float], samples: int
) -> tuple[float, float]:
    """Return the approximate multiplications of `reconstruct` besides the walk, and the values it gathers.

    Parameters
    ----------
    model : ModelProto
        The normalized float model.
    plan : Plan
    config : Config
    multiplications : mapping of str to float
        Multiplications of each layer for one sample, by node; 0 where they are unknown.
    samples : int
        Number of samples.
    """
    view = GraphView(model)
    nodes = {n.name: n for n in view.nodes}
    total = values = 0.0
    for layer in plan.layers:
        form = linear_form(nodes[layer.node], view)
        if form is not None:
            few = layer.weight_spec.bits <= FEW_BITS
            visits = len(RATIOS[ScaleRule.ANY]) + 3 * config.descent_passes * (1 + REFITS) if few else 4
            shape = view.constant_shape(layer.weight)
            groups, outputs, terms = row_shape(form, shape)
            rows = float(wanted_rows(terms, layer.weight_spec.bits))
            if multiplications.get(layer.node):
                rows = min(rows, samples * multiplications[layer.node] / math.prod(shape))
            total += groups * rows * terms * outputs
            values += 2 * groups * rows * terms + _RANGES * math.prod(shape)
            if activation_of(view, layer, form, config) is not None:
                groups, outputs = groups * outputs, 1
            solved = _SYSTEMS * (terms / 3 + outputs) + _A_VISIT * visits * outputs
            total += groups * terms * terms * (_HALF * rows + solved)
            total += groups * terms * outputs * rows
    return total, values


def unsolved(model: ModelProto, plan: Plan) -> dict[str, str]:
    """Return the layers that cannot be reconstructed, each with the reason."""
    view = GraphView(model)
    nodes = {n.name: n for n in view.nodes}
    shared, tables = plan.shared_weights, {table.weight for table in plan.tables}
    found = {}
    for layer in plan.layers:
        if linear_form(nodes[layer.node], view) is None:
            found[layer.node] = f"this {layer.op_type} is not a plain matrix product"
        elif layer.weight_spec.is_given:
            found[layer.node] = "the file that was given has its integers alone"
        elif layer.weight in shared:
            found[layer.node] = f"its weight {layer.weight} is shared by several layers"
        elif layer.weight in tables:
            found[layer.node] = f"its weight {layer.weight} is a lookup table, too"
    return found


def _with_open_layers(quantized: ModelProto, plan: Plan) -> tuple[ModelProto, dict[str, tuple[str, str]]]:
    """Return the QDQ model with weights and biases as inputs of the walk, and their names by layer node."""
    builder = edit.Builder(quantized, "closed_form/")
    layers = {layer.node: layer for layer in plan.layers}
    names: dict[str, tuple[str, str]] = {}
    for node in quantized.graph.node:
        copy = NodeProto()
        copy.CopyFrom(node)
        layer, row = layers.get(node.name), spec_of(node)
        if layer is not None:
            names[node.name] = builder.unique(f"{node.name}/weight"), builder.unique(f"{node.name}/bias")
            copy.input[row.weight or 0] = names[node.name][0]
            if layer.bias is not None and row.bias is not None:
                del copy.input[row.bias :]
                copy.input.append(names[node.name][1])
        builder.nodes.append(copy)
    return infer_shapes(edit.with_nodes(quantized, builder.nodes)), names
