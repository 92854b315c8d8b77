"""Which candidate of the optimization is kept: the start, or what beats it on held-out samples."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy import stats

from eptq_onnx.engines.base import TrainingGraph
from eptq_onnx.numerics.types import Array
from eptq_onnx.records import Rounding

_MOST_FACTOR = 1e30
"""Of errors in the loss."""

_LEAST_SAMPLES = 5
"""With fewer pairs the signed-rank test never gets below one in twenty."""


class Kept:
    """The best candidate so far; at first that is the start.

    Parameters
    ----------
    start : Rounding
    errors : ndarray of shape (2, n_samples)
        Of the start; see `Balance`.
    """

    def __init__(self, start: Rounding, errors: Array) -> None:
        self.rounding, self.step = start, 0
        self.checkpoints = {0: float(errors[0].sum())}
        self._outputs = [float(errors[1].mean())]
        self._start = errors

    def offer(self, step: int, candidate: Rounding, errors: Array) -> int:
        """Take the candidate if it may replace the start and is the best of these; returns how many checks
        ago the lowest loss was."""
        self.checkpoints[step] = float(errors[0].sum())
        self._outputs.append(float(errors[1].mean()))
        if self.checkpoints[step] < self.checkpoints[self.step] and is_accepted(errors, self._start):
            self.rounding, self.step = candidate, step
        losses = list(self.checkpoints.values())
        return len(losses) - 1 - losses.index(min(losses))

    @property
    def is_settled(self) -> bool:
        """True if the start will be kept: one of the errors that a candidate must lower was lower in no
        check, and does not fall."""
        (loss, *losses), (output, *outputs) = self.checkpoints.values(), self._outputs
        if self.step or len(losses) < 2:
            return False
        # Rising from the first check to the last, or level.
        rises = [values[-1] >= min(values[:-1]) for values in (losses, outputs)]
        return (min(losses) >= loss and rises[0]) or (min(outputs) > output and rises[1])

    def reason(self, steps: int, total: int) -> str:
        """Why this rounding was kept, after so many steps, as a sentence."""
        (loss, *losses), (output, *outputs) = self.checkpoints.values(), self._outputs
        ran = f"{steps} of {total} steps" + ("; stopped early" if steps < total else "")
        if self.step:
            return f"step {self.step} was kept: it lowered the error on held-out samples ({_change(self.checkpoints[self.step], loss)}; {ran})"
        if not losses:
            return "the start was kept: there was no check"
        if min(losses) >= loss:
            return f"the start was kept: no step lowered the error on held-out samples (best {_change(min(losses), loss)} in {ran})"
        if min(outputs) > output:
            best = _change(min(outputs), output)
            return f"the start was kept: no step lowered the error of the outputs on held-out samples (best {best} in {ran})"
        best = _change(min(losses), loss)
        return (
            "the start was kept: no step lowered the error on held-out samples by more than chance without raising that of the outputs "
            f"(best {best} in {ran})"
        )

    def saved(self) -> dict[str, Any]:
        """What is kept so far, but for the real values of the weights, which are those of the start."""
        best = replace(self.rounding, targets={}) if self.step else None
        return {"best": best, "step": self.step, "checkpoints": self.checkpoints, "outputs": self._outputs}

    def restore(self, saved: Mapping[str, Any]) -> None:
        """Go on from what `saved` gave."""
        if saved["step"]:
            self.rounding = replace(saved["best"], targets=self.rounding.targets)
        self.step, self.checkpoints, self._outputs = saved["step"], saved["checkpoints"], saved["outputs"]

    def amend(self, rounding: Rounding, errors: Array) -> None:
        """Take another form of what is kept, if that, too, may replace the start."""
        if is_accepted(errors, self._start):
            self.rounding = rounding


def _change(value: float, former: float) -> str:
    return f"{value / former - 1:+.1%}".replace("%", " %") if former else f"from 0 to {value:.3g}"


def is_accepted(errors: Array, others: Array) -> bool:
    """True if a candidate may replace the start: better in all, and no worse at the outputs.

    Parameters
    ----------
    errors, others : ndarray of shape (2, n_samples)
        Of the candidate and of the start; see `Balance`.
    """
    return bool(errors[1].mean() <= others[1].mean()) and is_better(errors[0], others[0])


def is_better(errors: Array, others: Array) -> bool:
    """True if the errors of the same samples are lower on average, and not by chance.

    Chance is what Wilcoxon's signed-rank test gives less than one in twenty: a few loud samples do not
    decide. Too few samples cannot tell, and their average does.
    """
    gain = np.asarray(others - errors, np.float64)
    if gain.mean() <= 0:
        return False
    return len(gain) < _LEAST_SAMPLES or float(stats.wilcoxon(gain, alternative="greater").pvalue) < 0.05


@dataclass(frozen=True)
class Balance:
    """How the errors of layers and of outputs make up the loss.

    Parameters
    ----------
    units : ndarray of shape (2,)
        With these factors the start's errors, of the layers and of the outputs, make 1 each.
    shares : ndarray of shape (2,)
        Of the loss of the start.
    """

    units: NDArray[np.float64]
    shares: NDArray[np.float64]

    @staticmethod
    def of(errors: Array, output_share: float) -> Balance:
        """The balance for the errors of the start, as `HeldOut` gives them; what has none has no share."""
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
        """True if float32 holds the factors."""
        return bool((self._factors < _MOST_FACTOR).all())

    def __call__(self, errors: Array) -> Array:
        """Of what `HeldOut` gives, each sample's loss, and its outputs' errors as they are; shape (2,
        n_samples)."""
        return np.stack([self._factors @ errors[:2], errors[2]])

    def columns(self, graph: TrainingGraph) -> Array:
        """Factor of each column of the errors that the graph gives."""
        return np.repeat(self._factors, [sum(graph.channels), len(graph.outputs)]).astype(np.float32)
