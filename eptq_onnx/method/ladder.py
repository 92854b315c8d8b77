"""The search for the fewest parts that have to be spared so that a score is kept.

Candidates are rungs of a ladder: each spares what the one below spares, and some more, what helps most for
its price first. A score falls with the noise of the outputs, roughly in proportion, but a score on few
samples is noisy itself: a rung may pass or fail by chance. So a rung counts as passed only if its own score
passes, and if it still does after scores are smoothed so that higher rungs are never worse than lower ones
(isotonic regression); and the search asks for somewhat less noise than the proportion tells.
"""

from __future__ import annotations

import bisect
import math
from collections.abc import Callable, Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

_CAREFUL = 0.8
"""Share of the noise that would just do, which a rung is chosen for."""
_CLOSE = 1.2
"""Ratio of the noise of two rungs that are as good as neighbours."""


def passed(drops: Mapping[int, float], most: float) -> dict[int, bool]:
    """Return which rungs pass, by their own score and by the smoothed one.

    Parameters
    ----------
    drops : mapping of int to float
        Rung to how much worse its score is.
    most : float
        Limit.
    """
    rungs = sorted(drops)
    smooth = _falling([drops[k] for k in rungs])
    return {k: drops[k] <= most and s <= most for k, s in zip(rungs, smooth, strict=True)}


def lowest(
    noises: Sequence[float], start: float, most: float, drop_of: Callable[[int], float], tries: int
) -> tuple[int | None, dict[int, float]]:
    """Return the lowest rung that passes among those tried, and the drops of all that were.

    Parameters
    ----------
    noises : sequence of float
        Foreseen noise of each rung, falling; the first is the file as asked for.
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
        None if no rung passes.
    dict of int to float
        Drop of each rung that was tried, the first included.
    """
    drops, top = {0: start}, len(noises) - 1
    while tries > 0 and top > 0:
        fits = passed(drops, most)
        high = min((k for k, ok in fits.items() if ok), default=None)
        low = max(k for k, ok in fits.items() if not ok and (high is None or k < high))
        if high is not None and (high - low <= 1 or noises[low] <= _CLOSE * noises[high]):
            break
        rung = len(noises) - 1 if high is None and tries == 1 else _next(noises, drops, (low, high), most)
        if rung in drops:
            break
        drops[rung] = drop_of(rung)
        tries -= 1
    return min((k for k, ok in passed(drops, most).items() if ok), default=None), drops


def _next(
    noises: Sequence[float], drops: Mapping[int, float], ends: tuple[int, int | None], most: float
) -> int:
    """Return the rung to try between the highest that failed and the lowest that passed, if any did."""
    low, high = ends
    # In proportion to the noise, as far as the failure tells; at least a good step.
    wanted = noises[low] * min(_CAREFUL * most / max(drops[low], 1e-30), 0.7)
    if high is not None:
        # A failure by chance, or one that smoothing made of a pass, tells little: halve what is left.
        wanted = max(wanted, math.sqrt(max(noises[low] * noises[high], 0.0)))
    rung = bisect.bisect_left([-n for n in noises], -wanted)
    least, greatest = low + 1, len(noises) - 1 if high is None else high - 1
    return min(max(rung, least), greatest)


def _falling(values: Sequence[float]) -> NDArray[np.float64]:
    """Return the closest values in the mean square that do not rise (pool adjacent violators)."""
    blocks: list[list[float]] = []
    for value in values:
        blocks.append([value, 1.0])
        while len(blocks) > 1 and blocks[-2][0] < blocks[-1][0]:
            (a, n), (b, m) = blocks[-2:]
            blocks[-2:] = [[(a * n + b * m) / (n + m), n + m]]
    return np.concatenate([np.full(int(n), mean) for mean, n in blocks]) if blocks else np.zeros(0)
