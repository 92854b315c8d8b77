"""Which channels of which tensors may be scaled without changing what the model computes.

A factor on a channel and its inverse in whatever reads it cancel where the operators between are positively
homogeneous, channel by channel (Relu, PRelu, pooling, sums); the constants of layers and normalizations take
the factors up (cross-layer equalization, Nagel et al. 2019, section 4.1). Every channel of a tensor has a
*slot*; operators tie the slots that must have the same factor. Slot 0 is that of all channels that must stay
as they are.

A *rule* enters what one node does to the slots of its tensors. It returns False where it cannot tell; then
the node's inputs stay as they are, and so does what it makes.
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
    """A constant that takes up what is done to channels.

    Parameters
    ----------
    constant : str
    times, over : ndarray or None
        Slots of what it makes, and of what it reads: those of its rows and of their terms, if it has such;
        else of the places along an axis.
    axis : int
    form : LinearForm or None
        How a layer's weight is made of rows.
    """

    constant: str
    times: Slots | None
    over: Slots | None
    axis: int = 0
    form: LinearForm | None = None

    @property
    def slots(self) -> Slots:
        """All slots."""
        return np.concatenate([s for s in (self.times, self.over) if s is not None])

    def scaled(self, value: Array, factors: Factors) -> Array:
        """The value where every slot has a factor."""
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
        The channel axis of each tensor (`eptq_onnx.graph.channel_axes`): along another one it has no slots.
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
        """Slots of a tensor's channels and their axis; None where all stay as they are."""
        return self._slots.get(name)

    def tensors(self) -> Mapping[str, Slots]:
        """The slots of all tensors that have any."""
        return {name: slots for name, (slots, _) in self._slots.items()}

    def classes(self) -> tuple[int, Slots]:
        """How many sets of tied slots there are, and the set of each slot; that of slot 0 stays as it is."""
        ties = [np.concatenate(side) for side in zip(*self._ties, strict=True)] or [np.zeros(0, np.int64)] * 2
        graph = coo_array((np.ones(len(ties[0])), (ties[0], ties[1])), shape=(self._count, self._count))
        count, sets = connected_components(graph, directed=False)
        return int(count), sets.astype(np.int64)

    # ---- for rules -----------------------------------------------------------------------------------------
    def fresh(self, count: int) -> Slots:
        """Slots that nothing is tied to yet."""
        self._count += count
        return np.arange(self._count - count, self._count)

    def make(self, name: str, slots: Slots, axis: int) -> bool:
        """Give a tensor its slots; False if they do not lie along its channel axis: then they must stay as
        they are."""
        if self.axes.get(name, axis) != axis:
            self.tie(slots, np.zeros_like(slots))
            return False
        self._slots[name] = slots, axis
        return True

    def read(self, name: str, count: int, axis: int) -> Slots:
        """Slots of a tensor along an axis; those of one whose channels lie along another stay as they are."""
        known = self._slots.get(name)
        if known is not None and known[1] == axis and len(known[0]) == count:
            return known[0]
        self.fix(name)
        return np.zeros(count, np.int64)

    def tie(self, slots: Slots, others: Slots) -> None:
        """Demand the same factors."""
        self._ties.append((slots, others))

    def fix(self, name: str) -> None:
        """Demand that a tensor stays as it is."""
        if name in self._slots:
            slots = self._slots[name][0]
            self.tie(slots, np.zeros_like(slots))

    def own(self, name: str) -> bool:
        """True for a constant that one node reads, once."""
        private = self._uses[name] == 1 and name not in self.view.outputs
        return self.view.is_constant(name) and private and self.view.is_float(name)

    def absorb(
        self, constant: str, times: Slots | None = None, over: Slots | None = None, axis: int = 0
    ) -> None:
        """Let a constant be multiplied by the factors of some slots, and divided by those of others, along an
        axis."""
        self.absorbers.append(Absorber(constant, times, over, axis % len(self.view.constant_shape(constant))))


Rule = Callable[[NodeProto, Channels], bool]


def layer(
    node: NodeProto, channels: Channels, form: LinearForm, weight: int, bias: int | None, axis: int
) -> bool:
    """A product with a constant: its rows take up the factors of what it makes, its terms those of what it
    reads.

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
    """f(a x) = a f(x) for a > 0, in every channel: what comes out has the factors of what comes in."""
    known = channels.of(node.input[0])
    for other in node.input[1:]:
        channels.fix(other)
    return known is not None and channels.make(node.output[0], *known)


def pools(node: NodeProto, channels: Channels) -> bool:
    """Like `passes`, where the channels lie on their usual axis: all behind it are pooled."""
    known = channels.of(node.input[0])
    return known is not None and known[1] == 1 and passes(node, channels)


def keeps_channels(node: NodeProto, channels: Channels) -> bool:
    """Like `passes`, if there are as many channels behind the operator as in front of it (Resize, Pad)."""
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
    """Zeros have any factor; copies of values have that of their channel."""
    fill = node.input[2] if len(node.input) > 2 else ""
    zero = not fill or (channels.view.is_constant(fill) and not channels.view.constant(fill).any())
    return zero and not attribute(node, "value", 0.0) and keeps_channels(node, channels)


def sums(node: NodeProto, channels: Channels) -> bool:
    """All terms have the same factors; a constant term takes them up."""
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
    """Mul: a constant with a value a channel takes up all factors; those of a computed tensor pass its gate.

    Of two computed operands the larger one is the tensor, the other (a gate has few values) stays as it is.
    """
    view = channels.view
    x, other = reversed(node.input) if view.is_constant(node.input[0]) else node.input
    if not view.is_constant(other):
        size, gate = (math.prod(d or 1 for d in view.shape(i) or ()) for i in (x, other))
        x, other = (other, x) if gate > size else (x, other)
    return _rescaled(node, channels, x, other, inverse=False)


def divided(node: NodeProto, channels: Channels) -> bool:
    """Div: like `multiplied`, where what is divided by is the constant or the gate."""
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
    """Slots of channels that stay as they are, and their axis, if that is where a constant tells them apart;
    else None."""
    varies = [i + rank - len(shape) for i, extent in enumerate(shape) if extent > 1]
    return (np.zeros(math.prod(shape), np.int64), axis) if axis and varies == [axis] else None


def batch_normalization(node: NodeProto, channels: Channels) -> bool:
    """``scale (x - mean) / sqrt(var + eps) + bias``: all factors go into scale, mean and bias."""
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
    """LayerNormalization and its like over the last axis: scale and bias take up the factors of what comes
    out."""
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
    """Channels side by side keep their factors; parts of the same channels have the same."""
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
    """Every part keeps the factors of its channels."""
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
    """The channels lie along another axis."""
    known, order = channels.of(node.input[0]), ints_attribute(node, "perm")
    return (
        known is not None
        and known[1] in order
        and channels.make(node.output[0], known[0], order.index(known[1]))
    )


def reshape(node: NodeProto, channels: Channels) -> bool:
    """Axes behind the channels may change; those of a channel that are joined with it have its factor."""
    known = channels.of(node.input[0])
    before, after = (channels.view.shape(name) for name in (node.input[0], node.output[0]))
    if known is None or before is None or after is None or known[1] != 1 or len(after) < 2:
        return False
    slots, inner = known[0], _product(before[2:])
    # As many values behind the channels as before: then the batch is the same, too.
    if inner is not None and after[1] == len(slots) and _product(after[2:]) == inner:
        return channels.make(node.output[0], slots, 1)
    if inner is None or len(after) != 2 or after[1] != len(slots) * inner:
        return False
    return channels.make(node.output[0], np.repeat(slots, inner), 1)


def _product(dims: Sequence[int | None]) -> int | None:
    return None if any(d is None for d in dims) else math.prod(d or 0 for d in dims)


def _along(shape: Sequence[int], axis: int, rank: int, count: int) -> int | None:
    """The axis of a constant that meets ``axis`` of a tensor of that rank and has ``count`` places; None if
    it has none."""
    place = axis - (rank - len(shape))
    return place if 0 <= place < len(shape) <= rank and shape[place] == count else None
