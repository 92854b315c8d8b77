"""Plan the scales of weights that are given, as those of a model that is quantized already."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import numpy as np

from eptq_onnx.config import Config
from eptq_onnx.graph.view import GraphView
from eptq_onnx.numerics.formats import IntFormat, PerBlock
from eptq_onnx.numerics.grid import nearest
from eptq_onnx.numerics.scales import GivenScales, ScaleRule
from eptq_onnx.numerics.spec import QuantSpec
from eptq_onnx.numerics.types import Array

_BITS = range(2, 9)


def with_given_scales(
    planned: QuantSpec,
    weight: str,
    view: GraphView,
    config: Config,
    spec_of_bits: Callable[[int, int | None], QuantSpec],
) -> QuantSpec:
    """Return the spec of a weight with the scales that are given, or the planned one.

    The latter where there are none, where the target has no such scales, and where the options ask for fewer
    bits.

    Parameters
    ----------
    planned : QuantSpec
    weight : str
    view : GraphView
    config : Config
        Its ``encodings`` hold the scales.
    spec_of_bits : callable
        Returns the target's spec of a weight with some bits, and a channel axis or None.
    """
    found = None if config.encodings is None else config.encodings.scales.get(weight)
    blocks = isinstance(planned.granularity, PerBlock)
    if (
        found is None
        or blocks
        or planned.scales is not ScaleRule.ANY
        or not isinstance(planned.format, IntFormat)
    ):
        return planned
    shape, axis, values = view.constant_shape(weight), planned.axis, found.values
    if found.axis is not None and found.axis % len(shape) != axis:
        return planned
    if axis is not None and len(values) == 1:
        values = values * shape[axis]
    if len(values) != (1 if axis is None else shape[axis]) or not all(v > 0 for v in values):
        return planned
    given, bits, reach = GivenScales(values, found.exact), found.bits, (0, 0)
    if found.exact:
        reach = _reach(view, weight, given, axis)
        # Those of few bits may be stored in more.
        bits = next((b for b in _BITS if -(2 ** (b - 1)) <= reach[0] and reach[1] < 2 ** (b - 1)), bits)
    if bits > planned.bits:
        return planned
    kept = replace(spec_of_bits(bits, axis), scales=given, zero_points=(0, 0))
    return kept if kept.qmin <= reach[0] and reach[1] <= kept.qmax else planned


def _reach(view: GraphView, weight: str, given: GivenScales, axis: int | None) -> tuple[int, int]:
    """Return the smallest and the largest integer of a weight."""
    values: Array = np.asarray(view.constant(weight), np.float32)
    shape = [-1 if k == axis else 1 for k in range(values.ndim)]
    integers = nearest(values / np.asarray(given.values, np.float32).reshape(shape))
    return int(integers.min(initial=0)), int(integers.max(initial=0))
