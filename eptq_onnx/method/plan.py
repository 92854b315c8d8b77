"""Decide which tensors get which quantizer, and say why the others stay float.

The rules, in the words of the operator table (`ops.TABLE`) and the target:

- a layer (constant weight) that the target runs on integers is quantized: its input, its weight, and its
  output behind the clipping function that the target absorbs;
- arithmetic and equal-scale operators are quantized if a quantized node reads their result. What lies behind
  the last layers thus stays float: nothing there would use the integers, and the outputs keep full precision;
- tensors joined by equal-scale operators share one scale.
"""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np
from onnx import AttributeProto, ModelProto, NodeProto

from eptq_onnx.config import Config
from eptq_onnx.errors import ModelError
from eptq_onnx.graph.branches import settled_branch
from eptq_onnx.graph.patterns import matching
from eptq_onnx.graph.view import GraphView, int_attribute, last_layers
from eptq_onnx.numerics.quant_math import keeps_bounds
from eptq_onnx.numerics.types import QuantSpec
from eptq_onnx.ops import (
    Bounds,
    OpSpec,
    Role,
    channel_axes_of,
    is_known,
    output_channels,
    pointwise,
    recorded,
    spec_of,
)
from eptq_onnx.proto.bodies import all_names, all_nodes, node_reads, subgraphs
from eptq_onnx.records import ActivationQuantizer, KeptFloat, Layer, Plan
from eptq_onnx.runtime import OWN_DOMAINS
from eptq_onnx.targets import Target

_NO_BOUNDS: Bounds = (-np.inf, np.inf)
_LEAST_TABLE = 16_384


@dataclass
class _Draft:
    """What is known of the graph while the plan is made."""

    view: GraphView
    target: Target
    quantized: dict[str, OpSpec] = field(default_factory=dict)
    """Node name to row, of the nodes that run on integers."""
    absorbed: dict[str, str] = field(default_factory=dict)
    """Tensor before a clipping operator to the tensor behind it, where the operator vanishes."""
    reasons: dict[str, str] = field(default_factory=dict)
    sensitive: Mapping[str, str] = field(default_factory=dict)
    """Tensors that must stay float, each with the reason."""
    excluded: Mapping[str, str] = field(default_factory=dict)
    """Nodes that the user wants float, each with the reason."""
    bits: Mapping[str, tuple[int, int]] = field(default_factory=dict)
    """Nodes that the user wants with other weight and activation bits than the rest."""

    def final(self, tensor: str) -> str:
        """The tensor that is quantized in place of ``tensor``: behind the absorbed clipping operators."""
        while tensor in self.absorbed:
            tensor = self.absorbed[tensor]
        return tensor

    def readers(self, tensor: str) -> list[NodeProto]:
        return self.view.consumers[self.final(tensor)]


def plan(
    model: ModelProto, target: Target, config: Config, sensitive: Mapping[str, str] | None = None
) -> Plan:
    """Make the plan for a normalized model.

    Parameters
    ----------
    model : ModelProto
    target : Target
    config : Config
    sensitive : mapping of str to str, optional
        Tensors that must not be quantized, each with the reason.

    Raises
    ------
    ModelError
        If there is nothing to quantize.
    ConfigError
        If a pattern matches no node.
    """
    view = GraphView(model)
    excluded = {
        name: f"excluded by the pattern {pattern}"
        for pattern in config.exclude
        for name in matching(view, pattern)
    }
    bits = {name: (w, a) for pattern, w, a in config.node_bits for name in matching(view, pattern)}
    draft = _Draft(view, target, sensitive=sensitive or {}, excluded=excluded, bits=bits)
    _absorb(draft)
    _choose(draft)
    layers = _layers(draft, config, model)
    if not layers:
        reasons = "; ".join(f"{name}: {why}" for name, why in list(draft.reasons.items())[:3])
        raise ModelError(
            f"there is nothing to quantize: no {', '.join(sorted(target.ops.layers))} with a constant float32 weight"
            f"{' (' + reasons + ')' if reasons else ''}."
        )
    activations = (*_activations(draft, layers, config), *_tables(draft, layers))
    absorbed = _absorbed_nodes(draft, activations)
    integer, left = _integer_nodes(draft), _kept_float(draft, absorbed)
    return Plan(layers, activations, integer, absorbed, left, target.bias.integer, _choosing(draft, integer))


def _absorb(draft: _Draft) -> None:
    view = draft.view
    for node in view.nodes:
        spec = spec_of(node)
        if (
            spec.role is not Role.CLIPPING
            or node.op_type not in draft.target.ops.absorbed
            or node.name in draft.excluded
        ):
            continue
        source = view.producer.get(node.input[0])
        if source is None or spec_of(source).role not in (Role.LAYER, Role.ARITHMETIC, Role.CLIPPING):
            continue
        low, high = spec.bounds(node, view) if spec.bounds else _NO_BOUNDS
        private = len(view.consumers[node.input[0]]) == 1 and node.input[0] not in view.outputs
        if private and spec.objection(node, view) is None and low <= 0 <= high:
            draft.absorbed[node.input[0]] = node.output[0]


def _choose(draft: _Draft) -> None:
    """Backwards, so that a node knows whether its readers run on integers."""
    for node in reversed(draft.view.nodes):
        spec = spec_of(node)
        reason = _objection(node, spec, draft)
        if reason is None:
            draft.quantized[node.name] = spec
        else:
            draft.reasons[node.name] = reason
    for node in draft.view.nodes:
        # An absorbed function belongs to the node in front of it, and is float only if that is.
        if (
            node.input
            and node.input[0] in draft.absorbed
            and draft.view.producer[node.input[0]].name not in draft.reasons
        ):
            del draft.reasons[node.name]


def _objection(node: NodeProto, spec: OpSpec, draft: _Draft) -> str | None:
    """Why a node stays float, or None."""
    view, rules = draft.view, draft.target.ops
    if node.name in draft.excluded:
        return draft.excluded[node.name]
    if subgraphs(node):
        return _inside(node, rules.layers)
    if not is_known(node) and node.domain not in OWN_DOMAINS:
        return f"{node.op_type} is a custom operator, of the domain {node.domain}"
    if not is_known(node):
        return f"{node.op_type} is not in the operator table"
    if spec.role is Role.FLOAT or spec.role is Role.CLIPPING:
        return f"{draft.target.name} has no integer kernel for {node.op_type}"
    allowed = {
        Role.LAYER: rules.layers,
        Role.ARITHMETIC: rules.arithmetic,
        Role.EQUAL_SCALE: rules.equal_scale,
    }[spec.role]
    if node.op_type not in allowed:
        return f"{draft.target.name} has no integer kernel for {node.op_type}"
    special = spec.objection(node, view)
    if special:
        return special
    data = spec.data_inputs(node)
    weighted = (
        spec.role is Role.LAYER and spec.weight is not None and view.is_constant(node.input[spec.weight])
    )
    if weighted:
        weight = _weight(node)
        data = [d for d in data if d != weight]
        if view.shape(weight) is not None and len(view.shape(weight) or ()) < 2:
            return "its weight is a vector"
        bias = node.input[spec.bias] if spec.bias is not None and len(node.input) > spec.bias else ""
        if bias and not view.is_constant(bias):
            return "its bias is computed at run time"
        if bias and view.constant_shape(bias) != (output_channels(node, view),):
            return "its bias has not one value for each output channel"
        constants = [weight, bias]
        infinite = [c for c in constants if c and view.is_float(c) and not view.is_finite(c)]
        if infinite:
            return f"its weight {infinite[0]} has NaN or Inf"
    elif spec.role is Role.LAYER and spec.weight not in (spec.data or ()):
        return "its weight is computed at run time"
    if not all(view.is_float(d) for d in (*data, *node.output)):
        return "its values are not float32"
    for tensor in (*data, *(draft.final(o) for o in node.output)):
        if tensor in draft.sensitive:
            return draft.sensitive[tensor]
    if weighted:
        return None
    infinite = [d for d in data if view.is_constant(d) and not view.is_finite(d)]
    if infinite:
        return f"its operand {infinite[0]} has infinite values"
    if all(view.is_constant(d) for d in data):
        return "all its inputs are constant"
    if not any(
        reader.name in draft.quantized and _reads(reader, draft.final(o))
        for o in node.output
        for reader in draft.readers(o)
    ):
        return "no integer operator reads its result"
    return None


def _inside(node: NodeProto, layers: frozenset[str]) -> str:
    """Why a node with bodies stays float, and which layers that leaves float."""
    bodies = {a.name: a.g for a in node.attribute if a.type == AttributeProto.GRAPH}
    settled = settled_branch(node)
    if settled is not None:
        del bodies[settled]
    counts = Counter(n.op_type for graph in bodies.values() for n in all_nodes(graph) if n.op_type in layers)
    left = f" ({', '.join(f'{n} {op}' for op, n in sorted(counts.items()))})" if counts else ""
    if settled is not None:
        return f"no sample takes its {next(iter(bodies))}: what is in there stays float{left}"
    if len(bodies) > 1:
        return f"samples take different branches: what is in them stays float{left}"
    return f"what it repeats stays float{left}"


def _reads(node: NodeProto, tensor: str) -> bool:
    """True if the tensor is one of the node's activations (not, say, a shape)."""
    return tensor in spec_of(node).data_inputs(node)


def _layer_nodes(draft: _Draft) -> list[NodeProto]:
    view = draft.view
    return [
        n for n in view.nodes
        if (s := draft.quantized.get(n.name)) and s.role is Role.LAYER and s.weight is not None and view.is_constant(n.input[s.weight])
    ]  # fmt: skip


def _weight(node: NodeProto) -> str:
    """Name of a layer's weight."""
    return str(node.input[spec_of(node).weight or 0])


def _is_depthwise(node: NodeProto, view: GraphView) -> bool:
    """True for a convolution of one input and one output channel a group."""
    return node.op_type == "Conv" and view.constant_shape(_weight(node))[:2] == (
        int_attribute(node, "group", 1),
        1,
    )


def _layers(draft: _Draft, config: Config, model: ModelProto) -> tuple[Layer, ...]:
    view, taken = draft.view, all_names(model.graph)
    nodes = _layer_nodes(draft)
    # That a path past all others leads there does not make a layer the first: residual streams lead past
    # every layer.
    behind = view.downstream(o for n in nodes for o in n.output)
    before = view.upstream(n.input[0] for n in nodes)
    layers: list[Layer] = []
    axes: dict[str, int] = {}
    edges = {_weight(n) for n in nodes if n.input[0] not in behind or n.output[0] not in before}
    dense = {_weight(n) for n in nodes if not _is_depthwise(n, view)}
    # A weight that several layers read has the most bits that any of them wants.
    wanted: dict[str, int] = {}
    for node in nodes:
        if node.name in draft.bits:
            wanted[_weight(node)] = max(wanted.get(_weight(node), 0), draft.bits[node.name][0])
    for node in nodes:
        spec, weight = spec_of(node), _weight(node)
        rank = len(view.constant_shape(weight))
        axis = spec.weight_axis(node) % rank
        if axes.setdefault(weight, axis) != axis:
            draft.reasons[node.name] = (
                f"its weight {weight} is shared with a layer that has other output channels"
            )
            del draft.quantized[node.name]
            continue
        bias: str | None = None
        has_bias = spec.bias is not None and len(node.input) > spec.bias and bool(node.input[spec.bias])
        if spec.bias is not None:
            bias = node.input[spec.bias] if has_bias else f"{node.name}_bias"
            while not has_bias and bias in taken:
                bias += "_"
            taken.add(bias)
        edge, depthwise = weight in edges, weight not in dense
        bits = wanted.get(weight, config.edge_bits if edge else config.weight_bits)
        layers.append(
            Layer(
                node=node.name,
                op_type=node.op_type,
                weight=weight,
                input=node.input[0],
                output=node.output[0],
                result=draft.final(node.output[0]),
                bias=bias,
                has_bias=has_bias,
                # Integer kernels of stacked matrices take one scale in all.
                weight_spec=draft.target.weight_spec(
                    bits, None if spec.weight in (spec.data or ()) and rank > 2 else axis, depthwise
                ),
                output_axis=-1 if spec.output_axis is None else spec.output_axis,
                edge=edge,
                depthwise=depthwise,
            )
        )
    return tuple(layers)


def _activations(draft: _Draft, layers: tuple[Layer, ...], config: Config) -> tuple[ActivationQuantizer, ...]:
    view, rules = draft.view, draft.target.ops
    weights = {layer.weight for layer in layers}
    parent: dict[str, str] = {}

    def root(tensor: str) -> str:
        parent.setdefault(tensor, tensor)
        while parent[tensor] != tensor:
            tensor = parent[tensor]
        return tensor

    for node in view.nodes:
        spec = draft.quantized.get(node.name)
        if spec is None:
            continue
        inputs = [i for i in spec.data_inputs(node) if i not in weights]
        outputs = [draft.final(o) for o in node.output if o]
        for name in inputs:
            root(name)
        if spec.role is Role.EQUAL_SCALE:
            for name in outputs:
                parent[root(name)] = root(inputs[0])
        elif not (node.op_type in rules.float_output and not _read_as_integer(draft, outputs)):
            for name in outputs:
                root(name)
    groups: dict[str, list[str]] = defaultdict(list)
    for name in _topological(view, parent):
        groups[root(name)].append(name)
    wide, axes = _edge_tensors(draft, layers), channel_axes_of(view)
    result = []
    for members in groups.values():
        edge = any(m in wide for m in members)
        bits = max(config.edge_bits, config.activation_bits) if edge else config.activation_bits
        readers = {
            n.name for m in members for n in view.consumers[m] if n.name in draft.quantized and _reads(n, m)
        }
        if readers & draft.bits.keys():
            bits = max(draft.bits[name][1] if name in draft.bits else bits for name in readers)
        spec_q: QuantSpec = draft.target.activation_spec(bits)
        first = members[0]
        constant = view.is_constant(first)
        through = first if constant else pointwise(view, first, lambda shape: math.prod(shape) == 1)[1]
        result.append(
            ActivationQuantizer(
                first, tuple(members), spec_q, _bounds(draft, first), constant, through, axes.get(first)
            )
        )
    return tuple(result)


def _tables(draft: _Draft, layers: tuple[Layer, ...]) -> list[ActivationQuantizer]:
    """Tables whose rows float nodes look up, stored as 8-bit integers with one scale a row."""
    view, weights = draft.view, {layer.weight for layer in layers}
    found: dict[str, None] = {}
    for node in view.nodes:
        row = spec_of(node)
        place = row.table(node) if row.table is not None and node.op_type in draft.target.ops.stored else None
        if place is None or node.name in draft.quantized or not view.is_constant(node.input[place]):
            continue
        table = node.input[place]
        shape = view.constant_shape(table)
        if not view.is_float(table) or len(shape) < 2 or not view.is_finite(table):
            continue
        if math.prod(shape) < _LEAST_TABLE:
            draft.reasons[node.name] = (
                f"its table has fewer than {_LEAST_TABLE} values: storing it as integers would not pay"
            )
            continue
        if table in weights:
            draft.reasons[node.name] = "its table is the weight of a layer too"
            continue
        draft.reasons[node.name] = (
            "its table is stored in 8 bits, one scale a row; what is looked up is float"
        )
        found[table] = None
    return [ActivationQuantizer(t, (t,), draft.target.table_spec(), constant=True, through=t) for t in found]


def _read_as_integer(draft: _Draft, tensors: list[str]) -> bool:
    return any(r.name in draft.quantized for t in tensors for r in draft.view.consumers[t])


def _topological(view: GraphView, wanted: dict[str, str]) -> list[str]:
    """The wanted tensors in the order in which they come to be; constants where they are first read."""
    order = [i for i in view.inputs if i in wanted]
    seen = set(order)
    for node in view.nodes:
        for name in (*node.input, *node.output):
            if name in wanted and name not in seen:
                seen.add(name)
                order.append(name)
    return order


def _edge_tensors(draft: _Draft, layers: tuple[Layer, ...]) -> set[str]:
    """The model's inputs, and what the last layers read and make: they have the bit width of the first and
    last layers."""
    wide = set(draft.view.inputs)
    for layer in last_layers(draft.view, layers):
        wide.update((layer.input, draft.final(layer.output)))
    return wide


def _bounds(draft: _Draft, tensor: str) -> Bounds:
    producer = draft.view.producer.get(tensor)
    if producer is None:
        return _NO_BOUNDS
    row = spec_of(producer)
    return row.bounds(producer, draft.view) if row.bounds else _NO_BOUNDS


def _integer_nodes(draft: _Draft) -> dict[str, str]:
    return {n.name: n.op_type for n in draft.view.nodes if n.name in draft.quantized}


def _choosing(draft: _Draft, integer: Mapping[str, str]) -> frozenset[str]:
    """Float nodes whose results only serve to choose by value (the mean of an image that a threshold is
    compared with, say)."""
    view = draft.view
    found: set[str] = set()
    for node in reversed(view.nodes):
        if node.name in integer or any(o in view.outputs for o in node.output):
            continue
        rule = recorded(node)
        chooses = rule is not None and not rule.draws and not rule.inputs and rule.applies(node, view)
        readers = [(n, o) for o in node.output for n in view.consumers[o]]
        if chooses or (readers and all(n.name in found or _only_decides(n, o, view) for n, o in readers)):
            found.add(node.name)
    return frozenset(found)


def _only_decides(node: NodeProto, tensor: str, view: GraphView) -> bool:
    """True if a node reads a tensor as its condition (If, Compress), and for nothing else."""
    rule = recorded(node)
    if rule is None or rule.draws or not rule.applies(node, view):
        return False
    reads = node_reads(node)
    for k in rule.inputs:
        reads.remove(node.input[k])
    return tensor not in reads


def _absorbed_nodes(draft: _Draft, activations: tuple[ActivationQuantizer, ...]) -> dict[str, str]:
    """The absorbed clipping nodes behind which stands a quantizer that cuts off the same (not all can)."""
    specs = {tensor: q.spec for q in activations for tensor in q.tensors}
    return {
        n.name: n.op_type
        for n in draft.view.nodes
        if n.input
        and n.input[0] in draft.absorbed
        and n.output[0] == draft.absorbed[n.input[0]]
        and (spec := specs.get(draft.final(n.output[0])))
        and keeps_bounds(spec, _bounds(draft, n.output[0]))
    }


def _kept_float(draft: _Draft, absorbed: Mapping[str, str]) -> tuple[KeptFloat, ...]:
    view = draft.view
    return tuple(
        KeptFloat(n.name, n.op_type, draft.reasons[n.name])
        for n in view.nodes
        if n.name in draft.reasons and n.name not in absorbed and any(view.is_float(o) for o in n.output)
    )
