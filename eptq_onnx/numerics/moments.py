"""Second moments of what a layer reads in both networks, from which its weights are corrected and rounded."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from eptq_onnx.numerics.linear import LinearForm
from eptq_onnx.numerics.types import Array, Float64
from eptq_onnx.parallel import ordered_map

_VALUES_AT_ONCE = 2**20
"""Of rows that are gathered before they are added to the second moments: large products are fast while they
stay in the cache."""

_SEEN_SHARE = 0.95
"""How much the slope of the function that reads an output decides what a row counts for it; the rest all have
in common."""

_STEP, _LEAST_STEP = 0.25, 1e-3
"""What errors these slopes are taken over, in units of each output's deviation: about those of 4 bits. Not
less than a thousandth of the largest."""

Covariances = tuple[Float64, Float64, Float64]
"""A = E[x_q x_qᵀ], C = E[x_q yᵀ] and V = E[y²], of shapes (n_groups, n_terms, n_terms), (n_groups, n_terms,
n_outputs) and (n_groups, n_outputs)."""

_Rows: TypeAlias = tuple[Array, Array, Array]
"""Outputs, inputs and shares of some rows."""


@dataclass(frozen=True)
class OutputNonlinearity:
    """The function of each output alone through which a layer acts on the rest of the network.

    Parameters
    ----------
    function : callable
        Of outputs of shape (n_groups, n_rows, n_outputs), bias included.
    bias : ndarray of shape (n_groups, n_outputs)
    """

    function: Callable[[Array], Array]
    bias: Array

    def slopes(self, outputs: Array, steps: Array) -> Array:
        """Of the function at each output (without bias), over steps of shape (n_groups, 1, n_outputs); 0
        where it has none."""
        z = outputs + self.bias[:, None, :]
        with np.errstate(invalid="ignore", over="ignore"):
            slope = (self.function(z + steps) - self.function(z - steps)) / (2 * steps)
        return np.where(np.isfinite(slope), slope, 0).astype(np.float32)


class Moments:
    """Streaming second moments of a layer's quantized inputs and float outputs, of two halves of the batches
    apart.

    Parameters
    ----------
    weight : ndarray of shape (n_groups, n_outputs, n_terms)
        Makes the float outputs of the float inputs; without a bias.
    centred : bool
        True if a bias takes up the means: errors in them then count nothing.
    reader : OutputNonlinearity, optional
        Rows then count, for each output, by how steep its function is there: errors where it is flat are not
        seen. As no two outputs have the same moments, each is a group of its own.
    """

    def __init__(self, weight: Array, centred: bool = True, reader: OutputNonlinearity | None = None) -> None:
        self._centred = centred
        self._reader = reader
        self._steps: Array | None = None
        self._steepest = 1.0
        self.apart = weight.shape[1] if reader is not None else 1
        """Outputs of each group that stand apart from each other."""
        self._turned = np.ascontiguousarray(weight.swapaxes(1, 2))
        self._batches = 0
        self._shifts: tuple[Array, Array] | None = None
        self._waiting: tuple[list[_Rows], list[_Rows]] = [], []
        self._halves: tuple[dict[str, Any], dict[str, Any]] = {}, {}

    def add(self, exact: Array, quantized: Array, weights: Array | None = None) -> None:
        """Take rows of inputs of both networks, of shape (n_groups, n_rows, n_terms); each counts ``weights``
        times."""
        outputs = np.matmul(exact, self._turned)
        if self._shifts is None:
            # Sums of values whose mean is far from 0 would lose the variance to float32.
            shifts = outputs.mean(axis=1), quantized.mean(axis=1)
            self._shifts = shifts if self._centred else (np.zeros_like(shifts[0]), np.zeros_like(shifts[1]))
        y, q = (x - shift[:, None, :] for x, shift in zip((outputs, quantized), self._shifts, strict=True))
        half = self._batches % 2
        shares = np.ones((1, q.shape[1], 1), np.float32) if weights is None else weights[None, :, None]
        self._waiting[half].append(
            (y, q, shares if self._reader is None else shares * self._seen(self._reader, outputs))
        )
        self._batches += 1
        if sum(q.size for _, q, _ in self._waiting[half]) >= _VALUES_AT_ONCE:
            self._settle(half)

    def _seen(self, reader: OutputNonlinearity, outputs: Array) -> Array:
        """How much errors of each output count; shape (n_groups, n_rows, n_outputs)."""
        if self._steps is None:
            # One row alone has no deviation.
            steps = np.float32(_STEP) * (
                outputs.std(axis=1, keepdims=True) if outputs.shape[1] > 1 else np.abs(outputs)
            )
            largest = float(steps.max())
            self._steps = np.maximum(steps, _LEAST_STEP * largest) if largest > 0 else np.ones_like(steps)
            self._steepest = float(np.abs(reader.slopes(outputs, self._steps)).max()) or 1.0
        relative = reader.slopes(outputs, self._steps) / np.float32(self._steepest)
        return np.asarray((1 - _SEEN_SHARE) + np.float32(_SEEN_SHARE) * np.square(relative), np.float32)

    def _settle(self, half: int) -> None:
        """Add the rows that wait to the sums."""
        if not self._waiting[half]:
            return
        y, q, shares = (np.concatenate(parts, axis=1) for parts in zip(*self._waiting[half], strict=True))
        self._waiting[half].clear()
        if self.apart == 1:
            sums = _sums(y, q, shares)
        else:
            each = [_sums(y[:, :, k : k + 1], q, shares[:, :, k : k + 1]) for k in range(self.apart)]
            sums = {
                name: np.stack([s[name] for s in each], axis=1).reshape(-1, *value.shape[1:])
                for name, value in each[0].items()
            }
        known = self._halves[half]
        for name, value in sums.items():
            if name in known:
                known[name] += value
            else:
                known[name] = np.asarray(value, np.float64)

    @property
    def is_empty(self) -> bool:
        """True if there was no row of numbers."""
        return not self._batches

    @property
    def means(self) -> tuple[Float64, Float64]:
        """Mean float outputs (n_groups, n_outputs) and mean quantized inputs (n_groups, n_terms)."""
        rows, y, q = (self._total(name) for name in ("rows", "y", "q"))
        shift_y, shift_q = self._shifts or (np.zeros_like(y), np.zeros_like(q))
        return y / rows + shift_y.reshape(y.shape), q / rows + np.repeat(
            shift_q, len(q) // len(shift_q), axis=0
        )

    def mean_error(self, rows: Array) -> Array:
        """Mean float outputs less those of a rounded weight of such rows: what the bias must take up; of
        shape (n_channels,)."""
        outputs, inputs = self.means
        return np.asarray((outputs - np.einsum("gnt,gt->gn", rows, inputs)).reshape(-1), np.float32)

    @property
    def covariances(self) -> Covariances:
        """Of all rows."""
        return self._covariances({name: self._total(name) for name in self._settled()[0]})

    @property
    def halves(self) -> tuple[Covariances, ...]:
        """Of each half of the batches; empty where there is one batch only.

        Where outputs stand apart, those of a group have the mean of their A.
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


def _sums(y: Array, q: Array, shares: Array) -> dict[str, Any]:
    """Sums over rows of products of outputs (n_groups, n_rows, n_outputs) and inputs (n_groups, n_rows,
    n_terms).

    Each row counts by ``shares`` of shape (n_groups or 1, n_rows, 1).
    """
    share = shares.swapaxes(1, 2)
    turned = q.swapaxes(1, 2) * share
    return {
        "qq": np.matmul(turned, q),
        "qy": np.matmul(turned, y),
        "yy": np.matmul(share, np.square(y))[:, 0].astype(np.float64),
        "q": turned.sum(axis=2, dtype=np.float64),
        "y": np.matmul(share, y)[:, 0].astype(np.float64),
        "rows": share.sum(axis=2, dtype=np.float64),
    }


def sampled_moments(
    form: LinearForm,
    moments: Moments,
    inputs: tuple[Sequence[NDArray[Any]], Sequence[NDArray[Any]]],
    wanted: int,
    rng: np.random.Generator,
    importance: Sequence[Array | None] | None = None,
) -> Moments:
    """Moments with about ``wanted`` random rows of a layer's inputs, of the same positions in both networks.

    Parameters
    ----------
    form : LinearForm
    moments : Moments
        What the rows are added to.
    inputs : pair of sequences of ndarray
        The layer's input in the float and in the quantized network, batch by batch; not all are empty.
    wanted : int
    rng : Generator
    importance : sequence of (ndarray of shape (n_positions,) or None), optional
        How much each position counts, batch by batch, about 1 on average; by default all count the same.
        Positions that count more are drawn more often.
    """
    exact, quantized = inputs
    # Of rows that are chosen by value there may be none.
    some = [k for k, x in enumerate(exact) if x.size]
    exact, quantized = [exact[k] for k in some], [quantized[k] for k in some]
    importance = None if importance is None else [importance[k] for k in some]
    total = sum(form.positions(x.shape) for x in exact)

    def places() -> Iterator[tuple[NDArray[np.int64], Array]]:
        for k, x in enumerate(exact):
            available = form.positions(x.shape)
            counts = importance[k] if importance is not None else None
            goal = (np.ones(available) if counts is None else counts) * min(1.0, wanted / max(total, 1))
            chance = np.minimum(goal, 1.0)
            chosen = np.flatnonzero(rng.random(available) < chance)
            if not len(chosen) and available:
                chosen = np.array([chance.argmax()])
            yield chosen, (goal[chosen] / chance[chosen]).astype(np.float32)

    def rows(
        batch: tuple[NDArray[Any], NDArray[Any], tuple[NDArray[np.int64], Array]],
    ) -> tuple[Array, Array, Array]:
        x_f, x_q, (chosen, weights) = batch
        return (
            form.input_rows(np.asarray(x_f, np.float32), chosen),
            form.input_rows(np.asarray(x_q, np.float32), chosen),
            weights,
        )

    for parts in ordered_map(rows, zip(exact, quantized, places(), strict=True)):
        known = _numbers(*parts)
        if known[0].shape[1]:
            moments.add(*known)
    return moments


def _numbers(exact: Array, quantized: Array, weights: Array) -> tuple[Array, Array, Array]:
    """The rows (n_groups, n_rows, n_terms) that are finite in both networks."""
    finite = np.isfinite(exact) & np.isfinite(quantized)
    if finite.all():
        return exact, quantized, weights
    known = finite.all(axis=(0, 2))
    return exact[:, known], quantized[:, known], weights[known]
