"""Choose the candidate to keep: the start, or one that beats it on held-out samples."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from eptq_onnx.engines.base import TrainingGraph
from eptq_onnx.numerics.types import Array
from eptq_onnx.records import Rounding

_MOST_FACTOR = 1e30
"""Largest factor of errors in the loss."""

_LEAST_SAMPLES = 5
"""Fewest pairs with which the signed-rank test can fall below a probability of one in twenty."""

_DEARER = 1.02
"""Most that a variant may raise the error of the outputs: slopes are not worth a tenth of a decibel.

Of 16 variants, the 6 that raised it by more than 3 % lost 0.2 to 0.5 dB on other samples, the others at most
0.1 dB.
"""


class Kept:
    """The best candidate so far, initially the start.

    Parameters
    ----------
    start : Rounding
    errors : ndarray of shape (2, n_samples)
        Errors of the start; see `Balance`.
    """

    def __init__(self, start: Rounding, errors: Array) -> None:
        self.rounding, self.step = start, 0
        self._first, self._kept = start, errors
        self._unclear = False
        self.checkpoints = {0: float(errors[0].sum())}
        self._outputs = [float(errors[1].mean())]
        self._start = errors

    def offer(self, step: int, candidate: Rounding, errors: Array) -> int:
        """Keep the candidate if it may replace the start and has the lowest loss so far.

        Returns the number of checks since the lowest loss.
        """
        self.checkpoints[step] = float(errors[0].sum())
        self._outputs.append(float(errors[1].mean()))
        if self.checkpoints[step] < self.checkpoints[self.step] and is_accepted(errors, self._start):
            self.rounding, self.step, self._kept = candidate, step, errors
        losses = list(self.checkpoints.values())
        return len(losses) - 1 - losses.index(min(losses))

    @property
    def is_settled(self) -> bool:
        """Return True if the start will be kept.

        That is so if one of the errors that a candidate must lower was lower in no check, and is not falling.
        """
        (loss, *losses), (output, *outputs) = self.checkpoints.values(), self._outputs
        if self.step or len(losses) < 2:
            return False
        # True if the last check brought no new minimum.
        rises = [values[-1] >= min(values[:-1]) for values in (losses, outputs)]
        return (min(losses) >= loss and rises[0]) or (min(outputs) > output and rises[1])

    def reason(self, ran: str) -> str:
        """Return why this rounding was kept, as a sentence; ``ran`` says how far the run came."""
        (loss, *losses), (output, *outputs) = self.checkpoints.values(), self._outputs
        if self.step:
            change = _change(self.checkpoints[self.step], loss)
            return f"step {self.step} was kept: it lowered the error on held-out samples ({change}; {ran})"
        if not losses:
            return "the start was kept: there was no check"
        if self._unclear:
            return (
                f"the start was kept: the outputs gained no more than by chance on held-out samples ({ran})"
            )
        if min(losses) >= loss:
            best = _change(min(losses), loss)
            return f"the start was kept: no step lowered the error on held-out samples (best {best} in {ran})"
        if min(outputs) > output:
            best = _change(min(outputs), output)
            return (
                "the start was kept: no step lowered the error of the outputs on held-out samples "
                f"(best {best} in {ran})"
            )
        best = _change(min(losses), loss)
        return (
            "the start was kept: no step lowered the error on held-out samples by more than chance "
            f"without raising that of the outputs (best {best} in {ran})"
        )

    def saved(self) -> dict[str, Any]:
        """Return the state, without the real values of the weights, which are those of the start."""
        best = replace(self.rounding, targets={}) if self.step else None
        found = {"checkpoints": self.checkpoints, "outputs": self._outputs, "errors": self._kept}
        return {"best": best, "step": self.step, **found}

    def restore(self, saved: Mapping[str, Any]) -> None:
        """Restore what `saved` returned."""
        if saved["step"]:
            self.rounding = replace(saved["best"], targets=self.rounding.targets)
        self.step, self.checkpoints, self._outputs = saved["step"], saved["checkpoints"], saved["outputs"]
        self._kept = saved["errors"]

    def settle(self, variant: Rounding, errors: Array) -> None:
        """Decide between the kept rounding, a variant of it, and the start.

        The variant must beat the start, too, and leave the outputs about as near as the kept rounding does.
        The best of many candidates also profits from chance, and its layers may have gained without the
        outputs: in the end, the outputs must have gained by more than chance as well.
        """
        if is_accepted(errors, self._start) and errors[1].mean() <= _DEARER * self._kept[1].mean():
            self.rounding, self._kept = variant, errors
        if self._start[1].any() and not is_better(self._kept[1], self._start[1]):
            self.rounding, self.step, self._unclear = self._first, 0, True


def _change(value: float, former: float) -> str:
    return f"{value / former - 1:+.1%}".replace("%", " %") if former else f"from 0 to {value:.3g}"


def is_accepted(errors: Array, others: Array) -> bool:
    """Return True if a candidate may replace the start: a lower loss, and no larger output error.

    Parameters
    ----------
    errors, others : ndarray of shape (2, n_samples)
        Errors of the candidate and of the start; see `Balance`.
    """
    return bool(errors[1].mean() <= others[1].mean()) and is_better(errors[0], others[0])


def is_better(errors: Array, others: Array) -> bool:
    """Return True if the errors of the same samples are lower on average, and not by chance.

    Wilcoxon's signed-rank test must give chance a probability below one in twenty, so a few samples with
    large errors do not decide. With too few samples for the test, the average decides.
    """
    gain = np.asarray(others - errors, np.float64)
    if gain.mean() <= 0:
        return False
    # Loading it takes a second, which runs without optimization need not wait.
    from scipy import stats  # noqa: PLC0415

    return len(gain) < _LEAST_SAMPLES or float(stats.wilcoxon(gain, alternative="greater").pvalue) < 0.05


@dataclass(frozen=True)
class Balance:
    """How the errors of layers and outputs make up the loss.

    Parameters
    ----------
    units : ndarray of shape (2,)
        Factors that normalize the start's errors, of layers and of outputs, to 1 each.
    shares : ndarray of shape (2,)
        Shares of the loss of the start.
    """

    units: NDArray[np.float64]
    shares: NDArray[np.float64]

    @staticmethod
    def of(errors: Array, output_share: float) -> Balance:
        """Return the balance for the start's errors, as given by `HeldOut`; an error of 0 gets no share."""
        sums = errors[:2].sum(axis=1, dtype=np.float64)
        some = sums > 0
        shares = some * np.array([1 - output_share, output_share])
        if not shares.any():
            shares = some * 1.0
        return Balance(np.divide(1.0, sums, out=np.zeros(2), where=some), shares / max(shares.sum(), 1e-30))

    @property
    def _factors(self) -> NDArray[np.float64]:
        return self.shares * self.units

    @property
    def fits(self) -> bool:
        """Return True if float32 holds the factors."""
        return bool((self._factors < _MOST_FACTOR).all())

    def __call__(self, errors: Array) -> Array:
        """Return each sample's loss and unaugmented output error, from `HeldOut`; shape (2, n_samples)."""
        return np.stack([self._factors @ errors[:2], errors[2]])

    def columns(self, graph: TrainingGraph) -> Array:
        """Return the factor of each column of the graph's errors."""
        return np.repeat(self._factors, [sum(graph.channels), len(graph.outputs)]).astype(np.float32)
