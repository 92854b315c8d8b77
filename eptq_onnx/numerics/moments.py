"""Second moments of a layer's inputs in both networks, for correcting and rounding its weights."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from eptq_onnx.numerics import quant_math
from eptq_onnx.numerics.linear import LinearForm
from eptq_onnx.numerics.types import Array, Float64
from eptq_onnx.parallel import ordered_map

_VALUES_AT_ONCE = 2**20
"""Values of rows gathered before they are added: large products are fast while they fit in the cache."""

_SEEN_SHARE = 0.95
"""Share of a row's weight that the slope of the output nonlinearity determines; the rest is constant."""

_STEP, _LEAST_STEP = 0.25, 1e-3
"""Step of the slopes' finite differences, in units of each output's standard deviation, and its lower limit.

The step is about the error of 4-bit weights; the limit is relative to the largest step.
"""

Covariances = tuple[Float64, Float64, Float64]
"""A = E[x_q x_qᵀ], C = E[x_q yᵀ] and V = E[y²].

Their shapes are (n_groups, n_terms, n_terms), (n_groups, n_terms, n_outputs) and (n_groups, n_outputs).
"""

_Rows: TypeAlias = tuple[Array, Array, Array | None]
"""Outputs, inputs and weights of some rows; without weights, all count alike."""


@dataclass(frozen=True)
class OutputNonlinearity:
    """The elementwise function through which a layer acts on the rest of the network.

    Parameters
    ----------
    function : callable
        Maps outputs of shape (n_groups, n_rows, n_outputs), bias included.
    bias : ndarray of shape (n_groups, n_outputs)
    """

    function: Callable[[Array], Array]
    bias: Array

    def slopes(self, outputs: Array, steps: Array) -> Array:
        """Return the slope of the function at each output (without bias), 0 where it is not finite.

        ``steps``, of shape (n_groups, 1, n_outputs), are those of the finite differences.
        """
        z = outputs + self.bias[:, None, :]
        with np.errstate(invalid="ignore", over="ignore"):
            slope = (self.function(z + steps) - self.function(z - steps)) / (2 * steps)
        return np.where(np.isfinite(slope), slope, 0).astype(np.float32)


class Moments:
    """Streaming second moments of a layer's quantized inputs and float outputs.

    Two halves of the batches are kept separate.

    Parameters
    ----------
    weight : ndarray of shape (n_groups, n_outputs, n_terms)
        Maps float inputs to float outputs; without a bias.
    centred : bool
        True if a bias absorbs the means, so that errors of the means count nothing.
    nonlinearity : OutputNonlinearity, optional
        If given, rows are weighted, for each output, by the slope of its function: errors do not pass where
        it is flat. Since no two outputs then have the same moments, each becomes a group of its own.
    """

    def __init__(
        self, weight: Array, centred: bool = True, nonlinearity: OutputNonlinearity | None = None
    ) -> None:
        self._centred = centred
        self._nonlinearity = nonlinearity
        self._steps: Array | None = None
        self._steepest = 1.0
        self.apart = weight.shape[1] if nonlinearity is not None else 1
        """Outputs of each group that have separate moments."""
        self._turned = np.ascontiguousarray(weight.swapaxes(1, 2))
        self._batches = 0
        self._shifts: tuple[Array, Array] | None = None
        self._waiting: tuple[list[_Rows], list[_Rows]] = [], []
        self._halves: tuple[dict[str, Any], dict[str, Any]] = {}, {}

    def add(self, exact: Array, quantized: Array, weights: Array | None = None) -> None:
        """Add rows of inputs of both networks, of shape (n_groups, n_rows, n_terms), with row ``weights``."""
        outputs = np.matmul(exact, self._turned)
        if self._shifts is None:
            # Without a shift, sums of values whose mean is far from 0 would lose the variance in float32.
            shifts = outputs.mean(axis=1), quantized.mean(axis=1)
            self._shifts = shifts if self._centred else (np.zeros_like(shifts[0]), np.zeros_like(shifts[1]))
        shares = None if weights is None else weights[None, :, None]
        if self._nonlinearity is not None:
            seen = self._seen(self._nonlinearity, outputs)
            shares = seen if shares is None else shares * seen
        y, q = (
            x - shift[:, None, :] if self._centred else x
            for x, shift in zip((outputs, quantized), self._shifts, strict=True)
        )
        half = self._batches % 2
        self._waiting[half].append((y, q, shares))
        self._batches += 1
        if sum(q.size for _, q, _ in self._waiting[half]) >= _VALUES_AT_ONCE:
            self._settle(half)

    def _seen(self, nonlinearity: OutputNonlinearity, outputs: Array) -> Array:
        """Return the weight of errors of each output, of shape (n_groups, n_rows, n_outputs)."""
        if self._steps is None:
            # A single row has no standard deviation.
            steps = np.float32(_STEP) * (
                outputs.std(axis=1, keepdims=True) if outputs.shape[1] > 1 else np.abs(outputs)
            )
            largest = float(steps.max())
            self._steps = np.maximum(steps, _LEAST_STEP * largest) if largest > 0 else np.ones_like(steps)
            self._steepest = float(np.abs(nonlinearity.slopes(outputs, self._steps)).max()) or 1.0
        relative = nonlinearity.slopes(outputs, self._steps) / np.float32(self._steepest)
        return np.asarray((1 - _SEEN_SHARE) + np.float32(_SEEN_SHARE) * np.square(relative), np.float32)

    def _settle(self, half: int) -> None:
        """Add the waiting rows to the sums."""
        if not self._waiting[half]:
            return
        y, q, shares = _joined(self._waiting[half])
        self._waiting[half].clear()
        sums = _sums(y, q, shares) if self.apart == 1 or shares is None else _sums_apart(y, q, shares)
        known = self._halves[half]
        for name, value in sums.items():
            if name in known:
                known[name] += value
            else:
                known[name] = np.asarray(value, np.float64)

    @property
    def is_empty(self) -> bool:
        """Return True if no row was added."""
        return not self._batches

    @property
    def means(self) -> tuple[Float64, Float64]:
        """Return mean float outputs (n_groups, n_outputs) and mean quantized inputs (n_groups, n_terms)."""
        rows, y, q = (self._total(name) for name in ("rows", "y", "q"))
        shift_y, shift_q = self._shifts or (np.zeros_like(y), np.zeros_like(q))
        return y / rows + shift_y.reshape(y.shape), q / rows + np.repeat(
            shift_q, len(q) // len(shift_q), axis=0
        )

    def mean_error(self, rows: Array, outputs: slice = slice(None)) -> Array:
        """Return mean float outputs minus those of rounded weight rows, of shape (n_channels,).

        This is what the bias must absorb. ``rows`` are those of some ``outputs`` of each group.
        """
        wanted, inputs = self.means
        return np.asarray(
            (wanted[:, outputs] - np.einsum("gnt,gt->gn", rows, inputs)).reshape(-1), np.float32
        )

    @property
    def covariances(self) -> Covariances:
        """Return the covariances of all rows."""
        return self._covariances({name: self._total(name) for name in self._settled()[0]})

    @property
    def halves(self) -> tuple[Covariances, ...]:
        """Return the covariances of each half of the batches; empty if there is only one batch.

        If outputs have separate moments, those of a group get the mean of their A.
        """
        return (
            tuple(self._pooled(*self._covariances(sums)) for sums in self._settled())
            if self._batches > 1
            else ()
        )

    def _pooled(self, moment: Float64, cross: Float64, power: Float64) -> Covariances:
        if self.apart == 1:
            return moment, cross, power
        groups, terms = len(moment) // self.apart, moment.shape[1]
        own = moment.reshape(groups, self.apart, terms, terms).mean(axis=1)
        return own, cross.reshape(groups, self.apart, terms).swapaxes(1, 2), power.reshape(groups, self.apart)

    def _settled(self) -> tuple[dict[str, Any], dict[str, Any]]:
        for half in range(2):
            self._settle(half)
        return self._halves

    def _total(self, name: str) -> Any:
        first, second = self._settled()
        return first[name] + second.get(name, 0.0)

    def _covariances(self, sums: dict[str, Any]) -> Covariances:
        rows, share = sums["rows"], float(self._centred)
        y, q = share * sums["y"] / rows, share * sums["q"] / rows
        return (
            sums["qq"] / rows[:, :, None] - q[:, :, None] * q[:, None, :],
            sums["qy"] / rows[:, :, None] - q[:, :, None] * y[:, None, :],
            sums["yy"] / rows - np.square(y),
        )


def _joined(parts: Sequence[_Rows]) -> _Rows:
    """Return several parts as one; their shares are all None, or none is."""
    if len(parts) == 1:
        return parts[0]
    y, q = (np.concatenate([part[k] for part in parts], axis=1) for k in (0, 1))
    shares = [share for _, _, share in parts if share is not None]
    return y, q, np.concatenate(shares, axis=1) if shares else None


def _sums(y: Array, q: Array, shares: Array | None) -> dict[str, Any]:
    """Return sums over rows of products of outputs and inputs.

    Outputs have shape (n_groups, n_rows, n_outputs), inputs (n_groups, n_rows, n_terms). Each row is weighted
    by ``shares`` of shape (n_groups or 1, n_rows, 1); None weights all alike.
    """
    groups, rows, outputs = y.shape
    ones: Array = np.ones((groups, rows, 1), np.float32)
    beside = np.concatenate([y, ones], axis=2)
    if shares is None:
        roots, total = q, np.full((groups, 1), float(rows))
        power = np.einsum("grn,grn->gn", y, y)
        sums = y.sum(axis=1)
    else:
        share = shares.swapaxes(1, 2)
        roots, beside = q * np.sqrt(shares), beside * shares
        total = share.sum(axis=2, dtype=np.float64)
        power = np.matmul(share, np.square(y))[:, 0]
        sums = np.matmul(share, y)[:, 0]
    # The outputs and the number 1 are multiplied in one reading of the inputs.
    products = np.matmul(q.swapaxes(1, 2), beside)
    return {
        # numpy computes a product of a matrix with its own transpose at half the cost.
        "qq": np.matmul(roots.swapaxes(1, 2), roots),
        "qy": products[:, :, :outputs],
        "q": products[:, :, outputs].astype(np.float64),
        "yy": power.astype(np.float64),
        "y": sums.astype(np.float64),
        "rows": total,
    }


def _sums_apart(y: Array, q: Array, shares: Array) -> dict[str, Any]:
    """Return `_sums` of each output of each group with weights of its own, one after the other.

    The weights have the shape of the outputs.
    """
    groups, _, terms = q.shape
    outputs, weighted = y.shape[2], y * shares
    squares = np.empty((groups, outputs, terms, terms), np.float32)
    roots, scaled = np.sqrt(shares), np.empty_like(q)
    for k in range(outputs):
        np.multiply(q, roots[:, :, k : k + 1], out=scaled)
        np.matmul(scaled.swapaxes(1, 2), scaled, out=squares[:, k])
    # Products with outputs and weights are those of all outputs at once.
    turned = q.swapaxes(1, 2)
    qy, sums = (np.matmul(turned, side).swapaxes(1, 2) for side in (weighted, shares))
    every = groups * outputs
    return {
        "qq": squares.reshape(every, terms, terms),
        "qy": qy.reshape(every, terms, 1),
        "q": sums.reshape(every, terms).astype(np.float64),
        "yy": (weighted * y).sum(axis=1, dtype=np.float64).reshape(every, 1),
        "y": weighted.sum(axis=1, dtype=np.float64).reshape(every, 1),
        "rows": shares.sum(axis=1, dtype=np.float64).reshape(every, 1),
    }


def sampled_moments(
    form: LinearForm,
    moments: Moments,
    inputs: tuple[Sequence[NDArray[Any]], Sequence[NDArray[Any]]],
    wanted: int,
    rng: np.random.Generator,
    importance: Sequence[Array | None] | None = None,
) -> Moments:
    """Add about ``wanted`` random rows of a layer's inputs to the moments.

    Rows are taken at the same positions in both networks.

    Parameters
    ----------
    form : LinearForm
    moments : Moments
        Receives the rows.
    inputs : pair of sequences of ndarray
        The layer's input in the float and in the quantized network, batch by batch; some may be empty, not
        all.
    wanted : int
    rng : Generator
    importance : sequence of (ndarray of shape (n_positions,) or None), optional
        Weight of each position, batch by batch, about 1 on average; by default all are equal. Positions with
        a larger weight are drawn more often.
    """
    exact, quantized = inputs
    # Rows chosen by value may be missing altogether.
    some = [k for k, x in enumerate(exact) if x.size]
    exact, quantized = [exact[k] for k in some], [quantized[k] for k in some]
    importance = None if importance is None else [importance[k] for k in some]
    total = sum(form.positions(x.shape) for x in exact)

    def places() -> Iterator[tuple[NDArray[np.int64], Array | None]]:
        for k, x in enumerate(exact):
            available = form.positions(x.shape)
            share = min(1.0, wanted / max(total, 1))
            counts = importance[k] if importance is not None else None
            if counts is None:
                chosen = _some(available, share, rng)
                yield chosen, None if importance is None else np.ones(len(chosen), np.float32)
                continue
            goal = counts * share
            chance = np.minimum(goal, 1.0)
            chosen = np.flatnonzero(rng.random(available) < chance)
            if not len(chosen) and available:
                chosen = np.array([chance.argmax()])
            yield chosen, (goal[chosen] / chance[chosen]).astype(np.float32)

    def rows(
        batch: tuple[NDArray[Any], NDArray[Any], tuple[NDArray[np.int64], Array | None]],
    ) -> tuple[Array, Array, Array | None]:
        x_f, x_q, (chosen, weights) = batch
        return _finite_rows(
            form.input_rows(np.asarray(x_f, np.float32), chosen),
            form.input_rows(np.asarray(x_q, np.float32), chosen),
            weights,
        )

    for known in ordered_map(rows, zip(exact, quantized, places(), strict=True)):
        if known[0].shape[1]:
            moments.add(*known)
    return moments


def _some(available: int, share: float, rng: np.random.Generator) -> NDArray[np.int64]:
    """Return a share of positions, drawn at random, in order; at least one if there are any."""
    if share >= 1 or not available:
        return np.arange(available)
    count = max(1, int(rng.binomial(available, share)))
    return np.sort(rng.choice(available, count, replace=False, shuffle=False))


def _finite_rows(exact: Array, quantized: Array, weights: Array | None) -> tuple[Array, Array, Array | None]:
    """Return the rows (n_groups, n_rows, n_terms) that are finite in both networks."""
    if quant_math.all_finite(exact) and quant_math.all_finite(quantized):
        return exact, quantized, weights
    known = (np.isfinite(exact) & np.isfinite(quantized)).all(axis=(0, 2))
    return exact[:, known], quantized[:, known], None if weights is None else weights[known]
