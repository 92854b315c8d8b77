"""Plan the quantizers of activations and of constant operands, and which tensors share one."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Sequence

from eptq_onnx.config import FLOAT_BITS, Config
from eptq_onnx.graph.view import GraphView, last_layers
from eptq_onnx.method.plan.draft import Draft, bounds_of
from eptq_onnx.numerics.formats import IntFormat
from eptq_onnx.numerics.spec import QuantSpec
from eptq_onnx.ops import Bounds, Role, channel_axes_of, pointwise
from eptq_onnx.records import ActivationQuantizer, ConstantOperand, DynamicQuantizer, Layer


def quantizers_of(
    draft: Draft, layers: tuple[Layer, ...], config: Config
) -> tuple[tuple[ActivationQuantizer, ...], tuple[ConstantOperand, ...]]:
    """Return the quantizers of activations and of constant operands, both in topological order."""
    view = draft.view
    weights = {layer.weight for layer in layers}
    joined: set[str] = set()
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
        row = draft.row(node)
        inputs = [i for i in draft.inputs(node) if i not in weights]
        outputs = [draft.final(o) for o in node.output if o]
        for name in inputs:
            root(name)
        if spec.role is Role.EQUAL_SCALE or row.shared_scale:
            joined.update(outputs)
            for name in (*inputs[1:], *outputs):
                parent[root(name)] = root(inputs[0])
        elif row.output == "quantized" or (row.output == "optional" and any(map(draft.is_read, outputs))):
            for name in outputs:
                root(name)
    groups: dict[str, list[str]] = defaultdict(list)
    for name in _topological(view, parent):
        groups[root(name)].append(name)
    wide, axes = _edge_tensors(draft, layers), channel_axes_of(view)
    activations, operands = [], []
    for members in groups.values():
        edge = any(m in wide for m in members)
        default = (
            config.most_activation_bits if config.activation_bits == FLOAT_BITS else config.activation_bits
        )
        bits = max(config.edge_bits, default) if edge else default
        readers = {
            n.name
            for m in members
            for n in view.consumers[m]
            if n.name in draft.quantized and m in draft.inputs(n)
        }
        if readers & draft.bits.keys():
            bits = max(draft.bits[name][1] if name in draft.bits else bits for name in readers)
        own, first = draft.target.activation_spec(bits), members[0]
        if view.is_constant(first):
            operands.append(ConstantOperand(first, tuple(members), own))
            continue
        others = tuple(m for m in members[1:] if m not in joined)
        through = first if others else pointwise(view, first, lambda shape: math.prod(shape) == 1)[1]
        lows, highs = zip(*(bounds_of(draft, m) for m in (first, *others)), strict=True)
        bounds = min(lows), max(highs)
        maker = view.producer.get(first)
        prescribed = draft.row(maker).output_range if maker is not None and not others else None
        if prescribed is None:
            prescribed = _given(members, bounds, own, config)
        activations.append(
            ActivationQuantizer(
                first, tuple(members), own, bounds, through, axes.get(first), others, prescribed
            )
        )
    return tuple(activations), tuple(operands)


def _given(members: Sequence[str], bounds: Bounds, spec: QuantSpec, config: Config) -> Bounds | None:
    """Return the range that the options give tensors with one scale, to be divided among all values."""
    ranges = {} if config.encodings is None else config.encodings.ranges
    own = [ranges[m] for m in members if m in ranges]
    if not own or not isinstance(spec.format, IntFormat):
        return None
    # What comes behind an absorbed function has its limits.
    low, high = max(min(low for low, _ in own), bounds[0]), min(max(high for _, high in own), bounds[1])
    steps = spec.qmax - spec.qmin
    return (low, low + (high - low) * (steps + 1) / steps) if low < high else None


def dynamic_quantizers(layers: tuple[Layer, ...]) -> tuple[DynamicQuantizer, ...]:
    """Return the inputs of dynamic layers, each with its readers."""
    readers: dict[str, list[str]] = defaultdict(list)
    for layer in layers:
        if layer.dynamic:
            readers[layer.input].append(layer.node)
    return tuple(DynamicQuantizer(name, tuple(nodes)) for name, nodes in readers.items())


def _topological(view: GraphView, wanted: dict[str, str]) -> list[str]:
    """Return the wanted tensors in topological order; constants come where they are first read."""
    order = [i for i in view.inputs if i in wanted]
    seen = set(order)
    for node in view.nodes:
        for name in (*node.input, *node.output):
            if name in wanted and name not in seen:
                seen.add(name)
                order.append(name)
    return order


def _edge_tensors(draft: Draft, layers: tuple[Layer, ...]) -> set[str]:
    """Return the tensors with the bit width of first and last layers.

    They are the model's inputs, and the inputs and outputs of the last layers.
    """
    wide = set(draft.view.inputs)
    for layer in last_layers(draft.view, layers):
        wide.update((layer.input, draft.final(layer.output)))
    return wide
