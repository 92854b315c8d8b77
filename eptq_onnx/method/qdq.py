"""Write the standard QDQ model.

Every quantized activation gets a QuantizeLinear/DequantizeLinear pair that all its readers share; weights and
biases become quantized initializers behind a DequantizeLinear that takes over the tensor's name. For bit
widths below the container's, a Clip on the integers between the two nodes keeps the range.

A layer whose activations are quantized in every run reads them behind a DynamicQuantizeLinear and a
DequantizeLinear; the stored file has other nodes there, see `eptq_onnx.graph.integer_products`.

Float layers read their integer weights through Casts and Mul, which runtimes fold into float constants. They
do not fold a DequantizeLinear, and some make an integer kernel of it.
"""

from __future__ import annotations

from collections import ChainMap
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import numpy as np
from onnx import ModelProto, NodeProto, TensorProto, helper

from eptq_onnx.graph import blocks, branches, edit, qdq_nodes
from eptq_onnx.graph.blocks import Blocks
from eptq_onnx.graph.view import GraphView
from eptq_onnx.numerics import quant_math
from eptq_onnx.numerics.biases import BiasSpec
from eptq_onnx.numerics.formats import Granularity, IntFormat, PerAxis, PerBlock, PerTensor
from eptq_onnx.numerics.grid import Grid
from eptq_onnx.numerics.types import Values
from eptq_onnx.ops import spec_of
from eptq_onnx.records import (
    FULL_BITS,
    ConstantOperand,
    HeldWeight,
    Layer,
    LookupTable,
    Plan,
    Rounding,
)

PRODUCER = "eptq-onnx"


def write(model: ModelProto, plan: Plan, rounding: Rounding) -> tuple[ModelProto, dict[str, str]]:
    """Write the QDQ model.

    Parameters
    ----------
    model : ModelProto
        The normalized float model; it is not changed.
    plan : Plan
    rounding : Rounding

    Returns
    -------
    ModelProto
        Inputs and outputs as in ``model``.
    dict of str to str
        Quantized tensor to the tensor of the new model that holds its dequantized values.
    """
    writer = _Writer(model, plan, rounding)
    return writer.run(), writer.read_as


class _Writer:
    def __init__(self, model: ModelProto, plan: Plan, rounding: Rounding) -> None:
        self._model, self._plan, self._rounding = model, plan, rounding
        self._view = GraphView(model)
        self._b = edit.Builder(model)
        self._quantizers = {tensor: q for q in plan.activations for tensor in q.tensors}
        self._layers = {layer.node: layer for layer in plan.layers}
        self._dynamic = {node: q.name for q in plan.dynamic for node in q.nodes}
        """Layer to the input that it quantizes in every run."""
        self.read_as: dict[str, str] = {}
        """Tensor to the one that its readers read instead."""
        self._layer_reads: dict[tuple[str, str], str] = {}
        """(layer node, constant) to the tensor that this layer alone reads instead."""
        self._made_as: dict[str, str] = {}
        """Tensor to the name that its producer's output gets."""
        self._tables: dict[str, tuple[str, str]] = {}
        """Lookup table to the names of its integers and scales."""
        self._ranged: dict[str, str] = {}
        """Tensor to its dequantized values, of those that are quantized in every run."""
        self._blocks: dict[str, Blocks] = {}
        """Weight or lookup table in blocks to its constants."""
        self._widened: dict[str, str] = {}
        """Activation to its values on the grid of 16 bits."""
        self._replaced: set[str] = set()
        """Float constants whose name now belongs to a DequantizeLinear."""

    def run(self) -> ModelProto:
        b, view = self._b, self._view
        self._constants()
        skipped = set(self._plan.absorbed)
        for node in view.nodes:
            if node.name in skipped:
                self._made_as[node.input[0]] = node.output[0]
        pending = [i for i in view.inputs if i in self._quantizers]
        for name in pending:
            self._pair(name, name)
        for node in view.nodes:
            if node.name in skipped:
                continue
            b.nodes.extend(self._written(node))
            copy = b.nodes[-1]
            for k, name in enumerate(node.output):
                final = self._final(name)
                if final in self._quantizers and final not in self._plan.carried:
                    source = b.unique(f"{final}_float") if self._is_output(final) else final
                    self._made(copy, k, source)
                    self._pair(final, source)
                elif final:
                    self._made(copy, k, final)
        result = edit.with_nodes(self._model, b.nodes, b.initializers, drop=self._replaced)
        edit.prune(result)
        made = {o for n in result.graph.node for o in n.output}
        self.read_as = {tensor: name for tensor, name in self.read_as.items() if name in made}
        self._restore_value_info(result)
        result.producer_name = PRODUCER
        return branches.shielded(result)

    def _made(self, node: NodeProto, k: int, name: str) -> None:
        """Name an output of a node; where the runtime would quantize the node unasked, behind a guard.

        The guard is a LeakyRelu with the slope 1, which onnxruntime computes in the kernel of the layer.
        """
        guarded = node.output[k] in self._plan.guarded
        node.output[k] = self._b.unique(f"{name}_guarded") if guarded else name
        if guarded:
            self._b.add("LeakyRelu", [node.output[k]], name, alpha=1.0)

    def _final(self, name: str) -> str:
        while name in self._made_as:
            name = self._made_as[name]
        return name

    def _rewired(self, node: NodeProto) -> NodeProto:
        layer = self._layers.get(node.name)
        own = self._read_wide(node) | {
            name: self._layer_reads[node.name, name]
            for name in node.input
            if (node.name, name) in self._layer_reads
        }
        reads: Mapping[str, str] = ChainMap(own, self.read_as)
        if branches.settled_branch(node):
            # The other branch gets inputs that the scales were not calibrated on, so it reads them in float.
            reads = {name: new for name, new in reads.items() if name not in self._view.inputs}
        if node.name in self._plan.exact:
            reads = {name: new for name, new in reads.items() if not self._is_there(name)}
        if node.name in self._plan.shielded:
            reads = {name: self._shield(new) for name, new in reads.items() if name in node.input}
        copy = edit.renamed(node, reads)
        if (
            layer is not None
            and layer.bias is not None
            and not layer.has_bias
            and self._rounding.biases[layer.bias].any()
        ):
            del copy.input[2:]
            copy.input.append(self._layer_reads[node.name, layer.bias])
        return copy

    def _shield(self, tensor: str) -> str:
        """Return a tensor behind a LeakyRelu with the slope 1, which stays float, as what reads it does."""
        return self._b.add("LeakyRelu", [tensor], self._b.unique(f"{tensor}_shielded"), alpha=1.0)

    def _is_there(self, tensor: str) -> bool:
        """Return True if the float values of a quantized tensor exist anyway.

        They do if no integer operator makes them.
        """
        producer = self._view.producer.get(tensor)
        made = producer is None or (
            producer.name not in self._plan.integer_nodes and producer.name not in self._plan.absorbed
        )
        return made and tensor not in self._view.outputs

    def _is_output(self, tensor: str) -> bool:
        """Return True for an output of the network that has dequantized values."""
        return tensor in self._view.outputs and not self._plan.float_outputs

    def _pair(self, tensor: str, source: str) -> None:
        """Add QuantizeLinear and DequantizeLinear, with a Clip between for ranges narrower than the type."""
        b, quantizer = self._b, self._quantizers[tensor]
        grid, form = self._rounding.grids[quantizer.name], quantizer.spec.format
        if tensor in self._plan.rewritten:
            source = qdq_nodes.add_widened(b, source, grid, tensor)
        made = self._is_output(tensor) and tensor in self._view.producer
        clips = form.narrower_than_container and tensor in quantizer.sources
        self.read_as[tensor] = qdq_nodes.add_pair(
            b,
            source,
            qdq_nodes.scale_names(b, quantizer.name, grid),
            tensor,
            tensor if made else None,
            form if clips and isinstance(form, IntFormat) else None,
        )

    def _read_wide(self, node: NodeProto) -> dict[str, str]:
        """Return what a node that computes with 16 bits reads instead of activations of fewer."""
        found = {}
        for name in dict.fromkeys(node.input) if node.name in self._plan.wide else ():
            quantizer = self._quantizers.get(name)
            if quantizer is None or quantizer.spec.bits > FULL_BITS or name not in self.read_as:
                continue
            if name not in self._widened:
                grid = self._rounding.grids[quantizer.name]
                self._widened[name] = qdq_nodes.add_widened(self._b, self.read_as[name], grid, f"{name}_read")
            found[name] = self._widened[name]
        return found

    def _quantize_in_every_run(self, node: str, tensor: str) -> None:
        """Let a layer read a tensor that is quantized with the range it has in the run, once for all such."""
        b = self._b
        if tensor not in self._ranged:
            made = [b.unique(f"{tensor}_{what}") for what in ("quantized", "scale", "zero_point")]
            b.add("DynamicQuantizeLinear", [self.read_as.get(tensor, tensor)], outputs=made)
            self._ranged[tensor] = b.add("DequantizeLinear", made, b.unique(f"{tensor}_dequantized"))
        self._layer_reads[node, tensor] = self._ranged[tensor]

    # ---- constants -----------------------------------------------------------------------------------------
    def _constants(self) -> None:
        for weight in self._plan.weight_specs:
            self._weight(weight)
        for operand in self._plan.operands:
            self._constant_operand(operand)
        for table in self._plan.tables:
            self._table(table)
        for held in self._plan.held:
            self._held(held)
        for layer in self._plan.static_layers:
            if layer.op_type == "MatMul":
                self._keep_apart(layer)
        spec = self._plan.bias
        for layer in self._plan.layers:
            if layer.bias is None or not (layer.has_bias or self._rounding.biases[layer.bias].any()):
                continue
            if spec is None or not layer.static:
                self._float_bias(layer.node, layer.bias)
            else:
                self._bias(layer, spec)

    def _weight(self, tensor: str) -> None:
        """Add the integers of a weight, and what its layers read."""
        readers = {layer.node: layer.stored for layer in self._plan.layers if layer.weight == tensor}
        if isinstance(self._rounding.weights[tensor].granularity, PerBlock):
            name = self._take_over(tensor, list(readers))
            self._weight_in_blocks(tensor, name)
            self._layer_reads |= {(node, tensor): name for node in readers}
            return
        values, grid = quant_math.folded(self._rounding.integers[tensor], self._rounding.weights[tensor])
        stored = self._stored(tensor, values, grid)
        for in_float in sorted(set(readers.values())):
            name = self._take_over(tensor, list(readers))
            if in_float:
                self._floats(stored, tensor, grid, name)
            else:
                self._dequantize(stored, tensor, grid, name)
            for node, own in readers.items():
                if own is in_float:
                    self._layer_reads[node, tensor] = name

    def _weight_in_blocks(self, tensor: str, name: str) -> None:
        """Add the rows of a weight in blocks, and the nodes that make floats of them; see `graph.blocks`."""
        values, grid = self._rounding.integers[tensor], self._rounding.weights[tensor]
        own = self._blocks[tensor] = qdq_nodes.add_blocks(self._b, tensor, values, grid)
        rank, axis = values.ndim, grid.granularity.axis if isinstance(grid.granularity, PerBlock) else 0
        if axis % rank == rank - 1:
            blocks.as_floats(self._b, own, name)
            return
        turned = [*range(rank - 2), rank - 1, rank - 2]
        self._b.add("Transpose", [blocks.as_floats(self._b, own)], name, perm=turned)

    def _stored(self, tensor: str, values: Values, grid: Grid) -> str:
        """Add the initializer with a constant's integers; return its name."""
        stored = self._b.unique(f"{tensor}_quantized")
        self._b.keep(grid.format.raw(values), stored, grid.format.type_name)
        return stored

    def _dequantize(self, stored: str, tensor: str, grid: Grid, name: str) -> None:
        """Add the DequantizeLinear of a constant."""
        scale, zero = qdq_nodes.scale_names(self._b, tensor, grid)
        self._b.add("DequantizeLinear", [stored, scale, zero], name, **_axis(grid.granularity))

    def _floats(self, stored: str, tensor: str, grid: Grid, name: str) -> None:
        rank = len(self._view.constant_shape(tensor))
        qdq_nodes.add_floats(self._b, (stored, rank), tensor, grid, name)

    def _dequantized(self, tensor: str, values: Values, grid: Grid, readers: list[str]) -> str:
        """Add the initializers and DequantizeLinear of a constant; return the name to read."""
        name = self._take_over(tensor, readers)
        self._dequantize(self._stored(tensor, values, grid), tensor, grid, name)
        return name

    def _take_over(self, tensor: str, readers: list[str]) -> str:
        """Return the tensor's own name if nothing else reads the float constant, else a new one."""
        others = [n for n in self._view.consumers[tensor] if n.name not in readers]
        if others or tensor in self._view.outputs or tensor in self._replaced:
            return self._b.unique(f"{tensor}_dequantized")
        self._replaced.add(tensor)
        return tensor

    def _table(self, table: LookupTable) -> None:
        """Store the integers and scales of a table under new names, for `_written` to look rows up in."""
        b, tensor = self._b, table.name
        if isinstance(table.spec.granularity, PerBlock):
            if table.weight:
                self._blocks[tensor] = self._blocks[table.weight]
                return
            grid = self._rounding.grids[tensor]
            values = grid.in_container(np.asarray(self._view.constant(tensor), np.float32))
            self._blocks[tensor] = qdq_nodes.add_blocks(self._b, tensor, values, grid)
            return
        shape, grid = self._view.constant_shape(tensor), self._rounding.grids[tensor]
        names = b.unique(f"{tensor}_quantized"), b.unique(f"{tensor}_scale")
        integers = np.empty(shape, grid.format.container)
        for part, rows in self._view.constant_parts(tensor):
            integers[part] = replace(grid, scale=grid.scale[part]).in_container(rows)
        scale = grid.scale.reshape(-1, *(1,) * (len(shape) - 1))
        for value, name in zip((integers, scale), names, strict=True):
            b.keep(value, name)
        self._tables[tensor] = names

    def _held(self, weight: HeldWeight) -> None:
        """Add the integers of a weight that float operators read, and what these read."""
        tensor, grid = weight.name, self._rounding.grids[weight.name]
        readers = [n.name for n in self._view.consumers[tensor] if spec_of(n).held]
        values, folded = quant_math.folded(grid.in_container(self._view.constant(tensor)), grid)
        name = self._take_over(tensor, readers)
        self._floats(self._stored(tensor, values, folded), tensor, folded, name)
        for node in readers:
            self._layer_reads[node, tensor] = name

    def _written(self, node: NodeProto) -> list[NodeProto]:
        """Return the nodes that replace a node; the last one makes its results.

        Rows of a stored table are integers times scales, because no DequantizeLinear takes scales that depend
        on an index.
        """
        if node.name in self._dynamic:
            self._quantize_in_every_run(node.name, self._dynamic[node.name])
        b, copy, place = self._b, self._rewired(node), None
        if copy.op_type == "Clip" and copy.input[0] in self._view.inputs:
            return qdq_nodes.as_limits(b, copy) if self._final(node.output[0]) in self._quantizers else [copy]
        rule = spec_of(node).table
        if rule is not None and node.name not in self._plan.integer_nodes:
            place = rule(node)
        table = None if place is None else node.input[place]
        if place is not None and table in self._blocks and self._is_table(table):
            blocks.as_floats(b, self._blocks[table], copy.output[0], copy.input[1 - place])
            last = b.nodes.pop()
            last.name = node.name
            return [last]
        if place is None or table not in self._tables:
            return [copy]
        parts = []
        for name in self._tables[node.input[place]]:
            part = edit.renamed(
                copy, {node.input[place]: name, node.output[0]: b.unique(f"{node.output[0]}_{name}")}
            )
            part.name = b.unique(f"{node.name}/{name}")
            parts.append(part)
        as_float = b.unique(f"{node.output[0]}_float")
        cast = helper.make_node(
            "Cast", [parts[0].output[0]], [as_float], name=b.unique(f"{as_float}/Cast"), to=TensorProto.FLOAT
        )
        return [
            *parts,
            cast,
            helper.make_node("Mul", [as_float, parts[1].output[0]], list(node.output), name=node.name),
        ]

    def _is_table(self, tensor: str) -> bool:
        return any(table.name == tensor for table in self._plan.tables)

    def _constant_operand(self, operand: ConstantOperand) -> None:
        view, tensor = self._view, operand.name
        grid = self._rounding.grids[tensor]
        values = grid.in_container(np.asarray(view.constant(tensor), np.float32))
        readers = [n.name for n in view.consumers[tensor] if n.name in self._plan.integer_nodes]
        wide = [n for n in readers if n in self._plan.wide and operand.spec.bits <= FULL_BITS]
        for group, own in ((wide, True), ([n for n in readers if n not in wide], False)):
            if not group:
                continue
            finer = grid.widened() if own else grid
            kept = finer.in_container(grid.dequantize(values)) if own else values
            name = self._dequantized(tensor, kept, finer, readers)
            for node in group:
                self._layer_reads[node, tensor] = name

    def _keep_apart(self, layer: Layer) -> None:
        """Give a vector that is added to the float result of an integer MatMul a second axis.

        onnxruntime 1.32 joins MatMul and Add into a Gemm, for which it has no integer kernel without a
        quantizer behind it: MatMul(x, W) + b[n] → MatMul(x, W) + b[1, n].
        """
        view, b = self._view, self._b
        readers = view.consumers[layer.output]
        if layer.output in self._quantizers or len(readers) != 1 or readers[0].op_type != "Add":
            return
        vector = next((i for i in readers[0].input if view.is_constant(i)), None)
        if vector is None or len(view.constant_shape(vector)) != 1 or len(view.shape(layer.output) or ()) < 2:
            return
        name = b.unique(f"{vector}_row")
        b.keep(view.constant(vector)[None], name)
        self._layer_reads[readers[0].name, vector] = name

    def _bias(self, layer: Layer, spec: BiasSpec) -> None:
        """Add a bias as integers with the zero point 0."""
        b, name = self._b, layer.bias or ""
        bias = self._rounding.biases[name]
        of_inputs = self._plan.input_scales({n: g.scale for n, g in self._rounding.grids.items()})
        scales = of_inputs[layer.node], self._rounding.weights[layer.weight].scale
        scale = spec.scale(bias, *scales)
        stored = b.unique(f"{name}_quantized")
        b.keep(spec.integers(bias, *scales), stored)
        inputs = [stored, b.constant(scale, f"{name}_scale")]
        if spec.zero_point:
            inputs.append(b.constant(np.zeros(scale.shape, spec.container), f"{name}_zero_point"))
        output = self._take_over(name, [layer.node])
        b.add("DequantizeLinear", inputs, output, **_axis(PerAxis(0) if scale.ndim else PerTensor()))
        self._layer_reads[layer.node, name] = output

    def _float_bias(self, node: str, bias: str) -> None:
        name = self._b.unique(f"{bias}_learned")
        self._b.keep(self._rounding.biases[bias], name)
        self._layer_reads[node, bias] = name

    def _restore_value_info(self, model: ModelProto) -> None:
        """Copy type and shape of each quantized tensor to its dequantized replacement."""
        known = {v.name: v for v in (*self._model.graph.value_info, *self._model.graph.input)}
        for tensor, name in self.read_as.items():
            if tensor in known and name not in known and tensor != name:
                info = model.graph.value_info.add()
                info.CopyFrom(known[tensor])
                info.name = name


def _axis(granularity: Granularity) -> dict[str, Any]:
    """Return the axis attribute if there is one scale per channel."""
    return {"axis": granularity.axis} if isinstance(granularity, PerAxis) else {}
