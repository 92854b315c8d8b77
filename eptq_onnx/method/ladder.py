"""The search for the fewest parts that have to be spared so that a score is kept.

Candidates are rungs of a ladder: each spares what the one below spares, and some more, what helps most for
its price first. A score on few samples is noisy: a rung may pass or fail by chance, and the lowest of several
that pass is likely to have passed by chance. So all scores seen so far count: a power of the foreseen noise
is fitted to them, and a rung is good only if its own score passes and the fitted one does. (Decisions flip in
proportion to the amplitude of the noise, other scores fall with its power: the exponent is fitted, too.)
"""

from __future__ import annotations

import bisect
from collections.abc import Callable, Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

_POWERS = np.linspace(0.5, 2, 31)
"""Exponents that are tried; of those that fit alike, the smallest is the most careful."""
_FURTHER = 0.8
"""Share of the noise of a rung that failed against expectation, from which on others are tried."""


def fitted(noises: Sequence[float], drops: Mapping[int, float]) -> NDArray[np.float64]:
    """Return the drop of each rung that a power of its noise foretells, fitted to the drops that were seen.

    Parameters
    ----------
    noises : sequence of float
        Foreseen noise of each rung, relative to the first.
    drops : mapping of int to float
        Rung to how much worse its score is.
    """
    known = sorted(drops)
    seen = np.array([drops[k] for k in known])
    if not np.isfinite(seen).all():
        # Outputs that are lost follow no law: what is left counts.
        known = [k for k in known if np.isfinite(drops[k])]
        seen = np.array([drops[k] for k in known])
    if not known:
        return np.full(len(noises), np.inf)
    curves = np.asarray(noises)[None] ** _POWERS[:, None]
    at = curves[:, known]
    factors = np.maximum((at @ seen) / np.maximum(np.square(at).sum(axis=1), 1e-30), 0)
    errors = np.square(factors[:, None] * at - seen).sum(axis=1)
    best = int(np.flatnonzero(errors <= errors.min() + 1e-12)[0])
    return np.asarray(factors[best] * curves[best])


def lowest(
    noises: Sequence[float], start: float, most: float, drop_of: Callable[[int], float], tries: int
) -> tuple[int | None, dict[int, float]]:
    """Return the lowest good rung among those tried, and the drops of all that were.

    Parameters
    ----------
    noises : sequence of float
        Foreseen noise of each rung, falling from 1; the first rung is the file as asked for.
    start : float
        Its drop, which is beyond the limit.
    most : float
        Limit of the drop.
    drop_of : callable
        Makes the file of a rung, and returns its drop.
    tries : int
        Most files.

    Returns
    -------
    int or None
        The highest rung that passes by its own score if none is good by all of them; None if none passes.
    dict of int to float
        Drop of each rung that was tried, the first included.
    """
    drops, top = {0: start}, len(noises) - 1
    while tries > 0 and top > 0:
        expected = fitted(noises, drops)
        rung = next((k for k in range(1, top + 1) if expected[k] <= most), top)
        while rung in drops and drops[rung] > most and rung < top:
            # It failed against expectation: the next one has clearly less noise.
            further = bisect.bisect_left([-n for n in noises], -_FURTHER * noises[rung])
            rung = min(max(further, rung + 1), top)
        if rung in drops:
            break
        if tries == 1 and min(drops.values()) > most:
            rung = top
        drops[rung] = drop_of(rung)
        tries -= 1
    expected = fitted(noises, drops)
    passing = [k for k, drop in drops.items() if drop <= most]
    good = [k for k in passing if expected[k] <= most]
    return (min(good) if good else max(passing, default=None)), drops
