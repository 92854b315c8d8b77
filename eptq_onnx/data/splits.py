"""Decide which samples train, which judge candidates, and which measure the result."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from eptq_onnx.config import Config
from eptq_onnx.data.samples import Samples, spread

ENOUGH = 32
"""Number of samples below which none are reserved for a measurement on unseen samples."""
_LEAST_JUDGED, _MOST_SHARE, _SHARE_OF_FEW = 16, 0.3, 0.25
"""Fewest samples to judge on, and the largest share used to reach them; share of few samples."""
_UNSEEN, _LEAST_UNSEEN, _MOST_UNSEEN = 0.1, 8, 64
"""Share of the samples reserved as unseen, and its limits."""


@dataclass(frozen=True)
class Shares:
    """Indices of the samples for each purpose.

    Parameters
    ----------
    training : ndarray of shape (n_training,)
        Ranges, channels and rounding are chosen on these.
    judged : ndarray of shape (n_judged,)
        Candidates are compared on these, and none was made with them. If there is only one sample, it serves
        both.
    unseen : ndarray of shape (n_unseen,)
        The result is compared with the float model on these.
    held_out : bool
        True if no step has seen ``unseen``; otherwise ``unseen`` equals ``judged``.
    scored : ndarray of shape (n_scored,)
        Samples of one shape, from ``training`` and ``judged``, on which gradients are taken.
    held : ndarray of shape (n_held,)
        Positions in ``scored`` of the samples that candidates are judged on.
    """

    training: NDArray[np.int64]
    judged: NDArray[np.int64]
    unseen: NDArray[np.int64]
    held_out: bool
    scored: NDArray[np.int64]
    held: NDArray[np.int64]


def share_out(samples: Samples, config: Config) -> Shares:
    """Return three sets of samples, drawn by the seed; two if there are fewer than 32 samples.

    Parameters
    ----------
    samples : Samples
    config : Config
        ``holdout``, ``score_samples`` and ``seed``.
    """
    batch = samples.fixed_batch or 1
    rng = np.random.default_rng(config.seed)
    alike = samples.alike()
    # Batches of a prescribed size consist of samples of one shape.
    rest = alike if batch > 1 else np.arange(samples.count)
    unseen = np.zeros(0, np.int64)
    held_out = len(rest) >= max(ENOUGH, 3 * batch)
    if held_out:
        count = int(np.clip(round(_UNSEEN * len(rest)), _LEAST_UNSEEN, _MOST_UNSEEN))
        unseen = _drawn(rest, _whole(count, batch, len(rest) - 2 * batch), rng)
        rest = np.setdiff1d(rest, unseen)
    share = (
        max(config.holdout, min(_LEAST_JUDGED / len(rest), _MOST_SHARE))
        if held_out
        else max(config.holdout, _SHARE_OF_FEW)
    )
    gradual = np.intersect1d(alike, rest)
    scored = gradual[spread(len(gradual), max(1, config.score_samples // samples.rows))]
    # Judge on some of the scored samples, and on as large a share of the others.
    held = _drawn(scored, _judges(len(scored), share, batch), rng)
    others = np.setdiff1d(rest, scored)
    judged = (
        np.union1d(held, _drawn(others, int(share * len(others)) // batch * batch, rng))
        if len(held) < _LEAST_JUDGED
        else held
    )
    training = np.setdiff1d(rest, judged)
    if not len(training):
        training = judged
    places = np.flatnonzero(np.isin(scored, held))
    return Shares(training, judged, unseen if held_out else judged, held_out, scored, places)


def _judges(count: int, share: float, batch: int) -> int:
    return _whole(max(1, round(count * share)), batch, max(count - batch, batch))


def _whole(count: int, batch: int, most: int) -> int:
    """Return a number of samples that fills whole batches."""
    return max(min(-(-count // batch), most // batch), 1) * batch


def _drawn(indices: NDArray[np.int64], count: int, rng: np.random.Generator) -> NDArray[np.int64]:
    return np.sort(rng.permutation(indices)[:count])
