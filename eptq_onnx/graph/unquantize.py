"""Take the quantizers out of a model that is quantized already; what stays is a float model.

    DequantizeLinear(QuantizeLinear(x))                       →  x, or Clip(x) where the integers start at 0
    DequantizeLinear(moves(Clip(QuantizeLinear(x))))          →  moves(x)
    DequantizeLinear(Gather(W, i)), W constant                →  Gather(DequantizeLinear(W), i)
    DequantizeLinear(x'), (x', s, z) = DynamicQuantizeLinear(x)   →  x
    Mul(Cast(MatMulInteger(x', W, z, w)), Mul(s, t))          →  MatMul(x, DequantizeLinear(W, t, w))

and ConvInteger like MatMulInteger, which may read what Gather looks up, too; constants behind
DequantizeLinear become float. Ranges and scales are returned beside the model, by the names that tensors have
in it. Weights in blocks (MatMulNBits) compute in float, and stay.

Where integers hold no negative values although x may have some, the quantizer is all that is left of a Relu
or Clip in front of it.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace

import numpy as np
from onnx import ModelProto, NodeProto, TensorProto, helper

from eptq_onnx.graph import edit
from eptq_onnx.graph.fold import dequantized
from eptq_onnx.graph.quantizers import LIMITS, Grid, GridReader
from eptq_onnx.graph.view import int_attribute, ints_attribute
from eptq_onnx.numerics.scales import WeightScales
from eptq_onnx.proto.bodies import all_nodes, node_reads, subgraphs

_ONNX, _OWN = ("", "ai.onnx"), "com.microsoft"
_MOVES = {
    "Concat", "Expand", "Flatten", "Gather", "Identity", "MaxPool", "Reshape", "Slice", "Split", "Squeeze",
    "Tile", "Transpose", "Unsqueeze",
}  # fmt: skip
"""Operators that move integers, and floats alike."""
_POOLS = ("AveragePool", "GlobalAveragePool", "GlobalMaxPool", "Dropout")
_POSITIVE = ("Relu", "Sigmoid", "HardSigmoid", "Softmax", "Abs", "Exp")
"""Operators whose results are not negative."""
_CLIP_INPUTS = 11
"""First opset in which Clip has its limits as inputs."""
_PRODUCTS = {"MatMulInteger": "MatMul", "ConvInteger": "Conv"}
_WHOLE = (
    "QLinear", "QGemm", "QAttention", "QEmbedLayerNormalization", "MatMulIntegerToFloat",
    "DynamicQuantizeMatMul", "DynamicQuantizeLSTM",
)  # fmt: skip
"""Beginnings of operators that compute on integers as a whole."""
_KINDS = {"QuantizeLinear", "DequantizeLinear", "DynamicQuantizeLinear", *_PRODUCTS}


@dataclass
class Quantization:
    """How a file is quantized.

    Parameters
    ----------
    ranges : dict of str to tuple of two floats
        Activation to the range of its integers.
    scales : dict of str to WeightScales
    dynamic : dict of str to None
        Nodes whose inputs are quantized in every run.
    other_weights : int
        Weights with zero points or in blocks, whose scales are not returned.
    """

    ranges: dict[str, tuple[float, float]] = field(default_factory=dict)
    scales: dict[str, WeightScales] = field(default_factory=dict)
    dynamic: dict[str, None] = field(default_factory=dict)
    other_weights: int = 0

    @property
    def is_there(self) -> bool:
        """Return True if anything is quantized."""
        return bool(self.ranges or self.scales or self.dynamic or self.other_weights)


def is_quantized(model: ModelProto) -> bool:
    """Return True if a model has nodes that quantize, or compute on integers."""
    return any(map(_quantizes, all_nodes(model.graph))) or any(
        _quantizes(n) for function in model.functions for n in all_nodes(function)
    )


def _quantizes(node: NodeProto) -> bool:
    return node.op_type in _KINDS or node.op_type.startswith(_WHOLE)


def unquantized(model: ModelProto, name: str) -> tuple[ModelProto, Quantization]:
    """Return a float model, and how the given one is quantized.

    Parameters
    ----------
    model : ModelProto
        It is not changed, and returned as it is if it is float.
    name : str
        Name of the model in messages.

    Raises
    ------
    ModelError
        If it is quantized in a way that this function does not know.
    """
    if not is_quantized(model):
        return model, Quantization()
    return _Reading(model, name).run()


@dataclass(frozen=True)
class _Product:
    """A product of integers on its way to floats."""

    node: NodeProto
    data: str


class _Reading(GridReader):
    """Reads one model; see `unquantized`."""

    def __init__(self, model: ModelProto, name: str) -> None:
        super().__init__(model, name)
        self._model = model
        self._names: dict[str, str] = {}
        """Dequantized tensor to the float tensor that takes its place."""
        self._floats: dict[str, str] = {}
        """Tensor of integers to the float tensor that they come from."""
        self._grids: dict[str, Grid] = {}
        self._scale_of: dict[str, str] = {}
        """Scale that a DynamicQuantizeLinear makes to its integers."""
        self._factors: dict[str, tuple[str, str]] = {}
        """Product of such a scale and a constant to the two."""
        self._products: dict[str, _Product] = {}
        self._in_every_run: set[str] = set()
        self._last: dict[str, str] = {}
        """Float tensor that becomes an output of the model to the output."""
        self._positive: set[str] = set()
        """Float tensors without negative values."""
        self.found = Quantization()

    def run(self) -> tuple[ModelProto, Quantization]:
        """Rewrite node after node."""
        if any(_quantizes(n) for function in self._model.functions for n in all_nodes(function)):
            raise self._refused("it quantizes within a function")
        for node in self._view.nodes:
            if any(_quantizes(n) for body in subgraphs(node) for n in all_nodes(body)):
                raise self._refused(f"its node {node.name or node.output[0]} has quantizers in its body")
            if not self._taken(node):
                self._kept(node)
        held = next((o for o in self._view.outputs if o in self._floats), None)
        if held is not None:
            raise self._refused(f"its output {held} holds integers")
        nodes = [edit.renamed(n, self._last) for n in self._builder.nodes]
        for tensor, output in self._last.items():
            if tensor in self.found.ranges:
                self.found.ranges[output] = self.found.ranges.pop(tensor)
        result = edit.with_nodes(self._model, nodes, self._builder.initializers)
        edit.prune(result)
        # Older opsets, which a runtime may need, lack types and blocks.
        result = dequantized(result)
        edit.prune(result)
        there = {n.name for n in result.graph.node}
        self.found.dynamic = {n: None for n in self.found.dynamic if n in there}
        return result, self.found

    def _taken(self, node: NodeProto) -> bool:
        """Rewrite a node of the quantization; False for all others."""
        kind = node.op_type if node.domain in (*_ONNX, _OWN) else ""
        if kind.startswith(_WHOLE):
            raise self._refused(
                f"its node {node.name or node.output[0]} is a {kind}, which computes on integers as a whole"
            )
        integers = any(i in self._floats for i in node.input)
        if kind == "QuantizeLinear":
            self._quantize(node)
        elif kind == "DequantizeLinear":
            return self._dequantize(node)
        elif kind == "DynamicQuantizeLinear":
            quantized, scale, zero = node.output
            self._floats[quantized] = self._name(node.input[0])
            self._grids[quantized] = Grid(None, np.zeros(1, np.int64), "uint8", LIMITS["uint8"])
            self._scale_of[scale] = self._scale_of[zero] = quantized
        elif kind in _PRODUCTS and node.input[0] in self._floats and node.input[1] in self._constants:
            self._products[node.output[0]] = _Product(node, self._floats[node.input[0]])
        elif kind == "Cast" and node.input[0] in self._products:
            self._products[node.output[0]] = self._products[node.input[0]]
        elif kind == "Mul" and set(node.input) & self._scale_of.keys() and set(node.input) & self._constants:
            scale, constant = sorted(node.input, key=lambda i: i in self._constants)
            self._factors[node.output[0]] = scale, constant
        elif kind == "Mul" and self._constants.issuperset(node.input):
            self._factors[node.output[0]] = node.input[0], node.input[1]
            return False
        elif kind == "Mul" and set(node.input) & self._products.keys():
            self._multiply(node)
        elif kind == "Clip" and node.input[0] in self._floats:
            self._clip(node)
        elif kind in _MOVES and integers:
            self._move(node)
        elif kind == "Gather" and self._is_table(node):
            self._look_up(node)
        else:
            return False
        return True

    def _kept(self, node: NodeProto) -> None:
        lost = next((i for i in node_reads(node) if self._is_gone(i)), None)
        if lost is not None:
            raise self._refused(
                f"its node {node.name or node.output[0]} ({node.op_type}) computes on the integers {lost}"
            )
        own = edit.renamed(node, self._names)
        if own.op_type in _KINDS:
            own.domain = ""  # onnxruntime's own quantizers are those of ONNX, for more types
        through = [i for i in own.input[:1] if i]
        if node.op_type in _POSITIVE or (
            node.op_type in (*_MOVES, *_POOLS) and through and self._positive.issuperset(through)
        ):
            self._positive.update(node.output)
        if any(i in self._in_every_run for i in node.input):
            own.name = node.name or self._builder.unique(node.op_type)
            self.found.dynamic[own.name] = None
        if self._constants.issuperset(i for i in own.input if i) and not subgraphs(node):
            # A weight may be turned before or behind its quantizer.
            self._constants.update(o for o in node.output if o)
            if node.op_type == "Transpose" and (scales := self.found.scales.get(own.input[0])) is not None:
                rank = len(self._view.shape(node.output[0]) or ())
                order = ints_attribute(node, "perm") or list(reversed(range(rank)))
                if scales.axis is not None and order:
                    scales = replace(scales, axis=order.index(scales.axis % len(order)))
                if scales.axis is None or order:
                    self.found.scales[node.output[0]] = scales
        self._builder.nodes.append(own)

    def _is_gone(self, tensor: str) -> bool:
        """Return True if nothing makes a tensor any more."""
        factor = tensor in self._factors and tensor not in self._constants
        return factor or any(tensor in made for made in (self._floats, self._products, self._scale_of))

    def _name(self, tensor: str) -> str:
        return self._names.get(tensor, tensor)

    def _quantize(self, node: NodeProto) -> None:
        quantized, name = node.output[0], self._name(node.input[0])
        grid = self._grids[quantized] = self._grid(node)
        self._floats[quantized] = name
        made = node.input[0] in self._view.producer and name not in self._constants
        if not made or grid.scale is None or grid.scale.size != 1 or (grid.zero != grid.limits[0]).any():
            return
        if name not in self._positive:
            end = float(grid.scale.reshape(-1)[0]) * (grid.limits[1] - grid.limits[0])
            single = self._view.elem_type(node.input[0]) in (TensorProto.FLOAT, TensorProto.UNDEFINED)
            ends = [0.0, end] if single and self._builder.opset >= _CLIP_INPUTS else []
            name = self._builder.add(
                "Clip" if ends else "Relu", [name, *ends], self._builder.unique(f"{name}/clip")
            )
            self._positive.add(name)
        self._floats[quantized] = name

    def _dequantize(self, node: NodeProto) -> bool:
        source, result = node.input[0], node.output[0]
        if source in self._constants:
            self._weight(result, node, exact=True)
            return False
        if source not in self._floats:
            raise self._refused(f"its tensor {source} holds integers that no QuantizeLinear makes")
        grid = self._grids[source]
        scale = node.input[1]
        own = grid if grid.scale is None and self._scale_of.get(scale) is not None else self._grid(node)
        if not own.same(grid):
            raise self._refused(
                f"its node {node.name or result} reads integers with another scale than they were made with"
            )
        name = self._floats[source]
        if result in self._view.outputs:
            if name in self._view.producer and name not in {
                *self._view.outputs,
                *self._last,
                *self._constants,
            }:
                self._last[name] = result
            else:
                self._builder.add("Identity", [name], result)
        else:
            self._names[result] = name
        if grid.scale is None:
            self._in_every_run.add(result)
        elif name in self._constants:
            self._weight(name, node, exact=False)
        else:
            self._range(name, grid)
        return True

    def _range(self, name: str, grid: Grid) -> None:
        """Note the range of an activation: all that its quantizers hold."""
        if grid.scale is None or grid.scale.size != 1 or name in self._constants:
            return
        zero = int(grid.zero.reshape(-1)[0])
        low, high = (float(grid.scale.reshape(-1)[0]) * (end - zero) for end in grid.limits)
        if low <= 0 <= high and low < high and math.isfinite(high - low):
            before = self.found.ranges.get(name, (0.0, 0.0))
            self.found.ranges[name] = min(low, before[0]), max(high, before[1])

    def _weight(self, name: str, node: NodeProto, *, exact: bool) -> None:
        """Note the scales of a weight."""
        kind = self._type(node)
        if kind not in LIMITS or kind.endswith("16"):
            return  # a bias
        grid, (low, high) = self._grid(node), LIMITS[kind]
        if (
            grid.scale is None
            or int_attribute(node, "block_size", 0)
            or (grid.zero != (low + high + 1) // 2).any()
        ):
            self.found.other_weights += 1
            return
        values = tuple(float(v) for v in grid.scale.reshape(-1))
        axis = int_attribute(node, "axis", 1) if len(values) > 1 else None
        self.found.scales[name] = WeightScales((high - low + 1).bit_length() - 1, values, axis, exact)

    def _clip(self, node: NodeProto) -> None:
        source, result = node.input[0], node.output[0]
        ends = [i for i in node.input[1:] if i]
        if len(ends) != 2 or not self._constants.issuperset(ends):
            raise self._refused(f"its node {node.name or result} clips integers at limits that are computed")
        low, high = (int(np.asarray(self._value(i)).reshape(-1)[0]) for i in ends)
        grid = self._grids[source]
        self._floats[result] = self._floats[source]
        self._grids[result] = Grid(grid.scale, grid.zero, grid.kind, (low, high))

    def _move(self, node: NodeProto) -> None:
        """Move floats instead of integers."""
        whole = [i for i in node.input if i in self._floats]
        wanted = list(node.input) if node.op_type == "Concat" else [node.input[0]]
        grid = self._grids[whole[0]]
        if whole != wanted or not all(self._grids[i].same(grid) for i in whole):
            raise self._refused(f"its node {node.name or node.output[0]} joins integers of several scales")
        for tensor in whole:
            self._range(self._floats[tensor], grid)
        names = {o: self._builder.unique(f"{o}/float") for o in node.output if o}
        self._builder.nodes.append(edit.renamed(node, {**self._names, **self._floats, **names}))
        for result, own in names.items():
            if result:
                self._floats[result], self._grids[result] = own, grid

    def _is_table(self, node: NodeProto) -> bool:
        """Return True if a Gather looks integers up."""
        return node.input[0] in self._view.initializers and bool(self._scale_behind(node.output[0]))

    def _scale_behind(self, tensor: str) -> list[str]:
        """Return scale and zero point that all readers of integers take them to have; empty if unknown.

        A product has the scales of both of its factors, multiplied.
        """
        found: set[tuple[str, ...]] = set()
        for reader in self._view.consumers[tensor]:
            ends = list(reader.input[1:3])
            if reader.op_type == "MatMulInteger":
                casts = self._view.consumers[reader.output[0]]
                muls = [m for c in casts for m in self._view.consumers[c.output[0]] if c.op_type == "Cast"]
                makers = [self._view.producer.get(i) for m in muls for i in m.input]
                factors = [n for n in makers if n is not None and n.op_type == "Mul"]
                ends = [*factors[0].input[:1], *reader.input[2:3]] if len(factors) == 1 else []
            elif reader.op_type != "DequantizeLinear":
                return []
            found.add(tuple(i for i in ends if i))
        [own] = found if len(found) == 1 else [()]
        return list(own) if own and self._constants.issuperset(own) else []

    def _look_up(self, node: NodeProto) -> None:
        """Look rows up in a table of floats."""
        ends = self._scale_behind(node.output[0])
        table, rows = (self._builder.unique(f"{stem}/float") for stem in (node.input[0], node.output[0]))
        self._builder.nodes += [
            dequantize := helper.make_node("DequantizeLinear", [node.input[0], *ends], [table]),
            edit.renamed(node, {**self._names, node.input[0]: table, node.output[0]: rows}),
        ]
        self._constants.add(table)
        self._floats[node.output[0]], self._grids[node.output[0]] = rows, self._grid(dequantize)

    def _multiply(self, node: NodeProto) -> None:
        """Make a product of floats of the integers' product and its scale."""
        [product, factor] = sorted(node.input, key=lambda i: i not in self._products)
        made, result = self._products[product], node.output[0]
        source = made.node.input[0]
        own, other = self._factors.get(factor, ("", ""))
        known = self._grids[source].scale
        if own and (
            self._scale_of.get(own) == source
            if known is None
            else own in self._constants and np.array_equal(self._scale_constant(own), known)
        ):
            scale = other
        elif factor in self._constants and known is not None:
            scale = self._builder.constant(
                np.asarray(self._scale_constant(factor) / known, np.float32), f"{factor}_scale"
            )
        else:
            raise self._refused(f"its node {node.name or result} multiplies integers by an unknown scale")
        weight, zeros = made.node.input[1], [i for i in made.node.input[3:4] if i]
        matrix = made.node.op_type == "MatMulInteger"
        sizes = self._scale_constant(scale)
        floats = self._builder.unique(f"{weight}/float")
        if sizes.ndim != 0:
            # One scale for each channel has one axis, one for all none.
            flat = sizes.reshape(-1) if sizes.size > 1 else sizes.reshape(())
            scale = self._builder.constant(flat, f"{weight}_scale")
            if zeros:
                zero = np.broadcast_to(np.asarray(self._value(zeros[0])).reshape(-1), flat.reshape(-1).shape)
                zeros = [self._builder.constant(zero.reshape(flat.shape), f"{weight}_zero")]
        dequantize = helper.make_node(
            "DequantizeLinear", [weight, scale, *zeros], [floats], axis=-1 if matrix else 0
        )
        self._weight(floats, dequantize, exact=True)
        name = node.name or made.node.name or self._builder.unique(_PRODUCTS[made.node.op_type])
        plain = NodeProto()
        plain.CopyFrom(made.node)
        plain.op_type, plain.name = _PRODUCTS[made.node.op_type], name
        plain.input[:], plain.output[:] = [made.data, floats], [result]
        self._builder.nodes += [dequantize, plain]
        if self._grids[source].scale is None and matrix:
            self.found.dynamic[name] = None
        elif self._grids[source].scale is not None:
            self._range(made.data, self._grids[source])
