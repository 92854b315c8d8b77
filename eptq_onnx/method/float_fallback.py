"""Find the activations that must stay float because their quantization would spoil the outputs.

What a quantizer does to the outputs is measured, not predicted: the float network runs with the quantizers of
some activations, and its outputs are compared with its own. (Hessian scores are of first order: in networks
that blow noise up they miss some quantizers by a factor of a hundred, and take others for a hundred times
worse than they are.) All at once come first, and in most networks are found quiet: one run. Otherwise the
noisiest group of neighbours is halved until the quantizers that make the noise are alone.
"""

from __future__ import annotations

import bisect
import itertools
from collections.abc import Callable, Mapping, Sequence

from onnx import ModelProto

from eptq_onnx.config import Config
from eptq_onnx.data.samples import Selection
from eptq_onnx.execute.deviation import Deviation
from eptq_onnx.records import Network

SAMPLES = 16
FLOAT_PASSES = 4.0
"""What the float network and all quantizers at once cost, in float passes over the samples; seldom more is
needed."""
_OUTLIER = 10.0
"""A quantizer is not singled out unless it is so many times noisier than the others: low bit widths are noisy
all over."""
_MOST_RUNS = 128

Quantized = Callable[[Sequence[str]], tuple[ModelProto, Mapping[str, str]]]
"""Makes the model in which some quantizers work, and tells what stands for a quantized tensor in it."""


def sensitive_activations(
    network: Network,
    quantized: Quantized,
    selection: Selection,
    config: Config,
    progress: Callable[[int, int], None],
) -> dict[str, float]:
    """Tensors that must stay float for the others to keep within ``config.max_noise``, with the noise that
    each causes alone.

    Parameters
    ----------
    network : Network
        Its calibration gives the spread that each part of the outputs is measured by.
    quantized : callable
        Of names of activation quantizers: the float model with these, and tensor to what holds its quantized
        values.
    selection : Selection
        16 of these samples are run.
    config : Config
    progress : callable
        Called with runs done and the most there may be.

    Returns
    -------
    dict of str to float
        Noise-to-signal power ratio at the outputs, each part of them in units of its own spread.
    """
    plan = network.plan
    names = [q.name for q in plan.activations if not q.constant]
    if not names or config.max_noise == 0:
        return {}
    deviation = Deviation(
        network.model, selection.samples, selection.indices, SAMPLES, network.calibration.variance, config
    )
    if not deviation.parts:
        return {}
    runs = itertools.count(1)

    def noise(group: Sequence[str]) -> float:
        total = deviation(*quantized(group))
        progress(next(runs), _MOST_RUNS)
        return total

    ratio = _spoilers(names, noise, config.max_noise)
    progress(_MOST_RUNS, _MOST_RUNS)
    found = {tensor: ratio[q.name] for q in plan.activations if q.name in ratio for tensor in q.tensors}
    # Without any layer left there would be nothing to quantize.
    return found if any(found.keys().isdisjoint(x.tensors) for x in plan.layers) else {}


def _spoilers(names: Sequence[str], noise: Callable[[Sequence[str]], float], most: float) -> dict[str, float]:
    """The noisiest quantizers, with the noise of each, until the rest stay within ``most`` together or
    nothing stands out any more.

    The noise of a group is about the sum of that of its members.
    """
    groups = [(noise(names), 0, len(names))]
    found: dict[str, float] = {}
    if groups[0][0] <= most:
        return found
    for _ in range(_MOST_RUNS // 2):
        if sum(ratio for ratio, _, _ in groups) <= most:
            break
        loudest, first, last = max(groups)
        groups.remove((loudest, first, last))
        others = sum(end - begin for _, begin, end in groups)
        if others and loudest <= _OUTLIER * sum(ratio for ratio, _, _ in groups) / others:
            break
        if last - first == 1:
            found[names[first]] = loudest
            continue
        middle = (first + last) // 2
        groups += [(noise(names[begin:end]), begin, end) for begin, end in ((first, middle), (middle, last))]
    order = list(found)

    def quiet_without(count: int) -> bool:
        gone = set(order[:count])
        return noise([n for n in names if n not in gone]) <= most

    # Noises add up to more than they make together: no more are named than it takes.
    count = bisect.bisect_left(range(len(order)), True, key=quiet_without)
    return {name: found[name] for name in order[:count]}
