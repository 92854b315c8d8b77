"""Where two versions of a network part: tensors of one name compared, in order.

The *accumulated* noise of a tensor is that of the second network as a whole; its *own* noise is what the
second network adds between the tensors in front of it, if these have the first network's values.

One network may hold a tensor with other scales of its channels, or with its channels mixed, and still
compute the same (cross-layer equalization, rotations). Scales are found and undone. Tensors that look
unrelated, while what follows from them agrees, are left out.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from onnx import ModelProto, NodeProto, TensorProto

from eptq_onnx.execute.walk import Walk
from eptq_onnx.graph.view import GraphView
from eptq_onnx.numerics.quant_math import sqnr_db
from eptq_onnx.numerics.types import Feeds
from eptq_onnx.ops import Role, spec_of

_UNLIKE = 0.01
"""Noise, as a share of the power, from which on other scales of the channels are looked for."""
_EXPLAINED = 0.25
"""Share of that noise that may be left if other scales explain it."""
_UNRELATED = 0.5
"""Noise from which on a tensor may hold mixed channels,"""
_RECOVERED = 0.1
"""if this share of it, or less, is left in a later tensor."""
_FLOATS = (TensorProto.FLOAT, TensorProto.FLOAT16, TensorProto.DOUBLE)
_BETWEEN = ("Clip", "Min", "Max", "Identity")
"""Operators on integers between a QuantizeLinear and its DequantizeLinear."""

Float64 = NDArray[np.float64]


@dataclass(frozen=True)
class TensorNoise:
    """A tensor that both networks compute.

    Parameters
    ----------
    tensor : str
    node, operator : str
        What computes it in the first network.
    own_db, accumulated_db : float
        SQNR in dB.
    scaled : bool
        True if the second network holds its channels in other scales.
    """

    tensor: str
    node: str
    operator: str
    own_db: float
    accumulated_db: float
    scaled: bool = False


@dataclass(frozen=True)
class _Shared:
    """A tensor of both networks, and the tensor of each that later nodes read in its place."""

    tensor: str
    node: NodeProto
    first: str
    second: str


@dataclass(frozen=True)
class _Likeness:
    """How two arrays agree.

    Parameters
    ----------
    noise : float
        Share of the power.
    gains : ndarray or None
        Factor of each channel that explains most of the noise, in a shape that broadcasts.
    scaled : float
        Noise with these factors.
    """

    noise: float
    gains: Float64 | None = None
    scaled: float = np.inf


def parting(
    first: ModelProto, second: ModelProto, feeds: tuple[Sequence[Feeds], Sequence[Feeds]]
) -> tuple[tuple[TensorNoise, ...], tuple[str, ...]]:
    """Compare all floating-point tensors that have one name in both networks.

    Operators are computed as ONNX defines them, without integer kernels.

    Parameters
    ----------
    first, second : ModelProto
        With named nodes and known element types.
    feeds : tuple of two sequences of Feeds
        What each takes, run by run.

    Returns
    -------
    tuple of TensorNoise
        In the order of the first network.
    tuple of str
        Tensors that cannot be compared, because the second network holds other values in them by design.
    """
    shared = _shared(first, second)
    judged = _judged(_accumulated(first, second, shared, feeds))
    kept = [(s, likeness) for s, likeness in zip(shared, judged, strict=True) if likeness is not None]
    own = _own(first, second, kept, feeds)
    noises = tuple(
        TensorNoise(
            s.tensor,
            s.node.name,
            s.node.op_type,
            _decibels(alone),
            _decibels(likeness.noise),
            scaled=likeness.gains is not None,
        )
        for (s, likeness), alone in zip(kept, own, strict=True)
    )
    return noises, tuple(s.tensor for s, likeness in zip(shared, judged, strict=True) if likeness is None)


def _shared(first: ModelProto, second: ModelProto) -> list[_Shared]:
    """Return the tensors that both compute, in order, without those that only move values."""
    views = GraphView(first), GraphView(second)
    reads = [_read_as(view) for view in views]
    other = {name for name, node in views[1].producer.items() if node.op_type != "DequantizeLinear"}
    return [
        _Shared(name, node, reads[0].get(name, name), reads[1].get(name, name))
        for node in views[0].nodes
        for name in node.output
        if name in other
        and node.op_type not in ("QuantizeLinear", "DequantizeLinear", "Constant")
        and spec_of(node).role is not Role.EQUAL_SCALE
        and all(view.elem_type(name) in _FLOATS for view in views)
    ]


def _read_as(view: GraphView) -> dict[str, str]:
    """Return the DequantizeLinear output that stands for each quantized tensor."""
    found: dict[str, str] = {}
    for node in view.nodes:
        if node.op_type != "QuantizeLinear":
            continue
        waiting = [node.output[0]]
        while waiting:
            for reader in view.consumers[waiting.pop()]:
                if reader.op_type == "DequantizeLinear":
                    found.setdefault(node.input[0], reader.output[0])
                elif reader.op_type in _BETWEEN:
                    waiting.extend(reader.output)
    return found


def _accumulated(
    first: ModelProto,
    second: ModelProto,
    shared: Sequence[_Shared],
    feeds: tuple[Sequence[Feeds], Sequence[Feeds]],
) -> list[_Likeness]:
    """Compare each tensor of both networks as they are."""
    walks = Walk(first, feeds[0], integers=False), Walk(second, feeds[1], integers=False)
    return [_likeness(walks[0].reach(s.first), walks[1].reach(s.second)) for s in shared]


def _own(
    first: ModelProto,
    second: ModelProto,
    kept: Sequence[tuple[_Shared, _Likeness]],
    feeds: tuple[Sequence[Feeds], Sequence[Feeds]],
) -> list[float]:
    """Return the noise of each tensor if those in front of it have the first network's values."""
    exact, other = Walk(first, feeds[0], integers=False), Walk(second, feeds[1], integers=False)
    noises = []
    for s, likeness in kept:
        reference = exact.reach(s.first)
        got = other.reach(s.second)
        gain = 1.0 if likeness.gains is None else likeness.gains
        reference = [np.asarray(v * gain, own.dtype) for v, own in zip(reference, got, strict=True)]
        noises.append(_noise(reference, got))
        other.put({s.tensor: reference, s.second: reference})
    return noises


def _judged(found: Sequence[_Likeness]) -> list[_Likeness | None]:
    """Return what holds of each tensor: None if it cannot be compared, factors where they are by design.

    Whatever a network holds in a tensor by design, later tensors agree all the same.
    """
    least, judged = np.inf, list[_Likeness | None]()
    for likeness in reversed(found):
        recovered = least <= _RECOVERED * likeness.noise
        if not recovered:
            judged.append(_Likeness(likeness.noise))
        elif likeness.gains is not None:
            judged.append(_Likeness(likeness.scaled, likeness.gains))
        else:
            judged.append(likeness if likeness.noise < _UNRELATED else None)
        last = judged[-1]
        least = min(least, last.noise if last is not None else np.inf)
    return judged[::-1]


def _likeness(reference: Sequence[NDArray[np.generic]], got: Sequence[NDArray[np.generic]]) -> _Likeness:
    """Compare the values of all runs; if they differ much, with the best scale of each channel."""
    noise = _noise(reference, got)
    if noise < _UNLIKE or any(a.shape != b.shape or a.ndim < 2 for a, b in zip(reference, got, strict=True)):
        return _Likeness(noise)
    for axis in dict.fromkeys((1, reference[0].ndim - 1)):
        gains = _gains(reference, got, axis)
        if gains is None:
            continue
        scaled = _noise([np.asarray(v, np.float64) * gains for v in reference], got)
        if scaled <= _EXPLAINED * noise:
            return _Likeness(noise, gains, scaled)
    return _Likeness(noise)


def _gains(
    reference: Sequence[NDArray[np.generic]], got: Sequence[NDArray[np.generic]], axis: int
) -> Float64 | None:
    """Return the factor of each channel with the least squared error; None if channels differ in number."""
    if len({v.shape[axis] for v in reference}) != 1:
        return None
    others = tuple(k for k in range(reference[0].ndim) if k != axis)
    pairs = [
        (np.asarray(a, np.float64), np.asarray(b, np.float64)) for a, b in zip(reference, got, strict=True)
    ]
    power = np.asarray(sum(np.square(a).sum(axis=others, keepdims=True) for a, _ in pairs))
    product = np.asarray(sum((a * b).sum(axis=others, keepdims=True) for a, b in pairs))
    return np.asarray(np.divide(product, power, out=np.ones_like(power), where=power > 0), np.float64)


def _noise(reference: Sequence[NDArray[np.generic]], got: Sequence[NDArray[np.generic]]) -> float:
    """Return the squared differences as a share of the power; of arrays of other shapes, all is noise."""
    power = noise = 0.0
    for a, b in zip(reference, got, strict=True):
        exact = np.asarray(a, np.float64)
        finite = np.isfinite(exact)
        square = float(np.square(exact[finite]).sum())
        power += square
        if a.shape != b.shape:
            noise += square
        else:
            difference = float(np.square(exact[finite] - np.asarray(b, np.float64)[finite]).sum())
            noise += difference if np.isfinite(difference) else square
    return noise / power if power else float(noise > 0)


def _decibels(noise: float) -> float:
    return round(sqnr_db(1.0, noise), 3)


def most_alone(noises: Sequence[TensorNoise], count: int) -> list[TensorNoise]:
    """Return the tensors with the most noise of their own, most first."""
    return sorted(noises, key=lambda n: n.own_db)[:count]


def first_below(noises: Sequence[TensorNoise], least_db: float) -> TensorNoise | None:
    """Return the first tensor that keeps less than so many decibels, or None."""
    return next((n for n in noises if n.accumulated_db < least_db), None)
