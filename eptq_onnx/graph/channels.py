"""Analysis of which channels of which tensors may be scaled without changing what the model computes.

A factor on a channel and its inverse in all consumers cancel if the operators between are positively
homogeneous per channel (Relu, PRelu, pooling, sums); the constants of layers and normalizations absorb the
factors (cross-layer equalization, Nagel et al. 2019, section 4.1). Every channel of a tensor has a *slot*;
operators tie slots that must have the same factor. Slot 0 is shared by all channels that must not be scaled.

A *rule* records how one node relates the slots of its tensors. It returns False if the relation is unknown;
then neither inputs nor outputs of the node are scaled.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from onnx import NodeProto
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components

from eptq_onnx.graph.view import GraphView, attribute, int_attribute, ints_attribute
from eptq_onnx.numerics.formats import along_axis
from eptq_onnx.numerics.linear import LinearForm, row_shape
from eptq_onnx.numerics.types import Array
from eptq_onnx.proto.bodies import node_reads

Slots = NDArray[np.int64]
Factors = NDArray[np.float64]


@dataclass(frozen=True)
class Absorber:
    """A constant that absorbs the factors of channels.

    Parameters
    ----------
    constant : str
    times, over : ndarray or None
        Slots whose factors multiply and divide the constant: those of the output and input channels of a
        layer, along rows and terms of its weight; for other constants, those of the entries along ``axis``.
    axis : int
    form : LinearForm or None
        The matrix form of a layer's weight; None for other constants.
    """

    constant: str
    times: Slots | None
    over: Slots | None
    axis: int = 0
    form: LinearForm | None = None

    @property
    def slots(self) -> Slots:
        """All slots of the constant."""
        return np.concatenate([s for s in (self.times, self.over) if s is not None])

    def scaled(self, value: Array, factors: Factors) -> Array:
        """Return the value of the constant scaled by the factor of each slot."""
        one = np.ones(1)
        times, over = (factors[s] if s is not None else one for s in (self.times, self.over))
        if self.form is None:
            return np.asarray(value * along_axis(times / over, self.axis, value.ndim), np.float32)
        rows = self.form.weight_rows(value)
        groups, outputs, _ = rows.shape
        terms = np.repeat(over.reshape(groups, -1), self.form.taps, axis=1)
        return self.form.weight_from_rows(
            rows * times.reshape(groups, outputs, 1) / terms[:, None, :]
        ).astype(np.float32)


class Channels:
    """The slots of every tensor of a graph.

    Parameters
    ----------
    view : GraphView
    rule_of : callable
        Node to its rule, or None.
    axes : mapping of str to int
        The channel axis of each tensor (`eptq_onnx.graph.channel_axes`); there are no slots along other axes.
    """

    def __init__(
        self, view: GraphView, rule_of: Callable[[NodeProto], Rule | None], axes: Mapping[str, int]
    ) -> None:
        self.view, self.axes = view, axes
        self.absorbers: list[Absorber] = []
        self._slots: dict[str, tuple[Slots, int]] = {}
        self._count = 1
        self._ties: list[tuple[Slots, Slots]] = []
        self._uses = Counter(name for node in view.nodes for name in node_reads(node))
        for node in view.nodes:
            rule = rule_of(node)
            if rule is None or not rule(node, self):
                for name in node_reads(node):
                    self.fix(name)
        for name in view.outputs:
            self.fix(name)

    def of(self, name: str) -> tuple[Slots, int] | None:
        """Return the slots of a tensor's channels and their axis, None if no channel may be scaled."""
        return self._slots.get(name)

    def tensors(self) -> Mapping[str, Slots]:
        """Return the slots of all tensors that have any."""
        return {name: slots for name, (slots, _) in self._slots.items()}

    def classes(self) -> tuple[int, Slots]:
        """Return the number of sets of tied slots, and the set of each slot; that of slot 0 is not scaled."""
        ties = [np.concatenate(side) for side in zip(*self._ties, strict=True)] or [np.zeros(0, np.int64)] * 2
        graph = coo_array((np.ones(len(ties[0])), (ties[0], ties[1])), shape=(self._count, self._count))
        count, sets = connected_components(graph, directed=False)
        return int(count), sets.astype(np.int64)

    # ---- for rules -----------------------------------------------------------------------------------------
    def fresh(self, count: int) -> Slots:
        """Return new slots that are not tied to any others."""
        self._count += count
        return np.arange(self._count - count, self._count)

    def make(self, name: str, slots: Slots, axis: int) -> bool:
        """Assign slots to a tensor; if they are not along its channel axis, fix them and return False."""
        if self.axes.get(name, axis) != axis:
            self.tie(slots, np.zeros_like(slots))
            return False
        self._slots[name] = slots, axis
        return True

    def read(self, name: str, count: int, axis: int) -> Slots:
        """Return the slots of a tensor along an axis; if its channels lie along another, fix them."""
        known = self._slots.get(name)
        if known is not None and known[1] == axis and len(known[0]) == count:
            return known[0]
        self.fix(name)
        return np.zeros(count, np.int64)

    def tie(self, slots: Slots, others: Slots) -> None:
        """Require equal factors of two arrays of slots, pair by pair."""
        self._ties.append((slots, others))

    def fix(self, name: str) -> None:
        """Require that the channels of a tensor are not scaled."""
        if name in self._slots:
            slots = self._slots[name][0]
            self.tie(slots, np.zeros_like(slots))

    def own(self, name: str) -> bool:
        """Return True for a float constant that is read exactly once, and so may be changed."""
        private = self._uses[name] == 1 and name not in self.view.outputs
        return self.view.is_constant(name) and private and self.view.is_float(name)

    def absorb(
        self, constant: str, times: Slots | None = None, over: Slots | None = None, axis: int = 0
    ) -> None:
        """Let a constant absorb along an axis: multiplied by the factors ``times``, divided by ``over``."""
        self.absorbers.append(Absorber(constant, times, over, axis % len(self.view.constant_shape(constant))))


Rule = Callable[[NodeProto, Channels], bool]


def layer(
    node: NodeProto, channels: Channels, form: LinearForm, weight: int, bias: int | None, axis: int
) -> bool:
    """Let a layer absorb the factors of its output channels in its rows, those of its inputs in its terms.

    ``sum_t W[n, t] x[t] + b[n]`` becomes ``sum_t (f[n] W[n, t] / f[t]) (f[t] x[t]) + f[n] b[n]``.
    """
    view, name = channels.view, node.input[weight]
    biases = [node.input[bias]] if bias is not None and len(node.input) > bias and node.input[bias] else []
    shape = view.shape(node.input[0])
    if not channels.own(name) or not all(channels.own(b) for b in biases) or shape is None:
        return False
    groups, outputs, terms = row_shape(form, view.constant_shape(name))
    if any(view.constant_shape(b) != (groups * outputs,) for b in biases):
        return False
    axis %= len(shape)
    read = channels.read(node.input[0], groups * terms // form.taps, axis)
    made = channels.fresh(groups * outputs)
    channels.absorbers.append(Absorber(name, made, read, form=form))
    for b in biases:
        channels.absorb(b, times=made)
    return channels.make(node.output[0], made, axis)


def passes(node: NodeProto, channels: Channels) -> bool:
    """Pass factors on through a positively homogeneous function: f(a x) = a f(x) for a > 0, per channel."""
    known = channels.of(node.input[0])
    for other in node.input[1:]:
        channels.fix(other)
    return known is not None and channels.make(node.output[0], *known)


def pools(node: NodeProto, channels: Channels) -> bool:
    """Pass factors on through pooling, if the channels lie along axis 1, as all later axes are pooled."""
    known = channels.of(node.input[0])
    return known is not None and known[1] == 1 and passes(node, channels)


def keeps_channels(node: NodeProto, channels: Channels) -> bool:
    """Pass factors on if the operator keeps the number of channels (Resize, Pad)."""
    known, shape = channels.of(node.input[0]), channels.view.shape(node.output[0])
    if attribute(node, "extrapolation_value", 0.0):
        return False
    return (
        known is not None
        and shape is not None
        and shape[known[1]] == len(known[0])
        and passes(node, channels)
    )


def pads(node: NodeProto, channels: Channels) -> bool:
    """Pass factors on through padding with zeros, or with copies from the same channel."""
    fill = node.input[2] if len(node.input) > 2 else ""
    zero = not fill or (channels.view.is_constant(fill) and not channels.view.constant(fill).any())
    return zero and not attribute(node, "value", 0.0) and keeps_channels(node, channels)


def sums(node: NodeProto, channels: Channels) -> bool:
    """Tie the factors of all terms of a sum; constant terms absorb them."""
    view = channels.view
    terms = [i for i in node.input if not view.is_constant(i)]
    known = [channels.of(i) for i in terms]
    shapes = [view.shape(i) for i in terms]
    if (
        not terms
        or any(k is None for k in known)
        or any(s is None or len(s) != len(shapes[0] or ()) for s in shapes)
    ):
        return False
    (slots, axis), *others = (k for k in known if k is not None)
    constants = [i for i in node.input if view.is_constant(i)]
    if any(a != axis or len(s) != len(slots) for s, a in others):
        return False
    places = [_along(view.constant_shape(c), axis, len(shapes[0] or ()), len(slots)) for c in constants]
    if any(place is None or not channels.own(c) for place, c in zip(places, constants, strict=True)):
        return False
    for other, _ in others:
        channels.tie(slots, other)
    for place, constant in zip(places, constants, strict=True):
        channels.absorb(constant, times=slots, axis=place or 0)
    return channels.make(node.output[0], slots, axis)


def multiplied(node: NodeProto, channels: Channels) -> bool:
    """Let a constant operand of a Mul with one value per channel absorb factors; pass them on otherwise.

    Of two computed operands, the larger one passes its factors on; the other, a gate, is not scaled.
    """
    view = channels.view
    x, other = reversed(node.input) if view.is_constant(node.input[0]) else node.input
    if not view.is_constant(other):
        size, gate = (math.prod(d or 1 for d in view.shape(i) or ()) for i in (x, other))
        x, other = (other, x) if gate > size else (x, other)
    return _rescaled(node, channels, x, other, inverse=False)


def divided(node: NodeProto, channels: Channels) -> bool:
    """Handle a Div like `multiplied`, with the divisor as the constant or the gate."""
    return _rescaled(node, channels, *node.input, inverse=True)


def _rescaled(node: NodeProto, channels: Channels, x: str, other: str, *, inverse: bool) -> bool:
    view, known = channels.view, channels.of(x)
    channels.fix(other)
    shapes = [view.shape(i) for i in (x, other)]
    if x == other or any(s is None for s in shapes) or len(shapes[1] or ()) > len(shapes[0] or ()):
        return False
    rank = len(shapes[0] or ())
    if known is None and channels.own(other):
        known = _fixed_along(view.constant_shape(other), rank, channels.axes.get(node.output[0], 0))
    if known is None:
        return False
    slots, axis = known
    place = _along(view.constant_shape(other), axis, rank, len(slots)) if channels.own(other) else None
    if place is None:
        return channels.make(node.output[0], slots, axis)
    made = channels.fresh(len(slots))
    channels.absorb(other, *((slots, made) if inverse else (made, slots)), axis=place)
    return channels.make(node.output[0], made, axis)


def _fixed_along(shape: Sequence[int], rank: int, axis: int) -> tuple[Slots, int] | None:
    """Return unscaled slots and their axis, if a constant varies along exactly that axis, else None."""
    varies = [i + rank - len(shape) for i, extent in enumerate(shape) if extent > 1]
    return (np.zeros(math.prod(shape), np.int64), axis) if axis and varies == [axis] else None


def batch_normalization(node: NodeProto, channels: Channels) -> bool:
    """Let scale, mean and bias of ``scale (x - mean) / sqrt(var + eps) + bias`` absorb all factors."""
    scale, bias, mean, _ = node.input[1:5]
    if not all(channels.own(c) for c in (scale, bias, mean)):
        return False
    count = channels.view.constant_shape(scale)[0]
    read, made = channels.read(node.input[0], count, 1), channels.fresh(count)
    channels.absorb(scale, times=made, over=read)
    channels.absorb(bias, times=made)
    channels.absorb(mean, times=read)
    return channels.make(node.output[0], made, 1)


def last_axis_normalization(node: NodeProto, channels: Channels) -> bool:
    """Let scale and bias of a normalization over the last axis absorb the factors of its output."""
    constants = [i for i in node.input[1:] if i]
    shape = channels.view.shape(node.input[0])
    if shape is None or int_attribute(node, "axis", -1) % len(shape) != len(shape) - 1:
        return False
    if not all(channels.own(c) and len(channels.view.constant_shape(c)) == 1 for c in constants):
        return False
    channels.fix(node.input[0])
    made = channels.fresh(channels.view.constant_shape(constants[0])[0])
    for constant in constants:
        channels.absorb(constant, times=made)
    return channels.make(node.output[0], made, len(shape) - 1)


def concatenation(node: NodeProto, channels: Channels) -> bool:
    """Concatenate slots along the channel axis; along other axes, tie the slots of all parts."""
    known = [channels.of(i) for i in node.input]
    axes = {k[1] for k in known if k is not None}
    shapes = [channels.view.shape(i) for i in node.input]
    if len(axes) != 1 or any(s is None for s in shapes):
        return False
    axis = axes.pop()
    along = int_attribute(node, "axis", 0) % len(shapes[0] or (0,)) == axis
    counts = [(s or ())[axis] for s in shapes]
    if any(c is None for c in counts) or (not along and len(set(counts)) > 1):
        return False
    parts = [channels.read(i, c or 0, axis) for i, c in zip(node.input, counts, strict=True)]
    if along:
        return channels.make(node.output[0], np.concatenate(parts), axis)
    for part in parts[1:]:
        channels.tie(parts[0], part)
    return channels.make(node.output[0], parts[0], axis)


def split(node: NodeProto, channels: Channels) -> bool:
    """Give every part of a Split the slots of its channels."""
    known = channels.of(node.input[0])
    shapes = [channels.view.shape(o) for o in node.output]
    if known is None or any(s is None for s in shapes):
        return False
    slots, axis = known
    if int_attribute(node, "axis", 0) % len(shapes[0] or (0,)) != axis:
        return all(channels.make(o, slots, axis) for o in node.output)
    counts = [(s or ())[axis] for s in shapes]
    if any(c is None for c in counts) or sum(c or 0 for c in counts) != len(slots):
        return False
    begins = np.cumsum([0, *(c or 0 for c in counts)])
    return all(
        channels.make(o, slots[a:b], axis) for o, a, b in zip(node.output, begins, begins[1:], strict=False)
    )


def transpose(node: NodeProto, channels: Channels) -> bool:
    """Move the slots to another axis."""
    known, order = channels.of(node.input[0]), ints_attribute(node, "perm")
    return (
        known is not None
        and known[1] in order
        and channels.make(node.output[0], known[0], order.index(known[1]))
    )


def reshape(node: NodeProto, channels: Channels) -> bool:
    """Pass slots on through changes of later axes; if these are merged with channels, repeat the slots."""
    known = channels.of(node.input[0])
    before, after = (channels.view.shape(name) for name in (node.input[0], node.output[0]))
    if known is None or before is None or after is None or known[1] != 1 or len(after) < 2:
        return False
    slots, inner = known[0], _product(before[2:])
    # With the same number of values per channel, the batch is the same, too.
    if inner is not None and after[1] == len(slots) and _product(after[2:]) == inner:
        return channels.make(node.output[0], slots, 1)
    if inner is None or len(after) != 2 or after[1] != len(slots) * inner:
        return False
    return channels.make(node.output[0], np.repeat(slots, inner), 1)


def _product(dims: Sequence[int | None]) -> int | None:
    return None if any(d is None for d in dims) else math.prod(d or 0 for d in dims)


def _along(shape: Sequence[int], axis: int, rank: int, count: int) -> int | None:
    """Return the axis of a constant that broadcasts to ``axis`` of a tensor and has ``count`` entries.

    ``rank`` is that of the tensor. None if there is no such axis.
    """
    place = axis - (rank - len(shape))
    return place if 0 <= place < len(shape) <= rank and shape[place] == count else None
