"""Find the activations that must stay float because quantizing them would spoil the outputs.

The effect of a quantizer on the outputs is measured, not predicted: the float network runs with the
quantizers of some activations, and its outputs are compared with those of the plain float network. (Hessian
scores are of first order: in networks that amplify noise they underestimate some quantizers by a factor of a
hundred, and overestimate others as much.) All quantizers together are tried first; in most networks they are
quiet, and one run suffices. Otherwise the noisiest group of neighbours is bisected until the noisy quantizers
are isolated.
"""

from __future__ import annotations

import bisect
import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial

from onnx import ModelProto

from eptq_onnx.config import Config
from eptq_onnx.data.samples import Selection
from eptq_onnx.execute.deviation import Deviation
from eptq_onnx.numerics.halving import halves
from eptq_onnx.records import Network

SAMPLES = 16
"""Samples that are run."""
_SAMPLES_OF_GROUPS = 4
"""Samples that tell which of two groups is noisier."""
FLOAT_PASSES = 4.0
"""Cost of the float network and of all quantizers together, in float passes; more is seldom needed."""
_OUTLIER = 10.0
"""How many times noisier than the others a quantizer must be to be singled out.

At low bit widths, everything is noisy.
"""
_MOST_RUNS = 128
"""Runs of the network, at most."""

Quantized = Callable[[Sequence[str]], tuple[ModelProto, Mapping[str, str]]]
"""Takes names of activation quantizers.

Returns the float model with these quantizers, and a mapping from each quantized tensor to the one that stands
for it in that model.
"""


@dataclass(frozen=True)
class Sensitivity:
    """The noise of activation quantizers: a power ratio at the outputs, each part normalized by its variance.

    Parameters
    ----------
    loud : dict of str to float
        Tensors to keep float to the noise that the quantizer of each causes alone.
    others : dict of str to float
        Quantizers that may stay to their noise. A group that was not split shares its noise evenly.
    left : float
        Noise of all quantizers that may stay, together.
    """

    loud: Mapping[str, float] = field(default_factory=dict)
    others: Mapping[str, float] = field(default_factory=dict)
    left: float = 0.0


def sensitive_activations(
    network: Network,
    quantized: Quantized,
    selection: Selection,
    config: Config,
    progress: Callable[[int, int], None],
) -> Sensitivity:
    """Return the tensors to keep float so that the rest stays within the limit of noise, and all noise.

    Parameters
    ----------
    network : Network
        Its calibration gives the variance that normalizes each part of the outputs.
    quantized : callable
        Builds the float model with some quantizers; see `Quantized`.
    selection : Selection
        16 of these samples are run, and fewer to tell groups apart.
    config : Config
    progress : callable
        Called with the number of runs done and the most there may be.
    """
    plan = network.plan
    names = plan.activation_names
    if not names or config.activation_noise == 0:
        return Sensitivity()
    deviation = Deviation(
        network.model, selection.samples, selection.indices, SAMPLES, network.calibration.variance, config
    )
    if not deviation.parts:
        return Sensitivity()
    runs = itertools.count(1)

    def noise_on(some: Deviation, group: Sequence[str]) -> float:
        total = some(*quantized(group))
        progress(min(next(runs), _MOST_RUNS), _MOST_RUNS)
        return total

    found = _spoilers(
        names,
        partial(noise_on, deviation),
        config.activation_noise,
        partial(noise_on, deviation.on_fewer(_SAMPLES_OF_GROUPS)),
    )
    progress(_MOST_RUNS, _MOST_RUNS)
    loud = {t: found.loud[q.name] for q in plan.activations if q.name in found.loud for t in q.tensors}
    loud |= {q.name: found.loud[q.name] for q in plan.dynamic if q.name in found.loud}
    if not plan.held and all(not loud.keys().isdisjoint(x.tensors) for x in plan.integer_layers):
        # There would be nothing to quantize but stored weights.
        return Sensitivity()
    return replace(found, loud=loud)


def _spoilers(
    names: Sequence[str],
    noise: Callable[[Sequence[str]], float],
    most: float,
    roughly: Callable[[Sequence[str]], float] | None = None,
) -> Sensitivity:
    """Return the noisiest quantizers, by name, and the noise of all.

    Bisection stops when the rest stay within ``most`` together, or when none stands out. The noise of a group
    is about the sum of its members' noise: where one half causes the lesser part, the other is not measured.
    Groups are told apart by ``roughly``, which takes less time than ``noise``; what is returned of the
    noisiest and of all is measured by ``noise``.
    """
    roughly = roughly or noise
    groups = [(noise(names), 0, len(names))]
    together = {0: groups[0][0]}
    found: dict[str, float] = {}
    for _ in range(_MOST_RUNS // 2):
        if sum(ratio for ratio, _, _ in groups) <= most:
            break
        loudest, first, last = max(groups)
        rest = [group for group in groups if group != (loudest, first, last)]
        others = sum(end - begin for _, begin, end in rest)
        if others and loudest <= _OUTLIER * sum(ratio for ratio, _, _ in rest) / others:
            break
        groups = rest
        if last - first == 1:
            found[names[first]] = loudest if roughly is noise else noise(names[first:last])
            continue
        groups += halves((loudest, first, last), lambda begin, end: roughly(names[begin:end]))
    order = list(found)

    def left(count: int) -> float:
        """Return the noise of all but the first of those found."""
        if count not in together:
            gone = set(order[:count])
            together[count] = noise([n for n in names if n not in gone])
        return together[count]

    # The separate noises sum to more than their joint noise, so return only as many as necessary.
    count = bisect.bisect_left(range(len(order)), True, key=lambda count: left(count) <= most)
    shares = {n: ratio / (end - begin) for ratio, begin, end in groups for n in names[begin:end]}
    return Sensitivity(
        {name: found[name] for name in order[:count]},
        shares | {name: found[name] for name in order[count:]},
        left(count),
    )
