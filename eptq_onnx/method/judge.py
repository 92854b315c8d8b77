"""Keep nearest rounding wherever nothing beats it, so that no result is worse than nearest rounding.

The comparison is with nearest rounding in the same ranges. Layer-wise reconstruction and the network-wise
loop are judged by running the resulting network on samples that they have not seen, with the choices of the
float network. If reconstructing all layers brings the outputs no closer to the float network's than nearest
rounding does, or may have done so by chance alone, nearest rounding is kept from the layer on that gives the
best result.
"""

from __future__ import annotations

from collections import ChainMap
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, replace
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray
from scipy import special

from eptq_onnx.numerics.types import Array
from eptq_onnx.records import Plan, Rounding

V = TypeVar("V")

SAMPLES = 32
"""Samples to judge on, at most."""
_SHARES = (0.75, 0.5, 0.25, 0.125)
"""Shares of the layers to keep reconstructed, if reconstructing all does harm.

Errors add up on the way to the outputs, so the first layers are kept.
"""
_SLACK = 1.02
"""Noise ratio that makes no difference: where activations cause nearly all the noise, the rest is chance."""
_WORST = 1.06
"""Largest noise ratio that a part of the outputs may have: a quarter of a decibel."""
_CLEAR = 0.7
"""Noise ratio of all outputs together below which parts need not be certain: 1.5 dB less."""
_CHANCE, _CHANCE_OF_MIXTURES = 0.01, 0.001
"""Probability of exceeding the limit on other samples.

It is stricter for mixtures, the best of which also profits from chance.
"""
_NOTHING = 1e-12
"""Noise of float rounding."""
_GAIN = 0.9
"""Noise ratio below which a mixture is worth keeping."""

Noise = NDArray[np.float64]
"""Noise of every run and part of the outputs; see `eptq_onnx.execute.deviation.Deviation.of_runs`."""


@dataclass(frozen=True)
class Limit:
    """Noise of nearest rounding.

    Parameters
    ----------
    noise : ndarray of shape (n_runs, n_parts)
    outputs : ndarray of shape (n_parts,)
        True for parts of the outputs; for other parts, from which choices are computed, only the mean counts.
    joined : ndarray of shape (n_parts,)
        True for parts of an output that has others.
    """

    noise: Noise
    outputs: NDArray[np.bool_]
    joined: NDArray[np.bool_]


NoiseOf = Callable[[Rounding], Noise]
"""Returns the noise of the network with a given rounding, on samples that the rounding has not seen.

The result is empty if no output can be compared.
"""


def better_than_nearest(
    noise_of: NoiseOf, limit: Limit, plan: Plan, nearest: Rounding, rounded: Rounding, *, targets: bool
) -> tuple[Rounding, str | None]:
    """Return the layer-wise rounding, or nearest rounding where that is better.

    Parameters
    ----------
    noise_of : callable
        See `NoiseOf`.
    limit : Limit
    plan : Plan
    nearest, rounded : Rounding
    targets : bool
        True if later steps need the real values that the weights were rounded from.

    Returns
    -------
    Rounding
    str or None
        A note, if nearest rounding is kept anywhere.
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
    elif _noisier(found, limit).any():
        worse = "some output is noisier"
    else:
        worse = "some output may well be noisier"
    return (
        best,
        f"nearest rounding stays ({where}): with all layers rounded one after the other {worse} "
        "on unseen samples",
    )


def still_better(noise_of: NoiseOf, limit: Limit, start: Rounding, candidate: Rounding) -> bool:
    """Return True if the candidate still beats nearest rounding and is no noisier than the start.

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
    """Return True if no part is noisier, and none is likely to be more than a quarter of a decibel noisier.

    With many parts some are always uncertain. If all parts together are clearly quieter, their means suffice.
    One of several parts of an output may even be noisier then, unless it is certainly so, or as loud as the
    parts of nearest rounding are on average.
    """
    ours, theirs = noise[:, limit.outputs], limit.noise[:, limit.outputs]
    if not ours.size:
        return not _noisier(noise, limit).any()
    together = ours.mean(axis=1, keepdims=True), theirs.mean(axis=1, keepdims=True)
    if (_at_most(*together, chance) <= _CLEAR * theirs.mean()).all():
        loud = noise.mean(axis=0) > np.minimum(_at_most(limit.noise, noise, chance), theirs.mean())
        excused = limit.outputs & limit.joined & ~loud
        return not (_noisier(noise, limit) & ~excused).any()
    likely = _at_most(ours, theirs, chance) <= _WORST * theirs.mean(axis=0) + _NOTHING
    return bool(likely.all()) and not _noisier(noise, limit).any()


def _noisier(noise: Noise, limit: Limit) -> NDArray[np.bool_]:
    """Return True for each part that is noisier on average."""
    return ~np.asarray(noise.mean(axis=0) <= _SLACK * limit.noise.mean(axis=0) + _NOTHING)


def _at_most(noise: Noise, limit: Noise, chance: float) -> Noise:
    """Return an upper confidence bound of each column's mean on other samples.

    It is computed from the differences between the noise and the limit, run by run.
    """
    mean: Noise = noise.mean(axis=0)
    if len(noise) < 2:
        return mean
    spread = (noise - limit).std(axis=0, ddof=1) / np.sqrt(len(noise))
    # SciPy's `special` has the quantile of Student's t, and is loaded faster than its `stats`.
    return np.asarray(mean - special.stdtrit(len(noise) - 1, chance) * spread)


def _mixed(plan: Plan, rounded: Rounding, nearest: Rounding, count: int, *, targets: bool) -> Rounding:
    """Return the first ``count`` layers of ``rounded`` and the others of ``nearest``."""
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
