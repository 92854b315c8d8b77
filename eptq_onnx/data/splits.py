"""Which samples do what: learn, choose among results, and tell what the result is worth."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from eptq_onnx.config import Config
from eptq_onnx.data.samples import Samples, spread

ENOUGH = 32
"""With fewer samples there is none to spare for a figure that no step has seen."""
_LEAST_JUDGED, _MOST_SHARE, _SHARE_OF_FEW = 16, 0.3, 0.25
_UNSEEN, _LEAST_UNSEEN, _MOST_UNSEEN = 0.1, 8, 64


@dataclass(frozen=True)
class Shares:
    """Indices of samples.

    Parameters
    ----------
    training : ndarray of shape (n_training,)
        Ranges, channels and rounding are chosen on these.
    judged : ndarray of shape (n_judged,)
        Candidates are compared on these; none of them was made with them. With a single sample, that.
    unseen : ndarray of shape (n_unseen,)
        The result is compared with the float model on these.
    held_out : bool
        True if no step has seen ``unseen``; else these are those of ``judged``.
    scored : ndarray of shape (n_scored,)
        Samples of one size, from ``training`` and ``judged``: gradients are taken on these.
    held : ndarray of shape (n_held,)
        Places in ``scored`` of those that are judged on.
    """

    training: NDArray[np.int64]
    judged: NDArray[np.int64]
    unseen: NDArray[np.int64]
    held_out: bool
    scored: NDArray[np.int64]
    held: NDArray[np.int64]


def share_out(samples: Samples, config: Config) -> Shares:
    """Three sets of samples, drawn by the seed; two where there are fewer than 32.

    Parameters
    ----------
    samples : Samples
    config : Config
        ``holdout``, ``score_samples`` and ``seed``.
    """
    batch = samples.fixed_batch or 1
    rng = np.random.default_rng(config.seed)
    alike = samples.alike()
    # Batches of a prescribed size are put together from samples of one size.
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
    # Some of those that gradients are taken on, and as large a share of the others.
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
    """Samples that fill batches."""
    return max(min(-(-count // batch), most // batch), 1) * batch


def _drawn(indices: NDArray[np.int64], count: int, rng: np.random.Generator) -> NDArray[np.int64]:
    return np.sort(rng.permutation(indices)[:count])
