"""What calibration keeps of the tensors that run past: little, made where they are computed."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from onnx import ModelProto

from eptq_onnx.config import Config
from eptq_onnx.data.samples import Samples
from eptq_onnx.errors import DataError
from eptq_onnx.execute.blocks import blocks_of, reduced
from eptq_onnx.execute.finite import has_infinite_source
from eptq_onnx.graph.view import GraphView
from eptq_onnx.numerics import quant_math
from eptq_onnx.numerics.sums import PowerSum
from eptq_onnx.numerics.types import Array

VALUES_PER_SAMPLE = 16384
"""Values of each sample that enter a histogram, or the power of what is no output, at most."""
_ENOUGH, _LEAST = 2**19, 2048
"""Values of all samples together that are enough, and the least of each sample."""


def values_of_a_sample(samples: int) -> int:
    """Return how many values of each of so many samples are counted, at most."""
    return max(_LEAST, min(VALUES_PER_SAMPLE, _ENOUGH // max(1, samples)))


def spread_values(values: Array, per_sample: int = VALUES_PER_SAMPLE) -> tuple[Array, int]:
    """Return about ``per_sample`` values of each row, evenly spread, and the step between them."""
    step = quant_math.stride(values.size, per_sample * max(1, len(values)))
    return values.reshape(-1)[::step], step


@dataclass(frozen=True)
class Seen:
    """What is kept of a tensor of a batch.

    Parameters
    ----------
    shape : tuple of int
        At least one axis.
    not_finite : int
        Values that are NaN or infinite.
    extremes : tuple of float or None
        The smallest and the largest finite value, if they were wanted and there are any values.
    picked : ndarray
        Evenly spread values, if extremes were wanted, and the ``step`` between them.
    step : int
    power : PowerSum
    refused : ndarray or None
        The value of an output that is not finite.
    """

    shape: tuple[int, ...]
    not_finite: int
    extremes: tuple[float, float] | None
    picked: Array
    step: int
    power: PowerSum
    refused: NDArray[np.floating] | None


_NO_VALUES: Array = np.zeros(0, np.float32)


@dataclass(frozen=True)
class Reader:
    """Reads tensors: each once while it is in the cache, as far as possible.

    Parameters
    ----------
    bounded : collection of str
        Tensors whose extremes and spread values are wanted.
    powers : mapping of str to bool
        Tensors whose power is wanted, with True if all values count.
    outputs : collection of str
        Tensors that must be finite.
    values : int
        See `values_of_a_sample`.
    """

    bounded: Collection[str]
    powers: Mapping[str, bool]
    outputs: Collection[str]
    values: int = VALUES_PER_SAMPLE

    def __call__(self, name: str, value: NDArray[np.floating], samples: int) -> Seen:
        """Read the value of a tensor for some samples."""
        value = np.atleast_1d(value)
        extremes: tuple[float, float] | None = None
        picked, step = _NO_VALUES, 1
        if name in self.bounded and value.size:
            extremes = float(value.min()), float(value.max())
            finite = bool(np.isfinite(extremes).all())
            picked, step = spread_values(value, self.values)
        else:
            finite = quant_math.all_finite(value)
        lost = 0 if finite else int(value.size - np.isfinite(value).sum())
        if extremes is not None and not finite:
            extremes = quant_math.finite_extremes(value)
        power = PowerSum()
        if name in self.powers:
            flat = value.reshape(-1)
            if not self.powers[name]:
                flat = flat[:: quant_math.stride(flat.size, self.values * max(1, samples))]
            power.add(flat if finite else flat[np.isfinite(flat)])
        refused = value if lost and name in self.outputs else None
        return Seen(value.shape, lost, extremes, picked.copy(), step, power, refused)


def watch(
    model: ModelProto,
    samples: Samples,
    config: Config,
    wanted: tuple[Sequence[str], Reader],
    progress: Callable[[int, int], None],
) -> Iterator[tuple[str, Seen, NDArray[np.int64]]]:
    """Yield what is seen of every wanted tensor of every batch, with its name and the samples' numbers."""
    names, reader = wanted
    if not names:
        return
    size = samples.micro_batch()
    parts = list(samples.batches(range(samples.count), size))
    blocks = blocks_of(model, samples.two_batches(size), config.block_bytes)

    def read(number: int, name: str, value: NDArray[np.floating]) -> Seen:
        return reader(name, value, len(parts[number]))

    done, total = 0, len(blocks) * samples.count
    for k, found in reduced(blocks, map(samples.take, parts), names, read):
        for name, seen in found.items():
            yield name, seen, samples.numbers(parts[k])
        done += len(parts[k])
        progress(done, total)


class Finite:
    """Counts values that are NaN or infinite, and refuses outputs that have them.

    Parameters
    ----------
    view : GraphView
        The float model.
    """

    def __init__(self, view: GraphView) -> None:
        self.outputs = [o for o in view.outputs if o in view.producer and view.is_float(o)]
        """Outputs that are checked."""
        self._masked = {o for o in self.outputs if has_infinite_source(view, o)}
        self.none: Counter[str] = Counter()
        """Values that are not finite, by tensor; tensors without any have no entry."""
        self._sizes: Counter[str] = Counter()

    def add(self, name: str, seen: Seen, numbers: NDArray[np.int64]) -> None:
        """Count.

        Raises
        ------
        DataError
            Names the output and a sample.
        """
        self._sizes[name] += math.prod(seen.shape)
        if seen.not_finite:
            self.none[name] += seen.not_finite
        if seen.refused is not None:
            _refuse(name, seen.refused, numbers, infinite=name in self._masked)

    @property
    def shares(self) -> dict[str, float]:
        """Tensors with values that are not finite, and the share of these."""
        return {name: count / self._sizes[name] for name, count in self.none.items()}


def _refuse(output: str, value: NDArray[np.floating], chosen: NDArray[np.int64], *, infinite: bool) -> None:
    """Raise if an output has a NaN, or an infinite value that does not come from the model's own masking.

    Raises
    ------
    DataError
        Names the output and a sample.
    """
    wrong = np.isnan(value) if infinite else ~np.isfinite(value)
    if not wrong.any():
        return
    place = int(np.argwhere(wrong)[0, 0]) if value.ndim and len(value) == len(chosen) else 0
    what = "NaN" if np.isnan(value).any() else "infinite values"
    raise DataError(
        f"the float model's output {output!r} has {what} for calibration sample {int(chosen[place])}: "
        "leave such samples out, or fix the model."
    )
