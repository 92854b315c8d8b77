"""Statistics of the difference between quantized and float outputs, chosen to reflect the effect on a task.

The signal-to-noise ratio of an output alone says little: a classification depends on the distance between the
two largest scores, and an output with a large mean (box coordinates, for instance) on its spread about that
mean. Both are measured here.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from enum import Enum
from typing import Any

import numpy as np
from numpy.typing import NDArray

from eptq_onnx.numerics.quant_math import sqnr_db


class Meaning(str, Enum):
    """What an output is, and so how its deviation is described."""

    SCORES = "scores"
    """Of classes: the largest channel is a decision."""
    EMBEDDING = "embedding"
    """Vectors that are compared by the angle between them."""
    BOXES = "boxes"
    """Coordinates."""
    PARTS = "parts"
    """Channels of different meaning in one tensor, such as boxes and scores."""
    VALUES = "values"
    """Any other numbers."""


@dataclass(frozen=True)
class OutputStatistics:
    """How one output of the quantized model differs from the float model's.

    Parameters
    ----------
    samples : int
        Samples compared.
    sqnr_db : float
        Signal-to-noise ratio of all values, in dB.
    centred_sqnr_db : float
        The same, with the variance of each channel about its mean as the signal.
    channel_sqnr_db : float
        Lower quartile, over channels, of each channel's own `centred_sqnr_db`.
    sample_sqnr_db : float
        `sqnr_db` of the worst sample.
    decisions : int
        Positions at which the largest channel of both outputs was compared; 0 for an output that is not a set
        of scores, because it has too few channels or the same channel is always largest.
    disagreement : float
        Share of these positions at which the largest channel differs.
    expected_disagreement : float
        Share at which the largest channel would differ on ordinary samples, given the noise and the mean
        distance between the two largest channels. It helps where few decisions were compared, or where the
        network was trained on the calibration samples.
    divergence : float
        Mean Kullback-Leibler divergence of the quantized scores from the float ones at these positions, in
        nats. Scores that are no probabilities are taken for logits.
    mismatched, not_finite : int
        Samples whose quantized output has another shape, or NaN or Inf where the float output has none; all
        of such an output counts as noise.
    meaning : Meaning
        What the output is. Only scores have decisions.
    cosine, least_cosine : float
        Of the angle between the vectors of an embedding in both models: the mean, and the smallest.
    error : float
        Root mean square difference of all values, in their own unit.
    """

    samples: int
    sqnr_db: float
    centred_sqnr_db: float
    channel_sqnr_db: float
    sample_sqnr_db: float
    decisions: int = 0
    disagreement: float = 0.0
    expected_disagreement: float = 0.0
    divergence: float = 0.0
    mismatched: int = 0
    not_finite: int = 0
    meaning: Meaning = Meaning.SCORES
    cosine: float = 1.0
    least_cosine: float = 1.0
    error: float = 0.0


_MOST_VALUES = 2**18
"""Values kept of each sample for the channel statistics; positions of larger outputs are sampled evenly."""
_CLEARLY = 0.05
"""Share of the variance that the last axis must explain beyond axis 1, where most models have channels."""
_NEGLIGIBLE = 1e-12
"""Share of the power below which a variance is float rounding."""
_SAME_LENGTH = 1e-3
"""Relative difference of lengths up to which all vectors have the length 1."""
_SUM, _LEAST_SHARE = 0.02, 1e-12
"""Distance of a sum of probabilities from 1 that quantization explains, and the smallest probability."""

Rows = NDArray[np.float64]


class Comparison:
    """Collects one output of both models, sample by sample, without keeping all of a large output.

    Parameters
    ----------
    meaning : Meaning
        What the output is. Scores whose rows all have the length 1 are an embedding.
    """

    def __init__(self, meaning: Meaning = Meaning.SCORES) -> None:
        self._meaning, self._values = meaning, 0
        self._power: list[float] = []
        self._noise: list[float] = []
        self._rows: dict[int, list[tuple[Rows, Rows]]] = {}
        self._mismatched = self._not_finite = 0

    def add(self, reference: NDArray[Any], other: NDArray[Any]) -> None:
        """Add one sample.

        Parameters
        ----------
        reference, other : ndarray
            Output of the float and of the quantized model, including the batch axis. If they differ in shape,
            or if the quantized one is not finite, all of the reference counts as noise.
        """
        exact = np.asarray(reference).astype(np.float64)
        finite = np.isfinite(exact)
        self._power.append(float(np.square(exact[finite]).sum()))
        self._values += int(finite.sum())
        got = np.asarray(other).astype(np.float64)
        mismatched = got.shape != exact.shape
        # Values that are infinite in both, as masked logits are, do not differ.
        if mismatched or not (
            np.isfinite(got[finite]).all() and np.array_equal(got[~finite], exact[~finite], equal_nan=True)
        ):
            self._mismatched += mismatched
            self._not_finite += not mismatched
            self._noise.append(self._power[-1])
            return
        self._noise.append(float(np.square(exact[finite] - got[finite]).sum()))
        exact, got = (np.where(finite, v, 0.0) for v in (exact, got))
        for axis in channel_axes(exact.ndim):
            self._rows.setdefault(axis, []).append((_rows(exact, axis), _rows(got, axis)))

    @property
    def ratios(self) -> list[float]:
        """Return the SQNR of each sample in dB, in the order in which they were added."""
        return [sqnr_db(p, n) for p, n in zip(self._power, self._noise, strict=True)]

    def result(self) -> OutputStatistics:
        """Return the statistics of all samples."""
        pooled = sqnr_db(sum(self._power), sum(self._noise))
        worst = min(self.ratios, default=float("inf"))
        pair = self._by_channel()
        centred, quartile = _spread_ratios(*pair, pooled) if pair is not None else (pooled, pooled)
        vectors, meaning = self._vectors(), self._meaning
        if meaning is Meaning.SCORES and vectors is not None and _have_length_1(vectors[0]):
            meaning = Meaning.EMBEDDING
        decided = pair is not None and meaning is Meaning.SCORES
        decisions, differing, expected = _decisions(*pair) if pair is not None and decided else (0, 0.0, 0.0)
        cosines = np.ones(1)
        if vectors is not None and meaning is Meaning.EMBEDDING:
            cosines = _cosines(*vectors)
        return OutputStatistics(
            samples=len(self._power),
            sqnr_db=pooled,
            centred_sqnr_db=centred,
            channel_sqnr_db=quartile,
            sample_sqnr_db=worst,
            decisions=decisions,
            disagreement=differing,
            expected_disagreement=expected,
            divergence=_divergence(*pair) if pair is not None and decisions else 0.0,
            mismatched=self._mismatched,
            not_finite=self._not_finite,
            meaning=meaning,
            cosine=float(cosines.mean()),
            least_cosine=float(cosines.min()),
            error=float(np.sqrt(sum(self._noise) / max(self._values, 1))),
        )

    def _vectors(self) -> tuple[Rows, Rows] | None:
        """Return values as (vectors, coordinates): the last axis of outputs with two or three."""
        pairs = self._rows.get(max(self._rows, default=0), [])
        if not pairs or len({exact.shape[1] for exact, _ in pairs}) > 1 or pairs[0][0].shape[1] < 2:
            return None
        exact, got = (np.concatenate(part) for part in zip(*pairs, strict=True))
        return (exact, got) if exact.size else None

    def _by_channel(self) -> tuple[Rows, Rows] | None:
        """Return values as (positions, channels), along the axis whose indices differ most.

        The last axis must do so clearly.
        """
        found = []
        for pairs in self._rows.values():
            if len({exact.shape[1] for exact, _ in pairs}) == 1:
                exact, got = (np.concatenate(part) for part in zip(*pairs, strict=True))
                if exact.size:
                    found.append((exact, got))
        if len(found) == 2 and _explained(found[1][0]) > _explained(found[0][0]) + _CLEARLY:
            return found[1]
        return found[0] if found else None


def _have_length_1(rows: Rows) -> bool:
    """Return True if all rows are vectors of the length 1, of which none has all of it in one coordinate."""
    lengths = np.linalg.norm(rows, axis=1)
    return bool((np.abs(lengths - 1) < _SAME_LENGTH).all() and np.abs(rows).max() < 1 - _SAME_LENGTH)


def _cosines(exact: Rows, got: Rows) -> Rows:
    """Return the cosine of the angle between the vectors of each row; 1 where both are zero."""
    product = np.einsum("rc,rc->r", exact, got)
    lengths = np.linalg.norm(exact, axis=1) * np.linalg.norm(got, axis=1)
    alike = (exact == got).all(axis=1)
    found = np.divide(product, lengths, out=np.zeros_like(product), where=lengths > 0)
    return np.where(alike, 1.0, np.clip(found, -1, 1))


def compare(references: Iterable[NDArray[Any]], others: Iterable[NDArray[Any]]) -> OutputStatistics:
    """Return the statistics of one output over samples.

    Parameters
    ----------
    references, others : iterable of ndarray
        One array per sample, of the float and of the quantized model, in the same order.
    """
    comparison = Comparison()
    for reference, other in zip(references, others, strict=True):
        comparison.add(reference, other)
    return comparison.result()


def channel_axes(rank: int) -> Sequence[int]:
    """Return the axes that may be the channels of an output; the first of several axes is the batch."""
    if rank < 2:
        return range(rank)
    return (1,) if rank == 2 else (1, rank - 1)


def _rows(value: Rows, axis: int) -> Rows:
    """Return the value as (positions, channels), with evenly sampled positions if there are many."""
    channels = value.shape[axis]
    rows = np.moveaxis(value, axis, -1).reshape(-1, channels) if channels else np.zeros((0, 0))
    most = max(1, _MOST_VALUES // max(channels, 1))
    return rows if len(rows) <= most else rows[np.linspace(0, len(rows) - 1, most).round().astype(np.int64)]


def _explained(rows: Rows) -> float:
    """Return the share of the variance between channel means, corrected for chance (adjusted R squared)."""
    total, within = (
        float(np.square(rows - rows.mean()).sum()),
        float(np.square(rows - rows.mean(axis=0)).sum()),
    )
    free = rows.size - rows.shape[1]
    if free <= 0 or total <= 0:
        return -np.inf
    return float(1 - within / total * (rows.size - 1) / free)


def _spread_ratios(exact: Rows, got: Rows, pooled: float) -> tuple[float, float]:
    """Return the ratio of the channels' variance to the noise in dB: of all together, and the lower quartile.

    If no channel varies, both are the pooled ratio.
    """
    spread = np.square(exact - exact.mean(axis=0)).sum(axis=0)
    noise = np.square(exact - got).sum(axis=0)
    alive = spread > _NEGLIGIBLE * np.square(exact).sum()
    if not alive.any():
        return pooled, pooled
    each = [sqnr_db(s, n) for s, n in zip(spread[alive], noise[alive], strict=True)]
    return sqnr_db(float(spread.sum()), float(noise.sum())), float(np.quantile(each, 0.25, method="lower"))


def _divergence(exact: Rows, got: Rows) -> float:
    """Return the mean Kullback-Leibler divergence of rows of scores in nats."""
    first, second = _log_shares(exact), _log_shares(got)
    # Where a share of the reference is 0, it contributes nothing, whatever the other is.
    terms = np.multiply(np.exp(first), first - second, out=np.zeros_like(first), where=np.exp(first) > 0)
    return max(0.0, float(terms.sum(axis=1).mean()))


def _log_shares(rows: Rows) -> Rows:
    """Return logarithms of probabilities: of the rows themselves if they are some, else of their softmax."""
    if (rows >= 0).all() and np.allclose(rows.sum(axis=1), 1, atol=_SUM):
        return np.log(np.maximum(rows, _LEAST_SHARE))
    shifted = rows - rows.max(axis=1, keepdims=True)
    return np.asarray(shifted - np.log(np.exp(shifted).sum(axis=1, keepdims=True)))


def _decisions(exact: Rows, got: Rows) -> tuple[int, float, float]:
    """Return the number of decisions, and the shares that differ and are expected to differ.

    See `OutputStatistics`.
    """
    count, channels = exact.shape
    winners = exact.argmax(axis=1) if channels else np.zeros(0, np.int64)
    if channels < 2 or len(np.unique(winners)) < 2:
        return 0, 0.0, 0.0
    disagreement = float((winners != got.argmax(axis=1)).mean())
    first, second = np.argpartition(exact, channels - 2, axis=1)[:, -2:].T
    place = np.arange(count)
    margin = np.abs(exact[place, first] - exact[place, second])
    kept = np.where(exact[place, first] >= exact[place, second], 1, -1) * (
        got[place, first] - got[place, second]
    )
    if not margin.any():
        return count, disagreement, disagreement
    gain = float(margin @ kept / (margin @ margin))
    if gain <= 0:
        return count, disagreement, max(disagreement, 1 - 1 / channels)
    # A common factor of all scores changes no decision. Distances near zero, which few samples show, are
    # taken to be as frequent as in an exponential distribution of the same mean.
    fall = np.maximum(margin - kept / gain, 0)
    return count, disagreement, float((1 - np.exp(-fall / margin.mean())).mean())
