"""Keep nearest rounding wherever nothing beats it: no result is worse than nearest rounding with the same
ranges.

Rounding layer by layer, and the network-wise loop, are judged by running the network that they make, on
samples that they have not seen, with the choices of the float network. Where the outputs of all layers
rounded so are no nearer to the float network's than nearest rounding leaves them, or may be so by chance
alone, nearest rounding stays, from the layer on that does best.
"""

from __future__ import annotations

from collections import ChainMap
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, replace
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray
from scipy import stats

from eptq_onnx.numerics.types import Array
from eptq_onnx.records import Plan, Rounding

V = TypeVar("V")

SAMPLES = 32
"""At most so many are judged on."""
_SHARES = (0.75, 0.5, 0.25, 0.125)
"""Of the layers that keep what was done to them, where all do harm: errors add up on the way to the
outputs."""
_SLACK = 1.02
"""Noise that makes no difference: where activations make nearly all of it, chance decides."""
_WORST = 1.06
"""A quarter of a decibel: what a part of the outputs may lose at worst."""
_CLEAR = 0.7
"""Share of the noise of all outputs together, one and a half decibels less: where no more is left, it need
not be sure of each part."""
_CHANCE, _CHANCE_OF_MIXTURES = 0.01, 0.001
"""Of more than that on other samples; the best of several mixtures is so by chance, too."""
_NOTHING = 1e-12
"""Noise of rounded floats."""
_GAIN = 0.9
"""Share of the noise that a mixture may leave at most: less is not worth it."""

Noise = NDArray[np.float64]
"""Run by run, of every part of the outputs; see `eptq_onnx.execute.deviation.Deviation.of_runs`."""


@dataclass(frozen=True)
class Limit:
    """What nearest rounding leaves.

    Parameters
    ----------
    noise : ndarray of shape (n_runs, n_parts)
    outputs : ndarray of shape (n_parts,)
        True for parts of the outputs; of others, which choices are made from, the mean alone counts.
    """

    noise: Noise
    outputs: NDArray[np.bool_]


NoiseOf = Callable[[Rounding], Noise]
"""Of the network with a rounding, on samples that it has not seen; without elements where no output can be
compared."""


def better_than_nearest(
    noise_of: NoiseOf, limit: Limit, plan: Plan, nearest: Rounding, rounded: Rounding, *, targets: bool
) -> tuple[Rounding, str | None]:
    """What was rounded layer by layer, as far as it serves.

    Parameters
    ----------
    noise_of : callable
    limit : Limit
    plan : Plan
    nearest, rounded : Rounding
    targets : bool
        True if the real values that weights are rounded from are needed later.

    Returns
    -------
    Rounding
    str or None
        A note, if nearest rounding stays somewhere.
    """
    if not limit.noise.size:
        return rounded, None
    found, most = noise_of(rounded), limit.noise.mean()
    if _serves(found, limit):
        return rounded, None
    layers = len(plan.layers)
    best, kept, least = nearest, 0, most
    for count in dict.fromkeys(round(share * layers) for share in _SHARES):
        if not 0 < count < layers:
            continue
        mixed = _mixed(plan, rounded, nearest, count, targets=targets)
        other = noise_of(mixed)
        if _serves(other, limit, _CHANCE_OF_MIXTURES) and other.mean() < min(_GAIN * most, least):
            best, kept, least = mixed, count, other.mean()
    lost = 10 * np.log10(max(found.mean(), 1e-30) / max(most, 1e-30))
    where = (
        f"from layer {plan.layers[kept].node} on, {layers - kept} of {layers} layers"
        if kept
        else f"all {layers} layers"
    )
    if lost > 0:
        worse = f"the outputs are noisier by {lost:.1f} dB"
    elif _noisier(found, limit):
        worse = "some output is noisier"
    else:
        worse = "some output may be noisier, for all that can be told,"
    return (
        best,
        f"nearest rounding stays ({where}): with all layers rounded one after the other {worse} on samples that neither saw",
    )


def still_better(noise_of: NoiseOf, limit: Limit, start: Rounding, candidate: Rounding) -> bool:
    """True if the candidate keeps what `better_than_nearest` asked of the start, and is no noisier than that.

    Parameters
    ----------
    noise_of : callable
    limit : Limit
    start, candidate : Rounding
    """
    if not limit.noise.size or candidate is start:
        return True
    found = noise_of(candidate)
    return bool(found.mean() <= _SLACK * noise_of(start).mean()) and _serves(found, limit)


def _serves(noise: Noise, limit: Limit, chance: float = _CHANCE) -> bool:
    """True if nothing is noisier, nor, but for chance, a part of the outputs by more than a quarter of a
    decibel on other samples.

    Of many parts some are uncertain: where all together are clearly quieter, their means count.
    """
    if _noisier(noise, limit):
        return False
    ours, theirs = noise[:, limit.outputs], limit.noise[:, limit.outputs]
    if not ours.size:
        return True
    likely = _at_most(ours, theirs, chance) <= _WORST * theirs.mean(axis=0) + _NOTHING
    together = ours.mean(axis=1, keepdims=True), theirs.mean(axis=1, keepdims=True)
    return bool(likely.all() or (_at_most(*together, chance) <= _CLEAR * theirs.mean()).all())


def _noisier(noise: Noise, limit: Limit) -> bool:
    """True if a part is noisier on average."""
    return not (noise.mean(axis=0) <= _SLACK * limit.noise.mean(axis=0) + _NOTHING).all()


def _at_most(noise: Noise, limit: Noise, chance: float) -> Noise:
    """The mean of each column on other samples is no higher, but for chance: judged by how it differs from
    the limit run by run."""
    mean: Noise = noise.mean(axis=0)
    if len(noise) < 2:
        return mean
    return np.asarray(
        mean + stats.t.isf(chance, len(noise) - 1) * (noise - limit).std(axis=0, ddof=1) / np.sqrt(len(noise))
    )


def _mixed(plan: Plan, rounded: Rounding, nearest: Rounding, count: int, *, targets: bool) -> Rounding:
    """The first layers of one, the others of the other."""
    first = {x.weight for x in plan.layers[:count]} - {x.weight for x in plan.layers[count:]}
    biases = {x.bias for x in plan.layers[:count] if x.bias is not None}
    real: Mapping[str, Array] = nearest.targets
    if targets:
        real = ChainMap({name: rounded.targets[name] for name in first}, nearest.targets)  # type: ignore[arg-type]  # it is only read
    return replace(
        nearest,
        integers=_joined(rounded.integers, nearest.integers, first),
        weights=_joined(rounded.weights, nearest.weights, first),
        biases=_joined(rounded.biases, nearest.biases, biases),
        targets=real,
    )


def _joined(ours: Mapping[str, V], others: Mapping[str, V], names: Collection[str]) -> dict[str, V]:
    return {name: ours[name] if name in names else value for name, value in others.items()}
